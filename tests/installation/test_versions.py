"""Versions of packages: errors and warnings at import, and what the project's files install."""

from __future__ import annotations

import re

import pytest

from llama_kernels.core.versions import OLDEST, interpreter_fault, untested
from tests.support.processes import ROOT, python
from tools import packages

pytestmark = pytest.mark.once

IMPORT = "import llama_kernels as lk, torch; lk.rms_norm(torch.ones(2, 8))"


def error_of(code: str, **env: str) -> str:
    """The last line of stderr of `code`, which must fail."""
    done = python("-W", "ignore", "-c", code, **env)
    assert done.returncode, done.stdout
    return done.stderr.strip().splitlines()[-1]


@pytest.fixture
def other_triton(tmp_path, monkeypatch):
    """other_triton(source): new processes import a package triton with this source instead of the installed one."""

    def put(source: str) -> None:
        (tmp_path / "triton").mkdir()
        (tmp_path / "triton" / "__init__.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return put


# --- errors ----------------------------------------------------------------------------------------------------------


def test_an_older_torch_is_an_error_that_says_what_to_install():
    assert error_of(f"import torch; torch.__version__ = '2.9.1+cu128'; {IMPORT}") == (
        "ImportError: llama_kernels needs torch 2.10 or newer; torch 2.9.1+cu128 is installed. "
        "Install a newer one: pip install 'torch>=2.10'"
    )


def test_an_older_triton_is_an_error_that_says_what_to_install(other_triton):
    other_triton("__version__ = '3.5.1'")
    assert error_of(IMPORT) == (
        "ImportError: llama_kernels needs Triton 3.6 or newer; Triton 3.5.1 is installed. "
        "Install a newer one: pip install 'triton>=3.6'"
    )


@pytest.mark.parametrize(
    "fault, message",
    [
        ("raise ImportError('libc.so.6: version GLIBC_2.99 not found')", "libc.so.6: version GLIBC_2.99 not found"),
        ("import no_such_module", "No module named 'no_such_module'"),
        ("from triton import no_such_name", "cannot import name 'no_such_name' from"),
    ],
)
def test_an_installed_triton_that_cannot_be_imported_is_an_error(other_triton, fault, message):
    other_triton(fault)
    expected = f"ImportError: llama_kernels: Triton is installed, but cannot be imported: {message}"
    assert error_of(IMPORT).startswith(expected)


def test_the_interpreter_without_numpy_is_an_error():
    pytest.importorskip("triton")
    assert error_of(f"import sys; sys.modules['numpy'] = None; {IMPORT}", TRITON_INTERPRET="1") == (
        "ImportError: llama_kernels: TRITON_INTERPRET is set, and Triton's interpreter needs numpy, which is not "
        "installed. Install it: pip install numpy, or with Triton 3.6 pip install 'numpy<2.4'"
    )


def test_an_interpreter_that_does_not_work_with_this_numpy_is_an_error():
    pytest.importorskip("triton")
    pytest.importorskip("numpy")
    versions = "import numpy, triton; numpy.__version__, triton.__version__ = '2.5.2', '3.6.0'"
    message = error_of(f"{versions}; triton.knobs.runtime.interpret = True; {IMPORT}", TRITON_INTERPRET="0")
    assert message == (
        "ImportError: llama_kernels: TRITON_INTERPRET is set, and the interpreter of Triton 3.6.0 does not work with "
        "numpy 2.5.2; wanted numpy below 2.4, or Triton 3.7 or newer. Install it: pip install 'numpy<2.4'"
    )


@pytest.mark.parametrize("triton, numpy, works", [("3.6.0", "2.3.5", True), ("3.6.0", "2.4.0", False),
                                                  ("3.7.1", "2.5.2", True), ("3.9.0", "2.5.2", True)])  # fmt: skip
def test_the_interpreter_of_triton_3_6_needs_numpy_below_2_4(triton, numpy, works):
    assert (interpreter_fault(triton, numpy) is None) == works


# --- warnings --------------------------------------------------------------------------------------------------------


def test_a_version_newer_than_the_tested_ones_gives_a_warning():
    assert untested("torch", "2.15.1+cu132") is None and untested("triton", "3.6.0") is None
    assert untested("transformers", "5.24.9") is None and untested("transformers", "4.57.6") is None
    assert untested("torch", "") is None
    assert "triton up to 3.9; this is 3.10.0" in untested("triton", "3.10.0")
    assert "torch up to 2.15; this is 2.16.0" in untested("torch", "2.16.0")
    assert untested("transformers", "5.25.0.dev0") == (
        "llama_kernels was tested with transformers up to 5.24; this is 5.25.0.dev0. Run `make test` to check."
    )


# --- the project's files ---------------------------------------------------------------------------------------------


def packages_of_extras() -> dict[str, set[str]]:
    """The packages of each extra in pyproject.toml."""
    tomllib = pytest.importorskip("tomllib", reason="is part of Python since 3.11")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    return {
        name: {re.match(r"[\w-]+", line)[0] for line in lines} - {"llama-kernels"} for name, lines in extras.items()
    }


TRL = {
    "trl",
    "datasets",
    "dill",
    "multiprocess",
    "pandas",
    "pyarrow",
    "xxhash",
}  # and what it needs: from Python 3.11 on


def test_constraints_pin_what_make_installs():
    required = set().union(*(names for extra, names in packages_of_extras().items() if extra != "witness"))
    pins = re.findall(r"^([\w-]+)==([^\s;]+)(.*)$", (ROOT / "constraints.txt").read_text(), re.M)
    newer = {name: version for name, version, marker in pins if "<" not in marker}
    older = {name: version for name, version, marker in pins if ">=" not in marker}  # Python 3.10
    assert required <= newer.keys() and newer.keys() - older.keys() == TRL
    assert untested("transformers", newer["transformers"]) is None


def test_the_project_asks_for_the_versions_that_the_package_takes():
    dependencies = re.search(r"^dependencies = (.*)$", (ROOT / "pyproject.toml").read_text(), re.M)[1]
    for name, version in OLDEST.items():
        assert f"{name}>={'.'.join(map(str, version))}" in dependencies


def test_make_knows_what_each_package_is_used_for():
    """tools/packages.py has the packages of the extras."""
    assert set().union(*packages_of_extras().values()) == {package.name for package in packages.PACKAGES}


def test_a_target_that_lacks_a_package_stops_and_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None if name == "rich" else object())
    for target, status, message in (
        ("demo", 1, "make demo needs rich, which python3 does not have. To install: python3 -m pip install rich\n"),
        ("lint", 0, ""),
    ):
        monkeypatch.setattr("sys.argv", ["packages.py", target, "--python", "python3"])
        assert packages.main() == status and capsys.readouterr().out == message
