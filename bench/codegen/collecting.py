"""Compiles and reads the cases of the compile gate in several processes.

This is not in `bench.codegen.__main__`, because processes that multiprocessing starts do not import that again.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing

from bench.codegen.cases import cases
from bench.codegen.compiling import Case, compile_case
from bench.codegen.reading import Report, read


def _work(job: tuple[str, int]) -> list[Report]:
    name, index = job
    case = list(cases())[index]
    return [read(name, case, kernel, compiled) for kernel, compiled in compile_case(name, case)]


def chosen(name: str, case: Case, full: bool) -> bool:
    """Whether `case` is compiled for target `name`. Except for attention, sm_86 has the tiles of sm_80."""
    elsewhere = name == "sm_86" and case.op not in ("attention", "decode")
    return case.only in (None, name) and (full or not (case.full or elsewhere))


def collect(targets: list[str], full: bool, workers: int, plain: bool = False) -> list[Report]:
    """The reports of all kernels of the chosen cases. plain: only of those without options."""
    all_cases = [(i, case) for i, case in enumerate(cases()) if case.plain or not plain]
    jobs = [(name, i) for i, case in all_cases for name in targets if chosen(name, case, full)]
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return [report for reports in pool.map(_work, jobs) for report in reports]
