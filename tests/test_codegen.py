"""The offline compile gate: it sees what it must see. Its verdict on the package is `make codegen`."""

from __future__ import annotations

import pytest
import torch

from llama_kernels.ops.attention import backward, forward, tables
from llama_kernels.ops.attention.tables import Tile
from tests.conftest import COMPILES

pytestmark = COMPILES


def reports(target: str, op: str, label: str, tile: Tile | None = None):
    from bench import codegen

    case = next(c for c in codegen.cases() if (c.op, c.label) == (op, label))
    with pytest.MonkeyPatch.context() as patch:
        for module in (forward, backward) if tile else ():
            patch.setattr(module, "tile_for", lambda *_: tile)
        return [codegen.read(target, case, name, kernel) for name, kernel in codegen.compile_case(target, case)]


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_attention_runs_on_tensor_cores(target):
    kernels = {r.kernel: r for r in reports(target, "attention", "D=64 bfloat16 causal")}
    assert set(kernels) == {"forward_kernel", "delta_kernel", "dkdv_kernel", "dq_kernel"}
    assert all(r.tensor_core for name, r in kernels.items() if name != "delta_kernel")
    assert not any(r.faults for r in kernels.values())


@pytest.mark.parametrize("op, label", [("rope", "D=128 R=128 heads=32/8"), ("rms_norm", "N=4096 +residual")])
def test_memory_bound_kernels_move_16_bytes_at_a_time(op, label):
    for r in reports("sm_90", op, label):
        assert max(r.loads) == max(r.stores) == 128 and not r.spill_bytes and not r.faults


def test_a_tile_too_large_is_a_fault():
    faults = [f for r in reports("sm_90", "attention", "D=128 bfloat16 causal", Tile(128, 128, 4, 2)) for f in r.faults]
    assert any("spills" in f for f in faults)
    faults = [f for r in reports("sm_80", "attention", "D=256 bfloat16 causal", Tile(128, 128, 8, 3)) for f in r.faults]
    assert any("shared memory" in f for f in faults)


@pytest.mark.corpus(67, 68)
def test_every_row_of_the_tables_is_there():
    from bench import codegen

    assert set(tables.FAMILIES) == set(codegen.TARGETS)
    for family in tables.FAMILIES:
        for pass_ in tables.PASSES:
            for width in (1, *tables.WIDTHS):
                for dtype in (torch.bfloat16, torch.float32):
                    tile = tables.tile(family, pass_, width, dtype)
                    assert all(n & (n - 1) == 0 and n >= 16 for n in (tile.BLOCK_M, tile.BLOCK_N))
                    assert backward.PADDING.value >= tile.BLOCK_M  # what lse2 and delta are padded to
                    # triton#10590: on sm_100 tl.dot races in 4 to 8 warps with 2 or 3 stages
                    assert family != "sm_100" or tile.num_stages not in (2, 3)


@pytest.mark.parametrize("options", ["causal", "causal window softcap sinks packed"])
def test_the_hopper_kernels_hide_their_softmax(options):
    kernels = {r.kernel: r for r in reports("sm_90", "hopper", f"D=64 bfloat16 {options}")}
    assert set(kernels) == {"hopper_forward_kernel", "delta_kernel", "hopper_backward_kernel", "round_dq_kernel"}
    assert not any(r.faults or r.spill_bytes for r in kernels.values())


def test_what_a_loop_hides_is_read_from_its_machine_code():
    from bench import hopper

    product, exp = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0", "MUFU.EX2 R1, R2"
    one_left, none_left = "WARPGROUP.DEPBAR.LE gsb0, 0x1", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    pipelined = hopper._loop([product, product, one_left, exp, exp, none_left])
    assert pipelined.covered == 1 and pipelined.tensor_cycles == 2 * 64 and pipelined.mix["MUFU.EX2"] == 2
    assert hopper._loop([product, product, one_left, exp, none_left, exp]).covered == 0.5
    assert hopper._loop([exp, product, none_left]).covered == 0
    assert hopper._loop([exp, none_left, product]).covered == 1  # left under way by the trip before
