"""The tasks of examples.finetune, a class in each file: data, encoding, metrics, baseline and picture.

A task takes training and test examples, a tokenizer and a maximum length. It encodes the examples as `train_set` and
`test_set` for the Trainer. `metrics` scores the predictions of `Trainer.predict` for `test_set`.
"""
