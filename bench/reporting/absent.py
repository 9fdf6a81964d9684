"""Providers that cannot run on this machine: they have one line at the end, and no row in tables."""

from __future__ import annotations

from collections.abc import Iterable

from bench.measuring.records import Record, Run
from bench.providers.provider import NEEDS_GPU, NOT_INSTALLED


def is_absent(reason: str | None) -> bool:
    """Whether `reason` keeps a provider from this machine, whatever the work."""
    return reason is not None and (reason.startswith(NOT_INSTALLED) or reason == NEEDS_GPU)


def present(rs: Iterable[Record]) -> list[Record]:
    """The records of providers that can run on this machine."""
    return [r for r in rs if not is_absent(r.reason)]


def absent_line(run: Run) -> str:
    """Who is absent, and why, as "Not installed: a (pip install b), c (pip install d). Needs a GPU: e." Or ""."""
    reasons = {r.provider: r.reason or "" for r in run.records if is_absent(r.reason)}
    for name, row in run.extra.get("providers", {}).items():
        if row and all(map(is_absent, row.values())):
            reasons.setdefault(name, next(iter(row.values())))
    missing = [name + reason.removeprefix(NOT_INSTALLED) for name, reason in reasons.items() if reason != NEEDS_GPU]
    gpu = [name for name, reason in reasons.items() if reason == NEEDS_GPU]
    parts = (NOT_INSTALLED, missing), (NEEDS_GPU, gpu)
    return " ".join(f"{what[0].upper()}{what[1:]}: {', '.join(names)}." for what, names in parts if names)
