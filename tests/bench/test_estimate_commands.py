"""`python -m bench estimate` and `calibrate`, with a small folder of peers that the test writes."""

from __future__ import annotations

import dataclasses
import functools
import json

import pytest
import torch

from bench.commands import arguments, estimate
from bench.estimate import (
    constants,
    errors,
    few_rows,
    kernels,
    layer,
    layer_picture,
    layer_times,
    lines,
    measured,
    ours,
    published,
    windows,
)
from bench.estimate.calibrate import Point
from bench.estimate.few_rows import Few
from bench.estimate.published import Figure
from bench.estimate.result import Estimate
from bench.estimate.tiles import Shape
from bench.measuring import records
from bench.measuring.kernels import tile_of
from bench.measuring.records import Record, Run
from bench.providers.provider import OURS
from llama_kernels.core.registry import KERNELS
from llama_kernels.ops.attention import tables
from llama_kernels.ops.attention.hopper.tables import HopperTile
from tests.support.environment import compiles

pytestmark = pytest.mark.once
H100 = constants.gpus()["H100"]

# A peer with the names of Liger's: one program a row, no loop.
LIGER = {
    "utils.py": "def calculate_settings(n):\n    return 1 << (n - 1).bit_length(), 8\n",
    "rms_norm.py": """
import triton
import triton.language as tl
from liger_kernel.ops.utils import calculate_settings


@triton.jit
def _rms_norm_forward_kernel(
    y, y_stride, x, x_stride, w, w_stride, rstd, rstd_stride, n, eps, offset, casting, per_row, BLOCK_SIZE: tl.constexpr
):
    row, cols = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_SIZE)
    a = tl.load(x + row * x_stride + cols, mask=cols < n, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(a * a) / n + eps)
    tl.store(y + row * y_stride + cols, (a * scale * tl.load(w + cols, mask=cols < n)).to(tl.bfloat16), mask=cols < n)
""",
}


@pytest.fixture
def peers(tmp_path, monkeypatch):
    folder = tmp_path / "peers" / "some" / "where" / "liger_kernel" / "ops"
    folder.mkdir(parents=True)
    for name, text in LIGER.items():
        (folder / name).write_text(text)
    sizes = {"M": 8192, "N": 4096, "dtype": "bfloat16", "weight": "bfloat16"}
    shown = [
        Figure("Liger", "rms_norm forward", "H100", sizes, 51.0, "us", "a page", "", "liger_rms_norm", None),
        Figure("F-3", "attention forward", "H100", {}, 1.0, "us", "a page", "", "flash_attention_3_forward", None),
        Figure("quack", "rms_norm forward", "H100", sizes, 2900.0, "GB/s", "a page", "", None, None),
    ]
    attention = {"B": 1, "S": 64, "Hq": 1, "D": 64, "causal": True}
    monkeypatch.setattr(published, "figures", lambda: iter([shown[0], shown[1]._replace(sizes=attention), shown[2]]))
    monkeypatch.setattr(errors, "FILE", tmp_path / "errors.json")
    monkeypatch.setattr(measured, "points", lambda say, only: iter(()))
    return tmp_path / "peers"


@compiles
def test_a_peer_in_a_folder_is_compiled_and_compared(peers, capsys):
    assert arguments.main(["calibrate", str(peers), "--record"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Liger, rms_norm forward, H100, M=8192 N=4096: estimated 5" in said and "published 51 us, error" in said
    assert "left out: flash_attention_3_forward: no flash_attn_3/_C.so below" in said
    (row,) = json.loads(errors.FILE.read_text())
    assert [row[name] for name in ("kind", "family", "whose", "points")] == ["rows", "sm_90", "peers", 1]
    assert 0 < row["mean"] < 0.1


def test_a_folder_without_peers_is_refused(tmp_path, capsys):
    assert arguments.main(["calibrate", str(tmp_path / "nowhere")]) == 2
    assert "is no folder" in capsys.readouterr().out


@compiles
def test_our_launchers_choose_their_grids_as_on_the_gpu():
    x, weight, rstd = torch.empty(65536, 64, dtype=torch.bfloat16), torch.empty(64), torch.empty(65536, 1)
    call = functools.partial(KERNELS["rms_norm_backward"], x, None, x, weight, rstd, 1e-6, 0.0, x.dtype, True, False)
    (kernel,) = kernels.compiled("sm_90", call)
    assert kernel.name == "rms_norm_backward_kernel" and kernel.launched % 132 == 0 and kernel.constants["N"] == 64
    assert 0 < kernel.registers < 256 and kernel.resident >= 1
    assert any(x.wait for x in kernel.code.instructions) and {x.stall for x in kernel.code.instructions} <= set(
        range(16)
    )


def fixed(*_, **__) -> Estimate:
    return Estimate(44e-6, "dram", 0.05, (("one", 44e-6),))


def test_estimates_are_printed_beside_published_speeds_with_their_sources(monkeypatch, capsys):
    monkeypatch.setattr(ours, "work_estimate", fixed)
    assert arguments.main(["estimate", "--gpus", "H100", "--ops", "rms_norm"]) == 0
    said = capsys.readouterr().out
    assert "Estimates by models of the machine code, not measurements" in said
    assert "estimate 50 us ±5%" in said and "bound by DRAM" in said  # 44 us, and what a timed call takes
    assert "quack" in said and "2,900" in said and "blog" in said


def test_estimates_of_another_day_are_shown_beside_those_of_today(monkeypatch, tmp_path, capsys):
    file, call = tmp_path / "before.json", ["estimate", "--gpus", "A100", "--ops", "rope"]
    monkeypatch.setattr(ours, "work_estimate", fixed)
    assert arguments.main([*call, "--json", str(file)]) == 0
    faster = lambda *_: dataclasses.replace(fixed(), seconds=18.5e-6)  # noqa: E731
    monkeypatch.setattr(ours, "work_estimate", faster)
    assert arguments.main([*call, "--before", str(file)]) == 0
    assert "estimate 25 us ±5%, was 50 (-50%)" in capsys.readouterr().out
    assert arguments.main([*call, "--before", str(tmp_path / "nowhere.json")]) == 2


def test_a_published_time_of_other_rows_becomes_a_rate():
    sizes = {"M": 4096, "N": 4096, "dtype": "bfloat16"}
    liger = Figure("Liger", "rms_norm forward", "H100", sizes, 29.18, "us", "", "", None, None)
    assert estimate._rate(liger, 4 * 32768 * 4096 / 1e9) == pytest.approx(4 * 4096 * 4096 / 29.18e-6 / 1e9)
    assert estimate._rate(liger._replace(value=640.0, unit="TFLOP/s"), 1.0) == 640.0


def test_only_figures_of_the_same_op_width_and_length_are_shown_and_none_at_a_held_clock():
    shown = list(estimate.published_for(H100, "attention forward", {"S": 8192, "D": 128, "B": 4}))
    assert {f.who for f in shown} >= {"FlashAttention-3", "FlashAttention-2"}
    assert {(f.sizes["S"], f.sizes["D"], f.gpu, f.clock) for f in shown} == {(8192, 128, "H100", None)}


def test_a_layer_has_fewer_launches_and_less_time_patched_than_stock(monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    monkeypatch.setattr(ours, "work_estimate", fixed)
    monkeypatch.setattr(ours, "attention_estimate", lambda *_: Estimate(1e-3, "tensor", 0.1, (("one", 1e-3),)))
    stock, patched, *_ = made = layer.stacks(H100)
    assert stock.launches > 2 * patched.launches and stock.seconds > patched.seconds
    products = [next(p.seconds for p in s.parts if p.name == "projections and MLP") for s in made]
    assert max(products) == min(products) > 0.5 * patched.seconds
    # 6 FLOPs a weight and token, at 80% of the data sheet
    weights = 4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336
    assert products[0] == pytest.approx(6 * weights * 8192 / (0.8 * 989e12), rel=0.02)
    file = tmp_path / "layer.png"
    figure = layer_picture.picture(made, H100)
    figure.savefig(file)
    assert "Estimate" in figure.axes[0].get_title(loc="left") and file.stat().st_size > 10000


def test_the_published_speed_of_flash_attention_is_taken_at_the_length_of_the_layer():
    assert layer_times._published(H100, "FlashAttention-2", "forward") == 370
    assert layer_times._published(H100, "nobody", "forward") is None


def test_programs_that_fit_on_an_sm_are_counted():
    kernel = kernels.Kernel("k", "sm_90", (1,), 8, 128, 0, 57344, {}, kernels.Code([], {}))
    assert kernel.resident == 2  # by registers; by shared memory, 4
    assert dataclasses.replace(kernel, registers=132).resident == 1
    assert dataclasses.replace(kernel, registers=32, shared=100 * 1024).resident == 2


def test_errors_that_are_recorded_keep_those_of_other_kinds(monkeypatch, tmp_path):
    file = tmp_path / "errors.json"
    file.write_text('[{"kind": "rows", "family": "sm_90", "whose": "peers", "mean": 0.5, "worst": 0.5, "points": 1}]')
    monkeypatch.setattr(errors, "FILE", file)
    ours_of_rows = Point(next(published.figures()), "rows", "sm_90", Estimate(1.1, "dram", 0.1), 1.0, errors.OURS)
    monkeypatch.setattr(measured, "points", lambda say, only: iter([ours_of_rows]))
    assert arguments.main(["calibrate", "--record"]) == 0
    means = {key: round(e.mean, 2) for key, e in errors.errors().items()}
    assert means == {("rows", "sm_90", "peers"): 0.5, ("rows", "sm_90", "ours"): 0.1}
    assert errors.error_of("rows", "sm_90") == pytest.approx(0.3)


@compiles
def test_our_kernels_that_a_gpu_timed_are_compared(monkeypatch, capsys):
    monkeypatch.setattr(measured, "_require_triton", lambda release: None)
    for only in ("rms_norm forward", "attention hopper backward", "attention dkdv", "decode"):
        found = list(measured.points(print, only))
        assert found and all(p.whose == errors.OURS and 0.5 < p.estimate.seconds / p.known < 1.6 for p in found), only
    # dk and dv of heads of 256 have had another tile since.
    (left_out,) = capsys.readouterr().out.splitlines()
    assert left_out.startswith("left out: attention dkdv, D = 256: measured with 32 x 128, 8, 2, split; today it is ")


@compiles
def test_a_record_is_compared_only_with_the_tiles_that_it_names(monkeypatch, tmp_path):
    monkeypatch.setattr(measured, "_require_triton", lambda release: None)
    monkeypatch.setattr(measured, "RESULTS", tmp_path)
    tiles = {pass_: tables.tile("sm_90", pass_, 64, torch.bfloat16).launch_options for pass_ in ("dq", "dkdv")}
    kernels = [f"{pass_}_kernel: BLOCK_D 64, {tile_of(**tile)}" for pass_, tile in tiles.items()]
    sizes = {"B": 1, "S": 2048, "Hq": 16, "Hkv": 8, "D": 64, "window": -1}
    record = Record("attention", "backward", "", sizes, "bfloat16", OURS, ms=1.0, kernels=kernels)
    said: list[str] = []

    def parts_compared() -> list[str]:
        run = Run({"gpu": "NVIDIA H100 80GB HBM3"}, {}, [record], {})
        records.write(run, tmp_path / "gpu" / "run.json")
        found = measured.points(said.append, "attention backward")
        return [name for point in found if point.figure.source == "gpu/run.json" for name, _ in point.estimate.parts]

    assert parts_compared() == ["dq", "dkdv"]
    record.kernels = ["delta_kernel: 4 warps, 1 stages", *kernels]
    assert parts_compared() == ["delta", "dq", "dkdv"]
    record.kernels = [kernel.replace(" warps", "0 warps") for kernel in kernels]
    assert parts_compared() == [] and said[-1].startswith("left out: attention backward, D = 64: measured with dq_kern")


def test_times_of_another_release_of_triton_are_left_out_with_the_reason(monkeypatch, capsys):
    monkeypatch.setattr(measured, "TRITON_VERSION", (3, 99))
    assert arguments.main(["calibrate", "--only", "attention dq"]) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "left out: measured with Triton 3.6; installed is 3.99" in said and "nothing to compare" in said


@compiles
def test_estimates_of_portable_kernels_are_so_where_a_hopper_kernel_is_the_default(monkeypatch):
    monkeypatch.setattr(HopperTile, "measured", True)
    ours.attention_kernels.cache_clear()
    names = {on: [k.name for k in ours.attention_kernels("sm_90", 128, 4, True, "forward", on)] for on in (False, True)}
    ours.attention_kernels.cache_clear()
    assert names == {False: ["forward_kernel"], True: ["hopper_forward_kernel"]}


@compiles
def test_each_launch_of_a_kernel_counts():
    made = ours.attention_estimate(H100, Shape(1, 2048, 16, 8, 256), "backward")
    assert [name for name, _ in made.parts] == ["dq", "dkdv", "dkdv'"]
    assert made.seconds == pytest.approx(sum(seconds for _, seconds in made.parts))


@compiles
@pytest.mark.parametrize("S", [512, 8192])
def test_a_launch_for_delta_reads_more_than_dq_does_for_it(S):
    within, apart = (ours.attention_estimate(H100, Shape(2, S, 32, 8, 128), "backward", delta_apart=apart)
                     for apart in (False, True))  # fmt: skip
    assert [name for name, _ in apart.parts] == ["delta", "dq", "dkdv"]
    assert 1.005 < apart.seconds / within.seconds < 1.1


@compiles
def test_a_chunk_of_a_prompt_gains_by_its_split_at_batch_1_and_loses_little_at_batch_64():
    one, many = Few(1, 128, 8192, 32, 8, 128), Few(64, 128, 8192, 32, 8, 128)
    split, whole = (few_rows.few_rows_estimate(H100, one, split) for split in (True, False))
    assert [name for name, _ in split.parts] == ["forward", "combine"] and len(whole.parts) == 1
    assert 2.5 < whole.seconds / split.seconds < 4
    split, whole = (few_rows.few_rows_estimate(H100, many, split) for split in (True, False))
    assert 0.8 < whole.seconds / split.seconds < 1


@compiles
def test_decoding_of_many_keys_is_bound_by_dram_and_of_few_by_latency():
    long, short = (few_rows.few_rows_estimate(H100, Few(B, 1, Sk, 32, 8, 128)) for B, Sk in ((8, 32768), (1, 1024)))
    assert (long.limit, short.limit) == ("dram", "latency")
    assert long.error == short.error == errors.error_of("decoding", "sm_90")
    assert 0.8 < Few(8, 1, 32768, 32, 8, 128).bytes / (H100.copy * 1e9) / long.seconds < 1


@compiles
def test_a_window_takes_its_share_of_the_time():
    shape = Shape(1, 4096, 8, 2, 64)
    for direction in ("forward", "backward"):
        small, large = (windows.window_estimate(H100, shape, left, direction).seconds for left in (127, 2047))
        assert 2 < large / small < 12
        assert large == pytest.approx(windows.window_estimate(H100, shape, 2047, direction).seconds)


@compiles
def test_a_gpu_without_a_model_of_its_sm_has_decoding_and_says_that_it_is_not_calibrated(capsys, monkeypatch):
    monkeypatch.setattr(lines, "_BATCHES", (1,))
    monkeypatch.setattr(lines, "_KEYS", (1024,))
    assert arguments.main(["estimate", "--gpus", "B200", "--ops", "attention", "windows", "decode"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "B200: there is no model of its SM, so of attention there is decoding alone." in said
    assert "B200: decode" in said and "not calibrated" in said and "window" not in said
