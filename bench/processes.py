"""A run on a GPU is done by a process that may be lost: one provider that spoils or ends it does not end the run.

The parent (`supervise`) touches no GPU. The child measures, and writes two files as it goes: `records.json` after each
piece of work, and `journal.json` with the step under way. When the child dies of a signal, reports that it cannot use
the GPU any more (exit status LOST), or spends too long on a step, the step is entered in the journal as an incident. A
new child goes on where the records end. The journal tells it what to leave out.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.records import replace_text

LOST = 75  # exit status of a process that cannot use its GPU any more; the journal says because of whom
INTERRUPTED = 130
MOST_CHILDREN = 40
CAPTURE = "capture"  # the step that may try a capture: what ends a process here is timed by events afterwards


class Step(NamedTuple):
    """What is being done: `doing` it for `provider` at `work`. An empty provider is the bench itself."""

    work: str
    provider: str
    doing: str


class Incident(NamedTuple):
    """A step that ended or spoiled its process, and how."""

    work: str
    provider: str
    doing: str
    reason: str

    def __str__(self) -> str:
        return f"{self.reason}, in the step {self.doing!r} of {self.provider or 'the bench'} at {self.work}"


class Journal:
    """The step under way and the incidents so far; in `folder`, or only in memory.

    fresh: what an earlier run left in `folder` is forgotten. Raises ValueError if it cannot be read.
    """

    def __init__(self, folder: Path | None = None, fresh: bool = False) -> None:
        self.file = None if folder is None else folder / "journal.json"
        self.step: Step | None = None
        self.incidents: list[Incident] = []
        if self.file is not None and self.file.exists() and not fresh:
            self._read()

    def begin(self, work: str, provider: str, doing: str) -> None:
        self.step = Step(work, provider, doing)
        self._write()

    def end(self) -> None:
        self.step = None
        self._write()

    def blame(self, reason: str) -> Incident | None:
        """Enter the step under way as an incident. None if no step is under way."""
        if self.step is None:
            return None
        self.incidents.append(Incident(*self.step, reason))
        self.end()
        return self.incidents[-1]

    def left_out(self, work: str, provider: str) -> str | None:
        """Why `provider` is not to run at `work`: it ended a process there, or two processes anywhere."""
        theirs = [i for i in self.incidents if i.provider == provider and i.doing != CAPTURE]
        here = [i for i in theirs if i.work == work]
        if here:
            return f"left out: {here[-1].reason}, in the step {here[-1].doing!r}"
        if provider and len(theirs) > 1:
            return f"left out: it ended {len(theirs)} processes, the last one at {theirs[-1].work}"
        return None

    def by_events(self, provider: str) -> str | None:
        """Why `provider` is to be timed by events, without a capture: one of its captures ended a process."""
        captures = [i for i in self.incidents if i.provider == provider and i.doing == CAPTURE]
        return f"an earlier capture of it ended a process ({captures[-1].reason})" if captures else None

    def _read(self) -> None:
        try:
            whole = json.loads(self.file.read_text())
            self.step = Step(*whole["step"]) if whole["step"] else None
            self.incidents = [Incident(*fields) for fields in whole["incidents"]]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise ValueError(
                f"{self.file}: not a journal of the bench ({e}); remove it, or choose another --out"
            ) from None

    def _write(self) -> None:
        if self.file is not None:
            replace_text(self.file, json.dumps({"step": self.step, "incidents": self.incidents}, indent=1) + "\n")


# --- the parent ------------------------------------------------------------------------------------------------------


def supervise(
    command: Callable[[bool, float], Sequence[str]],
    folder: Path,
    *,
    resume: bool,
    minutes: float,
    patience: float,
    say: Callable[[str], object] = print,
) -> int:
    """Run children until one ends by itself; its exit status.

    command: of (resume, minutes left) the command line of a child. minutes: for all children together. patience:
    minutes that one step of one provider may take. Ctrl-C goes to the child, which keeps what it has. Raises ValueError
    on a journal in `folder` that cannot be read.
    """
    end, status = time.monotonic() + 60 * minutes, LOST
    # A step that was interrupted with an earlier run is not a failure of its provider.
    Journal(folder, fresh=not resume).end()
    for _ in range(MOST_CHILDREN):
        left = max(end - time.monotonic(), 1.0) / 60
        # Not the terminal's process group: a Ctrl-C reaches the child once, from here. It ends when the pipe closes.
        child = subprocess.Popen([*command(resume, left)], stdin=subprocess.PIPE, start_new_session=True)
        stuck = _wait(child, folder, patience)
        child.stdin.close()
        status = child.returncode
        if not stuck and status >= 0 and status != LOST:
            return status
        journal = Journal(folder)
        if status == LOST and not stuck:
            incident = journal.incidents[-1] if journal.incidents else None  # the child entered it
        else:
            incident = journal.blame(stuck or f"the process ended by {_signal_name(-status)}")
        if incident is None:
            say(f"bench: the measuring process ended ({_signal_name(-status)}), in no step of any provider")
            return status if status > 0 else 128 - status
        say(f"bench: {incident}; going on in a new process")
        resume = True
    say(f"bench: {MOST_CHILDREN} processes were lost; giving up. `--resume` goes on.")
    return status


def _wait(child: subprocess.Popen[bytes], folder: Path, patience: float) -> str | None:
    """Until `child` has ended. It is killed if a step takes longer than `patience` minutes: the reason, else None."""
    journal = folder / "journal.json"
    while True:
        try:
            child.wait(timeout=1)
            return None
        except subprocess.TimeoutExpired:
            if journal.exists() and time.time() - journal.stat().st_mtime > 60 * patience and Journal(folder).step:
                child.kill()
                child.wait()
                return f"the process did not finish within {patience:g} minutes"
        except KeyboardInterrupt:
            child.send_signal(signal.SIGINT)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"exit status {-number}"


# --- the child -------------------------------------------------------------------------------------------------------


def end_with_parent() -> None:
    """End this process when the parent is gone, however it ended: then standard input, a pipe from it, closes."""

    def watch() -> None:
        while os.read(0, 1):  # not sys.stdin, whose lock Python wants when it ends
            pass
        os._exit(INTERRUPTED)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    from bench.__main__ import main as bench

    end_with_parent()
    status = bench([*sys.argv[1:], "--in-process"])
    sys.stdout.flush()
    sys.stderr.flush()
    if status == LOST:
        os._exit(status)  # CUDA's own clean-up would fail, and might not end
    sys.exit(status)


if __name__ == "__main__":
    main()
