"""The environment report as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def report_lines(environment: dict[str, Any], kernels: dict[str, Any] | None = None) -> Iterator[str]:
    """The lines of the report: the sections of `environment`, then `kernels` unless it is None."""
    for name, value in environment.items():
        yield from _section(name, value)
    if kernels is not None:
        yield ""
        yield from _kernel_lines(kernels)


def _section(name: str, value: Any, indent: str = "") -> Iterator[str]:
    """A value on one line, a dictionary or a list on lines of its own."""
    if isinstance(value, dict) and set(value) == {"error"}:
        yield f"{indent}{name}: could not be read: {value['error']}"
    elif isinstance(value, dict) and set(value) == {"none"}:
        yield f"{indent}{name}: {value['none']}"
    elif isinstance(value, dict):
        yield f"{indent}{name}:" + ("" if value else " none")
        for key, each in value.items():
            yield from _section(key, each, indent + "  ")
    elif isinstance(value, list):
        yield f"{indent}{name}:"
        for each in value:
            yield f"{indent}  " + (", ".join(f"{k} {v}" for k, v in each.items()) if isinstance(each, dict) else each)
    else:
        yield f"{indent}{name}: {value}"


def _kernel_lines(kernels: dict[str, Any]) -> Iterator[str]:
    for tensors in ("CPU tensors", "GPU tensors"):
        path = kernels[tensors]
        yield f"{tensors} run: {path['runs']} ({path['why']})"
    yield "kernels of each op on a GPU:"
    rows = ((op, *passes.values()) for op, passes in kernels["ops"].items())
    yield from _table([("op", "forward", "backward"), *rows])
    for family, found in kernels["attention"].items():
        yield ""
        if "error" in found:
            yield from _section(f"attention on {family}", found)
            continue
        yield f"attention on {family}, portable kernels: query rows x keys, warps, stages"
        for names, passes in found["portable"].items():
            yield from _table([(names, *found["widths"]), *((pass_, *tiles) for pass_, tiles in passes.items())])
        yield f"attention on {family}, bfloat16 and float16: which kernel runs"
        for call, choice in found["choices"].items():
            yield f"  {call}: {choice['now']}"
            if choice["now"] != choice["with hopper_attention()"]:
                yield f"    with llama_kernels.hopper_attention(): {choice['with hopper_attention()']}"
    if not kernels["attention"]:
        yield "attention tiles: none, since there is no GPU; --arch shows those of a family"


def _table(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  " + "  ".join(x.ljust(width) for x, width in zip(row, widths, strict=True)).rstrip()
