"""Triton's cache on disk has one entry a kernel, in whatever order a program launches."""

from __future__ import annotations

import json

from tests.support.environment import COMPILES
from tests.support.processes import output_of

pytestmark = COMPILES

# The keys of all kernels, by name. A process a seed, which hashes them in an order of its own.
KEYS = """
import json, multiprocessing, random, sys
import llama_kernels
from llama_kernels.core.kernel_hashes import settled
from triton.runtime.jit import JITFunction
modules = [module for name, module in sorted(sys.modules.items()) if name.startswith("llama_kernels")]
kernels = {f"{module.__name__}.{name}": x for module in modules for name, x in sorted(vars(module).items())
           if isinstance(x, JITFunction) and name.endswith("_kernel")}

def keys(seed):
    order = list(kernels)
    random.Random(seed).shuffle(order)
    for name in order:
        settled(kernels[name])
    return {name: kernel.cache_key for name, kernel in kernels.items()}

with multiprocessing.get_context("fork").Pool(3, maxtasksperchild=1) as pool:
    print(json.dumps(pool.map(keys, range(3), chunksize=1)))
"""


def test_the_key_of_a_kernel_does_not_depend_on_what_was_launched_before():
    found = json.loads(output_of("-c", KEYS))
    assert len(found) == 3 and len(found[0]) >= 12
    assert [name for name in found[0] if len({keys[name] for keys in found}) > 1] == []
