"""Stages and jobs made up for the tests of bench.gpu_check."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bench.gpu_check import run
from bench.gpu_check.process import Job
from bench.gpu_check.stages import Stage
from bench.gpu_check.state import Outcome
from tests.bench.sample_page import ABOUT


def stage(name: str, *jobs: Job, minutes: float = 1.0, workers: int = 1) -> Stage:
    return Stage(name, minutes, lambda _: list(jobs), ("bench",), workers)


# --- stages ----------------------------------------------------------------------------------------------------------


def carry_out(
    made: Stage, folder: Path, about: dict[str, str] = ABOUT, over: Callable[[], bool] = lambda: False
) -> Outcome:
    return run.carry_out(made, folder, about, 2, over, lambda _: None)
