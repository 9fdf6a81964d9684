"""The bytes and FLOPs of each work, its results in float64, and the presets."""

from __future__ import annotations

import pytest
import torch

import llama_kernels as lk
from bench.providers.eager import Eager
from bench.works import attention, norms
from bench.works.errors import disparity, errors
from bench.works.presets import documents, small, works_of
from bench.works.rotations import MRope, QKNormRope, Rope, RopeQKV
from bench.works.tangents import TANGENTS, RMSNormTangents, RopeTangents
from bench.works.work import DIRECTIONS, Call, compute
from tests.bench.fakes import EVERY_OP
from tests.support.ops import OPS

pytestmark = pytest.mark.once


@pytest.mark.parametrize("S, window", [(1, -1), (7, -1), (7, 0), (7, 3), (7, 6), (7, 100)])
def test_pairs_are_those_of_the_mask(S, window):
    i, j = torch.arange(S)[:, None], torch.arange(S)
    visible = (j <= i) & ((i - j <= window) if window >= 0 else True)
    assert attention.pairs(S, window) == int(visible.sum())


def test_least_bytes_of_the_norms():
    norm, add = norms.RMSNorm(shape="", M=10, N=8), norms.AddRMSNorm(shape="", M=10, N=8)
    assert [norm.bytes(d) for d in DIRECTIONS] == [2 * 160 + 16, 3 * 160 + 32, 5 * 160 + 48]
    assert [add.bytes(d) for d in DIRECTIONS] == [4 * 160 + 16, 4 * 160 + 32, 8 * 160 + 48]


def test_least_bytes_of_the_rotations():
    sizes = {"shape": "", "B": 2, "S": 3, "Hq": 4, "Hkv": 1, "D": 8}
    rope, heads, packed = Rope(**sizes), QKNormRope(**sizes), RopeQKV(**sizes)
    assert rope.bytes("forward") == rope.bytes("backward") == 2 * (2 * 3 * 5 * 8 * 2) + 2 * 3 * 4 * 4
    assert heads.bytes("backward") - heads.bytes("forward") == 2 * 3 * 5 * 8 * 2
    assert packed.bytes("forward") == rope.bytes("forward")
    assert packed.bytes("backward") == rope.bytes("backward") + 2 * (2 * 3 * 1 * 8 * 2)


def test_least_bytes_of_several_positions_and_of_tangents():
    sizes = {"shape": "", "B": 2, "S": 3, "Hq": 4, "Hkv": 1, "D": 16}
    heads, tables = 2 * (2 * 3 * 5 * 16 * 2), 2 * 3 * 8 * 4
    assert MRope(**sizes).bytes("forward") == heads + tables + 3 * 3 * 8 + 8 * 8
    assert RopeTangents(**sizes).bytes("forward") == 2 * heads + tables
    assert RMSNormTangents(shape="", M=10, N=8).bytes("forward") == 2 * (2 * 160 + 16)


def test_an_image_takes_the_positions_of_its_longer_side():
    work = MRope(shape="", B=1, S=2048, Hq=1, Hkv=1, D=128)
    time, height, width = work.position_ids("cpu")[:, 0].tolist()
    assert sum(work.sections) == 64 and work.sections == (16, 24, 24)
    assert time[511] == 511 and (time[512], height[512], width[512]) == (512, 512, 512)
    assert (time[1535], height[1535], width[1535]) == (512, 543, 543)
    assert time[1536] == height[1536] == width[1536] == 544  # one past the largest position of the image
    assert time[2047] == 544 + 511


def test_least_bytes_and_flops_of_attention():
    heads = {"shape": "", "Hq": 4, "Hkv": 2, "D": 8}
    dense, rotated = attention.Attention(B=2, S=4, **heads), attention.RopeAttention(B=2, S=4, **heads)
    q, k, lse = 2 * 4 * 4 * 8 * 2, 2 * 2 * 4 * 8 * 2, 2 * 4 * 4 * 4
    assert dense.bytes("forward") == 2 * q + 2 * k + lse and dense.bytes("backward") == 4 * q + 4 * k + lse
    assert dense.flops("forward") == 2 * 2 * 8 * (2 * 4 * 10)  # two products, D, B H pairs
    assert dense.flops("backward") == 2.5 * dense.flops("forward")
    assert dense.flops("both") == 3.5 * dense.flops("forward")
    assert rotated.bytes("both") == dense.bytes("both") + 2 * 2 * 4 * 4 * 4
    assert rotated.flops("both") == dense.flops("both")
    packed = attention.AttentionVarlen(lengths=(3, 5), **heads)
    assert packed.flops("forward") == 4 * 4 * 8 * (6 + 15)


@pytest.mark.parametrize("tokens", [16384, 32768])
def test_documents_add_up_to_all_tokens(tokens):
    lengths = documents(tokens)
    (equal,) = [w.lengths for w in works_of("all") if w.shape == "equal documents" and sum(w.lengths) == tokens]
    assert len(equal) == len(lengths) and len(set(equal)) == 1
    assert sum(lengths) == tokens and min(lengths) >= 128 and max(lengths) >= tokens // 4


def whole_reference(work):
    """The reference on the whole work at once. For two ops, `work.reference` is only right for pieces."""

    def packed(q, k, v):
        cu, longest = work.cu_seqlens("cpu"), max(work.lengths)
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        return lk.reference.attention_varlen(q, k, v, cu, cu, longest, longest).transpose(0, 1)[None]

    def rotated(q, k, v):
        return lk.reference.rope_attention(q, k, v, *work.tables("cpu"))

    return {"attention_varlen": packed, "rope_attention": rotated}.get(work.op, work.reference)


@pytest.mark.parametrize("work", EVERY_OP, ids=lambda w: w.shape)
def test_results_in_pieces_equal_those_of_the_whole(work, monkeypatch):
    """So do the errors of eager PyTorch in the dtype of the work."""
    call, backward = work.draw("cpu"), "backward" in work.directions
    monkeypatch.setattr(norms, "ROWS", 7)
    monkeypatch.setattr(attention, "QUERIES", 8)
    assert len(list(work.pieces(call))) > 1 or work.op in ("decode", "rope_into_cache")
    truth = work.truth(call)
    wide = Call(*(tuple(x.double() for x in xs) for xs in call))
    whole = compute(work, whole_reference(work), wide, backward)
    assert truth.keys() == whole.keys()
    for name, x in truth.items():
        torch.testing.assert_close(x, work.judged(name, whole[name]))
    plain = compute(work, Eager().function(work, "cpu"), call, backward)
    assert disparity(work, plain, truth, errors(work, work.yardstick(call), truth))[1] is None


@pytest.mark.parametrize("preset", ["models", "sweeps", "attention", "memory_bound", "smoke"])
def test_a_preset_has_each_work_once(preset):
    keys = [(w.op, w.shape, str(w.sizes)) for w in works_of(preset)]
    assert keys and len(set(keys)) == len(keys)


def test_the_presets_measure_every_op_of_the_table():
    uses = {"bounded_attention", "decode", "shared_prompt", "mrope", *(kind.op for kind in TANGENTS)}
    for works in (works_of("models"), small(), EVERY_OP):
        assert {w.op for w in works} == {*OPS, *uses}
    assert len(list(works_of("all"))) == len(list(works_of("models"))) + len(list(works_of("sweeps")))
