"""Fine-tune a patched Hugging Face model with the Trainer: sequence or token classification, or question answering.

Without --data, the examples are made from Python's standard library, and the test examples from files that are not in
the training set. With --compare, the stock model is trained too, from the same weights on the same batches.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python examples/finetune.py`

from examples import common, report, training
from examples.tasks.question_answering import QuestionAnswering
from examples.tasks.sequence_classification import SequenceClassification
from examples.tasks.token_classification import TokenClassification

TASKS: dict[str, Any] = {
    "sequence-classification": SequenceClassification,
    "token-classification": TokenClassification,
    "question-answering": QuestionAnswering,
}


def main() -> int:
    lines = "; ".join(f"{name}: {task.line}" for name, task in TASKS.items())
    parser = common.arguments(__doc__, lines, steps=250, batch=32, max_length=128, lr=2e-3)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--test-size", type=common.positive, default=500, help="examples to test on, at most")
    parser.add_argument("--lora", type=common.positive, metavar="RANK", help="train low-rank adapters; needs peft")
    args = common.parse(parser)
    Task = TASKS[args.task]

    examples = common.read_jsonl(args.data, Task.fields, Task.fault) if args.data else Task.built_in()
    train_examples, test_examples = common.split(examples, args.seed)
    train_examples = train_examples[: args.steps * args.batch]
    test_examples = test_examples[: args.test_size]
    texts = (e.get("context") or e["text"] for e in train_examples)
    tokenizer = common.load_tokenizer(args.model, texts)
    task = Task(train_examples, test_examples, tokenizer, args.max_length)
    report.console.print(f"{len(task.train_set)} examples to train on, {len(task.test_set)} to test on")

    settings: dict[str, Any] = {}
    if task.labels:
        settings = {"id2label": dict(enumerate(task.labels)), "label2id": {x: i for i, x in enumerate(task.labels)}}
    runs = []
    for name in common.run_names(args):
        run = report.Run(name)
        dtype = common.DTYPES[args.dtype if args.lora else "float32"]  # trained weights are float32
        model: Any = common.load_model(Task.model_class, args, tokenizer, dtype, **settings)
        common.prepare(model, name, args)
        if config := args.lora and common.lora(args.lora, Task.peft_type):
            from peft import get_peft_model

            model = get_peft_model(model, config)
        trainer = training.train(run, model, task.train_set, args, tokenizer, data_collator=Task.collator(tokenizer))
        run.metrics = task.metrics(trainer.predict(task.test_set).predictions)
        runs.append(run)
    if args.save:
        trainer.save_model(args.save)  # and the tokenizer
    return report.write(args, args.task, runs, task.baseline, lambda axes: task.draw(axes, runs))


if __name__ == "__main__":
    sys.exit(main())
