"""The examples, shortened: what they measure, that both runs of --compare agree, on the user's data and model as well,
and that two processes compute what one does. They run on CPU tensors' own path or on a GPU, never interpreted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from llama_kernels.core.language import INTERPRETED

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
transformers = pytest.importorskip("transformers")

from examples import (  # noqa: E402
    demo,
    finetune_sequence_classification,
    finetune_token_classification,
    generate,
    pretrain,
    question_answering,
    training,
    verify,
)

pytestmark = pytest.mark.skipif(INTERPRETED, reason="a training loop in Triton's interpreter would take hours")

ROOT = Path(__file__).parents[2]
SMALL = ("--batch", "4", "--max-length", "48", "--dtype", "float32")


@pytest.fixture(autouse=True)
def _as_before():
    verbosity, quiet = transformers.logging.get_verbosity(), training.console.quiet
    yield
    transformers.logging.set_verbosity(verbosity)
    transformers.utils.logging.enable_progress_bar()
    training.console.quiet = quiet


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(script, *options): its exit status, and the numbers it wrote."""

    def run(script, *options):
        name = script.__name__.rsplit(".", 1)[-1]
        monkeypatch.setattr(sys, "argv", [name, *SMALL, "--out", str(tmp_path / "out"), *map(str, options)])
        status = script.main()
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 10_000
        return status, json.loads((tmp_path / "out" / f"{name}.json").read_text())

    return run


def jsonl(path: Path, examples: list) -> Path:
    path.write_text("\n".join(map(json.dumps, examples)) + "\n")
    return path


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A model of another shape than the built-in one, with its tokenizer, as save_pretrained leaves them."""
    folder = tmp_path_factory.mktemp("model")

    class Arguments:
        model = None

    tokenizer = training.load_tokenizer(Arguments, ["def f(x): return x"], 300)
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), hidden_size=48, intermediate_size=64,
                                      num_hidden_layers=1, num_attention_heads=3, num_key_value_heads=1,
                                      bos_token_id=0, eos_token_id=1)  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# --- what they measure -----------------------------------------------------------------------------------------------


def test_metrics_of_sequence_classification():
    confusion = torch.tensor([[3, 1], [2, 4]])
    found = finetune_sequence_classification.metrics(confusion)
    assert found["accuracy"] == pytest.approx(0.7)
    assert found["precision"] == pytest.approx((3 / 5 + 4 / 5) / 2)
    assert found["recall"] == pytest.approx((3 / 4 + 4 / 6) / 2)
    assert found["F1"] == pytest.approx((2 / 3 + 8 / 11) / 2)


def test_a_class_that_is_never_predicted_scores_zero():
    assert finetune_sequence_classification.metrics(torch.tensor([[4, 0], [2, 0]]))["F1"] == pytest.approx(0.8 / 2)


def test_pythons_tokens_become_spans():
    source = "if x:  # why\n    y = f'{x}!' + 'z'\n"
    spans, ends = finetune_token_classification.python_tokens(source)
    assert [(source[a:b], kind) for a, b, kind in spans] == [
        ("if", "keyword"), ("x", "name"), (":", "operator"), ("# why", "comment"), ("y", "name"), ("=", "operator"),
        ("f'{x}!'", "string"), ("+", "operator"), ("'z'", "string"),
    ]  # fmt: skip
    assert ends == [source.index("\n") + 1, len(source)]


def test_tags_follow_spans_whatever_the_tokens():
    text, spans = "ab = 'c d'", [(0, 2, "name"), (3, 4, "operator"), (5, 10, "string")]
    offsets = [(0, 1), (1, 2), (2, 4), (4, 6), (6, 8), (8, 9), (9, 10)]  # the space with the token that follows
    assert finetune_token_classification.tag(text, spans, offsets) == [
        "B-name", "I-name", "B-operator", "B-string", "I-string", "I-string", "I-string"
    ]  # fmt: skip


def test_metrics_of_token_classification():
    assert finetune_token_classification.entities(["B-a", "B-a", "I-a", "O", "I-b", "I-a"]) == {
        (0, 1, "a"), (1, 3, "a"), (4, 5, "b"), (5, 6, "a")
    }  # fmt: skip
    actual, predicted = [["B-a", "I-a", "O", "B-b"]], [["B-a", "O", "O", "B-b"]]
    found = finetune_token_classification.metrics(actual, predicted)
    assert found["accuracy"] == 0.75
    assert found["precision"] == found["recall"] == found["F1"] == 0.5
    assert (found["F1, a"], found["F1, b"], found["F1, macro"]) == (0.0, 1.0, 0.5)


def test_metrics_of_question_answering():
    found = question_answering.metrics(["a b", "None", "x"], ["a", "none", "y"])
    assert found["exact match"] == pytest.approx(1 / 3)
    assert found["F1"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    start, end = torch.tensor([9.0, 1.0, 0.0, 3.0]), torch.tensor([0.0, 4.0, 2.0, 0.0])
    assert question_answering.best_span(start, end, first=1) == (1, 1)  # not (0, 1), the question; not (3, 1), backward


def test_every_answer_stands_where_it_should():
    examples = question_answering.questions()
    assert len(examples) > 5000
    assert all(e["context"].startswith(e["answer"], e["start"]) for e in examples)
    assert {question_answering.kind(e["question"]) for e in examples} > {"What is ... set to?", "What is returned?"}


def test_packing_keeps_documents_apart():
    class Tokenizer:
        eos_token_id = 9

        def __call__(self, texts, add_special_tokens):
            return {"input_ids": [[int(c) for c in text] for text in texts]}

    rows = pretrain.pack(Tokenizer(), ["123", "45678", "1"], 4)  # 1239 4567 8919
    assert rows["input_ids"].tolist() == [[1, 2, 3, 9], [4, 5, 6, 7], [8, 9, 1, 9]]
    assert rows["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 0, 1]]
    assert rows["labels"].tolist() == [[-100, 2, 3, 9], [-100, 5, 6, 7], [-100, 9, -100, 9]]
    assert pretrain.count(rows) == 8


def test_split_keeps_groups_together_and_batches_repeat():
    examples = [{"n": i, "group": i % 10} for i in range(100)]
    train_set, test_set = training.split(examples, seed=0, share=0.2)
    assert len(test_set) == 20
    assert not {e["group"] for e in train_set} & {e["group"] for e in test_set}
    first, again = (training.batches(examples, 30, seed=1) for _ in range(2))
    drawn = [next(first) for _ in range(10)]
    assert drawn == [next(again) for _ in range(10)]
    assert all(sum(e["n"] == n for batch in drawn for e in batch) == 3 for n in range(100))


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [finetune_sequence_classification, question_answering])
def test_compare_on_built_in_data(run, script):
    status, numbers = run(script, "--compare", "--steps", "8")
    stock, ours = (numbers["runs"][name] for name in ("stock", "ours"))
    assert status == 0
    assert len(stock["losses"]) == 8
    assert numbers["apart"]["all"] == max(abs(a - b) for a, b in zip(stock["losses"], ours["losses"], strict=True))
    assert numbers["apart"]["all"] < 2e-3
    assert set(stock) == set(ours)


def test_token_classification_learns(run):
    status, numbers = run(finetune_token_classification, "--compare", "--steps", "80", "--batch", "16")
    assert status == 0
    assert numbers["runs"]["ours"]["F1"] > numbers["baseline"]["F1"] + 0.1
    assert numbers["runs"]["ours"]["losses"][-1] < numbers["runs"]["ours"]["losses"][0] / 3


def test_a_run_that_parts_from_stock_fails(run, monkeypatch):
    monkeypatch.setattr(training, "patch", lambda model: model.model.norm.weight.data.mul_(1.1))
    status, numbers = run(finetune_sequence_classification, "--compare", "--steps", "3")
    assert status == 1
    assert numbers["apart"]["early"] > 2e-3


DATA = {
    finetune_sequence_classification: [{"text": w, "label": w} for w in ("so", "such", "thus")] * 8,
    finetune_token_classification: [{"text": "ab cd", "spans": [[0, 2, "a"], [3, 5, "c"]]}, {"text": "x", "spans": []},
                                    {"text": "cd", "spans": [[0, 2, "c"]]}] * 8,
    question_answering: [{"question": "who?", "context": f"it was {w}.", "answer": w} for w in ("me", "you")] * 8,
    pretrain: [{"text": f"a text of some length, the number {i}"} for i in range(60)],
}  # fmt: skip


@pytest.mark.parametrize("script", DATA, ids=lambda script: script.__name__)
def test_users_data_and_model(run, script, tmp_path, model_folder):
    data = jsonl(tmp_path / "data.jsonl", DATA[script])
    saved = tmp_path / "saved"
    status, numbers = run(script, "--model", model_folder, "--data", data, "--compare", "--steps", "3",
                          "--checkpointing", "--save", saved)  # fmt: skip
    assert status == 0
    assert numbers["apart"]["all"] < 2e-3
    assert json.loads((saved / "config.json").read_text())["num_attention_heads"] == 3
    assert transformers.AutoTokenizer.from_pretrained(saved).is_fast


def test_generate_gives_stocks_tokens(run, tmp_path, model_folder):
    data = jsonl(tmp_path / "data.jsonl", [{"prompt": "def "}, {"prompt": "for i in range(3)"}])
    status, numbers = run(generate, "--model", model_folder, "--data", data, "--compare", "--tokens", "12")
    assert status == 0
    for method in ("greedy", "beam search"):
        tokens = numbers["runs"]["ours"][method]["tokens"]
        assert tokens == numbers["runs"]["stock"][method]["tokens"]
        assert [len(row) for row in tokens] == [12, 12]


def test_generate_learns_first_without_a_model(run):
    status, numbers = run(generate, "--stock", "--steps", "2", "--tokens", "4")
    assert status == 0
    assert list(numbers["runs"]) == ["stock"]


def test_lora_trains_adapters_only(run, tmp_path):
    pytest.importorskip("peft")
    data = jsonl(tmp_path / "data.jsonl", DATA[finetune_sequence_classification])
    saved = tmp_path / "adapter"
    status, _ = run(finetune_sequence_classification, "--data", data, "--compare", "--steps", "3", "--lora", "4",
                    "--save", saved)  # fmt: skip
    assert status == 0
    assert json.loads((saved / "adapter_config.json").read_text())["r"] == 4


# --- many processes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_processes_compute_what_one_does(run, tmp_path, parallel):
    data = jsonl(tmp_path / "data.jsonl", DATA[pretrain])
    options = ["--data", data, "--device", "cpu", "--steps", "6", "--validate-every", "3"]
    _, alone = run(pretrain, *options)
    folder = tmp_path / "together"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
               "examples.pretrain", *SMALL, *options, "--parallel", parallel, "--checkpoint-every", "4",
               "--out", folder, "--save", folder / "model"]  # fmt: skip
    env = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation loss") == 1  # one process speaks
    together = json.loads((folder / "pretrain.json").read_text())
    alone, together = (numbers["runs"]["ours"] for numbers in (alone, together))
    torch.testing.assert_close(together["losses"], alone["losses"], atol=2e-5, rtol=0)
    torch.testing.assert_close(together["validation"], alone["validation"], atol=2e-5, rtol=0)
    assert len(transformers.AutoModelForCausalLM.from_pretrained(folder / "model").model.layers) == 4

    # One process goes on from what two wrote after four steps, and comes to the same end.
    _, resumed = run(pretrain, *options, "--resume", "--out", folder)
    resumed = json.loads((folder / "pretrain.json").read_text())["runs"]["ours"]
    torch.testing.assert_close(resumed["losses"], alone["losses"], atol=2e-5, rtol=0)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "lines", "said"),
    [
        (finetune_sequence_classification, ['{"text": "a", "label": "b"}', "{"], "line 2: not JSON"),
        (
            finetune_sequence_classification,
            ['{"text": "a"}'],
            "line 1: field 'label' must be str or int, got 'nothing'",
        ),
        (finetune_sequence_classification, ['{"text": "a", "label": "b"}'], "at least two lines"),
        (finetune_sequence_classification, ["[1]"], "line 1: field 'text' must be str, got [1]"),
        (finetune_token_classification, ['{"text": "a", "spans": [[0, 2, "x"]]}'] * 2, "a span must be"),
        (question_answering, ['{"question": "a", "context": "b", "answer": "c"}'] * 2, "does not stand in the context"),
        (pretrain, ['{"text": "a"}'] * 2, "do not fill two rows"),
        (pretrain, ['{"text": "a text of some length"}'] * 9, "4 rows are less than two batches"),
        (generate, ['{"prompt": 3}'] * 2, "field 'prompt' must be str, got 3"),
    ],
)
def test_bad_data_is_named(run, tmp_path, script, lines, said):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(SystemExit) as refused:
        run(script, "--data", path)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data", "/no/such/file"], "no file /no/such/file"),
        (["--model", "/no/such/model"], "no folder with a config.json"),
        (["--steps", "0"], "0 is less than 1"),
        (["--stock", "--compare"], "not allowed with"),
    ],
)
def test_bad_options_are_named(run, capsys, options, said):
    with pytest.raises(SystemExit):
        run(finetune_sequence_classification, *options)
    assert said in capsys.readouterr().err


def test_resume_needs_a_checkpoint(run, tmp_path):
    data = jsonl(tmp_path / "data.jsonl", DATA[pretrain])
    with pytest.raises(SystemExit, match="no checkpoint in"):
        run(pretrain, "--data", data, "--resume")


@pytest.mark.parametrize("script", [*DATA, generate], ids=lambda script: script.__name__)
def test_help(run, capsys, script):
    with pytest.raises(SystemExit):
        run(script, "--help")
    assert "--compare" in capsys.readouterr().out


# --- the device ------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_gpu_may_be_used(monkeypatch):
    """torch says that there is a GPU, and any use of it fails: a build for CPUs has none, a GPU's memory is watched."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        yield
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    else:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        yield


@pytest.mark.parametrize("script", [*DATA, generate], ids=lambda script: script.__name__)
def test_on_a_cpu_where_there_is_a_gpu(run, no_gpu_may_be_used, tmp_path, script):
    options = ["--device", "cpu", "--compare", "--steps", "2"]
    options += ["--tokens", "3"] if script is generate else ["--data", jsonl(tmp_path / "data.jsonl", DATA[script])]
    status, numbers = run(script, *options)
    assert status == 0 and set(numbers["runs"]) == {"stock", "ours"}


def test_the_dtype_is_that_of_the_device(monkeypatch):
    parser = training.arguments("A test.", "test", "{}", steps=1, batch=1, max_length=1, lr=1.0)
    monkeypatch.setattr(sys, "argv", ["test"])
    for device, dtype in (("cpu", "float32"), ("cuda", "bfloat16")):
        assert parser.parse_args(["--device", device]).dtype == dtype
        assert parser.parse_args(["--device", device, "--dtype", "bfloat16"]).dtype == "bfloat16"


def test_the_demo_on_a_cpu_where_there_is_a_gpu(no_gpu_may_be_used, monkeypatch, tmp_path):
    """Its training, and the verification, which is a process of its own and here runs in this one."""

    def verified(command, env, **_):
        assert command[1:5] == ["-m", "examples.verify", "--device", "cpu"] and env["TRITON_INTERPRET"] == "1"
        return types.SimpleNamespace(stdout=json.dumps(verify.main(command[3:])))

    monkeypatch.setattr(demo.subprocess, "run", verified)
    monkeypatch.setattr(demo, "standard_library", lambda: torch.arange(9000).remainder(97).to(torch.uint8))
    options = ["--device", "cpu", "--steps", "2", "--batch", "2", "--seq", "16", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["demo", *options])
    assert demo.main() == 0
    numbers = json.loads((tmp_path / "demo.json").read_text())
    assert numbers["device"] == "cpu" and [s["step"] for s in numbers["steps"]] == [0, 1] and len(numbers["ops"]) == 8
