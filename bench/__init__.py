"""Measurements and machine-code reports. Not installed: run from a checkout, as `python -m bench.codegen`."""
