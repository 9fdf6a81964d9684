"""Extractive question answering: questions about a few lines of source, whose answers are parts of the lines.

The built-in questions, such as "Which exception is raised?", and their answers come from `ast`. The baseline is the
best guess without the question.
"""

from __future__ import annotations

import ast
import bisect
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from transformers import AutoModelForQuestionAnswering, DataCollatorWithPadding, PreTrainedTokenizerFast

from examples import report
from examples.common import Examples, f1, pieces, standard_library

PACKAGES = ("asyncio", "email", "http", "json", "logging", "multiprocessing", "unittest", "urllib")


class QuestionAnswering:
    line = '{"question": ..., "context": ..., "answer": ..., "start": first character}'
    fields: ClassVar = {"question": str, "context": str, "answer": str}
    model_class = AutoModelForQuestionAnswering
    collator = DataCollatorWithPadding
    peft_type = "QUESTION_ANS"
    labels: tuple[str, ...] = ()

    def __init__(
        self, train_examples: Examples, test_examples: Examples, tokenizer: PreTrainedTokenizerFast, max_length: int
    ) -> None:
        self.train_set = [features for _, _, features in encode(train_examples, tokenizer, max_length)]
        kept = list(encode(test_examples, tokenizer, max_length))
        if not self.train_set or not kept:
            raise SystemExit(f"--max-length {max_length} cuts every answer off")
        self._examples, self._offsets, self.test_set = (list(column) for column in zip(*kept, strict=True))
        # The baseline is the most frequent answer in training that occurs in the context.
        usual = [answer for answer, _ in Counter(e["answer"] for e in train_examples).most_common()]
        self.baseline = self._scores([next((a for a in usual if a in e["context"]), "") for e in self._examples])

    @staticmethod
    def fault(example: dict[str, Any]) -> str | None:
        start = example.setdefault("start", example["context"].find(example["answer"]))
        if not example["answer"] or not example["context"].startswith(example["answer"], max(start, 0)):
            return f"the answer {example['answer']!r} is not in the context"
        return None

    @staticmethod
    def built_in(characters: int = 250) -> Examples:
        """Whole lines of a file, at most `characters` long, with each question that has one answer in them."""
        examples = []
        for file, source in standard_library(*(f"{name}/*.py" for name in PACKAGES)):
            lines = source.splitlines(keepends=True)
            starts = [0, *itertools.accumulate(map(len, lines))]
            answers = sorted(
                (starts[part.lineno - 1] + part.col_offset, question, part.end_col_offset - part.col_offset)
                for node in ast.walk(ast.parse(source)) for question, part in asked(node)
                if part.lineno == part.end_lineno and part.end_col_offset - part.col_offset <= 30
            )  # fmt: skip
            for start, context in pieces(lines, characters):
                end = start + len(context)
                inside = answers[bisect.bisect_left(answers, (start,)) : bisect.bisect_left(answers, (end,))]
                times = Counter(question for _, question, _ in inside)
                examples += [
                    {"question": question, "context": context, "answer": source[first : first + length],
                     "start": first - start, "group": file}
                    for first, question, length in inside if times[question] == 1
                ]  # fmt: skip
        return examples

    def metrics(self, logits: Any) -> dict[str, Any]:
        """logits: of the answer's first and last token, (examples, tokens) each, padded."""
        predictions = []
        for e, offsets, features, start, end in zip(self._examples, self._offsets, self.test_set, *logits, strict=True):
            S = len(features["input_ids"])
            first_of_context = next(t for t, span in enumerate(offsets) if span)
            first, last = best_span(torch.from_numpy(start[:S]), torch.from_numpy(end[:S]), first_of_context)
            predictions.append(e["context"][offsets[first][0] : offsets[last][1]])
        return {**self._scores(predictions), "predictions": predictions}

    def _scores(self, predictions: list[str]) -> dict[str, Any]:
        return scores([e["answer"] for e in self._examples], predictions, [kind(e["question"]) for e in self._examples])

    def draw(self, axes: Any, runs: list[report.Run]) -> None:
        each = {**{run.name: run.metrics for run in runs}, "baseline": self.baseline}
        report.bars(axes, {name: m["exact match by question"] for name, m in each.items()}, "exact match")
        predictions = zip(self._examples, runs[-1].metrics["predictions"], strict=True)
        for e, prediction in list(predictions)[:5]:
            report.console.print(f"{e['question']} {prediction.strip()!r}, is {e['answer']!r}", markup=False)


def asked(node: ast.AST) -> Iterator[tuple[str, Any]]:
    """The questions about a node, each with its answer, a part of the node."""
    match node:
        case ast.ClassDef(bases=[ast.Name() as base, *_]):
            yield "What is the base class?", base
        case ast.FunctionDef(args=ast.arguments(args=[ast.arg(arg="self"), first, *_])):
            yield "What is the argument after self?", first
        case ast.Raise(exc=ast.Name() as exception) | ast.Raise(exc=ast.Call(func=ast.Name() as exception)):
            yield "Which exception is raised?", exception
        case ast.ExceptHandler(type=ast.Name() as exception):
            yield "Which exception is caught?", exception
        case ast.Import(names=[module]) | ast.ImportFrom(names=[module]):
            yield "What is imported?", module
        case ast.For(target=ast.Name() as variable):
            yield "What is the loop variable?", variable
        case ast.Return(value=ast.Name() | ast.Constant() as value):
            yield "What is returned?", value
        case ast.Assign(targets=[ast.Name(id=name)], value=ast.Name() | ast.Constant() as value):
            yield f"What is {name} set to?", value
        case ast.keyword(arg=str(name), value=ast.Name() | ast.Constant() as value):
            yield f"What is {name} set to?", value


def kind(question: str) -> str:
    return re.sub(r"What is \w+ set to", "What is ... set to", question)


def encode(
    examples: Examples, tokenizer: PreTrainedTokenizerFast, max_length: int
) -> Iterator[tuple[dict[str, Any], list[tuple[int, int] | None], dict[str, Any]]]:
    """(example, position of each token in the context, features) for the examples whose answer is not cut off."""
    encoded = tokenizer([e["question"] for e in examples], [e["context"] for e in examples], truncation=True,
                        max_length=max_length, return_offsets_mapping=True)  # fmt: skip
    for i, e in enumerate(examples):
        begin, end = e["start"], e["start"] + len(e["answer"])
        places = zip(encoded["offset_mapping"][i], encoded.sequence_ids(i), strict=True)
        offsets = [place if sequence == 1 else None for place, sequence in places]
        answer = [t for t, place in enumerate(offsets) if place and place[0] < end and begin < place[1]]
        if answer and end <= max(place[1] for place in offsets if place):
            features = {"input_ids": encoded["input_ids"][i], "attention_mask": encoded["attention_mask"][i]}
            yield e, offsets, {**features, "start_positions": answer[0], "end_positions": answer[-1]}


def best_span(start: torch.Tensor, end: torch.Tensor, first: int, longest: int = 30) -> tuple[int, int]:
    """The first and last token of the most probable answer from token `first` on. Logits are (tokens,) each."""
    S = len(start)
    allowed = torch.ones(S, S, dtype=torch.bool).triu().tril(longest - 1)
    allowed[:first] = False
    both = (start[:, None] + end[None, :]).masked_fill(~allowed, -torch.inf)
    best, last = divmod(int(both.argmax()), S)
    return best, last


def scores(answers: list[str], predictions: list[str], kinds: list[str]) -> dict[str, Any]:
    """Exact match, in all and by kind of question, and F1 over the words shared by answer and prediction."""
    hits: dict[str, list[bool]] = defaultdict(list)
    overlaps = []
    for answer, prediction, kind_of_question in zip(answers, predictions, kinds, strict=True):
        a, p = answer.lower().split(), prediction.lower().split()
        hits[kind_of_question].append(a == p)
        overlaps.append(f1((Counter(a) & Counter(p)).total(), len(p), len(a))[2])
    by_kind = {name: sum(each) / len(each) for name, each in hits.items()}
    if len(by_kind) > 12:  # as with users' own questions
        by_kind = {}
    exact = sum(sum(each) for each in hits.values()) / len(answers)
    return {"exact match": exact, "F1": sum(overlaps) / len(overlaps),
            "exact match by question": by_kind or {"all": exact}}  # fmt: skip
