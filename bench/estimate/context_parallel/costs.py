"""What the steps of context-parallel attention take: attention by the model of its kernels, the rest by bytes.

Kernels are compiled as a rank calls them, with bounds for each row and float32 results, so they are the portable ones.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from bench.attention_options import attention_options
from bench.estimate import attention
from bench.estimate.constants import Gpu, Network
from bench.estimate.constants import attention as attention_constants
from bench.estimate.context_parallel.steps import Block, Copies, Heads, Rows, Start
from bench.estimate.kernels import Kernel, compiled
from bench.estimate.tiles import Tile, steps
from llama_kernels.core.registry import KERNELS
from llama_kernels.ops.attention.backward import parts_of_group
from llama_kernels.ops.attention.call import AttentionCall

_PRODUCTS = {"forward": 1.0, "dq": 1.5, "dkdv": 2.0}  # of a kernel, in those of a forward


class Costs(Protocol):
    """Seconds of steps. chunk: tokens of a chunk of the layout."""

    def block(self, block: Block, chunk: int) -> float: ...

    def copies(self, copies: Copies, chunk: int) -> float: ...


class Kernels(NamedTuple):
    """What the kernels of one GPU take, by their model. speed: of attention, as a multiple of the model's."""

    gpu: Gpu
    speed: float = 1.0

    def block(self, block: Block, chunk: int) -> float:
        return _block(self.gpu, block, chunk) / self.speed

    def copies(self, copies: Copies, chunk: int) -> float:
        return copies.bytes * chunk / (self.gpu.copy * 1e9) + copies.launches * attention_constants().launch


@dataclasses.dataclass(frozen=True)
class Place:
    """Where ranks are: `node` of them, one after another, share NVLink. Each GPU has a network adapter of its own."""

    network: Network
    node: int

    def hop(self, sent: float, a: int, b: int) -> float:
        """Seconds of sending bytes from rank a to rank b."""
        if a // self.node == b // self.node:
            return self.network.nvlink_latency + sent / (self.network.nvlink * 1e9)
        return self.network.network_latency + sent / (self.network.network * 1e9)

    def collective(self, start: Start, chunk: int) -> float:
        """Seconds of an all-gather or an all-to-all, which all ranks of its group start together."""
        ranks, sent, net = len(start.group), start.bytes * chunk, self.network
        near = sum(rank // self.node == start.group[0] // self.node for rank in start.group)
        latency = net.nvlink_latency if near == ranks else net.network_latency
        if start.kind == "all_gather":  # as NCCL's rings: each byte passes each GPU; nodes are joined by all adapters
            rate = net.nvlink if near == ranks else min(net.nvlink, near * net.network)
            return latency + (ranks - 1) * sent / (rate * 1e9)
        apart = (ranks - near) * sent / ranks / (net.network * 1e9)
        return latency + max((near - 1) * sent / ranks / (net.nvlink * 1e9), apart)


# --- attention -------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _block(gpu: Gpu, block: Block, chunk: int) -> float:
    heads, seconds = block.heads, 0.0
    pairs = block.pairs * chunk**2
    if not pairs:
        return 0.0
    kernels = _kernels(gpu, heads, block.backward)
    for i, kernel in enumerate(kernels):
        name = kernel.name.removesuffix("_kernel")
        seconds += attention_constants().launch * bool(i)
        if name not in _PRODUCTS:  # delta: it reads out and do
            seconds += 4 * heads.Hq * heads.D * len(block.rows) * chunk / (gpu.copy * 1e9)
            continue
        BLOCK_M, BLOCK_N = kernel.tile
        if name == "dkdv":
            parts = _parts(block, chunk, BLOCK_N)
            tiles = of_keys(block, chunk, kernel.tile, parts)
            seconds += _sum_of_parts(gpu, block, chunk, parts)
        else:
            tiles = of_rows(block, chunk, kernel.tile)
        work = [tile for tile in tiles if tile.plain or tile.masked]
        empty = sum(tile.count for tile in tiles) - sum(tile.count for tile in work)
        read = steps(work) * (BLOCK_M if name == "dkdv" else BLOCK_N) * heads.D * 2 * 2
        flops = 4 * heads.Hq * heads.D * pairs * _PRODUCTS[name]
        kind = "attention backward" if block.backward else "attention forward"
        first = attention.bytes_for_delta(kernel, kernels, heads.D)
        made = attention.kernel_estimate(
            gpu, kernel, work, flops=flops, l2_bytes=read, kind=kind, empty=empty, first=first
        )
        seconds += made.seconds
    return seconds


@functools.cache
def _kernels(gpu: Gpu, heads: Heads, backward: bool) -> list[Kernel]:
    """What a call with bounds for each row launches, whatever its length."""
    S, group = 2048, heads.Hq // heads.Hkv
    q, k = (torch.empty(1, S, H, heads.D, dtype=torch.bfloat16).transpose(1, 2) for H in (2 * group, 2))
    bound = torch.empty(1, S, dtype=torch.int32)
    rest = attention_options(S, S, heads.D**-0.5, kv_start=bound, kv_end=bound, right=None)
    if not backward:
        return compiled(gpu.family, lambda: KERNELS["attention_forward"](q, k, k, *rest, torch.float32), gpu)
    lse, last = torch.empty(1, 2 * group, S), (True, True, True, False, True, torch.float32)
    return compiled(gpu.family, lambda: KERNELS["attention_backward"](q, None, q, k, k, q, lse, *rest, *last), gpu)


def of_rows(block: Block, chunk: int, tile: tuple[int, int]) -> list[Tile]:
    """Programs that keep rows and walk over the keys (forward, dq), the last rows first, as they are launched."""
    BLOCK_M, BLOCK_N = tile
    found = []
    for row in block.rows:
        for m in range(0, chunk, BLOCK_M):
            seen_by_all = row.whole * chunk + (m + 1 if row.causal else 0)
            seen_by_any = row.whole * chunk + (min(m + BLOCK_M, chunk) if row.causal else 0)
            plain, blocks = seen_by_all // BLOCK_N, -(-seen_by_any // BLOCK_N)
            found.append(Tile(plain, blocks - plain, block.heads.Hq))
    return found[::-1]


def _parts(block: Block, chunk: int, BLOCK_N: int) -> int:
    """How many programs divide the query heads of a key head among them."""
    heads = block.heads
    q, k = (torch.empty(1, H, chunks * chunk, heads.D, dtype=torch.bfloat16, device="meta")
            for H, chunks in ((heads.Hq, len(block.rows)), (heads.Hkv, block.keys)))  # fmt: skip
    rest = attention_options(q.shape[2], k.shape[2], heads.D**-0.5, right=None)
    return parts_of_group(AttentionCall(q, k, k, *rest), BLOCK_N)


def _sum_of_parts(gpu: Gpu, block: Block, chunk: int, parts: int) -> float:
    """Seconds of the two launches that add up the parts of dk and of dv."""
    if parts == 1:
        return 0.0
    elements = 2 * block.heads.Hkv * block.keys * chunk * block.heads.D
    return 4 * (parts + 1) * elements / (gpu.copy * 1e9) + 2 * attention_constants().launch


def of_keys(block: Block, chunk: int, tile: tuple[int, int], parts: int = 1) -> list[Tile]:
    """Programs that keep keys and walk over the rows of a part of a group of heads (dk and dv)."""
    BLOCK_M, BLOCK_N = tile
    group, in_chunk = block.heads.Hq // block.heads.Hkv // parts, -(-chunk // BLOCK_M)
    found = []
    for key in range(block.keys):
        whole = in_chunk * sum(row.first <= key < row.first + row.whole for row in block.rows)
        diagonal = sum(row.causal and key == row.first + row.whole for row in block.rows)
        for n in range(0, chunk, BLOCK_N):
            below = (in_chunk - n // BLOCK_M) * diagonal
            masked = min(-(-BLOCK_N // BLOCK_M) * diagonal, below)
            found.append(Tile(group * (whole + below - masked), group * masked, block.heads.Hkv * parts))
    return _joined(found)


def _joined(tiles: Sequence[Tile]) -> list[Tile]:
    """Tiles of the same work are one. The longest come first, as under a causal mask."""
    counts: Counter[tuple[float, float]] = Counter()
    for tile in tiles:
        counts[tile.plain, tile.masked] += tile.count
    made = (Tile(*work, count) for work, count in counts.items())
    return sorted(made, key=lambda tile: tile.plain + tile.masked, reverse=True)


def own_block(heads: Heads, chunks: int, backward: bool) -> Block:
    """Causal attention of a rank of a zigzag ring to its own keys, as theory has it. chunks: those of a rank."""
    return Block(heads, tuple(Rows(0, i, True) for i in range(chunks)), chunks, backward)


def other_blocks(heads: Heads, chunks: int, backward: bool) -> tuple[Block, Block]:
    """Attention to the keys of a rank before it, whose first half every query sees, and to those of a rank after it,
    all of which the second half of the queries sees."""
    before = (Rows(0, chunks // 2, False),) * chunks
    after = (Rows(0, 0, False),) * (chunks // 2) + (Rows(0, chunks, False),) * (chunks // 2)
    return Block(heads, before, chunks, backward), Block(heads, after, chunks, backward)
