"""`make test-present`: the make targets with TORCH=present, in an environment made for the test, without a network.

    python -m tests.installation.present_environment

The Python is a virtual environment with links to the packages of this Python. ruff, mypy and pytest-xdist are missing,
and the repository is a copy without .git. If pip can download, numpy is the newest release and Triton is 3.6.0, whose
interpreter does not work with it. Each target is called with options that make it short. The exit status is 1 if a
target fails, does not print what it should, or installs something.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parents[2]
NOT_COPIED = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
# Prefixes of names in site-packages: packages that are missing, and those that make this repository importable.
NOT_LINKED = ("ruff", "mypy", "xdist", "pytest_xdist", "llama_kernels", "__editable__", "__pycache__")
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "HF_HUB_OFFLINE": "1"}
ASK = """
import numpy, torch, triton, llama_kernels
from llama_kernels.core.language import why_not_interpreted
print(f"numpy {numpy.__version__}, torch {torch.__version__}, Triton {triton.__version__}, {llama_kernels.__file__}")
print(why_not_interpreted() or "the interpreter works")
"""


class Target(NamedTuple):
    """A make target and its variables, texts that it must print, and its exit status."""

    arguments: tuple[str, ...]
    prints: tuple[str, ...]
    status: int = 0


def targets(interpreter_works: bool) -> Iterator[Target]:
    """Every target once, install first."""
    not_run = () if torch.cuda.is_available() or interpreter_works else ("The kernels are not tested.", "wanted numpy")
    named = ("ruff            make lint", "pytest-xdist    tests in parallel", "python -m pip install pytest-xdist")
    yield Target(("install",), named)
    yield Target(("lint",), ("make typecheck needs mypy", "typecheck is left out.", "make lint needs ruff",
                             "lint is left out."))  # fmt: skip
    yield Target(("codegen",), ("codegen is left out",))
    tests = "PYTEST=-o addopts= tests/installation/test_package.py -k 'public or signature'"
    yield Target(("test", tests, "JOBS=2"), (" passed", "pytest-xdist is not installed", *not_run))
    yield Target(("demo", "DEMO=--steps 2 --batch 1 --seq 16"), ("build/demo/demo.json",))
    yield Target(("bench", "BENCH=--help"), ("--preset",))
    if torch.cuda.is_available():
        yield Target(("gpu-check", "GPU_CHECK=--help"), ("usage: ",))
    else:
        yield Target(("gpu-check",), ("torch sees no GPU",), status=2)
    examples = "EXAMPLES=pretrain token-classification"
    yield Target(("examples", examples, "STEPS=2"), ("pretrain.json", "classification.json"))
    yield Target(("install", "TRITON=3.7.1"), ("it takes TRITON=present only",), status=2)


def make_python(folder: Path) -> Path:
    """A virtual environment with links to the packages of this Python."""
    venv.create(folder, symlinks=True, with_pip=False)
    site_packages = next(folder.glob("lib/python3*/site-packages"))
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade", "--target", site_packages]
    for package in ("numpy", "triton==3.6.0"):
        if subprocess.run([*pip, package], stderr=subprocess.DEVNULL).returncode:
            print(f"pip cannot download {package}: the environment has the one of {sys.executable}")
    there = {entry.name.split("-")[0].split(".")[0] for entry in site_packages.iterdir()}
    for path in map(Path, sys.path):
        for entry in path.iterdir() if path.name in ("site-packages", "dist-packages") else ():
            name = entry.name.split("-")[0].split(".")[0]
            if not entry.name.startswith(NOT_LINKED) and name not in there and entry.suffix != ".pth":
                (site_packages / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


def fault_of(target: Target, folder: Path, python: Path) -> str | None:
    """Run the target in `folder`. Returns None, or why it fails."""
    command = ["make", *target.arguments, "TORCH=present", f"PYTHON={python}"]
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "PYTHONPATH")}
    start = time.monotonic()
    done = subprocess.run(command, cwd=folder, env={**env, **OFFLINE}, capture_output=True, text=True)
    output = done.stdout + done.stderr
    missing, status = [text for text in target.prints if text not in output], done.returncode
    print(f"{time.monotonic() - start:4.0f} s  make {' '.join(target.arguments)}", flush=True)
    if status == target.status and not missing:
        return None
    return f"exit status {status}, not {target.status}; not printed: {missing}; it printed:\n{output[-3000:]}"


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        python, repository = make_python(Path(name, "python")), Path(name, "repository")
        shutil.copytree(ROOT, repository, symlinks=True, ignore=NOT_COPIED)
        site_packages = next(Path(name).glob("python/lib/python3*/site-packages"))
        before, failed = sorted(site_packages.iterdir()), False
        about = subprocess.run([python, "-c", ASK], cwd=repository, capture_output=True, text=True, check=True).stdout
        print(about, end="", flush=True)
        for target in targets("the interpreter works" in about):
            if fault := fault_of(target, repository, python):
                print(f"FAILS: {fault}")
                failed = True
        own = sorted(p.name for p in next(repository.glob(".venv/lib/python3*/site-packages")).iterdir())
        if sorted(site_packages.iterdir()) != before or len(own) != 1:
            print(f"FAILS: something was installed: .venv has {own}")
            failed = True
    print("make with TORCH=present:", "FAILS" if failed else "every target works")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
