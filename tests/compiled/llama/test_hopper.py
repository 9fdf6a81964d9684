"""The Hopper kernels, compiled: every tile of their tables, packed sequences side by side, and which kernel ran."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

import llama_kernels as lk
from llama_kernels.ops.attention.hopper import backward
from llama_kernels.ops.attention.hopper.tables import TILES
from tests.support.attention import Case, check
from tests.support.environment import compiles
from tests.support.hopper import check_of_hopper_kernels
from tests.support.launches import kernels_launched

CPU = torch.device("cpu")


@contextlib.contextmanager
def on_the_machine() -> Iterator[None]:
    """Attention takes the Hopper kernels, which run on CPU tensors; a finding is an error."""
    from tests.compiled.driver import running
    from tests.compiled.llama.plugin import kernels_on_cpu

    torch.use_deterministic_algorithms(False)
    with kernels_on_cpu("sm_90", hopper=True), running("sm_90") as log:
        yield
    assert log.reports and not log.findings, "\n".join(log.findings)


@compiles
@pytest.mark.compiled_table
@pytest.mark.parametrize("tile", TILES["forward"], ids=str)
def test_every_tile_is_run(tile):
    """Rows and keys that fill tiles, and some that are left over."""
    case, gradients = Case(1, 1, 1, 130, 130, tile.width, tile.width), TILES["backward"]
    with on_the_machine(), kernels_launched() as launches:
        check(case, torch.float16, CPU)
    ran = {launched.name: launched.options for launched in launches}
    options = ran["_hopper_forward_kernel"]
    assert (options["BLOCK_N"], options["STAGES"]) == (tile.BLOCK_N, tile.STAGES)
    of_backward = [other for other in gradients if other.width == tile.width]
    assert ("_hopper_backward_kernel" in ran) == bool(of_backward)
    assert all(ran["_hopper_backward_kernel"]["STAGES"] == other.STAGES for other in of_backward)
    assert {other.width for other in gradients} <= {other.width for other in TILES["forward"]}


@compiles
@pytest.mark.parametrize("at_once", [1, 2])
def test_gradients_of_a_few_heads_at_a_time(at_once, monkeypatch):
    """By default a batch as small as this has all heads at a time."""
    monkeypatch.setattr(backward, "heads_at_once", lambda sizes, width: at_once)
    with on_the_machine():
        check_of_hopper_kernels(Case(1, 3, 3, 40, 150, 64, 64), torch.float16, CPU)


@compiles
@pytest.mark.compiled_table
@pytest.mark.parametrize("D", [64, 128])
def test_nan_in_one_sequence_does_not_reach_its_neighbours(D):
    """The rows and keys of a packed sequence share tiles with those of the sequences before and after it."""
    q, k, v = (torch.randn(200, H, D).half() for H in (2, 1, 1))
    bounds = torch.tensor([0, 70, 130, 200], dtype=torch.int32)
    grads = []
    for between in (0.0, torch.nan):
        for x in (q, k, v):
            x.requires_grad_(False)[70:130] = between
            x.requires_grad_()
        with on_the_machine():
            out = lk.attention_varlen(q, k, v, bounds, bounds, 70, 70)
            grads.append([out.detach(), *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))])
    for clean, poisoned in zip(*grads, strict=True):
        assert torch.equal(clean[:70], poisoned[:70]) and torch.equal(clean[130:], poisoned[130:])


@compiles
def test_a_portable_backward_is_not_taken_for_a_hopper_kernel():
    """What the check of the Hopper kernels says if a portable kernel ran."""
    with on_the_machine(), pytest.raises(AssertionError, match="_dq_kernel"):
        torch.use_deterministic_algorithms(True)  # for which the Hopper kernels have no backward
        check_of_hopper_kernels(Case(1, 2, 1, 70, 70, 64, 64), torch.float16, CPU)
