"""The search for the capacity: what each point did to the objectives, where the edge is, and how it was found."""

from __future__ import annotations

import math
from collections.abc import Sequence

from harness import units
from harness.report import charts, view
from harness.report.section import Block, Charts
from harness.report.tables import Cell, Row, Table, column, figure, heading, stamp
from harness.report.view import Json, RunView

READ = (
    "Each line is one objective over the load, as a share of its bound: below the dashed line it is met. The whiskers are "
    "95 % intervals within the point, the shaded stripe is the interval of the edge. Points that are not to be trusted, "
    "or at which arrivals outran completions, are in the table alone."
)
WORDS = {True: "met", False: "missed", None: "not trusted"}


def section(runs: Sequence[RunView]) -> Charts | None:
    """A block for each run that was a search; None without one."""
    found = [(name, view.child(run.summary, "capacity")) for name, run in zip(view.labels(runs), runs, strict=True)]
    blocks = [_block(at, name, search) for at, (name, search) in enumerate(found) if search]
    return Charts(blocks, tall=True) if blocks else None


def _block(at: int, name: str, search: Json) -> Block:
    title = f"Load and objectives{f', {name}' if name else ''}"
    return Block(f"chart-search-{at}", title, view.text(search, "sentence"), READ, _table(at, search), _draw(search),
                 "Nothing to draw: no point is to be trusted.")  # fmt: skip


def _load(point: Json, search: Json) -> str:
    load = view.num(point, "load")
    return units.rate(load, "requests") if view.text(search, "mode") == "open" else units.count(load)


def _drawn(search: Json) -> list[Json]:
    """The points of a steady state, by their load."""
    kept = [p for p in view.items(search, "points") if p.get("holds") is not None and not p.get("saturated")]
    return sorted(kept, key=lambda p: view.num(p, "load"))


def _draw(search: Json) -> charts.Figure | None:
    points = _drawn(search)
    metrics = list(dict.fromkeys(view.text(r, "metric") for p in points for r in view.items(p, "readings")))
    if not points or not metrics:
        return None
    data = [_line(metric, place, points, search) for place, metric in enumerate(metrics)]
    open_loop = view.text(search, "mode") == "open"
    return charts.figure_of(data, {
        "xaxis": charts.axis("requests per second" if open_loop else "requests in flight", type="log"),
        "yaxis": charts.axis("share of the bound", type="log"), "showlegend": True, "shapes": _marks(search),
        "margin": {"l": 56, "r": 10, "t": 8, "b": 46},
    })  # fmt: skip


def _line(metric: str, place: int, points: Sequence[Json], search: Json) -> Json:
    rows = [(p, next((r for r in view.items(p, "readings") if view.text(r, "metric") == metric), {})) for p in points]
    shares = [
        view.Estimate(*(view.num(r, key) / view.num(r, "bound") for key in ("value", "low", "high"))) for _, r in rows
    ]
    ink = charts.run_colour(place)
    hover = [charts.tooltip([f"{metric} at {_load(p, search)}", units.seconds(view.num(r, "value"), 3),
             f"bound {units.seconds(view.num(r, 'bound'), 3)}", view.verdict_of(p)]) for p, r in rows]  # fmt: skip
    return {
        "type": "scatter", "mode": "lines+markers", "name": charts.inert(metric), "x": [view.num(p, "load") for p, _ in rows],
        "y": [e.value for e in shares], "hoverinfo": "text", "hovertext": hover, "error_y": charts.whiskers(shares, 1.0, ink),
        "line": {"color": ink, "dash": ("solid", "dot", "dashdot")[place % 3], "width": 1.6},
        "marker": {"color": ink, "size": 8, "symbol": ("circle", "diamond", "square")[place % 3]},
    }  # fmt: skip


def _marks(search: Json) -> list[Json]:
    """The bound, and the interval of the edge."""
    line = {"color": charts.colour("invalid"), "width": 1.4, "dash": "dash"}
    marks: list[Json] = [{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 1, "y1": 1, "line": line}]
    low, high = view.num(search, "low"), view.num(search, "high")
    if 0 < low <= high < math.inf:
        marks.append({"type": "rect", "yref": "paper", "x0": low, "x1": high, "y0": 0, "y1": 1, "layer": "below",
                      "fillcolor": charts.colour("grid"), "line": {"width": 0}})  # fmt: skip
    return marks


def _table(at: int, search: Json) -> Table:
    points = view.items(search, "points")
    metrics = list(dict.fromkeys(view.text(r, "metric") for p in points for r in view.items(p, "readings")))
    head = [column(text) for text in ("Point", "Load", "Objective", *metrics, "Failed", "Validity")]
    body: list[Row] = []
    for number, point in enumerate(points, start=1):
        readings = {view.text(r, "metric"): r for r in view.items(point, "readings")}
        over = "arrivals outrun completions" if point.get("saturated") else ""
        holds = point.get("holds")
        body.append([
            heading(str(number)), Cell(_load(point, search)), Cell(WORDS[holds if isinstance(holds, bool) else None], over),
            *(_reading(readings.get(metric, {})) for metric in metrics),
            figure(units.percent(view.num(point, "failed_share"), 2)), stamp(view.verdict_of(point)),
        ])  # fmt: skip
    ends = f"The edge: {_load(search, search)}, 95 % interval {units.interval(view.num(search, 'low'), view.num(search, 'high'))}."
    return Table(
        f"table-search-{at}", "The points of the search, in the order they were measured", [head], body, [ends]
    )


def _reading(reading: Json) -> Cell:
    span = units.interval(view.num(reading, "low"), view.num(reading, "high"), lambda v: units.seconds(v, 3))
    return figure(units.seconds(view.num(reading, "value"), 3), span)
