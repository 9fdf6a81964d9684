"""Reinforcement learning (GRPO) with TRL: the reward is the share of generated lines that are indented as in Python.

    python examples/grpo.py
    python examples/sft.py --save build/lm && python examples/grpo.py --model build/lm --lr 2e-4

The model that generates is the patched one: prompts of different lengths, padded on the left, and a KV cache. A reward
is a number that a program computes from the text; replace `reward` by your own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python examples/grpo.py`

from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from examples import common, report, training
from examples.functions import functions
from llama_kernels.integrations.trainer import LlamaKernelsCallback


def indented(text: str) -> float:
    """The share of the lines after the first that are indented by four spaces or a multiple, and have text."""
    lines = text.split("\n")[1:]
    indents = [len(line) - len(line.lstrip(" ")) for line in lines if line.strip()]
    return sum(n > 0 and n % 4 == 0 for n in indents) / max(len(lines), 1)


def reward(completions: list[str], **_: Any) -> list[float]:
    return [indented(text) for text in completions]


def main() -> int:
    parser = common.arguments(__doc__, '{"prompt": ...}', steps=30, batch=16, max_length=32, lr=2e-3)
    parser.add_argument(
        "--group", type=common.positive, default=8, help="completions per prompt (default: %(default)s)"
    )
    args = common.parse(parser)
    if args.batch % args.group:
        parser.error(f"--batch {args.batch} does not divide into groups of {args.group} completions")

    given = common.read_jsonl(args.data, {"prompt": str}) if args.data else []
    prompts = [example["prompt"] for example in given] or [f.header for f in functions(args.seed)]
    tokenizer = common.load_tokenizer(args.model, (f.header + f.body for f in functions(args.seed)), 1024)

    runs = []
    for name in common.run_names(args):
        run = report.Run(name)
        model: Any = common.load_model(AutoModelForCausalLM, args, tokenizer)
        trainer = GRPOTrainer(
            model,
            reward,
            training.configure(
                GRPOConfig, args,
                num_generations=args.group, max_completion_length=args.max_length,
                generation_kwargs={"use_cache": True},
                gradient_checkpointing=args.checkpointing,
            ),
            train_dataset=common.dataset({"prompt": prompts}), processing_class=tokenizer,
            callbacks=[LlamaKernelsCallback()] if name == "patched" else [],
        )  # fmt: skip
        training.fit(run, trainer, args)
        rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
        last = rewards[-5:]
        run.metrics = {"reward": sum(last) / len(last), "rewards": rewards}
        runs.append(run)
    if args.save:
        trainer.save_model(args.save)

    def draw(axes: Any) -> None:
        for run in runs:
            axes.plot(run.metrics["rewards"], color=report.COLORS[run.name], lw=5 if run.name == "stock" else 1.4)
        axes.set(xlabel="step", ylabel="mean reward", ylim=(0, 1), title=f"reward {baseline['reward']:.2f} at first, "
                 f"{runs[-1].metrics['reward']:.2f} at the end")  # fmt: skip

    baseline = {"reward": runs[-1].metrics["rewards"][0]}  # of the model before training
    return report.write(args, "grpo", runs, baseline, draw)


if __name__ == "__main__":
    sys.exit(main())
