"""A run on a GPU is made by a child process, so that a provider that crashes it does not end the run.

The parent (`supervise`) touches no GPU. The child measures, and writes two files as it goes: `records.json` after each
piece of work, and `journal.json` with the step under way. When the child dies of a signal, reports that it cannot use
the GPU any more (exit status LOST), or spends too long on a step, the step is entered in the journal as an incident. A
new child goes on where the records end. The journal tells it what to leave out.
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

LOST = 75  # exit status of a process that cannot use its GPU any more; the journal says because of whom
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
