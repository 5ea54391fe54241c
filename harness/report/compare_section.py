"""Several runs against the first: forest plots, figures with their change, and what differs between the runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from harness import baseline, units
from harness.report import changes, charts, view
from harness.report.changes import METRICS, WORDS, Change
from harness.report.section import Block, Charts
from harness.report.tables import Cell, Row, Table, column, heading
from harness.report.view import RunView

_STYLES = {"better": "valid", "worse": "invalid"}
_SYMBOLS = {"better": "triangle-left", "worse": "triangle-right", "same": "circle", "unclear": "circle-open", "not judged": "x-thin-open"}  # fmt: skip
_READ = (
    "Each mark is one point's change from the first run, with its 95 % interval over the trials: right of zero is worse, "
    "left is better. Inside the grey band a change is too small to matter. Better or worse is said where chance does not "
    f"explain it (all tests of the page together: {units.percent(changes.ALPHA)}) and it is larger than the band; same, where the whole "
    "interval lies inside; unclear, where neither holds. A server that is started anew has luck of its own, which no trial "
    "of one run can show: runs in turn (`--interleave`) are free of it, and `ridgeline noise` measures it."
)


@dataclass(frozen=True, slots=True)
class Compared(Charts):
    """Charts, and what stands before and after them."""

    sentences: list[str] = field(default_factory=list)
    before: Table | None = None
    after: Table | None = None


def section(runs: Sequence[RunView]) -> Compared | None:
    """None for a single run."""
    if len(runs) < 2:
        return None
    found, names, room = changes.changes(runs), view.labels(runs), view.room(runs)
    most = list(dict.fromkeys(c.key for c in found))[: view.MOST_OF_FEW // 2]
    shown = [c for c in found if c.run < room and c.key in most]
    cut = f"Charts and tables show the first {room} of {len(runs)} runs: a page has no room for more. `--format json` has all."
    return Compared(
        [_block(metric, rows, names) for metric in METRICS if (rows := [c for c in shown if c.metric == metric])],
        notices=([cut] if room < len(runs) else []) + changes.caveats(runs),
        otherwise="No point was measured in the first run and in another, so no figure can be compared.",
        sentences=[sentence([c for c in found if c.run == place], names[place], names[0]) for place in range(1, len(runs))],
        before=overview(shown, names) if shown else None,
        after=differences(runs[:room]),
    )  # fmt: skip


def sentence(found: Sequence[Change], name: str, base: str) -> str:
    """How one run compares with the first, in words."""
    if not found:
        return f"{name} has no point in common with {base}."
    counts = [(word, sum(c.word == word for c in found)) for word in WORDS]
    told = ", ".join(f"{n} {word}" for word, n in counts if n)
    reasons = list(dict.fromkeys(c.why for c in found if c.word == "not judged"))
    told += f" ({'; '.join(reasons[:3])})" if reasons else ""
    largest = max(
        (c for c in found if c.word in ("better", "worse")), key=lambda c: abs(math.log1p(c.harm)), default=None
    )
    most = ""
    if largest:
        most = f"; the largest: {short(largest.metric)} at {view.key_label(largest.key, full=True)} {largest.shown}"
    return f"{name} against {base}, {len(found)} figures: {told}{most}."


def short(metric: str) -> str:
    text = metric.replace("_p50", " p50").upper().replace("P50", "p50")
    return "tokens/s" if baseline.higher_is_better(metric) else text


def _stamp(word: str) -> str:
    return f"{WORDS[word]} {word}"


def overview(found: Sequence[Change], names: Sequence[str]) -> Table:
    """Every metric at every point: the first run's figure, each other's, its change and what that is."""
    places = sorted({c.run for c in found})
    head = [column(""), column(names[0], small="first")]
    for place in places:
        head += [column(names[place], small="change, 95 % interval"), column("Judged")]
    body: list[Row] = []
    for metric, title in METRICS.items():
        rows = [c for c in found if c.metric == metric]
        if rows:
            body.append([Cell(title, scope="rowgroup", span=len(head), style="group")])
        for key in dict.fromkeys(c.key for c in rows):
            cells = {c.run: c for c in rows if c.key == key}
            row = [
                heading(view.key_label(key, full=True)),
                Cell(changes.figure(metric, next(iter(cells.values())).base)),
            ]
            for place in places:
                row += _cells(cells.get(place))
            body.append(row)
    return Table("table-compare", "Each run against the first", [head], body)


def _cells(change: Change | None) -> Row:
    if change is None:
        return [Cell("not measured", style="missing"), Cell("–", style="missing")]
    return [Cell(changes.figure(change.metric, change.new), change.shown),
            Cell(_stamp(change.word), change.why, _STYLES.get(change.word, ""))]  # fmt: skip


def differences(runs: Sequence[RunView]) -> Table | None:
    """What is not the same in all runs; None where all is."""
    rows = changes.differences(runs)
    if not rows:
        return None
    head = [column("What differs", style="left"), *(column(name, style="left") for name in view.labels(runs))]
    body = [
        [heading(name), *(Cell(value or "not set", style="left wrap" if value else "left missing") for value in values)]
        for name, values in rows[: changes.MOST_DIFFERENCES]
    ]
    left = len(rows) - len(body)
    notes = [f"{left} more differ; the provenance below has all."] if left else []
    return Table("table-differs", "What differs between the runs; all else is the same", [head], body, notes)


# --- forest plots ---------------------------------------------------------------------------------------------------


def _block(metric: str, found: Sequence[Change], names: Sequence[str]) -> Block:
    counts = [(word, sum(c.word == word for c in found)) for word in WORDS]
    finding = ", ".join(f"{n} {word}" for word, n in counts if n) + f"; the band is ±{units.percent(found[0].margin)}."
    chart = f"chart-change-{metric}"
    return Block(chart, METRICS[metric], finding, _READ, _table(metric, found, names), _forest(found, names),
                 missing="Nothing to draw: no change is known.")  # fmt: skip


def _table(metric: str, found: Sequence[Change], names: Sequence[str]) -> Table:
    head = [column(text) for text in ("Run", "Point", names[0] or "first", "This run", "Change")]
    head += [column("p", small="Holm, one-sided"), column("Trials", small="first, this"), column("Judged")]
    body = [
        [heading(names[c.run]), heading(view.key_label(c.key)), Cell(changes.figure(metric, c.base)),
         Cell(changes.figure(metric, c.new)), Cell(c.shown), Cell(units.number(c.p, 2) if math.isfinite(c.p) else "–"),
         Cell(f"{c.trials[0]}, {c.trials[1]}"), Cell(_stamp(c.word), c.why, _STYLES.get(c.word, ""))]
        for c in found
    ]  # fmt: skip
    return Table(f"table-change-{metric}", f"{METRICS[metric]}: change from the first run", [head], body)


def _forest(found: Sequence[Change], names: Sequence[str]) -> charts.Figure | None:
    """Rows are points, marks runs; to the right is worse."""
    known = [c for c in found if math.isfinite(c.harm)]
    if not known:
        return None
    keys = list(dict.fromkeys(c.key for c in known))
    places = sorted({c.run for c in known})
    data = [_marks([c for c in known if c.run == place], keys, names, places) for place in places]
    margin = 100 * known[0].margin
    ends = [100 * v for c in known for v in (c.harm, c.low, c.high) if math.isfinite(v)]
    low, high = min([*ends, -2 * margin]), max([*ends, 2 * margin])
    pad = 0.05 * (high - low)
    upright = {"yref": "paper", "y0": 0, "y1": 1, "layer": "below", "xref": "x"}
    shapes = [
        {"type": "rect", "x0": -margin, "x1": margin, "fillcolor": charts.colour("nofit"), "line": {"width": 0}, **upright},
        {"type": "line", "x0": 0, "x1": 0, "line": {"width": 1.2, "color": charts.colour("muted")}, **upright},
    ]  # fmt: skip
    across = charts.axis("change, %: left is better, right is worse", range=[low - pad, high + pad], zeroline=False)
    labels = [view.key_label(key) for key in keys]
    up = charts.axis("", tickvals=list(range(len(keys))), ticktext=labels, range=[len(keys) - 0.4, -0.6], showgrid=False,
                     zeroline=False)  # fmt: skip
    return charts.figure_of(
        data, {"xaxis": across, "yaxis": up, "shapes": shapes, "showlegend": len(places) > 1, "margin": {"l": 40, "r": 10, "t": 8, "b": 46}}
    )  # fmt: skip


def _marks(rows: Sequence[Change], keys: Sequence[view.Key], names: Sequence[str], places: Sequence[int]) -> view.Json:
    place = places.index(rows[0].run)
    offset = 0.5 * ((place + 0.5) / len(places) - 0.5)
    ink = charts.run_colour(rows[0].run)
    estimates = [view.Estimate(c.harm, c.low, c.high) for c in rows]
    hover = [charts.tooltip([f"{names[c.run]}, {view.key_label(c.key, full=True)}", f"{names[0]}: {changes.figure(c.metric, c.base)}",
                             f"{names[c.run]}: {changes.figure(c.metric, c.new)}", c.shown, _stamp(c.word), c.why])
             for c in rows]  # fmt: skip
    return {
        "type": "scatter", "mode": "markers", "name": charts.inert(names[rows[0].run]),
        "x": [100 * c.harm for c in rows], "y": [keys.index(c.key) + offset for c in rows],
        "hoverinfo": "text", "hovertext": hover, "error_x": charts.whiskers(estimates, 100, ink),
        "marker": {"symbol": [_SYMBOLS[c.word] for c in rows], "size": 10, "color": ink, "line": {"width": 1.6, "color": ink}},
    }  # fmt: skip
