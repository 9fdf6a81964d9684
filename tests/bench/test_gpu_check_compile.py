"""The compile stage without a GPU: Triton finds on disk the kernels that were compiled for meta tensors."""

from __future__ import annotations

import json

import pytest
import torch

from bench.gpu_check import compile as compiling
from bench.gpu_check import launches
from llama_kernels.ops import rms_norm
from llama_kernels.ops.attention.hopper.tables import tile_for_width
from tests.support.environment import COMPILES
from tests.support.processes import output_of

pytestmark = [*COMPILES, pytest.mark.once]

SM_90 = launches.Target("cuda", 90, 32, "sm_90", 132)

# Compiles the kernels of a few works on the meta device, or launches them on CPU tensors under a driver whose launches
# do nothing. Prints for each kernel whether it was in Triton's cache on disk.
CALLS = """
import sys, torch
from triton import knobs
from triton.runtime import driver
from bench.works.presets import small
from bench.gpu_check import launches
from bench.host import LaunchingNothing
shapes = ("head norm 128", "heads 8/2", "cache of 700", "packed")
works = [w for w in small([torch.bfloat16]) if w.shape in shapes]
target, hits = launches.Target("cuda", 90, 32, "sm_90", 132), []
knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
if sys.argv[1] == "compile":
    with launches.launching_for(target, lambda kernel: True):
        for work in works:
            launches._work(work, hopper=False)
else:
    from llama_kernels.ops import qk_norm_rope, rms_norm
    from llama_kernels.ops.attention import tables
    from llama_kernels.core import device
    library = torch.library.Library("llama_kernels", "IMPL")
    launches.run_launchers_on("CPU", library)
    driver.set_active(LaunchingNothing("sm_90"))
    for module in (qk_norm_rope, rms_norm):
        module.processors_of = lambda _: 132
    for module in (device, tables):
        module.arch_of = lambda _: "sm_90"
    from bench.providers.ours import Ours
    from bench.measuring.step import Step
    for work in reversed(works):
        step = Step(Ours().function(work, "cpu"), work.draw("cpu"), "backward" in work.directions)
        step.forward_once()
        if "backward" in work.directions:
            step.backward()
print(hits)
"""


def test_launches_find_the_kernels_compiled_on_the_meta_device(tmp_path):
    """In another process and another order, every launch on CPU tensors finds its kernel on disk."""

    def hits(what: str) -> list[bool]:
        said = output_of("-c", CALLS, what, TRITON_CACHE_DIR=str(tmp_path))
        return json.loads(said.splitlines()[-1].lower())

    assert not any(hits("compile"))
    launched = hits("launch")
    assert len(launched) >= 14 and all(launched)


def test_kernels_are_collected_and_compiled_by_their_cache_key(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made = [call for call in launches.calls(SM_90) if call.name == "parity: rms_norm, head norm 128, bfloat16"]
    (kernels,) = launches.collected(SM_90, made)
    assert [k.name for k in kernels] == ["rms_norm_forward_kernel", "rms_norm_backward_kernel", "sum_partials_kernel"]
    assert kernels[0].tile == "BLOCK_R 32, BLOCK_N 128, 4 warps, 3 stages"
    monkeypatch.setattr(compiling, "_worker", (SM_90, made), raising=False)
    for on_disk in (False, True):
        for kernel in filter(lambda x: hasattr(x, "device_caches"), vars(rms_norm).values()):
            kernel.device_caches.clear()  # the cache of this process
        found = compiling._compile((0, kernels[0].key))
        assert found["on disk"] == on_disk and len(found["hashes"]) == 1 and not found["error"]
    missing = compiling._compile((0, "another key"))
    assert missing["error"] and not missing["hashes"] and not missing["on disk"]


def test_attention_and_a_patched_layer_launch_the_expected_kernels():
    torch.use_deterministic_algorithms(False)  # with them, the backward takes the portable kernels
    made = launches.calls(SM_90)
    launched = {call.name: kernels for call, kernels in zip(made, launches.collected(SM_90, made), strict=True)}
    assert all(launched.values())
    plain = launched["bench: attention, Llama 3.1 8B, Qwen3 8B, bfloat16"]
    # The default under the release of Triton that the Hopper kernel was measured with.
    forward = "hopper_forward_kernel" if tile_for_width("forward", 128).measured else "forward_kernel"
    assert [k.name for k in plain] == [forward, "dq_kernel", "dkdv_kernel"]
    hopper = launched["bench, Hopper: attention, Llama 3.1 8B, Qwen3 8B, bfloat16"]
    assert {"hopper_forward_kernel", "hopper_backward_kernel"} <= {k.name for k in hopper}
    layer = launched["patched layer: Llama 3.1 8B"]
    assert {k.key for k in plain} <= {k.key for k in layer}
    assert not any(call.startswith("bench, Hopper") for call, _ in launches.calls(SM_90._replace(family="sm_80")))
