"""A workload -> its points, and the requests of each trial in the order of sending.  Reads the files a workload names."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from harness import lengths, tokens, trace
from harness.arrivals import Stretch, expected, offsets_s, rescaled
from harness.lengths import Asks
from harness.records import NAN, Floats, Ints, Play, Request
from harness.scenario import Workload


@dataclass(slots=True)
class Point:
    """One line of the report: a batch size, a rate, or a rate that changes (`stretches`; `rate` is its mean).  `play`: of
    its own, where a search chose it; else the workload says."""

    index: int
    batch_size: int | None
    rate: float | None
    stretches: tuple[Stretch, ...] = ()
    name: str = ""
    play: Play | None = None

    @property
    def label(self) -> str:
        return self.name or (f"batch size {self.batch_size}" if self.batch_size else f"{self.rate:g} requests/s")

    def as_dict(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "rate": self.rate} | (
            {"label": self.name} if self.name else {}) | ({"play": asdict(self.play)} if self.play else {})  # fmt: skip


def searched(points: Sequence[Mapping[str, Any]]) -> list[Point]:
    """The points of a search, as run.json holds them."""
    return [Point(i, p["batch_size"], p["rate"], play=Play(**p["play"])) for i, p in enumerate(points)]


def points_of(workload: Workload) -> list[Point]:
    if workload.mode != "open":
        return [Point(i, size, None) for i, size in enumerate(workload.batch_sizes)]
    points = [Point(i, None, rate) for i, rate in enumerate(workload.rates)]
    if ramp := workload.rate_ramp:
        name = f"{ramp.start:g} to {ramp.end:g} requests/s over {ramp.over_s:g} s"
        points.append(_shaped(len(points), name, (ramp.over_s, ramp.start, ramp.end)))
    if steps := workload.rate_steps:
        name = f"{', '.join(f'{step.rate:g}' for step in steps)} requests/s in steps"
        points.append(_shaped(len(points), name, *((step.for_s, step.rate, step.rate) for step in steps)))
    if workload.trace:
        due_s = _replayed(workload)
        points.append(
            Point(0, None, len(due_s) / (float(due_s[-1]) or 1.0), name=f"trace {trace.name_of(workload.trace)}")
        )
    return points


def _shaped(index: int, name: str, *stretches: Stretch) -> Point:
    return Point(index, None, expected(stretches) / sum(for_s for for_s, _, _ in stretches), stretches, name)


def _replayed(workload: Workload) -> Floats:
    found = trace.read(str(workload.trace)).due_s
    assert found is not None
    return found / workload.trace_speed


def counts_of(workload: Workload, point: Point) -> tuple[int, int | None]:
    """(warm-up requests, measured requests) of one trial; None measured: as many as the duration allows."""
    if point.play:
        return point.play.warmup, point.play.requests
    if workload.mode == "wave":
        size = point.batch_size or 1
        warm = math.ceil(workload.warmup / size) * size
        if workload.requests:
            return warm, math.ceil(workload.requests / size) * size
        return warm, workload.waves * size if workload.waves else None if workload.duration_s else 3 * size
    if workload.trace:
        rows = len(_replayed(workload))
        warm = min(workload.warmup, rows - 1)
        return warm, min(rows - warm, workload.requests or rows)
    warm = math.ceil(workload.warmup / workload.turns) * workload.turns  # whole sessions
    if workload.requests:
        return warm, workload.requests
    if point.stretches:
        return warm, max(1, math.ceil(expected(point.stretches))) * workload.turns
    if workload.duration_s is None:
        return warm, (4 * point.batch_size if point.batch_size else 100) * workload.turns
    return warm, max(1, math.ceil(point.rate * workload.duration_s)) * workload.turns if point.rate else None


def planned(workload: Workload, point: Point) -> int | None:
    """Measured requests of all trials of a point; None where that is not known before."""
    measured = counts_of(workload, point)[1]
    return None if measured is None or workload.precision else measured * workload.trials


def prompts_needed(workload: Workload) -> int | None:
    """Requests of the whole run; None where that is not known before."""
    counts = [counts_of(workload, point) for point in points_of(workload)]
    if workload.precision or any(measured is None for _, measured in counts):
        return None
    return sum(warm + (measured or 0) for warm, measured in counts) * workload.trials


def asks_of(workload: Workload) -> tuple[Asks, list[str]]:
    """What the requests of each trial ask, and the prompts where files give them (else none).  Follows from the seed.
    Raises RidgelineError naming the file and the line."""
    if workload.trace:
        asks = trace.read(workload.trace)
        return asks, list(asks.texts)
    needed = prompts_needed(workload)
    spec = workload.model_dump(include={"input_tokens", "output_tokens"})
    if workload.prompts:
        texts = trace.read_prompts(workload.prompts, needed or 100_000)
        outputs = _drawn(workload, spec["output_tokens"], "output", min(needed or lengths.ROWS, lengths.ROWS))
        return _rows(np.full(len(outputs), -1), outputs), texts
    if all(isinstance(length, int) for length in spec.values()) and workload.turns == 1:
        rows = 1 if workload.same_prompt else min(needed or tokens.POOL, tokens.POOL)
        return Asks(
            np.full(rows, spec["input_tokens"]), np.full(rows, spec["output_tokens"]), np.full(rows, -1), alike=True
        ), []
    counts = [counts_of(workload, point) for point in points_of(workload)]
    longest = max(lengths.ROWS if measured is None else warm + measured for warm, measured in counts)
    rows = math.ceil(min(longest, lengths.ROWS) / workload.turns) * workload.turns
    inputs, outputs = (_drawn(workload, spec[f"{side}_tokens"], side, rows) for side in ("input", "output"))
    if workload.turns > 1:
        return Asks(*lengths.in_turns(inputs, outputs, workload.turns)), []
    return _rows(inputs, outputs), []


def _rows(inputs: Ints, outputs: Ints) -> Asks:
    return Asks(inputs, outputs, np.full(len(outputs), -1))


def _drawn(workload: Workload, length: lengths.Length, side: str, n: int) -> Ints:
    listed, rows = None, None
    if lengths.kind_of(length)[0] == "file":
        listed = trace.pairs(lengths.kind_of(length)[1])[side == "output"]
        rows = np.random.default_rng([workload.seed, 11]).integers(0, len(listed), n)
    return lengths.draw(length, np.random.default_rng([workload.seed, 12, side == "output"]), n, listed, rows)


def context_tokens(workload: Workload) -> int:
    """The most tokens that a request and its answer may hold together.  Reads files that a workload names."""
    if workload.trace or workload.turns > 1:
        asks = asks_of(workload)[0]
        return int(np.max(np.maximum(asks.input_tokens, 0) + asks.output_tokens))
    found = 0
    for side in ("input", "output"):
        length = workload.model_dump()[f"{side}_tokens"]
        kind, path = lengths.kind_of(length)
        found += int(trace.pairs(path)[side == "output"].max()) if kind == "file" else lengths.longest(length) or 0
    return found


def due_s(workload: Workload, point: Point, trial: int, n: int) -> Floats | None:
    """When each of `n` arrivals is due, in seconds since the trial began; None where requests go as slots free."""
    if workload.trace:
        return _replayed(workload)
    if not point.rate:
        return None
    rng = np.random.default_rng([workload.seed, point.index, trial])
    if point.stretches:
        return rescaled(offsets_s(workload.arrivals, rng, 1.0, n, workload.burstiness), point.stretches)
    # A search takes its intervals from how parts of a run differ: as much as they would of independent arrivals.
    return offsets_s(workload.arrivals, rng, point.rate, n, workload.burstiness, point.play is not None)


def trial_requests(workload: Workload, point: Point, trial: int, prompts: tokens.Prompts,
                   numbers: Iterator[int]) -> Iterator[Request]:  # fmt: skip
    """The requests of one trial in the order of sending.  `numbers` hands out ids that are unique in the run."""
    warm, measured = counts_of(workload, point)
    size, turns = point.batch_size or 1, workload.turns
    asks = prompts.asks or asks_of(workload)[0]
    rows = list(zip(asks.input_tokens.tolist(), asks.output_tokens.tolist(), asks.after.tolist(), strict=True))
    due = due_s(workload, point, trial, warm + (measured or 0))
    if point.play and point.play.fill_s and due is None:
        due = np.concatenate([np.arange(size) * point.play.fill_s / size, np.full(warm + (measured or 0), NAN)])
    for i in itertools.count() if measured is None else range(warm + measured):
        number, row = next(numbers), i % len(rows)
        asked, output_tokens, before = rows[row]
        after = number - (row - before) if before >= 0 else None
        # A later turn is due when its session has come to it; in a trace, not before its own time either.
        scheduled_s = None if due is None or (after is not None and turns > 1) else float(due[i // turns])
        scheduled_s = None if scheduled_s != scheduled_s else scheduled_s
        yield Request(number, prompts.at(number, i), output_tokens, scheduled_s, i % turns if turns > 1 else i // size,
                      i < warm, None if asked < 0 else asked, after, workload.think_time_s)  # fmt: skip
