"""The tasks of examples.finetune, one class a file: its data, encoding, metrics, baseline and picture.

A task is made of training and test examples, a tokenizer and a length. It encodes them into `train_set` and `test_set`
for the Trainer; `metrics` scores what `Trainer.predict` returns for `test_set`.
"""
