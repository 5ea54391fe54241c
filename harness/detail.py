"""Blocks of a run's records -> what the charts of a report need beyond its figures: distributions, trials, the run over
time, a sample of requests.  Its size does not grow with the run, and no stamp within an answer is read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from harness.records import NAN, Floats, Table
from harness.stats import Spread
from harness.tally import Blocks, Tally

SHOWN = ("ttft", "itl", "e2e")  # whose distributions are kept
STEPS = 48  # of a distribution
BUCKETS = 240  # of the time line
STRETCHES = 400  # trials of points that are marked on it, at most
ROWS = 380  # requests of the sample, at most, and as many of the slowest as SLOWEST
SLOWEST = 20
RANKED = ("p50", "p90", "p95", "p99")
READ = (
    "point", "trial", "warmup", "sent_s", "last_token_s", "end_s", "id", "scheduled_s", "first_token_s",
    "output_tokens", "error_class",
)  # fmt: skip
PER_REQUEST = ("ttft", "itl", "tpot", "e2e")  # of which one request can be said to meet an objective


def rounded(value: float) -> float:
    """Six digits: more would differ with the order of summing."""
    return float(f"{value:.6g}") if math.isfinite(value) else NAN


def of_tally(tally: Tally) -> dict[str, Any]:
    """The distributions of a point's times, and the figures of its trials."""
    spreads = {name: tally.spreads[name] for name in SHOWN if tally.spreads[name].n}
    return {"spread": {f"{name}_s": _spread(spread) for name, spread in spreads.items()}, "trials": _trials(tally)}


def _spread(spread: Spread) -> dict[str, Any]:
    """`q` against `value`, finer towards the tail, its end the largest value; `rank`: the 95 % interval of a percentile by
    the ranks that bound it if requests were independent (normal approximation of the binomial), NaN past the ends."""
    nines = np.linspace(0, math.log10(max(spread.n, 2)), STEPS - 1)
    qs = [*(1 - 10.0**-nines).tolist(), 1.0]
    rank = {}
    for name in RANKED:
        q = int(name[1:]) / 100
        half = 1.96 * math.sqrt(q * (1 - q) / spread.n)
        ends = [q - half, q + half]
        found = spread.quantiles(*(min(max(end, 0.0), 1.0) for end in ends))
        rank[name] = [rounded(v) if 0 <= end <= 1 else NAN for v, end in zip(found, ends, strict=True)]
    values = [rounded(value) for value in spread.quantiles(*qs)]
    return {"n": spread.n, "q": [rounded(q) for q in qs], "value": values, "rank": rank}


def _trials(tally: Tally) -> list[dict[str, Any]]:
    rows = []
    for k, trial in sorted(tally.trials.items()):
        means = {f"{name}_s": rounded(trial.means[name].value) for name in SHOWN}
        rates = {name: rounded(value) for name, value in trial.rates().items()}
        rows.append({"trial": k, "requests": trial.means["e2e"].n} | means | rates)
    return rows


def over_time(span: Span, blocks: Blocks, shown: int | None, limits: Mapping[str, float]) -> dict[str, Any]:
    """The run in at most BUCKETS stretches; a sample of the requests of point `shown`'s first trial with requests; and
    for each point how many of its requests met all `limits` (of PER_REQUEST, seconds).  `span` has seen all blocks."""
    if not math.isfinite(span.start_s) or span.end_s <= span.start_s:
        return {"timeline": None, "sample": None, "attained": {}}
    line, sample, attained = _Line(span), _Sample(span, shown), _Attained(limits)
    for t in blocks(READ, False):
        for part in (line, sample, attained):
            part.add(t)
    return {"timeline": line.rows(), "sample": sample.rows(), "attained": attained.points if limits else {}}


@dataclass(slots=True)
class Span:
    """When the run began and ended, each trial of a point too, and how many measured requests each has."""

    start_s: float = math.inf
    end_s: float = -math.inf
    stretches: dict[tuple[int, int], list[float]] = field(default_factory=dict)  # (point, trial) -> began, ended
    requests: Counter[tuple[int, int]] = field(default_factory=Counter)

    def add(self, t: Table) -> None:
        if not len(t):
            return
        last_s = _last_s(t)
        self.start_s, self.end_s = min(self.start_s, float(t.sent_s.min())), max(self.end_s, float(last_s.max()))
        for key in sorted(set(zip(t.point.tolist(), t.trial.tolist(), strict=True))):
            mine = (t.point == key[0]) & (t.trial == key[1])
            ends = self.stretches.setdefault(key, [math.inf, -math.inf])
            ends[0], ends[1] = min(ends[0], float(t.sent_s[mine].min())), max(ends[1], float(last_s[mine].max()))
            self.requests[key] += int((mine & ~t.warmup).sum())


def _last_s(t: Table) -> Floats:
    """When a request was over: its last token, else its end, else its sending."""
    last_s = np.where(np.isnan(t.last_token_s), t.end_s, t.last_token_s)
    return np.asarray(np.where(np.isnan(last_s), t.sent_s, last_s))


class _Line:
    """In flight and tokens per second over time.  A request's tokens count evenly from its first to its last."""

    def __init__(self, span: Span) -> None:
        self.span = span
        self.edges = np.linspace(span.start_s, span.end_s, BUCKETS + 1)
        self.in_flight, self.tokens = np.zeros(BUCKETS + 1), np.zeros(BUCKETS + 1)
        self.errors = np.zeros(BUCKETS)

    def add(self, t: Table) -> None:
        self.in_flight += _elapsed(self.edges, t.sent_s, _last_s(t), np.ones(len(t)))
        good = t.ok & (t.output_tokens > 0) & (t.last_token_s >= t.first_token_s)
        length_s = np.maximum((t.last_token_s - t.first_token_s)[good], 1e-9)
        first_s = t.first_token_s[good]
        self.tokens += _elapsed(self.edges, first_s, first_s + length_s, t.output_tokens[good] / length_s)
        self.errors += np.histogram(t.sent_s[~t.ok], self.edges)[0]

    def rows(self) -> dict[str, Any]:
        width_s = float(self.edges[1] - self.edges[0])
        ordered = sorted(self.span.stretches.items(), key=lambda pair: (pair[1], pair[0]))[:STRETCHES]
        since = self.span.start_s
        stretches = [[*key, *(rounded(end - since) for end in ends)] for key, ends in ordered]
        return {
            "step_s": rounded(width_s),
            "in_flight": [rounded(v) for v in (np.diff(self.in_flight) / width_s).tolist()],
            "output_tokens_per_s": [rounded(v) for v in (np.diff(self.tokens) / width_s).tolist()],
            "errors": [int(n) for n in self.errors],
            "stretches": stretches,
        }


def _elapsed(edges: Floats, start_s: Floats, end_s: Floats, weight: Floats) -> Floats:
    """Sum over all rows of weight x the time that has passed of [start, end], at each edge."""
    return _ramp(edges, start_s, weight) - _ramp(edges, end_s, weight)


def _ramp(edges: Floats, from_s: Floats, weight: Floats) -> Floats:
    """Sum of weight x max(0, edge - from), at each edge."""
    order = np.argsort(from_s, kind="stable")
    at = np.searchsorted(from_s[order], edges)
    weights = np.concatenate([[0.0], np.cumsum(weight[order])])
    moments = np.concatenate([[0.0], np.cumsum((weight * from_s)[order])])
    return np.asarray(weights[at] * edges - moments[at])


class _Sample:
    """Requests of one trial in the order of the file, evenly picked, and the slowest of them all."""

    NAMES = ("id", "scheduled_s", "sent_s", "first_token_s", "last_token_s", "output_tokens", "ok")

    def __init__(self, span: Span, shown: int | None) -> None:
        self.start_s, self.point = span.start_s, shown
        trials = [trial for (point, trial), n in span.requests.items() if point == shown and n]
        self.trial = min(trials, default=None)
        self.total = span.requests[shown, self.trial] if shown is not None and self.trial is not None else 0
        self.every, self.seen = max(1, math.ceil(self.total / ROWS)), 0
        self.picked: list[dict[str, float]] = []
        self.slowest: list[dict[str, float]] = []

    def add(self, t: Table) -> None:
        t = t.where((t.point == self.point) & (t.trial == self.trial) & ~t.warmup)
        if not len(t):
            return
        order = np.arange(self.seen, self.seen + len(t))
        self.seen += len(t)
        self.picked += [self._row(t, int(k)) for k in np.flatnonzero(order % self.every == 0)]
        took_s = np.nan_to_num(_last_s(t) - t.sent_s)
        worst = np.argsort(-took_s, kind="stable")[:SLOWEST]
        self.slowest += [self._row(t, int(k)) for k in worst]
        self.slowest.sort(key=lambda row: (row["sent_s"] - row["last_token_s"], row["id"]))
        del self.slowest[SLOWEST:]

    def _row(self, t: Table, k: int) -> dict[str, float]:
        times = {
            name: round(float(getattr(t, name)[k]) - self.start_s, 6)
            for name in ("scheduled_s", "sent_s", "first_token_s")
        }
        tokens = int(t.output_tokens[k])
        return {"id": int(t.id[k]), **times, "last_token_s": round(float(_last_s(t)[k]) - self.start_s, 6),
                "output_tokens": tokens if tokens >= 0 else NAN, "ok": bool(t.ok[k])}  # fmt: skip

    def rows(self) -> dict[str, Any] | None:
        if not self.picked:
            return None
        slow = {row["id"] for row in self.slowest}
        kept = [*(row for row in self.picked if row["id"] not in slow), *self.slowest]
        kept.sort(key=lambda row: (row["sent_s"], row["id"]))
        columns = {name: [row[name] for row in kept] for name in self.NAMES}
        return {"point": self.point, "trial": self.trial, "of": self.total, "slowest": sorted(slow), **columns}


class _Attained:
    """How many requests of each point met all the limits that one request can meet; a failed one meets none."""

    def __init__(self, limits: Mapping[str, float]) -> None:
        self.limits = limits
        self.points: dict[int, dict[str, int]] = {}

    def add(self, t: Table) -> None:
        t = t.where(~t.warmup)
        steps = np.where(t.output_tokens > 1, t.output_tokens - 1, 1)
        pace_s = (t.last_token_s - t.first_token_s) / steps
        values = {"ttft": t.first_token_s - t.sent_s, "itl": pace_s, "tpot": pace_s, "e2e": t.last_token_s - t.sent_s}
        met = t.ok
        for name, bound in self.limits.items():
            met = met & (values[name] <= bound)
        for point in np.unique(t.point).tolist():
            row = self.points.setdefault(point, {"requests": 0, "met": 0})
            mine = t.point == point
            row["requests"] += int(mine.sum())
            row["met"] += int(met[mine].sum())


def build(
    tallies: Mapping[int, Tally], span: Span, blocks: Blocks, shown: int | None, limits: Sequence[tuple[str, float]]
) -> dict[str, Any]:
    """All of it, as summary.json holds it under `detail`.  `limits`: (metric of baseline's names, seconds); of several
    of one kind the strictest is that of each request."""
    bounds: dict[str, float] = {}
    for metric, bound in limits:
        name = metric.partition("_")[0]
        if name in PER_REQUEST:
            bounds[name] = min(bound, bounds.get(name, math.inf))
    found = over_time(span, blocks, shown, bounds)
    attained = found.pop("attained")
    points = {
        str(index): of_tally(tally) | {"attained": attained.get(index)}
        for index, tally in tallies.items()
        if tally.requests
    }
    return {"points": points, "limits": bounds} | found
