"""bench.gpu_check without a GPU. The stages here run small processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.gpu_check import __main__ as gpu_check
from bench.gpu_check import process, run, state
from bench.gpu_check.state import ABSENT, FAILED, PASSED, STOPPED, UNFINISHED
from bench.measuring import records
from bench.measuring.records import Run
from tests.bench.fake_stages import (
    ABOUT,
    COUNTS,
    HANGS,
    HurriedTime,
    carry_out,
    is_alive,
    pretend,
    python,
    runs,
    stage,
    wait_for,
    wrote,
)
from tests.bench.fakes import norm_row
from tests.support.environment import DEVICE

pytestmark = pytest.mark.once


# --- stages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code, status, last", [
    ("print('12 passed, 3 skipped in 4.5s')", PASSED, "12 passed, 3 skipped in 4.5s"),
    ("print('2 failed, 1 passed'); raise SystemExit(1)", FAILED, "2 failed, 1 passed"),
    ("import time; print('test_seven', flush=True); time.sleep(60)", STOPPED, "killed after 4 s, at: test_seven"),
    ("print('Error: Device not supported'); raise SystemExit(1)", ABSENT, "Device not supported"),
])  # fmt: skip
def test_a_stage_of_one_job_has_the_result_of_the_job(code, status, last, tmp_path, monkeypatch):
    log = tmp_path / "one" / "job.txt"
    monkeypatch.setattr(process, "time", HurriedTime(lambda: status == STOPPED and wrote(log)))
    outcome = carry_out(stage("one", python("job", code, seconds=4)), tmp_path)
    assert (outcome.status, outcome.last_line, outcome.wrong) == (status, last, status in (FAILED, STOPPED))
    assert state.read(run.stage_file(tmp_path, "one")) == outcome
    if status == PASSED:
        assert outcome.counts == {"passed": 12, "skipped": 3}


def test_a_stage_of_many_jobs_adds_up_their_results(tmp_path):
    jobs = [python("a", "print('2 passed')"), python("b", "print('1 failed, 5 passed'); raise SystemExit(1)"),
            python("c", "print('3 passed, 1 error'); raise SystemExit(1)")]  # fmt: skip
    outcome = carry_out(stage("many", *jobs), tmp_path)
    assert outcome.status == FAILED and outcome.last_line == "3 of 3 parts done, wrong: b c"
    assert outcome.counts == {"passed": 10, "failed": 1, "error": 1}
    assert state.read(tmp_path / "many" / "b.json").status == FAILED


def test_a_stage_without_jobs_has_not_passed(tmp_path):
    assert carry_out(stage("none"), tmp_path).status == UNFINISHED


def test_only_jobs_that_have_not_passed_are_repeated(tmp_path):
    counted = [tmp_path / f"{name}.count" for name in "abc"]
    codes = ("pass", "import pathlib; sys.exit(not pathlib.Path(sys.argv[3]).exists())", "pass")
    jobs = [python(x.stem, COUNTS, x, code, tmp_path / "mended") for x, code in zip(counted, codes, strict=True)]
    made = stage("many", *jobs)
    assert carry_out(made, tmp_path).status == FAILED
    assert run.kept(made, tmp_path, ABOUT) is None
    (tmp_path / "mended").touch()
    assert carry_out(made, tmp_path).status == PASSED
    assert list(map(runs, counted)) == [1, 2, 1]
    assert run.kept(made, tmp_path, ABOUT).status == PASSED


@pytest.mark.parametrize("changed", ["commit", "torch", "triton", "gpu", "driver", "sources", "command", "env"])
def test_a_result_holds_only_for_its_gpu_versions_sources_and_command(changed, tmp_path, monkeypatch):
    count, about = tmp_path / "count", dict(ABOUT)
    job = python("job", COUNTS, count, "pass")
    assert carry_out(stage("one", job), tmp_path).status == PASSED
    (tmp_path / "one" / "records.json").touch()  # a file from which a command would resume
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


def test_the_digest_of_sources_changes_with_content_and_names(tmp_path, monkeypatch):
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


def test_a_stage_ends_at_its_own_time_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "time", HurriedTime(lambda: wrote(tmp_path / "pid")))
    jobs = [python("quick", "pass"), python("slow", HANGS, tmp_path / "pid"), python("never", "pass")]
    outcome = carry_out(stage("many", *jobs, minutes=6), tmp_path)
    assert outcome.status == UNFINISHED and outcome.last_line == "1 of 3 parts done"
    assert state.read(tmp_path / "many" / "never.json") is None


def test_a_command_with_more_to_do_is_continued(tmp_path):
    count = tmp_path / "count"
    job = python("job", COUNTS, count, "print('a part of it')")
    made = stage("one", job)._replace(finished=lambda _: runs(count) > 1)
    outcome = carry_out(made, tmp_path)
    assert outcome.status == UNFINISHED and outcome.last_line == "has more to do: a part of it"
    assert carry_out(made, tmp_path).status == PASSED and runs(count) == 2
    assert run.kept(made, tmp_path, ABOUT)


# --- the whole -------------------------------------------------------------------------------------------------------


class Whole:
    """Four stages in `folder`: the second waits for the file `go`, and the last cannot run here."""

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
def test_a_run_ended_by_a_signal_is_continued(name, whole, main, capsys):
    command = [sys.executable, "-m", "tests.bench.fake_stages", json.dumps(ABOUT), json.dumps(whole.described)]
    started = subprocess.Popen([*command, "--out", str(whole.out)], stdout=subprocess.PIPE, text=True, cwd=state.ROOT)
    wait_for(lambda: runs(whole.counts[1]))
    assert whole.status("first") == PASSED  # is on disk before the next stage begins
    pid = int(subprocess.run(["pgrep", "-P", str(started.pid)], capture_output=True, text=True).stdout.split()[0])
    started.send_signal(getattr(signal, name))
    said, _ = started.communicate(timeout=30)
    if name == "SIGKILL":
        os.killpg(pid, signal.SIGKILL)  # the parent was killed before it could
    else:
        assert started.returncode == gpu_check.LEFT
        assert "continues with second, third" in said and whole.status("second") == UNFINISHED
        assert (whole.out / "page.md").read_text().startswith("```\nllama_kernels on Imitated GPU")
    wait_for(lambda: not is_alive(pid))
    assert whole.status("third") is None

    whole.go.touch()
    assert main() == gpu_check.PASSED and whole.runs() == [1, 2, 1]
    said = capsys.readouterr().out
    assert "fourth" in said and "there is no such tool here" in said


def test_the_page_has_no_results_of_another_commit(whole, main, capsys):
    whole.go.touch()
    assert main() == gpu_check.PASSED
    capsys.readouterr()
    assert main("--only", "third", about={**ABOUT, "commit": "fff9999"}) == gpu_check.PASSED
    said = capsys.readouterr().out
    assert "commit fff9999" in said and "continues with first, second" in said
    assert whole.runs() == [1, 1, 2]
    assert (whole.out / "earlier" / "first" / "job.txt").read_text() == "one\n"


def test_the_minutes_of_the_run_also_end_a_running_stage(whole, main, monkeypatch):
    monkeypatch.setattr(gpu_check, "time", HurriedTime(lambda: runs(whole.counts[1]) > 0))
    assert main("--minutes", "12") == gpu_check.LEFT
    assert [whole.status(name) for name in ("first", "second", "third")] == [PASSED, UNFINISHED, None]


def test_choosing_a_stage_also_chooses_the_stage_it_needs():
    made = [stage("first"), stage("second"), stage("third")._replace(needs="first")]
    assert [s.name for s in gpu_check.chosen(made, ["third"])] == ["first", "third"]
    assert [s.name for s in gpu_check.chosen(made, ["second"])] == ["second"]
    assert gpu_check.chosen(made, None) == made


def test_options_choose_stages_and_the_exit_code_tells_the_result(whole, main, capsys):
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
    assert "no stage is called fifth; the stages are first, second, third, fourth" in capsys.readouterr().err
    whole.described[0][2][2][2] = "print('it broke'); sys.exit(1)"
    assert main() == gpu_check.WRONG
    said = capsys.readouterr().out
    assert "FAILED     first" in said and "it broke" in said and "--only first" in said


def test_a_row_slower_than_the_last_record_makes_the_run_wrong(whole, main, monkeypatch, tmp_path):
    whole.go.touch()
    assert main() == gpu_check.PASSED
    for path, ms in ((whole.out / "speed" / "records.json", 1.0), (tmp_path / "before.json", 0.8)):
        records.write(Run(ABOUT, {}, [norm_row(4096, 97, ms=ms)], {}), path)
    monkeypatch.setattr(records, "latest", lambda gpu: tmp_path / "before.json")
    assert gpu_check.main(["--out", str(whole.out)]) == gpu_check.WRONG


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_gpu_check_needs_a_gpu(capsys):
    assert gpu_check.main([]) == gpu_check.NO_GPU and "no GPU" in capsys.readouterr().out
