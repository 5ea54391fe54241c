"""Every check of every point in one table, those that found nothing too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.report import tables, view
from harness.report.tables import Cell, Table, column, heading
from harness.report.view import SEVERITIES, Json, RunView

# What each check of harness.checks asks, as a statement that holds where it finds nothing.
ASKED = {
    "V001": "The client read in time what came",
    "V002": "The client's core had time left",
    "V003": "All requests ended well",
    "V004": "Prompts had the length asked",
    "V005": "Answers had the length asked",
    "V006": "The server told its usage",
    "V007": "No prefix cache answered",
    "V008": "Answers came as a stream, not in one burst",
    "V009": "One token came in each arrival",
    "V010": "Enough requests for the percentiles shown",
    "V011": "The trials agree",
    "V012": "Nothing was faster than physics allows",
    "V013": "The batch asked was the batch in flight",
    "V014": "Requests were sent when they were due",
    "V015": "The machine was left alone",
    "V016": "The client's core was its own",
    "V017": "The server's own figures agree with the client's",
    "V018": "The server preempted nothing",
    "V019": "The accelerator kept its clock",
    "V020": "No CPU quota stopped the client",
    "V021": "Neither the machine nor the clock stood still or jumped",
    "V022": "The garbage collector did not pause the client",
    "V023": "Every answer ended as it should",
    "V024": "The figures are our own, not another tool's",
    "V025": "The imported file agrees with itself",
    "V026": "All requests planned were sent and ended",
}
MOST = 24


def section(runs: Sequence[RunView]) -> dict[str, Any]:
    return {"found": tables.findings(runs), "table": checks_table(runs)}


def _worst(point: Json, code: str) -> str:
    found = [view.text(f, "severity") for f in view.items(point, "findings") if view.text(f, "code") == code]
    return max((word if word in SEVERITIES else "suspect" for word in found), key=list(SEVERITIES).index, default="")


def checks_table(runs: Sequence[RunView]) -> Table | None:
    """A row for each check, a column for each point; None without points."""
    points = [(view.joined(name, view.key_label(key)), point) for _, name, key, point in view.rows(runs)][:MOST]
    if not points:
        return None
    body = []
    for code, said in ASKED.items():
        cells = []
        for _, point in points:
            word = _worst(point, code)
            cells.append(Cell(f"{SEVERITIES[word]} {word}", style=word) if word else Cell("✓"))
        body.append([heading(said, code), *cells])
    head = [column("Check"), *(column(name) for name, _ in points)]
    notes = [
        "✓: the check found nothing. A check that lacked its sense finds nothing either; the findings above say which senses were missing."
    ]
    return Table("table-checks", "Every check at every point", [head], body, notes)
