"""`make gpu-check`: every check that needs a GPU, in stages that can be resumed. See docs/gpu_check.md."""
