"""Stored stamps -> the figures that other tools would have shown, under their own formulas.  Why they differ: docs/definitions.md.

Read for this (formulas re-stated, not copied):
- vllm bench serve 0.32.0: vllm-project/vllm, vllm/benchmarks/lib/endpoint_request_func.py
  (async_request_openai_completions, async_request_openai_chat_completions) and vllm/benchmarks/serve.py
  (calculate_metrics); the first also at commit 02cfb534df56.
- guidellm 0.8.1: vllm-project/guidellm, src/guidellm/schemas/base/request_stats.py, benchmark/schemas/metrics.py,
  backends/openai/http.py, schemas/base/statistics.py.
- aiperf 0.13.0: ai-dynamo/aiperf, src/aiperf/metrics/types/{ttft,inter_token_latency,request_latency,
  output_token_throughput,benchmark_duration}_metric*.py, common/models/record_models.py (content_responses).
- sglang bench_serving: sgl-project/sglang, python/sglang/benchmark/serving.py at commit 00f9ec472ffe
  (async_request_openai_completions, async_request_openai_chat_completions, calculate_metrics).

What a stored run cannot tell is missing (NaN), never guessed: see the page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness import metrics, stats, units
from harness.metrics import chunk_gap_s, e2e_s, ttft_s
from harness.records import NAN, Floats, RidgelineError, Table

TIMES = ("ttft_s", "itl_s", "tpot_s", "e2e_s")
RATES = ("output_tokens_per_s", "total_tokens_per_s", "requests_per_s")


def _output_tokens(t: Table) -> Floats:
    return np.where(t.output_tokens > 0, t.output_tokens, NAN).astype(float)


def _asked_tokens(t: Table) -> Floats:
    """sglang asks for no usage, so its count is the length it requested."""
    return np.where(t.asked_output_tokens > 0, t.asked_output_tokens, _output_tokens(t)).astype(float)


def _pace(first_s: Floats, last_s: Floats, tokens: Floats) -> Floats:
    """Seconds per token after the first; missing for a single token."""
    return np.asarray((last_s - first_s) / np.where(tokens > 1, tokens - 1, NAN))


def _over_s(t: Table) -> Floats:
    """Request written -> the response was over: usage, [DONE] and the end of the message included."""
    return np.asarray(t.end_s - t.sent_s)


def _first_event_s(t: Table) -> Floats:
    return t.first_event_s


def _last_event_s(t: Table) -> Floats:
    return t.last_event_s


def _event_gaps_s(t: Table) -> Floats:
    """Gaps between events with a choice: those between texts, and to an empty one before or after them.  Other empty ones
    came in one read with a neighbour (a gap of 0), or split a gap: as many zeros keep the mean exact."""
    first_s, last_s = ttft_s(t), e2e_s(t)
    if np.isnan(t.first_event_s[~np.isnan(first_s)]).any():  # recorded before these stamps were kept
        return np.empty(0)
    grain_s = 2e-6 + 2e-7 * np.nan_to_num(last_s)  # text stamps are float32
    lead_s, tail_s = first_s - t.first_event_s, t.last_event_s - last_s
    gaps_s = np.concatenate([chunk_gap_s(t), lead_s[lead_s > grain_s], tail_s[tail_s > grain_s]])
    others = int(np.maximum(t.choice_events - 1, 0).sum()) - len(gaps_s)
    return np.append(gaps_s, np.zeros(max(0, others)))


def _by_tokens(values_s: Floats, weights: Floats) -> Floats:
    """Each request's value as often as it had tokens: guidellm weighs so."""
    known = ~np.isnan(values_s) & ~np.isnan(weights)
    return np.repeat(values_s[known], weights[known].astype(int))


@dataclass(frozen=True, slots=True)
class Tool:
    """How one tool reads a request.  Each function gives seconds, a value per request or per gap; None: it has no such
    figure.  `over_s` is when a request is over, after it was sent: the last one ends the tool's duration."""

    version: str
    ttft_s: Callable[[Table], Floats]
    itl_s: Callable[[Table], Floats]
    tpot_s: Callable[[Table], Floats] | None
    e2e_s: Callable[[Table], Floats]
    over_s: Callable[[Table], Floats]
    tokens: Callable[[Table], Floats] = _output_tokens


TOOLS: dict[str, Tool] = {
    "ridgeline": Tool("this one", ttft_s, metrics.itl_s, metrics.tpot_s, e2e_s, e2e_s),
    "vllm": Tool(
        "vllm bench serve 0.32.0",
        ttft_s=_first_event_s,
        itl_s=_event_gaps_s,
        tpot_s=lambda t: _pace(t.first_event_s, t.last_event_s, _output_tokens(t)),
        e2e_s=_last_event_s,
        over_s=_over_s,
    ),
    "guidellm": Tool(
        "guidellm 0.8.1",
        ttft_s=ttft_s,
        itl_s=lambda t: _by_tokens(_pace(ttft_s(t), e2e_s(t), _output_tokens(t)), _output_tokens(t) - 1),
        tpot_s=lambda t: _by_tokens(e2e_s(t) / _output_tokens(t), _output_tokens(t)),
        e2e_s=_over_s,
        over_s=_over_s,
    ),
    "aiperf": Tool(
        "aiperf 0.13.0",
        ttft_s=ttft_s,
        itl_s=lambda t: _pace(ttft_s(t), e2e_s(t), _output_tokens(t)),
        tpot_s=None,
        e2e_s=e2e_s,
        over_s=e2e_s,
    ),
    "sglang": Tool(
        "sglang bench_serving 00f9ec472ffe",
        ttft_s=ttft_s,
        itl_s=chunk_gap_s,
        tpot_s=lambda t: _pace(ttft_s(t), _over_s(t), _asked_tokens(t)),
        e2e_s=_over_s,
        over_s=_over_s,
        tokens=_asked_tokens,
    ),
}


def tool(name: str) -> Tool:
    """Raises RidgelineError for a name that is not in the table."""
    if name not in TOOLS:
        raise RidgelineError(f"definitions: got {name!r}; known: {', '.join(TOOLS)}")
    return TOOLS[name]


def figures(name: str, t: Table, mode: str, slots: int) -> dict[str, Any]:
    """One point's figures as `name` defines them, from its measured records: seconds, tokens and requests per second."""
    t = t.where(~t.warmup)
    if name == "ridgeline":
        ours = metrics.point_summary(t, mode, slots)
        return {key: ours[key] for key in (*TIMES, *RATES)}
    how, good = tool(name), t.where(t.ok)
    row: dict[str, Any] = {}
    for key in TIMES:
        compute = getattr(how, key)
        row[key] = metrics.distribution(compute(good), []) if compute else None
    rates = [_rates(how, t.where(t.trial == k)) for k in np.unique(t.trial)]
    return row | {key: stats.mean(np.array([rate[key] for rate in rates])) for key in RATES}


def _rates(how: Tool, t: Table) -> dict[str, float]:
    """All tokens of the run over all of its time, ramp and drain included; each trial is one run of the tool."""
    over_s = (t.sent_s + how.over_s(t))[t.ok]
    duration_s = float(np.nanmax(over_s) - np.nanmin(t.sent_s)) if np.isfinite(over_s).any() else NAN
    good = t.where(t.ok)
    outputs, inputs = float(np.nansum(how.tokens(good))), float(good.input_tokens[good.input_tokens > 0].sum())
    return {
        "output_tokens_per_s": outputs / duration_s,
        "total_tokens_per_s": (outputs + inputs) / duration_s if inputs else NAN,
        "requests_per_s": len(good) / duration_s,
    }


def compare(name: str, run: Mapping[str, Any], records: Table) -> list[dict[str, Any]]:
    """For each point with a measured request: its batch size or rate, `ours` and `theirs`."""
    tool(name)
    mode, found = run["scenario"]["workload"]["mode"], []
    for index, plan in enumerate(run["points"]):
        t = records.where((records.point == index) & ~records.warmup)
        if len(t):
            both = {"ours": "ridgeline", "theirs": name}
            slots = plan["batch_size"] or 0
            found.append({**plan, **{side: figures(who, t, mode, slots) for side, who in both.items()}})
    return found


LABELS = {"ttft_s": "TTFT", "itl_s": "ITL", "tpot_s": "TPOT", "e2e_s": "E2E", "output_tokens_per_s": "output tokens/s",
          "total_tokens_per_s": "all tokens/s", "requests_per_s": "requests/s"}  # fmt: skip


def rows(point: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(figure, ours, theirs, difference) of one point of `compare`, as text: means of the times."""
    found = []
    for key, label in LABELS.items():
        ours, theirs = point["ours"][key], point["theirs"][key]
        if key in TIMES:
            for statistic in ("mean", "p99"):
                a = ours[statistic]
                other = ("none", "–") if theirs is None else (units.seconds(b := theirs[statistic]), _difference(a, b))
                found.append((f"{label} {statistic}", units.seconds(a), *other))
        else:
            found.append((label, units.number(ours), units.number(theirs), _difference(ours, theirs)))
    return found


def _difference(ours: float, theirs: float) -> str:
    change = (theirs - ours) / ours if ours else NAN
    if not np.isfinite(change):
        return units.MISSING
    return f"{100 * change:+.2f} %" if abs(change) >= 5e-5 else "0 %"


def text(name: str, points: list[dict[str, Any]]) -> str:
    """A table for the terminal."""
    lines = []
    for point in points:
        label = f"batch size {point['batch_size']}" if point["batch_size"] else f"{point['rate']:g} requests/s"
        lines += [f"{label:<22} {'ridgeline':>12} {name:>12} {'difference':>12}"]
        lines += [f"  {a:<20} {b:>12} {c:>12} {d:>12}" for a, b, c, d in rows(point)]
    return "\n".join(lines)
