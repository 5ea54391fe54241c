"""How figures went over time: an append-only CSV for each kind of run, and what a chart needs of it."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from harness import baseline, stats
from harness.records import RidgelineError

COLUMNS = (
    "started_at", "name", "engine_version", "driver", "ridgeline", "point", "metric", "trials", "mean", "low", "high",
)  # fmt: skip
KEPT = (*(f"{name}_{q}" for name in ("ttft", "itl", "e2e") for q in ("p50", "p95")), "output_tokens_per_s")


def rows_of(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of one run: mean over its trials of each metric kept, with the 95 % interval where it has one.  SI units.
    Points that are invalid are left out."""
    said = found["shown"]
    about = {"started_at": found.get("started_at"), "name": found["name"], "engine_version": said.get("engine version"),
             "driver": said.get("driver"), "ridgeline": said.get("ridgeline")}  # fmt: skip
    rows = []
    for label, point in found["points"].items():
        for name in KEPT if point["verdict"] != "invalid" else ():
            values = [v for v in baseline.measured(point, name) if math.isfinite(v)]
            if values:
                low, high = stats.interval(values)
                mean = sum(values) / len(values)
                rows.append(about | {"point": label, "metric": name, "trials": len(values)} | _figures(mean, low, high))
    return rows


def _figures(mean: float, low: float, high: float) -> dict[str, str]:
    named = {"mean": mean, "low": low, "high": high}
    return {key: "" if math.isnan(value) else f"{value:.7g}" for key, value in named.items()}


def appended(text: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The file with these lines at its end; a run that it has already changes nothing."""
    there = {(row["started_at"], row["name"]) for row in parsed(text)} if text else set()
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    if not text:
        writer.writeheader()
    writer.writerows(row for row in rows if (row["started_at"], row["name"]) not in there)
    return text + ("" if text.endswith("\n") or not text else "\n") + out.getvalue()


def parsed(text: str, where: str = "history") -> list[dict[str, Any]]:
    """The lines of a history, figures as numbers (None: missing).  Raises RidgelineError naming the line."""
    reader = csv.DictReader(io.StringIO(text))
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise RidgelineError(f"{where}:1: no history: its columns are not {', '.join(COLUMNS)}")
    found = []
    for row in reader:
        try:
            figures = {key: float(row[key]) if row[key] else None for key in ("mean", "low", "high")}
        except (TypeError, ValueError):
            raise RidgelineError(f"{where}:{reader.line_num}: a line that cannot be read") from None
        found.append(dict(row) | figures)
    return found
