"""Measuring: clocks, CUDA graph capture, failures of providers, child processes and records."""
