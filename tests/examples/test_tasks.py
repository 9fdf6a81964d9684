"""Scores and data of the examples."""

from __future__ import annotations

import pytest
import torch

for package in ("accelerate", "matplotlib", "rich", "transformers"):
    pytest.importorskip(package)

from examples import common, packing  # noqa: E402
from examples.tasks import question_answering, sequence_classification, token_classification  # noqa: E402

pytestmark = pytest.mark.once


def test_sequence_scores_are_means_over_the_classes():
    found = sequence_classification.scores(torch.tensor([[3, 1], [2, 4]]))
    assert found["accuracy"] == pytest.approx(0.7)
    assert found["precision"] == pytest.approx((3 / 5 + 4 / 5) / 2)
    assert found["recall"] == pytest.approx((3 / 4 + 4 / 6) / 2)
    assert found["F1"] == pytest.approx((2 / 3 + 8 / 11) / 2)


def test_a_class_that_is_never_predicted_scores_zero():
    assert sequence_classification.scores(torch.tensor([[4, 0], [2, 0]]))["F1"] == pytest.approx(0.8 / 2)


def test_python_tokens_become_spans():
    source = "if x:  # why\n    y = f'{x}!' + 'z'\n"
    spans, ends = token_classification.python_tokens(source)
    assert [(source[a:b], kind) for a, b, kind in spans] == [
        ("if", "keyword"), ("x", "name"), (":", "operator"), ("# why", "comment"), ("y", "name"), ("=", "operator"),
        ("f'{x}!'", "string"), ("+", "operator"), ("'z'", "string"),
    ]  # fmt: skip
    assert ends == [source.index("\n") + 1, len(source)]


def test_tags_follow_spans_that_tokens_divide():
    text, spans = "ab = 'c d'", [(0, 2, "name"), (3, 4, "operator"), (5, 10, "string")]
    offsets = [(0, 1), (1, 2), (2, 4), (4, 6), (6, 8), (8, 9), (9, 10)]  # a token begins with the space before it
    assert token_classification.tag(text, spans, offsets) == [
        "B-name", "I-name", "B-operator", "B-string", "I-string", "I-string", "I-string"
    ]  # fmt: skip


def test_token_scores_count_whole_entities():
    assert token_classification.entities(["B-a", "B-a", "I-a", "O", "I-b", "I-a"]) == {
        (0, 1, "a"), (1, 3, "a"), (4, 5, "b"), (5, 6, "a")
    }  # fmt: skip
    found = token_classification.scores([["B-a", "I-a", "O", "B-b"]], [["B-a", "O", "O", "B-b"]])
    assert found["accuracy"] == 0.75
    assert found["precision"] == found["recall"] == found["F1"] == 0.5
    assert (found["F1 by class"], found["F1, macro"]) == ({"a": 0.0, "b": 1.0}, 0.5)


def test_answer_scores_are_exact_match_and_f1_over_words():
    found = question_answering.scores(["a b", "None", "x"], ["a", "none", "y"], ["how?", "how?", "why?"])
    assert found["exact match"] == pytest.approx(1 / 3)
    assert found["F1"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert found["exact match by question"] == {"how?": 0.5, "why?": 0.0}


def test_the_best_span_is_forward_and_inside_the_context():
    start, end = torch.tensor([9.0, 1.0, 0.0, 3.0]), torch.tensor([0.0, 4.0, 2.0, 0.0])
    assert question_answering.best_span(start, end, first=1) == (1, 1)  # not (0, 1), the question; not (3, 1), backward


def test_built_in_answers_are_in_their_contexts(monkeypatch):
    monkeypatch.setattr(question_answering, "PACKAGES", ("http", "email"))
    examples = question_answering.QuestionAnswering.built_in()
    assert len(examples) > 1000
    assert all(e["context"].startswith(e["answer"], e["start"]) for e in examples)
    assert {question_answering.kind(e["question"]) for e in examples} > {"What is ... set to?", "What is returned?"}


class Digits:
    """A tokenizer that gives each digit a token."""

    eos_token_id = 9

    def __call__(self, texts, add_special_tokens):
        return {"input_ids": [[int(c) for c in text] for text in texts]}


def test_packing_keeps_documents_apart():
    rows = packing.pack(Digits(), ["123", "45678", "1"], 4)  # 1239 4567 8919
    assert rows["input_ids"].tolist() == [[1, 2, 3, 9], [4, 5, 6, 7], [8, 9, 1, 9]]
    assert rows["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 0, 1]]
    assert rows["labels"].tolist() == [[-100, 2, 3, 9], [-100, 5, 6, 7], [-100, 9, -100, 9]]
    assert packing.count(rows) == 8


def test_a_batch_depends_on_seed_and_step_only():
    rows = {"labels": torch.arange(100)[:, None]}
    first, again, later, other = (packing.draw_batch(rows, 30, seed, step)["labels"].tolist()
                                  for seed, step in ((1, 5), (1, 5), (1, 6), (2, 5)))  # fmt: skip
    assert first == again
    assert first != later and first != other and later != other


def test_split_keeps_a_group_on_one_side():
    train_set, test_set = common.split([{"n": i, "group": i % 10} for i in range(100)], seed=0, share=0.2)
    assert len(test_set) == 20
    assert not {e["group"] for e in train_set} & {e["group"] for e in test_set}
    assert sorted(e["n"] for e in train_set + test_set) == list(range(100))
