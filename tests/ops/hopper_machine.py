"""A machine that runs the Hopper kernels on a CPU: their own Python, with the hardware they talk to played by PyTorch.

Triton's interpreter knows no Gluon. But a Gluon kernel is a Python function of the names it calls, and the kernels of
llama_kernels call few: so `run` gives their functions other globals, under which a tile is a tensor, a warp group a
thread, and every copy and product happens at some moment, drawn by chance, between its issue and the wait for it. What
the kernels' schedule does not forbid therefore happens: it hangs, reads a tile too early, or overwrites one that is
still read. Then `Broken` is raised, or the numbers are wrong.

What it has of the hardware: mbarriers with their phases and bytes; the copy engine's addresses, modulo 2^64, and its
bounds; the order of a warp group's products; that what is written into shared memory, tensor cores and copy engine see
only behind a fence. What it has not: registers, layouts, threads within a warp group, time.
"""

from __future__ import annotations

import contextlib
import random
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from llama_kernels.ops.attention import tiles
from llama_kernels.ops.attention.hopper import backward, descriptors, forward, schedule
from tests.support.hardware import EXACT, Arithmetic
from tests.support.launches import record

_MODULES = (tiles, descriptors, schedule, forward, backward)


class Broken(AssertionError):
    """The schedule hung, or lost data."""


class Barrier:
    """An mbarrier: a phase is over after so many arrivals, and after the bytes it was told to expect."""

    def __init__(self, name: str, arrivals: int) -> None:
        self.name, self.arrivals, self.missing = name, arrivals, arrivals
        self.bytes = self.over = 0

    def arrive(self, expected: int = 0, landed: int = 0) -> None:
        self.bytes += expected - landed
        self.missing -= not landed
        if self.missing < 0:
            raise Broken("an arrival too many")
        if self.missing == self.bytes == 0:
            self.over, self.missing = self.over + 1, self.arrivals

    def passes(self, phase: int) -> bool:
        """Whether a wait for `phase` returns: the phase under way is of the other parity."""
        return self.over % 2 != phase


# --- values ----------------------------------------------------------------------------------------------------------


class Int(int):
    """What a kernel holds in a scalar register."""

    def to(self, _: torch.dtype) -> Int:
        return self


class Tile(torch.Tensor):
    """What a warp group holds in registers. Its layout is nobody's business here."""

    type = types.SimpleNamespace(layout=None)

    def __truediv__(self, other: Any) -> Tile:
        return tile(_arithmetic.divide(plain(self), plain(other)))

    def __rtruediv__(self, other: Any) -> Tile:
        return tile(_arithmetic.divide(plain(other), plain(self)))


def tile(x: torch.Tensor) -> Tile:
    return x.as_subclass(Tile)


def plain(x: Any) -> torch.Tensor:
    return x.as_subclass(torch.Tensor) if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=torch.float32)


_arithmetic = EXACT


@contextlib.contextmanager
def computing_by(arithmetic: Arithmetic) -> Iterator[None]:
    """Inside, exp2, log2 and divisions of the kernels are those of `arithmetic`."""
    global _arithmetic
    before, _arithmetic = _arithmetic, arithmetic
    try:
        yield
    finally:
        _arithmetic = before


class Pointer:
    """Into the storage of a tensor, by elements."""

    def __init__(self, x: torch.Tensor, at: Any = None) -> None:
        self.x, self.at = x, x.storage_offset() if at is None else at

    def __add__(self, by: Any) -> Pointer:
        return Pointer(self.x, self.at + by)

    @property
    def memory(self) -> torch.Tensor:
        return self.x.as_strided((self.x.untyped_storage().nbytes() // self.x.element_size(),), (1,), 0)


class Shared:
    """Shared memory, or a part of it seen in some shape; `unseen` marks what was written and not fenced yet."""

    def __init__(self, data: torch.Tensor, unseen: torch.Tensor) -> None:
        self.data, self.unseen = data, unseen
        self.shape, self.dtype = list(data.shape), data.dtype

    def _of(self, view: Callable[[torch.Tensor], torch.Tensor]) -> Shared:
        return Shared(view(self.data), view(self.unseen))

    def index(self, i: int) -> Shared:
        if not 0 <= i < self.shape[0]:
            raise Broken(f"slot {i} of {self.shape[0]}")
        return self._of(lambda x: x[i])

    def reshape(self, shape: list[int]) -> Shared:
        return self._of(lambda x: x.view(shape))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return self._of(lambda x: x.permute(order))

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return self._of(lambda x: x.narrow(dim, start, length))

    def load(self, _: Any) -> Tile:
        return tile(self.data.clone())

    def store(self, value: torch.Tensor) -> None:
        if value.dtype != self.dtype:
            raise Broken(f"{value.dtype} is stored as {self.dtype}")
        self.data.copy_(value)
        self.unseen.fill_(True)
        _machine.role().written.append(self.unseen)

    def seen(self) -> torch.Tensor:
        """As the tensor cores and the copy engine find it."""
        if self.unseen.any():
            raise Broken("shared memory is read without a fence behind what was written there")
        return self.data


class Descriptor:
    """Gluon's TensorDescriptor, and what a copy by it touches."""

    def __init__(self, x: torch.Tensor, shape: list[int], strides: list[int], block_shape: list[int], layout: Any):
        size = x.element_size()
        assert x.data_ptr() % 16 == 0 and len(shape) == len(strides) == len(block_shape) <= 5
        assert strides[-1] == 1 and all(s * size % 16 == 0 and 0 < s * size < 2**40 for s in strides[:-1])
        assert all(0 < n < 2**31 for n in shape) and all(n <= 256 for n in block_shape)
        assert all(n == 1 for n in block_shape[:-2])
        self.x, self.extent, self.strides, self.block_shape, self.layout = x, shape, strides, block_shape, layout
        self.dtype = x.dtype
        self.block_type = types.SimpleNamespace(nbytes=block_shape[-2] * block_shape[-1] * size)

    def at(self, coordinates: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The memory, the place of each element of the tile in it, and whether that is inside of the tensor."""
        assert all(-(2**31) <= c < 2**31 for c in coordinates) and len(coordinates) == len(self.extent)
        size = self.x.element_size()
        base, inside = 0, True
        for c, n, s in zip(coordinates[:-2], self.extent, self.strides, strict=False):
            base, inside = base + c * s * size, inside and 0 <= c < n
        rows, columns = (c + torch.arange(n) for c, n in zip(coordinates[-2:], self.block_shape[-2:], strict=True))
        there = ((rows >= 0) & (rows < self.extent[-2]))[:, None] & ((columns >= 0) & (columns < self.extent[-1]))
        # Only the first row's address may wrap: from there on, plain steps.
        first = (base + coordinates[-2] * self.strides[-2] * size + 2**63) % 2**64 - 2**63
        places = first // size + (rows - coordinates[-2])[:, None] * self.strides[-2] + columns
        places = self.x.storage_offset() + places
        return Pointer(self.x).memory, places, there & inside

    def load(self, coordinates: tuple[int, ...]) -> torch.Tensor:
        memory, places, there = self.at(coordinates)
        out = torch.zeros(there.shape, dtype=self.dtype)
        out[there] = memory[places[there]]
        return out

    def store(self, coordinates: tuple[int, ...], value: torch.Tensor, add: bool = False) -> None:
        memory, places, there = self.at(coordinates)
        memory[places[there]] = value[there] + (memory[places[there]] if add else 0)


# --- the machine -----------------------------------------------------------------------------------------------------


class Product:
    """A product under way; its value comes when it is done."""

    def __init__(self, compute: Callable[[], torch.Tensor]) -> None:
        self.compute, self.value = compute, None

    def finish(self) -> None:
        if self.value is None:
            self.value = self.compute()


class Role:
    """A warp group at work: what it waits for, and what it has under way."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.go, self.waits_for, self.error, self.done = threading.Semaphore(0), None, None, False
        self.products: list[Product] = []
        self.stores: list[Callable[[], None]] = []
        self.written: list[torch.Tensor] = []
        self.thread = threading.Thread(target=self._work, args=(work,), daemon=True)

    def _work(self, work: Callable[[], None]) -> None:
        self.go.acquire()
        try:
            with torch.no_grad():
                work()
        except BaseException as error:
            self.error = error
        self.done = True
        _machine.back.release()

    def ready(self) -> bool:
        return not self.done and (self.waits_for is None or self.waits_for[0].passes(self.waits_for[1]))


class Machine:
    """One program at a time. `without` names barriers that nobody waits for: a planted fault."""

    def __init__(self, seed: int = 0, without: str = "") -> None:
        self.chance, self.without = random.Random(seed), without
        self.speed = self.chance.choice((0.05, 0.4, 0.9))  # of copies and products, against the warp groups'
        self.back = threading.Semaphore(0)
        self.barriers: dict[int, Barrier] = {}
        self.copies: list[Callable[[], None]] = []
        self.roles: list[Role] = []
        self.current: Role | None = Role(lambda: None)
        self.pid = self.programs = 0
        self.events: list[tuple[str, Any]] = []

    def role(self) -> Role:
        return self.current

    def run(self, works: list[Callable[[], None]]) -> None:
        outside, self.roles = self.current, [Role(work) for work in works]
        for role in self.roles:
            role.thread.start()
        while any(not role.done for role in self.roles):
            ready, under_way = [role for role in self.roles if role.ready()], list(self.copies)
            for role in self.roles:
                under_way += role.products[:1] + role.stores[:1]
            if not ready and not under_way:
                raise Broken("it hangs")
            # Some machines are slow to copy, some to compute, and all now and then let one warp group run ahead.
            if not ready or (under_way and self.chance.random() < self.speed):
                move = self.chance.choice(under_way)
            else:
                move = (
                    self.current if self.current in ready and self.chance.random() < 0.7 else self.chance.choice(ready)
                )
            if isinstance(move, Role):
                self.current = move
                move.go.release()
                self.back.acquire()
                if move.error:
                    raise move.error
            elif isinstance(move, Product):
                self._finish(next(role for role in self.roles if move in role.products[:1]), 1)
            elif move in self.copies:
                self.copies.remove(move)
                move()
            else:
                next(role for role in self.roles if move in role.stores[:1]).stores.pop(0)()
        if self.copies:
            raise Broken("a copy lands after the end")
        for role in self.roles:
            if role.stores:
                raise Broken("shared memory is given up while it is being stored")
        self.current = outside

    def _finish(self, role: Role, count: int) -> None:
        for product in role.products[:count]:
            product.finish()
        del role.products[:count]

    def pause(self, waits_for: tuple[Barrier, int] | None = None) -> None:
        role = self.current
        if role not in self.roles:  # before the roles part, one thread runs
            return
        role.waits_for = waits_for
        self.back.release()
        role.go.acquire()
        role.waits_for = None


_machine = Machine()


# --- the language ----------------------------------------------------------------------------------------------------


def _pair(function: Callable[..., Any], on_ints: Callable[..., Any]) -> Callable[..., Any]:
    def either(a: Any, b: Any) -> Any:
        if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
            return tile(function(*(x if isinstance(x, torch.Tensor) else torch.tensor(x) for x in (a, b))))
        return Int(on_ints(a, b))

    return either


def _load(pointer: Pointer) -> Any:
    value = pointer.memory[pointer.at]
    return Int(value) if not value.dtype.is_floating_point and not value.ndim else tile(value)


def _store(pointer: Pointer, value: torch.Tensor, mask: torch.Tensor) -> None:
    pointer.memory[pointer.at[mask]] = value[mask]


def _static_range(n: int) -> range:
    return range(n)


def _allocate(dtype: torch.dtype, shape: list[int], _: Any) -> Shared:
    data = torch.zeros(shape, dtype=dtype)
    if dtype.is_floating_point:
        data.fill_(torch.nan)
    return Shared(data, torch.zeros(shape, dtype=torch.bool))


def _specialize(
    parts: list[tuple[Callable[..., Any], tuple[Any, ...]]], warps: list[int], registers: list[int]
) -> None:
    assert len(parts) == len(warps) + 1 == len(registers) + 1
    assert 128 * sum(registers[i] for i in range(len(warps)) if warps[i] == 4) + 128 * 24 + 128 * 240 <= 65536
    _machine.run([lambda function=function, args=args: function(*args) for function, args in parts])


class _Language(types.SimpleNamespace):
    """Layouts are asked for and passed on; nothing here looks at them."""

    def __getattr__(self, name: str) -> Any:
        if name.endswith("Layout"):
            return _LAYOUT
        raise AttributeError(name)


_LAYOUT = type("Layout", (), {"__call__": lambda self, *_: self, "get_default_for": lambda self, *_: self})()
_DTYPES = {str(d)[6:]: d for d in (torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64)}
_LANGUAGE = _Language(
    **_DTYPES,
    constexpr=lambda value: value,
    program_id=lambda _: Int(_machine.pid),
    num_programs=lambda _: Int(_machine.programs),
    static_range=_static_range,
    range=lambda begin, end, **_: range(begin, end),
    cast=lambda value, _: Int(value),
    cdiv=lambda a, b: Int(-(-a // b)),
    minimum=_pair(torch.minimum, min),
    maximum=_pair(torch.maximum, max),
    abs=torch.abs,
    exp2=lambda x: tile(_arithmetic.exp2(plain(x))),
    log2=lambda x: tile(_arithmetic.log2(plain(x))),
    where=lambda see, a, b: tile(torch.where(see, a, b)),
    max=lambda x, axis: x.amax(axis),
    sum=lambda x, axis: x.sum(axis),
    zeros=lambda shape, dtype, _: tile(torch.zeros(shape, dtype=dtype)),
    zeros_like=torch.zeros_like,
    full=lambda shape, value, dtype, _: tile(torch.full(shape, value, dtype=dtype)),
    arange=lambda begin, end, _: tile(torch.arange(begin, end)),
    expand_dims=lambda x, axis: x.unsqueeze(axis),
    convert_layout=lambda x, _: x,
    load=_load,
    store=_store,
    allocate_shared_memory=_allocate,
    warp_specialize=_specialize,
)


def _barrier(at: Shared) -> Barrier:
    return _machine.barriers[at.data.data_ptr()]


def _init(at: Shared, count: int) -> None:
    _machine.barriers[at.data.data_ptr()] = Barrier("", count)


def _wait(at: Shared, phase: int, pred: bool = True) -> None:
    barrier = _barrier(at)
    if pred and barrier.name != _machine.without:
        _machine.pause((barrier, phase))


def _arrive(at: Shared, count: int = 1) -> None:
    _machine.pause()
    _barrier(at).arrive()


def _expect(at: Shared, nbytes: int) -> None:
    _barrier(at).arrive(expected=nbytes)


def _tma_load(desc: Descriptor, at: tuple[int, ...], bar: Shared, into: Shared) -> None:
    assert into.shape == desc.block_shape
    into.data.fill_(torch.nan)  # from here on it is neither what it was nor what it will be
    value, barrier = desc.load(at).view(into.shape), _barrier(bar)

    def land() -> None:
        into.data.copy_(value)
        barrier.arrive(landed=desc.block_type.nbytes)

    _machine.copies.append(land)


def _tma_store(desc: Descriptor, at: tuple[int, ...], what: Shared, add: bool = False) -> None:
    assert what.shape == desc.block_shape
    store = lambda: desc.store(at, what.seen().view(desc.block_shape[-2:]), add)  # noqa: E731
    _machine.role().stores.append(store)


def _store_wait(pending: int) -> None:
    role = _machine.role()
    while len(role.stores) > pending:
        role.stores.pop(0)()


def _fence() -> None:
    role = _machine.role()
    for unseen in role.written:
        unseen.fill_(False)
    role.written.clear()


def _mma(a: Any, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False) -> Product:
    assert is_async
    acc = acc.clone() if isinstance(acc, torch.Tensor) else acc

    def compute() -> torch.Tensor:
        left = a.seen() if isinstance(a, Shared) else a
        assert left.dtype == b.dtype != torch.float32
        product = left.float() @ b.seen().float()
        if use_acc:
            product = product + (acc.value if isinstance(acc, Product) else acc)
        return tile(product)

    product = Product(compute)
    _machine.role().products.append(product)
    return product


def _mma_wait(pending: int, deps: tuple[Any, ...]) -> Any:
    _machine.pause()
    role = _machine.role()
    _machine._finish(role, max(len(role.products) - pending, 0))
    values = tuple(x.value if isinstance(x, Product) else x for x in deps)
    if any(x is None for x in values):
        raise Broken("a product is used before it is waited for")
    return values[0] if len(values) == 1 else values


_FAKES = {
    "gl": _LANGUAGE,
    "tl": _LANGUAGE,
    "min": min,
    "max": max,
    "mbarrier": types.SimpleNamespace(
        MBarrierLayout=lambda: None, init=_init, wait=_wait, arrive=_arrive, expect=_expect
    ),
    "tma": types.SimpleNamespace(store_wait=_store_wait),
    "tma_load": _tma_load,
    "tma_store": _tma_store,
    "tma_add": lambda desc, at, what: _tma_store(desc, at, what, add=True),
    "fence_async_shared": _fence,
    "warpgroup_mma": _mma,
    "warpgroup_mma_wait": _mma_wait,
    "TensorDescriptor": Descriptor,
    "_ROWS": type("Rows", (int,), {"value": 2**30})(2**30),
}


def _named(barriers: Any) -> Callable[..., Any]:
    """The kernel's NamedTuple of barriers, which tells each barrier its name."""

    def make(*fields: Shared) -> Any:
        made = barriers(*fields)
        for name, slots in zip(made._fields, made, strict=True):
            for i in range(slots.shape[0]):
                _barrier(slots.index(i)).name = name
        return made

    return make


def functions(**replaced: Any) -> dict[types.ModuleType, dict[str, Any]]:
    """The globals under which each module's functions run here; `replaced` stands in for functions of that name."""
    spaces: dict[str, dict[str, Any]] = {module.__name__: {} for module in _MODULES}
    for module in _MODULES:
        space = spaces[module.__name__]
        for name, value in vars(module).items():
            function = getattr(value, "fn", value)
            on_device = isinstance(function, types.FunctionType) and not function.__closure__  # a plan has one
            if on_device and function.__module__ in spaces:
                inside = spaces[function.__module__]
                value = types.FunctionType(function.__code__, inside, name, function.__defaults__)
            space[name] = getattr(value, "value", value) if type(value).__name__ == "constexpr" else value
        space.update(_FAKES)
        if "Barriers" in space:
            space["Barriers"] = _named(space["Barriers"])
        space.update((name, value) for name, value in replaced.items() if name in space)
    return {module: spaces[module.__name__] for module in _MODULES}


class Launcher:
    """Stands for a kernel of `module`: `kernel[(programs,)](...)` runs it, one program after the other."""

    def __init__(self, space: dict[str, Any], name: str, seed: int, without: str = "") -> None:
        self.kernel, self.name, self.seed, self.without, self.launches = space[name], name, seed, without, 0

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, enable_fp_fusion: bool, **constants: Any) -> None:
            global _machine
            assert num_warps == 4
            self.launches += 1
            record(self.name, constants | {"num_warps": num_warps})
            args = [Pointer(x) if isinstance(x, torch.Tensor) else x for x in args]
            for pid in range(grid[0]):
                _machine = Machine(self.seed + pid, self.without)
                _machine.pid, _machine.programs = pid, grid[0]
                with torch.no_grad():
                    self.kernel(*args, **constants)

        return launch


def patches(seed: int = 0, without: str = "", **replaced: Any) -> Iterator[tuple[Any, str, Any]]:
    """(object, attribute, value): under these the two launchers run their kernels on this machine."""
    spaces = functions(**replaced)
    for module, kernel in ((forward, "_hopper_forward_kernel"), (backward, "_hopper_backward_kernel")):
        yield module, kernel, Launcher(spaces[module], kernel, seed, without)
        yield module, "describe", spaces[descriptors]["describe"]
    yield backward, "describe_rows", spaces[descriptors]["describe_rows"]
