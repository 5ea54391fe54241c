"""How figures went from run to run: the history of this kind of run, as a chart and a table."""

from __future__ import annotations

import math
from collections.abc import Sequence

from harness import units
from harness.report import charts, view
from harness.report.section import Block, Charts
from harness.report.tables import Cell, Table, column, heading
from harness.report.view import Json, RunView

ID = "chart-trend"
SHOWN = {"output_tokens_per_s": ("tokens/s", "solid"), "itl_p50": ("ITL p50", "dot"), "ttft_p50": ("TTFT p50", "dash")}
MOST_ROWS = 90
READ = (
    "Each line is one metric at one point, as a change from its first run; the whisker is the 95 % interval over the "
    "trials of that run. Tokens/s are solid (higher is better), ITL is dotted and TTFT dashed (lower is better)."
)


def _lines(runs: Sequence[RunView]) -> dict[tuple[str, str], list[Json]]:
    """(point, metric) -> its rows in the order of the file; of the first run that has a history."""
    rows = next((found for run in runs if (found := view.items(run.summary, "history"))), [])
    lines: dict[tuple[str, str], list[Json]] = {}
    for row in rows:
        if view.text(row, "metric") in SHOWN and view.num(row, "mean") > 0:
            lines.setdefault((view.text(row, "point"), view.text(row, "metric")), []).append(row)
    return lines


def draw(runs: Sequence[RunView]) -> charts.Figure | None:
    """Change from the first run over time, a line for each point and metric."""
    lines = _lines(runs)
    places = {point: place for place, point in enumerate(dict.fromkeys(point for point, _ in lines))}
    data = [_trace(point, metric, rows, charts.run_colour(places[point])) for (point, metric), rows in lines.items()]
    if not data:
        return None
    legend = {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.17, "yanchor": "top", "font": {"size": 11.5}}
    return charts.figure_of(data, {"xaxis": charts.axis("Run", type="category"), "legend": legend, "showlegend": True,
                                 "yaxis": charts.axis("change from the first run, %"),
                                 "margin": {"l": 56, "r": 10, "t": 8, "b": 46}})  # fmt: skip


def _trace(point: str, metric: str, rows: Sequence[Json], ink: str) -> Json:
    first = view.num(rows[0], "mean")
    change = [100 * (view.num(row, "mean") / first - 1) for row in rows]
    ends = [[100 * (view.num(row, key) / first - 1) for row in rows] for key in ("low", "high")]
    name, dash = SHOWN[metric]
    hover = [charts.tooltip([f"{name}, {point}", _figure(metric, view.num(row, "mean")), view.text(row, "engine_version")])
             for row in rows]  # fmt: skip
    return {
        "type": "scatter", "mode": "lines+markers", "name": charts.inert(f"{name}, {point}"),
        "x": [charts.inert(_day(row)) for row in rows], "y": change, "hoverinfo": "text", "hovertext": hover,
        "line": {"color": ink, "dash": dash, "width": 1.6}, "marker": {"color": ink, "size": 7},
        "error_y": {"type": "data", "symmetric": False, "color": ink, "thickness": 1, "width": 3,
                    "array": [high - y for high, y in zip(ends[1], change, strict=True)],
                    "arrayminus": [y - low for low, y in zip(ends[0], change, strict=True)],
                    "visible": any(math.isfinite(high) for high in ends[1])},
    }  # fmt: skip


def _day(row: Json) -> str:
    return view.text(row, "started_at").replace("T", " ")[:16]


def _figure(metric: str, value: float) -> str:
    return units.rate(value, "tokens") if metric.endswith("per_s") else units.seconds(value)


def section(runs: Sequence[RunView]) -> Charts | None:
    """None without a history."""
    lines = _lines(runs)
    if not lines:
        return None
    runs_there = len({view.text(row, "started_at") for rows in lines.values() for row in rows})
    finding = f"{runs_there} run{'' if runs_there == 1 else 's'} of this kind; the table has the newest first."
    return Charts([Block(ID, "History", finding, READ, _table(lines), draw(runs))], tall=True)


def _table(lines: dict[tuple[str, str], list[Json]]) -> Table:
    body = []
    for (point, metric), rows in lines.items():
        first = view.num(rows[0], "mean")
        for row in rows:
            mean = view.num(row, "mean")
            span = units.interval(view.num(row, "low"), view.num(row, "high"), lambda v, m=metric: _figure(m, v))  # type: ignore[misc]
            body.append((view.text(row, "started_at"), [
                heading(_day(row)), Cell(view.text(row, "engine_version") or "unknown"), Cell(point), Cell(SHOWN[metric][0]),
                Cell(_figure(metric, mean), span), Cell(units.percent(mean / first - 1, 3))]))  # fmt: skip
    body.sort(key=lambda pair: pair[0], reverse=True)
    head = [
        column(text) for text in ("Run", "Engine", "Point", "Metric", "Mean over the trials", "Change from the first")
    ]
    notes = [f"{len(body) - MOST_ROWS} older lines are in the history's file."] if len(body) > MOST_ROWS else []
    return Table("t-trend", "Runs of this kind over time", [head], [row for _, row in body[:MOST_ROWS]], notes)
