"""Liger-Kernel's fused linear cross-entropy and SwiGLU beside our attention, RMSNorm and RoPE.

    python examples/liger.py --compare                            # on a GPU
    TRITON_INTERPRET=1 python examples/liger.py --no-swiglu ...   # on a CPU, where it is slow

Liger's own RoPE and RMSNorm are switched off; the order of the two calls does not matter. In the Hugging Face Trainer,
use_liger_kernel=True with liger_kernel_config={"rope": False, "rms_norm": False} does the same.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python examples/liger.py`

from liger_kernel.transformers import _apply_liger_kernel_to_instance
from transformers import AutoModelForCausalLM

from examples import common, report, training
from examples.packing import Rows, corpus, unigram_loss
from llama_kernels.core.language import INTERPRETED
from llama_kernels.integrations.transformers import patch


def train(run: report.Run, args: argparse.Namespace, tokenizer: Any, rows: Rows, test: Rows) -> Any:
    model: Any = common.load_model(AutoModelForCausalLM, args, tokenizer)
    if run.name == "patched":
        _apply_liger_kernel_to_instance(
            model=model, rope=False, rms_norm=False, swiglu=not args.no_swiglu, cross_entropy=False,
            fused_linear_cross_entropy=True,
        )  # fmt: skip
        patch(model)
    run.metrics = {"validation loss": training.on_rows(run, args, model, rows, test)}
    return model


def main() -> int:
    parser = common.arguments(__doc__, '{"text": ...}', steps=60, batch=8, max_length=128, lr=3e-3)
    parser.add_argument("--no-swiglu", action="store_true", help="keep the stock SwiGLU")
    args = common.parse(parser)
    if args.device == "cpu" and not (INTERPRETED and args.no_swiglu):
        parser.error("Liger's kernels need a GPU. Its loss, without SwiGLU, also runs in Triton's interpreter: set "
                     "TRITON_INTERPRET=1 and pass --no-swiglu")  # fmt: skip
    tokenizer, rows, test = corpus(args)
    runs = [report.Run(name) for name in common.run_names(args)]
    for run in runs:
        model = train(run, args, tokenizer, rows, test)
    if args.save:
        common.save(model, tokenizer, args.save)
    baseline = {"validation loss": unigram_loss(rows, test)}
    return report.write(args, "liger", runs, baseline, lambda axes: report.final_scores(axes, runs, baseline))


if __name__ == "__main__":
    sys.exit(main())
