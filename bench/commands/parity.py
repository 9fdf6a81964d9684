"""`python -m bench parity`: the numbers of every provider at small shapes, without times. The gate of CI.

Without a GPU, the kernels run in Triton's interpreter. Exits with 1 if an op of llama_kernels is wrong.
"""

from __future__ import annotations

import argparse

import torch

from bench.commands.session import in_new_processes, measure, status_of
from bench.measuring import records
from bench.providers.provider import OURS
from bench.reporting.terminal import console, say_absent
from bench.works import presets
from llama_kernels.core.language import INTERPRETED


def check_parity(args: argparse.Namespace) -> int:
    device = "cpu" if INTERPRETED else args.device
    if device == "cuda" and not args.in_process:
        return in_new_processes(args)
    works = [w for w in presets.small([presets.DTYPES[name] for name in args.dtypes]) if w.op in args.ops]
    torch.set_num_threads(1)
    try:
        made = measure(args, works, [], device, None)
    except ValueError as e:
        console.print(f"bench parity: {e}", soft_wrap=True)
        return 2
    if args.json:
        records.write(made, args.json)
    if (status := status_of(made)) is not None:
        return status
    say_absent(made)
    wrong = [r for r in made.records if r.provider == OURS and r.reason]
    where = "on the GPU" if device == "cuda" else "in Triton's interpreter" if INTERPRETED else "on the CPU path"
    console.print(f"llama_kernels {where}: {'WRONG' if wrong else 'right'} in {len(works)} pieces of work")
    return 1 if wrong else 0
