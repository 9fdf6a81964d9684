"""What is measured: an op at a shape in a dtype, the fewest bytes and FLOPs it takes, and its truth in float64."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch

DIRECTIONS = ("forward", "backward", "both")
UNIT = {torch.bfloat16: 1.7e-3, torch.float16: 2.1e-4, torch.float32: 2.5e-7}  # relative error of one rounding

Function = Callable[..., Any]  # an op: arguments -> its output, or a tuple of them
Results = dict[str, torch.Tensor]  # outputs by name; gradients by "d" and the argument's name


class Model(NamedTuple):
    """The widths of a published model. `window`: keys that a query of its sliding layers sees, itself among them.
    `qk_norm`: the heads of q and k are normed."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    window: int = -1
    qk_norm: bool = False


MODELS = {
    "Llama 3.2 1B": Model(2048, 8192, 16, 32, 8, 64, 128256),
    "Llama 3.1 8B": Model(4096, 14336, 32, 32, 8, 128, 128256),
    "Llama 3.1 70B": Model(8192, 28672, 80, 64, 8, 128, 128256),
    "Llama 3.1 405B": Model(16384, 53248, 126, 128, 8, 128, 128256),
    "Qwen3 8B": Model(4096, 12288, 36, 32, 8, 128, 151936, qk_norm=True),
    "Gemma 3 12B": Model(3840, 15360, 48, 16, 8, 256, 262208, window=1024, qk_norm=True),
}


def models_by(*fields: str) -> Iterator[tuple[str, Model]]:
    """The models that differ in `fields`, under the names of all that are alike."""
    alike: dict[tuple[int, ...], list[str]] = {}
    for name, m in MODELS.items():
        alike.setdefault(tuple(getattr(m, field) for field in fields), []).append(name)
    for names in alike.values():
        yield ", ".join(names), MODELS[names[0]]


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
    def bytes(self, direction: str) -> int:
        """The floor: every input read once, every output written once."""

    def flops(self, direction: str) -> int:
        """Of the matrix products."""
        return 0

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


# --- parity ----------------------------------------------------------------------------------------------------------


def relative_errors(x: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """Frobenius norm of the error over that of the truth, and the worst row's, over its own or the typical row's."""
    error = x.double() - truth
    tiny = torch.finfo(torch.float64).tiny
    bulk = error.norm() / truth.norm().clamp_min(tiny)
    if truth.ndim < 2:
        return bulk.item(), bulk.item()
    size = truth.norm(dim=-1)
    floor = size.square().mean().sqrt()  # a row that cancels to nearly nothing has no relative error to speak of
    return bulk.item(), (error.norm(dim=-1) / size.clamp_min(floor).clamp_min(tiny)).max().item()


def errors(work: Work, results: Results, truth: Results) -> dict[str, tuple[float, float]]:
    """By name: relative error of the whole, and of the worst row."""
    return {name: relative_errors(work.judged(name, results[name]), truth[name]) for name in truth}


def disparity(
    work: Work, results: Results, truth: Results, theirs: dict[str, tuple[float, float]]
) -> tuple[float, str | None]:
    """The largest relative error of `results`, and why they are wrong, or None.

    Right is twice the error of plain PyTorch in the same dtype and two roundings; the worst row, eight. `theirs` are
    those errors. It is the bar for being timed; how good a provider is beyond it, its error says beside its speed.
    """
    for name, exact in truth.items():
        shape = work.judged(name, results[name]).shape
        if shape != exact.shape:
            return float("nan"), f"wrong shape: {name} is {tuple(shape)}, not {tuple(exact.shape)}"
    ours, u = errors(work, results, truth), UNIT[work.dtype]
    worst = max((bulk for bulk, _ in ours.values()), key=lambda e: (e != e, e))
    for name, (bulk, row) in ours.items():
        bars = 2 * theirs[name][0] + 2 * u, 2 * theirs[name][1] + 8 * u
        for error, bar, what in ((bulk, bars[0], name), (row, bars[1], f"a row of {name}")):
            if not error <= bar:  # NaN is wrong too
                return worst, f"wrong numbers: {what} is off by {error:.1e}, allowed {bar:.1e}"
    return worst, None
