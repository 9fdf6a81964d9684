"""A piece of work: an op at a shape in a dtype, the least bytes and FLOPs that it needs, and its float64 results."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch

DIRECTIONS = ("forward", "backward", "both")

Function = Callable[..., Any]  # an op: arguments -> its output, or a tuple of outputs
Results = dict[str, torch.Tensor]  # outputs by their names; gradients by "d" + the argument's name


class Call(NamedTuple):
    """The arguments of one call, and the gradients of its outputs."""

    args: tuple[torch.Tensor, ...]
    grads: tuple[torch.Tensor, ...]


class Piece(NamedTuple):
    """A part of a call that can be computed alone, and where its outputs and gradients are in those of the whole."""

    call: Call
    outputs: tuple[Any, ...]
    arguments: tuple[Any, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work(abc.ABC):
    """An op at one shape. Subclasses add the sizes as fields.

    A provider's function takes tensors named `arguments` and returns those named `outputs`. `shape` is the name of the
    shape in reports.
    """

    shape: str
    dtype: torch.dtype = torch.bfloat16

    op: ClassVar[str]
    arguments: ClassVar[tuple[str, ...]]
    outputs: ClassVar[tuple[str, ...]]
    directions: ClassVar[tuple[str, ...]] = DIRECTIONS

    @property
    def sizes(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("shape", "dtype")}

    @abc.abstractmethod
    def draw(self, device: str) -> Call:
        """Random tensors in the memory order that training code has."""

    @abc.abstractmethod
    def least_bytes(self) -> tuple[int, int]:
        """Bytes of the forward and of the backward if every input is read once and every output written once."""

    def bytes(self, direction: str) -> int:
        """The least bytes that `direction` moves."""
        return _of(direction, self.least_bytes())

    def least_flops(self) -> tuple[int, int]:
        """FLOPs of the matrix products of the forward and of the backward."""
        return 0, 0

    def flops(self, direction: str) -> int:
        return _of(direction, self.least_flops())

    @abc.abstractmethod
    def reference(self, *args: torch.Tensor) -> Any:
        """The op by llama_kernels.reference, on the arguments of a piece and in their dtype."""

    @abc.abstractmethod
    def plain(self, *args: torch.Tensor) -> Any:
        """The op as a model's code writes it in plain PyTorch, on the arguments of a piece."""

    @abc.abstractmethod
    def pieces(self, call: Call) -> Iterator[Piece]:
        """Pieces small enough for float64. Together they make up what `judged` returns."""

    def judged(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """The part of a result that is compared with float64."""
        return x

    def truth(self, call: Call) -> Results:
        """The results of `reference` in float64."""
        return self._assemble(call, self.reference, torch.float64)

    def yardstick(self, call: Call) -> Results:
        """The results of `plain` in the work's dtype, whose errors set the limit for those of a provider."""
        return self._assemble(call, self.plain, self.dtype)

    def _assemble(self, call: Call, f: Function, dtype: torch.dtype) -> Results:
        gradients = tuple("d" + name for name in self.arguments)
        likes = dict(zip(self.outputs, call.grads, strict=True)) | dict(zip(gradients, call.args, strict=True))
        whole = {name: torch.zeros_like(self.judged(name, x), dtype=torch.float64) for name, x in likes.items()}
        backward = "backward" in self.directions
        for piece in self.pieces(call):
            args, grads = (tuple(x.to(dtype) for x in tensors) for tensors in piece.call)
            results = compute(self, f, Call(args, grads), backward)
            where = zip((*self.outputs, *gradients), (*piece.outputs, *piece.arguments), strict=True)
            for name, index in where:
                if name in results:
                    whole[name][index] += results[name].double()
        return whole if backward else {name: whole[name] for name in self.outputs}


def _of(direction: str, each: tuple[int, int]) -> int:
    forward, backward = each
    return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


def compute(work: Work, f: Function, call: Call, backward: bool) -> Results:
    """Outputs and, with `backward`, the gradients of all arguments. The tensors of `call` are not changed."""
    args = tuple(x.detach().clone().requires_grad_(backward) for x in call.args)
    grads = tuple(g.clone() for g in call.grads)
    outputs = as_tuple(f(*args))
    results = {name: y.detach() for name, y in zip(work.outputs, outputs, strict=True)}
    if backward:
        # Copied before the backward, because some peers write gradients over the outputs.
        results = {name: y.clone() for name, y in results.items()}
        for name, g in zip(work.arguments, torch.autograd.grad(outputs, args, grads), strict=True):
            results["d" + name] = g
    return results


def as_tuple(outputs: Any) -> tuple[torch.Tensor, ...]:
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)
