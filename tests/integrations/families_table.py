"""Make the table of families in docs/transformers.md: python -m tests.integrations.families_table

It runs every check on every family and writes the table between two markers.
"""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "0")  # on a CPU, the reference path

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llama_kernels.integrations.transformers import patch, report
from tests.integrations.checks import CHECKS, Baseline
from tests.integrations.families import EVERY_FAMILY

PAGE = Path(__file__).parents[2] / "docs" / "transformers.md"
BEGIN = "<!-- families: made by python -m tests.integrations.families_table with Transformers {version} -->"
END = "<!-- families: end -->"
KINDS = {"attention": "attention", "rms_norm": "RMSNorm", "rope": "RoPE"}
FUSIONS = {"add_rms_norm": "add + norm", "qk_norm_rope": "q, k norm + RoPE"}


def installed() -> list[str]:
    return [family for family in EVERY_FAMILY if family in CONFIG_MAPPING]


def header() -> list[str]:
    names = ["family", *KINDS.values(), "fusions", *CHECKS]
    return ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]


def who_computes(rows: list[Any], kind: str) -> str:
    """The cell of one kind: ours, stock, or ours but for the classes that stay stock."""
    ours = [row.cls for row in rows if row.kind == kind and row.ours]
    theirs = sorted({row.cls for row in rows if row.kind == kind and not row.ours})
    return ("ours, but " + ", ".join(theirs) if theirs else "ours") if ours else "stock" if theirs else "—"


def families_row(family: str) -> tuple[str, dict[str, str], list[Any]]:
    """The row of the table, why each failed check failed, and the rows of `report` for the patched model."""
    baseline = Baseline(family)
    patched = copy.deepcopy(baseline.model)
    try:
        rows = report(patch(patched)).rows
    except ValueError as refusal:
        if not str(refusal).startswith("llama_kernels."):
            raise
        return "| " + " | ".join([family, *["stock"] * len(KINDS), "—", *["—"] * len(CHECKS)]) + " |", {}, []
    cells, failed = [], {}
    for name in CHECKS:
        try:
            if name in baseline.checks:
                baseline.check(name, patched)
            cells.append("✓" if name in baseline.checks else "—")
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
            cells.append("✗")
    fused = [name for kind, name in FUSIONS.items() if any(row.kind == kind and row.ours for row in rows)]
    kinds = [who_computes(rows, kind) for kind in KINDS]
    return "| " + " | ".join([family, *kinds, ", ".join(fused) or "—", *cells]) + " |", failed, rows


def committed() -> tuple[str, list[str]]:
    """The version of Transformers in the documentation's table, and the lines of the table."""
    before, after = BEGIN.split("{version}")
    _, _, rest = PAGE.read_text().partition(before)
    version, _, rest = rest.partition(after)
    return version, rest.partition(END)[0].strip().splitlines()


def main() -> int:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    lines, faults = header(), 0
    for family in installed():
        line, failed, _ = families_row(family)
        lines.append(line)
        faults += len(failed)
        for name, why in failed.items():
            print(f"{family}, {name}: {why}", file=sys.stderr)
    text = PAGE.read_text()
    first, last = text.index(BEGIN.split("{version}")[0]), text.index(END)
    table = "\n".join([BEGIN.format(version=transformers.__version__), "", *lines, "", ""])
    PAGE.write_text(text[:first] + table + text[last:])
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
