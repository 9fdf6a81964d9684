"""What every op shares: the language of the kernels, the device, tensors, op registration, checks, the launch cache."""
