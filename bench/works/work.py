"""What is measured: an op at a shape in a dtype, the fewest bytes and FLOPs it takes, and its float64 results."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch

DIRECTIONS = ("forward", "backward", "both")

Function = Callable[..., Any]  # an op: arguments -> its output, or a tuple of them
Results = dict[str, torch.Tensor]  # outputs by name; gradients by "d" and the argument's name


class Call(NamedTuple):
    """The tensors of one call, and the gradients of its outputs."""

    args: tuple[torch.Tensor, ...]
    grads: tuple[torch.Tensor, ...]


class Piece(NamedTuple):
    """A part of a call that can be computed alone, and where in the whole its outputs and its gradients lie."""

    call: Call
    outputs: tuple[Any, ...]
    arguments: tuple[Any, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work(abc.ABC):
    """An op at one shape. Subclasses add its sizes as fields.

    A provider of the op is a function of `arguments` that gives `outputs`. `shape` is a name for people.
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
        """Random tensors, in the memory order that training code gives them."""

    @abc.abstractmethod
    def least_bytes(self) -> tuple[int, int]:
        """Of a forward and of a backward: every input read once, every output written once."""

    def bytes(self, direction: str) -> int:
        """The least bytes that `direction` moves: the floor of memory-bound work."""
        return _of(direction, self.least_bytes())

    def least_flops(self) -> tuple[int, int]:
        """Of the matrix products of a forward and of a backward."""
        return 0, 0

    def flops(self, direction: str) -> int:
        return _of(direction, self.least_flops())

    @abc.abstractmethod
    def reference(self, *args: torch.Tensor) -> Any:
        """A piece by llama_kernels.reference, in the dtype of its arguments."""

    @abc.abstractmethod
    def plain(self, *args: torch.Tensor) -> Any:
        """A piece as a model's code writes it in PyTorch, one op after another."""

    @abc.abstractmethod
    def pieces(self, call: Call) -> Iterator[Piece]:
        """Parts small enough for float64; together they are what `judged` picks."""

    def judged(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """The part of a result that is compared with the truth."""
        return x

    def truth(self, call: Call) -> Results:
        return self._assemble(call, self.reference, torch.float64)

    def yardstick(self, call: Call) -> Results:
        """The same by `plain` in the work's own dtype: whose error is the measure of a provider's."""
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
    """Outputs and, with `backward`, the gradients of all arguments. The tensors of `call` stay as they are."""
    args = tuple(x.detach().clone().requires_grad_(backward) for x in call.args)
    grads = tuple(g.clone() for g in call.grads)
    outputs = as_tuple(f(*args))
    results = {name: y.detach() for name, y in zip(work.outputs, outputs, strict=True)}
    if backward:
        # Copies first: some peers write a gradient over the output's.
        results = {name: y.clone() for name, y in results.items()}
        for name, g in zip(work.arguments, torch.autograd.grad(outputs, args, grads), strict=True):
            results["d" + name] = g
    return results


def as_tuple(outputs: Any) -> tuple[torch.Tensor, ...]:
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)
