"""Generate text with a patched model, and time it: greedy, beam search and sampling, for prompts of different lengths.

Without --model, a tiny Llama is trained on source code first. With --compare, the stock and the patched model generate
from the same weights. In float32, greedy and beam search must give the same tokens. In bfloat16, two tokens of nearly
equal probability may change places.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python examples/generate.py`

import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, LogitsProcessor

from examples import common, training
from examples.packing import definitions, pack, select
from examples.report import COLORS, Run, console
from llama_kernels.integrations.transformers import patch, unpatch

PROMPTS = [
    "def ",
    "import os\n\nclass ",
    "    if not isinstance(",
    "for i in range(",
    "    def __init__(self, ",
    "return ",
]
COMPARED = ("greedy", "beam search")  # sampling amplifies the last bit


class Clock(LogitsProcessor):
    """Records the time of each step, and does not change the logits."""

    def __init__(self, device: str) -> None:
        self._device, self.times = device, [training.clock(device)]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(training.clock(self._device))
        return scores

    def seconds(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


def generate(model: Any, inputs: dict[str, torch.Tensor], args: argparse.Namespace) -> dict[str, Any]:
    """For each method: tokens (B, --tokens), and the seconds of each token."""
    methods: dict[str, dict[str, Any]] = {
        "greedy": {"do_sample": False},
        "beam search": {"do_sample": False, "num_beams": args.beams},
        "sampling": {"do_sample": True, "temperature": 0.8, "top_p": 0.95},
    }
    results = {}
    for method, options in methods.items():
        torch.manual_seed(args.seed)
        clock = Clock(args.device)
        # Exactly --tokens tokens, so that all methods are timed over the same length.
        tokens = model.generate(**inputs, **options, max_new_tokens=args.tokens, min_new_tokens=args.tokens,
                                logits_processor=[clock], use_cache=True)  # fmt: skip
        results[method] = {"tokens": tokens[:, inputs["input_ids"].shape[1] :].tolist(), "seconds": clock.seconds()}
    return results


def plot(results: dict[str, dict[str, Any]], rates: dict[str, dict[str, float]], path: Path) -> None:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    width = 0.9 / len(rates)
    places = range(len(next(iter(rates.values()))))
    for i, (name, methods) in enumerate(results.items()):
        seconds = methods["greedy"]["seconds"][1:]  # the first is the prompt
        smooth = [1e3 * statistics.median(seconds[max(i - 4, 0) : i + 5]) for i in range(len(seconds))]
        left.plot(range(2, len(smooth) + 2), smooth, color=COLORS[name], lw=2, label=name)
        drawn = right.bar([x + i * width for x in places], rates[name].values(), width, color=COLORS[name])
        right.bar_label(drawn, fmt="{:,.0f}")
    left.set(xlabel="new token", ylabel="ms, median of nine", ylim=(0, None), title="greedy: time of a token")
    left.legend(frameon=False, loc="lower right")
    right.set_xticks([x + width * (len(rates) - 1) / 2 for x in places], next(iter(rates.values())))
    right.set(ylabel="tokens/s", title="prompt included")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = common.arguments(__doc__, '{"prompt": ...}', steps=200, batch=16, max_length=256, lr=3e-3)
    parser.add_argument("--tokens", type=common.positive, default=100, help="new tokens for each prompt")
    parser.add_argument("--beams", type=common.positive, default=4)
    args = common.parse(parser)
    prompts = [e["prompt"] for e in common.read_jsonl(args.data, {"prompt": str})] if args.data else PROMPTS
    tokenizer: Any = common.load_tokenizer(args.model, size=0)
    model: Any = common.load_model(AutoModelForCausalLM, args, tokenizer)
    if not args.model:
        common.prepare(model, common.run_names(args)[-1], args)
        rows = pack(tokenizer, definitions(args.seed), args.max_length)
        train_set = [select(rows, i) for i in range(len(rows["labels"]))]
        trainer = training.train(Run("learning"), model, train_set, args, tokenizer)
        if args.save:
            trainer.save_model(args.save)
    model.to(common.DTYPES[args.dtype]).eval()
    inputs = tokenizer(prompts, truncation=True, max_length=args.max_length, padding=True, padding_side="left",
                       return_tensors="pt", return_token_type_ids=False).to(args.device)  # fmt: skip

    results = {}
    for name in common.run_names(args):
        (patch if name == "patched" else unpatch)(model)
        with console.status(f"{name}: {args.tokens} tokens for each of {len(prompts)} prompts"):
            model.generate(**inputs, max_new_tokens=2, use_cache=True)  # warm-up
            results[name] = generate(model, inputs, args)
    rates = {name: {method: len(prompts) * args.tokens / sum(r["seconds"]) for method, r in methods.items()}
             for name, methods in results.items()}  # fmt: skip

    for method, result in results[name].items():
        console.print(f"\n{method}:", style="bold")
        for prompt, tokens in list(zip(prompts, result["tokens"], strict=True))[:2]:
            console.print(prompt + tokenizer.decode(tokens), markup=False, highlight=False)
    for name, rate in rates.items():
        console.print(f"{name}, tokens/s: " + ", ".join(f"{method} {x:,.0f}" for method, x in rate.items()))
    held = True
    for method in results[name] if args.compare else ():
        equal = results["stock"][method]["tokens"] == results["patched"][method]["tokens"]
        required = method in COMPARED and args.dtype == "float32"
        style = ("green" if equal else "red") if required else None
        console.print(f"{method}: {'the same tokens as' if equal else 'other tokens than'} stock", style=style)
        held = held and (equal or not required)

    args.out.mkdir(parents=True, exist_ok=True)
    plot(results, rates, args.out / "generate.png")
    numbers = {"torch": torch.__version__, "prompts": prompts, "tokens/s": rates, "runs": results}
    (args.out / "generate.json").write_text(json.dumps(numbers, indent=1) + "\n")
    console.print(f"{args.out / 'generate.png'}, {args.out / 'generate.json'}")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
