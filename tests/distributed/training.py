"""A run of examples.pretrain: what the processes of test_training.py run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import transformers

from examples import common, pretrain
from tests.distributed.processes import device


def small_llama(model_class: Any, args: Any, tokenizer: Any, **_: Any) -> torch.nn.Module:
    torch.manual_seed(args.seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.1, pad_token_id=tokenizer.pad_token_id, use_cache=False,
    )  # fmt: skip
    return model_class.from_config(config).to(args.device)


def losses(folder: str, *options: str) -> list[float]:
    """Of each step, of the run that all processes of the group make together."""
    arguments = ["pretrain", "--device", device().type, "--dtype", "float32", "--out", folder, *options]
    started = mock.patch.multiple(dist, init_process_group=mock.DEFAULT, destroy_process_group=mock.DEFAULT)
    with (
        started,
        mock.patch.object(sys, "argv", arguments),
        mock.patch.object(common, "load_model", small_llama),
    ):
        pretrain.main()
    if dist.is_initialized():
        dist.barrier()
    (run,) = json.loads(Path(folder, "pretrain.json").read_text())["runs"].values()
    return run["losses"]
