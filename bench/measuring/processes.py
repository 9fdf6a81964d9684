"""A run on a GPU measures in a child process, so that a provider that crashes the process does not end the run.

The parent (`supervise`) does not use the GPU. The child measures and keeps two files up to date: `records.json` after
each piece of work, and `journal.json` with the step under way. If the child dies of a signal, reports that it can no
longer use the GPU (exit status LOST), or spends too long on a step, that step is entered in the journal as an incident.
A new child continues from the records, and leaves out what the journal says.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.measuring.journal import Journal

LOST = 75  # exit status of a process that can no longer use its GPU; the journal names the provider
INTERRUPTED = 130
MOST_CHILDREN = 40


def supervise(
    command: Callable[[bool, float], Sequence[str]],
    folder: Path,
    *,
    resume: bool,
    minutes: float,
    patience: float,
    say: Callable[[str], object] = print,
) -> int:
    """Run children until one ends by itself, and return its exit status.

    Args:
        command: (resume, minutes left) -> the command line of a child.
        folder: where the children write their records and the journal.
        resume: whether the first child continues from the records in `folder`.
        minutes: time limit of all children together.
        patience: minutes that one step of one provider may take.
        say: prints a line.

    Ctrl-C is sent to the child, which keeps its records. Raises ValueError if the journal in `folder` cannot be read.
    """
    end, status = time.monotonic() + 60 * minutes, LOST
    # The step that an earlier run was interrupted in is no failure of its provider.
    Journal(folder, fresh=not resume).end()
    for _ in range(MOST_CHILDREN):
        left = max(end - time.monotonic(), 1.0) / 60
        # In a session of its own, the child gets Ctrl-C once, from here. It ends when the pipe closes.
        child = subprocess.Popen([*command(resume, left)], stdin=subprocess.PIPE, start_new_session=True)
        stuck = _wait(child, folder, patience)
        child.stdin.close()
        status = child.returncode
        if not stuck and status >= 0 and status != LOST:
            return status
        journal = Journal(folder)
        if status == LOST and not stuck:
            incident = journal.incidents[-1] if journal.incidents else None  # entered by the child
        else:
            incident = journal.blame(stuck or f"the process ended by {_signal_name(-status)}")
        if incident is None:
            say(f"bench: the measuring process ended ({_signal_name(-status)}) outside any step of a provider")
            return status if status > 0 else 128 - status
        say(f"bench: {incident}; continuing in a new process")
        resume = True
    say(f"bench: gave up after {MOST_CHILDREN} lost processes. --resume continues.")
    return status


def _wait(child: subprocess.Popen[bytes], folder: Path, patience: float) -> str | None:
    """Wait for `child`. If a step takes longer than `patience` minutes, kill it and return the reason; else None."""
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
    """End this process when its parent ends: standard input, a pipe from the parent, closes then."""

    def watch() -> None:
        while os.read(0, 1):  # not sys.stdin, whose lock Python needs at exit
            pass
        os._exit(INTERRUPTED)

    threading.Thread(target=watch, daemon=True).start()
