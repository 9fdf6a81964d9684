"""Training steps of Transformers models: stock, patched by llama_kernels, and patched by Liger."""
