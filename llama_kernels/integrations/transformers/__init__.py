"""The ops in Hugging Face models: `patch` a model, `unpatch` it, `report` what runs in it.

Importing this package registers attn_implementation="llama_kernels" for `from_pretrained` and
`set_attn_implementation`, which replaces attention only. `patch(model)` also replaces RMSNorm and RoPE.
docs/transformers.md lists the tested models.

The model's classes keep their own forwards. These files replace operations inside the forwards:

    attention.py    attention, through Transformers' AttentionInterface; attention_stock.py has the calls that stock
                    attention computes, attention_refusals.py those that raise
    modules.py      RMSNorm modules
    rotaries.py     the function apply_rotary_pos_emb
    fusions.py      residual add + norm, norms of q and k + RoPE, in forwards with the lines of the two
    known_code.py   the source texts of the functions that may be replaced; known_rotaries.py has those of RoPE
    masks.py        masks as ranges of keys; intervals.py reads the ranges from Transformers' mask functions,
                    packed_masks.py puts them into the tensor that every layer gets
    documents.py    where documents begin that are packed into one row
    shared_prompts.py  batches of completions that share a prompt
    patch.py        replaces them: places.py chooses, classes.py makes the classes, source.py copies functions
    report.py       what a call of each module would run now
"""

import importlib.util
import warnings

from llama_kernels.core.versions import untested

if importlib.util.find_spec("transformers") is None:
    raise ImportError("llama_kernels.integrations.transformers needs transformers: pip install 'transformers>=4.57'")

import transformers

if tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 57):
    raise ImportError(
        f"llama_kernels.integrations.transformers needs transformers 4.57 or newer; {transformers.__version__} is "
        "installed. Install a newer one: pip install 'transformers>=4.57'"
    )
if _warning := untested("transformers", transformers.__version__):
    warnings.warn(_warning, stacklevel=2)

from llama_kernels.integrations.transformers.attention import register
from llama_kernels.integrations.transformers.patch import patch, unpatch
from llama_kernels.integrations.transformers.report import report
from llama_kernels.integrations.transformers.shared_prompts import SharedPromptCollator, SharedPrompts, share_prompts

__all__ = ["SharedPromptCollator", "SharedPrompts", "patch", "report", "share_prompts", "unpatch"]

register()
