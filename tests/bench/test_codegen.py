"""The compile gate finds the faults that it must find. `make codegen` runs the gate on the package."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.codegen import cases, compiling, hopper, ones, reading, record, sass, traffic
from llama_kernels.core.language import TRITON_VERSION
from llama_kernels.core.registry import KERNELS
from llama_kernels.ops.attention import decode, delta, tables
from llama_kernels.ops.attention.call import AttentionCall
from llama_kernels.ops.attention.hopper.tables import HopperTile, Record
from llama_kernels.ops.attention.tables import Tile
from tests.support.attention import tiles
from tests.support.environment import COMPILES

pytestmark = [*COMPILES, pytest.mark.once]

RELEASES = ((3, 6), (3, 7), (3, 8), (3, 9))  # of Triton, for which there are tiles


def reports(target: str, op: str, label: str, tile: Tile | None = None):
    case = next(c for c in cases.cases() if (c.op, c.label) == (op, label))
    with tiles(tile):
        return [reading.read(target, case, name, kernel) for name, kernel in compiling.compile_case(target, case)]


def test_the_gate_compiles_every_registered_op(monkeypatch):
    """`rope_` launches the kernel of `rope`, and `decode_attention` calls launch_decode."""
    called = set()
    for name in KERNELS:
        monkeypatch.setitem(KERNELS, name, lambda *_, name=name: called.add(name))
    monkeypatch.setattr(decode, "launch_decode", lambda *_: called.add("decode_attention"))
    for case in cases.cases():
        case.launch()
    assert called | {"rope_"} == KERNELS.keys() | {"decode_attention", "rope_"}


def test_plain_cases_have_every_op_and_every_recorded_kernel_and_no_options():
    plain = [case for case in cases.cases() if case.plain]
    assert {case.op for case in plain} == {case.op for case in cases.cases()}
    kernels = (name.split(" ") for name in record.read()["kernels"])
    assert {" ".join(words[3:]) for words in kernels} <= {case.label for case in plain}
    options = ("float32", "all", "window", "prefix", "mask", "packed", "interleaved", "tangent", "residual", "cache")
    assert not any(option in case.label for case in plain for option in options)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_attention_compiles_to_tensor_core_instructions(target):
    kernels = {r.kernel: r for r in reports(target, "attention", "D=64 bfloat16 causal")}
    assert set(kernels) == {"forward_kernel", "dq_kernel", "dkdv_kernel"}
    assert all(r.tensor_core for r in kernels.values())
    assert not any(r.faults for r in kernels.values())


def test_documents_of_one_token_have_the_machine_code_of_longer_ones():
    """A length of 1 must not be a constant of the kernel: ptxas then crashes on some code (Triton 3.6, sm_90).

    Without causal mask and window, which documents of one token do not need.
    """

    def machine_code(length: int) -> list[bytes]:
        size = ones._Size("documents", Sq=length, Sk=length, tokens=512)
        case = compiling.Case("attention", "", lambda: ones._attention(64, torch.bfloat16, size, "bounds"))
        return [kernel.asm["cubin"] for _, kernel in compiling.compile_case("sm_90", case)]

    assert machine_code(1) == machine_code(7)


@pytest.mark.parametrize("op, label", [("rope", "D=128 R=128 heads=32/8"), ("rms_norm", "N=4096 +residual")])
def test_memory_bound_kernels_move_16_bytes_at_a_time(op, label):
    for r in reports("sm_90", op, label):
        assert max(r.loads) == 128 and not r.spill_bytes and not r.faults
        assert max(r.stores) == 128 or r.kernel == "sum_partials_kernel"


@pytest.mark.parametrize("op, label", [("rope", "D=128 R=128 heads=32/8"), ("rms_norm", "N=8192"),
                                       ("qk_norm_rope", "D=128 R=128 heads=32/8")])  # fmt: skip
def test_instructions_a_byte_are_read_from_machine_code(op, label):
    """A thread of RoPE moves 64 bytes, in and out, for 8 pairs, and each pair takes at least 4 products or sums."""
    for r in reports("sm_90", op, label):
        assert r.moves and all(loop.bytes for loop in r.moves)
        if r.kernel == "rope_kernel":
            assert {loop.bytes for loop in r.moves} == {64} and all(32 < loop.instructions < 128 for loop in r.moves)
        if "sum_partials" not in r.kernel:
            assert 0.1 < traffic.heaviest(r.moves).share_of_issue("sm_90") < 0.8


def test_narrow_accesses_and_too_many_instructions_are_faults():
    faults, loops, Loop = traffic.faults, traffic.loops, traffic.Loop
    wide = Loop(100, {128: 2, 32: 1}, {128: 2})
    assert faults([wide], "sm_90") == []
    assert faults([wide, Loop(100, {64: 4}, {128: 2})], "sm_90") == ["a loop without a 128-bit load"]
    assert faults([Loop(100, {128: 4}, {32: 8})], "sm_90") == ["a loop without a 128-bit store"]
    assert "instructions that fit" in faults([Loop(1000, {128: 4}, {128: 4})], "sm_90")[0]
    code = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_0:
        /*0010*/                   LDG.E.64 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        /*0030*/                   FADD R4, R4, R5 ;
        /*0040*/                   STG.E.U16 desc[UR4][R2.64], R4 ;
        /*0050*/              @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0060*/                   BRA `(.L_x_1) ;
"""
    assert loops(code) == [Loop(5, {64: 1, 128: 1}, {16: 1})]
    assert loops(code.replace("@P0 BRA `(.L_x_0)", "EXIT")) == [Loop(7, {64: 1, 128: 2}, {16: 1})]


def test_a_tile_that_spills_or_exceeds_shared_memory_is_a_fault():
    faults = [f for r in reports("sm_90", "attention", "D=128 bfloat16 causal", Tile(128, 128, 4, 2)) for f in r.faults]
    assert any("spills" in f for f in faults) and "local memory in a loop" in faults
    faults = [f for r in reports("sm_80", "attention", "D=256 bfloat16 causal", Tile(128, 128, 8, 3)) for f in r.faults]
    assert any("shared memory" in f for f in faults)


def test_products_computed_twice_are_a_fault():
    """Eight warps on 64 rows: both warpgroups compute the same rows."""
    kernels = reports("sm_90", "attention", "D=64 bfloat16 causal", Tile(64, 64, 8, 2))
    dkdv = next(r for r in kernels if "dkdv" in r.kernel)
    (loop,) = dkdv.loops
    assert dkdv.faults == ["products computed more than once"] and loop.cycles["tensor"] == 1.5 * loop.ideal


PRODUCT = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
FLOPS = 2 * 64 * 64 * 16


def loops_of(*body: str, flops: int = FLOPS):
    code = (".L_x_1:", *body, "@!P0 BRA `(.L_x_1)", "EXIT")
    lines = (line if line.startswith(".") else f"        /*{16 * i:04x}*/  {line} ;" for i, line in enumerate(code))
    return sass.loops("\n".join(lines), "sm_90", registers=168, shared=1 << 16, warps=4, flops=flops)


def test_instructions_cycles_and_overlap_of_a_loop_are_read_from_its_code():
    (loop,) = loops_of(WAIT, "MUFU.EX2 R1, R2", "@P1 FSEL R1, R1, -INF, P0", PRODUCT, "MUFU.EX2 R3, R4", "BAR.SYNC 0x0")
    assert loop.instructions == 7 and loop.covered == 0.5
    assert (loop.mix["tensor"], loop.mix["exp"], loop.mix["select"], loop.mix["barrier"]) == (1, 2, 1, 1)
    assert loop.cycles["tensor"] == loop.ideal == 32 and loop.cycles["mufu"] == 16
    assert loop.programs == 3 and loop.step >= 32 and 0 < loop.share <= 1
    # Exponentials of 16 cycles overlap a product of 32 cycles; after a wait for the product, they do not.
    (loop,) = loops_of(PRODUCT, *["MUFU.EX2 R1, R2"] * 2)
    assert loop.covered == 1 and loop.step == 32
    (loop,) = loops_of(PRODUCT, WAIT, *["MUFU.EX2 R1, R2"] * 2)
    assert loop.covered == 0 and loop.step >= 48
    assert not loops_of("MUFU.EX2 R1, R2")


@pytest.mark.parametrize(
    "body, flops, fault",
    [
        ((PRODUCT, "FSEL R1, R1, -INF, P0"), FLOPS, "a select in the unmasked loop"),
        ((PRODUCT, "LDL R1, [R2]"), FLOPS, "local memory in a loop"),
        ((PRODUCT, PRODUCT), FLOPS, "products computed more than once"),
        (("MUFU.EX2 R1, R2",), FLOPS, "no loop around tensor-core instructions"),
    ],
)
def test_each_fault_of_a_loop_is_reported(body, flops, fault):
    found = loops_of(*body, flops=flops)
    assert sass.faults(found, "sm_90", "forward_kernel", plain=True) == [fault]
    always = fault.startswith(("products", "no loop"))
    assert sass.faults(found, "sm_90", "forward_kernel", plain=False) == [fault] * always
    assert not sass.faults(loops_of(PRODUCT, "MUFU.EX2 R1, R2"), "sm_90", "forward_kernel", plain=True)


def test_a_window_that_hides_no_key_is_no_option():
    q = torch.empty(1, 1, 64, 16, device="meta")
    plain = AttentionCall(q, q, q, *[None] * 5, 64, 64, 0.25, None, left=None, right=0)
    assert not plain.has_options and not plain._replace(left=63).has_options and plain._replace(left=62).has_options
    bounds = torch.empty(2, dtype=torch.int32, device="meta")  # in a packed batch, other sequences may be longer
    assert plain._replace(cu_seqlens_q=bounds, left=63).has_options


def test_a_tile_may_depend_on_the_triton_version():
    older, newer = (tables.tile("sm_90", "dq", 256, torch.bfloat16, triton) for triton in ((3, 8), (3, 10)))
    assert older.newer == newer and not newer.newer


@pytest.mark.corpus(67, 68)
def test_every_family_pass_and_width_has_a_valid_tile():
    assert set(tables.FAMILIES) == set(compiling.TARGETS)
    for family in tables.FAMILIES:
        for pass_ in tables.PASSES:
            for width in (1, *tables.WIDTHS):
                for dtype in (torch.bfloat16, torch.float32):
                    rows = [tables.tile(family, pass_, width, dtype, triton) for triton in RELEASES]
                    for tile in filter(None, (*rows, *(row.for_options for row in rows))):
                        assert all(n & (n - 1) == 0 and n >= 16 for n in (tile.BLOCK_M, tile.BLOCK_N))
                        assert delta.PADDING.value >= tile.BLOCK_M  # the padding of lse2 and delta
                        # triton#10590: on sm_100 tl.dot races in 4 to 8 warps with 2 or 3 stages
                        assert family != "sm_100" or tile.num_stages not in (2, 3)


def test_a_change_of_recorded_machine_code_is_reported():
    found = reports("sm_90", "attention", "D=64 bfloat16 causal")
    now = {"triton": record.triton.__version__, "kernels": record.plain(found)}
    assert len(now["kernels"]) == len(found) and not record.changes(found, now)
    found[0].instructions += 1
    (told,) = record.changes(found, now)
    count = found[0].instructions
    assert told == f"sm_90 attention forward_kernel D=64 bfloat16 causal: instructions {count - 1} -> {count}"
    assert not record.changes(found, {**now, "triton": "0.0.0"})
    assert len(record.changes(found, {**now, "kernels": {}})) == len(found)


def test_the_record_has_all_families_and_kernels():
    recorded = record.read()
    assert f"RECORDED := {recorded['triton']}\n" in (Path(__file__).parents[2] / "Makefile").read_text()
    for family in tables.FAMILIES:
        kernels = {name.split()[2] for name in recorded["kernels"] if name.startswith(family)}
        assert kernels >= {"forward_kernel", "dq_kernel", "dkdv_kernel", "decode_kernel"}


@pytest.mark.parametrize("options", ["causal", "causal window softcap sinks packed"])
def test_the_hopper_kernels_have_no_spills_or_faults(options):
    kernels = {r.kernel: r for r in reports("sm_90", "hopper", f"D=64 bfloat16 {options}")}
    wanted = {"hopper_forward_kernel", "delta_kernel", "hopper_backward_kernel", "round_sum_kernel"}
    assert set(kernels) == wanted | ({"tile_list_kernel"} if "packed" in options else set())
    assert not any(r.faults or r.spill_bytes for r in kernels.values())


def test_only_a_hopper_kernel_that_another_release_recorded_may_spill(monkeypatch):
    major, minor = TRITON_VERSION
    records = {"none": None, "installed": Record("", (major, minor)), "other": Record("", (major, minor + 1))}
    limits = {}
    for name, made in records.items():
        monkeypatch.setattr(hopper, "TILES", {"forward": (HopperTile(64, 128, 128, 4, made),)})
        limits[name] = reading._spill_limit("sm_90", "hopper_forward_kernel", "D=64 bfloat16 causal")
    assert limits == {"none": 0, "installed": 0, "other": 8}
    assert reading._spill_limit("sm_90", "forward_kernel", "D=64 bfloat16 causal") == 0


@pytest.mark.parametrize("access", ["LDL.LU R4, [R1]", "STL [R1+0x4], R4"])
def test_local_memory_in_a_hopper_loop_is_a_fault(access, monkeypatch):
    loop = hopper._loop(["HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0", access])
    monkeypatch.setattr(hopper, "loops", lambda _: [loop])
    compiled = SimpleNamespace(asm={"cubin": b"", "ptx": ""})
    assert sass.LOCAL_MEMORY in hopper.faults("hopper_forward_kernel", "D=64 bfloat16 causal", compiled)


def test_overlap_in_a_hopper_loop_is_read_from_its_code():
    product, exp = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0", "MUFU.EX2 R1, R2"
    one_left, none_left = "WARPGROUP.DEPBAR.LE gsb0, 0x1", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    pipelined = hopper._loop([product, product, one_left, exp, exp, none_left])
    assert pipelined.covered == 1 and pipelined.tensor_cycles == 2 * 64 and pipelined.mix["MUFU.EX2"] == 2
    assert hopper._loop([product, product, one_left, exp, none_left, exp]).covered == 0.5
    assert hopper._loop([exp, product, none_left]).covered == 0
    assert hopper._loop([exp, none_left, product]).covered == 1  # the product of the iteration before
