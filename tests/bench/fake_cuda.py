"""An imitation of torch.cuda for tests of the bench's clock. A capture that fails leaves the state of torch 2.11."""

from __future__ import annotations

import contextlib
import types
import warnings

import torch

from bench.measuring import capture


class _Generator:
    """A generator, or a state of one. torch 2.11 leaves `state.capturing` set after a failed capture."""

    def __init__(self, state=None):
        self.state = state or types.SimpleNamespace(capturing=False)

    def clone_state(self):
        return _Generator()

    def graphsafe_get_state(self):
        return _Generator(self.state)

    def graphsafe_set_state(self, other):
        self.state = other.state


class FakeCuda:
    """Replaces what the clock uses of torch.cuda. `now` is the time of the imitated device in milliseconds.

    As in torch 2.11, `graph.__exit__` restores the current stream, the generator and the allocator only if the capture
    is valid. A call that waits makes it invalid. `empty_cache` fails while the allocator has a capture under way.
    """

    def __init__(self, monkeypatch) -> None:
        fake = self
        fake.now, fake.busy, fake.mode = 0.0, False, 0
        fake.graphs, fake.underway, fake.released = [], [], []
        fake.capturing, fake.valid, fake.empty = None, True, False
        fake.generator = _Generator()
        fake.default = fake.current = object()

        class Event:
            def __init__(self, enable_timing=False):
                pass

            def record(self):
                self.at = fake.now

            def query(self):
                return not fake.busy

            def synchronize(self):
                fake.busy = False

            def elapsed_time(self, end):
                return end.at - self.at

        class CUDAGraph:
            def __init__(self):
                self.calls = []
                fake.graphs.append(self)

            def replay(self):
                for call in self.calls:
                    call()

        class Stream:
            def wait_stream(self, other):
                pass

        class Graph:
            def __init__(self, graph, pool, stream):
                self.graph, self.pool, self.stream = graph, pool, stream

            def __enter__(self):
                fake.empty_cache()
                self.before, fake.current = fake.current, self.stream
                if fake.generator.state.capturing:
                    raise RuntimeError("the generator is in capture mode")
                fake.generator.state.capturing, fake.capturing, fake.valid = True, self.graph, True
                fake.underway.append(self.pool)

            def __exit__(self, *_):
                fake.capturing = None
                if not fake.valid:
                    raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
                if fake.empty:
                    warnings.warn("The CUDA Graph is empty.", stacklevel=2)
                fake.generator.state.capturing, fake.current = False, self.before
                fake.underway.remove(self.pool)

        @contextlib.contextmanager
        def on(stream):
            before, fake.current = fake.current, stream
            yield
            fake.current = before

        def randn(*shape, device):
            if fake.generator.state.capturing:
                raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
            return torch.ones(*shape)

        def end_allocation(device, pool):
            if pool not in fake.underway:
                raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
            fake.underway.remove(pool)

        pools = iter(range(1000))
        names = {
            "Event": Event, "CUDAGraph": CUDAGraph, "Stream": Stream, "graph": Graph, "stream": on,
            "set_stream": lambda stream: setattr(fake, "current", stream), "current_stream": lambda: fake.current,
            "default_stream": lambda: fake.default, "synchronize": lambda: setattr(fake, "busy", False),
            "current_device": lambda: 0, "_sleep": lambda cycles: fake.sleep(),
            "default_generators": (fake.generator,), "graph_pool_handle": lambda: (0, next(pools)),
            "empty_cache": fake.empty_cache, "get_sync_debug_mode": lambda: fake.mode,
            "set_sync_debug_mode": lambda mode: setattr(fake, "mode", {"default": 0, "error": 2}.get(mode, mode)),
            "get_device_properties": lambda _: types.SimpleNamespace(L2_cache_size=1000),
        }  # fmt: skip
        for name, x in names.items():
            monkeypatch.setattr(torch.cuda, name, x, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_allocation, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda _, pool: fake.released.append(pool), raising=False)
        monkeypatch.setattr(capture.torch, "randn", randn)
        monkeypatch.setattr(capture.torch, "zeros", lambda n, device, new=torch.zeros: new(n))

    def sleep(self):
        self.now += 5
        self.busy = True

    def empty_cache(self):
        if self.underway:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    def work(self, ms: float, waits: str | None = None, fails_in_capture: bool = False):
        """A call that takes `ms`. It may wait for the device: as PyTorch does ("torch") or as an extension does."""

        def call():
            if waits == "torch" and self.mode == 2:
                raise RuntimeError("called a synchronizing CUDA operation")
            if self.capturing is None:
                self.now += ms
                self.busy = self.busy and not waits
            elif waits or fails_in_capture:
                self.valid = False
                raise RuntimeError("operation not permitted when stream is capturing")
            else:
                self.capturing.calls.append(lambda: setattr(self, "now", self.now + ms))

        return call
