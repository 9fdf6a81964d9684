"""Short runs of the examples, on the reference path or on a GPU."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

SMALL = ("--batch", "4", "--max-length", "48", "--dtype", "float32")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Restores what Transformers and rich print, which the examples change."""
    import transformers
    import transformers.models.llama.modeling_llama as modeling_llama

    from examples import report

    verbosity, quiet = transformers.logging.get_verbosity(), report.console.quiet
    before = dict(vars(modeling_llama))
    yield
    vars(modeling_llama).update(before)  # Liger-Kernel replaces classes there, for an instance too
    transformers.logging.set_verbosity(verbosity)
    transformers.utils.logging.enable_progress_bar()
    report.console.quiet = quiet


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any]]]:
    """run("finetune", "--task", ...): the exit status of the example, and the contents of its JSON file."""

    def run(name: str, *options: Any) -> tuple[int, dict[str, Any]]:
        out = tmp_path / "out"
        monkeypatch.setattr(sys, "argv", [name, *SMALL, "--out", str(out), *map(str, options)])
        status = importlib.import_module(f"examples.{name}").main()
        written = out / (options[options.index("--task") + 1] if "--task" in options else name)
        assert written.with_suffix(".png").stat().st_size > 10_000
        return status, json.loads(written.with_suffix(".json").read_text())

    return run


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[[list[Any]], Path]:
    def write(examples: list[Any]) -> Path:
        path = tmp_path / "data.jsonl"
        path.write_text("\n".join(map(json.dumps, examples)) + "\n")
        return path

    return write


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a saved model with its tokenizer. Its shape is not that of the built-in model."""
    import transformers

    from examples import common

    folder = tmp_path_factory.mktemp("model")
    tokenizer = common.load_tokenizer(None, ["def f(x): return x"], 300)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=3,
        num_key_value_heads=1, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
