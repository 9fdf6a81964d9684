"""What a user meets before the first tensor: the import, the report, the files that ship."""

from __future__ import annotations

import ast
import fnmatch
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import llama_kernels as lk

ROOT = Path(lk.__file__).parent.parent
SOURCES = sorted(Path(lk.__file__).parent.rglob("*.py"))


def python(*args: str, **env: str) -> str:
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **env})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_public_name_is_there():
    assert set(lk.__all__) <= set(dir(lk))
    ops = "add_rms_norm attention attention_varlen qk_norm_rope rms_norm rope rope_attention rope_into_cache rope_qkv"
    assert lk.reference.__all__ == ops.split()


def test_the_reference_knows_nothing_of_us():
    for source in (ROOT / "reference").glob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert {name.split(".")[0] for name in names} <= {"__future__", "torch", "itertools"}, source


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


@pytest.mark.skipif(not (ROOT / ".github").exists(), reason="the workflows are not part of this copy")
def test_ci_keeps_the_reports_of_the_compile_gate():
    pattern = re.search(r"path: (build/codegen\S+)", (ROOT / ".github/workflows/cpu.yml").read_text())[1]
    assert all(fnmatch.fnmatch(f"build/codegen{version}.json", pattern) for version in ("", "-newest"))


@pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="needs setuptools to build")
def test_the_wheel_holds_the_reference_and_nothing_generic(tmp_path):
    code = f"""
import os, setuptools
os.chdir({str(ROOT)!r})
packages = setuptools.find_packages(include=["llama_kernels*"])
print(*packages)
"""
    packages = python("-c", code).split()
    assert "llama_kernels.reference" in packages and "llama_kernels.ops.attention" in packages
    assert all(name.split(".")[0] == "llama_kernels" for name in packages)


@pytest.mark.parametrize("name", lk.reference.__all__)
def test_the_reference_has_the_same_signature(name):
    """Names, kinds, defaults and annotations."""
    assert inspect.signature(getattr(lk, name)) == inspect.signature(getattr(lk.reference, name))
