"""Pretraining in two processes gives the losses of one process, and one process resumes what two have begun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from llama_kernels.core.language import INTERPRETED
from tests.examples.conftest import SMALL

for package in ("accelerate", "matplotlib", "rich"):
    pytest.importorskip(package)
transformers = pytest.importorskip("transformers")

from examples import common, packing, pretrain  # noqa: E402

load_model = common.load_model
pytestmark = pytest.mark.skipif(INTERPRETED, reason="a training loop in Triton's interpreter would take hours")

# By name: the options of a run. Each process does all of them, since most of the time goes into starting a process.
RUNS = {"ddp": [], "cp": ["--cp", "2"], "tp": ["--tp", "2"], "fsdp2": ["--parallel", "fsdp2"]}
ALL = """
import json
import sys
from unittest import mock
import torch.distributed as dist
from examples import pretrain
runs, folder, *options = sys.argv[1:]
dist.init_process_group("gloo")
with mock.patch.multiple(dist, init_process_group=mock.DEFAULT, destroy_process_group=mock.DEFAULT):
    for name, of_run in json.loads(runs).items():
        out = f"{folder}/{name}"
        sys.argv[1:] = [*options, *of_run, "--out", out, "--save", f"{out}/model"]
        if pretrain.main():
            sys.exit(1)
dist.destroy_process_group()
"""


def one_rounding_larger(*args, **kwargs):
    """common.load_model, with every weight replaced by the next larger float32."""
    model = load_model(*args, **kwargs)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.nextafter(p, torch.full_like(p, torch.inf)))
    return model


def test_two_processes_give_the_losses_of_one(run, tmp_path, jsonl):
    data = jsonl([{"text": f"a text of some length, the number {i}"} for i in range(60)])
    options = ["--data", data, "--device", "cpu", "--steps", "6", "--validate-every", "3"]
    _, numbers = run("pretrain", *options)
    alone = numbers["runs"]["patched"]
    with mock.patch.object(common, "load_model", one_rounding_larger):
        nudged = run("pretrain", *options)[1]["runs"]["patched"]
    # Two processes add in another order, which changes roundings. Training amplifies them as it amplifies a rounding of
    # the weights. As in the demo, losses may differ by ten times as much as they do after a rounding of all weights.
    bound = 10 * max(abs(a - b) for a, b in zip(nudged["losses"], alone["losses"], strict=True))

    def assert_close(found, expected):
        torch.testing.assert_close(found, expected, atol=bound, rtol=0)

    script = tmp_path / "all.py"
    script.write_text(ALL)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script,
               json.dumps(RUNS), tmp_path, *SMALL, *options, "--checkpoint-every", "4"]  # fmt: skip
    root = Path(pretrain.__file__).parents[1]
    env = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run([*map(str, command)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation loss") == len(RUNS)  # of each run, only one process prints

    for name in RUNS:
        folder = tmp_path / name
        together = json.loads((folder / "pretrain.json").read_text())["runs"]["patched"]
        assert_close(together["losses"], alone["losses"])
        assert_close(together["validation"], alone["validation"])
        assert len(transformers.AutoModelForCausalLM.from_pretrained(folder / "model").model.layers) == 4

        # One process resumes what two wrote after four steps, and ends with the same losses.
        (folder / "pretrain.json").unlink()
        with mock.patch.object(pretrain, "draw_batch", wraps=packing.draw_batch) as drawn:
            run("pretrain", *options, "--resume", "--out", folder)
        assert [call.args[-1] for call in drawn.call_args_list] == [4, 5]
        resumed = json.loads((folder / "pretrain.json").read_text())["runs"]["patched"]
        assert_close(resumed["losses"], alone["losses"])
