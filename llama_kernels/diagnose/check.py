"""`python -m llama_kernels --check`: the parity check of every op on this machine, forward and gradients.

Each call runs three times, the second and third with uninitialised memory filled with NaN. rule.py compares the first
two results with float64 and eager code. The last two must be equal bit for bit.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

import llama_kernels
from llama_kernels.core import language
from llama_kernels.diagnose import cases as calls
from llama_kernels.diagnose.environment import described, without_home
from llama_kernels.diagnose.rule import Verdict, compare

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Row(NamedTuple):
    """One call in one dtype. The errors are those of the tensor that came nearest to its bound."""

    call: str
    dtype: str
    nearest: str  # the tensor that came nearest: a result, or the gradient of an argument
    error: float | None  # None: the result is not finite
    eager: float | None
    first_call: float | None  # seconds for forward and backward, with compilation of what is not in Triton's cache
    faults: list[str]

    @property
    def passed(self) -> bool:
        return not self.faults


def run(device: torch.device, only: list[str] | None = None) -> Iterator[Row]:
    """Yield a row for each call and dtype on `device`, when it is done. `only`: the ops to check. Default: all."""
    sizes = calls.INTERPRETED if language.INTERPRETED else calls.ON_GPU if device.type == "cuda" else calls.ON_CPU
    with _full_precision():
        for case in calls.cases():
            for dtype in DTYPES if not only or case.op in only else ():
                yield _row(case, dtype, device, sizes)


def what_is_checked(device: torch.device) -> str:
    """Which code the check runs on `device`, and what this shows."""
    if language.INTERPRETED:
        return "the kernels in Triton's interpreter, on small inputs.\nThis shows nothing about compiled code."
    if device.type == "cuda":
        return "the kernels, compiled for this GPU."
    return (
        "the reference, which is what CPU tensors run, against itself in float64.\n"
        "This shows that it works here and rounds as it should, and nothing about the kernels: for those set "
        "TRITON_INTERPRET=1."
    )


def _row(case: calls.Case, dtype: torch.dtype, device: torch.device, sizes: calls.Sizes) -> Row:
    name = str(dtype).removeprefix("torch.")
    try:
        return _checked(case, dtype, device, sizes)
    except Exception as error:
        return Row(case.label, name, "", None, None, None, [without_home(described(error))])


def _checked(case: calls.Case, dtype: torch.dtype, device: torch.device, sizes: calls.Sizes) -> Row:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    inputs = case.inputs(sizes, normal)
    exact = {n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in inputs.items()}
    ours, reference = (getattr(module, case.op) for module in (llama_kernels, llama_kernels.reference))
    grads = [normal(*x.shape) for x in _outputs(reference, case, exact)[0]] if case.differentiable else []

    start = time.perf_counter()
    results = _results(ours, case, inputs, grads)
    _wait(device)
    first_call = time.perf_counter() - start
    with _poisoned_memory():
        again, repeated = (_results(ours, case, inputs, grads) for _ in range(2))
    truth = _results(reference, case, exact, [grad.double() for grad in grads])
    eager = _results(case.eager, case, inputs, grads)

    faults, verdicts = [], {}
    for tensor, result in results.items():
        verdicts[tensor] = verdict = compare(result, truth[tensor], eager[tensor])
        fault = verdict.fault
        if fault is None and again[tensor].isnan().any():
            fault = f"{int(again[tensor].isnan().sum())} elements are not written"
        if fault is None:
            fault = compare(again[tensor], truth[tensor], eager[tensor]).fault
        if fault is None and not torch.equal(again[tensor], repeated[tensor]):
            fault = "two runs differ"
        faults += [f"{tensor}: {fault}"] if fault else []
    nearest = max(verdicts, key=lambda tensor: _share(verdicts[tensor]))
    error, eagers = (x if math.isfinite(x) else None for x in verdicts[nearest][:2])
    name = str(dtype).removeprefix("torch.")
    return Row(case.label, name, nearest, error, eagers, first_call, faults)


def _share(verdict: Verdict) -> float:
    """The error as a share of its bound."""
    return float("inf") if verdict.fault else verdict.error / verdict.bound


def _outputs(
    function: Callable[..., Any], case: calls.Case, inputs: dict[str, Any]
) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """The results of a call with copies of `inputs`, and the copies."""
    copies = {name: x.detach().clone() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    for name in case.differentiable:
        copies[name].requires_grad_()
    outputs = function(**copies)
    return outputs if isinstance(outputs, tuple) else (outputs,), copies


def _results(
    function: Callable[..., Any], case: calls.Case, inputs: dict[str, Any], grads: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Outputs, arguments that were written in place, and gradients of the differentiable arguments, by name."""
    outputs, copies = _outputs(function, case, inputs)
    results = dict(zip(case.outputs, outputs, strict=True))
    results |= {name: copies[name] for name in case.written}
    if case.differentiable:
        of = torch.autograd.grad(outputs, [copies[name] for name in case.differentiable], grads)
        results |= {f"gradient of {name}": grad for name, grad in zip(case.differentiable, of, strict=True)}
    return {name: x.detach() for name, x in results.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Inside, eager products of float32 do not use TF32, gradients are enabled, and warnings are ignored."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Inside, uninitialised memory is filled with NaN, which torch does where algorithms are deterministic."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = filled


# --- as text ---------------------------------------------------------------------------------------------------------

_COLUMNS = "{:36}{:10}{:>10}{:>10}{:>12}  {}"


def heading(device: torch.device) -> str:
    """What is checked, then the names of the columns of `line`."""
    columns = _COLUMNS.format("call", "dtype", "error", "eager's", "first call", "")
    return f"parity on {device}: {what_is_checked(device)}\n\n{columns.rstrip()}"


def line(row: Row) -> str:
    """A row of the table."""
    numbers = [f"{x:.2g}" if x is not None else "" for x in (row.error, row.eager)]
    seconds = f"{row.first_call:.2f} s" if row.first_call is not None else ""
    said = f"passed ({row.nearest})" if row.passed else f"FAILED: {'; '.join(row.faults)}"
    return _COLUMNS.format(row.call, row.dtype, *numbers, seconds, said)


def closing(rows: list[Row]) -> str:
    """The outcome, and what the columns mean."""
    failed = sum(not row.passed for row in rows)
    outcome = f"{failed} of {len(rows)} calls FAILED" if failed else f"all {len(rows)} calls passed"
    return f"\n{outcome}.\n{_LEGEND}"


_LEGEND = """\
error, eager's: relative errors against float64, of ours and of plain PyTorch in the same dtype, for the result or
  gradient, named in brackets, that came nearest to its bound. A call also fails where a row is off, where an element
  is not written, or where two runs differ in any bit.
first call: forward and backward, compiling what was not in Triton's cache."""
