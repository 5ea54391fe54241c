"""Run folder <-> Run.

Format 1 of run.json and summary.json (2026-11): first version.
A folder holds scenario.yaml (what was asked), run.json (provenance and state), journal.bin (the records while the run
goes on), requests.parquet (the same records when it has ended), server.jsonl (the server's own senses), engine.log,
summary.json and report.html (derived, rebuilt at any time).
"""

from __future__ import annotations

import fcntl
import itertools
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson

from harness import archive, journal
from harness.records import SCALAR_COLUMNS, RidgelineError, Table, joined, table

FORMAT = 1
JOURNAL, PARQUET, RUN, SUMMARY, SERVER = "journal.bin", "requests.parquet", "run.json", "summary.json", "server.jsonl"


@dataclass
class Run:
    """All that is on disk of a run.  Its requests are read in blocks, from requests.parquet or else from the journals."""

    folder: Path
    run: dict[str, Any]
    events: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    archived: bool = False
    begun: journal.Begun = field(default_factory=dict)

    @property
    def state(self) -> str:
        said = self.run.get("state")
        return said if said in ("complete", "interrupted") else "incomplete"

    def blocks(self, only: tuple[str, ...] | None = None, chunks: bool = True) -> Iterator[Table]:
        """The requests, some thousand at a time; columns that are not among `only` (None: all) may be missing."""
        if self.archived:
            return archive.blocks(self.folder / PARQUET, only or SCALAR_COLUMNS, chunks)
        return _journalled(self.folder, journal.Reading(), self.begun)

    @cached_property
    def records(self) -> Table:
        """All requests at once, in the order of their ids."""
        return joined(list(self.blocks()))


def clean(value: Any) -> Any:
    """JSON has no NaN: missing numbers become null; numpy's become Python's."""
    if isinstance(value, dict):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [clean(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(clean(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a file at once: a reader sees the old or the new, never a half.  Raises RidgelineError naming the file."""
    if path.exists() and not path.is_file():  # a device or a pipe would be replaced, and gone
        raise RidgelineError(f"{path}: cannot be written: is no file; name one")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False,
                                         encoding="utf-8", errors="replace") as out:  # fmt: skip
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(out.name, 0o644)
        os.replace(out.name, path)
    except OSError as problem:
        raise RidgelineError(f"{path}: cannot be written: {problem.strerror}") from None


def create(out: str | None, name: str, results: Path) -> tuple[Path, IO[str]]:
    """A new, locked run folder.  Raises RidgelineError if it cannot be had, or holds a run already."""
    if out is not None:
        folder = Path(out)
        if (folder / RUN).exists() or (folder / JOURNAL).exists():
            raise RidgelineError(
                f"--out {folder}: holds a run already; runs are never overwritten: name another folder"
            )
    else:
        safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:80] or "run"
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        folder = results / f"{safe}-{stamp}"
        for i in range(2, 1000):
            if not folder.exists():
                break
            folder = results / f"{safe}-{stamp}-{i}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return folder, _locked(folder)
    except OSError as problem:
        raise RidgelineError(
            f"{folder}: no run folder can be made here: {problem.strerror}; name another by --out"
        ) from None


def reopen(folder: Path) -> tuple[Path, IO[str]]:
    """The locked folder of a run that did not end.  Raises RidgelineError if it is none, or still goes on."""
    if not (folder / RUN).exists() or not (folder / JOURNAL).exists():
        raise RidgelineError(f"--resume {folder}: no run that could go on ({RUN} or {JOURNAL} is missing)")
    try:
        return folder, _locked(folder)
    except OSError as problem:
        raise RidgelineError(f"--resume {folder}: cannot be written: {problem.strerror}") from None


def _locked(folder: Path) -> IO[str]:
    """The folder's lock, held as long as the run; the system frees it with the process, however that ends."""
    lock = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read(20).strip() or "unknown"
        lock.close()
        raise RidgelineError(
            f"{folder}: another run is writing here (process {holder}); name another folder by --out"
        ) from None
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()
    return lock


def cut_torn(folder: Path) -> None:
    """Drop a half-written last frame of each journal, so that what is appended can be read."""
    for path in journals(folder):
        with path.open("rb") as file:
            whole = journal.whole_bytes(file)
        if whole < path.stat().st_size:
            os.truncate(path, whole)


def journals(folder: Path) -> list[Path]:
    """All journals of a run: one, or one for each worker beside it."""
    return sorted(folder.glob(f"{Path(JOURNAL).stem}*{Path(JOURNAL).suffix}"))


def read_json(path: Path) -> Any:
    """A JSON file of a run folder.  Raises RidgelineError naming it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RidgelineError(
            f"{path.parent}: no run here ({path.name} is missing); give the folder that `ridgeline run` named"
        ) from None
    except (OSError, ValueError, RecursionError) as problem:
        raise RidgelineError(f"{path}: cannot be read: {str(problem)[:200]}") from None


def info(folder: Path) -> dict[str, Any]:
    """run.json of a run folder.  Raises RidgelineError if it is none."""
    path = folder / RUN
    run = read_json(path)
    if not isinstance(run, dict) or "schema" not in run:
        raise RidgelineError(f"{path}: not written by Ridgeline (no schema number)")
    if run["schema"] != FORMAT:
        raise RidgelineError(f"{path}: format {run['schema']}, written by ridgeline {run.get('ridgeline')}; this one reads "
                             f"format {FORMAT}: use that version")  # fmt: skip
    return run


def load(folder: Path, columns: bool = True) -> Run:
    """Read a run folder in whatever state it was left, by its columns if they are there, else by its journal.  Raises
    RidgelineError if it is none."""
    found = Run(folder, info(folder), samples=load_lines(folder / SERVER))
    told = _archived(found) if columns else None
    if told is None:
        _scan(found, journal.Reading())
    else:
        found.archived, found.events = True, told["events"]
        found.notes += told["notes"]
    return found


def _archived(run: Run) -> dict[str, Any] | None:
    """What requests.parquet tells besides the requests; None if it is to be left aside: absent, broken, or out of date."""
    path, sizes = run.folder / PARQUET, _sizes(run.folder)
    if not path.exists():
        return None
    try:
        told = archive.told(path)
    except (OSError, ValueError) as problem:
        run.notes.append(f"{PARQUET} cannot be read ({problem}); the journal was used")
        return None
    return told if not sizes or told["journals"] == sizes else None


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in journals(folder)}


def _journalled(folder: Path, reading: journal.Reading, begun: journal.Begun) -> Iterator[Table]:
    for path in journals(folder):
        with path.open("rb") as file:
            found = journal.records(file, reading)
            while block := list(itertools.islice(found, archive.BLOCK)):
                first = [begun.get((record.point, record.trial), (0, 0))[1] for record in block]
                yield table([record for record, least in zip(block, first, strict=True) if record.id >= least])


def _scan(run: Run, reading: journal.Reading) -> None:
    """What the journals tell besides their records."""
    events: list[dict[str, Any]] = []
    for path in journals(run.folder):
        with path.open("rb") as file:
            events += [orjson.loads(p[1:]) for p in journal.payloads(file, reading) if p[:1] == b"E"]
    run.begun, run.events = journal.begun(events), [dict(e) for e in journal.current(events)]
    if reading.torn_bytes:
        run.notes.append(f"the journal ends inside a record: its last {reading.torn_bytes} bytes were dropped")
    if reading.bad_frames:
        run.notes.append(f"journal records {reading.bad_frames[:10]} fail their checksum and were left out")


def derive(folder: Path, done: Callable[[int], object] = lambda n: None) -> None:
    """Make requests.parquet from the journals; `done` is told the number of requests so far.  Raises OSError."""
    run, sizes, n = Run(folder, {}), _sizes(folder), 0
    _scan(run, journal.Reading())

    def blocks() -> Iterator[Table]:
        nonlocal n
        for block in run.blocks():
            yield block
            n += len(block)
            done(n)

    archive.write(folder / PARQUET, blocks(), {"journals": sizes, "events": run.events, "notes": run.notes})


def load_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, which may have been cut at any byte; none if there is no such file."""
    found: list[dict[str, Any]] = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # the last line of a killed run
    return found
