"""The sentiment loop: a Llama learns to tell which family of modules a span of source is from.

Without --data the texts are spans of Python's standard library, labelled by the package they stand in; the test spans
are from files that were not trained on. Prints accuracy, precision, recall and F1, and draws the confusion matrix.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from examples import training
from examples.training import Batch, Examples

FAMILIES = {
    "asyncio": ("asyncio",),
    "email": ("email",),
    "imports": ("importlib", "zipimport", "pkgutil", "modulefinder", "runpy"),
    "processes": ("multiprocessing", "concurrent", "subprocess"),
    "testing": ("unittest", "doctest"),
    "web": ("http", "urllib", "xmlrpc", "wsgiref"),
    "xml": ("xml",),
}


# --- data ------------------------------------------------------------------------------------------------------------


def spans(characters: int = 400) -> Examples:
    """Whole lines of a file, together at most so long."""
    examples = []
    for family, parts in FAMILIES.items():
        for file, source in training.standard_library(*parts):
            text = ""
            for line in [*source.splitlines(keepends=True), ""]:
                if text and (not line or len(text) + len(line) > characters):
                    examples.append({"text": text, "label": family, "group": file})
                    text = ""
                text += line
    return examples


def read(path: Any) -> Examples:
    return [{**e, "label": str(e["label"])} for e in training.read_jsonl(path, text=str, label=(str, int))]


# --- metrics ---------------------------------------------------------------------------------------------------------


def metrics(confusion: torch.Tensor) -> dict[str, Any]:
    """confusion (actual class, predicted class) counts; precision, recall and F1 are means over the classes."""
    classes = range(len(confusion))
    each = [training.f1(int(confusion[c, c]), int(confusion[:, c].sum()), int(confusion[c].sum())) for c in classes]
    precision, recall, f1 = (sum(column) / len(each) for column in zip(*each, strict=True))
    accuracy = (confusion.diagonal().sum() / confusion.sum()).item()
    return {"accuracy": accuracy, "precision": precision, "recall": recall, "F1": f1, "confusion": confusion.tolist()}


# --- the whole -------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = training.arguments(
        __doc__, "finetune_sequence_classification", '{"text": ..., "label": ...}',
        steps=250, batch=32, max_length=128, lr=2e-3, task="SEQ_CLS",
    )  # fmt: skip
    args = parser.parse_args()
    examples = read(args.data) if args.data else spans()
    labels = sorted({e["label"] for e in examples})
    if len(labels) < 2:
        parser.error(f"all lines of {args.data} have the label {labels[0]!r}")
    train_set, test_set = training.split(examples, args.seed, share=0.2)
    tokenizer = training.load_tokenizer(args, (e["text"] for e in train_set))
    training.console.print(f"{len(train_set)} spans to train on, {len(test_set)} to test on, classes: {labels}")

    def collate(batch: Examples) -> Batch:
        """input_ids and attention_mask (B, S), padded on the right; labels (B,)."""
        texts = [e["text"] for e in batch]
        inputs = tokenizer(texts, truncation=True, max_length=args.max_length, padding=True, padding_side="right",
                           return_tensors="pt")  # fmt: skip
        classes = torch.tensor([labels.index(e["label"]) for e in batch])
        return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "labels": classes}

    def inputs() -> Iterator[Batch]:
        return map(collate, training.batches(train_set, args.batch, args.seed))

    def build() -> Any:
        # The head reads the last token that is not tokenizer.pad_token: Transformers looks at the ids, not at the mask.
        names = dict(enumerate(labels))
        return training.load_model(args, AutoModelForSequenceClassification, tokenizer, num_labels=len(labels),
                                   id2label=names, label2id={label: i for i, label in names.items()})  # fmt: skip

    def test(model: torch.nn.Module) -> dict[str, Any]:
        confusion = torch.zeros(len(labels), len(labels), dtype=torch.long)
        for i in range(0, len(test_set), args.batch):
            batch = collate(test_set[i : i + args.batch])
            logits = model(**{name: x.to(args.device) for name, x in batch.items()}).logits  # (B, classes)
            for actual, predicted in zip(batch["labels"].tolist(), logits.argmax(-1).tolist(), strict=True):
                confusion[actual, predicted] += 1
        return metrics(confusion)

    def draw(axes: Any, runs: list[training.Run]) -> None:
        confusion = torch.tensor(runs[-1].metrics["confusion"])
        axes.imshow((confusion / confusion.sum(1, keepdim=True).clamp(min=1)).numpy(), cmap="Blues", vmin=0, vmax=1)
        if len(labels) <= 12:
            for (row, column), count in zip(torch.cartesian_prod(*[torch.arange(len(labels))] * 2).tolist(),
                                            confusion.flatten().tolist(), strict=True):  # fmt: skip
                dark = count > confusion[row].sum() / 2
                axes.text(column, row, count, ha="center", va="center", color="white" if dark else "black")
        axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
        axes.set_yticks(range(len(labels)), labels)
        axes.set(xlabel="predicted", ylabel="actual", title=f"accuracy {runs[-1].metrics['accuracy']:.2f}")

    # The best that one and the same answer to everything can do.
    baseline = {"accuracy": Counter(e["label"] for e in test_set).most_common(1)[0][1] / len(test_set)}
    runs = training.fit(args, build, inputs, test, tokenizer)
    return training.finish(args, "finetune_sequence_classification", runs, baseline, draw)


if __name__ == "__main__":
    sys.exit(main())
