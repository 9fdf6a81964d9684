"""The bench itself: a provider that is wrong is caught, the arithmetic is right, nobody is dropped, reports are whole.

No time is taken here: clocks are fakes that say what they are told.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import types

import pytest
import torch

pytest.importorskip("rich", reason="the bench's commands print with rich")

import llama_kernels as lk
from bench.commands import session
from bench.commands.arguments import main, parser
from bench.estimate import bounds
from bench.gpus import GPUS
from bench.measuring import machine, records, runner, step, timing
from bench.measuring.records import Record, Run
from bench.providers import ours as ours_module
from bench.providers import provider as provider_module
from bench.providers.eager import Eager
from bench.providers.ours import Ours
from bench.providers.provider import OURS, Provider, Unsupported
from bench.providers.registry import PROVIDERS
from bench.reporting import compare, report
from bench.reporting.sweeps import sweeps
from bench.training import runner as training_runner
from bench.training import scale as training
from bench.training import step as training_step
from bench.training import variations as training_variations
from bench.works import attention, errors, norms, presets, rotations
from bench.works import work as work_module
from bench.works.presets import works_of
from tests.bench.fakes import ABOUT, CEILINGS, NORM, FakeClock, tiny_model
from tests.support.environment import DEVICE, compiles

DENSE = attention.Attention(shape="dense", B=2, S=40, Hq=4, Hkv=2, D=16, dtype=torch.float16)
PACKED = attention.AttentionVarlen(shape="packed", lengths=(12, 1, 20), Hq=4, Hkv=2, D=16, dtype=torch.float16)
TINY = (
    NORM,
    norms.AddRMSNorm(shape="add", M=10, N=32, dtype=torch.float16),
    rotations.Rope(shape="rope", B=2, S=9, Hq=4, Hkv=2, D=16, dtype=torch.float16),
    rotations.QKNormRope(shape="heads", B=2, S=9, Hq=4, Hkv=2, D=16, dtype=torch.float16),
    rotations.RopeQKV(shape="projection", B=2, S=9, Hq=4, Hkv=2, D=16, dtype=torch.float16),
    rotations.RopeIntoCache(shape="cache", B=2, S=9, Hq=4, Hkv=2, D=16, dtype=torch.float16),
    DENSE,
    attention.RopeAttention(shape="rotated", B=2, S=40, Hq=4, Hkv=2, D=16, dtype=torch.float16),
    attention.Attention(shape="window", B=1, S=40, Hq=4, Hkv=2, D=16, window=9, dtype=torch.float16),
    PACKED,
    attention.Decode(shape="decode", B=2, Sk=50, Hq=4, Hkv=2, D=16, dtype=torch.float16),
)


def named(works):
    return pytest.mark.parametrize("work", works, ids=lambda w: w.shape)


def run(work, *chosen, clock=None, ceilings=CEILINGS, **options) -> list[Record]:
    made = runner.run([work], chosen, device=DEVICE, clock=clock, ceilings=ceilings, about=ABOUT, **options)
    return [r for rs in made for r in rs]


# --- the work --------------------------------------------------------------------------------------------------------


def test_pairs_are_those_of_the_mask():
    for S, window in ((1, -1), (7, -1), (7, 0), (7, 3), (7, 6), (7, 100)):
        i, j = torch.arange(S)[:, None], torch.arange(S)
        see = (j <= i) & ((i - j <= window) if window >= 0 else True)
        assert attention.pairs(S, window) == int(see.sum())


def test_floors_by_hand():
    norm = norms.RMSNorm(shape="", M=10, N=8)
    assert [norm.bytes(d) for d in work_module.DIRECTIONS] == [2 * 160 + 16, 3 * 160 + 32, 5 * 160 + 48]
    add = norms.AddRMSNorm(shape="", M=10, N=8)
    assert [add.bytes(d) for d in work_module.DIRECTIONS] == [4 * 160 + 16, 4 * 160 + 32, 8 * 160 + 48]
    rope = rotations.Rope(shape="", B=2, S=3, Hq=4, Hkv=1, D=8)
    assert rope.bytes("forward") == rope.bytes("backward") == 2 * (2 * 3 * 5 * 8 * 2) + 2 * 3 * 4 * 4
    heads = rotations.QKNormRope(shape="", B=2, S=3, Hq=4, Hkv=1, D=8)
    assert heads.bytes("backward") - heads.bytes("forward") == 2 * 3 * 5 * 8 * 2
    packed = rotations.RopeQKV(shape="", B=2, S=3, Hq=4, Hkv=1, D=8)
    assert packed.bytes("forward") == rope.bytes("forward")
    assert packed.bytes("backward") == rope.bytes("backward") + 2 * (2 * 3 * 1 * 8 * 2)
    dense = attention.Attention(shape="", B=2, S=4, Hq=4, Hkv=2, D=8)
    q, k, lse = 2 * 4 * 4 * 8 * 2, 2 * 2 * 4 * 8 * 2, 2 * 4 * 4 * 4
    assert dense.bytes("forward") == 2 * q + 2 * k + lse and dense.bytes("backward") == 4 * q + 4 * k + lse
    assert dense.flops("forward") == 2 * 2 * 8 * (2 * 4 * 10)  # two products, D, B H pairs
    assert dense.flops("backward") == 2.5 * dense.flops("forward")
    assert dense.flops("both") == 3.5 * dense.flops("forward")
    rotated = attention.RopeAttention(shape="", B=2, S=4, Hq=4, Hkv=2, D=8)
    assert rotated.bytes("both") == dense.bytes("both") + 2 * 2 * 4 * 4 * 4
    assert rotated.flops("both") == dense.flops("both")
    packed = attention.AttentionVarlen(shape="", lengths=(3, 5), Hq=4, Hkv=2, D=8)
    assert packed.flops("forward") == 4 * 4 * 8 * (6 + 15)


def test_documents_fill_the_batch():
    for tokens in (16384, 32768):
        lengths = presets.documents(tokens)
        assert sum(lengths) == tokens and min(lengths) >= 128 and max(lengths) >= tokens // 4


def whole_reference(work):
    """The specification of all of the work at once."""
    window = (getattr(work, "window", -1), -1)

    def packed(q, k, v):
        cu, longest = work.cu_seqlens("cpu"), max(work.lengths)
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        return lk.reference.attention_varlen(q, k, v, cu, cu, longest, longest).transpose(0, 1)[None]

    return {
        "rms_norm": lambda x, w: lk.reference.rms_norm(x, w, norms.EPS),
        "add_rms_norm": lambda x, r, w: lk.reference.add_rms_norm(x, r, w, norms.EPS),
        "rope": lambda q, k: lk.reference.rope(q, k, *work.tables("cpu")),
        "qk_norm_rope": lambda *args: lk.reference.qk_norm_rope(*args, *work.tables("cpu"), eps=norms.EPS),
        "rope_qkv": lambda qkv: lk.reference.rope_qkv(qkv, work.Hq, work.Hkv, *work.tables("cpu")),
        "rope_into_cache": lambda q, k, v: (*lk.reference.rope(q, k, *work.angles("cpu")), v),
        "attention": lambda q, k, v: lk.reference.attention(q, k, v, window_size=window),
        "rope_attention": lambda q, k, v: lk.reference.rope_attention(q, k, v, *work.tables("cpu")),
        "attention_varlen": packed,
        "decode": lk.reference.attention,
    }[work.op]


@named(TINY)
def test_the_truth_in_pieces_is_the_whole(work, monkeypatch):
    """Small pieces add up to what the reference says at once; the yardstick to what plain PyTorch says."""
    call = work.draw("cpu")
    monkeypatch.setattr(norms, "ROWS", 7)
    monkeypatch.setattr(attention, "QUERIES", 8)
    pieces = list(work.pieces(call))
    assert len(pieces) > 1 or work.op in ("decode", "rope_into_cache")
    truth = work.truth(call)
    wide = work_module.Call(*(tuple(x.double() for x in xs) for xs in call))
    backward = "backward" in work.directions
    whole = work_module.compute(work, whole_reference(work), wide, backward)
    assert truth.keys() == whole.keys()
    for name, x in truth.items():
        torch.testing.assert_close(x, work.judged(name, whole[name]))
    plain = work_module.compute(work, Eager().function(work, "cpu"), call, backward)
    bars = errors.errors(work, work.yardstick(call), truth)
    assert errors.disparity(work, plain, truth, bars)[1] is None


# --- parity ----------------------------------------------------------------------------------------------------------


NO_WINDOW = "has no window but a mask written out"


@named(TINY)
def test_ours_and_plain_pytorch_are_right(work):
    """Of PyTorch's own kernels, only those that run at every shape and on every GPU must."""
    everywhere = [p for p in PROVIDERS if p.module is None and p.cpu]
    made = run(work, *everywhere)
    assert {r.provider for r in made} >= {OURS, "eager"}
    for r in made:
        assert r.reason in (None, NO_WINDOW), f"{r.provider}: {r.reason}"
        assert r.reason or r.error > 0


@pytest.mark.gpu
@named(TINY)
def test_no_kernel_of_pytorch_is_called_in_a_wrong_way(work):
    """It may refuse a shape, or this GPU; but right arguments give right numbers."""
    for r in run(work, *[p for p in PROVIDERS if p.module is None and not p.cpu]):
        assert not (r.reason or "").startswith("wrong"), f"{r.provider}: {r.reason}"


@pytest.mark.gpu
@named(TINY)
def test_everything_is_timed_on_a_gpu(work):
    made = run(work, Ours(), Eager(), clock=timing.Gpu(), seconds=0.05)
    assert all(r.ms > 0 and r.memory is not None and r.percent < 110 for r in made), made
    assert all(r.method == "graph" for r in made if r.provider == OURS), [r.reason for r in made]  # none of ours waits


@pytest.mark.parametrize("provider", [p for p in PROVIDERS if p.module], ids=lambda p: p.name)
def test_a_peer_that_is_not_installed_is_listed(provider, monkeypatch):
    """Whether or not it is installed here."""
    monkeypatch.setattr(provider_module, "_importable", lambda module: False)
    work = next(w for w in TINY if provider.has(w.op))
    assert {r.reason for r in run(work, provider)} == {f"not installed (pip install {provider.package})"}


class Wrong(Provider):
    """What `change` makes of our result."""

    name, cpu = "wrong", True

    def __init__(self, change) -> None:
        self.change = change

    def rms_norm(self, work, device):
        return lambda x, weight: self.change(lk.rms_norm(x, weight, norms.EPS), x, weight)

    def attention(self, work, device):
        return lambda q, k, v: self.change(lk.attention(q, k, v), q, k, v)


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, weight):
        ctx.N = weight.shape[0]
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy, dy.new_zeros(ctx.N)


def _without_row(y, *_):
    return torch.cat((y[:-1], y[-1:] * 0))


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda y, *_: y * 1.02, "wrong numbers: y is off by 2.0e-02"),
        (
            lambda y, *_: y.masked_fill(torch.arange(64, device=y.device) == 3, math.nan),
            "wrong numbers: y is off by nan",
        ),
        (_without_row, "wrong numbers"),
        (lambda y, x, weight: y + x * 0.1 - (x * 0.1).detach(), "wrong numbers: dx"),
        (lambda y, x, weight: _NoGradient.apply(y.detach() + 0 * y, weight), "wrong numbers: dx"),
        (lambda y, *_: y[:, :-1], "RuntimeError: Mismatch in shape"),
        (lambda y, *_: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda y, *_: y.detach(), "RuntimeError: "),
    ],
    ids=["scaled", "nan", "a row", "a gradient", "no gradient", "shape", "raises", "not differentiable"],
)
def test_a_wrong_provider_is_shown_as_wrong_and_not_timed(change, reason):
    clock = FakeClock()
    made = run(NORM, Wrong(change), Ours(), clock=clock)
    wrong = [r for r in made if r.provider == "wrong"]
    assert [r.direction for r in wrong] == ["forward", "backward", "both"]
    for r in wrong:
        assert r.reason.startswith(reason), r.reason
        assert r.ms is None and r.rate is None
    assert all(r.ms == 2.0 and r.reason is None for r in made if r.provider == OURS)
    assert len(clock.calls) == 3


def test_attention_that_drops_its_last_key_head_is_caught():
    work = DENSE
    dropped = run(work, Wrong(lambda o, q, k, v: torch.cat((o[:, :-1], o[:, :1]), 1)))
    assert all(r.reason.startswith("wrong numbers") for r in dropped)


def test_a_provider_that_writes_over_its_arguments_harms_nobody():
    class Writing(Provider):
        name, cpu = "writing", True

        def rms_norm(self, work, device):
            def f(x, weight):
                y = lk.rms_norm(x, weight, norms.EPS)
                with torch.no_grad():
                    x.data.fill_(math.nan)
                return y + 0

            return f

    made = run(NORM, Writing(), Ours(), Eager(), clock=FakeClock())
    assert all(r.reason is None and r.ms for r in made if r.provider in (OURS, "eager"))
    assert all(r.reason for r in made if r.provider == "writing")  # its own gradient is lost with x


# --- everyone is shown -----------------------------------------------------------------------------------------------


def test_who_cannot_says_why():
    class Missing(Ours):
        name, module, package = "missing", "no_such_module_anywhere", "no-such-package"

    class Refusing(Provider):
        name, cpu = "refusing", True

        def rms_norm(self, work, device):
            raise Unsupported("rows of 64 are beneath me")

    class WithoutNorm(Provider):
        name = "without"

    reasons = {r.provider: r.reason for r in run(NORM, Missing(), Refusing(), WithoutNorm(), Ours())}
    assert reasons == {
        "missing": "not installed (pip install no-such-package)",
        "refusing": "rows of 64 are beneath me",
        OURS: None,
    }
    assert WithoutNorm().why_not("rms_norm", "cpu") == "has no rms_norm"


def test_what_comes_too_late_is_listed():
    made = run(NORM, Ours(), Eager(), clock=FakeClock(), out_of_time=lambda: True)
    assert [r.reason for r in made] == ["not run: out of time"] * 6


def test_rates_ceilings_and_ratios():
    made = run(NORM, Ours(), Eager(), clock=FakeClock(0.001), directions=["forward"])
    for r in made:
        assert r.unit == "GB/s" and r.ceiling == 1000 and r.method == "graph" and r.ratio == 1
        assert r.rate == pytest.approx(NORM.bytes("forward") / 1e-6 / 1e9)
        assert r.percent == pytest.approx(r.rate / 10)
    dense, slow = DENSE, {"copy": 1000.0, "float16": 1.0}
    r = run(dense, Ours(), clock=FakeClock(0.01), directions=["forward"], ceilings=slow)[0]
    assert r.unit == "TFLOP/s" and r.rate == pytest.approx(dense.flops("forward") / 1e-5 / 1e12) and r.ratio is None


def test_every_provider_has_a_name_of_its_own_and_an_op():
    names = [p.name for p in PROVIDERS]
    assert len(set(names)) == len(names) and names[0] == OURS
    ops = {w.op for w in TINY}
    assert all(any(p.has(op) for op in ops) for p in PROVIDERS)
    assert all(Ours().has(op) and Eager().has(op) for op in ops)


def test_presets_name_every_op_and_no_shape_twice():
    for preset in ("models", "sweeps", "attention", "memory_bound", "smoke"):
        works = list(works_of(preset))
        keys = [(w.op, w.shape, str(w.sizes)) for w in works]
        assert works and len(set(keys)) == len(keys)
    assert {w.op for w in works_of("models")} == {w.op for w in TINY}
    assert len(list(works_of("all"))) == len(list(works_of("models"))) + len(list(works_of("sweeps")))


# --- records ---------------------------------------------------------------------------------------------------------


def record(provider=OURS, ms=1.0, **fields) -> Record:
    fields = {
        "op": "rms_norm",
        "direction": "forward",
        "shape": "rows",
        "sizes": {"M": 1, "N": 2},
        "dtype": "bfloat16",
    } | fields
    return Record(provider=provider, ms=ms, gpu="Fake GPU", **fields)


def fake_run(*rs: Record, gpu: str = "Fake GPU") -> Run:
    return Run({"gpu": gpu, "torch": "2"}, CEILINGS, list(rs), {})


def test_records_come_back_as_they_were(tmp_path):
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
        ("{", "not JSON"),
        ("[]", "no object with `records`"),
        ('{"schema": 99, "records": []}', "schema 99; this is 1"),
        ('{"schema": 1, "records": [3]}', "record 0 is no object"),
        ('{"schema": 1, "records": [{"op": "rope"}]}', "record 0 has no direction"),
        ('{"schema": 1, "records": [{"speed": 1}]}', "record 0 has unknown fields: speed"),
    ],
)
def test_a_file_that_is_not_ours_is_refused(tmp_path, text, said):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        records.read(tmp_path / "x.json")


@pytest.mark.parametrize(
    "field, value", [("ms", "fast"), ("estimate", 1), ("sizes", None), ("memory", 1.5), ("ms", True)]
)
def test_fields_are_checked(tmp_path, field, value):
    records.write(fake_run(record()), tmp_path / "x.json")
    whole = json.loads((tmp_path / "x.json").read_text())
    whole["records"][0][field] = value
    (tmp_path / "x.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=f"record 0: {field} is"):
        records.read(tmp_path / "x.json")


def test_the_ratio_is_to_the_fastest_other():
    made = records.with_ratios(
        [record(ms=2.0), record("a", 3.0), record("b", 5.0), record("c", None), record(ms=1.0, shape="x")]
    )
    assert [r.ratio for r in made] == [1.5, pytest.approx(2 / 3), 0.4, None, None]


def test_results_have_a_folder_for_each_gpu(tmp_path, monkeypatch):
    assert records.folder("NVIDIA H200").parts[-3:] == ("bench", "results", "nvidia-h200")
    monkeypatch.setattr(records, "folder", lambda gpu: tmp_path)
    assert records.latest("x") is None
    for name in ("2026-01-02-a.json", "2026-01-10-b.json"):
        (tmp_path / name).write_text("{}")
    assert records.latest("x").name == "2026-01-10-b.json"


# What nvidia-smi says on a machine of two GPUs, in the order of their PCI addresses.
LISTED = """GPU-AAAAAAAA-1111-2222-3333-444444444444, 00000000:3B:00.0, {0}
GPU-bbbbbbbb-1111-2222-3333-444444444444, 00000000:AF:00.0, {1}"""
FIELDS = {"driver_version": ("580.65.06", "580.65.06"), "clocks.sm": ("1980 MHz", "345 MHz")}


@pytest.fixture
def two_gpus(monkeypatch):
    """two_gpus(**properties): torch.cuda's only visible device has these, as under CUDA_VISIBLE_DEVICES."""

    def make(listed=LISTED, **properties):
        def output(*command):
            if command[0] != "nvidia-smi":
                return ""
            assert "-i" not in command  # an index of CUDA is not one of nvidia-smi
            field = command[1].rsplit(",", 1)[-1]
            return listed.format(*FIELDS[field])

        monkeypatch.setattr(machine, "_output", output)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Fake GPU")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(**properties))

    return make


@pytest.mark.parametrize("uuid, mhz", [("aaaaaaaa", 1980), ("bbbbbbbb", 345)])
def test_the_gpu_is_found_by_its_uuid(two_gpus, uuid, mhz):
    """Device 0 of CUDA is either of nvidia-smi's, by CUDA_VISIBLE_DEVICES or by CUDA_DEVICE_ORDER."""
    two_gpus(uuid=f"{uuid}-1111-2222-3333-444444444444")
    assert machine.clock("cuda") == mhz
    made = machine.describe("cuda")
    assert (made["gpu"], made["driver"]) == ("Fake GPU", "580.65.06")


def test_a_mig_slice_is_found_by_the_address_of_its_gpu(two_gpus):
    slice_of_the_second = {"uuid": "cccccccc-1111-2222-3333-444444444444", "pci_domain_id": 0, "pci_bus_id": 0xAF}
    two_gpus(**slice_of_the_second, pci_device_id=0)
    assert machine.clock("cuda") == 345


def test_what_is_not_known_of_a_gpu_is_not_guessed(two_gpus):
    two_gpus()  # neither UUID nor address
    assert machine.clock("cuda") is None and machine.describe("cuda")["driver"] == "580.65.06"  # which both have
    two_gpus(listed="", uuid="x")  # no nvidia-smi
    assert machine.clock("cuda") is None and machine.describe("cuda")["driver"] == "unknown"


def test_on_a_cpu_no_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: 1 / 0)
    monkeypatch.setattr(machine, "_smi", lambda field: 1 / 0)
    made = machine.describe("cpu")
    assert (made["gpu"], made["driver"], machine.clock("cpu")) == ("none", "none", None)


# --- comparing -------------------------------------------------------------------------------------------------------


def verdict(before: Record, after: Record | None) -> list[bool]:
    findings = compare.compare(fake_run(before), fake_run(*([after] if after else [])))
    return [f.regression for f in findings]


def test_ten_percent_is_a_regression_and_three_are_noise():
    assert verdict(record(ms=1.0), record(ms=1.10)) == [True]
    assert verdict(record(ms=1.0, spread=0.5), record(ms=1.10, spread=0.5)) == [True]
    assert verdict(record(ms=1.0), record(ms=1.03)) == verdict(record(ms=1.0), record(ms=0.97)) == []
    assert verdict(record(ms=1.0), record(ms=0.9)) == [False]


def test_other_regressions():
    good = record(error=1e-3, memory=1000, saved=1000)
    assert verdict(good, dataclasses.replace(good, ms=None, reason="wrong numbers")) == [True]
    assert verdict(good, None) == [True]
    assert verdict(good, dataclasses.replace(good, error=2e-3)) == [True]
    assert verdict(good, dataclasses.replace(good, error=1.1e-3)) == []
    assert verdict(good, dataclasses.replace(good, error=None)) == [True]
    assert verdict(good, dataclasses.replace(good, memory=1100, saved=1100)) == [True, True]
    assert verdict(good, dataclasses.replace(good, memory=1010)) == []
    assert verdict(record("peer", 1.0), record("peer", 2.0)) == []  # its own affair
    assert verdict(record(f"{OURS}, compiled", 1.0), record(f"{OURS}, compiled", 2.0)) == [True]
    assert verdict(good, dataclasses.replace(good, shape="renamed")) == [True]


def test_the_command_compares(tmp_path, capsys):
    for name, ms, gpu in (
        ("a", 1.0, "Fake GPU"),
        ("noise", 1.03, "Fake GPU"),
        ("slow", 1.1, "Fake GPU"),
        ("other", 1.0, "X"),
    ):
        records.write(fake_run(record(ms=ms), gpu=gpu), tmp_path / f"{name}.json")

    def code(a, b, *more):
        return main(["compare", str(tmp_path / f"{a}.json"), str(tmp_path / f"{b}.json"), *more])

    assert code("a", "noise") == 0 and "1 rows in both, 0 regressions" in capsys.readouterr().out
    assert code("a", "slow") == 1 and "10.0% slower" in capsys.readouterr().out
    assert code("a", "slow", "--threshold", "15") == 0
    assert code("a", "other") == 2 and "two machines" in capsys.readouterr().out
    assert code("a", "nothing") == 2


# --- estimates -------------------------------------------------------------------------------------------------------


def test_bytes_and_flops_of_ops_are_counted():
    x, w = torch.empty(8, 32, device="meta"), torch.empty(32, 16, device="meta")
    tally = bounds.count(lambda: (x @ w).view(-1).t() + 1)
    assert [(op.name, op.bytes, op.flops) for op in tally.ops] == [
        ("aten.mm", (8 * 32 + 32 * 16 + 8 * 16) * 4, 2 * 8 * 32 * 16),
        ("aten.add", 2 * 8 * 16 * 4, 0),
    ]
    tally = bounds.count(lambda: torch.empty(4, device="meta").expand(100, 4) * x.new_empty(100, 1).expand(100, 4))
    assert [op.bytes for op in tally.ops] == [(4 + 100 + 400) * 4]  # what is broadcast is there once
    # 1 GB/s is a byte a nanosecond
    assert bounds.count(lambda: x + 1).milliseconds({"copy": 1.0, "float32": 1.0}, "float32") == pytest.approx(2048e-6)


@named([dataclasses.replace(w, dtype=torch.bfloat16) for w in TINY])
def test_our_ops_move_the_floor_and_little_else(work):
    made = bounds.estimates([work], [Ours()], ABOUT)
    assert {r.gpu for r in made} == set(GPUS) and all(r.estimate and r.method == "model" for r in made)
    most = 2.0 if work.op == "rope_attention" else 1.4  # rotated q and k are written, and read again
    for r in made:
        floor = max(work.bytes(r.direction) / GPUS[r.gpu].ceilings["copy"] / 1e6,
                    work.flops(r.direction) / GPUS[r.gpu].ceilings["bfloat16"] / 1e9)  # fmt: skip
        assert 0.9 * floor <= r.ms <= most * floor, r  # rstd, delta; scores twice in a backward


def test_plain_pytorch_moves_more():
    work = norms.RMSNorm(shape="", M=4096, N=4096)
    by = {
        (r.provider, r.direction): r.ms for r in bounds.estimates([work], [Ours(), Eager()], ABOUT) if r.gpu == "H100"
    }
    assert by["eager", "forward"] > 5 * by[OURS, "forward"]


def test_flops_of_a_step_are_those_that_are_counted():
    pytest.importorskip("transformers")
    for whole in (False, True):
        scale = tiny_model(whole, 2)
        stock = training_step.llama(scale, "meta", scale.dtype)
        one_step = training_step.Step(scale, training_variations.Stock(False), "meta", scale.dtype, stock)
        no_mask = pytest.MonkeyPatch()
        no_mask.setattr("transformers.models.llama.modeling_llama.create_causal_mask", lambda *_, **__: None)
        with bounds.counting_flash():
            tally = bounds.count(lambda made=one_step: made.backward(made.forward()))
        no_mask.undo()
        assert sum(op.flops for op in tally.ops) == training.flops(scale)


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True], ids=["layer", "llama"])
def test_training_runs_stock_and_ours(whole):
    pytest.importorskip("transformers")
    scale = tiny_model(whole, 1)

    class Broken(training_variations.Stock):
        def change(self, model):
            model.model.layers[0].mlp.down_proj.weight.data.mul_(1.5)
            return model

    broken = Broken(False)
    broken.name = "broken"
    variations = [v for v in training_variations.VARIATIONS if not v.compiled] + [broken]
    options = {"device": "cpu", "clock": FakeClock(4.0), "ceilings": CEILINGS, "about": ABOUT}
    (made,) = training_runner.run([scale], variations, **options)
    by = {r.provider: r for r in made}
    for name in ("stock", OURS):
        assert by[name].reason is None and by[name].rate == pytest.approx(32 / 4e-3) and by[name].unit == "tokens/s"
    assert by[OURS].saved < by["stock"].saved
    assert by["broken"].reason.startswith("wrong numbers") and by["broken"].ms is None
    assert all(by[v.name].reason for v in variations if not v.cpu)  # they need a GPU, or are not installed


def test_what_liger_replaces_is_there_only_while_it_runs():
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    stock = modeling.apply_rotary_pos_emb
    liger = training_variations.Liger(False)
    liger._names = {"apply_rotary_pos_emb": len}
    with liger.active():
        assert modeling.apply_rotary_pos_emb is len
    assert modeling.apply_rotary_pos_emb is stock


# --- reports ---------------------------------------------------------------------------------------------------------


def measured() -> Run:
    """As from a GPU: every op over sizes, one provider with a reason."""
    rs = []
    for work in (*works_of("models"), *works_of("sweeps")):
        for direction in work.directions:
            for i, name in enumerate((OURS, "eager", "liger", "flash-attn-2")):
                r = Record(op=work.op, direction=direction, shape=work.shape, sizes=work.sizes, dtype="bfloat16",
                           provider=name, error=1e-3 * (i + 1), gpu="Fake GPU", torch="2", memory=2**20)  # fmt: skip
                floor = max(work.bytes(direction) / 1e9, work.flops(direction) / 1e11)
                if name == "liger":
                    r.reason = "not installed (pip install <liger> & more)"
                else:
                    r.ms, r.spread, r.method = floor * (1.1 + i), 0.01, "graph"
                    step.put_rate(r, work, CEILINGS)
                rs.append(r)
    for scale in training.scales():
        for v in training_variations.VARIATIONS:
            r = training_runner.row_of(scale, v.name, {**ABOUT})
            r.ms, r.memory = 10.0, 2**30
            training.put_rate(r, scale, CEILINGS)
            rs.append(r)
    return Run(
        {"gpu": "Fake GPU", "driver": "1"}, CEILINGS, records.with_ratios(rs), {"providers": {OURS: {"rope": "yes"}}}
    )


SWEPT = (
    *("rms_norm", "add_rms_norm", "rope", "qk_norm_rope", "rope_qkv", "rope_into_cache"),
    *("attention", "rope_attention", "decode"),
)


def test_a_report_of_measurements(tmp_path):
    pytest.importorskip("matplotlib")
    made = measured()
    written = {path.name for path in report.write(made, tmp_path)}
    speeds = {f"speed-{op}.png" for op in SWEPT}
    assert written == speeds | {"models.png", "training.png", "error.png", "report.html", "records.json"}
    page = (tmp_path / "report.html").read_text()
    assert "llama_kernels on Fake GPU" in page and "ESTIMATES" not in page
    assert page.count("data:image/png;base64,") == 12 and 'src="http' not in page  # nothing to load
    assert "not installed (pip install &lt;liger&gt; &amp; more)" in page
    assert page.count("<tr class=") >= len(made.records)
    for path in tmp_path.glob("*.png"):
        assert path.stat().st_size > 5000


def test_a_report_without_matplotlib_has_everything_else(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # its import fails
    made = measured()
    assert [path.name for path in report.write(made, tmp_path)] == ["records.json", "report.html"]
    assert len(records.read(tmp_path / "records.json").records) == len(made.records)
    page = (tmp_path / "report.html").read_text()
    assert "pip install matplotlib" in page and "data:image" not in page and page.count("<tr class=") > 100


@pytest.mark.parametrize("direction", work_module.DIRECTIONS)
def test_a_report_of_one_direction(tmp_path, direction):
    pytest.importorskip("matplotlib")
    made = measured()
    works = [w.op for w in works_of("models")]
    rs = [r for r in made.records if r.direction == direction and r.op in works and r.shape.startswith("Llama")]
    assert "report.html" in {path.name for path in report.write(made._replace(records=rs), tmp_path)}


def test_a_report_of_estimates_says_so(tmp_path):
    pytest.importorskip("matplotlib")
    works = [dataclasses.replace(w, shape="Llama 3.1 8B", dtype=torch.bfloat16) for w in TINY]
    rs = bounds.estimates(works, [Ours(), Eager(), bounds.FLASH], ABOUT)
    host = [
        {"op": "rope", "forward": 20.0, "training": 60.0, "goal": 25.0},
        {"op": "decode", "forward": 30.0, "goal": 25.0},
    ]
    kernel = {"target": "sm_90", "kernel": "k", "label": "D<64", "warps": 4, "registers": 9, "spill_bytes": 0,
              "shared_bytes": 0, "tensor_core": 3, "faults": ["spills"]}  # fmt: skip
    made = Run({"gpu": "none"}, {}, rs, {"host": host, "codegen": {"kernels": [kernel]}})
    written = {path.name for path in report.write(made, tmp_path)}
    assert written == {"saving.png", "roofline.png", "host.png", "report.html", "records.json"}
    page = (tmp_path / "report.html").read_text()
    assert "ESTIMATES" in page and "none was measured" in page and "D&lt;64" in page
    assert all(html in page for html in ("datasheet", "machine code for sm_90"))


def test_sweeps_are_found():
    found = sweeps(measured().records)
    assert {key[0] for key in found} == set(SWEPT)
    norm = found["rms_norm", "forward", "bfloat16", ""]
    assert norm.keys() == {OURS, "eager", "flash-attn-2"}
    sizes = [n for n, _ in norm[OURS]]
    assert sizes == sorted(sizes) and {64, 4096, 262144} <= set(sizes)
    assert next(r for n, r in norm[OURS] if n == 4096).sizes["M"] == 2**15  # not the few rows of that length
    assert any("Hq=32, Hkv=8, D=128" in key[3] for key in found if key[0] == "attention")


# --- commands --------------------------------------------------------------------------------------------------------


def test_reports_are_drawn_again_from_files(tmp_path):
    pytest.importorskip("matplotlib")
    records.write(
        fake_run(record(ms=1.0, percent=50.0, error=1e-3, rate=1.0, ceiling=2.0, unit="GB/s")), tmp_path / "a.json"
    )
    records.write(fake_run(record(ms=2.0), record("peer", 8.0)), tmp_path / "b.json")
    assert main(["report", *(str(tmp_path / f"{name}.json") for name in "ab"), "--out", str(tmp_path / "out")]) == 0
    merged = records.read(tmp_path / "out" / "records.json").records
    assert [(r.provider, r.ms, r.ratio) for r in merged] == [(OURS, 2.0, 4.0), ("peer", 8.0, 0.25)]
    assert main(["report", str(tmp_path / "none.json")]) == 2


def test_a_whole_run_but_for_the_clock(tmp_path, monkeypatch):
    """What a GPU is measured with, from arguments to report, on CPU tensors and a fake clock."""
    pytest.importorskip("matplotlib")
    small = [dataclasses.replace(w, dtype=torch.bfloat16) for w in TINY]
    scale = tiny_model(False, 1)
    options = ["--out", str(tmp_path), "--seconds", "0.01", "--providers", OURS, "eager", "sdpa"]
    monkeypatch.setattr(session, "VARIATIONS", [v for v in session.VARIATIONS if not v.compiled])  # takes minutes
    args = parser().parse_args(["run", "--directions", "forward", *options])
    made = session.measure(args, small, [scale], DEVICE, FakeClock())
    assert {r.op for r in made.records} == {*(w.op for w in TINY), "decoder_layer"}
    assert all(r.ms == 2.0 for r in made.records if r.provider == OURS)
    assert (tmp_path / "report.html") in report.write(made, tmp_path)
    args = parser().parse_args(["run", "--minutes", "1e-9", *options])
    late = session.measure(args, small, [scale], DEVICE, FakeClock())
    assert late.records and all(r.reason == "not run: out of time" for r in late.records)


def test_parity_is_a_gate(tmp_path, monkeypatch, capsys):
    small = [NORM, TINY[2]]
    monkeypatch.setattr(presets, "small", lambda dtypes: iter(small))
    options = ["--in-process", "--out", str(tmp_path)]
    assert main(["parity", *options, "--json", str(tmp_path / "p.json")]) == 0
    assert "right in 2 pieces of work" in capsys.readouterr().out
    assert {r.op for r in records.read(tmp_path / "p.json").records} == {"rms_norm", "rope"}
    monkeypatch.setattr(ours_module.Ours, "rope", lambda *_: lambda q, k: (q, k))
    assert main(["parity", *options]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_help_names_every_command():
    out = subprocess.run([sys.executable, "-m", "bench", "--help"], capture_output=True, text=True, check=True).stdout
    assert all(command in out for command in ("run", "parity", "compare", "report", "providers"))


@compiles
def test_host_cost_is_measured_without_a_gpu(tmp_path):
    command = [sys.executable, "-m", "bench.host", "--json", str(tmp_path / "host.json")]
    subprocess.run(command, check=True, capture_output=True)
    rows = json.loads((tmp_path / "host.json").read_text())
    fused = ["rope_qkv", "rope_into_cache", "qk_norm_rope"]
    attended = ["attention", "rope_attention", "decode"]
    assert [row["op"] for row in rows] == ["rms_norm", "add_rms_norm", "rope", *fused, *attended]
    assert all(1 < row["forward"] < 5000 for row in rows)
