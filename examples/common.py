"""What the examples on Hugging Face models share: arguments, data, tokenizer and model.

Without --model, the model is a tiny Llama with random weights and a byte-level tokenizer. With --model, it is loaded
from a Hugging Face folder. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from llama_kernels.integrations.transformers import patch

Examples = list[dict[str, Any]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
IGNORED = -100  # the label of a token without a loss: cross_entropy ignores it


# --- arguments -------------------------------------------------------------------------------------------------------


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def arguments(doc: str, data: str, **defaults: Any) -> argparse.ArgumentParser:
    """A parser of the arguments that all examples have, for `parse`. `data` describes a line of --data."""
    transformers.utils.logging.set_verbosity_error()  # no warning that a new head has random weights
    transformers.utils.logging.disable_progress_bar()  # of loading weights
    parser = argparse.ArgumentParser(description=doc.split("\n\n")[0])
    parser.add_argument("--model", type=Path, help="Hugging Face model folder instead of the tiny Llama")
    parser.add_argument("--data", type=Path, help=f"your own data, one JSON object per line: {data}")
    parser.add_argument("--steps", type=positive, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch", type=positive, help="sequences per step (default: %(default)s)")
    parser.add_argument("--max-length", type=positive, help="tokens per sequence (default: %(default)s)")
    parser.add_argument("--lr", type=float, help="peak learning rate (default: %(default)s; pretrained models: 2e-5)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and dropout")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="of the arithmetic (default: float32; on a GPU bfloat16)")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in backward: less memory")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--stock", action="store_true", help="do not patch the model")
    which.add_argument("--compare", action="store_true", help="run both, stock and patched, from the same seed")
    parser.add_argument("--out", type=Path, default=Path("build/examples"), help="folder (default: %(default)s)")
    parser.add_argument("--save", type=Path, help="folder to save the trained model and its tokenizer in")
    parser.set_defaults(**defaults)
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    args = parser.parse_args()
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    if args.data and not args.data.is_file():
        parser.error(f"--data: no file {args.data}")
    if args.model and not (args.model / "config.json").is_file():
        parser.error(f"--model: no folder with a config.json: {args.model}")
    return args


def run_names(args: argparse.Namespace) -> list[str]:
    return ["stock", "patched"] if args.compare else ["stock"] if args.stock else ["patched"]


# --- data ------------------------------------------------------------------------------------------------------------


def read_jsonl(
    path: Path,
    fields: dict[str, type | tuple[type, ...]],
    fault: Callable[[dict[str, Any]], str | None] = lambda example: None,
) -> Examples:
    """The objects of a file with one per line. Ends the program at the first object with a wrong field or a fault."""
    examples = []
    for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            example = json.loads(line)
        except json.JSONDecodeError as error:
            raise SystemExit(f"{path}, line {n}: not JSON: {error}") from None
        for name, kind in fields.items():
            if not isinstance(example, dict) or not isinstance(example.get(name), kind):
                wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
                got = repr(example.get(name, "nothing") if isinstance(example, dict) else example)
                raise SystemExit(f"{path}, line {n}: field {name!r} must be {wanted}, got {got:.60}")
        if error := fault(example):
            raise SystemExit(f"{path}, line {n}: {error}")
        examples.append(example)
    if len(examples) < 2:
        raise SystemExit(f"{path}: at least two lines are needed, one to train on and one to test on")
    return examples


def read_texts(path: Path | None, seed: int) -> list[str]:
    """The texts of a file with one {"text": ...} per line, shuffled; without a file, none."""
    return shuffled([example["text"] for example in read_jsonl(path, {"text": str})], seed) if path else []


def dataset(columns: dict[str, list[str]]) -> Any:
    """A Dataset of the package datasets, which TRL takes, without progress bars of its own."""
    import datasets

    datasets.disable_progress_bars()
    return datasets.Dataset.from_dict(columns)


def standard_library(*patterns: str) -> list[tuple[str, str]]:
    """(name, source) of files of Python's standard library that match one of the patterns. Every machine has this text.

    Sources that are not ASCII are left out, so a byte is a character.
    """
    root = Path(os.__file__).parent
    paths = [path.relative_to(root) for pattern in patterns for path in sorted(root.glob(pattern))]
    sources = [(path.as_posix(), (root / path).read_bytes()) for path in paths if "test" not in path.parts]
    return [(name, source.decode()) for name, source in sources if source.isascii()]


def pieces(units: Iterable[str], characters: int) -> Iterator[tuple[int, str]]:
    """Join consecutive units to texts of at most `characters`, or of one longer unit: (first character, text) each."""
    start, text = 0, ""
    for unit in [*units, "\n" * (characters + 1)]:
        if text and len(text) + len(unit) > characters:
            yield start, text
            start, text = start + len(text), ""
        text += unit


def shuffled(items: list[Any], seed: int) -> list[Any]:
    return [items[i] for i in torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()]


def split(examples: Examples, seed: int, share: float = 0.1) -> tuple[Examples, Examples]:
    """Training and test examples, shuffled. Examples with the same "group", such as a file, stay together."""
    groups = shuffled(sorted({e.get("group", i) for i, e in enumerate(examples)}, key=str), seed)
    test_groups = set(groups[: max(1, round(share * len(groups)))])
    parts: tuple[Examples, Examples] = [], []
    for i, example in enumerate(examples):
        parts[example.get("group", i) in test_groups].append(example)
    return shuffled(parts[0], seed), shuffled(parts[1], seed)


def f1(hits: int, predicted: int, actual: int) -> tuple[float, float, float]:
    """Precision, recall, and their harmonic mean F1: 0 if `predicted` or `actual` is 0."""
    precision, recall = hits / max(predicted, 1), hits / max(actual, 1)
    return precision, recall, 2 * precision * recall / max(precision + recall, 1e-12)


# --- tokenizer and model ---------------------------------------------------------------------------------------------


def load_tokenizer(folder: Path | None, texts: Iterable[str] = (), size: int = 2048) -> PreTrainedTokenizerFast:
    """The tokenizer of `folder`, or a new one with `size` tokens: bytes, and frequent pieces of words of `texts`."""
    if folder:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="right")
        if not tokenizer.is_fast:
            raise SystemExit(f"{folder}: wanted a fast tokenizer, which gives the position of each token in the text")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # Llama has no pad token
        return tokenizer
    special = ["<s>", "</s>", "<pad>"]
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\w+|\n *| +|."), "isolated"),  # a punctuation mark is one token
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet,
                                  show_progress=False)  # fmt: skip
    words.train_from_iterator(texts, trainer)
    words.add_special_tokens([AddedToken(token, special=True) for token in special])
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A </s> $B", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="right",
        clean_up_tokenization_spaces=False, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def load_model(
    model_class: Any, args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype = torch.float32,
    layers: int = 2, **settings: Any,
) -> PreTrainedModel:  # fmt: skip
    """The model of --model, or a tiny Llama, by an AutoModelFor... class. `settings` are fields of its config."""
    settings |= {"pad_token_id": tokenizer.pad_token_id, "use_cache": False}
    torch.manual_seed(args.seed)
    if args.model:
        config = AutoConfig.from_pretrained(args.model, **settings)
        return model_class.from_pretrained(args.model, config=config, dtype=dtype).to(args.device)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=352, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, initializer_range=128**-0.5,
        bos_token_id=0, eos_token_id=1, **settings,
    )  # fmt: skip
    return model_class.from_config(config).to(args.device)


def save(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save both for --model."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def lora(rank: int, task_type: str) -> Any:
    """The configuration of PEFT for adapters of all linear layers. Weights of a new head are trained in full."""
    try:
        from peft import LoraConfig
    except ImportError:
        raise SystemExit("--lora needs peft: pip install peft") from None
    heads = [] if task_type == "CAUSAL_LM" else ["score", "qa_outputs"]
    return LoraConfig(task_type=task_type, r=rank, target_modules="all-linear", exclude_modules=heads or None)


def prepare(model: Any, name: str, args: argparse.Namespace) -> None:
    """Patch the model of the run "patched", and with --checkpointing recompute its activations in the backward."""
    if name == "patched":
        patch(model)
    if args.checkpointing:
        names = "activation_checkpointing_enable", "gradient_checkpointing_enable"  # of Transformers 5 and 4
        getattr(model, next(name for name in names if hasattr(model, name)))({"use_reentrant": False})
