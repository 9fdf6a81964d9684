"""The calls that the compile gate compiles. bench/codegen/hopper.py and ones.py have more.

The calls go to the package's launchers, so no signature of a kernel is repeated here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from bench.attention_options import attention_options
from bench.codegen import hopper, ones
from bench.codegen.compiling import TARGETS, Case
from llama_kernels.core.registry import KERNELS
from llama_kernels.ops.attention import decode
from llama_kernels.ops.attention.call import AttentionCall


def cases() -> Iterator[Case]:
    yield from _rms_norm_cases()
    yield from _rope_cases()
    yield from _qk_norm_rope_cases()
    yield from _attention_cases()
    yield from _rope_attention_cases()
    yield from _decode_cases()
    yield from hopper.cases()
    yield from ones.cases()


def _call(op: str, label: str, kernel: str, *arguments: Any, full: bool = False) -> Case:
    """A case that calls the launcher of the registered op `kernel`."""
    return Case(op, label, lambda: KERNELS[kernel](*arguments), full)


def _rms_norm_cases() -> Iterator[Case]:
    half, single = torch.bfloat16, torch.float32
    # Each row of the tile table once, and a width that is not a power of two. Similar widths only with --full.
    for N in (64, 128, 1024, 2048, 4096, 5120, 8192, 14336, 16384, 32768, 65536, 262144):
        yield from _rows_of(N, half, half, N in (64, 2048, 14336, 65536))
    for N in (128, 4096, 8192, 16384, 32768):
        yield from _rows_of(N, single, single, N not in (4096, 16384))
    for N in (16384, 32768):
        yield from _rows_of(N, half, single, N != 16384)


def _rows_of(N: int, dtype: torch.dtype, weight_dtype: torch.dtype, full: bool) -> Iterator[Case]:
    x, weight, rstd = torch.empty(64, N, dtype=dtype), torch.empty(N, dtype=weight_dtype), torch.empty(64, 1)
    for residual in (None, x):
        label = f"N={N}" + " float32" * (dtype == torch.float32) + " float32 weight" * (weight_dtype != dtype)
        label += "" if residual is None else " +residual"
        yield _call("rms_norm", label, "rms_norm_forward", x, residual, weight, 1e-6, 0.0, full=full)
        grads = (x, residual, x, weight, rstd, 1e-6, 0.0, dtype, True, True)
        yield _call("rms_norm", label, "rms_norm_backward", *grads, full=full)
    tangents = (x, x, weight, weight.clone(), rstd, 1e-6, 0.0, dtype)
    label = label.replace(" +residual", " tangent")
    yield _call("rms_norm", label, "rms_norm_tangent", *tangents, full=full)


def _rope_cases() -> Iterator[Case]:
    for D, R, Hq, Hkv in ((64, 64, 32, 8), (80, 80, 32, 32), (96, 96, 32, 8), (128, 128, 32, 8), (128, 64, 32, 8),
                          (128, 128, 32, 1), (256, 256, 8, 4)):  # fmt: skip
        for interleaved in (False, True):
            q, k, *angles = _heads(D, R, Hq, Hkv)
            label = f"D={D} R={R} heads={Hq}/{Hkv}" + " interleaved" * interleaved
            yield _call("rope", label, "rope", q, k, *angles, interleaved, False)
    q, k, *angles = _heads(128, 128, 32, 8)
    yield _call("rope", "D=128 heads=32/8 packed", "rope_qkv_backward", q, k, k, *angles, False)
    cache, slots = torch.empty(1, 8, 64, 128, dtype=q.dtype), angles[-1]
    into = (q, k, k, cache, cache, slots)
    yield _call("rope", "D=128 heads=32/8 into a cache", "rope_into_cache", *into, *angles, False)
    positions, interleaved, _, axes = _three_positions(False, False)
    several = (*angles[:2], positions, interleaved, axes)
    label = "D=128 heads=32/8 three positions a token, into a cache"
    yield _call("rope", label, "rope_into_cache", *into, *several, full=True)
    for interleaved in (False, True):
        label = "D=128 heads=32/8 an angle an element" + " interleaved" * interleaved
        yield _call("rope", label, "rope", q, k, *_wide_tables(128), slots, interleaved, True, full=interleaved)
    for interleaved in (False, True):
        label = "D=128 heads=32/8 three positions a token" + " interleaved" * interleaved
        yield _call("rope", label, "rope", q, k, *angles[:2], *_three_positions(interleaved, False))
    label = "D=128 heads=32/8 three positions a token, an angle an element"
    yield _call("rope", label, "rope", q, k, *_wide_tables(128), *_three_positions(False, True, 128), full=True)


def _qk_norm_rope_cases() -> Iterator[Case]:
    for D, R, Hq, Hkv in ((64, 64, 32, 8), (80, 80, 32, 32), (128, 128, 32, 8), (128, 64, 32, 8), (256, 256, 16, 8)):
        for interleaved in (False, True):
            q, k, *angles = _heads(D, R, Hq, Hkv)
            weights = (torch.empty(D, dtype=q.dtype),) * 2
            label = f"D={D} R={R} heads={Hq}/{Hkv}" + " interleaved" * interleaved
            rest, full = (*weights, *angles, 1e-6, 0.0, interleaved), D == 80 or (interleaved and (D, R) != (128, 128))
            yield _call("qk_norm_rope", label, "qk_norm_rope", q, k, *rest, full=full)
            yield _call("qk_norm_rope", label, "qk_norm_rope_backward", q, k, q, k, *rest, True, full=full)
    q, k, *_, position_ids = _heads(128, 128, 32, 8)
    for interleaved in (False, True):
        label = "D=128 heads=32/8 an angle an element" + " interleaved" * interleaved
        weights = (torch.empty(128, dtype=q.dtype),) * 2
        grads = (q, k, q, k, *weights, *_wide_tables(128), position_ids, 1e-6, 0.0, interleaved, True)
        yield _call("qk_norm_rope", label, "qk_norm_rope_backward", *grads, full=interleaved)

    rest = (*weights, *_heads(128, 128, 32, 8)[2:4])
    position_ids, interleaved, _, axes = _three_positions(False, False)
    given = (*rest, position_ids, 1e-6, 0.0, interleaved)
    label = "D=128 heads=32/8 three positions a token"
    yield _call("qk_norm_rope", label, "qk_norm_rope", q, k, *given, axes)
    yield _call("qk_norm_rope", label, "qk_norm_rope_backward", q, k, q, k, *given, True, axes)
    for D, R in ((128, 128), (256, 256), (128, 64)):
        q, k, *angles = _heads(D, R, 32, 8)
        weights = (torch.empty(D, dtype=q.dtype),) * 4
        tangents = (q, k, *weights[:2], q, k, *weights[2:], *angles, 1e-6, 0.0, False)
        label = f"D={D} R={R} heads=32/8 tangent"
        yield _call("qk_norm_rope", label, "qk_norm_rope_tangent", *tangents, full=D != R)


def _three_positions(interleaved: bool, inverse: bool, columns: int = 64) -> tuple[Any, ...]:
    """position_ids, interleaved, inverse and axes of a call of the op rope, where a token has three positions."""
    return torch.zeros(3, 1, 32, dtype=torch.int64), interleaved, inverse, torch.zeros(columns, dtype=torch.int64)


def _heads(D: int, R: int, Hq: int, Hkv: int) -> tuple[torch.Tensor, ...]:
    """q, k in the memory order of a projection, cos, sin, position_ids."""
    q, k = (torch.empty(1, 32, H, D, dtype=torch.bfloat16).transpose(1, 2) for H in (Hq, Hkv))
    return q, k, torch.empty(32, R // 2), torch.empty(32, R // 2), torch.zeros(1, 32, dtype=torch.int64)


def _wide_tables(D: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos, sin (S, D) in bfloat16, as Hugging Face models have them."""
    return torch.empty(32, D, dtype=torch.bfloat16), torch.empty(32, D, dtype=torch.bfloat16)


def _attention_cases() -> Iterator[Case]:
    # Every width of tiles, with and without masked columns. With multi-head latent attention, v is narrower than q.
    widths = ((16, 16), (32, 32), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
    for D, DV in widths:
        for dtype in (torch.bfloat16, torch.float32):
            for features in ("causal", "all"):
                # A narrower head with the tiles of a wider one is compiled only with --full.
                full = (D, DV) not in ((64, 64), (128, 128), (192, 128), (256, 256)) or (
                    dtype == torch.float32 and (features == "all" or D != 128)
                )
                label = f"D={D}" + (f"/{DV}" if DV != D else "") + f" {str(dtype)[6:]} {features}"
                yield Case("attention", label, functools.partial(_attention, D, DV, dtype, features == "all"), full)

    for D in (64, 128, 256):
        label = f"D={D} bfloat16 packed causal"
        yield Case("attention", label, lambda a=(D, D, torch.bfloat16, False, True): _attention(*a), D == 256)

    for D, DV, dtype, features, families in (
        (512, 512, torch.bfloat16, "causal", tuple(TARGETS)), (512, 512, torch.bfloat16, "all", tuple(TARGETS)),
        (576, 512, torch.bfloat16, "causal", ("sm_90", "sm_80", "sm_100")),
        (576, 512, torch.bfloat16, "all", ("sm_90", "sm_80", "sm_100")),
        (512, 512, torch.float32, "causal", ("sm_90", "sm_80", "sm_100")),
    ):  # fmt: skip
        launch = functools.partial(_attention, D, DV, dtype, features == "all")
        label = f"D={D}" + (f"/{DV}" if DV != D else "") + f" {str(dtype)[6:]} {features}"
        for family in families:
            yield Case("attention", label, launch, only=family, wide=True)

    # Options that take registers in dk and dv. The first call takes the tile for options, the second does not.
    for D in (64, 128, 256):
        for features in ("start window", "packed window"):
            launch = functools.partial(_backward_with_window, D, features)
            yield Case("attention", f"D={D} bfloat16 {features}", launch)

    # Documents or a window, and first keys that stay visible.
    for D, dtype, features in (
        (64, torch.bfloat16, "prefix"), (128, torch.bfloat16, "prefix"), (256, torch.bfloat16, "prefix"),
        (128, torch.bfloat16, "window prefix"), (128, torch.bfloat16, "all prefix"), (128, torch.float32, "prefix"),
        (64, torch.bfloat16, "all prefix"), (256, torch.bfloat16, "all prefix"), (128, torch.float32, "all prefix"),
    ):  # fmt: skip
        full = "all" in features and D != 128
        launch = functools.partial(_attention_with_prefix, D, D, dtype, features)
        yield Case("attention", f"D={D} {str(dtype)[6:]} {features}", launch, full)
    for family in ("sm_90", "sm_80", "sm_100"):
        launch = functools.partial(_attention_with_prefix, 576, 512, torch.bfloat16, "all prefix")
        yield Case("attention", "D=576/512 bfloat16 all prefix", launch, only=family, wide=True)

    yield Case("attention", "D=128 bfloat16 in parts causal", _in_parts)

    # Few rows and many keys, which the forward splits.
    for D, dtype, features in (
        (64, torch.bfloat16, "causal"), (128, torch.bfloat16, "causal"), (256, torch.bfloat16, "causal"),
        (64, torch.bfloat16, "all"), (128, torch.bfloat16, "all"), (256, torch.bfloat16, "all"),
        (128, torch.bfloat16, "all prefix"), (128, torch.float32, "causal"), (128, torch.float32, "all prefix"),
    ):  # fmt: skip
        label = f"D={D} {str(dtype)[6:]} split {features}"
        yield Case("attention", label, functools.partial(_split, D, dtype, features), D != 128 and features == "all")


def _rope_attention_cases() -> Iterator[Case]:
    """The backward kernels, which end with a rotation; other kernels are compiled above.

    Rotations of whole heads and of parts of them, of halves and of neighbours, and the options that need registers.
    """
    for D, R, interleaved, dtype, features in (
        (64, 64, False, torch.bfloat16, "causal"), (128, 128, False, torch.bfloat16, "causal"),
        (128, 128, True, torch.bfloat16, "causal"), (128, 64, False, torch.bfloat16, "causal"),
        (256, 128, False, torch.bfloat16, "causal"), (192, 64, True, torch.bfloat16, "causal"),
        (128, 128, False, torch.bfloat16, "all"), (256, 128, True, torch.bfloat16, "all"),
        (128, 128, False, torch.float32, "causal"), (80, 80, True, torch.bfloat16, "causal"),
        (64, 64, True, torch.bfloat16, "all"), (64, 64, False, torch.float32, "causal"),
        (256, 128, False, torch.float32, "causal"), (128, 128, True, torch.bfloat16, "all"),
    ):  # fmt: skip
        label = f"rotated D={D} R={R}" + " interleaved" * interleaved + f" {str(dtype)[6:]} {features}"
        full = (D, R, interleaved, dtype, features) not in (
            (128, 128, False, torch.bfloat16, "causal"), (256, 128, True, torch.bfloat16, "all"),
        )  # fmt: skip
        launch = functools.partial(_rope_attention, D, R, interleaved, dtype, features == "all")
        yield Case("attention", label, launch, full)


def _decode_cases() -> Iterator[Case]:
    for D in (64, 128, 256, 512):
        for dtype, features in ((torch.bfloat16, "causal"), (torch.bfloat16, "all"), (torch.float32, "all")):
            if D == 512 and dtype == torch.float32:  # not on every family
                continue
            label = f"D={D} {str(dtype)[6:]} {features}"
            yield Case("decode", label, functools.partial(_decode, D, dtype, features == "all"))
        for dtype in (torch.bfloat16, torch.float32) if D < 512 else ():
            launch, full = functools.partial(_decode, D, dtype, True, masked=True), (D, dtype) != (128, torch.bfloat16)
            yield Case("decode", f"D={D} {str(dtype)[6:]} key mask", launch, full)


def _decode(D: int, dtype: torch.dtype, everything: bool, masked: bool = False) -> None:
    """One token with four query heads a key head; with `everything`, the most rows that are split, and all options.

    A key mask excludes a window.
    """
    B, Hkv, Sk = 2, 2, 2048
    Hq, Sq = (8 * Hkv, decode.TILE_ROWS // 8) if everything else (4 * Hkv, 1)
    q, k, v = (torch.empty(B, S, H, D, dtype=dtype).transpose(1, 2) for S, H in ((Sq, Hq), (Sk, Hkv), (Sk, Hkv)))
    bound = torch.zeros(B, Sq, dtype=torch.int32)
    given = (torch.empty(Hq), bound, bound) if everything else (None, None, None)
    softcap, window = 30.0 if everything else None, (64, 0) if everything else (None, 0)
    window = (None, None) if masked else window
    call = AttentionCall(q, k, v, *given, None, None, Sq, Sk, 0.1, softcap, *window)
    decode.launch_decode(call, torch.empty(B, Sk, dtype=torch.bool) if masked else None)


def _attention(D: int, DV: int, dtype: torch.dtype, everything: bool, packed: bool = False) -> None:
    B, Hq, Hkv, S = 2, 8, 2, 512
    # With `everything`, the 512 tokens are packed sequences, and all options are compiled together.
    q, k, v, do = (
        torch.empty(B, S, H, d, dtype=dtype).transpose(1, 2) for H, d in ((Hq, D), (Hkv, D), (Hkv, DV), (Hq, DV))
    )
    lse = torch.empty(B, Hq, S)
    cu_seqlens = None
    if everything or packed:
        q, k, v, do = (x[0].transpose(0, 1) for x in (q, k, v, do))
        lse, cu_seqlens = lse[0], torch.zeros(3, dtype=torch.int32)
    if everything:
        bound = torch.zeros(S, dtype=torch.int32)
        rest = (bound, bound, cu_seqlens, cu_seqlens, S, S, 0.1, 30.0, 64, 0)
        sinks, dlse = torch.empty(Hq), lse
    else:
        rest = (None, None, cu_seqlens, cu_seqlens, S, S, 0.1, None, None, 0)
        sinks = dlse = None
    KERNELS["attention_forward"](q, k, v, sinks, *rest)
    KERNELS["attention_backward"](do, dlse, q, k, v, do, lse, sinks, *rest, True, True, True, everything, None)


def _backward_with_window(D: int, features: str) -> None:
    B, S = 2, 512
    q, k = (torch.empty(B, S, H, D, dtype=torch.bfloat16).transpose(1, 2) for H in (8, 2))
    lse, on = torch.empty(B, 8, S), {"kv_start": torch.zeros(B, S, dtype=torch.int32)}
    if features == "packed window":
        q, k, lse, starts = q[0].transpose(0, 1), k[0].transpose(0, 1), lse[0], torch.zeros(3, dtype=torch.int32)
        on = {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
    options = attention_options(S, S, 0.1, left=64, **on)
    KERNELS["attention_backward"](q, None, q, k, k, q, lse, *options, True, True, True, False, None)


def _attention_with_prefix(D: int, DV: int, dtype: torch.dtype, features: str) -> None:
    B, Hq, Hkv, S = 2, 8, 2, 512
    q, k, v, do = (
        torch.empty(B, S, H, d, dtype=dtype).transpose(1, 2) for H, d in ((Hq, D), (Hkv, D), (Hkv, DV), (Hq, DV))
    )
    lse, bound = torch.empty(B, Hq, S), torch.zeros(B, S, dtype=torch.int32)
    start, end, softcap, left = {
        "prefix": (bound, None, None, None),
        "window prefix": (None, None, None, 64),
        "all prefix": (bound, bound, 30.0, 64),
    }[features]
    options = attention_options(S, S, 0.1, kv_start=start, kv_end=end, softcap=softcap, left=left)
    KERNELS["attention_forward"](q, k, v, *options, None, bound)
    KERNELS["attention_backward"](do, None, q, k, v, do, lse, *options, True, True, True, False, None, None, bound)


def _split(D: int, dtype: torch.dtype, features: str) -> None:
    q, k = (torch.empty(1, S, H, D, dtype=dtype).transpose(1, 2) for H, S in ((8, 64), (2, 8192)))
    bound, on = torch.zeros(1, 64, dtype=torch.int32), {}
    if features != "causal":
        on = {"sinks": torch.empty(8), "kv_start": bound, "kv_end": bound, "softcap": 30.0, "left": 6000}
    prefix = bound if "prefix" in features else None
    KERNELS["attention_forward"](q, k, k, *attention_options(64, 8192, 0.1, **on), None, prefix)


def _in_parts() -> None:
    """Few keys and many query heads, which several programs divide among them."""
    S = 4096
    q, k = (torch.empty(1, H, S, 128, dtype=torch.bfloat16) for H in (32, 1))
    plain = attention_options(S, S, 0.1)
    wanted = (False, True, True, False, None)
    KERNELS["attention_backward"](q, None, q, k, k, q, torch.empty(1, 32, S), *plain, *wanted)


def _rope_attention(D: int, R: int, interleaved: bool, dtype: torch.dtype, everything: bool) -> None:
    B, Hq, Hkv, S = 2, 8, 2, 512
    q, k, v = (torch.empty(B, S, H, D, dtype=dtype).transpose(1, 2) for H in (Hq, Hkv, Hkv))
    lse, bound = torch.empty(B, Hq, S), torch.zeros(B, S, dtype=torch.int32)
    angles = (torch.empty(S, R // 2), torch.empty(S, R // 2), torch.zeros(1, S, dtype=torch.int64), interleaved)
    bounds, numbers = ((bound, bound), (0.1, 30.0, 64, 0)) if everything else ((None, None), (0.1, None, None, 0))
    needed = (True, True, True, False)
    backward = KERNELS["rope_attention_backward"]
    backward(q, None, q, k, v, q, lse, None, *bounds, *angles, *numbers, *needed, None)
