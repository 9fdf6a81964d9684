"""The result of each stage and of each job, in a JSON file each, from which a second run resumes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]

PASSED, FAILED, STOPPED = "passed", "FAILED", "STOPPED"  # STOPPED: killed at its own limit
UNFINISHED = "unfinished"  # no verdict: the time of the whole run was over, or it was interrupted
ABSENT = "not here"  # this machine cannot do it; `last_line` says why


class Outcome(NamedTuple):
    """Of a stage or a job. `counts`: of tests, of kernels compiled. `identity`: what it was found with."""

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
    """The file is there as a whole or as it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.new")
    unfinished.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(unfinished, path)


def read(path: Path) -> Outcome | None:
    """None where there is none, or what is there is not ours."""
    try:
        return Outcome(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def identity(folders: Iterable[str], about: Mapping[str, Any]) -> dict[str, str]:
    """What a verdict holds for: the commit and the sources in `folders`, the versions, the GPU and its driver."""
    named = {name: str(about[name]) for name in ("commit", "torch", "triton", "python", "gpu", "driver")}
    return {"sources": digest(folders), **named}


def digest(folders: Iterable[str]) -> str:
    """Of every Python file in `folders`: a changed file counts before it is committed, and no git is needed."""
    found = hashlib.sha256()
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            found.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]
