"""Faults planted in the launch cache, each with the scenario that must find it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import pytest

from llama_kernels.core import launch_cache
from tests.contracts.launcher import scenarios
from tests.contracts.launcher.compare import Comparisons
from tests.contracts.launcher.substitute import current_stream, state


class Mutant(NamedTuple):
    fault: str
    found_by: Callable[[Comparisons], None]
    text: str  # of launch_cache.py
    instead: str


MUTANTS_OF_DESCRIPTORS = (
    Mutant("descriptors describe the first call's tensors", scenarios.descriptors, "args[source])\n",
           "filled[place].base if filled[place].base is not None else args[source])\n"
           "                        found[0].args[place] = filled[place]\n"),
    Mutant("descriptors change places", scenarios.descriptors, "for place, source in descriptor_slots:",
           "for (place, _), (_, source) in zip(descriptor_slots, descriptor_slots[::-1]):"),
)  # fmt: skip
MUTANTS = (
    Mutant("numbers are not in the key", scenarios.numbers, "others_of(args), float", "float"),
    Mutant("floats are not in the key", scenarios.numbers, "float_bytes_of(args), args", "args"),
    Mutant("types are not in the key", scenarios.numbers, "key = [number, ", "key = ["),
    Mutant("0.0 is -0.0", scenarios.numbers, "lambda args: pack(*floats_of(args))", "floats_of"),
    Mutant("the key is without alignments", scenarios.alignments, "x.data_ptr() % 16", "0"),
    Mutant("the key has alignments to 8", scenarios.alignments, "x.data_ptr() % 16", "x.data_ptr() % 8"),
    Mutant("the key is without dtypes", scenarios.dtypes, "x.dtype, ", ""),
    Mutant("the key is without strides", scenarios.shapes_and_strides, "x.stride(), ", ""),
    Mutant("the key is without shapes", scenarios.shapes_and_strides, "(x.shape, ", "("),
    Mutant("the key is without the device", scenarios.devices, ", args[0].get_device()]", "]"),
    Mutant("launches are on the current device", scenarios.devices, "with on_device_of(args[0]):", "if True:"),
    Mutant("one tensor in two places is two", scenarios.one_tensor_twice,
           "len({*map(id, tensors)}) < len(tensors)", "False"),
    Mutant("tensors change places", scenarios.repeats, "for place, source in tensor_slots:",
           "for (place, _), (_, source) in zip(tensor_slots, tensor_slots[::-1]):"),
    Mutant("the first call's tensors stay", scenarios.repeats,
           "filled[place] = None if tensor is x else", "tensor_slots, filled[place] = [], x if tensor is x else"),
    Mutant("absent tensors are dropped", scenarios.absent_tensors,
           "filled = [*each.args,", "filled = [*(x for x in each.args if x is not None),"),
    Mutant("the second kernel is not launched", scenarios.repeats, "in found:", "in found[:1]:"),
    Mutant("the arguments are shared by threads", scenarios.threads, "filled = filled.copy()", "pass"),
    Mutant("tensors are kept alive", scenarios.collected_inputs, "filled[place] = None if tensor is x else",
           "filled[place] = x if tensor is x else"),
    Mutant("tensors inside tuples are cached", scenarios.tensors_in_tuples,
           "return isinstance(x, tuple) and", "return False and"),
    Mutant("floats in named tuples are not in the key", scenarios.named_tuples, "float_bytes_of(args), args", "args"),
    Mutant("inner named tuples are not expanded", scenarios.named_tuples,
           "while signature.expand:", "if signature.expand:"),
    Mutant("the stream is that of the first call", scenarios.streams,
           "_Bound(compiled[(*each.grid, 1, 1)[:3]],",
           "_Bound(functools.partial(compiled[(*each.grid, 1, 1)[:3]], stream=_current_stream()),"),
    Mutant("nothing is forgotten", scenarios.knob, "        cache.clear()\n\n\nclass", "        pass\n\n\nclass"),
    Mutant("launchers share a cache", scenarios.two_launchers, "_caches.append(cache)",
           "_caches.append(cache)\n    cache = _caches[0]"),
    Mutant("the cache has no bound", scenarios.many_keys, "if len(cache) >= MAX_KEYS", "if False"),
)  # fmt: skip


def module_with(mutant: Mutant) -> ModuleType:
    """launch_cache.py with the fault."""
    with open(launch_cache.__file__) as file:
        source = file.read()
    if mutant.text not in source:
        raise ValueError(f"launch_cache.py does not contain {mutant.text!r}: change this mutant with it.")
    module = ModuleType("llama_kernels.core.launch_cache_with_a_fault")
    module._current_stream = lambda: current_stream(state.current)
    exec(compile(source.replace(mutant.text, mutant.instead), launch_cache.__file__, "exec"), vars(module))
    return module


def check_found(mutant: Mutant) -> None:
    comparing = Comparisons(cache=module_with(mutant))
    comparing.install()
    try:
        # A launch that differs, or what Triton's launcher or the driver refuses.
        with warnings.catch_warnings(), pytest.raises((AssertionError, TypeError, RuntimeError)) as found:
            warnings.simplefilter("error", UserWarning)  # that a kernel failed and another one was taken
            mutant.found_by(comparing)
            comparing.check()
    finally:
        comparing.remove()
    print(f"{mutant.fault}: {found.type.__name__} {found.value}")
