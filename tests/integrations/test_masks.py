"""Masks as ranges of keys say what Transformers' own masks say, for each mask that Transformers composes."""

from __future__ import annotations

import copy
import inspect
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("transformers", minversion="4.57")

from transformers import DynamicCache, LlamaConfig, StaticCache, masking_utils

from llama_kernels.integrations.transformers import masks
from llama_kernels.integrations.transformers.attention import NAME, attention_forward
from llama_kernels.integrations.transformers.intervals import Window
from tests.integrations.small import VERSION, WithoutWaiting, not_interpreted
from tests.support.environment import DEVICE
from tests.support.ideal import drawn, ideal_attention
from tests.support.judge import judge

pytestmark = not_interpreted

B, S, WINDOW, SCALE = 2, 12, 4, 0.25
BIDIRECTIONAL = ("create_bidirectional_mask", "create_bidirectional_sliding_window_mask")
CREATE = {
    "causal": "create_causal_mask",
    "sliding": "create_sliding_window_causal_mask",
    "chunked": "create_chunked_causal_mask",
    "bidirectional": BIDIRECTIONAL[0],
    "bidirectional sliding": BIDIRECTIONAL[1],
}
LAYERS = {"sliding": "sliding_attention", "chunked": "chunked_attention"}


class State(NamedTuple):
    """What a cache holds when the mask of `queries` new tokens is made."""

    queries: int
    past: int = 0
    cache: str | None = None


STATES = {
    "no cache": State(S),
    "prefill": State(S, 0, "dynamic"),
    "second piece": State(5, 7, "dynamic"),
    "second piece of one window": State(3, 4, "dynamic"),
    "step": State(1, 11, "dynamic"),
    "piece far along": State(5, 20, "dynamic"),
    "step far along": State(1, 20, "dynamic"),
    "static prefill": State(5, 0, "static"),
    "static second piece": State(5, 3, "static"),
    "static step": State(1, 9, "static"),
}


class Without(Exception):
    """The installed Transformers has not what is asked for."""


def config_for(kind: str) -> Any:
    config = LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8)
    config.sliding_window = config.attention_chunk_size = WINDOW
    config.layer_types = [LAYERS.get(kind, "full_attention")]
    return config


def cache_in(state: State, config: Any) -> Any:
    if state.cache is None:
        return None
    cache = DynamicCache(config=config) if state.cache == "dynamic" else StaticCache(config=config, max_cache_len=16)
    kept = torch.zeros(B, 1, max(state.past, 1), 8, device=DEVICE)
    if state.past:
        cache.update(kept, kept, 0, {"cache_position": torch.arange(state.past, device=DEVICE)})
    return cache


def call_of(attention: str, name: str, config: Any, state: State, cache: Any = None, **given: Any) -> tuple[Any, dict]:
    """One of Transformers' functions that make masks, and its arguments in a model whose attention is `attention`."""
    create = getattr(masking_utils, name, None)
    if create is None:
        raise Without(name)
    names = inspect.signature(create).parameters
    config = copy.deepcopy(config)
    config._attn_implementation = attention
    call = {"attention_mask": None, **given}
    if missing := {name for name, value in call.items() if value is not None and name not in names}:
        raise Without(f"{name}({', '.join(missing)})")
    embeds = torch.zeros(B, state.queries, 8, device=DEVICE)
    call |= {"config": config, "inputs_embeds" if "inputs_embeds" in names else "input_embeds": embeds}
    call["cache" if "cache" in names else "past_key_values"] = cache
    if "position_ids" in names:
        call.setdefault("position_ids", None)
    if "cache_position" in names:
        call["cache_position"] = torch.arange(state.past, state.past + state.queries, device=DEVICE)
    return create, call


def created(*args: Any, **given: Any) -> Any:
    create, call = call_of(*args, **given)
    return create(**call)


def stock_mask(name: str, config: Any, state: State, cache: Any = None, **given: Any) -> torch.Tensor:
    """(B, Sq, Sk) bool: which query sees which key, written out by Transformers."""
    mask = created("eager", name, config, state, cache, **given)
    if mask is None:  # a bidirectional mask that hides nothing
        return torch.ones(B, state.queries, state.queries, dtype=torch.bool, device=DEVICE)
    return (mask[:, 0] == 0).expand(B, -1, -1)


def expanded(mask: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """A mask as one bool for each query and key, whether it is a range or written out already."""
    if mask.dtype == torch.bool:
        return mask[:, 0].expand(expected.shape)
    return masks.written_out(mask, *expected.shape[1:])[:, 0].expand(expected.shape)


def is_range(mask: torch.Tensor) -> bool:
    return mask.dtype == torch.int32 and mask.ndim == 4


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Masks are made without the host waiting for the device."""

    def key_ranges(*args: Any, **kwargs: Any) -> Any:
        with WithoutWaiting():
            return masks.key_ranges(*args, **kwargs)

    monkeypatch.setitem(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, NAME, key_ranges)


@pytest.fixture(params=["eager", "traced"])
def way(request, monkeypatch):
    """Closures are read, or, as under torch.compile, asked key by key."""
    if request.param == "traced":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    return request.param


def padding(side: str, length: int) -> torch.Tensor | None:
    if side == "none":
        return None
    mask = torch.ones(B, length, dtype=torch.int64, device=DEVICE)
    if side == "left":
        mask[0, : length // 2], mask[1, :1] = 0, 0
    elif side == "right":
        mask[0, -2:] = 0
    elif side == "holes":  # virtual tokens, then padding on the left; and a hole amid tokens
        mask[0, 1 : length // 2], mask[1, -4:-2] = 0, 0
    elif side == "empty":
        mask[0] = 0
    return mask


# --- compositions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["none", "left", "right", "holes", "empty"])
@pytest.mark.parametrize(
    ("kind", "state"),
    [(kind, state) for kind in CREATE for state in STATES if state == "no cache" or CREATE[kind] not in BIDIRECTIONAL],
)
def test_a_mask_of_padding_and_window(kind, state, side, way):
    state, config = STATES[state], config_for(kind)
    cache = cache_in(state, config)
    mask = padding(side, state.past + state.queries)
    try:
        expected = stock_mask(CREATE[kind], config, state, cache, attention_mask=mask)
    except Without as missing:
        pytest.skip(f"this Transformers has no {missing}")
    for training in (True, False):
        with torch.set_grad_enabled(training):
            ours = created(NAME, CREATE[kind], config, state, cache, attention_mask=mask)
        assert is_range(ours)
        assert torch.equal(expanded(ours, expected), expected)


@pytest.mark.parametrize(
    ("kind", "window"),
    [("causal", Window(-1, 0)), ("sliding", Window(3, 0)), ("bidirectional", Window(-1, -1)),
     ("bidirectional sliding", Window(4, 4))],
)  # fmt: skip
def test_a_mask_without_padding_holds_no_element(kind, window):
    """The host knows the window, and no memory is read, in training, in a prefill and in a step."""
    for state in (STATES["no cache"], STATES["prefill"], STATES["second piece"], STATES["step"]):
        if state.cache and CREATE[kind] in BIDIRECTIONAL:
            continue
        if state.past and VERSION < (5, 0):
            continue  # Transformers 4 has the offset in device memory
        config = config_for(kind)
        try:
            mask = created(NAME, CREATE[kind], config, state, cache_in(state, config))
        except Without as missing:
            pytest.skip(f"this Transformers has no {missing}")
        assert mask.numel() == 0 and masks.unpack(mask, state.queries, S) == window


def test_no_mask_has_an_element_for_each_query_and_key():
    state = State(64)
    for side in ("left", "holes"):
        mask = created(NAME, CREATE["causal"], config_for("causal"), state, attention_mask=padding(side, 64))
        assert mask.numel() <= 5 * B * 64


# Positions of packed documents, as Transformers reads them without a cache: each step other than +1 starts one.
POSITIONS = {
    "documents": [0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 5],
    "a document that begins at 3": [3, 4, 5, 6, 7, 3, 4, 5, 0, 1, 2, 3],
    "jumps": [0, 1, 2, 3, 9, 10, 11, 12, 40, 41, 42, 43],
    "repeats": [0, 1, 2, 2, 2, 2, 3, 4, 5, 6, 7, 8],
    "standing still": [0] * 12,
    "half steps": [i / 2 for i in range(12)],
}


@pytest.mark.parametrize("rows", ["one row for all", "a row for each"])
@pytest.mark.parametrize("name", POSITIONS)
@pytest.mark.parametrize("kind", ["causal", "sliding", "chunked"])
def test_packed_documents(kind, name, rows, way):
    positions = torch.tensor([POSITIONS[name]], device=DEVICE)
    if rows == "a row for each":
        positions = torch.cat((positions, torch.arange(S, device=DEVICE)[None]))
    call = {"position_ids": positions}
    expected = stock_mask(CREATE[kind], config_for(kind), State(S), **call)
    ours = created(NAME, CREATE[kind], config_for(kind), State(S), **call)
    assert is_range(ours)
    assert torch.equal(expanded(ours, expected), expected)


BLOCKS = {
    "one image": [[-1, -1, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1]] * 2,
    "two images": [[-1, 0, 0, 0, -1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, -1, -1, -1, -1, -1, 1, 1, -1, -1]],
    "images side by side": [[0, 0, 0, 1, 1, 1, -1, 2, 2, 2, -1, -1]] * 2,
    "a prefix": [[0] * 7 + [-1] * 5, [0] * 3 + [-1] * 9],
    "no image": [[-1] * 12] * 2,
}


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("state", ["no cache", "prefill", "static prefill"])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_that_see_all_of_themselves(name, state, side, way):
    """The images of Gemma 3 and the prefix of PaliGemma."""
    state = STATES[state]._replace(queries=S)
    blocks, config = torch.tensor(BLOCKS[name], device=DEVICE), config_for("causal")
    cache = cache_in(state, config)
    call = {"block_sequence_ids": blocks, "attention_mask": padding(side, S)}
    try:
        expected = stock_mask(CREATE["causal"], config, state, cache, **call)
    except Without as missing:
        pytest.skip(f"this Transformers has no {missing}")
    ours = created(NAME, CREATE["causal"], config, state, cache, **call)
    assert is_range(ours) == (way == "eager")  # traced code cannot ask whether the blocks are contiguous
    assert torch.equal(expanded(ours, expected), expected)


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("kind", ["causal", "sliding", "bidirectional"])
def test_a_mask_that_the_model_combines_with_another_is_written_out(kind, side):
    """T5 Gemma 2 and Falcon ask for it: their own code adds something to the mask."""
    option = "allow_is_bidirectional_skip" if kind == "bidirectional" else "allow_is_causal_skip"
    call = {"attention_mask": padding(side, S), option: False}
    try:
        expected = stock_mask(CREATE[kind], config_for(kind), State(S), **call)
    except Without as missing:
        pytest.skip(f"this Transformers has no {missing}")
    ours = created(NAME, CREATE[kind], config_for(kind), State(S), **call)
    assert ours.dtype == torch.bool
    assert torch.equal(expanded(ours, expected), expected)


def test_padding_that_has_the_number_of_a_block():
    """PaliGemma's processor gives padding the number of the prefix: on the right it is no second piece of it."""
    blocks = torch.tensor([[0] * 5 + [-1] * 5 + [0] * 2, BLOCKS["a prefix"][1]], device=DEVICE)
    call = {"block_sequence_ids": blocks, "attention_mask": padding("right", S)}
    try:
        expected = stock_mask(CREATE["causal"], config_for("causal"), State(S), **call)
    except Without as missing:
        pytest.skip(f"this Transformers has no {missing}")
    ours = created(NAME, CREATE["causal"], config_for("causal"), State(S), **call)
    assert is_range(ours) and torch.equal(expanded(ours, expected), expected)
    assert attended(ours, *inputs()).isfinite().all()


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_cut_by_a_window(name, side):
    """Gemma 3's sliding layers: and(or(causal, blocks), window)."""
    if not hasattr(masking_utils, "blockwise_overlay"):
        pytest.skip("this Transformers has no blockwise_overlay")
    call = {
        "or_mask_function": masking_utils.blockwise_overlay(torch.tensor(BLOCKS[name], device=DEVICE)),
        "and_mask_function": masking_utils.sliding_window_overlay(WINDOW),
        "attention_mask": padding(side, S),
    }
    expected = stock_mask(CREATE["causal"], config_for("causal"), State(S), **call)
    ours = created(NAME, CREATE["causal"], config_for("causal"), State(S), **call)
    assert is_range(ours)
    assert torch.equal(expanded(ours, expected), expected)


@pytest.mark.parametrize("shown", [[1, 0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 1], [0, 1] * 6, [0] * 12, [1] * 12])
def test_any_mask_of_keys(shown, way):
    mask = torch.tensor([shown, [1] * 12], device=DEVICE)
    for kind in ("causal", "sliding"):
        expected = stock_mask(CREATE[kind], config_for(kind), State(S), attention_mask=mask)
        ours = created(NAME, CREATE[kind], config_for(kind), State(S), attention_mask=mask)
        assert is_range(ours) and torch.equal(expanded(ours, expected), expected)


# --- what is written out ---------------------------------------------------------------------------------------------


def even_keys(batch_idx, head_idx, q_idx, kv_idx):
    return kv_idx % 2 == 0


@pytest.mark.parametrize("argument", ["or_mask_function", "and_mask_function"])
@pytest.mark.parametrize("side", ["none", "left"])
def test_a_function_that_is_unknown_is_written_out(argument, side, way):
    if way == "traced" and VERSION < (5, 0):
        pytest.skip("Transformers 4 does not tell that a function is the caller's, and traced code cannot be read")
    for kind in ("causal", "sliding"):
        call = {argument: even_keys, "attention_mask": padding(side, S)}
        expected = stock_mask(CREATE[kind], config_for(kind), State(S), **call)
        ours = created(NAME, CREATE[kind], config_for(kind), State(S), **call)
        assert ours.dtype == torch.bool and torch.equal(ours[:, 0].expand(expected.shape), expected)


def test_blocks_that_need_not_be_contiguous_are_written_out():
    """Molmo 2: all images of a sequence are one block."""
    config = config_for("causal")
    config.model_type = "molmo2_text"
    blocks = torch.tensor([[-1, 0, 0, -1, 0, 0, -1, -1, -1, -1, -1, -1]] * 2, device=DEVICE)
    try:
        expected = stock_mask(CREATE["causal"], config, State(S), block_sequence_ids=blocks)
    except Without as missing:
        pytest.skip(f"this Transformers has no {missing}")
    ours = created(NAME, CREATE["causal"], config, State(S), block_sequence_ids=blocks)
    assert ours.dtype == torch.bool and torch.equal(ours[:, 0].expand(expected.shape), expected)


def inputs(queries: int = S, keys: int = S, rows: int = B) -> list[torch.Tensor]:
    return [torch.randn(rows, H, n, 16, device=DEVICE) for H, n in ((4, queries), (2, keys), (2, keys))]


def attended(mask: torch.Tensor | None, *qkv: torch.Tensor, **options: Any) -> torch.Tensor:
    with WithoutWaiting():
        return attention_forward(torch.nn.Module(), *qkv, mask, scaling=SCALE, **options)[0]


def test_blocks_that_are_not_contiguous_give_nan_and_no_number():
    blocks = torch.tensor([[-1, 0, 0, -1, 0, 0, -1, -1, -1, -1, -1, -1], BLOCKS["one image"][0]], device=DEVICE)
    try:
        mask = created(NAME, CREATE["causal"], config_for("causal"), State(S), block_sequence_ids=blocks)
    except Without as missing:
        pytest.skip(f"this Transformers has no {missing}")
    out = attended(mask, *inputs())
    assert out[0].isnan().all() and out[1].isfinite().all()


# --- what is done with a mask ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["none", "left", "right", "holes"])
@pytest.mark.parametrize("kind", ["causal", "sliding"])
def test_a_mask_cut_to_its_last_queries(kind, side):
    for state in (STATES["no cache"], STATES["second piece"], STATES["static second piece"]):
        config = config_for(kind)
        cache = cache_in(state, config)
        mask = padding(side, state.past + state.queries)
        expected = stock_mask(CREATE[kind], config, state, cache, attention_mask=mask)
        ours = created(NAME, CREATE[kind], config, state, cache, attention_mask=mask)
        for n in (1, 3):
            assert torch.equal(expanded(ours[:, :, -n:, :], expected[:, -n:]), expected[:, -n:])


@pytest.mark.parametrize("side", ["none", "left", "holes"])
def test_a_mask_cut_to_the_keys_there_are(side):
    state, config = State(S), config_for("causal")
    expected = stock_mask(CREATE["causal"], config, state, attention_mask=padding(side, S))
    ours = created(NAME, CREATE["causal"], config, state, attention_mask=padding(side, S))
    assert torch.equal(expanded(ours[:, :, :, :S], expected), expected)


@pytest.mark.parametrize("side", ["none", "left", "holes"])
@pytest.mark.parametrize("kind", ["causal", "sliding", "chunked"])
def test_attention_reads_no_value_of_a_mask_on_the_host(kind, side):
    """And each row's result is that of the mask written out."""
    for state in (STATES["no cache"], STATES["second piece"], STATES["static step"]):
        for training in (True, False):
            config = config_for(kind)
            cache = cache_in(state, config)
            mask = padding(side, state.past + state.queries)
            see = stock_mask(CREATE[kind], config, state, cache, attention_mask=mask)
            q, k, v = inputs(state.queries, see.shape[-1])
            with torch.set_grad_enabled(training):
                ours = created(NAME, CREATE[kind], config, state, cache, attention_mask=mask)
                out = attended(ours, q, k, v)
            ideal = drawn(ideal_attention, q, k, v, see[:, None], SCALE, None, None, q, q[..., 0])[0]
            judge("attention", out.transpose(1, 2), in_float64(q, k, v, see), ideal)


def in_float64(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, see: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.double() for x in (q, *(x.repeat_interleave(2, 1) for x in (k, v))))
    p = torch.softmax((q @ k.mT * SCALE).masked_fill(~see[:, None], -torch.inf), -1)
    return p.nan_to_num(0) @ v  # a row that sees no key is 0


def test_documents_by_cu_seq_lens_without_waiting():
    cu = torch.tensor([0, 5, 12, 24], dtype=torch.int32, device=DEVICE)
    how = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 12, "max_length_k": 12}
    q, k, v = inputs(24, 24, 1)
    number = torch.bucketize(torch.arange(24, device=DEVICE), cu, right=True)
    see = (number[:, None] == number) & torch.ones(24, 24, dtype=torch.bool, device=DEVICE).tril()
    ideal = drawn(ideal_attention, q, k, v, see[None, None], SCALE, None, None, q, q[..., 0])[0]
    judge("attention", attended(None, q, k, v, **how).transpose(1, 2), in_float64(q, k, v, see[None]), ideal)


# --- compiled --------------------------------------------------------------------------------------------------------


def test_masks_are_made_in_one_graph(monkeypatch):
    """torch.compile does not let closures be read: the masks are the same."""
    mask = padding("left", S)
    documents = torch.tensor([POSITIONS["documents"]], device=DEVICE)
    blocks = torch.tensor(BLOCKS["two images"], device=DEVICE)
    calls = [(kind, {"attention_mask": mask}) for kind in ("causal", "sliding", "chunked")]
    calls += [("causal", {}), ("sliding", {}), ("causal", {"position_ids": documents})]
    if hasattr(masking_utils, "blockwise_overlay"):
        calls.append(("causal", {"block_sequence_ids": blocks}))
    if hasattr(masking_utils, BIDIRECTIONAL[1]):
        calls += [(kind, {"attention_mask": mask}) for kind in ("bidirectional", "bidirectional sliding")]
    configs = {kind: config_for(kind) for kind in CREATE}
    expected = [stock_mask(CREATE[kind], configs[kind], State(S), **given) for kind, given in calls]

    ready = [call_of(NAME, CREATE[kind], configs[kind], State(S), **given) for kind, given in calls]

    def make_all():
        return [create(**call) for create, call in ready]

    monkeypatch.setitem(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, NAME, masks.key_ranges)
    torch._dynamo.reset()
    made = torch.compile(make_all, backend="eager", fullgraph=True)()
    for ours, see, (_, given) in zip(made, expected, calls, strict=True):
        assert is_range(ours) == ("block_sequence_ids" not in given) and torch.equal(expanded(ours, see), see)
