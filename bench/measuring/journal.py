"""The step under way and the incidents of a run, in a file that remains when the process that measures is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from bench.measuring.records import replace_text

CAPTURE = "capture"  # the step that tries a capture; a provider that ends a process in it is timed by events later


class Step(NamedTuple):
    """A step under way: `doing` names it. An empty `provider` is the bench itself."""

    work: str
    provider: str
    doing: str


class Incident(NamedTuple):
    """A step after which the process could no longer measure, and the reason."""

    work: str
    provider: str
    doing: str
    reason: str

    def __str__(self) -> str:
        return f"{self.reason}, in the step {self.doing!r} of {self.provider or 'the bench'} at {self.work}"


class Journal:
    """The step under way and the incidents so far, in `folder`/journal.json or, with None, only in memory.

    `fresh` ignores what an earlier run left in `folder`. Raises ValueError if that cannot be read.
    """

    def __init__(self, folder: Path | None = None, fresh: bool = False) -> None:
        self.file = None if folder is None else folder / "journal.json"
        self.watch: Callable[[Step], None] = lambda step: None  # called at the beginning of each step
        self.step: Step | None = None
        self.incidents: list[Incident] = []
        if self.file is not None and self.file.exists() and not fresh:
            self._read()

    def begin(self, work: str, provider: str, doing: str) -> None:
        self.step = Step(work, provider, doing)
        self.watch(self.step)
        self._write()

    def end(self) -> None:
        self.step = None
        self._write()

    def blame(self, reason: str) -> Incident | None:
        """Enter the step under way as an incident and return it. Returns None if no step is under way."""
        if self.step is None:
            return None
        self.incidents.append(Incident(*self.step, reason))
        self.end()
        return self.incidents[-1]

    def left_out(self, work: str, provider: str) -> str | None:
        """Why `provider` is left out at `work`: it ended a process there, or two processes anywhere. Else None."""
        theirs = [i for i in self.incidents if i.provider == provider and i.doing != CAPTURE]
        here = [i for i in theirs if i.work == work]
        if here:
            return f"left out: {here[-1].reason}, in the step {here[-1].doing!r}"
        if provider and len(theirs) > 1:
            return f"left out: it ended {len(theirs)} processes, the last one at {theirs[-1].work}"
        return None

    def by_events(self, provider: str) -> str | None:
        """Why `provider` is timed by events without a capture: one of its captures ended a process. Else None."""
        captures = [i for i in self.incidents if i.provider == provider and i.doing == CAPTURE]
        return f"its earlier capture ended a process ({captures[-1].reason})" if captures else None

    def _read(self) -> None:
        try:
            whole = json.loads(self.file.read_text())
            self.step = Step(*whole["step"]) if whole["step"] else None
            self.incidents = [Incident(*fields) for fields in whole["incidents"]]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise ValueError(
                f"{self.file} is not a journal of the bench ({e}); remove it, or choose another --out"
            ) from None

    def _write(self) -> None:
        if self.file is not None:
            replace_text(self.file, json.dumps({"step": self.step, "incidents": self.incidents}, indent=1) + "\n")
