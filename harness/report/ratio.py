"""Measured over predicted, beside the interval that the prediction states of itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

from harness import units
from harness.report import charts, view
from harness.report.section import Block
from harness.report.tables import Cell, Table, column, figure, heading, stamp
from harness.report.view import HEADLINES, Json, Key, RunView, Shown

INKS = ("measured", "second", "third", "fourth")
READ = (
    "Each dot is a measurement over its prediction, with the 95 % interval over the trials; at 1 they agree, and equal "
    "distances up and down are equal factors. The grey bar behind it is the tolerance that the prediction states: 90 % of "
    "measurements of this kind are to lie inside. For a time above 1 is slower than predicted, for the output faster."
)
MARKS = (0.1, 0.125, 0.2, 0.25, 1 / 3, 0.5, 2 / 3, 0.8, 1, 1.25, 1.5, 2, 3, 4, 5, 8, 10)
MOST = 24
Row = tuple[str, Key, Json]


def block(runs: Sequence[RunView]) -> Block | None:
    """None where nothing is predicted."""
    named = [(view.joined(name, view.marked(key, point)), key, point) for _, name, key, point in view.rows(runs)]
    rows = [row for row in named if any(math.isfinite(view.quotient(row[2], shown.key)) for shown in HEADLINES)]
    if not rows:
        return None
    return Block(
        "chart-ratio", "Measured over predicted", _finding(rows), READ, _table(rows), _figure(rows[:MOST]), wide=True
    )


def band(point: Json, shown: Shown) -> tuple[float, float]:
    """The prediction's own interval as factors of its value; NaNs where it has none."""
    theory = view.predicted(point, shown.key)
    return theory.low / theory.value, theory.high / theory.value


def inside(point: Json, shown: Shown) -> bool | None:
    """Whether the mean lies in the stated interval; None where one of the two is missing."""
    was, theory = view.measured(point, shown.key).value, view.predicted(point, shown.key)
    if not all(map(math.isfinite, (was, theory.low, theory.high))):
        return None
    return theory.low <= was <= theory.high


def _finding(rows: Sequence[Row]) -> str:
    judged = [
        (row, shown, found) for row in rows for shown in HEADLINES if (found := inside(row[2], shown)) is not None
    ]
    far = max(((abs(math.log(q)), name, shown, q) for name, _, point in rows for shown in HEADLINES if (q := view.quotient(point, shown.key)) > 0),
              key=lambda row: row[0])  # fmt: skip
    held = f"{sum(found for *_, found in judged)} of {len(judged)} lie within the tolerance"
    text = held if judged else "No prediction states a tolerance"
    return f"{text}; furthest off is {far[2].short} at {far[1]}, {units.ratio(far[3])} its prediction."


def _figure(rows: Sequence[Row]) -> charts.Figure:
    data: list[Json] = []
    seen = [1.0]
    for place, (shown, ink) in enumerate(zip(HEADLINES, INKS, strict=True)):
        xs, ys, hover, above, below = [], [], [], [], []
        for column_, (name, _, point) in enumerate(rows):
            ratio = view.quotient(point, shown.key)
            was, theory = view.measured(point, shown.key), view.predicted(point, shown.key)
            x = column_ - 0.3 + 0.2 * place
            low, high = band(point, shown)
            if math.isfinite(low) and math.isfinite(high) and low > 0:
                data.append({"type": "scatter", "mode": "lines", "x": [x, x], "y": [low, high], "line": {"color": charts.colour("line"), "width": 9},
                             "showlegend": False, "hoverinfo": "skip"})  # fmt: skip
                seen += [low, high]
            if ratio > 0:
                xs.append(x)
                ys.append(ratio)
                above.append((was.high - was.value) / theory.value)
                below.append((was.value - was.low) / theory.value)
                seen += [v for end in (was.low, was.high) if (v := end / theory.value) > 0 and math.isfinite(v)]
                hover.append(charts.tooltip([f"{shown.short}, {name}", f"measured {shown.show(was.value)}, predicted {shown.show(theory.value)}: {units.ratio(ratio)}",
                                             f"tolerance {units.interval(low, high, units.ratio)}"]))  # fmt: skip
        seen += ys
        if ys:
            data.append({"type": "scatter", "mode": "markers", "name": shown.short, "x": xs, "y": ys, "hoverinfo": "text", "hovertext": hover, "cliponaxis": False,
                         "marker": {"size": 8, "color": charts.colour(ink), "symbol": "diamond" if shown.higher_is_better else "circle"},
                         "error_y": {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "color": charts.colour(ink), "thickness": 1.3, "width": 3}})  # fmt: skip
    low, high = min(seen) / 1.15, max(seen) * 1.15
    marks = [mark for mark in MARKS if low <= mark <= high]
    one = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 1, "y1": 1, "layer": "below",
           "line": {"width": 1.4, "color": charts.colour("ink")}}  # fmt: skip
    across = charts.axis("", tickvals=list(range(len(rows))), ticktext=[charts.stacked(name) for name, *_ in rows], tickangle=0, range=[-0.6, len(rows) - 0.4],
                         showgrid=False, zeroline=False)  # fmt: skip
    up = charts.axis("measured / predicted", type="log", range=[math.log10(low), math.log10(high)], tickvals=marks,
                     ticktext=[f"{mark:.3g}×" for mark in marks])  # fmt: skip
    return charts.figure_of(data, {"xaxis": across, "yaxis": up, "shapes": [one], "showlegend": True})


def _table(rows: Sequence[Row]) -> Table:
    head = [column("Point"), *(column(shown.short, small="tolerance") for shown in HEADLINES), column("Within it"),
            column("Validity")]  # fmt: skip
    body = []
    for name, _, point in rows:
        cells = [figure(units.ratio(view.quotient(point, shown.key)), units.interval(*band(point, shown), units.ratio), "–")
                 for shown in HEADLINES]  # fmt: skip
        known = [one for shown in HEADLINES if (one := inside(point, shown)) is not None]
        held = Cell(f"{sum(known)} of {len(known)}" if known else "–")
        body.append([heading(name), *cells, held, stamp(view.verdict_of(point))])
    return Table("table-ratio", "Measured over predicted, and the tolerance that the prediction states", [head], body)
