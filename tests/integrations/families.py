"""Decoder families of Transformers as tiny models with random weights: a table with a row for each family.

A row has the settings of its config other than SIZES. Windows, chunks and the original lengths of rotary scaling are
shorter than the sequences of the checks. Each model has every kind of layer of its family.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import sys
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.integrations.small import randomized
from tests.support.environment import DEVICE

# A config gets the settings for which it has a field. Every token goes to all experts, so that rounding changes no
# routing. The epsilon of norms is large, so that a wrong epsilon changes the results.
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 99, "max_position_embeddings": 128, "sliding_window": 7,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "rms_norm_eps": 1e-2, "norm_eps": 1e-2,
    "layer_norm_eps": 1e-2, "norm_epsilon": 1e-2, "query_pre_attn_scalar": 24,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 4, "num_experts_per_token": 4, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "num_shared_experts": 1, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 12, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8,
    "mamba_chunk_size": 8, "chunk_size": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip


def rope(rule: str = "default", theta: float = 10000.0, **more: Any) -> dict[str, Any]:
    return {"rope_type": rule, "rope_theta": theta, **more}


LENGTH = {"original_max_position_embeddings": 16}
LINEAR = rope("linear", factor=4.0)
DYNAMIC = {"rope_parameters": rope("dynamic", factor=4.0), "max_position_embeddings": 16}
LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0) | LENGTH
YARN = rope("yarn", factor=4.0) | LENGTH
LONGROPE = rope("longrope", factor=8.0, short_factor=[1.0 + i / 8 for i in range(8)],
                long_factor=[float(i + 1) for i in range(8)]) | LENGTH  # fmt: skip
SLIDING_FULL = ["sliding_attention", "full_attention"]
LINEAR_FULL = ["linear_attention", "full_attention"]
DENSE_SPARSE = ["dense", "sparse"]
BY_LAYER = {"sliding_attention": rope(), "full_attention": rope(theta=1e6)}
LATENT = {"num_key_value_heads": 4, "head_dim": 8}  # multi-head latent attention: keys of 24, values of 12
INDEXED = {**LATENT, "index_topk": 8, "index_head_dim": 16, "index_n_heads": 2, "mlp_layer_types": DENSE_SPARSE}
SCALED = {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}
GATED_DELTA = {"num_hidden_layers": 2, "layer_types": LINEAR_FULL}

FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {"layer_types": SLIDING_FULL, "num_dense_layers": 1},
    "apertus": {"rope_parameters": LLAMA3},
    "apertus1p5_text": {"rope_parameters": LLAMA3},
    "arcee": {"rope_parameters": YARN},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 4},
    "axk1": {**LATENT, "mlp_layer_types": DENSE_SPARSE},
    "axk2": {**INDEXED, "layer_types": ["indexed_attention"] * 2, "gated_norm_rank": 8},
    "bailing_hybrid": {**LATENT, "layer_types": LINEAR_FULL, "mlp_layer_types": DENSE_SPARSE, "num_expert_group": 1,
                       "first_k_dense_replace": 1, "layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1]},
    "beam": {"layer_types": SLIDING_FULL, "mlp_layer_types": DENSE_SPARSE,
             "rope_parameters": {"sliding_attention": rope(), "full_attention": None}},
    "bitnet": {},
    "cohere": {"use_qk_norm": True},
    "cohere2": {"layer_types": SLIDING_FULL},
    "cohere2_moe": {"layer_types": SLIDING_FULL, "mlp_layer_types": DENSE_SPARSE},
    "cohere_compass_text": {"layer_types": SLIDING_FULL, "rope_parameters": BY_LAYER},
    "cwm": {"layer_types": ["full_attention", "sliding_attention"], "rope_parameters": LLAMA3},
    "dbrx": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128,
             "attn_config": {"kv_n_heads": 2, "clip_qkv": 0.5, "rope_theta": 10000.0},
             "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_top_k": 4}},
    "deepseek_v2": {**LATENT, "first_k_dense_replace": 1, "rope_parameters": YARN},
    "deepseek_v3": {**LATENT, "first_k_dense_replace": 1,
                    "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "deepseek_v32": {**INDEXED, "first_k_dense_replace": 1},
    "deepseek_v4": {"num_key_value_heads": 1, "partial_rotary_factor": 0.5, "mlp_layer_types": ["hash_moe", "moe"],
                    "layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"],
                    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
                    "hc_mult": 2, "o_groups": 2, "o_lora_rank": 16, "index_n_heads": 2, "index_head_dim": 16,
                    "index_topk": 4, "rope_parameters": None},
    "diffllama": {},
    "doge": {},
    "dory": {"num_hidden_layers": 4, "n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1,
             "layer_types": SLIDING_FULL * 2, "rope_parameters": BY_LAYER},
    "dots1": {"layer_types": SLIDING_FULL, "first_k_dense_replace": 1},
    "dots3_note_text": {**INDEXED, "head_dim": 24, "layer_types": ["indexed_attention", "sliding_attention"],
                        "shared_experts_intermediate_size": 32, "rope_parameters": None,
                        "per_layer_config": {1: {"head_dim": 24, "q_lora_rank": 24, "kv_lora_rank": 16,
                                                 "num_attention_heads": 4, "num_key_value_heads": 4,
                                                 "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}}},
    "ernie4_5": {"use_bias": True},
    "ernie4_5_moe": {"moe_k": 4, "moe_num_experts": 4, "moe_num_shared_experts": 1, "moe_layer_start_index": 1,
                     "moe_layer_end_index": 1},
    "exaone4": {"layer_types": SLIDING_FULL, "rope_parameters": LLAMA3},
    "exaone_moe": {"layer_types": SLIDING_FULL, "mlp_layer_types": DENSE_SPARSE},
    "falcon_h1": {"mamba_d_ssm": 128, "key_multiplier": 0.7, "attention_out_multiplier": 0.9,
                  "ssm_multipliers": [0.9, 0.8, 0.7, 0.6, 0.5]},
    "flex_olmo": {},
    "flint": {"layer_types": SLIDING_FULL, "mlp_only_layers": [0]},
    "gemma": {},
    "gemma2": {"layer_types": SLIDING_FULL},
    "gemma3_text": {"layer_types": SLIDING_FULL,
                    "rope_parameters": {"sliding_attention": rope(), "full_attention": LINEAR}},
    "gemma3n_text": {"num_hidden_layers": 4, "layer_types": SLIDING_FULL * 2, "num_kv_shared_layers": 2,
                     "laurel_rank": 8, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
                     "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 99, "intermediate_size": [96] * 4,
                     "rope_parameters": BY_LAYER},
    "gemma4_text": {"num_hidden_layers": 4, "layer_types": SLIDING_FULL * 2, "num_kv_shared_layers": 2,
                    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 99, "enable_moe_block": True,
                    "top_k_experts": 4, "global_head_dim": 32, "rope_parameters": {
                        "sliding_attention": rope(),
                        "full_attention": rope("proportional", partial_rotary_factor=0.25),
                    }},
    "gemma4_unified_text": {"num_hidden_layers": 4, "global_head_dim": 32, "layer_types": SLIDING_FULL * 2,
                            "num_kv_shared_layers": 2, "rope_parameters": {
                                "sliding_attention": rope(),
                                "full_attention": rope("proportional", partial_rotary_factor=0.25),
                            }},
    "glm": {"rope_parameters": rope(partial_rotary_factor=0.5)},
    "glm4": {"rope_parameters": rope(partial_rotary_factor=0.5)},
    "glm4_moe": {"rope_parameters": rope(partial_rotary_factor=0.5), "first_k_dense_replace": 1, "use_qk_norm": True},
    "glm4_moe_lite": {**LATENT, "mlp_layer_types": DENSE_SPARSE},
    "glm_moe_dsa": {**INDEXED, "first_k_dense_replace": 1},
    "gpt_oss": {"layer_types": SLIDING_FULL, "rope_parameters": {**YARN, "truncate": False}},
    "granite": SCALED,
    "granite_swa": {**SCALED, "layer_types": SLIDING_FULL},
    "granitemoe": SCALED,
    "granitemoe_swa": {**SCALED, "layer_types": SLIDING_FULL, "shared_intermediate_size": 32},
    "granitemoehybrid": {**SCALED, "layer_types": LINEAR_FULL, "shared_intermediate_size": 32,
                         "position_embedding_type": "rope"},
    "granitemoeshared": {**SCALED, "shared_intermediate_size": 32},
    "helium": {},
    "hrm_text": {"num_layers_per_stack": 1, "H_cycles": 1, "L_cycles": 1, "L_bp_cycles": [1]},
    "hunyuan_v1_dense": DYNAMIC,
    "hunyuan_v1_moe": {"moe_topk": 4},
    "hy_v3": {"mlp_layer_types": DENSE_SPARSE},
    "hy_v4": {**INDEXED, "layer_types": ["indexed_attention"] * 2, "indexer_types": ["full", "shared"], "hc_mult": 2},
    "hyperclovax": {**SCALED, "use_post_norm": True},
    "jais2": {},
    "jetmoe": {"kv_channels": 16},
    "kolibri1": {"layer_types": SLIDING_FULL},
    "laguna": {"layer_types": SLIDING_FULL, "mlp_layer_types": DENSE_SPARSE, "num_attention_heads_per_layer": [4, 8],
               "rope_parameters": {"sliding_attention": rope(partial_rotary_factor=1.0),
                                   "full_attention": {**YARN, "partial_rotary_factor": 0.5}}},
    "lara_mini": {"num_hidden_layers": 3, "layer_types": ["linear_attention", *SLIDING_FULL]},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"num_hidden_layers": 3, "layer_types": ["conv", *SLIDING_FULL],
             "rope_parameters": {"sliding_attention": rope(),
                                 "full_attention": rope("proportional", partial_rotary_factor=0.5)}},
    "llama": {"rope_parameters": LLAMA3},
    "llama4_text": {"num_hidden_layers": 4, "intermediate_size_mlp": 64, "num_local_experts": 2,
                    "num_experts_per_tok": 2, "attention_chunk_size": 8, "moe_layers": [1], "floor_scale": 4,
                    "no_rope_layers": [1, 0, 1, 0], "layer_types": ["chunked_attention", "full_attention"] * 2},
    "longcat_flash": {**LATENT, "num_layers": 1, "ffn_hidden_size": 96, "moe_topk": 6, "zero_expert_num": 2,
                      "expert_ffn_hidden_size": 32},
    "mellum": {"layer_types": SLIDING_FULL, "mlp_layer_types": ["sparse"] * 2, "rope_parameters": BY_LAYER},
    "mimo_v2_flash": {"layer_types": SLIDING_FULL, "mlp_layer_types": DENSE_SPARSE, "rope_parameters": {
        "sliding_attention": rope(partial_rotary_factor=0.5),
        "full_attention": rope(theta=1e6, partial_rotary_factor=0.5),
    }},
    "minicpm3": {**LATENT, "dim_model_base": 32},
    "minimax": {"layer_types": LINEAR_FULL[::-1], "block_size": 8},
    "minimax_m2": {"rope_parameters": rope(partial_rotary_factor=0.5)},
    "minimax_m3_vl_text": {"mlp_layer_types": DENSE_SPARSE, "dense_intermediate_size": 96,
                           "shared_intermediate_size": 32, "rotary_dim": 8, "index_n_heads": 2, "index_head_dim": 16,
                           "index_block_size": 4, "index_topk_blocks": 2,
                           "layer_types": ["full_attention", "minimax_m3_sparse"]},
    "ministral": {"layer_types": SLIDING_FULL},
    "ministral3": {"rope_parameters": {**YARN, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0,
                                       "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}},
    "mistral": {},
    "mixtral": {},
    "modernbert-decoder": {"layer_types": SLIDING_FULL, "local_attention": 14, "rope_parameters": BY_LAYER},
    "moshi": {"ffn_dim": 192, "audio_vocab_size": 64},
    "nanochat": {},
    "nemotron": {"rope_parameters": rope(partial_rotary_factor=0.5)},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "ssm_state_size": 8,
                   "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2,
                   "moe_shared_expert_intermediate_size": 32},
    "olmo": {"clip_qkv": 0.5},
    "olmo2": {},
    "olmo3": {"layer_types": SLIDING_FULL, "rope_parameters": {"sliding_attention": rope(), "full_attention": YARN}},
    "olmo_hybrid": {"layer_types": LINEAR_FULL},
    "olmoe": {"clip_qkv": 0.5},
    "phi": {"rope_parameters": rope(partial_rotary_factor=0.5), "qk_layernorm": True},
    "phi3": {"rope_parameters": {**LONGROPE, "partial_rotary_factor": 1.0}, **LENGTH},
    "phimoe": {"router_jitter_noise": 0.0},
    "qwen2": {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"],
              "rope_parameters": YARN},
    "qwen2_moe": {"mlp_only_layers": [0]},
    "qwen3": {"rope_parameters": YARN},
    "qwen3_5_moe_text": GATED_DELTA,
    "qwen3_5_text": GATED_DELTA,
    "qwen3_moe": {"mlp_only_layers": [0]},
    "qwen3_next": GATED_DELTA,
    "qwen4_exp_text": {"layer_types": ["linear_attention", "indexed_attention"], "hc_count": 2, "hc_lowrank": 8,
                       "ple_layer_ids": [], "ngram_vocab_size_base": 97, "make_ngram_vocab_size_divisible_by": 1,
                       "split_ngram_parts": 1, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16,
                       "indexer_budget": 8, "indexer_compress_ratio": 4},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 7},
    "seed_oss": DYNAMIC,
    "smollm3": {"no_rope_layers": [1, 0], "use_sliding_window": True, "layer_types": SLIDING_FULL},
    "solar_open": {"rope_parameters": rope(partial_rotary_factor=1.0)},
    "stablelm": {"rope_parameters": rope(partial_rotary_factor=0.25), "use_qkv_bias": True, "qk_layernorm": True},
    "starcoder2": {},
    "vaultgemma": {"layer_types": SLIDING_FULL},
    "youtu": LATENT,
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "use_mem_rope": True, "n_mamba_heads": 8,
               "mamba_d_state": 8, "adapter_rank": 8},
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding"], "num_experts_per_tok": 1, "router_hidden_size": 16,
             "rope_parameters": {"hybrid": rope(partial_rotary_factor=0.5),
                                 "hybrid_sliding": rope(partial_rotary_factor=0.5)}},
}  # fmt: skip

# Families without a row, and why.
NO_ROW = {
    "blt": "it reads bytes in patches, which another model chooses, with four decoders",
    "inkling2_text": "its text has relative positions; only its vision tower has a rotary embedding",
    "jamba": "its attention does not use the rotary embedding that its file defines",
    "phi4_multimodal": "its text model is phi3; images and audio need adapter weights",
}

# Checks that do not apply to a family, and why.
_SCORES_PADDING = "its sparse layers score blocks of keys that contain padding"
UNDEFINED: dict[tuple[str, str], str] = {
    ("minimax_m3_vl_text", "left"): _SCORES_PADDING,
    ("minimax_m3_vl_text", "cache"): _SCORES_PADDING,
    ("minimax_m3_vl_text", "generate"): _SCORES_PADDING,
    ("minimax_m3_vl_text", "far positions"): "its sparse layers use a position as the index of a key",
    ("recurrent_gemma", "cache"): "its output has no cache",
}

# --- images ----------------------------------------------------------------------------------------------------------

IMAGE, S = 98, 20  # the token id of a part of an image; tokens in a sequence
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}  # fmt: skip
QWEN_VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 4,
               "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64}  # fmt: skip
QWEN_TOKENS = {"image_token_id": IMAGE, "video_token_id": 97, "vision_start_token_id": 96, "vision_end_token_id": 95}
SECTIONS = rope(mrope_section=[2, 3, 3])

# The text decoder's type and settings, the config of the vision tower, and the other settings.
MULTIMODAL: dict[str, tuple[str | None, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": ("gemma3_text", {"layer_types": SLIDING_FULL, "rope_parameters": BY_LAYER},
               {**VISION, "model_type": "siglip_vision_model"},
               {"mm_tokens_per_image": 4, "image_token_index": IMAGE, "boi_token_index": 97, "eoi_token_index": 96}),
    "llava": ("llama", {}, {**VISION, "model_type": "clip_vision_model", "projection_dim": 32},
              {"image_token_index": IMAGE}),
    "mllama": ("mllama_text_model", {"cross_attention_layers": [1]},
               {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_global_layers": 1,
                "attention_heads": 2, "image_size": 28, "patch_size": 14, "max_num_tiles": 1,
                "supported_aspect_ratios": [[1, 1]], "vision_output_dim": 64, "intermediate_layers_indices": [0]},
               {"image_token_index": IMAGE}),
    "paligemma": ("gemma", {}, {**VISION, "model_type": "siglip_vision_model", "projection_dim": 64},
                  {"projection_dim": 64, "image_token_index": IMAGE}),
    "qwen2_5_vl": ("qwen2_5_vl_text", {"rope_parameters": SECTIONS},
                   {**QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]}, QWEN_TOKENS),
    "qwen3_vl": ("qwen3_vl_text", {"rope_parameters": SECTIONS},
                 {**QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}, QWEN_TOKENS),
    "smolvlm": ("llama", {}, {**VISION, "model_type": "smolvlm_vision"}, {"image_token_id": IMAGE, "scale_factor": 1}),
}  # fmt: skip

EVERY_FAMILY = (*FAMILIES, *MULTIMODAL)
DROPOUT = 0.2  # of hidden states. That of attention is 0: with another one, stock attention runs


class Batch(NamedTuple):
    ids: torch.Tensor
    by_token: dict[str, torch.Tensor]  # (B, S, ...): other arguments with an element for each token
    images: dict[str, torch.Tensor]

    @property
    def everything(self) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids, **self.by_token, **self.images}


def fields(config_class: type) -> set[str]:
    if dataclasses.is_dataclass(config_class):
        return {f.name for f in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    return set(inspect.signature(config_class.__init__).parameters)


def settings(family: str, row: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the family's config: a copy, since configs keep the dicts that they get and write into them."""
    known = fields(CONFIG_MAPPING[family])
    dropouts = {
        name: 0.0 if "att" in name else DROPOUT for name in known if "drop" in name and "classifier" not in name
    }
    return copy.deepcopy({name: value for name, value in (SIZES | dropouts).items() if name in known} | row)


def config_of(family: str, **changes: Any) -> Any:
    """changes: settings in place of those of the row, of a family of FAMILIES."""
    if family in FAMILIES:
        return AutoConfig.for_model(family, **settings(family, FAMILIES[family] | changes))
    text, text_row, vision, rest = MULTIMODAL[family]
    text_config = settings(text, text_row) | {"model_type": text}
    return AutoConfig.for_model(family, text_config=text_config, **copy.deepcopy({"vision_config": vision, **rest}))


def stock(family: str, attention: str = "eager", **changes: Any) -> torch.nn.Module:
    """The small model of the family, with random weights. changes: as of `config_of`."""
    torch.manual_seed(1)
    auto = AutoModelForCausalLM if family in FAMILIES else AutoModelForImageTextToText
    # The grouped implementation of experts has no float64.
    return randomized(
        auto.from_config(config_of(family, **changes), attn_implementation=attention, experts_implementation="eager")
    )


def batch(family: str) -> Batch:
    """Two sequences, each with an image if the family takes images."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 90, (2, S), generator=generator)
    if family in FAMILIES:
        return Batch(ids.to(DEVICE), {}, {})
    ids[:, 7:11] = IMAGE
    kind = (ids == IMAGE).long()
    pixels = torch.randn(2, 3, 28, 28, generator=generator)
    by_token, images = {}, {"pixel_values": pixels}
    if family == "gemma3":
        by_token = {"token_type_ids": kind}
    elif family == "paligemma":
        by_token = {"token_type_ids": (torch.arange(S) >= 13).long().expand(2, S)}  # the prefix sees all of itself
    elif family == "mllama":
        by_token = {"cross_attention_mask": torch.ones(2, S, 1, 1, dtype=torch.int64)}
        images = {"pixel_values": pixels[:, None, None], "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.int64),
                  "aspect_ratio_mask": torch.ones(2, 1, 1, dtype=torch.int64)}  # fmt: skip
    elif family == "smolvlm":
        images = {"pixel_values": pixels[:, None]}
    elif family.startswith("qwen"):
        by_token = {"mm_token_type_ids": kind}
        images = {"pixel_values": torch.randn(32, 96, generator=generator),
                  "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]])}  # fmt: skip
    by_token, images = ({name: x.to(DEVICE) for name, x in group.items()} for group in (by_token, images))
    return Batch(ids.to(DEVICE), by_token, images)


def decoder_families() -> set[str]:
    """The model types of the installed causal language models with rotary embeddings and RMSNorm or grouped queries.

    Multimodal models are left out where their text model is a class of its own.
    """
    found = set()
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if family not in CONFIG_MAPPING or "text_config" in CONFIG_MAPPING[family].sub_configs:
            continue
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family]]
        module = sys.modules[model_class.__module__]
        rotary = any(name.startswith("apply_") and "rot" in name for name in vars(module))
        source = inspect.getsource(module)
        if rotary and ("RMSNorm" in source or "num_key_value_heads" in source):
            found.add(model_class.config_class.model_type)
    return found
