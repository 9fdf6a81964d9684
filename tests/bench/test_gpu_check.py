"""bench.gpu_check without a GPU: its stages are small real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.gpu_check import __main__ as gpu_check
from bench.gpu_check import process, run, state
from bench.gpu_check.process import run_all
from bench.gpu_check.state import ABSENT, FAILED, PASSED, STOPPED, UNFINISHED
from bench.measuring import records
from bench.measuring.records import Run
from tests.bench.fake_stages import ABOUT, HurriedTime, carry_out, pretend, python, stage, wait_for, wrote
from tests.bench.fakes import norm_row
from tests.support.environment import DEVICE

pytestmark = pytest.mark.once


def is_alive(pid: int) -> bool:
    """A process that has ended and was not waited for is not alive."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def is_dead(pid_file: Path) -> Callable[[], bool]:
    return lambda: not is_alive(int(pid_file.read_text()))


# Hangs, and so does its child, whose process ID it writes down.
HANGS = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
print("now it hangs", flush=True)
time.sleep(600)
"""
# Ends, and leaves such a child behind.
LEAVES = HANGS.replace("time.sleep(600)\n", "").replace("now it hangs", "done")
# Children that a job cannot find in one of two ways: without its variables, or in a session of their own.
CHILDREN = {"of its group": ", env={})\n", "of another session": ", start_new_session=True)\n"}
# Adds a line to a file, then does what the second argument says.
COUNTS = "import sys; open(sys.argv[1], 'a').write('run\\n'); exec(sys.argv[2])"


def runs(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


# --- processes -------------------------------------------------------------------------------------------------------


def test_jobs_end_as_their_commands_do(tmp_path, monkeypatch):
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
def test_what_a_job_leaves_behind_is_killed(child, tmp_path):
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


def test_no_job_starts_or_goes_on_when_time_is_over(tmp_path):
    jobs = [python("first", HANGS, tmp_path / "pid"), python("second", "print('started')")]
    ended = list(run_all(jobs, tmp_path, 1, lambda: wrote(tmp_path / "pid")))
    assert [(each.job.name, each.code, each.cut) for each in ended] == [("first", None, True)]
    assert not (tmp_path / "second.txt").exists()


def test_the_jobs_of_a_caller_that_stops_are_killed(tmp_path):
    jobs = [python("quick", "pass"), python("slow", HANGS, tmp_path / "pid")]
    for ended in run_all(jobs, tmp_path, workers=2):
        assert ended.job.name == "quick"
        wait_for(lambda: wrote(tmp_path / "pid"))
        break
    wait_for(is_dead(tmp_path / "pid"))


# --- stages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code, status, last", [
    ("print('12 passed, 3 skipped in 4.5s')", PASSED, "12 passed, 3 skipped in 4.5s"),
    ("print('2 failed, 1 passed'); raise SystemExit(1)", FAILED, "2 failed, 1 passed"),
    ("import time; print('test_seven', flush=True); time.sleep(60)", STOPPED, "killed after 4 s, at: test_seven"),
    ("print('Error: Device not supported'); raise SystemExit(1)", ABSENT, "Device not supported"),
])  # fmt: skip
def test_a_stage_of_one_job_says_what_its_job_said(code, status, last, tmp_path, monkeypatch):
    log = tmp_path / "one" / "job.txt"
    monkeypatch.setattr(process, "time", HurriedTime(lambda: status == STOPPED and wrote(log)))
    outcome = carry_out(stage("one", python("job", code, seconds=4)), tmp_path)
    assert (outcome.status, outcome.last_line, outcome.wrong) == (status, last, status in (FAILED, STOPPED))
    assert state.read(run.stage_file(tmp_path, "one")) == outcome
    if status == PASSED:
        assert outcome.counts == {"passed": 12, "skipped": 3}


def test_a_stage_of_many_jobs_adds_them_up(tmp_path):
    jobs = [python("a", "print('2 passed')"), python("b", "print('1 failed, 5 passed'); raise SystemExit(1)"),
            python("c", "print('3 passed, 1 error'); raise SystemExit(1)")]  # fmt: skip
    outcome = carry_out(stage("many", *jobs), tmp_path)
    assert outcome.status == FAILED and outcome.last_line == "3 of 3 parts done, wrong: b c"
    assert outcome.counts == {"passed": 10, "failed": 1, "error": 1}
    assert state.read(tmp_path / "many" / "b.json").status == FAILED


def test_a_stage_without_jobs_has_not_passed(tmp_path):
    assert carry_out(stage("none"), tmp_path).status == UNFINISHED


def test_only_what_has_not_passed_is_repeated(tmp_path):
    counted = [tmp_path / f"{name}.count" for name in "abc"]
    codes = ("pass", "import pathlib; sys.exit(not pathlib.Path(sys.argv[3]).exists())", "pass")
    jobs = [
        python(path.stem, COUNTS, path, code, tmp_path / "mended") for path, code in zip(counted, codes, strict=True)
    ]
    made = stage("many", *jobs)
    assert carry_out(made, tmp_path).status == FAILED
    assert run.kept(made, tmp_path, ABOUT) is None
    (tmp_path / "mended").touch()
    assert carry_out(made, tmp_path).status == PASSED
    assert list(map(runs, counted)) == [1, 2, 1]
    assert run.kept(made, tmp_path, ABOUT).status == PASSED


@pytest.mark.parametrize("changed", ["commit", "torch", "triton", "gpu", "driver", "sources", "command", "env"])
def test_a_verdict_holds_for_one_gpu_and_one_state_of_the_sources(changed, tmp_path, monkeypatch):
    count, about = tmp_path / "count", dict(ABOUT)
    job = python("job", COUNTS, count, "pass")
    assert carry_out(stage("one", job), tmp_path).status == PASSED
    (tmp_path / "one" / "records.json").touch()  # what a command would resume by
    if changed == "sources":
        monkeypatch.setattr(state, "digest", lambda folders: "other")
    elif changed == "command":
        job = python("job", COUNTS, count, "0")
    elif changed == "env":
        job = job._replace(env={"A": "1"})
    else:
        about[changed] = "another"
    carry_out(stage("one", job), tmp_path, about)
    assert runs(count) == 2
    assert (tmp_path / "one" / "records.json").exists() == (changed in ("command", "env"))


def test_sources_are_known_by_their_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "ROOT", tmp_path)
    (tmp_path / "package" / "inner").mkdir(parents=True)
    source = tmp_path / "package" / "inner" / "a.py"
    source.write_text("a = 1\n")
    before = state.digest(["package"])
    assert state.digest(["package"]) == before
    source.write_text("a = 2\n")
    assert state.digest(["package"]) != before
    source.rename(source.with_name("b.py")).write_text("a = 1\n")
    assert state.digest(["package"]) != before


def test_a_stage_has_a_clock_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "time", HurriedTime(lambda: wrote(tmp_path / "pid")))
    jobs = [python("quick", "pass"), python("slow", HANGS, tmp_path / "pid"), python("never", "pass")]
    outcome = carry_out(stage("many", *jobs, minutes=6), tmp_path)
    assert outcome.status == UNFINISHED and outcome.last_line == "1 of 3 parts done"
    assert state.read(tmp_path / "many" / "never.json") is None


def test_a_command_that_has_more_to_do_goes_on(tmp_path):
    count = tmp_path / "count"
    made = stage("one", python("job", COUNTS, count, "print('a part of it')"))._replace(
        finished=lambda _: runs(count) > 1
    )
    outcome = carry_out(made, tmp_path)
    assert outcome.status == UNFINISHED and outcome.last_line == "has more to do: a part of it"
    assert carry_out(made, tmp_path).status == PASSED and runs(count) == 2
    assert run.kept(made, tmp_path, ABOUT)


# --- the whole -------------------------------------------------------------------------------------------------------


class Whole:
    """Four stages in `folder`: the second waits until it is allowed to end, the last is not possible here."""

    def __init__(self, folder: Path) -> None:
        self.out, self.counts, self.go = folder / "out", [folder / f"{i}.count" for i in range(3)], folder / "go"
        waits = "import os, time\nwhile not os.path.exists(sys.argv[3]): time.sleep(0.05)"
        self.described: list[Any] = [["first", 1, ["job", 60, [COUNTS, str(self.counts[0]), "print('one')"]]],
                                     ["second", 1, ["job", 60, [COUNTS, str(self.counts[1]), waits, str(self.go)]]],
                                     ["third", 1, ["job", 60, [COUNTS, str(self.counts[2]), "print('three')"]]],
                                     ["fourth", "there is no such tool here"]]  # fmt: skip

    def status(self, name: str) -> str | None:
        outcome = state.read(run.stage_file(self.out, name))
        return outcome and outcome.status

    def runs(self) -> list[int]:
        return list(map(runs, self.counts))


@pytest.fixture
def whole(tmp_path) -> Whole:
    return Whole(tmp_path)


@pytest.fixture
def main(whole, monkeypatch):
    """main(*options): `python -m bench.gpu_check` with the stages of `whole`, in this process."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def main(*options: str, about: dict[str, str] = ABOUT) -> int:
        pretend(monkeypatch.setattr, about, whole.described)
        return gpu_check.main(["--out", str(whole.out), *options])

    return main


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_a_run_that_was_ended_midway_goes_on(name, whole, main, capsys):
    command = [sys.executable, "-m", "tests.bench.fake_stages", json.dumps(ABOUT), json.dumps(whole.described)]
    started = subprocess.Popen([*command, "--out", str(whole.out)], stdout=subprocess.PIPE, text=True, cwd=state.ROOT)
    wait_for(lambda: runs(whole.counts[1]))
    assert whole.status("first") == PASSED  # on disk before the next begins
    pid = int(subprocess.run(["pgrep", "-P", str(started.pid)], capture_output=True, text=True).stdout.split()[0])
    started.send_signal(getattr(signal, name))
    said, _ = started.communicate(timeout=30)
    if name == "SIGKILL":
        os.killpg(pid, signal.SIGKILL)  # nobody else can
    else:
        assert started.returncode == gpu_check.LEFT
        assert "goes on with second, third" in said and whole.status("second") == UNFINISHED
        assert (whole.out / "page.md").read_text().startswith("```\nllama_kernels on Imitated GPU")
    wait_for(lambda: not is_alive(pid))
    assert whole.status("third") is None

    whole.go.touch()
    assert main() == gpu_check.PASSED and whole.runs() == [1, 2, 1]
    said = capsys.readouterr().out
    assert "fourth" in said and "there is no such tool here" in said


def test_the_page_has_nothing_of_another_commit(whole, main, capsys):
    whole.go.touch()
    assert main() == gpu_check.PASSED
    capsys.readouterr()
    assert main("--only", "third", about={**ABOUT, "commit": "fff9999"}) == gpu_check.PASSED
    said = capsys.readouterr().out
    assert "commit fff9999" in said and "goes on with first, second" in said
    assert whole.runs() == [1, 1, 2]
    assert (whole.out / "earlier" / "first" / "job.txt").read_text() == "one\n"


def test_minutes_end_the_stage_under_way(whole, main, monkeypatch):
    monkeypatch.setattr(gpu_check, "time", HurriedTime(lambda: runs(whole.counts[1]) > 0))
    assert main("--minutes", "12") == gpu_check.LEFT
    assert [whole.status(name) for name in ("first", "second", "third")] == [PASSED, UNFINISHED, None]


def test_a_chosen_stage_brings_what_it_needs():
    made = [stage("first"), stage("second"), stage("third")._replace(needs="first")]
    assert [s.name for s in gpu_check.chosen(made, ["third"])] == ["first", "third"]
    assert [s.name for s in gpu_check.chosen(made, ["second"])] == ["second"]
    assert gpu_check.chosen(made, None) == made


def test_exit_codes_and_choices(whole, main, capsys):
    whole.go.touch()
    assert main("--only", "third") == gpu_check.PASSED
    assert whole.runs() == [0, 0, 1]
    assert main() == gpu_check.PASSED
    assert whole.runs() == [1, 1, 1]
    assert main("--fresh", "--only", "first") == gpu_check.PASSED
    assert whole.runs() == [2, 1, 1]
    capsys.readouterr()
    assert main("--page") == gpu_check.PASSED
    assert whole.runs() == [2, 1, 1] and "llama_kernels on Imitated GPU" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main("--only", "fifth")
    assert "no stage is called fifth; there are first, second, third, fourth" in capsys.readouterr().err
    whole.described[0][2][2][2] = "print('it broke'); sys.exit(1)"
    assert main() == gpu_check.WRONG
    said = capsys.readouterr().out
    assert "FAILED     first" in said and "it broke" in said and "--only first" in said


def test_slower_than_the_last_record_is_wrong(whole, main, monkeypatch, tmp_path):
    whole.go.touch()
    assert main() == gpu_check.PASSED
    for path, ms in ((whole.out / "speed" / "records.json", 1.0), (tmp_path / "before.json", 0.8)):
        records.write(Run(ABOUT, {}, [norm_row(4096, 97, ms=ms)], {}), path)
    monkeypatch.setattr(records, "latest", lambda gpu: tmp_path / "before.json")
    assert gpu_check.main(["--out", str(whole.out)]) == gpu_check.WRONG


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_gpu_check_needs_a_gpu(capsys):
    assert gpu_check.main([]) == gpu_check.NO_GPU and "no GPU" in capsys.readouterr().out
