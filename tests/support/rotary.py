"""Configurations of rotary embeddings, with every kind of scaling."""

from __future__ import annotations

from typing import Any

import pytest

transformers = pytest.importorskip("transformers")

FACTORS = [1.0 + 0.1 * i for i in range(32)]
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.3},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 2048},
    "yarn, all options": {
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 32.0, "original_max_position_embeddings": 4096, "mscale": 0.7,
        "mscale_all_dim": 0.9, "beta_fast": 20.0, "beta_slow": 2.0, "truncate": False},
    "yarn, its own factor": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 2048,
        "attention_factor": 1.25},
    "longrope": {
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 2048,
        "long_factor": FACTORS, "short_factor": FACTORS[::-1]},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 4096},
    "llama3.2": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 2048},
}  # fmt: skip


def config(scaling: dict[str, Any], head_dim: int = 64) -> Any:
    """A LlamaConfig in the manner of the installed version: rope_parameters since 5, rope_scaling before."""
    sizes = {
        "hidden_size": 4 * head_dim,
        "num_attention_heads": 4,
        "head_dim": head_dim,
        "max_position_embeddings": 8192,
    }
    if int(transformers.__version__.split(".")[0]) >= 5:
        return transformers.LlamaConfig(**sizes, rope_parameters=dict(scaling))
    rule = {name: value for name, value in scaling.items() if name != "rope_theta"}
    rule = None if rule["rope_type"] == "default" else rule
    return transformers.LlamaConfig(**sizes, rope_theta=scaling["rope_theta"], rope_scaling=rule)
