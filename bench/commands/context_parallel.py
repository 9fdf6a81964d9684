"""`python -m bench estimate --context-parallel FILE`: what the network costs context-parallel attention, estimated."""

from __future__ import annotations

import argparse
import math

from rich.table import Table

from bench.estimate.constants import Gpu, Network, gpus, network
from bench.estimate.context_parallel.cases import SCALES, SURE, Made, Row, Scale, hides_from, name_of, rows
from bench.estimate.context_parallel.costs import Kernels, Place
from bench.estimate.context_parallel.paper import METHODS, times
from bench.estimate.context_parallel.picture import picture
from bench.estimate.context_parallel.schedule import simulated
from bench.estimate.context_parallel.steps import recorded
from bench.reporting.terminal import console

_SIMULATED = 16  # ranks at most, all of which are recorded and simulated


def estimate_context_parallel(args: argparse.Namespace) -> int:
    gpu, net = gpus()[args.gpus[0]], network()
    if gpu.family != "sm_90":
        console.print(f"bench estimate: --context-parallel: {gpu.name}: the constants of the network are of nodes of "
                      "H100 or H200. Choose --gpus H100 or H200.")  # fmt: skip
        return 2
    console.print(f"Estimates, not measurements: {gpu.name}, {net.gpus_of_a_node} to a node, NVLink at {net.nvlink:g} "
                  f"GB/s and a 400 Gb/s adapter a GPU at {net.network:g} GB/s each way. Attention of one causal "
                  "sequence in bfloat16, a layer forward and backward. +: longer than the ranks' share of the time on "
                  f"one GPU. waits: for transfers that are not hidden, from where attention takes {SURE:.0%} longer "
                  f"than estimated to where it is {SURE:.0%} faster and the network reaches {net.nvlink_low:g} and "
                  f"{net.network_low:g} GB/s.")  # fmt: skip
    found: dict[Scale, list[Row]] = {}
    for scale in SCALES:
        found[scale] = list(rows(gpu, scale, net))
        console.print(_table(scale, found[scale]))
        console.print(_hidden(gpu, scale, net))
    off = _difference(gpu, found)
    console.print(f"The formulas differ from the simulation of up to {_SIMULATED} ranks by {off:.1%} at most.")
    args.context_parallel.parent.mkdir(parents=True, exist_ok=True)
    picture(gpu, net, found).savefig(args.context_parallel, dpi=110)
    console.print(f"written: {args.context_parallel}", soft_wrap=True)
    return 0


def _table(scale: Scale, found: list[Row]) -> Table:
    table = Table(box=None, title=f"Estimate: {scale}. ms, +, waits", title_justify="left")
    for name in ("tokens", "ranks", "a rank", *map(name_of, METHODS), "fastest"):
        table.add_column(name)
    for tokens, ranks, made in found:
        cells = {each.setting.method: _cell(each) for each in made}
        in_order = (cells.get(method, "-") for method in METHODS)
        best = name_of(made[0].setting.method)
        table.add_row(f"{tokens // 1024}k", str(ranks), f"{tokens / ranks / 1024:g}k", *in_order, best)
    return table


def _cell(each: Made) -> str:
    least, most = (f"{100 * share:.0f}" for share in each.waiting)
    waits = least if least == most else f"{least}-{most}"
    return f"{each.time.seconds * 1e3:,.0f} +{each.overhead:.0%} {waits}%"


def _hidden(gpu: Gpu, scale: Scale, net: Network) -> str:
    """From how many tokens a rank on a ring's transfers are hidden."""
    said = []
    for link, node in (("NVLink", 2), ("the network", 1)):
        forward, backward = (hides_from(gpu, scale, Place(net, node), backward) for backward in (False, True))
        said.append(f"{forward:,} and {backward:,} over {link}")
    return f"A hop is hidden from so many tokens a rank, forward and backward: {'; '.join(said)}."


def _difference(gpu: Gpu, found: dict[Scale, list[Row]]) -> float:
    """The largest difference between a formula and the simulation, as a share of the time."""
    costs, worst = Kernels(gpu), 0.0
    for row in (row for each in found.values() for row in each if row.ranks <= _SIMULATED):
        for setting in (made.setting for made in row.made):
            steps = [recorded(setting.method, setting.mesh, setting.heads, rank) for rank in range(setting.ranks)]
            for backward in (False, True):
                ran = simulated([each[backward] for each in steps], costs, setting.place, setting.chunk)
                worst = max(worst, math.fabs(times(setting, costs, backward).seconds / ran.seconds - 1))
    return worst
