"""The Hopper kernels without a GPU: their schedule on integers, when they are chosen, and what is done around them.

The functions of schedule.py are compared with the definition of the mask. The kernels themselves run as compiled, in
tests/compiled/llama, where faults planted in them are caught, and on a GPU in tests/gpu/test_gpu.py.
"""

from __future__ import annotations

import contextlib
import random
import types
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

import llama_kernels as lk
from bench.attention_options import attention_options
from llama_kernels.core.registry import KERNELS
from llama_kernels.ops.attention import dispatch, hopper, masks, tiles
from llama_kernels.ops.attention.call import AttentionCall, Sizes, Wanted
from llama_kernels.ops.attention.hopper import schedule, switch
from llama_kernels.ops.attention.hopper import tables as hopper_tables
from llama_kernels.ops.attention.hopper.descriptors import tokens_apart
from llama_kernels.ops.attention.hopper.tables import TILES, HopperTile
from tests.support.attention import Case
from tests.support.hopper import check_of_hopper_kernels
from tests.support.processes import python

# --- the kernels' own functions, on integers -------------------------------------------------------------------------


def plain(*modules: types.ModuleType, **replaced: Any) -> types.SimpleNamespace:
    """The device functions of `modules` as plain ones; `replaced` stands in for functions of that name."""
    names: dict[str, Any] = {"min": min, "max": max}
    for module in modules:
        names |= {name: getattr(value, "fn", value) for name, value in vars(module).items()}
    names["tl"] = types.SimpleNamespace(minimum=min, maximum=max, cdiv=lambda a, b: -(-a // b))
    names |= replaced
    for name, value in list(names.items()):
        if isinstance(value, types.FunctionType) and name not in replaced:
            names[name] = types.FunctionType(value.__code__, names, name, value.__defaults__, value.__closure__)
    return types.SimpleNamespace(**names)


PLAIN = plain(masks, tiles, schedule)


class Shape:
    """One sequence of one head, and which query sees which key by the definition."""

    def __init__(self, Sq: int, Sk: int, left: int | None, right: int | None) -> None:
        self.Sq, self.Sk, self.left, self.right = Sq, Sk, left, right

    def __repr__(self) -> str:
        return f"Sq={self.Sq} Sk={self.Sk} left={self.left} right={self.right}"

    def sees(self) -> torch.Tensor:
        i, j = torch.arange(self.Sq)[:, None] + self.Sk - self.Sq, torch.arange(self.Sk)
        see = torch.ones(self.Sq, self.Sk, dtype=torch.bool)
        see &= True if self.left is None else j >= i - self.left
        return see & (True if self.right is None else j <= i + self.right)

    def row_walk(self, n: int) -> schedule.Walk:
        mask = masks.Mask(self.Sk - self.Sq, self.left, self.right, None, None, self.Sk)
        return PLAIN.row_walk(mask, n, self.Sq, 64, 128)

    def walk(self, m: int, BLOCK_N: int) -> schedule.Walk:
        mask = masks.Mask(self.Sk - self.Sq, self.left, self.right, None, None, self.Sk)
        blocks = PLAIN.key_blocks(mask, m, min(m + 128, self.Sq) - 1, BLOCK_N)
        return PLAIN.key_walk(blocks, PLAIN.floor_of(mask, blocks), self.Sk, BLOCK_N)


def shapes(count: int, longest: int = 700) -> Iterator[Shape]:
    chance = random.Random(0)
    yield from (Shape(1, 1, None, 0), Shape(300, 5, None, 0), Shape(129, 400, 3, 0), Shape(256, 256, None, None))
    for _ in range(count):
        Sq, Sk = chance.randint(1, longest), chance.randint(1, longest)
        Sk = chance.choice((Sq, Sk))
        left, right = (chance.choice((None, 0, chance.randint(0, longest))) for _ in range(2))
        yield Shape(Sq, Sk, left, right)


@pytest.mark.parametrize("BLOCK_N", [64, 128])
def test_a_tile_visits_every_block_it_sees_once(BLOCK_N):
    for shape in shapes(150):
        see = shape.sees()
        for m in range(0, shape.Sq, 128):
            rows, walk = see[m : m + 128], shape.walk(m, BLOCK_N)
            visited = [PLAIN.block_of(walk, step) for step in range(walk.count)]
            seen = [n for n in range(-(-shape.Sk // BLOCK_N)) if rows[:, n * BLOCK_N : (n + 1) * BLOCK_N].any()]
            assert sorted(visited) == (seen or [-(-shape.Sk // BLOCK_N)]), (shape, m, walk)
            assert walk.masked >= 1
            for step in range(walk.masked, walk.count):
                whole = rows[:, visited[step] * BLOCK_N :][:, :BLOCK_N]
                assert whole.shape[1] == BLOCK_N and whole.all(), (shape, m, walk, step)
            wanted = [
                n for n in visited if not rows[:, n * BLOCK_N :][:, :BLOCK_N].all() or (n + 1) * BLOCK_N > shape.Sk
            ]
            assert walk.masked <= max(len(wanted), 1) + 1  # one block more is masked than must be, the first, at most


def test_a_tile_of_keys_visits_every_block_of_rows_that_sees_it_once():
    for shape in shapes(150):
        see = shape.sees()
        for n in range(0, shape.Sk, 128):
            keys, walk = see[:, n : n + 128], shape.row_walk(n)
            visited = [PLAIN.block_of(walk, step) for step in range(walk.count)]
            seeing = [m for m in range(-(-shape.Sq // 64)) if keys[m * 64 : (m + 1) * 64].any()]
            assert sorted(visited) == seeing, (shape, n, walk)
            for step in range(walk.masked, walk.count):
                assert keys.shape[1] == 128 and keys[visited[step] * 64 :][:64].all(), (shape, n, walk, step)
            if n + 128 <= shape.Sk:  # no step is masked without need
                assert all(not keys[m * 64 :][:64].all() for m in visited[: walk.masked]), (shape, n, walk)


@pytest.mark.parametrize("group", [1, 3])
def test_every_head_of_a_group_walks_alike_masked_steps_first(group):
    for shape in shapes(60):
        for n in range(0, shape.Sk, 128):
            walk = shape.row_walk(n)
            steps = [PLAIN.head_and_block(walk, step, group) for step in range(group * walk.count)]
            blocks = [PLAIN.block_of(walk, step) for step in range(walk.count)]
            masked, rest = blocks[: walk.masked], blocks[walk.masked :]
            assert steps == [(h, m) for part in (masked, rest) for h in range(group) for m in part]


def test_the_mask_within_a_block_is_the_definition():
    """The end of the keys goes in as every row's kv_end."""
    for shape in shapes(12, longest=40):
        mask = masks.Mask(shape.Sk - shape.Sq, shape.left, shape.right, None, shape.Sk, None)
        see = [[bool(PLAIN.visible(mask, i, j)) for j in range(shape.Sk + 9)] for i in range(shape.Sq)]
        assert torch.equal(torch.tensor(see), torch.nn.functional.pad(shape.sees(), (0, 9))), shape


@pytest.mark.parametrize("B, Hq, Sq", [(1, 1, 1), (2, 6, 300), (3, 8, 1024)])
def test_each_tile_of_queries_has_one_program_the_longest_first(B, Hq, Sq):
    programs = B * Hq * -(-Sq // 128)
    sizes, found = types.SimpleNamespace(B=B, Hq=Hq), []
    for pid in range(programs):
        tl = types.SimpleNamespace(num_programs=lambda _: programs, program_id=lambda _, pid=pid: pid)
        found.append(plain(masks, tiles, schedule, tl=tl).query_tile(None, 0, sizes, 128))
    assert len(set(found)) == programs and {(h, b) for _, h, b in found} == {
        (h, b) for h in range(Hq) for b in range(B)
    }
    assert [m for m, _, _ in found] == sorted((m for m, _, _ in found), reverse=True)


def key_tiles(B: int, Hkv: int, tiles_a_head: int, at_once: int | None) -> list[tuple[int, int, int]]:
    """First key, key head and batch of every program of a dense batch."""
    programs, found = B * Hkv * tiles_a_head, []
    sizes = types.SimpleNamespace(B=B, Hq=3 * Hkv, group=3, Sk=128 * tiles_a_head - 2**31, longest_k=0)
    for pid in range(programs):
        tl = types.SimpleNamespace(
            num_programs=lambda _: programs, program_id=lambda _, pid=pid: pid, minimum=min, int64=int,
            cast=lambda x, dtype: dtype(x),
        )  # fmt: skip
        n, h_kv, b, _, Sk = plain(masks, tiles, schedule, tl=tl).key_tile(None, 0, sizes, None, 128, at_once)
        assert Sk == 128 * tiles_a_head
        found.append((n, h_kv, b))
    return found


@pytest.mark.parametrize("B, Hkv, tiles_a_head", [(1, 1, 1), (2, 3, 5), (1, 8, 4), (3, 2, 1)])
@pytest.mark.parametrize("at_once", [None, 1, 2, 4, 6, 8])
def test_each_tile_of_keys_has_one_program_a_few_heads_at_a_time(B, Hkv, tiles_a_head, at_once):
    found = key_tiles(B, Hkv, tiles_a_head, at_once)
    assert len(set(found)) == len(found) == B * Hkv * tiles_a_head
    assert {n for n, _, _ in found} == {128 * t for t in range(tiles_a_head)}
    assert {(b, h) for _, h, b in found} == {(b, h) for b in range(B) for h in range(Hkv)}
    heads = at_once or B * Hkv
    for first in range(0, B * Hkv, heads):
        here = found[first * tiles_a_head : (first + heads) * tiles_a_head]
        assert {b * Hkv + h for _, h, b in here} == set(range(first, min(first + heads, B * Hkv)))
        assert [n for n, _, _ in here] == sorted(n for n, _, _ in here)  # the first keys, which most rows see


@pytest.mark.parametrize(
    "B, Hq, Hkv, S, width, heads",
    [
        (2, 32, 8, 8192, 128, 2),  # one head would fit into L2, and would leave half of an H100 idle
        (4, 32, 8, 1024, 128, 12),
        (1, 32, 8, 1024, 128, 8),  # all there are
        (1, 2, 1, 10**6, 64, 1),
        (0, 2, 1, 64, 64, 1),
    ],
)
def test_as_many_heads_at_a_time_as_fit_into_l2(B, Hq, Hkv, S, width, heads):
    sizes = Sizes(B, Hq, Hq // Hkv, S, S, S, S)
    assert hopper.backward.heads_at_once(sizes, width) == heads


# --- the choice ------------------------------------------------------------------------------------------------------


def tensors(D: int = 128, S: int = 64, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    return [torch.zeros(2, S, H, D, dtype=dtype).transpose(1, 2) for H in (8, 2, 2)]


@pytest.fixture
def on_hopper(monkeypatch):
    """The tensors count as tensors on a Hopper GPU."""
    monkeypatch.setattr(dispatch, "arch_of", lambda _: "sm_90")
    monkeypatch.setattr(dispatch, "HAS_GLUON", True)
    monkeypatch.setattr(switch, "failures", {})


def attention_call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **changed: Any) -> AttentionCall:
    """A plain causal call."""
    call = AttentionCall(q, k, v, *attention_options(q.shape[2], k.shape[2], 0.1))
    return call._replace(**changed)


def chosen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **changed: Any) -> dispatch.Choice:
    return dispatch.forward(attention_call(q, k, v, **changed))


def tile_of_backward(wanted: Wanted, **changed: Any) -> HopperTile | None:
    call = attention_call(*tensors(), **changed)
    return dispatch.backward(call, call.q, wanted).tile


@pytest.mark.parametrize("release", [(3, 6), (3, 7)])
def test_hopper_kernels_are_on_by_default_where_they_were_measured(release, on_hopper, monkeypatch):
    """The forward at widths 128 and 256 was measured with Triton 3.6; nothing was with 3.7."""
    monkeypatch.setattr(hopper_tables, "TRITON_VERSION", release)
    measured = {name for name, tiles in TILES.items() if any(tile.measured for tile in tiles)}
    monkeypatch.setattr(switch, "_MEASURED", measured)
    with lk.hopper_attention(False):  # as it is but for `pytest --hopper`
        on = {D for D in (64, 128, 256) if chosen(*tensors(D)).tile}
        assert on == ({128, 256} if release == (3, 6) else set())
        assert tile_of_backward(Wanted(True, True, True, False, False)) is None
        assert "the portable kernel is as fast" in dispatch.for_heads("forward", "sm_90", 64).reason
        assert "does not repeat bit for bit" in dispatch.for_heads("backward", "sm_90", 128).reason
        if release != (3, 6):
            assert "measured with Triton 3.6 alone" in dispatch.for_heads("forward", "sm_90", 128).reason
        with lk.hopper_attention():
            assert chosen(*tensors(64)).tile.width == 64
            assert tile_of_backward(Wanted(True, True, True, False, False)).width == 128
        assert chosen(*tensors(64)).tile is None


@pytest.mark.parametrize("D, width", [(40, 64), (64, 64), (80, 128), (96, 128), (128, 128), (192, 256), (256, 256)])
def test_narrower_heads_take_the_next_width(D, width, on_hopper):
    with lk.hopper_attention():
        assert chosen(*tensors(D)).tile.width == width


def unaligned() -> list[torch.Tensor]:
    q, k, v = tensors()
    return [q, torch.zeros(k.numel() + 1, dtype=k.dtype)[1:].view(k.shape), v]


def odd_strides() -> list[torch.Tensor]:
    return [torch.zeros(2, H, 64, 132, dtype=torch.bfloat16)[..., :128] for H in (8, 2, 2)]


def expanded() -> list[torch.Tensor]:
    q, k, v = tensors()
    return [q, k[:, :, :1].expand_as(k), v]


@pytest.mark.parametrize(
    "made, why",
    [
        (lambda: tensors(32), "head_dim 32"),
        (lambda: tensors(100), "head_dim 100"),
        (lambda: tensors(dtype=torch.float32), "float32"),
        (lambda: [*tensors()[:2], tensors(64)[2]], "v is 64 wide"),
        (lambda: tensors(S=0), "empty"),
        (unaligned, "16 bytes"),
        (odd_strides, "strides"),
        (expanded, "strides"),
    ],
)
def test_the_reason_names_what_the_copy_engine_does_not_take(made, why, on_hopper):
    with lk.hopper_attention():
        assert chosen(*made()).kernel == "portable" and why in chosen(*made()).reason


@pytest.mark.parametrize("bounds", [("kv_start",), ("kv_end",), ("kv_start", "kv_end")])
def test_the_forward_takes_bounds_where_it_is_switched_on(bounds, on_hopper):
    """It has not run with bounds on a GPU, so they alone do not switch it on. The backward never takes them."""
    given = {name: torch.zeros(2, 64, dtype=torch.int32) for name in bounds}
    with lk.hopper_attention():
        assert chosen(*tensors(), **given).tile.width == 128
        assert "kv_prefix" in chosen(*tensors(), **given, kv_prefix=torch.zeros(2, 64, dtype=torch.int32)).reason
        call = attention_call(*tensors(), **given)
        choice = dispatch.backward(call, call.q, Wanted(True, True, True, False, False))
        assert choice.tile is None and "kv_start" in choice.reason
    with lk.hopper_attention(False), measured_by_the_installed_release():
        assert chosen(*tensors()).tile.width == 128
        choice = chosen(*tensors(), **given)
        assert choice.tile is None and "has not run on a GPU" in choice.reason


@contextlib.contextmanager
def measured_by_the_installed_release() -> Iterator[None]:
    """Inside, the forward at widths 128 and 256 is on by default."""
    with (
        mock.patch.object(hopper_tables, "TRITON_VERSION", (3, 6)),
        mock.patch.object(switch, "_MEASURED", {"forward"}),
    ):
        yield


def test_bounds_need_sequences_a_whole_number_of_tokens_apart(on_hopper):
    q, k, v = tensors()
    rest = {"kv_start": torch.zeros(2, 64, dtype=torch.int32)}
    apart = torch.zeros(2 * v.numel(), dtype=v.dtype).as_strided(v.shape, (v.stride(0) + 8, *v.stride()[1:]))
    with lk.hopper_attention():
        assert chosen(q, k, apart).tile is not None
        assert "whole number of tokens" in chosen(q, k, apart, **rest).reason
        assert "whole number of tokens" in chosen(q, apart, v, **rest).reason
        assert "strides" in chosen(q, k[:, :, :1].expand_as(k), v, **rest).reason
        assert "empty" in chosen(*tensors(S=0), **rest).reason


@pytest.mark.parametrize(
    "shape, strides, tokens",
    [
        ((3, 2, 64, 128), None, 2 * 64),
        ((3, 2, 64, 128), (64 * 256, 128, 256, 1), 64),
        ((3, 2, 64, 128), (64 * 640, 128, 640, 1), 64),  # a part of a packed projection
        ((3, 2, 64, 128), (64 * 256 + 8, 128, 256, 1), None),
        ((1, 2, 64, 128), (8, 128, 256, 1), 0),  # one sequence
        ((3, 2, 1, 128), (256, 128, 7, 1), 32),  # one token: its stride is not used, and counts as 8
        ((2, 1, 2**30 - 2**15 - 1, 8), None, 2**30 - 2**15 - 1),
        ((2, 1, 2**30 - 2**15, 8), None, None),  # more than the copy engine has coordinates for
        ((2**12, 2**10, 1024, 8), None, None),
    ],
)  # fmt: skip
def test_sequences_of_a_dense_batch_are_so_many_tokens_apart(shape, strides, tokens):
    assert tokens_apart(empty(shape, strides)) == tokens


def empty(shape: tuple[int, ...], strides: tuple[int, ...] | None = None) -> torch.Tensor:
    """Without data: of any size."""
    dtype = torch.bfloat16
    if strides is None:
        return torch.empty(shape, dtype=dtype, device="meta")
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


def in_order(*shape: int) -> list[torch.Tensor]:
    """q, k and v, alike."""
    return [empty(shape)] * 3


def apart(stride: int) -> list[torch.Tensor]:
    """Sequences so far apart, of q, k and v."""
    return [empty((2, 2, 64, 128), (stride, 64 * 128, 128, 1))] * 3


@pytest.mark.parametrize(
    "made, why",
    [
        (lambda: apart(2**38 - 8), None),
        (lambda: apart(2**38), "strides"),
        (lambda: in_order(1, 1, 2**30, 128), None),
        (lambda: in_order(1, 1, 2**30 + 1, 128), "2^30 tokens"),
        (lambda: in_order(2**30, 1, 128), None),
        (lambda: in_order(2**30 + 1, 1, 128), "2^30 tokens"),
        (lambda: [empty((1, H, 64, 128), (1, 64 * 128, 128, 1)) for H in (8, 2, 2)], None),
    ],
    ids=["near", "far", "tokens", "too many tokens", "packed", "too many packed", "a batch of one"],
)
def test_the_limits_of_the_copy_engine(made, why, on_hopper):
    """The stride of a dimension of one element is not used."""
    q, k, v = made()
    packed = empty((2,)) if q.ndim == 3 else None
    tokens = q.shape[0 if packed is not None else 2]
    options = attention_options(tokens, tokens, 0.1, cu_seqlens_q=packed, cu_seqlens_k=packed)
    with lk.hopper_attention():
        choice = dispatch.backward(AttentionCall(q, k, v, *options), q, Wanted(True, True, True, False, False))
    assert (choice.tile is not None) == (why is None) and (why or "") in choice.reason


@pytest.mark.parametrize("D, taken", [(64, True), (128, False)])
def test_a_softcap_leaves_registers_for_gradients_of_narrow_heads(D, taken, on_hopper):
    call = attention_call(*tensors(D), softcap=30.0)
    with lk.hopper_attention():
        assert dispatch.forward(call).tile is not None
        assert (dispatch.backward(call, call.q, Wanted(True, True, True, False, False)).tile is not None) == taken


@pytest.mark.parametrize(
    "left, keys, taken",
    [(None, 192, True), (127, 192, False), (128, 192, True), (0, 64, True), (0, 65, False)],
)
def test_gradients_of_keys_that_a_window_hides_from_every_row_are_portable(left, keys, taken, on_hopper):
    """The Hopper kernel of the gradients multiplies them by 0, and they may be NaN. 64 queries."""
    q, (_, k, v) = tensors()[0], tensors(S=keys)
    call = attention_call(q, k, v, left=left)
    with lk.hopper_attention():
        assert dispatch.forward(call).tile is not None
        assert (dispatch.backward(call, q, Wanted(True, True, True, False, False)).tile is not None) == taken


@pytest.mark.parametrize(("same", "longest_q"), [(True, 64), (False, 64), (True, 63)])
def test_gradients_of_packed_windows_are_portable_where_keys_may_outnumber_queries(same, longest_q, on_hopper):
    """Only the GPU knows the lengths. With one tensor for both sides, each sequence has as many keys as queries, unless
    longest_q cuts off its queries."""
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in tensors())
    cu_seqlens = torch.tensor([0, 64, 128], dtype=torch.int32)
    bounds = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens if same else cu_seqlens.clone()}
    call = AttentionCall(q, k, v, *attention_options(longest_q, 64, 0.1, **bounds))._replace(left=8)
    with lk.hopper_attention():
        taken = dispatch.backward(call, q, Wanted(True, True, True, False, False)).tile is not None
    assert taken == (same and longest_q == 64)


def test_other_devices_take_the_portable_kernels(monkeypatch):
    with lk.hopper_attention():
        assert "not Hopper" in chosen(*tensors()).reason
        monkeypatch.setattr(dispatch, "arch_of", lambda _: "sm_90")
        monkeypatch.setattr(dispatch, "HAS_GLUON", False)
        monkeypatch.setattr(dispatch, "WHY_NOT", "no Gluon here")
        assert chosen(*tensors()) == dispatch.Choice("portable", "no Gluon here")
        q, k, v = tensors(64)
        assert lk.attention(q, k, v).shape == q.shape


def test_a_kernel_that_fails_warns_once_and_is_not_tried_again(on_hopper):
    q, k, v = tensors()
    call = attention_call(q, k, v)
    failing = mock.Mock(side_effect=RuntimeError("PassManager::run failed\nat length"))
    with lk.hopper_attention(), mock.patch.object(hopper, "launch_hopper_forward", failing):
        with pytest.warns(UserWarning, match="portable kernel.*PassManager::run failed$"):
            assert not hopper.try_forward(call, TILES["forward"][1])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert dispatch.forward(call).tile is None
        assert "PassManager" in dispatch.forward(call).reason
    assert failing.call_count == 1


# --- around the kernel -----------------------------------------------------------------------------------------------


@pytest.mark.interpreter
@pytest.mark.parametrize("packed", [False, True])
def test_the_sum_of_dq_begins_at_zero_and_is_rounded_once(packed, on_hopper):
    """The delta kernel zeroes it and a last kernel scales and rounds it; tokens that no sequence owns get zeros."""
    q, k, v = (torch.randn_like(x) for x in tensors(64, S=70))
    cu_seqlens, longest = None, 70
    if packed:
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        cu_seqlens, longest = torch.tensor([3, 40, 61], dtype=torch.int32), 40
    rest = attention_options(longest, longest, 0.1, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens)
    with lk.hopper_attention(False):
        out, lse = KERNELS["attention_forward"](q, k, v, *rest)
    owned = torch.zeros(q.shape[0 if packed else 2], dtype=torch.bool)
    owned[3 if packed else 0 : 61 if packed else 70] = True
    by_token = (lambda x: x) if packed else (lambda x: x.transpose(1, 2).transpose(0, 1))
    total = torch.randn(q.shape)
    padded = []

    def kernel(*args: Any, **_: Any) -> None:
        lse2, delta, dq_sum, dk, dv = args[4:9]
        padded.append(lse2.shape[-1] % 128 or delta.data_ptr() % 16)
        assert dq_sum.dtype == torch.float32 and not by_token(dq_sum)[owned].any()
        dq_sum.copy_(total), dk.fill_(1.0), dv.fill_(2.0)

    on_backward = hopper.backward
    with (
        lk.hopper_attention(),
        mock.patch.object(on_backward, "_hopper_backward_kernel", {(n,): kernel for n in range(99)}),
        mock.patch.object(on_backward, "describe", lambda x, *_: x),
        mock.patch.object(on_backward, "describe_rows", lambda x, *_: x),
        mock.patch.object(switch, "failures", {}),
    ):
        grads = KERNELS["attention_backward"](out, None, q, k, v, out, lse, *rest, True, True, True, False, False)
        assert not switch.failures
    assert padded == [0]
    expected = torch.where(owned.view(-1, *[1] * (q.ndim - 1)), by_token(total) * 0.1, 0.0).to(q.dtype)
    assert (by_token(grads[0]).float() - expected.float()).abs().max() <= 2e-3  # a rounding of the interpreter's
    assert (grads[1] == 1).all() and (grads[2] == 2).all()


@pytest.mark.deterministic
@pytest.mark.parametrize("deterministic, taken", [(True, False), (None, False), (False, True)])
def test_gradients_that_must_repeat_are_left_to_the_portable_kernels(deterministic, taken, on_hopper):
    """None asks PyTorch, which is told to be deterministic here."""
    with lk.hopper_attention():
        assert (tile_of_backward(Wanted(True, True, True, False, deterministic)) is not None) == taken
        assert tile_of_backward(Wanted(True, True, False, False, False)) is None
        assert tile_of_backward(Wanted(True, True, True, False, False), softcap=30.0) is None


def test_under_the_option_gradients_come_from_the_hopper_kernel(request, on_hopper):
    """`pytest --hopper` asks PyTorch for no deterministic algorithms, which would rule the Hopper backward out."""
    with lk.hopper_attention():
        tile = tile_of_backward(Wanted(True, True, True, False, None))
    assert (tile is not None) == request.config.getoption("hopper")


@pytest.mark.once
def test_gradients_with_and_without_the_hopper_option():
    """In a process of its own: the tests of the choice of the backward, with and without deterministic algorithms."""
    tests = "gradients_that_must_repeat or under_the_option"
    done = python("-m", "pytest", "-o", "addopts=", "--hopper", __file__, "-k", tests)
    assert done.returncode == 0 and "4 passed" in done.stdout, done.stdout[-2000:]


@pytest.mark.interpreter
def test_a_portable_kernel_is_not_taken_for_a_hopper_kernel(device):
    """What the check of the Hopper kernels says if a portable kernel ran."""
    with pytest.raises(AssertionError, match="_dq_kernel"):
        check_of_hopper_kernels(Case(1, 2, 1, 70, 70, 64, 64), torch.float16, device)


@pytest.mark.gpu
def test_a_call_takes_the_hopper_kernels(request, device):
    """Nothing turns them on but `--hopper`."""
    if not request.config.getoption("hopper") or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs --hopper and a Hopper GPU")
    check_of_hopper_kernels(Case(1, 4, 2, 300, 300, 128, 128), torch.bfloat16, device)
