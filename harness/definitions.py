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

from harness import foreign, metrics, stats, units
from harness.metrics import chunk_gap_s, e2e_s, ttft_s
from harness.records import NAN, RATES, Floats, RidgelineError, Table
from harness.stats import Spread
from harness.tally import Blocks, Tally, count, of_table

TIMES = ("ttft_s", "itl_s", "tpot_s", "e2e_s")


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
        ttft_s=lambda t: t.first_event_s,
        itl_s=_event_gaps_s,
        tpot_s=lambda t: _pace(t.first_event_s, t.last_event_s, _output_tokens(t)),
        e2e_s=lambda t: t.last_event_s,
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


class _Figures:
    """One point's figures as a tool defines them, from blocks of its measured records."""

    def __init__(self, how: Tool) -> None:
        self.how = how
        self.spreads = {key: Spread() for key in TIMES if getattr(how, key)}
        self.trials: dict[int, _Span] = {}

    def add(self, t: Table) -> None:
        good = t.where(t.ok)
        for key, spread in self.spreads.items():
            spread.add(getattr(self.how, key)(good))
        for k in np.unique(t.trial).tolist():
            self.trials.setdefault(k, _Span()).add(self.how, t.where(t.trial == k))

    def row(self) -> dict[str, Any]:
        """Seconds, tokens and requests per second; None for what the tool has not."""
        row: dict[str, Any] = {
            key: metrics.distribution(self.spreads[key]) if key in self.spreads else None for key in TIMES
        }
        rates = [span.rates() for span in self.trials.values()]
        return row | {key: stats.mean(np.array([rate[key] for rate in rates])) for key in RATES}


@dataclass(slots=True)
class _Span:
    """All tokens of a trial over all of its time, ramp and drain included: each trial is one run of the tool."""

    start_s: float = float("inf")
    end_s: float = -float("inf")
    outputs: float = 0.0
    inputs: float = 0.0
    requests: int = 0

    def add(self, how: Tool, t: Table) -> None:
        over_s = (t.sent_s + how.over_s(t))[t.ok]
        self.start_s = min(self.start_s, float(np.nanmin(t.sent_s, initial=self.start_s)))
        self.end_s = max(self.end_s, float(np.nanmax(over_s, initial=self.end_s)))
        good = t.where(t.ok)
        self.outputs += float(np.nansum(how.tokens(good)))
        self.inputs += float(good.input_tokens[good.input_tokens > 0].sum())
        self.requests += len(good)

    def rates(self) -> dict[str, float]:
        lasted_s = self.end_s - self.start_s if self.end_s > self.start_s else NAN
        return {
            "output_tokens_per_s": self.outputs / lasted_s,
            "total_tokens_per_s": (self.outputs + self.inputs) / lasted_s if self.inputs else NAN,
            "requests_per_s": self.requests / lasted_s,
        }


def figures(name: str, t: Table, mode: str, slots: int) -> dict[str, Any]:
    """One point's figures as `name` defines them, from its measured records: seconds, tokens and requests per second."""
    t = t.where(~t.warmup)
    if name == "ridgeline":
        ours = of_table(t, mode, slots).row()
        return {key: ours[key] for key in (*TIMES, *RATES)}
    found = _Figures(tool(name))
    found.add(t)
    return found.row()


def compare(name: str, run: Mapping[str, Any], blocks: Blocks) -> list[dict[str, Any]]:
    """For each point with a measured request: its batch size or rate, `ours` and `theirs`.  What the tool itself said
    of an imported result is `theirs`."""
    how, mode = tool(name), run["scenario"]["workload"]["mode"]
    ours = {index: Tally(mode, plan["batch_size"] or 0) for index, plan in enumerate(run["points"])}
    theirs = {index: _Figures(how) for index in ours}
    count(ours, blocks)
    for t in blocks(None, True) if name != "ridgeline" else ():
        for point in np.unique(t.point).tolist():
            if point in theirs:
                theirs[point].add(t.where((t.point == point) & ~t.warmup))
    found = []
    for index, plan in enumerate(run["points"]):
        imported = plan.get("imported") or {}
        if ours[index].requests or imported:
            row, other = ours[index].row(), theirs[index].row()
            if said := foreign.known(imported.get("said") or {}):
                row, _ = foreign.filled(row, imported | {"said": said})
                other = {key: said[key] for key in (*TIMES, *RATES)} if imported["tool"] == name else other
            mine = {key: row[key] for key in (*TIMES, *RATES)}
            found.append({**plan, "ours": mine, "theirs": mine if name == "ridgeline" else other})
    return found


LABELS = {"ttft_s": "TTFT", "itl_s": "ITL", "tpot_s": "TPOT", "e2e_s": "E2E", "output_tokens_per_s": "output tokens/s",
          "total_tokens_per_s": "all tokens/s", "requests_per_s": "requests/s"}  # fmt: skip


def load_of(point: Mapping[str, Any]) -> str:
    return f"batch size {point['batch_size']}" if point["batch_size"] else f"{point['rate']:g} requests/s"


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
        label = load_of(point)
        lines += [f"{label:<22} {'ridgeline':>12} {name:>12} {'difference':>12}"]
        lines += [f"  {a:<20} {b:>12} {c:>12} {d:>12}" for a, b, c, d in rows(point)]
    return "\n".join(lines)
