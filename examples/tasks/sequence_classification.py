"""Sequence classification: from which family of modules is a piece of source?"""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

import torch
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, PreTrainedTokenizerFast

from examples.common import Examples, f1, pieces, standard_library
from examples.report import Run

FAMILIES = {
    "asyncio": ("asyncio/*.py",),
    "email": ("email/**/*.py",),
    "imports": ("importlib/**/*.py", "zipimport.py", "pkgutil.py", "modulefinder.py", "runpy.py"),
    "processes": ("multiprocessing/*.py", "concurrent/**/*.py", "subprocess.py"),
    "testing": ("unittest/*.py", "doctest.py"),
    "web": ("http/*.py", "urllib/*.py", "xmlrpc/*.py", "wsgiref/*.py"),
    "xml": ("xml/**/*.py",),
}


class SequenceClassification:
    line = '{"text": ..., "label": ...}'
    fields: ClassVar = {"text": str, "label": (str, int)}
    model_class = AutoModelForSequenceClassification
    collator = DataCollatorWithPadding
    peft_type = "SEQ_CLS"

    def __init__(
        self, train_examples: Examples, test_examples: Examples, tokenizer: PreTrainedTokenizerFast, max_length: int
    ) -> None:
        self.labels = sorted({str(e["label"]) for e in train_examples + test_examples})
        if len(self.labels) < 2:
            raise SystemExit(f"at least two labels are needed, got {self.labels[0]!r} only")
        # The head reads the last token whose id is not the pad token. Transformers does not use the mask for this.
        self.train_set, self.test_set = (
            [{**tokenizer(e["text"], truncation=True, max_length=max_length, return_token_type_ids=False),
              "labels": self.labels.index(str(e["label"]))} for e in examples]
            for examples in (train_examples, test_examples)
        )  # fmt: skip
        self.baseline = {
            "accuracy": Counter(e["labels"] for e in self.test_set).most_common(1)[0][1] / len(self.test_set)
        }

    @staticmethod
    def fault(example: dict[str, Any]) -> str | None:
        return None

    @staticmethod
    def built_in(characters: int = 400) -> Examples:
        """Whole lines of a file, together at most `characters` long."""
        return [
            {"text": text, "label": family, "group": file}
            for family, patterns in FAMILIES.items()
            for file, source in standard_library(*patterns)
            for _, text in pieces(source.splitlines(keepends=True), characters)
        ]

    def metrics(self, logits: Any) -> dict[str, Any]:
        """logits (examples, classes)."""
        actual = torch.tensor([e["labels"] for e in self.test_set])
        C = len(self.labels)
        pairs = actual * C + torch.from_numpy(logits).argmax(-1)
        return scores(torch.bincount(pairs, minlength=C * C).view(C, C))

    def draw(self, axes: Any, runs: list[Run]) -> None:
        """The confusion matrix of the last run."""
        confusion = torch.tensor(runs[-1].metrics["confusion"])
        shares = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
        axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
        if len(self.labels) <= 12:
            for row, column in torch.cartesian_prod(*[torch.arange(len(self.labels))] * 2).tolist():
                axes.text(column, row, int(confusion[row, column]), ha="center", va="center",
                          color="white" if shares[row, column] > 0.5 else "black")  # fmt: skip
        axes.set_xticks(range(len(self.labels)), self.labels, rotation=30, ha="right")
        axes.set_yticks(range(len(self.labels)), self.labels)
        axes.set(xlabel="predicted", ylabel="actual", title=f"accuracy {runs[-1].metrics['accuracy']:.2f}")


def scores(confusion: torch.Tensor) -> dict[str, Any]:
    """Scores of the counts in confusion (actual class, predicted class). Precision, recall and F1 are class means."""
    classes = range(len(confusion))
    each = [f1(int(confusion[c, c]), int(confusion[:, c].sum()), int(confusion[c].sum())) for c in classes]
    precision, recall, mean_f1 = (sum(column) / len(each) for column in zip(*each, strict=True))
    accuracy = (confusion.diagonal().sum() / confusion.sum()).item()
    return {"accuracy": accuracy, "precision": precision, "recall": recall, "F1": mean_f1,
            "confusion": confusion.tolist()}  # fmt: skip
