"""Result files of vllm bench serve, guidellm and aiperf -> loads: what each tool said, and its requests where the file has them.

Read for this, as files and in their sources: vllm bench serve 0.32.0 (--save-result, with and without --save-detailed),
guidellm 0.8.1 (JSON, metadata.version 2), aiperf 0.13.0 (profile_export_aiperf.json, schema 1.4, and profile_export.jsonl).
The definitions of their figures are those of definitions.TOOLS.  What a file does not tell is NaN, never guessed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from harness.endings import plain
from harness.records import NAN, RATES, Floats, Record, RidgelineError

NAMES = {"vllm": "vllm bench serve", "guidellm": "guidellm", "aiperf": "aiperf"}
STATISTICS = ("mean", "p50", "p90", "p95", "p99")
APART = 0.05  # gaps between events that differ so much from the time per token: events were not tokens
Said = dict[str, Any]  # keys as in definitions (TIMES: STATISTICS; RATES), and requests, errors, duration_s, tokens


@dataclass(frozen=True, slots=True)
class Load:
    """One benchmark of a tool: a point of ours.  `batch_size` or `rate` is None.  `records` is empty where the file holds
    no requests: then there is only what the tool `said`, under its own definitions."""

    tool: str
    version: str
    model: str
    batch_size: int | None
    rate: float | None
    said: Said
    records: list[Record] = field(default_factory=list)
    url: str | None = None
    api: str = "completions"
    started_at: str = ""
    stamps: str = "no requests in the file"

    @property
    def name(self) -> str:
        return f"{NAMES[self.tool]} {self.version}".strip() + ("" if self.version else " (version not in its file)")

    @property
    def load(self) -> str:
        return f"batch size {self.batch_size}" if self.batch_size else f"{self.rate:g} requests/s"


def loads(text: str, where: str) -> list[Load]:
    """What a result file holds.  Raises RidgelineError naming the file, and what it is if it is none of these."""
    values = parsed(text, where)
    try:
        if all(_is_aiperf_record(value) for value in values):
            found = [aiperf({}, values)]
        else:
            found = [load for value in values for load in READERS[tool_of(value)](value)]
        return [_sound(load) for load in found]
    except KeyError as problem:
        raise RidgelineError(f"{where}: {_unknown(problem.args[0])}") from None
    except (TypeError, ValueError, AttributeError, IndexError) as problem:
        raise RidgelineError(f"{where}: not as these tools write it: {str(problem)[:160]}") from None


def _sound(load: Load) -> Load:
    if not ((load.batch_size or 0) > 0 or (load.rate or 0.0) > 0):
        raise ValueError(f"a load of {load.batch_size or load.rate}")
    if any(record.chunk_s.ndim != 1 for record in load.records):
        raise ValueError("stamps that are no list")
    return load


def _unknown(key: str) -> str:
    if key:
        return f"lacks {key!r}, which this format has (vllm bench serve 0.32, guidellm 0.8, aiperf 0.13)"
    return ("no result of vllm bench serve (--save-result), guidellm (--output kind=json) or aiperf "
            "(profile_export_aiperf.json, profile_export.jsonl)")  # fmt: skip


def parsed(text: str, where: str) -> list[Any]:
    """A JSON file, or one JSON value a line (vllm's --append-result, aiperf's records)."""
    try:
        return [json.loads(text)]
    except (ValueError, RecursionError):
        pass
    try:
        found = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, RecursionError) as problem:
        raise RidgelineError(f"{where}: neither JSON nor JSON lines: {str(problem)[:120]}") from None
    if not found:
        raise RidgelineError(f"{where}: is empty")
    return found


def tool_of(value: Any) -> str:
    """The tool that wrote a JSON value.  Raises KeyError("") if it is none."""
    if isinstance(value, dict):
        if "benchmarks" in value and "metadata" in value:
            return "guidellm"
        if "aiperf_version" in value and "request_latency" in value:
            return "aiperf"
        if {"model_id", "num_prompts", "completed", "duration", "request_throughput"} <= value.keys():
            return "vllm"
    raise KeyError("")


def _is_aiperf_record(value: Any) -> bool:
    return isinstance(value, dict) and "request_start_ns" in (value.get("metadata") or {}) and "metrics" in value


def _number(value: Any) -> float:
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else NAN


def _count(value: Any) -> int | None:
    found = _number(value)
    return None if math.isnan(found) else round(found)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _record(id: int, sent_s: float, chunk_s: Floats, **more: Any) -> Record:
    """A request of a tool; its times in seconds after `sent_s`, which counts from the first request sent."""
    values: dict[str, Any] = {
        "point": 0, "trial": 0, "wave": 0, "warmup": False, "scheduled_s": NAN, "token_source": "tool",
    }  # fmt: skip
    if not more.get("error_class"):
        values |= {"status": 200, "end_s": sent_s + float(chunk_s[-1])}
    return Record(id=id, sent_s=sent_s, chunk_s=chunk_s.astype(np.float32), chunk_tokens=np.ones(len(chunk_s), np.int32),
                  **values | more)  # fmt: skip


def _failed(text: Any) -> dict[str, Any]:
    if isinstance(text, Mapping):
        text = f"{text.get('code')} {text.get('type')}: {text.get('message')}"
    said = text if isinstance(text, str) else ""
    last = next((line for line in reversed(said.splitlines()) if line.strip()), "the tool gives no reason")
    return {"error_class": "failed_elsewhere", "error": plain(last, limit=400)}


NOTHING = np.empty(0)


# --- vllm bench serve ---------------------------------------------------------------------------------------------


def vllm(data: Mapping[str, Any]) -> list[Load]:
    rate = _number(data.get("request_rate"))  # "inf" is a text
    open_loop = math.isfinite(rate)
    n = int(data["completed"]) + int(data.get("failed") or 0)
    slots = data.get("max_concurrency") or data["num_prompts"]
    records = _vllm_records(data) if data.get("start_times") and data.get("itls") else []
    said: Said = {}
    for ours, theirs in (("ttft", "ttft"), ("itl", "itl"), ("tpot", "tpot"), ("e2e", "e2el")):
        times = {q: _number(data.get(f"{q}_{theirs}_ms")) for q in STATISTICS}
        if math.isnan(times["p50"]):  # the median is told even where no percentile was asked for
            times["p50"] = _number(data.get(f"median_{theirs}_ms"))
        # It writes 0 for the mean of nothing.
        said[f"{ours}_s"] = {q: v / 1e3 if times["mean"] else NAN for q, v in times.items()} | {
            "n": int(data["completed"])
        }
    said |= {
        "output_tokens_per_s": _number(data.get("output_throughput")),
        "total_tokens_per_s": _number(data.get("total_token_throughput")),
        "requests_per_s": _number(data["request_throughput"]),
        "requests": n,
        "errors": int(data.get("failed") or 0),
        "duration_s": _number(data["duration"]),
        "input_tokens": _number(data.get("total_input_tokens")),
        "output_tokens": _number(data.get("total_output_tokens")),
    }
    return [
        Load("vllm", "", str(data["model_id"]), None if open_loop else int(slots), rate if open_loop else None, said, records,
             api="chat" if "chat" in str(data.get("endpoint_type") or data.get("backend")) else "completions",
             started_at=_vllm_date(str(data.get("date") or "")),
             stamps="of every event with a choice, empty ones too" if records else
             "no requests in the file: --save-detailed keeps them")
    ]  # fmt: skip


def _vllm_records(data: Mapping[str, Any]) -> list[Record]:
    start_s = min(data["start_times"], default=0.0)
    columns = [data[key] for key in ("start_times", "ttfts", "itls", "input_lens", "output_lens", "errors")]
    found = []
    for i, (at_s, ttft_s, gaps_s, inputs, outputs, error) in enumerate(zip(*columns, strict=True)):
        lengths = {"input_tokens": _count(inputs), "output_tokens": _count(outputs)}
        if error or not outputs:
            found.append(_record(i, at_s - start_s, NOTHING, **_failed(error)))
            continue
        chunk_s = np.cumsum([ttft_s, *gaps_s])
        events = {"first_event_s": float(chunk_s[0]), "last_event_s": float(chunk_s[-1]), "choice_events": len(chunk_s)}
        found.append(_record(i, at_s - start_s, chunk_s, **lengths, **events))
    return found


def _vllm_date(said: str) -> str:
    """20261121-144147 -> 2026-11-21T14:41:47: the local time of its machine."""
    digits = said.replace("-", "")
    if len(digits) != 14 or not digits.isdigit():
        return ""
    return f"{digits[:4]}-{digits[4:6]}-{digits[6:8]}T{digits[8:10]}:{digits[10:12]}:{digits[12:]}"


# --- guidellm -----------------------------------------------------------------------------------------------------


def guidellm(data: Mapping[str, Any]) -> list[Load]:
    """Each of its benchmarks.  It keeps the first and the last token of a request; what came between is NaN."""
    backend = data["config"]["spec"]["backend"]
    found = []
    for one in data["benchmarks"]:
        metrics, strategy = one["metrics"], one["config"]["strategy"]
        totals = metrics["request_totals"]
        asked = strategy.get("streams") or strategy.get("max_concurrency") or totals["total"]
        rate = _number(strategy.get("rate"))
        done, failed = one["requests"].get("successful") or [], one["requests"].get("errored") or []
        whole = len(done) == totals["successful"] and len(failed) == totals["errored"] and bool(done)
        open_loop = math.isfinite(rate)
        found.append(
            Load("guidellm", str(data["metadata"].get("guidellm_version") or ""), str(backend.get("model") or "unknown"),
                 None if open_loop else 1 if strategy["type_"] == "synchronous" else int(asked),
                 rate if open_loop else None, _guidellm_said(one, metrics, totals),
                 _guidellm_records(done, failed, open_loop) if whole else [], url=_text(backend.get("target")),
                 api="chat" if "chat" in str(backend.get("request_format")) else "completions",
                 started_at=_utc(one.get("start_time")),
                 stamps="of the first and the last token" if whole else "the file holds a sample of the requests, or none")
        )  # fmt: skip
    return found


def _guidellm_said(one: Mapping[str, Any], metrics: Mapping[str, Any], totals: Mapping[str, Any]) -> Said:
    times = (("ttft_s", "time_to_first_token_ms", 1e3), ("itl_s", "inter_token_latency_ms", 1e3),
             ("tpot_s", "time_per_output_token_ms", 1e3), ("e2e_s", "request_latency", 1.0))  # fmt: skip
    said: Said = {}
    for key, name, scale in times:
        spread = metrics[name]["successful"]
        known = spread["count"] > 0  # it writes 0 for what it has not
        said[key] = {"mean": _number(spread["mean"]) / scale if known else NAN, "n": int(spread["count"])}
        said[key] |= {q: _number(spread["percentiles"].get(q)) / scale if known else NAN for q in STATISTICS[1:]}
    rates = ("output_tokens_per_second", "tokens_per_second", "requests_per_second")
    said |= {key: _number(metrics[name]["total"]["mean"]) for key, name in zip(RATES, rates, strict=True)}
    tokens = {"input_tokens": "prompt_token_count", "output_tokens": "output_token_count"}
    said |= {key: _number(metrics[name]["successful"].get("total_sum")) for key, name in tokens.items()}
    return said | {"requests": totals["successful"] + totals["errored"], "errors": totals["errored"],
                   "failed_output_tokens": _number(metrics["output_token_count"]["errored"].get("total_sum")),
                   "duration_s": _number(one.get("duration"))}  # fmt: skip


def _guidellm_records(
    done: Sequence[Mapping[str, Any]], failed: Sequence[Mapping[str, Any]], due: bool
) -> list[Record]:
    started = [request["info"]["timings"]["request_start"] for request in (*done, *failed)]
    start_s = min((at for at in started if at is not None), default=0.0)
    found = []
    for i, request in enumerate((*done, *failed)):
        timing = request["info"]["timings"]
        sent_s = (started[i] if started[i] is not None else NAN) - start_s
        more: dict[str, Any] = {"scheduled_s": _number(timing.get("targeted_start")) - start_s if due else NAN}
        if i >= len(done):
            found.append(_record(i, sent_s, NOTHING, **more, **_failed(request["info"].get("error"))))
            continue
        first_s, last_s = (_number(timing[f"{k}_token_iteration"]) - started[i] for k in ("first", "last"))
        between = max(0, int(timing["token_iterations"]) - 2)
        chunk_s = np.array([first_s, *[NAN] * between, last_s] if last_s > first_s else [first_s])
        lengths = {"input_tokens": _count(request["prompt_tokens"]), "output_tokens": _count(request["output_tokens"])}
        more |= {"end_s": timing["request_end"] - start_s, "cached_tokens": _count(request.get("cached_tokens"))}
        found.append(_record(i, sent_s, chunk_s, **lengths, **more))
    return found


def _utc(at_s: Any) -> str:
    if math.isnan(_number(at_s)):
        return ""
    return f"{np.datetime64(int(at_s), 's')}+00:00"


# --- aiperf -------------------------------------------------------------------------------------------------------


def aiperf(summary: Mapping[str, Any], lines: Sequence[Mapping[str, Any]] = ()) -> Load:
    """Its summary, its records, or both of one run."""
    records = _aiperf_records(lines) if lines else []
    config = summary.get("input_config") or {}
    phase: Mapping[str, Any] = next((p for p in reversed(config.get("phases") or []) if p.get("kind") != "warmup"), {})
    endpoint = config.get("endpoint") or {}
    rate = _number(phase.get("rate"))
    batch = None if math.isfinite(rate) else _count(phase.get("concurrency")) or _most_in_flight(records)
    if batch is None and not math.isfinite(rate):
        raise KeyError("input_config.phases[].concurrency or .rate")
    models = ((config.get("models") or {}).get("items")) or [{}]
    return Load("aiperf", str(summary.get("aiperf_version") or ""), str(models[0].get("name") or "unknown"), batch,
                rate if math.isfinite(rate) else None, _aiperf_said(summary) if summary else {}, records,
                url=_text(next(iter(endpoint.get("urls") or []), None)), api="chat" if "chat" in str(endpoint.get("type")) else "completions",
                started_at=str(summary.get("start_time") or "").partition(".")[0],
                stamps="of every event with text" if records else "no requests in the file: profile_export.jsonl beside it has them")  # fmt: skip


def _aiperf_said(summary: Mapping[str, Any]) -> Said:
    def value(name: str, q: str = "avg") -> float:
        return _number((summary.get(name) or {}).get(q))

    times = {"ttft_s": "time_to_first_token", "itl_s": "inter_token_latency", "e2e_s": "request_latency",
             "chunk_gap_s": "inter_chunk_latency"}  # fmt: skip
    said: Said = {
        key: {"mean": value(name) / 1e3, "n": _count(value(name, "count")) or 0}
        | {q: value(name, q) / 1e3 for q in STATISTICS[1:]}
        for key, name in times.items()
    }
    rates = ("output_token_throughput", "total_token_throughput", "request_throughput")
    errors = _count(value("error_request_count")) or 0
    return said | {key: value(name) for key, name in zip(RATES, rates, strict=True)} | {
        "tpot_s": None, "requests": (_count(value("request_count")) or 0) + errors, "errors": errors,
        "duration_s": value("benchmark_duration"), "input_tokens": value("total_isl"), "output_tokens": value("total_osl"),
    }  # fmt: skip


def _aiperf_records(lines: Sequence[Mapping[str, Any]]) -> list[Record]:
    start_ns = min(line["metadata"]["request_start_ns"] for line in lines)
    found = []
    for i, line in enumerate(sorted(lines, key=lambda line: line["metadata"]["request_start_ns"])):
        about, metrics = line["metadata"], line["metrics"]
        sent_s = (about["request_start_ns"] - start_ns) / 1e9
        more = {"warmup": about.get("benchmark_phase") == "warmup"}
        if line.get("error") or about.get("was_cancelled") or "request_latency" not in metrics:
            found.append(_record(i, sent_s, NOTHING, **more, **_failed(line.get("error") or "cancelled")))
            continue
        first_ms = metrics.get("time_to_first_token", {}).get("value")
        gaps_ms = metrics.get("inter_chunk_latency", {}).get("value") or []
        last_ms = metrics["request_latency"]["value"]
        chunk_ms = np.cumsum([first_ms, *gaps_ms]) if first_ms is not None else np.array([NAN, last_ms])
        lengths = {key: _count((metrics.get(name) or {}).get("value"))
                   for key, name in (("input_tokens", "input_sequence_length"), ("output_tokens", "output_sequence_length"))}  # fmt: skip
        found.append(_record(i, sent_s, chunk_ms / 1e3, **more, **lengths, end_s=sent_s + last_ms / 1e3))
    return found


def _most_in_flight(records: Sequence[Record]) -> int | None:
    """The most requests that were under way at once, for files that do not tell what was asked for."""
    good = [r for r in records if not r.error_class and not r.warmup]
    steps = sorted([(r.sent_s, 1) for r in good] + [(r.end_s, -1) for r in good])
    return max(np.cumsum([step for _, step in steps]).tolist(), default=None)


READERS: dict[str, Callable[[Mapping[str, Any]], list[Load]]] = {
    "vllm": vllm,
    "guidellm": guidellm,
    "aiperf": lambda summary: [aiperf(summary)],
}


# --- beside our own figures ---------------------------------------------------------------------------------------


def comparable(tool: str, said: Mapping[str, Any], empty_events: bool = False) -> Said:
    """Those of a tool's figures that mean what ours of that name mean; see docs/definitions.md.

    vllm's ITL is of events: ours only where each held one token, which its TPOT tells, and `empty_events` if known.
    guidellm's percentiles of ITL are of requests, its TPOT holds TTFT, and its rates count what failed.  aiperf's ITL is our
    TPOT, and its gaps between events are our chunk gap.  Where events are not tokens, the mean of TPOT stands for that of ITL.
    """
    found: Said = {key: dict(said[key]) for key in ("ttft_s", "e2e_s") if said.get(key)}
    found |= {key: said[key] for key in RATES if key in said}
    itl = dict(said.get("itl_s") or {})
    if tool == "guidellm":
        if said.get("errors"):
            found = {key: value for key, value in found.items() if key not in RATES}
            if not said.get("failed_output_tokens"):
                found["output_tokens_per_s"] = said["output_tokens_per_s"]
        return found | {"itl_s": {"mean": itl.get("mean", NAN), "n": itl.get("n", 0)}}
    pace, gaps = (said.get("tpot_s"), itl) if tool == "vllm" else (itl, dict(said.get("chunk_gap_s") or {}))
    found |= {"tpot_s": dict(pace or {}), "chunk_gap_s": gaps}
    per_token_s = (pace or {}).get("mean", NAN)
    otherwise = empty_events or abs(gaps.get("mean", NAN) - per_token_s) > APART * per_token_s
    return found | {"itl_s": {"mean": per_token_s, "n": (pace or {}).get("n", 0)} if otherwise else dict(gaps)}


def filled(row: Mapping[str, Any], imported: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A point's row with what its stamps do not tell put in from what the tool said, and the names of what was put in."""
    row, names, said = dict(row), [], imported["said"]
    empty_events = imported["tool"] == "vllm" and row["arrivals_per_token"] > 1
    if empty_events:  # which of its stamps were of no token, a role's or a finish reason's, is not known
        row["itl_s"] = dict.fromkeys(row["itl_s"], NAN) | {"n": 0}
    for key, theirs in comparable(imported["tool"], said, empty_events).items():
        if not isinstance(theirs, Mapping):
            if _missing(row[key]) and not _missing(theirs):
                row[key] = theirs
                names.append(key)
            continue
        lacking = [q for q in theirs if q != "n" and _missing(row[key][q]) and not _missing(theirs[q])]
        if lacking:
            n = row[key]["n"] or theirs.get("n") or 0
            row[key] = row[key] | {q: theirs[q] for q in lacking} | {"n": n}
            names.append(key)
    if not row["requests"]:
        row |= _counted(said)
    return row, names


def _counted(said: Mapping[str, Any]) -> dict[str, Any]:
    """What a row has of requests, where only the tool's summary tells."""
    good = said["requests"] - said["errors"]
    tokens = {
        key: said[key] / good if good and not _missing(said[key]) else None for key in ("input_tokens", "output_tokens")
    }
    classes = {"failed_elsewhere": said["errors"]} if said["errors"] else {}
    return {"requests": said["requests"], "errors": said["errors"], "error_classes": classes, "trials": 1, **tokens}


def _missing(value: Any) -> bool:
    return value is None or value != value


def known(said: Mapping[str, Any]) -> Said:
    """What a tool said, read back from JSON: null is NaN there, but for a figure that the tool has not."""
    found = dict(said)
    for key, value in said.items():
        if isinstance(value, Mapping):
            found[key] = {q: NAN if v is None else v for q, v in value.items()}
        elif value is None and key not in ("ttft_s", "itl_s", "tpot_s", "e2e_s"):
            found[key] = NAN
    return found


def placed(load: Load, point: int, first_id: int) -> list[Record]:
    """A load's records as those of a point of a run."""
    return [replace(record, id=first_id + i, point=point) for i, record in enumerate(load.records)]
