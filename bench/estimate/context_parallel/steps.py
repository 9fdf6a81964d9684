"""What each rank does in a call of context-parallel attention, in order, recorded from the code that does it.

`cp_attention` itself runs, forward and backward, as one rank after another of a process group that sends nothing. Its
attention calls, transfers and waits are recorded in place of being carried out. The sequence is tiny, CHUNK tokens a
chunk of the zigzag layout: which chunks see which does not depend on the length, and the bytes of all other ops grow
with it, so a record holds for any length.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from bench.estimate.bounds import Tally
from llama_kernels.distributed import Layout, blocks, cp_attention
from llama_kernels.distributed.blocks import Grads, Mask

CHUNK = 2  # tokens: the fewest that tell a causal chunk from a whole one


class Heads(NamedTuple):
    """The heads of one GPU: query heads, key heads, and their width."""

    Hq: int
    Hkv: int
    D: int


class Rows(NamedTuple):
    """The keys that a chunk of queries sees in a block: `whole` chunks from chunk `first`, and, if `causal`, of the
    next chunk as many keys as there are queries so far."""

    first: int
    whole: int
    causal: bool


class Block(NamedTuple):
    """A call of attention. rows: of each chunk of its queries, in order; keys: how many chunks of them it gets."""

    heads: Heads
    rows: tuple[Rows, ...]
    keys: int
    backward: bool

    @property
    def pairs(self) -> float:
        """Visible pairs of a query and a key, in those of a chunk with a chunk. The diagonal counts half."""
        return sum(row.whole + row.causal / 2 for row in self.rows)


class Copies(NamedTuple):
    """Other ops between two steps: bytes that they move, for each token of a chunk, and launches."""

    bytes: float
    launches: int


class Start(NamedTuple):
    """A transfer is started on the lane of `group`, the ranks that take part. bytes: that this rank hands over, for
    each token of a chunk. kind: "hop" to the next rank of the group, "all_gather" or "all_to_all"."""

    kind: str
    group: tuple[int, ...]
    bytes: float


class Wait(NamedTuple):
    """A wait for the transfer that this rank started on the lane of `group` after `number` others of the same pass."""

    group: tuple[int, ...]
    number: int


Step = Block | Copies | Start | Wait


class Steps(NamedTuple):
    """The steps of one rank."""

    forward: tuple[Step, ...]
    backward: tuple[Step, ...]


@functools.lru_cache(maxsize=64)
def recorded(method: str | tuple[str, str], mesh: tuple[int, ...], heads: Heads, rank: int) -> Steps:
    """The steps of one rank, of one causal sequence in the zigzag layout, in bfloat16.

    mesh: its shape, one number, or two for a pair of methods.

    Raises:
        RuntimeError: this process is in a process group already.
        ValueError: `cp_attention` does not take such a mesh or such heads.
    """
    ranks = math.prod(mesh)
    recorder = _Recorder()
    layout = Layout(2 * CHUNK * ranks, ranks)
    q, k, v = (torch.zeros(1, H, 2 * CHUNK, heads.D, dtype=torch.bfloat16) for H in (heads.Hq, heads.Hkv, heads.Hkv))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with _as_rank(rank, ranks), recorder.in_place_of_work():
        on = init_device_mesh("cpu", mesh)
        with recorder.tally:
            out = cp_attention(q, k, v, mesh=on, layout=layout, method=method)
        forward = recorder.taken()
        with recorder.tally:
            torch.autograd.grad(out, leaves, torch.zeros_like(out))
        return Steps(forward, recorder.taken())


@contextmanager
def _as_rank(rank: int, ranks: int) -> Iterator[None]:
    """This process is one rank of a process group that sends nothing."""
    if dist.is_initialized():
        raise RuntimeError("bench estimate: this process is in a process group already. Run the estimate in one that "
                           "is in none: it plays the ranks one after another.")  # fmt: skip
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers PyTorch's "fake" backend

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


class _Recorder:
    """Stands in for torch.distributed's transfers and for the attention ops of a block."""

    def __init__(self) -> None:
        self.tally = Tally()
        self._steps: list[Step] = []
        self._started: dict[tuple[int, ...], int] = {}

    @contextmanager
    def in_place_of_work(self) -> Iterator[None]:
        with (
            mock.patch.object(dist, "batch_isend_irecv", self._hop),
            mock.patch.object(dist, "all_gather", self._all_gather),
            mock.patch.object(dist, "all_to_all_single", self._all_to_all),
            mock.patch.object(blocks, "forward", self._block_forward),
            mock.patch.object(blocks, "backward", self._block_backward),
        ):
            yield

    def taken(self) -> tuple[Step, ...]:
        """The steps since the last call."""
        self._copies()
        steps, self._steps, self._started = tuple(self._steps), [], {}
        return steps

    def _copies(self) -> None:
        ops, self.tally.ops = self.tally.ops, []
        if ops:
            self._steps.append(Copies(sum(op.bytes for op in ops) / CHUNK, len(ops)))

    # --- transfers ---

    def _hop(self, ops: Sequence[dist.P2POp]) -> list[Any]:
        return [self._start("hop", ops[0].group, [op.tensor for op in ops if op.op is dist.isend])]

    def _all_gather(self, coming: list[torch.Tensor], x: torch.Tensor, group: Any, async_op: bool) -> Any:
        return self._start("all_gather", group, [x])

    def _all_to_all(self, coming: torch.Tensor, x: torch.Tensor, group: Any, async_op: bool) -> Any:
        return self._start("all_to_all", group, [x])

    def _start(self, kind: str, group: Any, sent: Sequence[torch.Tensor]) -> _Work:
        self._copies()
        members = tuple(dist.get_process_group_ranks(group))
        number = self._started.get(members, 0)
        self._started[members] = number + 1
        self._steps.append(Start(kind, members, sum(x.nbytes for x in sent) / CHUNK))
        return _Work(self, Wait(members, number))

    def wait(self, step: Wait) -> None:
        self._copies()
        self._steps.append(step)

    # --- blocks ---

    def _block_forward(self, q, k, v, sinks, mask, scores) -> tuple[torch.Tensor, torch.Tensor]:
        self._block(q, k, mask, backward=False)
        return q.new_empty(q.shape, dtype=torch.float32), q.new_empty(q.shape[:3], dtype=torch.float32)

    def _block_backward(self, row, q, k, v, sinks, mask, scores) -> Grads:
        self._block(q, k, mask, backward=True)
        return Grads(*(x.new_empty(x.shape, dtype=torch.float32) for x in (q, k, v)), None)

    def _block(self, q: torch.Tensor, k: torch.Tensor, mask: Mask, backward: bool) -> None:
        self._copies()
        heads = Heads(q.shape[1], k.shape[1], q.shape[3])
        rows = rows_of(*_bounds(q.shape[2], k.shape[2], mask))
        self._steps.append(Block(heads, rows, k.shape[2] // CHUNK, backward))


class _Work:
    """The handle of one transfer, as torch.distributed returns it."""

    def __init__(self, recorder: _Recorder, step: Wait) -> None:
        self._recorder, self._step = recorder, step

    def wait(self) -> None:
        self._recorder.wait(self._step)


def _bounds(Sq: int, Sk: int, mask: Mask) -> tuple[list[int], list[int]]:
    """The keys that each query sees, from a first to one before an end."""
    if mask.kv_start is not None and mask.kv_end is not None:
        return mask.kv_start[0].tolist(), mask.kv_end[0].tolist()
    if (mask.left, mask.right) != (None, 0):
        raise ValueError(f"a window of {mask.left}, {mask.right} is not modelled")
    return [0] * Sq, [Sk - Sq + row + 1 for row in range(Sq)]


def rows_of(first: Sequence[int], end: Sequence[int]) -> tuple[Rows, ...]:
    """What each chunk of CHUNK queries sees, from the bounds of its queries.

    Raises:
        ValueError: it is not so many whole chunks with or without a causal one.
    """
    found = []
    for at in range(0, len(first), CHUNK):
        (low, same), (short, long) = first[at : at + CHUNK], end[at : at + CHUNK]
        if long <= low:
            found.append(Rows(0, 0, False))
        elif low == same and not (low % CHUNK or long % CHUNK) and long - short in (0, 1):
            causal = long > short
            found.append(Rows(low // CHUNK, (long - low) // CHUNK - causal, causal))
        else:
            raise ValueError(f"queries that see keys {low} to {short - 1} and {same} to {long - 1} are not modelled")
    return tuple(found)
