"""Cached launches: from the third call of one cache key on, a launch is what Triton would have bound, and nothing else.

tests/contracts/launcher compares what reaches the CUDA driver; here it is what reaches Triton's launcher."""

from __future__ import annotations

import gc
import weakref
from typing import Any
from unittest import mock

import pytest
import torch

from llama_kernels.core import launch_cache
from llama_kernels.core.language import triton
from llama_kernels.core.launch_cache import Launch, cached_launch
from llama_kernels.ops import qk_norm_rope, rms_norm, rope, rope_attention
from llama_kernels.ops.attention import backward, decode, forward
from llama_kernels.ops.attention.hopper import backward as hopper_backward
from llama_kernels.ops.attention.hopper import choice
from llama_kernels.ops.attention.hopper import forward as hopper_forward
from llama_kernels.ops.attention.layout import call_sizes
from llama_kernels.ops.pairs import rotation_of
from tests.support.environment import COMPILES
from tests.support.launching_nothing import _twice_kernel

pytestmark = COMPILES


def heads(H: int, S: int = 32, D: int = 64, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(2, S, H, D).to(dtype).transpose(1, 2)


def rotation() -> tuple[torch.Tensor, ...]:
    return torch.randn(32, 32), torch.randn(32, 32), torch.randint(32, (2, 32))


def _rope():
    return rope._rotated, (heads(4), heads(2), *rotation(), False, False)


def _rope_in_place():
    return rope._rotate_in_place, (heads(4), heads(2), *rotation(), False)


def _rope_qkv_backward():
    return rope._packed_backward, (heads(4), heads(2), heads(2), *rotation(), True)


def _rope_into_cache():
    slots = torch.arange(32)
    return rope._into_cache, (heads(4), heads(2), heads(2), heads(2, 48), heads(2, 48), slots, *rotation(), False)


def _qk_norm_rope():
    return qk_norm_rope._forward, (heads(4), heads(2), torch.ones(64), torch.ones(64), *rotation(), 1e-6, 0.0, False)


def _qk_norm_rope_backward():
    given = [heads(H) for H in (4, 2, 4, 2)]
    weights = torch.ones(64), torch.ones(64)
    return qk_norm_rope._backward, (*given, *weights, *rotation(), 1e-6, 0.0, False, True)


def _rms_norm():
    return rms_norm._forward, (torch.randn(6, 256), torch.randn(6, 256), torch.ones(256), 1e-6, 0.0)


def _rms_norm_backward(N: int = 256):
    dy, ds, x = (torch.randn(6, N) for _ in range(3))
    return rms_norm._backward, (dy, ds, x, torch.ones(N), torch.ones(6, 1), 1e-6, 0.0, torch.float32, True, True)


def _attention():
    return forward.launch_forward, (heads(4), heads(2), heads(2), *_CALL)


def _decode():
    return forward.launch_forward, (heads(4, 1), heads(2, 600), heads(2, 600), *_CALL[:5], 1, 600, *_CALL[7:])


def _masked_decode():
    key_mask, sinks, kv_end = torch.ones(2, 600, dtype=torch.bool), torch.zeros(4), torch.zeros(2, 1, dtype=torch.int32)
    numbers = (0.125, 5.0, None, None)
    return decode.launch_decode, (
        heads(4, 1), heads(2, 600), heads(2, 600), sinks, None, kv_end, *numbers, key_mask
    )  # fmt: skip


def _packed():
    cu_seqlens = torch.tensor([0, 20, 64], dtype=torch.int32)
    q, k, v = (heads(H).flatten(0, 1).reshape(64, H, 64) for H in (4, 2, 2))
    start = torch.zeros(64, dtype=torch.int32)
    return forward.launch_forward, (
        q, k, v, torch.zeros(4), start, None, cu_seqlens, cu_seqlens, 44, 44, 0.1, 30.0, 8, 0
    )  # fmt: skip


def _attention_backward():
    q, k, v, o = heads(4), heads(2), heads(2), heads(4)
    lse, needs = torch.zeros(2, 4, 32), (True, True, True, False)
    return backward.launch_backward, (heads(4), None, q, k, v, o, lse, *_CALL, *needs, False)


def _rope_attention_backward():
    q, k, v, o = heads(4), heads(2), heads(2), heads(4)
    rest = (torch.zeros(2, 4, 32), torch.zeros(4), None, None, *rotation(), True, 0.125, None, None, 0)
    return rope_attention.backward_kernels, (heads(4), None, q, k, v, o, *rest, True, True, True, True, False)


_CALL = (None, None, None, None, None, 32, 32, 0.125, None, None, 0)  # from the sinks on


def _hopper_attention():
    tile = choice.TILES["forward"][0]
    return hopper_forward.launch_hopper_forward, (tile, heads(4), heads(2), heads(2), None, None, None, *_CALL[5:])


def _hopper_attention_backward():
    q, k, v, do, dq, dk, dv = (heads(H) for H in (4, 2, 2, 4, 4, 2, 2))
    rows, dq_sum = torch.zeros(2, 4, 128), heads(4, dtype=torch.float32)
    sizes, turned = call_sizes(q, k, None, 32, 32), rotation_of(*rotation(), False)
    given = (q, k, v, rows, torch.zeros_like(rows), dq_sum, dq, dk, dv, None, None, sizes, 0.125, None, None, 0, 128)
    return hopper_backward.launch_hopper_backward, (choice.TILES["backward"][0], do, *given, turned)


LAUNCHERS = [
    _rope, _rope_in_place, _rope_qkv_backward, _rope_into_cache, _qk_norm_rope, _qk_norm_rope_backward, _rms_norm,
    _rms_norm_backward, _attention, _attention_backward, _rope_attention_backward, _decode, _masked_decode,
    _packed, _hopper_attention, _hopper_attention_backward,
]  # fmt: skip


def _alike(a: Any, b: Any, given: tuple[Any, ...]) -> bool:
    """One argument of two launches: the same tensor of the caller's, or new ones that look alike, or equal."""
    if hasattr(a, "extras"):  # what profilers are told
        a, b = a.data, b.data
    if hasattr(a, "block_shape"):  # a descriptor
        return _alike(a.base, b.base, given) and {**vars(a), "base": None} == {**vars(b), "base": None}
    if not isinstance(a, torch.Tensor):
        return a is b or (type(a) is type(b) and a == b)
    first, second = ((x.shape, x.stride(), x.dtype) for x in (a, b))
    return first == second and (a is b or not any(x is y for x in (a, b) for y in given))


@pytest.mark.parametrize("case", LAUNCHERS, ids=lambda case: case.__name__[1:])
def test_a_cached_launch_is_the_one_triton_makes(case, launched):
    launcher, _ = case()
    for _ in range(2):  # what comes once need not come again
        launcher(*case()[1])
    count = len(launched) // 2
    assert count
    given = case()[1]  # other tensors, the same cache key
    with mock.patch.object(triton.runtime.JITFunction, "run", side_effect=AssertionError("bound anew")):
        launcher(*given)
    launch_cache.forget()
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
        for case in (*LAUNCHERS, lambda: _rms_norm_backward(20000)):
            launcher, given = case()
            launcher(*given)
    modules = (rope, rms_norm, qk_norm_rope, forward, backward, decode, hopper_forward, hopper_backward)
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert kernels <= covered


def _twice_plan(x, y, scale):
    yield Launch(_twice_kernel, (1,), (x, y, x.stride(0), scale), {"BLOCK": 16, "num_warps": 1})


def _arguments(reached: tuple[Any, ...]) -> tuple[Any, ...]:
    return reached[9:]


@pytest.mark.parametrize("other", ["dtype", "stride", "alignment", "scale", "size"])
def test_another_cache_key_is_another_launch(other, launched):
    twice = cached_launch(_twice_plan)
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
    twice = cached_launch(_twice_plan)
    x, y = torch.zeros(16), torch.zeros(16)
    for a, b in ((x, x), (x, y), (y, y), (y, x)) * 3:
        twice(a, b, 1.0)
        got = _arguments(launched[-1])
        assert got[0] is a and got[1] is b


def test_a_plan_that_makes_tensors_is_not_cached(launched):
    def into_new(x, scale):
        yield from _twice_plan(x, torch.empty_like(x), scale)

    twice = cached_launch(into_new)
    x = torch.zeros(16)
    for _ in range(4):
        twice(x, 1.0)
    assert len({id(_arguments(reached)[1]) for reached in launched}) == 4


def test_tensors_are_not_kept_alive(launched):
    twice = cached_launch(_twice_plan)
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
        twice = cached_launch(_twice_plan)
        (kept,) = launch_cache._caches
        for scale in range(8):
            for _ in range(2):
                twice(torch.zeros(16), torch.zeros(16), float(scale))
            assert 1 <= len(kept) <= 3
