"""Every reported number is one row: name, unit, level, what is better, meaning, how it is computed from the stamps.

Definitions of the field differ; these are ours (see README, "What the numbers mean").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from harness import stats
from harness.records import NAN, Floats, Table

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Metric:
    """`compute` gives one value per request (level "request") or per token gap (level "gap")."""

    name: str
    unit: str
    level: str
    better: str
    meaning: str
    compute: Callable[[Table], Floats]


def ttft_s(t: Table) -> Floats:
    first = np.full(len(t), NAN)
    has = t.start[1:] > t.start[:-1]
    first[has] = t.chunk_s[t.start[:-1][has]]
    return first


def ttft_scheduled_s(t: Table) -> Floats:
    """With the lateness of sending, whoever caused it: the user waits either way."""
    late = np.where(np.isnan(t.scheduled_s), 0.0, t.sent_s - t.scheduled_s)
    return ttft_s(t) + late


def e2e_s(t: Table) -> Floats:
    last = np.full(len(t), NAN)
    has = t.start[1:] > t.start[:-1]
    last[has] = t.chunk_s[t.start[1:][has] - 1]
    return last


def tpot_s(t: Table) -> Floats:
    steps = (t.output_tokens - 1).astype(float)
    chunks = np.diff(t.start)
    # One arrival tells no pace, however many tokens it held.
    pace = np.divide(e2e_s(t) - ttft_s(t), steps, out=np.full(len(t), NAN), where=(steps > 0) & (chunks > 1))
    return np.asarray(pace)


def chunk_gap_s(t: Table) -> Floats:
    """All gaps between successive arrivals, of all requests, flat."""
    gaps = np.diff(t.chunk_s.astype(np.float64))
    inside = np.ones(len(gaps), bool)
    edges = t.start[1:-1] - 1
    inside[edges[(edges >= 0) & (edges < len(gaps))]] = False
    return gaps[inside]


def itl_s(t: Table) -> Floats:
    """Gaps per token.  Where arrivals held several tokens, each gap is spread evenly over the tokens it brought.

    Which gap brought how many is known only if the server tells; else the request's mean tokens per arrival is used.
    The weights are whole requests' tokens, so that a request counts by its length.
    """
    gaps = chunk_gap_s(t)
    chunks = np.diff(t.start)
    told = np.add.reduceat(np.append(t.chunk_tokens, 0), t.start[:-1])[: len(t)] if len(t) else np.empty(0)
    told = np.where(chunks > 0, told, 0)
    missing = np.where(
        (chunks > 1) & (t.output_tokens > told) & (told == chunks), t.output_tokens / np.maximum(chunks, 1), 1.0
    )
    per_gap = np.repeat(missing, np.maximum(chunks - 1, 0))
    tokens = _gap_tokens(t).astype(float) * per_gap
    if np.all(tokens == 1):
        return gaps
    weight = np.maximum(1, np.rint(tokens)).astype(int)
    return np.repeat(gaps / tokens, weight)


def _gap_tokens(t: Table) -> npt.NDArray[Any]:
    first = np.zeros(len(t.chunk_s), bool)
    starts = t.start[:-1]
    first[starts[starts < t.start[1:]]] = True
    return np.asarray(t.chunk_tokens[~first])


METRICS = (
    Metric("ttft", "s", "request", "lower", "time to first token: request written -> first event with generated text", ttft_s),
    Metric("itl", "s", "gap", "lower", "inter-token latency: gap between successive tokens; several tokens in one event "
           "share its gap evenly", itl_s),
    Metric("tpot", "s", "request", "lower", "time per output token: (last token - first token) / (output tokens - 1)", tpot_s),
    Metric("e2e", "s", "request", "lower", "end-to-end time: request written -> last token", e2e_s),
    Metric("chunk_gap", "s", "gap", "lower", "gap between successive network arrivals, whatever number of tokens each "
           "held", chunk_gap_s),
    Metric("ttft_scheduled", "s", "request", "lower", "TTFT from when the request was due: the headline in open loop",
           ttft_scheduled_s),
)  # fmt: skip


def distribution(values: Floats, per_trial: list[Floats]) -> dict[str, float | int]:
    values = values[~np.isnan(values)]
    low, high = stats.interval([stats.mean(v[~np.isnan(v)]) for v in per_trial])
    row: dict[str, float | int] = {"mean": stats.mean(values)}
    row |= {f"p{q}": stats.quantile(values, q / 100) for q in (50, 90, 95, 99)}
    return row | {"n": len(values), "low": low, "high": high}


def steady_window(t: Table, mode: str, slots: int) -> list[tuple[float, float]]:
    """Stretches of time (start, end; seconds since the run began) in which throughput is counted, for one trial.

    Wave: each wave from its release to its last token, since that is what the formulas describe.  Closed loop: from
    when all slots were filled to when the first stays empty.  Open loop: from the first to the last scheduled time.
    """
    if not len(t):
        return []
    last_s = t.sent_s + np.nan_to_num(e2e_s(t), nan=0.0)
    if mode == "wave":
        waves = np.unique(t.wave)
        return [(float(t.sent_s[t.wave == w].min()), float(last_s[t.wave == w].max())) for w in waves]
    if mode == "closed":
        sent = np.sort(t.sent_s)
        start = float(sent[min(slots, len(sent)) - 1])
        late = sent[-1]  # no request is sent after this, so the next ending leaves a slot empty
        ends = last_s[last_s > late]
        end = float(ends.min()) if len(ends) else float(last_s.max())
        return [(start, end)] if end > start else [(float(sent[0]), float(last_s.max()))]
    due = np.where(np.isnan(t.scheduled_s), t.sent_s, t.scheduled_s)
    start, end = float(due.min()), float(due.max())
    return [(start, end)] if end > start else [(start, float(last_s.max()))]


def _inside(times: Floats, windows: list[tuple[float, float]]) -> Mask:
    mask = np.zeros(len(times), bool)
    for start, end in windows:
        mask |= (times >= start) & (times <= end)
    return mask


def throughput(t: Table, windows: list[tuple[float, float]]) -> dict[str, float]:
    """Tokens and requests per second inside the windows, counted by token arrival; input tokens at the first token."""
    length_s = sum(end - start for start, end in windows)
    if length_s <= 0:
        return {"output_tokens_per_s": NAN, "total_tokens_per_s": NAN, "requests_per_s": NAN}
    counts = np.diff(t.start)
    per_chunk = np.divide(t.output_tokens, counts, out=np.zeros(len(t)), where=(counts > 0) & (t.output_tokens > 0))
    arrivals = np.repeat(t.sent_s, counts) + t.chunk_s
    # A window of a wave ends at its last token, rounded as float32: half a microsecond of grace keeps that token in.
    grace = [(start - 1e-6, end + 1e-6) for start, end in windows]
    tokens = float(np.repeat(per_chunk, counts)[_inside(arrivals, grace)].sum())
    begun = _inside(t.sent_s + ttft_s(t), grace)
    inputs = float(t.input_tokens[begun & (t.input_tokens > 0)].sum())
    ended = float(_inside(t.sent_s + e2e_s(t), grace).sum())
    return {
        "output_tokens_per_s": tokens / length_s,
        "total_tokens_per_s": (tokens + inputs) / length_s if inputs else NAN,
        "requests_per_s": ended / length_s,
    }


def _one(values: npt.NDArray[Any]) -> float | int | None:
    """The value all requests share, else their mean; None when the server told none."""
    known = values[values >= 0]
    if not len(known):
        return None
    return int(known[0]) if np.all(known == known[0]) else float(known.mean())


def point_summary(t: Table, mode: str, slots: int) -> dict[str, Any]:
    """All figures of one point from its measured records (warm-up left out, failures counted apart)."""
    t = t.where(~t.warmup)
    good = t.where(t.ok)
    trials = [good.where(good.trial == k) for k in np.unique(good.trial)]
    classes, counts = np.unique(t.error_class[~t.ok].astype(str), return_counts=True)
    row: dict[str, Any] = {
        "requests": len(t),
        "errors": int((~t.ok).sum()),
        "error_classes": {str(c): int(n) for c, n in zip(classes, counts, strict=True)},
        "trials": len(np.unique(t.trial)),
        "input_tokens": _one(good.input_tokens),
        "output_tokens": _one(good.output_tokens),
        "token_source": sorted(set(good.token_source.tolist())),
        "cached_tokens": _one(good.cached_tokens),
        "arrivals_per_token": _ratio(len(good.chunk_s), good.output_tokens[good.output_tokens > 0].sum()),
    }
    for metric in METRICS:
        row[f"{metric.name}_s"] = distribution(metric.compute(good), [metric.compute(trial) for trial in trials])
    rates = [throughput(trial, steady_window(trial, mode, slots)) for trial in trials]
    for name in ("output_tokens_per_s", "total_tokens_per_s", "requests_per_s"):
        row[name] = stats.mean(np.array([rate[name] for rate in rates]))
    low, high = stats.interval([rate["output_tokens_per_s"] for rate in rates])
    return row | {"output_tokens_per_s_low": low, "output_tokens_per_s_high": high}


def _ratio(a: float, b: float) -> float:
    return float(a / b) if b else NAN
