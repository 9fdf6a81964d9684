"""Every tile that the tables of attention, or the rules of the other ops, can give is run and judged.

On a GPU, each tile of its family that calls take under the installed Triton runs as it is: at its head width, with its
warps and stages. Triton's interpreter knows neither warps nor stages and runs tiles of any family, so there tiles of
the same blocks are run once, on narrow heads. That a tile ran is read from the recorded launches. The tiles of the
Hopper kernels are run, compiled, by tests/compiled/llama/test_hopper.py.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import pytest
import torch

import llama_kernels as lk
from llama_kernels.core.device import arch_of, lanes_of
from llama_kernels.core.language import INTERPRETED, TRITON_VERSION
from llama_kernels.ops import rms_norm
from llama_kernels.ops.attention import backward, decode, tables
from llama_kernels.ops.attention.call import AttentionCall, far
from llama_kernels.ops.attention.tables import Tile
from llama_kernels.ops.rotation import head_tile, rotates_in_registers
from tests.support import attention as attention_cases
from tests.support import qk_norm_rope as qk_norm_rope_cases
from tests.support import rms_norm as rms_norm_cases
from tests.support import rope as rope_cases
from tests.support import rope_attention as rope_attention_cases
from tests.support.attention import Case, packed
from tests.support.environment import DEVICE
from tests.support.hopper import without_hopper_kernels
from tests.support.ideal import drawn, ideal_rms_norm
from tests.support.judge import judge
from tests.support.launches import KERNELS_RUN, Launched, kernels_launched, names

pytestmark = pytest.mark.skipif(not KERNELS_RUN, reason="CPU tensors take the reference in this run: it has no tiles")

# --- the tables of attention -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tile of the tables, and its place there."""

    family: str
    pass_: str
    width: int
    dtype: torch.dtype
    variant: tuple[str, ...]  # the fields of Tile that lead to it from its row: (), ("newer", "for_options")
    tile: Tile
    taken: bool  # by calls under this Triton


def variants(tile: Tile, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Tile]]:
    """The tile, and every tile that a field of it holds."""
    yield path, tile
    for field in dataclasses.fields(tile):
        if isinstance(other := getattr(tile, field.name), Tile):
            yield from variants(other, (*path, field.name))


def releases_after(tile: Tile) -> int:
    """How many fields `newer` lead from a row's tile to the one that this Triton takes."""
    return 1 + releases_after(tile.newer) if tile.newer and tile.since <= TRITON_VERSION else 0


def entries() -> Iterator[Entry]:
    for dtype in (torch.float16, torch.float32):
        for family, pass_ in itertools.product(tables.FAMILIES, tables.PASSES):
            for width, column in zip(tables.ALL_WIDTHS, tables.row_of(family, pass_, dtype), strict=False):
                for variant, tile in variants(column):
                    taken = variant.count("newer") == releases_after(column)
                    yield Entry(family, pass_, width, dtype, variant, tile, taken)


ENTRIES = list(entries())


@pytest.fixture(autouse=True)
def _portable_kernels() -> Iterator[None]:
    """Also where the Hopper kernels are on: these are the tiles of the portable ones."""
    with without_hopper_kernels():
        yield


def test_every_tile_of_the_tables_is_one_that_some_call_takes(monkeypatch):
    """A pass that takes no tile for options has none, and only the forward and dq take one for a prefix."""
    taken = set()
    for family, triton, dtype in itertools.product(
        tables.FAMILIES, ((3, 6), (3, 7), (3, 8), (3, 9)), (torch.float16, torch.float32)
    ):
        monkeypatch.setattr(tables, "arch_of", lambda _, family=family: family)
        monkeypatch.setattr(tables, "tile", functools.partial(TILE, triton=triton))
        for pass_, D in itertools.product(tables.PASSES, tables.ALL_WIDTHS):
            if tables.ALL_WIDTHS.index(D) >= len(tables.row_of(family, pass_, dtype)):
                continue
            calls = (call_of(D, dtype), call_of(D, dtype, softcap=5.0), call_of(D, dtype, kv_prefix=BOUND))
            for call, rotated in itertools.product(calls, (False, True) if pass_ == "dq" else (False,)):
                taken.add((family, pass_, D, dtype, tables.tile_for(pass_, call, rotated)))
    assert not [e for e in ENTRIES if (e.family, e.pass_, e.width, e.dtype, e.tile) not in taken]


TILE = tables.tile
BOUND = torch.zeros(1, 8, dtype=torch.int32)


def call_of(D: int, dtype: torch.dtype, **options: object) -> AttentionCall:
    q = torch.empty(1, 2, 8, D, dtype=dtype, device="meta")
    return AttentionCall(q, q, q, *[None] * 5, 8, 8, 0.1, None, left=None, right=0)._replace(**options)


@pytest.mark.parametrize(
    "family, D, pass_, options, rotated, fields",
    [
        ("sm_90", 64, "forward", {}, False, ()),
        ("sm_90", 64, "forward", {"kv_start": BOUND}, False, ("for_options",)),
        ("sm_90", 64, "forward", {"left": 2}, False, ("for_options",)),
        ("sm_90", 64, "forward", {"kv_prefix": BOUND}, False, ("for_options",)),
        ("sm_80", 128, "dq", {"kv_prefix": BOUND}, False, ("for_prefix",)),
        ("sm_80", 128, "dq", {"kv_start": BOUND}, False, ("for_options",)),
        ("sm_80", 128, "dq", {"kv_start": BOUND}, True, ("for_options", "for_options")),
        ("sm_80", 128, "dq", {}, True, ()),
        ("sm_80", 256, "dq", {}, False, ()),
        ("sm_80", 256, "dq", {}, True, ("for_options",)),
        ("sm_80", 256, "dq", {"cu_seqlens_q": BOUND}, False, ("for_options",)),
        ("sm_90", 128, "dq", {"cu_seqlens_q": BOUND}, True, ()),  # which has spare registers
        ("sm_90", 128, "dq", {"softcap": 5.0}, True, ("for_options",)),
        ("sm_100", 256, "dq", {"softcap": 5.0}, False, ("for_options",)),
        ("sm_100", 256, "dq", {}, True, ("for_options", "for_options")),
        ("sm_90", 256, "dq", {}, True, ()),
        ("sm_90", 128, "dkdv", {"kv_start": BOUND}, False, ()),
        ("sm_90", 128, "dkdv", {"left": 2, "cu_seqlens_q": BOUND}, False, ()),
        ("sm_90", 128, "dkdv", {"kv_start": BOUND, "left": 2}, False, ("for_options",)),
        ("sm_90", 128, "dkdv", {"kv_end": BOUND}, False, ("for_options",)),
        ("sm_90", 128, "dkdv", {"softcap": 5.0}, False, ("for_options",)),
        ("sm_90", 128, "decode", {"softcap": 5.0, "kv_prefix": BOUND}, False, ()),
    ],
)
def test_the_tile_of_a_call_with_options(family, D, pass_, options, rotated, fields, monkeypatch):
    """fields: those that lead to it from the first tile of its row."""
    monkeypatch.setattr(tables, "arch_of", lambda _: family)
    monkeypatch.setattr(tables, "tile", functools.partial(TILE, triton=(3, 6)))
    tile = functools.reduce(getattr, fields, TILE(family, pass_, D, torch.float16, (3, 6)))
    assert tables.tile_for(pass_, call_of(D, torch.float16, **options), rotated) is tile


@dataclasses.dataclass(frozen=True)
class Run:
    """One call that takes a tile in each pass."""

    dtype: torch.dtype
    width: int  # of the heads of q and k
    DV: int
    options: bool  # with those that take registers, which a tile `for_options` is for
    tiles: tuple[tuple[str, Tile], ...]

    def __str__(self) -> str:
        on = f"{str(self.dtype)[6:]}, D={self.width}/{self.DV}" + ", options" * self.options
        return f"{on}: " + "; ".join(f"{pass_} {tile}" for pass_, tile in self.tiles)


def blocks(tile: Tile) -> Tile:
    """The tile with the fields that the interpreter uses."""
    return Tile(tile.BLOCK_M, tile.BLOCK_N, 4, 1, tile.split)


def runs(*passes: str, rotated: bool = False) -> list[Run]:
    """Few calls that take all tiles of the passes, each of them tiles of similar sizes. Where dq is `rotated`, the
    tile for options takes the place of one without spare registers."""
    kinds: dict[tuple[torch.dtype, int, int, bool], dict[str, set[Tile]]] = {}
    family = None if INTERPRETED else arch_of(torch.device(DEVICE))
    for entry in ENTRIES:
        here = family is None or (family == entry.family and entry.taken)
        if (
            not here
            or entry.pass_ not in passes
            or (rotated and entry.pass_ == "dq" and entry.tile.for_options and not entry.tile.spare_registers)
        ):
            continue
        tile = dataclasses.replace(entry.tile, for_options=None, for_prefix=None, newer=None, since=(3, 9))
        DV = min(entry.width, 512)
        kind = (entry.dtype, entry.width, DV, "for_options" in entry.variant)
        if family is None:
            tile, kind = blocks(tile), (entry.dtype, 16, 16, False)
        kinds.setdefault(kind, {}).setdefault(entry.pass_, set()).add(tile)
    found = []
    for kind, by_pass in kinds.items():
        columns = [sorted(by_pass.get(p, ()), key=lambda t: (-t.BLOCK_M * t.BLOCK_N, str(t))) for p in passes]
        for number in range(max(map(len, columns))):
            rest = [tiles[min(number, len(tiles) - 1)] if tiles else SMALL for tiles in columns]
            found.append(Run(*kind, tuple(zip(passes, rest, strict=True))))
    return found


SMALL = Tile(16, 16, 4, 1)


def assert_ran(launches: list[Launched], kernel: str, count: int = 1, **options: object) -> None:
    """`kernel` was launched so often, each time with these options."""
    found = [launched.options for launched in launches if launched.name == kernel]
    assert len(found) == count, f"{kernel} was launched {len(found)} times, not {count}"
    for given in found:
        assert {name: given[name] for name in options} == options, kernel


@pytest.mark.corpus(67)
@pytest.mark.parametrize("run", runs("forward", "dq", "dkdv"), ids=str)
def test_every_tile_of_the_tables_is_right(run, device):
    """Rows and keys that fill a block, keys that all rows of a block see, and a rest in each that does not fill one."""
    tiles = dict(run.tiles)
    M, N = (max(getattr(tile, side) for tile in tiles.values()) for side in ("BLOCK_M", "BLOCK_N"))
    options = {"window_size": (M + 2 * N, 0), "softcap": 5.0} if run.options else {}
    Sk = M + (3 if run.options else 1) * N + 8
    case = Case(1, 2, 1, M + 5, Sk, run.width, run.DV, **options)
    with kernels_launched() as launches:
        attention_cases.check(case, run.dtype, device, tile=tiles)
    assert_ran(launches, "_forward_kernel", **tiles["forward"].launch_options)
    assert_ran(launches, "_dq_kernel", parts_of_dq(run, tiles["dq"]), **tiles["dq"].launch_options)
    assert_ran(launches, "_dkdv_kernel", 1 + tiles["dkdv"].split, **tiles["dkdv"].launch_options)


def test_dq_of_a_wide_head_takes_a_launch_for_each_of_its_columns(device):
    """With all options on sm_80, of 576 columns: 256, 256 and 64."""
    tile = Tile(32, 16, 8, 1, split=True, columns=256)
    wide = dict.fromkeys(("forward", "dkdv"), Tile(16, 16, 8, 1, split=True))
    case = Case(1, 2, 1, 20, 33, 576, 512, softcap=5.0)
    with kernels_launched() as launches:
        attention_cases.check(case, torch.bfloat16, device, tile={**wide, "dq": tile})
    assert_ran(launches, "_dq_kernel", 3, **tile.launch_options)


def test_dk_and_dv_may_take_more_rows_in_a_step_than_dq(device):
    """The kernel of dq then writes lse2 and delta of rows past the last one, in which it computes nothing else."""
    tiles = {"forward": SMALL, "dq": Tile(16, 32, 4, 1), "dkdv": Tile(128, 16, 4, 1)}
    for case in (Case(1, 2, 1, 20, 40, 32, 32), packed((20, 130, 0, 7), (20, 130, 3, 9), 2, 1, 32, 32, sinks=True)):
        with kernels_launched() as launches:
            attention_cases.check(case, torch.float16, device, tile=tiles)
        assert_ran(launches, "_dq_kernel", BLOCK_M=16)
        assert_ran(launches, "_dkdv_kernel", BLOCK_M=128)
        assert "_delta_kernel" not in names(launches)


def parts_of_dq(run: Run, tile: Tile) -> int:
    """The launches of dq, each of some of its columns."""
    return -(-run.width // tile.columns) if tile.split else 1


@pytest.mark.parametrize("run", runs("dq", "dkdv", rotated=True), ids=str)
def test_gradients_are_rotated_back_in_every_tile(run, device):
    """The sums of dq and dk are rotated in registers, for the rows and keys of a tile."""
    tiles = {**dict(run.tiles), "forward": SMALL}
    S = max(tiles["dq"].BLOCK_M, tiles["dkdv"].BLOCK_N) + 5
    with kernels_launched() as launches:
        rope_attention_cases.check(Case(1, 1, 1, S, S, run.width, run.DV), run.dtype, device, tile=tiles)
    half = run.width // 2
    half = half if rotates_in_registers(half, False) and run.width <= backward.MOST_COLUMNS else 0
    assert_ran(launches, "_dq_kernel", parts_of_dq(run, tiles["dq"]), **tiles["dq"].launch_options, HALF=half)
    assert_ran(launches, "_dkdv_kernel", 1 + tiles["dkdv"].split, **tiles["dkdv"].launch_options, HALF=half)


@pytest.mark.parametrize("rows", [1, 32])
@pytest.mark.parametrize("run", runs("decode"), ids=str)
def test_every_tile_of_decoding_is_right(run, rows, device, monkeypatch):
    """A chunk of two whole blocks, and one that ends within its second; as few rows as there are, and the most."""
    tile = dict(run.tiles)["decode"]
    monkeypatch.setattr(decode, "chunk_of", lambda Sk, Hkv: 2 * tile.BLOCK_N)
    case = Case(1, 4 if rows > 1 else 1, 1, -(-rows // 4), 3 * tile.BLOCK_N + 5, run.width, run.DV)
    with kernels_launched() as launches:
        attention_cases.check(case, run.dtype, device, tile={"decode": tile}, gradients=False)
    assert_ran(launches, "_decode_kernel", **{**tile.launch_options, "BLOCK_M": max(rows, 16)})
    assert_ran(launches, "_combine_kernel")


# --- the rules of the other ops --------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [8, 16, 32, 64, 128])
def test_every_tile_of_heads_is_right(half, device):
    """Of rope and of qk_norm_rope: tokens and heads that fill a tile, and a rest of each."""
    chosen = {head_tile(half, 2**power, lanes_of(device)) for power in range(11)}
    assert {tile.BLOCK_R for tile in chosen} == {half} and len(chosen) == (1024 // half).bit_length()
    for tile in chosen:
        q, k = rope_cases.qk(1, tile.BLOCK_H + 1, tile.BLOCK_H, tile.BLOCK_T + 1, 2 * half, torch.float16, device)
        angles = rope_cases.tables(tile.BLOCK_T + 1, 2 * half, device)
        with kernels_launched() as launches:
            rope_cases.check(q, k, *angles, inplace=True)
            qk_norm_rope_cases.check(q, k, *qk_norm_rope_cases.weights(2 * half, q.dtype, device), *angles)
        assert_ran(launches, "_rope_kernel", **tile._asdict())
        assert_ran(launches, "_qk_norm_rope_forward_kernel", **tile._asdict())
        assert_ran(launches, "_qk_norm_rope_backward_kernel", **tile._asdict())


def row_tiles() -> Iterator[tuple[int, torch.dtype]]:
    """Widths up to which rows take tiles of other blocks than any shorter ones."""
    for dtype in (torch.float16, torch.float32):
        seen = set()
        for width in (2**power for power in range(4, 21)):
            tiles = [rms_norm.row_tile(pass_, width, dtype.itemsize)[:2] for pass_ in ("forward", "backward")]
            if not seen.issuperset(enumerate(tiles)):
                yield width, dtype
            seen.update(enumerate(tiles))


@pytest.mark.parametrize("width, dtype", list(row_tiles()), ids=str)
def test_every_tile_of_rows_is_right(width, dtype, device):
    """Of rms_norm: a tile of rows that is full, and one that is not; columns that fill no tile, or no step."""
    tiles = {p: rms_norm.row_tile(p, width, dtype.itemsize) for p in ("forward", "backward", "weight_grad")}
    rows = 1 + max(tiles[pass_].BLOCK_R for pass_ in ("forward", "backward"))
    with kernels_launched() as launches:
        rms_norm_cases.check((rows, width - 3), dtype, device)
    for pass_ in ("forward", "backward"):
        assert_ran(launches, f"_rms_norm_{pass_}_kernel", **blocks_of(tiles[pass_], device))
    if width > tiles["backward"].BLOCK_N:
        assert_ran(launches, "_rms_norm_weight_grad_kernel", **blocks_of(tiles["weight_grad"], device))
    if width <= 2 * tiles["weight_grad"].BLOCK_N:  # wider rows take the tile of this width
        rows = tiles["weight_grad"].BLOCK_R + 1
        weight_gradient_alone((rows, width - 3), dtype, device, tiles["weight_grad"])


def blocks_of(tile: rms_norm.RowTile, device: torch.device) -> dict[str, int]:
    return {"BLOCK_R": tile.BLOCK_R, "BLOCK_N": tile.BLOCK_N, "num_warps": tile.threads // lanes_of(device)}


def weight_gradient_alone(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, tile: rms_norm.RowTile
) -> None:
    """Where x needs no gradient, a kernel of its own makes the weight's."""
    x, dy = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    w = torch.randn(shape[-1], device=device).to(dtype).requires_grad_()
    with kernels_launched() as launches:
        (dw,) = torch.autograd.grad(lk.rms_norm(x, w), w, dy)
    wide = w.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(lk.reference.rms_norm(x.double(), wide), wide, dy.double())
    judge("dweight", dw, truth, drawn(ideal_rms_norm, x, None, w.detach(), 1e-6, 0.0, dy, None)[-1])
    assert_ran(launches, "_rms_norm_weight_grad_kernel", **blocks_of(tile, device))
    assert not [launched for launched in launches if launched.name == "_rms_norm_backward_kernel"]


@pytest.mark.parametrize("in_packed", [False, True])
@pytest.mark.parametrize("stride, is_far", [(2**23 - 8, False), (2**23, True)])
def test_rows_that_are_far_apart_have_offsets_of_64_bits(stride, is_far, in_packed):
    """A tile has at most 256 rows, and 256 * 2^23 is 2^31. One such tensor is enough. Heads may be farther apart."""
    near = torch.empty(1, 2, 64, 16, device="meta")
    rows = torch.empty_strided((1, 2, 64, 16), (2**30, 2**29, stride, 1), device="meta")
    if in_packed:
        near, rows = near[0].transpose(0, 1), rows[0].transpose(0, 1)
    assert far(near, rows) == is_far and not far(near, near)
