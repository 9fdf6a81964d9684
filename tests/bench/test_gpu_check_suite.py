"""The stages of bench.gpu_check, and the test suite in parts."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import runpy
import sys
from pathlib import Path

import pytest

from bench.commands.arguments import parser
from bench.gpu_check import state, suite
from bench.gpu_check.process import run_all
from bench.gpu_check.stages import SANITIZED, Machine, Missing, find_sanitizer, stages
from bench.gpu_check.state import ABSENT, FAILED, PASSED
from bench.measuring import records
from bench.measuring.records import Run
from tests.bench.fake_stages import ABOUT, HOPPER, carry_out, stage
from tests.bench.fakes import norm_row
from tests.support.processes import python

pytestmark = pytest.mark.once


def test_all_stages_together_take_under_25_minutes(tmp_path):
    made = list(stages(HOPPER))
    assert sum(s.minutes for s in made) < 25
    names = [s.name for s in made]
    order = ["environment", "compile", "parity", "speed", "tests", "hopper", "determinism", "sanitizer"]
    assert [name for name in names if name in order] == order and len(set(names)) == len(names)
    for each in made:
        assert all(job.seconds <= 60 * each.minutes for job in each.jobs(tmp_path)), each.name
        assert each.needs is None or names.index(each.needs) < names.index(each.name)


def test_the_speed_stage_is_unfinished_until_all_work_is_measured(tmp_path):
    (speed,) = [s for s in stages(HOPPER) if s.name == "speed"]
    assert not speed.finished(tmp_path)
    late = dataclasses.replace(norm_row(8192, 0), ms=None, percent=None, reason="not run: out of time")
    for rows, finished in (([norm_row(4096, 97), late], False), ([norm_row(4096, 97)], True)):
        records.write(Run(ABOUT, {}, rows, {}), tmp_path / "records.json")
        assert speed.finished(tmp_path) == finished


def test_stages_that_cannot_run_on_a_machine_say_why():
    missing = {s.name: s.why for s in stages(Machine(False, None, 8)) if isinstance(s, Missing)}
    assert list(missing) == ["hopper", "hopper-speed", "sanitizer"]
    assert "compute-sanitizer" in missing["sanitizer"] and "Hopper" in missing["hopper"]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_commands_of_all_stages_and_their_options_exist(tmp_path, monkeypatch, capsys):
    """Each module can be imported and accepts the options that it gets."""
    for each in stages(HOPPER):
        for job in each.jobs(tmp_path):
            module, *options = job.command[job.command.index("-m") + 1 :]
            if module in ("pytest", "bench"):
                continue  # tested below
            monkeypatch.setattr(sys, "argv", [module, "--help"])
            with pytest.raises(SystemExit, match="0"):
                runpy.run_module(module, run_name="__main__")
            told = capsys.readouterr().out
            assert all(option in told for option in options if option.startswith("--")), module


def test_the_bench_accepts_the_options_of_the_stages(tmp_path):
    for each in stages(HOPPER):
        for job in each.jobs(tmp_path):
            if "bench" in job.command:
                parser().parse_args(list(job.command[job.command.index("bench") + 1 :]))


@pytest.mark.parametrize("place", ["path", "toolkit", "wheel", "nowhere"])
def test_compute_sanitizer_is_found_on_the_path_in_a_toolkit_or_in_a_wheel(place, tmp_path, monkeypatch):
    folders = {"path": "path", "toolkit": "cuda/compute-sanitizer", "wheel": "site/nvidia/cu13/bin"}
    program = tmp_path / folders.get(place, "other") / "compute-sanitizer"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "site"))
    assert find_sanitizer() == (None if place == "nowhere" else str(program))


SANITIZER = """#!/bin/sh
test "$1" = --tool && test "$3" = --error-exitcode || exit 99
shift 4
test "$2" = -m && test "$3" = pytest || exit 98
echo "%s"; exit %d
"""


@pytest.mark.parametrize("said, code, status", [
    ("ERROR SUMMARY: 0 errors", 0, PASSED), ("ERROR SUMMARY: 1 error", 1, FAILED), ("Device not supported", 1, ABSENT),
])  # fmt: skip
def test_the_sanitizer_stage_has_the_result_of_its_tools(said, code, status, tmp_path):
    program = tmp_path / "compute-sanitizer"
    program.write_text(SANITIZER % (said, code))
    program.chmod(0o755)
    (made,) = [s for s in stages(HOPPER._replace(sanitizer=str(program))) if s.name == "sanitizer"]
    outcome = carry_out(made, tmp_path)
    assert outcome.status == status
    found = {path.stem for path in (tmp_path / "sanitizer").glob("*check.json")}
    assert found == {"memcheck", "racecheck", "initcheck"}


# --- the suite in parts ----------------------------------------------------------------------------------------------


BUSY = 300  # seconds for a job here, whose machine may be slower and busier than those that the limits are for


@pytest.fixture(scope="module")
def every_test(tmp_path_factory) -> list[str]:
    """The tests that the collect stage lists."""
    folder = tmp_path_factory.mktemp("collected")
    job = suite.collect_job()._replace(seconds=BUSY)
    (ended,) = run_all([job], folder / "collect", workers=1)
    assert ended.code == 0, (folder / "collect" / "collect.txt").read_text()[-2000:]
    return suite.listed(folder)


def test_the_parts_hold_every_test_once_and_slow_files_last(every_test):
    """A file without a listed test has a mark by which its tests are not run here, or needs a missing package."""
    on_disk = {str(path.relative_to(state.ROOT)) for path in (state.ROOT / "tests").rglob("test_*.py")}
    listed = {test.split("::")[0] for test in every_test}
    assert listed <= on_disk
    for file in on_disk - listed:
        text = "".join((state.ROOT / file).with_name(name).read_text() for name in (Path(file).name, "__init__.py"))
        needed = re.findall(r"importorskip\(\"(\w+)\"", text)
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        assert missing or re.search(r"mark\.(once|compiled_table)\b", text), file
    jobs = suite.parts(every_test)
    given = [arg for job in jobs for arg in job.command if arg.startswith("tests/")]
    assert sorted(given) == sorted(every_test) and len(given) == len(set(given))
    assert len({job.name for job in jobs}) == len(jobs)
    assert all(sum(arg.startswith("tests/") for arg in job.command) <= suite.PART for job in jobs)
    last = ("integrations-", "examples-", "regressions-test_fuzz", "gpu-test_large")
    slow = [job.name.startswith(last) for job in jobs]
    assert slow == sorted(slow), "slow files must come last"


@pytest.mark.parametrize("count, sizes", [(1, [1]), (40, [40]), (41, [40, 1]), (81, [40, 40, 1])])
def test_the_parts_of_a_file_hold_all_its_tests(count, sizes):
    jobs = suite.parts(f"tests/test_a.py::test[{i}]" for i in range(count))
    assert [sum(arg.startswith("tests/") for arg in job.command) for job in jobs] == sizes


def collected(*args: str) -> set[str]:
    out = python("-m", "pytest", "-o", "addopts=", "-q", "--collect-only", *args).stdout
    return {line for line in out.splitlines() if "::" in line}


def test_repeated_tests_run_only_in_the_determinism_stage(every_test):
    repeated = set(filter(suite.is_repeated, every_test))
    assert repeated == collected("tests/gpu/test_gpu.py", "-k", suite.REPEATS)
    assert any("thousand_times" in test for test in repeated) and any("races" in test for test in repeated)
    assert len(repeated) < sum(test.startswith("tests/gpu/test_gpu.py") for test in every_test)


def test_the_sanitizer_stage_selects_existing_tests(every_test):
    file, _, words = SANITIZED
    for word in words.split(" or "):
        assert any(test.startswith(f"{file}::") and word in test for test in every_test), word


def test_the_hopper_stage_runs_the_tests_of_attention(every_test):
    files = {test.split("::")[0] for test in every_test if suite.reaches_attention(test)}
    ours = ("ops/test_attention", "ops/test_rope_attention", "gpu/test_gpu", "regressions/test_corpus")
    assert {f"tests/{name}.py" for name in (*ours, "contracts/test_autograd")} <= files
    assert not files & {"tests/ops/test_rms_norm.py", "tests/ops/test_qk_norm_rope.py"}


def test_a_file_that_cannot_be_collected_becomes_a_part(tmp_path):
    (tmp_path / "collect").mkdir()
    (tmp_path / "collect" / "collect.txt").write_text(
        "tests/test_a.py::test_x[a - b]\n\n==== ERRORS ====\n___ ERROR collecting tests/test_b.py ___\n"
        "tests/test_b.py:3: in <module>\nERROR tests/test_b.py - ImportError: no such thing\n1 test collected\n"
    )
    assert suite.listed(tmp_path) == ["tests/test_a.py::test_x[a - b]", "tests/test_b.py"]
    assert [job.name for job in suite.once(tmp_path)] == ["test_a.1", "test_b.1"]
    assert suite.listed(tmp_path / "nothing") == []


def test_a_part_runs_its_tests_and_counts_their_results(every_test, tmp_path):
    """pytest accepts the options and names each test before it runs, and its counts are read."""
    ids = [test for test in every_test if test.startswith("tests/ops/test_rms_norm.py")][:3]
    (job,) = suite.parts(ids)
    outcome = carry_out(stage("tests", job._replace(seconds=BUSY), minutes=BUSY / 60), tmp_path)
    assert outcome.status == PASSED and outcome.counts.get("passed", 0) + outcome.counts.get("skipped", 0) == 3
    assert ids[0] in (tmp_path / "tests" / f"{job.name}.txt").read_text()
