"""Everything that one GPU can say, in stages that can be resumed: `make gpu-check`. See docs/gpu_check.md."""
