"""The results of stages and jobs. Each is a JSON file, so that a second run can resume."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bench.measuring.records import replace_text

ROOT = Path(__file__).parents[2]

PASSED, FAILED, STOPPED = "passed", "FAILED", "STOPPED"  # STOPPED: killed at its own time limit
UNFINISHED = "unfinished"  # no result: the time of the whole run was over, or it was interrupted
ABSENT = "not here"  # cannot run on this machine; `last_line` says why


class Outcome(NamedTuple):
    """The result of a stage or a job.

    counts: numbers of tests by result, and of kernels compiled. identity: what the result holds for.
    """

    name: str
    status: str
    seconds: float
    last_line: str
    counts: Mapping[str, int]
    identity: Mapping[str, str]

    @property
    def wrong(self) -> bool:
        return self.status in (FAILED, STOPPED)


def write(outcome: Outcome, path: Path) -> None:
    write_json(outcome._asdict(), path)


def write_json(value: Any, path: Path) -> None:
    """Write `value` to `path`, atomically."""
    replace_text(path, json.dumps(value, indent=1) + "\n")


def read(path: Path) -> Outcome | None:
    """The outcome in `path`, or None if there is none."""
    try:
        return Outcome(**read_json(path))
    except TypeError:
        return None


def read_json(path: Path) -> Any:
    """The value in `path`, or None if the file is missing or is not JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def identity(folders: Iterable[str], about: Mapping[str, Any]) -> dict[str, str]:
    """What a result holds for: the commit, the sources in `folders`, the versions, the GPU and its driver."""
    named = {name: str(about[name]) for name in ("commit", "torch", "triton", "python", "gpu", "driver")}
    return {"sources": digest(folders), **named}


def digest(folders: Iterable[str]) -> str:
    """A digest of every Python file in `folders`. It needs no git, and changes before a change is committed."""
    found = hashlib.sha256()
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            found.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]
