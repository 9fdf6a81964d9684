"""Sequences of calls that a launch cache may confuse. Each takes `Comparisons`, and makes launches that it compares.

The checks run them with the package's launch cache and with faults planted in it, which they must find. Kernels are
declared, not compiled.
"""

from __future__ import annotations

import gc
import itertools
import math
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
import triton.language as tl
from triton import knobs

import llama_kernels as lk
from llama_kernels.core.launch_cache import Launch
from tests.contracts.launcher import cases
from tests.contracts.launcher.compare import Comparisons
from tests.contracts.launcher.substitute import on_stream, state, tensors_on


@triton.jit
def _kernel(x_ptr, y_ptr, z_ptr, strides, number, FLAG: tl.constexpr, BLOCK: tl.constexpr):
    pass


def _launches(x, y, z, number, flag) -> list[Launch]:
    options = {"FLAG": flag, "BLOCK": 16, "num_warps": 1}
    return [Launch(_kernel, (x.shape[0],), (x, y, z, x.stride(), number), options)]


def launcher(comparisons: Comparisons) -> Callable[..., None]:
    """A launcher of the tests' own: launcher(x, y, z, number, flag), y and z optional."""
    return comparisons.compared("tests._launches", comparisons.cache.cached_launch(_launches))


def tensor(*shape: int, dtype: torch.dtype = torch.float32, shift: int = 0) -> torch.Tensor:
    """Its address is a multiple of 64 bytes, and `shift` elements."""
    count = math.prod(shape)
    return torch.empty(count + shift, dtype=dtype)[shift:].view(shape)


def in_turns(call: Callable[[Any], None], choices: tuple[Any, ...]) -> None:
    """Each ordered pair of the choices, one after the other, after each was called often enough to be cached."""
    for choice in choices:
        for _ in range(2):
            call(choice)
    for pair in itertools.permutations(choices, 2):
        for choice in pair:
            call(choice)


# --- what a cache key must hold --------------------------------------------------------------------------------------

NUMBERS = (
    1, 1.0, True, 0, 0.0, -0.0, False, 2, 2.0, 16, 17, -1, -16, 2**31 - 1, 2**31, 2**40, -(2**31) - 1, 0.1, -0.1,
    math.inf, -math.inf, math.nan, None,
)  # fmt: skip


def numbers(comparisons: Comparisons) -> None:
    """Numbers that compare equal are of several types, and 0.0 has a sign."""
    call = launcher(comparisons)
    in_turns(lambda number: call(tensor(4, 4), None, None, number, 0), NUMBERS)


def constants(comparisons: Comparisons) -> None:
    call = launcher(comparisons)
    in_turns(lambda flag: call(tensor(4, 4), None, None, 1.0, flag), (0, 1, False, True, 1.0, 0.0, -0.0, None, "text"))


def alignments(comparisons: Comparisons) -> None:
    call = launcher(comparisons)
    in_turns(lambda i: call(tensor(4, 4, shift=i), tensor(4, shift=4 - i), None, 1.0, 0), (0, 1, 2, 3, 4))


def dtypes(comparisons: Comparisons) -> None:
    call = launcher(comparisons)
    choices = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int64, torch.bool)
    in_turns(lambda dtype: call(tensor(4, 4, dtype=dtype), None, tensor(4), 1.0, 0), choices)
    in_turns(lambda dtype: call(tensor(4, 4), tensor(4, dtype=dtype), None, 1.0, 0), choices)


def shapes_and_strides(comparisons: Comparisons) -> None:
    call = launcher(comparisons)
    choices = (
        tensor(4, 4), tensor(4, 16), tensor(16, 4), tensor(4, 4).t(), tensor(4, 64)[:, ::16], tensor(4, 1),
        tensor(1, 4), tensor(4, 1).expand(4, 4), tensor(4), tensor(4, 4, 4), tensor(4, 2**16)[:, :4],
    )  # fmt: skip
    in_turns(lambda x: call(x, None, None, 1.0, 0), choices)


def absent_tensors(comparisons: Comparisons) -> None:
    call = launcher(comparisons)
    y, z = tensor(4), tensor(4)
    in_turns(lambda given: call(tensor(4, 4), *given, 1.0, 0), ((None, None), (y, None), (None, z), (y, z)))


def one_tensor_twice(comparisons: Comparisons) -> None:
    """One tensor for two arguments, then a tensor for each; two tensors at one address."""
    call = launcher(comparisons)
    x, y = tensor(4, 4), tensor(4, 4)
    choices = ((x, x, x), (x, y, x), (x, x, y), (x, y, y), (y, x, x), (x, x.view(4, 4), y), (x, y, None), (x, x, None))
    in_turns(lambda given: call(*given, 1.0, 0), choices)


def tensors_in_tuples(comparisons: Comparisons) -> None:
    """A launcher that takes a tuple of tensors, and one that launches with such a tuple: neither is cached."""

    def takes(x: torch.Tensor, pair: tuple[torch.Tensor, ...]) -> list[Launch]:
        return _launches(x, *pair, 1.0, 0)

    def gives(x: torch.Tensor, y: torch.Tensor) -> list[Launch]:
        return [Launch(_kernel, (1,), (x, None, None, (y, y), 1.0), {"FLAG": 0, "BLOCK": 16, "num_warps": 1})]

    taking, giving = (comparisons.compared("tests", comparisons.cache.cached_launch(each)) for each in (takes, gives))
    for _ in range(4):
        taking(tensor(4, 4), (tensor(4), tensor(4)))
        giving(tensor(4, 4), tensor(4))


class _Number(NamedTuple):
    number: Any


class _Inputs(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor | None
    inner: _Number


class _Output(NamedTuple):
    z: torch.Tensor | None


def named_tuples(comparisons: Comparisons) -> None:
    """Tensors and numbers inside named tuples, which are cached: the first argument, the last, and a nested tuple."""

    def launches(inputs: _Inputs, flag: int, output: _Output | torch.Tensor) -> list[Launch]:
        z = output.z if isinstance(output, _Output) else output
        return _launches(inputs.x, inputs.y, z, inputs.inner.number, flag)

    call = comparisons.compared("tests.named_tuples", comparisons.cache.cached_launch(launches))

    def call_with(given: tuple[bool, str, bool]) -> None:
        has_y, number, named = given
        y, z = tensor(4) if has_y else None, tensor(4, 4)
        call(_Inputs(tensor(4, 4), y, _Number(numbers[number])), 0, _Output(z) if named else z)
        bound = comparisons.made[-1].bound
        seen[given] = seen.get(given, 0) + 1
        if seen[given] > 2 and bound:
            raise AssertionError(f"{given}: {bound} launches of a call with named tuples are not cached")

    seen: dict[Any, int] = {}
    choices = itertools.product((True, False), ("0.0", "-0.0", "1", "1.0"), (True, False))
    numbers = {"0.0": 0.0, "-0.0": -0.0, "1": 1, "1.0": 1.0}
    in_turns(call_with, tuple(choices))


def two_launchers(comparisons: Comparisons) -> None:
    """Launchers of the same arguments, which launch other grids."""

    def another(x, y, z, number, flag) -> list[Launch]:
        return [each._replace(grid=(2, 3)) for each in _launches(x, y, z, number, flag)]

    calls = launcher(comparisons), comparisons.compared("tests.another", comparisons.cache.cached_launch(another))
    in_turns(lambda call: call(tensor(4, 4), None, None, 1.0, 0), calls)


def optional_arguments(comparisons: Comparisons) -> None:
    """Optional tensors, numbers and flags of public functions."""

    def rms_norm(options: dict[str, Any]) -> None:
        lk.rms_norm(tensor(6, 64), **options)

    weight = torch.ones(64)
    in_turns(rms_norm, ({}, {"weight": weight}, {"eps": 1.0}, {"eps": 0.0}, {"offset": 1.0}, {"offset": -0.0}))

    def attention(options: dict[str, Any]) -> None:
        lk.attention(*(cases.heads(H, grad=False) for H in (4, 2, 2)), **options)

    bound = torch.zeros(2, cases.S, dtype=torch.int32)
    in_turns(
        attention,
        (
            {}, {"is_causal": False}, {"scale": 1.0}, {"scale": -1.0}, {"scale": 0.0}, {"softcap": 1.0},
            {"window_size": (1, 0)}, {"window_size": (16, 0)}, {"window_size": (16, 1)}, {"window_size": (2**33, 0)},
            {"sinks": torch.zeros(4)}, {"kv_start": bound}, {"kv_end": bound}, {"kv_start": bound, "kv_end": bound},
            {"kv_prefix": bound}, {"kv_start": bound, "kv_prefix": bound},
        ),
    )  # fmt: skip


# --- where a launch goes ---------------------------------------------------------------------------------------------


def devices(comparisons: Comparisons) -> None:
    """Tensors on devices of two architectures; the current device is another one."""

    def call(device: int) -> None:
        with tensors_on(device):
            lk.rms_norm(tensor(6, 64), torch.ones(64))
        launched = comparisons.made[-1].cached
        assert [each.device for each in launched] == [device], launched
        assert state.current == 0

    in_turns(call, (0, 1, 2))


def streams(comparisons: Comparisons) -> None:
    """A launch is on the stream of the device that is current at that moment."""
    call = launcher(comparisons)

    def on_current(device: int) -> None:
        with tensors_on(device), on_stream(0) as first, on_stream(1) as second:
            call(tensor(4, 4), None, None, 1.0, 0)
        launched = comparisons.made[-1].cached
        assert [each.stream for each in launched] == [(first, second)[device]], launched

    for _ in range(4):
        on_current(0)
        on_current(1)
        call(tensor(4, 4), None, None, 1.0, 0)


def threads(comparisons: Comparisons) -> None:
    """Two threads make the same calls at once, and may switch at each line of the launch cache."""
    call = launcher(comparisons)
    call(tensor(4, 4), tensor(4), None, 1.0, 0)  # the kernel is loaded: Triton does not do that in two threads at once
    failed: list[BaseException] = []
    meeting = threading.Barrier(2)

    def give_way(frame: Any, event: str, _: Any) -> Any:
        if "launch" not in frame.f_code.co_filename.rsplit("/", 1)[-1]:
            return None
        time.sleep(1e-6)  # after a sleep of 0 the same thread goes on with Python 3.10
        return give_way

    def run(device: int) -> None:
        try:
            sys.settrace(give_way)
            for round in range(24):
                meeting.wait(timeout=60)
                if round == 12:
                    comparisons.cache.clear()
                with tensors_on(device if round % 2 else 0):
                    call(tensor(4, 4), tensor(4), None, float(round // 4), 0)
        except BaseException as error:
            failed.append(error)
            meeting.abort()
        finally:
            sys.settrace(None)

    running = [threading.Thread(target=run, args=(device,)) for device in (0, 1)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if failed:
        raise failed[0]


# --- what else Triton does at a launch -------------------------------------------------------------------------------


def hooks(comparisons: Comparisons) -> None:
    """A profiler's hooks are called at each launch, with what Triton tells them of it."""
    call = launcher(comparisons)
    seen: list[tuple[str, Any]] = []

    def enter(metadata: Any) -> None:
        seen.append(("enter", metadata.get()))

    def leave(metadata: Any) -> None:
        seen.append(("leave", metadata.get()))

    def once() -> None:
        call(tensor(4, 4), None, None, 1.0, 0)

    for _ in range(3):
        once()
    knobs.runtime.launch_enter_hook.add(enter)
    knobs.runtime.launch_exit_hook.add(leave)
    try:
        for _ in range(2):
            seen.clear()
            once()
            events = [event for event, _ in seen]
            assert events == ["enter", "leave"] * 2, events
            assert seen[:2] == seen[2:], seen  # the cache's launch, then Triton's
    finally:
        knobs.runtime.launch_enter_hook.remove(enter)
        knobs.runtime.launch_exit_hook.remove(leave)
    seen.clear()
    once()
    assert not seen


def knob(comparisons: Comparisons) -> None:
    """A knob changes the machine code. After `clear` the launch cache launches the new code."""
    call = launcher(comparisons)
    for debug in (False, True, False):
        with mock.patch.object(knobs.runtime, "debug", debug):
            comparisons.cache.clear()
            for _ in range(3):
                call(tensor(4, 4), None, None, 1.0, 0)


def inference_mode(comparisons: Comparisons) -> None:
    def call(inference: bool) -> None:
        with torch.inference_mode(inference):
            lk.rms_norm(torch.randn(6, 64), torch.ones(64))

    in_turns(call, (False, True))


def collected_inputs(comparisons: Comparisons) -> None:
    """Tensors are not kept alive. Others may get their addresses and ids."""
    call = launcher(comparisons)
    for _ in range(50):
        x, y = tensor(4, 4), tensor(4, 4)
        gone = weakref.ref(x), weakref.ref(y)
        call(x, y, None, 1.0, 0)
        del x, y
        gc.collect(0)
        assert [each() for each in gone] == [None, None]


def many_keys(comparisons: Comparisons) -> None:
    """More keys than the cache holds: those that it drops are bound again."""
    call, cache = launcher(comparisons), comparisons.cache._caches[-1]
    x, most = tensor(4, 4), comparisons.cache.MAX_KEYS
    for number in (*range(most + 100), 1, 2, 3):
        for _ in range(2):
            call(x, None, None, float(number), 0)
        assert len(cache) <= most


def repeats(comparisons: Comparisons) -> None:
    """Every case, on devices of two architectures; from the third call on, Triton binds nothing."""
    for device, (label, case) in itertools.product((0, 1), cases.PORTABLE.items()):
        with tensors_on(device):
            for _ in range(4):
                comparisons.check()
                case()
        assert [each.launcher for each in comparisons.made if each.bound] == [], label


def descriptors(comparisons: Comparisons) -> None:
    """Attention's Hopper kernels, which describe tensors to the copy engine. Their kernels must be compiled."""
    for _ in range(4):
        cases.hopper_rope_attention()


SCENARIOS = (
    numbers, constants, alignments, dtypes, shapes_and_strides, absent_tensors, one_tensor_twice, tensors_in_tuples,
    named_tuples, two_launchers, optional_arguments, devices, streams, threads, hooks, knob, inference_mode,
    collected_inputs, many_keys, repeats,
)  # fmt: skip
