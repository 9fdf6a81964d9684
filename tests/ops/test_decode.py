"""decode_attention: masks that hide single keys, at the borders of the chunks of keys and elsewhere."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.library import opcheck

import llama_kernels as lk
from llama_kernels.ops.attention.masked_decode import decode_attention, fits_decode
from tests.support.decode import CASES, Case, check, make
from tests.support.judge import DTYPES
from tests.support.launches import KERNELS_RUN, kernels_launched, names

SMALL = Case(2, 4, 2, 2, 70, 16, 16, sinks=True, bounds=True)
TWO_CHUNKS = Case(3, 4, 1, 2, 300, 16, 16, sinks=True, bounds=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_single_hidden_keys(case, dtype, device):
    check(case, dtype, device)


def test_no_keys(device):
    q, k = torch.randn(2, 4, 1, 16, device=device), torch.randn(2, 2, 0, 16, device=device)
    key_mask = torch.ones(2, 0, dtype=torch.bool, device=device)
    assert torch.equal(decode_attention(q, k, k, key_mask), torch.zeros_like(q))
    assert decode_attention(q[:0], k[:0], k[:0], key_mask[:0]).shape == (0, 4, 1, 16)


def test_softcap_zero_is_off(device):
    x = make(CASES[1], torch.float32, device)
    off = decode_attention(x.q, x.k, x.v, x.key_mask, softcap=0.0)
    assert torch.equal(off, decode_attention(x.q, x.k, x.v, x.key_mask))
    assert not torch.equal(off, decode_attention(x.q, x.k, x.v, x.key_mask, softcap=0.1))


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_values_of_hidden_keys_change_no_bit(dtype, device):
    x = make(TWO_CHUNKS, dtype, device)
    before = decode_attention(x.q, x.k, x.v, x.key_mask, **x.options)
    largest = torch.finfo(dtype).max
    for cache in (x.k, x.v):
        hidden = ~x.key_mask[:, None, :, None].expand(cache.shape)
        cache[hidden] = torch.where(torch.rand(int(hidden.sum()), device=device) < 0.5, largest, -largest).to(dtype)
    assert torch.equal(decode_attention(x.q, x.k, x.v, x.key_mask, **x.options), before)


def test_a_mask_that_hides_nothing_changes_no_bit(device):
    x = make(Case(2, 4, 2, 2, 600, 32, 32, sinks=True, bounds=True), torch.float16, device)
    everything = torch.ones_like(x.key_mask)
    masked = decode_attention(x.q, x.k, x.v, everything, **x.options)
    with kernels_launched() as launches:
        unmasked = lk.attention(x.q, x.k, x.v, is_causal=False, **x.options)
    assert names(launches) == ["_decode_kernel", "_combine_kernel"] or not KERNELS_RUN
    assert torch.equal(masked, unmasked)


def test_the_result_does_not_depend_on_the_batch(device):
    x = make(TWO_CHUNKS, torch.bfloat16, device)
    whole = decode_attention(x.q, x.k, x.v, x.key_mask, **x.options)
    assert whole[0].any() and whole[1].any()
    for b in range(3):
        one = slice(b, b + 1)
        options = {name: bound[one] if name.startswith("kv_") else bound for name, bound in x.options.items()}
        assert torch.equal(decode_attention(x.q[one], x.k[one], x.v[one], x.key_mask[one], **options), whole[one])


def test_a_mask_of_any_strides(device):
    x = make(SMALL, torch.float16, device)
    expected = decode_attention(x.q, x.k, x.v, x.key_mask, **x.options)
    transposed = x.key_mask.T.contiguous().T
    assert transposed.stride() != x.key_mask.stride()
    assert torch.equal(decode_attention(x.q, x.k, x.v, transposed, **x.options), expected)
    rows = decode_attention(x.q, x.k, x.v, x.key_mask[:1].expand(2, -1), **x.options)
    assert torch.equal(rows[:1], expected[:1]) and rows[1].any()


def test_autocast_casts_q_k_and_v(device):
    x = make(SMALL, torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        out = decode_attention(x.q, x.k, x.v, x.key_mask)
    assert torch.equal(out, decode_attention(*(t.bfloat16() for t in (x.q, x.k, x.v)), x.key_mask))
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_a_graph_break(dynamic, device):
    compiled = torch.compile(decode_attention, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for Sk in (40, 41):
        x = make(dataclasses.replace(SMALL, Sk=Sk), torch.float32, device)
        expected = decode_attention(x.q, x.k, x.v, x.key_mask, **x.options)
        assert torch.equal(compiled(x.q, x.k, x.v, x.key_mask, **x.options), expected)


@pytest.mark.parametrize("case", [CASES[0], SMALL], ids=str)
def test_the_registered_op_passes_opcheck(case, device):
    x = make(case, torch.float32, device)
    tensors = (x.options.get(name) for name in ("sinks", "kv_start", "kv_end"))
    opcheck(torch.ops.llama_kernels.decode_attention.default, (x.q, x.k, x.v, x.key_mask, *tensors, 0.3, 2.0))


def test_the_largest_number_of_rows():
    def fits(Hq: int, Hkv: int, Sq: int) -> bool:
        return fits_decode(torch.empty(1, Hq, Sq, 16), torch.empty(1, Hkv, 5, 16))

    assert fits(32, 8, 32) and fits(128, 1, 1) and fits(4, 4, 32)
    assert not fits(40, 8, 32) and not fits(129, 1, 1) and not fits(4, 4, 33)
    assert not fits(0, 0, 1) and not fits(4, 4, 0)


F = torch.zeros
MASK = torch.ones(2, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    "error, argument, said, changed",
    [
        (ValueError, "q", r"of shape \(2, 4, 33, 8\) for 2 key heads; wanted 1 to 128 query", {"q": F(2, 4, 33, 8)}),
        (ValueError, "q", r"of shape \(2, 4, 0, 8\)", {"q": F(2, 4, 0, 8)}),
        (ValueError, "key_mask", r"of shape \(2, 6\); wanted \(2, 5\)", {"key_mask": F(2, 6, dtype=torch.bool)}),
        (ValueError, "key_mask", r"of shape \(2, 1, 1, 5\)", {"key_mask": MASK[:, None, None]}),
        (ValueError, "key_mask", "on meta", {"key_mask": MASK.to("meta")}),
        (TypeError, "key_mask", "torch.int64", {"key_mask": MASK.long()}),
        (TypeError, "key_mask", "a int", {"key_mask": 3}),
        (ValueError, "v", "a tensor that requires grad", {"v": F(2, 2, 5, 8).requires_grad_()}),
        (ValueError, "sinks", "a tensor that requires grad", {"sinks": F(4).requires_grad_()}),
        (ValueError, "softcap", "-1.0", {"softcap": -1.0}),
        (ValueError, "kv_end", r"of shape \(2,\)", {"kv_end": F(2, dtype=torch.int32)}),
    ],
)
def test_bad_arguments_are_refused(error, argument, said, changed):
    given = {"q": F(2, 4, 1, 8), "k": F(2, 2, 5, 8), "v": F(2, 2, 5, 8), "key_mask": MASK} | changed
    with pytest.raises(error, match=rf"llama_kernels.decode_attention: {argument} is {said}"):
        decode_attention(**given)
    if "requires grad" in said:
        with torch.no_grad():
            decode_attention(**given)
