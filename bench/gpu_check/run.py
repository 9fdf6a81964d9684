"""Carries out one stage: runs the jobs without a result, and writes the result of each job, then that of the stage."""

from __future__ import annotations

import collections
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from triton import knobs

from bench.gpu_check import state, suite
from bench.gpu_check.process import Ended, Job, run_all
from bench.gpu_check.stages import Stage
from bench.gpu_check.state import ABSENT, FAILED, PASSED, STOPPED, UNFINISHED, Outcome

_IDENTITY = "identity.json"
GRACE = 1.0  # seconds; with them, a job with the limit of its stage is stopped at its own limit
_REFUSED = re.compile(r"Device not supported")  # compute-sanitizer, on a machine that does not permit it
# What Triton 3.9 prints as a process ends. The last line has no end, so that what is printed next may follow in it.
_LEAKS = re.compile(
    r"^(?:nanobind: .*| - leaked .*| - \.\.\. skipped remainder)\n|See https://nanobind\S*?/refleaks\.html", re.M
)
_WORST_FIRST = (FAILED, STOPPED, UNFINISHED, PASSED, ABSENT)


def stage_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.stage.json"


def kept(stage: Stage, folder: Path, about: Mapping[str, Any]) -> Outcome | None:
    """The result of an earlier run, if it passed with the same commands, sources, versions and GPU."""
    outcome = state.read(stage_file(folder, stage.name))
    if not outcome or outcome.status not in (PASSED, ABSENT):
        return None
    if outcome.identity != state.identity(stage.sources, about):
        return None
    return outcome if all(_earlier(job, folder / stage.name) for job in stage.jobs(folder)) else None


def carry_out(
    stage: Stage, folder: Path, about: Mapping[str, Any], workers: int, over: Callable[[], bool],
    say: Callable[[str], None] = print,
) -> Outcome:  # fmt: skip
    """Run the jobs of `stage` that have not passed. Logs are `folder`/STAGE/JOB.txt, with the results beside them."""
    own, found = folder / stage.name, state.identity(stage.sources, about)
    stage_file(folder, stage.name).unlink(missing_ok=True)
    _keep_only(own, found)
    start, kernels = time.monotonic(), _kernels_on_disk()
    end = start + 60 * stage.minutes + GRACE
    jobs = stage.jobs(folder)
    outcomes = {job.name: _earlier(job, own) for job in jobs}
    waiting = [job for job in jobs if outcomes[job.name] is None]
    for job in waiting:
        (own / f"{job.name}.json").unlink(missing_ok=True)
    for ended in run_all(waiting, own, stage.workers or workers, lambda: over() or time.monotonic() > end):
        outcome = _judged(ended, own)
        if outcome.status == PASSED and not stage.finished(own):
            outcome = outcome._replace(status=UNFINISHED, last_line=f"has more to do: {outcome.last_line}")
        outcomes[ended.job.name] = outcome
        state.write(outcome, own / f"{ended.job.name}.json")
        if outcome.wrong and len(jobs) > 1:
            say(f"        {outcome.status} {stage.name}/{outcome.name}: {outcome.last_line}")
    whole = _together(stage.name, list(outcomes.values()), time.monotonic() - start, found)
    counts = {**whole.counts, "kernels compiled": _kernels_on_disk() - kernels}
    whole = whole._replace(counts={what: n for what, n in counts.items() if n})
    state.write(whole, stage_file(folder, stage.name))
    return whole


def is_current(stage: Stage, folder: Path, about: Mapping[str, Any]) -> bool:
    """Whether the results in the folder of `stage` are of this commit, these sources, versions and GPU."""
    return state.read_json(folder / stage.name / _IDENTITY) == state.identity(stage.sources, about)


def _keep_only(own: Path, found: Mapping[str, str]) -> None:
    """Empty the folder of a stage if its results are not current."""
    if state.read_json(own / _IDENTITY) != found:
        shutil.rmtree(own, ignore_errors=True)
        state.write_json(found, own / _IDENTITY)


def _earlier(job: Job, folder: Path) -> Outcome | None:
    """The result of `job` in an earlier run, if it passed with the same command."""
    outcome = state.read(folder / f"{job.name}.json")
    current = outcome and outcome.status in (PASSED, ABSENT) and outcome.identity == _command(job)
    return outcome if current else None


def _command(job: Job) -> dict[str, str]:
    return {"command": " ".join(job.command), **job.env}


def _judged(ended: Ended, folder: Path) -> Outcome:
    job, output = ended.job, _LEAKS.sub("", (folder / f"{ended.job.name}.txt").read_text(errors="replace"))
    last = next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "")
    if ended.code is None:
        limit = "" if ended.cut else f"killed after {job.seconds:.0f} s, at: "
        status, last = (UNFINISHED if ended.cut else STOPPED), limit + last
    elif ended.code and (refused := _REFUSED.search(output)):
        status, last = ABSENT, refused[0]
    else:
        status = FAILED if ended.code else PASSED
    return Outcome(job.name, status, ended.seconds, last, suite.counts(output), _command(job))


def _together(name: str, outcomes: Sequence[Outcome | None], seconds: float, found: Mapping[str, str]) -> Outcome:
    """The outcome of a stage from those of its jobs. A job without one did not start."""
    statuses = {o.status if o else UNFINISHED for o in outcomes} or {UNFINISHED}
    status = next(s for s in _WORST_FIRST if s in statuses)
    counts: collections.Counter[str] = collections.Counter()
    for o in filter(None, outcomes):
        counts.update(o.counts)
    done = sum(o is not None and o.status != UNFINISHED for o in outcomes)
    wrong = [o.name for o in outcomes if o and o.wrong]
    if len(outcomes) == 1 and outcomes[0]:
        last = outcomes[0].last_line
    else:
        last = f"{done} of {len(outcomes)} parts done" + (f", wrong: {' '.join(wrong)}" if wrong else "")
    return Outcome(name, status, seconds, last, counts, found)


def _kernels_on_disk() -> int:
    """The number of kernels in Triton's cache. A stage adds those that the compile stage did not compile."""
    return sum(1 for pattern in ("*/*.cubin", "*/*.hsaco") for _ in Path(knobs.cache.dir).glob(pattern))
