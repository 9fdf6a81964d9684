"""Supervised fine-tuning with TRL: packed, padding-free, or with low-rank adapters, also of a 4-bit model.

    python examples/sft.py --compare                 # padded batches
    python examples/sft.py --packing                 # documents are joined to rows of --max-length tokens
    python examples/sft.py --padding-free            # a batch is one row of its documents
    python examples/sft.py --model FOLDER --lora 16 --four-bit    # QLoRA; needs peft and bitsandbytes

In packed and padding-free rows, attention does not cross from one document into another.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python examples/sft.py`

from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from examples import common, report, training
from examples.packing import definitions, pack, unigram_loss
from llama_kernels.integrations.trainer import LlamaKernelsCallback


def main() -> int:
    parser = common.arguments(__doc__, '{"text": ...}', steps=80, batch=8, max_length=192, lr=3e-3)
    rows = parser.add_mutually_exclusive_group()
    rows.add_argument("--packing", action="store_true", help="join documents to rows of --max-length tokens")
    rows.add_argument("--padding-free", action="store_true", help="join the documents of a batch to one row")
    parser.add_argument("--lora", type=common.positive, metavar="RANK", help="train low-rank adapters; needs peft")
    parser.add_argument("--four-bit", action="store_true", help="with --lora: a 4-bit model; needs bitsandbytes")
    args = common.parse(parser)
    if args.four_bit and not (args.lora and args.model):
        parser.error("--four-bit needs --lora and --model: the weights of a saved model are quantized as it is loaded")

    texts = common.read_texts(args.data, args.seed) or definitions(args.seed)
    tokenizer = common.load_tokenizer(args.model, texts, size=1024)
    # No document is longer than a row.
    texts = [tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][: args.max_length - 1])
             for text in texts]  # fmt: skip
    held_out = max(1, min(len(texts) // 10, 64))
    train_set, test_set = (common.dataset({"text": part}) for part in (texts[held_out:], texts[:held_out]))

    runs = []
    for name in common.run_names(args):
        run = report.Run(name)
        if args.four_bit:
            four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=common.DTYPES[args.dtype])
            model: Any = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=four_bit)
        else:
            model = common.load_model(AutoModelForCausalLM, args, tokenizer)
        trainer = SFTTrainer(
            model,
            training.configure(
                SFTConfig, args,
                packing=args.packing, padding_free=args.padding_free,
                max_length=None if args.padding_free else args.max_length,  # padding-free batches are not cut
                gradient_checkpointing=args.checkpointing,
            ),
            train_dataset=train_set, eval_dataset=test_set, processing_class=tokenizer,
            peft_config=common.lora(args.lora, "CAUSAL_LM") if args.lora else None,
            callbacks=[LlamaKernelsCallback()] if name == "patched" else [],
        )  # fmt: skip
        training.fit(run, trainer, args)
        run.metrics = {"validation loss": trainer.evaluate()["eval_loss"]}
        runs.append(run)
    if args.save:
        trainer.save_model(args.save)

    train_rows, test_rows = (pack(tokenizer, list(part["text"]), args.max_length) for part in (train_set, test_set))
    baseline = {"validation loss": unigram_loss(train_rows, test_rows)}
    return report.write(args, "sft", runs, baseline, lambda axes: report.final_scores(axes, runs, baseline))


if __name__ == "__main__":
    sys.exit(main())
