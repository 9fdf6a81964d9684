"""CPU tensors against stock: generation with small Llamas, and the ops of a decoding step: `python -m bench.cpu`.

Ours and stock alternate in one process. A figure is the least of several runs, in CPU time with one thread and in
elapsed time with more. Compare the ratios: the times are those of this machine.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

import llama_kernels as lk
from llama_kernels.integrations.transformers import patch

Call = Callable[[], Any]

# hidden size, layers, query heads, key heads, hidden size of the MLP
MODELS = {"30 layers of 576": (576, 30, 9, 3, 1536), "4 layers of 2,048": (2048, 4, 32, 8, 8192)}
PROMPTS = ((1, 32), (1, 512), (4, 32), (4, 256))  # sequences and tokens; several are padded on the left
TOKENS = 32


def least(runs: list[Call], rounds: int, calls: int) -> list[float]:
    """Seconds of a call of each of `runs`: the least over `rounds` of `calls` calls, which alternate."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    best = [float("inf")] * len(runs)
    for run in runs:
        run()
    for _ in range(rounds):
        for i, run in enumerate(runs):
            start = clock()
            for _ in range(calls):
                run()
            best[i] = min(best[i], (clock() - start) / calls)
    return best


def ops() -> Iterator[tuple[str, Call, Call]]:
    """(name, stock, ours) of the ops of a decoding step of one token, in torch's default dtype."""
    norm, x, residual = LlamaRMSNorm(576), torch.randn(1, 1, 576), torch.randn(1, 1, 576)
    yield "rms_norm", lambda: norm(x), lambda: lk.rms_norm(x, norm.weight)
    yield "add_rms_norm", lambda: norm(residual + x), lambda: lk.add_rms_norm(x, residual, norm.weight)
    q, k, v = (torch.randn(1, 1, H, 64).transpose(1, 2) for H in (9, 3, 3))
    cos, sin = torch.randn(2, 1, 1, 64)
    yield "rope", lambda: apply_rotary_pos_emb(q, k, cos, sin), lambda: lk.rope(q, k, cos, sin)
    of_q, of_k = LlamaRMSNorm(64), LlamaRMSNorm(64)
    yield (
        "qk_norm_rope",
        lambda: apply_rotary_pos_emb(of_q(q), of_k(k), cos, sin),
        lambda: lk.qk_norm_rope(q, k, of_q.weight, of_k.weight, cos, sin),
    )
    caches, slot = torch.randn(2, 1, 3, 512, 64), torch.tensor([100])

    def into_cache() -> torch.Tensor:  # as Transformers' StaticCache does
        rotated_q, rotated_k = apply_rotary_pos_emb(q, k, cos, sin)
        for cache, x in zip(caches, (rotated_k, v), strict=True):
            cache.index_copy_(2, slot, x)
        return rotated_q

    yield "rope_into_cache", into_cache, lambda: lk.rope_into_cache(q, k, v, *caches, slot, cos, sin)
    for Hq, Hkv in ((9, 3), (32, 8)):
        for keys in (100, 1000):
            yield f"attention, {Hq}/{Hkv} heads, {keys} keys", *_attention(1, Hq, Hkv, keys)
            yield f"attention, {Hq}/{Hkv} heads, {keys} keys, 4 padded", *_attention(4, Hq, Hkv, keys)


def _attention(B: int, Hq: int, Hkv: int, keys: int) -> tuple[Call, Call]:
    q = torch.randn(B, 1, Hq, 64).transpose(1, 2)
    k, v = torch.randn(2, B, Hkv, keys, 64)
    if B == 1:
        return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), lambda: lk.attention(q, k, v)
    start = torch.arange(B, dtype=torch.int32)[:, None] * 10
    mask = (torch.arange(keys) >= start)[:, None, None]

    layer: Any = SimpleNamespace(num_key_value_groups=Hq // Hkv, is_causal=True)
    return lambda: sdpa_attention_forward(layer, q, k, v, mask), lambda: lk.attention(q, k, v, kv_start=start)


def model_of(hidden: int, layers: int, Hq: int, Hkv: int, of_mlp: int) -> Any:
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=Hq, num_key_value_heads=Hkv,
        intermediate_size=of_mlp, vocab_size=8192, tie_word_embeddings=True, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def with_its_weights(model: Any) -> Any:
    """Another model with the same tensors: a copy of the weights, elsewhere in memory, may take longer to read."""
    return copy.deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers())})


def generations(models: list[Any], B: int, S: int, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of the first token of each of `models`, prefill included, and of a decoding step after it."""
    ids = torch.randint(1, 8192, (B, S))
    mask = torch.ones_like(ids)
    for b in range(B):
        mask[b, : S // 8 * b] = 0

    def generate(model: Any, tokens: int) -> Call:
        return lambda: model.generate(
            ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
        )

    runs = [generate(model, tokens) for model in models for tokens in (1, 1 + TOKENS)]
    seconds = least(runs, rounds, 1)
    first, all_tokens = seconds[::2], seconds[1::2]
    return first, [(long - short) / TOKENS for short, long in zip(first, all_tokens, strict=True)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.set_default_dtype(getattr(torch, args.dtype))
    print(f"{'':44}{'stock':>10}{'ours':>10}   ratio")
    with torch.no_grad():
        for name, *runs in ops():
            stock, ours = least(runs, 5 * args.rounds, 30)
            print(f"{name:44}{stock * 1e6:7.1f} us{ours * 1e6:7.1f} us{ours / stock:8.2f}", flush=True)
    for name, sizes in MODELS.items():
        model = model_of(*sizes)
        models = [model, patch(with_its_weights(model))]
        for B, S in PROMPTS:
            for what, (stock, ours) in zip(("first", "step"), generations(models, B, S, args.rounds), strict=True):
                row = f"{what}, {name}, batch {B}, {S} tokens"
                print(f"{row:44}{stock * 1e3:7.2f} ms{ours * 1e3:7.2f} ms{ours / stock:8.2f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
