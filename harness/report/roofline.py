"""Roofline: what each phase of each point reaches, under what bandwidth and arithmetic allow at its intensity."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from harness import units
from harness.records import NAN
from harness.report import charts, view
from harness.report.section import Block, Charts
from harness.report.tables import Cell, Table, column, heading, run_cell, run_column, stamp
from harness.report.view import Json, Key, RunView

READ = (
    "Both axes are logarithmic. The sloped line is what memory bandwidth allows at each arithmetic intensity (FLOP done for "
    "each byte moved), the level lines what the arithmetic units can do in each number format; both are the rates of the "
    "hardware row. A point is a phase: circles decode steps, squares the prefill of one prompt alone. Its height is the "
    "work that the model needs over the time measured, so work done twice or thrown away does not count. Points beneath "
    "the slope wait for memory, those beneath the level for arithmetic; the distance to the line above is what is lost."
)
NARROW = ("fp32", "tf32", "bf16", "fp16", "fp8", "int8", "fp4", "int4")


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of one point: the least bytes and FLOPs it needs, and the seconds it was measured to take."""

    run: int
    key: Key
    point: Json
    name: str
    moved: float
    flops: float
    seconds: float

    @property
    def intensity(self) -> float:
        return self.flops / self.moved

    @property
    def achieved(self) -> float:
        return self.flops / self.seconds


@dataclass(frozen=True, slots=True)
class Roof:
    """Bytes/s and FLOP/s of all accelerators of a run together; `dtype` is what its matrices are computed in."""

    bytes_per_s: float
    flops: dict[str, float]
    dtype: str

    @property
    def peak(self) -> float:
        return self.flops.get(self.dtype, NAN)

    def at(self, intensity: float) -> float:
        return min(self.bytes_per_s * intensity, self.peak)


def roof_of(run: RunView) -> Roof | None:
    """None where the hardware is not known."""
    row = view.child(run.summary, "hardware")
    many = view.num(run.summary, "worth", "accelerators")
    many = many if many >= 1 else 1.0
    flops = {name: many * view.num(row, "flops", name) for name in NARROW if view.num(row, "flops", name) > 0}
    if not flops or not view.num(row, "bytes_per_s") > 0:
        return None
    stored = view.text(run.summary, "architecture", "dtype")
    wide = next((name for name in ("bf16", "fp16", "fp32") if name in flops), next(iter(flops)))
    return Roof(many * view.num(row, "bytes_per_s"), flops, stored if stored in flops else wide)


def phases(runs: Sequence[RunView]) -> Iterator[Phase]:
    """Decode steps of all points; the prefill only of single requests, where no other prompt is in the time."""
    for k, _, key, point in view.rows(runs):
        for name, metric in (("decode", "itl_s"), ("prefill", "ttft_s")):
            work = view.child(point, "predicted", "work", name)
            moved, flops = view.num(work, "bytes"), view.num(work, "flops")
            seconds = view.measured(point, metric).value
            alone = view.num(point, "batch_size") == 1
            if moved > 0 and flops > 0 and seconds > 0 and (name == "decode" or alone):
                yield Phase(k, key, point, name, moved, flops, seconds)


def section(runs: Sequence[RunView]) -> Charts:
    found, roofs = list(phases(runs)), [roof_of(run) for run in runs]
    found = [phase for phase in found if roofs[phase.run]]
    otherwise = "Not drawn: it needs the hardware, the model's configuration, and at least one measured time."
    if not found:
        return Charts([], otherwise=otherwise)
    block = Block("chart-roofline", "Roofline", _finding(found, roofs), READ, _table(runs, found, roofs),
                  _figure(runs, found, roofs))  # fmt: skip
    return Charts([block], tall=True, otherwise=otherwise)


def _finding(found: Sequence[Phase], roofs: Sequence[Roof | None]) -> str:
    best = max(found, key=lambda phase: phase.achieved if phase.name == "decode" else 0.0)
    roof = roofs[best.run]
    assert roof
    mbu, mfu = best.moved / best.seconds / roof.bytes_per_s, best.achieved / roof.peak
    text = f"Decoding at {view.marked(best.key, best.point, full=True)} moves {units.percent(mbu, 2)} of the memory bandwidth and does {units.percent(mfu, 2)} of the peak arithmetic"
    alone = next((phase for phase in found if phase.name == "prefill" and phase.run == best.run), None)
    if alone is None:
        return text + "; the prefill is not shown, since no request was measured alone."
    return text + f"; the prefill of one prompt does {units.percent(alone.achieved / roof.peak, 2)}."


def _figure(runs: Sequence[RunView], found: Sequence[Phase], roofs: Sequence[Roof | None]) -> charts.Figure:
    names, alone = view.labels(runs), len(runs) == 1
    xs = [phase.intensity for phase in found]
    known = [roof for roof in roofs if roof]
    ridges = [roof.peak / roof.bytes_per_s for roof in known]
    x0, x1 = min(xs) / 3, max([*xs, *ridges]) * 3
    data: list[Json] = []
    for k, roof in enumerate(roofs):
        if roof and roof not in roofs[:k]:
            data += _lines(roof, x0, x1, charts.colour("predicted") if alone else charts.run_colour(k), names[k])
    for k in range(len(runs)):
        for name, symbol, ink in (("decode", "circle", "measured"), ("prefill", "square", "second")):
            mine = [phase for phase in found if phase.run == k and phase.name == name]
            if mine:
                data.append({
                    "type": "scatter", "mode": "markers+text", "textposition": "bottom right", "text": [view.marked(p.key, p.point) for p in mine],
                    "textfont": {"size": 11, "color": charts.colour("muted")}, "name": charts.inert(view.joined(name.capitalize(), names[k])),
                    "x": [p.intensity for p in mine], "y": [p.achieved / 1e12 for p in mine], "hoverinfo": "text",
                    "hovertext": [_hover(p, roof_, names[k]) for p in mine if (roof_ := roofs[k])], "cliponaxis": False,
                    "marker": {"symbol": symbol, "size": 10, "color": charts.colour(ink) if alone else charts.run_colour(k),
                               "line": {"width": 1.2, "color": charts.colour("paper")}},
                })  # fmt: skip
    return charts.figure_of(data, {
        "xaxis": charts.axis("FLOP for each byte moved", type="log", range=[math.log10(x0), math.log10(x1)], dtick=1),
        "yaxis": charts.axis("TFLOP/s", type="log", dtick=1), "showlegend": True, "legend": charts.below(),
        "annotations": _level_names(known[0], x1), "margin": {"l": 56, "r": 10, "t": 10, "b": 46},
    })  # fmt: skip


def levels(roof: Roof) -> dict[float, str]:
    """FLOP/s -> the formats that have it, "bf16, fp16"."""
    found: dict[float, str] = {}
    for dtype, flops in roof.flops.items():
        found[flops] = f"{found[flops]}, {dtype}" if flops in found else dtype
    return found


def _lines(roof: Roof, x0: float, x1: float, ink: str, name: str) -> Iterator[Json]:
    """The roof of the format in use in bold, the levels of the others thin."""
    ridge = roof.peak / roof.bytes_per_s
    for flops, dtypes in levels(roof).items():
        bold = flops == roof.peak
        bend = flops / roof.bytes_per_s
        xs = [x0, ridge, x1] if bold else [bend, max(x1, bend)]
        said = f"{dtypes}: {units.flops(flops)}, ridge at {units.number(bend, 3)} FLOP/byte, {units.bandwidth(roof.bytes_per_s)}"
        if bold or bend < x1:
            yield {
                "type": "scatter", "mode": "lines", "name": charts.inert(view.joined(f"Roof, {dtypes}", name)),
                "x": xs, "y": [min(roof.bytes_per_s * x, flops) / 1e12 for x in xs], "hoverinfo": "text",
                "hovertext": [charts.tooltip([name, said])] * len(xs), "showlegend": bold,
                "line": {"color": ink, "width": 2.4 if bold else 1.1, "dash": "solid" if bold else "dot"},
            }  # fmt: skip


def _level_names(roof: Roof, x1: float) -> list[Json]:
    """The formats at the right end of their levels.  An annotation on a log axis stands at the logarithm."""
    return [{"x": math.log10(x1), "xanchor": "right", "y": math.log10(flops / 1e12), "yanchor": "bottom", "showarrow": False, "text": charts.inert(dtypes),
             "font": {"size": 11, "color": charts.colour("muted")}} for flops, dtypes in levels(roof).items() if flops / roof.bytes_per_s < x1]  # fmt: skip


def _hover(phase: Phase, roof: Roof, name: str) -> str:
    return charts.tooltip([
        view.joined(name, view.marked(phase.key, phase.point, full=True), phase.name),
        f"{units.size(phase.moved)} and {units.amount(phase.flops)}FLOP in {units.seconds(phase.seconds)}",
        f"MBU {units.percent(phase.moved / phase.seconds / roof.bytes_per_s, 3)}, MFU {units.percent(phase.achieved / roof.peak, 3)}",
    ])  # fmt: skip


def _table(runs: Sequence[RunView], found: Sequence[Phase], roofs: Sequence[Roof | None]) -> Table:
    names = view.labels(runs)
    head = [*run_column(runs), column("Point"), column("Phase", style="left"), column("Moves"), column("Does"), column("FLOP/byte"), column("Measured"),
             column("Reaches"), column("MBU", small="of bandwidth"), column("MFU", small="of peak"), column("Of its roof"), column("Validity")]  # fmt: skip
    body = []
    for phase in found:
        roof = roofs[phase.run]
        assert roof
        body.append([
            *run_cell(names[phase.run]), heading(view.key_label(phase.key, full=True)), Cell(phase.name, style="left"),
            Cell(units.size(phase.moved, 3)), Cell(units.amount(phase.flops, 3) + "FLOP"), Cell(units.number(phase.intensity, 3)),
            Cell(units.seconds(phase.seconds)), Cell(units.flops(phase.achieved, 3)),
            Cell(units.percent(phase.moved / phase.seconds / roof.bytes_per_s, 3)), Cell(units.percent(phase.achieved / roof.peak, 3)),
            Cell(units.percent(phase.achieved / roof.at(phase.intensity), 3)), stamp(view.verdict_of(phase.point)),
        ])  # fmt: skip
    notes = [
        f"Peak in {roof.dtype}: {units.flops(roof.peak)}; memory {units.bandwidth(roof.bytes_per_s)}."
        for k, roof in enumerate(roofs)
        if roof and roof not in roofs[:k]
    ]
    return Table("table-roofline", "Work, time and utilisation of each phase", [head], body, notes)
