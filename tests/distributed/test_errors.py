"""Bad arguments of context parallelism raise on each rank before anything is sent."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import llama_kernels
from llama_kernels.distributed import (
    Layout,
    attention,
    balanced_layout,
    context_parallel,
    cp_attention,
    layout,
    shard,
    transport,
    unshard,
)

pytestmark = [
    pytest.mark.once,
]


@pytest.fixture(autouse=True)
def four_ranks() -> Iterator[None]:
    """This process as rank 0 of 4, whose sends go nowhere; sending is an error."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    with (
        mock.patch.object(attention, "all_gather", side_effect=AssertionError("sent")),
        mock.patch.object(layout, "all_gather", side_effect=AssertionError("sent")),
        mock.patch.object(transport.dist, "batch_isend_irecv", side_effect=AssertionError("sent")),
    ):
        yield
    dist.destroy_process_group()


@pytest.fixture
def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (4,))


def call(mesh: DeviceMesh, heads: tuple[int, int] = (4, 2), tokens: int = 8, **options):
    q, k = (torch.randn(1, H, tokens, 16) for H in heads)
    options = {"mesh": mesh, "layout": Layout(32, 4), **options}
    return cp_attention(q, k, k, **options)


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"mesh": "cpu"}, TypeError, "mesh is a str; wanted a torch.distributed DeviceMesh"),
        ({"layout": 4}, TypeError, "layout is a int; wanted a llama_kernels.distributed.Layout"),
        ({"layout": Layout(32, 2)}, ValueError, "layout is of 2 ranks; wanted the 4 of the mesh"),
        ({"method": "tree"}, ValueError, "method is 'tree'"),
        ({"method": ("ring", "ring")}, ValueError, r"method is \('ring', 'ring'\)"),
        ({"method": ("ulysses", "ring")}, ValueError, "mesh is of 1 dimensions; wanted 2"),
        ({"tokens": 7}, ValueError, "q is of shape .*; wanted 8 tokens"),
        (
            {"heads": (6, 2), "method": "ulysses"},
            ValueError,
            "q is a tensor of 6 heads, and k of 2; wanted numbers of heads",
        ),
        (
            {"heads": (12, 3), "method": "ulysses"},
            ValueError,
            "q is a tensor of 12 heads, and k of 3; wanted numbers of heads",
        ),
        ({"doc_start": torch.zeros(1, 8)}, TypeError, "doc_start is torch.float32; wanted torch.int32"),
        ({"doc_start": torch.zeros(1, 32, dtype=torch.int32)}, ValueError, r"doc_start is of shape \(1, 32\)"),
        ({"sinks": torch.zeros(3)}, ValueError, "cp_attention: sinks is of shape"),
        ({"window_size": (-2, 0)}, ValueError, "cp_attention: window_size"),
    ],
    ids=str,
)
def test_cp_attention_names_the_bad_argument(mesh, options, error, text):
    with pytest.raises(error, match=text):
        call(**{"mesh": mesh, **options})


POSITIONS = [0, 1, 2, 3, 28, 29, 30, 31]  # of rank 0


@pytest.mark.parametrize(
    "starts, text",
    [
        ([0, 1, 2, 0, 1, 2, 3, 4], "inside an earlier document"),  # position_ids instead of doc_start
        ([0, 0, 0, 0, 2, 2, 2, 2], "inside an earlier document"),
        ([0, 0, 0, 0, 3, 3, 3, 3], "inside an earlier document"),
        ([0, 0, 2, 4, 4, 4, 4, 4], "outside of 0 to its token's position"),
        ([-1, 0, 0, 0, 0, 0, 0, 0], "outside of 0 to its token's position"),
        ([0, 0, 0, 0, 29, 29, 30, 30], "outside of 0 to its token's position"),
    ],
    ids=str,
)
def test_checked_looks_at_the_values_of_doc_start(mesh, starts, text):
    doc_start = torch.tensor([POSITIONS, starts], dtype=torch.int32)
    q = torch.randn(2, 2, 8, 16)
    with llama_kernels.checked(), pytest.raises(ValueError, match=f"doc_start is {text}.*position minus position_ids"):
        cp_attention(q, q, q, mesh=mesh, layout=Layout(32, 4), doc_start=doc_start)


@pytest.mark.parametrize("starts", [[0] * 8, POSITIONS, [0, 0, 2, 2, 2, 29, 29, 31], [0, 0, 2, 3, 17, 17, 17, 17]])
def test_checked_accepts_the_starts_of_documents(mesh, starts):
    with llama_kernels.checked(), pytest.raises(AssertionError, match="sent"):
        call(mesh, doc_start=torch.tensor([starts], dtype=torch.int32))


def test_sending_would_show(mesh):
    with pytest.raises(AssertionError, match="sent"):
        call(mesh)


@pytest.mark.parametrize(
    "arguments, text",
    [
        ((30, 4), "tokens is 30; wanted a multiple of 8, for 4 ranks. Pad the sequence to 32 tokens"),
        ((30, 4, "contiguous"), "tokens is 30; wanted a multiple of 4"),
        ((8, 0), "ranks is 0"),
        ((8, 2, "striped"), "kind is 'striped'"),
        ((4, 2, [[0, 1], [2]]), r"kind is lists of \[2, 1\] positions"),
        ((0, 2, [[]]), r"kind is lists of \[0\] positions; wanted 2 lists"),
        ((4, 2, [[1, 0], [2, 3]]), "kind is not increasing for rank 0"),
        ((4, 2, [[0, 1], [1, 3]]), "kind is not each token once"),
    ],
    ids=str,
)
def test_a_layout_says_what_does_not_fit(arguments, text):
    with pytest.raises(ValueError, match=text):
        Layout(*arguments)


@pytest.mark.parametrize("count", [True, torch.tensor(2)], ids=["a bool", "a tensor"])
def test_a_count_is_an_int(count):
    with pytest.raises(TypeError, match="Layout: ranks is "):
        Layout(8, count)
    with pytest.raises(TypeError, match="Layout: tokens is "):
        Layout(count, 2)
    with pytest.raises(TypeError, match="balanced_layout: chunk is "):
        balanced_layout(torch.zeros(1, 8, dtype=torch.int32), 2, chunk=count)


def test_shard_and_unshard_check_tokens(mesh):
    with pytest.raises(ValueError, match=r"tensors\[0\] is of shape \(2, 16\), 16 tokens in dimension 1; wanted 32"):
        shard(mesh, [torch.zeros(2, 16)], [1], layout=Layout(32, 4))
    with pytest.raises(ValueError, match=r"tensors\[0\] .*; wanted 8 tokens"):
        unshard(mesh, [torch.zeros(2, 16)], [1], layout=Layout(32, 4))
    with pytest.raises(ValueError, match="dims is 1 dimensions; wanted one for each of 2 tensors"):
        shard(mesh, [torch.zeros(2, 32)] * 2, [1], layout=Layout(32, 4))


WRONG = ("x", float("nan"), [1.0], object())


@pytest.mark.parametrize("value", WRONG, ids=["a string", "NaN", "a list", "an object"])
def test_every_argument_of_a_wrong_type_is_named(mesh, value):
    q = torch.randn(1, 4, 8, 8)
    heads = {"q": q, "k": q, "v": q, "doc_start": torch.zeros(1, 8, dtype=torch.int32), "sinks": torch.zeros(4)}
    options = {"is_causal": True, "window_size": (-1, -1), "scale": None, "softcap": None, "return_lse": False}
    shares = {"mesh": mesh, "layout": Layout(32, 4)}
    tokens = {"tensors": [torch.arange(32)], "dims": [0], **shares}
    doc_start = torch.zeros(1, 8, dtype=torch.int32)
    for call, args in (
        (cp_attention, {**heads, **options, **shares, "method": "ring"}),
        (shard, tokens),
        (unshard, {**tokens, "tensors": [torch.arange(8)]}),
        (balanced_layout, {"doc_start": doc_start, "ranks": 2, "chunk": 2}),
        (Layout, {"tokens": 8, "ranks": 2, "kind": "zigzag"}),
        (lambda **given: context_parallel(**given).__enter__(), {"model": torch.nn.Linear(2, 2), **shares}),
    ):
        for name in args:
            with pytest.raises((TypeError, ValueError), match=rf"^llama_kernels\.\w+: {name}\b"):
                call(**{**args, name: value})


def test_shard_gives_the_tokens_of_the_layout(mesh):
    (part,) = shard(mesh, [torch.arange(32)], [0], layout=Layout(32, 4))
    assert part.tolist() == [0, 1, 2, 3, 28, 29, 30, 31]


@pytest.mark.corpus(85)
@pytest.mark.parametrize("made", [False, True], ids=["made before", "made inside"])
def test_a_layout_used_in_inference_mode_trains_later(made, mesh):
    """As in a first evaluation: autograd cannot save inference tensors, such as a copy of the positions on a device."""
    layout = None if made else Layout(32, 4)
    with torch.inference_mode():
        layout = layout or Layout(32, 4)
        shard(mesh, [torch.randn(32)], [0], layout=layout)
        layout.positions(0, "meta")
    x = torch.randn(32, requires_grad=True)
    (part,) = shard(mesh, [x], [0], layout=layout)
    part.sum().backward()
    assert x.grad.nonzero().flatten().tolist() == [0, 1, 2, 3, 28, 29, 30, 31]
    assert not layout.positions(0, "meta").is_inference()


def test_a_second_derivative_raises():
    """A mesh of one process: nothing is sent."""
    leaves = [torch.randn(1, 2, 8, 16, requires_grad=True) for _ in range(3)]
    mesh = DeviceMesh("cpu", [0])
    out = cp_attention(*leaves, mesh=mesh, layout=Layout(8, 1))
    (dq,) = torch.autograd.grad(out.sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="cp_attention: double backward is not supported"):
        dq.sum().backward()
