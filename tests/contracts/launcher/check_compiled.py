"""Compiled kernels: each op, forward and backward, by the launch cache and by Triton, on sm_90 and on sm_80."""

from __future__ import annotations

import re

import pytest

from tests.contracts.launcher import cases, declared
from tests.contracts.launcher.mutants import MUTANTS_OF_DESCRIPTORS, check_found
from tests.contracts.launcher.substitute import ARCHITECTURES, tensors_on

# Compilation takes the time here. check_declared.py has all cases.
CASES = {
    **cases.PORTABLE,
    "hopper rope_attention": cases.hopper_rope_attention,
    "hopper attention_varlen": cases.hopper_attention_varlen,
}
SM_80 = ("add_rms_norm", "rope", "decode")
SM_90 = (
    "rms_norm, wide", "add_rms_norm", "rope", "rope, in place", "rope_qkv", "rope_into_cache", "qk_norm_rope",
    "attention, everything", "decode", "hopper rope_attention", "hopper attention_varlen",
)  # fmt: skip


@pytest.mark.parametrize(
    ("device", "case"),
    [(0, case) for case in SM_90] + [(1, case) for case in SM_80],
    ids=lambda x: ARCHITECTURES[x] if isinstance(x, int) else x,
)
def test_the_driver_receives_what_triton_would_send(device, case, comparisons):
    with tensors_on(device):
        for _ in range(2):  # a key is cached at its second call
            CASES[case]()
            comparisons.check()
        CASES[case]()
        assert comparisons.made
        assert [each.launcher for each in comparisons.made if each.bound] == []
        assert {launched.device for each in comparisons.made for launched in each.cached} == {device}
        comparisons.check()


def test_kernels_are_declared_as_they_are_compiled():
    """The other checks launch declared kernels. A declaration has no tensor descriptors."""
    with tensors_on(0):
        for case in SM_90:
            CASES[case]()  # compiled before
    compiled = [kernel for function in declared.functions() for kernel in function.device_caches[0][0].values()]
    compiled = [kernel for kernel in compiled if "tensordesc" not in str(kernel.src.signature)]
    assert len({kernel.name for kernel in compiled}) > 8
    for kernel in compiled:
        head = kernel.asm["ptx"].split(".entry", 1)[1].split(")", 1)[0]
        assert re.findall(r"\.param \.(\w+)", head) == declared.parameters(kernel.src.signature), kernel.name


@pytest.mark.parametrize("mutant", MUTANTS_OF_DESCRIPTORS, ids=lambda mutant: mutant.fault)
def test_a_fault_in_the_launch_cache_is_found(mutant):
    check_found(mutant)
