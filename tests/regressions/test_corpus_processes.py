"""Bugs that users of other kernels met, each as a test: compilation, devices and processes.

A docstring says what went wrong there. The mark `corpus` has the numbers of the entries of docs/reliability.md that a
test answers.
"""

from __future__ import annotations

import ast
import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import llama_kernels as lk
from llama_kernels.core import launch_cache
from llama_kernels.core.registry import KERNELS
from llama_kernels.ops import rms_norm
from tests.support.environment import compiles
from tests.support.processes import output_of

corpus = pytest.mark.corpus
ROOT = Path(lk.__file__).parent.parent
SOURCES = sorted(Path(lk.__file__).parent.rglob("*.py"))


@pytest.mark.once
@corpus(65)
def test_four_lengths_take_two_compiled_graphs(device):
    """Each shape was compiled: Liger#988. One of the two graphs is dynamic."""
    graphs = 0

    def backend(graph, _):
        nonlocal graphs
        graphs += 1
        return graph

    @torch.compile(backend=backend, fullgraph=True)
    def layer(q, k, v):
        return lk.rms_norm(lk.attention(q, k, v))

    with torch.no_grad():
        for B, S in ((2, 8), (3, 12), (5, 20), (7, 9)):
            layer(*(torch.randn(B, H, S, 16, device=device) for H in (4, 2, 2)))
    assert graphs <= 2


@compiles
@corpus(65)
def test_six_row_counts_take_three_compiled_kernels():
    """Row counts and lengths are arguments, not constants: flash-attention f692b98d."""
    from triton.runtime import driver

    from bench.host import LaunchingNothing

    before = driver._active
    driver.set_active(LaunchingNothing("sm_90"))
    try:
        kernel = rms_norm._rms_norm_forward_kernel
        kernel.device_caches.clear()
        for M in (2, 16, 48, 100, 1001, 4096):
            KERNELS["rms_norm_forward"](torch.zeros(M, 256), None, None, 1e-6, 0.0)
        compiled = len(kernel.device_caches[driver.active.get_current_device()][0])
    finally:
        driver._active = before
    assert compiled <= 3


@corpus(66, 68, 69, 75)
def test_the_package_uses_no_autotuner_and_no_libdevice():
    """An autotuner runs kernels on live tensors (triton#6547), chooses by too few keys (flash-attention e317aa49), and
    has races between threads (triton#10295). libdevice moves between releases (Liger#79)."""
    for source in SOURCES:
        names = {node.attr for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Attribute)}
        assert not names & {"autotune", "heuristics", "libdevice", "Autotuner"}, source


@corpus(70)
def test_no_op_reads_a_value_back_from_the_device():
    """A wait for the GPU breaks CUDA graphs and delays training: triton#10596. Only `checked` reads values, and
    FlopCounterMode, for the FLOPs of a packed batch. The code of CPU tensors has them at hand."""
    for source in (Path(lk.__file__).parent / "ops").rglob("*.py"):
        if source.name == "flops.py" or source.name.startswith("cpu"):
            continue
        tree = ast.parse(source.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                name = node.func.attr
                assert name not in {"item", "cpu", "nonzero", "numpy", "synchronize"}, f"{source}:{node.lineno}"
                if name in {"tolist", "aminmax"}:
                    line = source.read_text().splitlines()[node.lineno - 2 : node.lineno]
                    assert "values_to_check" in " ".join(line), f"{source}:{node.lineno}"


@compiles
@corpus(71)
def test_every_launch_is_on_the_device_of_its_tensors(monkeypatch):
    """Triton launches on torch's current device: triton#2441, flash-attention#54, unsloth#6888."""
    from triton.runtime.jit import JITFunction

    inside, launches = [False], []

    @contextlib.contextmanager
    def on_device_of(x):
        inside[0] = True
        yield
        inside[0] = False

    monkeypatch.setattr(launch_cache, "on_device_of", on_device_of)
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **options: launches.append((self.__name__, inside[0])))
    from bench.codegen.cases import cases

    wanted = {
        ("attention", "D=64 bfloat16 all"), ("attention", "D=64 float32 all"), ("decode", "D=64 bfloat16 all"),
        ("rope", "D=64 R=64 heads=32/8"), ("qk_norm_rope", "D=64 R=64 heads=32/8"), ("rms_norm", "N=32768"),
    }  # fmt: skip
    for case in cases():
        if (case.op, case.label) in wanted:
            case.launch()
    assert len({name for name, _ in launches}) == 14 and all(where for _, where in launches), launches


@compiles
@corpus(69, 74)
def test_cold_starts_of_many_threads_and_processes(tmp_path):
    """A cache that several write at once: triton#2688, #11512, fla deec73e1. Four processes of four threads."""
    program = """
import concurrent.futures, multiprocessing, sys, torch
from bench.host import LaunchingNothing
from llama_kernels.core.registry import KERNELS
from triton.runtime import driver

def norm(i):
    y, _, _ = KERNELS["rms_norm_forward"](torch.zeros(4, 256 * (1 + i % 2)), None, None, 1e-6, 0.0)
    assert y.shape == (4, 256 * (1 + i % 2))

def cold_start():
    driver.set_active(LaunchingNothing("sm_90"))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(norm, range(16)))) == 16

processes = [multiprocessing.get_context("fork").Process(target=cold_start) for _ in range(4)]
for process in processes:
    process.start()
for process in processes:
    process.join(120)
sys.exit(any(process.exitcode != 0 for process in processes))
"""
    output_of("-c", program, TRITON_CACHE_DIR=str(tmp_path / "cache"), OMP_NUM_THREADS="1")
    assert list((tmp_path / "cache").iterdir())


@pytest.mark.once
@corpus(74)
def test_the_package_runs_with_a_home_that_cannot_be_written():
    """HOME is often read-only in a container: triton#518. The import and the ops on a CPU write nothing."""
    program = "import torch, llama_kernels as lk; print(*lk.rms_norm(torch.ones(2, 8)).shape)"
    env = {**{k: v for k, v in os.environ.items() if not k.startswith("TRITON_CACHE")}, "HOME": "/proc/nowhere"}
    done = subprocess.run([sys.executable, "-c", program], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["2", "8"], done.stderr[-1000:]


def test_the_table_of_the_documentation_lists_these_tests():
    """Every entry has a row. A row names the tests that are marked with its number, or says why there is none."""
    marked: dict[int, set[str]] = {}
    for file in Path(__file__).parents[1].rglob("test_*.py"):
        for node in ast.parse(file.read_text()).body:
            for mark in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) in ("corpus", "pytest.mark.corpus"):
                    for number in mark.args:
                        marked.setdefault(number.value, set()).add(f"{file.stem.removeprefix('test_')}: {node.name}")
    listed: dict[int, set[str]] = {}
    for line in (ROOT / "docs/reliability.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and cells[0].isdigit():
            tests = cells[3].replace("`", "").replace(" (GPU)", "")
            listed[int(cells[0])] = set() if tests.startswith("does not apply: ") else set(tests.split("<br>"))
    assert sorted(listed) == list(range(1, 88))
    tested = {number: tests for number, tests in listed.items() if tests}
    assert tested == marked
    for file in ("README.md", "docs/reliability.md", "CHANGELOG.md"):
        said = re.findall(r"(\d+) bugs and wishes", (ROOT / file).read_text())
        assert said == [str(len(tested))], f"{file} says {said}; {len(tested)} have tests"
