"""Draws the picture of accuracy in the README: `TRITON_INTERPRET=1 python -m tools.accuracy_picture`.

It runs the parity check of `python -m llama_kernels --check` in bfloat16, and writes docs/pictures/accuracy.svg.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch

from llama_kernels.core.language import INTERPRETED
from llama_kernels.diagnose import check

PICTURE = Path(__file__).parent.parent / "docs" / "pictures" / "accuracy.svg"
_SHOWN = "Of each call, the result or gradient nearest to its bound. Kernels in Triton's interpreter, on small inputs."
OURS, EAGER, LINE = "#0b6e4f", "#c05621", "#c8ccd0"


def draw(rows: list[check.Row], path: Path) -> None:
    """One line a call: the relative error of the kernel and of plain PyTorch, both against float64."""
    # Names of ids in the file are drawn from this, so that the same figures give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "accuracy"}):
        figure, axes = plt.subplots(figsize=(8.4, 4.8), layout="constrained")
        figure.get_layout_engine().set(rect=(0, 0.05, 1, 0.95))
        heights = range(len(rows), 0, -1)
        ours, eager = ([1e3 * (getattr(row, name) or 0.0) for row in rows] for name in ("error", "eager"))
        axes.hlines(heights, ours, eager, color=LINE, linewidth=3, zorder=1)
        axes.scatter(eager, heights, color=EAGER, s=52, label="plain PyTorch in bfloat16", zorder=2)
        axes.scatter(ours, heights, color=OURS, s=52, label="llama_kernels in bfloat16", zorder=3)
        axes.set_yticks(heights, [f"{row.call}: {row.nearest}" for row in rows])
        axes.set_xlim(left=0)
        axes.set_xlabel("relative error against float64, in thousandths (lower is better)")
        axes.grid(axis="x", color="#e8eaed")
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(left=False)
        axes.legend(loc="upper right", frameon=False)
        figure.suptitle(_finding(rows), x=0.01, ha="left", fontsize=13, fontweight="bold")
        figure.text(0.01, 0.01, _SHOWN, fontsize=8.5, color="#5f6368")
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def _finding(rows: list[check.Row]) -> str:
    """The title: in how many calls the kernel's error is at most that of plain PyTorch, to five digits."""
    as_good = sum(round(row.error or 0.0, 5) <= round(row.eager or 0.0, 5) for row in rows)
    which = "every call" if as_good == len(rows) else f"{as_good} of {len(rows)} calls"
    return f"At least as accurate as plain PyTorch in {which}"


def main() -> int:
    if not INTERPRETED and not torch.cuda.is_available():
        sys.exit("On a CPU the kernels run in Triton's interpreter only: set TRITON_INTERPRET=1.")
    device = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
    rows = [row for row in check.run(device) if row.dtype == "bfloat16"]
    if faults := [f"{row.call}: {fault}" for row in rows for fault in row.faults]:
        sys.exit("The parity check failed.\n" + "\n".join(faults))
    draw(rows, PICTURE)
    print(f"wrote {PICTURE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
