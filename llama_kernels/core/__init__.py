"""What every op shares. Of the rest of the package it imports the reference alone, for the names of its ops.

The files:

    language.py            the import of Triton, and the device functions that all kernels share
    device.py              GPU families, SMs, shared memory; launches on the device of a tensor
    tensors.py             shapes, strides and allocation
    checks.py              argument checks and their error messages, `checked`
    registry.py            registration of ops with torch.library
    autograd.py            the base class of the ops' autograd.Functions, and derivatives that are refused
    overlap.py             whether tensors that are written in place share memory
    second_derivatives.py  derivatives of gradients and tangents, in plain PyTorch
    launch_cache.py        reuse of launches that Triton bound
    kernel_hashes.py       keys in Triton's cache on disk that do not depend on the order of launches
    dtensors.py            calls of the ops on DTensors; sharding.py has the sharding rules
    versions.py            the releases of torch, Triton and Transformers that are supported
"""
