"""Training steps of a tiny model. Variations are checked and timed as providers are."""

from __future__ import annotations

import pytest

from bench.providers.provider import OURS
from bench.training import runner
from bench.training.variations import VARIATIONS, Liger, Stock
from tests.bench.fakes import FakeClock, options, tiny_model

pytestmark = pytest.mark.once


@pytest.mark.parametrize("whole", [False, True], ids=["layer", "llama"])
def test_stock_and_our_training_steps_are_timed_and_a_wrong_one_is_not(whole):
    pytest.importorskip("transformers")
    scale = tiny_model(whole, 1)

    class Broken(Stock):
        def change(self, model):
            model.model.layers[0].mlp.down_proj.weight.data.mul_(1.5)
            return model

    broken = Broken(False)
    broken.name = "broken"
    variations = [v for v in VARIATIONS if not v.compiled] + [broken]
    (made,) = runner.run([scale], variations, **options(FakeClock(4.0), device="cpu"))
    by = {r.provider: r for r in made}
    for name in ("stock", OURS):
        assert by[name].reason is None and by[name].rate == pytest.approx(32 / 4e-3) and by[name].unit == "tokens/s"
    assert by[OURS].saved < by["stock"].saved
    assert by["broken"].reason.startswith("wrong numbers") and by["broken"].ms is None
    assert all(by[v.name].reason for v in variations if not v.cpu)  # these need a GPU or a package


def test_functions_that_liger_replaces_are_put_back_after_each_call():
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    stock = modeling.apply_rotary_pos_emb
    liger = Liger(False)
    liger._names = {"apply_rotary_pos_emb": len}
    with liger.active():
        assert modeling.apply_rotary_pos_emb is len
    assert modeling.apply_rotary_pos_emb is stock
