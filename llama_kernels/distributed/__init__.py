"""Attention over sequences that are divided among processes, and DTensor, on torch.distributed and DeviceMesh.

layout.py says which tokens each process holds, balance.py which give equal work, attention.py has the public
`cp_attention`. The methods are in ring.py (blocks of keys travel around a ring), all_gather.py (each process gets all
keys) and ulysses.py (each process gets all tokens of some heads). blocks.py says which keys a row sees in a block, and
calls the attention ops on it; transport.py sends tensors. models.py has the context manager for Hugging Face models.
The sharding rules of the ops for DTensor are in core/sharding.py, since the first DTensor that an op gets registers
them.
"""

from llama_kernels.core.sharding import register_dtensor_rules
from llama_kernels.distributed.attention import cp_attention
from llama_kernels.distributed.balance import balanced_layout
from llama_kernels.distributed.layout import Layout, shard, unshard
from llama_kernels.distributed.models import context_parallel

__all__ = [
    "Layout", "balanced_layout", "context_parallel", "cp_attention", "register_dtensor_rules", "shard", "unshard",
]  # fmt: skip
