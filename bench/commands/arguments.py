"""`python -m bench`: measures kernels side by side. See docs/bench.md.

python -m bench                       every provider at the shapes of published models; a report in build/bench
python -m bench --preset sweeps       the same over sizes
python -m bench parity                parity at small shapes, without times: a gate for CI
python -m bench compare A.json B.json what became slower from A to B; exits with 1 if anything did
python -m bench report FILES          draws the pictures and the page again from records
python -m bench providers             which providers can be measured here, and why the others cannot
python -m bench estimate              estimates speed without a GPU, beside published speeds
python -m bench calibrate [PEERS]     how far these estimates are off: for our kernels, and the peers' in a folder
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.commands.kept import compare_runs, list_providers, redraw
from bench.commands.parity import check_parity
from bench.commands.run import run
from bench.estimate import OPS as ESTIMATED
from bench.estimate.constants import gpus
from bench.providers.registry import PROVIDERS
from bench.reporting import compare
from bench.training.scale import TRAINING
from bench.works.presets import DTYPES, OPS, PRESETS
from bench.works.work import DIRECTIONS


def parser() -> argparse.ArgumentParser:
    layout = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    whole = argparse.ArgumentParser(prog="python -m bench", description=__doc__, **layout)
    commands = whole.add_subparsers(dest="command")
    names, ops = [p.name for p in PROVIDERS], (*OPS, *TRAINING)

    def command(
        name: str, do: Callable[[argparse.Namespace], int], text: str, **defaults: Any
    ) -> Callable[..., argparse.Action]:
        one = commands.add_parser(name, help=text, description=text)
        one.set_defaults(do=do, **defaults)
        return one.add_argument

    def add_measuring(add: Callable[..., argparse.Action], folder: str, minutes: float) -> None:
        """Add the options of every command that measures."""
        add_device(add)
        add("--minutes", type=_positive, default=minutes,
            help="time limit; work that is left then is listed as not run (default: %(default)s)")  # fmt: skip
        add("--out", type=Path, default=Path(folder), metavar="FOLDER", help="default: %(default)s")
        add("--resume", action="store_true", help="continue from FOLDER/records.json; its rows are not measured again")
        add("--patience", type=_positive, default=10, metavar="MINUTES",
            help="leave out a provider whose single step takes longer (default: %(default)s)")  # fmt: skip
        add("--in-process", action="store_true",
            help="measure in this process, for a debugger; a provider that crashes then ends the run")  # fmt: skip

    def add_device(add: Callable[..., argparse.Action]) -> None:
        here = "cuda" if torch.cuda.is_available() else "cpu"
        add("--device", type=_device, choices=("cpu", "cuda"), default=here, help="default here: %(default)s")

    add = command("run", run, "measure (the default command)")
    add("--preset", choices=PRESETS, default="models", help="which shapes (default: %(default)s)")
    add("--ops", nargs="+", choices=ops, default=ops, metavar="OP", help=f"of {', '.join(ops)} (default: all)")
    add("--shapes", default="", metavar="TEXT", help="only shapes whose name contains TEXT, such as 8B")
    add("--dtypes", nargs="+", choices=DTYPES, default=["bf16"], help="default: bf16")
    add("--directions", nargs="+", choices=DIRECTIONS, default=DIRECTIONS, help="default: all three")
    add("--providers", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)} (default: all)")
    add("--seconds", type=_positive, default=0.5, help="seconds of samples for each direction (default: %(default)s)")
    add_measuring(add, "build/bench", 30)
    add("--json", type=Path, metavar="FILE", help="also write the records to FILE")
    add("--save", action="store_true", help="keep the records in bench/results/<gpu>/")
    add("--workers", type=int, default=os.cpu_count(), help="processes that compile, without a GPU")
    add("--hopper", action="store_true", help="use all Hopper kernels of attention, not only those on by default")

    add = command("parity", check_parity, "parity at small shapes, without times",
                  directions=None, hopper=False, seconds=0.0)  # fmt: skip
    add_measuring(add, "build/parity", math.inf)
    add("--ops", nargs="+", choices=OPS, default=OPS, metavar="OP")
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    add("--providers", nargs="+", choices=names, metavar="NAME")
    add("--json", type=Path, metavar="FILE")

    add = command("compare", compare_runs, "compare two files of records; exits with 1 on a regression, 2 on an error")
    add("before", type=Path)
    add("after", type=Path)
    add("--threshold", type=_positive, default=100 * compare.THRESHOLD, metavar="PERCENT",
        help="a time that grew by more is a regression (default: %(default)s)")  # fmt: skip
    add("--all", action="store_true", help="compare all providers, not only llama_kernels")

    add = command("report", redraw, "draw the pictures and the page again from records")
    add("files", type=Path, nargs="+")
    add("--out", type=Path, default=Path("build/bench"), metavar="FOLDER")

    add = command("estimate", estimate_speed, "estimates of speed without a GPU, beside published speeds")
    add("--gpus", nargs="+", choices=tuple(gpus()), default=["H100", "A100"], metavar="GPU",
        help=f"of {', '.join(gpus())} (default: H100 A100)")  # fmt: skip
    add("--ops", nargs="+", choices=ESTIMATED, default=ESTIMATED, metavar="OP",
        help=f"of {', '.join(ESTIMATED)} (default: all)")  # fmt: skip
    add(
        "--hopper",
        action="store_true",
        help="attention on Hopper GPUs takes all Hopper kernels; some are on by default",
    )
    add("--json", type=Path, metavar="FILE", help="write our estimates there")
    add(
        "--before",
        type=Path,
        metavar="FILE",
        help="what --json wrote another day: show the change beside each estimate",
    )
    add("--layer", type=Path, metavar="FILE", help="a Llama 3.1 8B layer: write a picture of where its time goes")
    add("--context-parallel", type=Path, metavar="FILE",
        help="only context-parallel attention on 2 to 512 GPUs: what the network costs, and a picture")  # fmt: skip
    add("--peers", type=Path, metavar="PEERS", help="with --layer: a folder with Liger, whose parts are shown too")

    add = command("calibrate", calibrate_models, "how far estimates are off, where the speed is known")
    add("peers", type=Path, nargs="?", metavar="PEERS", help="a folder with the code of peers, to compare these too")
    add("--only", default="", metavar="OP", help='figures of an op, as "rms_norm" or "attention forward"')
    add("--record", action="store_true", help="keep the errors, which `estimate` prints, in bench/estimate/errors.json")

    add_device(command("providers", list_providers, "which providers can be measured here, and why others cannot"))
    return whole


def estimate_speed(args: argparse.Namespace) -> int:
    if args.context_parallel is not None:
        from bench.commands.context_parallel import estimate_context_parallel

        return estimate_context_parallel(args)
    from bench.commands.estimate import estimate_speed  # compiles, so it needs Triton, which the rest does not

    return estimate_speed(args)


def calibrate_models(args: argparse.Namespace) -> int:
    from bench.commands.calibrate import calibrate_models  # likewise

    return calibrate_models(args)


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _device(text: str) -> str:
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch sees no GPU here")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["run", *argv]
    args = parser().parse_args(argv, argparse.Namespace(argv=argv))
    return args.do(args)
