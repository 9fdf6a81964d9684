"""Lists the packages that make targets need and this Python does not have.

    python tools/packages.py                         lists all missing packages, and what they are used for
    python tools/packages.py demo --python python3   exits with 1 if `make demo` cannot run, and says why

`make` runs this for TORCH=present, which installs nothing. --python is the Python to install packages for.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from typing import NamedTuple


class Package(NamedTuple):
    """A package: its name for pip, its module, what it is used for, and the make targets that cannot run without it."""

    name: str
    module: str
    used_for: str
    targets: tuple[str, ...] = ()


PACKAGES = (
    Package("numpy", "numpy", "Triton's interpreter, the tests, and pictures", ("test", "gpu-check")),
    Package("pytest", "pytest", "the tests", ("test", "gpu-check", "witness")),
    Package("hypothesis", "hypothesis", "the tests", ("test", "gpu-check", "fuzz")),
    Package("pytest-xdist", "xdist", "tests in parallel; without it they run in one process"),
    Package("rich", "rich", "tables and progress", ("demo", "bench", "examples", "gpu-check", "fuzz")),
    Package("matplotlib", "matplotlib", "pictures", ("demo", "bench", "examples", "gpu-check")),
    Package("transformers", "transformers", "Hugging Face models: the examples, and the tests of patch", ("examples",)),
    Package("peft", "peft", "low-rank adapters in the examples, and their tests"),
    Package("accelerate", "accelerate", "the Trainer in the examples, and tests of offloaded weights", ("examples",)),
    Package("liger-kernel", "liger_kernel", "tests of patch beside Liger's loss, an example, and the bench"),
    Package("trl", "trl", "the examples of TRL, and their tests"),
    Package("lightning", "lightning", "the example of Lightning, and its test"),
    Package("bitsandbytes", "bitsandbytes", "4-bit models (QLoRA) in an example, and their tests"),
    Package("einops", "einops", "the suites of other projects (make witness)", ("witness",)),
    Package("ruff", "ruff", "make lint", ("lint", "fmt", "quick")),
    Package("mypy", "mypy", "make typecheck, a part of make lint", ("typecheck", "quick")),
    Package("mkdocs-material", "material", "the documentation", ("docs",)),
    Package("mkdocstrings", "mkdocstrings", "the documentation", ("docs",)),
)


def missing(target: str | None = None) -> list[Package]:
    """Packages that this Python does not have and, if given, `target` cannot run without."""
    wanted = [package for package in PACKAGES if target is None or target in package.targets]
    return [package for package in wanted if importlib.util.find_spec(package.module) is None]


def install_command(python: str, packages: list[Package]) -> str:
    return f"{python} -m pip install {' '.join(package.name for package in packages)}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tools/packages.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("target", nargs="?", help="a make target; without one, all missing packages are listed")
    parser.add_argument("--python", default=sys.executable, help="the Python to install packages for")
    args = parser.parse_args()
    lacking = missing(args.target)
    if not lacking:
        return 0
    if args.target:
        names = " and ".join(package.name for package in lacking)
        print(f"make {args.target} needs {names}, which {args.python} does not have.", end=" ")
    else:
        print(f"Packages that {args.python} does not have, and what they are used for:")
        for package in lacking:
            needed = f" (needed by make {', '.join(package.targets)})" if package.targets else ""
            print(f"  {package.name:15} {package.used_for}{needed}")
    print(f"To install: {install_command(args.python, lacking)}")
    return 1 if args.target else 0


if __name__ == "__main__":
    sys.exit(main())
