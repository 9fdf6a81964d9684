"""Python in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def python(*arguments: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments and environment variables, by default in the repository."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **env})


def output_of(*arguments: str, cwd: Path = ROOT, **env: str) -> str:
    """What Python prints with these arguments and environment variables. It must succeed."""
    done = python(*arguments, cwd=cwd, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout
