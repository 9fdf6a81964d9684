"""Families of Transformers under tensor parallelism: two processes load a model with its tp_plan, run it and patch it.

    TRITON_INTERPRET=0 CUDA_VISIBLE_DEVICES= python -m tests.integrations.tensor_parallel [family ...]

prints for each family, or for all, whether the results of the stock and of the patched model are right.
"""

from __future__ import annotations

import functools
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from llama_kernels.integrations.transformers import patch, report
from tests.distributed import processes
from tests.integrations.checks import Baseline, Result, with_padding
from tests.integrations.comparison import Results, compare
from tests.integrations.families import EVERY_FAMILY, FAMILIES, batch


def whole(result: Result) -> Results:
    """The tensors of a result, gathered from all ranks."""
    return {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in result.close.items()}


def results(families: list[str], seconds: float) -> dict[str, dict[str, Any]]:
    """By family, what `run_family` found. Raises RuntimeError if the processes have not ended after `seconds`."""
    with tempfile.TemporaryDirectory() as folder:
        for family in families:
            baseline(family).model.save_pretrained(Path(folder, family))
        return processes.run({family: (run_family, (family, folder)) for family in families}, 2, seconds)


def run_family(family: str, folder: str) -> dict[str, Any]:
    """What each process runs: the model that `folder` has, stock and patched.

    "stock" and "patched" are logits and gradients, with padding on the left. "ours" counts the replaced operations by
    kind. "error" is a traceback, if anything was raised.
    """
    auto = AutoModelForCausalLM if family in FAMILIES else AutoModelForImageTextToText
    found: dict[str, Any] = {}
    try:
        options = {"attn_implementation": "eager", "experts_implementation": "eager"}
        model = auto.from_pretrained(f"{folder}/{family}", tp_plan="auto", **options).eval()
        found["stock"] = whole(with_padding(model, batch(family), "left"))
        patch(model)
        found["patched"] = whole(with_padding(model, batch(family), "left"))
        rows = report(model).rows
        found["ours"] = {
            kind: sum(r.count for r in rows if r.kind == kind and r.ours) for kind in {r.kind for r in rows}
        }
    except Exception:
        found["error"] = traceback.format_exc()
    return found


baseline = functools.cache(Baseline)


def check_results(family: str, results: Results, check: str = "left") -> None:
    """Raise AssertionError unless `results` are those of the stock model in one process."""
    theirs, truth = baseline(family).results(check)
    compare(results, theirs.close, truth.close)


if __name__ == "__main__":
    for family, found in results(sys.argv[1:] or list(EVERY_FAMILY), 600).items():
        words = []
        for name in ("stock", "patched"):
            try:
                if name in found:
                    check_results(family, found[name])
                    words.append(f"{name} right")
            except AssertionError as error:
                words.append(f"{name} wrong: {error}")
        if "error" in found:
            words.append(found["error"].splitlines()[-1])
        print(family, *words, sep=" | ")
