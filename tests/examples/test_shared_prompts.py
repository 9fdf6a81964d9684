"""The example with shared prompts: its first step is that of repeated prompts, and its results are written."""

from __future__ import annotations

import pytest

from llama_kernels.core.language import INTERPRETED

for package in ("accelerate", "matplotlib", "rich", "transformers"):
    pytest.importorskip(package)

from examples import shared_prompts  # noqa: E402

pytestmark = pytest.mark.skipif(INTERPRETED, reason="a training loop in Triton's interpreter would take hours")

SMALL = ("--steps", "2", "--completions", "3", "--tokens", "4", "--max-length", "40", "--batch", "2")


def test_a_step_equals_that_with_repeated_prompts(run):
    status, numbers = run("shared_prompts", *SMALL)
    assert status == 0
    assert numbers["gradients apart"] < 1e-4
    assert numbers["shared tokens"] < numbers["repeated tokens"] / 2
    assert len(numbers["rewards"]) == 2


@pytest.mark.parametrize(
    "option", [("--data", __file__), ("--stock",), ("--compare",), ("--save", "x")], ids=lambda o: o[0]
)
def test_options_of_the_other_examples_are_errors(option, run, capsys):
    with pytest.raises(SystemExit) as stop:
        run("shared_prompts", *option)
    assert stop.value.code == 2 and f"{option[0]}: not in this example" in capsys.readouterr().err


def test_other_gradients_fail(run, monkeypatch):
    step = shared_prompts.repeated_step
    monkeypatch.setattr(shared_prompts, "repeated_step", lambda *call: step(*call)._replace(loss=step(*call).loss * 2))
    status, _ = run("shared_prompts", *SMALL)
    assert status == 1
