"""The faster interpreter computes what Triton's own does."""

from __future__ import annotations

import contextlib
import dataclasses
from unittest import mock

import pytest
import torch

import llama_kernels as lk
from llama_kernels.core.language import tl

pytestmark = pytest.mark.interpreter


def test_results_are_those_of_tritons_interpreter():
    from triton.runtime import interpreter

    q, k, v = (torch.randn(1, H, 40, 16).requires_grad_() for H in (4, 2, 2))

    def results() -> list[torch.Tensor]:
        out = lk.attention(*lk.rope(q, k, *lk.rope_tables(torch.ones(8), 40)), v, softcap=3.0)
        return [out, *torch.autograd.grad(out.sin().sum(), (q, k, v))]

    faster, builder, core = results(), interpreter.interpreter_builder, interpreter.tl.core
    own_options = dataclasses.replace(builder.options, sanitize_overflow=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(builder, "options", own_options))
        for owner, name in (
            (interpreter, "_patch_lang"),
            (interpreter, "_get_np_dtype"),
            (interpreter.TritonSemantic, "broadcast_impl_value"),
            (core.block_type, "__init__"),
            (core.tensor, "__init__"),
        ):
            stack.enter_context(mock.patch.object(owner, name, getattr(owner, name).__wrapped__))
        own = results()
    assert all(torch.equal(a, b) for a, b in zip(faster, own, strict=True))


@pytest.mark.parametrize("fails", [False, True], ids=["", "that fails"])
def test_a_launch_restores_the_language(fails):
    from triton.runtime import interpreter

    x, builtins = torch.randn(4, 64), {name: f for name, f in vars(tl).items() if tl.core.is_builtin(f)}
    if fails:
        with (
            mock.patch.object(interpreter.InterpreterBuilder, "create_rsqrt", side_effect=RuntimeError("no rsqrt")),
            pytest.raises(Exception, match="no rsqrt"),
        ):
            lk.rms_norm(x)
    else:
        lk.rms_norm(x)
    assert builtins and all(vars(tl)[name] is function for name, function in builtins.items())
    torch.testing.assert_close(lk.rms_norm(x), lk.reference.rms_norm(x))


def test_tritons_interpreter_drops_what_it_knows_of_overflows():
    """It asserts on the device that integers do not overflow, and such assertions are only made where `debug` is on."""
    from triton.runtime import interpreter

    semantic, builder = interpreter.interpreter_semantic, interpreter.interpreter_builder
    assert not interpreter.InterpreterOptions().debug
    with mock.patch.object(builder, "create_assert", side_effect=AssertionError("an assertion was made")):
        semantic.device_assert(semantic.to_tensor(0), "overflow", None)
