"""`python -m llama_kernels --check`: the parity check of the ops on this machine, forward and gradients.

Each call runs three times, the second and third time with uninitialized memory filled with NaN. rule.py compares the
first two results with float64 and with plain PyTorch. The last two must be equal bit for bit.
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
from llama_kernels.diagnose import cases
from llama_kernels.diagnose.cases import Case, Sizes
from llama_kernels.diagnose.environment import described, without_home
from llama_kernels.diagnose.rule import Verdict, compare

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Row(NamedTuple):
    """One call in one dtype. The errors are those of `nearest`, the tensor whose error is nearest to its bound."""

    call: str
    dtype: str
    nearest: str  # a result, or the gradient of an argument
    error: float | None  # None: the result is not finite, or the call raised
    eager: float | None  # the error of plain PyTorch
    first_call: float | None  # seconds of forward and backward, including compilation
    faults: list[str]

    @property
    def passed(self) -> bool:
        return not self.faults


def run(device: torch.device, only: list[str] | None = None) -> Iterator[Row]:
    """Check each call in each dtype on `device`, and yield its row. `only`: the ops to check. Default: all."""
    sizes = cases.IN_INTERPRETER if language.INTERPRETED else cases.ON_GPU if device.type == "cuda" else cases.ON_CPU
    with _full_precision():
        for case in cases.CASES:
            for dtype in DTYPES if not only or case.op in only else ():
                yield _row(case, dtype, device, sizes)


def what_is_checked(device: torch.device) -> str:
    """Which code the check runs on `device`, and what its result means."""
    if language.INTERPRETED:
        return "the kernels in Triton's interpreter, on small inputs.\nThis shows nothing about compiled code."
    if device.type == "cuda":
        return "the kernels, compiled for this GPU."
    return (
        "the plain PyTorch code that CPU tensors run.\n"
        "This shows nothing about the kernels. To check them in Triton's interpreter, set TRITON_INTERPRET=1."
    )


def _row(case: Case, dtype: torch.dtype, device: torch.device, sizes: Sizes) -> Row:
    row = Row(case.label, str(dtype).removeprefix("torch."), "", None, None, None, [])
    try:
        return row._replace(**_checked(case, dtype, device, sizes))
    except Exception as error:
        return row._replace(faults=[without_home(described(error))])


def _checked(case: Case, dtype: torch.dtype, device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """The fields of the row, other than call and dtype."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    inputs = case.inputs(sizes, normal)
    exact = {n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in inputs.items()}
    ours, reference = (getattr(module, case.op) for module in (llama_kernels, llama_kernels.reference))
    grads = [normal(*x.shape) for x in _outputs(reference, case, exact)[0]] if case.differentiable else []

    start = time.perf_counter()
    results = _results(ours, case, inputs, grads)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
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
    error, eager_error = (x if math.isfinite(x) else None for x in verdicts[nearest][:2])
    return {"nearest": nearest, "error": error, "eager": eager_error, "first_call": first_call, "faults": faults}


def _share(verdict: Verdict) -> float:
    """The error as a share of its bound."""
    return float("inf") if verdict.fault else verdict.error / verdict.bound


def _outputs(
    function: Callable[..., Any], case: Case, inputs: dict[str, Any]
) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """The results of a call with copies of `inputs`, and the copies."""
    copies = {name: x.detach().clone() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    for name in case.differentiable:
        copies[name].requires_grad_()
    outputs = function(**copies)
    return outputs if isinstance(outputs, tuple) else (outputs,), copies


def _results(
    function: Callable[..., Any], case: Case, inputs: dict[str, Any], grads: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The outputs, arguments written in place, and gradients of the differentiable arguments, by name."""
    outputs, copies = _outputs(function, case, inputs)
    results = dict(zip(case.outputs, outputs, strict=True))
    results |= {name: copies[name] for name in case.written}
    if case.differentiable:
        of = torch.autograd.grad(outputs, [copies[name] for name in case.differentiable], grads)
        results |= {f"gradient of {name}": grad for name, grad in zip(case.differentiable, of, strict=True)}
    return {name: x.detach() for name, x in results.items()}


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """A context without TF32 and warnings, with gradients enabled."""
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
    """A context that fills uninitialized memory with NaN. torch does it only with deterministic algorithms."""
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
    """The lines above the table: what is checked, and the column names."""
    columns = _COLUMNS.format("call", "dtype", "error", "eager", "first call", "")
    return f"parity on {device}: {what_is_checked(device)}\n\n{columns.rstrip()}"


def line(row: Row) -> str:
    """A row of the table."""
    numbers = [f"{x:.2g}" if x is not None else "" for x in (row.error, row.eager)]
    seconds = f"{row.first_call:.2f} s" if row.first_call is not None else ""
    outcome = f"passed ({row.nearest})" if row.passed else f"FAILED: {'; '.join(row.faults)}"
    return _COLUMNS.format(row.call, row.dtype, *numbers, seconds, outcome)


def closing(rows: list[Row]) -> str:
    """The outcome, and what the columns mean."""
    failed = sum(not row.passed for row in rows)
    outcome = f"{failed} of {len(rows)} calls FAILED" if failed else f"all {len(rows)} calls passed"
    return f"\n{outcome}.\n{_LEGEND}"


_LEGEND = """\
error, eager: the relative errors of the op and of plain PyTorch in the same dtype, against float64. They are those of
  the result or gradient in brackets, whose error is nearest to its bound. A call also fails if one row is wrong, if an
  element is not written, or if two runs differ in any bit.
first call: time of forward and backward, including compilation of kernels that are not in Triton's cache."""
