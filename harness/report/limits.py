"""What limits a run: one decode step and one first token as stacked terms with the unexplained rest, and what would help."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from harness import units
from harness.records import NAN
from harness.report import charts, decision, view
from harness.report.section import Block, Charts
from harness.report.tables import Cell, Table, column, figure, heading
from harness.report.view import Json, Key, RunView

# (name, colour, hatched, its terms); a term that is not named here is of the last.
GROUPS: tuple[tuple[str, str, frozenset[str]], ...] = (
    ("Weights read", "measured", frozenset({"weights", "draft"})),
    ("KV cache read", "second", frozenset({"kv cache"})),
    ("Compute", "fourth", frozenset({"matmul", "attention", "ridge", "activations"})),
    ("Communication", "invalid", frozenset({"link latency", "link volume"})),
    ("Prefills of others and waiting", "third", frozenset({"prefills of others", "waiting for memory", "waiting for prefills",
                                                           "waiting for a step", "waiting for a slot",
                                                           "waiting for those beside"})),
    ("Launch and host", "predicted", frozenset()),
)  # fmt: skip
REST = "Unexplained"
LEAST_GAIN = 0.02
PARTS = (("itl_s", "chart-step", "One decode step"), ("ttft_s", "chart-first", "One first token: the prefill"))
READ = (
    "Each bar is one time as measured. Its parts are the predicted terms in seconds, one after the other; the hatched end "
    "is what no term explains. Where the terms add up to more than was measured, the line marks the measurement. Of two "
    "things that overlap in time only the longer one is a part."
)
READ_LEVERS = (
    "Each bar is the predicted output of the same point with one thing changed, per accelerator, as a multiple of the "
    "prediction as it is: right of 1 is more for the same number of accelerators. The table has the latencies too. Nothing "
    "here was measured, and no lever says what it does to the answers' quality."
)

Row = tuple[str, Key, Json]


def section(runs: Sequence[RunView]) -> Charts:
    blocks = [block for key, chart, title in PARTS if (block := _stack(runs, key, chart, title))]
    blocks += [block for k, run in enumerate(runs) if (block := _levers(run, k, view.labels(runs)[k]))]
    return Charts(
        blocks, stacked=True, otherwise="There is no prediction to take apart, so what limits it is not known."
    )


def _rows(runs: Sequence[RunView], metric: str) -> list[Row]:
    """All points of one run, or the best point of each of several, that have a prediction."""
    rows = [(name, key, point) for _, name, key, point in view.chosen(runs)]
    return [row for row in rows if view.predicted(row[2], metric).known][:12]


def terms(point: Json, key: str) -> dict[str, float]:
    """Seconds of each group that has any, of a predicted time, in the order of GROUPS."""
    found: dict[str, float] = {}
    for term in view.child(point, "predicted", key, "terms"):
        value = view.num(point, "predicted", key, "terms", str(term))
        name = next((name for name, _, members in GROUPS if term in members), GROUPS[-1][0])
        if value > 0:
            found[name] = found.get(name, 0.0) + value
    return {name: found[name] for name, _, _ in GROUPS if name in found}


def rest(point: Json, key: str) -> float:
    """Measured less predicted, seconds: below zero where it was quicker than its terms."""
    return view.measured(point, key).value - view.predicted(point, key).value


def _stack(runs: Sequence[RunView], key: str, chart: str, title: str) -> Block | None:
    rows = _rows(runs, key)
    if not rows:
        return None
    figure_ = _stacked(rows, key)
    return Block(chart, title, _sentence(rows, key), READ, _table(rows, key, chart, title), figure_)


def _sentence(rows: Sequence[Row], key: str) -> str:
    """Of the point with most output: its largest part, and the rest."""
    name, _, point = max(rows, key=lambda row: view.num(row[2], "output_tokens_per_s") if row[2] else NAN)
    was, parts = view.measured(point, key).value, terms(point, key)
    largest = max(parts, key=lambda part: parts[part])
    theory = view.predicted(point, key).value
    said = f"{parts[largest] / theory:.0%}".replace("%", " %")
    text = f"At {name} {largest[:1].lower() + largest[1:]} makes {said} of the predicted {units.seconds(theory, 3)}".replace(
        "kV", "KV"
    )
    if not math.isfinite(was):
        return f"{text}; it was not measured."
    left = rest(point, key)
    if left >= 0:
        return f"{text}; measured {units.seconds(was, 3)}, of which {units.seconds(left, 3)} ({units.percent(left / was, 2)}) is unexplained."
    return f"{text}; measured {units.seconds(was, 3)}, {units.percent(-left / theory, 2)} quicker than its terms add up to."


def _stacked(rows: Sequence[Row], key: str) -> charts.Figure:
    rows = rows[::-1]  # plotly counts upwards
    largest = max(max(view.predicted(p, key).value, view.measured(p, key).value or 0) for _, _, p in rows)
    factor, unit = units.time_scale(largest)
    names, data = [charts.inert(name) for name, _, _ in rows], []
    for group, ink, _ in GROUPS:
        values = [terms(point, key).get(group, NAN) for _, _, point in rows]
        if any(math.isfinite(v) for v in values):
            data.append(_part(group, names, values, factor, charts.colour(ink), rows, key, hatched=False))
    left = [max(rest(point, key), 0.0) for _, _, point in rows]
    if any(v > 0 for v in left):
        data.append(_part(REST, names, left, factor, charts.colour("ink"), rows, key, hatched=True))
    was = [factor * view.measured(point, key).value for _, _, point in rows]
    known = [k for k, v in enumerate(was) if math.isfinite(v)]
    data.append({
        "type": "scatter", "mode": "markers", "name": "Measured", "x": [was[k] for k in known], "y": [names[k] for k in known],
        "hoverinfo": "text", "hovertext": [charts.tooltip([rows[k][0], f"measured {units.seconds(was[k] / factor)}"]) for k in known],
        "marker": {"symbol": "line-ns", "size": 22, "line": {"width": 2.4, "color": charts.colour("ink")}}, "cliponaxis": False,
    })  # fmt: skip
    return charts.figure_of(data, {
        "barmode": "stack", "xaxis": charts.axis("", rangemode="tozero", ticksuffix=f" {unit}", showticksuffix="last"),
        "yaxis": charts.axis("", type="category", showgrid=False), "showlegend": True, "legend": charts.below(),
        "margin": {"l": 60, "r": 14, "t": 6, "b": 30},
    })  # fmt: skip


def _part(name: str, names: list[str], values: list[float], factor: float, ink: str, rows: Sequence[Row], key: str, *,
          hatched: bool) -> dict[str, Any]:  # fmt: skip
    marker: dict[str, Any] = {"color": ink, "line": {"width": 0}}
    if hatched:
        marker = {"color": charts.CLEAR, "line": {"width": 1.2, "color": ink},
                  "pattern": {"shape": "x", "size": 6, "solidity": 0.16, "fgcolor": ink, "bgcolor": charts.CLEAR}}  # fmt: skip
    hover = []
    for (row, _, point), value in zip(rows, values, strict=True):
        whole = max(view.measured(point, key).value, view.predicted(point, key).value)
        share = units.percent(value / whole, 2) if whole > 0 else ""
        hover.append(charts.tooltip([row, f"{name}: {units.seconds(value)}", f"{share} of the bar"]))
    return {"type": "bar", "orientation": "h", "name": name, "y": names, "x": [factor * v for v in values], "width": 0.62,
            "marker": marker, "hoverinfo": "text", "hovertext": hover}  # fmt: skip


def _table(rows: Sequence[Row], key: str, chart: str, title: str) -> Table:
    groups = [name for name, _, _ in GROUPS if any(name in terms(point, key) for _, _, point in rows)]
    head = [column("Point"), *(column(name) for name in groups), column("Predicted"), column("Measured"),
            column(REST, small="share of measured")]  # fmt: skip
    body = []
    for name, _, point in rows:
        parts, left = terms(point, key), rest(point, key)
        was, theory = view.measured(point, key), view.predicted(point, key)
        body.append([
            heading(name),
            *(Cell(units.seconds(parts[g], 3), units.percent(parts[g] / theory.value, 2)) if g in parts else Cell("–") for g in groups),
            Cell(units.seconds(theory.value), units.interval(theory.low, theory.high, units.seconds)),
            figure(units.seconds(was.value)),
            figure(units.seconds(left, 3), units.percent(left / was.value, 2)),
        ])  # fmt: skip
    caption = f"{title}: its terms and what they leave unexplained"
    return Table(f"table-{chart.removeprefix('chart-')}", caption, [head], body)


# --- what would help ----------------------------------------------------------------------------------------------


def _per_gpu(row: Json, base: int) -> float:
    return view.num(row, "times", "output_tokens_per_s") * base / max(view.num(row, "gpus"), 1)


def next_lever(run: RunView) -> Json | None:
    """The change of a setting or of the load that helps most where it is lacking: the time that misses its objective, or
    else output per accelerator.  None where none of those predicted helps."""
    _, base, _ = decision.price(run)
    rows = [row for row in view.items(run.summary, "levers") if view.text(row, "kind") != "hardware"]
    if metric := _missed(run):
        rows = [row for row in rows if view.num(row, "times", metric) < 1 - LEAST_GAIN]
        return min(rows, key=lambda row: (view.num(row, "times", metric), view.text(row, "name")), default=None)
    rows = [row for row in rows if _per_gpu(row, base) > 1 + LEAST_GAIN]
    settings = [row for row in rows if view.text(row, "kind") == "setting"]
    return max(settings or rows, key=lambda row: (_per_gpu(row, base), view.text(row, "name")), default=None)


_TIMES = {"itl_s": "time between tokens", "ttft_s": "time to first token"}


def _missed(run: RunView) -> str:
    """The time that misses its objective at the point that is judged; "" where none does."""
    checks = (check for row in decision.decide(run).held for check in row.checks if check.status == decision.MISSES)
    return next((key for check in checks if (key := f"{check.metric.partition('_')[0]}_s") in _TIMES), "")


def lever_sentence(run: RunView) -> str:
    """The next best lever, and the best other hardware, in words."""
    if not view.items(run.summary, "levers"):
        return ""
    best = view.best(run, "output_tokens_per_s", highest=True)
    row = next_lever(run)
    if row is None:
        text = f"No change of settings or load that can be predicted gives more than {units.percent(LEAST_GAIN)}."
    else:
        was = view.num(best[1], "output_tokens_per_s") if best else NAN
        told = [f"{units.ratio(view.num(row, 'times', 'output_tokens_per_s'))} the output tokens/s"]
        told += [f"{units.ratio(v)} the {name}" for key, name in _TIMES.items()
                 if math.isfinite(v := view.num(row, "times", key)) and abs(v - 1) > LEAST_GAIN]  # fmt: skip
        here = units.rate(was * view.num(row, "times", "output_tokens_per_s"), "tokens", 2)
        against = f" for the {_TIMES[metric]}, which misses its objective" if (metric := _missed(run)) else ""
        text = (f"Next best lever{against}: {view.text(row, 'name')} ({view.text(row, 'note')}), predicted to give "
                f"{', '.join(told[:-1])}{' and ' if told[:-1] else ''}{told[-1]}; here that would be about {here}.")  # fmt: skip
    return text + _other_hardware(run, best)


def _other_hardware(run: RunView, best: tuple[Key, Json] | None) -> str:
    """The cheapest per token where prices are known, else the quickest."""
    others = [row for row in view.items(run.summary, "levers")
              if view.text(row, "kind") == "hardware" and view.num(row, "times", "output_tokens_per_s") > 0]  # fmt: skip
    if not others or best is None:
        return ""
    now = decision.usd_per_million(run, best[1])
    priced = [(view.num(row, "usd_per_h") / view.num(row, "times", "output_tokens_per_s"), row) for row in others
              if view.num(row, "usd_per_h") > 0]  # fmt: skip
    per_h, _, _ = decision.price(run)
    if priced and math.isfinite(now):
        cost, row = min(priced, key=lambda pair: (pair[0], view.text(pair[1], "name")))
        than = f"{units.usd(now * cost / per_h)} instead of {units.usd(now)} for a million output tokens"
        none = "No other hardware with a known price is cheaper a token; nearest"
        word = "Cheapest other hardware" if cost < per_h else none
        return f" {word}: {view.text(row, 'name')}, {units.ratio(view.num(row, 'times', 'output_tokens_per_s'))} the output, {than}."
    row = max(others, key=lambda row: (view.num(row, "times", "output_tokens_per_s"), view.text(row, "name")))
    return f" Quickest other hardware: {view.text(row, 'name')}, {units.ratio(view.num(row, 'times', 'output_tokens_per_s'))} the output."


def _levers(run: RunView, place: int, name: str) -> Block | None:
    rows = view.items(run.summary, "levers")
    if not rows:
        return None
    _, base, _ = decision.price(run)
    suffix = f"-{place}" if place else ""
    title = "What would help" + (f", {name}" if name else "")
    return Block(f"chart-levers{suffix}", title, lever_sentence(run), READ_LEVERS, _lever_table(run, rows, base, f"table-levers{suffix}"),
                 _lever_figure(rows, base), high=True)  # fmt: skip


def _lever_figure(rows: Sequence[Json], base: int) -> charts.Figure:
    rows = list(rows)[::-1]
    kinds = {"setting": ("Settings", "measured"), "load": ("Load", "second"), "hardware": ("Other hardware", "fourth")}
    data = []
    for kind, (name, ink) in kinds.items():
        mine = [row for row in rows if view.text(row, "kind") == kind]
        hover = [charts.tooltip([view.text(row, "name"), view.text(row, "note"), f"output per accelerator {units.ratio(_per_gpu(row, base))}",
                                 f"ITL {units.ratio(view.num(row, 'times', 'itl_s'))}, TTFT {units.ratio(view.num(row, 'times', 'ttft_s'))}"])
                 for row in mine]  # fmt: skip
        if mine:
            data.append({"type": "bar", "orientation": "h", "name": name, "y": [charts.inert(view.text(row, "name")) for row in mine],
                         "x": [_per_gpu(row, base) for row in mine], "width": 0.62, "hoverinfo": "text", "hovertext": hover,
                         "marker": {"color": charts.colour(ink), "line": {"width": 0}}})  # fmt: skip
    order = [charts.inert(view.text(row, "name")) for row in rows]
    one = {"type": "line", "xref": "x", "yref": "paper", "x0": 1, "x1": 1, "y0": 0, "y1": 1,
           "line": {"width": 1.4, "dash": "dash", "color": charts.colour("ink")}}  # fmt: skip
    return charts.figure_of(data, {
        "xaxis": charts.axis("", rangemode="tozero", ticksuffix="×"), "shapes": [one], "barmode": "overlay",
        "yaxis": charts.axis("", type="category", showgrid=False, categoryorder="array", categoryarray=order, dtick=1),
        "showlegend": True, "legend": charts.below(), "margin": {"l": 60, "r": 14, "t": 6, "b": 30},
    })  # fmt: skip


def _lever_table(run: RunView, rows: Sequence[Json], base: int, id: str) -> Table:
    head = [column("Change"), column("Accelerators"), column("Output tokens/s"), column("per accelerator"), column("ITL"), column("TTFT"),
            column("Limited by", style="left"), column("Note", style="left")]  # fmt: skip
    body = []
    for row in rows:
        fits = view.num(row, "times", "output_tokens_per_s") > 0
        cells = [figure(units.ratio(v) if fits else units.MISSING) for v in
                 (view.num(row, "times", "output_tokens_per_s"), _per_gpu(row, base), view.num(row, "times", "itl_s"), view.num(row, "times", "ttft_s"))]  # fmt: skip
        body.append([heading(view.text(row, "name")), Cell(units.count(view.num(row, "gpus"))), *cells,
                     Cell(view.limit_word(view.text(row, "limit")), style="left"), Cell(view.text(row, "note"), style="left wrap")])  # fmt: skip
    found = view.best(run, "output_tokens_per_s", highest=True)
    at = f" at {view.marked(*found, full=True)}" if found else ""
    return Table(id, f"The same point{at} predicted again with one thing changed", [head], body,
                 ["Times are multiples of the prediction as it is: 0.5× is half."])  # fmt: skip
