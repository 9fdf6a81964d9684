"""The NER loop: a Llama learns to label each name, keyword, string, number, comment and operator of Python source.

Without --data the texts are statements of the standard library, labelled by Python's own tokenizer; the test statements
are from files that were not trained on. Prints accuracy over tokens, and precision, recall and F1 over whole entities.
"""

from __future__ import annotations

import bisect
import io
import keyword
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForTokenClassification

from examples import training
from examples.training import Batch, Examples

IGNORED = -100  # cross_entropy's: padding and special tokens
Span = tuple[int, int, str]  # first character, the one past the last, class


# --- data ------------------------------------------------------------------------------------------------------------


def python_tokens(source: str) -> tuple[list[Span], list[int]]:
    """The labelled spans of a source in ASCII, and the characters at which a logical line ends."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    kinds = {tokenize.STRING: "string", tokenize.NUMBER: "number", tokenize.COMMENT: "comment",
             tokenize.OP: "operator"}  # fmt: skip
    spans, ends, opened = [], [], []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        first, last = (starts[row - 1] + column for row, column in (token.start, token.end))
        name = tokenize.tok_name[token.type]
        if name.endswith("STRING_START"):  # an f-string, which Python 3.12 and newer take apart
            opened.append(first)
        elif name.endswith("STRING_END"):
            begin = opened.pop()
            if not opened:
                spans.append((begin, last, "string"))
        elif opened:
            continue
        elif token.type == tokenize.NAME:
            spans.append((first, last, "keyword" if keyword.iskeyword(token.string) else "name"))
        elif token.type in kinds:
            spans.append((first, last, kinds[token.type]))
        elif token.type == tokenize.NEWLINE:
            ends.append(last)
    return spans, ends


def statements(characters: int = 300) -> Examples:
    """Logical lines of a file, together at most so long, with their spans; a longer line stands alone."""
    examples = []
    for file, source in training.standard_library("asyncio", "email", "http", "json", "logging", "unittest"):
        spans, ends = python_tokens(source)
        firsts = [first for first, _, _ in spans]
        begin, last = 0, 0
        for end in [*ends, len(source) + characters]:
            if end - begin > characters and last > begin:
                inside = spans[bisect.bisect_left(firsts, begin) : bisect.bisect_left(firsts, last)]
                inside = [(a - begin, b - begin, kind) for a, b, kind in inside]
                examples.append({"text": source[begin:last], "spans": inside, "group": file})
                begin = last
            last = end
    return examples


def read(path: Path) -> Examples:
    examples = training.read_jsonl(path, text=str, spans=list)
    for n, example in enumerate(examples, 1):
        for span in example["spans"]:
            match span:
                case [int(first), int(last), str()] if 0 <= first < last <= len(example["text"]):
                    continue
            raise SystemExit(f"{path}, example {n}: a span must be [first, end, class] inside the text, got {span}")
        example["spans"] = sorted(map(tuple, example["spans"]))
    return examples


# --- tags and entities -----------------------------------------------------------------------------------------------


def tag(text: str, spans: list[Span], offsets: list[tuple[int, int]]) -> list[str]:
    """B-class for the token in which a span begins, I-class for those after it, O outside; spans are sorted."""
    tags, current, begun = [], 0, -1
    for first, last in offsets:
        piece = text[first:last]
        first += len(piece) - len(piece.lstrip()) if piece.strip() else 0  # many tokenizers put the space in the token
        while current < len(spans) and spans[current][1] <= first:
            current += 1
        if current == len(spans) or first < spans[current][0]:
            tags.append("O")
        else:
            tags.append(("I-" if begun == current else "B-") + spans[current][2])
            begun = current
    return tags


def entities(tags: list[str]) -> set[Span]:
    """(first token, the one past the last, class). An I- that follows no entity of its class begins one."""
    found, begin = set(), None
    for i, (before, here) in enumerate(zip(["O", *tags], [*tags, "O"], strict=True)):
        if before != "O" and (here[:2] != "I-" or here[2:] != before[2:]):
            found.add((begin, i, before[2:]))
        if here != "O" and (here[:2] == "B-" or here[2:] != before[2:]):
            begin = i
    return found


def metrics(actual: list[list[str]], predicted: list[list[str]]) -> dict[str, Any]:
    """Of tags (examples, tokens): accuracy by token; by entity the micro mean, and F1's mean over classes."""
    pairs = [(a, p) for these, those in zip(actual, predicted, strict=True) for a, p in zip(these, those, strict=True)]
    hits, found, there = Counter(), Counter(), Counter()
    for these, those in zip(actual, predicted, strict=True):
        a, p = entities(these), entities(those)
        for counter, of in ((hits, a & p), (found, p), (there, a)):
            counter.update(kind for _, _, kind in of)
    precision, recall, micro = training.f1(hits.total(), found.total(), there.total())
    each = {kind: training.f1(hits[kind], found[kind], there[kind])[2] for kind in sorted(there)}
    return {
        "accuracy": sum(a == p for a, p in pairs) / len(pairs), "precision": precision, "recall": recall,
        "F1": micro, "F1, macro": sum(each.values()) / len(each), **{f"F1, {kind}": f for kind, f in each.items()},
    }  # fmt: skip


# --- the whole -------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = training.arguments(
        __doc__, "finetune_token_classification", '{"text": ..., "spans": [[first character, end, class], ...]}',
        steps=200, batch=32, max_length=128, lr=2e-3, task="TOKEN_CLS",
    )  # fmt: skip
    args = parser.parse_args()
    train_set, test_set = training.split(read(args.data) if args.data else statements(), args.seed)
    tokenizer = training.load_tokenizer(args, (e["text"] for e in train_set))
    classes = sorted({kind for e in train_set + test_set for _, _, kind in e["spans"]})
    tags = ["O", *(f"{where}-{kind}" for kind in classes for where in "BI")]
    training.console.print(f"{len(train_set)} texts to train on, {len(test_set)} to test on, classes: {classes}")

    def encode(examples: Examples) -> None:
        """Gives each example its tokens, and the number of the tag of each; special tokens have none."""
        encodings = tokenizer([e["text"] for e in examples], truncation=True, max_length=args.max_length,
                              return_offsets_mapping=True)  # fmt: skip
        for i, example in enumerate(examples):
            numbers = [tags.index(t) for t in tag(example["text"], example["spans"], encodings["offset_mapping"][i])]
            example["ids"] = encodings["input_ids"][i]
            example["tags"] = [IGNORED if special is None else number
                               for number, special in zip(numbers, encodings.sequence_ids(i), strict=True)]  # fmt: skip

    def collate(batch: Examples) -> Batch:
        """All (B, S), padded on the right."""
        return {
            "input_ids": training.pad((e["ids"] for e in batch), tokenizer.pad_token_id),
            "attention_mask": training.pad(([1] * len(e["ids"]) for e in batch), 0),
            "labels": training.pad((e["tags"] for e in batch), IGNORED),
        }

    def inputs() -> Iterator[Batch]:
        return map(collate, training.batches(train_set, args.batch, args.seed))

    def build() -> Any:
        # The head drops a tenth of its input in training (config.classifier_dropout): both runs draw the same.
        names = dict(enumerate(tags))
        return training.load_model(args, AutoModelForTokenClassification, tokenizer, num_labels=len(tags),
                                   id2label=names, label2id={label: i for i, label in names.items()})  # fmt: skip

    def kept(numbers: list[int], example: dict[str, Any]) -> list[str]:
        """The tags of the tokens that have one."""
        return [tags[n] for n, actual in zip(numbers, example["tags"], strict=False) if actual != IGNORED]

    def test(model: torch.nn.Module) -> dict[str, Any]:
        predicted = []
        for i in range(0, len(test_set), args.batch):
            batch = test_set[i : i + args.batch]
            logits = model(**{name: x.to(args.device) for name, x in collate(batch).items()}).logits  # (B, S, tags)
            predicted += [kept(row, e) for row, e in zip(logits.argmax(-1).tolist(), batch, strict=True)]
        return metrics(actual, predicted)

    def draw(axes: Any, runs: list[training.Run]) -> None:
        bars = {**{run.name: run.metrics for run in runs}, "baseline": baseline}
        for i, (name, values) in enumerate(bars.items()):
            heights = [values[f"F1, {kind}"] for kind in shown]
            axes.barh([row + i / (len(bars) + 1) for row in range(len(shown))], heights, 1 / (len(bars) + 1),
                      color=training.COLORS.get(name, "#d0d0d0"), label=name)  # fmt: skip
        axes.set_yticks([row + (len(bars) - 1) / 2 / (len(bars) + 1) for row in range(len(shown))], shown)
        axes.set(xlabel="F1 over whole entities", xlim=(0, 1))
        axes.invert_yaxis()
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=3)

    encode(train_set)
    encode(test_set)
    actual = [kept(e["tags"], e) for e in test_set]
    shown = sorted({kind for row in actual for _, _, kind in entities(row)})
    # Without a model: each token gets the tag that it has most often.
    counts: dict[int, Counter[int]] = defaultdict(Counter)
    for e in train_set:
        for token, number in zip(e["ids"], e["tags"], strict=True):
            counts[token][number] += 1
    usual = {token: counter.most_common(1)[0][0] for token, counter in counts.items()}
    baseline = metrics(actual, [kept([usual.get(token, 0) for token in e["ids"]], e) for e in test_set])

    runs = training.fit(args, build, inputs, test, tokenizer)
    return training.finish(args, "finetune_token_classification", runs, baseline, draw)


if __name__ == "__main__":
    sys.exit(main())
