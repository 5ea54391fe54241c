"""The append-only truth of a run: Record or event -> framed bytes, and back from a file cut anywhere.

Format 1: the magic line, then frames of (length u32, crc32 u32, payload), little-endian.  A payload is one kind byte
("R" a record, "E" an event of the run as JSON), then for a record: header length u32, header JSON, chunk_s float32[n],
chunk_tokens int32[n].
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import orjson

from harness.records import NAN, Record, RidgelineError

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
        if header.get(name) is None:
            header[name] = NAN
    return Record(**header, chunk_s=chunk_s, chunk_tokens=chunk_tokens)


@dataclass(slots=True)
class Reading:
    """What a journal told besides its records: events of the run, bytes dropped at a torn end, frames that failed."""

    events: list[dict[str, Any]] = field(default_factory=list)
    torn_bytes: int = 0
    bad_frames: list[int] = field(default_factory=list)


def whole_bytes(file: BinaryIO) -> int:
    """How many bytes of a journal, perhaps cut, are whole frames."""
    at = len(MAGIC) if file.read(len(MAGIC)) == MAGIC else 0
    size = file.seek(0, 2)
    while at and at + _FRAME.size <= size:
        file.seek(at)
        end = at + _FRAME.size + _FRAME.unpack(file.read(_FRAME.size))[0]
        if end > size:
            break
        at = end
    return at


Begun = dict[
    tuple[int, int], tuple[int, int]
]  # (point, trial) -> its last start's place among the events, its first id


def begun(events: Sequence[Mapping[str, Any]]) -> Begun:
    """Where each trial began, the last time it did: a run that was resumed has some twice."""
    return {(e["point"], e["trial"]): (i, e["first_id"]) for i, e in enumerate(events)
            if e.get("event") == "trial_start" and "first_id" in e}  # fmt: skip


def current(events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The events that still hold: a trial that was begun anew loses what it had before."""
    starts = begun(events)
    return [e for i, e in enumerate(events) if i >= starts.get((e.get("point", -1), e.get("trial", -1)), (0, 0))[0]]


def ended(events: Sequence[Mapping[str, Any]]) -> set[tuple[int, int]]:
    """(point, trial) of those that came to their end."""
    return {(e["point"], e["trial"]) for e in events if e.get("event") == "trial_end" and not e.get("stopped")}


LONGEST = 2**26  # no frame is longer
PIECE = 4 * 2**20  # bytes read at once


def payloads(file: BinaryIO, reading: Reading) -> Iterator[bytes]:
    """The payloads of all whole frames of a journal, which may be cut at any byte.

    A torn end and frames whose checksum fails are noted in `reading` and skipped, never raised; where a frame's length is
    damaged too, the next whole frame is looked for.  A file that is no journal, or of a newer format, is refused by name.
    """
    data, at, index = file.read(PIECE), len(MAGIC), 0
    if not data.startswith(MAGIC):
        _refuse(data, reading)
        return
    while True:
        length, crc = _FRAME.unpack_from(data, at) if at + _FRAME.size <= len(data) else (0, 0)
        end = at + _FRAME.size + length
        if end > len(data):
            if more := file.read(PIECE):
                data, at = data[at:] + more, 0
                if length < LONGEST or len(data) < LONGEST:
                    continue
            if (found := _next_frame(data, at + 1)) is None:
                break
            index += 1
            reading.bad_frames.append(index)
            at = found
            continue
        payload = data[at + _FRAME.size : end]
        at, index = end, index + 1
        if zlib.crc32(payload) != crc:
            reading.bad_frames.append(index)
            if end + _FRAME.size <= len(data) and not _is_frame(data, end):
                at = _next_frame(data, end - len(payload)) or end
        else:
            yield payload
    reading.torn_bytes += len(data) - at


def _is_frame(data: bytes, at: int) -> bool:
    length, crc = _FRAME.unpack_from(data, at)
    payload = data[at + _FRAME.size : at + _FRAME.size + length]
    return payload[:1] in (b"R", b"E") and len(payload) == length and zlib.crc32(payload) == crc


def _next_frame(data: bytes, at: int) -> int | None:
    """Where the next whole frame begins: its kind byte is looked for, its length and checksum must hold."""
    for kind in re.finditer(b"[RE]", data[at + _FRAME.size :]):
        start = at + kind.start()
        if data[start + 3] < LONGEST >> 24 and _is_frame(data, start):
            return start
    return None


def _refuse(data: bytes, reading: Reading) -> None:
    if MAGIC.startswith(data):
        reading.torn_bytes += len(data)
    elif data.startswith(b"ridgeline journal "):
        said = data[:40].split(b"\n")[0].decode("ascii", "replace")
        raise RidgelineError(f"journal: written by a newer version ({said}); this one reads format 1")
    else:
        raise RidgelineError("journal: not a Ridgeline journal (its first line is not 'ridgeline journal 1')")


def read(data: bytes, reading: Reading) -> Iterator[Record]:
    """All whole records of a journal's bytes; its events and what is wrong with it go to `reading`."""
    yield from records(io.BytesIO(data), reading)


def records(file: BinaryIO, reading: Reading) -> Iterator[Record]:
    """All whole records of a journal; its events and what is wrong with it go to `reading`."""
    for payload in payloads(file, reading):
        if payload[:1] == b"R":
            yield decode_record(payload)
        else:
            reading.events.append(orjson.loads(payload[1:]))
