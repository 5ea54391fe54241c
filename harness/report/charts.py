"""Runs -> plotly figures, as plain JSON.  A chart is a row of CHARTS.

Colours are the light ones of PALETTE; the page swaps each for its dark twin, so a figure names no other colour.
Traps of plotly kept out here: its texts are pseudo-HTML (`inert`), its default template is 7 KB a figure (`figure_of`).
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from harness import units
from harness.records import NAN
from harness.report import view
from harness.report.view import HEADLINES, Json, Key, RunView, Shown

Figure = dict[str, Any]

# name -> (light, dark).  Lines and marks reach 3:1, texts 4.5:1 against the paper of their mode.
PALETTE: dict[str, tuple[str, str]] = {
    "paper": ("#ffffff", "#111418"),
    "panel": ("#f5f7f9", "#191e24"),
    "ink": ("#1b1f24", "#e7e9ec"),
    "muted": ("#57606a", "#a3abb5"),
    "line": ("#d3d9df", "#39414a"),
    "grid": ("#e6eaee", "#2a3037"),
    "measured": ("#0072b2", "#4ba9e2"),
    "second": ("#00805c", "#33c295"),
    "third": ("#a8487f", "#dd94bd"),
    "fourth": ("#7a6200", "#d6b854"),
    "predicted": ("#4a545e", "#b4bcc5"),
    "valid": ("#00694b", "#4fd0a2"),
    "suspect": ("#8a5300", "#e8b04f"),
    "invalid": ("#b0271f", "#ff9088"),
    "memory": ("#e9f2f9", "#16222d"),
    "compute": ("#f8efe4", "#2a2118"),
    "nofit": ("#e4e6e9", "#24282d"),
}
RUN_COLOURS = ("measured", "second", "third", "fourth")
SYMBOLS = {"valid": "circle", "suspect": "triangle-up", "invalid": "x"}
CLEAR = "rgba(0,0,0,0)"
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'DejaVu Sans', sans-serif"


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart of the page: `draw` gives its figure, None where there is nothing to draw; `read` tells how to read it."""

    title: str
    read: str
    draw: Callable[[Sequence[RunView]], Figure | None]


def colour(name: str) -> str:
    return PALETTE[name][0]


def run_colour(place: int) -> str:
    return colour(RUN_COLOURS[place % len(RUN_COLOURS)])


def inert(value: str) -> str:
    """Text that plotly shows as it stands: its own pseudo-HTML knows links, so no tag may survive."""
    return html.escape(value, quote=False)


def tooltip(lines: Iterable[str]) -> str:
    return "<br>".join(inert(line) for line in lines if line)


def template(*lines: str) -> Json:
    """The part of a trace whose tooltip plotly fills in itself: shorter than a text for each point.  A line with a text
    of others goes through `untemplated`."""
    return {"hovertemplate": "<br>".join(line for line in lines if line), "hoverlabel": {"namelength": 0}}


def stacked(label: str) -> str:
    """ "run, batch 4" on two lines, beneath an axis."""
    return "<br>".join(inert(part) for part in label.split(", ", 1))


def untemplated(value: str) -> str:
    """Text that stands in a template as it is."""
    return inert(value).replace("%{", "% {")


def _plain(value: Any) -> Any:
    """JSON with plain lists, no NaN, and six significant digits: more would differ between machines."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


# What all figures have in common; it is told once, and the page adds it.
SHARED: dict[str, Any] = {
    "font": {"family": _FONT, "size": 12, "color": colour("ink")},
    "paper_bgcolor": CLEAR,
    "plot_bgcolor": CLEAR,
    "margin": {"l": 56, "r": 10, "t": 4, "b": 46},
    "hoverlabel": {
        "align": "left",
        "bgcolor": colour("paper"),
        "bordercolor": colour("muted"),
        "font": {"color": colour("ink"), "size": 12, "family": _FONT},
    },
    "hovermode": "closest",
    "dragmode": False,  # a drag on a phone scrolls the page
    "legend": {
        "orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom",
        "font": {"size": 11.5}, "itemclick": False, "itemdoubleclick": False,
    },
}  # fmt: skip


def figure_of(data: Sequence[Json], layout: Json) -> Figure:
    """The figure, checked by plotly, as plain JSON; without what it shares with the others (SHARED)."""
    import plotly.graph_objects as go  # here: the import takes longer than `ridgeline --help` may

    figure: Figure = go.Figure(data=list(data), layout={"template": "none", **SHARED, **layout}).to_plotly_json()
    figure["layout"] = {key: v for key, v in figure["layout"].items() if key != "template" and v != SHARED.get(key)}
    plain: Figure = _plain(figure)
    return plain


def axis(title: str, **more: Any) -> Json:
    return {
        "title": {"text": inert(title), "standoff": 8, "font": {"size": 12, "color": colour("muted")}},
        "gridcolor": colour("grid"), "linecolor": colour("line"), "zerolinecolor": colour("line"),
        "tickfont": {"color": colour("muted")}, "fixedrange": True, "automargin": True, **more,
    }  # fmt: skip


def legend(runs: Sequence[RunView]) -> list[tuple[int, str]]:
    """(place among the colours, name) of several runs, for the page to tell; a single one needs none."""
    named = enumerate(view.labels(runs))
    return [(place % len(RUN_COLOURS), name) for place, name in named] if len(runs) > 1 else []


def below() -> Json:
    """A legend beneath the chart, for one with many traces."""
    return {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.17, "yanchor": "top", "font": {"size": 11.5},
            "traceorder": "normal", "itemclick": False, "itemdoubleclick": False}  # fmt: skip


def logarithmic(title: str, low: float, high: float) -> Json:
    """An axis for values from `low` to `high`: logarithmic with marks at 1, 2, 5, or level where they are close together."""
    if not 0 < low < high or high / low < 3:
        return axis(title, zeroline=False)
    marks = [
        m * 10.0**k for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for m in (1, 2, 5)
    ]
    marks = [mark for mark in marks if low / 1.3 <= mark <= high * 1.3]
    if high / low > 300:
        marks = [mark for mark in marks if math.isclose(math.log10(mark) % 1, 0, abs_tol=1e-9)]
    ends = [math.log10(low / 1.05), math.log10(high * 1.05)]
    return axis(title, type="log", tickvals=marks, ticktext=[units.number(mark) for mark in marks], range=ends)


def whiskers(estimates: Sequence[view.Estimate], factor: float, ink: str) -> Json:
    above = [factor * max(e.high - e.value, 0.0) if math.isfinite(e.high) else NAN for e in estimates]
    below = [factor * max(e.value - e.low, 0.0) if math.isfinite(e.low) else NAN for e in estimates]
    known = any(math.isfinite(a) for a in above)
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "visible": known,
            "color": ink, "thickness": 1.3, "width": 3}  # fmt: skip


def _point_hover(name: str, key: Key, point: Json, shown: Shown) -> str:
    was, theory = view.measured(point, shown.key), view.predicted(point, shown.key)
    word = view.verdict_of(point)
    seed = view.seed_value(point, shown.key)
    span, room = (units.interval(e.low, e.high, shown.show) for e in (was, theory))
    return tooltip(
        [
            view.joined(name, view.key_label(key, full=True)),
            f"measured {shown.show(was.value)}" + (f" (95 % interval {span})" if span else ""),
            f"predicted {shown.show(theory.value)}" + (f" ({room})" if room else "")
            if theory.known
            else "no prediction",
            f"seed's arithmetic {shown.show(seed)}" if math.isfinite(seed) else "",
            f"measured / predicted {units.ratio(view.quotient(point, shown.key))}" if theory.known else "",
            f"{units.count(num)} samples" if math.isfinite(num := view.num(point, shown.key, "n")) else "",
            f"{view.VERDICTS[word]} {word}",
            view.failures(point),
        ]
    )


def _bar(name: str, x: list[float], width: float, estimates: Sequence[view.Estimate], factor: float, hover: list[str],
         ink: str, solid: bool) -> Json:  # fmt: skip
    """Predicted is an outline with a hatch, measured is solid: the same two everywhere."""
    marker: dict[str, Any] = {"color": ink, "line": {"width": 0}}
    if not solid:
        marker = {"color": CLEAR, "line": {"width": 1.4, "color": ink},
                  "pattern": {"shape": "/", "size": 6, "solidity": 0.16, "fgcolor": ink, "bgcolor": CLEAR}}  # fmt: skip
    return {
        "type": "bar", "name": inert(name), "x": x, "width": width * 0.94,
        "y": [factor * e.value for e in estimates], "marker": marker, "hoverinfo": "text", "hovertext": hover,
        "error_y": whiskers(estimates, factor, colour("ink") if solid else ink),
    }  # fmt: skip


def _stamps(x: list[float], heights: list[float], words: list[str], hover: list[str]) -> Json:
    """The glyph above a measured bar that is not valid: no figure without its stamp."""
    kept = [k for k, word in enumerate(words) if word != "valid" and math.isfinite(heights[k])]
    return {
        "type": "scatter", "mode": "text", "showlegend": False, "cliponaxis": False,
        "x": [x[k] for k in kept], "y": [heights[k] for k in kept], "text": [view.VERDICTS[words[k]] for k in kept],
        "textposition": "top center", "hoverinfo": "text", "hovertext": [hover[k] for k in kept],
        "textfont": {"size": 11, "color": [colour(words[k]) for k in kept]},
    }  # fmt: skip


def versus(runs: Sequence[RunView], shown: Shown) -> Figure | None:
    """Grouped bars of one figure: for each batch size (or rate) the prediction beside the measurement."""
    keys, names = view.all_keys(runs), view.labels(runs)
    found = [view.keyed(run) for run in runs]
    every = [point for run in found for point in run.values()]
    has_theory = [any(view.predicted(p, shown.key).known for p in run.values()) for run in found]
    if not any(view.measured(p, shown.key).known or view.predicted(p, shown.key).known for p in every):
        return None
    largest = max((v for p in every for e in (view.measured(p, shown.key), view.predicted(p, shown.key))
                   for v in (e.value, e.high) if math.isfinite(v)), default=NAN)  # fmt: skip
    factor, unit = (1.0, "tokens/s") if shown.higher_is_better else units.time_scale(largest)
    title = unit if shown.higher_is_better else f"{shown.short}, {unit}"
    alone = len(runs) == 1  # the names of several runs would fill the chart: the page has a legend of its own for them
    slots = len(runs) + sum(has_theory)
    width, slot, data = 0.8 / slots, 0, []
    for place, run in enumerate(found):
        theirs = [(column, key, run[key]) for column, key in enumerate(keys) if key in run]
        hover = [_point_hover(names[place], key, point, shown) for _, key, point in theirs]
        suffix = f", {names[place]}" if names[place] else ""
        for kind in ("predicted", "measured") if has_theory[place] else ("measured",):
            x = [column - 0.4 + (slot + 0.5) * width for column, _, _ in theirs]
            solid = kind == "measured"
            ink = run_colour(place) if solid or not alone else colour("predicted")
            estimates = [(view.measured if solid else view.predicted)(point, shown.key) for _, _, point in theirs]
            data.append(_bar(kind.capitalize() + suffix, x, width, estimates, factor, hover, ink, solid))
            if solid:
                tops = [factor * (e.high if math.isfinite(e.high) else e.value) for e in estimates]
                data.append(_stamps(x, tops, [view.verdict_of(point) for _, _, point in theirs], hover))
            else:
                seeds = [factor * view.seed_value(point, shown.key) for _, _, point in theirs]
                data.append(_seed_marks(x, seeds, hover, "Seed's arithmetic" + suffix))
            slot += 1
    data = [trace for trace in data if any(math.isfinite(v) for v in trace["y"])]
    margin = max(0.5, (3 - len(keys)) / 2)  # one batch size is a bar, not a wall
    across = axis(view.load_word(runs), tickvals=list(range(len(keys))), ticktext=[view.key_label(k) for k in keys],
                   range=[-margin, len(keys) - 1 + margin], showgrid=False, zeroline=False)  # fmt: skip
    return figure_of(
        data, {"xaxis": across, "yaxis": axis(title, rangemode="tozero"), "barmode": "overlay", "showlegend": alone}
    )


def _seed_marks(x: list[float], y: list[float], hover: list[str], name: str) -> Json:
    return {
        "type": "scatter", "mode": "markers", "name": inert(name), "x": x, "y": y, "hoverinfo": "text",
        "hovertext": hover, "cliponaxis": False,
        "marker": {"symbol": "diamond", "size": 9, "color": colour("paper"),
                   "line": {"width": 1.8, "color": colour("ink")}},
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Part:
    """A shaded part of the plane, from batch x0 to x1."""

    x0: float
    x1: float
    name: str
    fill: str


def _parts(x0: float, x1: float, ridge: float, wall: float) -> list[_Part]:
    """The parts of the plane between x0 and x1; a ridge or a wall outside of them cuts nothing."""
    fits = min(max(wall, x0), x1) if math.isfinite(wall) else x1
    bend = min(max(ridge, x0), fits) if math.isfinite(ridge) else x0
    parts = [_Part(x0, bend, "memory-bound", "memory"), _Part(bend, fits, "compute-bound", "compute")]
    parts = parts if math.isfinite(ridge) else []
    return [part for part in [*parts, _Part(fits, x1, "does not fit", "nofit")] if part.x1 > part.x0 * 1.0001]


def _shapes(parts: Sequence[_Part]) -> list[Json]:
    upright = {"yref": "paper", "y0": 0, "y1": 1, "layer": "below", "xref": "x"}
    shapes: list[Json] = [
        {"type": "rect", "x0": p.x0, "x1": p.x1, "fillcolor": colour(p.fill), "line": {"width": 0}, **upright}
        for p in parts
    ]
    for part in parts[1:]:
        line = {"width": 1.2, "color": colour("muted"), "dash": "solid" if part.fill == "nofit" else "dash"}
        shapes.append({"type": "line", "x0": part.x0, "x1": part.x0, "line": line, **upright})
    return shapes


def _notes(parts: Sequence[_Part], ridge: float, wall: float) -> list[Json]:
    """The names of the parts and of the lines between them.  An annotation on a log axis stands at the logarithm."""
    whole = math.log10(parts[-1].x1 / parts[0].x0) if parts else 0.0
    shared = {"xref": "x", "yref": "paper", "showarrow": False, "yanchor": "bottom"}
    notes: list[Json] = []
    for part in parts:
        share = math.log10(part.x1 / part.x0) / whole
        name = f"does not fit: > {units.count(wall)}" if part.fill == "nofit" else part.name
        upright = share < 0.16
        notes.append({
            "x": (math.log10(part.x0) + math.log10(part.x1)) / 2, "y": 0.01, "textangle": -90 if upright else 0,
            "text": inert(name) if upright or share > 0.42 else inert(name).replace("-", "-<br>").replace(": ", ":<br>"),
            "font": {"size": 11.5, "color": colour("muted")}, **shared,
        })  # fmt: skip
    for part in parts[1:]:
        if part.fill == "compute":
            name, ink = f"ridge, batch {units.number(ridge, 3)}", {"size": 11.5, "color": colour("ink")}
            notes.append(
                {"x": math.log10(part.x0), "y": 1, "text": inert(name), "font": ink, "xanchor": "center", **shared}
            )
    return notes


def _roofs(plane: Json, name: str, ink: str, wall: float, alone: bool) -> list[Json]:
    batch = view.numbers(plane, "batch")
    rows = [
        ("memory_roof_tokens_per_s", "Memory bandwidth alone", "dot", 1.2),
        ("compute_roof_tokens_per_s", "Compute alone", "dashdot", 1.2),
        ("roof_tokens_per_s", "Predicted roof", "solid", 2.4),
    ]
    traces: list[Json] = []
    for key, title, dash, width in rows if alone else rows[2:]:
        roof = view.numbers(plane, key)
        pairs = [
            (b, r) for b, r in zip(batch, roof, strict=False) if b > 0 and r > 0 and not (b > wall and dash == "solid")
        ]
        if dash == "solid" and pairs and math.isfinite(edge := view.roof_at(plane, wall)):
            pairs.append((wall, edge))
        if pairs:
            traces.append({
                "type": "scatter", "mode": "lines", "name": inert(title + (f", {name}" if name else "")),
                "x": [b for b, _ in pairs], "y": [r for _, r in pairs], "hoverinfo": "text",
                "hovertext": [tooltip([name, title, f"batch {units.number(b)}: {units.rate(r, 'tokens')}"]) for b, r in pairs],
                "line": {"color": ink, "width": width, "dash": dash},
            })  # fmt: skip
    return traces


def _plane_points(name: str, run: RunView, ink: str) -> Json:
    rows = []
    for key, point in view.keyed(run).items():
        x, y = view.batch_of(point), view.num(point, "output_tokens_per_s")
        if x > 0 and y > 0:
            word, ran = view.verdict_of(point), view.num(point, "batch_ran", "mean")
            known = (
                f"the server ran {units.number(ran)} on average"
                if math.isfinite(ran)
                else "batch really ran: not known"
            )
            hover = [name, f"asked: {view.key_label(key, full=True)}", known, f"measured {units.rate(y, 'tokens')}",
                     f"{view.VERDICTS[word]} {word}", view.failures(point)]  # fmt: skip
            rows.append((x, y, word, tooltip(hover)))
    return {
        "type": "scatter", "mode": "lines+markers", "name": inert("Measured" + (f", {name}" if name else "")),
        "x": [r[0] for r in rows], "y": [r[1] for r in rows], "hoverinfo": "text", "hovertext": [r[3] for r in rows],
        "line": {"color": ink, "width": 1.6}, "cliponaxis": False,
        "marker": {"symbol": [SYMBOLS[r[2]] for r in rows], "size": 10, "color": ink,
                   "line": {"width": 1.2, "color": colour("paper")}},
    }  # fmt: skip


def plane(runs: Sequence[RunView]) -> Figure | None:
    """Output tokens per second over batch size, both logarithmic, under the predicted roof."""
    names, alone = view.labels(runs), len(runs) == 1
    planes = [view.child(run.summary, "plane") for run in runs]
    walls = [view.num(p, "largest_batch") for p in planes]
    data: list[Json] = []
    for k, entry in enumerate(planes):
        ink = colour("predicted") if alone else run_colour(k)
        data += _roofs(entry, names[k], ink, walls[k] if walls[k] > 0 else math.inf, alone)
    data += [_plane_points(names[k], run, run_colour(k)) for k, run in enumerate(runs)]
    data = [trace for trace in data if trace["x"]]
    if not data:
        return None
    xs = [x for trace in data for x in trace["x"]]
    x0, x1 = min(xs) / 1.15, max(xs) * 1.15
    first = next((k for k, entry in enumerate(planes) if entry), None)  # regions are one run's: they may differ
    ridge, wall = (view.num(planes[first], "ridge_batch"), walls[first]) if first is not None else (NAN, NAN)
    parts = _parts(x0, x1, ridge, wall)
    across = axis("Batch size, as really run", type="log", dtick="D2", showgrid=False,
                   range=[math.log10(x0), math.log10(x1)])  # fmt: skip
    up = axis("output tokens/s", type="log", dtick="D2")
    return figure_of(data, {"xaxis": across, "yaxis": up, "shapes": _shapes(parts), "legend": below(), "showlegend": alone,
                          "annotations": _notes(parts, ridge, wall), "margin": {"l": 56, "r": 10, "t": 26, "b": 46}})  # fmt: skip


_HOW = (
    "Hatched outline: predicted, with its interval as a whisker. Solid: measured, mean and 95 % interval over the trials. "
    "Diamond: the articles' arithmetic, uncorrected. ▲ suspect and ✕ invalid points carry their sign. "
)


def _versus_chart(shown: Shown) -> Chart:
    better = "Higher is better." if shown.higher_is_better else "Lower is better."
    return Chart(shown.name, _HOW + better, lambda runs: versus(runs, shown))


CHARTS: dict[str, Chart] = {f"chart-{shown.key}": _versus_chart(shown) for shown in HEADLINES} | {
    "chart-plane": Chart(
        "Throughput over batch size",
        "Both axes are logarithmic. Left of the ridge a step waits for memory, so a larger batch is almost free; right of "
        "it arithmetic binds and a larger batch only makes each answer slower. Beyond the wall the KV cache does not fit. "
        "Points stand at the batch the server really ran. The roof is that of decoding alone; a measured point also pays "
        "for reading its prompts, so it lies below. One above the roof puts the measurement or the hardware row in doubt.",
        plane,
    )
}
