"""Preference optimization (DPO) with TRL: which of two bodies belongs to the header of a function?

    python examples/dpo.py --compare
    python examples/sft.py --save build/lm && python examples/dpo.py --model build/lm --lr 2e-4
    python examples/dpo.py --model FOLDER --lora 16      # without adapters, the model itself is the reference

The reference model is not the trainer's model: it is patched before it is passed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python examples/dpo.py`

from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from examples import common, report, training
from examples.functions import functions
from llama_kernels.integrations.trainer import LlamaKernelsCallback
from llama_kernels.integrations.transformers import patch

FIELDS = {"prompt": str, "chosen": str, "rejected": str}


def preferences(seed: int) -> common.Examples:
    """Chosen is the body of the function, rejected the same lines in reverse order."""
    return [
        {"prompt": f.header, "chosen": f.body, "rejected": "\n".join(["", *f.body.splitlines()[:0:-1]])}
        for f in functions(seed)
    ]


def main() -> int:
    line = '{"prompt": ..., "chosen": ..., "rejected": ...}'
    parser = common.arguments(__doc__, line, steps=40, batch=8, max_length=192, lr=1e-3)
    parser.add_argument("--lora", type=common.positive, metavar="RANK", help="train low-rank adapters; needs peft")
    args = common.parse(parser)

    pairs = common.read_jsonl(args.data, FIELDS) if args.data else preferences(args.seed)
    train_pairs, test_pairs = common.split(pairs, args.seed)
    tokenizer = common.load_tokenizer(args.model, (pair["prompt"] + pair["chosen"] for pair in train_pairs), 1024)
    train_set, test_set = (
        common.dataset({name: [pair[name] for pair in part] for name in FIELDS})
        for part in (train_pairs, test_pairs[:64])
    )

    runs = []
    for name in common.run_names(args):
        run = report.Run(name)
        model: Any = common.load_model(AutoModelForCausalLM, args, tokenizer)
        reference: Any = None  # with adapters: the model without them
        if not args.lora:
            reference = common.load_model(AutoModelForCausalLM, args, tokenizer)
            if name == "patched":
                patch(reference)
        trainer = DPOTrainer(
            model,
            reference,
            training.configure(
                DPOConfig, args,
                beta=0.1, max_length=args.max_length, gradient_checkpointing=args.checkpointing,
            ),
            train_dataset=train_set, eval_dataset=test_set, processing_class=tokenizer,
            peft_config=common.lora(args.lora, "CAUSAL_LM") if args.lora else None,
            callbacks=[LlamaKernelsCallback()] if name == "patched" else [],
        )  # fmt: skip
        training.fit(run, trainer, args)
        scores = trainer.evaluate()
        run.metrics = {"preferred": scores["eval_rewards/accuracies"], "margin": scores["eval_rewards/margins"]}
        runs.append(run)
    if args.save:
        trainer.save_model(args.save)
    baseline = {"preferred": 0.5}  # the share of test pairs of which chosen has the higher reward: by chance
    return report.write(args, "dpo", runs, baseline, lambda axes: report.final_scores(axes, runs, baseline))


if __name__ == "__main__":
    sys.exit(main())
