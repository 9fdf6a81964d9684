"""The source of a function counts only if the file still has the code that runs."""

from __future__ import annotations

import importlib
import inspect
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers.models.llama import modeling_llama

from llama_kernels.integrations.transformers import definitions, patch, report, source
from tests.integrations.comparison import compare_with_stock, logits_and_gradients
from tests.integrations.small import not_interpreted, small, tokens
from tests.integrations.user_classes import class_in, with_class

pytestmark = not_interpreted

NORM = """import torch
from {module} import LlamaRMSNorm


class OwnRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)
""".replace("{module}", modeling_llama.__name__)


# --- patch -----------------------------------------------------------------------------------------------------------


def with_norm(before: str, after: str, folder: Path) -> Any:
    """A model whose last norm is of a file that was imported with the text `before`, and then changed to `after`."""
    file = folder / "norm.py"
    file.write_text(before)
    cls = class_in(file, "OwnRMSNorm")
    file.write_text(after)
    return with_class(small(), "model.norm", cls)


def test_a_norm_in_a_file_of_the_user_is_known_by_its_text(tmp_path):
    assert all(row.ours for row in report(patch(with_norm(NORM, NORM, tmp_path))).rows)


@pytest.mark.parametrize("lines", ["\n\n", "def helper(x):\n    return x\n\n\n"])
def test_a_norm_that_moved_within_its_file_is_known(lines, tmp_path):
    moved = NORM.replace("class Own", f"{lines}class Own")
    for before, after in ((moved, NORM), (NORM, moved)):
        assert all(row.ours for row in report(patch(with_norm(before, after, tmp_path))).rows)


@pytest.mark.parametrize(
    "before",
    [
        NORM.replace("pow(2)", "abs()"),
        NORM.replace("pow(2)", "pow(4)"),
        NORM.replace("variance + self", "variance - self"),
        NORM.replace("self.weight *", "self.weight.exp() *"),
        NORM.replace("keepdim=True)", "keepdim=True)  # variance", 1).replace("pow(2)", "pow(2.0)"),
    ],
)
def test_a_norm_of_a_file_that_changed_after_its_import_stays_stock(before, tmp_path):
    """The file now has the code of a norm that we know. The class still has the other code."""
    stock, ours = (with_norm(before, NORM, tmp_path) for _ in range(2))
    (row,) = (row for row in report(patch(ours)).rows if row.cls == "OwnRMSNorm")
    assert not row.ours and row.why == "its forward is not known code"
    compare_with_stock(ours, stock, logits_and_gradients(tokens()))


def test_our_attention_by_name_refuses_a_forward_whose_file_changed(tmp_path):
    """It cannot know whether the forward passes its mask on unchanged."""
    base, file = modeling_llama.LlamaAttention, tmp_path / "attention.py"
    imports = f"from {base.__module__} import *\nfrom {base.__module__} import ALL_ATTENTION_FUNCTIONS, Callable, "
    imports += "LlamaAttention, apply_rotary_pos_emb, eager_attention_forward, torch\n"
    forward = inspect.getsource(inspect.unwrap(base.forward))
    text = f"{imports}\nclass Own(LlamaAttention):\n{forward[forward.index('    def forward') :]}"

    def with_attention(before: str) -> Any:
        file.write_text(f"from __future__ import annotations\n{before}")
        model = with_class(small(), "model.layers.0.self_attn", class_in(file, "Own"))
        file.write_text(f"from __future__ import annotations\n{text}")
        model.set_attn_implementation("llama_kernels")
        return model

    with_attention(text)(tokens())
    with pytest.raises(ValueError, match="the source of its forward is missing, or has changed since the import"):
        with_attention(text.replace("self.o_proj(", "2 * self.o_proj("))(tokens())


# --- texts of functions ----------------------------------------------------------------------------------------------


def functions_of(module: types.ModuleType) -> Iterator[types.FunctionType]:
    """The functions of a module and the methods of its classes, as the file defines them."""
    classes = [x for x in vars(module).values() if isinstance(x, type) and x.__module__ == module.__name__]
    for x in (*vars(module).values(), *(x for cls in classes for x in vars(cls).values())):
        plain = isinstance(x, types.FunctionType) and not hasattr(x, "__wrapped__") and x.__name__ != "<lambda>"
        if plain and x.__code__.co_filename == module.__file__:
            yield x


@pytest.mark.parametrize("name", ["ast", "functools", "inspect", "json.decoder", "logging", "random", "unittest.case"])
def test_every_function_of_an_unchanged_file_has_its_definition(name):
    """With decorators, docstrings, closures, super(), defaults and functions inside them."""
    found = [*functions_of(importlib.import_module(name))]
    assert len(found) > 5
    for function in found:
        assert definitions.definition_of(function) is not None, function.__qualname__


FUNCTION = """def rotate(q, factor=1, *, sign=-1, name="rope", table=TABLE):
    return q * factor * sign
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [("factor=1", "factor=2"), ("factor=1", "factor=1.0"), ("sign=-1", "sign=1"), ('"rope"', '"rotary"')],
)
def test_a_default_that_changed_in_the_file_is_not_that_of_the_function(old, new, tmp_path):
    text, file = f"TABLE = (1, 2)\n{FUNCTION}", tmp_path / "rotary.py"
    file.write_text(text)
    function = class_in(file, "rotate")
    assert source.text_of(function) == source.normalised(FUNCTION)
    file.write_text(text.replace(old, new))
    other = class_in(file, "rotate")
    file.write_text(text)
    assert source.text_of(other) == ""
