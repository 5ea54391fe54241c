"""The report as Markdown, for a pull request or an issue, and as JSON, for machines: the page's own words and figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from harness import markdown as md
from harness import units
from harness.report import changes, compare_section, decision, provenance, tables, verdict, view
from harness.report.changes import Change
from harness.report.view import HEADLINES, Json, RunView, Shown

FORMAT = 1


def data(runs: Sequence[RunView]) -> dict[str, Any]:
    """All that the page is made of, without secrets: `runs` are the runs' summaries (SI units, as in summary.json) with
    their `provenance`; `comparison` is what changed from the first to each other, None for a single run."""
    parts = zip(view.labels(runs), runs, strict=True)
    return {
        "schema": FORMAT,
        "title": verdict.title(runs),
        "runs": [
            {"label": name or view.text(run.summary, "name"), "decision": _decided(run)}
            | {key: provenance.redacted(value, key) for key, value in run.summary.items()}
            | {"provenance": provenance.redacted({k: v for k, v in run.run.items() if k != "theory"})}
            for name, run in parts
        ],
        "comparison": _compared(runs) if len(runs) > 1 else None,
    }


def _decided(run: RunView) -> dict[str, Any]:
    """The page's first line: the answer, the point that it rests on (`at`), and what that costs, NaN where not known."""
    found = decision.decide(run)
    point = found.chosen[1] if found.chosen else {}
    return {
        "answer": found.word,
        "sentence": found.sentence,
        "objective": decision.objective(run) or None,
        "at": view.key_label(found.chosen[0], full=True) if found.chosen else None,
        "usd_per_million_output_tokens": decision.usd_per_million(run, point),
        "roof_share": decision.roof_share(run, point),
        "limit": view.text(point, "predicted", "limit") or None,
    }


def _compared(runs: Sequence[RunView]) -> dict[str, Any]:
    names = view.labels(runs)
    return {
        "base": names[0],
        "alpha": changes.ALPHA,
        "caveats": changes.caveats(runs),
        "differs": {field: dict(zip(names, values, strict=True)) for field, values in changes.differences(runs)},
        "changes": [_change(change, names) for change in changes.changes(runs)],
    }


def _change(change: Change, names: Sequence[str]) -> dict[str, Any]:
    return dataclasses.asdict(change) | {"run": names[change.run], "key": view.key_label(change.key, full=True)}


# --- Markdown -------------------------------------------------------------------------------------------------------


def markdown(runs: Sequence[RunView]) -> str:
    """Verdict, headline figures, prediction and comparison, findings, the command: below 60 kB, the most important first."""
    parts = [_head(runs), _headlines(runs), _changes(runs), _versus(runs), _findings(runs), _repeat(runs)]
    return "\n".join([*md.fitting([part for part in parts if part]), ""])


def _head(runs: Sequence[RunView]) -> list[str]:
    lines = [f"## {md.inert(verdict.title(runs))}", ""]
    for one in verdict.section(runs)["runs"]:
        stamp = f"**{view.VERDICTS[one['word']]} {one['word']}**"
        stamp += f", **{md.inert(one['state'], 40)}**" if one["state"] else ""
        lines += [f"**{md.inert(one['name'])}**", ""] if one["name"] else []
        if answer := one["answer"]:
            lines += [f"**{answer['glyph']} {answer['word']}** {md.inert(answer['reason'], 1200)}.", ""]
        lines += [f"{stamp}: {md.inert(one['sentence'], 1200)}", ""]
        if facts := answer and answer["facts"]:
            cells = [
                f"**{md.inert(value, 60)}**" + (f" ({md.inert(small, 120)})" if small else "")
                for _, value, small in facts
            ]
            lines += [*md.table([md.inert(name) for name, _, _ in facts], [cells], len(facts)), ""]
    return [*lines, *([" · ".join(md.inert(part) for part in meta)] if (meta := verdict.meta(runs)) else [])]


def _headlines(runs: Sequence[RunView]) -> list[str]:
    rows, many = view.rows(runs), len(runs) > 1
    if not rows:
        return ["", "No point was measured."]
    head = [*(["Run"] if many else []), view.load_word(runs), "Output tokens/s", "TTFT", "TTFT p95", "ITL", "ITL p95", "E2E",
            "Requests", "Failed", "Validity"]  # fmt: skip
    body = []
    for _, name, key, point in rows:
        word = view.verdict_of(point)
        cells = [_mean(point, HEADLINES[3])]
        for shown in HEADLINES[:2]:
            cells += [_mean(point, shown), _tail(point, shown)]
        cells += [_mean(point, HEADLINES[2]), units.count(view.num(point, "requests"))]
        cells += [md.inert(view.failures(point)) or "none", f"{view.VERDICTS[word]} {word}"]
        body.append([*([md.inert(name)] if many else []), view.key_label(key), *cells])
    note = "Means with their 95 % interval over the trials. † too few samples (n) to pin this percentile down."
    return ["", *md.table(head, body, 1 + many), "", note]


def _mean(point: Json, shown: Shown) -> str:
    was = view.measured(point, shown.key)
    show = units.number if shown.higher_is_better else shown.show
    span = units.interval(was.low, was.high, show)
    return show(was.value) + (f" ({span})" if span else "")


def _tail(point: Json, shown: Shown) -> str:
    samples = view.num(point, shown.key, "n")
    thin = "" if samples >= view.SAMPLES_NEEDED["p95"] else " †"
    value = view.num(point, shown.key, "p95")
    return units.MISSING if units.is_missing(value) else f"{units.seconds(value)}{thin} (n {units.count(samples)})"


def _versus(runs: Sequence[RunView]) -> list[str]:
    many, body = len(runs) > 1, []
    for _, name, key, point in view.rows(runs):
        cells = [_ratio(point, shown) for shown in HEADLINES]
        if any(cells):
            limit = view.limit_word(view.text(point, "predicted", "limit"))
            body.append([*([md.inert(name)] if many else []), view.key_label(key), *(cell or "–" for cell in cells), md.inert(limit) or "–"])  # fmt: skip
    if not body:
        return ["", "No prediction to compare with."]
    head = [*(["Run"] if many else []), view.load_word(runs), *(shown.short for shown in HEADLINES), "Limited by"]
    return ["", "### Predicted versus measured", "", *md.table(head, body, 1 + many), "",
            "Predicted value (its interval), and measured ÷ predicted."]  # fmt: skip


def _ratio(point: Json, shown: Shown) -> str:
    theory = view.predicted(point, shown.key)
    if not theory.known:
        return ""
    show = units.number if shown.higher_is_better else shown.show
    span = units.interval(theory.low, theory.high, show)
    return show(theory.value) + (f" ({span})" if span else "") + f", {units.ratio(view.quotient(point, shown.key))}"


def _changes(runs: Sequence[RunView]) -> list[str]:
    if len(runs) < 2:
        return []
    found, names = changes.changes(runs), view.labels(runs)
    said = [compare_section.sentence([c for c in found if c.run == k], names[k], names[0]) for k in range(1, len(runs))]
    lines = ["", "### Comparison", "", *(f"- {md.inert(text, 1000)}" for text in [*said, *changes.caveats(runs)]), ""]
    order = {word: place for place, word in enumerate(("worse", "better", "unclear", "same", "not judged"))}
    body = [
        [md.inert(names[c.run]), view.key_label(c.key), compare_section.short(c.metric), changes.figure(c.metric, c.base),
         changes.figure(c.metric, c.new), c.shown.replace("[", "(").replace("]", ")"), f"{changes.WORDS[c.word]} {c.word}"]
        for c in sorted(found, key=lambda c: order[c.word])
    ]  # fmt: skip
    head = ["Run", view.load_word(runs), "Figure", md.inert(names[0]), "This run", "Change (95 % interval)", "Judged"]
    lines += md.table(head, body, 3) if body else []
    rows = changes.differences(runs)[: changes.MOST_DIFFERENCES]
    if rows:
        cells = [[md.inert(field, 120), *(md.inert(value, 120) or "–" for value in values)] for field, values in rows]
        lines += ["", "<details><summary>What differs between the runs</summary>", "",
                  *md.table(["", *map(md.inert, names)], cells, len(names) + 1), "", "</details>"]  # fmt: skip
    return lines


def _findings(runs: Sequence[RunView]) -> list[str]:
    found = tables.findings(runs)
    lines = ["", "### Validity findings", ""]
    if not found:
        return [*lines, "Nothing was found that would put a figure in doubt."]
    for one in found:
        places = ", ".join(where for where, _ in one.saw[:8]) + (", …" if len(one.saw) > 8 or one.more else "")
        saw = one.saw[0][1] if one.saw else ""
        lines.append(f"- {view.SEVERITIES[one.severity]} **{md.inert(one.code, 20)}** ({one.severity}; {md.inert(places)}): "
                     f"{md.inert(saw, 400)}. Do: {md.inert(one.do, 300) or 'nothing'}")  # fmt: skip
    return lines


def _repeat(runs: Sequence[RunView]) -> list[str]:
    lines = ["", "### Repeat it"]
    for part in provenance.section(runs):
        lines += ["", f"{md.inert(part['name'])}:"] if part["name"] else []
        lines += ["", *md.code(view.shorten(part["command"], 4000) or "# the command was not recorded")]
        facts = [*part["facts"], *(pair for title, rows in part["groups"] if title in ("Engine", "Hardware row", "Machine")
                                   for pair in _few(title, rows))]  # fmt: skip
        lines += ["", " · ".join(f"{md.inert(key)} {md.inert(value, 120)}" for key, value in facts)]
    return lines


_KEPT = {
    "Engine": ("kind", "version"),
    "Hardware row": ("name",),
    "Machine": ("cpu", "cores", "memory_bytes", "kernel"),
}


def _few(title: str, rows: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(f"{title.lower()} {key}".replace("_", " "), value) for key, value in rows if key in _KEPT[title]]
