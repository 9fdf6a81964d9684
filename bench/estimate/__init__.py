"""Estimates of speed without a GPU."""
