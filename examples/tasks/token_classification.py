"""Token classification: the names, keywords, strings, numbers, comments and operators of source.

Accuracy is over tokens; precision, recall and F1 are over whole entities.
"""

from __future__ import annotations

import bisect
import io
import keyword
import tokenize
from collections import Counter, defaultdict
from typing import Any, ClassVar

from transformers import AutoModelForTokenClassification, DataCollatorForTokenClassification, PreTrainedTokenizerFast

from examples import report
from examples.common import IGNORED, Examples, f1, pieces, standard_library

PACKAGES = ("asyncio", "email", "http", "json", "logging", "unittest")
Span = tuple[int, int, str]  # first character, the one past the last, class


class TokenClassification:
    line = '{"text": ..., "spans": [[first character, end, class], ...]}'
    fields: ClassVar = {"text": str, "spans": list}
    model_class = AutoModelForTokenClassification
    collator = DataCollatorForTokenClassification
    peft_type = "TOKEN_CLS"

    def __init__(
        self, train_examples: Examples, test_examples: Examples, tokenizer: PreTrainedTokenizerFast, max_length: int
    ) -> None:
        classes = sorted({kind for e in train_examples + test_examples for _, _, kind in e["spans"]})
        self.labels = ["O", *(f"{where}-{kind}" for kind in classes for where in "BI")]
        self.train_set, self.test_set = (
            self._encode(examples, tokenizer, max_length) for examples in (train_examples, test_examples)
        )
        self.actual = [self._names(e["labels"], e) for e in self.test_set]
        # The baseline gives each token its most frequent tag.
        counts: dict[int, Counter[int]] = defaultdict(Counter)
        for e in self.train_set:
            for token, label in zip(e["input_ids"], e["labels"], strict=True):
                counts[token][label] += 1
        usual = {token: counter.most_common(1)[0][0] for token, counter in counts.items()}
        self.baseline = scores(self.actual, [self._names([usual.get(token, 0) for token in e["input_ids"]], e)
                                             for e in self.test_set])  # fmt: skip

    def _encode(self, examples: Examples, tokenizer: PreTrainedTokenizerFast, max_length: int) -> Examples:
        encoded = tokenizer([e["text"] for e in examples], truncation=True, max_length=max_length,
                            return_offsets_mapping=True)  # fmt: skip
        features = []
        for i, e in enumerate(examples):
            tags = tag(e["text"], sorted(map(tuple, e["spans"])), encoded["offset_mapping"][i])
            # The collator gives padding the same label as special tokens have.
            labels = [IGNORED if special is None else self.labels.index(t)
                      for t, special in zip(tags, encoded.sequence_ids(i), strict=True)]  # fmt: skip
            features.append({"input_ids": encoded["input_ids"][i], "attention_mask": encoded["attention_mask"][i],
                             "labels": labels})  # fmt: skip
        return features

    def _names(self, tags: list[int], example: dict[str, Any]) -> list[str]:
        """The tags of the tokens that have a label."""
        return [self.labels[t] for t, label in zip(tags, example["labels"], strict=False) if label != IGNORED]

    @staticmethod
    def fault(example: dict[str, Any]) -> str | None:
        for span in example["spans"]:
            match span:
                case [int(first), int(end), str()] if 0 <= first < end <= len(example["text"]):
                    continue
            return f"a span must be [first, end, class] inside the text, got {span}"
        return None

    @staticmethod
    def built_in(characters: int = 300) -> Examples:
        """Logical lines of a file, together at most `characters` long, with their spans. A longer line stands alone."""
        examples = []
        for file, source in standard_library(*(f"{name}/*.py" for name in PACKAGES)):
            spans, ends = python_tokens(source)
            firsts = [first for first, _, _ in spans]
            for start, text in pieces((source[a:b] for a, b in zip([0, *ends], ends, strict=False)), characters):
                inside = spans[bisect.bisect_left(firsts, start) : bisect.bisect_left(firsts, start + len(text))]
                inside = [(first - start, end - start, kind) for first, end, kind in inside]
                examples.append({"text": text, "spans": inside, "group": file})
        return examples

    def metrics(self, logits: Any) -> dict[str, Any]:
        """logits (examples, tokens, tags), padded."""
        rows = logits.argmax(-1).tolist()
        return scores(self.actual, [self._names(row, e) for row, e in zip(rows, self.test_set, strict=True)])

    def draw(self, axes: Any, runs: list[report.Run]) -> None:
        each = {**{run.name: run.metrics for run in runs}, "baseline": self.baseline}
        report.bars(axes, {name: values["F1 by class"] for name, values in each.items()}, "F1 over whole entities")


def python_tokens(source: str) -> tuple[list[Span], list[int]]:
    """The labelled spans of a source in ASCII, and the characters at which a logical line ends."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    kinds = {tokenize.STRING: "string", tokenize.NUMBER: "number", tokenize.COMMENT: "comment",
             tokenize.OP: "operator"}  # fmt: skip
    spans: list[Span] = []
    ends: list[int] = []
    opened: list[int] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        first, last = (starts[row - 1] + column for row, column in (token.start, token.end))
        name = tokenize.tok_name[token.type]
        if name.endswith("STRING_START"):  # an f-string, which Python 3.12 and newer split into several tokens
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


def tag(text: str, spans: list[Span], offsets: list[tuple[int, int]]) -> list[str]:
    """Tags: B-class where a span begins, I-class for its other tokens, O outside of spans. `spans` is sorted."""
    tags, current, begun = [], 0, -1
    for first, last in offsets:
        piece = text[first:last]
        first += len(piece) - len(piece.lstrip()) if piece.strip() else 0  # many tokens begin with a space
        while current < len(spans) and spans[current][1] <= first:
            current += 1
        if current == len(spans) or first < spans[current][0]:
            tags.append("O")
        else:
            tags.append(("I-" if begun == current else "B-") + spans[current][2])
            begun = current
    return tags


def entities(tags: list[str]) -> set[Span]:
    """The entities, (first token, one past the last, class). An I- tag that continues no entity begins one."""
    found, begin = set(), 0
    for i, (before, here) in enumerate(zip(["O", *tags], [*tags, "O"], strict=True)):
        if before != "O" and (here[:2] != "I-" or here[2:] != before[2:]):
            found.add((begin, i, before[2:]))
        if here != "O" and (here[:2] == "B-" or here[2:] != before[2:]):
            begin = i
    return found


def scores(actual: list[list[str]], predicted: list[list[str]]) -> dict[str, Any]:
    """Scores of tags (examples, tokens): accuracy over tokens, micro and macro means over entities."""
    equal = [a == p for these, those in zip(actual, predicted, strict=True) for a, p in zip(these, those, strict=True)]
    hits, found, there = Counter[str](), Counter[str](), Counter[str]()
    for these, those in zip(actual, predicted, strict=True):
        a, p = entities(these), entities(those)
        for counter, of in ((hits, a & p), (found, p), (there, a)):
            counter.update(kind for _, _, kind in of)
    precision, recall, micro = f1(hits.total(), found.total(), there.total())
    each = {kind: f1(hits[kind], found[kind], there[kind])[2] for kind in sorted(there)}
    return {"accuracy": sum(equal) / len(equal), "precision": precision, "recall": recall, "F1": micro,
            "F1, macro": sum(each.values()) / len(each), "F1 by class": each}  # fmt: skip
