"""Generation for a batch of prompts of unlike length: greedy, beam search and sampling, with what a token costs.

Without --model a tiny Llama first learns source code for some seconds, byte by byte. With --compare stock Transformers
and ours generate from the same weights, and in float32 greedy and beam search must give the same tokens. In bfloat16
two about equally likely tokens may change places.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LogitsProcessor, PreTrainedModel

from examples import training
from examples.pretrain import definitions, pack
from examples.training import COLORS, Batch, Run, console
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
    """Changes no logits; notes when they come."""

    def __init__(self, device: str) -> None:
        self._device, self.times = device, [training.clock(device)]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(training.clock(self._device))
        return scores

    def per_token(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


def learn(model: PreTrainedModel, tokenizer: Any, args: argparse.Namespace) -> None:
    rows = pack(tokenizer, definitions()[:1500], 256)

    def inputs() -> Iterator[Batch]:
        for chosen in training.batches(list(range(len(rows["labels"]))), args.batch, args.seed):
            yield {name: x[torch.tensor(chosen)] for name, x in rows.items()}

    training.train(Run("learning to write"), model, inputs(), args)


def generate(model: PreTrainedModel, inputs: Batch, args: argparse.Namespace) -> dict[str, Any]:
    """method: tokens (B, --tokens), and the seconds of each."""
    methods = {
        "greedy": {"do_sample": False},
        "beam search": {"do_sample": False, "num_beams": args.beams},
        "sampling": {"do_sample": True, "temperature": 0.8, "top_p": 0.95},
    }
    results = {}
    for method, options in methods.items():
        torch.manual_seed(args.seed)
        watch = Clock(args.device)
        # No end before --tokens: all methods are timed over the same length.
        tokens = model.generate(**inputs, **options, max_new_tokens=args.tokens, min_new_tokens=args.tokens,
                                logits_processor=[watch], use_cache=True)  # fmt: skip
        results[method] = {"tokens": tokens[:, inputs["input_ids"].shape[1] :].tolist(), "seconds": watch.per_token()}
    return results


def plot(results: dict[str, dict[str, Any]], rates: dict[str, dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, methods in results.items():
        seconds = methods["greedy"]["seconds"][1:]  # the first is the prompt
        smooth = [1e3 * statistics.median(seconds[max(i - 4, 0) : i + 5]) for i in range(len(seconds))]
        left.plot(range(2, len(smooth) + 2), smooth, color=COLORS[name], lw=2, label=name)
    left.set(
        xlabel="new token", ylabel="ms, median of nine", ylim=(0, None), title="greedy: what a step of the batch costs"
    )
    for i, (name, rate) in enumerate(rates.items()):
        drawn = right.bar([x + i / (len(rates) + 1) for x in range(len(rate))], rate.values(), 0.9 / (len(rates) + 1),
                          color=COLORS[name], label=name)  # fmt: skip
        right.bar_label(drawn, fmt="{:,.0f}")
    middle = (len(rates) - 1) / 2 / (len(rates) + 1)
    right.set_xticks([x + middle for x in range(3)], next(iter(rates.values())))
    right.set(ylabel="tokens/s", title="prompt included")
    for axes in (left, right):
        axes.legend(frameon=False, loc="lower right" if axes is left else "best")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = training.arguments(__doc__, "generate", '{"prompt": ...}', steps=200, batch=16, max_length=256, lr=3e-3)
    parser.add_argument("--tokens", type=training.positive, default=100, help="new tokens for each prompt")
    parser.add_argument("--beams", type=training.positive, default=4)
    args = parser.parse_args()
    prompts = [e["prompt"] for e in training.read_jsonl(args.data, prompt=str)] if args.data else PROMPTS
    tokenizer = training.load_tokenizer(args, size=0)
    model = training.load_model(args, AutoModelForCausalLM, tokenizer)
    if not args.model:
        learn(model if args.stock else patch(model), tokenizer, args)
        if args.save:
            model.save_pretrained(args.save)
            tokenizer.save_pretrained(args.save)
    model.to(training.DTYPES[args.dtype]).eval()
    inputs = tokenizer(prompts, truncation=True, max_length=args.max_length, padding=True, padding_side="left",
                       return_tensors="pt", return_token_type_ids=False).to(args.device)  # fmt: skip

    results = {}
    for name in training.names(args):
        (patch if name == "ours" else unpatch)(model)
        with console.status(f"{name} generates {args.tokens} tokens for each of {len(prompts)} prompts"):
            model.generate(**inputs, max_new_tokens=2, use_cache=True)  # warm-up
            results[name] = generate(model, inputs, args)
    rates = {name: {method: len(prompts) * args.tokens / sum(r["seconds"]) for method, r in methods.items()}
             for name, methods in results.items()}  # fmt: skip

    for method, result in results[training.names(args)[-1]].items():
        console.print(f"\n{method}:", style="bold")
        for prompt, tokens in list(zip(prompts, result["tokens"], strict=True))[:2]:
            console.print(prompt + tokenizer.decode(tokens), markup=False, highlight=False)
    console.print("\ntokens/s", style="bold")
    for name, rate in rates.items():
        console.print(f"{name}: " + ", ".join(f"{method} {x:,.0f}" for method, x in rate.items()))
    held = True
    if args.compare:
        stock, ours = results["stock"], results["ours"]
        same = {method: stock[method]["tokens"] == ours[method]["tokens"] for method in stock}
        for method, equal in same.items():
            demanded = method in COMPARED and args.dtype == "float32"
            style = ("green" if equal else "red") if demanded else None
            console.print(f"{method}: {'the same tokens' if equal else 'other tokens'} as stock", style=style)
        held = args.dtype != "float32" or all(same[method] for method in COMPARED)

    args.out.mkdir(parents=True, exist_ok=True)
    plot(results, rates, args.out / "generate.png")
    numbers = {"torch": torch.__version__, "prompts": prompts, "tokens/s": rates, "runs": results}
    (args.out / "generate.json").write_text(json.dumps(numbers, indent=1) + "\n")
    console.print(f"{args.out / 'generate.png'}, {args.out / 'generate.json'}")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
