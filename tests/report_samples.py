"""Runs for the tests of the report: the sample on disk, and its variants."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from harness import journal, models, store, summary
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

# Strings that ran code, loaded something or broke out of their place in other pages.
CORPUS = (
    HOSTILE,
    HOSTILE_LINK,
    "</title></style></textarea></noscript></template></pre></script><svg/onload=window.pwned=1>",
    "\" autofocus onfocus=window.pwned=1 x=\"' onmouseover='window.pwned=1",
    "<iframe srcdoc='<script>parent.pwned=1</script>'></iframe><object data=javascript:pwned=1>",
    "<base href=//127.0.0.1/><meta http-equiv=refresh content='0;url=//127.0.0.1/'><link rel=stylesheet href=//127.0.0.1/>",
    "<style>*{background:url(http://127.0.0.1/x)}</style>}</style>*{background:url(http://127.0.0.1/y)}",
    "<form action=//127.0.0.1/><input autofocus onfocus=window.pwned=1><button>x</button></form>",
    "{{constructor.constructor('window.pwned=1')()}}${window.pwned=1}#{1}<%= 1 %>{% raw %}",
    "__proto__", "constructor", "toString",
    "<b onclick=window.pwned=1>x</b><br><sub><span style='position:fixed;inset:0'>", "data:text/html,<script>1</script>",
    "&lt;img src=x onerror=window.pwned=1&gt;&#60;script&#62;", "%3Cscript%3E \\u003cscript\\u003e \\x3cscript\\x3e",
    "\r\n\r\n<script>window.pwned=1</script>", "x" * 5000, "\u202e\u2066txt.exe\ufeff\ufffe", "",
)  # fmt: skip


def sample() -> RunView:
    summary, run = (json.loads((DATA / f"sample_{name}.json").read_text("utf-8")) for name in ("summary", "run"))
    return RunView(summary, run, LOG)


def recorded(count: int = 96, trials: int = 3, sizes: tuple[int, ...] = (1, 8, 32), slo: str = "", price: str = "",
             step_s: float = 7e-3, each_s: float = 1e-4, hardware: str | None = "H100-SXM-80GB", mode: str = "wave") -> RunView:  # fmt: skip
    """A run summarised from records that follow a law: waves of a batch, the first token after 20 ms and 0.1 ms for each
    in the batch, then `step_s` + `each_s` x batch from token to token; trial k is k permille slower; every 50th fails."""
    tables = [law(k, size, trial, count, step_s, each_s) for k, size in enumerate(sizes) for trial in range(trials)]
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


def whole(each_s: float = 1e-4) -> RunView:
    """A run that has something to say in every section of one run."""
    return recorded(slo="ttft_p95=500ms,itl_p95=50ms", price="2/h", each_s=each_s)


def law(point: int, size: int, trial: int, count: int, step_s: float, each_s: float) -> Table:
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
    return _poisoned(lambda: text)


def corpus(first: int, view: RunView | None = None) -> RunView:
    """The sample, or `view`, with the texts of CORPUS in turn, from `first` on: over all of them each field has had each."""
    turn = itertools.count(first)
    return _poisoned(lambda: CORPUS[next(turn) % len(CORPUS)], view)


def _poisoned(text: Callable[[], str], view: RunView | None = None) -> RunView:
    def poison(value: Any, free: bool = False) -> Any:
        if isinstance(value, str):
            return text()
        if isinstance(value, list):
            return [poison(entry) for entry in value]
        if isinstance(value, dict):
            return {key + text() if free else key: poison(entry, key in _FREE) for key, entry in value.items()}
        return value

    view = view or sample()
    return RunView(poison(view.summary), poison(view.run), text() + "\n" + text())


_FREE = {"terms", "error_classes", "flops", "versions", "machine", "scenario", "engine"}


# Words that the program itself reads: a run that says others is refused, or never came about.
_READ = {"mode", "api", "transport", "arrivals", "state", "dtype", "kv_dtype", "compute_dtype", "matmul_dtype", "family",
         "event", "started_at"}  # fmt: skip


def poison_folder(folder: Path) -> None:
    """A real run folder with a text of CORPUS in every text of run.json, of the server's samples, and of the records, of
    which every other one has failed; what is derived of them is removed."""
    turn = itertools.count()

    def text() -> str:
        return CORPUS[next(turn) % len(CORPUS)].encode("utf-8", "replace").decode()

    def poison(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k: poison(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [poison(v, key) for v in value]
        return text() if isinstance(value, str) and key not in _READ else value

    reading, records = journal.Reading(), []
    for path in folder.glob("journal*.bin"):
        with path.open("rb") as file:
            records += list(journal.records(file, reading))
        path.unlink()
    with (folder / store.JOURNAL).open("wb") as out:
        out.write(journal.MAGIC)
        for event in reading.events:
            out.write(journal.encode_event(poison(event)))
        for place, record in enumerate(records):
            for name in ("finish_reason", "token_source", "notes", *(("error_class", "error") if place % 2 else ())):
                setattr(record, name, text())
            out.write(journal.encode(record))
    run = poison(json.loads((folder / store.RUN).read_text()))
    run["model"] = run["model"] or "x"
    hardware = (run.get("theory") or {}).get("hardware") or {}
    hardware["name"] = hardware.get("name") or "x"  # none is refused in a sentence
    (folder / store.RUN).write_text(json.dumps(run))
    lines = store.load_lines(folder / store.SERVER)
    (folder / store.SERVER).write_text("".join(json.dumps(poison(line)) + "\n" for line in lines))
    (folder / "engine.log").write_text("\n".join(map(str, CORPUS)), errors="replace")
    for name in (store.SUMMARY, store.PARQUET, "report.html"):
        (folder / name).unlink(missing_ok=True)
