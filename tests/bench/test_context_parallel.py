"""Context-parallel attention, estimated: recorded steps, their simulation, and the formulas, which must agree."""

from __future__ import annotations

from operator import sub
from unittest import mock

import pytest
import torch.distributed as dist

if not dist.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

from bench.commands import arguments
from bench.estimate import attention, ours, tiles
from bench.estimate.constants import Network, gpus, network
from bench.estimate.context_parallel import cases, costs, picture
from bench.estimate.context_parallel.costs import Kernels, Place, of_keys, of_rows, own_block
from bench.estimate.context_parallel.paper import Setting, copies, times
from bench.estimate.context_parallel.schedule import simulated
from bench.estimate.context_parallel.steps import CHUNK, Block, Copies, Heads, Rows, Start, Wait, recorded, rows_of
from bench.estimate.tiles import Shape
from tests.support.environment import compiles

pytestmark = pytest.mark.once

HEADS = Heads(8, 2, 16)
SETTINGS = (
    ("ring", (1,)), ("ring", (2,)), ("ring", (3,)), ("ring", (8,)), ("ring", (16,)), ("all_gather", (4,)),
    ("all_gather", (16,)), ("ulysses", (4,)), ("ulysses", (8,)), (("ring", "ulysses"), (2, 4)),
    (("ring", "ulysses"), (4, 4)),
)  # fmt: skip


class Rate:
    """Attention and copies at fixed rates: FLOPs and bytes a second."""

    def __init__(self, flops: float, bytes_: float = 3e12) -> None:
        self.flops, self.bytes = flops, bytes_

    def block(self, block: Block, chunk: int) -> float:
        return 4 * block.heads.Hq * block.heads.D * block.pairs * chunk**2 * (3.5 if block.backward else 1) / self.flops

    def copies(self, copied: Copies, chunk: int) -> float:
        return copied.bytes * chunk / self.bytes


def recorded_everywhere(method, mesh, backward, heads=HEADS):
    ranks = mesh[0] * (mesh[1] if len(mesh) == 2 else 1)
    return [recorded(method, mesh, heads, rank)[backward] for rank in range(ranks)]


def of_kind(steps, kind):
    return [step for step in steps if isinstance(step, kind)]


# --- what is recorded ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, mesh", SETTINGS, ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_the_ranks_together_compute_each_visible_pair_once(method, mesh, backward):
    ranks = recorded_everywhere(method, mesh, backward)
    chunks = 2 * len(ranks)
    blocks = [step for steps in ranks for step in of_kind(steps, Block)]
    assert sum(block.pairs * block.heads.Hq for block in blocks) == HEADS.Hq * chunks**2 / 2
    assert {block.backward for block in blocks} == {backward}


def test_a_ring_sends_six_blocks_a_hop_and_waits_for_each():
    forward, backward = recorded("ring", (8,), HEADS, 3)
    block = HEADS.Hkv * HEADS.D * 2 * CHUNK  # elements of k
    assert [s.bytes * CHUNK for s in of_kind(forward, Start)] == [2 * 2 * block] * 7
    sent = sorted(s.bytes * CHUNK for s in of_kind(backward, Start))
    assert sent == [2 * 2 * block] * 7 + [2 * 4 * block] * 7  # gradients are float32
    assert len(of_kind(forward, Wait)) == 7 and len(of_kind(backward, Wait)) == 14


def test_of_a_zigzag_ring_each_rank_computes_half_a_block_a_step():
    for rank in range(4):
        own, *others = of_kind(recorded("ring", (4,), HEADS, rank).forward, Block)
        assert own == own_block(HEADS, 2, False)
        assert [block.pairs for block in others] == [2.0] * 3


def test_copies_grow_evenly_with_the_ranks():
    for method, mesh in (("ring", (16,)), ("all_gather", (16,)), (("ring", "ulysses"), (16, 2))):
        for backward in (False, True):
            counted = of_kind(recorded(method, mesh, HEADS, 0)[backward], Copies)
            found = copies(method, mesh, HEADS, backward)
            assert found.bytes == pytest.approx(sum(x.bytes for x in counted), rel=0.01)
            assert found.launches == sum(x.launches for x in counted)


def test_bounds_of_queries_become_chunks_or_are_refused():
    assert rows_of([0, 0, 2, 2], [1, 2, 6, 6]) == (Rows(0, 0, True), Rows(1, 2, False))
    assert rows_of([4, 4], [4, 3]) == (Rows(0, 0, False),)
    with pytest.raises(ValueError, match="not modelled"):
        rows_of([0, 1], [4, 4])


def test_a_process_that_is_in_a_group_is_refused():
    with mock.patch.object(dist, "is_initialized", lambda: True), pytest.raises(RuntimeError, match="in none"):
        recorded("ring", (2,), Heads(4, 4, 8), 0)


# --- the simulation --------------------------------------------------------------------------------------------------

SECOND = Network(1.0, 0.5, 0.0, 0.0, 2, 1.0, 0.5)  # GB/s
PAIR = (0, 1)


def two_ranks(*steps):
    return simulated([steps, steps], Rate(1.0, 1e9), Place(SECOND, 2), 1)


def test_a_transfer_runs_beside_kernels_until_it_is_waited_for():
    work, sent = Copies(3e9, 1), Start("hop", PAIR, 2e9)  # 3 seconds, 2 seconds
    assert two_ranks(sent, work, Wait(PAIR, 0), work).seconds == 6
    assert two_ranks(work, sent, Wait(PAIR, 0), work).seconds == 8
    ran = two_ranks(sent, sent, work, Wait(PAIR, 1), work)  # the second follows the first on the lane
    assert (ran.seconds, ran.computed, ran.exposed) == (7, 6, 1)


def test_a_hop_waits_for_the_rank_that_receives():
    send, wait = Start("hop", PAIR, 2e9), Wait(PAIR, 0)
    late = simulated([(send, wait), (Copies(5e9, 1), send, wait)], Rate(1.0, 1e9), Place(SECOND, 2), 1)
    assert late.seconds == 7 and late.transfers[0][0].end == 7
    three = [(Start("hop", (0, 1, 2), 2e9), Wait((0, 1, 2), 0))] * 2
    three.append((Copies(5e9, 1), *three[0]))
    ran = simulated(three, Rate(1.0, 1e9), Place(SECOND, 3), 1)
    assert [spans[0].end for spans in ran.transfers] == [7, 7, 7]  # the second sends to the last, which is late
    apart = simulated([(send, wait), (send, wait)], Rate(1.0, 1e9), Place(SECOND, 1), 1)
    assert apart.seconds == 4  # over the network, at half the rate


def test_a_collective_starts_with_its_last_rank():
    both, wait = Start("all_to_all", PAIR, 2e9), Wait(PAIR, 0)
    late = simulated([(both, wait), (Copies(5e9, 1), both, wait)], Rate(1.0, 1e9), Place(SECOND, 2), 1)
    assert [spans[0].end for spans in late.transfers] == [6, 6]


def test_ranks_that_wait_for_each_other_are_an_error():
    with pytest.raises(RuntimeError, match="wait for each other"):
        simulated([(Start("hop", PAIR, 1.0), Wait(PAIR, 0)), ()], Rate(1.0), Place(SECOND, 2), 1)


# --- the formulas ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flops", [2e12, 2e13, 4e14], ids=["hidden", "balanced", "exposed"])
@pytest.mark.parametrize("method, mesh", SETTINGS, ids=str)
def test_formulas_are_within_three_percent_of_the_simulation(method, mesh, flops):
    rate, place = Rate(flops), Place(network(), 4)
    for backward in (False, True):
        steps = recorded_everywhere(method, mesh, backward)
        setting = Setting(method, mesh, HEADS, 2048, place)
        ran, paper = simulated(steps, rate, place, 2048), times(setting, rate, backward)
        assert paper.seconds == pytest.approx(ran.seconds, rel=0.03)
        assert paper.kernels + paper.copies == pytest.approx(ran.computed, rel=0.02)


def test_a_mesh_that_does_not_divide_the_heads_is_refused():
    with pytest.raises(ValueError, match="16 ranks do not divide 8 and 2 heads"):
        times(Setting("ulysses", (16,), HEADS, 128, Place(network(), 8)), Rate(1e12), False)


# --- costs -----------------------------------------------------------------------------------------------------------


def test_tiles_of_a_causal_block_are_those_of_a_causal_call():
    shape, block = Shape(1, 1024, 8, 2, 16), own_block(HEADS, 4, False)
    assert of_rows(block, 256, (128, 64)) == tiles.of_rows(shape, 128, 64, 8)
    keys = of_keys(block, 256, (64, 128))
    assert tiles.steps(keys) == tiles.steps(tiles.of_keys(shape, 64, 128, 2, 4))
    assert sum(tile.count for tile in of_keys(block, 256, (64, 128), 2)) == 2 * sum(tile.count for tile in keys)


def test_parts_of_dk_and_dv_are_read_and_added_up():
    block, H100 = own_block(HEADS, 2, True), gpus()["H100"]
    assert costs._sum_of_parts(H100, block, 512, 1) == 0
    moved = (costs._sum_of_parts(H100, block, 512, parts) for parts in (2, 4))
    keys = 2 * 2 * 512 * HEADS.Hkv * HEADS.D  # of dk and dv
    assert -sub(*moved) == pytest.approx(2 * 4 * keys / 3030e9)


@compiles
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_causal_block_takes_as_long_as_a_causal_call_by_the_same_kernels(monkeypatch, direction):
    H100, heads = gpus()["H100"], Heads(8, 2, 128)
    kernels = ours.attention_kernels(H100.family, heads.D, 4, True, direction)
    monkeypatch.setattr(costs, "_kernels", lambda *_: kernels)
    monkeypatch.setattr(costs, "_block", costs._block.__wrapped__)  # remembers nothing
    block = own_block(heads, 2, direction == "backward")
    call = ours.attention_estimate(H100, Shape(1, 4096, *heads), direction).seconds
    assert Kernels(H100).block(block, 2048) == pytest.approx(call, rel=1e-9)
    assert Kernels(H100, 2.0).block(block, 2048) == pytest.approx(call / 2, rel=1e-9)


@compiles
def test_the_mask_of_a_block_takes_longer_than_that_of_a_causal_call():
    """The kernel of a block has bounds for each row. How long its steps without a mask take depends on the compiler."""
    H100, heads = gpus()["H100"], Heads(8, 2, 128)
    (bounded,) = costs._kernels(H100, heads, False)
    (causal,) = ours.attention_kernels(H100.family, heads.D, 4, True, "forward")
    masked, of_call = (attention.steps_of(kernel, 1)[1].step for kernel in (bounded, causal))
    assert of_call < masked < 1.5 * of_call


def test_collectives_use_the_links_between_the_ranks():
    place, ranks = Place(SECOND, 2), (0, 1, 2, 3)
    assert place.collective(Start("all_to_all", PAIR, 4e9), 1) == 2  # half of it goes to the other
    assert place.collective(Start("all_to_all", ranks, 4e9), 1) == 4  # half of it to the other node, at 0.5 GB/s
    assert place.collective(Start("all_gather", ranks, 1e9), 1) == 3  # by the adapters of both GPUs


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_estimates_and_draws_them(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cases, "TOKENS", (2**17, 2**20))
    monkeypatch.setattr(cases, "RANKS", (2, 8, 16))
    rate = Rate(4e14)
    monkeypatch.setattr(Kernels, "block", lambda self, block, chunk: rate.block(block, chunk) / self.speed)
    drawn = []
    monkeypatch.setattr(picture, "_draw_rank", lambda ax, gpu, setting, rank, at: drawn.append(setting.method))
    file = tmp_path / "picture.png"
    assert arguments.main(["estimate", "--gpus", "H100", "--context-parallel", str(file)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Estimates, not measurements" in said and "differ from the simulation" in said
    assert "Estimate: Llama 3.1 70B, tensor parallel on the 8 GPUs of a node" in said and "ring x ulysses" in said
    assert file.stat().st_size > 20000 and len(drawn) == 4


def test_the_picture_says_that_it_is_an_estimate(monkeypatch):
    monkeypatch.setattr(picture, "_lanes", lambda *_: None)
    figure = picture.picture(gpus()["H100"], network(), {scale: [] for scale in cases.SCALES})
    assert "Estimate, not measured" in figure.get_suptitle()
    assert all("%" in ax.get_ylabel() or ax.get_ylabel() == "" for ax in figure.axes)


def test_a_gpu_without_constants_of_its_network_is_refused(tmp_path, capsys):
    assert arguments.main(["estimate", "--gpus", "A100", "--context-parallel", str(tmp_path / "x.png")]) == 2
    assert "H100 or H200" in capsys.readouterr().out
