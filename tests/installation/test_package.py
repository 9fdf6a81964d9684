"""The import of the package, its public names, and the files in the wheel and the source distribution."""

from __future__ import annotations

import ast
import fnmatch
import importlib.util
import inspect
import re
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

import llama_kernels as lk
from tests.support.processes import output_of

pytestmark = pytest.mark.once

ROOT = Path(lk.__file__).parent.parent
SOURCES = sorted(Path(lk.__file__).parent.rglob("*.py"))


def test_every_public_name_exists():
    assert set(lk.__all__) <= set(dir(lk))
    assert set(lk.reference.__all__) <= set(lk.__all__)


def test_the_reference_imports_only_torch_and_the_standard_library():
    for source in (ROOT / "reference").glob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            allowed = {"__future__", "torch", "itertools", "typing", "typing_extensions"}
            assert {name.split(".")[0] for name in names} <= allowed, source


def test_the_import_does_not_initialize_cuda_or_load_transformers():
    loaded = "torch.cuda.is_initialized(), 'transformers' in sys.modules"
    out = output_of("-c", f"import sys, torch, llama_kernels; print({loaded})", TRITON_INTERPRET="0")
    assert out.split() == ["False", "False"]


def test_without_triton_cpu_tensors_run_the_reference():
    """The import works, as on a Mac, and so do the ops and their gradients."""
    out = output_of("-c", """
import sys
sys.modules["triton"] = None
import torch, llama_kernels as lk
q, k, v = (torch.randn(1, 2, 8, 16, requires_grad=True) for _ in range(3))
cos, sin = lk.rope_tables(lk.rope_frequencies(16)[0], 8)
lk.rms_norm(lk.attention(*lk.rope(q, k, cos, sin), v)).sum().backward()
print(q.grad.shape == k.grad.shape == v.grad.shape)
""")  # fmt: skip
    assert out.strip() == "True"


def test_sources_are_marked_as_typed_and_parse_with_python_3_10():
    assert (Path(lk.__file__).parent / "py.typed").exists()
    assert len(SOURCES) > 10
    for source in SOURCES:
        ast.parse(source.read_text(), feature_version=(3, 10))


def test_the_citation_names_this_version():
    assert re.search("^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == lk.__version__


def test_the_conda_recipe_has_this_version_and_the_requirements_of_the_package():
    recipe = (ROOT / "conda/recipe.yaml").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    assert re.search('^  version: "(.*)"$', recipe, re.MULTILINE)[1] == lk.__version__
    same = {
        r'requires-python = "(>=[\d.]*)"': r"- python (>=[\d.]*)",
        r'"torch(>=[\d.]*)"': r"- pytorch (>=[\d.]*)",
        r'"setuptools(>=[\d.]*)"': r"- setuptools (>=[\d.]*)",
    }
    for in_project, in_recipe in same.items():
        assert set(re.findall(in_recipe, recipe)) == {re.search(in_project, project)[1]}


@pytest.mark.skipif(not (ROOT / ".github").exists(), reason="the workflows are not part of this copy")
def test_ci_uploads_the_reports_of_the_compile_gate():
    pattern = re.search(r"path: (build/codegen\S+)", (ROOT / ".github/workflows/cpu.yml").read_text())[1]
    assert all(fnmatch.fnmatch(f"build/codegen{version}.json", pattern) for version in ("", "-newest"))


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The wheel and the source distribution, built without a network from a copy of the repository."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("needs setuptools to build")
    copy, built = tmp_path_factory.mktemp("repository") / "copy", tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=_left_out)
    build = f"from setuptools import build_meta as b; b.build_sdist({str(built)!r}); b.build_wheel({str(built)!r})"
    output_of("-c", build, cwd=copy)
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        requirements = re.findall("^Requires-Dist: (.*)$", archive.read(_metadata(archive)).decode(), re.MULTILINE)
        in_wheel = set(archive.namelist())
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    return Distributions(in_wheel, requirements, in_sdist, copy)


class Distributions(NamedTuple):
    wheel: set[str]  # names of the files in it
    requirements: list[str]
    sdist: set[str]
    repository: Path


def _left_out(folder: str, names: list[str]) -> set[str]:
    """Files that are not part of the repository: environments, caches and builds."""
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


def test_the_wheel_requires_torch_and_triton_only(distributions):
    always = {re.match(r"[\w-]+", line)[0] for line in distributions.requirements if "extra ==" not in line}
    assert always == {"torch", "triton"}


def test_the_source_distribution_holds_the_repository(distributions):
    """The tests can run from it: those of the documentation follow links to files of every folder."""
    copied = {path for path in distributions.repository.rglob("*") if path.is_file()}
    names = {path.relative_to(distributions.repository).as_posix() for path in copied}
    built = {name for name in names if name.split("/")[0] in ("build", "llama_kernels.egg-info")}
    assert names - built <= distributions.sdist


@pytest.mark.parametrize("name", lk.reference.__all__)
def test_the_reference_has_the_signature_of_the_public_function(name):
    """With the same names, kinds, defaults and annotations."""
    assert inspect.signature(getattr(lk, name)) == inspect.signature(getattr(lk.reference, name))
