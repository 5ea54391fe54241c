"""Runs for the tests of the report: the sample on disk, and its variants."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from harness import models, store, summary
from harness.records import Record, Table, table
from harness.report.page import RunView
from harness.scenario import validate
from harness.theory.hardware import find

DATA = Path(__file__).parent / "data"
LOG = "main: server is listening\nslot released"

HOSTILE = (
    "</script><script>window.pwned=1</script>\"'><img src=x onerror=window.pwned=1>"
    "<a href='javascript:window.pwned=1'>x</a>\u2028\u2029\x00\ud800\u202e--><!--]]>&lt;b&gt;{{7*7}}${1+1}%{x}\n`#0072b2"
)
HOSTILE_LINK = "<a href=\"javascript:window.pwned=1\" target='_self'>javascript:window.pwned=1</a>"


def sample() -> RunView:
    summary, run = (json.loads((DATA / f"sample_{name}.json").read_text("utf-8")) for name in ("summary", "run"))
    return RunView(summary, run, LOG)


def recorded(count: int = 96, trials: int = 3, sizes: tuple[int, ...] = (1, 8, 32), slo: str = "", price: str = "",
             step_s: float = 7e-3, each_s: float = 1e-4, hardware: str | None = "H100-SXM-80GB", mode: str = "wave") -> RunView:  # fmt: skip
    """A run summarised from records that follow a law: waves of a batch, the first token after 20 ms and 0.1 ms for each
    in the batch, then `step_s` + `each_s` x batch from token to token; trial k is k permille slower; every 50th fails."""
    tables = [_law(k, size, trial, count, step_s, each_s) for k, size in enumerate(sizes) for trial in range(trials)]
    sent = 0.0
    for t in tables:
        t.sent_s[:] += sent
        t.first_token_s[:] += sent
        t.last_token_s[:] += sent
        t.end_s[:] += sent
        sent = float(np.nanmax(t.end_s)) + 0.5
    workload = {"mode": mode, "batch_sizes": list(sizes), "trials": trials}
    scenario = validate({"workload": workload} | {k: v for k, v in (("slo", slo), ("price", price)) if v}, "test")
    run = {
        "scenario": scenario.model_dump(mode="json", by_alias=True), "model": "Llama-3.1-8B", "started_at": "2026-11-01T10:00:00+00:00",
        "engine": {"kind": "simulator", "version": "1"}, "command": ["ridgeline", "run"], "seed": 1,
        "points": [{"batch_size": size, "rate": None} for size in sizes],
    }  # fmt: skip
    model = models.load(DATA.parent.parent / "scenarios" / "llama-3.1-8b.config.json")
    row = find(hardware) if hardware else None
    blocks = lambda only=None, chunks=True: iter(tables)  # noqa: E731
    found = summary.build(run, "complete", blocks, [], [], [], model if row else None, row)
    return RunView(json.loads(json.dumps(store.clean(found))), run, LOG)


def _law(point: int, size: int, trial: int, count: int, step_s: float, each_s: float) -> Table:
    records, slow = [], 1 + 1e-3 * trial
    took = 20e-3 + 1e-4 * size + 149 * (step_s + each_s * size)
    for i in range(count):
        n = (point * 100 + trial) * 10_000 + i
        gaps = np.full(150, (step_s + each_s * size) * slow)
        gaps[0] = (20e-3 + 1e-4 * size) * slow * (1 + (i % 7) / 100)
        record = Record(n, point, trial, i // size, False, float("nan"), (i // size) * took * 1.02, input_tokens=350, output_tokens=150,
                        token_source="usage", chunk_s=np.cumsum(gaps).astype(np.float32), chunk_tokens=np.ones(150, np.int32))  # fmt: skip
        record.end_s = record.sent_s + float(record.chunk_s[-1])
        if i % 50 == 49:
            record = Record(
                n,
                point,
                trial,
                i // size,
                False,
                float("nan"),
                record.sent_s,
                end_s=record.sent_s + 0.3,
                error_class="timeout",
                error="none in 0.3 s",
            )
        records.append(record)
    return table(records)


def changed(change: Callable[[dict[str, Any]], Any]) -> RunView:
    """The sample with its summary changed in place by a function."""
    view = sample()
    change(view.summary)
    return view


def empty() -> RunView:
    """What is left of a run killed before its first point."""
    summary = {"schema": 1, "state": "incomplete", "name": "killed", "model": None, "engine": None, "points": [],
               "hardware": None, "architecture": None, "start": None, "findings": [], "plane": None}  # fmt: skip
    return RunView(summary, {})


def without_theory(*, hardware: bool = True, architecture: bool = True) -> RunView:
    def change(summary: dict[str, Any]) -> None:
        summary["plane"] = None
        summary["hardware"] = None if hardware else summary["hardware"]
        summary["architecture"] = None if architecture else summary["architecture"]
        for point in summary["points"]:
            point["predicted"] = None

    return changed(change)


def open_loop() -> RunView:
    def change(summary: dict[str, Any]) -> None:
        summary["workload"]["mode"] = "open"
        for place, point in enumerate(summary["points"]):
            point.update(batch_size=None, rate=0.5 * (place + 1))
        summary["points"][0]["batch_ran"] = None

    return changed(change)


def batches(count: int) -> RunView:
    def change(summary: dict[str, Any]) -> None:
        points = summary["points"]
        summary["points"] = [copy.deepcopy(points[k % 4]) | {"point": k, "batch_size": 2**k} for k in range(count)]

    return changed(change)


def hostile(text: str = HOSTILE) -> RunView:
    """The sample with every text, and every free key, replaced or followed by a hostile one."""

    def poison(value: Any, free: bool = False) -> Any:
        if isinstance(value, str):
            return text
        if isinstance(value, list):
            return [poison(entry) for entry in value]
        if isinstance(value, dict):
            return {key + text if free else key: poison(entry, key in _FREE) for key, entry in value.items()}
        return value

    view = sample()
    return RunView(poison(view.summary), poison(view.run), text + "\n" + text)


_FREE = {"terms", "error_classes", "flops", "versions", "machine", "scenario", "engine"}
