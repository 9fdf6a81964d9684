"""Extractive question answering: a Llama learns to answer questions about a few lines of source by a part of them.

Without --data the questions are about the standard library ("Which exception is raised?", "What is indent set to?"),
asked and answered by `ast`; the test files were not trained on. Prints exact match and F1, beside the best guess that
can be had without reading the question, and draws exact match by kind of question.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForQuestionAnswering

from examples import training
from examples.training import Batch, Examples

# --- data ------------------------------------------------------------------------------------------------------------


def asked(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What can be asked about a node, and the part of it that answers."""
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


def questions(characters: int = 250) -> Examples:
    """Whole lines of a file, together at most so long, and what can be asked about them in one way only."""
    examples = []
    for file, source in training.standard_library() + training.standard_library("asyncio", "email", "http", "unittest"):
        lines = source.splitlines(keepends=True)
        answers: dict[int, list[tuple[str, int, str]]] = defaultdict(list)  # of each line: question, column, answer
        for node in ast.walk(ast.parse(source)):
            for question, part in asked(node):
                if part.lineno == part.end_lineno and part.end_col_offset - part.col_offset <= 30:
                    text = lines[part.lineno - 1][part.col_offset : part.end_col_offset]
                    answers[part.lineno - 1].append((question, part.col_offset, text))
        context, inside = "", []
        for n, line in enumerate([*lines, ""]):
            if context and (not line or len(context) + len(line) > characters):
                times = Counter(question for question, _, _ in inside)
                examples += [{"question": question, "context": context, "answer": answer, "start": start, "group": file}
                             for question, start, answer in inside if times[question] == 1]  # fmt: skip
                context, inside = "", []
            inside += [(question, len(context) + column, answer) for question, column, answer in answers[n]]
            context += line
    return examples


def kind(question: str) -> str:
    return re.sub(r"What is \w+ set to", "What is ... set to", question)


def read(path: Path) -> Examples:
    examples = training.read_jsonl(path, question=str, context=str, answer=str)
    for n, example in enumerate(examples, 1):
        example.setdefault("start", example["context"].find(example["answer"]))
        if not example["answer"] or not example["context"].startswith(example["answer"], max(example["start"], 0)):
            raise SystemExit(f"{path}, example {n}: the answer {example['answer']!r} does not stand in the context")
    return examples


# --- metrics ---------------------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    return text.lower().split()


def metrics(answers: list[str], predictions: list[str]) -> dict[str, Any]:
    """Exact match, and F1 over the words that answer and prediction share, each the mean over the questions."""
    exact, overlap = [], []
    for answer, prediction in zip(map(words, answers), map(words, predictions), strict=True):
        shared = (Counter(answer) & Counter(prediction)).total()
        exact.append(answer == prediction)
        overlap.append(training.f1(shared, len(prediction), len(answer))[2])
    return {"exact match": sum(exact) / len(exact), "F1": sum(overlap) / len(overlap), "exact": exact}


def best_span(start: torch.Tensor, end: torch.Tensor, first: int, longest: int = 30) -> tuple[int, int]:
    """The first and the last token of the likeliest answer, from token `first` on; logits (S,) each."""
    S = len(start)
    allowed = torch.ones(S, S, dtype=torch.bool).triu().tril(longest - 1)
    allowed[:first] = False
    scores = (start[:, None] + end[None, :]).masked_fill(~allowed, -torch.inf)
    return divmod(int(scores.argmax()), S)


# --- the whole -------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = training.arguments(
        __doc__, "question_answering", '{"question": ..., "context": ..., "answer": ..., "start": first character}',
        steps=250, batch=32, max_length=128, lr=1e-3, task="QUESTION_ANS",
    )  # fmt: skip
    args = parser.parse_args()
    train_set, test_set = training.split(read(args.data) if args.data else questions(), args.seed)
    tokenizer = training.load_tokenizer(args, (e["context"] for e in train_set), size=2048)

    def encode(examples: Examples) -> Examples:
        """With the tokens of question and context, the context's first and the answer's; without those cut off."""
        encodings = tokenizer([e["question"] for e in examples], [e["context"] for e in examples],
                              truncation=True, max_length=args.max_length,
                              return_offsets_mapping=True)  # fmt: skip
        kept = []
        for i, example in enumerate(examples):
            begin, end = example["start"], example["start"] + len(example["answer"])
            offsets = encodings["offset_mapping"][i]
            context = [t for t, sequence in enumerate(encodings.sequence_ids(i)) if sequence == 1]
            answer = [t for t in context if offsets[t][0] < end and begin < offsets[t][1]]
            if answer and end <= offsets[context[-1]][1]:
                kept.append({**example, "ids": encodings["input_ids"][i], "offsets": offsets,
                             "context from": context[0], "first": answer[0], "last": answer[-1]})  # fmt: skip
        return kept

    def collate(batch: Examples) -> Batch:
        """input_ids and attention_mask (B, S), padded on the right; the answer's first and last token (B,) each."""
        return {
            "input_ids": training.pad((e["ids"] for e in batch), tokenizer.pad_token_id),
            "attention_mask": training.pad(([1] * len(e["ids"]) for e in batch), 0),
            "start_positions": torch.tensor([e["first"] for e in batch]),
            "end_positions": torch.tensor([e["last"] for e in batch]),
        }

    def inputs() -> Iterator[Batch]:
        return map(collate, training.batches(train_set, args.batch, args.seed))

    def build() -> Any:
        return training.load_model(args, AutoModelForQuestionAnswering, tokenizer)

    def answers(model: torch.nn.Module) -> Iterator[str]:
        for i in range(0, len(test_set), args.batch):
            batch = test_set[i : i + args.batch]
            output = model(**{name: x.to(args.device) for name, x in collate(batch).items()})
            starts, ends = output.start_logits.float().cpu(), output.end_logits.float().cpu()  # (B, S) each
            for e, start, end in zip(batch, starts, ends, strict=True):
                S = len(e["ids"])
                first, last = best_span(start[:S], end[:S], e["context from"])
                yield e["context"][e["offsets"][first][0] : e["offsets"][last][1]]

    def test(model: torch.nn.Module) -> dict[str, Any]:
        predicted = list(answers(model))
        shown = [f"{e['question']} {p.strip()!r}, is {e['answer']!r}" for e, p in zip(test_set, predicted, strict=True)]
        return {**metrics(truth, predicted), "answers": shown}

    def draw(axes: Any, runs: list[training.Run]) -> None:
        bars = {**{run.name: run.metrics["exact"] for run in runs}, "best guess": guess["exact"]}
        of = [kind(e["question"]) for e in test_set]
        of = of if len(set(of)) <= 12 else ["all"] * len(of)
        kinds = Counter(of)
        for i, (name, exact) in enumerate(bars.items()):
            shares = [sum(hit for hit, its in zip(exact, of, strict=True) if its == k) / n
                      for k, n in kinds.items()]  # fmt: skip
            rows = [row + i / (len(bars) + 1) for row in range(len(kinds))]
            axes.barh(rows, shares, 1 / (len(bars) + 1), color=training.COLORS.get(name, "#d0d0d0"), label=name)
        axes.set_yticks([row + (len(bars) - 1) / 2 / (len(bars) + 1) for row in range(len(kinds))],
                        [f"{k} ({n})" for k, n in kinds.items()])  # fmt: skip
        axes.set(xlabel="exact match (questions)", xlim=(0, 1))
        axes.invert_yaxis()
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=3)

    train_set, test_set = encode(train_set), encode(test_set)
    if not train_set or not test_set:
        parser.error(f"--max-length {args.max_length} cuts every answer off")
    training.console.print(f"{len(train_set)} questions to train on, {len(test_set)} to test on")
    truth = [e["answer"] for e in test_set]
    # Without reading the question: of all answers in training, the most frequent one that the context holds.
    usual = [answer for answer, _ in Counter(e["answer"] for e in train_set).most_common()]
    guess = metrics(truth, [next((a for a in usual if a in e["context"]), "") for e in test_set])

    runs = training.fit(args, build, inputs, test, tokenizer)
    training.console.print(*runs[-1].metrics["answers"][:5], sep="\n", markup=False)
    return training.finish(args, "question_answering", runs, guess, draw)


if __name__ == "__main__":
    sys.exit(main())
