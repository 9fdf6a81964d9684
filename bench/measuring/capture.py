"""CUDA graph capture of code that may not support it.

A capture that fails can leave a process unable to use the GPU. Three functions guard against that:

1. `host_wait` finds calls that wait for the GPU, which cannot be captured. No capture of them is tried.
2. `capture` restores the current stream, the random generator and the allocator after any failure. `torch.cuda.graph`
   restores them only where `cudaStreamEndCapture` succeeds. Otherwise the capture stream stays the current stream. The
   generator of torch 2.11 and older stays in capture mode, so that every later draw fails (pytorch/pytorch#171263). The
   allocator still has a capture under way, so that `torch.cuda.empty_cache` and every later capture fail.
3. `gpu_fault` tests afterwards whether the process can still measure. If it cannot, because a release of torch keeps
   more state than `capture` restores or because the error is permanent, the run continues in a new process
   (processes.py).
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch

Calls = Sequence[Callable[[], object]]

CYCLES_A_MS = 2_000_000  # GPU cycles a millisecond at 2 GHz; at a lower clock a sleep only takes longer
BUSY_MS = 5.0  # the shortest time for which the GPU is kept busy, to see whether a call waits for it
MOST_BUSY_MS = 500.0


def brief(e: BaseException) -> str:
    """The type and the first line of `e`, at most 160 characters."""
    if isinstance(e, torch.cuda.OutOfMemoryError):
        return "out of memory"
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    text = f"{type(e).__name__}: {lines[0]}" if lines else type(e).__name__
    return text if len(text) <= 160 else text[:157] + "..."


class Lost(RuntimeError):
    """This process can no longer measure on its GPU."""


# --- waiting ---------------------------------------------------------------------------------------------------------


def host_wait(calls: Calls, stream: torch.cuda.Stream) -> str | None:
    """Run `calls` and return how they make the host wait for the GPU, or None if they do not.

    The first call must have run before. PyTorch's own waits (`.item()`, `.cpu()`, `nonzero`, ...) raise an error under
    `set_sync_debug_mode("error")`. That mode does not see `torch.cuda.synchronize`, events, or the waits of an
    extension. So the first call runs once more while `stream` is busy. If the stream is idle when the call returns,
    either the call waited, or it took longer than the stream was busy; a second try with more time tells which.
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
    """The capture recorded no launch."""


def capture(run: Callable[[], object], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """Capture the launches of `run` on `stream` and return the graph.

    Raises what `run` or the capture raises, and EmptyCapture. The current stream, the default generator and the
    allocator are restored in every case:

    - the current stream is set again;
    - the capture uses a copy of the generator's state, and the generator gets its own state back;
    - the graph's memory pool is created here, so that a failed capture's allocation to it can be ended.
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
    """End the allocation of a failed capture to its pool. PyTorch has no public function for this."""
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except (AttributeError, RuntimeError):
        return  # the capture ended it, and its graph releases the pool; or this torch has no such function
    torch._C._cuda_releasePool(device, pool)


# --- the process -----------------------------------------------------------------------------------------------------


def gpu_fault(device: str) -> str | None:
    """Why this process can no longer measure on `device`; None if it can. Always None on a CPU.

    On a GPU, everything that a measurement needs is tried once: random numbers, the allocator, a capture and a replay.
    """
    if torch.device(device).type != "cuda":
        return None
    try:
        torch.cuda.synchronize()
        if torch.cuda.current_stream() != torch.cuda.default_stream():
            return "a stream other than the default one stayed the current stream"
        torch.cuda.empty_cache()
        x, y = torch.randn(256, device=device), torch.zeros(256, device=device)
        graph = capture(lambda: torch.add(x, x, out=y), torch.cuda.Stream())
        graph.replay()
        torch.cuda.synchronize()
        return None if torch.equal(x + x, y) else "a captured graph computed wrong numbers"
    except Exception as e:
        return brief(e)
