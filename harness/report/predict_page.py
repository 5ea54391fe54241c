"""Predictions -> one self-contained HTML page, of the report's own pieces.  Pure: the same predictions give the same bytes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from harness import units
from harness.records import Prediction
from harness.report import charts, view
from harness.report.charts import Figure
from harness.report.page import document
from harness.report.plan_charts import INKS, MARKS
from harness.report.section import Block, Charts, Parts, Section
from harness.report.tables import Cell, Row, Table, column, figure, heading
from harness.report.view import HEADLINES, Json, Shown
from harness.theory.hardware import Hardware
from harness.theory.predict import PointPrediction, point
from harness.theory.sweep import Sweep

MOST_POINTS, MOST_LINES, MOST_SENTENCES = 600, 10, 24  # in the tables, in a chart, and taken apart
GLOSSARY = (
    ("Prediction", "Named terms of one pass through the model that add up to the value; of two that overlap only the longer counts."),
    ("90 % interval", "Where nine of ten public measurements lay around such a prediction, kind by kind."),
    ("Bound", "What no measurement can beat: all reads at full bandwidth, all operations at full rate, in full overlap."),
    ("Seed's arithmetic", "The formulas of the articles that this project grew from, without any correction."),
    ("TTFT, ITL, E2E", "Time to the first token; between two tokens; to the last token. Means over the requests of a point."),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Other:
    """What another predictor says of the same points, float[n], NaN where it says nothing, for a `reason`."""

    name: str
    ttft_s: npt.NDArray[np.float64]
    itl_s: npt.NDArray[np.float64]
    output_tokens_per_s: npt.NDArray[np.float64]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Part:
    """The predictions of one hardware, precision, tp and rate; `sweep` None where `reason` says why there are none."""

    hardware: Hardware
    dtype: str
    tp: int
    rate: float | None
    sweep: Sweep | None
    reason: str = ""
    other: Other | None = None


@dataclass(frozen=True, slots=True)
class _Line:
    """The points of one part with the same lengths, by batch."""

    name: str
    points: list[PointPrediction]


def render(parts: Sequence[Part], model: str, mode: str, command: str) -> str:
    """The page of what `ridgeline predict` was asked; `command` is how to make it again."""
    parts = _cut(parts)
    lines = list(_lines(parts))
    best = _best(lines)
    built: list[tuple[Section, Any]] = [
        (Section(key, name, form, lambda _: None), content) for key, name, form, content in (
            ("verdict", "At a glance", "parts", Parts(best, [_glance(lines)], _missing(parts))),
            ("figures", "Figures", "charts", _charts(lines, parts)),
            *([("beside", "Beside another predictor", "parts", _beside(parts))] if any(p.other for p in parts) else []),
            ("time", "Where the time goes", "parts", _apart(lines)),
            ("doubts", "Hardware and doubts", "parts", Parts(tables=[_rows(parts)], points=_notes(parts))),
            ("repeat", "How to reproduce", "parts", Parts(command=command)),
            ("glossary", "Glossary", "glossary", GLOSSARY),
        )]  # fmt: skip
    framework = next((part.sweep.setup.framework.name for part in parts if part.sweep), "")
    return document(built, title=f"What theory says of {view.shorten(model, 80)}", description=best,
                    meta=[f"{mode} load", *([f"framework {framework}"] if framework else []), "predicted, no server asked"],
                    forms="plan_forms.html.j2", styles=("style.css", "plan.css"), source="from its theory and the tables it carries")  # fmt: skip


def _cut(parts: Sequence[Part]) -> list[Part]:
    """The parts whose points fit a page; what is left out is said where the others are."""
    kept, room = [], MOST_POINTS
    for part in parts:
        size = len(part.sweep) if part.sweep else 1
        if size > room:
            left = f"left out: more than {MOST_POINTS} points; --json has them all"
            kept.append(Part(part.hardware, part.dtype, part.tp, part.rate, None, left))
            continue
        kept.append(part)
        room -= size
    return kept


def _name(part: Part) -> str:
    rate = f", {units.rate(part.rate, 'requests', 3)}" if part.rate is not None else ""
    dtype = part.dtype if part.sweep is None else part.sweep.setup.dtype or part.sweep.setup.model.dtype
    spread = f", cp {part.sweep.setup.cp}" if part.sweep and part.sweep.setup.cp > 1 else ""
    return f"{part.tp} × {part.hardware.name}, {dtype}{spread}{rate}"


def _lines(parts: Sequence[Part]) -> Iterator[_Line]:
    """One for each part and pair of lengths; the rates of an open load are one line."""
    for part in parts:
        if part.sweep is None:
            continue
        found = [point(part.sweep, at) for at in range(len(part.sweep))]
        shapes = list(dict.fromkeys((p.input_tokens, p.output_tokens) for p in found))
        for shape in shapes:
            same = sorted((p for p in found if (p.input_tokens, p.output_tokens) == shape), key=lambda p: p.batch)
            told = f", {shape[0]:,} in {shape[1]:,} out" if len(shapes) > 1 else ""
            yield _Line(_name(part) + told, same)


def _metric(found: PointPrediction, shown: Shown) -> Prediction:
    metric: Prediction = getattr(found, shown.key)
    return metric


def _best(lines: Sequence[_Line]) -> str:
    rates = [
        (line.name, p) for line in lines for p in line.points if p.fits and math.isfinite(p.output_tokens_per_s.value)
    ]
    if not rates:
        return "Nothing that was asked for fits, or can be predicted."
    quick = min(rates, key=lambda pair: pair[1].e2e_s.value)
    much = max(rates, key=lambda pair: pair[1].output_tokens_per_s.value)
    return (
        f"Most output tokens: {units.rate(much[1].output_tokens_per_s.value, 'tokens', 3)} with {much[0]} at batch {much[1].batch}, "
        f"limited by {view.limit_word(much[1].limit)}. Quickest to the last token: {units.seconds(quick[1].e2e_s.value, 3)} with "
        f"{quick[0]} at batch {quick[1].batch}."
    )


def _missing(parts: Sequence[Part]) -> list[str]:
    return [f"{_name(part)}: {part.reason}" for part in parts if part.sweep is None]


def _value(found: Prediction, shown: Shown) -> Cell:
    span = units.interval(found.low, found.high, units.number if shown.higher_is_better else lambda v: shown.show(v))
    if found.value == math.inf:
        return Cell("unbounded", style="invalid")
    return figure(units.number(found.value, 4) if shown.higher_is_better else shown.show(found.value), span)


def _glance(lines: Sequence[_Line]) -> Table:
    head = [column("With"), column("Batch"), *(column(s.short, small="90 % interval") for s in HEADLINES),
            column("Limited by"), column("Fits", small="largest batch")]  # fmt: skip
    body: list[Row] = []
    for line in lines:
        for p in line.points:
            if not p.fits:
                body.append(
                    [heading(line.name), Cell(str(p.batch)), Cell(p.e2e_s.because, style="wrap left invalid", span=6)]
                )
                continue
            body.append([heading(line.name), Cell(str(p.batch)), *(_value(_metric(p, s), s) for s in HEADLINES),
                         Cell(view.limit_word(p.limit)), Cell(units.count(p.largest_batch))])  # fmt: skip
    return Table("table-glance", "Every point that was asked for", [head], body)


def _charts(lines: Sequence[_Line], parts: Sequence[Part]) -> Charts:
    read = ("Dashed lines: predicted means, with the 90 % interval as a whisker; hollow diamonds: the articles' arithmetic, "
            "uncorrected. Both axes are logarithmic.")  # fmt: skip
    by_rate = any(part.rate is not None for part in parts)
    blocks = [] if by_rate else [
        Block(f"chart-{shown.key}", shown.name, _finding(lines, shown), read, _bounds(lines, shown), _figure(lines, shown))
        for shown in HEADLINES
    ]  # fmt: skip
    cut = f"Only the first {MOST_LINES} of {len(lines)} lines are drawn; the tables have all."
    more = [cut] if len(lines) > MOST_LINES else []
    return Charts(blocks, tall=True, notices=more, otherwise="Points at a rate are in the table above.")


def _finding(lines: Sequence[_Line], shown: Shown) -> str:
    every = ((line.name, p, _metric(p, shown).value) for line in lines for p in line.points)
    known = [row for row in every if math.isfinite(row[2])]
    if not known:
        return "No value."
    name, at, value = (max if shown.higher_is_better else min)(known, key=lambda row: row[2])
    return f"{'Most' if shown.higher_is_better else 'Least'}: {shown.show(value)} with {name} at batch {at.batch}."


def _figure(lines: Sequence[_Line], shown: Shown) -> Figure | None:
    drawn = [(k, line) for k, line in enumerate(lines[:MOST_LINES])]
    values = [_metric(p, shown).value for _, line in drawn for p in line.points]
    largest = max((v for v in values if math.isfinite(v)), default=math.nan)
    factor, unit = (1.0, "tokens/s") if shown.higher_is_better else units.time_scale(largest)
    data: list[Json] = []
    for k, line in drawn:
        ink, mark = charts.colour(INKS[k % len(INKS)]), MARKS[(k + k // len(INKS)) % len(MARKS)]
        kept = [p for p in line.points if math.isfinite(_metric(p, shown).value)]
        spans = [view.Estimate(m.value, m.low, m.high) for m in (_metric(p, shown) for p in kept)]
        hover = [charts.tooltip([line.name, f"batch {p.batch}", f"predicted {shown.show(m.value)}",
                                 units.interval(m.low, m.high, shown.show), f"bound {shown.show(m.bound)}",
                                 f"seed's arithmetic {shown.show(p.seed.get(shown.key))}", view.limit_word(m.limit)])
                 for p in kept for m in [_metric(p, shown)]]  # fmt: skip
        x = [p.batch for p in kept]
        data.append({"type": "scatter", "mode": "lines+markers", "name": charts.inert(line.name), "x": x,
                     "y": [factor * s.value for s in spans], "hoverinfo": "text", "hovertext": hover,
                     "line": {"color": ink, "width": 1.8, "dash": "dash"}, "error_y": charts.whiskers(spans, factor, ink),
                     "marker": {"symbol": mark, "size": 8, "color": charts.colour("paper"), "line": {"width": 1.8, "color": ink}}})  # fmt: skip
        seeds = [factor * p.seed.get(shown.key, math.nan) for p in kept]
        data.append({"type": "scatter", "mode": "markers", "showlegend": False, "x": x, "y": seeds, "hoverinfo": "text",
                     "hovertext": hover, "marker": {"symbol": "diamond-open", "size": 7, "color": ink}})  # fmt: skip
    data = [trace for trace in data if trace["x"]]
    if not data:
        return None
    across = charts.axis("Batch size", type="log", dtick="D2", showgrid=False)
    up = charts.axis(unit if shown.higher_is_better else f"{shown.short}, {unit}", type="log", dtick="D2")
    legend = {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.15, "yanchor": "top", "font": {"size": 11.5}}
    return charts.figure_of(data, {"xaxis": across, "yaxis": up, "legend": legend, "showlegend": True,
                                   "margin": {"l": 56, "r": 14, "t": 10, "b": 46}})  # fmt: skip


def _bounds(lines: Sequence[_Line], shown: Shown) -> Table:
    head = [column("With"), column("Batch"), column("Predicted", small="90 % interval"), column("Strict bound"),
            column("Seed's arithmetic"), column("Limited by")]  # fmt: skip
    body = [[heading(line.name), Cell(str(p.batch)), _value(m, shown), figure(shown.show(m.bound)),
             figure(shown.show(p.seed.get(shown.key))), Cell(view.limit_word(m.limit))]
            for line in lines for p in line.points if p.fits for m in [_metric(p, shown)]]  # fmt: skip
    return Table(f"table-{shown.key}", f"{shown.name}: predicted, bound, and the articles' arithmetic", [head], body)


def _apart(lines: Sequence[_Line]) -> Parts:
    """The sentences of some points: the smallest and the largest batch of each line."""
    ends = [
        (line.name, p)
        for line in lines
        for p in (line.points[:1] + line.points[-1:] if len(line.points) > 1 else line.points)
    ]
    shown = [f"{name}, batch {p.batch}: {getattr(p, metric).because}" for name, p in ends[:MOST_SENTENCES]
             for metric in (("ttft_s", "itl_s", "mem_bytes") if p.fits else ("e2e_s",))]  # fmt: skip
    lead = "Each prediction is the sum of named terms; here of the smallest and the largest batch, with the numbers put in."
    return Parts(lead, points=shown)


def _beside(parts: Sequence[Part]) -> Parts:
    """Our values and those of the other predictor, point by point."""
    body: list[Row] = []
    for part, s, other in ((p, p.sweep, p.other) for p in parts if p.sweep and p.other):
        for at in np.flatnonzero(np.isfinite(other.output_tokens_per_s)):
            pairs = [
                (s.columns[h.key].value[at], getattr(other, h.key)[at], h) for h in HEADLINES if hasattr(other, h.key)
            ]
            body.append([heading(_name(part)), Cell(f"{s.batch[at]:.0f}"),
                         Cell(f"{s.input_tokens[at]:.0f} in {s.output_tokens[at]:.0f} out"),
                         *(figure(h.show(theirs), f"ours {h.show(ours)}") for ours, theirs, h in pairs)])  # fmt: skip
    names = ", ".join(dict.fromkeys(p.other.name for p in parts if p.other))
    head = [column("With"), column("Batch"), column("Tokens"),
            *(column(h.short, small="ours below") for h in HEADLINES if h.key in Other.__dataclass_fields__)]  # fmt: skip
    reasons = dict.fromkeys(f"{_name(p)}: {p.other.reason}" for p in parts if p.other and p.other.reason)
    lead = (f"Figures of {names} for the same points; it interpolates tables of measured kernels and has no intervals; of a wave "
            "all first tokens come together there.")  # fmt: skip
    return Parts(lead, [Table("table-beside", names, [head], body)] if body else [], list(reasons))


def _rows(parts: Sequence[Part]) -> Table:
    body = []
    for row in {part.hardware.name: part.hardware for part in parts}.values():
        peak = ", ".join(f"{dtype} {units.flops(v)}" for dtype, v in row.flops.items())
        body.append([heading(row.name), Cell(units.size(row.mem_bytes)), Cell(units.bandwidth(row.bytes_per_s)),
                     Cell(peak, style="wrap left"), Cell(row.source or "–", "; ".join(row.caveats), "wrap left")])  # fmt: skip
    head = [column("Hardware"), column("Memory"), column("Bandwidth"), column("Dense peaks", style="left"),
            column("Source and doubts", style="left")]  # fmt: skip
    return Table("table-rows", "The hardware as its rows state it", [head], body)


def _notes(parts: Sequence[Part]) -> list[str]:
    return list(dict.fromkeys(itertools.chain.from_iterable(part.sweep.setup.notes for part in parts if part.sweep)))
