"""A run writes its records after each piece of work, so a run that ends early can be resumed.

The providers and clocks here are artificial.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="the bench's commands print with rich")

from bench.commands import session
from bench.commands.arguments import main, parser
from bench.measuring import processes, records
from bench.providers.eager import Eager
from bench.providers.ours import Ours
from bench.reporting.terminal import say_absent
from tests.bench.fakes import ADD, CEILINGS, NORM, ROPE, Bad, FailingClock, FakeClock, fail, norm_provider, reasons

pytestmark = pytest.mark.once


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """measure(works, clock, *options): a run of `eager` and `bad` on a CPU, with its records in tmp_path."""
    monkeypatch.setattr(session, "PROVIDERS", (Eager(), Bad(lambda: None)))

    def measure(works, clock, *options):
        args = parser().parse_args(["run", "--out", str(tmp_path), "--seconds", "0.01", *options])
        return session.measure(args, works, [], "cpu", clock)

    return measure


def test_records_are_on_disk_after_each_piece_of_work(measure, tmp_path, monkeypatch):
    counts, write = [], records.write
    monkeypatch.setattr(records, "write", lambda run, path: (write(run, path), counts.append(len(run.records))))
    run = measure([NORM, ADD, ROPE], FakeClock())
    assert counts == [0, 6, 9, 12] and len(records.read(tmp_path / "records.json").records) == 12
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert session.status_of(run) is None


def test_peers_that_are_not_installed_take_one_line_at_the_end(measure, monkeypatch, capsys):
    missing = (norm_provider(fail(AssertionError()), "one"), norm_provider(fail(AssertionError()), "two"))
    for provider in missing:
        provider.module, provider.package = "no_such_module_anywhere", "no-such-package"
    monkeypatch.setattr(session, "PROVIDERS", (Eager(), *missing))
    run = measure([NORM, ADD], FakeClock())
    assert "no-such-package" not in capsys.readouterr().out
    say_absent(run)
    assert capsys.readouterr().out == (
        "Not installed: one (pip install no-such-package), two (pip install no-such-package).\n"
    )
    assert reasons(run.records, "two") == {"not installed (pip install no-such-package)"}


def test_the_progress_bar_names_each_step(measure, monkeypatch):
    shown, name_of = [], session._in_short
    monkeypatch.setattr(session, "_in_short", lambda step: shown.append(name_of(step)))
    measure([NORM], None, "--providers", "eager")
    assert shown == ["rms_norm, norm: bench, inputs", "rms_norm, norm: eager, numbers and memory"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x"
    records.replace_text(path, "old")

    class Killed(BaseException):
        pass

    monkeypatch.setattr(Path, "write_text", lambda self, text: (self.open("w").write(text[:1]), fail(Killed())()))
    with pytest.raises(Killed):
        records.replace_text(path, "new")
    assert path.read_text() == "old"


def test_an_interrupted_run_keeps_its_records_and_can_be_resumed(measure, tmp_path, capsys):
    clock = FailingClock(7, KeyboardInterrupt())  # six samplers of rms_norm, and one of add_rms_norm
    stopped = measure([NORM, ADD, ROPE], clock)
    assert session.status_of(stopped) == processes.INTERRUPTED
    kept = records.read(tmp_path / "records.json")
    assert kept.extra["stopped"] == "interrupted" and {r.op for r in kept.records} == {"rms_norm"}
    assert "--resume continues" in capsys.readouterr().out

    class Other(FakeClock):
        def ceilings(self):
            raise AssertionError("the ceilings of the first process are kept")

    clock = Other(3.0)
    whole = measure([NORM, ADD, ROPE], clock, "--resume")
    assert {r.op: r.ms for r in whole.records if r.provider == "eager"} == {
        "rms_norm": 2.0, "add_rms_norm": 3.0, "rope": 3.0}  # fmt: skip
    assert len(clock.calls) == 6 and whole.ceilings == CEILINGS and "stopped" not in whole.extra
    assert records.read(tmp_path / "records.json").extra == {}


def test_a_resumed_run_measures_what_was_not_run(measure):
    measure([NORM, ADD], FakeClock(), "--minutes", "1e-9")
    again = measure([NORM, ADD], FakeClock(), "--resume")
    assert len(again.records) == 9 and all(r.ms == 2.0 for r in again.records)


def test_a_resumed_run_measures_new_providers(measure):
    measure([NORM, ADD], FakeClock(), "--directions", "forward", "--providers", "eager")
    clock = FakeClock(3.0)
    again = measure([NORM, ADD], clock, "--directions", "forward", "--resume")
    assert [(r.op, r.provider, r.ms) for r in again.records] == [
        ("add_rms_norm", "eager", 2.0), ("rms_norm", "eager", 3.0), ("rms_norm", "bad", 3.0)]  # fmt: skip


def test_a_run_does_not_resume_from_records_of_another_machine(measure, tmp_path):
    measure([NORM], FakeClock())
    whole = json.loads((tmp_path / "records.json").read_text())
    whole["machine"]["gpu"] = "Another GPU"
    (tmp_path / "records.json").write_text(json.dumps(whole))
    said = r"--resume: .*records.json was measured with gpu 'Another GPU', and this is 'none'"
    with pytest.raises(ValueError, match=said):
        measure([NORM], FakeClock(), "--resume")
    assert measure([NORM], FakeClock()).records  # without --resume, all is measured again


def test_parity_can_be_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bench.works.presets.small", lambda dtypes: iter([NORM, ROPE]))
    options = ["parity", "--device", "cpu", "--out", str(tmp_path), "--providers", "llama_kernels"]
    assert main(options) == 0 and len(records.read(tmp_path / "records.json").records) == 6
    monkeypatch.setattr(Ours, "rope", lambda *_: lambda q, k: (q, k))
    assert main([*options, "--resume"]) == 0  # it was right before
    assert main(options) == 1
    (tmp_path / "journal.json").write_text("{")
    assert main([*options, "--resume"]) == 2 and "not a journal of the bench" in capsys.readouterr().out
