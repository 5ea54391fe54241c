"""Runs -> tables of text.  A table is rows of cells; the template only lays them out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from harness import definitions, units
from harness.records import NAN
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


def figure(text: str, small: str = "", missing: str = units.MISSING) -> Cell:
    """A cell with a number; a missing one is greyed and says `missing`, not left empty."""
    return Cell(missing, style="missing") if text == units.MISSING else Cell(text, small)


def plain(text: str) -> Cell:
    """A cell with a number that may well be missing: a dash."""
    return Cell("–" if text == units.MISSING else text)


def run_column(runs: Sequence[RunView]) -> Row:
    """The heading of the column that tells several runs apart."""
    return [column("Run")] if len(runs) > 1 else []


def run_cell(name: str) -> Row:
    """What stands in it; a single run has no name."""
    return [heading(name)] if name else []


def stamp(word: str) -> Cell:
    return Cell(f"{VERDICTS[word]} {word}", style=word)


def _interval(estimate: view.Estimate, show: Callable[[float | None], str]) -> str:
    return units.interval(estimate.low, estimate.high, show)


def _span(estimate: view.Estimate, shown: Shown) -> str:
    """The interval of a headline; the unit of a rate is not said twice."""
    return _interval(estimate, units.number if shown.higher_is_better else shown.show)


def versus_table(runs: Sequence[RunView], shown: Shown) -> Table:
    """One row per point and run: what its chart shows, in figures."""
    head = [*run_column(runs), column(view.load_word(runs)), column("Measured", small="mean, 95 % interval"),
            column("Predicted", small="interval"), column("Measured / predicted"), column("Seed's arithmetic"),
            column("Validity"), column("Errors", style="wrap")]  # fmt: skip
    body = []
    for _, name, key, point in view.rows(runs):
        was, theory = view.measured(point, shown.key), view.predicted(point, shown.key)
        body.append([
            *run_cell(name), heading(view.key_label(key)), figure(shown.show(was.value), _span(was, shown)),
            figure(shown.show(theory.value), _span(theory, shown), "none"),
            Cell(units.ratio(view.quotient(point, shown.key)) if theory.known and was.known else "–"),
            plain(shown.show(view.seed_value(point, shown.key))), stamp(view.verdict_of(point)),
            Cell(view.failures(point) or "none", style="wrap"),
        ])  # fmt: skip
    return Table(f"table-{shown.key}", f"{shown.name}: measured and predicted", [head], body)


def plane_table(runs: Sequence[RunView]) -> Table:
    """Each measured point against the roof over it."""
    head = [*run_column(runs), column("Asked"), column("Batch really ran", small="mean, largest"), column("Measured"),
            column("Roof at that batch"), column("Share of the roof"), column("Validity")]  # fmt: skip
    body = []
    for k, name, key, point in view.rows(runs):
        roof = view.roof_at(view.child(runs[k].summary, "plane"), view.batch_of(point))
        was = view.num(point, "output_tokens_per_s")
        body.append([
            *run_cell(name), heading(view.key_label(key, full=True)), _ran(point), figure(units.rate(was, "tokens")),
            figure(units.rate(roof, "tokens"), missing="none"), plain(units.percent(was / roof if roof > 0 else NAN, 3)),
            stamp(view.verdict_of(point)),
        ])  # fmt: skip
    return Table("table-plane", "Throughput at each batch size, and the roof over it", [head], body)


def _ran(point: Json) -> Cell:
    """The batch that the server really ran."""
    most = view.num(point, "batch_ran", "max")
    small = f"largest {units.count(most)}" if math.isfinite(most) else ""
    return figure(units.number(view.num(point, "batch_ran", "mean")), small, "not known")


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


def _mean(columns: list[Json], name: str, key: str, show: Callable[[float | None], str]) -> Row:
    def cell(point: Json) -> Cell:
        was = view.measured(point, key)
        return figure(show(was.value), _interval(was, show))

    return _across(name, columns, cell)


def _time_rows(columns: list[Json], key: str, name: str) -> list[Row]:
    rows = [_across(name, columns, None), _mean(columns, "mean", key, units.seconds)]
    rows += [_across(q, columns, partial(_percentile, key=key, name=q)) for q in ("p50", "p90", "p95", "p99")]
    rows.append(_across("samples (n)", columns, lambda p: figure(units.count(view.num(p, key, "n")))))
    return rows + _theory_rows(columns, key, units.seconds)


def _theory_rows(columns: list[Json], key: str, show: Callable[[float | None], str]) -> list[Row]:
    if not any(view.predicted(p, key).known for p in columns):
        return []

    def theory(point: Json) -> Cell:
        found = view.predicted(point, key)
        return figure(show(found.value), _interval(found, show), "none")

    return [_across("predicted", columns, theory),
            _across("measured / predicted", columns, lambda p: plain(units.ratio(view.quotient(p, key))))]  # fmt: skip


def _rate_rows(columns: list[Json]) -> list[Row]:
    rows = [_across("Throughput, per second", columns, None),
            _mean(columns, "output tokens", "output_tokens_per_s", units.number)]  # fmt: skip
    rows += _theory_rows(columns, "output_tokens_per_s", units.number)
    for name, key in (("all tokens", "total_tokens_per_s"), ("requests", "requests_per_s")):
        rows.append(_across(name, columns, partial(_told, key=key, show=units.number)))
    return rows


def _load_rows(columns: list[Json]) -> list[Row]:
    def ran(point: Json) -> Cell:
        return replace(_ran(point), title=view.text(point, "batch_ran", "source"))

    def failed(point: Json) -> Cell:
        said = view.failures(point)
        return Cell(units.count(view.num(point, "errors")), said, "failed" if said else "")

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
            verb = "said" if said.get("imported") else "reckons"
            caption = " · ".join(filter(None, (name, definitions.load_of(point), f"as {said['version']} {verb}")))
            head = [[column(text) for text in ("Figure", "Ridgeline", said["definitions"], "difference")]]
            body = [[heading(row[0]), *(figure(text) for text in row[1:])] for row in definitions.rows(point)]
            stamps = "As that tool printed them, beside what its stamps give here"
            source = stamps if said.get("imported") else "Recomputed from the stored stamps"
            notes = [f"{source}; `ridgeline definitions` explains each difference."]
            found.append(Table(f"table-definitions-{len(found)}", caption, head, body, notes if not i else []))
    return found


def terms_table(run: RunView, shown: Shown, name: str) -> Table | None:
    """The named terms of a predicted time, one row per point, beside what was measured.  A rate has no such parts."""
    if shown.higher_is_better:
        return None
    rows = [(key, point) for key, point in view.keyed(run).items() if view.predicted(point, shown.key).known]
    named = (str(term) for _, p in rows for term in view.child(p, "predicted", shown.key, "terms"))
    names = list(dict.fromkeys(named))[:12]
    if not rows or not names:
        return None
    head = [column(view.load_word([run])), *(column(view.shorten(term, 60)) for term in names),
            column("Predicted", small="interval"), column("Measured"), column("Limited by", style="left")]  # fmt: skip
    body = []
    for key, point in rows:
        entry, theory = view.child(point, "predicted", shown.key), view.predicted(point, shown.key)
        terms = [view.num(entry, "terms", term) for term in names]
        limit = view.text(entry, "limit") or view.text(point, "predicted", "limit")
        shares = [units.percent(v / theory.value, 2) if theory.value > 0 else "" for v in terms]
        body.append([
            heading(view.key_label(key)),
            *(Cell(shown.show(v), share) if math.isfinite(v) else Cell("–") for v, share in zip(terms, shares, strict=True)),
            Cell(shown.show(theory.value), _span(theory, shown)), figure(shown.show(view.measured(point, shown.key).value)),
            Cell(view.limit_word(limit) or "–", style="left"),
        ])  # fmt: skip
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
    spans = (s - (found[k - 1][1] if k else 0.0) for k, (name, s) in enumerate(found) if "weight" in name)
    took = next(spans, math.nan)
    real = f"it took {units.seconds(took)}" if math.isfinite(took) else "the engine did not tell how long it took"
    if math.isfinite(theory):
        known = math.isfinite(weight) and math.isfinite(disk)
        how = f" ({units.size(weight)} at {units.bandwidth(disk)})" if known else ""
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
                where = view.joined(name, place) or "whole run"
                groups.setdefault(group, []).append((where, view.text(entry, "saw")))
    worst = list(reversed(view.SEVERITIES))
    ordered = sorted(groups.items(), key=lambda pair: (worst.index(pair[0][0]), pair[0][1]))
    return [Shared(g[0], g[1], saw[:30], g[2], g[3], max(0, len(saw) - 30)) for g, saw in ordered]
