"""What `plan` does: names and files in, a page and text or one JSON object out."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from harness import command_theory, models, planning, planning_text, slo, store, units
from harness import prices as price_lists
from harness.planning import Advice, Objective, Plan, Point, Run, Span, Way
from harness.records import NAN, RidgelineError
from harness.report import view
from harness.theory import frameworks
from harness.theory.dtypes import dtype_named
from harness.theory.hardware import Hardware, find, from_row
from harness.theory.shape import Model

DEFAULTS: dict[str, Any] = {
    "model": None, "hardware": None, "slo": "ttft_p95=500ms,itl_p95=50ms", "rate": None, "input_tokens": 350,
    "output_tokens": 150, "dtype": None, "kv_dtype": "auto", "tp": [1, 2, 4, 8], "framework": "vllm", "calibration": None,
    "prices": [], "runs": [], "out": None}  # fmt: skip
LIKE = 0.1  # lengths of a run may differ by so much from those asked for


@dataclass(frozen=True, slots=True)
class Asked:
    """What `ridgeline plan` is asked for."""

    model: str
    hardware: list[str]
    slo: str
    rate: float | None
    input_tokens: int
    output_tokens: int
    dtype: list[str] | None
    kv_dtype: str
    tp: list[int]
    framework: str
    calibration: Path | None
    prices: list[str]
    runs: list[Path]
    out: Path | None


def plan(asked: Asked, as_json: bool, words: Sequence[str]) -> str:
    """Write the page; returns what goes to stdout.  `words` are the command's, for whoever wants to repeat it."""
    from harness.report.plan_page import render

    found = found_of(asked)
    told = planning.advice(found)
    out = (
        asked.out or Path("reports") / f"plan-{re.sub(r'[^A-Za-z0-9._-]+', '-', found.model.name.split('/')[-1])}.html"
    )
    store.write_text(out, render(found, told, shlex.join(words)))
    if as_json:
        return orjson.dumps(as_dict(found, told) | {"report": str(out)}, option=orjson.OPT_SERIALIZE_NUMPY).decode()
    return planning_text.text(found, told, str(out))


def asked_of(scenario: Path | None, given: Mapping[str, Any]) -> Asked:
    """What is asked for: the options (those not None in `given`), over what a scenario says of model, hardware, load and
    objectives, over the defaults.  Raises RidgelineError where model or hardware are in neither."""
    values = DEFAULTS | (_of_scenario(scenario) if scenario else {})
    values |= {key: value for key, value in given.items() if value is not None}
    for key, flag in (("model", "--model"), ("hardware", "--hardware")):
        if not values.get(key):
            raise RidgelineError(f"{flag}: missing; name it, or a scenario whose theory does")
    return Asked(**values)


def _of_scenario(path: Path) -> dict[str, Any]:
    from harness import command

    found = command.planned(path, {})
    theory, work = found.theory, found.workload
    lengths = {key: getattr(work, key) for key in ("input_tokens", "output_tokens")}
    for key, value in lengths.items():
        if not isinstance(value, int):
            raise RidgelineError(
                f"{found.at('workload', key)}: a plan takes one length; give --{key.replace('_', '-')}"
            )
    rate = work.rates[0] if work.mode == "open" and work.rates else None
    row = theory.hardware if theory.hardware != "machine" else None
    values: dict[str, Any] = {
        "model": theory.model_config_path or found.model, "hardware": [row] if row else None, "slo": found.slo, "rate": rate,
        "dtype": [theory.dtype] if theory.dtype else None, "kv_dtype": theory.kv_dtype, "framework": theory.framework,
        "calibration": Path(theory.calibration) if theory.calibration else None,
        "prices": [f"{row}={found.price}"] if row and found.price else None, **lengths}  # fmt: skip
    return {key: value for key, value in values.items() if value is not None}


def found_of(asked: Asked) -> Plan:
    """The plan that is asked for.  Raises RidgelineError for whatever makes no sense."""
    objectives = objectives_of(asked.slo)
    if asked.rate is not None and not (math.isfinite(asked.rate) and asked.rate > 0):
        raise RidgelineError(f"--rate: got {asked.rate:g}, expected requests per second, more than 0")
    frameworks.stated(asked.framework)
    model = models.load(asked.model)
    model = replace(model, name=view.shorten(model.name, 80))
    rows = [_shown(row) for name in asked.hardware for row in command_theory.hardware_rows(name.strip())]
    rows = list({row.name: row for row in rows}.values())
    dtypes = None if asked.dtype is None else ["auto" if d == "auto" else dtype_named(d) for d in asked.dtype]
    load = planning.Load(asked.input_tokens, asked.output_tokens, asked.rate)
    runs = [_run(folder, model, load, objectives) for folder in asked.runs]
    prices = prices_of(asked.prices, [*rows, *(run.hardware for run in runs)])
    rows = [_priced(row, prices) for row in rows]
    runs = [replace(run, hardware=_priced(run.hardware, prices)) for run in runs]
    calibration = command_theory.calibration_of(asked.calibration) if asked.calibration else None
    return planning.plan(model, rows, load, objectives, dtypes=dtypes, tps=asked.tp, kv_dtype=asked.kv_dtype,
                         framework=asked.framework, calibration=calibration, runs=runs)  # fmt: skip


def objectives_of(text: str) -> tuple[Objective, ...]:
    """`ttft_p95=500ms,itl_p95=50ms`.  Raises RidgelineError."""
    found: dict[str, Objective] = {}
    for part in slo.parts(text):
        name, value = slo.pair(part, "--slo", "ttft_p95=500ms")
        planning.objective(name, 1.0)  # an unknown name before a wrong unit
        found[name] = planning.objective(name, units.parse(value, "time", f"--slo {name}"))
    if not found:
        raise RidgelineError("--slo: name at least one objective, such as ttft_p95=500ms")
    return tuple(found.values())


def prices_of(texts: Sequence[str], rows: Sequence[Hardware]) -> dict[str, float]:
    """Hardware name -> US dollars an hour, from "A=1.2/h".  Raises RidgelineError."""
    known = {row.name: row for row in rows}
    found = {}
    for part in (part for text in texts for part in slo.parts(text)):
        key, value = slo.pair(part, "--price", "H100-SXM=2.5/h")
        name = key if key in known else _named(key)
        if name not in known:
            raise RidgelineError(f"--price: {key!r} is none of the hardware asked for: {', '.join(known)}")
        found[name] = price_lists.usd_per_h(value, f"--price {key}")
    return found


def whole(text: str, flag: str) -> list[int]:
    """Whole numbers from 1 with commas between.  Raises RidgelineError."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and 0 < int(word) <= 1024 for word in words):
        raise RidgelineError(
            f"{flag}: got {text!r}; give whole numbers from 1 to 1024 with commas between, such as 1,2,4,8"
        )
    return list(dict.fromkeys(map(int, words)))


def _named(key: str) -> str:
    try:
        return find(key).name
    except RidgelineError:
        return ""


def _shown(row: Hardware) -> Hardware:
    """A row of the user's as a page may show it: printable, and no text that fills it."""
    return replace(row, name=view.shorten(row.name, 60), source=view.shorten(row.source, 500),
                   notes=view.shorten(row.notes, 1000), price_source=view.shorten(row.price_source, 200))  # fmt: skip


def _priced(row: Hardware, prices: Mapping[str, float]) -> Hardware:
    given = prices.get(row.name)
    return row if given is None else replace(row, usd_per_h=given, price_source="given with --price")


# --- runs -------------------------------------------------------------------------------------------------------------


def _run(folder: Path, model: Model, load: planning.Load, objectives: Sequence[Objective]) -> Run:
    """What a run folder holds of this question.  Raises RidgelineError where its hardware is not known."""
    from harness import command

    found = command.summarise(folder)
    run = store.info(folder)
    inputs, theory = run["theory"], run["scenario"]["theory"]
    if not inputs.get("hardware"):
        raise RidgelineError(
            f"{folder}: its hardware is not known; name it once: ridgeline report {folder} --hardware NAME"
        )
    own = command.model_from(inputs["model"]) if inputs.get("model") else None
    dtype = theory.get("dtype") or "auto"
    dtype = (own.dtype if own else "unknown") if dtype == "auto" else dtype
    points = tuple(point for p in found["points"] if (point := _point(p, objectives)) is not None)
    return Run(view.shorten(folder.resolve().name, 40), from_row(inputs["hardware"]), dtype, int(theory.get("tp") or 1), points,
               _unlike(found, own, model, load))  # fmt: skip


def _unlike(found: Mapping[str, Any], own: Model | None, model: Model, load: planning.Load) -> str:
    if own is None:
        return "its model is not known"
    if own.params != model.params or own.layers != model.layers:
        return f"another model: {own.name}"
    asked = {"input_tokens": load.input_tokens, "output_tokens": load.output_tokens}
    for key, wanted in asked.items():
        for point in found["points"]:
            was = view.num(point, key)
            if abs(was / wanted - 1) > LIKE:
                return f"other lengths: {units.number(was, 4)} {key.replace('_', ' ')}"
    return ""


def _point(point: Mapping[str, Any], objectives: Sequence[Objective]) -> Point | None:
    ran, e2e = view.batch_of(point), view.num(point, "e2e_s", "mean")
    batch = ran if math.isfinite(ran) else view.num(point, "requests_per_s") * e2e  # Little's law
    times, thin = {}, []
    for o in objectives:
        key, statistic = f"{o.metric}_s", o.name.partition("_")[2]
        mean = statistic == "mean"
        value = view.num(point, key, statistic)
        times[o.name] = Span(value, *(view.num(point, key, end) if mean else NAN for end in ("low", "high")))
        if not view.num(point, key, "n") >= view.SAMPLES_NEEDED.get(statistic, 0):
            thin.append(o.name)
    speed = view.measured(point, "output_tokens_per_s")
    if not math.isfinite(batch):
        return None
    return Point(batch, Span(speed.value, speed.low, speed.high), times, view.verdict_of(point), tuple(thin))


# --- out --------------------------------------------------------------------------------------------------------------


def as_dict(found: Plan, told: Advice | None) -> dict[str, Any]:
    """The plan as JSON takes it: SI units, US dollars, NaN is null."""
    return {
        "schema": 1,
        "model": found.model.name,
        "input_tokens": found.load.input_tokens,
        "output_tokens": found.load.output_tokens,
        "rate": found.load.rate,
        "slo": {o.name: o.bound_s for o in found.objectives},
        "framework": found.framework,
        "verdict": found.verdict,
        "sentence": planning_text.verdict(found),
        "choice": _way(found, found.choice) if found.choice else None,
        "lever": _way(found, found.lever) if found.lever else None,
        "does_not_fit": planning_text.unfit(found),
        "measure_next": _advice(found, told) if told else None,
        "ways": [_way(found, way) for way in found.ways],
    }


def _span(span: Span) -> dict[str, float]:
    return {"value": span.value, "low": span.low, "high": span.high}


def _way(found: Plan, way: Way) -> dict[str, Any]:
    row = way.hardware
    return {
        "hardware": row.name, "dtype": way.dtype, "tp": way.tp, "allowed": way.allowed, "state": way.state,
        "reason": way.reason or None, "measured": way.run.name if way.run else None, "batch": way.batch or None,
        "batch_if_predictions_held": way.hoped or None, "in_flight": way.in_flight, "replicas": _span(way.replicas),
        "gpus": way.gpus, "binding": way.binding or None, "limit": way.limit or None,
        "output_tokens_per_s": _span(way.tokens_per_s),
        "times_s": {name: _span(span) for name, span in (way.times or {}).items()},
        "usd_per_h": row.usd_per_h, "price_source": row.price_source or None,
        "usd_per_million_output_tokens": _span(way.usd_per_million),
        "usd_per_million_tokens": _span(way.usd_per_million.times(
            found.load.output_tokens / (found.load.input_tokens + found.load.output_tokens))),
        "usd_per_month": _span(way.usd_per_month),
    }  # fmt: skip


def _advice(found: Plan, told: Advice) -> dict[str, Any]:
    return {
        "hardware": told.way.hardware.name, "dtype": told.way.dtype, "tp": told.way.tp, "batch": told.point.batch,
        "input_tokens": told.point.input_tokens, "output_tokens": told.point.output_tokens, "metric": told.metric,
        "doubt": told.point.doubt, "doubt_after": told.point.doubt_after, "saves": told.saves,
        "because": planning_text.measure(found, told),
    }  # fmt: skip
