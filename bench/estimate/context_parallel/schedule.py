"""A simulation of context-parallel attention: all ranks, each with a lane for kernels and lanes for transfers.

A rank's kernels run one after another. A transfer starts when the kernels before it are done and its lane is free, as
NCCL's do on a stream of their own, one for each process group. It needs the ranks that it connects: a hop those before
and after, a collective all. A wait holds the kernels after it until the transfer is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bench.estimate.context_parallel.costs import Costs, Place
from bench.estimate.context_parallel.steps import Block, Copies, Start, Step, Wait

_Key = tuple[tuple[int, ...], int]  # a group, and how many transfers it had before


class Span(NamedTuple):
    """A piece of work on a lane of one rank. what: "block", "copies", or the kind of a transfer."""

    what: str
    begin: float
    end: float


class Ran(NamedTuple):
    """What a simulation found: the seconds until the last rank is done, and what filled the lanes of each rank."""

    seconds: float
    kernels: list[list[Span]]
    transfers: list[list[Span]]

    @property
    def computed(self) -> float:
        """Seconds of kernels, of the rank that has most."""
        return max(sum(span.end - span.begin for span in spans) for spans in self.kernels)

    @property
    def exposed(self) -> float:
        """Seconds that transfers add."""
        return self.seconds - self.computed


class _Rank:
    """How far one rank has come."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps, self.at, self.now = steps, 0, 0.0
        self.kernels: list[Span] = []
        self.transfers: list[Span] = []
        self.ends: dict[_Key, float] = {}  # of transfers, when they were over here
        self.started: dict[tuple[int, ...], int] = {}


class _Simulation:
    def __init__(self, steps: Sequence[Sequence[Step]], costs: Costs, place: Place, chunk: int) -> None:
        self.ranks = [_Rank(each) for each in steps]
        self.costs, self.place, self.chunk = costs, place, chunk
        self.open: dict[_Key, dict[int, tuple[Start, float]]] = {}  # transfers, with the ranks that have asked for them

    def run(self) -> Ran:
        while any(rank.at < len(rank.steps) for rank in self.ranks):
            moved = [self._advance(number, rank) for number, rank in enumerate(self.ranks)]
            ended = [self._resolve(key) for key in list(self.open)]
            if not any(moved) and not any(ended):
                raise RuntimeError("the ranks wait for each other: their steps do not fit together")
        seconds = max(span.end for rank in self.ranks for span in (*rank.kernels, *rank.transfers))
        return Ran(seconds, [rank.kernels for rank in self.ranks], [rank.transfers for rank in self.ranks])

    def _advance(self, number: int, rank: _Rank) -> bool:
        """Whether the rank did anything, up to a transfer that is not over yet."""
        before = rank.at
        while rank.at < len(rank.steps):
            step = rank.steps[rank.at]
            if isinstance(step, Wait):
                if (step.group, step.number) not in rank.ends:
                    break
                rank.now = max(rank.now, rank.ends[step.group, step.number])
            elif isinstance(step, Start):
                place = rank.started.get(step.group, 0)
                rank.started[step.group] = place + 1
                self.open.setdefault((step.group, place), {})[number] = step, rank.now
            else:
                self._compute(rank, step)
            rank.at += 1
        return rank.at > before

    def _compute(self, rank: _Rank, step: Block | Copies) -> None:
        if isinstance(step, Block):
            name, seconds = "block", self.costs.block(step, self.chunk)
        else:
            name, seconds = "copies", self.costs.copies(step, self.chunk)
        rank.kernels.append(Span(name, rank.now, rank.now + seconds))
        rank.now += seconds

    def _resolve(self, key: _Key) -> bool:
        """Whether a transfer ended on some rank that is known only now."""
        (group, place), asked = key, self.open[key]
        begins = {number: max(since, self.ranks[number].ends[group, place - 1] if place else 0.0)
                  for number, (_, since) in asked.items()
                  if not place or (group, place - 1) in self.ranks[number].ends}  # fmt: skip
        missing = [number for number in group if key not in self.ranks[number].ends]
        ended = 0
        for number in missing:
            end = self._end(group, number, begins, asked)
            if end is not None:
                self.ranks[number].ends[key] = end
                self.ranks[number].transfers.append(Span(asked[number][0].kind, begins[number], end))
                ended += 1
        if ended == len(missing):
            del self.open[key]
        return ended > 0

    def _end(
        self, group: tuple[int, ...], number: int, begins: dict[int, float], asked: dict[int, tuple[Start, float]]
    ) -> float | None:
        """When a transfer is over on one rank; None: a rank that it needs has not come to it."""
        hop = number in asked and asked[number][0].kind == "hop"
        at = group.index(number)
        before, after = group[at - 1], group[(at + 1) % len(group)]
        if any(other not in begins for other in ((before, number, after) if hop else group)):
            return None
        start = asked[number][0]
        if not hop:
            return max(begins.values()) + self.place.collective(start, self.chunk)
        sends = max(begins[number], begins[after]) + self.place.hop(start.bytes * self.chunk, number, after)
        receives = max(begins[before], begins[number]) + self.place.hop(
            asked[before][0].bytes * self.chunk, before, number
        )
        return max(sends, receives)


def simulated(steps: Sequence[Sequence[Step]], costs: Costs, place: Place, chunk: int) -> Ran:
    """All ranks, whose steps are given in the order of the ranks. chunk: tokens of a chunk of the layout.

    Raises:
        RuntimeError: a rank waits for a transfer that another never starts.
    """
    return _Simulation(steps, costs, place, chunk).run()
