"""CUDA graph capture of code that we do not know.

A capture that fails can leave a process unusable, so three things guard it:

1. `host_wait` finds calls that wait for the GPU, which no graph can hold. They are never captured.
2. `capture` restores the current stream, the random generator and the allocator after any failure. `torch.cuda.graph`
   restores them only where `cudaStreamEndCapture` succeeds. Otherwise the capture stream stays the current stream. The
   generator of torch 2.11 and older stays in capture mode, so that every later draw fails (pytorch/pytorch#171263). The
   allocator believes that the capture goes on, so that `torch.cuda.empty_cache` and every later capture fail.
3. `gpu_fault` then tries what a measurement needs. If that fails, because a release of torch keeps more state than we
   restore, or because no process recovers from the error, the run goes on in a new process (processes.py).
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch

Calls = Sequence[Callable[[], object]]

CYCLES_A_MS = 2_000_000  # of the GPU's clock, at 2 GHz; slower clocks only wait longer
BUSY_MS = 5.0  # the GPU is kept busy at least this long to see whether a call waits for it
MOST_BUSY_MS = 500.0


def brief(e: BaseException) -> str:
    """One line that says what went wrong."""
    if isinstance(e, torch.cuda.OutOfMemoryError):
        return "out of memory"
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    text = f"{type(e).__name__}: {lines[0]}" if lines else type(e).__name__
    return text if len(text) <= 160 else text[:157] + "..."


class Lost(RuntimeError):
    """This process can no longer measure on its GPU."""


# --- waiting ---------------------------------------------------------------------------------------------------------


def host_wait(calls: Calls, stream: torch.cuda.Stream) -> str | None:
    """Run `calls`, the first of which has run before; how they make the host wait for the GPU, or None if they do not.

    PyTorch's own waits (`.item()`, `.cpu()`, `nonzero`, ...) raise an error under `set_sync_debug_mode("error")`. That
    mode does not see `torch.cuda.synchronize`, events, or the waits of an extension. So the first call runs once more
    while `stream` is busy: if the stream is idle when the call returns, the call has waited, or took longer than the
    stream was busy, which a second try with more time tells apart.
    """
    with torch.cuda.stream(stream):
        try:
            with _sync_debug_mode("error"):
                for call in calls:
                    call()
        except RuntimeError as e:
            if "synchronizing CUDA operation" not in str(e):
                raise
            return "the host waits for the GPU (PyTorch: called a synchronizing CUDA operation)"
        if _waits(calls[0], BUSY_MS) and _waits(calls[0], 10 * BUSY_MS):
            return "the host waits for the GPU (a call returned only after earlier work had ended)"
    return None


def _waits(call: Callable[[], object], least_ms: float) -> bool:
    """Whether `call` returns only when the current stream is idle."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    host_ms = 1e3 * (time.perf_counter() - start)
    torch.cuda.synchronize()
    torch.cuda._sleep(int(CYCLES_A_MS * min(max(least_ms, 4 * host_ms), MOST_BUSY_MS)))
    busy = torch.cuda.Event()
    busy.record()
    call()
    waited = busy.query()
    torch.cuda.synchronize()
    return waited


@contextlib.contextmanager
def _sync_debug_mode(mode: str) -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


# --- capture ---------------------------------------------------------------------------------------------------------


class EmptyCapture(RuntimeError):
    """Nothing was launched on the stream of the capture."""


def capture(run: Callable[[], object], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """The launches of `run` as a graph, captured on `stream`.

    Raises what `run` or the capture raises, and EmptyCapture. Afterwards, however it ended, the current stream, the
    default generator and the allocator are as before:

    - the stream is set again;
    - the generator lends the capture a copy of its state, and gets its own state back;
    - the graph's memory pool is named by us, so that allocation to it can be ended where the capture did not.
    """
    device, current = torch.cuda.current_device(), torch.cuda.current_stream()
    generator = torch.cuda.default_generators[device]
    own_state = generator.graphsafe_get_state()
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    generator.graphsafe_set_state(generator.clone_state())
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                run()
    except BaseException:
        _end_allocation(device, pool)
        raise
    finally:
        torch.cuda.set_stream(current)
        generator.graphsafe_set_state(own_state)
    if any("CUDA Graph is empty" in str(warning.message) for warning in said):
        raise EmptyCapture("nothing was launched on the current stream; work on another stream cannot be timed")
    return graph


def _end_allocation(device: int, pool: tuple[int, int]) -> None:
    """Of a failed capture, to its pool. PyTorch has no public name for this."""
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except (AttributeError, RuntimeError):
        return  # ended by the capture itself, whose graph releases the pool; or no longer known by this name
    torch._C._cuda_releasePool(device, pool)


# --- the process -----------------------------------------------------------------------------------------------------


def gpu_fault(device: str) -> str | None:
    """Why this process can no longer measure on `device`, or None.

    On a GPU, what a measurement needs is tried once: random numbers, the allocator, a capture and a replay. A CPU has
    no such faults.
    """
    if torch.device(device).type != "cuda":
        return None
    try:
        torch.cuda.synchronize()
        if torch.cuda.current_stream() != torch.cuda.default_stream():
            return "another stream than the default one stayed the current stream"
        torch.cuda.empty_cache()
        x, y = torch.randn(256, device=device), torch.zeros(256, device=device)
        graph = capture(lambda: torch.add(x, x, out=y), torch.cuda.Stream())
        graph.replay()
        torch.cuda.synchronize()
        return None if torch.equal(x + x, y) else "a captured graph computed wrong numbers"
    except Exception as e:
        return brief(e)
