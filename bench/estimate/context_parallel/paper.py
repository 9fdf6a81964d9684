"""The time of context-parallel attention in closed form, for any number of ranks.

Steps, blocks and bytes are those of theory: a ring of W ranks computes its own block and W - 1 of half the pairs, and
sends 6 (W - 1) blocks. Only what is copied beside the attention is counted on the recorded steps of small meshes: it
grows evenly with the ranks. `schedule` simulates the same event by event.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from bench.estimate.context_parallel.costs import Costs, Place, other_blocks, own_block
from bench.estimate.context_parallel.steps import Block, Copies, Heads, Rows, Start, recorded

Method = str | tuple[str, str]
METHODS: tuple[Method, ...] = ("ring", "all_gather", "ulysses", ("ring", "ulysses"))


class Setting(NamedTuple):
    """Who computes what: the method, how many ranks in each dimension of the mesh, the heads of one GPU, tokens of a
    chunk (each rank has two), and where the ranks are."""

    method: Method
    mesh: tuple[int, ...]
    heads: Heads
    chunk: int
    place: Place

    @property
    def ranks(self) -> int:
        return math.prod(self.mesh)

    @property
    def local(self) -> int:
        """Tokens of a rank."""
        return 2 * self.chunk


class Time(NamedTuple):
    """Seconds of the slowest rank, and what they consist of: `kernels` of attention, `copies`, and waiting for
    transfers. transfers: seconds that its transfers take, hidden or not."""

    seconds: float
    kernels: float
    copies: float
    transfers: float

    @property
    def exposed(self) -> float:
        """Seconds of waiting."""
        return self.seconds - self.kernels - self.copies

    def __add__(self, other: Time) -> Time:  # type: ignore[override]
        return Time(*(a + b for a, b in zip(self, other, strict=True)))


def refusal(method: Method, mesh: tuple[int, ...], heads: Heads) -> str | None:
    """Why `cp_attention` does not take such a mesh, or None."""
    if "ulysses" not in (method, *method):
        return None
    ranks = mesh[-1]
    if heads.Hq % ranks or (heads.Hkv % ranks and ranks % heads.Hkv):
        return f"{ranks} ranks do not divide {heads.Hq} and {heads.Hkv} heads"
    return None


def times(setting: Setting, costs: Costs, backward: bool) -> Time:
    """The time of one causal sequence, in the forward or the backward of one layer.

    Raises:
        ValueError: `cp_attention` does not take such a mesh or such heads.
    """
    why = refusal(setting.method, setting.mesh, setting.heads)
    if why:
        raise ValueError(why)
    if setting.method == "ring":
        return _ring(setting, costs, setting.heads, 1, backward)
    if setting.method == "all_gather":
        return _all_gather(setting, costs, backward)
    exchanged = _exchange(setting, costs, backward)
    if setting.method == "ulysses":
        kernels = costs.block(own_block(_shared(setting), 2 * setting.ranks, backward), setting.chunk)
        copied = costs.copies(_copies(setting, backward), setting.chunk)
        return exchanged + Time(kernels + copied, kernels, copied, 0.0)
    return exchanged + _ring(setting, costs, _shared(setting), setting.mesh[1], backward)


# --- the methods -----------------------------------------------------------------------------------------------------


def _ring(setting: Setting, costs: Costs, heads: Heads, together: int, backward: bool) -> Time:
    """together: ranks whose tokens are one block, after an exchange of heads."""
    ranks, chunk = setting.mesh[0], setting.chunk
    own = costs.block(own_block(heads, 2 * together, backward), chunk)
    other = max(costs.block(block, chunk) for block in other_blocks(heads, 2 * together, backward))
    keys = 2 * heads.Hkv * heads.D * 2 * setting.local * together  # bytes of k and v, bfloat16
    slowest = (0, together) if ranks * together <= setting.place.node else (setting.place.node - 1, setting.place.node)
    h, g = (setting.place.hop(sent, *slowest) for sent in (keys, 2 * keys))  # gradients are float32
    copies, hops = costs.copies(_copies(setting, backward), chunk), ranks - 1
    if not hops:
        return Time(own + copies, own, copies, 0.0)
    kernels = own + hops * other
    step = other + copies / hops
    transfers = hops * (h + g if backward else h)
    if not backward:
        seconds = max(own, h) + (hops - 1) * max(step, h) + step
    elif hops == 1:
        seconds = max(own, h) + step + g
    else:  # the gradients of a block and the next keys share a lane
        last = max(step, g) + g
        seconds = max(own, h) + max(step, h) + (hops - 2) * max(step, g + h) + last
    return Time(seconds, kernels, copies, transfers)


def _all_gather(setting: Setting, costs: Costs, backward: bool) -> Time:
    ranks, chunk, heads = setting.ranks, setting.chunk, setting.heads
    rows = (Rows(0, 0, True), Rows(0, 2 * ranks - 1, True))
    kernels = costs.block(Block(heads, rows, 2 * ranks, backward), chunk)
    one = heads.Hkv * heads.D * setting.local  # elements of k
    group = tuple(range(ranks))
    gather = setting.place.collective(Start("all_gather", group, 2 * one), 1)
    transfers = 2 * gather
    if backward:
        transfers += 2 * setting.place.collective(Start("all_to_all", group, 4 * one * ranks), 1)
    copies = costs.copies(_copies(setting, backward), chunk)
    ordering = costs.copies(Copies(2 * 2 * 2 * one * ranks / chunk, 2), chunk)  # k, read and written twice
    hidden = min(ordering, gather)  # while v comes
    return Time(kernels + copies + transfers - hidden, kernels, copies, transfers)


def _exchange(setting: Setting, costs: Costs, backward: bool) -> Time:
    """The all-to-all of q, k, v, out and lse, or of do, dq, dk and dv. Nothing is computed meanwhile."""
    (Hq, Hkv, D), ranks, place = setting.heads, setting.mesh[-1], setting.place
    sharing = max(ranks // Hkv, 1)
    keys = Hkv * sharing * D * (4 if backward and sharing > 1 else 2)  # gradients that are summed are float32
    sent = [Hq * D * 2, Hq * D * 2, keys, keys] + ([] if backward else [Hq * 4])
    group = tuple(range(ranks))
    transfers = sum(place.collective(Start("all_to_all", group, x * setting.local), 1) for x in sent)
    return Time(transfers, 0.0, 0.0, transfers)


def _shared(setting: Setting) -> Heads:
    """The heads of a rank after the exchange."""
    Hq, Hkv, D = setting.heads
    return Heads(Hq // setting.mesh[-1], max(Hkv // setting.mesh[-1], 1), D)


# --- copies ----------------------------------------------------------------------------------------------------------


def _copies(setting: Setting, backward: bool) -> Copies:
    return copies(setting.method, setting.mesh, setting.heads, backward)


@functools.lru_cache(maxsize=1024)
def copies(method: Method, mesh: tuple[int, ...], heads: Heads, backward: bool) -> Copies:
    """The copies of rank 0. More than 8 ranks in a ring or an all-gather are extrapolated from 4 and 8."""
    if mesh[0] <= 8 or method == "ulysses":
        steps = recorded(method, mesh, heads, 0)[backward]
        found = [step for step in steps if isinstance(step, Copies)]
        return Copies(sum(x.bytes for x in found), sum(x.launches for x in found))
    few, more = (copies(method, (n, *mesh[1:]), heads, backward) for n in (4, 8))
    return Copies(*(b + (b - a) / 4 * (mesh[0] - 8) for a, b in zip(few, more, strict=True)))
