"""`python -m bench`: measures kernels side by side. See docs/bench.md."""

from __future__ import annotations

import sys

from rich.console import Console

if __name__ == "__main__":
    with Console(stderr=True).status("importing torch and Triton"):  # takes some seconds
        from bench.commands.arguments import main
    sys.exit(main())
