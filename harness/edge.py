"""One point's records -> what a search for the capacity asks of them: each objective with its interval, and whether
arrivals outran completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from harness import baseline
from harness.metrics import METRICS, Metric
from harness.records import NAN, Floats, Table
from harness.slo import Limit

SECTIONS = 12
T95 = 2.201  # Student's t, two-sided, 11 degrees of freedom
GROWTH = 0.02  # of the arrivals: a backlog that grows by more is no fluctuation of a queue that holds
SETTLED = 3.0  # a point must last so many times as long as a request before a growing backlog means anything


def readings(t: Table, limits: Sequence[Limit], mode: str) -> list[dict[str, Any]]:
    """The value of each objective over the good measured requests, with its 95 % interval; seconds."""
    good = t.where(t.ok & ~t.warmup)
    begun_s = np.where(np.isnan(good.scheduled_s), good.sent_s, good.scheduled_s)
    place = np.empty(len(good), int)
    place[np.argsort(begun_s, kind="stable")] = np.arange(len(good)) * SECTIONS // max(1, len(good))
    sections = [good.where(place == k) for k in range(SECTIONS)]
    rows = []
    for limit in limits:
        metric, q = _of(limit.metric, mode)
        values = [v[~np.isnan(v)] for v in (metric.compute(section) for section in sections)]
        value, low, high = quantile(values, q, metric.level == "request")
        rows.append({"metric": limit.metric, "bound": limit.bound, "value": value, "low": low, "high": high,
                     "n": sum(map(len, values))})  # fmt: skip
    return rows


def _of(name: str, mode: str) -> tuple[Metric, float | None]:
    """(metric, quantile or None for the mean).  In an open loop TTFT counts from when the request was due."""
    family, _, statistic = name.rpartition("_")
    family = "ttft_scheduled" if family == "ttft" and mode == "open" else family
    metric = next(metric for metric in METRICS if metric.name == family)
    return metric, baseline.QUANTILES.get(statistic)


def quantile(sections: Sequence[Floats], q: float | None, alone: bool) -> tuple[float, float, float]:
    """(value, low, high): a quantile (None: the mean) of what successive sections hold, with its 95 % interval by
    leaving out one section at a time, on the scale of logarithms (Shao and Wu 1989: a jackknife of large groups holds for
    quantiles, and for neighbours that depend on each other).  Where each value is of another request (`alone`) it is at
    least what ranks give."""
    whole = np.concatenate(list(sections)) if sections else np.empty(0)
    if not len(whole):
        return NAN, NAN, NAN
    value = _statistic(whole, q)
    filled = [k for k, section in enumerate(sections) if len(section)]
    if len(filled) < SECTIONS or not value > 0:  # fewer requests than sections
        return value, value / 1.5, value * 1.5
    left = [_statistic(np.concatenate([s for j, s in enumerate(sections) if j != k]), q) for k in filled]
    logs = np.log(np.maximum(left, 1e-9))
    sd = float(np.sqrt((SECTIONS - 1) / SECTIONS * np.sum((logs - logs.mean()) ** 2)))
    low, high = value * np.exp(-T95 * sd), value * np.exp(T95 * sd)
    if q is not None and alone:
        n = len(whole)
        half = 1.96 * np.sqrt(q * (1 - q) / n)
        low = min(low, float(np.quantile(whole, max(0.0, q - half))))
        high = max(high, float(np.quantile(whole, min(1.0, q + half))) * (1.5 if q + half >= 1 else 1.0))
    return value, float(low), float(high)


def _statistic(values: Floats, q: float | None) -> float:
    return float(np.mean(values)) if q is None else float(np.quantile(values, q))


def backlog(t: Table) -> tuple[bool, float]:
    """(arrivals outran completions, requests completed per second while they did; NaN if they did not), of a point of an
    open loop.  In flight at the arrivals of the measured part must rise from quarter to quarter, by more than GROWTH of
    them and than a queue of that length fluctuates; and the point must have lasted long enough to tell."""
    due_s = np.where(np.isnan(t.scheduled_s), t.sent_s, t.scheduled_s)
    done_s = np.where(np.isnan(t.last_token_s), t.end_s, t.last_token_s)
    known = ~np.isnan(done_s)
    due_s, done_s, measured = due_s[known], done_s[known], ~t.warmup[known]
    n = int(measured.sum())
    if n < 16:
        return False, NAN
    order = np.argsort(due_s, kind="stable")
    due_s, done_s, measured = due_s[order], done_s[order], measured[order]
    shortest_s = float(np.min(done_s - due_s))  # the first ones found the server idle
    lasted_s = float(due_s[-1] - due_s[measured][0])
    if lasted_s < SETTLED * shortest_s:
        return False, NAN
    in_flight = np.arange(len(due_s)) - np.searchsorted(np.sort(done_s), due_s, side="right")
    quarters = [float(np.mean(part)) for part in np.array_split(in_flight[measured], 4)]
    risen = quarters[3] - quarters[0]
    rises = quarters[3] > max(quarters[:2]) and quarters[2] > quarters[0]
    if not (rises and risen * 4 / 3 > GROWTH * n and risen > 4 * np.sqrt(quarters[0] + 1)):
        return False, NAN
    return True, rate(due_s, done_s)


def rate(due_s: Floats, done_s: Floats) -> float:
    """Completions per second of a server that was never idle: between the rate since the first arrival, which has the
    first service time in it, and that since the first completion, which lacks one."""
    ended = np.sort(done_s)
    since_arrival, since_end = ended[-1] - due_s.min(), ended[-1] - ended[0]
    if since_end <= 0 or since_arrival <= 0:
        return NAN
    return float(np.sqrt(len(ended) / since_arrival * (len(ended) - 1) / since_end))


def objective(t: Table, limits: Sequence[Limit], mode: str) -> dict[str, Any]:
    """What a point's row in the summary holds of a search."""
    saturated, served = backlog(t.where(t.ok)) if mode == "open" else (False, NAN)
    return {"readings": readings(t, limits, mode), "saturated": saturated, "served_per_s": served}
