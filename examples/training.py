"""What the training examples share: arguments, files, a tokenizer and a model, the loop, the picture.

Without --model all of them train a tiny Llama from random weights: grouped-query attention, four heads on two, and
byte-level tokens. With --model they load that Hugging Face folder. Nothing is ever downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before Transformers is imported

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from llama_kernels.integrations.transformers import patch

console = Console()
Examples = list[dict[str, Any]]
Batch = dict[str, torch.Tensor]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COLORS = {"stock": "#9ec5e8", "ours": "#1b3a5c"}
EARLY = 20  # steps over which two right float32 runs stay together; later, training amplifies the last bit
BOUND = 2e-3  # and how far they may part there


# --- arguments -------------------------------------------------------------------------------------------------------


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that there are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default else action.help


class _Parser(argparse.ArgumentParser):
    """Chooses --dtype by --device."""

    def parse_args(self, *args: Any, **options: Any) -> argparse.Namespace:
        parsed = super().parse_args(*args, **options)
        parsed.dtype = parsed.dtype or ("bfloat16" if parsed.device == "cuda" else "float32")
        return parsed


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def arguments(doc: str, name: str, data: str, **defaults: Any) -> argparse.ArgumentParser:
    """What all examples take; `data` says what a line of --data looks like."""
    transformers.utils.logging.set_verbosity_error()  # a head that starts from random weights is no news here
    transformers.utils.logging.disable_progress_bar()
    parser = _Parser(
        prog=f"python -m examples.{name}",
        description=doc.split("\n\n")[0],
        formatter_class=_Help,
    )
    gpu = torch.cuda.is_available()
    parser.add_argument("--model", type=_model_folder, help="Hugging Face model folder instead of the tiny Llama")
    parser.add_argument("--data", type=_file, help=f"your own data, one JSON object a line: {data}")
    parser.add_argument("--steps", type=positive, help="optimizer steps")
    parser.add_argument("--batch", type=positive, help="sequences a step")
    parser.add_argument("--max-length", type=positive, help="tokens a sequence; what is longer is cut")
    parser.add_argument("--lr", type=float, help="peak learning rate; for a pretrained model 2e-5 is usual")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and dropout")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="of the arithmetic (default: float32; on a GPU bfloat16)")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in backward: less memory")
    if "task" in defaults:  # a head is trained; peft wants to know which
        parser.add_argument("--lora", type=positive, metavar="RANK", help="train low-rank adapters only; needs peft")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--stock", action="store_true", help="leave the model as Transformers made it")
    which.add_argument(
        "--compare", action="store_true", help="stock and ours, same seed and batches, and how far apart"
    )
    parser.add_argument("--out", type=Path, default=Path("build/examples"), help="folder of the picture and numbers")
    parser.add_argument("--save", type=Path, help="folder to save the trained model and its tokenizer in")
    parser.set_defaults(**{"lora": None, **defaults})
    return parser


def _file(text: str) -> Path:
    if not (path := Path(text)).is_file():
        raise argparse.ArgumentTypeError(f"no file {text}")
    return path


def _model_folder(text: str) -> Path:
    if not (path := Path(text)).joinpath("config.json").is_file():
        raise argparse.ArgumentTypeError(f"no folder with a config.json: {text}")
    return path


# --- data ------------------------------------------------------------------------------------------------------------


def read_jsonl(path: Path, **fields: type | tuple[type, ...]) -> Examples:
    """The objects of a file, one a line; the first fault ends the program with its line."""
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
        examples.append(example)
    if len(examples) < 2:
        raise SystemExit(f"{path}: at least two lines are needed, one to train on and one to test on")
    return examples


def standard_library(*parts: str) -> list[tuple[str, str]]:
    """(name, source) of the modules and packages `parts` of Python's standard library, or of all its plain modules.

    Real text that every machine has. Sources with characters beyond ASCII are left out: in what is left, a column of
    bytes is a column of characters.
    """
    root = Path(os.__file__).parent
    paths = sorted(root.glob("*.py")) if not parts else [
        path for part in parts for path in (sorted((root / part).rglob("*.py")) or [root / f"{part}.py"])
    ]  # fmt: skip
    named = [(path.relative_to(root), path) for path in paths if path.is_file()]
    sources = [(name.as_posix(), path.read_bytes()) for name, path in named if "test" not in name.parts]
    return [(name, source.decode()) for name, source in sources if source.isascii()]


def split(examples: Examples, seed: int, share: float = 0.1, most: int = 500) -> tuple[Examples, Examples]:
    """Training and test examples, shuffled. Examples with the same "group" stay together: a test on unseen files."""
    groups = sorted({e.get("group", i) for i, e in enumerate(examples)}, key=str)
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    test_groups = {groups[i] for i in order[: max(1, round(share * len(groups)))]}
    parts: tuple[Examples, Examples] = [], []
    for i, example in enumerate(examples):
        parts[example.get("group", i) in test_groups].append(example)
    for part in parts:
        order = torch.randperm(len(part), generator=torch.Generator().manual_seed(seed)).tolist()
        part[:] = [part[i] for i in order]
    return parts[0], parts[1][:most]


def batches(examples: Examples, size: int, seed: int) -> Iterator[Examples]:
    """Shuffled epochs without end, the same for whoever asks with the same seed."""
    generator = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    while True:
        while len(queue) < size:
            queue += torch.randperm(len(examples), generator=generator).tolist()
        yield [examples[i] for i in queue[:size]]
        del queue[:size]


def pad(rows: Iterable[list[int]], value: int) -> torch.Tensor:
    """(rows, longest), filled up on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, value)


# --- tokenizer and model ---------------------------------------------------------------------------------------------


def load_tokenizer(args: argparse.Namespace, texts: Iterable[str] = (), size: int = 2048) -> PreTrainedTokenizerFast:
    """That of --model. Otherwise bytes, and up to `size` pieces of words that are frequent in `texts`."""
    if args.model:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        if not tokenizer.is_fast:
            raise SystemExit(f"{args.model}: its tokenizer is not a fast one, it cannot tell where a token stands")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # Llama has none of its own
        return tokenizer
    special = ["<s>", "</s>", "<pad>"]
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\w+|\n *| +|."), "isolated"),  # a punctuation mark is always one token
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
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
                                   clean_up_tokenization_spaces=False)  # fmt: skip


def load_model(
    args: argparse.Namespace, auto: type, tokenizer: PreTrainedTokenizerFast, layers: int = 2, **settings: Any
) -> PreTrainedModel:
    """`auto` is the AutoModelFor... of the task; `settings` are fields of the configuration."""
    settings |= {"pad_token_id": tokenizer.pad_token_id, "use_cache": False}
    torch.manual_seed(args.seed)
    if args.model:
        config = AutoConfig.from_pretrained(args.model, **settings)
        dtype = DTYPES[args.dtype] if args.lora else torch.float32  # what is trained stays float32
        model = auto.from_pretrained(args.model, config=config, dtype=dtype)
    else:
        tiny = LlamaConfig(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=352, num_hidden_layers=layers,
                           num_attention_heads=4, num_key_value_heads=2, head_dim=32,
                           bos_token_id=0, eos_token_id=1, initializer_range=128**-0.5,
                           **settings)  # fmt: skip
        model = auto.from_config(tiny)
    return model.to(args.device)


# --- training --------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One model in training, its losses and what a step costs."""

    name: str
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)
    validation: list[tuple[int, float]] = field(default_factory=list)  # (step, loss)

    @property
    def step_ms(self) -> float:
        return 1e3 * sorted(self.seconds)[len(self.seconds) // 2]


def names(args: argparse.Namespace) -> list[str]:
    return ["stock", "ours"] if args.compare else ["stock"] if args.stock else ["ours"]


def prepare(model: PreTrainedModel, name: str, args: argparse.Namespace) -> torch.nn.Module:
    """Ours or stock, with or without checkpointing, trained in full or by low-rank adapters."""
    if name == "ours":
        patch(model)
    if args.checkpointing:
        # Its name in Transformers 5, and in 4.
        either = "activation_checkpointing_enable", "gradient_checkpointing_enable"
        enable = next(getattr(model, method) for method in either if hasattr(model, method))
        enable({"use_reentrant": False})
    if not args.lora:
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise SystemExit("--lora needs peft: pip install peft") from None
    return get_peft_model(model, LoraConfig(task_type=args.task, r=args.lora, target_modules="all-linear"))


def autocast(args: argparse.Namespace, enabled: bool = True) -> torch.autocast:
    return torch.autocast(args.device, dtype=torch.bfloat16, enabled=enabled and args.dtype == "bfloat16")


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def bar() -> Progress:
    return Progress(TextColumn("[progress.description]{task.description}"), BarColumn(), MofNCompleteColumn(),
                    TimeRemainingColumn(), console=console)  # fmt: skip


def set_rate(optimizer: torch.optim.Optimizer, step: int, args: argparse.Namespace) -> None:
    """Up to args.lr over a tenth of the steps, then down in a line."""
    warmup = max(args.steps // 10, 1)
    share = min((step + 1) / warmup, max(1 - (step - warmup) / max(args.steps - warmup, 1), 0.02))
    for group in optimizer.param_groups:
        group["lr"] = args.lr * share


def train(run: Run, model: torch.nn.Module, inputs: Iterator[Batch], args: argparse.Namespace) -> None:
    """args.steps steps of AdamW; `inputs` are what the model takes, labels among them."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01)
    model.train()
    torch.manual_seed(args.seed)  # dropout
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with bar() as progress:
        task = progress.add_task(run.name, total=args.steps)
        for i in range(args.steps):
            set_rate(optimizer, i, args)
            batch = {name: x.to(args.device) for name, x in next(inputs).items()}
            started = clock(args.device)
            with autocast(args):
                loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.losses.append(loss.item())
            run.seconds.append(clock(args.device) - started)
            progress.update(task, advance=1, description=f"{run.name}: loss {run.losses[-1]:.4f}")
    if args.device == "cuda":
        run.peak_bytes = torch.cuda.max_memory_allocated()


def fit(
    args: argparse.Namespace,
    build: Callable[[], PreTrainedModel],
    inputs: Callable[[], Iterator[Batch]],
    test: Callable[[torch.nn.Module], dict[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
) -> list[Run]:
    """Trains and tests what the arguments ask for, each from the same weights on the same batches."""
    runs = []
    for name in names(args):
        run, model = Run(name), prepare(build(), name, args)
        train(run, model, inputs(), args)
        with torch.no_grad(), autocast(args):
            run.metrics = test(model.eval())
        runs.append(run)
    if args.save:
        model.save_pretrained(args.save)
        tokenizer.save_pretrained(args.save)
    return runs


def f1(hits: int, found: int, actual: int) -> tuple[float, float, float]:
    """Precision, recall, and their harmonic mean; 0 where nothing was found or nothing was there."""
    precision, recall = hits / max(found, 1), hits / max(actual, 1)
    return precision, recall, 2 * precision * recall / max(precision + recall, 1e-12)


# --- report ----------------------------------------------------------------------------------------------------------


def finish(
    args: argparse.Namespace,
    name: str,
    runs: list[Run],
    baseline: dict[str, float],
    draw: Callable[[Any, list[Run]], None],
) -> int:
    """Table, picture and numbers; `draw` fills the picture's right side. The exit status: 1 if the curves part."""
    table = Table("", *(run.name for run in runs), *(["baseline"] if baseline else []))
    for metric, value in runs[0].metrics.items():
        if isinstance(value, float):
            row = [*(run.metrics[metric] for run in runs), *([baseline.get(metric)] if baseline else [])]
            table.add_row(metric, *("" if x is None else f"{x:,.0f}" if x > 100 else f"{x:.4f}" for x in row))
    table.add_row("step, ms", *(f"{run.step_ms:.1f}" for run in runs))
    if args.device == "cuda":
        table.add_row("peak, GiB", *(f"{run.peak_bytes / 2**30:.2f}" for run in runs))
    console.print(table)

    numbers = {
        "torch": torch.__version__, "transformers": transformers.__version__, "baseline": baseline,
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "runs": {run.name: {"losses": run.losses, "step_ms": run.step_ms, **run.metrics} for run in runs},
    }  # fmt: skip
    held = True
    if args.compare:
        apart = [abs(a - b) for a, b in zip(*(run.losses for run in runs), strict=True)]
        numbers["apart"] = {"early": max(apart[:EARLY]), "all": max(apart)}
        console.print(f"largest distance of the loss curves: {max(apart[:EARLY]):.1e} in the first {EARLY} steps, "
                      f"{max(apart):.1e} in all")  # fmt: skip
        if args.dtype == "float32":
            held = max(apart[:EARLY]) <= BOUND
            said = "holds" if held else "FAILS"
            console.print(f"{said}: the first {EARLY} steps within {BOUND}", style="green" if held else "red")

    args.out.mkdir(parents=True, exist_ok=True)
    picture, file = (args.out / f"{name}.{kind}" for kind in ("png", "json"))
    _plot(runs, name, draw, picture)
    file.write_text(json.dumps(numbers, indent=1) + "\n")
    console.print(f"{picture}, {file}")
    return 0 if held else 1


def _plot(runs: list[Run], name: str, draw: Callable[[Any, list[Run]], None], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subfigures(1, 2)
    if len(runs) == 2:
        top, below = left.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        floor = 1e-8  # where two losses are the same float32
        apart = [max(abs(a - b), floor) for a, b in zip(*(run.losses for run in runs), strict=True)]
        below.semilogy(apart, color=COLORS["ours"], lw=1.1)
        below.set(xlabel="step", ylabel="ours - stock", ylim=(floor / 2, max(1e-2, 2 * max(apart))))
        below.spines[["top", "right"]].set_visible(False)
    else:
        top = left.subplots()
        top.set(xlabel="step")
    for run in runs:
        wide = run.name == "stock" and len(runs) == 2  # so that both show where they lie on each other
        color = COLORS[run.name if len(runs) == 2 else "ours"]
        top.plot(run.losses, color=color, lw=5 if wide else 1.1, solid_capstyle="round", label=run.name)
    top.set(ylabel="training loss", title=name.replace("_", " "))
    top.legend(frameon=False)
    axes = right.subplots()
    for spines in (top.spines, axes.spines):
        spines[["top", "right"]].set_visible(False)
    draw(axes, runs)
    figure.savefig(path, dpi=150)
