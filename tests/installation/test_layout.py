"""Which folders import which, as docs/architecture.md says."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import llama_kernels as lk

pytestmark = pytest.mark.once

ROOT = Path(lk.__file__).parents[1]
# The files and folders of llama_kernels/ops that have public ops.
OPS = {getattr(lk, op).__module__.split(".")[2] for op in lk.reference.__all__}


def imported(source: Path) -> Iterator[str]:
    """The modules that `source` imports, anywhere in it; `from a import b` is a.b."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def sources(folder: str) -> list[Path]:
    return sorted(
        path for path in (ROOT / folder).rglob("*.py") if "reference" not in path.relative_to(ROOT).parts[1:-1]
    )


def test_an_op_imports_core_and_the_reference_only():
    """Except for rope_attention, which combines two ops."""
    for source in sources("llama_kernels/ops"):
        own = source.relative_to(ROOT / "llama_kernels/ops").parts[0].removesuffix(".py")
        ours = [name.split(".")[1:] for name in imported(source) if name.split(".")[0] == "llama_kernels"]
        assert {parts[0] for parts in ours} <= {"core", "ops", "reference"}, source
        others = {parts[1] for parts in ours if parts[0] == "ops"} & OPS - {own}
        assert others <= ({"attention", "rope"} if own == "rope_attention" else set()), (source, others)


def test_core_imports_core_only():
    for source in sources("llama_kernels/core"):
        ours = {name for name in imported(source) if name.split(".")[0] == "llama_kernels"}
        others = {name for name in ours if not name.startswith("llama_kernels.core.")}
        assert others <= {"llama_kernels.reference"}, source  # which ops have a reference, for errors


def test_the_package_imports_no_tests_tools_or_bench():
    for source in sources("llama_kernels"):
        assert not {name.split(".")[0] for name in imported(source)} & {"tests", "bench", "examples", "tools"}, source


def test_no_test_file_imports_another():
    for source in sources("tests"):
        found = [name for name in imported(source) if name.startswith("tests.") and ".test_" in name]
        assert not found, f"{source} imports {found}; put what two test files share into tests/support"
