"""The run over time, and a sample of its requests."""

from __future__ import annotations

import math
from collections.abc import Sequence

from harness import units
from harness.records import NAN
from harness.report import charts, view
from harness.report.section import Block, Charts
from harness.report.tables import Cell, Table, column, figure, heading
from harness.report.view import Json, RunView

READ = (
    "Above: requests in flight, below: output tokens per second, both as means over {step}, from the run's first request on. "
    "Shaded stretches are the trials of each load, in two shades by turns. A request's tokens are taken to come evenly from its first to its last, so "
    "a stall within one answer does not show here. Crosses are failed requests. Gaps between points are the pauses, and the "
    "server's start anew where it has one."
)
READ_SAMPLE = (
    "Each row is a request, from when it was due or sent (left) to its last token: grey waits to be sent by the client, "
    "light to the first token, dark from first to last token, red failed. Even slopes and equal lengths are a steady server; "
    "a long light part is queueing or a slow prefill. The slowest {slowest} are always among them."
)
MOST = 80  # trials that are shaded and listed
NOT_KEPT = (
    "Not measured (this run's records hold no times of single requests, or its summary was made by an older version)."
)


def section(runs: Sequence[RunView]) -> Charts:
    """Of one run; several would need a page each."""
    if len(runs) != 1:
        return Charts([], otherwise="Shown in the report of a single run.")
    blocks = [block for block in (_line(runs[0]), _sample(runs[0])) if block]
    return Charts(blocks, stacked=True, otherwise=NOT_KEPT)


def _labels(run: RunView) -> dict[int, str]:
    found = ((view.num(point, "point"), view.key_label(key, full=True)) for key, point in view.keyed(run).items())
    return {int(place): label for place, label in found if place >= 0}


def _line(run: RunView) -> Block | None:
    line = view.child(run.summary, "detail", "timeline")
    step = view.num(line, "step_s")
    flying, tokens = view.numbers(line, "in_flight"), view.numbers(line, "output_tokens_per_s")
    if not step > 0 or not flying:
        return None
    xs = [(k + 0.5) * step for k in range(len(flying))]
    ink = charts.colour("measured")
    data: list[Json] = [
        {"type": "scatter", "mode": "lines", "name": name, "x": xs, "y": ys, "yaxis": axis, "fill": "tozeroy", "fillcolor": charts.CLEAR,
         "line": {"color": colour, "width": 1.5, "shape": "hvh"}, **charts.template(f"after %{{x:.4~g}} s: %{{y:.4~g}} {unit}")}
        for name, ys, axis, colour, unit in (("In flight", flying, "y", ink, "in flight"), ("Output tokens/s", tokens, "y2", charts.colour("second"), "output tokens/s"))
    ]  # fmt: skip
    failed = [(x, n) for x, n in zip(xs, view.numbers(line, "errors"), strict=False) if n > 0]
    if failed:
        data.append({"type": "scatter", "mode": "markers", "name": "Failed", "x": [x for x, _ in failed], "y": [0] * len(failed), "cliponaxis": False,
                     "marker": {"symbol": "x", "size": 8, "color": charts.colour("invalid")}, "hoverinfo": "text",
                     "hovertext": [charts.tooltip([f"{units.count(n)} failed at {units.seconds(x)}"]) for x, n in failed]})  # fmt: skip
    names = _labels(run)
    points = [(names.get(int(row[0]), ""), int(row[1]), row[2], row[3]) for row in _spans(line)]
    inks = {name: charts.colour("memory" if k % 2 == 0 else "compute") for k, name in enumerate(names.values())}
    shapes = [{"type": "rect", "xref": "x", "yref": "paper", "x0": x0, "x1": x1, "y0": 0, "y1": 1, "layer": "below", "line": {"width": 0},
               "fillcolor": inks.get(name, charts.CLEAR)} for name, _, x0, x1 in points[:MOST]]  # fmt: skip
    whole = max((x1 for *_, x1 in points), default=1.0)
    notes = [{"xref": "x", "yref": "paper", "x": (x0 + x1) / 2, "y": 1, "yanchor": "bottom", "showarrow": False, "text": charts.inert(name),
              "font": {"size": 11, "color": charts.colour("muted")}} for name, _, x0, x1 in points[:MOST] if (x1 - x0) > 0.09 * whole]  # fmt: skip
    drawn = charts.figure_of(data, {
        "xaxis": charts.axis("seconds since the first request", zeroline=False, anchor="y2"), "yaxis": charts.axis("in flight", domain=[0.56, 1], rangemode="tozero"),
        "yaxis2": charts.axis("output tokens/s", domain=[0, 0.46], rangemode="tozero"), "shapes": shapes, "annotations": notes, "showlegend": False,
        "margin": {"l": 56, "r": 10, "t": 20, "b": 46},
    })  # fmt: skip
    finding = f"The run took {units.seconds(len(flying) * step, 3)}; most in flight were {units.number(max(flying), 3)}, and most output {units.rate(max(tokens), 'tokens', 3)}."
    body = []
    for name, trial, x0, x1 in points[:MOST]:
        inside = [k for k, x in enumerate(xs) if x0 <= x <= x1]
        body.append([heading(name or "–"), Cell(units.count(trial + 1)), Cell(units.seconds(x0)), Cell(units.seconds(x1 - x0)), *(
            figure(units.number(sum(ys[k] for k in inside) / len(inside)) if inside else units.MISSING) for ys in (flying, tokens))])  # fmt: skip
    notes_ = [f"{len(points) - MOST} later trials are left out."] if len(points) > MOST else []
    head = [column("Point"), column("Trial"), column("Began after"), column("Took"), column("In flight", small="mean"),
            column("Output tokens/s", small="mean, pauses included")]  # fmt: skip
    table = Table("table-timeline", "The trials of the run over time, warm-up included", [head], body, notes_)
    read = READ.format(step=units.seconds(step, 2))
    return Block("chart-timeline", "The run over time", finding, read, table, drawn, high=True)


def _spans(line: Json) -> list[list[float]]:
    """[point, trial, began, ended] of each trial."""
    rows = [[view.num({"v": v}, "v") for v in row] for row in _list(line, "stretches") if isinstance(row, list)]
    return [row for row in rows if len(row) == 4 and all(math.isfinite(v) for v in row)]


def _sample(run: RunView) -> Block | None:
    found = view.child(run.summary, "detail", "sample")
    sent = view.numbers(found, "sent_s")
    if not sent:
        return None
    due, first, last = (view.numbers(found, name) for name in ("scheduled_s", "first_token_s", "last_token_s"))
    ids, tokens = view.numbers(found, "id"), view.numbers(found, "output_tokens")
    ok = [bool(v) for v in _list(found, "ok")]
    start = min(min(sent), min((v for v in due if math.isfinite(v)), default=math.inf))
    slow = set(view.numbers(found, "slowest"))
    hover = [charts.tooltip([f"request {units.count(ids[k])}" + (", among the slowest" if ids[k] in slow else ""),
                             f"sent after {units.seconds(sent[k] - start)}", f"first token {units.seconds(first[k] - sent[k])}",
                             f"all {units.seconds(last[k] - sent[k])}, {units.count(tokens[k])} tokens", "" if ok[k] else "failed"]) for k in range(len(sent))]  # fmt: skip
    gone = (NAN, NAN)
    rows_ = list(zip(due, sent, first, last, ok, strict=True))
    spans = (
        ("Waits in the client", "predicted", [(d, s) if s > d else gone for d, s, _, _, _ in rows_]),
        ("To the first token", "fourth", [(s, f) if good else gone for _, s, f, _, good in rows_]),
        ("First to last token", "measured", [(f, e) if good else gone for _, _, f, e, good in rows_]),
        ("Failed", "invalid", [gone if good else (s, max(e, s + 1e-3)) for _, s, _, e, good in rows_]),
    )
    data: list[Json] = []
    for name, ink, ends in spans:
        rows = [k for k, (a, b) in enumerate(ends) if math.isfinite(a) and math.isfinite(b) and b > a]
        if rows:
            data.append({"type": "bar", "orientation": "h", "name": name, "y": rows, "base": [ends[k][0] - start for k in rows], "x": [ends[k][1] - ends[k][0] for k in rows],
                         "width": 0.9, "marker": {"color": charts.colour(ink), "line": {"width": 0}}, "hoverinfo": "text", "hovertext": [hover[k] for k in rows]})  # fmt: skip
    if not data:
        return None
    drawn = charts.figure_of(data, {
        "barmode": "overlay", "bargap": 0, "xaxis": charts.axis("seconds since the trial began", zeroline=False),
        "yaxis": charts.axis("requests, in the order sent", autorange="reversed", showticklabels=False, showgrid=False, zeroline=False), "showlegend": True, "legend": charts.below(),
        "margin": {"l": 30, "r": 10, "t": 6, "b": 46},
    })  # fmt: skip
    whole, point = view.num(found, "of"), _labels(run).get(int(view.num(found, "point")), "")
    rows = sorted((k for k in range(len(sent)) if ids[k] in slow), key=lambda k: (sent[k] - last[k], ids[k]))
    head = [
        *map(column, ("Request", "Sent after", "To the first token", "End to end", "Output tokens")),
        column("Ended", style="left"),
    ]
    body = [[heading(units.count(ids[k])), Cell(units.seconds(sent[k] - start)), figure(units.seconds(first[k] - sent[k])), figure(units.seconds(last[k] - sent[k])),
             figure(units.count(tokens[k])), Cell("well" if ok[k] else "failed", style="left")] for k in rows]  # fmt: skip
    slowest = rows[0] if rows else 0
    text = f"{units.count(len(sent))} of the {units.count(whole)} requests of one trial at {point}; the slowest took {units.seconds(last[slowest] - sent[slowest], 3)}"
    text += (
        f", {units.seconds(first[slowest] - sent[slowest], 3)} of it to the first token."
        if math.isfinite(first[slowest])
        else "."
    )
    table = Table("table-sample", f"The slowest {units.count(len(rows))} requests of the trial shown", [head], body)
    read = READ_SAMPLE.format(slowest=units.count(len(rows)))
    return Block("chart-sample", f"A sample of requests, {point}", text, read, table, drawn, high=True)


def _list(data: Json, key: str) -> list[object]:
    found = data.get(key)
    return found if isinstance(found, list) else []
