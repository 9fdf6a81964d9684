"""`python -m bench.commands.child`: runs a command of the bench in a child process, which a failure may end."""

from __future__ import annotations

import os
import sys

from bench.commands.arguments import main as bench
from bench.measuring.processes import LOST, end_with_parent


def main() -> None:
    end_with_parent()
    status = bench([*sys.argv[1:], "--in-process"])
    sys.stdout.flush()
    sys.stderr.flush()
    if status == LOST:
        os._exit(status)  # skips the cleanup of CUDA, which would fail or hang
    sys.exit(status)


if __name__ == "__main__":
    main()
