"""The package `kernels` of Hugging Face loads this repository, and `kernelize` puts our layers into a model.

`make test` installs it into build/kernels, since Transformers behaves differently where it is installed.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from llama_kernels import layers  # noqa: E402
from tests.integrations.small import VERSION  # noqa: E402
from tests.support.processes import ROOT, output_of  # noqa: E402

pytestmark = pytest.mark.once

ASIDE = ROOT / "build/kernels"
SCRIPT = """
import sys
from pathlib import Path
import torch
import kernels
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

# What Transformers does itself with the releases of kernels that it takes.
if not hasattr(modeling_llama.LlamaRMSNorm, "kernel_layer_name"):
    kernels.replace_kernel_forward_from_hub(modeling_llama.LlamaRMSNorm, "RMSNorm")
    rotary = kernels.use_kernel_forward_from_hub("rotary_pos_emb")(modeling_llama.apply_rotary_pos_emb)
    modeling_llama.apply_rotary_pos_emb = rotary
    kernels.use_kernelized_func(rotary)(modeling_llama.LlamaAttention)

root = Path(sys.argv[1])
package = kernels.get_local_kernel(root)
assert Path(package.__file__) == root / "llama_kernels/__init__.py"
assert package.attention.__module__ == "llama_kernels.ops.attention"

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, rms_norm_eps=1e-2))
for parameter in model.parameters():
    parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
ids = torch.randint(99, (2, 20))


def run():
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), model.get_input_embeddings().weight.grad


stock = run()
layers = {"RMSNorm": "RMSNorm", "rotary_pos_emb": "ApplyRotaryPosEmb"}
mapping = {name: {"cpu": kernels.LocalLayerRepository(root, layer_name=layer)} for name, layer in layers.items()}
with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
    kernels.kernelize(model, mode=kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE, device="cpu")
with torch.profiler.profile() as profile:
    ours = run()
torch.testing.assert_close(ours, stock)
calls = {event.key: event.count for event in profile.key_averages()}
print(*(calls.get(f"llama_kernels::{op}", 0) for op in ("rms_norm_forward", "rms_norm_backward", "rope")))
"""


@pytest.mark.skipif(not (ROOT / "metadata.json").is_file(), reason="metadata.json is not part of this copy")
@pytest.mark.skipif(VERSION < (5, 13), reason="with this release of kernels, Transformers before 5.13 does not import")
@pytest.mark.skipif(not (ASIDE.is_dir() or importlib.util.find_spec("kernels")), reason="needs kernels")
def test_kernelize_puts_our_layers_into_a_model(tmp_path):
    """5 norms; RoPE of 2 layers, forward and backward. The package is loaded by its path, and is on no other path."""
    env = {"PYTHONPATH": str(ASIDE), "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    assert output_of("-c", SCRIPT, str(ROOT), cwd=tmp_path, **env).split() == ["5", "5", "4"]


@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
@pytest.mark.parametrize("model", ["llama", "gpt_oss"])
def test_the_rotary_layer_computes_what_stock_does(model, unsqueeze_dim):
    """GPT-OSS gives an angle for each pair of elements, Llama one for each element."""
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    q, k = (torch.randn(2, heads, 5, 16) for heads in (4, 2))
    if unsqueeze_dim == 2:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    angles = torch.randn(2, 5, 8)
    angles = angles if model == "gpt_oss" else torch.cat((angles, angles), -1)
    call = (q, k, angles.cos(), angles.sin())
    ours = layers.ApplyRotaryPosEmb()(*call, unsqueeze_dim=unsqueeze_dim)
    torch.testing.assert_close(ours, module.apply_rotary_pos_emb(*call, unsqueeze_dim=unsqueeze_dim))


# Their functions have the name and the arguments of the others, but rotate neighbouring elements, or the other way.
OTHER_ROTATION = {"openai_privacy_filter", "nanochat"} if VERSION < (5, 24) else {"openai_privacy_filter"}


def test_the_rotary_layer_computes_what_stock_does_in_every_model_that_names_it():
    """kernelize replaces functions by their name. The docs list the models in which ours must not replace them."""
    name = re.compile(r'@use_kernel_(?:forward|func)_from_hub\("rotary_pos_emb"\)\ndef (\w+)')
    layer, differ, compared = layers.ApplyRotaryPosEmb(), set(), set()
    q, k = (torch.randn(2, heads, 5, 16) for heads in (4, 2))
    angles = torch.randn(2, 5, 8)
    calls = [(q, k, x.cos(), x.sin()) for x in (angles, torch.cat((angles, angles), -1))]
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        for function in name.findall(path.read_text()):
            stock = getattr(importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}"), function)
            for call in calls:
                try:
                    expected = stock(*call)
                except RuntimeError:  # its tables have the other width
                    continue
                compared.add(path.parent.name)
                if not all(torch.allclose(a, b, atol=1e-5) for a, b in zip(layer(*call), expected, strict=True)):
                    differ.add(path.parent.name)
    assert len(compared) >= 20
    assert differ == OTHER_ROTATION & compared
    documented = (ROOT / "docs/transformers.md").read_text()
    assert all(f"`{model}`" in documented for model in OTHER_ROTATION)
