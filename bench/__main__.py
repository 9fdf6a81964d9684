"""`python -m bench`: measures kernels side by side. See docs/bench.md."""

from __future__ import annotations

import sys

from bench.commands.arguments import main

if __name__ == "__main__":
    sys.exit(main())
