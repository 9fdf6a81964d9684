"""How the tests compare a patched model with the stock model: what is run, and how far the results may differ.

The truth is the stock model in float64. The error of the patched model against it may be twice the error of the stock
model in float32 with eager attention: see `compare`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from tests.support.judge import UNIT

# --- what is run -----------------------------------------------------------------------------------------------------

Results = dict[str, torch.Tensor]  # logits and gradients, by name
Run = Callable[[Any], Results]


def padding_mask(ids: torch.Tensor, side: str) -> torch.Tensor:
    """An attention_mask that hides the first or the last six tokens of the first sequence, or none."""
    mask = torch.ones_like(ids)
    if side != "none":
        mask[0, {"left": slice(0, 6), "right": slice(-6, None)}[side]] = 0
    return mask


def logits_and_gradients(ids: torch.Tensor, mask: torch.Tensor | None = None, **arguments: Any) -> Run:
    """Run a model: the logits of the tokens that are not padding, and the gradient of their loss for each parameter."""

    def run(model: Any) -> Results:
        model.zero_grad()
        call = {"input_ids": ids, "attention_mask": mask, "use_cache": False, **arguments}
        logits = model(**call).logits[:, -ids.shape[1] :]  # without those of virtual tokens
        shown = torch.ones_like(ids).bool() if mask is None else mask.bool()
        predicted = shown[:, 1:] & shown[:, :-1]
        F.cross_entropy(logits[:, :-1][predicted], ids[:, 1:][predicted]).backward()
        results = {"logits": logits.detach()[shown], **gradients(model)}
        model.zero_grad()
        return results

    return run


def gradients(model: torch.nn.Module) -> Results:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def logits_of(ids: torch.Tensor, **arguments: Any) -> Run:
    """Run a model: all logits."""

    @torch.no_grad()
    def run(model: Any) -> Results:
        return {"logits": model(ids, **arguments).logits}

    return run


def mean_square_of(output: Callable[[Any], torch.Tensor]) -> Run:
    """Run a model: what `output` computes with it, as logits, and the gradients of the mean of its squares."""

    def run(model: Any) -> Results:
        model.zero_grad()
        out = output(model)
        out.square().mean().backward()
        return {"logits": out.detach(), **gradients(model)}

    return run


class DropoutInFloat32(TorchFunctionMode):
    """Draws each dropout mask in float32, whatever the input's dtype: on a GPU, masks depend on the dtype."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.dropout:
            return func(*args, **(kwargs or {}))
        call = inspect.signature(F.dropout).bind(*args, **(kwargs or {}))
        call.apply_defaults()
        x, p, training, _ = call.args
        return x * F.dropout(torch.ones_like(x, dtype=torch.float32), p, training).to(x.dtype)


class DoubleSoftmax(TorchFunctionMode):
    """Computes in float64 each softmax that stock code asks for in float32.

    The masks of a float64 model hold the lowest number of float64. In float32 it is -inf, and a row of it gives NaN.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func.__name__ == "softmax" and kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


# --- how results are compared ----------------------------------------------------------------------------------------


def compare_with_stock(ours: Any, stock: Any, run: Run, run_ours: Run | None = None) -> None:
    """Raise AssertionError if the results of the model `ours` are not those of `stock`.

    run_ours: runs `ours`, where it takes another call than `stock`.
    """
    theirs = run(stock)
    with DoubleSoftmax():
        truth = run(copy.deepcopy(stock).double())
    compare((run_ours or run)(ours), theirs, truth)


def with_weights_rounded(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """A copy of a float32 model whose weights are one more rounding off: its results are another draw of float32's."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            signs = 2 * torch.randint(2, parameter.shape, generator=generator).to(parameter) - 1
            parameter.mul_(1 + signs * torch.finfo(torch.float32).eps)
    return other


def compare(ours: Results, theirs: Results, truth: Results, others: Sequence[Results] = ()) -> None:
    """Raise AssertionError unless |ours - truth| <= factor |theirs - truth| + u |truth|.

    others: more draws of `theirs`, for a model that magnifies roundings so much that the error of one draw is chance.
    The worst draw counts.

    The norms are of all logits and of all gradients, with factor 2: the two float32 computations differ in the order of
    additions. For the gradient of one parameter and for a few logits the factor is 4, and for the largest error of an
    element it is 3, since the error of a few numbers is a matter of chance: see tests/support/judge.py. A gradient is a
    sum of terms that cancel, for the bias of keys to zero. So for gradients, u applies to the norm of all of them.
    """
    assert ours.keys() == theirs.keys() == truth.keys(), f"gradients of {sorted(ours.keys() ^ theirs.keys())}"
    u, ulp = UNIT[torch.float32], torch.finfo(torch.float32).eps
    for name, exact in truth.items():
        assert ours[name].shape == exact.shape and ours[name].dtype == theirs[name].dtype, name
    parameters = [name for name in truth if not name.endswith("logits")]
    terms = torch.stack([truth[name].norm() for name in parameters]).norm().item() if parameters else 0.0

    def check(name: str, K: torch.Tensor, E: Sequence[torch.Tensor], R: torch.Tensor, factor: int) -> None:
        error, stock_errors = K.double() - R, [x.double() - R for x in E]
        assert error.isfinite().all(), f"{name}: not finite"
        size = terms if name in parameters else R.norm().item()
        off, allowed = error.norm().item(), factor * max(x.norm().item() for x in stock_errors) + u * size
        assert off <= allowed, f"{name}: off by {off / size:.3g} of its norm, allowed {allowed / size:.3g}"
        largest = terms if name in parameters else R.abs().max().item()
        off, allowed = error.abs().max().item(), 3 * max(x.abs().max().item() for x in stock_errors)
        allowed += 2 * ulp * largest
        assert off <= allowed, f"{name}: largest error {off:.3g}, allowed {allowed:.3g}"

    draws = [theirs, *others]
    for name, exact in truth.items():
        check(name, ours[name], [draw[name] for draw in draws], exact, 2 if name == "logits" else 4)
    if parameters:
        K, R, *E = (torch.cat([x[name].flatten() for name in parameters]) for x in (ours, truth, *draws))
        check("all gradients", K, E, R, 2)
