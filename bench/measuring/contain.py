"""An exception of a provider becomes the reason in its rows, and the run goes on."""

from __future__ import annotations

import contextlib
import gc
import traceback
from collections.abc import Iterable, Iterator

import torch

from bench.measuring.capture import Lost, brief, gpu_fault
from bench.measuring.journal import Journal
from bench.measuring.records import NOT_RUN, Record
from bench.providers.provider import Unsupported


class Contained:
    """The steps of one piece of work, in the journal while they last."""

    def __init__(self, work: str, device: str, journal: Journal) -> None:
        self.work, self.device, self.journal = work, device, journal

    @contextlib.contextmanager
    def step(self, provider: str, doing: str, rows: Iterable[Record]) -> Iterator[None]:
        """What is raised inside becomes the reason of `rows`. An empty provider is the bench itself.

        Raises Lost, after an entry in the journal, if the process cannot use the GPU any more.
        """
        rows = list(rows)
        self.begin(provider, doing)
        try:
            yield
            if self.device == "cuda":
                torch.cuda.synchronize()  # an error of a kernel is raised in its own step, not in the next one
        except (Exception, SystemExit) as e:
            self.failed(e, rows)
        self.journal.end()

    def admit(self, provider: str) -> None:
        """Raises Unsupported if `provider` ended a process at this work before, or too many elsewhere."""
        if reason := self.journal.left_out(self.work, provider):
            raise Unsupported(reason)

    def begin(self, provider: str, doing: str) -> None:
        """A step whose exception the caller hands to `failed`."""
        self.journal.begin(self.work, provider, doing)

    def failed(self, e: BaseException, rows: Iterable[Record]) -> None:
        """The step under way raised `e`. Raises Lost as `step` does."""
        reason = str(e) if isinstance(e, Unsupported | Lost) else brief(e)
        if not self.journal.step.provider:
            reason = f"inputs or float64 results: {reason}"
        for r in rows:
            r.reason = reason
        if isinstance(e, Unsupported):
            return
        _free(e)
        fault = reason if isinstance(e, Lost) else gpu_fault(self.device)
        if fault not in (None, "out of memory"):  # which other providers' tensors may hold
            incident = self.journal.blame(reason if fault == reason else f"{reason}; then {fault}")
            raise Lost(str(incident)) from None


def _free(e: BaseException | None) -> None:
    """Let go of the tensors in the frames that `e` and its causes came through."""
    while e is not None:
        traceback.clear_frames(e.__traceback__)
        e = e.__context__
    gc.collect()


def mark_unfinished(rows: Iterable[Record], timed: bool) -> None:
    """Of a piece of work during which the process was lost: rows to which the run did not come."""
    for r in rows:
        if r.reason is None and (r.ms if timed else r.error) is None:
            r.reason = f"{NOT_RUN}: the process was lost"
