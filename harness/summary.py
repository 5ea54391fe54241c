"""Run -> summary: the figures of each point, theory beside them, the verdict.  A pure function of what is on disk."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from harness import capacity_answer, checks, detail, edge, foreign, journal, prices, server, slo, units
from harness.capacity import Goal
from harness.lengths import typical
from harness.records import NAN, Finding, RidgelineError, Table, joined
from harness.tally import Blocks, Tally, count
from harness.theory import levers, seeds
from harness.theory.calibration import from_dict
from harness.theory.frameworks import of_run
from harness.theory.hardware import Hardware
from harness.theory.predict import plane, predict
from harness.theory.shape import Model

LENGTHS = ("input_tokens", "output_tokens")
COMPARED = ("ttft_s", "itl_s", "e2e_s", "output_tokens_per_s")


def build(run: Mapping[str, Any], state: str, blocks: Blocks, events: Sequence[Mapping[str, Any]],
          samples: Sequence[Mapping[str, Any]], notes: Sequence[str], model: Model | None,
          hardware: Hardware | None, only: Collection[int] | None = None) -> dict[str, Any]:  # fmt: skip
    """The summary (format: see store).  Points without a measured request are left out; so are those not in `only`."""
    scenario = run["scenario"]
    workload = scenario["workload"]
    theory = scenario["theory"]
    asked = _asked(run, theory)
    asked_in, asked_out = (workload[key] if isinstance(workload[key], int) else None for key in LENGTHS)
    if run.get("imported"):  # what the tool asked for is not what its file tells
        asked_in = asked_out = None
    if workload.get("prompts") or workload.get("trace") or workload.get("turns", 1) > 1:
        asked_in = None
    repeats = workload["same_prompt"] or any(workload.get(key) for key in ("shared_prefix", "prompts", "trace"))
    repeats = bool(repeats or workload.get("turns", 1) > 1)
    felt: dict[int, dict[int, Any]] = {}
    for event in events:
        if event.get("event") == "trial_end":
            felt.setdefault(event["point"], {})[event["trial"]] = event["senses"]
    tallies = {
        index: Tally(workload["mode"], plan["batch_size"] or 0, asked_in, asked_out, felt.get(index))
        for index, plan in enumerate(run["points"])
        if only is None or index in only
    }
    span = detail.Span()
    count(tallies, blocks, span.add)
    searched = scenario.get("capacity")
    tables = gathered(tallies, blocks) if searched else {}
    points = []
    for index, plan in enumerate(run["points"]):
        tally = tallies.get(index)
        if tally is None:
            continue
        if not tally.requests and not plan.get("imported"):
            continue
        row = {"point": index, "planned": None} | plan | tally.row()
        row["not_sent"] = max(0, row["planned"] - row["requests"]) if row["planned"] is not None else None
        if plan.get("imported"):
            row = _imported(row, plan["imported"])
        felt_here = list(felt.get(index, {}).values())
        spans = [(sense["started_s"], sense["ended_s"]) for sense in felt_here]
        seen = [s for s in samples if any(start <= s["at_s"] <= end for start, end in spans)]
        row["batch_ran"] = _batch_ran(seen)
        row |= _beside(tally, samples, spans)
        row["predicted"] = _predicted(row, workload, asked, model, hardware)
        evidence = checks.Evidence(
            row, tally, workload["mode"], felt_here, seen, row["predicted"], repeats, workload["api"]
        )
        findings = checks.run_checks(evidence)
        row["verdict"] = checks.verdict(findings)
        if searched:
            row["objective"] = edge.objective(tables[index], slo.upper(scenario["slo"]), workload["mode"])
        row["findings"] = [dataclasses.asdict(f) for f in findings]
        points.append(row)
    ended = sum(tally.requests for tally in tallies.values())
    refused = _refused(asked, model, hardware)
    findings = _run_findings(run, state, ended, notes, model, hardware, refused)
    findings += [] if run.get("imported") else checks.absent_senses(server.senses(samples))
    best = _best(points)
    worth = _worth(run, hardware)
    limits = [(limit["metric"], limit["bound"]) for limit in worth["limits"] if limit["point"] is None]
    worst = max((row["verdict"] for row in points), key=("valid", "suspect", "invalid").index, default="invalid")
    verdict = max(worst, checks.verdict(findings), key=("valid", "suspect", "invalid").index)
    summary = {
        "schema": 1,
        "state": state,
        "name": scenario["name"],
        "model": run.get("model"),
        "engine": run.get("engine"),
        "workload": workload,
        "hardware": hardware.as_dict() if hardware else None,
        "architecture": _architecture(model, theory) if model else None,
        "start": _start(run, model),
        "findings": [dataclasses.asdict(f) for f in findings],
        "verdict": verdict,
        "points": points,
        "plane": _plane(workload, points, asked, model, hardware),
        "worth": worth,
        "levers": _levers(best, workload, asked, model, hardware),
        "detail": detail.build(
            tallies, span, blocks, best["point"] if best else points[-1]["point"] if points else None, limits
        ),
    }
    if searched:
        ended_by = "stopped" if state != "complete" else (run.get("capacity") or {}).get("ended", "stopped")
        goal = Goal(workload["mode"], 1.0, max_failed=scenario["limits"]["max_error_rate"])
        finished = {point for point, _ in journal.ended(events)}
        summary["capacity"] = capacity_answer.answer(points, run["points"], finished, scenario["slo"], goal, ended_by)
        return summary | {"verdict_sentence": f"{summary['capacity']['sentence']}{_doubts(points)}"}
    return summary | {"verdict_sentence": sentence(summary)}


def gathered(wanted: Collection[int], blocks: Blocks) -> dict[int, Table]:
    """All records of each of these points."""
    parts: dict[int, list[Table]] = {index: [] for index in wanted}
    for t in blocks(None, True):
        for index in np.unique(t.point).tolist():
            if index in parts:
                parts[index].append(t.where(t.point == index))
    return {index: joined(tables) for index, tables in parts.items()}


def _imported(row: dict[str, Any], imported: Mapping[str, Any]) -> dict[str, Any]:
    said = foreign.known(imported["said"])
    row, taken = foreign.filled(row, dict(imported) | {"said": said}) if said else (row, [])
    return row | {"imported": dict(imported) | {"taken": taken}}


def _beside(tally: Tally, samples: Sequence[Mapping[str, Any]], spans: server.Spans) -> dict[str, Any]:
    """What was sensed beside a point.  The server counts the warm-up too, so here the client's means have it as well."""
    figures = server.point_figures(samples, spans, tally.tokens_with_warmup)
    for name in ("ttft", "itl"):
        figures[f"client_{name}_s"] = tally.mean_with_warmup(name) if figures[f"server_{name}_s"] else None
    figures["cache_share"] = server.cached_share(samples, spans)
    return figures


def _batch_ran(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What the server ran at once, from its own metrics.  Idle samples lie between waves and tell nothing."""
    running = [s["running"] for s in samples if s.get("running")]
    if not running:
        return None
    source = next(s["names"]["running"] for s in samples if "running" in s.get("names", {}))
    return {"mean": float(np.mean(running)), "max": max(running), "n": len(running), "source": source}


def _asked(run: Mapping[str, Any], theory: Mapping[str, Any]) -> dict[str, Any]:
    """What a prediction takes beside model, hardware and point.  Runs of older formats have no calibration."""
    stored, engine = (run.get("theory") or {}).get("calibration"), run.get("engine") or {}
    return {
        "dtype": theory["dtype"],
        "kv_dtype": theory["kv_dtype"],
        "tp": theory["tp"],
        "pp": theory.get("pp", 1),
        "framework": of_run(theory, engine),
        "calibration": from_dict(stored, "run.json") if stored else None,
    }


def _predicted(row: Mapping[str, Any], workload: Mapping[str, Any], asked: Mapping[str, Any], model: Model | None,
               hardware: Hardware | None) -> dict[str, Any] | None:  # fmt: skip
    if model is None or hardware is None:
        return None
    load = _load(row, workload)
    if load is None:
        return None
    try:
        point = predict(model, hardware, **load, **asked)
        if load["rate"] and not math.isfinite(point.ttft_s.value):  # saturated: what it does to those in flight
            point = predict(model, hardware, **{**load, "rate": None}, **asked)
    except RidgelineError:
        return None
    found = point.as_dict()
    measured = {
        name: row[name]["mean"] if name.endswith("_s") and isinstance(row[name], dict) else row[name]
        for name in COMPARED
    }
    found["ratio"] = {name: measured[name] / found[name]["value"] if found[name]["value"] else NAN for name in COMPARED}
    found["work"] = levers.work(model, asked, load)
    return found


def _refused(asked: Mapping[str, Any], model: Model | None, hardware: Hardware | None) -> str:
    """Why theory has nothing to say of this model, split and stored so, on this hardware; empty where it has."""
    if model is None or hardware is None:
        return ""
    try:
        predict(model, hardware, batch=1, input_tokens=1, output_tokens=1, **asked)
    except RidgelineError as problem:
        return str(problem)
    return ""


def _load(row: Mapping[str, Any], workload: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a point asked of the server, as `predict` takes it.  The run knows what a prediction from outside must
    assume: its arrivals, how often each client asked, and the share of its prompts that the server had in its cache."""
    batch = row["batch_size"]
    if batch is None:  # open loop: by Little's law, what was in flight on average
        e2e_s = row["e2e_s"]["mean"]
        batch = max(1.0, row["requests_per_s"] * e2e_s) if e2e_s == e2e_s else 1.0
    inputs, outputs = (row[key] or typical(workload[key]) for key in LENGTHS)
    if inputs is None or outputs is None:
        return None
    cached = row.get("cache_share")
    cached = min(0.99, max(0.0, cached)) if cached is not None and math.isfinite(cached) else 0.0
    rate = row["rate"] if workload["mode"] == "open" and isinstance(row["rate"], float | int) else None
    return {"batch": max(1, round(batch)), "input_tokens": round(inputs), "output_tokens": round(outputs),
            "mode": workload["mode"], "rate": rate, "waves": max(1.0, row["requests"] / batch), "cached_share": cached}  # fmt: skip


def _best(points: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The point that the verdict speaks of: most output among the valid, or else the suspect ones."""
    good = [p for p in points if p["verdict"] != "invalid" and p["output_tokens_per_s"] == p["output_tokens_per_s"]]
    return max(good, key=lambda p: (p["verdict"] == "valid", p["output_tokens_per_s"]), default=None)


def _worth(run: Mapping[str, Any], hardware: Hardware | None) -> dict[str, Any]:
    """What the load must meet and what an accelerator costs: told with the report, else in the scenario, else a list
    price."""
    scenario, told = run["scenario"], run.get("worth") or {}
    text, price = (told.get(key) or scenario.get(key) for key in ("slo", "price"))
    theory = scenario["theory"]
    found = {"slo": text, "limits": [dataclasses.asdict(limit) for limit in slo.parse(text)],
             "accelerators": theory["tp"] * theory.get("pp", 1), "usd_per_h": None, "price_source": ""}  # fmt: skip
    if price:
        return found | {"usd_per_h": prices.usd_per_h(price), "price_source": "as given"}
    if hardware and math.isfinite(hardware.usd_per_h):
        return found | {"usd_per_h": hardware.usd_per_h, "price_source": hardware.price_source}
    return found


def _levers(best: Mapping[str, Any] | None, workload: Mapping[str, Any], asked: Mapping[str, Any], model: Model | None,
            hardware: Hardware | None) -> list[dict[str, Any]]:  # fmt: skip
    load = _load(best, workload) if best else None
    if load is None or model is None or hardware is None:
        return []
    return levers.levers(model, hardware, {**load, **asked})


def _plane(workload: Mapping[str, Any], points: Sequence[Mapping[str, Any]], asked: Mapping[str, Any], model: Model | None,
           hardware: Hardware | None) -> dict[str, Any] | None:  # fmt: skip
    if model is None or hardware is None:
        return None
    lengths = [workload[key] for key in LENGTHS]
    if not all(isinstance(n, int) for n in lengths) or any(workload.get(key) for key in ("trace", "prompts")):
        lengths = [next((row[key] for row in points if row[key]), None) or typical(workload[key]) for key in LENGTHS]
    if None in lengths:
        return None
    try:
        return plane(model, hardware, input_tokens=round(lengths[0]), output_tokens=round(lengths[1]),
                     **asked)  # fmt: skip
    except RidgelineError:
        return None


def _architecture(model: Model, theory: Mapping[str, Any]) -> dict[str, Any]:
    return model.as_dict() | {
        "weight_bytes": model.weight_bytes(theory["dtype"]),
        "kv_bytes_per_token": model.kv_bytes_per_token(theory["kv_dtype"]),
        "dtype": theory["dtype"] or model.dtype,
    }


def _start(run: Mapping[str, Any], model: Model | None) -> dict[str, Any] | None:
    """The engine's start in its stages, and what reading the weights from disk should take (seed 000)."""
    stages = (run.get("engine") or {}).get("stages")
    if not stages:
        return None
    disk = (run.get("engine") or {}).get("disk_bytes_per_s")
    weights = (run.get("engine") or {}).get("weight_bytes") or (
        model.weight_bytes(run["scenario"]["theory"]["dtype"]) if model else None
    )
    predicted = seeds.load_s(weights, disk) if weights and disk else None
    return {"stages": stages, "weight_bytes": weights, "disk_bytes_per_s": disk, "predicted_load_s": predicted}


def _of_planned(run: Mapping[str, Any], ended: int) -> str:
    planned = [point.get("planned") for point in run["points"]]
    return "" if None in planned else f"; {units.count(sum(planned))} requests were planned, {units.count(ended)} ended"


def _run_findings(run: Mapping[str, Any], state: str, ended: int, notes: Sequence[str], model: Model | None,
                  hardware: Hardware | None, refused: str) -> list[Finding]:  # fmt: skip
    found = []
    if state != "complete":
        said = "was interrupted" if state == "interrupted" else "did not end: it was killed or is still going on"
        found.append(Finding("R001", "suspect", f"the run {said}{_of_planned(run, ended)}", "points may be missing or have fewer requests than planned",
                             "run it again for figures to be quoted"))  # fmt: skip
    for note in notes:
        found.append(
            Finding(
                "R002", "suspect", note, "these requests are in no figure", "keep the folder if you need to know more"
            )
        )
    for why in run.get("no_prediction", []) if model is None or hardware is None else []:
        found.append(Finding("R003", "info", why["saw"], "without it no figure can be held against theory", why["do"]))
    if refused:
        found.append(Finding("R003", "info", f"no prediction: {refused}", "without it no figure can be held against theory",
                             "say with --tp, --dtype, --kv-dtype and --hardware what the server runs with"))  # fmt: skip
    for caveat in hardware.caveats if hardware else ():
        found.append(Finding("R004", "info", f"hardware row {hardware.name}: {caveat}",  # type: ignore[union-attr]
                             "a prediction is as good as its row", "measure the part that matters, or take another source"))  # fmt: skip
    tokens = run.get("prompts") or {}
    if tokens.get("source") == "none":
        found.append(Finding("R005", "suspect", "prompt lengths are estimates: no tokenizer, and no usage from the server",
                             "the points are not of the length asked", "give --tokenizer"))  # fmt: skip
    return found


def sentence(summary: Mapping[str, Any]) -> str:
    """The verdict in a sentence, for people who read no further."""
    points = summary["points"]
    model = summary["model"] or "the model"
    if not points:
        return f"Nothing was measured of {model}."
    good = [p for p in points if p["verdict"] != "invalid" and p["output_tokens_per_s"] == p["output_tokens_per_s"]]
    if not good:
        return f"No point of {model} is valid: see the findings before quoting any figure."
    best = max(good, key=lambda p: p["output_tokens_per_s"])
    at = f"batch size {best['batch_size']}" if best["batch_size"] else f"{units.number(best['rate'])} requests/s"
    text = (f"{model} gave at most {units.number(best['output_tokens_per_s'], 3)} output tokens/s, at {at} "
            f"(TTFT {units.seconds(best['ttft_s']['mean'], 3)}, ITL {units.seconds(best['itl_s']['mean'], 3)})")  # fmt: skip
    if predicted := best["predicted"]:
        ratio = predicted["ratio"]["itl_s"]
        text += (f"; a token took {units.number(ratio, 3)} times what theory predicts for {summary['hardware']['name']}, "
                 f"where the limit is {predicted['limit'].replace('_', ' ')}")  # fmt: skip
    return f"{text}.{_doubts(points)}"


def _doubts(points: Sequence[Mapping[str, Any]]) -> str:
    counts = {v: sum(p["verdict"] == v for p in points) for v in ("suspect", "invalid")}
    doubts = [f"{n} of {len(points)} points {v}" for v, n in counts.items() if n]
    return f" {' and '.join(doubts).capitalize()}: see the findings." if doubts else ""


def public(summary: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """The object that `--json` prints: latencies in ms, one line a point."""
    return {
        "run": folder,
        "model": summary["model"],
        "engine": (summary["engine"] or {}).get("kind"),
        "state": summary["state"],
        "verdict": summary["verdict"],
        "findings": summary["findings"],
        "points": [public_point(point) for point in summary["points"]],
    } | ({"capacity": summary["capacity"]} if summary.get("capacity") else {})


def public_point(point: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, value in point.items():
        if isinstance(value, dict) and name.endswith("_s"):
            row[f"{name[:-2]}_ms"] = {k: v if k == "n" else _ms(v) for k, v in value.items()}
        elif name in ("server_ttft_s", "server_itl_s", "client_ttft_s", "client_itl_s"):
            row[f"{name[:-2]}_ms"] = _ms(value)
        elif name == "predicted" and value:
            row[name] = {f"{k[:-2]}_ms": _ms(value[k]["value"]) for k in ("ttft_s", "itl_s", "e2e_s")} | {
                "output_tokens_per_s": value["output_tokens_per_s"]["value"],
                "limit": value["limit"],
                "largest_batch": value["largest_batch"],
                "ratio": {
                    k.removesuffix("_s") if k != "output_tokens_per_s" else k: v for k, v in value["ratio"].items()
                },
            }
        else:
            row[name] = value
    return row


def _ms(value_s: float | None) -> float | None:
    return None if value_s is None else value_s * 1e3
