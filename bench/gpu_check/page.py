"""The page at the end. It is made from the files of the stages, so a run that was cut short has a page too."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.gpu_check import state
from bench.gpu_check.state import ABSENT, PASSED, UNFINISHED, Outcome
from bench.measuring import records
from bench.measuring.records import Run
from bench.providers.provider import OURS
from bench.reporting import goals
from bench.reporting.compare import THRESHOLD
from llama_kernels.ops.attention import dispatch

COLUMNS, LINES = 110, 60
SHAPE = "Llama 3.1 8B"  # the shape whose attention the page shows: 32/8 heads of 128
_ATTENTION = ("forward_kernel", "dq_kernel", "dkdv_kernel")


class Findings(NamedTuple):
    """What the page shows. A value of None means that the stage left no result."""

    folder: Path
    outcomes: Sequence[Outcome]
    about: Mapping[str, Any]  # what machine.describe returned; empty if there was no run
    speed: Run | None
    hopper: Run | None
    parity: Run | None
    kernels: Mapping[str, Any] | None
    host: Sequence[Mapping[str, Any]] | None
    before: Run | None  # the newest run of this GPU in bench/results/
    worse: Sequence[str]  # what is slower than there by more than the spread, or has no time now

    @classmethod
    def of(cls, folder: Path, outcomes: Sequence[Outcome]) -> Findings:
        """Read the files that the stages left in `folder`."""
        about = state.read_json(folder / "machine.json") or {}
        latest = records.latest(about["gpu"]) if about else None
        speed, before = _run(folder / "speed" / "records.json"), _run(latest) if latest else None
        return cls(
            folder, outcomes, about, speed=speed, before=before,
            hopper=_run(folder / "hopper-speed" / "records.json"),
            parity=_run(folder / "parity" / "records.json"),
            kernels=state.read_json(folder / "compile" / "kernels.json"),
            host=state.read_json(folder / "host" / "microseconds.json"),
            worse=list(changes(before, speed)) if before and speed else [],
        )  # fmt: skip

    def of_stage(self, name: str) -> Outcome:
        nothing = Outcome(name, UNFINISHED, 0.0, "did not begin", {}, {})
        return next((o for o in self.outcomes if o.name == name), nothing)


def _run(path: Path) -> Run | None:
    try:
        return records.read(path)
    except (OSError, ValueError):
        return None


def changes(before: Run, after: Run) -> Iterator[str]:
    """Which of our rows became slower by more than both spreads and THRESHOLD, or lost their time."""
    new = {r.key: r for r in after.records if r.provider == OURS and not r.estimate}
    for old in before.records:
        r = new.get(old.key)
        if r is None or old.ms is None or (r.reason or "").startswith("not run"):
            continue
        name = f"{r.op} {r.direction}, {r.shape}"
        if r.ms is None:
            yield f"{name}: took {old.ms:.4f} ms, now: {r.reason or 'no time'}"
        elif r.ms / old.ms - 1 > max(THRESHOLD, old.spread or 0, r.spread or 0):
            yield f"{name}: {r.ms / old.ms - 1:.1%} slower, {old.ms:.4f} -> {r.ms:.4f} ms"


# --- lines -----------------------------------------------------------------------------------------------------------


def line(o: Outcome) -> str:
    """The line of a stage."""
    counted = ", ".join(f"{n:,} {what}" for what, n in o.counts.items())
    said = o.last_line if not counted else f"{counted}; {o.last_line}" if o.wrong or "parts" in o.last_line else counted
    seconds = f"{o.seconds:4.0f} s" if o.seconds else "      "
    return _short(f"{o.status:10} {o.name:13}{seconds}  {said}")


def page(found: Findings) -> str:
    """The page: at most LINES lines of at most COLUMNS characters."""
    about = found.about
    if not about:
        return f"no run in {found.folder}"
    minutes = sum(o.seconds for o in found.outcomes) / 60
    lines = [
        "llama_kernels on {gpu}, driver {driver}, torch {torch}, triton {triton}".format(**about),
        f"commit {about['commit'] or 'unknown'}, {about['date']}, {minutes:.1f} minutes in stages",
        "",
    ]
    lines += [line(o) for o in found.outcomes]
    lines += ["", *_wrapped("parity", _parity(found)), *_wrapped("determinism", _determinism(found)),
              *_wrapped("races", _races(found)), *_attention(found), ""]  # fmt: skip
    lines += _speed(found)
    lines += _wrapped("last record", _last_record(found))
    following = ["", "next", *(f"  {step}" for step in _next(found))]
    return "\n".join(map(_short, [*lines[: LINES - len(following)], *following]))


def _short(text: str) -> str:
    return (text if len(text) <= COLUMNS else text[: COLUMNS - 3] + "...").rstrip()


def _wrapped(title: str, text: str, most: int = 2) -> list[str]:
    lines = textwrap.wrap(text, COLUMNS - 14) or [""]
    if len(lines) > most:
        lines = [*lines[: most - 1], " ".join(lines[most - 1 :])]
    return [f"{title if i == 0 else '':14}{part}" for i, part in enumerate(lines)]


def _parity(found: Findings) -> str:
    tests = found.of_stage("tests")
    suite = f"suite: {', '.join(f'{n:,} {what}' for what, n in tests.counts.items()) or tests.status}"
    if found.parity is None:
        return f"the work of the bench was not compared; {suite}"
    ours = [r for r in found.parity.records if r.provider == OURS]
    if wrong := {f"{r.op}, {r.shape}, {r.dtype}: {r.reason}" for r in ours if r.reason}:
        return f"WRONG: {'; '.join(sorted(wrong))}; {suite}"
    errors: dict[str, float] = {}
    for r in ours:
        errors[r.dtype] = max(errors.get(r.dtype, 0.0), r.error or 0.0)
    worst = ", ".join(f"{dtype} {error:.1e}" for dtype, error in errors.items())
    works = len({r.key[:1] + r.key[2:] for r in ours})
    return f"right in {works} pieces of work of the bench, largest relative error {worst}; {suite}"


def _determinism(found: Findings) -> str:
    o = found.of_stage("determinism")
    if o.status == PASSED:
        return "gradients repeat bit for bit, a thousand times, while other processes load the GPU"
    return f"{o.status}: {o.last_line}"


def _races(found: Findings) -> str:
    o = found.of_stage("sanitizer")
    unknown = "accesses out of bounds, races in shared memory and reads of unwritten memory are not tested"
    if o.status in (ABSENT, UNFINISHED):
        return f"not looked for ({o.last_line}): {unknown}"
    return "none found by memcheck, racecheck and initcheck" if o.status == PASSED else f"{o.status}: {o.last_line}"


def _attention(found: Findings) -> Iterator[str]:
    """The kernels that attention launches, their tiles, and the reason for them."""
    if found.kernels is None:
        yield from _wrapped("attention", "its kernels are not known, because the compile stage has not ended")
        return
    launched, family = found.kernels["launched"], found.kernels["target"]["family"]
    plain = _launches(launched, "bench: attention, ")
    for name, tile, _ in plain:
        yield _short(f"{'attention' if name == plain[0][0] else '':14}{name}: {tile}")
    reasons = {pass_: str(dispatch.for_heads(pass_, family, 128)) for pass_ in ("forward", "backward")}
    both = reasons["forward"] == reasons["backward"]
    said = "; ".join(f"{pass_}: {reason}" for pass_, reason in reasons.items())
    yield from _wrapped("  why", f"forward: {reasons['forward']}" if both else said)
    if said := _fallbacks(found.folder):
        yield from _wrapped("  Hopper", said)
    if layer := _launches(launched, "patched layer: "):
        known = {digest for *_, digest in plain}
        others = ", ".join(f"{name} ({tile})" for name, tile, digest in layer if digest not in known)
        found_there = f"OTHER kernels: {others}" if others else "the kernels of the plain causal call"
        yield from _wrapped("  a layer", f"a patched Llama layer launches {found_there}")


def _launches(launched: Mapping[str, Any], kind: str) -> list[tuple[str, str, str]]:
    """(name, tile, digest of the cache key) of the kernels of attention in the call of this kind at SHAPE."""
    calls = (kernels for call, kernels in launched.items() if call.startswith(kind) and SHAPE in call)
    return [tuple(k) for k in next(calls, []) if k[0] in _ATTENTION]


def _fallbacks(folder: Path) -> str:
    """The warning of the package if a Hopper kernel failed and the portable one ran in its place; else ""."""
    for log in sorted((*folder.glob("hopper-speed/*.txt"), *folder.glob("hopper/*.txt"))):
        if said := re.search(r"llama_kernels: (attention .*since the Hopper one failed\..*)", log.read_text()):
            return said[1]
    return ""


def _speed(found: Findings) -> Iterator[str]:
    if found.speed is None:
        yield "speed         not measured"
        return
    rates = found.speed.ceilings
    yield (f"speed against the goals, slowest shape, bf16 (copy {rates.get('copy', 0):,.0f} GB/s, "
           f"product {rates.get('bfloat16', 0):,.0f} TFLOP/s)")  # fmt: skip
    for s in goals.standings(found.speed.records, found.hopper.records if found.hopper else ()):
        value = s.why if s.value is None else s.goal.shown(s.value)
        yield _goal_line(s.goal.work, s.goal.direction, str(s.goal), value, s.met)
    if found.host:
        slowest = max(found.host, key=lambda r: r["forward"])
        us = slowest["forward"] + goals.LAUNCH_MICROSECONDS
        goal = f"{goals.HOST_MICROSECONDS:g} us, launch included"
        yield _goal_line(f"host, {slowest['op']}", "forward", goal, f"{us:.1f}", us <= goals.HOST_MICROSECONDS)


def _goal_line(work: str, direction: str, goal: str, value: str, met: bool | None) -> str:
    verdict = "-" if met is None else "met" if met else "MISSED"
    return _short(f"  {work:37}{direction:10}{goal:25}{verdict:8}{value}")


def _last_record(found: Findings) -> str:
    if found.speed is None:
        return "not compared: nothing was measured"
    if found.before is None:
        return f"bench/results/ has no run of {found.about['gpu']}"
    rows = {r.key for r in found.speed.records} & {r.key for r in found.before.records}
    when = f"{found.before.machine.get('date', '')[:10]}, commit {found.before.machine.get('commit')}"
    if not found.worse:
        return f"nothing is slower by more than the spread in {len(rows)} rows ({when})"
    return f"WORSE than {when}: " + "; ".join(found.worse)


def _next(found: Findings) -> list[str]:
    """At most five steps to do next, the most urgent first."""
    again, steps = "python -m bench.gpu_check", []
    for o in found.outcomes:
        if o.wrong:
            logs = f"{os.path.relpath(found.folder)}/{o.name}/*.txt"
            steps.append(f"{again} --only {o.name}, which is wrong: see {logs}")
    if left := [o.name for o in found.outcomes if o.status == UNFINISHED]:
        steps.append(f"{again} continues with {', '.join(left)}")
    if found.worse:
        steps.append(f"see what became slower: {again} --only speed --fresh, then python -m bench compare")
    if any(o.status == ABSENT and o.name == "sanitizer" for o in found.outcomes):
        steps.append("install compute-sanitizer (CUDA toolkit), or set CUDA_HOME, for the sanitizer stage")
    if not steps:
        steps.append("python -m bench --save keeps the records of published shapes; commit bench/results/")
        if found.hopper:
            steps.append("if the Hopper goals are met: name the record in TILES of ops/attention/hopper/tables.py")
    return steps[:5]
