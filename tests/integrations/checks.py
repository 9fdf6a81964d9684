"""The checks of a model family: each runs the stock and the patched model on the same inputs and compares them.

Numbers are compared as comparison.py says. Generated tokens and the state of the random number generator are equal.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tests.integrations.comparison import (
    DoubleSoftmax,
    DropoutInFloat32,
    compare,
    logits_and_gradients,
    logits_of,
    padding_mask,
    with_weights_rounded,
)
from tests.integrations.families import UNDEFINED, Batch, batch, stock

FAR = 1000  # a position beyond every length in a config
_OF_IMAGES = {"mm_token_type_ids"}  # an argument of calls with images only


class Result(NamedTuple):
    close: dict[str, torch.Tensor]  # equal to stock within rounding
    equal: dict[str, torch.Tensor]  # equal bit for bit


# --- the checks ------------------------------------------------------------------------------------------------------


def with_padding(model: torch.nn.Module, batch: Batch, side: str) -> Result:
    run = logits_and_gradients(batch.ids, padding_mask(batch.ids, side), **batch.by_token, **batch.images)
    return Result(run(model), {})


def in_training(model: torch.nn.Module, batch: Batch) -> Result:
    """With the dropouts of its config: the same seed gives the same masks and leaves the same random state."""
    device = batch.ids.device
    model.train()
    try:
        torch.manual_seed(3)
        with DropoutInFloat32():
            close, _ = with_padding(model, batch, "none")
    finally:
        model.eval()
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.random.get_rng_state()
    return Result(close, {"random state": state})


def far_positions(model: torch.nn.Module, batch: Batch) -> Result:
    positions = torch.arange(FAR, FAR + batch.ids.shape[1], device=batch.ids.device).expand_as(batch.ids)
    run = logits_of(batch.ids, **batch.by_token, **batch.images, position_ids=positions, use_cache=False)
    return Result(run(model), {})


@torch.no_grad()
def cached(model: torch.nn.Module, batch: Batch) -> Result:
    """A prefill in two parts, then single tokens; and a prefill that returns only the logits of its last tokens.

    There is padding on the left, except with Qwen's images: given a mask, that forward takes a prefill as a whole only.
    """
    mask = padding_mask(batch.ids, "none" if "image_grid_thw" in batch.images else "left")
    argument = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    cache, logits = None, []
    for a, b in ((0, 12), (12, 17), (17, 18), (18, 19), (19, 20)):
        by_token = {name: x[:, a:b] for name, x in batch.by_token.items() if a == 0 or name not in _OF_IMAGES}
        out = model(
            input_ids=batch.ids[:, a:b], attention_mask=None if mask.all() else mask[:, :b], use_cache=True,
            **{argument: cache}, **by_token, **(batch.images if a == 0 else {}),
        )  # fmt: skip
        cache = getattr(out, argument)
        logits.append(out.logits[mask[:, a:b].bool()])
    options = {"attention_mask": None if mask.all() else mask, "use_cache": True, "logits_to_keep": 3}
    last = model(**batch.everything, **options).logits
    return Result({"logits": torch.cat(logits), "last logits": last}, {})


def generated(model: torch.nn.Module, batch: Batch) -> Result:
    """Greedy generation from a prompt with padding on the left, to more tokens than the sliding window."""
    mask = padding_mask(batch.ids, "left")
    options = {"max_new_tokens": 8, "do_sample": False, "disable_compile": True}
    return Result({}, {"tokens": model.generate(**batch.everything, attention_mask=mask, **options)})


CHECKS: dict[str, Callable[[torch.nn.Module, Batch], Result]] = {
    "no padding": functools.partial(with_padding, side="none"),
    "left": functools.partial(with_padding, side="left"),
    "right": functools.partial(with_padding, side="right"),
    "training": in_training,
    "far positions": far_positions,
    "cache": cached,
    "generate": generated,
}

# --- the comparison --------------------------------------------------------------------------------------------------


class Baseline:
    """The stock model of a family, its copy in float64, and a batch. changes: other settings of its config."""

    def __init__(self, family: str, **changes: Any) -> None:
        self.model, self.batch = stock(family, **changes), batch(family)
        self.exact_model = copy.deepcopy(self.model).double()
        images = {name: x.double() if x.is_floating_point() else x for name, x in self.batch.images.items()}
        self.exact_batch = self.batch._replace(images=images)
        self.checks = [name for name in CHECKS if (family, name) not in UNDEFINED]

    def results(self, name: str) -> tuple[Result, Result]:
        """The results of a check for the stock model and for its float64 copy."""
        theirs = CHECKS[name](self.model, self.batch)
        with DoubleSoftmax():
            return theirs, CHECKS[name](self.exact_model, self.exact_batch) if theirs.close else theirs

    def check(self, name: str, patched: torch.nn.Module) -> None:
        """Raise AssertionError if the patched model gives other results than the stock model."""
        theirs, truth = self.results(name)
        ours = CHECKS[name](patched, self.batch)
        if theirs.close:
            try:
                compare(ours.close, theirs.close, truth.close)
            except AssertionError:  # which may be chance: Dory's recurrence magnifies roundings
                others = [CHECKS[name](with_weights_rounded(self.model, seed), self.batch).close for seed in range(4)]
                compare(ours.close, theirs.close, truth.close, others)
        assert ours.equal.keys() == theirs.equal.keys()
        for what, expected in theirs.equal.items():
            assert torch.equal(ours.equal[what], expected), f"{what} differs"
