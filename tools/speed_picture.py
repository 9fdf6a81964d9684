"""Draws the picture of speed in the README from records of the bench: `python -m tools.speed_picture FILES`.

It writes docs/pictures/speed.svg: for each op and direction, how near each provider came to the machine's own limit. Of
a call in several files, the last is drawn.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

PICTURE = Path(__file__).parent.parent / "docs" / "pictures" / "speed.svg"
COLORS = {
    "llama_kernels": "#0b6e4f",
    "torch.compile": "#5b6670",
    "F.rms_norm": "#b58b3f",
    "sdpa-cudnn": "#6a9f1f",
    "sdpa-flash": "#c05621",
    "flex_attention": "#7c6bb0",
    "varlen_attn": "#3a86c8",
}
NAMES = {"sdpa-cudnn": "cuDNN (SDPA)", "sdpa-flash": "FlashAttention-2 (SDPA)", "flex_attention": "FlexAttention"}


def name_of(record: dict[str, Any]) -> str:
    op, sizes = record["op"], record["sizes"]
    about = f", D = {sizes['D']}, {sizes['S'] // 1024}k" if op == "attention" else ""
    about = f", {record['shape']}" if op == "attention_varlen" else about
    return f"{op}{about}: {record['direction']}"


def drawn(record: dict[str, Any]) -> bool:
    """rope_into_cache moves a few kilobytes, so a call takes as long as a launch, and its bandwidth says nothing."""
    return record["direction"] != "both" and record["percent"] is not None and record["op"] != "rope_into_cache"


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """One line a call, with a dot for each provider; ours is the largest."""
    by_call: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        new: dict[str, list[dict[str, Any]]] = {}
        for record in filter(drawn, run["records"]):
            new.setdefault(name_of(record), []).append(record)
        by_call |= new  # a call's providers are those of one run
    records = [record for own in by_call.values() for record in own]
    last = "attention", "rope_attention", "attention_varlen", "decode"
    calls = list(dict.fromkeys(name_of(r) for r in sorted(records, key=lambda r: _place(last, r["op"]))))
    with matplotlib.rc_context({"svg.hashsalt": "speed"}):
        figure, axes = plt.subplots(figsize=(8.4, 1.2 + 0.27 * len(calls)), layout="constrained")
        for height, call in enumerate(reversed(calls)):
            own = [r for r in records if name_of(r) == call]
            axes.hlines(height, min(r["percent"] for r in own), max(r["percent"] for r in own), color="#c8ccd0", lw=3)
        for provider, color in COLORS.items():
            own = [r for r in records if r["provider"] == provider]
            heights = [len(calls) - 1 - calls.index(name_of(r)) for r in own]
            ours = provider == "llama_kernels"
            axes.scatter([r["percent"] for r in own], heights, color=color, s=90 if ours else 40,
                         label=NAMES.get(provider, provider), zorder=2 if ours else 3)  # fmt: skip
        axes.set_yticks(range(len(calls)), reversed(calls))
        axes.set_xlim(0, 100)
        axes.set_xlabel("% of the speed of a copy in memory, or of a\nmatrix product in attention (higher is better)")
        figure.suptitle(_finding(records, calls), x=0.01, ha="left", fontsize=13, fontweight="bold")
        axes.set_title(f"Measured on an {runs[-1]['machine']['gpu']} in bfloat16", loc="left", fontsize=10)
        axes.grid(axis="x", color="#e8eaed")
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(left=False)
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def _place(last: tuple[str, ...], op: str) -> int:
    return last.index(op) + 1 if op in last else 0


def _finding(records: list[dict[str, Any]], calls: list[str]) -> str:
    """The title: how often ours is the fastest, and how near the fastest it is where it is not."""
    shares = []
    for call in calls:
        own = {r["provider"]: r["percent"] for r in records if name_of(r) == call}
        shares.append(own["llama_kernels"] / max(own.values()))
    fastest = sum(share == 1 for share in shares)
    return f"The fastest in {fastest} of {len(calls)} calls; elsewhere {int(100 * min(shares))}% of the fastest or more"


if __name__ == "__main__":
    draw([json.loads(Path(file).read_text(encoding="utf-8")) for file in sys.argv[1:]], PICTURE)
