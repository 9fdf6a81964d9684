"""The recorded figures of the plain causal kernels of attention: machine_code.json."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import triton

from bench.codegen.reading import Report

RECORD = Path(__file__).with_name("machine_code.json")


def plain(reports: list[Report]) -> dict[str, dict[str, int]]:
    """The recorded figures of the kernels of causal attention without other options, in half precision."""
    return {
        f"{r.target} {r.op} {r.kernel} {r.label}": {
            "instructions": r.instructions,
            "in loops": sum(loop.instructions for loop in r.loops),
            "registers": r.registers,
            "shared_bytes": r.shared_bytes,
            "programs": r.loops[0].programs if r.loops else 0,
        }
        for r in reports
        if r.op in ("attention", "decode", "hopper") and re.match(r"D=\S+ \w*float16 causal$", r.label)
    }


def changes(reports: list[Report], record: dict[str, Any]) -> list[str]:
    """What differs from the record. Nothing if the record was made with another Triton."""
    if record["triton"] != triton.__version__:
        return []
    found = []
    for kernel, now in plain(reports).items():
        then = record["kernels"].get(kernel)
        if then is None:
            found.append(f"{kernel}: not recorded")
        elif then != now:
            changed = (f"{name} {then[name]} -> {now[name]}" for name in now if then[name] != now[name])
            found.append(f"{kernel}: {', '.join(changed)}")
    return found


def read() -> dict[str, Any]:
    return json.loads(RECORD.read_text())


def write(reports: list[Report]) -> None:
    """Write the record from `reports`."""
    RECORD.write_text(one_a_line({"triton": triton.__version__, "kernels": plain(reports)}))


def one_a_line(record: dict[str, Any]) -> str:
    """The record as JSON with one line for each kernel, sorted by name."""
    kernels = (
        f"  {json.dumps(name)}: {json.dumps(values, sort_keys=True)}"
        for name, values in sorted(record["kernels"].items())
    )
    return f'{{\n "triton": {json.dumps(record["triton"])},\n "kernels": {{\n' + ",\n".join(kernels) + "\n }\n}\n"
