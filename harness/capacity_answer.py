"""What a search for the capacity found: for summary.json, in a sentence, and as the last lines on the terminal."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from harness import units
from harness.capacity import FAILED, QUEUE, Edge, Goal, Measured, Reading, edge
from harness.records import NAN


def measured(row: Mapping[str, Any], mode: str) -> Measured:
    """A point of the summary, as the search sees it."""
    said = row["objective"]
    readings = tuple(
        Reading(r["metric"], r["bound"], *(_nan(r[key]) for key in ("value", "low", "high"))) for r in said["readings"]
    )
    served = said["served_per_s"] if mode == "open" else row["requests_per_s"]
    return Measured(
        float(row["rate"] if mode == "open" else row["batch_size"]), row["verdict"], readings, said["saturated"],
        _nan(served), row["errors"] / row["requests"] if row["requests"] else 1.0,
        _nan(row["ttft_s"]["mean"]), _nan(row["e2e_s"]["mean"]), row["play"]["full"],
    )  # fmt: skip


def unmeasured(plan: Mapping[str, Any], mode: str) -> Measured:
    """A point of which no measured request ended."""
    return Measured(float(plan["rate"] if mode == "open" else plan["batch_size"]), "invalid", ())


def _nan(value: float | None) -> float:
    return NAN if value is None else float(value)


def answer(rows: Sequence[Mapping[str, Any]], plans: Sequence[Mapping[str, Any]], finished: Collection[int],
           objective: str, goal: Goal, ended: str) -> dict[str, Any]:  # fmt: skip
    """What a search found, for summary.json.  `plans` are its points and `finished` the numbers of those that ended; one
    without a row in `rows` had no measured request.  `ended` is what `decide` said, or `time` or `stopped`."""
    known = {row["point"]: row for row in rows}
    order = [i for i in range(len(plans)) if i in finished]
    points = [measured(known[i], goal.mode) if i in known else unmeasured(plans[i], goal.mode) for i in order]
    at = edge(points, goal) if any(p.usable for p in points) else Edge(NAN, 0.0, math.inf, NAN, NAN, "")
    found: dict[str, Any] = {
        "slo": objective,
        "mode": goal.mode,
        "ended": ended,
        "load": at.load,
        "low": at.low,
        "high": at.high,
        "met": at.met,
        "missed": at.missed,
        "limit": at.limit,
        "points": [
            {"point": i, "load": p.load, "verdict": p.verdict, "holds": holds(p, goal), "saturated": p.saturated,
             "failed_share": p.failed_share, "readings": known[i]["objective"]["readings"] if i in known else []}
            for i, p in zip(order, points, strict=True)
        ],
    }  # fmt: skip
    return found | {"sentence": sentence(found)}


def holds(point: Measured, goal: Goal) -> bool | None:
    """Whether a point met the objective; None where it is not to be trusted."""
    if not point.usable:
        return None
    return not point.saturated and point.failed_share <= goal.max_failed and all(r.excess <= 0 for r in point.readings)


def load_text(load: float | None, mode: str) -> str:
    return f"{units.number(load, 4)} requests/s" if mode == "open" else f"batch size {units.count(load)}"


def bound_text(reading: Mapping[str, Any]) -> str:
    return f"{reading['metric']} ≤ {units.seconds(reading['bound'], 3)}"


LIMITS = {QUEUE: "arrivals outrun completions", FAILED: "requests fail"}


def sentence(found: Mapping[str, Any]) -> str:
    """The answer for people who read no further."""
    mode, points = found["mode"], found["points"]
    if not points:
        return "Nothing was measured."
    readings: list[dict[str, Any]] = next((p["readings"] for p in points if p["readings"]), [])
    bounds = " and ".join(bound_text(reading) for reading in readings) or str(found["slo"])
    met, missed = _nan(found["met"]), _nan(found["missed"])
    if found["ended"] == "invalid":
        again = load_text(points[-1]["load"], mode)
        known = [f"{load_text(met, mode)} meets it"] * (met == met) + [f"{load_text(missed, mode)} misses it"] * (
            missed == missed
        )
        return f"Cannot tell up to which load {bounds} hold: {again} was invalid twice" + (
            f"; {', '.join(known)}." if known else "."
        )
    if math.isnan(met):
        least = next((p for p in points if p["load"] == missed), None)
        shown = "" if least is None else f": {_first(least, found['limit'])} at {load_text(missed, mode)}"
        sure = "No load meets" if found["ended"] == "none" else "No load that was tried meets"
        return f"{sure} {bounds}{shown}."
    if math.isnan(missed):
        return f"{bounds} hold up to {load_text(met, mode)} at least: nothing beyond was measured."
    span = f"{units.number(found['low'], 4)} – {units.number(found['high'], 4)}"
    why = LIMITS.get(found["limit"], f"{found['limit']} is missed first")
    return f"{bounds} hold up to {load_text(found['load'], mode)} (95 % interval {span}); beyond, {why}."


def _first(point: Mapping[str, Any], limit: str) -> str:
    value = next((r["value"] for r in point["readings"] if r["metric"] == limit), None)
    return LIMITS.get(limit, limit) if value is None else f"{limit} is {units.seconds(value, 3)}"


def code(found: Mapping[str, Any]) -> int:
    """The exit code: 0 an answer, 3 no load meets the objective, 5 invalid points leave it open."""
    none = found["points"] and math.isnan(_nan(found["met"]))
    return 5 if found["ended"] == "invalid" else 3 if none and found["ended"] != "stopped" else 0


ENDED = {
    "found": "the interval is within 5 %",
    "points": "all points are used",
    "time": "the time is over",
    "invalid": "a point was invalid twice",
    "none": "even the least load misses it",
    "all": "the most that is tried meets it",
    "stopped": "it was stopped",
}


def following(found: Mapping[str, Any], folder: str, url: str | None) -> str:
    """The command that would help most now."""
    if found["ended"] == "stopped":
        return f"ridgeline run --resume {folder}"
    if found["ended"] == "invalid":
        return f"ridgeline doctor --url {url}"
    if math.isnan(_nan(found["met"])):
        return f"ridgeline report {folder}"
    load = (
        f"--rate {found['load']:.4g}" if found["mode"] == "open" else f"--mode closed --batch-sizes {found['load']:g}"
    )
    return f"ridgeline run --url {url} {load} --trials 5"


MOST_LINES = 8


def _line(point: Mapping[str, Any], mode: str) -> str:
    said = ", ".join(f"{r['metric']} {units.seconds(r['value'], 3)}" for r in point["readings"])
    word = {True: "met", False: "missed", None: "not trusted"}[point["holds"]]
    over = ", arrivals outrun completions" if point["saturated"] else ""
    failed = f", {units.percent(point['failed_share'], 2)} failed" if point["failed_share"] else ""
    return f"{load_text(point['load'], mode):>22}  {word:<11} {said}{over}{failed}  {point['verdict']}"


def text(found: Mapping[str, Any], folder: str, page: str | None, url: str | None) -> str:
    """The last lines on the terminal."""
    mode = found["mode"]
    lines = [found["sentence"], ""]
    shown = found["points"][-MOST_LINES:]
    if len(found["points"]) > MOST_LINES:
        shown = shown[1:]
        lines.append(f"{'':>22}  {len(found['points']) - len(shown)} points before these: see the report")
    lines += [_line(point, mode) for point in shown]
    many = len(found["points"])
    lines += [
        "",
        f"{many} point{'s' if many != 1 else ''}; ended: {ENDED.get(found['ended'], found['ended'])}",
        f"run: {folder}",
    ]
    return "\n".join(lines + ([f"report: {page}"] if page else []) + [f"next: {following(found, folder, url)}"])
