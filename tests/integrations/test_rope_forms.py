"""Models whose rotary embedding is not Llama's: patch replaces it, and the model computes what the stock one does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23")

from transformers import AutoConfig, AutoModelForCausalLM, Llama4VisionModel, PixtralVisionModel

from llama_kernels.integrations.transformers import report
from tests.integrations.comparison import Results, Run, compare_with_stock, logits_of, mean_square_of
from tests.integrations.families import LINEAR_FULL, SIZES, rope
from tests.integrations.families import stock as stock_of
from tests.integrations.small import Calls, not_interpreted, patched, randomized, stock_rows, tokens
from tests.support.environment import DEVICE

pytestmark = not_interpreted


def tower(cls: Any, **sizes: Any) -> Any:
    torch.manual_seed(1)
    return randomized(cls._from_config(cls.config_class(**sizes), attn_implementation="eager"))


def hidden_of(images: torch.Tensor) -> Callable[[Any], torch.Tensor]:
    return lambda model: model(images.to(model.dtype)).last_hidden_state


def pixtral() -> tuple[Any, Callable[[Any], torch.Tensor]]:
    """Two images of different sizes in one packed sequence; tables of rows and columns."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
             "image_size": 32, "patch_size": 4}  # fmt: skip
    images = torch.randn(2, 3, 32, 32, device=DEVICE)
    sizes_of_images = torch.tensor([[32, 24], [16, 32]], device=DEVICE)

    def run(model: Any) -> torch.Tensor:
        return model(images.to(model.dtype), image_sizes=sizes_of_images).last_hidden_state

    return tower(PixtralVisionModel, **sizes), run


def llama4_vision() -> tuple[Any, Callable[[Any], torch.Tensor]]:
    """Complex tables of columns and rows, and a class token that is not rotated."""
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
             "image_size": 16, "patch_size": 4, "vision_output_dim": 64, "projector_input_dim": 64,
             "projector_output_dim": 64}  # fmt: skip
    images = torch.randn(2, 3, 16, 16, device=DEVICE)

    return tower(Llama4VisionModel, **sizes), hidden_of(images)


def dinov3() -> tuple[Any, Callable[[Any], torch.Tensor]]:
    """A class token and registers before the patches: these are not rotated."""
    module = pytest.importorskip("transformers.models.dinov3_vit.modeling_dinov3_vit")
    sizes = {**VIT, "image_size": 32, "patch_size": 4, "num_register_tokens": 4}
    images = torch.randn(2, 3, 32, 24, device=DEVICE)

    return tower(module.DINOv3ViTModel, **sizes), hidden_of(images)


def sam3() -> tuple[Any, Callable[[Any], torch.Tensor]]:
    """A layer with windows and one without; pairs are interleaved, and the tables are 4-D."""
    module = pytest.importorskip("transformers.models.sam3.modeling_sam3")
    sizes = {**VIT, "image_size": 56, "patch_size": 14, "pretrain_image_size": 28, "window_size": 2,
             "global_attn_indexes": [1], "rope_parameters": {"rope_type": "axial", "rope_theta": 10000.0}}  # fmt: skip
    images = torch.randn(2, 3, 56, 56, device=DEVICE)

    return tower(module.Sam3ViTModel, **sizes), hidden_of(images)


def sam2_memory() -> tuple[Any, Callable[[Any], torch.Tensor]]:
    """Attention to the tokens of an image, and to a memory of three images and two tokens that are not rotated."""
    module = pytest.importorskip("transformers.models.sam2_video.modeling_sam2_video")
    if not hasattr(module, "Sam2VideoVisionRotaryEmbedding"):
        pytest.skip("this Transformers has another embedding")
    config = module.Sam2VideoConfig(
        memory_attention_hidden_size=64, memory_attention_num_layers=2, memory_attention_num_attention_heads=2,
        memory_attention_feed_forward_hidden_size=96, memory_attention_rope_feat_sizes=[4, 5],
        rope_parameters={"rope_type": "axial", "rope_theta": 10000.0},
    )  # fmt: skip
    config._attn_implementation = "eager"
    torch.manual_seed(1)
    model = randomized(module.Sam2VideoMemoryAttention(config))
    image, memory, places = (torch.randn(n, 1, d, device=DEVICE) for n, d in ((20, 64), (62, 64), (62, 64)))

    def run(model: Any) -> torch.Tensor:
        number = model.layer_norm.weight.dtype
        return model(image.to(number), memory.to(number), None, places.to(number), num_object_pointer_tokens=2)

    return model, run


VIT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
# Each with the number of its calls of our rotation in a forward.
TOWERS = {
    "pixtral": (pixtral, 2),
    "llama4": (llama4_vision, 2),
    "dinov3": (dinov3, 2),
    "sam3": (sam3, 2),
    "sam2_memory": (sam2_memory, 2 * (1 + 2)),  # self-attention; q and k of the attention to a memory
}


def check(stock: Any, run: Run) -> Calls:
    """Compare the patched model, in which every rotation is ours, with the stock one. Returns what it called."""
    ours, calls = patched(stock), Calls()
    assert not [kind for kind, _ in stock_rows(ours) if kind == "rope"]

    def recorded(model: Any) -> Results:
        with calls:
            return run(model)

    compare_with_stock(ours, stock, run, recorded)
    return calls


@pytest.mark.parametrize("name", TOWERS)
def test_vision_towers_equal_the_stock_ones(name):
    make, rotations = TOWERS[name]
    stock, output = make()
    assert len(check(stock, mean_square_of(output)).of("rope")) == 2 * rotations  # forward and backward


GPTJ = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8, "vocab_size": 99, "n_inner": 96}


@pytest.mark.parametrize("family", ["gptj", "codegen"])
def test_a_part_of_each_head_in_interleaved_pairs(family):
    sizes = {**GPTJ, "n_ctx": 64, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(family, **sizes)
    torch.manual_seed(1)
    stock = randomized(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    assert len(check(stock, logits_of(tokens())).of("rope")) == 2 * 2  # q and k of each layer


def narrower(stock: Any) -> Any:
    """The model with half of each row of its tables, as a partial_rotary_factor of 0.5 makes them."""

    def half(module: Any, args: Any, tables: Any) -> Any:
        halves = [x[..., : x.shape[-1] // 2] for x in (tables if isinstance(tables, tuple) else (tables,))]
        return tuple(halves) if isinstance(tables, tuple) else halves[0]

    for module in stock.modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            module.register_forward_hook(half)
    return stock


@pytest.mark.parametrize(
    "family",
    ["llama", "qwen3", "olmo2", "cohere", "helium", "ernie4_5", "gpt_oss", "gemma3n_text", "deepseek_v2",
     "deepseek_v3", "modernbert-decoder"],
)  # fmt: skip
def test_functions_that_rotate_whole_heads_refuse_narrower_tables_as_stock_does(family):
    stock = narrower(stock_of(family))
    for model in (stock, patched(stock)):
        with pytest.raises(RuntimeError, match="must match"):
            model(tokens())


@pytest.mark.parametrize("family", ["phi3", "nemotron", "glm4", "glm4_moe"])
def test_functions_that_rotate_a_part_of_each_head_take_narrower_tables(family):
    check(narrower(stock_of(family)), logits_of(tokens()))


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
def test_functions_that_rotate_q_or_k_alone(family):
    assert check(stock_of(family), logits_of(tokens())).of("rope")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_text_models_with_sections_run_our_rotation_in_text_and_vision(family):
    rows = report(patched(stock_of(family))).rows
    assert [row.ours for row in rows if row.kind == "rope"] == [True, True]


# --- several positions a token ---------------------------------------------------------------------------------------


def sections(*widths: int, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": rope(mrope_section=list(widths), **more)}


WHOLE, PART = sections(2, 3, 3, partial_rotary_factor=1.0), sections(2, 1, 1, partial_rotary_factor=0.5)
MROPE = {
    "qwen2_vl": ("Qwen2VLTextModel", WHOLE),
    "qwen2_5_vl": ("Qwen2_5_VLTextModel", WHOLE),
    "qwen2_5_omni": ("Qwen2_5OmniThinkerTextModel", WHOLE),
    "qwen3_vl": ("Qwen3VLTextModel", sections(4, 2, 2)),
    "qwen3_vl_moe": ("Qwen3VLMoeTextModel", sections(4, 2, 2)),
    "qwen3_omni_moe": ("Qwen3OmniMoeThinkerTextModel", sections(4, 2, 2)),
    "qwen3_5": ("Qwen3_5TextModel", {**PART, "layer_types": LINEAR_FULL}),
    "glm4v": ("Glm4vTextModel", WHOLE),
    "glm4v_moe": ("Glm4vMoeTextModel", {**PART, "first_k_dense_replace": 1}),
    "glm_ocr": ("GlmOcrTextModel", WHOLE),
    "glm_image": ("GlmImageTextModel", WHOLE),
    "ernie4_5_vl_moe": (
        "Ernie4_5_VLMoeTextModel",
        {**sections(3, 3, 2), "moe_intermediate_size": [32, 32], "moe_num_experts": 4, "moe_k": 4},
    ),
    "paddleocr_vl": ("PaddleOCRTextModel", WHOLE),
    "hunyuan_vl": ("HunYuanVLTextModel", sections(2, 2, 2, 2)),
    "cosmos3_edge": ("Cosmos3EdgeTextModel", WHOLE),
}


@pytest.mark.corpus(80)
@pytest.mark.parametrize("family", MROPE)
def test_text_models_with_several_positions_a_token(family):
    """Each axis has other positions; logits and gradients are those of the stock model."""
    name, settings = MROPE[family]
    module = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    if not hasattr(module, name):
        pytest.skip(f"this Transformers has no {name}")
    cls = getattr(module, name)
    config = cls.config_class(**copy.deepcopy({**SIZES, **settings}))
    config._experts_implementation = "eager"  # the grouped one has no float64
    torch.manual_seed(1)
    stock = randomized(cls._from_config(config, attn_implementation="eager"))
    ours, ids = patched(stock), tokens()
    assert not [kind for kind, _ in stock_rows(ours) if kind in ("rope", "rms_norm", "attention")]
    axes = len(settings["rope_parameters"]["mrope_section"])
    positions = torch.randint(0, 40, (axes, *ids.shape), device=DEVICE)
    images = {"moe_mm_token_type_ids": torch.zeros_like(ids, dtype=torch.int32)} if "ernie" in family else {}

    def hidden(model: Any, positions: torch.Tensor = positions) -> torch.Tensor:
        return model(input_ids=ids, position_ids=positions, use_cache=False, **images).last_hidden_state

    calls = check(stock, mean_square_of(hidden))
    assert calls.of("rope") or calls.of("qk_norm_rope")
    expected = hidden(ours)
    for axis in range(axes):  # each axis counts
        others = positions.clone()
        others[axis] += 1
        assert not torch.equal(hidden(ours, others), expected)
