"""The memory of a training step: what autograd keeps, and what a launcher allocates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import llama_kernels as lk
from bench.attention_options import attention_options
from llama_kernels.core.registry import KERNELS
from llama_kernels.ops import rms_norm
from llama_kernels.ops.attention import dispatch
from llama_kernels.ops.attention.hopper.gluon import HAS_GLUON, WHY_NOT
from llama_kernels.ops.attention.hopper.tables import TILES
from tests.support.environment import compiles
from tests.support.rope import TABLE_LAYOUTS, tables, unlike_tables

B, Hq, Hkv, S, D = 2, 4, 2, 200, 64
PADDED = 256  # S in whole tiles of lse2 and delta


def heads(H: int, device: str = "cpu", seq: int = S) -> torch.Tensor:
    return torch.randn(B, seq, H, D, device=device).bfloat16().transpose(1, 2)


# --- kept between forward and backward -------------------------------------------------------------------------------


def kept(call: Callable[[], Any]) -> list[torch.Tensor]:
    """What autograd saves of `call`, each storage once."""
    found: dict[int, torch.Tensor] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        found[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        results = call()
    del results
    return list(found.values())


def storages(*tensors: torch.Tensor) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in tensors}


def test_attention_keeps_its_inputs_its_output_and_lse(device):
    q, k, v = (heads(H, device, 40).requires_grad_() for H in (Hq, Hkv, Hkv))
    results: list[torch.Tensor] = []
    saved = kept(lambda: results.extend(lk.attention(q, k, v, return_lse=True)))
    assert storages(*saved) == storages(q, k, v, *results)


def test_rope_attention_keeps_q_and_k_as_rotated_only(device):
    q, k, v = (heads(H, device, 40).requires_grad_() for H in (Hq, Hkv, Hkv))
    cos, sin = tables(40, D, device)
    results: list[torch.Tensor] = []
    saved = kept(lambda: results.extend(lk.rope_attention(q, k, v, cos, sin, return_lse=True)))
    made = storages(*saved) - storages(v, cos, sin, *results)
    assert len(made) == 2 and not made & storages(q, k)


def test_rms_norm_keeps_its_input_and_one_number_for_each_row(device):
    x, residual, weight = (torch.randn(n, 256, device=device).requires_grad_() for n in (6, 6, 1))
    saved = kept(lambda: lk.rms_norm(x, weight[0]))
    assert sum(s.numel() for s in saved if s.untyped_storage().data_ptr() not in storages(x, weight)) == 6
    results: list[torch.Tensor] = []
    saved = kept(lambda: results.extend(lk.add_rms_norm(x, residual, weight[0])))
    assert not storages(*saved) & storages(x, residual, results[0])  # the sum stands for both
    assert storages(*saved) > storages(results[1], weight)


@pytest.mark.parametrize("layout", TABLE_LAYOUTS)
def test_rope_keeps_its_tables(layout, device):
    q, k = (heads(H, device, 13).requires_grad_() for H in (Hq, Hkv))
    cos, sin = (TABLE_LAYOUTS[layout](table) for table in unlike_tables(40, D, device, torch.bfloat16))
    assert storages(*kept(lambda: lk.rope(q, k, cos, sin))) == storages(cos, sin)


def test_qk_norm_rope_keeps_nothing_it_made(device):
    q, k = (heads(H, device, 40).requires_grad_() for H in (Hq, Hkv))
    weight = torch.ones(D, device=device).requires_grad_()
    cos, sin = tables(40, D, device)
    saved = kept(lambda: lk.qk_norm_rope(q, k, weight, weight, cos, sin))
    assert storages(*saved) == storages(q, k, weight, cos, sin)


# --- allocated by a launcher -----------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Bytes of every storage that an operation makes, whether it is still there or not."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, int] = {}
        self.alive: list[Any] = []  # so that no address is reused

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = storages(*(x for x in args if isinstance(x, torch.Tensor)))
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and not storages(x) & given and x.numel():
                self.made[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                self.alive.append(x)
        return out


def allocated(op: str, *args: Any) -> int:
    """Bytes that a launcher allocates. Its kernels are not launched."""
    from triton.runtime.jit import JITFunction

    with mock.patch.object(JITFunction, "run", lambda *_, **__: None), Allocations() as found:
        KERNELS[op](*args)
    return sum(found.made.values())


def size(*tensors: torch.Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


CALL = attention_options(S, S, 0.125)  # from the sinks on
ROW_NUMBERS = 2 * B * Hq * PADDED * 4  # lse2 and delta


@compiles
def test_attention_allocates_its_results_and_two_numbers_for_each_row():
    q, k, v, do, lse = heads(Hq), heads(Hkv), heads(Hkv), heads(Hq), torch.zeros(B, Hq, S)
    assert allocated("attention_forward", q, k, v, *CALL) == size(q, lse)
    made = allocated("attention_backward", do, None, q, k, v, do, lse, *CALL, True, True, True, False, None)
    assert made == size(q, k, v) + ROW_NUMBERS
    made = allocated("attention_backward", do, None, q, k, v, do, lse, *CALL, False, True, True, False, None)
    assert made == size(k, v) + ROW_NUMBERS


@compiles
@pytest.mark.skipif(not HAS_GLUON, reason=str(WHY_NOT))
def test_the_hopper_backward_also_allocates_a_sum_of_dq():
    q, k, v, do, lse = heads(Hq), heads(Hkv), heads(Hkv), heads(Hq), torch.zeros(B, Hq, S)
    choice = dispatch.Choice("Hopper kernel", "a test", TILES["backward"][0])
    with mock.patch.object(dispatch, "backward", lambda *_: choice):
        made = allocated("attention_backward", do, None, q, k, v, do, lse, *CALL, True, True, True, False, False)
    assert made == size(q, k, v) + ROW_NUMBERS + 4 * q.numel()


@compiles
def test_norms_and_rotations_allocate_their_results_and_a_sum_for_each_program():
    x, weight, rstd = torch.randn(64, 256), torch.ones(256), torch.zeros(64, 1)
    assert allocated("rms_norm_forward", x, None, weight, 1e-6, 0.0) == size(x, rstd)
    made = allocated("rms_norm_backward", x, None, x, weight, rstd, 1e-6, 0.0, x.dtype, True, True)
    programs = 2 * rms_norm.row_tile("backward", 256, 4).programs  # of two processors
    assert made == size(x, weight) + size(weight) * min(programs, 64)
    q, k, cos = heads(Hq), heads(Hkv), torch.zeros(S, D // 2)
    assert allocated("rope", q, k, cos, cos, None, False, False) == size(q, k)
    assert allocated("rope_qkv_backward", q, k, k, cos, cos, None, False) == size(q, k, k)
    made = allocated("qk_norm_rope_backward", q, k, q, k, None, None, cos, cos, None, 1e-6, 0.0, False, False)
    assert made == size(q, k)


@pytest.mark.gpu
@pytest.mark.deterministic  # the Hopper backward keeps its sum of dq too
def test_peak_memory_of_a_step(device):
    """Inputs, out, lse, lse2 and delta, gradients, and what torch's allocator rounds up to."""
    q, k, v = (
        torch.randn(2, 4096, H, 128, device=device).bfloat16().transpose(1, 2).requires_grad_() for H in (8, 2, 2)
    )
    do = torch.randn_like(q)

    def step() -> None:
        torch.autograd.grad(lk.attention(q, k, v), (q, k, v), do)

    step()  # compiled
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    row = 2 * 8 * 4096 * 4
    assert torch.cuda.max_memory_allocated() - before <= size(q) + size(q, k, v) + 3 * row + 2**20
