"""Bad input raises an error of the right type, which names the op and the argument, what it got and what it takes."""

from __future__ import annotations

import concurrent.futures
import functools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import llama_kernels as lk
from tests.support.bad_inputs import TYPE_ERRORS, UNSUPPORTED, VALUE_ERRORS, F, all_arguments, ints
from tests.support.ops import OPS, sample

ROOT = Path(__file__).parents[2]
MAIN = [(op.name, name) for op in OPS.values() for name in op.tensors]


def refused(op: str, argument: str, error: type[Exception], got: str, **changed: Any) -> None:
    with pytest.raises(error, match=rf"^llama_kernels\.{op}: {argument} is {got}.*; wanted .+"):
        getattr(lk, op)(**{**sample(op), **changed})


# --- every tensor ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op, argument", MAIN)
def test_an_argument_that_is_not_a_tensor_is_refused(op, argument):
    refused(op, argument, TypeError, "a list", **{argument: [1.0, 2.0]})


OPTIONAL = {("rope", "k"), ("qk_norm_rope", "k")} | {(op, name) for op, name in MAIN if "weight" in name}
TABLES = [(op, name) for op in OPS for name in ("cos", "sin") if name in sample(op)]


@pytest.mark.parametrize("op, argument", [*(pair for pair in MAIN if pair not in OPTIONAL), *TABLES])
def test_none_in_place_of_a_tensor_is_refused(op, argument):
    refused(op, argument, TypeError, "None", **{argument: None})


@pytest.mark.parametrize("op, argument", MAIN)
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.complex64, torch.bool])
def test_unsupported_dtypes_are_refused(op, argument, dtype):
    refused(op, argument, TypeError, str(dtype), **{argument: sample(op)[argument].to(dtype)})


def test_the_error_for_float64_names_the_reference():
    with pytest.raises(TypeError, match=r"llama_kernels\.reference\.rms_norm takes any floating dtype"):
        lk.rms_norm(torch.randn(3, 8, dtype=torch.float64))


def test_float64_is_refused_under_autocast_which_leaves_it():
    q = torch.randn(1, 2, 4, 8, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.nn.functional.scaled_dot_product_attention(q, q, q).dtype == torch.float64
        with pytest.raises(TypeError, match=r"^llama_kernels\.attention: q is torch.float64"):
            lk.attention(q, q, q)


def test_an_error_names_a_reference_only_where_there_is_one():
    out, lse = torch.randn(1, 2, 4, 8, dtype=torch.float64), torch.randn(1, 2, 4)
    with pytest.raises(TypeError, match=r"outs\[0\] is torch.float64") as raised:
        lk.merge_attention([out], [lse])
    assert "reference" not in str(raised.value)


def test_nested_tensors_are_refused_with_what_takes_their_parts():
    nested = torch.nested.nested_tensor([torch.randn(n, 4, 8) for n in (3, 5)], layout=torch.jagged)
    with pytest.raises(TypeError, match=r"attention: q is a nested tensor; .*attention_varlen takes q.values"):
        lk.attention(*(nested.transpose(1, 2),) * 3)
    bounds = nested.offsets().int()
    assert lk.attention_varlen(*(nested.values(),) * 3, bounds, bounds, 5, 5).shape == (8, 4, 8)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of PyTorch, that it may change these kinds of tensors
@pytest.mark.parametrize("kind", UNSUPPORTED)
@pytest.mark.parametrize("op", OPS)
def test_every_tensor_argument_refuses_unsupported_tensors(op, kind):
    make, got = UNSUPPORTED[kind]
    args = all_arguments(op)
    getattr(lk, op)(**args)
    for argument, x in args.items():
        if isinstance(x, torch.Tensor):
            refused(op, argument, TypeError, got, **{**args, argument: make(x.dtype)})


@pytest.mark.parametrize("op", OPS)
def test_a_tensor_without_data_beside_others_is_named(op):
    first = OPS[op].tensors[0]
    refused(op, first, ValueError, "on meta", **{first: sample(op)[first].to("meta")})


SECOND = [(op, name) for op, name in MAIN if name != OPS[op].tensors[0]] + TABLES


@pytest.mark.parametrize("op, argument", SECOND)
def test_tensors_on_different_devices_are_refused(op, argument):
    refused(op, argument, ValueError, "on meta", **{argument: sample(op)[argument].to("meta")})


@pytest.mark.corpus(60)
@pytest.mark.parametrize("op, argument", [(op, name) for op, name in MAIN if name in ("k", "v", "k_cache", "v_cache")])
def test_tensors_of_different_dtypes_are_refused(op, argument):
    refused(op, argument, TypeError, "torch.bfloat16", **{argument: sample(op)[argument].bfloat16()})


def _name(case: Any) -> str | None:
    return re.sub(r"\\", "", case) if isinstance(case, str) else ""


@pytest.mark.parametrize("op, argument, got, changed", VALUE_ERRORS, ids=_name)
def test_bad_shapes_and_values_are_refused(op, argument, got, changed):
    refused(op, argument, ValueError, got, **changed)


@pytest.mark.parametrize("op, argument, got, changed", TYPE_ERRORS, ids=_name)
def test_bad_types_are_refused(op, argument, got, changed):
    refused(op, argument, TypeError, got, **changed)


def test_bad_shapes_are_refused_before_anything_is_written():
    args = sample("rope")
    before = args["q"].clone()
    with pytest.raises(ValueError, match=r"llama_kernels\.rope: k"):
        lk.rope(**{**args, "k": torch.randn(2, 1, 6, 8).expand(2, 2, 6, 8)}, inplace=True)
    assert torch.equal(args["q"], before)


def test_what_autograd_refuses_is_refused_before_anything_is_written():
    """Views made by split() may not be modified in place; q, which comes first, may."""
    args = sample("rope")
    before = args["q"].clone()
    both = (torch.randn(2, 4, 6, 8).requires_grad_() * 1).split(2, dim=1)
    with pytest.raises(RuntimeError, match="view"):
        lk.rope(args["q"], both[0], args["cos"], args["sin"], inplace=True)
    assert torch.equal(args["q"], before)


# --- values, under lk.checked() --------------------------------------------------------------------------------------


@pytest.mark.corpus(24, 40)
@pytest.mark.parametrize("op, argument, got, wanted, changed", [
    ("rope", "position_ids", "from -3 to 5", "0 to 8", {"position_ids": ints(0, 1, 2, -3, 4, 5)}),
    ("rope", "position_ids", "from 0 to 9", "0 to 8", {"position_ids": ints(0, 1, 2, 3, 4, 9)}),
    ("rope_qkv", "position_ids", "from 0 to 9", "0 to 8", {"position_ids": ints(0, 1, 2, 3, 4, 9)}),
    ("rope_into_cache", "cache_position", "from 6 to 6", "positions of the cache, 0 to 5", {"cache_position": ints(6)}),
    ("qk_norm_rope", "position_ids", "from -3 to 5", "0 to 8", {"position_ids": ints(0, 1, 2, -3, 4, 5)}),
    ("rope_attention", "position_ids", "from -3 to 5", "0 to 8", {"position_ids": ints(0, 1, 2, -3, 4, 5)}),
    ("attention_varlen", "cu_seqlens_q", "-1 at its start", "0 or more", {"cu_seqlens_q": ints(-1, 2, 6)}),
    ("attention_varlen", "cu_seqlens_k", "1 at index 2, after 2", "never decrease", {"cu_seqlens_k": ints(0, 2, 1)}),
    ("attention_varlen", "cu_seqlens_k", "7 at its end", "the 6 tokens of k",
     {"cu_seqlens_k": ints(0, 4, 7)}),
    ("attention_varlen", "max_seqlen_q", "3", "at least 4, the length of sequence 1", {"max_seqlen_q": 3}),
])  # fmt: skip
def test_checked_refuses_bad_positions_and_lengths(op, argument, got, wanted, changed):
    call = functools.partial(getattr(lk, op), **{**sample(op), **changed})
    call()  # clamped
    with (
        lk.checked(),
        pytest.raises(ValueError, match=rf"^llama_kernels\.{op}: {argument} is {got}; wanted .*{wanted}"),
    ):
        call()
    call()


def test_checked_accepts_good_values():
    with lk.checked():
        lk.rope(**sample("rope"), position_ids=torch.tensor([8, 0, 3, 3, 1, 7]))
        lk.attention_varlen(**sample("attention_varlen"))
        cu = torch.tensor([1, 3, 5], dtype=torch.int32)  # tokens may belong to no sequence
        lk.attention_varlen(**{**sample("attention_varlen"), "cu_seqlens_q": cu})
        torch.compile(lk.rope, backend="eager", fullgraph=True)(**sample("rope"), position_ids=torch.arange(6))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8], ids=str)
def test_checked_takes_positions_of_any_integer_dtype(dtype):
    positions = torch.tensor([8, 0, 3, 3, 1, 9]).to(dtype)
    with lk.checked(), pytest.raises(ValueError, match="position_ids is from 0 to 9; wanted rows of the table, 0 to 8"):
        lk.rope(**sample("rope"), position_ids=positions)


@pytest.mark.parametrize("in_dim", [0, 1])
def test_checked_finds_bad_values_in_every_example_of_a_vmap(in_dim):
    positions, bounds = torch.arange(6).repeat(3, 1), torch.tensor([[0, 2, 6]] * 3, dtype=torch.int32)
    args, packed = sample("rope"), {**sample("attention_varlen"), "max_seqlen_q": 9}
    rotate = torch.func.vmap(lambda p: lk.rope(**args, position_ids=p)[0], in_dims=in_dim)
    attend = torch.func.vmap(lambda cu: lk.attention_varlen(**{**packed, "cu_seqlens_q": cu}), in_dims=in_dim)
    with lk.checked():
        for call, rows, bad in ((rotate, positions, 9), (attend, bounds, 7)):
            call(rows.movedim(0, in_dim))
            rows[2, -1] = bad
            with pytest.raises(ValueError, match=rf"is .*{bad}"):
                call(rows.movedim(0, in_dim))


def test_checked_applies_to_one_thread():
    with lk.checked(), concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(lk.rope, **sample("rope"), position_ids=torch.full((6,), -1)).result()


# --- fake tensors, and python -O -------------------------------------------------------------------------------------


@pytest.mark.parametrize("op, argument, got, changed", [*VALUE_ERRORS, *TYPE_ERRORS], ids=_name)
def test_fake_tensors_get_the_same_errors(op, argument, got, changed):
    """Tracing runs the same checks."""
    args = {**sample(op), **changed}
    with pytest.raises((ValueError, TypeError)) as real:
        getattr(lk, op)(**args)
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for name, x in args.items()}
        with pytest.raises(real.type) as traced:
            getattr(lk, op)(**fake)
    assert str(traced.value).replace("FakeTensor", "Tensor") == str(real.value)


@pytest.mark.once
def test_checks_are_kept_under_python_O():
    """python -O removes assertions, and no check is one."""
    program = """
import torch, llama_kernels as lk
from tests.support.bad_inputs import TYPE_ERRORS, VALUE_ERRORS
from tests.support.ops import sample
assert False, "assertions are on"
count = 0
for errors, kind in ((VALUE_ERRORS, ValueError), (TYPE_ERRORS, TypeError)):
    for op, argument, got, changed in errors:
        try:
            getattr(lk, op)(**{**sample(op), **changed})
        except kind as error:
            count += str(error).startswith(f"llama_kernels.{op}: {argument} is ")
print(count)
"""
    done = subprocess.run([sys.executable, "-O", "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == str(len(VALUE_ERRORS) + len(TYPE_ERRORS)), done.stderr[-1000:]


# --- unusual arguments that are accepted -----------------------------------------------------------------------------


@pytest.mark.parametrize("changed", [
    {"window_size": [3, 0]}, {"window_size": (0, 0)}, {"window_size": (2**40, 2**40)},
    {"window_size": (np.int64(3), np.int32(0))}, {"scale": 0.0}, {"scale": -1.0},
    {"softcap": 30}, {"softcap": 0.0}, {"softcap": 0}, {"sinks": F(4).bfloat16()},
    {"deterministic": True}, {"deterministic": False},
    {"q": F(2, 4, 0, 8)}, {"k": F(2, 2, 0, 8), "v": F(2, 2, 0, 8)},
    {"q": F(0, 4, 6, 8), "k": F(0, 2, 6, 8), "v": F(0, 2, 6, 8)},
    {"q": F(2, 0, 6, 8)}, {"q": F(2, 0, 6, 8), "k": F(2, 0, 6, 8), "v": F(2, 0, 6, 8)}, {"v": F(2, 2, 6, 3)},
    {"q": F(2, 4, 8, 6).mT}, {"q": F(1, 4, 6, 8).expand(2, 4, 6, 8)},
], ids=lambda changed: ", ".join(f"{name}" for name in changed))  # fmt: skip
def test_attention_accepts_unusual_arguments(changed):
    out, lse = lk.attention(**{**sample("attention"), **changed}, return_lse=True)
    q, v = changed.get("q", sample("attention")["q"]), changed.get("v", sample("attention")["v"])
    assert out.shape == (*q.shape[:-1], v.shape[-1]) and lse.shape == q.shape[:-1]
    assert out.isfinite().all()


def test_a_number_may_require_grad_where_no_gradient_is_computed():
    args, scale = sample("attention"), torch.tensor(0.25).requires_grad_()
    with torch.no_grad():
        assert torch.equal(lk.attention(**{**args, "scale": scale}), lk.attention(**{**args, "scale": 0.25}))


def test_numbers_of_heads_may_be_integers_of_numpy():
    args = sample("rope_qkv")
    heads = {name: np.int64(args[name]) for name in ("q_heads", "kv_heads")}
    assert all(map(torch.equal, lk.rope_qkv(**{**args, **heads}), lk.rope_qkv(**args)))


def test_rope_of_no_token_accepts_tables_without_positions():
    q, k, table = F(2, 4, 0, 8), F(2, 2, 0, 8), F(0, 4)
    for ids in (None, torch.zeros(0, dtype=torch.int32), torch.zeros(2, 0, dtype=torch.int32)):
        assert [x.shape for x in lk.rope(q, k, table, table, ids)] == [q.shape, k.shape]


@pytest.mark.parametrize("longest", [np.int64(6), np.int32(6), 2**31 - 1, 2**31, 2**40, np.int64(2**40)], ids=repr)
def test_packed_attention_accepts_any_length_that_is_long_enough(longest):
    args = sample("attention_varlen")
    expected = lk.attention_varlen(**args)
    assert torch.equal(lk.attention_varlen(**{**args, "max_seqlen_q": longest, "max_seqlen_k": longest}), expected)


@pytest.mark.corpus(25)
@pytest.mark.parametrize("bounds", [[0], [0, 0], [0, 6], [0, 0, 6, 6], [2, 4]], ids=str)
def test_packed_attention_accepts_unusual_lengths(bounds):
    cu = torch.tensor(bounds, dtype=torch.int32)
    whole = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 6, "max_seqlen_k": 6}
    out, lse = lk.attention_varlen(**{**sample("attention_varlen"), **whole}, return_lse=True)
    owned = torch.zeros(6, dtype=torch.bool)
    owned[bounds[0] : bounds[-1]] = True
    assert torch.equal(lse[0].isfinite(), owned) and torch.equal(out.abs().sum((1, 2)) > 0, owned)
