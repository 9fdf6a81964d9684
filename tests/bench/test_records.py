"""Records: their file, the machine that they name, and the comparison of two runs."""

from __future__ import annotations

import json
import types

import pytest
import torch

from bench.measuring import machine, records
from bench.measuring.records import Run
from bench.providers.ours import Ours
from bench.providers.provider import OURS
from bench.reporting import compare
from tests.bench.fakes import CEILINGS, PACKED, FakeClock, fake_run, record, run

pytestmark = pytest.mark.once


def test_records_are_read_as_they_were_written(tmp_path):
    made = Run({"gpu": "Fake GPU"}, CEILINGS, run(PACKED, Ours(), clock=FakeClock()), {"host": [{"op": "rope"}]})
    records.write(made, tmp_path / "a" / "run.json")
    back = records.read(tmp_path / "a" / "run.json")
    assert back.machine == made.machine and back.ceilings == CEILINGS and back.extra == made.extra
    assert [r.key for r in back.records] == [r.key for r in made.records]  # tuples have become lists
    assert back.records[0].ms == 2.0
    whole = json.loads((tmp_path / "a" / "run.json").read_text())
    wanted = {"op", "direction", "shape", "dtype", "provider", "ms", "spread", "ceiling", "percent", "memory", "error",
              "torch", "triton", "gpu", "driver", "date"}  # fmt: skip
    assert wanted <= whole["records"][0].keys() and whole["records"][0]["provider"] == "llama_kernels"


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "x.json is not JSON"),
        ("[]", "no JSON object with a list of `records`"),
        ('{"schema": 99, "records": []}', "schema 99; this bench reads schema 1"),
        ('{"schema": 1, "records": [3]}', "record 0 is no JSON object"),
        ('{"schema": 1, "records": [{"op": "rope"}]}', "record 0 has no direction"),
        ('{"schema": 1, "records": [{"speed": 1}]}', "record 0 has unknown fields: speed"),
    ],
)
def test_a_file_of_another_format_is_refused(tmp_path, text, said):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        records.read(tmp_path / "x.json")


@pytest.mark.parametrize(
    "field, value", [("ms", "fast"), ("estimate", 1), ("sizes", None), ("memory", 1.5), ("ms", True)]
)
def test_a_field_of_the_wrong_type_is_refused(tmp_path, field, value):
    records.write(fake_run(record()), tmp_path / "x.json")
    whole = json.loads((tmp_path / "x.json").read_text())
    whole["records"][0][field] = value
    (tmp_path / "x.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=f"record 0: {field} is"):
        records.read(tmp_path / "x.json")


def test_the_ratio_compares_with_the_fastest_other_provider():
    rows = [record(ms=ms, provider=name) for name, ms in ((OURS, 2.0), ("a", 3.0), ("b", 5.0), ("c", None))]
    made = records.with_ratios([*rows, record(shape="x")])
    assert [r.ratio for r in made] == [1.5, pytest.approx(2 / 3), 0.4, None, None]


def test_results_have_a_folder_for_each_gpu(tmp_path, monkeypatch):
    assert records.folder("NVIDIA H200").parts[-3:] == ("bench", "results", "nvidia-h200")
    monkeypatch.setattr(records, "folder", lambda gpu: tmp_path)
    assert records.latest("x") is None
    for name in ("2026-01-02-a.json", "2026-01-10-b.json"):
        (tmp_path / name).write_text("{}")
    assert records.latest("x").name == "2026-01-10-b.json"


# --- the machine -----------------------------------------------------------------------------------------------------

# The output of nvidia-smi on a machine with two GPUs, in the order of their PCI addresses.
LISTED = """GPU-AAAAAAAA-1111-2222-3333-444444444444, 00000000:3B:00.0, {0}
GPU-bbbbbbbb-1111-2222-3333-444444444444, 00000000:AF:00.0, {1}"""
FIELDS = {"driver_version": ("580.65.06", "580.65.06"), "clocks.sm": ("1980 MHz", "345 MHz")}


@pytest.fixture
def two_gpus(monkeypatch):
    """two_gpus(**properties): CUDA_VISIBLE_DEVICES leaves torch.cuda one device, with these properties."""

    def make(listed=LISTED, **properties):
        def output(*command):
            if command[0] != "nvidia-smi":
                return ""
            assert "-i" not in command  # indices of CUDA and of nvidia-smi differ
            field = command[1].rsplit(",", 1)[-1]
            return listed.format(*FIELDS[field])

        monkeypatch.setattr(machine, "_output", output)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Fake GPU")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(**properties))

    return make


@pytest.mark.parametrize("uuid, mhz", [("aaaaaaaa", 1980), ("bbbbbbbb", 345)])
def test_the_gpu_is_found_by_its_uuid(two_gpus, uuid, mhz):
    """Device 0 of CUDA may be any GPU of nvidia-smi: CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER decide."""
    two_gpus(uuid=f"{uuid}-1111-2222-3333-444444444444")
    assert machine.clock("cuda") == mhz
    made = machine.describe("cuda")
    assert (made["gpu"], made["driver"]) == ("Fake GPU", "580.65.06")


def test_a_mig_slice_is_found_by_the_address_of_its_gpu(two_gpus):
    slice_of_the_second = {"uuid": "cccccccc-1111-2222-3333-444444444444", "pci_domain_id": 0, "pci_bus_id": 0xAF}
    two_gpus(**slice_of_the_second, pci_device_id=0)
    assert machine.clock("cuda") == 345


def test_values_that_nvidia_smi_does_not_give_are_unknown(two_gpus):
    two_gpus()  # neither UUID nor address
    assert machine.clock("cuda") is None and machine.describe("cuda")["driver"] == "580.65.06"  # that of both
    two_gpus(listed="", uuid="x")  # no nvidia-smi
    assert machine.clock("cuda") is None and machine.describe("cuda")["driver"] == "unknown"


def test_the_machine_of_a_cpu_run_names_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: 1 / 0)
    monkeypatch.setattr(machine, "_smi", lambda field: 1 / 0)
    made = machine.describe("cpu")
    assert (made["gpu"], made["driver"], machine.clock("cpu")) == ("none", "none", None)


# --- two runs --------------------------------------------------------------------------------------------------------


GOOD = {"ms": 1.0, "error": 1e-3, "memory": 1000, "saved": 1000}


@pytest.mark.parametrize("changed, regressions", [
    ({"ms": 1.10}, [True]),
    ({"ms": 1.10, "spread": 0.5}, [True]),
    ({"ms": 1.03}, []),
    ({"ms": 0.97}, []),
    ({"ms": 0.9}, [False]),
    ({"ms": None, "reason": "wrong numbers"}, [True]),
    ({"error": 2e-3}, [True]),
    ({"error": 1.1e-3}, []),
    ({"error": None}, [True]),
    ({"memory": 1100, "saved": 1100}, [True, True]),
    ({"memory": 1010}, []),
    ({"shape": "renamed"}, [True]),
])  # fmt: skip
def test_which_changes_are_regressions(changed, regressions):
    before, after = fake_run(record(**GOOD)), fake_run(record(**GOOD | changed))
    assert [f.regression for f in compare.compare(before, after)] == regressions


@pytest.mark.parametrize("provider, regressions", [("peer", []), (f"{OURS}, compiled", [True])])
def test_only_rows_of_our_ops_are_regressions(provider, regressions):
    before, after = (fake_run(record(ms=ms, provider=provider)) for ms in (1.0, 2.0))
    assert [f.regression for f in compare.compare(before, after)] == regressions


def test_a_missing_row_is_a_regression():
    assert [f.regression for f in compare.compare(fake_run(record()), fake_run())] == [True]
