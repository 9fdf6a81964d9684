"""The Hopper kernels as far as a CPU can show: their schedule, run in a model of the machine, and their choice.

Gluon is not interpreted. What can go wrong in such a kernel and nowhere else is its schedule: a block left out, a wrong
phase and the GPU hangs, a slot overwritten while tensor cores still read it. So the functions that the kernels compile
from schedule.py and tiles.py are called here on plain integers, by programs that wait, arrive, copy and multiply in the
kernels' order, on a machine whose copies and products take as long as chance wills. That the kernels' numbers are those
of the portable ones, only a GPU can show: tests/test_gpu.py.
"""

from __future__ import annotations

import random
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch

import llama_kernels as lk
from llama_kernels.ops.attention import hopper, tiles
from llama_kernels.ops.attention.backward import launch_backward
from llama_kernels.ops.attention.forward import launch_forward
from llama_kernels.ops.attention.hopper import choice, schedule

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
        return PLAIN.key_walk(PLAIN.key_blocks(mask, m, min(m + 128, self.Sq) - 1, BLOCK_N), self.Sk, BLOCK_N)


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


# --- a machine -------------------------------------------------------------------------------------------------------


class Broken(AssertionError):
    """The schedule hung, or lost data."""


class Barrier:
    """An mbarrier: a phase is over after so many arrivals, and after the bytes it was told to expect."""

    def __init__(self, arrivals: int) -> None:
        self.arrivals = self.missing = arrivals
        self.bytes = self.over = 0

    def arrive(self, expect: int = 0, landed: int = 0, again: bool = False) -> None:
        self.bytes += expect - landed
        self.missing -= not (landed or again)
        if self.missing < 0:
            raise Broken("an arrival too many")
        if self.missing == self.bytes == 0:
            self.over, self.missing = self.over + 1, self.arrivals

    def passes(self, phase: int) -> bool:
        """Whether a wait for `phase` returns: the phase under way is of the other parity."""
        return self.over % 2 != phase


class Slot:
    """A tile of shared memory."""

    def __init__(self) -> None:
        self.holds: Any = None
        self.written = False  # a copy is under way
        self.readers = 0  # products under way

    def start_write(self) -> None:
        if self.written or self.readers:
            raise Broken("a slot is overwritten while it is in use")
        self.written = True

    def end_write(self, holds: Any) -> None:
        self.holds, self.written = holds, False

    def start_read(self, holds: Any) -> None:
        if self.written or self.holds != holds:
            raise Broken(f"{holds} is read where {'nothing yet' if self.written else self.holds} is")
        self.readers += 1

    def end_read(self) -> None:
        self.readers -= 1


# A wait for products under way, which the others spend as they like.
DONE = (Barrier(1), 1)


class Machine:
    """Runs programs that yield (barrier, phase) to wait, in an order of chance; copies land by chance too."""

    def __init__(self, seed: int) -> None:
        self.chance, self.copies = random.Random(seed), []

    def load(self, barrier: Barrier, slot: Slot, holds: Any, arrive: bool = True) -> None:
        """`arrive` False: into a barrier that an earlier call has told of both."""
        barrier.arrive(expect=1, again=not arrive)
        slot.start_write()
        self.copies.append(lambda: (slot.end_write(holds), barrier.arrive(landed=1)))

    def run(self, *programs: Iterator[tuple[Barrier, int]]) -> None:
        waiting: dict[Any, Any] = {program: next(program, None) for program in programs}
        while waiting := {program: wait for program, wait in waiting.items() if wait}:
            ready = [program for program, (barrier, phase) in waiting.items() if barrier.passes(phase)]
            choices = ready + self.copies
            if not choices:
                raise Broken("it hangs")
            chosen = self.chance.choice(choices)
            if chosen in ready:
                waiting[chosen] = next(chosen, None)
            else:
                self.copies.remove(chosen)
                chosen()
        if self.copies:
            raise Broken("a copy lands after the end")


# --- the forward's pipeline ------------------------------------------------------------------------------------------


class Forward:
    """The forward's warp groups: each wait, arrival, copy and product, in the order of hopper/forward.py."""

    def __init__(self, walk: schedule.Walk, STAGES: int, on: Any = PLAIN, without: str = "") -> None:
        self.walk, self.STAGES, self.on, self.without = walk, STAGES, on, without
        self.bars = {name: [Barrier(1) for _ in range(STAGES)] for name in ("k_filled", "v_filled")}
        self.bars |= {name: [Barrier(2) for _ in range(STAGES)] for name in ("k_freed", "v_freed")}
        self.bars |= {name: [Barrier(1), Barrier(1)] for name in ("q_filled", "turn", "o_filled")}
        self.slots = {name: [Slot() for _ in range(STAGES)] for name in "kv"} | {"q": [Slot(), Slot()]}
        self.visited: list[list[tuple[int, bool]]] = [[], []]
        self.issuing: list[tuple[int, int]] = []

    def run(self, seed: int) -> None:
        self.machine = Machine(seed)
        self.machine.run(self.produce(), self.consume(0), self.consume(1))

    def wait(self, name: str, slot: int, phase: int) -> Iterator[tuple[Barrier, int]]:
        if name != self.without:
            yield self.bars[name.removesuffix(" at the end")][slot], phase

    def produce(self) -> Iterator[tuple[Barrier, int]]:
        for c in range(2):
            self.machine.load(self.bars["q_filled"][c], self.slots["q"][c], "q")
        for step in range(self.walk.count):
            slot, freed = self.on.slot_of(step, self.STAGES), self.on.freed_phase(step, self.STAGES)
            block = self.on.block_of(self.walk, step)
            for name in "kv":
                yield from self.wait(f"{name}_freed", slot, freed)
                self.machine.load(self.bars[f"{name}_filled"][slot], self.slots[name][slot], (name, block))
        for c in range(2):
            yield from self.wait("o_filled", c, 0)
            self.slots["q"][c].start_read(("o", c))
            self.slots["q"][c].end_read()

    def consume(self, C: int) -> Iterator[tuple[Barrier, int]]:
        on, walk, STAGES = self.on, self.walk, self.STAGES
        q, blocks = self.slots["q"][C], [on.block_of(walk, step) for step in range(walk.count)]

        def filled(name: str, step: int) -> Iterator[tuple[Barrier, int]]:
            return self.wait(f"{name}_filled", on.slot_of(step, STAGES), on.filled_phase(step, STAGES))

        def issue(name: str, step: int) -> Slot:
            slot = self.slots[name][on.slot_of(step, STAGES)]
            slot.start_read((name, blocks[step]))
            return slot

        def free(name: str, step: int) -> None:
            self.bars[f"{name}_freed"][on.slot_of(step, STAGES)].arrive()

        yield from self.wait("q_filled", C, 0)
        yield from filled("k", 0)
        q.start_read("q")
        k = issue("k", 0)
        yield DONE
        k.end_read()
        free("k", 0)
        self.visited[C].append((blocks[0], True))
        if walk.count > 1:
            yield from filled("k", 1)
        for step in range(1, walk.count):
            yield from self.wait("turn", C, on.turn_phase(step, C))
            self.issuing.append((step, C))
            k = issue("k", step)
            yield from filled("v", step - 1)
            v = issue("v", step - 1)
            self.bars["turn"][1 - C].arrive()
            yield DONE
            k.end_read()
            free("k", step)
            self.visited[C].append((blocks[step], step < walk.masked))
            if step + 1 < walk.count:
                yield from filled("k", step + 1)
            yield DONE
            v.end_read()
            free("v", step - 1)
        yield from filled("v", walk.count - 1)
        v = issue("v", walk.count - 1)
        yield DONE
        v.end_read()
        q.end_read()
        q.start_write()
        q.end_write(("o", C))
        self.bars["o_filled"][C].arrive()


WALKS = [shape.walk(m, BLOCK_N) for shape in shapes(40) for m in range(0, shape.Sq, 128) for BLOCK_N in (64, 128)]


@pytest.mark.parametrize("STAGES", [2, 4])
def test_the_forward_neither_hangs_nor_loses_a_block(STAGES):
    for seed, walk in enumerate(WALKS):
        forward = Forward(walk, STAGES)
        forward.run(seed)
        blocks = [(PLAIN.block_of(walk, step), step < walk.masked) for step in range(walk.count)]
        assert forward.visited == [blocks, blocks]
        assert forward.issuing == [(step, C) for step in range(1, walk.count) for C in range(2)]  # in turns


# --- the backward's pipeline -----------------------------------------------------------------------------------------


class Backward:
    """The backward's warp groups, as `Forward`, in the order of hopper/backward.py. SHARED: each consumer multiplies
    the score gradients of both."""

    wait = Forward.wait

    def __init__(self, walk: schedule.Walk, group: int, SHARED: bool, on: Any = PLAIN, without: str = "") -> None:
        self.walk, self.SHARED, self.on, self.without, self.STAGES = walk, SHARED, on, without, 2
        self.steps = [PLAIN.head_and_block(walk, step, group) for step in range(group * walk.count)]
        counts = {"kv_filled": (1, 1), "q_filled": (2, 1), "do_filled": (2, 1), "freed": (2, 2), "ds_filled": (1, 2),
                  "ds_freed": (1, 2), "dq_filled": (2, 1), "dq_freed": (2, 1), "dkdv_filled": (2, 1)}  # fmt: skip
        self.bars = {name: [Barrier(arrivals) for _ in range(slots)] for name, (slots, arrivals) in counts.items()}
        self.slots = {name: [Slot(), Slot()] for name in ("k", "q", "do", "ds", "dq")}
        self.added: list[tuple[int, Any]] = []

    def run(self, seed: int) -> None:
        self.machine = Machine(seed)
        self.machine.run(self.produce(), self.write(), self.consume(0), self.consume(1))

    def produce(self) -> Iterator[tuple[Barrier, int]]:
        for c in range(2):
            self.machine.load(self.bars["kv_filled"][0], self.slots["k"][c], ("k", c), arrive=not c)
        for step, at in enumerate(self.steps):
            slot, freed = self.on.slot_of(step, self.STAGES), self.on.freed_phase(step, self.STAGES)
            yield from self.wait("freed", slot, freed)
            for name in ("q", "do"):
                self.machine.load(self.bars[f"{name}_filled"][slot], self.slots[name][slot], (name, at))

    def write(self) -> Iterator[tuple[Barrier, int]]:
        dq = self.slots["dq"]
        for step, at in enumerate(self.steps):
            for c in range(2):
                yield from self.wait("dq_filled", c, self.on.filled_phase(step, 1))
                dq[c].start_read(("dq", at))
                self.added.append((c, at))
            for c in range(2):
                yield DONE
                dq[c].end_read()
                self.bars["dq_freed"][c].arrive()
        for c in range(2):
            yield from self.wait("dkdv_filled", c, 0)
            self.slots["k"][c].start_read(("dk", c))
            self.slots["k"][c].end_read()

    def consume(self, C: int) -> Iterator[tuple[Barrier, int]]:
        on, bars, slots, STAGES = self.on, self.bars, self.slots, self.STAGES
        keys = range(2) if self.SHARED else (C,)

        def store(slot: Slot, holds: Any) -> None:
            slot.start_write()
            slot.end_write(holds)

        yield from self.wait("kv_filled", 0, 0)
        for step, at in enumerate(self.steps):
            slot, freed = on.slot_of(step, STAGES), on.freed_phase(step, 1)
            q, do = slots["q"][slot], slots["do"][slot]
            yield from self.wait("q_filled", slot, on.filled_phase(step, STAGES))
            q.start_read(("q", at))
            yield from self.wait("do_filled", slot, on.filled_phase(step, STAGES))
            do.start_read(("do", at))
            yield DONE
            yield from self.wait("ds_freed", 0, freed) if self.SHARED else self.wait("dq_freed", C, freed)
            yield DONE
            store(slots["ds"][C], ("ds", at))
            if self.SHARED:
                bars["ds_filled"][0].arrive()
            yield DONE
            if self.SHARED:
                yield from self.wait("ds_filled", 0, on.filled_phase(step, 1))
            for c in keys:
                slots["ds"][c].start_read(("ds", at))
                slots["k"][c].start_read(("k", c))
            yield DONE
            q.end_read()
            do.end_read()
            bars["freed"][slot].arrive()
            yield DONE
            for c in keys:
                slots["ds"][c].end_read()
                slots["k"][c].end_read()
            if self.SHARED:
                bars["ds_freed"][0].arrive()
                yield from self.wait("dq_freed", C, freed)
            store(slots["dq"][C], ("dq", at))
            bars["dq_filled"][C].arrive()
        if self.SHARED:
            yield from self.wait("ds_freed at the end", 0, on.freed_phase(len(self.steps), 1))
        store(slots["k"][C], ("dk", C))
        bars["dkdv_filled"][C].arrive()


ROW_WALKS = [(shape.row_walk(n), 1 + n // 128 % 3) for shape in shapes(40, 400) for n in range(0, shape.Sk, 128)]


@pytest.mark.parametrize("SHARED", [False, True])
def test_the_backward_neither_hangs_nor_loses_a_block(SHARED):
    for seed, (walk, group) in enumerate(ROW_WALKS):
        backward = Backward(walk, group, SHARED)
        backward.run(seed)
        assert backward.added == [(c, at) for at in backward.steps for c in range(2)]


# --- mutants ---------------------------------------------------------------------------------------------------------


def caught(run: Callable[..., None], walks: list[Any]) -> bool:
    for seed, walk in enumerate(walks):
        try:
            run(walk, seed)
        except Broken:
            return True
    return False


MUTANTS = {
    "a phase that flips a round late": {"filled_phase": lambda step, STAGES: (step // (2 * STAGES)) & 1},
    "a ring of one slot more than there are": {"filled_phase": lambda step, STAGES: (step // (STAGES + 1)) & 1},
    "an untouched slot that is waited for": {"freed_phase": lambda step, STAGES: (step // STAGES) & 1},
    "both begin with the turn": {"turn_phase": lambda step, C: step & 1},
    "nobody begins": {"turn_phase": lambda step, C: (step + 1) & 1},
    "keys and values of other slots": {"slot_of": lambda step, STAGES: (step // 2) & (STAGES - 1)},
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_model_catches_wrong_arithmetic(mutant):
    on = plain(tiles, schedule, **MUTANTS[mutant])
    in_turns = True

    def run(walk: schedule.Walk, seed: int) -> None:
        nonlocal in_turns
        forward = Forward(walk, 2, on)
        forward.run(seed)
        in_turns &= forward.issuing == [(step, C) for step in range(1, walk.count) for C in range(2)]

    assert caught(run, WALKS) or not in_turns


@pytest.mark.parametrize("without", ["k_freed", "v_freed", "k_filled", "v_filled", "q_filled", "o_filled"])
def test_the_model_catches_a_missing_wait(without):
    assert caught(lambda walk, seed: Forward(walk, 2, without=without).run(seed), WALKS)


@pytest.mark.parametrize("SHARED", [False, True])
@pytest.mark.parametrize("mutant", ["filled_phase", "freed_phase", "slot_of"])
def test_the_model_of_the_backward_catches_wrong_arithmetic(mutant, SHARED):
    wrong = {"slot_of": lambda step, STAGES: (step // 2) & (STAGES - 1)}
    wrong |= {name: lambda step, STAGES: (step // (STAGES + 1)) & 1 for name in ("filled_phase", "freed_phase")}
    on = plain(tiles, schedule, **{mutant: wrong[mutant]})
    assert caught(lambda walk, seed: Backward(*walk, SHARED, on).run(seed), ROW_WALKS)


WAITS = ("kv_filled", "q_filled", "do_filled", "freed", "dq_filled", "dq_freed", "dkdv_filled")


@pytest.mark.parametrize(
    "without, SHARED",
    [(name, SHARED) for name in WAITS for SHARED in (False, True)]
    + [(name, True) for name in ("ds_filled", "ds_freed", "ds_freed at the end")],
)
def test_the_model_of_the_backward_catches_a_missing_wait(without, SHARED):
    assert caught(lambda walk, seed: Backward(*walk, SHARED, without=without).run(seed), ROW_WALKS)


# --- the choice ------------------------------------------------------------------------------------------------------


def tensors(D: int = 128, S: int = 64, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    return [torch.zeros(2, S, H, D, dtype=dtype).transpose(1, 2) for H in (8, 2, 2)]


@pytest.fixture
def on_hopper(monkeypatch):
    """As if the tensors' device were one."""
    monkeypatch.setattr(choice, "arch_of", lambda _: "sm_90")
    monkeypatch.setattr(choice, "HAS_GLUON", True)
    monkeypatch.setattr(choice, "_failed", {})


def test_it_is_off_until_it_is_switched_on(on_hopper):
    assert "opt-in" in choice.choose("forward", None, None, None, *tensors())
    assert not choice.wanted("forward")
    with lk.hopper_attention():
        assert choice.wanted("forward") and choice.choose("forward", None, None, None, *tensors()).width == 128
        with lk.hopper_attention(False):
            assert not choice.wanted("forward")
    assert not choice.wanted("forward")


@pytest.mark.parametrize("D, width", [(40, 64), (64, 64), (80, 128), (96, 128), (128, 128), (192, 256), (256, 256)])
def test_narrower_heads_take_the_next_width(D, width, on_hopper):
    with lk.hopper_attention():
        assert choice.choose("forward", None, None, None, *tensors(D)).width == width


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
        assert why in choice.choose("forward", None, None, None, *made())
        bound = torch.zeros(2, 64, dtype=torch.int32)
        assert "kv_start" in choice.choose("forward", bound, None, None, *tensors())


def test_no_other_device_is_ever_asked(monkeypatch):
    with lk.hopper_attention():
        assert "not Hopper" in choice.choose("forward", None, None, None, *tensors())
        monkeypatch.setattr(choice, "arch_of", lambda _: "sm_90")
        monkeypatch.setattr(choice, "HAS_GLUON", False)
        monkeypatch.setattr(choice, "WHY_NOT", "no Gluon here")
        assert choice.choose("forward", None, None, None, *tensors()) == "no Gluon here"
        q, k, v = tensors(64)
        assert lk.attention(q, k, v).shape == q.shape


def test_a_kernel_that_fails_is_told_once_and_not_tried_again(on_hopper):
    q, k, v = tensors()
    call = (q, k, v, None, None, None, None, None, 64, 64, 0.1, None, None, 0)
    failing = mock.Mock(side_effect=RuntimeError("PassManager::run failed\nat length"))
    with lk.hopper_attention(), mock.patch.object(hopper, "launch_hopper_forward", failing):
        with pytest.warns(UserWarning, match="portable kernel.*PassManager::run failed$"):
            assert hopper.try_forward(*call) is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert hopper.try_forward(*call) is None
        assert "PassManager" in choice.choose("forward", None, None, None, q, k, v)
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
    out, lse = launch_forward(q, k, v, *rest)
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
        mock.patch.object(choice, "_failed", {}),
    ):
        grads = launch_backward(out, None, q, k, v, out, lse, *rest, True, True, True, False, False)
        assert not choice._failed
    assert padded == [0]
    expected = torch.where(owned.view(-1, *[1] * (q.ndim - 1)), by_token(total) * 0.1, 0.0).to(q.dtype)
    assert (by_token(grads[0]).float() - expected.float()).abs().max() <= 2e-3  # a rounding of the interpreter's
    assert (grads[1] == 1).all() and (grads[2] == 2).all()


@pytest.mark.parametrize("deterministic, taken", [(True, False), (None, False), (False, True)])
def test_gradients_that_must_repeat_are_left_to_the_portable_kernels(deterministic, taken, on_hopper):
    """None asks PyTorch, which every test here has told to be deterministic."""
    q, k, v = tensors()
    with lk.hopper_attention():
        tile = hopper.backward_tile(q, q, k, v, None, None, None, deterministic, True, True, True)
        assert (tile is not None) == taken
        assert hopper.backward_tile(q, q, k, v, None, None, None, False, True, True, False) is None
        assert hopper.backward_tile(q, q, k, v, None, None, 30.0, False, True, True, True) is None
