"""The providers that are measured: llama_kernels, PyTorch and other libraries."""
