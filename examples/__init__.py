"""Scripts to run and to copy from."""
