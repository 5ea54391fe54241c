"""Runs that are stored -> what `report` and `definitions` give: a page, Markdown, JSON, another tool's figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import baseline, redaction, store, summary
from harness.command import summarise
from harness.records import RidgelineError

FORMS = ("html", "md", "json")


def report(folders: Sequence[Path], page: Path | None, hardware_name: str | None, model_config: str | None,
           as_tool: str | None = None, calibration: str | None = None, past: Path | None = None,
           slo: str | None = None, price: str | None = None, form: str = "html") -> str:  # fmt: skip
    """Write the report; returns what stdout gets.  As md or json it is that itself, unless `page` names a file for it."""
    if form not in FORMS:
        raise RidgelineError(f"--format: got {form!r}; known: {', '.join(FORMS)}")
    worth = {"slo": slo, "price": price}
    found = [summarise(folder, None, hardware_name, model_config, calibration, worth) for folder in folders]
    for one, folder in zip(found, folders, strict=True):
        imported = next((str(p["imported"]["tool"]) for p in one["points"] if p.get("imported")), None)
        if name := as_tool or imported:  # what a tool printed stands beside what we make of it
            one["definitions"] = _compared(folder, name)
    if past:
        from harness import command_gate

        found[0]["history"] = command_gate.past(past)
    if form == "html":
        page = page or folders[0] / "report.html"
        write_report(folders, found, page)
    else:
        text = _text_form(folders, found, form)
        if page is None:
            return text.rstrip()
        store.write_text(page, text)
    return "\n".join([*(one["verdict_sentence"] for one in found), f"report: {page}"])


def _text_form(folders: Sequence[Path], found: Sequence[dict[str, Any]], form: str) -> str:
    from harness.report import formats

    seen = views(folders, found)
    text = (
        formats.markdown(seen) if form == "md" else json.dumps(store.clean(formats.data(seen)), allow_nan=False) + "\n"
    )
    return redaction.clean(text, len(text))


def _compared(folder: Path, name: str) -> dict[str, Any]:
    from harness import definitions as tools

    run = store.load(folder)
    tool = tools.tool(name)
    points = tools.compare(name, run.run, run.blocks)
    own = next((p["imported"] for p in points if p.get("imported") and p["imported"]["tool"] == name), None)
    return {"run": str(folder), "definitions": name, "version": own["name"] if own else tool.version,
            "imported": bool(own), "points": points}  # fmt: skip


def definitions(folder: Path | None, name: str, as_json: bool) -> str:
    """The figures of a stored run under `name`'s formulas beside ours; without a run, the page that explains."""
    from harness import definitions as tools

    if folder is None:
        return (Path(__file__).parent / "docs" / "definitions.md").read_text(encoding="utf-8").rstrip()
    found = _compared(folder, name)
    if not as_json:
        return tools.text(name, found["points"])
    sides = [p | {side: summary.public_point(p[side]) for side in ("ours", "theirs")} for p in found["points"]]
    return json.dumps(store.clean(found | {"points": sides}), allow_nan=False)


def write_report(folders: Sequence[Path], found: Sequence[dict[str, Any]], page: Path) -> None:
    from harness.report.page import render

    store.write_text(page, render(views(folders, found)))


def views(folders: Sequence[Path], found: Sequence[dict[str, Any]]) -> list[Any]:
    """The runs as a report sees them; several also with their figures trial by trial, to be compared."""
    from harness.report.page import RunView

    seen = []
    for folder, one in zip(folders, found, strict=True):
        more = {}
        if len(folders) > 1:
            run = store.load(folder)
            more["figures"] = store.clean(baseline.figures(run.run, one, run.blocks, run.events))
        seen.append(RunView(one | more, store.info(folder), _log_tail(folder)))
    return seen


def _log_tail(folder: Path) -> str:
    try:
        with open(folder / "engine.log", "rb") as log:
            log.seek(max(0, log.seek(0, 2) - 4000))
            return log.read().decode("utf-8", "replace")
    except OSError:
        return ""
