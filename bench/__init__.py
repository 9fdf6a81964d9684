"""Measurements and reports of machine code. Not installed: run from a checkout, for example `python -m bench`."""
