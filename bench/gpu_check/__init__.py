"""Every check that needs a GPU, in stages that can be resumed: `make gpu-check`. See docs/gpu_check.md."""
