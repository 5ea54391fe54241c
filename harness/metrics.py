"""Every reported number is one row: name, unit, level, what is better, meaning, how it is computed from the stamps.

Definitions of the field differ; these are ours (see README, "What the numbers mean").
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from harness import stats
from harness.records import NAN, Floats, Ints, Table
from harness.stats import Spread


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
    counts = np.diff(t.start)
    if len(counts) and counts[0] > 0 and np.all(counts == counts[0]):  # answers of one length, as most runs have
        return np.asarray(np.diff(t.chunk_s.reshape(len(counts), -1), axis=1).ravel())
    gaps = np.diff(t.chunk_s)
    inside = np.ones(len(gaps), bool)
    edges = t.start[1:-1] - 1
    inside[edges[(edges >= 0) & (edges < len(gaps))]] = False
    return np.asarray(gaps[inside])


def itl_s(t: Table) -> Floats:
    """Gaps per token.  Where arrivals held several tokens, each gap is spread evenly over the tokens it brought.

    Which gap brought how many is known only if the server tells; else the request's mean tokens per arrival is used.
    The weights are whole requests' tokens, so that a request counts by its length.
    """
    gaps = chunk_gap_s(t)
    if one_token_each(t):
        return gaps
    chunks = np.diff(t.start)
    told = np.where(chunks > 0, _told(t), 0)
    missing = np.where(
        (chunks > 1) & (t.output_tokens > told) & (told == chunks), t.output_tokens / np.maximum(chunks, 1), 1.0
    )
    per_gap = np.repeat(missing, np.maximum(chunks - 1, 0))
    tokens = _gap_tokens(t).astype(float) * per_gap
    if np.all(tokens == 1):
        return gaps
    weight = np.maximum(1, np.rint(tokens)).astype(int)
    return np.repeat(gaps / tokens, weight)


def one_token_each(t: Table) -> bool:
    """Whether every arrival held one token, so that gaps per token are the gaps of the network."""
    return bool(np.all(t.chunk_tokens == 1) and np.all(t.output_tokens <= np.diff(t.start)))


def _told(t: Table) -> npt.NDArray[Any]:
    return np.asarray(np.add.reduceat(np.append(t.chunk_tokens, 0), t.start[:-1])[: len(t)] if len(t) else np.empty(0))


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


def distribution(values: Spread, per_trial: Sequence[float] = ()) -> dict[str, float | int]:
    """A row of the summary; `per_trial` are the means of the trials, from which the interval of the mean follows, and
    their median, which one trial on a disturbed machine does not move."""
    low, high = stats.interval(per_trial)
    row: dict[str, float | int] = {"mean": values.mean}
    row |= dict(zip(("p50", "p90", "p95", "p99"), values.quantiles(0.5, 0.9, 0.95, 0.99), strict=True))
    known = [mean for mean in per_trial if not math.isnan(mean)]
    return row | {
        "n": values.n,
        "low": low,
        "high": high,
        "median_of_trials": statistics.median(known) if known else NAN,
    }


Windows = list[tuple[float, float]]


def steady_window(begun_s: Floats, last_s: Floats, wave: Ints, mode: str, slots: int) -> Windows:
    """Stretches of time (start, end; seconds since the run began) in which throughput is counted, for one trial.

    Of its good requests: `begun_s` is when each was sent, or in open loop due; `last_s` its last token, or as sent where
    none came; `wave` its wave.  Wave: each wave from its release to its last token, since that is what the formulas
    describe.  Closed loop: from when all slots were filled to when the first stays empty.  Open loop: until the last
    scheduled time, from when the first requests had time to end (their median time after the first was due, if that
    leaves half of the schedule): until then fewer are in flight than the rate will bring.
    """
    if not len(begun_s):
        return []
    if mode == "wave":
        order = np.argsort(wave, kind="stable")
        starts = np.flatnonzero(np.diff(wave[order], prepend=wave[order][0] - 1))
        first, last = np.minimum.reduceat(begun_s[order], starts), np.maximum.reduceat(last_s[order], starts)
        return list(zip(first.tolist(), last.tolist(), strict=True))
    begun = np.sort(begun_s)
    start, end = float(begun[0]), float(last_s.max())
    if mode == "closed":
        full, late = float(begun[min(slots, len(begun)) - 1]), begun[-1]  # nothing is sent after `late`
        empty = float(np.min(last_s[last_s > late], initial=end))  # so the next ending leaves a slot empty
        return [(full, empty)] if empty > full else [(start, end)]
    if begun[-1] <= start:
        return [(start, end)]
    full = start + float(np.median(last_s - begun_s))
    return [(full if full <= (start + begun[-1]) / 2 else start, float(begun[-1]))]


def window_of(times: Floats, windows: Windows | Floats) -> Ints:
    """Which of the windows (ascending, not overlapping) holds each time, -1 for none.  Each is a microsecond wider: a
    window of a wave ends at its last token, which float32 may round past it."""
    if not len(windows):
        return np.full(len(times), -1)
    starts, ends = np.asarray(windows).T
    at = np.searchsorted(starts - 1e-6, times, side="right") - 1
    return np.asarray(np.where(times <= ends[np.maximum(at, 0)] + 1e-6, at, -1))


def tokens_inside(t: Table, windows: Windows | Floats) -> dict[str, float]:
    """Output tokens by their arrival, input tokens by the first token, and requests by their last, inside the windows."""
    first, last = window_of(t.first_token_s, windows), window_of(t.last_token_s, windows)
    whole = (first >= 0) & (first == last)  # all its arrivals are inside
    tokens = float(t.output_tokens[whole & (t.output_tokens > 0)].sum())
    if not whole.all():
        rest = t.where(~whole)
        counts = np.diff(rest.start)
        per_chunk = np.divide(
            rest.output_tokens, counts, out=np.zeros(len(rest)), where=(counts > 0) & (rest.output_tokens > 0)
        )
        arrivals = np.repeat(rest.sent_s, counts) + rest.chunk_s
        tokens += float(np.repeat(per_chunk, counts)[window_of(arrivals, windows) >= 0].sum())
        if np.isnan(arrivals).any():  # of an imported result: which of them were inside is not known
            tokens = NAN
    inputs = float(t.input_tokens[(first >= 0) & (t.input_tokens > 0)].sum())
    return {"output_tokens": tokens, "input_tokens": inputs, "requests": float((last >= 0).sum())}


def held_up_s(stamps_s: Floats, held: Sequence[Sequence[float]], usual_s: float) -> Floats:
    """How late each stamp may be: [n] s, from ticks [when read, how late] of the same loop.

    A tick that was due at t and read at t + late: what was read at t + x before it waited x at most, as it came after the
    tick was due or it would have been read first; what was read after it waited less and less, as what had piled up was worked off.
    Everything else waited `usual_s`.
    """
    order = np.argsort(stamps_s)
    ranked, found = stamps_s[order], np.full(len(stamps_s), usual_s)
    for at_s, late_s in held:
        low, high = np.searchsorted(ranked, [at_s - late_s, at_s + late_s])
        if low < high:
            found[low:high] = np.maximum(found[low:high], late_s - np.abs(ranked[low:high] - at_s))
    back = np.empty_like(found)
    back[order] = found
    return back
