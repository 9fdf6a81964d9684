"""What Triton's compiler makes of the kernels, run on tests/compiled: numbers, bounds, races, on CPU tensors.

One table of calls; each runs forward and backward, for sm_80 and sm_90, and is judged as the same call is on a GPU.
`make test` runs the calls with `fast`, which reach every kernel of the package; `make test-compiled` runs all.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import llama_kernels
from llama_kernels.ops.attention import key_split
from tests.support import attention, decode, hopper, qk_norm_rope, rms_norm, rope, rope_attention
from tests.support.attention import Case, anywhere, documents, packed, padded_left, shared, so_far
from tests.support.environment import compiles
from tests.support.launches import kernels_launched, names

CPU = torch.device("cpu")
HALF, FP16, SINGLE = torch.bfloat16, torch.float16, torch.float32
DTYPES = {HALF: "bf16", FP16: "fp16", SINGLE: "fp32"}


@dataclasses.dataclass(frozen=True)
class Call:
    """check: the check of the op's own tests, of a dtype. hopper: with the Hopper kernels, on sm_90."""

    name: str
    check: Callable[[torch.dtype], None]
    fast: tuple[torch.dtype, ...] = ()  # in `make test`
    dtypes: tuple[torch.dtype, ...] = tuple(DTYPES)
    hopper: bool = False


def _norm(N: int, residual: bool, rows: int = 9, **options) -> Callable[[torch.dtype], None]:
    return lambda dtype: rms_norm.check((rows, N), dtype, CPU, residual=residual, **options)


def _rope(D: int, R: int, interleaved: bool, tokens: int = 9) -> Callable[[torch.dtype], None]:
    def check(dtype: torch.dtype) -> None:
        q, k = rope.qk(2, 4, 2, tokens, D, dtype, CPU)
        rope.check(q, k, *rope.tables(60, R, CPU), torch.randint(60, (2, tokens)), interleaved=interleaved)
        rope.check(q, k, *rope.tables(60, R, CPU), interleaved=interleaved, inplace=True)

    return check


def _packed_rope(D: int, R: int, interleaved: bool) -> Callable[[torch.dtype], None]:
    return lambda dtype: rope.check_a_packed_projection((2, 13), 4, 2, D, R, interleaved, dtype, CPU)


def _cache(
    slots: str, order: str, interleaved: bool, tables=rope.tables, A: int | None = None
) -> Callable[[torch.dtype], None]:
    return lambda dtype: rope.check_into_a_cache(tables, slots, order, interleaved, CPU, A)


def _norm_rope(D: int, R: int, interleaved: bool, **options) -> Callable[[torch.dtype], None]:
    def check(dtype: torch.dtype) -> None:
        q, k = rope.qk(2, 4, 2, 9, D, dtype, CPU)
        weights, angles = qk_norm_rope.weights(D, dtype, CPU), rope.tables(60, R, CPU)
        position_ids = torch.randint(60, (2, 9))
        qk_norm_rope.check(q, k, *weights, *angles, position_ids, interleaved=interleaved, **options)

    return check


def _tangent(N: int, residual: bool, rows: int = 9) -> Callable[[torch.dtype], None]:
    def check(dtype: torch.dtype) -> None:
        rms_norm.check_tangent((rows, N), dtype, CPU, residual_dtype=dtype if residual else None, offset=1.0)

    return check


def _norm_rope_tangents(D: int, R: int, interleaved: bool) -> Callable[[torch.dtype], None]:
    def check(dtype: torch.dtype) -> None:
        q, k = rope.qk(2, 4, 2, 9, D, dtype, CPU)
        weights, angles = qk_norm_rope.weights(D, dtype, CPU), rope.tables(60, R, CPU)
        qk_norm_rope.check_tangents(q, k, *weights, *angles, torch.randint(60, (2, 9)), interleaved=interleaved)

    return check


def _axes(D: int, R: int, interleaved: bool, tables=rope.tables) -> Callable[[torch.dtype], None]:
    """Three positions a token. R: of half-width tables."""

    def check(dtype: torch.dtype) -> None:
        axes = torch.randint(3, (R // 2 if tables is rope.tables else R,))
        rope.check_axes(D, tables(60, R, CPU), axes, 3, dtype, interleaved=interleaved)

    return check


def _attention(case: Case, **options) -> Callable[[torch.dtype], None]:
    return lambda dtype: attention.check(case, dtype, CPU, **options)


def _split(case: Case) -> Callable[[torch.dtype], None]:
    """The forward alone, of few keys, which are split all the same."""

    def check(dtype: torch.dtype) -> None:
        with pytest.MonkeyPatch.context() as patch, kernels_launched() as launches:
            patch.setattr(key_split, "LEAST_KEYS", 64)
            key_split._chunks.cache_clear()
            attention.check(case, dtype, CPU, gradients=False)
        key_split._chunks.cache_clear()
        assert names(launches) == ["_forward_kernel", "_combine_kernel"]

    return check


def _rope_attention(case: Case, R: int, interleaved: bool) -> Callable[[torch.dtype], None]:
    return lambda dtype: rope_attention.check(case, dtype, CPU, R, interleaved=interleaved)


def _hopper(case: Case, layout: int | None = None) -> Callable[[torch.dtype], None]:
    return lambda dtype: hopper.check_of_hopper_kernels(case, dtype, CPU, layout)


def _axes_attention(D: int) -> Callable[[torch.dtype], None]:
    """rope_attention with three positions a token."""

    def check(dtype: torch.dtype) -> None:
        axes, position_ids = torch.randint(3, (D // 2,)), torch.randint(60, (3, 2, 33))
        case = rope_attention.square(33, D, B=2)
        rope_attention.check(case, dtype, CPU, position_ids=position_ids, axes=axes)

    return check


def _hopper_rope_attention(D: int, R: int, interleaved: bool) -> Callable[[torch.dtype], None]:
    case = rope_attention.square(150, D, B=2)

    def check(dtype: torch.dtype) -> None:
        with kernels_launched() as launches:
            rope_attention.check(case, dtype, CPU, R, interleaved=interleaved)
        assert hopper.expected_kernels(case) <= set(names(launches))

    return check


def _masked_decode(case: decode.Case) -> Callable[[torch.dtype], None]:
    return lambda dtype: decode.check(case, dtype, CPU)


def _square(S: int, D: int, **on) -> Case:
    return Case(1, 2, 1, S, on.pop("Sk", S), D, on.pop("DV", D), **on)


ATTENTION = {
    # Of every width of the tile table; odd widths; other widths of v.
    "causal-64": (_square(130, 64), (HALF, SINGLE)),
    "causal-128": (_square(130, 128), (HALF,)),
    "causal-256": (_square(70, 256), ()),
    "one-token": (_square(1, 64), ()),
    "odd-width": (_square(70, 80, DV=48), (FP16,)),
    "narrow": (_square(70, 24), ()),
    "v-narrower": (_square(70, 192, DV=128), ()),
    "rows-without-keys": (_square(150, 64, Sk=70), ()),
    # Masks and options, alone and together.
    "full": (_square(70, 64, Sk=150, is_causal=False), ()),
    "window": (_square(130, 64, Sk=200, window_size=(20, 0)), ()),
    "two-sided-window": (_square(130, 64, is_causal=False, window_size=(9, 30)), ()),
    "softcap": (_square(130, 64, softcap=3.0), ()),
    "softcap-128": (_square(70, 128, softcap=3.0), ()),
    "softcap-256": (_square(40, 256, softcap=3.0), ()),
    "scale": (_square(70, 64, scale=-0.3), ()),
    "sinks": (_square(130, 64, sinks=True), ()),
    "kv_start": (_square(130, 64, kv_start=anywhere), ()),
    "bounds": (_square(70, 64, Sk=150, is_causal=False, kv_start=padded_left, kv_end=so_far, sinks=True), ()),
    "prefix": (_square(130, 64, kv_start=documents, kv_prefix=shared), (HALF,)),
    "prefix-window": (_square(130, 128, window_size=(20, 0), kv_prefix=anywhere, sinks=True), ()),
    "prefix-everything": (
        _square(70, 64, Sk=100, is_causal=False, softcap=5.0, kv_start=anywhere, kv_end=so_far, kv_prefix=anywhere),
        (),
    ),
    "wide": (_square(40, 512, Sk=70), (HALF,)),
    "wide-absorbed": (_square(33, 576, DV=512, sinks=True), ()),
    "prefix-256": (_square(40, 256, Sk=70, kv_start=anywhere, kv_prefix=padded_left), ()),
    "everything": (
        _square(130, 72, Sk=200, is_causal=False, window_size=(20, 30), softcap=5.0, sinks=True, kv_start=anywhere),
        (HALF,),
    ),
    **{
        f"everything-{D}": (_square(40, D, Sk=70, window_size=(30, 9), softcap=5.0, sinks=True, kv_start=anywhere), ())
        for D in (64, 128, 256)
    },
    "grouped": (Case(2, 6, 2, 70, 70, 64, 64), ()),
    # Packed sequences, some of them of no token or of one.
    "varlen": (packed((50, 0, 70, 1), (50, 0, 70, 1), 4, 2, 64, 64), (HALF,)),
    "varlen-apart": (packed((30, 0, 1, 40), (70, 5, 1, 0), 2, 1, 64, 64, sinks=True), ()),
    "varlen-all": (
        packed((30, 60), (60, 90), 2, 1, 80, 80, is_causal=False, window_size=(40, 9), softcap=4.0, kv_start=anywhere),
        (),
    ),
    "varlen-prefix": (packed((100, 0, 60), (100, 5, 90), 2, 1, 64, 64, kv_start=documents, kv_prefix=shared), ()),
    # Few queries, split over the keys.
    "decode": (Case(1, 4, 2, 1, 600, 64, 64), (HALF, SINGLE)),
    "decode-128": (Case(2, 4, 1, 3, 600, 128, 128, sinks=True, softcap=5.0), ()),
    "decode-256": (Case(1, 2, 1, 1, 600, 256, 256), ()),
    "decode-absorbed": (Case(1, 16, 1, 1, 600, 576, 512), ()),
    "decode-bounds": (Case(1, 8, 2, 2, 600, 64, 64, kv_start=padded_left, kv_end=so_far, is_causal=False), ()),
    "decode-prefix": (Case(1, 8, 2, 2, 600, 64, 64, window_size=(100, 0), kv_prefix=padded_left), ()),
    "decode-window": (Case(1, 4, 2, 5, 600, 80, 80, window_size=(300, 0)), ()),
}
# The dtypes in which `make test` runs cases of the Hopper kernels.
_HOPPER_OF_MAKE_TEST = {"64": (HALF,), "128": (FP16,), "start-end": (FP16,)}

CALLS = [
    *(
        Call(f"rms_norm-{N}{'-add' * residual}", _norm(N, residual), fast)
        for N, residual, fast in (
            (1, False, ()), (64, True, (FP16,)), (80, False, ()), (1000, True, (SINGLE,)), (4096, False, (HALF,)),
            (5120, True, ()), (16640, False, (HALF,)), (16640, True, ()),
        )
    ),
    Call("rms_norm-offset", _norm(128, True, weight_dtype=SINGLE, offset=1.0)),
    Call("rms_norm-no-weight", _norm(128, False, weight=False)),
    Call("rms_norm-many-rows", _norm(64, True, rows=300)),
    *(
        Call(f"rope-{D}-{R}{'-interleaved' * interleaved}", _rope(D, R, interleaved), fast)
        for D, R, interleaved, fast in (
            (64, 64, False, (HALF, SINGLE)), (64, 64, True, (FP16,)), (128, 128, False, ()), (128, 96, True, ()),
            (80, 80, False, ()), (80, 20, True, ()), (256, 256, False, ()), (5, 4, False, ()), (5, 4, True, ()),
        )
    ),
    Call("rms_norm-tangent", _tangent(1000, False), (HALF,)),
    Call("rms_norm-tangent-add", _tangent(4096, True)),
    Call("rms_norm-tangent-long", _tangent(40000, False, rows=2)),
    Call("qk_norm_rope-tangent", _norm_rope_tangents(64, 64, False), (HALF,)),
    Call("qk_norm_rope-tangent-part-interleaved", _norm_rope_tangents(80, 20, True)),
    Call("rope-axes", _axes(64, 64, False), (HALF,)),
    Call("rope-axes-part-interleaved", _axes(80, 40, True)),
    Call("rope-axes-unlike", _axes(64, 64, False, rope.unlike_tables)),
    Call("rope-axes-into-a-cache", _cache("one each", "heads first", False, A=3), dtypes=(HALF,)),
    Call("rope_qkv", _packed_rope(64, 64, False), (HALF,)),
    Call("rope_qkv-interleaved", _packed_rope(80, 20, True)),
    *(
        Call(f"rope_into_cache-{slots}-{order}", _cache(slots, order, interleaved), fast, dtypes=(HALF,))
        for slots, order, interleaved, fast in (
            ("one for all", "heads first", False, (HALF,)), ("one each", "tokens first", True, ()),
            ("some outside", "heads first", True, ()),
        )
    ),
    *(
        Call(f"qk_norm_rope-{D}-{R}{'-interleaved' * interleaved}", _norm_rope(D, R, interleaved), fast)
        for D, R, interleaved, fast in (
            (64, 64, False, (HALF,)), (128, 96, True, (SINGLE,)), (80, 20, False, ()), (256, 256, False, ()),
        )
    ),
    Call("qk_norm_rope-offset", _norm_rope(64, 64, False, offset=1.0)),
    *(
        # float32 heads wider than 512 fit no program.
        Call(name, _attention(case), fast, **({"dtypes": (HALF, FP16)} if case.D > 512 else {}))
        for name, (case, fast) in ATTENTION.items()
    ),
    Call("attention-split", _split(_square(40, 64, Sk=300)), (HALF,)),
    Call("attention-split-128", _split(_square(40, 128, Sk=300, window_size=(200, 0), sinks=True))),
    Call("attention-split-all", _split(_square(40, 64, Sk=300, softcap=5.0, kv_end=anywhere, kv_prefix=shared))),
    Call("attention-strides", _attention(Case(2, 4, 2, 70, 70, 64, 64), layout=3), (HALF,)),
    *(
        Call(f"rope_attention-{D}-{R}{'-pairs' * pairs}", _rope_attention(_square(100, D), R, pairs), fast)
        for D, R, pairs, fast in (
            (64, 64, False, (HALF,)), (64, 32, True, ()), (128, 128, False, ()), (128, 96, True, ()),
            (80, 20, False, ()),
        )
    ),
    Call("rope_attention-axes", _axes_attention(64), dtypes=(HALF,)),
    *(
        Call(f"decode_attention-{case}", _masked_decode(case), (HALF,) * (case == decode.CASES[3]))
        for case in decode.CASES
    ),
    *(
        Call(f"hopper-{name}", _hopper(case), _HOPPER_OF_MAKE_TEST.get(name, ()), (HALF, FP16), hopper=True)
        for name, case in hopper.CASES.items()
    ),
    *(
        Call(f"hopper-{name}", _hopper(case, layout=3), dtypes=(FP16,), hopper=True)
        for name, case in hopper.DIMENSIONS_OF_ONE.items()
    ),
    *(
        Call(f"hopper-rope_attention-{D}-{R}{'-pairs' * pairs}", _hopper_rope_attention(D, R, pairs), dtypes=(FP16,),
             hopper=True)
        for D, R, pairs in ((64, 64, False), (128, 64, True), (80, 80, False))
    ),
]  # fmt: skip


# Every kernel of the package, and a call of `make test` that reaches it.
REACHED_BY = {
    "_rms_norm_forward_kernel": "rms_norm-1000-add",
    "_rms_norm_backward_kernel": "rms_norm-1000-add",
    "_rms_norm_weight_grad_kernel": "rms_norm-16640",
    "_rms_norm_tangent_kernel": "rms_norm-tangent",
    "_sum_partials_kernel": "rms_norm-1000-add",
    "_rope_kernel": "rope-64-64",
    "_qk_norm_rope_forward_kernel": "qk_norm_rope-64-64",
    "_qk_norm_rope_backward_kernel": "qk_norm_rope-64-64",
    "_forward_kernel": "causal-64",
    "_delta_kernel": "hopper-64",
    "_tile_list_kernel": "varlen",
    "_dkdv_kernel": "causal-64",
    "_dq_kernel": "causal-64",
    "_decode_kernel": "decode",
    "_combine_kernel": "decode",
    "_hopper_forward_kernel": "hopper-64",
    "_hopper_backward_kernel": "hopper-64",
    "_round_sum_kernel": "hopper-64",
}
# Likewise every operator.
CALLED_BY = {
    "rms_norm_forward": "rms_norm-1000-add",
    "rms_norm_backward": "rms_norm-1000-add",
    "rms_norm_tangent": "rms_norm-tangent",
    "rope": "rope-64-64",
    "rope_": "rope-64-64",
    "rope_qkv_backward": "rope_qkv",
    "rope_into_cache": "rope_into_cache-one for all-heads first",
    "qk_norm_rope": "qk_norm_rope-64-64",
    "qk_norm_rope_backward": "qk_norm_rope-64-64",
    "qk_norm_rope_tangent": "qk_norm_rope-tangent",
    "attention_forward": "causal-64",
    "attention_backward": "causal-64",
    "rope_attention_backward": "rope_attention-64-64",
    "decode_attention": f"decode_attention-{decode.CASES[3]}",
}


# What LLVM gets wrong by the words of the PTX ISA, and ptxas corrects (docs/lab/2026-11-26-every_barrier.md), by the
# call's name and the beginning of the finding.
KNOWN = (
    # Under Triton 3.7, the rounding of p is below the fence.
    ("softcap", "_hopper_backward_kernel: no wgmma.fence after a write of a register"),
)


def _is_known(call: Call, finding: str) -> bool:
    return any(name in call.name and finding.startswith(beginning) for name, beginning in KNOWN)


def _parameters() -> list:
    out = []
    for call in CALLS:
        for dtype in call.dtypes:
            for target in ("sm_90",) if call.hopper else ("sm_80", "sm_90"):
                marks = () if dtype in call.fast else (pytest.mark.compiled_table,)
                out.append(pytest.param(call, dtype, target, id=f"{call.name}-{DTYPES[dtype]}-{target}", marks=marks))
    return out


@compiles
@pytest.mark.parametrize("call, dtype, target", _parameters())
def test_compiled_kernels(call, dtype, target):
    from tests.compiled.driver import running
    from tests.compiled.llama.plugin import kernels_on_cpu

    torch.use_deterministic_algorithms(not call.hopper)
    with kernels_on_cpu(target, hopper=call.hopper) as called, running(target) as log:
        call.check(dtype)
    found = [each for each in log.findings if not _is_known(call, each)]
    assert log.reports and not found, "\n".join(found)
    ran = {report.kernel for report in log.reports}
    assert ran >= {kernel for kernel, name in REACHED_BY.items() if name == call.name}
    assert called >= {operator for operator, name in CALLED_BY.items() if name == call.name}


def test_every_kernel_and_operator_is_reached():
    from tests.compiled.llama.plugin import operators

    package = Path(llama_kernels.__file__).parent
    found = {
        name
        for path in package.rglob("*.py")
        for name in re.findall(r"^@.*jit.*\ndef (\w+_kernel)\(", path.read_text(), re.MULTILINE)
    }
    fast = {call.name for call in CALLS if call.fast}
    assert found == set(REACHED_BY) and set(REACHED_BY.values()) <= fast
    assert set(operators()) == set(CALLED_BY) and set(CALLED_BY.values()) <= fast


@compiles
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_kernels_execute_what_is_recorded(target):
    import triton

    from tests.compiled.llama import counts as compiled_counts

    record = json.loads(compiled_counts.RECORD.read_text())
    if triton.__version__ not in record:
        pytest.skip(f"no counts are recorded for Triton {triton.__version__}; each compiler has its own")
    found = compiled_counts.differences(compiled_counts.measure(target), record[triton.__version__][target])
    assert not found, "If it is meant, record it: python -m tests.compiled.llama.counts\n" + "\n".join(found)


# The ops of docs/reliability.md, by the beginnings of the names of their calls. All other calls are of attention.
OPS = (
    *("rms_norm", "rope_qkv", "rope_into_cache", "rope_attention"),
    *("rope", "qk_norm_rope", "decode_attention", "hopper"),
)
NAMES = {"": "attention", "hopper": "Hopper attention"}


@pytest.mark.once
def test_the_page_says_how_many_calls_there_are():
    page = (Path(__file__).parents[3] / "docs" / "reliability.md").read_text(encoding="utf-8")
    counted = collections.defaultdict(lambda: [0] * len(DTYPES))
    for call in CALLS:
        op = next((op for op in OPS if call.name.startswith(op)), "")
        for column, dtype in enumerate(DTYPES):
            counted[NAMES.get(op, op)][column] += dtype in call.dtypes
    for op, numbers in counted.items():
        cells = (f"{n}" if op == "Hopper attention" else f"{n} + {n}" for n in numbers)
        row = "| " + " | ".join([op, *(cell if cell.strip("0 +") else "" for cell in cells)]) + " |"
        assert row in page, f"docs/reliability.md has no row {row}"
    fast = sum(param.marks == () for param in _parameters())
    assert f"| {fast} calls; of the Hopper kernels" in page, f"`make test` has {fast} calls"
    assert f"| {len(_parameters())} calls; of the Hopper kernels" in page, f"there are {len(_parameters())} calls"
