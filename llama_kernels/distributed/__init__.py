"""Attention over sequences that are divided among processes, on torch.distributed and DeviceMesh.

layout.py says which tokens each process holds, attention.py has the public `cp_attention`. The methods are in ring.py
(blocks of keys travel around a ring), all_gather.py (each process gets all keys) and ulysses.py (each process gets all
tokens of some heads). blocks.py says which keys a row sees in a block, and calls the attention ops on it; transport.py
sends tensors.
"""

from llama_kernels.distributed.attention import cp_attention
from llama_kernels.distributed.layout import Layout, shard, unshard

__all__ = ["Layout", "cp_attention", "shard", "unshard"]
