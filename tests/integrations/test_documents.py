"""Packed documents: no document sees another. Documents start where positions decrease or where stock starts them."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import DynamicCache, StaticCache, masking_utils
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llama_kernels.integrations.transformers import documents, packed_masks, patch
from llama_kernels.integrations.transformers.attention import attention_forward
from llama_kernels.integrations.transformers.intervals import WindowSize
from tests.integrations.comparison import (
    DoubleSoftmax,
    Results,
    Run,
    compare_with_stock,
    gradients,
    logits_of,
    padding_mask,
)
from tests.integrations.families import stock as stock_of
from tests.integrations.small import (
    CACHE,
    VERSION,
    Calls,
    families,
    needs_our_attention,
    not_interpreted,
    ops_of,
    patched,
    small,
    tokens,
)
from tests.support.environment import DEVICE

pytestmark = not_interpreted

LENGTHS = (9, 2, 13)
IDS = tokens(1, sum(LENGTHS))
POSITIONS = torch.tensor([[*range(9), *range(2), *range(13)]], device=DEVICE)
changes = pytest.mark.parametrize("change", ["patched", "by name"])


def with_gradients(model: Any, logits: torch.Tensor) -> Results:
    F.cross_entropy(logits[0], IDS[0]).backward()  # without a shift, so that the last logit of a document counts too
    results = {"logits": logits.detach(), **gradients(model)}
    model.zero_grad()
    return results


def one_by_one(model: Any) -> Results:
    return with_gradients(
        model, torch.cat([model(input_ids=ids, use_cache=False).logits for ids in IDS.split(LENGTHS, 1)], 1)
    )


def packed(**options: Any) -> Run:
    return packed_at(POSITIONS, **options)


def packed_at(positions: torch.Tensor, **options: Any) -> Run:
    return lambda model: with_gradients(model, model(input_ids=IDS, position_ids=positions, **options).logits)


def cu_seq_lens() -> dict[str, Any]:
    cu = torch.tensor([0, 9, 11, 24], dtype=torch.int32, device=DEVICE)
    return {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 13, "max_length_k": 13}


def changed(model: Any, change: str) -> Any:
    """A copy of the model with our attention, patched or by name."""
    if change == "patched":
        return patched(model)
    ours = copy.deepcopy(model)
    ours.set_attn_implementation("llama_kernels")
    return ours


@changes
@pytest.mark.parametrize("use_cache", [False, True])
@families
def test_documents_that_start_at_position_zero_are_separate(family, use_cache, change):
    model = small(family)
    compare_with_stock(changed(model, change), model, one_by_one, packed(use_cache=use_cache))


@changes
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("reason", ["dropout", "float64", "wide heads"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_documents_are_separate_where_stock_attention_runs(family, reason, use_cache, change):
    """As where a kernel does: a model must not see other documents in training, with dropout, alone."""
    if family == "gpt_oss" and reason != "float64" and VERSION < (5, 0):
        pytest.skip("stock GPT-OSS of Transformers 4 does not run in float64 with dropout or heads this wide")
    sizes = {"dropout": {"attention_dropout": 1e-30}, "wide heads": {"head_dim": 640}}.get(reason, {})
    model = small(family, **sizes)  # this dropout drops nothing, and scales by 1
    model = model.double() if reason == "float64" else model.train()
    ours = changed(model, change)
    with DoubleSoftmax():
        compare_with_stock(ours, model, one_by_one, packed(use_cache=use_cache))
    assert "attention_forward" not in ops_of(ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_documents_are_separate_where_a_wrapper_drops_the_mask(dtype):
    module = small().model.layers[0].self_attn
    q, k, v = (torch.randn(1, 4, 24, 16, device=DEVICE, dtype=dtype) for _ in range(3))
    out, _ = attention_forward(module, q, k[:, ::2], v[:, ::2], None, position_ids=POSITIONS)
    k, v = (x[:, ::2].repeat_interleave(2, 1) for x in (k, v))
    pieces = zip(*(x.split(LENGTHS, 2) for x in (q, k, v)), strict=True)
    expected = torch.cat([F.scaled_dot_product_attention(*piece, is_causal=True) for piece in pieces], 2)
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_the_positions_of_a_call_separate_no_documents_of_another_model():
    """A hook calls it. It has our attention by name, so it keeps no positions of its own."""
    ours, other = patched(small()), changed(small("qwen3"), "by name")
    with torch.no_grad():
        expected, seen = other(IDS).logits, []
        ours.model.layers[0].register_forward_hook(lambda *_: seen.append(other(IDS).logits))
        ours(IDS, position_ids=POSITIONS)
    assert torch.equal(*seen, expected)


def test_positions_of_another_number_of_tokens_separate_no_documents():
    """A wrapper may give a layer other tokens than the positions are of. Stock attention does not read positions."""
    q, k, v = (torch.randn(1, 4, 24, 16, device=DEVICE) for _ in range(3))
    for positions in (POSITIONS[:, :12], POSITIONS[:, :1], torch.cat((POSITIONS, POSITIONS), 1), POSITIONS[0]):
        out, _ = attention_forward(torch.nn.Module(), q, k, v, None, position_ids=positions)
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.testing.assert_close(out, expected.transpose(1, 2))


@pytest.mark.parametrize("use_cache", [False, True])
def test_a_document_of_one_token_is_separate_only_without_a_cache(use_cache):
    """Positions 0, 0 do not decrease. Without a cache, stock too starts a document where positions do not increase."""
    ids, positions = tokens(1, 6), torch.tensor([[0, 1, 2, 0, 0, 1]], device=DEVICE)
    cuts = (3, 3) if use_cache else (3, 1, 2)
    model = small()

    def separately(model: Any) -> Results:
        pieces = zip(ids.split(cuts, 1), positions.split(cuts, 1), strict=True)
        return {"logits": torch.cat([model(x, position_ids=at, use_cache=True).logits for x, at in pieces], 1)}

    with torch.no_grad():
        compare_with_stock(
            patched(model), model, separately, logits_of(ids, position_ids=positions, use_cache=use_cache)
        )


@pytest.mark.parametrize("layer_types", [["full_attention"] * 2, ["sliding_attention", "full_attention"]], ids=str)
@pytest.mark.parametrize("use_cache", [False, True])
def test_documents_whose_tokens_see_later_ones_are_separate(use_cache, layer_types):
    """As EmbeddingGemma's. Stock joins them where there is a cache."""
    model = small("gemma3_text", use_bidirectional_attention=True, layer_types=layer_types)
    whole = logits_of(IDS, position_ids=POSITIONS, use_cache=False)
    compare_with_stock(patched(model), model, whole, logits_of(IDS, position_ids=POSITIONS, use_cache=use_cache))


@changes
@families
def test_documents_given_by_cu_seq_lens_are_separate(family, change):
    model = small(family)
    compare_with_stock(changed(model, change), model, one_by_one, packed(use_cache=False, **cu_seq_lens()))


@pytest.mark.parametrize(
    ("family", "changes", "layer"),
    [
        ("llama4_text", {"attention_chunk_size": 8, "layer_types": ["chunked_attention"] * 2}, "chunked_attention"),
        ("phimoe", {"sliding_window": 7}, "a sliding window of 7 that it does not pass on"),
    ],
)
def test_cu_seq_lens_are_refused_where_only_the_mask_says_which_keys_are_visible(family, changes, layer):
    """cu_seq_lens_q would replace the mask, and with it the chunks of Llama 4 and the window of Phi MoE."""
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this Transformers has no {family}")
    model = small(family, num_local_experts=2, num_experts_per_tok=1, **changes)
    needs_our_attention(model)
    patch(model)
    call = {"position_ids": POSITIONS, "use_cache": False}
    with pytest.raises(ValueError, match=rf"cu_seq_lens_q is given to a layer with {layer}; .*position_ids"):
        model(IDS, **call, **cu_seq_lens())
    model(IDS, **call)


@pytest.mark.parametrize(
    ("kinds", "layer", "only_in_mask"),
    [
        (["sliding_attention", "full_attention"], 0, "a sliding window of 7 that it does not pass on"),
        (["sliding_attention", "full_attention"], 1, None),
        (["full_attention", "chunked_attention"], 1, "chunked_attention"),
        (["full_attention", "chunked_attention"], 0, None),
        (["full_attention", "chunked_attention"], None, "chunked_attention"),
        (None, 0, "a sliding window of 7 that it does not pass on"),
    ],
)
def test_cu_seq_lens_are_refused_by_the_kind_of_the_layer(kinds, layer, only_in_mask):
    """A layer without a number may be of any kind of its config."""
    module = torch.nn.Module()
    module.config = SimpleNamespace(layer_types=kinds, sliding_window=7)
    module.layer_idx = layer
    qkv = [torch.randn(1, H, 24, 16, device=DEVICE) for H in (4, 2, 2)]
    if only_in_mask is None:
        attention_forward(module, *qkv, None, **cu_seq_lens())
        return
    with pytest.raises(ValueError, match=rf"cu_seq_lens_q is given to a layer with {only_in_mask}; wanted None"):
        attention_forward(module, *qkv, None, **cu_seq_lens())


def test_cu_seq_lens_are_refused_where_stock_attention_runs():
    """It does not read them, and would let documents see each other."""
    qkv = [torch.randn(1, H, 24, 16, device=DEVICE, dtype=torch.float64) for H in (4, 2, 2)]
    with pytest.raises(ValueError, match=r"cu_seq_lens_q is given beside .*float64.*; wanted None, since stock"):
        attention_forward(torch.nn.Module(), *qkv, None, **cu_seq_lens())


@families
def test_documents_are_separate_in_a_prefill_of_a_static_cache(family):
    model = small(family)

    def prefill(model: Any) -> Results:
        call = {CACHE: StaticCache(config=model.config, max_cache_len=40), "use_cache": True}
        if VERSION < (5, 0):
            call["cache_position"] = torch.arange(24, device=DEVICE)
        with torch.no_grad():
            return {"logits": model(IDS, position_ids=POSITIONS, **call).logits}

    compare_with_stock(patched(model), model, lambda model: {"logits": one_by_one(model)["logits"]}, prefill)


@changes
def test_documents_from_the_flattening_collator_are_separate(change):
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = {
        name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x
        for name, x in collator([{"input_ids": ids[0].tolist()} for ids in IDS.split(LENGTHS, 1)]).items()
    }
    assert {"position_ids", "cu_seq_lens_q"} <= batch.keys()
    model = small()
    ours = changed(model, change)
    compare_with_stock(ours, model, one_by_one, lambda model: with_gradients(model, model(**batch).logits))
    assert ours(**batch).loss.isfinite()


@pytest.mark.skipif(VERSION < (5, 0), reason="the table of families is for Transformers 5")
@changes
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("rotated", [POSITIONS, torch.arange(24, device=DEVICE)], ids=["the same", "going on"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_documents_are_separate_where_the_text_has_a_fourth_row_of_positions(family, rotated, use_cache, change):
    """Beside the three of M-RoPE, whose positions may go on from document to document. Stock reads it for its mask."""
    model = stock_of(family)
    ours = changed(model, change)
    rows = torch.cat((POSITIONS[None], rotated.expand(3, 1, -1)))
    compare_with_stock(ours, model, one_by_one, packed_at(rows, use_cache=use_cache))


@pytest.mark.skipif(VERSION < (5, 2), reason="before Transformers 5.2, config.is_causal has no effect")
@changes
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3_text"])
def test_positions_start_no_document_where_tokens_see_later_ones(family, traced, change, monkeypatch):
    """As in stock. Otherwise a token saw the documents after its own, but not those before."""
    model = small(family)
    model.config.is_causal = False
    ours = changed(model, change)
    ours.config.is_causal = False
    if traced:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for use_cache in (False, True):
        compare_with_stock(ours, model, logits_of(IDS, position_ids=POSITIONS, use_cache=use_cache))


@pytest.mark.skipif(VERSION < (5, 2), reason="before Transformers 5.2, the names of the arguments differ")
def test_positions_of_a_decoder_start_no_document_in_cross_attention():
    decoder = patch(small()).model
    ours, encoded = (torch.zeros(1, n, 64, device=DEVICE) for n in (sum(LENGTHS), 7))
    documents.note_position_ids(decoder, (), {"position_ids": POSITIONS})
    try:
        mask = masking_utils.create_bidirectional_mask(
            config=decoder.config, inputs_embeds=ours, attention_mask=None, encoder_hidden_states=encoded
        )
    finally:
        documents.forget_position_ids(decoder, (), None)
    assert packed_masks.unpack(mask, sum(LENGTHS), 7) == WindowSize(-1, -1)


@pytest.mark.skipif(VERSION < (5, 15), reason="before Transformers 5.15, models cannot ask for an ordinary mask")
@pytest.mark.parametrize("past", [0, 5])
def test_documents_are_separate_in_a_mask_that_the_model_combines_with_another(past):
    """As in Doge. Such a mask has an element for every query and key."""
    model = patch(small())
    S, cache = sum(LENGTHS), DynamicCache()
    if past:
        cache.update(*(torch.zeros(1, 2, past, 16, device=DEVICE) for _ in range(2)), 0)
    documents.note_position_ids(model, (), {"position_ids": POSITIONS})
    try:
        mask = masking_utils.create_causal_mask(
            config=model.config, inputs_embeds=torch.zeros(1, S, 64, device=DEVICE), attention_mask=None,
            allow_is_causal_skip=False, **{CACHE: cache},
        )  # fmt: skip
    finally:
        documents.forget_position_ids(model, (), None)
    expected = torch.block_diag(*(torch.ones(n, n).tril() for n in LENGTHS)).bool()
    continued = torch.zeros(S, past, dtype=torch.bool)  # the first document continues that of the cache
    continued[: LENGTHS[0]] = True
    assert torch.equal(mask[0, 0].cpu(), torch.cat((continued, expected), 1))


@pytest.mark.skipif(DEVICE == "cuda", reason="the host does not read positions on a GPU")
def test_positions_on_the_cpu_that_start_no_document_make_no_bounds():
    """As those that `generate` passes with a prompt."""
    model, seen = patch(small()), []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(kwargs["attention_mask"].numel())

    model.model.layers[0].self_attn.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        model(IDS, position_ids=torch.arange(IDS.shape[1])[None], use_cache=True)
        model(IDS, position_ids=POSITIONS, use_cache=True)
    model.generate(IDS, max_new_tokens=1, min_new_tokens=1)
    assert seen[0] == seen[2] == 0 < seen[1]


def test_a_call_inside_another_one_leaves_the_documents_of_the_outer_one():
    """As of a reward model in a hook, before the masks of the outer model are made."""
    model, other = patch(small()), patch(small("mistral"))
    with torch.no_grad():
        expected = model(IDS, position_ids=POSITIONS, use_cache=True).logits
        for inner in (model, other):
            calls: list[Any] = []

            def call(*_: Any, inner: Any = inner, calls: list[Any] = calls) -> None:
                if not calls:
                    calls.append(inner)
                    inner(IDS, use_cache=True)

            handle = model.model.embed_tokens.register_forward_hook(call)
            assert torch.equal(model(IDS, position_ids=POSITIONS, use_cache=True).logits, expected)
            assert calls == [inner]
            handle.remove()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_an_exception_in_a_forward_leaves_no_documents_for_the_next_call(cache):
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    model, ids = patch(small()), tokens(1, sum(LENGTHS))
    options = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": cache, "output_logits": True}

    def generate() -> torch.Tensor:
        return torch.cat(model.generate(ids, **options, return_dict_in_generate=True).logits)

    expected = generate()
    hook = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(ids, position_ids=POSITIONS)
    hook.remove()
    assert torch.equal(generate(), expected)


def test_rows_of_a_batch_have_different_documents():
    ids = tokens(2, 12)
    positions = torch.tensor([[*range(5), *range(7)], [*range(10), *range(2)]], device=DEVICE)
    model = small()

    def separately(model: Any) -> Results:
        pieces = ((0, 0, 5), (0, 5, 12), (1, 0, 10), (1, 10, 12))
        return {"logits": torch.cat([model(ids[row : row + 1, a:b]).logits[0] for row, a, b in pieces])}

    for use_cache in (True, False):

        def together(model: Any, use_cache: bool = use_cache) -> Results:
            return {"logits": model(ids, position_ids=positions, use_cache=use_cache).logits.flatten(0, 1)}

        with torch.no_grad():
            compare_with_stock(patched(model), model, separately, together)


# Positions of one document that do not increase by one, as in PoSE, parallel branches and ablations of positions.
# Without a cache, Transformers' mask and ours start a document at every such step. With a cache, neither does.
IRREGULAR = {
    "a jump": [*range(8), *range(48, 56)],
    "repeated": [0, 1, 2, 3, 3, 3, 3, *range(4, 13)],
    "constant": [0] * 16,
    "half steps": [i / 2 for i in range(16)],
    "beginning late": [*range(30, 46)],
}


@changes
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("positions", IRREGULAR)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_irregular_positions_start_documents_as_in_stock(family, positions, use_cache, change):
    positions = torch.tensor([IRREGULAR[positions]] * 2, device=DEVICE)
    model = small(family)
    run = logits_of(tokens(2, 16), position_ids=positions, use_cache=use_cache)
    compare_with_stock(changed(model, change), model, run)


@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_positions_start_no_document_if_there_is_an_attention_mask(side):
    ids = tokens(1, 24)
    mask = padding_mask(ids, side)
    model = small()
    ours = patched(model)

    def run(model: Any) -> Results:
        return {"logits": model(ids, attention_mask=mask, position_ids=POSITIONS).logits[mask.bool()]}

    with torch.no_grad():
        compare_with_stock(ours, model, run)
        masked = run(ours)["logits"]
        assert (masked - ours(ids, position_ids=POSITIONS).logits[mask.bool()]).abs().max() > 1e-2


def test_a_call_without_positions_forgets_those_of_the_call_before():
    model = small()
    ours, ids = patched(model), IDS
    with torch.no_grad():
        ours(ids, position_ids=POSITIONS)
    compare_with_stock(ours, model, logits_of(ids))
    with Calls() as calls:
        ours(ids)
    assert all(call["kv_start"] is None for call in calls.of("attention_forward"))
