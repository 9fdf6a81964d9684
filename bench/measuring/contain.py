"""An exception of a provider becomes the reason in its rows, and the run continues."""

from __future__ import annotations

import contextlib
import gc
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

from bench.measuring.capture import Lost, brief, gpu_fault
from bench.measuring.journal import Journal
from bench.measuring.records import NOT_RUN, Record
from bench.providers.provider import Unsupported

T = TypeVar("T")


class Contained:
    """The steps of one piece of work. The step under way is in the journal."""

    def __init__(self, work: str, device: str, journal: Journal) -> None:
        self.work, self.device, self.journal = work, device, journal

    @contextlib.contextmanager
    def step(self, provider: str, doing: str, rows: Iterable[Record]) -> Iterator[None]:
        """An exception inside becomes the reason of `rows`. An empty `provider` is the bench itself.

        Raises Lost, after an entry in the journal, if the process can no longer use the GPU.
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

    def attempt(self, provider: str, doing: str, rows: Iterable[Record], f: Callable[[], T]) -> T | None:
        """Run `f` as a `step`. Its result, or None if it raised or the journal leaves `provider` out."""
        with self.step(provider, doing, rows):
            if reason := self.journal.left_out(self.work, provider):
                raise Unsupported(reason)
            return f()
        return None

    def begin(self, provider: str, doing: str) -> None:
        """Begin a step. The caller passes its exception to `failed`."""
        self.journal.begin(self.work, provider, doing)

    def failed(self, e: BaseException, rows: Iterable[Record]) -> None:
        """Write the exception `e` of the step under way into `rows`. Raises Lost as `step` does."""
        reason = str(e) if isinstance(e, Unsupported | Lost) else brief(e)
        if not self.journal.step.provider:
            reason = f"inputs or float64 results: {reason}"
        for r in rows:
            r.reason = reason
        if isinstance(e, Unsupported):
            return
        _free(e)
        fault = reason if isinstance(e, Lost) else gpu_fault(self.device)
        if fault not in (None, "out of memory"):  # tensors of other providers may fill the memory
            incident = self.journal.blame(reason if fault == reason else f"{reason}; then {fault}")
            raise Lost(str(incident)) from None


def _free(e: BaseException | None) -> None:
    """Release the tensors that the frames of `e` and its causes refer to."""
    while e is not None:
        traceback.clear_frames(e.__traceback__)
        e = e.__context__
    gc.collect()


def mark_unfinished(rows: Iterable[Record], timed: bool) -> None:
    """Give a reason to the rows that the run had not reached when the process was lost."""
    for r in rows:
        if r.reason is None and (r.ms if timed else r.error) is None:
            r.reason = f"{NOT_RUN}: the process was lost"
