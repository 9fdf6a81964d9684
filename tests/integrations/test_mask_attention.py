"""Attention with a mask as ranges of keys: results against the ideal, without the host waiting for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llama_kernels.integrations.transformers.attention import attention_forward
from llama_kernels.integrations.transformers.masks import key_ranges
from tests.integrations.comparison import Results, compare_with_stock
from tests.integrations.mask_cases import BLOCKS, STATES, B, Masks, S, no_waiting, padding  # noqa: F401  a fixture
from tests.integrations.small import WithoutWaiting, needs_our_attention, not_interpreted, patched, randomized, tokens
from tests.support.environment import DEVICE
from tests.support.ideal import drawn, ideal_attention
from tests.support.judge import judge

pytestmark = not_interpreted

SCALE = 0.25


def random_qkv(queries: int = S, keys: int = S, rows: int = B) -> list[torch.Tensor]:
    return [torch.randn(rows, H, n, 16, device=DEVICE) for H, n in ((4, queries), (2, keys), (2, keys))]


def attend(mask: torch.Tensor | None, qkv: list[torch.Tensor], **options: Any) -> torch.Tensor:
    """(B, Hq, Sq, D), without the host waiting for the device."""
    with WithoutWaiting():
        return attention_forward(torch.nn.Module(), *qkv, mask, scaling=SCALE, **options)[0].transpose(1, 2)


def check(out: torch.Tensor, qkv: list[torch.Tensor], see: torch.Tensor) -> None:
    """Judge `out` for queries that see the keys in `see` (B, Sq, Sk). A row that sees no key is 0."""
    q, k, v = qkv
    ideal = drawn(ideal_attention, q, k, v, see[:, None], SCALE, None, None, q, q[..., 0])[0]
    q, k, v = (x.double() for x in (q, *(x.repeat_interleave(2, 1) for x in (k, v))))
    p = torch.softmax((q @ k.mT * SCALE).masked_fill(~see[:, None], -torch.inf), -1)
    judge("attention", out, p.nan_to_num(0) @ v, ideal)


@pytest.mark.parametrize("side", ["none", "left", "holes"])
@pytest.mark.parametrize("kind", ["causal", "sliding", "chunked"])
def test_attention_sees_the_keys_of_the_mask(kind, side):
    for state in (STATES["no cache"], STATES["second piece"], STATES["static step"]):
        for training in (True, False):
            of_kind = Masks(kind, state, attention_mask=padding(side, state.past + state.queries))
            see = of_kind.stock()
            qkv = random_qkv(state.queries, see.shape[-1])
            with torch.set_grad_enabled(training):
                out = attend(of_kind.ours(), qkv)
            check(out, qkv, see)


def test_a_mask_that_was_made_without_gradients_gives_the_same_gradients():
    """It marks hidden keys for the kernel for decoding, which has no gradient."""
    of_kind = Masks("causal", STATES["second piece"], attention_mask=padding("holes"))
    qkv = [x.requires_grad_() for x in random_qkv(5)]
    gradients = []
    for training in (True, False):
        with torch.set_grad_enabled(training):
            mask = of_kind.ours()
        gradients.append(torch.autograd.grad(attend(mask, qkv).square().sum(), qkv))
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("training", [True, False])
def test_a_mask_of_one_key_applies_to_all_keys(training):
    """Transformers 5.20 makes one for the cache of RecurrentGemma, and stock attention broadcasts it."""
    shown, qkv = torch.tensor([[1], [0]], device=DEVICE), random_qkv(1, 7, 2)
    with torch.set_grad_enabled(training):
        mask = key_ranges(batch_size=2, kv_length=1, q_length=1, attention_mask=shown, device=DEVICE)
        out = attend(mask, qkv)
    check(out, qkv, shown.bool()[:, None].expand(2, 1, 7))


@pytest.mark.parametrize("sliding_window", [None, 3])
@pytest.mark.parametrize("is_causal", [True, False])
def test_cu_seq_lens_separate_documents(is_causal, sliding_window):
    cu = torch.tensor([0, 5, 12, 24], dtype=torch.int32, device=DEVICE)
    bounds = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 12, "max_length_k": 12}
    qkv = random_qkv(24, 24, 1)
    document = torch.bucketize(torch.arange(24, device=DEVICE), cu, right=True)
    see = (document[:, None] == document) & in_window(24, is_causal, sliding_window)
    options = {"is_causal": is_causal, "sliding_window": sliding_window}
    check(attend(None, qkv, **bounds, **options), qkv, see[None])


def in_window(keys: int, is_causal: bool, sliding_window: int | None, queries: int = 0) -> torch.Tensor:
    """The keys that each query sees. Without causality, a window has keys on both sides."""
    at = torch.arange(keys, device=DEVICE)
    before = at[keys - (queries or keys) :, None] - at
    see = before >= 0 if is_causal else torch.ones_like(before, dtype=torch.bool)
    return see if sliding_window is None else see & (before.abs() < sliding_window)


@pytest.mark.parametrize("sliding_window", [None, 3])
@pytest.mark.parametrize("is_causal", [True, False])
def test_without_a_mask_the_arguments_say_which_keys_are_visible(is_causal, sliding_window):
    qkv = random_qkv()
    see = in_window(S, is_causal, sliding_window)
    check(attend(None, qkv, is_causal=is_causal, sliding_window=sliding_window), qkv, see.expand(B, S, S))


@pytest.mark.parametrize("way", ["kernel", "SDPA", "eager"])
@pytest.mark.parametrize("sliding_window", [None, 3])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("queries", [1, 5])
def test_without_a_mask_the_last_query_is_aligned_with_the_last_key(queries, is_causal, sliding_window, way):
    """As with a cache. float64 runs stock attention: SDPA, or the eager function of a model where there are sinks."""
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    q, k, v = (x.double() if way != "kernel" else x for x in random_qkv(queries))
    module = gpt_oss.GptOssAttention.__new__(gpt_oss.GptOssAttention)
    torch.nn.Module.__init__(module)
    module.num_key_value_groups = 2
    options = {"scaling": SCALE, "is_causal": is_causal, "sliding_window": sliding_window}
    if way == "eager":
        module.sinks = options["s_aux"] = torch.full(
            (4,), -1e4, dtype=q.dtype, device=DEVICE
        )  # sinks that take nothing
    out = attention_forward(module, q, k, v, None, **options)[0].transpose(1, 2)
    see = in_window(S, is_causal, sliding_window, queries)
    if way == "kernel":
        check(out, [q, k, v], see.expand(B, queries, S))
    keys, values = (x.repeat_interleave(2, 1) for x in (k, v))
    expected = torch.softmax((q @ keys.mT * SCALE).masked_fill(~see, -torch.inf), -1) @ values
    torch.testing.assert_close(out, expected)


def test_cu_seq_lens_give_an_encoder_with_windows_the_results_of_its_mask():
    """ModernBERT: windows have keys on both sides."""
    modernbert = pytest.importorskip("transformers.models.modernbert.modeling_modernbert")
    config = modernbert.ModernBertConfig(
        vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        local_attention=8, global_attn_every_n_layers=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    model = randomized(modernbert.ModernBertModel._from_config(config, attn_implementation="sdpa"))
    needs_our_attention(model)
    cu = torch.tensor([0, 40], dtype=torch.int32, device=DEVICE)
    call = {"input_ids": tokens(1, 40), "position_ids": torch.arange(40, device=DEVICE)[None]}
    bounds = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 40, "max_length_k": 40}

    @torch.no_grad()
    def run(model: Any, **more: Any) -> Results:
        return {"logits": model(**call, **more).last_hidden_state}

    compare_with_stock(patched(model), model, run, lambda ours: run(ours, **bounds))


def test_a_block_in_two_pieces_gives_nan():
    """Its mask is not ranges of keys, which the host does not know when it makes the mask."""
    blocks = torch.tensor([[-1, 0, 0, -1, 0, 0, -1, -1, -1, -1, -1, -1], BLOCKS["one image"][0]], device=DEVICE)
    out = attend(Masks("causal", block_sequence_ids=blocks).ours(), random_qkv())
    assert out[0].isnan().all() and out[1].isfinite().all()


def test_padding_may_have_the_number_of_a_block():
    """PaliGemma's processor gives padding on the right the number of the prefix. It is not a second piece of it."""
    blocks = torch.tensor([[0] * 5 + [-1] * 5 + [0] * 2, BLOCKS["a prefix"][1]], device=DEVICE)
    mask = Masks("causal", block_sequence_ids=blocks, attention_mask=padding("right")).check()
    assert attend(mask, random_qkv()).isfinite().all()
