"""Triton's cache on disk has one entry a kernel, in whatever order a program launches."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.support.environment import COMPILES

pytestmark = COMPILES

# The keys of all kernels, hashed in an order drawn by a seed.
KEYS = """
import json, random, sys
import llama_kernels
from llama_kernels.core.kernel_hashes import settled
from triton.runtime.jit import JITFunction
modules = [module for name, module in sorted(sys.modules.items()) if name.startswith("llama_kernels")]
kernels = {f"{module.__name__}.{name}": x for module in modules for name, x in sorted(vars(module).items())
           if isinstance(x, JITFunction) and name.endswith("_kernel")}
order = list(kernels)
random.Random(int(sys.argv[1])).shuffle(order)
for name in order:
    settled(kernels[name])
print(json.dumps({name: kernel.cache_key for name, kernel in kernels.items()}))
"""


def test_the_key_of_a_kernel_does_not_depend_on_what_was_launched_before():
    found = []
    for seed in range(3):
        done = subprocess.run([sys.executable, "-c", KEYS, str(seed)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(json.loads(done.stdout))
    assert len(found[0]) >= 12
    assert [name for name in found[0] if len({keys[name] for keys in found}) > 1] == []
