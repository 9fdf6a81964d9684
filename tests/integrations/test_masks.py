"""Masks as ranges of keys hide the same keys as Transformers' own masks, for each mask that Transformers composes."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import masking_utils

from llama_kernels.integrations.transformers import masks, packed_masks
from llama_kernels.integrations.transformers.attention import NAME
from llama_kernels.integrations.transformers.intervals import WindowSize
from tests.integrations.mask_cases import (
    BIDIRECTIONAL,
    BLOCKS,
    CREATE,
    POSITIONS,
    STATES,
    WINDOW,
    B,
    Masks,
    S,
    State,
    config_for,
    is_ranges,
    no_waiting,  # noqa: F401  a fixture
    padding,
    visible,
)
from tests.integrations.small import HOST_KNOWS_POSITIONS, VERSION, not_interpreted
from tests.support.environment import DEVICE

pytestmark = not_interpreted


@pytest.fixture(params=["eager", "traced"])
def way(request, monkeypatch):
    """How intervals are found: closures are read, or, as under torch.compile, the mask function is called."""
    if request.param == "traced":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    return request.param


@pytest.fixture
def values_read(monkeypatch):
    """The masks of CPU tensors, of which the host may read the values. `no_waiting` has those of a GPU."""
    if DEVICE == "cuda":
        pytest.skip("on a GPU the host does not read the mask")
    monkeypatch.setitem(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, NAME, masks.key_ranges)


# --- masks as ranges of keys -----------------------------------------------------------------------------------------


with_padding = pytest.mark.parametrize(
    ("side", "kind", "state"),
    [
        (side, kind, state)
        for side in ("none", "left", "right", "holes", "empty")
        for kind in CREATE
        for state in STATES
        if state == "no cache" or CREATE[kind] not in BIDIRECTIONAL
    ],
)


@with_padding
def test_ranges_for_each_kind_of_mask_with_padding(kind, state, side, way):
    state = STATES[state]
    of_kind = Masks(kind, state, attention_mask=padding(side, state.past + state.queries))
    for training in (True, False):
        with torch.set_grad_enabled(training):
            of_kind.check()


@with_padding
def test_ranges_of_masks_whose_values_are_read(kind, state, side, values_read):
    state = STATES[state]
    for attention_mask in (padding(side, state.past + state.queries), torch.ones(B, state.past + state.queries)):
        Masks(kind, state, attention_mask=attention_mask).check()


@pytest.mark.parametrize(
    ("kind", "window"),
    [("causal", WindowSize(-1, 0)), ("sliding", WindowSize(3, 0)), ("bidirectional", WindowSize(-1, -1)),
     ("bidirectional sliding", WindowSize(4, 4))],
)  # fmt: skip
def test_a_mask_without_padding_has_no_elements(kind, window):
    """In training, in a prefill and in a step, the host knows the window and reads no memory."""
    for state in (STATES["no cache"], STATES["prefill"], STATES["second piece"], STATES["step"]):
        if state.cache and CREATE[kind] in BIDIRECTIONAL:
            continue
        if state.past and not HOST_KNOWS_POSITIONS:
            continue
        mask = Masks(kind, state).ours()
        assert mask.numel() == 0 and packed_masks.unpack(mask, state.queries, S) == window


@pytest.mark.parametrize("fields", packed_masks._FORMATS.values(), ids=len)
def test_a_packed_mask_is_read_as_it_was_written(fields):
    """For the last queries and the first keys, and also with more queries than keys."""
    of_queries = ("start", "end", "prefix")
    for Sq, Sk in ((3, 7), (7, 3)):
        given = {name: torch.randint(9, (2, Sq if name in of_queries else Sk)).int() for name in fields}
        found = packed_masks.unpack(packed_masks.pack(packed_masks.KeyRanges(**given)), Sq - 1, Sk - 1)
        for name, x in found._asdict().items():
            expected = given.get(name)
            if expected is None:
                assert x is None, name
            else:
                assert torch.equal(x, expected[:, 1:] if name in of_queries else expected[:, :-1]), name


@pytest.mark.parametrize(
    ("side", "state", "fields"),
    [("left", "no cache", 2), ("right", "no cache", 2), ("empty", "no cache", 2), ("holes", "no cache", 4),
     ("left", "step", 2), ("holes", "step", 3), ("left", "static step", 2)],
)  # fmt: skip
def test_a_mask_on_the_cpu_whose_tokens_are_one_range_is_that_range(side, state, fields, values_read):
    """k and v are not rearranged for it. With padding between tokens the mask has more fields."""
    state = STATES[state]
    of_kind = Masks("causal", state, attention_mask=padding(side, state.past + state.queries))
    with torch.no_grad():
        assert len(packed_masks._FORMATS[of_kind.ours().shape[1]]) == fields
        of_kind.check()


@pytest.mark.parametrize(
    ("kind", "state"),
    [*itertools.product(("causal", "sliding"), ("no cache", "prefill", "step")),
     *itertools.product(("bidirectional", "bidirectional sliding"), ("no cache",))],
)  # fmt: skip
def test_a_mask_on_the_cpu_that_shows_every_key_has_no_elements(kind, state, values_read):
    """In training and in a prefill it also says that position_ids start no documents, as in stock models."""
    if state == "step" and not HOST_KNOWS_POSITIONS:
        pytest.skip("this Transformers has the positions of queries in device memory")
    keys = STATES[state].past + STATES[state].queries

    def of_mask(mask: torch.Tensor) -> Masks:
        return Masks(kind, STATES[state], attention_mask=mask)

    everything = torch.ones(B, keys, dtype=torch.int64)
    mask = of_mask(everything).ours()
    assert mask.numel() == 0 and packed_masks.is_one_document(mask) is (state != "step")
    assert packed_masks.is_one_document(mask[:, :, -2:, :1]) is (state != "step")  # as model code slices it
    of_mask(everything).check()
    padded = of_mask(padding("left", keys)).ours()
    assert padded.numel() and not packed_masks.is_one_document(padded)


@pytest.mark.parametrize("tracing", ["make_fx", "fake", "vmap"])
def test_a_traced_graph_does_not_depend_on_the_values_of_a_mask(tracing):
    mask = torch.ones(B, S, dtype=torch.bool)
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(masks._has_values(x))
        return x + 0

    assert masks._has_values(mask)
    if tracing == "make_fx":
        torch.fx.experimental.proxy_tensor.make_fx(look)(mask)
    elif tracing == "fake":
        with torch._subclasses.FakeTensorMode() as mode:
            look(mode.from_tensor(mask))
    else:
        torch.func.vmap(look)(mask)
    assert seen == [False]


@pytest.mark.parametrize("shown", ["right", "holes"])
def test_a_mask_of_one_query_is_that_of_every_query(shown, way):
    """Some models make one for the keys alone, where all queries see the same. Stock broadcasts it."""
    if VERSION < (5, 0):
        pytest.skip("Transformers 4 has no masks of both directions")
    mask = padding(shown).to(DEVICE)
    call = {"batch_size": B, "q_length": 1, "kv_length": S, "mask_function": masking_utils.bidirectional_mask_function}
    ours = masks.key_ranges(**call, attention_mask=mask.bool(), device=mask.device)
    seen = packed_masks.written_out(ours, S, S)[:, 0]
    assert torch.equal(seen, mask.bool()[:, None].expand(B, S, S))


@pytest.mark.parametrize("side", ["left", "holes"])
def test_the_elements_of_a_mask_grow_linearly_with_the_length(side):
    assert Masks("causal", State(64), attention_mask=padding(side, 64)).ours().numel() <= 19 * B * 64


@pytest.mark.parametrize("rows", ["one row for all", "a row for each"])
@pytest.mark.parametrize("name", POSITIONS)
@pytest.mark.parametrize("kind", ["causal", "sliding", "chunked"])
def test_ranges_for_packed_documents(kind, name, rows, way):
    positions = torch.tensor([POSITIONS[name]], device=DEVICE)
    if rows == "a row for each":
        positions = torch.cat((positions, torch.arange(S, device=DEVICE)[None]))
    Masks(kind, position_ids=positions).check()


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("state", ["no cache", "prefill", "static prefill"])
@pytest.mark.parametrize("name", BLOCKS)
def test_ranges_for_blocks_of_mutually_visible_tokens(name, state, side, way):
    """As images are in Gemma 3, and the prefix in PaliGemma. Traced code cannot ask whether blocks are contiguous."""
    blocks = torch.tensor(BLOCKS[name], device=DEVICE)
    state = STATES[state]._replace(queries=S)
    of_blocks = Masks("causal", state, block_sequence_ids=blocks, attention_mask=padding(side))
    of_blocks.check(ranges=way == "eager")


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", BLOCKS)
def test_ranges_for_blocks_inside_a_window(name, side):
    """As in Gemma 3's sliding layers: and(or(causal, blocks), window)."""
    if not hasattr(masking_utils, "blockwise_overlay"):
        pytest.skip("this Transformers has no blockwise_overlay")
    Masks(
        "causal",
        or_mask_function=masking_utils.blockwise_overlay(torch.tensor(BLOCKS[name], device=DEVICE)),
        and_mask_function=masking_utils.sliding_window_overlay(WINDOW),
        attention_mask=padding(side),
    ).check()


@pytest.mark.parametrize("shown", [[1, 0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 1], [0, 1] * 6, [0] * 12, [1] * 12])
@pytest.mark.parametrize("kind", ["causal", "sliding"])
def test_ranges_for_any_attention_mask(kind, shown, way):
    Masks(kind, attention_mask=torch.tensor([shown, [1] * 12], device=DEVICE)).check()


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("state", ["no cache", "second piece", "step"])
def test_ranges_for_a_window_of_the_own_key_alone(state, side):
    config = config_for("sliding")
    config.sliding_window = 1
    of_state = STATES[state]
    Masks("sliding", of_state, config, attention_mask=padding(side, of_state.past + of_state.queries)).check()


# --- ordinary masks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("kind", ["causal", "sliding", "bidirectional"])
def test_a_mask_that_the_model_combines_with_another_is_an_ordinary_mask(kind, side):
    """T5 Gemma 2 and Falcon ask for one, since their code adds to the mask."""
    option = "allow_is_bidirectional_skip" if kind == "bidirectional" else "allow_is_causal_skip"
    Masks(kind, attention_mask=padding(side), **{option: False}).check(ranges=False)


def even_keys(batch_idx, head_idx, q_idx, kv_idx):
    return kv_idx % 2 == 0


@pytest.mark.parametrize("argument", ["or_mask_function", "and_mask_function"])
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("kind", ["causal", "sliding"])
def test_a_composition_with_an_unknown_function_is_an_ordinary_mask(kind, argument, side, way):
    if way == "traced" and VERSION < (5, 0):
        pytest.skip("Transformers 4 does not tell that a function is the caller's, and traced code cannot be read")
    Masks(kind, attention_mask=padding(side), **{argument: even_keys}).check(ranges=False)


def test_blocks_of_a_model_whose_blocks_need_not_be_contiguous_are_an_ordinary_mask():
    """In Molmo 2, all images of a sequence are one block."""
    config = config_for("causal")
    config.model_type = "molmo2_text"
    blocks = torch.tensor([[-1, 0, 0, -1, 0, 0, -1, -1, -1, -1, -1, -1]] * 2, device=DEVICE)
    Masks("causal", config=config, block_sequence_ids=blocks).check(ranges=False)


# --- slices of a mask ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["none", "left", "right", "holes"])
@pytest.mark.parametrize("kind", ["causal", "sliding"])
def test_a_mask_can_be_sliced_to_the_last_queries(kind, side):
    for state in (STATES["no cache"], STATES["second piece"], STATES["static second piece"]):
        of_kind = Masks(kind, state, attention_mask=padding(side, state.past + state.queries))
        expected, ours = of_kind.stock(), of_kind.ours()
        for n in (1, 3):
            assert torch.equal(visible(ours[:, :, -n:, :], expected[:, -n:]), expected[:, -n:])


@pytest.mark.parametrize("side", ["none", "left", "holes"])
def test_a_mask_can_be_sliced_to_the_number_of_keys(side):
    causal = Masks("causal", attention_mask=padding(side))
    expected = causal.stock()
    assert torch.equal(visible(causal.ours()[:, :, :, :S], expected), expected)


# --- compiled --------------------------------------------------------------------------------------------------------


def test_masks_compile_into_one_graph(monkeypatch):
    """torch.compile cannot read closures; the masks are the same."""
    mask = padding("left")
    documents = torch.tensor([POSITIONS["documents"]], device=DEVICE)
    calls = [(kind, {"attention_mask": mask}) for kind in ("causal", "sliding", "chunked")]
    calls += [("causal", {}), ("sliding", {}), ("causal", {"position_ids": documents})]
    if hasattr(masking_utils, "blockwise_overlay"):
        calls.append(("causal", {"block_sequence_ids": torch.tensor(BLOCKS["two images"], device=DEVICE)}))
    if hasattr(masking_utils, BIDIRECTIONAL[1]):
        calls += [(kind, {"attention_mask": mask}) for kind in ("bidirectional", "bidirectional sliding")]
    each = [Masks(kind, **given) for kind, given in calls]
    ready = [one.call(NAME) for one in each]

    def make_all():
        return [create(**call) for create, call in ready]

    monkeypatch.setitem(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, NAME, masks.key_ranges)
    torch._dynamo.reset()
    made = torch.compile(make_all, backend="eager", fullgraph=True)()
    for one, ours in zip(each, made, strict=True):
        expected = one.stock()
        assert is_ranges(ours) == ("block_sequence_ids" not in one.given)
        assert torch.equal(visible(ours, expected), expected)


# --- blocks in Transformers ------------------------------------------------------------------------------------------

CONTIGUOUS = "a new number for each run of image tokens"
PREFIX = "one block, of the image or of the tokens before the answer"
# Models with masks of blocks, and why each block is one run of tokens, as masks.py assumes for all but molmo2.
REVIEWED = {
    "gemma3": CONTIGUOUS, "gemma4": CONTIGUOUS, "gemma4_unified": CONTIGUOUS, "diffusion_gemma": CONTIGUOUS,
    "paligemma": PREFIX, "git": PREFIX, "hrm_text": PREFIX, "deepseek_ocr2": PREFIX,
    "pi0": "two blocks: the prompt with the state, and the actions",
    "unlimited_ocr": "it adds a function of its own, so its masks are ordinary ones",
    "molmo2": "all images of a sequence are one block: an ordinary mask, by _SCATTERED_BLOCKS",
}  # fmt: skip


def test_every_model_with_masks_of_blocks_was_reviewed():
    models = Path(transformers.__file__).parent / "models"
    users = {
        path.parent.name
        for path in models.glob("*/modeling_*.py")
        if re.search(r"block_sequence_ids|blockwise_overlay", path.read_text())
    }
    assert users <= REVIEWED.keys(), (
        f"new models with masks of blocks: {sorted(users - REVIEWED.keys())}. If each block is one run of tokens, add "
        "the model to REVIEWED. If not, also add it to _SCATTERED_BLOCKS of masks.py: a block in two pieces gives NaN"
    )
