"""bench.gpu_check.process: jobs with time limits, which leave no process behind."""

from __future__ import annotations

import pytest

from bench.gpu_check import process
from bench.gpu_check.process import run_all
from tests.bench.fake_stages import HANGS, HurriedTime, is_dead, python, wait_for, wrote

pytestmark = pytest.mark.once

# Ends while its child still runs.
LEAVES = HANGS.replace("time.sleep(600)\n", "").replace("now it hangs", "done")
# Children without the variables of the job, and in another session.
CHILDREN = {"of its group": ", env={})\n", "of another session": ", start_new_session=True)\n"}


def test_jobs_return_the_exit_codes_and_output_of_their_commands(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    jobs = [
        python("compiles", "import os; print(os.environ['TRITON_INTERPRET'])"),
        python("good", "import os; print(os.environ['SAID'])", env={"SAID": "all is well"}),
        python("bad", "print('one is wrong'); raise SystemExit(3)"),
    ]
    assert {each.job.name: each.code for each in run_all(jobs, tmp_path, workers=2)} == {
        "compiles": 0, "good": 0, "bad": 3,
    }  # fmt: skip
    assert {path.stem: path.read_text() for path in tmp_path.glob("*.txt")} == {
        "compiles": "0\n", "good": "all is well\n", "bad": "one is wrong\n",
    }  # fmt: skip


@pytest.mark.parametrize("child", CHILDREN.values(), ids=CHILDREN)
def test_a_job_that_hangs_is_killed_with_its_children(child, tmp_path, monkeypatch):
    monkeypatch.setattr(process, "time", HurriedTime(lambda: wrote(tmp_path / "slow.txt")))
    code = HANGS.replace(")\n", child, 1)
    (ended,) = run_all([python("slow", code, tmp_path / "pid", seconds=5)], tmp_path, workers=1)
    assert ended.code is None and not ended.cut and ended.seconds > 5
    assert (tmp_path / "slow.txt").read_text() == "now it hangs\n"
    wait_for(is_dead(tmp_path / "pid"))


@pytest.mark.parametrize("child", CHILDREN.values(), ids=CHILDREN)
def test_processes_that_a_job_leaves_behind_are_killed(child, tmp_path):
    (ended,) = run_all([python("leaves", LEAVES.replace(")\n", child, 1), tmp_path / "pid")], tmp_path, workers=1)
    assert ended.code == 0
    wait_for(is_dead(tmp_path / "pid"))


def test_no_more_jobs_than_workers_run_at_once(tmp_path):
    code = "import pathlib, sys, time; p = pathlib.Path(sys.argv[1]); p.touch(); time.sleep(0.4); p.unlink()"
    jobs = [python(f"job{i}", code, tmp_path / f"{i}.running") for i in range(5)]
    most = 0

    def over() -> bool:
        nonlocal most
        most = max(most, len(list(tmp_path.glob("*.running"))))
        return False

    assert len(list(run_all(jobs, tmp_path, 2, over))) == 5
    assert most == 2


def test_no_job_starts_or_continues_after_the_time_limit(tmp_path):
    jobs = [python("first", HANGS, tmp_path / "pid"), python("second", "print('started')")]
    ended = list(run_all(jobs, tmp_path, 1, lambda: wrote(tmp_path / "pid")))
    assert [(each.job.name, each.code, each.cut) for each in ended] == [("first", None, True)]
    assert not (tmp_path / "second.txt").exists()


def test_running_jobs_are_killed_if_the_caller_stops_iterating(tmp_path):
    jobs = [python("quick", "pass"), python("slow", HANGS, tmp_path / "pid")]
    for ended in run_all(jobs, tmp_path, workers=2):
        assert ended.job.name == "quick"
        wait_for(lambda: wrote(tmp_path / "pid"))
        break
    wait_for(is_dead(tmp_path / "pid"))
