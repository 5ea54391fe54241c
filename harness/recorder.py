"""Turns stamped bytes into records, in a process of its own, so that the loop that stamps never parses JSON.

`python -m harness.recorder JOURNAL` reads frames from standard input until it closes, and appends what they say to the
journal: records are in the operating system's hands at most FLUSH_S after their response ended, and a kill of the load
generator loses none that reached the pipe.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import select
import struct
import sys
import threading
import time
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from harness import dialects, journal
from harness.background import give_way, return_memory
from harness.framing import unframe
from harness.records import NAN, Record, Request

if TYPE_CHECKING:  # this process needs no event loop
    from harness.wire import Exchange

FLUSH_S = 0.05
SYNC_S = 1.0
READ_BYTES = 2**20
WHOLE_TEXTS, SHORT_CHARS = 200, 160  # so many different messages are kept whole
_HEAD = struct.Struct("<IcI")  # frame length after this field, kind, header length


def pack(kind: bytes, header: dict[str, Any], stamps_s: array[float] | None = None, ends: array[int] | None = None,
         body: bytes = b"") -> bytes:  # fmt: skip
    """One frame for the pipe: kind "X" an exchange, "E" an event of the run."""
    head = orjson.dumps(header)
    arrays = b"" if stamps_s is None or ends is None else stamps_s.tobytes() + ends.tobytes()
    return _HEAD.pack(5 + len(head) + len(arrays) + len(body), kind, len(head)) + head + arrays + body


def pack_exchange(exchange: Exchange, point: int, trial: int, t0_s: float, start_s: float) -> bytes:
    """The frame of one finished exchange, its times as the clock gave them; `t0_s` is when the run began, `start_s`
    when the trial did (scheduled times count from there)."""
    request: Request = exchange.tag
    ends = array("L", itertools.accumulate(map(len, exchange.reads)))
    due_s = request.scheduled_s
    header = {
        "id": request.id, "point": point, "trial": trial, "wave": request.wave, "warmup": request.warmup, "t0_s": t0_s,
        "scheduled_s": None if due_s is None else start_s + due_s, "sent_s": exchange.sent_s, "end_s": exchange.end_s,
        "connect_s": exchange.connect_s, "tls_s": exchange.tls_s, "status": exchange.status, "ending": exchange.ending, "note": exchange.note,
        "coding": exchange.coding, "resent": exchange.resent,
        "output_tokens": request.output_tokens, "input_tokens": request.input_tokens, "n": len(ends), "http": exchange.http,
    }  # fmt: skip
    return pack(b"X", header, exchange.stamps_s, ends, b"".join(exchange.reads))


_seen: set[str] = set()


def _bounded(text: str) -> str:
    """A million errors that all differ are told apart by their beginnings only."""
    if text in _seen or len(_seen) < WHOLE_TEXTS:
        _seen.add(text)
        return text
    return text[:SHORT_CHARS]


def _time(header: dict[str, Any], name: str, since_s: float = 0.0) -> float:
    """A time of the header, NaN if it never came: JSON carries it as null."""
    return NAN if header[name] is None else header[name] - since_s


def to_record(
    header: dict[str, Any], stamps_s: Sequence[float], ends: Sequence[int], body: bytes, secret: str = ""
) -> Record:
    answer = dialects.interpret(body, stamps_s, ends, header["status"], header["ending"], header["output_tokens"],
                                header["note"], header["coding"], secret)  # fmt: skip
    if header["resent"]:
        answer.notes.append("resent")
    t0_s, sent_s = header["t0_s"], _time(header, "sent_s")
    return Record(
        id=header["id"],
        point=header["point"],
        trial=header["trial"],
        wave=header["wave"],
        warmup=header["warmup"],
        scheduled_s=_time(header, "scheduled_s", t0_s),
        sent_s=sent_s - t0_s,
        connect_s=_time(header, "connect_s"),
        end_s=_time(header, "end_s", t0_s),
        chunk_s=(np.array(answer.arrivals_s, np.float64) - sent_s).astype(np.float32),
        chunk_tokens=np.array(answer.arrival_tokens, np.int32),
        input_tokens=answer.input_tokens,
        output_tokens=answer.output_tokens,
        token_source=answer.token_source,
        cached_tokens=answer.cached_tokens,
        status=header["status"],
        finish_reason=answer.finish_reason,
        error_class=answer.error_class,
        error=_bounded(answer.error),
        asked_input_tokens=header["input_tokens"],
        asked_output_tokens=header["output_tokens"],
        tls_s=_time(header, "tls_s"),
        first_event_s=answer.first_event_s - sent_s,
        last_event_s=answer.last_event_s - sent_s,
        choice_events=answer.choice_events,
        notes=" ".join(answer.notes),
    )


def unpack(frame: memoryview, secret: str = "") -> bytes:
    """A frame of the pipe -> a frame of the journal."""
    kind, length = bytes(frame[:1]), int.from_bytes(frame[1:5], "little")
    header = orjson.loads(frame[5 : 5 + length])
    if kind == b"E":
        return journal.encode_event(header)
    n, at = header["n"], 5 + length
    stamps_s, ends = array("d"), array("L")
    stamps_s.frombytes(frame[at : at + 8 * n])
    at += 8 * n
    ends.frombytes(frame[at : at + ends.itemsize * n])
    read = frame[at + ends.itemsize * n :]
    body, body_ends = unframe(read, ends) if header["http"] else (bytes(read), ends)
    return journal.encode(to_record(header, stamps_s, body_ends, body, secret))


def main(path: str) -> int:
    secret = os.environ.get("RIDGELINE_KEY", "")
    os.set_blocking(0, True)
    give_way()
    return_memory()
    gc.freeze()  # the modules stay: they need not be looked over with each collection
    out = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    if not os.fstat(out).st_size:
        os.write(out, journal.MAGIC)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    pending, ready, dealt = bytearray(), bytearray(), 0
    into = bytearray(READ_BYTES)  # once: a fresh one for each read would be mapped and unmapped each time
    flushed_s = time.monotonic()
    threading.Thread(target=_sync, args=(out,), daemon=True).start()  # a slow disk must not hold up what comes next
    while True:
        readable = select.select([0], [], [], FLUSH_S)[0]
        got = os.readv(0, [into]) if readable else 0
        with memoryview(into) as view:
            pending += view[:got]
        at = 0
        with memoryview(pending) as view:
            while at + 4 <= len(view) and (end := at + 4 + int.from_bytes(view[at : at + 4], "little")) <= len(view):
                ready += unpack(view[at + 4 : end], secret)
                at = end
                if time.monotonic() - flushed_s > FLUSH_S:
                    flushed_s = _flush(out, ready, dealt + at)
        del pending[:at]
        dealt += at
        now_s = time.monotonic()
        if ready and (now_s - flushed_s > FLUSH_S or not readable or not got):
            flushed_s = _flush(out, ready, dealt)
        if readable and not got:
            break
    os.fsync(out)
    return 0


def _sync(out: int) -> None:
    while True:
        time.sleep(SYNC_S)
        with contextlib.suppress(OSError):
            os.fsync(out)


def _flush(out: int, ready: bytearray, dealt: int) -> float:
    """Write what is ready, and tell the load generator how many of its bytes are dealt with."""
    view = bytes(ready)
    while view:
        view = view[os.write(out, view) :]
    ready.clear()
    with contextlib.suppress(OSError):  # it may be dead
        os.write(1, b"%d\n" % dealt)
    return time.monotonic()


if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1]))
    except OSError as problem:  # a full disk: what was written stands, and its last frame is dropped by the reader
        raise SystemExit(problem.strerror or str(problem)) from None
