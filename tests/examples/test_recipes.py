"""Runs of the recipes for TRL, Lightning, Accelerate, torch.compile and Liger-Kernel: stock and patched agree."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_kernels.core.language import INTERPRETED
from llama_kernels.integrations.transformers import patch
from tests.examples.conftest import SMALL

for package in ("accelerate", "matplotlib", "rich"):
    pytest.importorskip(package)
transformers = pytest.importorskip("transformers", minversion="5.0")

from examples import common, functions, packing, report  # noqa: E402
from examples.packing import definitions  # noqa: E402
from tests.integrations.comparison import compare_with_stock, logits_of  # noqa: E402
from tests.integrations.small import small  # noqa: E402

ROOT = Path(common.__file__).parents[1]
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="a training loop in Triton's interpreter would take hours")
SHORT = ("--steps", "3", "--compare")


@pytest.fixture
def few_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "definitions", lambda seed: definitions(seed, most=80))
    monkeypatch.setattr(functions.functions, "__defaults__", (0, 60, 300))


def run_or_skip(run: Any, name: str, *options: Any) -> dict[str, Any]:
    """The numbers of a recipe, which must end with status 0. Skips where the package that it is about is missing."""
    needed = {"sft": "trl", "dpo": "trl", "grpo": "trl", "lightning_fit": "lightning", "liger": "liger_kernel"}
    if name in needed:
        pytest.importorskip(needed[name], reason=f"needs {needed[name]}")
    status, numbers = run(name, *options)
    assert status == 0
    return numbers


def check_equal(numbers: dict[str, Any], metric: str) -> None:
    stock, patched = (numbers["runs"][name] for name in ("stock", "patched"))
    assert len(stock["losses"]) == 3
    assert patched["losses"] == pytest.approx(stock["losses"], abs=report.BOUND)
    assert patched[metric] == pytest.approx(stock[metric], rel=1e-3)


@not_interpreted
@pytest.mark.parametrize(
    ("name", "options", "metric"),
    [
        ("sft", (), "validation loss"),
        ("sft", ("--packing",), "validation loss"),
        ("sft", ("--padding-free",), "validation loss"),
        ("dpo", (), "margin"),
        ("grpo", ("--group", "4", "--max-length", "8"), "rewards"),
        ("lightning_fit", (), "validation loss"),
        ("fsdp2", (), "validation loss"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
@pytest.mark.usefixtures("few_data")
def test_stock_and_patched_agree(run, monkeypatch, name, options, metric):
    if name == "fsdp2":
        monkeypatch.setattr(os, "environ", {**os.environ})  # it sets those of torchrun
    check_equal(run_or_skip(run, name, *SHORT, *options), metric)


@not_interpreted
@pytest.mark.parametrize("name", ["sft", "dpo"])
@pytest.mark.usefixtures("few_data")
def test_adapters_are_trained_by_trl(run, name, tmp_path):
    pytest.importorskip("peft", reason="needs peft")
    numbers = run_or_skip(run, name, *SHORT, "--lora", "4", "--save", tmp_path)
    check_equal(numbers, {"sft": "validation loss", "dpo": "margin"}[name])
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4


@not_interpreted
@pytest.mark.usefixtures("few_data")
def test_adapters_of_a_4_bit_model_are_trained_by_trl(run, model_folder, tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,  # on a CPU, bitsandbytes wants multiples of 32
    )  # fmt: skip
    common.save(transformers.LlamaForCausalLM(config), tokenizer, tmp_path / "model")
    numbers = run_or_skip(run, "sft", *SHORT, "--model", tmp_path / "model", "--lora", "4", "--four-bit")
    check_equal(numbers, "validation loss")


@not_interpreted
@pytest.mark.usefixtures("few_data")
def test_a_compiled_model_agrees_with_stock(run, monkeypatch):
    """Without Inductor, which takes a minute. tests/compiled has its code of patched models."""
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, fullgraph, mode: compile_(model, fullgraph=fullgraph, backend="aot_eager")
    )
    check_equal(run_or_skip(run, "compiled", *SHORT), "validation loss")


@pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="Liger's kernels need a GPU, or the interpreter"
)
@pytest.mark.usefixtures("few_data")
def test_ligers_loss_beside_our_ops_agrees_with_stock(run):
    options = ["--no-swiglu", "--batch", "1", "--max-length", "16"] if INTERPRETED else []
    check_equal(run_or_skip(run, "liger", *SHORT, *options), "validation loss")


@not_interpreted
def test_liger_without_a_gpu_says_what_it_needs(run, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        run_or_skip(run, "liger", *SHORT)
    assert "TRITON_INTERPRET=1" in capsys.readouterr().err


@not_interpreted
@pytest.mark.once
def test_accelerate_in_two_processes_has_the_losses_of_one(run, tmp_path, monkeypatch):
    """On a CPU, where Accelerate runs DDP instead of FSDP2."""
    monkeypatch.setattr(os, "environ", {**os.environ})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(ROOT / "examples/fsdp2.py"), *SMALL, "--steps", "3", "--device", "cpu",
               "--out", str(tmp_path), "--save", str(tmp_path / "saved")]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "fsdp2.json").read_text())["runs"]["patched"]
    one = run_or_skip(run, "fsdp2", "--steps", "3", "--device", "cpu")["runs"]["patched"]
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-4)
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert not any(parameter.isnan().any() for parameter in saved.parameters())


# --- what TRL's collator makes of documents --------------------------------------------------------------------------


@not_interpreted
@pytest.mark.parametrize("packed", [True, False], ids=["packing", "padding_free"])
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_documents_of_a_trl_batch_stay_apart(family, packed):
    """The logits of each document are those that it has alone. Stock GPT-OSS joins the documents."""
    sft_trainer = pytest.importorskip("trl.trainer.sft_trainer", reason="needs trl")
    documents = [torch.randint(3, 90, (n,)).tolist() for n in (5, 9, 2, 12)]
    if packed:
        rows = [{"input_ids": documents[0] + documents[1], "seq_lengths": [5, 9]},
                {"input_ids": documents[2] + documents[3], "seq_lengths": [2, 12]}]  # fmt: skip
    else:
        rows = [{"input_ids": document} for document in documents]
    rows = [{**row, "labels": row["input_ids"]} for row in rows]
    collator = sft_trainer.DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    batch = collator(rows)
    assert batch["input_ids"].shape == (1, 28) and "attention_mask" not in batch

    stock = small(family)

    @torch.no_grad()
    def one_by_one(model: Any) -> dict[str, torch.Tensor]:
        alone = [model(input_ids=torch.tensor([document]), use_cache=False).logits[0] for document in documents]
        return {"logits": torch.cat(alone)}

    for names in (set(batch), {"input_ids", "position_ids"}):  # with cu_seq_lens_q, and without
        together = logits_of(batch["input_ids"], **{name: batch[name] for name in names - {"input_ids", "labels"}})

        def run(model: Any, of_batch: Any = together) -> dict[str, torch.Tensor]:
            return {"logits": of_batch(model)["logits"][0]}

        compare_with_stock(patch(copy.deepcopy(stock)), stock, one_by_one, run)
