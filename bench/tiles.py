"""Other tiles of attention, timed on this GPU: `python -m bench.tiles [--passes dq] [--widths 128] [--json FILE]`.

The tables of tiles (llama_kernels/ops/attention/tables.py) say which tile a call takes. For each pass and width, this
compiles the tile of the table and those around it on all cores, compares each with float64, and times the right ones in
turns. It prints them, the fastest first, and changes nothing: a faster tile must also compile without a spill under
every option (`python -m bench.codegen`).

bfloat16, causal, without options; the portable kernels alone. The time of dq, and of dk and dv, includes the short
launch that computes delta.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.table import Table

import llama_kernels as lk
from bench.attention_options import attention_options
from bench.measuring import machine, timing
from bench.reporting.terminal import console
from bench.works.errors import UNIT, relative_errors
from llama_kernels.core import launch_cache
from llama_kernels.core.device import arch_of
from llama_kernels.ops.attention import tables
from llama_kernels.ops.attention.hopper import switch
from llama_kernels.ops.attention.tables import Tile

PASSES = ("forward", "dq", "dkdv")
PRODUCTS = {"forward": 2, "dq": 3, "dkdv": 4}  # of the size of q @ k^T
B, S, CHECKED = 2, 8192, 512  # sequences, their tokens where a tile is timed, and where it is compared
HEADS = {64: (32, 8), 128: (32, 8), 256: (16, 8)}
DTYPE, DEVICE = torch.bfloat16, "cuda"
Result = tuple[torch.Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Candidate:
    pass_: str
    width: int
    tile: Tile


# --- the candidates --------------------------------------------------------------------------------------------------


def around(tile: Tile) -> list[Tile]:
    """`tile`, and those that differ from it in at most two of rows, keys, warps and stages."""
    rows, keys = ({n, n // 2, 2 * n} for n in (tile.BLOCK_M, tile.BLOCK_N))
    near = itertools.product(
        sorted(rows), sorted(keys), (4, 8), range(max(tile.num_stages - 1, 1), tile.num_stages + 2)
    )
    bare, own = Tile(**tile.launch_options, split=tile.split), tuple(tile.launch_options.values())
    found = [bare]
    for numbers in near:
        changed = sum(a != b for a, b in zip(numbers, own, strict=True))
        if 0 < changed <= 2 and min(numbers[:2]) >= 16 and max(numbers[:2]) <= 128:
            found.append(dataclasses.replace(bare, **dict(zip(bare.launch_options, numbers, strict=True))))
    return found


@contextlib.contextmanager
def taking(candidate: Candidate) -> Iterator[None]:
    """Inside, the pass takes the candidate's tile, and no Hopper kernel runs."""
    usual = tables.tile

    def tile(family: str, pass_: str, *others: Any) -> Tile:
        return candidate.tile if pass_ == candidate.pass_ else usual(family, pass_, *others)

    launch_cache.clear()
    with mock.patch.object(tables, "tile", tile), mock.patch.object(switch, "may_run", lambda pass_: False):
        yield
    launch_cache.clear()


# --- the calls -------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def _tensors(width: int, S: int) -> tuple[torch.Tensor, ...]:
    """q, k, v and do (B, heads, S, width)."""
    Hq, Hkv = HEADS[width]
    generator = torch.Generator(DEVICE).manual_seed(0)
    return tuple(
        torch.randn(B, S, H, width, dtype=DTYPE, device=DEVICE, generator=generator).transpose(1, 2)
        for H in (Hq, Hkv, Hkv, Hq)
    )


@functools.lru_cache(maxsize=2)
def _outputs(width: int, S: int) -> Result:
    """out and lse, by the tile of the table."""
    q, k, v, _ = _tensors(width, S)
    with torch.no_grad():
        return lk.attention(q, k, v, return_lse=True)


@functools.lru_cache(maxsize=1)
def _truth(width: int) -> dict[str, Result]:
    """The results of each pass in float64, for sequences of CHECKED tokens."""
    *leaves, do = (x.double() for x in _tensors(width, CHECKED))
    for x in leaves:
        x.requires_grad_()
    out = lk.reference.attention(*leaves)
    dq, dk, dv = torch.autograd.grad(out, leaves, do)
    return {"forward": (out.detach(),), "dq": (dq,), "dkdv": (dk, dv)}


def call_of(candidate: Candidate, S: int) -> Callable[[], Result]:
    """The candidate's call; the pass alone, with delta for a gradient."""
    q, k, v, do = _tensors(candidate.width, S)
    options = attention_options(S, S, candidate.width**-0.5)
    ops = torch.ops.llama_kernels
    if candidate.pass_ == "forward":
        return lambda: ops.attention_forward(q, k, v, *options)[:1]
    of_q = candidate.pass_ == "dq"
    out, lse = _outputs(candidate.width, S)

    def backward() -> Result:
        grads = ops.attention_backward(do, None, q, k, v, out, lse, *options, of_q, not of_q, not of_q, False, None)
        return grads[:1] if of_q else grads[1:3]

    return backward


# --- measuring -------------------------------------------------------------------------------------------------------


def compare(candidate: Candidate) -> str:
    """Compile the candidate, and compare it with float64. Returns why it is not timed, or ""."""
    try:
        with taking(candidate), torch.no_grad():
            results = call_of(candidate, CHECKED)()
        with torch.enable_grad():
            truth = _truth(candidate.width)[candidate.pass_]
        error = max(relative_errors(x, exact)[0] for x, exact in zip(results, truth, strict=True))
    except Exception as e:  # an error of the compiler, or too much shared memory
        return f"{type(e).__name__}: {e}".splitlines()[0][:100]
    return "" if error <= 4 * UNIT[DTYPE] else f"wrong numbers: off by {error:.1e}"


def measured(candidates: Sequence[Candidate], seconds: float) -> dict[Tile, timing.Timing]:
    """The times of candidates of one pass and width, which take samples in turns."""
    gpu, samplers = timing.GpuClock(), {}
    for candidate in candidates:
        with taking(candidate), torch.no_grad():
            sampling = gpu.sampler([call_of(candidate, S)])
        if sampling.method == "graph":  # a graph keeps its kernels; later calls would take the tile of the table
            samplers[str(candidate.tile)] = sampling.sampler
    taken = timing.in_turns(samplers, seconds)
    return {c.tile: taken[str(c.tile)] for c in candidates if str(c.tile) in taken}


def show(pass_: str, width: int, own: Tile, times: dict[Tile, timing.Timing], reasons: dict[Tile, str]) -> None:
    Hq, _ = HEADS[width]
    flops = PRODUCTS[pass_] * 2 * width * S * S / 2 * B * Hq
    shown = Table(title=f"{pass_}, width {width}", title_justify="left", box=None)
    for name in ("rows x keys, warps, stages", "ms", "±", "TFLOP/s", ""):
        shown.add_column(name, justify="left" if name in ("", "rows x keys, warps, stages") else "right")
    for tile, time in sorted(times.items(), key=lambda pair: pair[1].ms):
        cells = f"{time.ms:.3f}", f"{time.spread:.1%}", f"{flops / time.ms / 1e9:.0f}"
        shown.add_row(str(tile), *cells, "the table's" if tile == own else "", style="bold" if tile == own else "")
    for tile, reason in reasons.items():
        shown.add_row(str(tile), "", "", "", reason, style="dim")
    console.print(shown)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tiles", description=__doc__.split("\n\n")[0])
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES, help="default: all")
    parser.add_argument(
        "--widths", nargs="+", type=int, choices=tuple(HEADS), default=tuple(HEADS), help="default: all"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="of samples for a pass and width (default: 2)")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 16), help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the times to FILE")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        console.print("bench.tiles: torch sees no GPU here. `python -m bench estimate` estimates speed without one.")
        return 2
    family = arch_of(torch.device("cuda"))
    rows = {
        (pass_, width): [Candidate(pass_, width, tile) for tile in around(tables.tile(family, pass_, width, DTYPE))]
        for pass_, width in itertools.product(args.passes, args.widths)
    }
    every = list(itertools.chain(*rows.values()))
    spawn = multiprocessing.get_context("spawn")
    with console.status(f"compiling {len(every)} tiles"), ProcessPoolExecutor(args.workers, spawn) as pool:
        found = dict(zip(every, pool.map(compare, every), strict=True))
    written = []
    for (pass_, width), candidates in rows.items():
        right = [c for c in candidates if not found[c]]
        times = measured(right, args.seconds)
        show(pass_, width, candidates[0].tile, times, {c.tile: found[c] for c in candidates if found[c]})
        written += [{"pass": pass_, "width": width, "tile": str(t), **dataclasses.asdict(x)} for t, x in times.items()]
    if args.json:
        args.json.write_text(json.dumps({"machine": machine.describe("cuda"), "times": written}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
