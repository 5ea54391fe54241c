"""A point's figures and the instrument's own senses -> Findings: what was seen, why it matters, what to do.

Codes are stable.  `invalid`: the figures do not describe the server; `suspect`: they may not; `info`: good to know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness import units
from harness.endings import NOTES
from harness.records import Finding, Severity, Verdict
from harness.stats import SAMPLES_NEEDED
from harness.tally import Tally

# What the README promises of a latency, or a share of the figure that bends nothing that is shown: (s, share).  Up to
# MANY streams p99 is within the first, beyond within the second: what comes together is read one after another.
MEAN_WITHIN, P99_WITHIN, P99_WITHIN_MANY, MANY = (0.0003, 0.005), (0.001, 0.02), (0.002, 0.04), 64
ITL_SHARE = 0.10
BOTH_ENDS = 0.6  # of what is promised: a gap is bent at both ends, its p99 by 1.0 to 2.0 times the loop's (measured)
LAG_INVALID_S = 0.050
CPU_SUSPECT, CPU_INVALID = 0.80, 0.95
# A loop that is alone on its core waits 0.2 to 0.6 times as long as it runs (for its own recorder and the kernel); beside
# one busy neighbour it waits 1.0 to 5 times as long, measured at 1, 8 and 64 streams.
WAIT_PER_RUN, WAIT_LEAST = 0.8, 0.01
# A server alone on its core waits 0.03 times as long as it runs; beside a neighbour that works now and then 0.1 to 1.5.
SERVER_WAIT_PER_RUN, SERVER_WAIT_LEAST = 0.10, 0.01
DISAGREE, DISAGREE_S = 0.20, 0.002
GC_S, GAP_S, CLOCK_STEP_S = 0.020, 1.0, 0.5
LATE_S = 0.005
DRIFT = 0.10


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a check may look at: one point's summary row, the tally of its records, and what was sensed beside it."""

    row: Mapping[str, Any]
    tally: Tally
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
    """How late this client's own reads were, at any moment and when first tokens came, against what may be promised."""
    lag_s, ttft, itl = e.worst("lag_p99_s"), e.row["ttft_s"], e.row["itl_s"]
    mean_s, (p99_s,) = e.tally.held_up.mean, e.tally.held_up.quantiles(0.99)
    tail = P99_WITHIN_MANY if e.worst("max_in_flight") > MANY else P99_WITHIN
    late = [
        (lag_s > BOTH_ENDS * _within((tail[0], ITL_SHARE), itl["mean"]), f"its event loop was {units.seconds(lag_s)} late (p99)"),
        (mean_s > _within(MEAN_WITHIN, ttft["mean"]), f"first tokens were read up to {units.seconds(mean_s, 2)} late on average"),
        (p99_s > _within(tail, ttft["p99"]), f"first tokens were read up to {units.seconds(p99_s, 2)} late (p99)"),
    ]  # fmt: skip
    said = [text for true, text in late if true]
    if not said:
        return None
    return Finding("V001", "invalid" if lag_s > LAG_INVALID_S else "suspect", f"the client was late by itself: {', '.join(said)}",
                   "a stamp is taken when the loop comes to it, so latencies are too long by up to as much",
                   "give the client a core of its own, or fewer streams; a server on the same machine takes its cores")  # fmt: skip


def _within(limit: tuple[float, float], figure_s: float) -> float:
    least_s, share = limit
    return max(least_s, share * figure_s) if figure_s == figure_s else least_s


def client_cpu(e: Evidence) -> Finding | None:
    """A core that runs the loop, or keeps it waiting, all the time has nothing left to be on time with; nor has one that
    does so most of the time and comes late."""
    share = e.worst("cpu_share")
    taken = max((s["cpu_share"] + (s.get("wait_share") or 0) for s in e.senses if s.get("cpu_share") is not None),
                default=share)  # fmt: skip
    behind = share > CPU_SUSPECT and e.worst("lag_p99_s") > LATE_S  # busy bursts queue up before the mean is full
    severity = "invalid" if taken > CPU_INVALID or behind else _graded(share, CPU_SUSPECT, CPU_INVALID)
    if not severity:
        return None
    waited = f" and waited for it {units.percent(taken - share, 3)} of the time" if taken - share > 0.05 else ""
    return Finding("V002", severity, f"the client used {units.percent(share, 3)} of one core{waited}",
                   "at this load the client, not the server, sets the pace" if severity == "invalid" else
                   "at this load the client, not the server, may set the pace",
                   "use fewer streams, or a faster machine")  # fmt: skip


def stolen_core(e: Evidence) -> Finding | None:
    """The scheduler's own account of how long the loop was ready to run while something else had its core."""
    stolen = [s for s in e.senses if s.get("wait_share") is not None and s.get("cpu_share")
              and s["wait_share"] > max(WAIT_LEAST, WAIT_PER_RUN * s["cpu_share"])]  # fmt: skip
    if not stolen:
        return None
    worst = max(stolen, key=lambda s: float(s["wait_share"]))
    longest = f", up to {units.seconds(worst['wait_max_s'])} in a row" if worst.get("wait_max_s") else ""
    return Finding("V016", "suspect", f"something else (its own recorder counts) ran on the client's core: it was ready but not running for "
                   f"{units.percent(worst['wait_share'], 2)} of the time and ran for {units.percent(worst['cpu_share'], 2)}"
                   + longest, "each stamp taken after such a wait is late by as much",
                   "give the client a core that nothing else uses (taskset), or stop what else runs")  # fmt: skip


def errors(e: Evidence) -> Finding | None:
    n, failed = e.row["requests"], e.row["errors"]
    if not n:
        return Finding("V003", "invalid", "no measured request ended", "there is nothing to report",
                       "see the engine's log, or let the run go on")  # fmt: skip
    if not failed:
        return None
    classes = ", ".join(f"{count} {name}" for name, count in e.row["error_classes"].items())
    example = e.tally.example
    return Finding("V003", "invalid" if failed == n else "suspect", f"{failed} of {n} requests failed: {classes}"
                   + (f" (“{example[:160]}”)" if example else ""),
                   "failed requests are in no latency, and a server that sheds load looks fast",
                   "mend the cause first: the engine's log and the records' error column say more")  # fmt: skip


def not_sent(e: Evidence) -> Finding | None:
    left = e.row.get("not_sent") or 0
    if not left:
        return None
    n, planned = (units.count(e.row[key]) for key in ("requests", "planned"))
    return Finding("V026", "info", f"{planned} requests were planned, {n} ended: {units.count(left)} were not sent, or were cut off",
                   "figures are those of the requests that ended, and the last of a plan may be unlike the first",
                   "let the run end, or give it the time that its requests need (workload.duration_s)")  # fmt: skip


def _lengths(e: Evidence, column: str) -> str:
    found = e.tally.lengths[column]
    if not found.wrong:
        return ""
    n = f"{found.wrong} of {found.known} requests had"
    if found.asked.low == found.asked.high:
        return f"{n} other than {found.asked.low} (from {found.came[0]} to {found.came[1]})"
    return f"{n} other than each was asked for (by {found.over[0]:+d} to {found.over[1]:+d})"


def input_length(e: Evidence) -> Finding | None:
    if said := _lengths(e, "input_tokens"):
        return Finding("V004", "suspect", f"input tokens by the server's usage: {said}",
                       "prefill time grows with the prompt, so the point is not the one asked for",
                       "give the served model's own tokenizer by --tokenizer")  # fmt: skip
    return None


def output_length(e: Evidence) -> Finding | None:
    if said := _lengths(e, "output_tokens"):
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
    share = e.row.get("cache_share") or 0.0
    share = 0.0 if share != share else share
    if e.row["cached_tokens"] and e.row["input_tokens"]:
        share = max(share, e.row["cached_tokens"] / e.row["input_tokens"])
    if share <= 0.05:
        return None
    severity: Severity = "info" if e.same_prompt else "suspect"
    return Finding("V007", severity, f"the server's prefix cache answered {units.percent(share, 3)} of the prompt tokens",
                   "cached tokens are not computed: TTFT and throughput are those of a shorter prompt",
                   "switch the prefix cache off, or restart the server between runs" if not e.same_prompt else
                   "the workload asks for it: same_prompt, shared_prefix, turns, or its own prompts")  # fmt: skip


def burst(e: Evidence) -> Finding | None:
    bursts, answers = e.tally.bursts, e.tally.long_answers
    if not answers or bursts < max(1, 0.02 * answers):
        return None
    return Finding("V008", "invalid" if bursts > 0.5 * answers else "suspect",
                   f"in {bursts} of {answers} answers nearly all tokens arrived in one burst",
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
    means = e.tally.e2e_by_trial_s()
    if len(means) < 3:
        return None
    spread = (max(means) - min(means)) / (sum(means) / len(means))
    if not spread > DRIFT:
        return None
    return Finding("V011", "suspect", f"the trials' mean E2E differ by {units.percent(spread, 3)}",
                   "the machine or the server changed while it was measured", "see what else ran; measure more trials")  # fmt: skip


def beats_physics(e: Evidence) -> Finding | None:
    """A measurement below the strict bound tests the inputs: a wrong hardware row, configuration or length."""
    if not e.predicted:
        return None
    names = {"ttft_s": "TTFT", "itl_s": "ITL", "e2e_s": "E2E"}
    beaten = [label for name, label in names.items() if e.row[name]["mean"] < 0.98 * e.predicted[name]["bound"]]
    if not beaten:
        return None
    return Finding("V012", "suspect", f"{', '.join(beaten)} faster than the hardware's bound",
                   "either the prediction's inputs are wrong or tokens were not computed",
                   "check --hardware, --model-config and --dtype, and the prefix cache")  # fmt: skip


def batch_ran(e: Evidence) -> Finding | None:
    ran, asked = e.row.get("batch_ran"), e.row.get("batch_size")
    flown = e.worst("max_in_flight")
    if asked and flown < asked and e.row["requests"] >= asked:
        return Finding("V013", "suspect", f"the client had at most {flown:g} requests in flight, {asked} were asked",
                       "the point is one of a smaller batch", "see the connection errors; the server may refuse so many")  # fmt: skip
    if not ran or not asked or asked < 2 or ran["max"] >= 0.8 * asked:
        return None
    return Finding("V013", "suspect", f"the server ran at most {ran['max']:g} requests at once, {asked} were asked",
                   "the rest waited in its queue: TTFT holds that wait and ITL is that of a smaller batch",
                   "raise the server's limit (vLLM --max-num-seqs, llama.cpp --parallel), or its KV memory")  # fmt: skip


def late_sending(e: Evidence) -> Finding | None:
    (p99,) = e.tally.late.quantiles(0.99)
    if not p99 >= LATE_S:
        return None
    return Finding("V014", "suspect", f"requests were sent up to {units.seconds(p99)} late (p99)",
                   "the schedule was not kept: ttft_scheduled holds the wait, ttft does not",
                   "allow more in flight, or a lower rate")  # fmt: skip


def shared_machine(e: Evidence) -> Finding | None:
    share, steal = e.worst("machine_cpu_share"), e.worst("steal_share")
    if steal > 0.02:
        return Finding("V015", "suspect", f"the hypervisor took {units.percent(steal, 2)} of this machine's time",
                       "both sides were held up at moments that nothing here can see", "measure on a quiet machine")  # fmt: skip
    ran_s, waited_s = (e.row.get(f"server_{name}_s") or 0.0 for name in ("ran", "waited"))
    lasted_s = sum(s["ended_s"] - s["started_s"] for s in e.senses)
    if waited_s > max(SERVER_WAIT_PER_RUN * ran_s, SERVER_WAIT_LEAST * lasted_s) and not share > 0.9:
        return Finding("V015", "suspect", f"the server's threads ran for {units.seconds(ran_s)} and waited {units.seconds(waited_s)} "
                       "for a core", "something else ran on the server's cores: alone it would be faster",
                       "stop what else runs, or give server and client cores of their own (taskset)")  # fmt: skip
    if not share > 0.9:
        return None
    return Finding("V015", "suspect", f"this machine's cores were {units.percent(share, 2)} busy",
                   "client and server took each other's time, so the server alone would be faster",
                   "run the client on another machine, or pin both (taskset) if the figures are to be quoted")  # fmt: skip


def server_disagrees(e: Evidence) -> Finding | None:
    """The server's own histograms against our stamps, both with the warm-up."""
    said = []
    for name in ("ttft", "itl"):
        server_s, client_s = e.row.get(f"server_{name}_s"), e.row.get(f"client_{name}_s")
        if server_s and client_s and abs(client_s - server_s) > max(DISAGREE * server_s, DISAGREE_S):
            said.append((name, client_s - server_s, f"{name.upper()} {units.seconds(server_s, 3)} by the server's own "
                         f"count, {units.seconds(client_s, 3)} here"))  # fmt: skip
    if not said:
        return None
    late = any(name == "ttft" and by_s > 0 for name, by_s, _ in said)
    quick = any(name == "itl" and by_s < 0 for name, by_s, _ in said)
    why, do = "one of the two does not describe the service", "see what lies between the client and the server"
    if late and quick:
        why = "tokens were made one by one and arrived in bursts: something holds the stream back"
        do = "look for a proxy that buffers (X-Accel-Buffering: no), or ask the server directly"
    elif late:
        why = "requests waited before the server began to count: in its accept queue, a proxy or the network"
        do = "ask the server directly, give it more HTTP workers, or measure from its own machine"
    return Finding("V017", "suspect", "; ".join(text for _, _, text in said), why, do)


def preemptions(e: Evidence) -> Finding | None:
    if not (n := e.row.get("preemptions")):
        return None
    return Finding("V018", "suspect", f"the server preempted {n:g} requests",
                   "its KV memory was full: their work was thrown away and done again, and ITL holds the pause",
                   "give it more KV memory, or a smaller batch or context")  # fmt: skip


def gpu_throttled(e: Evidence) -> Finding | None:
    """A power cap is how many cards live at full load; heat and brakes are not."""
    reasons = e.row.get("gpu_throttled") or []
    slowest, fastest = e.row.get("gpu_sm_hz") or (1.0, 1.0)
    moved = slowest < 0.9 * fastest
    if not reasons and not moved:
        return None
    parts = ([f"the GPU was slowed down: {', '.join(reasons)}"] if reasons else []) + (
        [f"its clock went from {fastest / 1e6:.0f} to {slowest / 1e6:.0f} MHz under load"] if moved else [])  # fmt: skip
    return Finding("V019", "info" if reasons in ([], ["power cap"]) else "suspect", "; ".join(parts),
                   "the same work takes longer than on a card that keeps its clock",
                   "see cooling and power limit (nvidia-smi -q -d PERFORMANCE), or lock the clocks")  # fmt: skip


def cgroup_throttled(e: Evidence) -> Finding | None:
    lasted_s = sum(s["ended_s"] - s["started_s"] for s in e.senses if s.get("ended_s"))
    taken_s = e.row.get("throttled_s") or 0.0
    if not taken_s > 0.001 * lasted_s:
        return None
    return Finding("V020", "suspect", f"the container's CPU quota stopped it for {units.seconds(taken_s)}",
                   "nothing in the container runs then, the client included", "raise its CPU limit, or use none")  # fmt: skip


def clocks(e: Evidence) -> Finding | None:
    """No figure hangs on the wall clock; a machine that slept or stood still bends them all."""
    slept_s, gap_s = e.worst("suspended_s"), e.worst("lag_max_s")
    step_s = max((s.get("wall_step_s") or 0.0 for s in e.senses), key=abs, default=0.0)
    if slept_s > CLOCK_STEP_S:
        return Finding("V021", "invalid", f"the machine was suspended for {units.seconds(slept_s)}",
                       "the monotonic clock stands still meanwhile, the server's may not", "measure again")  # fmt: skip
    if gap_s > GAP_S:
        return Finding("V021", "invalid", f"the client stood still for {units.seconds(gap_s)}",
                       "it was stopped, or its machine was: nothing was stamped meanwhile", "measure again")  # fmt: skip
    if abs(step_s) > CLOCK_STEP_S:
        return Finding("V021", "info", f"the wall clock was set {'back' if step_s < 0 else 'forward'} by "
                       f"{units.seconds(abs(step_s))}", "no figure is affected: all times are monotonic",
                       "mind it when comparing with the server's log")  # fmt: skip
    return None


def collector(e: Evidence) -> Finding | None:
    pause_s = e.worst("gc_max_s")
    if not pause_s > GC_S:
        return None
    return Finding("V022", "suspect", f"the client's garbage collector paused it for {units.seconds(pause_s)}",
                   "stamps of that moment are late by as much", "report it: the collector should be off in a measurement")  # fmt: skip


DOUBTFUL = ("compressed", "not_streamed", "token_count_mismatch")  # these bend figures, the others are good to know


def oddities(e: Evidence) -> Finding | None:
    """What was odd about answers that succeeded or not (endings.NOTES)."""
    if not (said := [f"{count}: {NOTES[name]}" for name, count in sorted(e.tally.notes.items()) if name in NOTES]):
        return None
    doubtful = any(e.tally.notes[name] > 0.01 * e.row["requests"] for name in DOUBTFUL)
    return Finding("V023", "suspect" if doubtful else "info", f"of {e.row['requests']} answers, " + "; ".join(said),
                   "arrivals or counts of these are not what a stream of tokens would give" if doubtful else
                   "no figure hangs on it", "look for a proxy in between, and at the server's streaming and usage")  # fmt: skip


def _words(figure: str) -> str:
    """ttft_s -> TTFT, output_tokens_per_s -> output tokens/s."""
    name = figure.replace("_per_s", "/s").removesuffix("_s").replace("_", " ")
    return name.upper() if len(name) <= 4 else name


def another_tools(e: Evidence) -> Finding | None:
    """Figures of an imported result: nothing here saw the wire, nor the client that stamped."""
    if not (imported := e.row.get("imported")):
        return None
    what = "all figures are as it printed them, under its own definitions"
    if imported["detailed"]:
        what = f"the stamps ({imported['stamps']}) are its own"
        if imported["taken"]:
            what += f"; as it printed them: {', '.join(map(_words, imported['taken']))}"
    return Finding("V024", "suspect", f"imported from {imported['name']}: {what}",
                   "how late its client stamped is not known (loop lag, CPU, garbage collection, connections), nor what the "
                   "machine and the server did meanwhile", "measure the same load with ridgeline, if it is to decide anything")  # fmt: skip


def contradicts_itself(e: Evidence) -> Finding | None:
    if not (differs := (e.row.get("imported") or {}).get("differs")):
        return None
    said = "; ".join(f"{_words(d['figure'])} {d['said']:.6g}, by its requests {d['stamps']:.6g}"
                     for d in differs)  # fmt: skip
    return Finding("V025", "suspect", f"the file contradicts itself: {said}",
                   "its requests are not those of its figures, or another version of the tool reckons otherwise",
                   "see which version wrote it, and whether the file was cut or edited")  # fmt: skip


def absent_senses(senses: Mapping[str, str | None]) -> list[Finding]:
    """What could not be sensed beside the run, and what that costs the reader."""
    lacking = []
    if not senses["metrics"]:
        lacking.append(
            ("the server's metrics", "the batch it ran, its queue, KV use, preemptions, cache hits and its own TTFT")
        )
    if str(senses["gpu"] or "absent").startswith("absent"):
        lacking.append(
            (f"GPUs ({str(senses['gpu']).removeprefix('absent: ')})", "energy per token, clocks and throttling")
        )
    if not lacking:
        return []
    return [Finding("R006", "info", "not sensed: " + "; ".join(what for what, _ in lacking),
                    "unknown are " + "; ".join(cost for _, cost in lacking),
                    "let the server publish /metrics (SGLang --enable-metrics, llama.cpp --metrics, TensorRT-LLM "
                    "return_perf_metrics); for GPUs run the client beside the server with ridgeline[gpu]")]  # fmt: skip


CHECKS: tuple[Callable[[Evidence], Finding | None], ...] = (
    errors, not_sent, another_tools, contradicts_itself, clocks, client_lag, client_cpu, stolen_core, collector, cgroup_throttled, shared_machine, late_sending,
    input_length, output_length, no_usage, cache_hits,
    burst, server_disagrees, batch_ran, preemptions, gpu_throttled, beats_physics, drift, several_per_event, samples, oddities,
)  # fmt: skip


def run_checks(evidence: Evidence) -> list[Finding]:
    """All findings, the gravest first."""
    found = [finding for check in CHECKS if (finding := check(evidence))]
    return sorted(found, key=lambda finding: -_RANK[finding.severity])


_RANK: dict[str, int] = {"info": 0, "suspect": 1, "invalid": 2}


def verdict(findings: Sequence[Finding]) -> Verdict:
    worst = max((_RANK[finding.severity] for finding in findings), default=0)
    return ("valid", "suspect", "invalid")[worst]
