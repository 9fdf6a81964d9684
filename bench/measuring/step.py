"""One call of an op on its own tensors, and the rate that follows from its time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

import torch

from bench.measuring.records import Record
from bench.works.work import Call, Function, Work, as_tuple


class Step:
    """One call of `f` on copies of the tensors of `call`: forward, backward or both."""

    def __init__(self, f: Function, call: Call, backward: bool) -> None:
        self.f, self.outputs = f, ()
        self.args = tuple(_same_layout(x).requires_grad_(backward) for x in call.args)
        self.grads = tuple(_same_layout(g) for g in call.grads)

    def of(self, direction: str) -> Callable[[], object]:
        return getattr(self, direction)

    def forward(self) -> object:
        return self.f(*self.args)

    def forward_once(self, stream: torch.cuda.Stream | None = None) -> None:
        """Run the forward whose backward `backward` repeats, on the stream that will capture the backward."""
        with contextlib.ExitStack() as here:
            if stream is not None:
                stream.wait_stream(torch.cuda.current_stream())
                here.enter_context(torch.cuda.stream(stream))
            self.outputs = as_tuple(self.forward())

    def backward(self) -> object:
        return torch.autograd.grad(self.outputs, self.args, self.grads, retain_graph=True)

    def both(self) -> object:
        return torch.autograd.grad(as_tuple(self.forward()), self.args, self.grads)

    def forget(self) -> None:
        self.outputs = ()


def _same_layout(x: torch.Tensor) -> torch.Tensor:
    """A copy with the strides of `x`."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x.detach())


def put_rate(r: Record, work: Work, ceilings: Mapping[str, float]) -> None:
    """Fill in rate, unit, ceiling and percent, by bytes or by FLOPs: whichever takes this machine longer."""
    size, flops = work.bytes(r.direction), work.flops(r.direction)
    copy, matmul = ceilings["copy"] * 1e6, ceilings[str(work.dtype)[6:]] * 1e9  # a millisecond
    by_flops = flops / matmul > size / copy
    done, r.unit, scale = (flops, "TFLOP/s", 1e9) if by_flops else (size, "GB/s", 1e6)
    r.ceiling = ceilings[str(work.dtype)[6:] if by_flops else "copy"]
    r.rate = done / r.ms / scale
    r.percent = 100 * r.rate / r.ceiling
