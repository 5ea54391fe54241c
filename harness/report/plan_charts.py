"""A plan -> plotly figures: predicted lines are dashed with an open mark at the planned batch, measured ones solid and filled."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from harness import planning_text, units
from harness.planning import Objective, Plan, Point, Way
from harness.report import charts
from harness.report.charts import Figure
from harness.report.view import Json

INKS = ("measured", "third", "second", "fourth", "predicted")
MARKS = ("circle", "square", "diamond", "triangle-up", "star")
MOST = 60  # marks of a line, evenly spread over the logarithm of the batch


def name_of(way: Way) -> str:
    return f"{way.tp} × {way.hardware.name}, {way.dtype}"


def lines(found: Plan) -> list[Way]:
    """The ways that are drawn as lines: the best of each hardware."""
    return [way for way in found.best if way.curve is not None]


def runs(found: Plan) -> list[Way]:
    return [way for way in found.ways if way.run is not None]


def _ink(found: Plan, way: Way) -> tuple[str, str]:
    """(colour, mark) of a hardware, the same in every chart and for its measurements."""
    names = list(dict.fromkeys([*(w.hardware.name for w in found.best), *(w.hardware.name for w in runs(found))]))
    place = names.index(way.hardware.name)
    return charts.colour(INKS[place % len(INKS)]), MARKS[place % len(MARKS)]


def places(way: Way) -> list[int]:
    """Some places of a way's curve, the planned batch among them."""
    assert way.curve is not None
    n = len(way.curve.batch)
    spread = np.unique(np.geomspace(1, n, MOST).round().astype(int))
    return sorted({int(b) - 1 for b in spread} | {way.batch - 1})


def _told(way: Way, place: int) -> list[str]:
    assert way.curve is not None
    times = [f"{planning_text.label(n)} {units.seconds(s.value, 3)} ({units.interval(s.low, s.high, lambda v: units.seconds(v, 3))})"
             for n in way.curve.times for s in [way.curve.time(n, place)]]  # fmt: skip
    return [f"batch {place + 1}", units.rate(way.curve.at(place).value, "tokens", 3), *times]


def _line(found: Plan, way: Way, x: Callable[[Way, int], float], y: Callable[[Way, int], float]) -> list[Json]:
    ink, mark = _ink(found, way)
    at, planned = places(way), way.batch - 1
    return [
        {"type": "scatter", "mode": "lines", "name": charts.inert(f"{way.tp} × {way.hardware.name}"), "x": [x(way, k) for k in at],
         "y": [y(way, k) for k in at], "hoverinfo": "text", "line": {"color": ink, "width": 1.8, "dash": "dash"},
         "hovertext": [charts.tooltip([name_of(way), "predicted", *_told(way, k)]) for k in at]},
        {"type": "scatter", "mode": "markers", "showlegend": False, "x": [x(way, planned)], "cliponaxis": False,
         "y": [y(way, planned)], "hoverinfo": "text",
         "hovertext": [charts.tooltip([name_of(way), "planned", *_told(way, planned)])],
         "marker": {"symbol": mark, "size": 11, "color": charts.colour("paper"), "line": {"width": 2, "color": ink}}},
    ]  # fmt: skip


def _times_text(point: Point) -> list[str]:
    return [f"batch {units.number(point.batch, 3)}", units.rate(point.tokens_per_s.value, "tokens", 3),
            *(f"{planning_text.label(n)} {units.seconds(s.value, 3)}" for n, s in point.times.items())]  # fmt: skip


def _points(found: Plan, way: Way, x: Callable[[Point], float], y: Callable[[Point, Way], float]) -> Json:
    assert way.run is not None
    ink, mark = _ink(found, way)
    kept = [p for p in way.run.points if p.verdict != "invalid" and x(p) > 0 and y(p, way) > 0]
    return {
        "type": "scatter", "mode": "lines+markers", "name": charts.inert(f"{way.run.name} (measured)"), "cliponaxis": False,
        "x": [x(p) for p in kept], "y": [y(p, way) for p in kept], "hoverinfo": "text", "line": {"color": ink, "width": 2},
        "hovertext": [charts.tooltip([way.run.name, f"measured, {p.verdict}", *_times_text(p)]) for p in kept],
        "marker": {"symbol": mark, "size": 10, "color": ink, "line": {"width": 1, "color": charts.colour("paper")}},
    }  # fmt: skip


def _batch(way: Way, place: int) -> float:
    return float(place + 1)


def _each(way: Way, place: int) -> float:
    """Output tokens per second of an accelerator."""
    assert way.curve is not None
    return way.curve.at(place).value / way.tp


def _measured_each(point: Point, way: Way) -> float:
    return point.tokens_per_s.value / way.tp


def _both(found: Plan, x: Callable[[Way, int], float], y: Callable[[Way, int], float], px: Callable[[Point], float],
          py: Callable[[Point, Way], float]) -> list[Json]:  # fmt: skip
    data = [trace for way in lines(found) for trace in _line(found, way, x, y)]
    data += [_points(found, way, px, py) for way in runs(found)]
    return [trace for trace in data if trace["x"]]


def _drawn(data: Sequence[Json], across: Json, up: Json) -> Figure:
    legend = {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.15, "yanchor": "top", "font": {"size": 11.5},
              "itemclick": False, "itemdoubleclick": False}  # fmt: skip
    margin = {"l": 56, "r": 14, "t": 10, "b": 46}
    return charts.figure_of(
        data, {"xaxis": across, "yaxis": up, "legend": legend, "margin": margin, "showlegend": True}
    )


def over_batch(found: Plan, objective: Objective) -> Figure | None:
    """A percentile over the batch in flight, with its bound."""
    factor, unit = units.time_scale(2 * objective.bound_s)

    def y(way: Way, place: int) -> float:
        assert way.curve is not None
        return factor * way.curve.time(objective.name, place).value

    data = _both(found, _batch, y, lambda p: p.batch, lambda p, _: factor * p.times[objective.name].value)
    if not data:
        return None
    top = math.log10(max(x for trace in data for x in trace["x"]) * 1.15)
    bound = {"type": "scatter", "mode": "lines", "name": charts.inert(f"objective {units.seconds(objective.bound_s)}"),
             "x": [0.9, 10**top], "y": [factor * objective.bound_s] * 2, "hoverinfo": "skip",
             "line": {"color": charts.colour("invalid"), "width": 1.6, "dash": "dot"}}  # fmt: skip
    largest = max((y for trace in data for y in trace["y"] if math.isfinite(y)), default=math.nan)
    if math.isnan(largest):  # one output token has no time between tokens
        return None
    most = factor * objective.bound_s * 1.08 * min(max(largest / factor / objective.bound_s, 1), 4)
    up = charts.axis(f"{planning_text.label(objective.name)}, {unit}", range=[0, most])
    across = charts.axis(
        "Batch in flight on a replica", type="log", dtick="D2", showgrid=False, range=[math.log10(0.9), top]
    )
    return _drawn([bound, *data], across, up)


def speed(found: Plan) -> Figure | None:
    """Output tokens per second of an accelerator over the batch in flight; both logarithmic."""
    data = _both(found, _batch, _each, lambda p: p.batch, _measured_each)
    across = charts.axis("Batch in flight on a replica", type="log", dtick="D2", showgrid=False)
    return _drawn(data, across, charts.axis("output tokens/s, each", type="log", dtick="D2")) if data else None


def pareto(found: Plan) -> Figure | None:
    """Tokens per second of an accelerator against those that one user sees."""

    def x(way: Way, place: int) -> float:
        assert way.curve is not None
        return float(1 / way.curve.found.columns["itl_s"].value[place])

    def user(point: Point) -> float:
        itl = [s.value for n, s in point.times.items() if n in ("itl_mean", "tpot_mean", "tpot_p50", "itl_p50")]
        return 1 / itl[0] if itl and itl[0] > 0 else point.tokens_per_s.value / point.batch

    data = _both(found, x, _each, user, _measured_each)
    across = charts.axis("output tokens/s for one user (1 / ITL)", rangemode="tozero")
    return _drawn(data, across, charts.axis("output tokens/s, each", type="log", dtick="D2")) if data else None


def costs(found: Plan, ways: Sequence[Way]) -> Figure | None:
    """US dollars for a million output tokens: hatched predicted, solid measured, with the 90 % interval as a whisker."""
    ways = [way for way in ways if way.works and way.priced]
    if not ways:
        return None
    data: list[Json] = []
    for measured in (False, True):
        part = [way for way in ways if (way.run is not None) is measured]
        inks = [charts.colour("measured" if measured else "predicted") for _ in part]
        marker: Json = {"color": inks, "line": {"width": 0}}
        if not measured:
            marker = {"color": "rgba(0,0,0,0)", "line": {"width": 1.4, "color": charts.colour("predicted")},
                      "pattern": {"shape": "/", "size": 6, "solidity": 0.16, "fgcolor": charts.colour("predicted"),
                                  "bgcolor": "rgba(0,0,0,0)"}}  # fmt: skip
        spans = [way.usd_per_million for way in part]
        data.append({
            "type": "bar", "orientation": "h", "name": "Measured" if measured else "Predicted", "marker": marker,
            "y": [charts.inert(label_of(way)) for way in part], "x": [s.value for s in spans], "hoverinfo": "text",
            "hovertext": [charts.tooltip([label_of(w), f"{planning_text.usd(w.usd_per_million.value)} per million output tokens",
                                          planning_text.span_usd(w.usd_per_million), f"batch {w.batch}",
                                          f"at {planning_text.usd(w.hardware.usd_per_h)}/h: {planning_text.price(w.hardware)}"])
                          for w in part],
            "error_x": {"type": "data", "symmetric": False, "array": [s.high - s.value for s in spans],
                        "arrayminus": [s.value - s.low for s in spans], "color": charts.colour("ink"), "thickness": 1.3,
                        "width": 3, "visible": any(math.isfinite(s.high) for s in spans)},
        })  # fmt: skip
    data = [trace for trace in data if trace["x"]]
    order = [charts.inert(label_of(way)) for way in sorted(ways, key=lambda w: -w.usd_per_million.value)]
    across = charts.axis("US dollars per million output tokens", rangemode="tozero")
    up = charts.axis("", type="category", categoryorder="array", categoryarray=order)
    return charts.figure_of(data, {"xaxis": across, "yaxis": up, "barmode": "overlay", "showlegend": True})


def label_of(way: Way) -> str:
    return f"{way.run.name} (measured)" if way.run else name_of(way)
