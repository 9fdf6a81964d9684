"""Runs of the examples: stock and patched models agree and learn, with built-in and with users' data and models."""

from __future__ import annotations

import json
import runpy
import sys
import types
from pathlib import Path

import pytest
import torch

from llama_kernels.core.language import INTERPRETED

for package in ("accelerate", "matplotlib", "rich"):
    pytest.importorskip(package)
transformers = pytest.importorskip("transformers")

from examples import common, demo, verify  # noqa: E402

pytestmark = pytest.mark.skipif(INTERPRETED, reason="a training loop in Triton's interpreter would take hours")

EXAMPLES = Path(demo.__file__).parent
SEQUENCE, TOKEN, QUESTION = (("finetune", "--task", task) for task in (
    "sequence-classification", "token-classification", "question-answering"))  # fmt: skip
DATA = {
    SEQUENCE: [{"text": w, "label": w} for w in ("so", "such", "thus")] * 8,
    TOKEN: [{"text": "ab cd", "spans": [[0, 2, "a"], [3, 5, "c"]]}, {"text": "x", "spans": []},
            {"text": "cd", "spans": [[0, 2, "c"]]}] * 8,
    QUESTION: [{"question": "who?", "context": f"it was {w}.", "answer": w} for w in ("me", "you")] * 8,
    ("pretrain",): [{"text": f"a text of some length, the number {i}"} for i in range(60)],
}  # fmt: skip
GENERATE = ("generate",)
NEEDED = {"sft": ["trl"], "dpo": ["trl"], "grpo": ["trl"], "lightning_fit": ["lightning"], "liger": ["liger_kernel"]}


@pytest.mark.parametrize("script", [SEQUENCE, TOKEN, QUESTION], ids=" ".join)
def test_stock_and_patched_have_equal_losses_on_built_in_data(run, script):
    status, numbers = run(*script, "--compare", "--steps", "4", "--test-size", "20")
    stock, patched = (numbers["runs"][name] for name in ("stock", "patched"))
    assert status == 0
    assert len(stock["losses"]) == 4
    assert numbers["apart"]["all"] == max(abs(a - b) for a, b in zip(stock["losses"], patched["losses"], strict=True))
    assert numbers["apart"]["all"] < 2e-3
    assert set(stock) == set(patched)


def test_a_patched_model_learns_token_classification(run):
    status, numbers = run(*TOKEN, "--steps", "60", "--batch", "16", "--lr", "4e-3", "--test-size", "80")
    assert status == 0
    patched = numbers["runs"]["patched"]
    assert patched["F1"] > numbers["baseline"]["F1"] + 0.1
    assert patched["losses"][-1] < patched["losses"][0] / 3


def test_a_run_that_differs_from_stock_fails(run, monkeypatch, jsonl):
    monkeypatch.setattr(common, "patch", lambda model: model.model.norm.weight.data.mul_(1.1))
    status, numbers = run(*SEQUENCE, "--data", jsonl(DATA[SEQUENCE]), "--compare", "--steps", "3")
    assert status == 1
    assert numbers["apart"]["early"] > 2e-3


@pytest.mark.parametrize("script", DATA, ids=" ".join)
def test_users_data_and_model_work(run, script, tmp_path, jsonl, model_folder):
    saved = tmp_path / "saved"
    status, numbers = run(*script, "--model", model_folder, "--data", jsonl(DATA[script]), "--compare", "--steps", "3",
                          "--checkpointing", "--save", saved)  # fmt: skip
    assert status == 0
    assert numbers["apart"]["all"] < 2e-3
    assert json.loads((saved / "config.json").read_text())["num_attention_heads"] == 3
    assert transformers.AutoTokenizer.from_pretrained(saved).is_fast


def test_checkpointing_recomputes_activations(run, jsonl, monkeypatch):
    """It changes no result, so the test counts the forwards of a layer."""
    forwards = 0
    forward = transformers.models.llama.modeling_llama.LlamaMLP.forward

    def counted(self, x):
        nonlocal forwards
        forwards += 1
        return forward(self, x)

    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaMLP, "forward", counted)
    data, counts = jsonl(DATA[SEQUENCE]), []
    for options in ((), ("--checkpointing",)):
        forwards = 0
        run(*SEQUENCE, "--data", data, "--steps", "2", *options)
        counts.append(forwards)
    assert counts[1] - counts[0] == 2 * 2  # steps, layers


def test_generate_gives_the_tokens_of_stock(run, jsonl, model_folder):
    data = jsonl([{"prompt": "def "}, {"prompt": "for i in range(3)"}])
    status, numbers = run("generate", "--model", model_folder, "--data", data, "--compare", "--tokens", "12")
    assert status == 0
    for method in ("greedy", "beam search"):
        tokens = numbers["runs"]["patched"][method]["tokens"]
        assert tokens == numbers["runs"]["stock"][method]["tokens"]
        assert [len(row) for row in tokens] == [12, 12]


def test_generate_trains_a_model_if_none_is_given(run, monkeypatch, tmp_path):
    monkeypatch.setattr("examples.generate.definitions", lambda seed: ["def f(x): return x\n"] * 40)
    status, numbers = run("generate", "--stock", "--steps", "2", "--tokens", "4", "--save", tmp_path / "saved")
    assert status == 0
    assert list(numbers["runs"]) == ["stock"]
    assert (tmp_path / "saved" / "model.safetensors").is_file()


@pytest.mark.parametrize("script", [SEQUENCE, TOKEN, QUESTION], ids=" ".join)
def test_lora_trains_adapters_only(run, tmp_path, jsonl, script):
    pytest.importorskip("peft")
    saved = tmp_path / "adapter"
    status, _ = run(*script, "--data", jsonl(DATA[script]), "--compare", "--steps", "2", "--lora", "4", "--save", saved)
    assert status == 0
    assert json.loads((saved / "adapter_config.json").read_text())["r"] == 4
    assert not (saved / "model.safetensors").exists()


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "lines", "error"),
    [
        (SEQUENCE, ['{"text": "a", "label": "b"}', "{"], "line 2: not JSON"),
        (SEQUENCE, ['{"text": "a"}'], "line 1: field 'label' must be str or int, got 'nothing'"),
        (SEQUENCE, ['{"text": "a", "label": "b"}'], "at least two lines"),
        (SEQUENCE, ['{"text": "a", "label": "b"}'] * 2, "at least two labels are needed, got 'b' only"),
        (SEQUENCE, ["[1]"], "line 1: field 'text' must be str, got [1]"),
        (TOKEN, ['{"text": "a", "spans": [[0, 2, "x"]]}'] * 2, "line 1: a span must be"),
        (QUESTION, ['{"question": "a", "context": "b", "answer": "c"}'] * 2, "is not in the context"),
        (("pretrain",), ['{"text": "a"}'] * 2, "do not fill two rows"),
        (("pretrain",), ['{"text": "a text of some length"}'] * 9, "4 rows are less than two batches"),
        (GENERATE, ['{"prompt": 3}'] * 2, "field 'prompt' must be str, got 3"),
    ],
)
def test_the_error_for_bad_data_names_it(run, tmp_path, script, lines, error):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(SystemExit) as refused:
        run(*script, "--data", path)
    assert error in str(refused.value)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--data", "/no/such/file"], "no file /no/such/file"),
        (["--model", "/no/such/model"], "no folder with a config.json"),
        (["--steps", "0"], "0 is less than 1"),
        (["--stock", "--compare"], "not allowed with"),
        (["--task", "translation"], "invalid choice: 'translation'"),
    ],
)
def test_the_error_for_bad_options_names_them(run, capsys, options, error):
    with pytest.raises(SystemExit):
        run(*SEQUENCE, *options)
    assert error in capsys.readouterr().err


def test_resume_without_a_checkpoint_is_an_error(run, jsonl):
    with pytest.raises(SystemExit, match="no checkpoint in"):
        run("pretrain", "--data", jsonl(DATA[("pretrain",)]), "--resume")


@pytest.mark.parametrize(
    "name",
    ["compiled", "demo", "dpo", "finetune", "fsdp2", "generate", "grpo", "liger", "lightning_fit", "pretrain", "sft",
     "verify"],
)  # fmt: skip
def test_an_example_runs_by_its_path(monkeypatch, capsys, tmp_path, name):
    """From any folder, without an installed package: neither is on the path."""
    for package in NEEDED.get(name, ()):
        pytest.importorskip(package, reason=f"needs {package}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    path = [entry for entry in sys.path if Path(entry or ".").resolve() not in (EXAMPLES.parent, tmp_path)]
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *path])
    for module in [module for module in sys.modules if module.split(".")[0] == "examples"]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 0
    assert "--device" in capsys.readouterr().out


# --- the device ------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_gpu_may_be_used(monkeypatch):
    """torch says that there is a GPU. Without one, its use raises. With one, no memory may be allocated on it."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        yield
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    else:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        # As in a build for CPUs. In one for CUDA, Adam asks for its current stream, whatever the parameters' device.
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
        yield


@pytest.mark.parametrize("script", [*DATA, GENERATE], ids=" ".join)
def test_device_cpu_uses_no_gpu(run, no_gpu_may_be_used, jsonl, model_folder, script):
    options = ["--model", model_folder, "--tokens", "3"] if script == GENERATE else ["--data", jsonl(DATA[script])]
    status, numbers = run(*script, "--device", "cpu", "--compare", "--steps", "2", *options)
    assert status == 0 and set(numbers["runs"]) == {"stock", "patched"}


def test_the_default_dtype_depends_on_the_device(monkeypatch):
    parser = common.arguments("A test.", "{}", steps=1, batch=1, max_length=1, lr=1.0)
    for device, dtype in (("cpu", "float32"), ("cuda", "bfloat16")):
        for options, wanted in (([], dtype), (["--dtype", "bfloat16"], "bfloat16")):
            monkeypatch.setattr(sys, "argv", ["test", "--device", device, *options])
            assert common.parse(parser).dtype == wanted


def test_the_demo_with_device_cpu_uses_no_gpu(no_gpu_may_be_used, monkeypatch, tmp_path, capsys):
    """The demo verifies its steps in a new process. Here that runs in this process."""

    def verified(command, env, **_):
        assert Path(command[1]) == EXAMPLES / "verify.py"
        assert command[2:4] == ["--device", "cpu"] and env["TRITON_INTERPRET"] == "1"
        return types.SimpleNamespace(stdout=json.dumps(verify.main(command[2:])))

    monkeypatch.setattr(demo.subprocess, "run", verified)
    monkeypatch.setattr(demo, "standard_library", lambda: torch.arange(9000).remainder(97).to(torch.uint8))
    options = ["--device", "cpu", "--steps", "2", "--batch", "2", "--seq", "16", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["demo", *options])
    assert demo.main() == 0
    numbers = json.loads((tmp_path / "demo.json").read_text())
    assert numbers["device"] == "cpu" and [s["step"] for s in numbers["steps"]] == [0, 1]
    assert {o["call"].split(",")[0] for o in numbers["ops"]} == set(verify.OPS)
    assert all(o["passed"] for o in numbers["ops"])
    printed = " ".join(capsys.readouterr().out.split())
    losses = numbers["losses"]["ours"]
    assert f"both losses fall from {losses[0]:.2f} to {losses[-1]:.2f} in 2 steps" in printed
    assert "Next: python -m llama_kernels" in printed
