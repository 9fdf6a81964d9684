"""What a user meets before the first tensor: the import, the report, the files that ship."""

from __future__ import annotations

import ast
import fnmatch
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

import llama_kernels as lk

pytestmark = pytest.mark.once

ROOT = Path(lk.__file__).parent.parent
SOURCES = sorted(Path(lk.__file__).parent.rglob("*.py"))


def python(*args: str, **env: str) -> str:
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **env})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_public_name_is_there():
    assert set(lk.__all__) <= set(dir(lk))
    assert set(lk.reference.__all__) <= set(lk.__all__)


def test_the_reference_knows_nothing_of_us():
    for source in (ROOT / "reference").glob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert {name.split(".")[0] for name in names} <= {
                "__future__",
                "torch",
                "itertools",
                "typing",
                "typing_extensions",
            }, source


def test_import_touches_no_gpu_and_loads_nothing_heavy():
    out = python("-c", "import sys, torch, llama_kernels; print(torch.cuda.is_initialized(), 'numpy' in sys.modules, "
                 "'transformers' in sys.modules)", TRITON_INTERPRET="0")  # fmt: skip
    assert out.split()[0] == "False" and out.split()[2] == "False"


def test_without_triton_cpu_tensors_run_the_reference():
    """As on a Mac: the import works, and so do all ops with their gradients."""
    out = python("-c", """
import sys
sys.modules["triton"] = None
import torch, llama_kernels as lk
q, k, v = (torch.randn(1, 2, 8, 16, requires_grad=True) for _ in range(3))
cos, sin = lk.rope_tables(lk.rope_frequencies(16)[0], 8)
lk.rms_norm(lk.attention(*lk.rope(q, k, cos, sin), v)).sum().backward()
print(q.grad.shape == k.grad.shape == v.grad.shape)
""")  # fmt: skip
    assert out.strip() == "True"


def test_sources_are_typed_and_of_python_3_10():
    assert (Path(lk.__file__).parent / "py.typed").exists()
    assert len(SOURCES) > 10
    for source in SOURCES:
        ast.parse(source.read_text(), feature_version=(3, 10))


def test_the_citation_names_this_version():
    assert re.search("^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == lk.__version__


@pytest.mark.skipif(not (ROOT / ".github").exists(), reason="the workflows are not part of this copy")
def test_ci_keeps_the_reports_of_the_compile_gate():
    pattern = re.search(r"path: (build/codegen\S+)", (ROOT / ".github/workflows/cpu.yml").read_text())[1]
    assert all(fnmatch.fnmatch(f"build/codegen{version}.json", pattern) for version in ("", "-newest"))


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The wheel and the source distribution, built from a copy without a network: the names of the files in each."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("needs setuptools to build")
    copy, built = tmp_path_factory.mktemp("repository") / "copy", tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=_left_out)
    build = f"from setuptools import build_meta as b; b.build_sdist({str(built)!r}); b.build_wheel({str(built)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        requirements = re.findall("^Requires-Dist: (.*)$", archive.read(_metadata(archive)).decode(), re.MULTILINE)
        in_wheel = set(archive.namelist())
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    return Distributions(in_wheel, requirements, in_sdist, copy)


class Distributions(NamedTuple):
    wheel: set[str]
    requirements: list[str]
    sdist: set[str]
    repository: Path


def _left_out(folder: str, names: list[str]) -> set[str]:
    """What is no part of the repository: environments, caches and builds. Of the hidden files two are copied."""
    kept = {".github", ".pre-commit-config.yaml"}
    return {n for n in names if n.endswith(".egg-info") or n in ("build", "dist", "__pycache__") or n[0] == "."} - kept


def _metadata(archive: zipfile.ZipFile) -> str:
    return next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))


def test_the_wheel_holds_the_package_and_nothing_else(distributions):
    package = {path.relative_to(ROOT).as_posix() for path in SOURCES}
    reference = {f"llama_kernels/reference/{path.name}" for path in (ROOT / "reference").glob("*.py")}
    files = {name for name in distributions.wheel if ".dist-info/" not in name}
    assert files == package | reference | {"llama_kernels/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in distributions.wheel)


def test_the_wheel_requires_torch_and_triton_alone(distributions):
    always = {re.match(r"[\w-]+", line)[0] for line in distributions.requirements if "extra ==" not in line}
    assert always == {"torch", "triton"}


def test_the_source_distribution_holds_the_repository(distributions):
    """So the tests can run from it."""
    copied = {path for path in distributions.repository.rglob("*") if path.is_file()}
    names = {path.relative_to(distributions.repository).as_posix() for path in copied}
    built = {name for name in names if name.split("/")[0] in ("build", "llama_kernels.egg-info")}
    results = {name for name in names if name.startswith("bench/results/")}  # records of measurements
    assert names - built - results <= distributions.sdist


@pytest.mark.parametrize("name", lk.reference.__all__)
def test_the_reference_has_the_same_signature(name):
    """Names, kinds, defaults and annotations."""
    assert inspect.signature(getattr(lk, name)) == inspect.signature(getattr(lk.reference, name))
