"""The ledger of a run: what the articles' arithmetic gives, what the refined roofline gives, and what was left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from harness import units
from harness.report import view
from harness.report.tables import Cell, Row, Table, column, figure, heading
from harness.report.view import HEADLINES, RunView, Shown

# The seeds' formulas (see theory.seeds) and what they leave out.
FORMULAS = {
    "ttft_s": ("2 × parameters × prompt tokens × batch / peak FLOP/s",
               "the peak is never reached; attention, launch and host are left out; every prompt waits for all others"),
    "itl_s": ("weight bytes / memory bandwidth",
              "no KV cache is read, no kernel reaches the full bandwidth, and no step costs the host anything: the batch changes nothing"),
    "e2e_s": ("time to first token + output tokens × time per token", "the first token comes from the prefill: n tokens take n − 1 steps"),
    "output_tokens_per_s": ("batch × output tokens / end-to-end time", "follows from the others"),
}  # fmt: skip


def section(runs: Sequence[RunView]) -> dict[str, Any] | None:
    """None where no seed's value stands in the page."""
    named = enumerate(zip(view.labels(runs), runs, strict=True))
    tables = [table for k, (name, run) in named if (table := _table(run, name, k))]
    return {"tables": tables} if tables else None


def _table(run: RunView, name: str, place: int) -> Table | None:
    body: list[Row] = []
    for shown in HEADLINES:
        rows = [(key, p) for key, p in view.keyed(run).items() if math.isfinite(view.seed_value(p, shown.key))]
        if rows:
            formula, lacks = FORMULAS[shown.key]
            body.append([Cell(f"{shown.name} = {formula}", lacks, "group", scope="rowgroup", span=6)])
        for key, point in rows:
            body.append(_row(key, point, shown))
    if not body:
        return None
    head = [column("Point"), column("Article's arithmetic"), column("Corrected", small="refined roofline"), column("Measured"),
            column("Article / measured"), column("Corrected / measured")]  # fmt: skip
    notes = ["Each formula is quoted as the articles give it, so that what they print can be checked; predictions use the corrected values. "
             "harness/theory/ledger.py holds every figure that the articles print, with its correction."]  # fmt: skip
    suffix = f", {name}" if name else ""
    return Table(
        f"table-ledger-{place}", f"The articles' arithmetic beside its correction{suffix}", [head], body, notes
    )


def _row(key: view.Key, point: view.Json, shown: Shown) -> Row:
    seed, was = view.seed_value(point, shown.key), view.measured(point, shown.key).value
    theory = view.predicted(point, shown.key).value
    return [
        heading(view.marked(key, point, full=True)), Cell(shown.show(seed)), figure(shown.show(theory)), figure(shown.show(was)),
        Cell(units.ratio(seed / was) if was > 0 else "–"), Cell(units.ratio(theory / was) if was > 0 else "–"),
    ]  # fmt: skip
