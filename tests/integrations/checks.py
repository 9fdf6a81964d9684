"""What a patched model must do as the stock model does: each check runs both on the same inputs and compares them.

The truth is the stock model in float64. The patched model may be off from it by twice what the stock model in float32,
with eager attention, is off by: see `close`. Generated tokens and the random number generator's state are equal.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from tests.integrations.families import UNDEFINED, Batch, batch, stock
from tests.support.judge import UNIT

PADDED = 6  # tokens of padding of the first sequence
FAR = 1000  # beyond every length in a config
_OF_IMAGES = {"mm_token_type_ids"}  # given with the images alone


class Result(NamedTuple):
    close: dict[str, torch.Tensor]  # numbers, within rounding
    equal: dict[str, torch.Tensor]  # bit for bit


# --- what is run -----------------------------------------------------------------------------------------------------


def mask_of(ids: torch.Tensor, side: str) -> torch.Tensor:
    mask = torch.ones_like(ids)
    if side == "left":
        mask[0, :PADDED] = 0
    elif side == "right":
        mask[0, -PADDED:] = 0
    return mask


def with_gradients(model: torch.nn.Module, batch: Batch, mask: torch.Tensor) -> Result:
    """Logits of the tokens that are no padding; the gradients of their loss, parameter by parameter."""
    model.zero_grad()
    logits = model(**batch.everything, attention_mask=mask, use_cache=False).logits
    there = mask[:, 1:].bool() & mask[:, :-1].bool()
    F.cross_entropy(logits[:, :-1][there], batch.ids[:, 1:][there]).backward()
    gradients = {name: p.grad.detach() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return Result({"logits": logits.detach()[mask.bool()], **gradients}, {})


def logits_and_gradients(model: torch.nn.Module, batch: Batch, side: str) -> Result:
    return with_gradients(model, batch, mask_of(batch.ids, side))


class DropoutInFloat32(TorchFunctionMode):
    """Draws the mask of each dropout in float32, whatever is dropped: on a GPU, masks depend on the dtype."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.dropout:
            return func(*args, **(kwargs or {}))
        call = inspect.signature(F.dropout).bind(*args, **(kwargs or {}))
        call.apply_defaults()
        x, p, training, _ = call.args
        return x * F.dropout(torch.ones_like(x, dtype=torch.float32), p, training).to(x.dtype)


def in_training(model: torch.nn.Module, batch: Batch) -> Result:
    """With the dropouts of its config: from one seed the same masks, and as many numbers drawn."""
    device = batch.ids.device
    model.train()
    try:
        torch.manual_seed(3)
        with DropoutInFloat32():
            close, _ = with_gradients(model, batch, mask_of(batch.ids, "none"))
    finally:
        model.eval()
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.random.get_rng_state()
    return Result(close, {"random state": state})


def far_positions(model: torch.nn.Module, batch: Batch) -> Result:
    positions = torch.arange(FAR, FAR + batch.ids.shape[1], device=batch.ids.device).expand_as(batch.ids)
    with torch.no_grad():
        return Result({"logits": model(**batch.everything, position_ids=positions, use_cache=False).logits}, {})


def cached(model: torch.nn.Module, batch: Batch) -> Result:
    """A prefill in two pieces, then single tokens; a prefill with the logits of its last tokens alone. Padding on the
    left, but for Qwen's images: with a mask, its forward takes a prefill in one piece only."""
    mask = mask_of(batch.ids, "none" if "image_grid_thw" in batch.images else "left")
    argument = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    cache, logits = None, []
    with torch.no_grad():
        for a, b in ((0, 12), (12, 17), (17, 18), (18, 19), (19, 20)):
            by_token = {name: x[:, a:b] for name, x in batch.by_token.items() if a == 0 or name not in _OF_IMAGES}
            out = model(
                input_ids=batch.ids[:, a:b], attention_mask=None if mask.all() else mask[:, :b], use_cache=True,
                **{argument: cache}, **by_token, **(batch.images if a == 0 else {}),
            )  # fmt: skip
            cache = getattr(out, argument)
            logits.append(out.logits[mask[:, a:b].bool()])
        how = {"attention_mask": None if mask.all() else mask, "use_cache": True, "logits_to_keep": 3}
        last = model(**batch.everything, **how).logits
    return Result({"logits": torch.cat(logits), "last logits": last}, {})


def generated(model: torch.nn.Module, batch: Batch) -> Result:
    """Greedy, past the sliding window, from a left-padded prompt."""
    how = {"max_new_tokens": 8, "do_sample": False, "disable_compile": True}
    return Result({}, {"tokens": model.generate(**batch.everything, attention_mask=mask_of(batch.ids, "left"), **how)})


CHECKS: dict[str, Callable[[torch.nn.Module, Batch], Result]] = {
    "no padding": functools.partial(logits_and_gradients, side="none"),
    "left": functools.partial(logits_and_gradients, side="left"),
    "right": functools.partial(logits_and_gradients, side="right"),
    "training": in_training,
    "far positions": far_positions,
    "cache": cached,
    "generate": generated,
}


class DoubleSoftmax(TorchFunctionMode):
    """Stock takes each softmax in float32: of the lowest number of float64, which its masks have, that makes NaN."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func.__name__ == "softmax" and kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


# --- how it is compared ----------------------------------------------------------------------------------------------


def close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> None:
    """|ours - truth| <= 2 |theirs - truth| + u |truth|, in the norm of the logits and in that of all gradients: two
    float32 computations in different orders. One parameter's gradient and the last logits may be off by 4 times, one
    element by 3 times what it is in stock, since of few numbers the error is luck, as in tests/support/judge.py. Terms
    that cancel add up to a gradient, to zero for the bias of keys: u counts in the norm of all gradients."""
    assert ours.keys() == theirs.keys() == truth.keys(), f"gradients of {sorted(ours.keys() ^ theirs.keys())}"
    u, ulp = UNIT[torch.float32], torch.finfo(torch.float32).eps
    for name, exact in truth.items():
        assert ours[name].shape == exact.shape and ours[name].dtype == theirs[name].dtype, name
    parameters = [name for name in truth if not name.endswith("logits")]
    terms = torch.stack([truth[name].norm() for name in parameters]).norm().item() if parameters else 0.0

    def judge(name: str, K: torch.Tensor, E: torch.Tensor, R: torch.Tensor, factor: int) -> None:
        error, stock_error = K.double() - R, E.double() - R
        assert error.isfinite().all(), f"{name}: not finite"
        size = terms if name in parameters else R.norm().item()
        off, allowed = error.norm().item(), factor * stock_error.norm().item() + u * size
        assert off <= allowed, f"{name}: off by {off / size:.3g} of its norm, allowed {allowed / size:.3g}"
        largest = terms if name in parameters else R.abs().max().item()
        off, allowed = error.abs().max().item(), 3 * stock_error.abs().max().item() + 2 * ulp * largest
        assert off <= allowed, f"{name}: largest error {off:.3g}, allowed {allowed:.3g}"

    for name, exact in truth.items():
        judge(name, ours[name], theirs[name], exact, 2 if name == "logits" else 4)
    if parameters:
        judge(
            "all gradients", *(torch.cat([x[name].flatten() for name in parameters]) for x in (ours, theirs, truth)), 2
        )


class Baseline:
    """A family's stock model and its copy in float64, on one batch."""

    def __init__(self, family: str) -> None:
        self.model, self.batch = stock(family), batch(family)
        self.exact_model = copy.deepcopy(self.model).double()
        images = {name: x.double() if x.is_floating_point() else x for name, x in self.batch.images.items()}
        self.exact_batch = self.batch._replace(images=images)
        self.checks = [name for name in CHECKS if (family, name) not in UNDEFINED]

    def results(self, name: str) -> tuple[Result, Result]:
        theirs = CHECKS[name](self.model, self.batch)
        with DoubleSoftmax():
            return theirs, CHECKS[name](self.exact_model, self.exact_batch) if theirs.close else theirs

    def check(self, name: str, patched: torch.nn.Module) -> None:
        """AssertionError where the patched model differs."""
        theirs, truth = self.results(name)
        ours = CHECKS[name](patched, self.batch)
        if theirs.close:
            close(ours.close, theirs.close, truth.close)
        assert ours.equal.keys() == theirs.equal.keys()
        for what, expected in theirs.equal.items():
            assert torch.equal(ours.equal[what], expected), f"{what} differ"
