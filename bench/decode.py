"""Decoding on a GPU: `python -m bench.decode [--json FILE]`. One query a head against a cache, ours and PyTorch's SDPA.

Each call is timed with CUDA events from a CUDA graph, over caches rotated so that together they exceed the L2, after
warm-up, ours and theirs in turn; medians. Parity comes first: a provider that is off is shown as such and not timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import triton

import llama_kernels as lk

SHAPES = [(1, 1024), (1, 4096), (1, 32768), (1, 131072), (16, 1024), (16, 4096), (16, 32768), (64, 4096)]
HEADS, KV_HEADS, D = 32, 8, 128  # Llama 3.1 8B
ROTATED_BYTES = 256 * 2**20  # several times any L2
ROUNDS = 20

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def providers() -> dict[str, Attention]:
    return {
        "llama_kernels": lk.attention,
        "sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        # What Transformers does where SDPA has no GQA kernel for the mask: k and v repeated in memory.
        "sdpa, repeated": lambda q, k, v: F.scaled_dot_product_attention(
            q, *(x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
        ),
    }


def captured(attend: Attention, caches: list[tuple[torch.Tensor, ...]]) -> torch.cuda.CUDAGraph:
    """One call for each of `caches`."""
    for cache in caches[:2]:
        attend(*cache)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for cache in caches:
            attend(*cache)
    return graph


def microseconds(graph: torch.cuda.CUDAGraph, calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / calls


def measure(B: int, Sk: int) -> list[dict[str, object]]:
    size = 2 * B * KV_HEADS * Sk * D * 2  # bytes of k and v
    count = max(2, -(-ROTATED_BYTES // size))
    shapes = ((B, HEADS, 1, D), (B, KV_HEADS, Sk, D), (B, KV_HEADS, Sk, D))
    caches = [tuple(torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shapes) for _ in range(count)]
    truth = lk.reference.attention(*(x.double() for x in caches[0]))
    records, graphs = [], {}
    for name, attend in providers().items():
        record = {"op": "decode", "B": B, "Sk": Sk, "heads": HEADS, "kv_heads": KV_HEADS, "D": D, "provider": name}
        records.append(record)
        try:
            error = ((attend(*caches[0]).double() - truth).norm() / truth.norm()).item()
            record["error"] = error
            if error > 1e-2:
                record["reason"] = "wrong numbers"
                continue
            graphs[name] = captured(attend, caches)
        except RuntimeError as failure:
            record["reason"] = str(failure).splitlines()[0]
    samples = {name: [] for name in graphs}
    for _, (name, graph) in itertools.product(range(ROUNDS), graphs.items()):
        samples[name].append(microseconds(graph, count))
    for record in records:
        if times := samples.get(record["provider"]):
            record["us"] = statistics.median(times[3:])
            record["spread"] = (max(times[3:]) - min(times[3:])) / record["us"]
            record["GB/s"] = size / record["us"] / 1e3
    return records


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.decode", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the records there too")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.decode: no GPU here, and a time from a CPU would say nothing. `make codegen` needs none.")
        return 1
    records = []
    for B, Sk in SHAPES:
        for r in measure(B, Sk):
            shown = f"{r['us']:9.1f} us {r['GB/s']:7.0f} GB/s" if "us" in r else r["reason"]
            print(f"B={B:<3} Sk={Sk:<7} {r['provider']:16} {shown}", flush=True)
            records.append(r)
    if args.json:
        about = {"torch": torch.__version__, "triton": triton.__version__, "gpu": torch.cuda.get_device_name()}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**about, "records": records}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
