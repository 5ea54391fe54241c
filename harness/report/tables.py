"""Runs -> tables of text.  A table is rows of cells; the template only lays them out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from harness import definitions, units
from harness.report import view
from harness.report.view import SAMPLES_NEEDED, VERDICTS, Json, Key, RunView, Shown


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell.  `scope` makes it a heading; `style` is a class of the style sheet; `small` stands beneath the text."""

    text: str
    small: str = ""
    style: str = ""
    title: str = ""
    scope: str = ""
    span: int = 1
    rows: int = 1


Row = list[Cell]


@dataclass(frozen=True, slots=True)
class Table:
    id: str
    caption: str
    head: list[Row]
    body: list[Row]
    notes: list[str] = field(default_factory=list)


def column(text: str, span: int = 1, small: str = "", style: str = "") -> Cell:
    return Cell(text, small, style, scope="colgroup" if span > 1 else "col", span=span)


def heading(text: str, small: str = "") -> Cell:
    return Cell(text, small, scope="row")


def figure(text: str, small: str = "") -> Cell:
    """A cell with a number; a missing one is greyed, not left empty."""
    return Cell(text, small, "missing" if text == units.MISSING else "")


def stamp(word: str) -> Cell:
    return Cell(f"{VERDICTS[word]} {word}", style=word)


def _interval(estimate: view.Estimate, show: Callable[[float | None], str]) -> str:
    return units.interval(estimate.low, estimate.high, show)


def _span(estimate: view.Estimate, shown: Shown) -> str:
    """The interval of a headline; the unit of a rate is not said twice."""
    return _interval(estimate, units.number if shown.higher_is_better else shown.show)


def versus_table(runs: Sequence[RunView], shown: Shown) -> Table:
    """One row per point and run: what its chart shows, in figures."""
    many, names = len(runs) > 1, view.labels(runs)
    head = [column("Run")] if many else []
    head += [
        column(view.load_word(runs)),
        column("Measured", small="mean, 95 % interval"),
        column("Predicted", small="interval"),
        column("Measured / predicted"),
        column("Seed's arithmetic"),
        column("Validity"),
        column("Errors", style="wrap"),
    ]
    body = []
    for place, run in enumerate(runs):
        for key, point in view.keyed(run).items():
            was, theory = view.measured(point, shown.key), view.predicted(point, shown.key)
            row = [heading(names[place])] if many else []
            row += [
                heading(view.key_label(key)),
                figure(shown.show(was.value), _span(was, shown)),
                Cell(shown.show(theory.value), _span(theory, shown)) if theory.known else Cell("none", style="missing"),
                Cell(units.ratio(view.quotient(point, shown.key)) if theory.known and was.known else "–"),
                Cell(shown.show(seed) if math.isfinite(seed := view.seed_value(point, shown.key)) else "–"),
                stamp(view.verdict_of(point)),
                Cell(view.failures(point) or "none", style="wrap"),
            ]
            body.append(row)
    return Table(f"table-{shown.key}", f"{shown.name}: measured and predicted", [head], body)


def plane_table(runs: Sequence[RunView]) -> Table:
    """Each measured point against the roof over it."""
    many, names = len(runs) > 1, view.labels(runs)
    head = [column("Run")] if many else []
    head += [
        column("Asked"),
        column("Batch really ran", small="mean, largest"),
        column("Measured"),
        column("Roof at that batch"),
        column("Share of the roof"),
        column("Validity"),
    ]
    body = []
    for place, run in enumerate(runs):
        plane = view.child(run.summary, "plane")
        for key, point in view.keyed(run).items():
            ran, most = view.num(point, "batch_ran", "mean"), view.num(point, "batch_ran", "max")
            roof, was = view.roof_at(plane, view.batch_of(point)), view.num(point, "output_tokens_per_s")
            row = [heading(names[place])] if many else []
            row += [
                heading(view.key_label(key, full=True)),
                Cell(units.number(ran), f"largest {units.count(most)}" if math.isfinite(most) else "")
                if math.isfinite(ran)
                else Cell("not known", style="missing"),
                figure(units.rate(was, "tokens")),
                Cell(units.rate(roof, "tokens")) if math.isfinite(roof) else Cell("none", style="missing"),
                Cell(units.percent(was / roof, 3) if roof > 0 and math.isfinite(was) else "–"),
                stamp(view.verdict_of(point)),
            ]
            body.append(row)
    return Table("table-plane", "Throughput at each batch size, and the roof over it", [head], body)


# --- every figure -------------------------------------------------------------------------------------------------

_TIMES = (
    ("ttft_s", "Time to first token (TTFT)"),
    ("itl_s", "Time between tokens (ITL)"),
    ("tpot_s", "Time per output token (TPOT)"),
    ("e2e_s", "End-to-end time (E2E)"),
    ("chunk_gap_s", "Gap between network chunks"),
)


def _percentile(point: Json, key: str, name: str) -> Cell:
    value, samples = view.num(point, key, name), view.num(point, key, "n")
    needed = SAMPLES_NEEDED.get(name, 0)
    if math.isfinite(value) and not samples >= needed:
        return Cell(units.seconds(value) + " †", style="thin", title=f"n too small: {units.count(samples)} of {needed}")
    return figure(units.seconds(value))


def _told(point: Json, key: str, show: Callable[[float | None], str]) -> Cell:
    return figure(show(view.num(point, key)))


def _time_rows(columns: list[Json], key: str, name: str) -> list[Row]:
    rows = [_across(name, columns, None)]
    rows.append(
        _across(
            "mean",
            columns,
            lambda p: figure(
                units.seconds(view.measured(p, key).value), _interval(view.measured(p, key), units.seconds)
            ),
        )
    )
    rows += [_across(q, columns, partial(_percentile, key=key, name=q)) for q in ("p50", "p90", "p95", "p99")]
    rows.append(_across("samples (n)", columns, lambda p: figure(units.count(view.num(p, key, "n")))))
    return rows + _theory_rows(columns, key, units.seconds)


def _theory_rows(columns: list[Json], key: str, show: Callable[[float | None], str]) -> list[Row]:
    if not any(view.predicted(p, key).known for p in columns):
        return []
    return [
        _across(
            "predicted",
            columns,
            lambda p: (
                Cell(show(view.predicted(p, key).value), _interval(view.predicted(p, key), show))
                if view.predicted(p, key).known
                else Cell("none", style="missing")
            ),
        ),
        _across(
            "measured / predicted",
            columns,
            lambda p: Cell(units.ratio(q) if math.isfinite(q := view.quotient(p, key)) else "–"),
        ),
    ]


def _rate_rows(columns: list[Json]) -> list[Row]:
    def output(point: Json) -> Cell:
        was = view.measured(point, "output_tokens_per_s")
        return figure(units.number(was.value), _interval(was, units.number))

    rows = [_across("Throughput, per second", columns, None), _across("output tokens", columns, output)]
    rows += _theory_rows(columns, "output_tokens_per_s", units.number)
    rows.append(_across("all tokens", columns, lambda p: figure(units.number(view.num(p, "total_tokens_per_s")))))
    rows.append(_across("requests", columns, lambda p: figure(units.number(view.num(p, "requests_per_s")))))
    return rows


def _load_rows(columns: list[Json]) -> list[Row]:
    def ran(point: Json) -> Cell:
        mean, most = view.num(point, "batch_ran", "mean"), view.num(point, "batch_ran", "max")
        if not math.isfinite(mean):
            return Cell("not known", style="missing")
        small = f"largest {units.count(most)}" if math.isfinite(most) else ""
        return Cell(units.number(mean), small, title=view.text(point, "batch_ran", "source"))

    def failed(point: Json) -> Cell:
        return Cell(
            units.count(view.num(point, "errors")), view.failures(point), "failed" if view.failures(point) else ""
        )

    rows = [_across("Load", columns, None), _across("batch really ran", columns, ran)]
    for name, key in (("trials", "trials"), ("requests", "requests")):
        rows.append(_across(name, columns, partial(_told, key=key, show=units.count)))
    rows.append(_across("errors", columns, failed))
    for name, key in (("input tokens", "input_tokens"), ("output tokens", "output_tokens")):
        rows.append(_across(name, columns, partial(_told, key=key, show=units.number)))
    return rows


def _across(name: str, columns: list[Json], cell: Callable[[Json], Cell] | None) -> Row:
    """One row of a table whose columns are points; without `cell` the heading of a group of rows."""
    if cell is None:
        return [Cell(name, scope="rowgroup", span=len(columns) + 1, style="group")]
    return [heading(name), *(cell(point) if point else Cell("–") for point in columns)]


def figures_table(runs: Sequence[RunView]) -> Table:
    """Every figure of every point: a column per point, for several runs a column per run beneath each batch size."""
    found, names = [view.keyed(run) for run in runs], view.labels(runs)
    cells: list[tuple[Key, int]] = [
        (key, k) for key in view.all_keys(runs) for k, run in enumerate(found) if key in run
    ]
    columns = [found[k][key] for key, k in cells]
    many = len(runs) > 1
    tops = [column(view.key_label(key), sum(1 for other, _ in cells if other == key)) for key in view.all_keys(runs)]
    head = [[Cell(view.load_word(runs), scope="col"), *tops]]
    if many:
        head.append([Cell("Run", scope="col"), *(column(names[k]) for _, k in cells)])
    marks = [stamp(view.verdict_of(point)) for point in columns]
    head.append([Cell("Validity", scope="col"), *(column(mark.text, style=mark.style) for mark in marks)])
    body = _load_rows(columns)
    for key, name in _TIMES:
        body += _time_rows(columns, key, name)
    body += _rate_rows(columns)
    notes = ["Times are of single requests (ITL: of single gaps); the mean's 95 % interval is over trials."]
    if any(cell.style == "thin" for row in body for cell in row):
        needed = ", ".join(f"{name} {n}" for name, n in SAMPLES_NEEDED.items())
        notes.append(f"† n too small: so few samples do not pin this percentile down. Needed: {needed}.")
    return Table("table-figures", "Every figure of every point", head, body, notes)


# --- where the time goes ------------------------------------------------------------------------------------------


def definitions_tables(runs: Sequence[RunView]) -> list[Table]:
    """Each point under another tool's formulas, where the report was asked for them."""
    found: list[Table] = []
    for run, name in zip(runs, view.labels(runs), strict=True):
        said = run.summary.get("definitions") or {}
        for i, point in enumerate(said.get("points", [])):
            load = f"batch size {point['batch_size']}" if point["batch_size"] else f"{point['rate']:g} requests/s"
            caption = " · ".join(
                filter(
                    None,
                    [
                        name if len(runs) > 1 else "",
                        load,
                        f"as {said['version']} {'said' if said.get('imported') else 'reckons'}",
                    ],
                )
            )
            head = [[column(text) for text in ("Figure", "Ridgeline", said["definitions"], "difference")]]
            body = [[heading(row[0]), *(figure(text) for text in row[1:])] for row in definitions.rows(point)]
            source = (
                "As that tool printed them, beside what its stamps give here"
                if said.get("imported")
                else "Recomputed from the stored stamps"
            )
            notes = [f"{source}; `ridgeline definitions` explains each difference."]
            found.append(Table(f"table-definitions-{len(found)}", caption, head, body, notes if not i else []))
    return found


def terms_table(run: RunView, shown: Shown, name: str) -> Table | None:
    """The named terms of a predicted time, one row per point, beside what was measured.  A rate has no such parts."""
    if shown.higher_is_better:
        return None
    rows = [(key, point) for key, point in view.keyed(run).items() if view.predicted(point, shown.key).known]
    names = list(dict.fromkeys(str(term) for _, p in rows for term in view.child(p, "predicted", shown.key, "terms")))[
        :12
    ]
    if not rows or not names:
        return None
    head = [
        column(view.load_word([run])),
        *(column(view.shorten(term, 60)) for term in names),
        column("Predicted", small="interval"),
        column("Measured"),
        column("Limited by", style="left"),
    ]
    body = []
    for key, point in rows:
        entry, theory = view.child(point, "predicted", shown.key), view.predicted(point, shown.key)
        terms = [view.num(entry, "terms", term) for term in names]
        limit = view.text(entry, "limit") or view.text(point, "predicted", "limit")
        body.append(
            [
                heading(view.key_label(key)),
                *(
                    Cell(shown.show(v), units.percent(v / theory.value, 2) if theory.value > 0 else "")
                    if math.isfinite(v)
                    else Cell("–")
                    for v in terms
                ),
                Cell(shown.show(theory.value), _span(theory, shown)),
                figure(shown.show(view.measured(point, shown.key).value)),
                Cell(view.limit_word(limit) or "–", style="left"),
            ]
        )
    suffix = f", {name}" if name else ""
    return Table("", f"{shown.name}: the terms of its prediction{suffix}", [head], body)


def because(run: RunView, shown: Shown) -> list[tuple[str, str]]:
    """(point, why) of each prediction that says why."""
    found = (
        (view.key_label(key, full=True), view.text(point, "predicted", shown.key, "because"))
        for key, point in view.keyed(run).items()
    )
    return [(point, why) for point, why in found if why]


# --- the engine's start -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of the start: when it was over, how long it took, and its place on a bar 100 wide."""

    name: str
    until: str
    took: str
    left: float
    width: float


def stages(run: RunView) -> list[Stage]:
    found = [
        (view.text(stage, "name") or "?", view.num(stage, "s")) for stage in view.items(run.summary, "start", "stages")
    ]
    whole = max((s for _, s in found if math.isfinite(s)), default=0.0)
    shown, since = [], 0.0
    for name, until in found[:40]:
        if not math.isfinite(until):
            shown.append(Stage(name, units.MISSING, units.MISSING, 0, 0))
            continue
        took, left = max(until - since, 0.0), min(since, until)
        bar = [round(100 * v / whole, 2) if whole > 0 else 0.0 for v in (left, took)]
        shown.append(Stage(name, units.seconds(until), units.seconds(took), bar[0], bar[1]))
        since = until
    return shown


def load_sentence(run: RunView) -> str:
    """The load time beside weight bytes over disk bandwidth."""
    start = view.child(run.summary, "start")
    weight, disk, theory = (view.num(start, key) for key in ("weight_bytes", "disk_bytes_per_s", "predicted_load_s"))
    found = [(view.text(stage, "name"), view.num(stage, "s")) for stage in view.items(start, "stages")]
    took = next(
        (s - (found[k - 1][1] if k else 0.0) for k, (name, s) in enumerate(found) if "weight" in name), math.nan
    )
    real = f"it took {units.seconds(took)}" if math.isfinite(took) else "the engine did not tell how long it took"
    if math.isfinite(theory):
        how = (
            f" ({units.size(weight)} at {units.bandwidth(disk)})"
            if math.isfinite(weight) and math.isfinite(disk)
            else ""
        )
        versus = f", {units.ratio(took / theory)} that" if math.isfinite(took) and theory > 0 else ""
        return f"Reading the weights from disk should take {units.seconds(theory)}{how}; {real}{versus}."
    if math.isfinite(took):
        return f"Loading the weights took {units.seconds(took)}; the disk's bandwidth is not known, so there is no prediction."
    return ""


# --- findings -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shared:
    """A finding once, with all the places where it was seen."""

    severity: str
    code: str
    saw: list[tuple[str, str]]
    why: str
    do: str
    more: int = 0


def findings(runs: Sequence[RunView]) -> list[Shared]:
    """The worst first; the same advice given for several points is said once."""
    groups: dict[tuple[str, str, str, str], list[tuple[str, str]]] = {}
    names = view.labels(runs)
    for name, run in zip(names, runs, strict=True):
        places = [("", view.items(run.summary, "findings"))]
        places += [
            (view.key_label(key, full=True), view.items(point, "findings")) for key, point in view.keyed(run).items()
        ]
        for place, found in places:
            for entry in found:
                severity = view.text(entry, "severity")
                severity = severity if severity in view.SEVERITIES else "suspect"
                group = (severity, view.text(entry, "code"), view.text(entry, "why"), view.text(entry, "do"))
                where = ", ".join(filter(None, (name, place))) or "whole run"
                groups.setdefault(group, []).append((where, view.text(entry, "saw")))
    worst = list(reversed(view.SEVERITIES))
    ordered = sorted(groups.items(), key=lambda pair: (worst.index(pair[0][0]), pair[0][1]))
    return [Shared(g[0], g[1], saw[:30], g[2], g[3], max(0, len(saw) - 30)) for g, saw in ordered]
