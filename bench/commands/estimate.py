"""`python -m bench estimate`: estimates of speed without a GPU, beside speeds that others published.

Nothing that it prints was measured here. Each of our lines has its uncertainty and the limit that binds.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Iterator

from rich.markup import escape
from rich.table import Table

from bench.estimate import layer, layer_picture, ours, packed, published
from bench.estimate.constants import Gpu, gpus
from bench.estimate.published import Figure
from bench.estimate.result import LIMITS, Estimate
from bench.estimate.tiles import Shape
from bench.reporting.terminal import console
from bench.works.attention import AttentionVarlen
from bench.works.norms import NORMS, RMSNorm
from bench.works.rotations import QKNormRope, Rope, RopeQKV
from bench.works.work import Work

ESTIMATED = (*ours.ROW_OPS, "attention", "attention_varlen")
_ROWS = 32768  # of RMSNorm
_WIDTHS = (1024, 4096, 8192, 16384, 65536)
_LENGTHS = (1024, 2048, 4096, 8192, 16384)  # of 32k tokens
_DOCUMENTS = {"16 of 2,048": (2048,) * 16, "1 of 8,192 and 64 of 384": (8192, *(384,) * 64)}


def estimate_speed(args: argparse.Namespace) -> int:
    console.print("Estimates by models of the machine code, not measurements. ±: the mean error of the same model for "
                  "peers' kernels whose speed is published; 30% where none can be compared.")  # fmt: skip
    for gpu in (gpus()[name] for name in args.gpus):
        for work, direction in _works(args.ops):
            made = ours.timed(ours.work_estimate(gpu, work, direction))
            _show(gpu, f"{work.op} {direction}", work.sizes, work.bytes(direction) / 1e9, "GB/s", {"ours": made})
        if "attention" in args.ops:
            _attention(gpu, args.hopper)
        if "attention_varlen" in args.ops:
            _packed(gpu)
    if args.layer is not None:
        _layer(gpus()[args.gpus[0]], args)
    return 0


def _works(ops: Iterable[str]) -> Iterator[tuple[Work, str]]:
    norms: Iterable[Work] = (kind(shape="", M=_ROWS, N=N) for kind, N in itertools.product(NORMS, _WIDTHS))
    heads = {"B": 4, "S": 8192, "Hq": 32, "Hkv": 8, "D": 128}
    rotations = (kind(shape="", **heads) for kind in (Rope, QKNormRope, RopeQKV))
    for work in itertools.chain(norms, rotations):
        # The backward of longer rows takes three launches, whose loops the model does not know.
        long = isinstance(work, RMSNorm) and work.N > 16384
        for direction in ("forward",) if long else ("forward", "backward"):
            if work.op in ops:
                yield work, direction


def _attention(gpu: Gpu, hopper: bool) -> None:
    kinds = {"ours, portable": False} | ({"ours, Hopper kernels": True} if hopper and gpu.family == "sm_90" else {})
    for D, direction, S in itertools.product((128, 64), ("forward", "backward"), _LENGTHS):
        shape = Shape(32768 // S, S, 32, 8, D)
        flops = shape.flops * (2.5 if direction == "backward" else 1) / 1e12
        made = {who: ours.timed(ours.attention_estimate(gpu, shape, direction, on)) for who, on in kinds.items()}
        sizes = {"B": shape.B, "S": S, "Hq": 32, "Hkv": 8, "D": D, "causal": True}
        _show(gpu, f"attention {direction}", sizes, flops, "TFLOP/s", made)


def _packed(gpu: Gpu) -> None:
    for name, lengths in _DOCUMENTS.items():
        for direction in ("forward", "backward"):
            work = AttentionVarlen(shape="", lengths=lengths, Hq=32, Hkv=8, D=128)
            flops = work.flops(direction) / 1e12
            made = packed.packed_estimate(gpu, work, direction)
            _show(
                gpu, f"attention_varlen {direction}", {"documents": name}, flops, "TFLOP/s", {"ours": ours.timed(made)}
            )


# --- lines -----------------------------------------------------------------------------------------------------------


def _show(gpu: Gpu, what: str, sizes: dict[str, object], amount: float, unit: str, made: dict[str, Estimate]) -> None:
    """amount: of what `unit` counts, in a call."""
    text = " ".join(f"{k}={v}" for k, v in sizes.items())
    table = Table(box=None, title=f"{gpu.name}: {what}, {text}", title_justify="left")
    for name in ("who", "estimate or published", unit, "limit, or source"):
        table.add_column(name)
    for who, e in made.items():
        low, high = amount / e.high, amount / e.low
        idle = f"; empty programs take {e.empty / e.seconds:.0%}" if e.empty > 0.01 * e.seconds else ""
        time = f"estimate {e.seconds * 1e6:,.0f} us ±{e.error:.0%}"
        table.add_row(who, time, f"{low:,.0f} to {high:,.0f}", f"bound by {LIMITS[e.limit]}{idle}")
    for figure in published_for(gpu, what, sizes):
        table.add_row(figure.who, "published", f"{_rate(figure, amount):,.0f}", escape(_where(figure, sizes)))
    console.print(table)


def published_for(gpu: Gpu, what: str, sizes: dict[str, object]) -> Iterator[Figure]:
    """Published figures of the op on `gpu`, at the same width and length, whatever their batch, heads and mask."""
    same = [k for k in ("N", "S", "D") if k in sizes]
    for figure in published.figures():
        alike = all(figure.sizes.get(k) == sizes[k] for k in same)
        if (figure.what, figure.gpu, figure.clock) == (what, gpu.name, None) and alike:
            yield figure


def _rate(figure: Figure, amount: float) -> float:
    """In the unit that `amount` counts. Published times of RMSNorm are of another number of rows."""
    if figure.unit != "us":
        return figure.value
    share = float(figure.sizes["M"]) / _ROWS * (2 if figure.sizes["dtype"] == "float32" else 1)
    return amount * share / (figure.value * 1e-6)


def _where(figure: Figure, sizes: dict[str, object]) -> str:
    """Its source, with what is not as in our line."""
    told = {"M", "B", "Hq"} | ({"dtype"} if figure.sizes.get("dtype") == "float32" else set())
    other = [f"{k} {v}" for k, v in figure.sizes.items() if k in told and v != sizes.get(k)]
    if figure.sizes.get("causal") is False:
        other.append("not causal")
    return "; ".join([figure.source, ", ".join(other), figure.note]).strip("; ")


# --- a layer ---------------------------------------------------------------------------------------------------------


def _layer(gpu: Gpu, args: argparse.Namespace) -> None:
    stacks = layer.stacks(gpu, args.hopper, args.peers)
    table = Table(box=None, title=f"{gpu.name}: {layer.TITLE}, estimates", title_justify="left")
    for name in ("stack", "part", "launches", "forward", "backward", "share"):
        table.add_column(name)
    for stack in stacks:
        for part in stack.parts:
            table.add_row(stack.name, part.name, str(part.launches), f"{part.forward * 1e3:.2f} ms",
                          f"{part.backward * 1e3:.2f} ms", f"{part.seconds / stack.seconds:.0%}")  # fmt: skip
        table.add_row(stack.name, "[bold]together[/]", str(stack.launches), f"{stack.forward * 1e3:.2f} ms",
                      f"{stack.backward * 1e3:.2f} ms", "100%")  # fmt: skip
    console.print(table)
    args.layer.parent.mkdir(parents=True, exist_ok=True)
    layer_picture.picture(stacks, gpu).savefig(args.layer)
    console.print(f"written: {args.layer}", soft_wrap=True)
