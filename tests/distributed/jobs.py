"""What the processes of the tests run: each function runs on every rank and returns what rank 0 found."""

from __future__ import annotations

import collections
import weakref
from typing import Any
from unittest import mock

import torch

import llama_kernels as lk
from llama_kernels.distributed import blocks, ring, transport
from tests.distributed.cases import NAMES, Case, in_float64, inputs, on_all_ranks, on_one_device


def _errors(found: list[torch.Tensor], truth: list[torch.Tensor]) -> dict[str, float]:
    """Relative errors, in the Frobenius norm."""
    pairs = zip(NAMES, found, truth, strict=False)
    return {name: ((x.double() - t).norm() / t.norm().clamp_min(1e-300)).item() for name, x, t in pairs}


def errors_in_float64(case: Case) -> dict[str, float]:
    x = inputs(case, torch.float64)
    with in_float64():
        found = on_all_ranks(case, x)
    return _errors(found, on_one_device(case, x, lk.reference.attention))


def errors_of_the_ops(case: Case, dtype: torch.dtype) -> tuple[dict[str, float], dict[str, float]]:
    """Of cp_attention, and of attention on one device."""
    x = inputs(case, dtype)
    truth = on_one_device(case, x.to(torch.float64), lk.reference.attention)
    return _errors(on_all_ranks(case, x), truth), _errors(on_one_device(case, x, lk.attention), truth)


def differing_bits(case: Case, dtype: torch.dtype) -> list[str]:
    """The results that are not bit for bit those of one device."""
    x = inputs(case, dtype)
    pairs = zip(NAMES, on_all_ranks(case, x), on_one_device(case, x, lk.attention), strict=False)
    return [name for name, found, alone in pairs if not torch.equal(found, alone)]


def repeats(case: Case) -> bool:
    x = inputs(case, torch.bfloat16)
    return all(torch.equal(a, b) for a, b in zip(on_all_ranks(case, x), on_all_ranks(case, x), strict=True))


def sent(case: Case) -> list[tuple[int, ...]]:
    """The shapes of the tensors that this rank sent around the ring."""
    shapes: list[tuple[int, ...]] = []

    def counting(tensors, group):
        shapes.extend(tuple(x.shape) for x in tensors)
        return transport.hop(tensors, group)

    with mock.patch.object(ring, "hop", counting):
        on_all_ranks(case, inputs(case, torch.float32))
    return shapes


def held(case: Case) -> dict[torch.dtype, int]:
    """How many received tensors this rank held at once, at most, by dtype: keys and values are bfloat16, their
    gradients float32."""
    received: list[weakref.ref[torch.Tensor]] = []
    most: collections.Counter[torch.dtype] = collections.Counter()

    def counting(tensors, group):
        transfer = transport.hop(tensors, group)
        received.extend(map(weakref.ref, transfer._result()))  # not waited for yet
        alive = collections.Counter(x.dtype for x in (each() for each in received) if x is not None)
        for dtype, count in alive.items():
            most[dtype] = max(most[dtype], count)
        return transfer

    with mock.patch.object(ring, "hop", counting):
        on_all_ranks(case, inputs(case, torch.bfloat16))
    return dict(most)


def errors_with_rounded_blocks(case: Case) -> tuple[dict[str, float], dict[str, float]]:
    """As `errors_of_the_ops`, if the partial results and gradients of blocks were in bfloat16."""

    def rounded(function):
        def call(*arguments):
            results = function(*arguments)
            kept = [x if x is None or x.ndim < 4 else x.to(torch.bfloat16).float() for x in results]
            return type(results)(*kept) if hasattr(results, "_fields") else tuple(kept)

        return call

    forward, backward = rounded(blocks.forward), rounded(blocks.backward)
    with mock.patch.multiple(blocks, forward=forward, backward=backward):
        return errors_of_the_ops(case, torch.bfloat16)


# --- planted mistakes ------------------------------------------------------------------------------------------------


def _sinks_in_every_block(q, k, v, sinks, mask, scores, forward=blocks.forward):
    return forward(q, k, v, inputs(MISTAKEN, torch.float32).sinks, mask, scores)


def _keys_that_stay(tensors, group):
    return transport.Transfer([], [], lambda: list(tensors))


def _delta_of_the_block(row, q, k, v, sinks, mask, scores, backward=blocks.backward):
    out, _ = blocks.forward(q, k, v, sinks, mask, scores)
    return backward(row._replace(out=out.to(row.out.dtype)), q, k, v, sinks, mask, scores)


def _documents_one_late(positions, doc_start, doc_end, reach, visible=blocks.visible):
    return visible(positions, doc_start + 1, doc_end, reach)


def _unscaled(row, q, k, v, sinks, mask, scores, backward=blocks.backward):
    grads = backward(row, q, k, v, sinks, mask, scores)
    return grads._replace(q=grads.q / scores.scale, k=grads.k / scores.scale)


MISTAKEN = Case(documents=((13, 30), (25,)), sinks=True)
MISTAKES: dict[str, tuple[Any, str, Any]] = {
    "a sink is counted in every block": (blocks, "forward", _sinks_in_every_block),
    "keys do not travel": (ring, "hop", _keys_that_stay),
    "delta is computed from the block's output": (blocks, "backward", _delta_of_the_block),
    "documents begin one token late": (blocks, "visible", _documents_one_late),
    "gradients are not scaled": (blocks, "backward", _unscaled),
}


def largest_error_with(mistake: str) -> float:
    x = inputs(MISTAKEN, torch.float32)
    with mock.patch.object(*MISTAKES[mistake]):
        found = on_all_ranks(MISTAKEN, x)
    truth = on_one_device(MISTAKEN, x.to(torch.float64), lk.reference.attention)
    return max(_errors(found, truth).values())
