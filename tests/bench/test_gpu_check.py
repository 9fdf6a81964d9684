"""bench.gpu_check without a GPU: imitated stages of small real processes, and its page from made-up records."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu_check import __main__ as gpu_check
from bench.gpu_check import run, state
from bench.gpu_check.process import Job, run_all
from bench.gpu_check.stages import Missing, Stage
from bench.gpu_check.state import ABSENT, FAILED, PASSED, STOPPED, UNFINISHED
from bench.measuring import machine, records
from bench.measuring.records import Run
from tests.bench.sample_page import ABOUT
from tests.bench.sample_records import norm
from tests.bench.sample_stages import carry_out, stage
from tests.support.environment import DEVICE


def python(name: str, code: str, *args: object, seconds: float = 20.0, env: dict[str, str] | None = None) -> Job:
    return Job(name, (sys.executable, "-c", code, *map(str, args)), seconds, env or {})


def wait_for(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


def is_alive(pid: int) -> bool:
    """A process that has ended and was not waited for does not live."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# Hangs, and so does its child, whose number it writes down.
HANGS = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
print("now it hangs", flush=True)
time.sleep(600)
"""
# Ends, and leaves such a child behind.
LEAVES = HANGS.replace("time.sleep(600)\n", "").replace("now it hangs", "done")
# A child in a session of its own.
AWAY = ", start_new_session=True)\n"
# A child that has none of the variables of its parent.
BARE = ", env={})\n"
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
    ended = {each.job.name: each for each in run_all(jobs, tmp_path, workers=2)}
    assert {name: each.code for name, each in ended.items()} == {"compiles": 0, "good": 0, "bad": 3}
    assert (tmp_path / "compiles.txt").read_text() == "0\n"
    assert (tmp_path / "good.txt").read_text() == "all is well\n"
    assert (tmp_path / "bad.txt").read_text() == "one is wrong\n"


@pytest.mark.parametrize(
    "code", [HANGS.replace(")\n", how, 1) for how in (BARE, AWAY)], ids=["of its group", "of another session"]
)
def test_a_job_that_hangs_is_killed_with_its_children(code, tmp_path):
    (ended,) = run_all([python("slow", code, tmp_path / "pid", seconds=5)], tmp_path, workers=1)
    assert ended.code is None and not ended.cut and 5 <= ended.seconds < 20
    assert (tmp_path / "slow.txt").read_text() == "now it hangs\n"
    wait_for(lambda: not is_alive(int((tmp_path / "pid").read_text())))


@pytest.mark.parametrize(
    "code", [LEAVES.replace(")\n", how, 1) for how in (BARE, AWAY)], ids=["of its group", "of another session"]
)
def test_what_a_job_leaves_behind_is_killed(code, tmp_path):
    (ended,) = run_all([python("leaves", code, tmp_path / "pid")], tmp_path, workers=1)
    assert ended.code == 0
    wait_for(lambda: not is_alive(int((tmp_path / "pid").read_text())))


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
    ended = list(run_all(jobs, tmp_path, 1, lambda: (tmp_path / "pid").exists()))
    assert [(each.job.name, each.code, each.cut) for each in ended] == [("first", None, True)]
    assert not (tmp_path / "second.txt").exists()


def test_the_jobs_of_a_caller_that_stops_are_killed(tmp_path):
    jobs = [python("quick", "pass"), python("slow", HANGS, tmp_path / "pid")]
    for ended in run_all(jobs, tmp_path, workers=2):
        assert ended.job.name == "quick"
        pid = int(wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text()))
        break
    wait_for(lambda: not is_alive(pid))


@pytest.mark.parametrize("code, seconds, status, last", [
    ("print('12 passed, 3 skipped in 4.5s')", 20, PASSED, "12 passed, 3 skipped in 4.5s"),
    ("print('2 failed, 1 passed'); raise SystemExit(1)", 20, FAILED, "2 failed, 1 passed"),
    ("import time; print('test_seven', flush=True); time.sleep(60)", 4, STOPPED, "killed after 4 s, at: test_seven"),
    ("print('Error: Device not supported'); raise SystemExit(1)", 20, ABSENT, "Device not supported"),
])  # fmt: skip
def test_a_stage_of_one_job_says_what_its_job_said(code, seconds, status, last, tmp_path):
    outcome = carry_out(stage("one", python("job", code, seconds=seconds)), tmp_path)
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
    monkeypatch.setattr(run, "GRACE", 0.0)
    jobs = [python("quick", "pass"), python("slow", HANGS, tmp_path / "pid"), python("never", "pass")]
    outcome = carry_out(stage("many", *jobs, minutes=6 / 60), tmp_path)
    assert outcome.status == UNFINISHED and outcome.last_line == "1 of 3 parts done" and outcome.seconds < 20
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

# What `python -m bench.gpu_check` does, with the stages of the test and no GPU.
PROGRAM = """
import json, sys
from pathlib import Path
import torch
from bench.measuring import machine, records
from bench.gpu_check import __main__ as gpu_check
from bench.gpu_check.process import Job
from bench.gpu_check.stages import Missing, Stage
about, described, argv = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]
torch.cuda.is_available, torch.cuda.current_device = lambda: True, lambda: 0
gpu_check.arch_of, machine.describe, records.latest = lambda _: "sm_90", lambda device: about, lambda gpu: None
def one(name, minutes, *jobs):
    made = [Job(n, (sys.executable, "-c", *command), seconds) for n, seconds, command in jobs]
    return Stage(name, minutes, lambda _: made, ("bench",))
gpu_check.stages = lambda machine: [one(*d) if len(d) > 2 else Missing(*d) for d in described]
sys.exit(gpu_check.main(argv))
"""


class Whole:
    """Runs it on three stages; the second one waits until it is allowed to end."""

    def __init__(self, folder: Path) -> None:
        self.out, self.counts, self.go = folder / "out", [folder / f"{i}.count" for i in range(3)], folder / "go"
        waits = "import os, time\nwhile not os.path.exists(sys.argv[3]): time.sleep(0.05)"
        self.described: list[Any] = [["first", 1, ["job", 60, [COUNTS, str(self.counts[0]), "print('one')"]]],
                                     ["second", 1, ["job", 60, [COUNTS, str(self.counts[1]), waits, str(self.go)]]],
                                     ["third", 1, ["job", 60, [COUNTS, str(self.counts[2]), "print('three')"]]],
                                     ["fourth", "there is no such tool here"]]  # fmt: skip

    def start(self, *argv: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PROGRAM, json.dumps(ABOUT), json.dumps(self.described)]
        return subprocess.Popen([*command, "--out", str(self.out), *argv], stdout=subprocess.PIPE, text=True)

    def status(self, name: str) -> str | None:
        outcome = state.read(run.stage_file(self.out, name))
        return outcome and outcome.status


@pytest.fixture
def whole(tmp_path) -> Whole:
    return Whole(tmp_path)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_a_run_that_was_ended_midway_goes_on(name, whole):
    started = whole.start()
    wait_for(lambda: runs(whole.counts[1]), 60)
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
    again = whole.start()
    said, _ = again.communicate(timeout=60)
    assert again.returncode == gpu_check.PASSED, said
    assert list(map(runs, whole.counts)) == [1, 2, 1]
    assert "fourth" in said and "there is no such tool here" in said


def test_the_page_has_nothing_of_another_commit(whole, monkeypatch, capsys):
    whole.go.touch()
    assert main(whole, monkeypatch) == gpu_check.PASSED
    monkeypatch.setattr(sys.modules[__name__], "ABOUT", {**ABOUT, "commit": "fff9999"})
    capsys.readouterr()
    assert main(whole, monkeypatch, "--only", "third") == gpu_check.PASSED
    said = capsys.readouterr().out
    assert "commit fff9999" in said and "goes on with first, second" in said
    assert list(map(runs, whole.counts)) == [1, 1, 2]
    assert (whole.out / "earlier" / "first" / "job.txt").read_text() == "one\n"


def test_minutes_end_the_stage_under_way(whole):
    started = time.monotonic()
    first = whole.start("--minutes", str(12 / 60))
    first.communicate(timeout=60)
    assert first.returncode == gpu_check.LEFT and time.monotonic() - started < 40
    assert whole.status("first") == PASSED and whole.status("second") == UNFINISHED


def main(whole: Whole, monkeypatch, *argv: str) -> int:
    """In this process, for what needs no signal."""
    made = [
        Stage(d[0], d[1], lambda _, d=d: [Job(n, (sys.executable, "-c", *c), s) for n, s, c in d[2:]], ("bench",))
        if len(d) > 2 else Missing(*d) for d in whole.described
    ]  # fmt: skip
    monkeypatch.setattr(gpu_check, "stages", lambda machine: made)
    monkeypatch.setattr(gpu_check, "arch_of", lambda _: "sm_90")
    monkeypatch.setattr(gpu_check._Clock, "__init__", lambda self, minutes: setattr(self, "end", float("inf")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(machine, "describe", lambda device: ABOUT)
    monkeypatch.setattr(records, "latest", lambda gpu: None)
    return gpu_check.main(["--out", str(whole.out), *argv])


def test_a_chosen_stage_brings_what_it_needs():
    made = [stage("first"), stage("second"), stage("third")._replace(needs="first")]
    assert [s.name for s in gpu_check.chosen(made, ["third"])] == ["first", "third"]
    assert [s.name for s in gpu_check.chosen(made, ["second"])] == ["second"]
    assert gpu_check.chosen(made, None) == made


def test_exit_codes_and_choices(whole, monkeypatch, capsys):
    whole.go.touch()
    assert main(whole, monkeypatch, "--only", "third") == gpu_check.PASSED
    assert list(map(runs, whole.counts)) == [0, 0, 1]
    assert main(whole, monkeypatch) == gpu_check.PASSED
    assert list(map(runs, whole.counts)) == [1, 1, 1]
    assert main(whole, monkeypatch, "--fresh", "--only", "first") == gpu_check.PASSED
    assert list(map(runs, whole.counts)) == [2, 1, 1]
    capsys.readouterr()
    assert main(whole, monkeypatch, "--page") == gpu_check.PASSED
    assert list(map(runs, whole.counts)) == [2, 1, 1] and "llama_kernels on Imitated GPU" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(whole, monkeypatch, "--only", "fifth")
    assert "no stage is called fifth; there are first, second, third, fourth" in capsys.readouterr().err
    whole.described[0][2][2][2] = "print('it broke'); sys.exit(1)"
    assert main(whole, monkeypatch) == gpu_check.WRONG
    said = capsys.readouterr().out
    assert "FAILED     first" in said and "it broke" in said and "--only first" in said


def test_slower_than_the_last_record_is_wrong(whole, monkeypatch, tmp_path):
    whole.go.touch()
    assert main(whole, monkeypatch) == gpu_check.PASSED
    records.write(Run(ABOUT, {}, [norm(4096, 97)], {}), whole.out / "speed" / "records.json")
    records.write(Run(ABOUT, {}, [dataclasses.replace(norm(4096, 97), ms=0.8)], {}), tmp_path / "before.json")
    monkeypatch.setattr(records, "latest", lambda gpu: tmp_path / "before.json")
    monkeypatch.setattr(gpu_check.page.records, "latest", lambda gpu: tmp_path / "before.json")
    assert gpu_check.main(["--out", str(whole.out)]) == gpu_check.WRONG


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_gpu_check_needs_a_gpu(capsys):
    assert gpu_check.main([]) == gpu_check.NO_GPU and "no GPU" in capsys.readouterr().out
