"""Run folder <-> Run.

Format 1 of run.json and summary.json (2026-11): first version.
A folder holds scenario.yaml (what was asked), run.json (provenance and state), journal.bin (the records while the run
goes on), requests.parquet (the same records when it has ended), server.jsonl (the server's own senses), engine.log,
summary.json and report.html (derived, rebuilt at any time).
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import numpy as np

from harness import journal
from harness.records import COUNTS, SCALAR_COLUMNS, TEXTS, Record, RidgelineError, Table, table

FORMAT = 1
# Columns that files of the first weeks lack: they read as missing.
LATER = (
    "asked_input_tokens",
    "asked_output_tokens",
    "tls_s",
    "first_event_s",
    "last_event_s",
    "choice_events",
    "notes",
)
JOURNAL, PARQUET, RUN, SUMMARY, SERVER = "journal.bin", "requests.parquet", "run.json", "summary.json", "server.jsonl"


@dataclass(slots=True)
class Run:
    """All that is on disk of a run."""

    folder: Path
    run: dict[str, Any]
    records: Table
    events: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def state(self) -> str:
        said = self.run.get("state")
        return said if said in ("complete", "interrupted") else "incomplete"


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
        whole = journal.whole_bytes(path.read_bytes())
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


def load(folder: Path, columns: bool = True) -> Run:
    """Read a run folder in whatever state it was left, by its columns if they are there, else by its journal.  Raises
    RidgelineError if it is none."""
    path = folder / RUN
    run = read_json(path)
    if not isinstance(run, dict) or "schema" not in run:
        raise RidgelineError(f"{path}: not written by Ridgeline (no schema number)")
    if run["schema"] != FORMAT:
        raise RidgelineError(f"{path}: format {run['schema']}, written by ridgeline {run.get('ridgeline')}; this one reads "
                             f"format {FORMAT}: use that version")  # fmt: skip
    found = Run(folder, run, table([]))
    _load_journal(found)
    if columns and (folder / PARQUET).exists():
        try:
            found.records = read_parquet(folder / PARQUET)
        except (OSError, ValueError, KeyError) as problem:
            found.notes.append(f"{PARQUET} cannot be read ({problem}); the journal was used")
    found.samples = load_lines(folder / SERVER)
    return found


def _load_journal(run: Run) -> None:
    """The records and events of all journals, without those of a trial that was begun anew."""
    reading = journal.Reading()
    found: list[Record] = []
    for path in journals(run.folder):
        found += journal.read(path.read_bytes(), reading)
    found, run.events = journal.current(found, reading.events)
    run.records = table(found)
    if reading.torn_bytes:
        run.notes.append(f"the journal ends inside a record: its last {reading.torn_bytes} bytes were dropped")
    if reading.bad_frames:
        run.notes.append(f"journal records {reading.bad_frames[:10]} fail their checksum and were left out")


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


def write_parquet(path: Path, records: Table) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {}
    for name in SCALAR_COLUMNS:
        values = getattr(records, name)
        if name in COUNTS:
            columns[name] = pa.array(values, pa.int64(), mask=values < 0)
        elif values.dtype == object:
            columns[name] = pa.array(values.tolist(), pa.string())
        elif values.dtype.kind == "f":
            columns[name] = pa.array(values, pa.float64(), mask=np.isnan(values))
        else:
            columns[name] = pa.array(values)
    start = pa.array(records.start.astype(np.int32), pa.int32())
    first = np.full(len(records), np.nan)
    has = records.start[1:] > records.start[:-1]
    first[has] = records.sent_s[has] + records.chunk_s[records.start[:-1][has]]
    columns["first_token_s"] = pa.array(first, pa.float64(), mask=np.isnan(first))
    columns["chunk_s"] = pa.ListArray.from_arrays(start, pa.array(records.chunk_s.astype(np.float32), pa.float32()))
    columns["chunk_tokens"] = pa.ListArray.from_arrays(
        start, pa.array(records.chunk_tokens.astype(np.int32), pa.int32())
    )
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(pa.table(columns).replace_schema_metadata({"ridgeline": str(FORMAT)}), temporary, compression="zstd")
    os.replace(temporary, path)


def read_parquet(path: Path) -> Table:
    import pyarrow.parquet as pq

    found = pq.read_table(path).combine_chunks()
    columns: dict[str, Any] = {}
    for name in SCALAR_COLUMNS:
        if name in LATER and name not in found.column_names:
            missing: Any = "" if name in TEXTS else -1 if name in COUNTS else np.nan
            columns[name] = np.full(len(found), missing, object if name in TEXTS else None)
            continue
        column = found[name]
        if name in COUNTS:
            columns[name] = column.fill_null(-1).to_numpy()
        elif name in TEXTS:
            columns[name] = np.array(column.to_pylist(), object)
        else:
            columns[name] = column.to_numpy()
    lists, tokens = found["chunk_s"].combine_chunks(), found["chunk_tokens"].combine_chunks()
    if not len(found):
        return table([])
    return Table(**columns, chunk_s=lists.flatten().to_numpy(zero_copy_only=False), start=lists.offsets.to_numpy().astype(np.int64),
                 chunk_tokens=tokens.flatten().to_numpy(zero_copy_only=False))  # fmt: skip
