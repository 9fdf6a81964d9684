"""Hugging Face models on our operations: `patch` one model, `unpatch` it, `report` what runs in it.

Importing this registers attn_implementation="llama_kernels", for `from_pretrained` and `set_attn_implementation`: then
attention alone is ours. `patch(model)` also replaces RMSNorm and RoPE. docs/transformers.md has what is served.

The forwards of the model's own classes run. What changes inside them:

    attention.py    attention, through Transformers' AttentionInterface
    modules.py      RMSNorm modules, and the function apply_rotary_pos_emb
    fusions.py      residual add + norm, head norms + RoPE: a few lines of a forward whose whole text is known
    known_code.py   the texts of the functions that may be replaced; known_rotaries.py has those of RoPE
    masks.py        masks as ranges of keys; intervals.py reads them from Transformers' mask functions
    patch.py        which module gets what; classes.py makes its class, source.py reads and copies functions
"""

import importlib.util
import warnings

from llama_kernels.core.versions import untested

if importlib.util.find_spec("transformers") is None:
    raise ImportError("llama_kernels.integrations.transformers needs transformers: pip install 'transformers>=4.57'")

import transformers

if tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 57):
    raise ImportError(
        f"llama_kernels.integrations.transformers needs transformers 4.57; this is {transformers.__version__}"
    )
if _said := untested("transformers", transformers.__version__):
    warnings.warn(_said, stacklevel=2)

from llama_kernels.integrations.transformers.attention import register
from llama_kernels.integrations.transformers.patch import patch, report, unpatch

__all__ = ["patch", "report", "unpatch"]

register()
