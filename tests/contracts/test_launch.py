"""Cached launches: from the third call of a cache key on, a launch is the one that Triton would have bound.

These tests compare what reaches Triton's launcher. tests/contracts/launcher compares what reaches the CUDA driver.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from bench.attention_options import attention_options
from llama_kernels.core import launch_cache
from llama_kernels.core.language import triton
from llama_kernels.core.launch_cache import Launch, cached_launch
from llama_kernels.core.registry import KERNELS
from llama_kernels.ops.attention.call import AttentionCall, Grads, RowInputs, empty_outputs
from llama_kernels.ops.attention.hopper import backward as hopper_backward
from llama_kernels.ops.attention.hopper import forward as hopper_forward
from llama_kernels.ops.attention.hopper.tables import TILES
from llama_kernels.ops.rotation import Rotation
from tests.support.environment import COMPILES
from tests.support.launching_nothing import _twice_kernel, kernels
from tests.support.ops import REGISTERED, Make, Shape, registered_calls

pytestmark = COMPILES


def heads(H: int, S: int = 32, D: int = 64, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(2, S, H, D).to(dtype).transpose(1, 2)


def rotation() -> tuple[torch.Tensor, ...]:
    return torch.randn(32, 32), torch.randn(32, 32), torch.randint(32, (2, 32))


SHAPE = Shape(S=32, D=64, N=256)


def _registered(label: str, shape: Shape = SHAPE) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The launcher of a registered op, and arguments of it."""
    op, args = registered_calls(shape, Make(dtype=torch.bfloat16))[label]
    return KERNELS[op], args


_CALL = attention_options(32, 32, 0.125)  # from the sinks on


def _hopper_attention():
    def launch(*call):
        call = AttentionCall(*call)
        return hopper_forward.launch_hopper_forward(call, TILES["forward"][0], *empty_outputs(call), None)

    return launch, (heads(4), heads(2), heads(2), *_CALL)


def _hopper_attention_backward():
    q, k, v, do, dq, dk, dv = (heads(H) for H in (4, 2, 2, 4, 4, 2, 2))
    rows, dq_sum = torch.zeros(2, 4, 128), heads(4, dtype=torch.float32)

    def launch(q, k, v, do, lse2, delta, dq_sum, dq, dk, dv, *tables):
        call, rotation = AttentionCall(q, k, v, *_CALL), Rotation(*tables, False)
        rows, grads = RowInputs(do, lse2, delta), Grads(dq, dk, dv)
        hopper_backward.launch_hopper_backward(call, TILES["backward"][0], rows, dq_sum, grads, rotation, None)

    return launch, (q, k, v, do, rows, torch.zeros_like(rows), dq_sum, dq, dk, dv, *rotation())


LAUNCHERS: dict[str, Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]] = {
    **{label: functools.partial(_registered, label) for label in REGISTERED},
    "hopper attention": _hopper_attention,
    "hopper attention backward": _hopper_attention_backward,
}


def _alike(a: Any, b: Any, given: tuple[Any, ...]) -> bool:
    """Whether two launches have the same argument: a tensor of the caller, new ones of one layout, or equal values."""
    if hasattr(a, "extras"):  # what profilers are told
        a, b = a.data, b.data
    if hasattr(a, "block_shape"):  # a descriptor
        return _alike(a.base, b.base, given) and {**vars(a), "base": None} == {**vars(b), "base": None}
    if not isinstance(a, torch.Tensor):
        return a is b or (type(a) is type(b) and a == b)
    first, second = ((x.shape, x.stride(), x.dtype) for x in (a, b))
    return first == second and (a is b or not any(x is y for x in (a, b) for y in given))


@pytest.mark.parametrize("label", LAUNCHERS)
def test_a_cached_launch_is_the_one_triton_makes(label, launched):
    case = LAUNCHERS[label]
    launcher, _ = case()
    for _ in range(2):  # a key is cached at its second call
        launcher(*case()[1])
    count = len(launched) // 2
    assert count
    given = case()[1]  # other tensors, the same cache key
    with mock.patch.object(triton.runtime.JITFunction, "run", side_effect=AssertionError("bound anew")):
        launcher(*given)
    launch_cache.clear()
    launcher(*given)
    assert len(launched) == 4 * count
    for ours, tritons in zip(launched[2 * count : 3 * count], launched[3 * count :], strict=True):
        assert len(ours) == len(tritons)
        assert [i for i, pair in enumerate(zip(ours, tritons, strict=True)) if not _alike(*pair, given)] == []


def test_every_launcher_is_compared_with_triton():
    covered = set()

    def note(self: Any, *_: Any, **__: Any) -> None:
        covered.add(self.__name__)

    with mock.patch.object(triton.runtime.JITFunction, "run", note):
        for case in (*LAUNCHERS.values(), lambda: _registered("rms_norm backward", SHAPE._replace(N=20000))):
            launcher, given = case()
            launcher(*given)
    missing = {kernel.__name__ for kernel in kernels()} - covered
    assert not missing, "registered_calls of tests/support/ops.py needs calls that launch these kernels"


def _twice(x, y, scale):
    return [Launch(_twice_kernel, (1,), (x, y, x.stride(0), scale), {"BLOCK": 16, "num_warps": 1})]


def _arguments(reached: tuple[Any, ...]) -> tuple[Any, ...]:
    return reached[9:]


@pytest.mark.parametrize("other", ["dtype", "stride", "alignment", "scale", "size"])
def test_another_cache_key_is_another_launch(other, launched):
    twice = cached_launch(_twice)
    for _ in range(2):
        twice(torch.zeros(64), torch.zeros(64), 1.0)
    x = {
        "dtype": torch.zeros(64, dtype=torch.float16), "stride": torch.zeros(64, 2)[:, 0],
        "alignment": torch.zeros(65)[1:], "size": torch.zeros(32),
    }.get(other, torch.zeros(64))  # fmt: skip
    with mock.patch.object(triton.runtime.JITFunction, "run", side_effect=AssertionError("bound anew")):
        twice(torch.zeros(64), torch.zeros(64), 1.0)
        with pytest.raises(AssertionError, match="bound anew"):
            twice(x, torch.zeros(64), 2.0 if other == "scale" else 1.0)


def test_one_tensor_in_two_places_is_not_two_tensors(launched):
    twice = cached_launch(_twice)
    x, y = torch.zeros(16), torch.zeros(16)
    for a, b in ((x, x), (x, y), (y, y), (y, x)) * 3:
        twice(a, b, 1.0)
        got = _arguments(launched[-1])
        assert got[0] is a and got[1] is b


def test_launches_of_tensors_that_the_launcher_makes_are_not_cached(launched):
    def into_new(x, scale):
        return _twice(x, torch.empty_like(x), scale)

    twice = cached_launch(into_new)
    x = torch.zeros(16)
    for _ in range(4):
        twice(x, 1.0)
    assert len({id(_arguments(reached)[1]) for reached in launched}) == 4


def test_tensors_are_not_kept_alive(launched):
    twice = cached_launch(_twice)
    x = torch.zeros(16)
    gone = weakref.ref(x)
    for _ in range(3):
        twice(x, torch.zeros(16), 1.0)
    launched.clear()
    del x
    gc.collect()
    assert gone() is None


def test_the_cache_is_bounded(launched):
    with mock.patch.object(launch_cache, "MAX_KEYS", 3), mock.patch.object(launch_cache, "_caches", []):
        twice = cached_launch(_twice)
        (kept,) = launch_cache._caches
        for scale in range(8):
            for _ in range(2):
                twice(torch.zeros(16), torch.zeros(16), float(scale))
            assert 1 <= len(kept) <= 3
