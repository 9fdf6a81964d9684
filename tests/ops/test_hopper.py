"""The Hopper kernels without a GPU: their schedule on integers, themselves on a machine that plays one, their choice.

What can go wrong in such a kernel and nowhere else is its schedule: a block left out, a wrong phase and the GPU hangs,
a slot overwritten while tensor cores still read it. The functions of schedule.py are compared with the definition of
the mask; then the kernels' own source runs on tests/ops/hopper_machine.py, held against float64 by the judge as any
kernel here, and planted faults are caught. What the compiler makes of it, `python -m bench.codegen` shows; the rest,
only a GPU (tests/gpu/test_gpu.py).
"""

from __future__ import annotations

import contextlib
import functools
import random
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import llama_kernels as lk
from llama_kernels.core.registry import KERNELS
from llama_kernels.ops.attention import dispatch, hopper, tiles
from llama_kernels.ops.attention.call import AttentionCall, Wanted
from llama_kernels.ops.attention.hopper import schedule, switch
from llama_kernels.ops.attention.hopper.tables import TILES, HopperTile
from tests.ops import hopper_machine
from tests.support.attention import Case, check, make, packed, run
from tests.support.launches import kernels_launched, names

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
            names[name] = types.FunctionType(value.__code__, names, name, value.__defaults__)
    return types.SimpleNamespace(**names)


PLAIN = plain(tiles, schedule)


class Shape:
    """One sequence of one head: who sees whom, by the definition."""

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
        mask = tiles.Mask(self.Sk - self.Sq, self.left, self.right, None, None, self.Sk)
        return PLAIN.row_walk(mask, n, self.Sq, 64, 128)

    def walk(self, m: int, BLOCK_N: int) -> schedule.Walk:
        mask = tiles.Mask(self.Sk - self.Sq, self.left, self.right, None, None, self.Sk)
        blocks = PLAIN.key_blocks(mask, m, min(m + 128, self.Sq) - 1, BLOCK_N)
        return PLAIN.key_walk(blocks, self.left, self.Sk, BLOCK_N)


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
            if n + 128 <= shape.Sk:  # nothing is masked that need not be
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
        mask = tiles.Mask(shape.Sk - shape.Sq, shape.left, shape.right, None, shape.Sk, None)
        see = [[bool(PLAIN.visible(mask, i, j)) for j in range(shape.Sk + 9)] for i in range(shape.Sq)]
        assert torch.equal(torch.tensor(see), torch.nn.functional.pad(shape.sees(), (0, 9))), shape


@pytest.mark.parametrize("B, Hq, Sq", [(1, 1, 1), (2, 6, 300), (3, 8, 1024)])
def test_every_tile_of_queries_is_one_programs_longest_first(B, Hq, Sq):
    programs = B * Hq * -(-Sq // 128)
    on_device = plain(tiles, schedule, tl=types.SimpleNamespace(num_programs=lambda _: programs))
    found = [on_device.query_tile(pid, types.SimpleNamespace(B=B, Hq=Hq), 128) for pid in range(programs)]
    assert len(set(found)) == programs and {(h, b) for _, h, b in found} == {
        (h, b) for h in range(Hq) for b in range(B)
    }
    assert [m for m, _, _ in found] == sorted((m for m, _, _ in found), reverse=True)


# --- the kernels themselves ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def machine(**planted: Any) -> Iterator[list[hopper_machine.Launcher]]:
    """Attention takes the Hopper kernels, which run on the machine; the launchers of forward and backward."""
    launchers = []
    with contextlib.ExitStack() as stack:
        for module, name, value in hopper_machine.patches(**planted):
            stack.enter_context(mock.patch.object(module, name, value))
            launchers += [value] if isinstance(value, hopper_machine.Launcher) else []
        stack.enter_context(mock.patch.object(dispatch, "arch_of", lambda _: "sm_90"))
        stack.enter_context(mock.patch.object(dispatch, "HAS_GLUON", True))
        # What fails here is to be seen, not stepped over.
        stack.enter_context(mock.patch.object(hopper, "attempt", lambda _, launch, *args: (True, launch(*args))))
        stack.enter_context(lk.hopper_attention())
        torch.use_deterministic_algorithms(False)
        yield launchers


# Heads of every width class, full and not; every option alone and together; rows and keys that leave tiles half full;
# rows without keys, keys without rows; packed sequences of any length.
ON_MACHINE = (
    Case(1, 4, 2, 300, 300, 64, 64),
    Case(1, 3, 1, 200, 200, 128, 128),
    Case(2, 2, 2, 70, 150, 80, 80),
    Case(1, 2, 1, 260, 130, 96, 96),
    Case(1, 2, 1, 70, 140, 256, 256),
    Case(2, 2, 1, 130, 257, 64, 64, is_causal=False),
    Case(1, 2, 1, 300, 500, 64, 64, window_size=(90, 0)),
    Case(1, 2, 2, 300, 200, 128, 128, is_causal=False, window_size=(20, 70)),
    Case(1, 2, 1, 150, 150, 64, 64, softcap=3.0),
    Case(1, 4, 2, 290, 200, 128, 128, sinks=True),
    Case(1, 2, 2, 140, 140, 64, 64, scale=-0.3),
    packed((50, 0, 200, 1), (50, 0, 200, 1), 4, 2, 64, 64),
    packed((150, 3, 90), (70, 200, 130), 2, 1, 128, 128, is_causal=False, window_size=(60, 30), sinks=True),
    packed((33, 129), (170, 60), 2, 2, 64, 64, window_size=(40, 5), softcap=4.0),
)


def check_of_hopper_kernels(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """`check`; and that the Hopper kernels ran, forward and backward, and no portable one in their place. The one
    exception is the backward that they do not have: of heads wider than 128, and of softcap at heads wider than 64."""
    with kernels_launched() as launches:
        check(case, dtype, device)
    backward = case.D <= 128 and (case.softcap is None or case.D <= 64)
    expected = {"_hopper_forward_kernel", "_delta_kernel"}
    expected |= {"_hopper_backward_kernel", "_round_dq_kernel"} if backward else {"_dkdv_kernel", "_dq_kernel"}
    assert set(names(launches)) == expected


@pytest.mark.interpreter
@pytest.mark.parametrize("case", ON_MACHINE, ids=str)
def test_the_kernels_are_right_on_a_machine_that_plays_the_gpu(case, device):
    number = ON_MACHINE.index(case)
    with machine(seed=number):
        check_of_hopper_kernels(case, (torch.float16, torch.bfloat16)[number % 2], device)


@pytest.mark.interpreter
@pytest.mark.parametrize("without", ["both", "backward"])
def test_a_portable_kernel_is_not_taken_for_a_hopper_kernel(without, device):
    """What the GPU's own test of the Hopper kernels would say if a portable kernel had run."""
    case = Case(1, 2, 1, 70, 70, 64, 64)
    with contextlib.ExitStack() as stack:
        if without == "backward":
            stack.enter_context(machine())
            torch.use_deterministic_algorithms(True)
        with pytest.raises(AssertionError, match="_dq_kernel"):
            check_of_hopper_kernels(case, torch.float16, device)


@pytest.mark.interpreter
@pytest.mark.parametrize("tile", TILES["forward"], ids=str)
def test_every_tile_of_the_hopper_kernels_is_run(tile, device):
    """Rows and keys that fill tiles, and a rest of each."""
    case, backward = Case(1, 1, 1, 130, 130, tile.width, tile.width), TILES["backward"]
    with machine() as (on_forward, on_backward), kernels_launched() as launches:
        check(case, torch.float16, device)
    ran = {launched.name: launched.options for launched in launches}
    options = ran["_hopper_forward_kernel"]
    assert on_forward.launches == 1 and (options["BLOCK_N"], options["STAGES"]) == (tile.BLOCK_N, tile.STAGES)
    of_backward = [other for other in backward if other.width == tile.width]
    assert on_backward.launches == len(of_backward)
    assert all(ran["_hopper_backward_kernel"]["STAGES"] == other.STAGES for other in of_backward)
    assert {other.width for other in backward} <= {other.width for other in TILES["forward"]}


@pytest.mark.interpreter
@pytest.mark.parametrize("D", [64, 128])
def test_dimensions_of_one_may_have_any_stride(D, device):
    """One token, one head, one of a batch: what it strides means nothing, and the copy engine still checks it."""
    cases = (packed((1, 0), (170, 20), 1, 1, D, D), Case(1, 1, 1, 40, 150, D, D))
    for case in cases:
        with machine() as (on_forward, on_backward):
            check(case, torch.float16, device, layout=3)
        assert on_forward.launches == on_backward.launches == 1


@pytest.mark.interpreter
@pytest.mark.parametrize("D", [64, 128])
def test_a_sequence_never_meets_what_lies_beside_it(D, device):
    """NaN in one sequence of a packed batch, whose rows and keys share tiles with its neighbours'."""
    q, k, v = (torch.randn(200, H, D, device=device).half() for H in (2, 1, 1))
    bounds = torch.tensor([0, 70, 130, 200], dtype=torch.int32, device=device)
    grads = []
    for beside in (0.0, torch.nan):
        for x in (q, k, v):
            x.requires_grad_(False)[70:130] = beside
            x.requires_grad_()
        with machine():
            out = lk.attention_varlen(q, k, v, bounds, bounds, 70, 70)
            grads.append([out.detach(), *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))])
    for clean, poisoned in zip(*grads, strict=True):
        assert torch.equal(clean[:70], poisoned[:70]) and torch.equal(clean[130:], poisoned[130:])


# --- planted faults --------------------------------------------------------------------------------------------------


def results(D: int, **planted: Any) -> list[torch.Tensor]:
    torch.manual_seed(0)
    case = Case(1, 2, 1, 290, 290, D, D, window_size=(150, 0))
    with machine(**planted):
        return run(lk, case, make(case, torch.float16, torch.device("cpu")))


_right = functools.cache(results)


def caught(D: int, **planted: Any) -> bool:
    """Whether a fault shows: the machine says so, or the numbers do, which are right without it."""
    expected = _right(D)
    for seed in range(6):
        try:
            torch.testing.assert_close(results(D, seed=seed, **planted), expected, atol=0.05, rtol=0.05)
        except AssertionError:
            return True
    return False


FAULTS = {
    "a phase that flips a round late": {"filled_phase": lambda step, STAGES: (step // (2 * STAGES)) & 1},
    "a ring of one slot more than there are": {"filled_phase": lambda step, STAGES: (step // (STAGES + 1)) & 1},
    "an untouched slot that is waited for": {"freed_phase": lambda step, STAGES: (step // STAGES) & 1},
    "a slot for two steps": {"slot_of": lambda step, STAGES: (step // 2) & (STAGES - 1)},
    "both begin with the turn": {"turn_phase": lambda step, C: step & 1},
    "nobody begins": {"turn_phase": lambda step, C: (step + 1) & 1},
    "blocks in the order of the steps": {"block_of": lambda walk, step: step},
    "another head of the group": {"head_and_block": lambda walk, step, group: (0, step % walk.count)},
    "no fence": {"fence_async_shared": lambda: None},
}


@pytest.mark.interpreter
@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_arithmetic_is_caught(fault):
    assert caught(64, **FAULTS[fault])


@pytest.mark.interpreter
@pytest.mark.parametrize("without", ["q_filled", "k_filled", "k_freed", "v_filled", "v_freed", "o_filled", "kv_filled",
                                     "do_filled", "freed", "ds_filled", "ds_freed", "dq_filled", "dq_freed",
                                     "dkdv_filled"])  # fmt: skip
def test_a_missing_wait_is_caught(without):
    assert caught(128, without=without)


# --- the choice ------------------------------------------------------------------------------------------------------


def tensors(D: int = 128, S: int = 64, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    return [torch.zeros(2, S, H, D, dtype=dtype).transpose(1, 2) for H in (8, 2, 2)]


@pytest.fixture
def on_hopper(monkeypatch):
    """As if the tensors' device were one."""
    monkeypatch.setattr(dispatch, "arch_of", lambda _: "sm_90")
    monkeypatch.setattr(dispatch, "HAS_GLUON", True)
    monkeypatch.setattr(switch, "failures", {})


def attention_call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **changed: Any) -> AttentionCall:
    """A plain causal call."""
    call = AttentionCall(q, k, v, None, None, None, None, None, q.shape[2], k.shape[2], 0.1, None, None, 0)
    return call._replace(**changed)


def chosen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **changed: Any) -> dispatch.Choice:
    return dispatch.forward(attention_call(q, k, v, **changed))


def tile_of_backward(wanted: Wanted, **changed: Any) -> HopperTile | None:
    call = attention_call(*tensors(), **changed)
    return dispatch.backward(call, call.q, wanted).tile


def test_it_is_off_until_it_is_switched_on(on_hopper):
    with lk.hopper_attention(False):  # as it is but for `pytest --hopper`
        assert chosen(*tensors()) is dispatch.PORTABLE
        assert "opt-in" in dispatch.for_heads("forward", "sm_90", 128).reason
        with lk.hopper_attention():
            assert chosen(*tensors()).tile.width == 128
        assert chosen(*tensors()) is dispatch.PORTABLE


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
def test_what_the_copy_engine_cannot_take_is_told(made, why, on_hopper):
    with lk.hopper_attention():
        assert chosen(*made()).kernel == "portable" and why in chosen(*made()).reason
        bound = torch.zeros(2, 64, dtype=torch.int32)
        assert "kv_start" in chosen(*tensors(), kv_start=bound).reason


def test_no_other_device_is_ever_asked(monkeypatch):
    with lk.hopper_attention():
        assert "not Hopper" in chosen(*tensors()).reason
        monkeypatch.setattr(dispatch, "arch_of", lambda _: "sm_90")
        monkeypatch.setattr(dispatch, "HAS_GLUON", False)
        monkeypatch.setattr(dispatch, "WHY_NOT", "no Gluon here")
        assert chosen(*tensors()) == ("portable", "no Gluon here", None)
        q, k, v = tensors(64)
        assert lk.attention(q, k, v).shape == q.shape


def test_a_kernel_that_fails_is_told_once_and_not_tried_again(on_hopper):
    q, k, v = tensors()
    call = attention_call(q, k, v)
    failing = mock.Mock(side_effect=RuntimeError("PassManager::run failed\nat length"))
    with lk.hopper_attention(), mock.patch.object(hopper, "launch_hopper_forward", failing):
        with pytest.warns(UserWarning, match="portable kernel.*PassManager::run failed$"):
            assert hopper.try_forward(call, TILES["forward"][1]) is None
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
    rest = (None, None, None, cu_seqlens, cu_seqlens, longest, longest, 0.1, None, None, 0)
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


def test_the_option():
    """In a process of its own: the tests of the choice of the backward, with and without deterministic algorithms."""
    tests = "gradients_that_must_repeat or under_the_option"
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "--hopper", __file__, "-k", tests]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0 and "4 passed" in done.stdout, done.stdout[-2000:]


@pytest.mark.gpu
def test_a_call_takes_the_hopper_kernels(request, device):
    """Nothing turns them on but `--hopper`."""
    if not request.config.getoption("hopper") or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs --hopper and a Hopper GPU")
    check_of_hopper_kernels(Case(1, 4, 2, 300, 300, 128, 128), torch.bfloat16, device)
