"""The sweeps in a run: records of one op that differ in one size."""

from __future__ import annotations

import collections
from collections.abc import Iterable

from bench.measuring.records import Record

# For each op, the size that a sweep varies, and its label.
AXES = {
    "rms_norm": ("N", "row length N"),
    "add_rms_norm": ("N", "row length N"),
    "rope": ("S", "tokens a sequence"),
    "qk_norm_rope": ("S", "tokens a sequence"),
    "rope_qkv": ("S", "tokens a sequence"),
    "rope_into_cache": ("B", "sequences"),
    "attention": ("S", "tokens a sequence"),
    "rope_attention": ("S", "tokens a sequence"),
    "decode": ("Sk", "tokens in the cache"),
}


def sweeps(rs: Iterable[Record]) -> dict[tuple[str, ...], dict[str, list[tuple[int, Record]]]]:
    """(op, direction, dtype, other sizes) -> provider -> (size, record) by size. A sweep has three sizes or more."""
    found: dict[tuple[str, ...], dict[str, dict[int, Record]]] = collections.defaultdict(
        lambda: collections.defaultdict(dict)
    )
    for r in rs:
        if r.op in AXES and r.ms is not None and not r.estimate:
            axis = AXES[r.op][0]
            held = {"B", "M", axis} if r.op != "decode" else {axis}
            family = ", ".join(f"{name}={n}" for name, n in r.sizes.items() if name not in held and n != -1)
            lines = found.setdefault((r.op, r.direction, r.dtype, family), {})
            by_size = lines.setdefault(r.provider, {})
            size, other = r.sizes[axis], by_size.get(r.sizes[axis])
            if other is None or r.rate * r.ms > other.rate * other.ms:  # of two works of one size, the larger
                by_size[size] = r
    return {
        key: {name: sorted(by_size.items()) for name, by_size in lines.items()}
        for key, lines in found.items()
        if len({size for by_size in lines.values() for size in by_size}) >= 3
    }
