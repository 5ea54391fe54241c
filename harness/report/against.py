"""Predictions beside measurements: the sentences and tables of each chart, and the terms of each prediction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from harness import units
from harness.report import ratio, tables, view
from harness.report.charts import CHARTS, legend
from harness.report.section import Block, Charts
from harness.report.view import HEADLINES, RunView, Shown


def versus(runs: Sequence[RunView]) -> Charts:
    """A chart for each headline."""
    measured = any(view.points(run) for run in runs)
    named = zip(view.labels(runs), runs, strict=True)
    return Charts(
        [*(_versus(runs, shown) for shown in HEADLINES), *filter(None, [ratio.block(runs)])] if measured else [],
        notices=[f"{name}: {advice}" if name else advice for name, run in named if (advice := _advice(run))],
        legend=legend(runs),
        otherwise="No point was measured, so there is nothing to compare.",
    )


def _versus(runs: Sequence[RunView], shown: Shown) -> Block:
    chart = CHARTS[f"chart-{shown.key}"]
    return Block(f"chart-{shown.key}", shown.name, _versus_sentence(runs, shown), chart.read,
                 tables.versus_table(runs, shown), chart.draw(runs))  # fmt: skip


def _versus_sentence(runs: Sequence[RunView], shown: Shown) -> str:
    rows = [(view.quotient(p, shown.key), view.measured(p, shown.key).value, view.predicted(p, shown.key))
            for *_, p in view.rows(runs)]  # fmt: skip
    known = [row for row in rows if math.isfinite(row[0])]
    if not known:
        return "No prediction to compare with." if any(math.isfinite(row[1]) for row in rows) else "Not measured."
    low, high = min(row[0] for row in known), max(row[0] for row in known)
    span = units.ratio(low) if units.ratio(low) == units.ratio(high) else f"{units.ratio(low)} to {units.ratio(high)}"
    ranges = [(was, theory) for _, was, theory in known if math.isfinite(theory.low) and math.isfinite(theory.high)]
    inside = sum(theory.low <= was <= theory.high for was, theory in ranges)
    held = f"; {inside} of {len(ranges)} within the predicted interval" if ranges else ""
    return f"Measured is {span} the prediction{held}."


def plane(runs: Sequence[RunView]) -> Charts:
    """Throughput over batch size, under the roof."""
    chart, otherwise = CHARTS["chart-plane"], "No point was measured."
    figure = chart.draw(runs)
    if not any(view.points(run) for run in runs) and figure is None:
        return Charts([], otherwise=otherwise)
    sentences = [s for run, name in zip(runs, view.labels(runs), strict=True) if (s := _plane_sentence(run, name))]
    finding = " ".join(sentences) or "Without a prediction there is no roof to draw: only the measured points."
    block = Block("chart-plane", chart.title, finding, chart.read, tables.plane_table(runs), figure)
    return Charts([block], tall=True, legend=legend(runs), otherwise=otherwise)


def _plane_sentence(run: RunView, name: str) -> str:
    plane = view.child(run.summary, "plane")
    ridge, wall = view.num(plane, "ridge_batch"), view.num(plane, "largest_batch")
    parts = []
    if math.isfinite(ridge):
        parts.append(f"the ridge is at batch {units.number(ridge, 3)}: memory bandwidth limits below it, compute above")
    if math.isfinite(wall):
        parts.append(f"the largest batch that fits is {units.count(wall)}")
    found = view.best(run, "output_tokens_per_s", highest=True)
    if found:
        roof = view.roof_at(plane, view.batch_of(found[1]))
        if roof > 0:
            part = view.num(found[1], "output_tokens_per_s") / roof
            word = view.verdict_of(found[1])
            stamp = "" if word == "valid" else f" ({view.VERDICTS[word]} {word})"
            parts.append(f"{view.key_label(found[0], full=True)} reaches {units.percent(part, 2)} of its roof{stamp}")
    sentence = "; ".join(parts)
    return f"{name + ': ' if name else ''}{sentence if name else sentence[:1].upper() + sentence[1:]}." if parts else ""


def _advice(run: RunView) -> str:
    """Which flag would bring the predictions that are missing; empty where none is."""
    if not view.points(run) or any(view.predicted(p, shown.key).known for p in view.points(run) for shown in HEADLINES):
        return ""
    lacking = []
    if not view.child(run.summary, "hardware"):
        lacking.append("the hardware is not known (pass --hardware NAME, or let `ridgeline machine` measure this one)")
    if not view.child(run.summary, "architecture"):
        lacking.append("the model's configuration is not known (pass --model-config PATH)")
    return "There is no prediction: " + ("; ".join(lacking) or "the validity findings below say why") + "."


def time(runs: Sequence[RunView]) -> list[dict[str, Any]]:
    return [_time(run, name) for run, name in zip(runs, view.labels(runs), strict=True)]


def _time(run: RunView, name: str) -> dict[str, Any]:
    parts = []
    for shown in HEADLINES:
        table, why = tables.terms_table(run, shown, name), tables.because(run, shown)
        if table or why:
            parts.append({"name": shown.name, "table": table, "because": why})
    return {"name": name, "parts": parts, "advice": _advice(run)}
