"""Calls that the Hopper kernels take, and a check that they are right and are what ran."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch

from llama_kernels.ops.attention.hopper import switch
from tests.support.attention import Case, anywhere, check, documents, packed, padded_left, so_far
from tests.support.launches import kernels_launched, names

# Heads of every width class, full and not; every option alone and together; rows and keys that leave tiles half full;
# rows without keys, keys without rows; packed sequences of any length; bounds of rows, in order and in none.
CASES = {
    "64": Case(1, 2, 1, 150, 200, 64, 64),
    "64-long": Case(1, 2, 1, 300, 300, 64, 64),
    "80": Case(2, 2, 2, 70, 150, 80, 80),
    "96-rows-without-keys": Case(1, 2, 1, 260, 130, 96, 96),
    "128": Case(1, 2, 1, 150, 150, 128, 128),
    "128-group": Case(1, 3, 1, 200, 200, 128, 128),
    "256": Case(1, 2, 1, 70, 140, 256, 256),
    "full": Case(1, 2, 1, 130, 257, 64, 64, is_causal=False),
    "window": Case(1, 2, 1, 300, 350, 64, 64, window_size=(90, 0)),
    "window-of-the-last-keys": Case(1, 2, 1, 300, 500, 64, 64, window_size=(90, 0)),
    "two-sided-window": Case(1, 2, 2, 300, 200, 128, 128, is_causal=False, window_size=(20, 70)),
    "window-sinks": Case(1, 2, 1, 150, 180, 64, 64, window_size=(40, 0), sinks=True),
    "softcap": Case(1, 2, 1, 150, 150, 64, 64, softcap=3.0),
    "sinks": Case(1, 2, 1, 290, 200, 128, 128, sinks=True),
    "scale": Case(1, 2, 2, 140, 140, 64, 64, scale=-0.3),
    "varlen": packed((50, 0, 200, 1), (50, 0, 200, 1), 2, 1, 64, 64),
    "varlen-window-sinks": packed(
        (150, 3, 90), (70, 200, 130), 2, 1, 128, 128, is_causal=False, window_size=(60, 30), sinks=True
    ),
    "varlen-window": packed((150, 3, 90), (150, 3, 90), 2, 1, 128, 128, window_size=(60, 0)),
    "varlen-softcap": packed((33, 129), (170, 60), 2, 2, 64, 64, window_size=(40, 5), softcap=4.0),
    "start": Case(2, 2, 1, 150, 300, 64, 64, kv_start=padded_left),
    "start-full": Case(2, 2, 1, 150, 300, 64, 64, kv_start=anywhere, is_causal=False),
    "end": Case(2, 2, 1, 150, 300, 128, 128, kv_end=padded_left, is_causal=False),
    "end-of-a-cache": Case(2, 1, 1, 140, 330, 64, 64, kv_end=so_far, is_causal=False),
    "start-end": Case(2, 2, 1, 150, 200, 128, 128, kv_start=anywhere, kv_end=padded_left),
    "start-end-256": Case(2, 1, 1, 130, 200, 256, 256, kv_start=documents, kv_end=so_far),
    "end-anywhere": Case(1, 2, 1, 140, 300, 80, 80, kv_end=anywhere),
    "documents": Case(2, 2, 1, 260, 260, 64, 64, kv_start=documents),
    "documents-window-sinks": Case(1, 2, 1, 200, 260, 64, 64, kv_start=documents, window_size=(30, 0), sinks=True),
    "window-end": Case(1, 2, 1, 150, 300, 64, 64, kv_end=so_far, window_size=(70, 20), is_causal=False),
    "varlen-start": packed((150, 3, 90), (150, 3, 90), 2, 1, 64, 64, kv_start=documents),
    "varlen-start-end": packed((33, 140), (170, 60), 2, 1, 128, 128, kv_start=padded_left, kv_end=so_far),
}
# One token, one head, a batch of one: the strides of dimensions of one element mean nothing, and the copy engine still
# checks them.
DIMENSIONS_OF_ONE = {
    f"{name}-{D}": case
    for D in (64, 128)
    for name, case in (
        ("varlen-one-token", packed((1, 0), (170, 20), 1, 1, D, D)), ("one-head", Case(1, 1, 1, 40, 150, D, D))
    )
}  # fmt: skip


def expected_kernels(case: Case) -> set[str]:
    """The kernels of a call and its gradients. The Hopper kernels have no backward of heads wider than 128, of softcap
    at heads wider than 64, of kv_start or kv_end, or of a window that may hide keys from all rows."""
    left, (of_q, of_k) = case.window_size[0], case.packed or (case.Sq, case.Sk)
    hides = left >= 0 and (of_q != of_k if case.packed else case.Sk - case.Sq > left)
    bounded = case.kv_start is not None or case.kv_end is not None
    backward = case.D <= 128 and (case.softcap is None or case.D <= 64) and not hides and not bounded
    of_backward = {"_dq_kernel", "_dkdv_kernel"}
    if backward:
        of_backward = {"_delta_kernel", "_hopper_backward_kernel", "_round_sum_kernel"}
    return {"_hopper_forward_kernel"} | of_backward | ({"_tile_list_kernel"} if case.packed else set())


@contextlib.contextmanager
def without_hopper_kernels() -> Iterator[None]:
    """Inside, attention takes the portable kernels, also where a Hopper kernel is on by default."""
    with mock.patch.object(switch, "may_run", lambda pass_: False):
        yield


def check_of_hopper_kernels(case: Case, dtype: torch.dtype, device: torch.device, layout: int | None = None) -> None:
    """`attention.check`; and that the Hopper kernels ran, forward and backward, and no portable one in their place."""
    with kernels_launched() as launches:
        check(case, dtype, device, layout=layout)
    assert set(names(launches)) == expected_kernels(case)
