"""The head of the page: what was run, and the verdict with its key figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from harness import units
from harness.report import decision, limits, view
from harness.report.tables import Cell, Table, column, figure, heading, stamp
from harness.report.view import HEADLINES, Json, RunView, Shown

_MODES = {
    "wave": "waves of requests released together",
    "closed": "a constant number of requests in flight",
    "open": "requests at a given rate",
}


_STATES = {
    "interrupted": "The run was stopped before its end. Everything below is of what was recorded until then.",
    "incomplete": "The run is incomplete: it ended without being closed. Everything below is of what had reached the disk.",
}


@dataclass(frozen=True, slots=True)
class KeyFigure:
    name: str
    value: str
    spread: str
    theory: str


@dataclass(frozen=True, slots=True)
class Panel:
    """The figures of one point that is worth a headline, with its stamp and its errors."""

    title: str
    where: str
    word: str
    figures: list[KeyFigure]
    limit: str
    failures: str
    also: str = ""


def verdict(summary: Mapping[str, Any]) -> str:
    """The verdict of a run in one plain sentence, as its summary states it."""
    return view.text(summary, "verdict_sentence") or "This run has no verdict."


def section(runs: Sequence[RunView]) -> dict[str, Any]:
    named = zip(runs, view.labels(runs), strict=True)
    return {"runs": [_verdict_of(run, name) for run, name in named], "glance": _glance(runs) if len(runs) > 1 else None}


def title(runs: Sequence[RunView]) -> str:
    models = list(dict.fromkeys(view.text(run.summary, "model") or "unknown model" for run in runs))
    machines = list(dict.fromkeys(view.text(run.summary, "hardware", "name") for run in runs))
    if not runs:
        return "No runs"
    what = models[0] if len(models) == 1 else f"{len(models)} models"
    where = f" on {machines[0]}" if len(machines) == 1 and machines[0] else ""
    return view.shorten(what, 120) + view.shorten(where, 120) + (f": {len(runs)} runs" if len(runs) > 1 else "")


def meta(runs: Sequence[RunView]) -> list[str]:
    """What was run, in a few words; for several runs only what they share."""
    described = [_described(run) for run in runs]
    return [part for part in described[0] if all(part in other for other in described)] if described else []


def _described(run: RunView) -> list[str]:
    summary, load = run.summary, view.child(run.summary, "workload")
    lengths = [units.count(view.num(load, key)) for key in ("input_tokens", "output_tokens")]
    fixed = not (load.get("trace") or load.get("prompts") or (load.get("turns") or 1) > 1)
    trials, started = view.num(load, "trials"), view.text(run.run, "started_at")
    utc = " UTC" if started.endswith("+00:00") else ""
    parts = (
        f"{view.text(summary, 'engine', 'kind')} {view.text(summary, 'engine', 'version')}".strip(),
        f"{lengths[0]} tokens in, {lengths[1]} out" if units.MISSING not in lengths and fixed else "",
        _MODES.get(view.text(load, "mode"), view.text(load, "mode")),
        "stamped in the openai client" if view.text(load, "transport") == "openai" else "",
        f"{units.count(trials)} trial{'' if trials == 1 else 's'} a point" if math.isfinite(trials) else "",
        started.replace("T", " ").removesuffix("+00:00") + utc if utc else started,
    )
    return [part for part in parts if part]


def _verdict_of(run: RunView, name: str) -> dict[str, Any]:
    state = view.shorten(view.text(run.summary, "state") or "incomplete", 40)
    return {
        "name": name,
        "sentence": verdict(run.summary),
        "word": view.verdict_of(run.summary),
        "state": "" if state == "complete" else state,
        "state_sentence": _STATES.get(state, "The run did not end as a complete run does."),
        "panels": _panels(run),
        "answer": _answer(run) if view.points(run) else None,
        "points": len(view.points(run)),
    }


def _answer(run: RunView) -> dict[str, Any]:
    """The decision in a word and a sentence, with the five figures that it rests on."""
    found = decision.decide(run)
    facts = _facts(run, found) if found.chosen else []
    return {"word": found.word, "glyph": decision.GLYPHS[found.word], "reason": found.reason, "objective": "" if (goal := decision.objective(run)) in found.reason else goal, "facts": facts, "lever": limits.lever_sentence(run),
            "style": {decision.YES: "valid", decision.NO: "invalid"}.get(found.word, "suspect")}  # fmt: skip


def _facts(run: RunView, found: decision.Decision) -> list[tuple[str, str, str]]:
    """(name, value, beneath it) of the point that decides."""
    assert found.chosen
    key, point = found.chosen
    was = view.measured(point, "output_tokens_per_s")
    span = units.interval(was.low, was.high, lambda v: units.number(v, 3))
    requests = view.num(point, "requests_per_s")
    share, limit = decision.roof_share(run, point), view.limit_word(view.text(point, "predicted", "limit"))
    many = view.num(point, "trials")
    return [
        ("Largest load that meets it" if found.meets else "Most output at", view.marked(key, point, full=True),
         f"of {len(found.held)} measured" if found.meets else decision.objective(run) and "no load was shown to meet it"),
        ("Output, all requests", units.rate(was.value, "tokens", 3),
         f"95 % interval {span}" if span else f"{units.count(many)} trial{'' if many == 1 else 's'}: no interval"),
        ("Requests", units.rate(requests, "requests", 3) if math.isfinite(requests) else "not measured",
         f"{units.count(view.num(point, 'requests'))} measured"),
        ("Cost of 1 M output tokens", *_cost(run, point)),
        ("Binding limit", limit or "not known",
         f"{units.percent(share, 2)} of what physics allows" if math.isfinite(share) else "no prediction"),
    ]  # fmt: skip


def _cost(run: RunView, point: Json) -> tuple[str, str]:
    usd_per_h, many, source = decision.price(run)
    if not math.isfinite(usd_per_h):
        return "no price known", "give --price 1.2/h"
    each = f"{many} × " if many > 1 else ""
    source = view.shorten(source.partition(",")[0], 60)
    return units.usd(decision.usd_per_million(run, point)), f"{each}{units.usd(usd_per_h)}/h ({source}), always busy"


def _panels(run: RunView) -> list[Panel]:
    fast, quick = view.best(run, "output_tokens_per_s", highest=True), view.best(run, "ttft_s", highest=False)
    chosen = [("Most output", fast, HEADLINES[3], True), ("Quickest answer", quick, HEADLINES[0], False)]
    if fast and quick and fast[0] == quick[0]:
        chosen = [("Best point", fast, HEADLINES[3], True)]
    return [_panel(run, title, found, shown, highest) for title, found, shown, highest in chosen if found]


def _panel(run: RunView, title: str, found: tuple[view.Key, Json], shown: Shown, highest: bool) -> Panel:
    key, point = found
    return Panel(
        title,
        view.key_label(key, full=True),
        view.verdict_of(point),
        [_key_figure(point, one) for one in reversed(HEADLINES)],
        view.limit_word(view.text(point, "predicted", "limit")),
        view.failures(point),
        _passed_over(run, point, shown, highest),
    )


def _passed_over(run: RunView, chosen: Json, shown: Shown, highest: bool) -> str:
    """The point that would have been the best had it been valid: told, so that nobody thinks it was overlooked."""
    sign = 1 if highest else -1
    rows = [(sign * view.measured(p, shown.key).value, key, p) for key, p in view.keyed(run).items()]
    rows = [row for row in rows if row[0] > sign * view.measured(chosen, shown.key).value]
    if not rows:
        return ""
    _, key, point = max(rows, key=lambda row: row[0])
    word = view.verdict_of(point)
    figure = shown.show(view.measured(point, shown.key).value)
    return f"Passed over: {view.key_label(key, full=True)} with {figure}, {view.VERDICTS[word]} {word}"


def _key_figure(point: Json, shown: Shown) -> KeyFigure:
    was, theory = view.measured(point, shown.key), view.predicted(point, shown.key)
    ratio = view.quotient(point, shown.key)
    name, show = f"{shown.name}, mean", partial(units.seconds, digits=3)
    if shown.higher_is_better:
        name, show = "Output, all requests", partial(units.rate, things="tokens", digits=3)
    times = f", {units.ratio(ratio)}" if math.isfinite(ratio) else ""
    predicted = f"predicted {show(theory.value)}{times}" if theory.known else "no prediction"
    return KeyFigure(name, show(was.value), _spread(point, shown), predicted)


def _spread(point: Json, shown: Shown) -> str:
    """What keeps a mean from standing alone: its interval for a rate, else the outermost percentile that n allows."""
    if shown.higher_is_better:
        was = view.measured(point, shown.key)
        span = units.interval(was.low, was.high, lambda v: units.number(v, 3))
        return f"95 % interval {span}" if span else f"{units.count(view.num(point, 'requests'))} requests"
    samples = view.num(point, shown.key, "n")
    allowed = [name for name, needed in view.SAMPLES_NEEDED.items() if samples >= needed]
    name = allowed[-1] if allowed else "p50"
    value = view.num(point, shown.key, name)
    return (f"{name} {units.seconds(value, 3)}, " if math.isfinite(value) else "") + f"n {units.count(samples)}"


def _glance(runs: Sequence[RunView]) -> Table:
    """Several runs in one table: the best point of each."""
    head = [*map(column, ("Run", "Validity", "Most output", "at", *(shown.short for shown in HEADLINES[:3]), "Limited by")),
            column("Errors", style="wrap")]  # fmt: skip
    body = []
    for name, run in zip(view.labels(runs), runs, strict=True):
        row = [heading(name, view.text(run.summary, "hardware", "name"))]
        found = view.best(run, "output_tokens_per_s", highest=True)
        if found is None:
            word = view.verdict_of(run.summary)
            body.append([*row, stamp(word), Cell("no measured point", style="missing", span=7)])
            continue
        key, point = found
        body.append([
            *row, stamp(view.verdict_of(point)), figure(units.rate(view.num(point, "output_tokens_per_s"), "tokens", 3)),
            Cell(view.key_label(key, full=True)),
            *(figure(units.seconds(view.measured(point, shown.key).value, 3)) for shown in HEADLINES[:3]),
            Cell(view.limit_word(view.text(point, "predicted", "limit")) or "–"),
            Cell(view.failures(point) or "none", style="wrap"),
        ])  # fmt: skip
    return Table("table-glance", "The best point of each run", [head], body)
