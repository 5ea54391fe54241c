"""How the times of single requests spread, and how the trials of a point agree."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from harness import units
from harness.records import NAN
from harness.report import charts, view
from harness.report.section import Block, Charts
from harness.report.tables import Cell, Row, Table, column, figure, heading
from harness.report.view import HEADLINES, SAMPLES_NEEDED, Json, Key, RunView, Shown

READ = (
    "Each line is one load: up to the height of 95 %, say, lie the times that 95 of 100 samples did not exceed. The scale "
    "upwards gives each nine of 99.9 % the same room, so the tail can be seen. A line ends at its largest sample. Steep is "
    "even; a bend to the right is a tail."
)
READ_TRIALS = (
    "Each dot is one trial, as its distance from the mean of all trials of that load; the bar is the 95 % interval of that "
    "mean. The trial is the unit: requests of one trial share its luck. Dots that climb or fall from trial to trial are drift."
)
NINES = (0.5, 0.9, 0.95, 0.99, 0.999, 0.9999)
DASHES = ("solid", "dash", "dot")
MOST_LINES = 12
NOT_KEPT = "not measured (this run's records hold no single requests, or its summary was made by an older version)"


def _details(runs: Sequence[RunView]) -> list[tuple[int, str, Key, Json, Json]]:
    """(run, name, key, point, its detail) of all points of one run, of the best point of each of several."""
    rows = []
    for k, name, key, point in view.chosen(runs):
        number = view.num(point, "point")
        detail = view.child(runs[k].summary, "detail", "points", f"{number:.0f}" if math.isfinite(number) else "")
        rows.append((k, name, key, point, detail))
    return [row for row in rows if row[4]]


def section(runs: Sequence[RunView]) -> Charts:
    rows = _details(runs)
    blocks = [block for shown in HEADLINES[:3] if (block := _distribution(rows, shown))]
    return Charts(blocks, otherwise=f"Distributions: {NOT_KEPT}.")


def _nines(q: float, n: float) -> float:
    """Height on an axis that gives each nine the same room; the largest of n samples stands at 1 - 1/(2n)."""
    return -math.log10(max(1 - q, 0.5 / n))


def _distribution(rows: Sequence[tuple[int, str, Key, Json, Json]], shown: Shown) -> Block | None:
    found = [(name, view.child(detail, "spread", shown.key), point) for _, name, _, point, detail in rows]
    found = [row for row in found if view.num(row[1], "n") > 0]
    if not found:
        return None
    low = min(view.numbers(spread, "value")[1] for _, spread, _ in found)  # the least may be 0: two tokens at once
    high = max(view.numbers(spread, "value")[-1] for _, spread, _ in found)
    factor, unit = units.time_scale(high)
    data: list[Json] = []
    for place, (name, spread, _) in enumerate(found[:MOST_LINES]):
        n, qs, values = view.num(spread, "n"), view.numbers(spread, "q"), view.numbers(spread, "value")
        ink = charts.run_colour(place)
        data.append({
            "type": "scatter", "mode": "lines", "name": charts.inert(name), "x": [factor * v for v in values], "y": [_nines(q, n) for q in qs],
            "line": {"color": ink, "width": 1.8, "dash": DASHES[place // len(charts.RUN_COLOURS) % len(DASHES)]}, "customdata": ["largest" if q == 1 else units.percent(q) for q in qs],
            **charts.template(charts.untemplated(name), f"%{{customdata}}: %{{x:.4~g}} {unit}", f"{units.count(n)} samples"),
        })  # fmt: skip
    most = max(view.num(spread, "n") for _, spread, _ in found)
    ticks = [q for q in NINES if 1 - q >= 0.5 / most]
    drawn = charts.figure_of(data, {
        "xaxis": charts.logarithmic(f"{shown.short}, {unit}", factor * low, factor * high),
        "yaxis": charts.axis("", tickvals=[0, *(_nines(q, most) for q in ticks)], ticktext=["0", *(units.percent(q) for q in ticks)]),
        "showlegend": True, "legend": charts.below(), "margin": {"l": 56, "r": 10, "t": 10, "b": 46},
    })  # fmt: skip
    return Block(f"chart-spread-{shown.key}", shown.name, _finding(found, shown), READ, _percentiles(found, shown), drawn,
                 high=True)  # fmt: skip


def _finding(found: Sequence[tuple[str, Json, Json]], shown: Shown) -> str:
    """Where the tail is longest, by p99 over p50 or the best percentile that every point can show."""
    least = min(view.num(spread, "n") for _, spread, _ in found)
    which = next((name for name in ("p99", "p95", "p90") if least >= SAMPLES_NEEDED[name]), "")
    if not which:
        return f"{units.count(least)} samples at some load are too few to show a tail."
    tails = [
        (view.num(point, shown.key, which) / view.num(point, shown.key, "p50"), name)
        for name, _, point in found
        if view.num(point, shown.key, "p50") > 0
    ]
    if not tails:
        return "Not measured."
    worst = max(tails)
    return f"The longest tail is at {worst[1]}: {which} is {units.ratio(worst[0])} the median."


def _percentiles(found: Sequence[tuple[str, Json, Json]], shown: Shown) -> Table:
    head = [column(text) for text in ("Point", "p50", "p90", "p95", "p99", "Largest", "samples (n)")]
    body = []
    for name, spread, point in found:
        row: Row = [heading(name)]
        for which in ("p50", "p90", "p95", "p99"):
            low, high = [*view.numbers(spread, "rank", which), NAN, NAN][:2]
            thin = view.num(spread, "n") < SAMPLES_NEEDED.get(which, 1)
            value = shown.show(view.num(point, shown.key, which))
            span = units.interval(low, high, shown.show)
            row.append(Cell(f"{value} †" if thin else value, span, "thin" if thin else ""))
        largest = shown.show(view.numbers(spread, "value")[-1])
        body.append([*row, figure(largest), Cell(units.count(view.num(spread, "n")))])
    notes = ["Beneath each percentile: its 95 % interval by ranks, as if requests were independent; where requests of a trial share their luck it is wider.",
             "† n too small to show this percentile."]  # fmt: skip
    what = "gaps" if shown.key == "itl_s" else "requests"
    return Table(f"table-spread-{shown.key}", f"{shown.name}: percentiles of single {what}", [head], body, notes)


# --- trials -------------------------------------------------------------------------------------------------------


def stability(runs: Sequence[RunView]) -> Charts:
    """A dot for each trial and the interval of the mean."""
    rows = [row for row in _details(runs) if len(view.items(row[4], "trials")) > 1]
    blocks = [block for shown in (HEADLINES[0], HEADLINES[1], HEADLINES[3]) if (block := _agreement(rows, shown))]
    return Charts(
        blocks, otherwise="Stability is not measured (it needs at least two trials of a point; give --trials 3)."
    )


def _trials(detail: Json, key: str) -> list[float]:
    return [view.num(trial, key) for trial in view.items(detail, "trials")]


def _agreement(rows: Sequence[tuple[int, str, Key, Json, Json]], shown: Shown) -> Block | None:
    found = []
    for k, name, _, point, detail in rows:
        values = [v for v in _trials(detail, shown.key) if math.isfinite(v)]
        if len(values) > 1 and (middle := sum(values) / len(values)) > 0:
            found.append((k, name, point, values, middle))
    if not found:
        return None
    data: list[Json] = []
    for place, (k, name, point, values, middle) in enumerate(found):
        was = view.measured(point, shown.key)
        step = 0.5 / len(values)
        xs = [place - 0.25 + (i + 0.5) * step for i in range(len(values))]
        ink = charts.run_colour(k)
        if math.isfinite(was.low) and math.isfinite(was.high):
            ends = [100 * (end / middle - 1) for end in (was.low, was.high)]
            data.append({"type": "scatter", "mode": "lines", "x": [place, place], "y": ends, "line": {"color": charts.colour("muted"), "width": 7},
                         "opacity": 0.35, "hoverinfo": "text", "hovertext": [charts.tooltip([name, f"95 % interval {units.interval(was.low, was.high, shown.show)}"])] * 2})  # fmt: skip
        data.append({"type": "scatter", "mode": "markers", "x": xs, "y": [100 * (v / middle - 1) for v in values], "marker": {"size": 8, "color": ink},
                     "hoverinfo": "text", "hovertext": [charts.tooltip([f"{name}, trial {i + 1}", shown.show(v)]) for i, v in enumerate(values)]})  # fmt: skip
    labels = [charts.stacked(name.removeprefix("batch ").removeprefix("rate ")) for _, name, *_ in found]
    across = charts.axis("", tickvals=list(range(len(found))), ticktext=labels, range=[-0.6, len(found) - 0.4],
                         showgrid=False, zeroline=False, tickangle=0)  # fmt: skip
    drawn = charts.figure_of(data, {"xaxis": across, "yaxis": charts.axis("from the mean, %"), "showlegend": False})
    spread = [((max(values) - min(values)) / middle, name, values) for _, name, _, values, middle in found]
    worst = max(spread, key=lambda row: row[0])
    finding = f"The trials differ most at {worst[1]}, by {units.percent(worst[0], 2)} of their mean{_drift(worst[2])}."
    most = max(len(values) for *_, values, _ in found)
    head = [column("Point"), *(column(f"trial {i + 1}") for i in range(min(most, 20))),
            column("Mean", small="95 % interval"), column("Largest less least")]  # fmt: skip
    body = [[heading(name), *(Cell(shown.show(v)) for v in values[:20]), *(Cell("–") for _ in range(min(most, 20) - len(values))),
             Cell(shown.show(middle), units.interval(view.measured(point, shown.key).low, view.measured(point, shown.key).high, shown.show)),
             Cell(units.percent((max(values) - min(values)) / middle, 3))] for _, name, point, values, middle in found]  # fmt: skip
    table = Table(f"table-trials-{shown.key}", f"{shown.name}: the mean of each trial", [head], body)
    return Block(f"chart-trials-{shown.key}", shown.name, finding, READ_TRIALS, table, drawn)


def _drift(values: Sequence[float]) -> str:
    """Whether they go one way only; fewer than four would often do so by chance."""
    if len(values) < 4:
        return ""
    if all(a < b for a, b in itertools.pairwise(values)):
        return ", rising from trial to trial"
    return ", falling from trial to trial" if all(a > b for a, b in itertools.pairwise(values)) else ""
