"""requests.parquet <-> Tables, in blocks of some thousand requests, so that a run of any length fits in little memory.

The file is derived from the journals and says so: its metadata hold the run's events and the size of each journal it was
made from.  One whose journals have grown since is out of date.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from harness.records import COUNTS, DERIVED, SCALAR_COLUMNS, TEXTS, Table, first_and_last_s

FORMAT = 1
BLOCK = 2048  # requests at once: with 150 stamps each some 2.5 MB, and tens of times that while they are read
# Columns that files of the first weeks lack: they read as missing.
LATER = (
    "asked_input_tokens", "asked_output_tokens", "tls_s", "first_event_s", "last_event_s", "choice_events", "notes",
)  # fmt: skip
NOTHING: dict[str, Any] = {"journals": {}, "events": [], "notes": []}
CHUNKS = ("chunk_s", "chunk_tokens")
# Times hardly repeat: a dictionary of them costs three times the writing, and twice the room.
_REPEATED = [name for name in SCALAR_COLUMNS if not name.endswith("_s")] + ["chunk_tokens.list.element"]


def write(path: Path, tables: Iterable[Table], told: Mapping[str, Any] | None = None) -> None:
    """Write all `tables`, and then what else is `told` (JSON), in its metadata; the file is replaced at once."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [(name, _type(name)) for name in SCALAR_COLUMNS]
        + [("chunk_s", pa.list_(pa.float32())), ("chunk_tokens", pa.list_(pa.int32()))],
        metadata={"ridgeline": str(FORMAT)},
    )
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with pq.ParquetWriter(temporary, schema, compression="zstd", use_dictionary=_REPEATED,
                              use_byte_stream_split=["chunk_s.list.element"]) as out:  # fmt: skip
            for block in tables:
                out.write_table(pa.table([_column(block, name) for name in schema.names], schema=schema))
            out.add_key_value_metadata({"told": orjson.dumps({**NOTHING, **(told or {})}).decode()})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _type(name: str) -> Any:
    import pyarrow as pa

    if name in TEXTS:
        return pa.string()
    if name == "warmup":
        return pa.bool_()
    return pa.float64() if name.endswith("_s") else pa.int64()


def _column(t: Table, name: str) -> Any:
    """A column as Arrow has it, from its bytes: pa.array() would load pandas, which takes longer than all the rest."""
    import pyarrow as pa

    if name in CHUNKS:
        flat = getattr(t, name).astype(np.float32 if name == "chunk_s" else np.int32)
        kind = pa.float32() if name == "chunk_s" else pa.int32()
        return pa.ListArray.from_arrays(_array(t.start.astype(np.int32), pa.int32()), _array(flat, kind))
    values = getattr(t, name)
    if name in TEXTS:
        texts = [text.encode("utf-8", "replace") for text in values]
        ends = np.cumsum([0, *map(len, texts)]).astype(np.int32)
        return pa.StringArray.from_buffers(len(texts), pa.py_buffer(ends), pa.py_buffer(b"".join(texts)))
    if name == "warmup":
        return _array(np.packbits(values, bitorder="little"), pa.bool_(), n=len(values))
    if name.endswith("_s"):
        return _array(values.astype(np.float64), pa.float64(), ~np.isnan(values))
    return _array(values.astype(np.int64), pa.int64(), values >= 0 if name in COUNTS else None)


def _array(
    values: npt.NDArray[Any], kind: Any, known: npt.NDArray[np.bool_] | None = None, n: int | None = None
) -> Any:
    import pyarrow as pa

    bits = None if known is None else pa.py_buffer(np.packbits(known, bitorder="little").tobytes())
    return pa.Array.from_buffers(
        kind, len(values) if n is None else n, [bits, pa.py_buffer(np.ascontiguousarray(values))]
    )


def told(path: Path) -> dict[str, Any]:
    """What `write` was told: `journals` (sizes by name), `events`, `notes`.  Raises OSError, ValueError."""
    import pyarrow.parquet as pq

    said = (pq.read_metadata(path).metadata or {}).get(b"told", b"{}")
    return {**NOTHING, **orjson.loads(said)}


def blocks(path: Path, only: Sequence[str] = SCALAR_COLUMNS, chunks: bool = True) -> Iterator[Table]:
    """The requests of a file, some thousand at a time, in the order in which they ended; columns that are not among
    `only` read as missing.  Raises OSError, ValueError, KeyError for what is no such file."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        has = set(file.schema_arrow.names)
        if lacking := set(SCALAR_COLUMNS) - has - set(LATER) - set(DERIVED):
            raise KeyError(min(lacking))
        chunks = chunks or not has.issuperset(DERIVED)  # of the first weeks: these follow from the chunks
        names = [name for name in (*only, *(CHUNKS if chunks else ())) if name in has]
        for group in _ahead(file, names):
            for batch in group.to_batches(BLOCK):
                yield _table(batch, chunks)


def _ahead(file: Any, names: Sequence[str]) -> Iterator[Any]:
    """The row groups in order; the next is unpacked while the last is worked on.  (iter_batches() keeps what it has read of
    every group.)"""

    def read(i: int) -> Any:
        return file.read_row_group(i, columns=list(names), use_threads=False)

    count = file.num_row_groups
    if count < 3:
        yield from map(read, range(count))
        return
    with ThreadPoolExecutor(1) as other:
        following = other.submit(read, 0)
        for i in range(count):
            group = following.result()
            if i + 1 < count:
                following = other.submit(read, i + 1)
            yield group


def _table(batch: Any, chunks: bool) -> Table:
    n = batch.num_rows
    columns = {name: _values(batch, name, n) for name in SCALAR_COLUMNS}
    start = np.zeros(n + 1, np.int64)
    chunk_s: npt.NDArray[Any] = np.empty(0, np.float32)
    chunk_tokens: npt.NDArray[Any] = np.empty(0, np.int32)
    if chunks and n:
        lists = [batch.column(name) for name in CHUNKS]
        offsets = _numbers(lists[0].offsets).astype(np.int64)
        start = offsets - offsets[0]
        # flatten() would load pyarrow.compute
        chunk_s, chunk_tokens = (_numbers(part.values)[offsets[0] : offsets[-1]] for part in lists)
    if chunks and "last_token_s" not in batch.schema.names:
        columns["first_token_s"], columns["last_token_s"] = first_and_last_s(columns["sent_s"], chunk_s, start)
    return Table(**columns, chunk_s=chunk_s, chunk_tokens=chunk_tokens, start=start)


def _values(batch: Any, name: str, n: int) -> npt.NDArray[Any]:
    if name not in batch.schema.names:
        missing: Any = "" if name in TEXTS else -1 if name in COUNTS else np.nan
        return np.full(n, missing, object if name in TEXTS else None)
    column = batch.column(name)
    if name in TEXTS:
        return np.array(column.to_pylist(), object)
    if name == "warmup":
        return _bits(column.buffers()[1], column)
    values = _numbers(column)
    if column.null_count:
        known = _bits(column.buffers()[0], column)
        values = np.where(known, values, -1 if name in COUNTS else np.nan)
    return values


def _numbers(column: Any) -> npt.NDArray[Any]:
    """The values of an Arrow array (to_numpy() would load pandas)."""
    kind = {"double": "float64", "float": "float32"}.get(str(column.type), str(column.type))
    return np.frombuffer(column.buffers()[1], kind)[column.offset : column.offset + len(column)]


def _bits(buffer: Any, column: Any) -> npt.NDArray[np.bool_]:
    bits = np.unpackbits(np.frombuffer(buffer, np.uint8), bitorder="little")
    return bits[column.offset : column.offset + len(column)].astype(bool)
