"""The versions of torch, Triton and numpy that the package works with, checked when it is imported."""

from __future__ import annotations

import re
import warnings

import torch

# torch 2.10 is the first release that comes with Triton 3.6, and Triton 3.6 the first that compiles every kernel here.
OLDEST = {"torch": (2, 10), "triton": (3, 6)}

# The newest releases that the test suite passed with.
NEWEST_TESTED = {"torch": (2, 15), "triton": (3, 9), "transformers": (5, 24)}

_TITLES = {"triton": "Triton"}


def major_minor(version: str) -> tuple[int, int] | None:
    """(2, 13) for "2.13.0+cu130". None if the text does not begin with a version."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else None


def too_old(name: str, version: str) -> str | None:
    """The error for a `version` of package `name` that is older than the package works with, or None."""
    found, oldest = major_minor(version), OLDEST[name]
    if found is None or found >= oldest:
        return None
    title, wanted = _TITLES.get(name, name), ".".join(map(str, oldest))
    return (
        f"llama_kernels needs {title} {wanted} or newer; {title} {version} is installed. "
        f"Install a newer one: pip install '{name}>={wanted}'"
    )


def untested(name: str, version: str) -> str | None:
    """The warning for a `version` of package `name` that is newer than the tested ones, or None."""
    found, newest = major_minor(version), NEWEST_TESTED[name]
    if found is None or found <= newest:
        return None
    tested = ".".join(map(str, newest))
    return f"llama_kernels was tested with {name} up to {tested}; this is {version}. Run `make test` to check."


def check_version(name: str, version: str) -> None:
    """Raise an ImportError if `version` of package `name` is too old, and warn if it is newer than the tested ones."""
    if error := too_old(name, version):
        raise ImportError(error)
    if warning := untested(name, version):
        warnings.warn(warning, stacklevel=2)


def interpreter_fault(triton: str, numpy: str | None) -> str | None:
    """Why the interpreter of this version of Triton cannot run with this version of numpy (None: no numpy), or None.

    Triton 3.6 calls `int()` on a one-dimensional array, which numpy 2.4 refuses.
    """
    if numpy is None:
        fix = "Install it: pip install numpy, or with Triton 3.6 pip install 'numpy<2.4'"
        return f"Triton's interpreter needs numpy, which is not installed. {fix}"
    versions = major_minor(triton), major_minor(numpy)
    if versions[0] and versions[1] and versions[0] < (3, 7) and versions[1] >= (2, 4):
        return (
            f"the interpreter of Triton {triton} does not work with numpy {numpy}; wanted numpy below 2.4, or Triton "
            "3.7 or newer. Install it: pip install 'numpy<2.4'"
        )
    return None


check_version("torch", torch.__version__)
