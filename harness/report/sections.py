"""The sections of the report, in the order of a decision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.report import (
    against,
    capacity,
    compare_section,
    corrections,
    glossary,
    limits,
    provenance,
    roofline,
    search,
    spread,
    tables,
    timeline,
    trend,
    validity,
    verdict,
    view,
)
from harness.report.section import Section
from harness.report.view import RunView


def _figures(runs: Sequence[RunView]) -> dict[str, Any]:
    measured = any(view.points(run) for run in runs)
    return {"tables": [tables.figures_table(runs), *tables.definitions_tables(runs)] if measured else []}


def _starts(runs: Sequence[RunView]) -> list[tuple[str, list[tables.Stage], str]]:
    named = zip(view.labels(runs), runs, strict=True)
    return [(name, tables.stages(run), tables.load_sentence(run)) for name, run in named]


SECTIONS = (
    Section("verdict", "Verdict", "verdict", verdict.section),
    Section("compare", "Comparison", "compared", compare_section.section),
    Section("limits", "What limits it, and what would help", "charts", limits.section),
    Section("versus", "Predicted versus measured", "charts", against.versus),
    Section("plane", "Throughput over batch size", "charts", against.plane),
    Section("roofline", "Roofline", "charts", roofline.section),
    Section("search", "Search for the capacity", "charts", search.section),
    Section("capacity", "Capacity under the objectives", "charts", capacity.section),
    Section("pareto", "Throughput against speed for each user", "charts", capacity.pareto),
    Section("cost", "Cost", "charts", capacity.cost),
    Section("spread", "Distributions", "charts", spread.section),
    Section("timeline", "Over time", "charts", timeline.section),
    Section("stability", "Stability over trials", "charts", spread.stability),
    Section("trend", "History", "charts", trend.section),
    Section("figures", "Every figure", "tables", _figures),
    Section("time", "Where the time goes", "time", against.time),
    Section("start", "Engine start", "starts", _starts),
    Section("findings", "Validity findings", "findings", validity.section),
    Section("repeat", "How to reproduce", "repeat", provenance.section),
    Section("ledger", "Ledger of corrections", "tables", corrections.section),
    Section("glossary", "Glossary", "glossary", glossary.section),
)
