"""Training steps of Transformers models: stock, patched by llama_kernels, patched by Liger."""
