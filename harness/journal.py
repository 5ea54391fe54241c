"""The append-only truth of a run: Record or event -> framed bytes, and back from a file cut anywhere.

Format 1: the magic line, then frames of (length u32, crc32 u32, payload), little-endian.  A payload is one kind byte
("R" a record, "E" an event of the run as JSON), then for a record: header length u32, header JSON, chunk_s float32[n],
chunk_tokens int32[n].
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson

from harness.records import Record, RidgelineError

MAGIC = b"ridgeline journal 1\n"
_FRAME = struct.Struct("<II")
_LENGTH = struct.Struct("<I")
_SCALARS = tuple(name for name in Record.__slots__ if name not in ("chunk_s", "chunk_tokens"))
_TIMES = tuple(name for name in _SCALARS if name.endswith("_s"))


def frame(payload: bytes) -> bytes:
    return _FRAME.pack(len(payload), zlib.crc32(payload)) + payload


def encode(record: Record) -> bytes:
    header = orjson.dumps({name: getattr(record, name) for name in _SCALARS} | {"n": len(record.chunk_s)})
    arrays = record.chunk_s.astype("<f4").tobytes() + record.chunk_tokens.astype("<i4").tobytes()
    return frame(b"R" + _LENGTH.pack(len(header)) + header + arrays)


def encode_event(event: dict[str, Any]) -> bytes:
    return frame(b"E" + orjson.dumps(event))


def decode_record(payload: bytes) -> Record:
    (length,) = _LENGTH.unpack_from(payload, 1)
    header = orjson.loads(payload[5 : 5 + length])
    n, at = header.pop("n"), 5 + length
    chunk_s = np.frombuffer(payload, "<f4", n, at)
    chunk_tokens = np.frombuffer(payload, "<i4", n, at + 4 * n)
    for name in _TIMES:  # JSON has no NaN: missing times travel as null, and older files lack some
        header[name] = float("nan") if header.get(name) is None else header[name]
    return Record(**header, chunk_s=chunk_s, chunk_tokens=chunk_tokens)


@dataclass(slots=True)
class Reading:
    """What a journal told besides its records: events of the run, bytes dropped at a torn end, frames that failed."""

    events: list[dict[str, Any]] = field(default_factory=list)
    torn_bytes: int = 0
    bad_frames: list[int] = field(default_factory=list)


def whole_bytes(data: bytes) -> int:
    """How many bytes of a journal, perhaps cut, are whole frames."""
    at = len(MAGIC) if data.startswith(MAGIC) else 0
    while at and at + _FRAME.size <= len(data):
        end = at + _FRAME.size + _FRAME.unpack_from(data, at)[0]
        if end > len(data):
            break
        at = end
    return at


def current(records: list[Record], events: list[dict[str, Any]]) -> tuple[list[Record], list[dict[str, Any]]]:
    """What still holds after a run was resumed: a trial that was begun anew has new ids, and what it had before goes."""
    began = {(e["point"], e["trial"]): (i, e["first_id"]) for i, e in enumerate(events)
             if e.get("event") == "trial_start" and "first_id" in e}  # fmt: skip
    kept = [r for r in records if r.id >= began.get((r.point, r.trial), (0, 0))[1]]
    later = [e for i, e in enumerate(events) if i >= began.get((e.get("point", -1), e.get("trial", -1)), (0, 0))[0]]
    return kept, later


def read(data: bytes, reading: Reading) -> Iterator[Record]:
    """All whole records of a journal, which may be cut at any byte.

    A torn end and frames whose checksum fails are noted in `reading` and skipped, never raised; a file that is no
    journal, or of a newer format, is refused by name.
    """
    if not data.startswith(MAGIC):
        if MAGIC.startswith(data):
            reading.torn_bytes += len(data)
            return
        if data.startswith(b"ridgeline journal "):
            said = data[:40].split(b"\n")[0].decode("ascii", "replace")
            raise RidgelineError(f"journal: written by a newer version ({said}); this one reads format 1")
        raise RidgelineError("journal: not a Ridgeline journal (its first line is not 'ridgeline journal 1')")
    at, index = len(MAGIC), 0
    while at < len(data):
        if at + _FRAME.size > len(data):
            break
        length, crc = _FRAME.unpack_from(data, at)
        payload = data[at + _FRAME.size : at + _FRAME.size + length]
        if len(payload) < length:
            break
        at += _FRAME.size + length
        index += 1
        if zlib.crc32(payload) != crc:
            reading.bad_frames.append(index)
        elif payload[:1] == b"R":
            yield decode_record(payload)
        else:
            reading.events.append(orjson.loads(payload[1:]))
    reading.torn_bytes += len(data) - at
