"""What only a GPU can show: streams, graphs, other devices, no waiting for the host, and repeatability under load."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable

import pytest
import torch
from torch.utils._pytree import tree_leaves

import llama_kernels as lk
from llama_kernels.core import launch_cache
from llama_kernels.ops.attention.hopper.gluon import HAS_GLUON, WHY_NOT
from tests.support.hopper import CASES as HOPPER_CASES
from tests.support.hopper import check_of_hopper_kernels, without_hopper_kernels
from tests.support.judge import UNIT, relative_error
from tests.support.launches import Launched, kernels_launched, names
from tests.support.ops import CALLS, OPS, Make, Shape, calls
from tests.support.rope import tables

# Most compare gradients bit for bit.
pytestmark = [pytest.mark.gpu, pytest.mark.deterministic]


def inputs(device: torch.device, S: int = 300) -> list[torch.Tensor]:
    return [torch.randn(2, S, H, 128, device=device).bfloat16().transpose(1, 2).requires_grad_() for H in (8, 2, 2)]


def layer(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> list[torch.Tensor]:
    """Outputs and gradients of all three ops."""
    q_, k_ = lk.rope(*lk.qk_norm_rope(q, k, cos[0].repeat(2), None, cos, sin), cos, sin)
    out = lk.rms_norm(lk.attention(q_, k_, v) + lk.rope_attention(q, k, v, cos, sin))
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.corpus(70)
def test_the_host_never_waits(device):
    args = (*inputs(device), *tables(300, 128, device))
    cu = torch.tensor([0, 100, 300], dtype=torch.int32, device=device)
    packed = [x.detach()[0].transpose(0, 1) for x in args[:3]]
    layer(*args), lk.attention_varlen(*packed, cu, cu, 200, 200)  # compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(*args)
        lk.attention_varlen(*packed, cu, cu, 200, 200)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.corpus(73)
def test_kernels_run_on_the_current_stream(device):
    args = (*inputs(device), *tables(300, 128, device))
    expected = layer(*args)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        results = layer(*args)
    torch.cuda.current_stream().wait_stream(stream)
    assert equal(results, expected)


@pytest.mark.corpus(70)
def test_forward_is_captured_in_a_graph(device):
    q, k, v = (x.detach() for x in inputs(device))
    angles = tables(300, 128, device)

    def forward() -> torch.Tensor:
        q_, k_ = lk.rope(q, k, *angles)
        return lk.rms_norm(lk.attention(q_, k_, v))

    forward()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward()
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert torch.equal(out, forward())


def _call(label: str, options: bool, device: torch.device) -> Callable[[], list[torch.Tensor]]:
    """A forward call on the same tensors each time: its results, and the tensors that it writes into."""
    shape, make = Shape(B=2, Hq=8, Hkv=2, S=300, D=128, N=128), Make(device, torch.bfloat16)
    if label != "rope_into_cache":
        call = dict(calls(shape, make, options))[label]
        return lambda: list(tree_leaves(call(lk, *call.tensors)))
    op = OPS[label]
    arguments = {**op.arguments(shape, make), **(op.options(shape, make) if options else {})}
    return lambda: [lk.rope_into_cache(**arguments), *(arguments[name] for name in op.written)]


@pytest.mark.corpus(70)
@pytest.mark.parametrize("options", [False, True], ids=["", "options"])
@pytest.mark.parametrize("label", [*CALLS, "rope_into_cache"])
def test_every_op_is_captured_in_a_graph(label, options, device):
    call = _call(label, options, device)
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = call()
    for out in outs:
        if not out._is_view():
            out.zero_()
    graph.replay()
    replayed = [out.clone() for out in outs]
    for out, expected in zip(replayed, call(), strict=True):
        assert torch.equal(out, expected)


@pytest.mark.corpus(70)
def test_decoding_is_captured_in_a_graph(device):
    """One token against a cache of fixed size, how far it is filled being known on the GPU alone."""
    q, k, v = (torch.randn(2, H, S, 128, device=device).bfloat16() for H, S in ((8, 1), (2, 4096), (2, 4096)))
    filled = torch.tensor([[1000], [17]], dtype=torch.int32, device=device)

    def step() -> torch.Tensor:
        return lk.attention(q, k, v, is_causal=False, kv_end=filled)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    filled.add_(3000)
    graph.replay()
    assert torch.equal(out, step())
    truth = lk.reference.attention(q.double(), k.double(), v.double(), is_causal=False, kv_end=filled)
    assert relative_error(out, truth) < 2 * UNIT[torch.bfloat16]


@pytest.mark.corpus(71)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_where_their_tensors_are():
    """The current device is another one."""
    there = torch.device("cuda", 1)
    args = (*inputs(there), *tables(300, 128, there))
    with torch.cuda.device(0):
        results = layer(*args)
    with torch.cuda.device(1):
        assert equal(results, layer(*args))
    assert all(x.device == there for x in results)


@pytest.mark.corpus(72, 76)
def test_gradients_repeat_a_thousand_times(device):
    args = (*inputs(device, S=1000), *tables(1000, 128, device))
    expected = layer(*args)
    for _ in range(1000):
        assert equal(layer(*args), expected)


def test_cached_launches_take_the_tensors_of_their_call(device):
    """The third call of a cache key is the first that Triton does not bind."""
    cos_sin = tables(300, 128, device)
    for _ in range(5):
        args = (*inputs(device), *cos_sin)
        results = layer(*args)
        launch_cache.clear()
        assert equal(results, layer(*args))
        layer(*args)  # cached again


@pytest.mark.corpus(72)
@pytest.mark.parametrize("D", [64, 128, 256])
def test_races_that_only_many_blocks_show(D, device):
    """flash-attention's race test: 250 repeats of a batch of 60, whose lengths leave blocks half full."""
    q, k, v = (torch.randn(60, H, 239, D, device=device).bfloat16().requires_grad_() for H in (4, 2, 2))
    out = lk.attention(q, k, v, window_size=(100, 0))
    dy = torch.randn_like(out)
    expected = [out, *torch.autograd.grad(out, (q, k, v), dy)]
    for _ in range(250):
        out = lk.attention(q, k, v, window_size=(100, 0))
        assert equal([out, *torch.autograd.grad(out, (q, k, v), dy)], expected)


@pytest.mark.corpus(73)
def test_workspaces_outlive_their_launch_on_a_side_stream(device):
    """Freed while a kernel on another stream still reads it: flash-attention#2063. Memory is asked for again."""
    args = (*inputs(device), *tables(300, 128, device))
    expected = layer(*args)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for _ in range(50):
        with torch.cuda.stream(stream):
            results = layer(*args)
        for size in (2**16, 2**20, 2**22):
            torch.full((size,), torch.nan, device=device)
        stream.synchronize()
        assert equal(results, expected)


# --- the Hopper kernels ----------------------------------------------------------------------------------------------


@pytest.fixture
def hopper():
    """Attention takes the Hopper kernels, and nothing else: a fallback is an error."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    if not HAS_GLUON:
        pytest.skip(WHY_NOT)
    torch.use_deterministic_algorithms(False)
    with lk.hopper_attention(), warnings.catch_warnings():
        warnings.filterwarnings("error", "llama_kernels: ")
        yield


def hopper_kernels_in(launches: list[Launched]) -> set[str]:
    return {name for name in names(launches) if "hopper" in name}


def hopper_kernels_of(D: int) -> set[str]:
    """The backward takes heads up to 128 wide."""
    return {"_hopper_forward_kernel"} | ({"_hopper_backward_kernel"} if D <= 128 else set())


def hopper_inputs(device: torch.device, D: int, S: int = 2048) -> list[torch.Tensor]:
    return [torch.randn(2, S, H, D, device=device).bfloat16().transpose(1, 2).requires_grad_() for H in (8, 2, 2)]


@pytest.mark.parametrize("case", HOPPER_CASES.values(), ids=HOPPER_CASES)
def test_hopper_kernels_are_right(case, hopper, device):
    """The launches show that they ran."""
    for dtype in (torch.bfloat16, torch.float16):
        check_of_hopper_kernels(case, dtype, device)


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("on", [{}, {"is_causal": False}, {"window_size": (500, 0)}], ids=str)
def test_hopper_kernels_agree_with_the_portable_ones(D, on, hopper, device):
    """Thousands of tiles, the longest first, on every processor; the two add up in other orders.

    Each is about one rounding away from the exact result, in a direction of its own.
    """
    q, k, v = hopper_inputs(device, D)
    do = torch.randn_like(q)
    found = []
    for enabled in (True, False):
        with contextlib.nullcontext() if enabled else without_hopper_kernels(), kernels_launched() as launches:
            out, lse = lk.attention(q, k, v, return_lse=True, **on)
            found.append([out, lse, *torch.autograd.grad(out, (q, k, v), do)])
        assert hopper_kernels_in(launches) == (hopper_kernels_of(D) if enabled else set())
    for name, here, there in zip(("out", "lse", "dq", "dk", "dv"), *found, strict=True):
        assert relative_error(here, there) < 2 * UNIT[torch.bfloat16], name


@pytest.mark.corpus(72, 76)
@pytest.mark.parametrize("D", [64, 128, 256])
def test_hopper_kernels_repeat_a_thousand_times(D, hopper, device):
    """Bit for bit, but for dq, whose sum is in no order. A wrong phase or a register taken too early shows here."""
    q, k, v = hopper_inputs(device, D, S=1000)
    do = torch.randn_like(q)

    def once() -> list[torch.Tensor]:
        out, lse = lk.attention(q, k, v, return_lse=True)
        return [out, lse, *torch.autograd.grad(out, (k, v, q), do)]

    with kernels_launched() as launches:
        *expected, dq = once()
    assert hopper_kernels_in(launches) == hopper_kernels_of(D)
    for _ in range(1000):
        *results, dq_again = once()
        assert equal(results, expected)
        assert relative_error(dq_again, dq) < UNIT[torch.bfloat16]


def test_deterministic_gradients_repeat_with_the_hopper_forward(hopper, device):
    q, k, v = hopper_inputs(device, 128, S=1000)

    def once() -> tuple[torch.Tensor, ...]:
        out = lk.attention(q, k, v, deterministic=True)
        return torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    with kernels_launched() as launches:
        expected = once()
    assert hopper_kernels_in(launches) == {"_hopper_forward_kernel"} and "_dq_kernel" in names(launches)
    for _ in range(20):
        assert equal(once(), expected)
