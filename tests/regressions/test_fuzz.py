"""Random calls, shrunk by hypothesis to the smallest that fails: any shape, mask, packing, position, stride."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from llama_kernels.core.language import INTERPRETED
from tests.regressions.draws import DRAWN, attempt_thrice, replay
from tests.support.environment import DEVICE

# Derandomised, so that a failure repeats. `make fuzz` draws more.
few = settings(
    max_examples=8 if INTERPRETED or DEVICE == "cuda" else 100,  # slow to interpret, and to compile
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.corpus(14, 16, 24, 40)
@pytest.mark.parametrize("attempt", DRAWN, ids=lambda attempt: attempt.__name__)
def test_random_calls(attempt, device):
    @few
    @given(**DRAWN[attempt])
    def drawn(**arguments):
        attempt_thrice(attempt, **arguments, device=device)

    drawn()


def test_past_failures_stay_fixed(device):
    """Each line of reproducers.txt is a failure that fuzzing found and shrank."""
    for line in reproducers():
        replay(line, device)


def reproducers() -> list[str]:
    lines = Path(__file__).with_name("reproducers.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]
