"""torch.compile of a patched model, in a plain PyTorch training loop on packed rows.

    python examples/compiled.py --compare      # stock and patched, both compiled without a graph break
    python examples/compiled.py --mode max-autotune-no-cudagraphs

Patch first, then compile. The ops are registered with torch.library: fullgraph=True holds.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python examples/compiled.py`

import torch
from transformers import AutoModelForCausalLM

from examples import common, report, training
from examples.packing import Rows, corpus, unigram_loss
from llama_kernels.integrations.transformers import patch


def train(run: report.Run, args: argparse.Namespace, tokenizer: Any, rows: Rows, test: Rows) -> Any:
    model: Any = common.load_model(AutoModelForCausalLM, args, tokenizer)
    if run.name == "patched":
        patch(model)
    torch.compiler.reset()
    compiled: Any = torch.compile(model, fullgraph=True, mode=args.mode)
    loss = training.on_rows(run, args, model, rows, test, forward=compiled)
    run.metrics = {"validation loss": loss, "first step, with compilation, s": run.seconds[0]}
    return model  # not its compiled wrapper, for --save


def main() -> int:
    parser = common.arguments(__doc__, '{"text": ...}', steps=60, batch=8, max_length=128, lr=3e-3)
    parser.add_argument("--mode", default="default", help="of torch.compile (default: %(default)s)")
    args = common.parse(parser)
    tokenizer, rows, test = corpus(args)
    runs = [report.Run(name) for name in common.run_names(args)]
    for run in runs:
        model = train(run, args, tokenizer, rows, test)
    if args.save:
        common.save(model, tokenizer, args.save)
    baseline = {"validation loss": unigram_loss(rows, test)}
    return report.write(args, "compiled", runs, baseline, lambda axes: report.final_scores(axes, runs, baseline))


if __name__ == "__main__":
    sys.exit(main())
