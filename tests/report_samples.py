"""Runs for the tests of the report: the sample on disk, and its variants."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import journal, store
from harness.report.page import RunView

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


def corpus(first: int) -> RunView:
    """The same with the texts of CORPUS in turn, from `first` on: over all of them each field has had each text."""
    turn = itertools.count(first)
    return _poisoned(lambda: CORPUS[next(turn) % len(CORPUS)])


def _poisoned(text: Callable[[], str]) -> RunView:
    def poison(value: Any, free: bool = False) -> Any:
        if isinstance(value, str):
            return text()
        if isinstance(value, list):
            return [poison(entry) for entry in value]
        if isinstance(value, dict):
            return {key + text() if free else key: poison(entry, key in _FREE) for key, entry in value.items()}
        return value

    view = sample()
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
    (folder / store.RUN).write_text(json.dumps(run))
    lines = store.load_lines(folder / store.SERVER)
    (folder / store.SERVER).write_text("".join(json.dumps(poison(line)) + "\n" for line in lines))
    (folder / "engine.log").write_text("\n".join(map(str, CORPUS)), errors="replace")
    for name in (store.SUMMARY, store.PARQUET, "report.html"):
        (folder / name).unlink(missing_ok=True)
