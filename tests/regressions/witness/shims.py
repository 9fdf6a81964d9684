"""What the witnesses of other projects' suites share: their checkout, their device, their modules, their parameters.

SUITE is a checkout of the project. Its tests are loaded from there and judge by their own criteria; the modules they
import are stood in for by thin ones over our ops. They hard-code "cuda": without a GPU that is read as "cpu", and of
each test's parameter sets those that a CPU can do are kept, of these CASES at random (the same in every run): 48, in
Triton's interpreter 2. With a GPU nothing is read otherwise, and all sets run unless CASES says how many.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.machinery
import importlib.util
import itertools
import os
import random
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

import llama_kernels as lk
from llama_kernels.core.language import INTERPRETED

GPU = torch.cuda.is_available()
_CASES = int(os.environ.get("CASES") or (0 if GPU else 2 if INTERPRETED else 48))  # 0: all


def checkout(project: str) -> Path:
    if "SUITE" not in os.environ:
        pytest.exit(f"SUITE: wanted the folder of a checkout of {project}", returncode=2)
    return Path(os.environ["SUITE"]).resolve()


# --- their device ----------------------------------------------------------------------------------------------------


class _CpuForCuda(TorchFunctionMode):
    """Whatever asks for "cuda", a factory or a .to(), gets the CPU."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        return func(*map(_cpu_for_cuda, args), **{name: _cpu_for_cuda(x) for name, x in (kwargs or {}).items()})


def _cpu_for_cuda(x: Any) -> Any:
    return "cpu" if isinstance(x, (str, torch.device)) and str(x).partition(":")[0] == "cuda" else x


@contextlib.contextmanager
def suite_device() -> Iterator[None]:
    """Where there is no GPU, the CPU under its name; with one, nothing."""
    if GPU:
        yield
        return
    # So little memory that what a suite calls too large for small GPUs is skipped by the suite itself.
    properties = types.SimpleNamespace(total_memory=16 * 2**30, multi_processor_count=2, warp_size=32)
    with pytest.MonkeyPatch.context() as patch, _CpuForCuda():
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        patch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        yield


@pytest.fixture(autouse=True)
def on_suite_device() -> Iterator[None]:
    """An adapter imports this, and its tests run so."""
    with suite_device():
        yield


# --- their modules ---------------------------------------------------------------------------------------------------


def stub(name: str, *, path: Path | None = None, **names: Any) -> types.ModuleType:
    """A module `name` that holds `names`, found before an installed one; its submodules lie in `path`, if anywhere."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)  # find_spec(name) asks for it
    if path is not None:
        module.__path__ = [str(path)]
    vars(module).update(names)
    sys.modules[name] = module
    return module


def load(path: Path, name: str) -> types.ModuleType:
    """The suite's file at `path` as module `name`, read on the suite's device."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with suite_device(), warnings.catch_warnings():
        warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)  # marks of plugins that are not installed
        spec.loader.exec_module(module)
    return module


def functions_of(path: Path, *names: str, **scope: Any) -> dict[str, Callable]:
    """These functions of the suite's file at `path`, of which nothing else is run: the rest wants CUDA at import."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    scope = {"torch": torch, **scope}
    exec(compile(tree, str(path), "exec"), scope)
    return {name: scope[name] for name in names}


def lacking(**options: bool) -> None:
    """Skips a test that uses an option which our ops do not have."""
    for option, used in options.items():
        if used:
            pytest.skip(f"llama_kernels has no {option.replace('_', ' ')}")


# --- their parameters ------------------------------------------------------------------------------------------------


def pick(test: Callable, fits: Callable[..., bool] = lambda **parameters: True) -> Callable:
    """`test` with at most CASES of its parameter sets; without a GPU of those that `fits`, which is given them by name.

    The marks' product becomes one mark, so that a few sets can be spread over all of it.
    """
    axes = [mark for mark in test.pytestmark if mark.name == "parametrize"]
    names = [name.strip() for mark in axes for name in _names(mark)]
    sets = []
    for choice in itertools.product(*([_as_set(value, mark) for value in mark.args[1]] for mark in axes)):
        values = [value for part in choice for value in part.values]
        if GPU or fits(**dict(zip(names, values, strict=True))):
            marks = [mark for part in choice for mark in part.marks]
            sets.append(pytest.param(*values, marks=marks, id="-".join(map(_label, values))))
    if not sets:
        raise ValueError(f"{test.__name__}: none of its parameter sets fits")
    if 0 < _CASES < len(sets):
        sets = random.Random(test.__name__).sample(sets, _CASES)
    others = [mark for mark in test.pytestmark if mark.name != "parametrize"]
    test.pytestmark = [*others, pytest.mark.parametrize(names, sets).mark]
    return test


def _names(mark: pytest.Mark) -> list[str]:
    return mark.args[0].split(",") if isinstance(mark.args[0], str) else list(mark.args[0])


def _as_set(value: Any, mark: pytest.Mark) -> Any:
    if isinstance(value, type(pytest.param())):
        return value
    return pytest.param(value) if len(_names(mark)) == 1 else pytest.param(*value)


def _label(value: Any) -> str:
    return getattr(value, "__name__", str(value)).removeprefix("torch.")


# --- RoPE as flash-attn and quack have it ----------------------------------------------------------------------------


def apply_rotary_emb(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | torch.Tensor | None = 0,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> torch.Tensor:
    """x is (B, S, H, D), or packed (T, H, D) with cu_seqlens; a sequence starts at its offset into the tables."""
    x = _writable(x) if inplace else x
    cos, sin, positions = _rows(x, cos, sin, seqlen_offsets, cu_seqlens)
    heads_first = x if cu_seqlens is not None else x.transpose(1, 2)
    out, _ = lk.rope(heads_first, None, cos, sin, positions, interleaved=interleaved, inplace=inplace)
    if inplace:
        return x
    return out if cu_seqlens is not None else out.transpose(1, 2)


def apply_rotary_emb_qkv_(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
    seqlen_offsets: int | torch.Tensor | None = 0,
    num_heads_q: int | None = None,
) -> torch.Tensor:
    """In place: the q and k of (B, S, 3, H, D), or of (B, S, Hq + 2 Hkv, D)."""
    qkv = _writable(qkv)
    if qkv.ndim == 5:
        q, k = qkv[:, :, 0], qkv[:, :, 1]
    else:
        num_heads_k = (qkv.shape[2] - num_heads_q) // 2
        q, k = qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : num_heads_q + num_heads_k]
    cos, sin, positions = _rows(q, cos, sin, seqlen_offsets, None)
    lk.rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin, positions, interleaved=interleaved, inplace=True)
    return qkv


def apply_rotary_emb_kv_(
    kv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    seqlen_offsets: int | torch.Tensor | None = 0,
) -> torch.Tensor:
    """In place: the k of (B, S, 2, H, D)."""
    kv = _writable(kv)
    apply_rotary_emb(kv[:, :, 0], cos, sin, interleaved, True, seqlen_offsets)
    return kv


def refused_in_place(x: torch.Tensor) -> bool:
    """A leaf that requires grad, or a view of one. Others rotate it in place behind autograd's back; ours does not."""
    base = x if x._base is None else x._base
    return base.requires_grad and base.is_leaf and torch.is_grad_enabled()


def _writable(x: torch.Tensor) -> torch.Tensor:
    return x.clone() if refused_in_place(x) else x


def _rows(x, cos, sin, offsets, cu_seqlens):
    """The tables, and which of their rows each token has; None is one after another."""
    if cu_seqlens is None and not isinstance(offsets, torch.Tensor):
        return cos[offsets or 0 :], sin[offsets or 0 :], None
    if cu_seqlens is None:
        return cos, sin, offsets[:, None] + torch.arange(x.shape[1], device=x.device)
    token = torch.arange(x.shape[0], device=x.device)
    sequence = torch.bucketize(token, cu_seqlens[1:], right=True)
    starts = offsets[sequence] if isinstance(offsets, torch.Tensor) else offsets or 0
    return cos, sin, token - cu_seqlens[sequence] + starts
