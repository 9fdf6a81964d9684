"""The models, lengths and numbers of GPUs that `python -m bench estimate --context-parallel` goes through."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from bench.estimate.constants import Gpu, Network
from bench.estimate.context_parallel.costs import Costs, Kernels, Place, other_blocks, own_block
from bench.estimate.context_parallel.paper import METHODS, Method, Setting, Time, refusal, times
from bench.estimate.context_parallel.steps import Heads
from bench.works.models import MODELS

TOKENS = (2**17, 2**18, 2**19, 2**20)
RANKS = (2, 8, 16, 32, 64, 128, 512)
SURE = 0.3  # of attention's time, by which the model's may be off


class Scale(NamedTuple):
    """A model, and how many GPUs divide its heads by tensor parallelism."""

    name: str
    tensor: int

    @property
    def heads(self) -> Heads:
        model = MODELS[self.name]
        return Heads(model.heads // self.tensor, model.kv_heads // self.tensor, model.head_dim)

    def __str__(self) -> str:
        return self.name if self.tensor == 1 else f"{self.name}, tensor parallel on the {self.tensor} GPUs of a node"


SCALES = (Scale("Llama 3.1 8B", 1), Scale("Llama 3.1 70B", 8))


class Made(NamedTuple):
    """A layer's attention, forward and backward, by one method. One GPU would take `alone` seconds. quick, slow: where
    attention takes longer than estimated, and where it is faster and the network is not tuned."""

    setting: Setting
    time: Time
    alone: float
    quick: Time
    slow: Time

    @property
    def overhead(self) -> float:
        """How much longer than the ranks' share of one GPU's time it takes, as a share of that."""
        return self.time.seconds * self.setting.ranks / self.alone - 1

    @property
    def waiting(self) -> tuple[float, float]:
        """The share of its time that it waits for transfers, at the least and at the most."""
        least, most = (t.exposed / t.seconds for t in (self.quick, self.slow))
        return least, most


class Row(NamedTuple):
    """One length and number of ranks, by each method, the fastest first."""

    tokens: int
    ranks: int
    made: list[Made]


def settings(scale: Scale, network: Network, tokens: int, ranks: int) -> Iterator[Setting]:
    """A setting of each method that takes so many ranks. A pair of methods has one node in its second dimension."""
    node = network.gpus_of_a_node // scale.tensor
    for method in METHODS:
        pair = not isinstance(method, str)
        if pair and (node == 1 or ranks % node or ranks == node):
            continue
        mesh = (ranks // node, node) if pair else (ranks,)
        if not refusal(method, mesh, scale.heads):
            yield Setting(method, mesh, scale.heads, tokens // ranks // 2, Place(network, node))


def made(gpu: Gpu, scale: Scale, network: Network, tokens: int, ranks: int) -> list[Made]:
    """The estimate of each method, the fastest first."""
    whole = (own_block(scale.heads, 1, backward) for backward in (False, True))
    alone = sum(Kernels(gpu).block(block, tokens) for block in whole)
    found = []
    for setting in settings(scale, network, tokens, ranks):
        untuned = setting._replace(place=Place(network.low, setting.place.node))
        quick, slow = Kernels(gpu, 1 / (1 + SURE)), Kernels(gpu, 1 / (1 - SURE))
        found.append(Made(setting, _both(setting, Kernels(gpu)), alone, _both(setting, quick), _both(untuned, slow)))
    return sorted(found, key=lambda made: made.time.seconds)


def _both(setting: Setting, costs: Costs) -> Time:
    return times(setting, costs, False) + times(setting, costs, True)


def rows(gpu: Gpu, scale: Scale, network: Network) -> Iterator[Row]:
    for tokens, ranks in itertools.product(TOKENS, RANKS):
        yield Row(tokens, ranks, made(gpu, scale, network, tokens, ranks))


def hides_from(gpu: Gpu, scale: Scale, place: Place, backward: bool) -> int:
    """Tokens of a rank from which a hop of a ring takes no longer than the block that is computed meanwhile. `place`:
    of two ranks that a hop connects."""
    heads, costs = scale.heads, Kernels(gpu)
    for chunk in range(128, 2**16, 128):
        sent = 2 * heads.Hkv * heads.D * 2 * 2 * chunk * (3 if backward else 1)
        if place.hop(sent, 0, 1) <= min(costs.block(block, chunk) for block in other_blocks(heads, 2, backward)):
            return 2 * chunk
    raise ValueError(f"no hop of {scale} is hidden")


def name_of(method: Method) -> str:
    """How a table calls it."""
    return method if isinstance(method, str) else " x ".join(method)
