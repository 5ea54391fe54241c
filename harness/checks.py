"""A point's figures and the instrument's own senses -> Findings: what was seen, why it matters, what to do.

Codes are stable.  `invalid`: the figures do not describe the server; `suspect`: they may not; `info`: good to know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from harness import metrics, units
from harness.records import Finding, Severity, Table, Verdict
from harness.stats import SAMPLES_NEEDED

LAG_SUSPECT_S, LAG_INVALID_S = 0.005, 0.050
CPU_SUSPECT, CPU_INVALID = 0.80, 0.95
LATE_S = 0.005
BURST_SHARE, BURST_SPAN = 0.9, 0.05  # of the tokens, within this share of the request's whole time
DRIFT = 0.10


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a check may look at: one point's summary row, its measured records, and what was sensed beside it."""

    row: Mapping[str, Any]
    records: Table
    asked_input: int
    asked_output: int
    mode: str
    senses: Sequence[Mapping[str, Any]] = ()
    samples: Sequence[Mapping[str, Any]] = ()
    predicted: Mapping[str, Any] | None = None
    same_prompt: bool = False
    api: str = "completions"
    notes: Mapping[str, Any] = field(default_factory=dict)

    def worst(self, name: str) -> float:
        values = [s[name] for s in self.senses if s.get(name) is not None]
        return max(values, default=float("nan"))


def _graded(value: float, suspect: float, invalid: float) -> Severity | None:
    return "invalid" if value > invalid else "suspect" if value > suspect else None


def client_lag(e: Evidence) -> Finding | None:
    lag_s = e.worst("lag_p99_s")
    ttft_s = e.row["ttft_s"]["mean"]
    # A lag that is small beside what is measured bends nothing that is shown.
    small = lag_s < 0.01 * ttft_s and lag_s < e.row["itl_s"]["mean"] if ttft_s == ttft_s else False
    severity = _graded(lag_s, LAG_SUSPECT_S, LAG_INVALID_S)
    if not severity or (small and severity == "suspect"):
        return None
    return Finding("V001", severity, f"the client's own event loop was up to {units.seconds(lag_s)} late (p99)",
                   "a stamp is taken when the loop comes to it, so latencies may be too long by as much",
                   "give the client a core of its own, or fewer streams; a server on the same machine takes its cores")  # fmt: skip


def client_cpu(e: Evidence) -> Finding | None:
    share = e.worst("cpu_share")
    severity = _graded(share, CPU_SUSPECT, CPU_INVALID)
    if not severity:
        return None
    return Finding("V002", severity, f"the client used {units.percent(share, 3)} of one core",
                   "at this load the client, not the server, may set the pace", "use fewer streams, or a faster machine")  # fmt: skip


def errors(e: Evidence) -> Finding | None:
    n, failed = e.row["requests"], e.row["errors"]
    if not n:
        return Finding("V003", "invalid", "no measured request ended", "there is nothing to report",
                       "see the engine's log, or let the run go on")  # fmt: skip
    if not failed:
        return None
    classes = ", ".join(f"{count} {name}" for name, count in e.row["error_classes"].items())
    example = next((str(text) for text in e.records.error[~e.records.ok] if text), "")
    return Finding("V003", "invalid" if failed == n else "suspect", f"{failed} of {n} requests failed: {classes}"
                   + (f" (“{example[:160]}”)" if example else ""),
                   "failed requests are in no latency, and a server that sheds load looks fast",
                   "mend the cause first: the engine's log and the records' error column say more")  # fmt: skip


def _lengths(e: Evidence, column: str, asked: int) -> str:
    values = getattr(e.records, column)[e.records.ok]
    known = values[values >= 0]
    wrong = known[known != asked]
    if not len(wrong):
        return ""
    return f"{len(wrong)} of {len(known)} requests had other than {asked} (from {wrong.min()} to {wrong.max()})"


def input_length(e: Evidence) -> Finding | None:
    if said := _lengths(e, "input_tokens", e.asked_input):
        return Finding("V004", "suspect", f"input tokens by the server's usage: {said}",
                       "prefill time grows with the prompt, so the point is not the one asked for",
                       "give the served model's own tokenizer by --tokenizer")  # fmt: skip
    return None


def output_length(e: Evidence) -> Finding | None:
    if said := _lengths(e, "output_tokens", e.asked_output):
        return Finding("V005", "suspect", f"output tokens: {said}",
                       "shorter answers free the batch early, and every figure but TTFT follows from the length",
                       "use a server that takes ignore_eos or min_tokens, or a model that goes on")  # fmt: skip
    return None


def no_usage(e: Evidence) -> Finding | None:
    if not e.row["requests"] or e.row["errors"] == e.row["requests"]:
        return None
    if e.row["input_tokens"] is None:
        return Finding("V006", "suspect", "the server tells no usage, so the input length is not known"
                       + ("; output tokens are counted by events" if "chunks" in e.row["token_source"] else ""),
                       "a point whose length is unknown cannot be compared with any other",
                       "let the server send usage (stream_options.include_usage), or give --tokenizer")  # fmt: skip
    return None


def cache_hits(e: Evidence) -> Finding | None:
    queries = _rise(e.samples, "cache_queries")
    share = _rise(e.samples, "cache_hits") / queries if queries > 0 else 0.0
    if e.row["cached_tokens"] and e.row["input_tokens"]:
        share = max(share, e.row["cached_tokens"] / e.row["input_tokens"])
    if share <= 0.05:
        return None
    severity: Severity = "info" if e.same_prompt else "suspect"
    return Finding("V007", severity, f"the server's prefix cache answered {units.percent(share, 3)} of the prompt tokens",
                   "cached tokens are not computed: TTFT and throughput are those of a shorter prompt",
                   "switch the prefix cache off, or restart the server between runs" if not e.same_prompt else
                   "this is what --same-prompt is for")  # fmt: skip


def _rise(samples: Sequence[Mapping[str, Any]], name: str) -> float:
    values = [s[name] for s in samples if name in s]
    return values[-1] - values[0] if len(values) > 1 else 0.0


def burst(e: Evidence) -> Finding | None:
    t = e.records.where(e.records.ok)
    counts = np.diff(t.start)
    rows = np.flatnonzero((t.output_tokens > 8) & (counts > 0))
    if not len(rows):
        return None
    bursts = 0
    for i in rows:
        chunk_s = t.chunk_s[t.start[i] : t.start[i + 1]]
        span = chunk_s[int(0.95 * (len(chunk_s) - 1))] - chunk_s[int(0.05 * (len(chunk_s) - 1))]
        bursts += span < BURST_SPAN * chunk_s[-1]
    if bursts < max(1, 0.02 * len(rows)):
        return None
    return Finding("V008", "invalid" if bursts > 0.5 * len(rows) else "suspect",
                   f"in {bursts} of {len(rows)} answers nearly all tokens arrived in one burst",
                   "TTFT and ITL then describe a buffer between the server and the client, not the server's work",
                   "look for a proxy that buffers (X-Accel-Buffering: no), or a server that batches its writes")  # fmt: skip


def several_per_event(e: Evidence) -> Finding | None:
    share = e.row["arrivals_per_token"]
    if not share < 0.95:
        return None
    return Finding("V009", "info", f"an arrival held {1 / share:.3g} tokens on average" if share > 0 else "no arrival",
                   "ITL spreads each gap evenly over its tokens; the gap of the network is chunk_gap",
                   "read TPOT and chunk_gap beside ITL")  # fmt: skip


def samples(e: Evidence) -> Finding | None:
    n = e.row["ttft_s"]["n"]
    short = [name for name, need in SAMPLES_NEEDED.items() if n < need]
    if not short or not n:
        return None
    return Finding("V010", "info", f"{n} requests: too few for {', '.join(short)} of TTFT and E2E",
                   "below 36, 72 and 368 samples the 95 % interval of p90, p95 and p99 is open at the top",
                   "measure more waves, requests or trials before quoting these percentiles")  # fmt: skip


def drift(e: Evidence) -> Finding | None:
    t = e.records.where(e.records.ok)
    trials = np.unique(t.trial)
    if len(trials) < 3:
        return None
    means = [float(np.nanmean(metrics.e2e_s(t.where(t.trial == k)))) for k in trials]
    spread = (max(means) - min(means)) / float(np.mean(means))
    if not spread > DRIFT:
        return None
    return Finding("V011", "suspect", f"the trials' mean E2E differ by {units.percent(spread, 3)}",
                   "the machine or the server changed while it was measured", "see what else ran; measure more trials")  # fmt: skip


def beats_physics(e: Evidence) -> Finding | None:
    """A measurement below the strict bound tests the inputs: a wrong hardware row, configuration or length."""
    if not e.predicted:
        return None
    names = {"ttft_s": "TTFT", "itl_s": "ITL", "e2e_s": "E2E"}
    beaten = [label for name, label in names.items() if e.row[name]["mean"] < 0.98 * e.predicted[name]["low"]]
    if not beaten:
        return None
    return Finding("V012", "suspect", f"{', '.join(beaten)} faster than the hardware's bound",
                   "either the prediction's inputs are wrong or tokens were not computed",
                   "check --hardware, --model-config and --dtype, and the prefix cache")  # fmt: skip


def batch_ran(e: Evidence) -> Finding | None:
    ran, asked = e.row.get("batch_ran"), e.row.get("batch_size")
    if not ran or not asked or asked < 2 or ran["max"] >= 0.8 * asked:
        return None
    return Finding("V013", "suspect", f"the server ran at most {ran['max']:g} requests at once, {asked} were asked",
                   "the rest waited in its queue: TTFT holds that wait and ITL is that of a smaller batch",
                   "raise the server's limit (vLLM --max-num-seqs, llama.cpp --parallel), or its KV memory")  # fmt: skip


def late_sending(e: Evidence) -> Finding | None:
    t = e.records
    late = (t.sent_s - t.scheduled_s)[~np.isnan(t.scheduled_s) & ~np.isnan(t.sent_s)]
    if not len(late) or (p99 := float(np.quantile(late, 0.99))) < LATE_S:
        return None
    return Finding("V014", "suspect", f"requests were sent up to {units.seconds(p99)} late (p99)",
                   "the schedule was not kept: ttft_scheduled holds the wait, ttft does not",
                   "allow more in flight, or a lower rate")  # fmt: skip


def shared_machine(e: Evidence) -> Finding | None:
    share, steal = e.worst("machine_cpu_share"), e.worst("steal_share")
    if steal > 0.02:
        return Finding("V015", "suspect", f"the hypervisor took {units.percent(steal, 2)} of this machine's time",
                       "both sides were held up at moments that nothing here can see", "measure on a quiet machine")  # fmt: skip
    if not share > 0.9:
        return None
    return Finding("V015", "suspect", f"this machine's cores were {units.percent(share, 2)} busy",
                   "client and server took each other's time, so the server alone would be faster",
                   "run the client on another machine, or pin both (taskset) if the figures are to be quoted")  # fmt: skip


CHECKS: tuple[Callable[[Evidence], Finding | None], ...] = (
    errors, client_lag, client_cpu, shared_machine, late_sending, input_length, output_length, no_usage, cache_hits,
    burst, batch_ran, beats_physics, drift, several_per_event, samples,
)  # fmt: skip


def run_checks(evidence: Evidence) -> list[Finding]:
    """All findings, the gravest first."""
    found = [finding for check in CHECKS if (finding := check(evidence))]
    return sorted(found, key=lambda finding: -_RANK[finding.severity])


_RANK: dict[str, int] = {"info": 0, "suspect": 1, "invalid": 2}


def verdict(findings: Sequence[Finding]) -> Verdict:
    worst = max((_RANK[finding.severity] for finding in findings), default=0)
    return ("valid", "suspect", "invalid")[worst]  # type: ignore[return-value]
