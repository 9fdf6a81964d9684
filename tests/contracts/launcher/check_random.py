"""Random pairs of calls that differ in one or two features: no call reuses what was bound for another one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import llama_kernels as lk
from llama_kernels.core import launch_cache
from llama_kernels.core.language import TRITON_VERSION
from tests.contracts.launcher.compare import Comparisons
from tests.contracts.launcher.declared import declared_kernels
from tests.contracts.launcher.substitute import on_stream, tensors_on

# Triton 3.6 has the C compiler make a launcher for every signature.
EXAMPLES = 60 if TRITON_VERSION > (3, 6) else 12

HALF, FLOAT = torch.bfloat16, torch.float32


def heads(H: int, S: int, dtype: torch.dtype, token_first: bool, shift: int, grad: bool, D: int = 32) -> torch.Tensor:
    """(1, H, S, D) in one of two memory orders, its address a multiple of 64 bytes and `shift` elements."""
    flat = torch.zeros(S * H * D + shift, dtype=dtype)[shift:]
    x = flat.view(1, S, H, D).transpose(1, 2) if token_first else flat.view(1, H, S, D)
    return x.requires_grad_(grad)


def train(*outs: torch.Tensor) -> None:
    outs = tuple(out for out in outs if out.requires_grad)
    if outs:
        torch.autograd.backward(outs, [torch.zeros_like(out) for out in outs])


# The features of a call and their values; the first value of each is the common one.


def rms_norm(
    dtype: Any = (HALF, FLOAT, torch.float16),
    rows: Any = (4, 1, 16, 17),
    width: Any = (64, 16, 48, 1, 8192),
    shift: Any = (0, 1, 2, 4, 8),
    step: Any = (1, 2),
    weight: Any = (FLOAT, HALF, None),
    residual: Any = ("given", "none", "x itself"),
    eps: Any = (1e-6, 1e-5, 0.0, 1.0),
    offset: Any = (0.0, -0.0, 1.0),
    grad: Any = (True, False),
) -> None:
    x = torch.zeros(rows * step * width + shift, dtype=dtype)[shift:].view(rows * step, width)[::step]
    x.requires_grad_(grad)
    weight = None if weight is None else torch.zeros(width, dtype=weight, requires_grad=grad)
    if residual == "none":
        train(lk.rms_norm(x, weight, eps, offset=offset))
    else:
        train(*lk.add_rms_norm(x, x if residual == "x itself" else torch.zeros_like(x), weight, eps, offset=offset))


def rope(
    dtype: Any = (HALF, FLOAT),
    Hq: Any = (4, 1, 16),
    Hkv: Any = (2, 1, None, "q itself"),
    S: Any = (8, 1, 16, 17),
    token_first: Any = (True, False),
    shift: Any = (0, 1, 8),
    tables: Any = (16, 8, 32),
    table_dtype: Any = (FLOAT, HALF),
    position_ids: Any = (None, 1, 2),
    interleaved: Any = (False, True),
    inplace: Any = (False, True),
    grad: Any = (True, False),
) -> None:
    q = heads(Hq, S, dtype, token_first, shift, grad and not inplace)
    k = q if Hkv == "q itself" else None if Hkv is None else heads(Hkv, S, dtype, True, 0, grad and not inplace)
    cos, sin = (torch.zeros(32, tables, dtype=table_dtype) for _ in range(2))
    positions = {None: None, 1: torch.zeros(S, dtype=torch.int32), 2: torch.zeros(1, S, dtype=torch.int64)}[
        position_ids
    ]
    outs = lk.rope(q, k, cos, sin, positions, interleaved=interleaved, inplace=inplace and k is not q)
    train(*(out for out in outs if out is not None))


def attention(
    dtype: Any = (HALF, FLOAT),
    Hq: Any = (4, 8),
    Hkv: Any = (2, 1, "v is k"),
    Sq: Any = (16, 1, 17),
    Sk: Any = (16, 17, 600),
    token_first: Any = (True, False),
    shift: Any = (0, 1, 8),
    scale: Any = (None, 1.0, 0.5, 0.0, -0.0, -1.0, 1e10),
    softcap: Any = (None, 1.0, 30.0),
    window_size: Any = ((-1, -1), (1, 0), (8, 0), (16, 1), (2**33, 0), (0, 0)),
    is_causal: Any = (True, False),
    sinks: Any = (None, FLOAT, HALF),
    kv_start: Any = (False, True),
    kv_end: Any = (False, True),
    kv_prefix: Any = (False, True),
    grad: Any = (True, False),
) -> None:
    q = heads(Hq, Sq, dtype, token_first, shift, grad)
    k = heads(2 if Hkv == "v is k" else Hkv, Sk, dtype, token_first, 0, grad)
    v = k if Hkv == "v is k" else heads(Hkv, Sk, dtype, True, 0, grad)
    bounds = {"kv_start": kv_start, "kv_end": kv_end, "kv_prefix": kv_prefix}
    bounds = {name: torch.zeros(1, Sq, dtype=torch.int32) for name, is_given in bounds.items() if is_given}
    sinks = None if sinks is None else torch.zeros(Hq, dtype=sinks, requires_grad=grad)
    if window_size != (-1, -1):
        is_causal = False if window_size[1] else is_causal
    options = {"scale": scale, "softcap": softcap, "window_size": window_size, "is_causal": is_causal, "sinks": sinks}
    train(lk.attention(q, k, v, **options, **bounds))


def qk_norm_rope(
    dtype: Any = (HALF, FLOAT),
    Hq: Any = (4, 1, 16),
    Hkv: Any = (2, 1, None),
    S: Any = (8, 1, 16, 17),
    token_first: Any = (True, False),
    shift: Any = (0, 1, 8),
    weights: Any = ("both", "one tensor", "none"),
    eps: Any = (1e-6, 0.0, 1.0),
    offset: Any = (0.0, -0.0, 1.0),
    interleaved: Any = (False, True),
    grad: Any = (True, False),
) -> None:
    q = heads(Hq, S, dtype, token_first, shift, grad)
    k = None if Hkv is None else heads(Hkv, S, dtype, True, 0, grad)
    weight, other = (torch.zeros(32, requires_grad=grad) for _ in range(2))
    tables = torch.zeros(32, 16), torch.zeros(32, 16)
    given = {"both": (weight, other), "one tensor": (weight, weight), "none": (None, None)}[weights]
    given = (given[0], None if k is None else given[1])
    outs = lk.qk_norm_rope(q, k, *given, *tables, eps=eps, offset=offset, interleaved=interleaved)
    train(*(out for out in outs if out is not None))


OPS = (rms_norm, rope, attention, qk_norm_rope)
EVERYWHERE = {"device": (0, 1, 2), "on_stream": (False, True)}


@st.composite
def pairs_of_calls(draw: Any, op: Callable[..., None]) -> tuple[dict[str, Any], dict[str, Any]]:
    features = {name: x.default for name, x in inspect.signature(op).parameters.items()} | EVERYWHERE
    # Most features are common. A call with uncommon ones alone has little in common with another call.
    first = {name: draw(st.sampled_from((*values[:1] * 3, *values))) for name, values in features.items()}
    changed = draw(st.lists(st.sampled_from(sorted(features)), min_size=1, max_size=2, unique=True))
    others = {name: [value for value in features[name] if repr(value) != repr(first[name])] for name in changed}
    return first, {**first, **{name: draw(st.sampled_from(values)) for name, values in others.items()}}


@pytest.fixture(scope="module", autouse=True)
def _declared():
    with declared_kernels():
        yield


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_no_call_reuses_the_launches_of_another(op):
    comparing = Comparisons()

    def call(features: dict[str, Any]) -> None:
        rest = dict(features)
        device, with_stream = rest.pop("device"), rest.pop("on_stream")
        with tensors_on(device):
            if with_stream:
                with on_stream(device):
                    op(**rest)
            else:
                op(**rest)

    cached = 0

    @settings(max_examples=EXAMPLES, derandomize=True, database=None, deadline=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(pairs_of_calls(op))
    def check(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
        nonlocal cached
        first, second = pair
        for features in (first, first, second, second, first):
            call(features)
        launch_cache.clear()
        for features in (second, second, first):  # nor does the first reuse what the second bound
            call(features)
        cached += any(each.cached and not each.bound for each in comparing.made)
        comparing.check()

    comparing.install()
    try:
        check()
    finally:
        comparing.remove()
    assert cached > EXAMPLES / 2  # or nothing was compared
