"""Who is measured: llama_kernels, PyTorch and other libraries."""
