"""The words of the project: Request, Record, Run, Prediction, Finding.  Imports nothing of ours.

Times are seconds.  Missing is NaN (or None for counts), never 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.integer[Any]]

NAN = float("nan")
Severity = Literal["info", "suspect", "invalid"]
Verdict = Literal["valid", "suspect", "invalid"]

# What can bind a point; the order is that of the explanation in the report.
LIMITS = ("memory_bandwidth", "compute", "latency", "communication", "capacity", "queue", "client")


RATES = ("output_tokens_per_s", "total_tokens_per_s", "requests_per_s")


class RidgelineError(Exception):
    """Something the user can mend: one sentence with where, what, what is allowed, what to do.

    `code` is the process's exit code (see the README): 2 local input, 5 invalid, 6 server or engine, 7 baseline.
    """

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Request:
    """One request to send.  `scheduled_s` (since the trial began) is None for "when a slot frees":
    that is the only difference between open and closed loop.

    `input_tokens` is the length asked of the prompt (None: as long as it is).  With `after`, it goes when the request of
    that id has ended, `think_s` later; in a session `wave` is the turn.
    """

    id: int
    prompt: str
    output_tokens: int
    scheduled_s: float | None = None
    wave: int = 0
    warmup: bool = False
    input_tokens: int | None = None
    after: int | None = None
    think_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Play:
    """How a point of a search is played: requests before the measured ones, measured ones, when the last may start, and
    the time over which a closed loop is filled (if all came at once, they would go on in step).  `full`: as long as a
    point at the edge is."""

    warmup: int
    requests: int
    within_s: float | None = None
    fill_s: float = 0.0
    full: bool = True


@dataclass(slots=True)
class Record:
    """What happened to one request.

    `scheduled_s`, `sent_s` and `end_s` are seconds since the run began, on the monotonic clock.
    `chunk_s` holds the arrivals of generated text in seconds after `sent_s` (float32: exact to a microsecond within
    16 s), `chunk_tokens` how many tokens each carried as far as the stream tells.  So TTFT is `chunk_s[0]` and E2E is
    `chunk_s[-1]`.  `connect_s` is the time the connection took to open, `tls_s` that of the TLS handshake after it; both were
    spent before `sent_s`.  `first_event_s` and `last_event_s` (after `sent_s` too) are the arrivals of the first and the
    last event that held a choice, with text or without, and `choice_events` how many there were: some tools count these
    as tokens (see definitions).
    """

    id: int
    point: int
    trial: int
    wave: int
    warmup: bool
    scheduled_s: float
    sent_s: float
    connect_s: float = NAN
    end_s: float = NAN
    chunk_s: Floats = field(default_factory=lambda: np.empty(0, np.float32))
    chunk_tokens: Ints = field(default_factory=lambda: np.empty(0, np.int32))
    input_tokens: int | None = None
    output_tokens: int | None = None
    token_source: str = "none"  # usage | chunks | none
    cached_tokens: int | None = None
    status: int = 0
    finish_reason: str = ""
    error_class: str = ""  # empty: success
    error: str = ""
    asked_input_tokens: int | None = None
    asked_output_tokens: int | None = None
    tls_s: float = NAN
    first_event_s: float = NAN
    last_event_s: float = NAN
    choice_events: int | None = None
    notes: str = ""  # names of endings.NOTES, with spaces between


@dataclass(frozen=True, slots=True)
class Finding:
    """What was seen, why it matters, what to do.  `code` is stable (V001 …)."""

    code: str
    severity: Severity
    saw: str
    why: str
    do: str


@dataclass(frozen=True, slots=True)
class Prediction:
    """A predicted value in SI units.  `terms` are the named parts and add up to it; `because` is a sentence with the
    numbers put in.  From `low` to `high` is the 90 % interval; `bound` is what no measurement can beat."""

    metric: str
    value: float
    low: float
    high: float
    limit: str
    terms: dict[str, float]
    because: str
    bound: float = NAN


@dataclass(frozen=True, slots=True)
class Table:
    """Many records as columns.  Ragged arrivals are flat: those of row i are chunk_s[start[i]:start[i + 1]].

    Counts that are missing are -1 here and None elsewhere: integer columns have no NaN.
    """

    id: Ints
    point: Ints
    trial: Ints
    wave: Ints
    warmup: npt.NDArray[np.bool_]
    scheduled_s: Floats
    sent_s: Floats
    connect_s: Floats
    end_s: Floats
    input_tokens: Ints
    output_tokens: Ints
    cached_tokens: Ints
    asked_input_tokens: Ints
    asked_output_tokens: Ints
    status: Ints
    token_source: npt.NDArray[Any]
    finish_reason: npt.NDArray[Any]
    error_class: npt.NDArray[Any]
    error: npt.NDArray[Any]
    tls_s: Floats
    first_event_s: Floats
    last_event_s: Floats
    choice_events: Ints
    notes: npt.NDArray[Any]
    first_token_s: Floats  # seconds since the run began, as sent_s: what the chunks tell in one value
    last_token_s: Floats
    chunk_s: Floats
    chunk_tokens: Ints
    start: Ints

    def __len__(self) -> int:
        return len(self.id)

    @property
    def ok(self) -> npt.NDArray[np.bool_]:
        return np.asarray(self.error_class == "")

    def where(self, mask: npt.NDArray[np.bool_]) -> Table:
        """The rows where `mask` (bool[n]) holds."""
        if mask.all():
            return self
        counts = np.diff(self.start)
        flat = np.repeat(mask, counts)
        columns = {name: getattr(self, name)[mask] for name in SCALAR_COLUMNS}
        start = np.concatenate([[0], np.cumsum(counts[mask])]).astype(np.int64)
        return Table(**columns, chunk_s=self.chunk_s[flat], chunk_tokens=self.chunk_tokens[flat], start=start)


SCALAR_COLUMNS = tuple(name for name in Table.__slots__ if name not in ("chunk_s", "chunk_tokens", "start"))
COUNTS = (
    "input_tokens", "output_tokens", "cached_tokens", "asked_input_tokens", "asked_output_tokens", "choice_events",
)  # fmt: skip
TEXTS = ("token_source", "finish_reason", "error_class", "error", "notes")


DERIVED = ("first_token_s", "last_token_s")


def table(records: list[Record]) -> Table:
    """Records -> columns, in the order of their ids."""
    rows = sorted(records, key=lambda record: record.id)

    def column(name: str) -> npt.NDArray[Any]:
        values = list(map(attrgetter(name), rows))
        if name in COUNTS:
            return np.array([-1 if value is None else value for value in values], np.int64)
        return np.array(values, object if name in TEXTS else bool if name == "warmup" else None)

    counts = [len(row.chunk_s) for row in rows]
    columns = {name: column(name) for name in SCALAR_COLUMNS if name not in DERIVED}
    chunk_s = np.concatenate([row.chunk_s for row in rows]) if rows else np.empty(0, np.float32)
    start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    first_s, last_s = first_and_last_s(columns["sent_s"], chunk_s, start)
    return Table(
        **columns,
        first_token_s=first_s,
        last_token_s=last_s,
        chunk_s=chunk_s,
        chunk_tokens=np.concatenate([row.chunk_tokens for row in rows]) if rows else np.empty(0, np.int32),
        start=start,
    )


def first_and_last_s(sent_s: Floats, chunk_s: Floats, start: Ints) -> tuple[Floats, Floats]:
    """When the first and the last arrival of each request came, in the time of `sent_s`; NaN where none came."""
    first, last = np.full(len(sent_s), NAN), np.full(len(sent_s), NAN)
    has = start[1:] > start[:-1]
    first[has] = sent_s[has] + chunk_s[start[:-1][has]]
    last[has] = sent_s[has] + chunk_s[start[1:][has] - 1]
    return first, last


def joined(tables: list[Table]) -> Table:
    """Blocks as one table, in the order of their ids."""
    if not tables:
        return table([])
    columns = {name: np.concatenate([getattr(t, name) for t in tables]) for name in SCALAR_COLUMNS}
    counts = np.concatenate([np.diff(t.start) for t in tables])
    start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    flat = {name: np.concatenate([getattr(t, name) for t in tables]) for name in ("chunk_s", "chunk_tokens")}
    order = np.argsort(columns["id"], kind="stable")
    if np.array_equal(order, np.arange(len(order))):
        return Table(**columns, **flat, start=start)
    at = np.concatenate([np.arange(start[i], start[i + 1]) for i in order]) if len(order) else np.empty(0, np.int64)
    return Table(
        **{name: values[order] for name, values in columns.items()},
        **{name: values[at] for name, values in flat.items()},
        start=np.concatenate([[0], np.cumsum(counts[order])]).astype(np.int64),
    )
