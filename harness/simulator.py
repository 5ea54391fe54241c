"""A fake engine with an exactly stated service law on a real socket: our signal generator.

The law.  A request of n prompt tokens gets a slot at once when one of k is free, else when one frees, first come first
served.  From the time it gets the slot (with no wait: the time at which its last byte was read from the socket):

    first token   after  a + b·n
    next token    after  c + d·batch, where batch is the number of requests that hold a slot, itself included and also
                  those before their first token (as in `vllm:num_requests_running`), when the token before was due

Each token is due at a fixed time computed from the due time before it, never from when that was really sent, so lateness
does not add up.  A slot frees when its last token is due; when the client goes away, at once.  With `tokens_per_event`
k > 1 the first event carries one token, each later one k (the last: what is left) and comes when its last token is due;
batch is then read once per event.  So TTFT, TPOT and E2E do not depend on k.  With `jitter_cv` all times of a request are
multiplied by one log-normal factor of mean 1; with `trial_cv` those of all requests between two resets.

Tokens.  A run of letters, digits and underscores is one, each other mark is one; a text prompt has `bos_tokens` more, a
chat `chat_tokens` on top of that; a prompt of token ids has as many as it has ids.

Every event is one HTTP chunk and one write; the response's head is written when the request has been parsed, and all that
follows the last token (usage, `[DONE]`, end of body) in one write after it.  `GET /__log__` tells for each request when it
was read and when each event was really written, on CLOCK_MONOTONIC, and how late that was: a client's error is its own
stamp minus ours.  (A chat's role chunk goes with the first token.  An answer that is not streamed, or with `one_piece`,
is one write; its log tells when each event would have been written.)  `POST /__reset__` empties that log.

How it keeps time: a timerfd wakes the loop a little early (libuv's own timers have steps of 1 ms) and the rest is polled
away, reading sockets meanwhile.  Requests are stamped when read and parsed later, between due tokens, so that a wave of
arrivals holds up neither stamps nor tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import math
import os
import random
import signal
import socket
import sys
import time
import traceback
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from heapq import heapify, heappop, heappush, heapreplace
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

import httptools
import orjson

from harness import __version__, units
from harness import simulator_formats as formats
from harness.records import RidgelineError

BODY_LIMIT_BYTES = 32_000_000
HEAD_LIMIT_BYTES = 65_536
BACKLOG_LIMIT_BYTES = 16_000_000  # what a client may leave unread before its connection is cut
LOG_REQUESTS = 20_000
LOG_EVENTS = 4_000_000
DEFAULT_OUTPUT_TOKENS = 16
CACHE_BLOCK_TOKENS = 16  # as vLLM's
CACHE_BLOCKS = 1_000_000
BEHIND_S = 1e-3

# Chosen by measurement: on an idle machine a timerfd wakes the loop 50 to 250 us late.
EARLY_S = 250e-6  # the timer is set this much before the due time
SPIN_S = 20e-6  # the last of it is spent without a look at the sockets, which would take that long
SLICE_S = 200e-6  # sockets are looked at this often, however much is due

now = time.perf_counter  # CLOCK_MONOTONIC on Linux, so stamps of several processes can be compared


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """What the server does, exactly; the module's text has the formulas.  Seconds and tokens.

    Raises RidgelineError for a value outside its range.
    """

    ttft_base_s: float = field(default=0.05, metadata={"help": "a: time to the first token of an empty prompt"})
    ttft_per_token_s: float = field(default=0.0, metadata={"help": "b: more time to it per prompt token"})
    itl_base_s: float = field(default=0.01, metadata={"help": "c: time from token to token, alone apart from d"})
    itl_per_batch_s: float = field(
        default=0.0, metadata={"help": "d: more time from token to token per running request"}
    )
    slots: int = field(default=0, metadata={"help": "k: requests that run at once; 0: all"})
    tokens_per_event: int = field(default=1, metadata={"help": "tokens in each event after the first"})
    jitter_cv: float = field(default=0.0, metadata={"help": "coefficient of variation of a factor per request"})
    trial_cv: float = field(default=0.0, metadata={"help": "the same per reset of the log"})
    seed: int = field(default=0, metadata={"help": "seed of both"})
    usage: Literal["end", "continuous", "none"] = field(
        default="end", metadata={"help": "usage, when asked for: in the last event, in each, or never"}
    )
    role_chunk: Literal["first", "early", "none"] = field(
        default="first",
        metadata={"help": "a chat's empty role chunk: just before the first token, when parsed, or none"},
    )
    done: bool = field(default=True, metadata={"help": "end streams with data: [DONE]"})
    one_piece: bool = field(
        default=False, metadata={"help": "deliver each stream in one write, when its last token is due"}
    )
    early_eos_after: int | None = field(default=None, metadata={"help": "end of text after so many tokens"})
    ignore_eos: Literal["honoured", "ignored", "refused"] = field(
        default="honoured", metadata={"help": "what ignore_eos and min_tokens in a request do"}
    )
    kv_tokens: int | None = field(
        default=None, metadata={"help": "KV cache: a request also waits until its prompt and max_tokens fit"}
    )
    prefix_cache: bool = field(
        default=False, metadata={"help": "prompt tokens seen before, in blocks of 16 from the start, take no time"}
    )
    context_tokens: int = field(default=32_768, metadata={"help": "longest prompt and output together"})
    bos_tokens: int = field(default=1, metadata={"help": "tokens before each text prompt"})
    chat_tokens: int = field(default=6, metadata={"help": "tokens of the chat template"})
    model: str = field(default="simulated", metadata={"help": "name of the served model"})

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(Law).items():
            value, least = getattr(self, name), _LEAST.get(name, 0)
            if name == "model" or (value is None and type(None) in get_args(kind)):
                continue
            if get_origin(kind) is Literal:
                if value not in get_args(kind):
                    raise RidgelineError(f"law: {name}: got {value!r}; known: {', '.join(get_args(kind))}")
            elif not (math.isfinite(value) and value >= least):
                raise RidgelineError(f"law: {name}: got {value!r}, expected a number of at least {least}")


_LEAST = {"tokens_per_event": 1, "early_eos_after": 1, "kv_tokens": 1, "context_tokens": 2}


class _Refused(Exception):
    """A request that gets an error instead of tokens."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param


@dataclass(slots=True, eq=False)
class _Job:
    """One request for tokens, from its last byte to its last token; then a line of the log."""

    id: str
    conn: _Connection | None
    answer: formats.Answer
    chat: bool
    stream: bool
    keep: bool
    usage: Literal["end", "continuous", "none"]
    finish: str
    prompt_tokens: int
    cached_tokens: int | None
    output_tokens: int
    prompt_crc32: int
    request_id: str
    peer_port: int
    received_s: float
    reserved_tokens: int = 0
    factor: float = 1.0
    slot_s: float = math.nan
    made: int = 0  # tokens so far
    step: int = 1  # tokens of the next event
    batch_sum: int = 0  # over gaps; for the mean
    gaps: int = 0
    clogged: int = 0  # writes that found the socket full: the client did not keep up
    state: str = "waiting"
    held: list[bytes] = field(default_factory=list)
    sent_s: array[float] = field(default_factory=lambda: array("d"))
    late_s: array[float] = field(default_factory=lambda: array("f"))
    tokens: array[int] = field(default_factory=lambda: array("I"))

    def line(self, with_events: bool) -> dict[str, Any]:
        line: dict[str, Any] = {
            "id": self.answer.id,
            "request_id": self.request_id,
            "peer_port": self.peer_port,
            "prompt_crc32": self.prompt_crc32,
            "chat": self.chat,
            "stream": self.stream,
            "state": self.state,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.made,
            "received_s": self.received_s,
            "slot_s": None if math.isnan(self.slot_s) else self.slot_s,
            "factor": self.factor,
            "batch_mean": self.batch_sum / self.gaps if self.gaps else None,
            "clogged_writes": self.clogged,
        }
        if with_events:
            line |= {"sent_s": self.sent_s.tolist(), "tokens": self.tokens.tolist(), "late_s": self.late_s.tolist()}
        return line


class _Alarm:
    """Calls back at an absolute time of `now`: by a timerfd on Linux, elsewhere by the loop's coarser timer."""

    def __init__(self, loop: asyncio.AbstractEventLoop, ring: Callable[[], None]) -> None:
        self._loop, self._ring = loop, ring
        self._at_s = math.inf
        self._fd = -1
        self._handle: asyncio.TimerHandle | None = None
        if sys.platform == "linux":
            # os.timerfd_create exists only from Python 3.13 on.
            libc = ctypes.PyDLL(None, use_errno=True)
            self._fd = libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd >= 0:
            self._spec = (ctypes.c_long * 4)()  # struct itimerspec: interval s, ns; value s, ns
            self._address = ctypes.addressof(self._spec)
            self._settime = libc.timerfd_settime
            self._settime.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
            loop.add_reader(self._fd, self._rang)

    def set(self, at_s: float) -> None:
        if at_s == self._at_s:
            return
        self._at_s = at_s
        if self._fd < 0:
            if self._handle:
                self._handle.cancel()
            # libuv rounds to milliseconds, so this one is set earlier still.
            self._handle = self._loop.call_at(self._loop.time() + at_s - now() - 1.5e-3, self._rang)
            return
        self._spec[2], self._spec[3] = int(at_s), int(at_s % 1 * 1e9)
        self._settime(self._fd, 1, self._address, None)  # 1: absolute

    def _rang(self) -> None:
        self._at_s = math.inf
        if self._fd >= 0:
            try:
                os.read(self._fd, 8)
            except BlockingIOError:
                return  # it was set anew since the loop saw it
        self._ring()

    def close(self) -> None:
        if self._handle:
            self._handle.cancel()
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1


class Server:
    """A listening simulator; `port` is the real one.  Made by `serve`."""

    def __init__(self, law: Law, loop: asyncio.AbstractEventLoop) -> None:
        self.law = law
        self.host, self.port = "", 0
        self._loop = loop
        self._alarm = _Alarm(loop, self._pump)
        self._soon = False
        self._closed = False
        self._listener: asyncio.Server | None = None
        self.connections: set[_Connection] = set()
        self._inbox: deque[tuple[_Connection, bytes, float]] = deque()
        self._due: list[tuple[float, int, _Job]] = []  # heap; the number breaks ties in order of arrival
        self._waiting: deque[_Job] = deque()
        self._running: dict[_Job, None] = {}
        self._reserved_tokens = 0
        self._begun = self._admitted = 0
        self._cache: set[int] = set()
        self._log: deque[_Job] = deque()
        self._log_events = 0
        self._counters = dict.fromkeys(
            ("prompt_tokens", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits", "num_preemptions"), 0
        )
        self._ttft, self._itl, self._e2e, self._queue = (
            formats.Histogram(formats.TTFT_BOUNDS_S),
            formats.Histogram(formats.ITL_BOUNDS_S),
            formats.Histogram(formats.E2E_BOUNDS_S),
            formats.Histogram(formats.E2E_BOUNDS_S),
        )
        self._trial = -1
        self.reset()

    @property
    def url(self) -> str:
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    @property
    def begun(self) -> int:
        """Requests for tokens accepted so far; the next one's number."""
        return self._begun

    def reset(self) -> None:
        """Empty the log and begin a new trial (see `trial_cv`); what is running goes on and will be logged."""
        self._log.clear()
        self._log_events = 0
        self._dropped = 0
        self._events = self._begun_in_trial = 0
        self._behind = 0
        self._late_sum_s = self._late_max_s = 0.0
        self._trial += 1
        self._trial_factor = _lognormal(self.law.trial_cv, self.law.seed, self._trial)

    async def close(self) -> None:
        """Stop listening, cut what is open."""
        if self._closed:
            return
        self._closed = True
        self._alarm.close()
        if self._listener:
            self._listener.close()
        for conn in tuple(self.connections):
            conn.abort()
        while self.connections:
            await asyncio.sleep(0)

    def summary(self) -> dict[str, Any]:
        """How well the law was kept since the last reset.  Seconds."""
        return {
            "events": self._events,
            "late_mean_s": self._late_sum_s / self._events if self._events else None,
            "late_max_s": self._late_max_s if self._events else None,
            "late_over_1ms": self._behind,
            "requests": len(self._log),
            "requests_dropped_from_log": self._dropped,
            "cpu_s": time.process_time(),
        }

    def log(self, with_events: bool = True) -> dict[str, Any]:
        """What GET /__log__ answers: requests that ended, oldest first, then those that run or wait."""
        jobs = [*self._log, *self._running, *self._waiting]
        return {
            "clock": "CLOCK_MONOTONIC",
            "now_s": now(),
            "law": asdict(self.law),
            "trial": self._trial,
            "summary": self.summary(),
            "requests": [job.line(with_events) for job in jobs],
        }

    def metrics(self) -> bytes:
        used = sum(job.prompt_tokens + job.made for job in self._running)
        return formats.metrics_text(
            self.law.model,
            {
                "num_requests_running": float(len(self._running)),
                "num_requests_waiting": float(len(self._waiting)),
                "kv_cache_usage_perc": used / self.law.kv_tokens if self.law.kv_tokens else 0.0,
            },
            {name: float(value) for name, value in self._counters.items()},
            {
                "time_to_first_token_seconds": self._ttft,
                "inter_token_latency_seconds": self._itl,
                "e2e_request_latency_seconds": self._e2e,
                "request_queue_time_seconds": self._queue,
            },
        )

    # ---- the loop: due tokens first, then one arrival at a time

    def took(self, conn: _Connection, data: bytes, at_s: float) -> None:
        """Bytes read at `at_s`: parsed soon, when nothing is due."""
        self._inbox.append((conn, data, at_s))
        self._wake()

    def _wake(self) -> None:
        if not self._soon:
            self._soon = True
            self._loop.call_soon(self._pumped)

    def _pumped(self) -> None:
        self._soon = False
        self._pump()

    def _pump(self) -> None:
        if self._closed:
            return
        due, inbox = self._due, self._inbox
        at_s = now()
        stop_s = at_s + SLICE_S
        while at_s < stop_s:
            if due and (wait_s := due[0][0] - at_s) < SPIN_S:
                if wait_s <= 0:
                    self._fire()
            elif inbox:
                conn, data, read_s = inbox.popleft()
                conn.feed(data, read_s)
            elif not due:
                return
            elif wait_s > EARLY_S + SPIN_S:
                self._alarm.set(due[0][0] - EARLY_S)
                return
            else:
                break
            at_s = now()
        self._wake()

    def _fire(self) -> None:
        """Send the event that is due, and say when the next one is."""
        due_s, order, job = self._due[0]
        conn = job.conn
        if conn is None:  # its client has gone
            heappop(self._due)
            return
        at, step = job.made, job.step
        made = at + step
        last = made >= job.output_tokens
        if job.stream:
            data = job.answer.event(at, step, last, self._usage(job, made) if job.usage == "continuous" else None)
            if at == 0 and job.chat and self.law.role_chunk == "first":
                data = job.answer.role() + data
            if self.law.one_piece:
                job.held.append(data)
                data = b"".join(job.held) if last else b""
        else:
            data = self._whole(job) if last else b""
        sent_s = now()
        if data and not conn.send(data):
            job.clogged += 1
        self._note(job, due_s, sent_s, step)
        job.made = made
        if last:
            heappop(self._due)
            self._finish(job, conn, due_s)
            return
        law = self.law
        batch = len(self._running)
        job.batch_sum += batch
        job.gaps += 1
        job.step = step = min(law.tokens_per_event, job.output_tokens - made)
        gap_s = (law.itl_base_s + law.itl_per_batch_s * batch) * step * job.factor
        heapreplace(self._due, (due_s + gap_s, order, job))

    def _note(self, job: _Job, due_s: float, sent_s: float, step: int) -> None:
        late_s = sent_s - due_s
        if job.sent_s:
            self._itl.observe((sent_s - job.sent_s[-1]) / step, step)
        else:
            self._ttft.observe(sent_s - job.received_s)
        job.sent_s.append(sent_s)
        job.late_s.append(late_s)
        job.tokens.append(step)
        self._counters["generation_tokens"] += step
        self._events += 1
        self._late_sum_s += late_s
        if late_s > self._late_max_s:
            self._late_max_s = late_s
        if late_s > BEHIND_S:
            self._behind += 1

    def _usage(self, job: _Job, made: int) -> dict[str, Any]:
        return formats.usage_of(job.prompt_tokens, made, job.cached_tokens)

    def _whole(self, job: _Job) -> bytes:
        usage = None if self.law.usage == "none" else self._usage(job, job.output_tokens)
        return formats.response(200, job.answer.whole(job.output_tokens, job.finish, usage), job.keep)

    def _finish(self, job: _Job, conn: _Connection, due_s: float) -> None:
        if job.stream:
            conn.send(job.answer.tail(None if job.usage == "none" else self._usage(job, job.made), self.law.done))
        self._e2e.observe(job.sent_s[-1] - job.received_s)
        conn.answered(job.keep)
        self._end(job, "finished", due_s)

    # ---- slots

    def begin(self, job: _Job) -> None:
        """Queue a parsed request."""
        self._begun += 1
        self._begun_in_trial += 1
        jitter = _lognormal(self.law.jitter_cv, self.law.seed, self._trial, self._begun_in_trial)
        job.factor = self._trial_factor * jitter
        job.reserved_tokens = job.prompt_tokens + job.output_tokens if self.law.kv_tokens else 0
        self._counters["prompt_tokens"] += job.prompt_tokens
        self._waiting.append(job)
        self._admit(job.received_s)

    def _admit(self, freed_s: float) -> None:
        law = self.law
        while self._waiting and not (law.slots and len(self._running) >= law.slots):
            job = self._waiting[0]
            if law.kv_tokens and self._reserved_tokens + job.reserved_tokens > law.kv_tokens:
                return
            self._waiting.popleft()
            self._running[job] = None
            self._reserved_tokens += job.reserved_tokens
            job.state = "running"
            job.slot_s = max(job.received_s, freed_s)
            self._queue.observe(job.slot_s - job.received_s)
            prefill = job.prompt_tokens - (job.cached_tokens or 0)
            ttft_s = (law.ttft_base_s + law.ttft_per_token_s * prefill) * job.factor
            self._admitted += 1
            heappush(self._due, (job.slot_s + ttft_s, self._admitted, job))

    def _end(self, job: _Job, state: str, at_s: float) -> None:
        job.state, job.conn = state, None
        job.held.clear()
        if job in self._running:
            del self._running[job]
            self._reserved_tokens -= job.reserved_tokens
        else:
            self._waiting.remove(job)
        self._log.append(job)
        self._log_events += len(job.sent_s)
        while len(self._log) > LOG_REQUESTS or self._log_events > LOG_EVENTS:
            self._log_events -= len(self._log.popleft().sent_s)
            self._dropped += 1
        self._admit(at_s)

    def gone(self, job: _Job) -> None:
        """The client has closed its connection: its slot frees at once."""
        self._end(job, "disconnected", now())
        if len(self._due) > 2 * len(self._running) + 64:
            self._due = [entry for entry in self._due if entry[2].conn]
            heapify(self._due)
        self._wake()

    def cached_tokens(self, prompt: _Prompt) -> int | None:
        """How many leading tokens are in the prefix cache; they are afterwards.  None without such a cache."""
        if not self.law.prefix_cache:
            return None
        ids = prompt.ids()
        self._counters["prefix_cache_queries"] += len(ids)
        hits, unbroken, key = 0, True, 0
        if len(self._cache) > CACHE_BLOCKS:
            self._cache.clear()
        for at in range(0, len(ids) - CACHE_BLOCK_TOKENS + 1, CACHE_BLOCK_TOKENS):
            key = hash((key, *ids[at : at + CACHE_BLOCK_TOKENS]))
            unbroken = unbroken and key in self._cache
            hits += unbroken
            self._cache.add(key)
        # The last token is always computed: the first output token comes from it.
        cached = min(hits * CACHE_BLOCK_TOKENS, (len(ids) - 1) // CACHE_BLOCK_TOKENS * CACHE_BLOCK_TOKENS)
        self._counters["prefix_cache_hits"] += cached
        return cached


class _Connection(asyncio.Protocol):
    """One client: stamps and hands over what it reads, parses when told to, writes at once."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._parser = httptools.HttpRequestParser(self)
        self._closed = False
        self._clogged = False
        self._job: _Job | None = None
        self._fd = -1
        self._port = 0
        self._head_bytes = 0
        self._read_s = 0.0
        self._clear()

    def _clear(self) -> None:
        self._url = b""
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._headed = False
        self._expects = False
        self._request_id = ""

    # asyncio's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._fd = sock.fileno()
        peer = transport.get_extra_info("peername")
        self._port = peer[1] if peer else 0
        self._server.connections.add(self)

    def data_received(self, data: bytes) -> None:
        self._server.took(self, data, now())

    def eof_received(self) -> None:
        self._lost()

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        self._lost()

    def _lost(self) -> None:
        self._closed = True
        job, self._job = self._job, None
        if job:
            self._server.gone(job)

    def abort(self) -> None:
        self._closed = True
        self._transport.abort()

    def send(self, data: bytes) -> bool:
        """Write now, past the loop's own queue (uvloop would write at the end of its turn); False if it had to wait."""
        if self._closed:
            return True
        if self._clogged:
            backlog = self._transport.get_write_buffer_size()
            self._clogged = backlog > 0
            if backlog > BACKLOG_LIMIT_BYTES:
                self._transport.abort()
                return False
        if not self._clogged:
            try:
                wrote = os.write(self._fd, data)
            except BlockingIOError:
                wrote = 0
            except OSError:
                self._transport.abort()  # connection_lost follows and frees the slot
                return True
            if wrote == len(data):
                return True
            data = data[wrote:]
            self._clogged = True
        self._transport.write(data)
        return False

    def answered(self, keep: bool) -> None:
        self._job = None
        if not keep and not self._closed:
            self._closed = True
            self._transport.close()

    # the server's call, then the parser's

    def feed(self, data: bytes, read_s: float) -> None:
        if self._closed:
            return
        self._read_s = read_s
        if not self._headed:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
            if not self._headed and self._head_bytes > HEAD_LIMIT_BYTES:
                raise _Refused(431, f"the request's head is longer than {HEAD_LIMIT_BYTES} bytes")
        except _Refused as refusal:
            self._reply(refusal.status, formats.error_body(refusal.status, str(refusal), refusal.param), keep=False)
        except httptools.HttpParserUpgrade:
            self._reply(400, formats.error_body(400, "no other protocol is spoken here"), keep=False)
        except httptools.HttpParserError as problem:
            # What our own callbacks raise comes wrapped.
            cause = problem.__context__ if isinstance(problem, httptools.HttpParserCallbackError) else None
            if isinstance(cause, _Refused):
                status, text = cause.status, str(cause)
            elif cause is None:
                status, text = 400, "this is not HTTP/1.1"
            else:
                status, text = 500, "a mistake of the simulator's own; its stderr says which"
                traceback.print_exception(cause)
            self._reply(status, formats.error_body(status, text), keep=False)

    def on_message_begin(self) -> None:
        self._clear()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        lower = name.lower()
        if lower == b"x-request-id":
            self._request_id = value[:200].decode("latin-1")
        elif lower == b"expect":
            self._expects = value.lower() == b"100-continue"

    def on_headers_complete(self) -> None:
        self._headed = True
        if self._parser.get_http_version() != "1.1":
            raise _Refused(505, "only HTTP/1.1 is spoken here")
        if self._expects:
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body.append(body)
        self._body_bytes += len(body)
        if self._body_bytes > BODY_LIMIT_BYTES:
            raise _Refused(413, f"the request's body is longer than {BODY_LIMIT_BYTES} bytes")

    def on_message_complete(self) -> None:
        keep = bool(self._parser.should_keep_alive())
        self._headed, self._head_bytes = False, 0
        if self._job is not None or self._closed:
            self.abort_pipelining()
            return
        try:
            self._route(self._parser.get_method().decode("latin-1"), keep)
        except _Refused as refusal:
            self._reply(refusal.status, formats.error_body(refusal.status, str(refusal), refusal.param), keep)

    def abort_pipelining(self) -> None:
        """A second request before the first was answered is a mistake of the client's; interleaved answers would hide it."""
        if not self._closed:
            self._transport.abort()

    def _route(self, method: str, keep: bool) -> None:
        path, _, query = self._url.decode("latin-1").partition("?")
        found = ROUTES.get(path)
        if found is None:
            raise _Refused(404, f"no such path: {path}; known: {', '.join(ROUTES)}")
        if method != found[0]:
            raise _Refused(405, f"{path} takes {found[0]}, not {method}")
        found[1](self, query, keep)

    def _reply(self, status: int, body: bytes, keep: bool, kind: bytes = b"application/json") -> None:
        self.send(formats.response(status, body, keep, kind))
        if not keep and not self._closed:
            self._closed = True
            self._transport.close()

    def _json(self) -> dict[str, Any]:
        try:
            said = orjson.loads(b"".join(self._body))
        except orjson.JSONDecodeError as problem:
            raise _Refused(400, f"the body is not JSON: {problem}") from None
        if not isinstance(said, dict):
            raise _Refused(400, "the body is not a JSON object")
        return said

    # what each path does

    def completions(self, query: str, keep: bool) -> None:
        self._generate(self._json(), False, keep)

    def chat(self, query: str, keep: bool) -> None:
        self._generate(self._json(), True, keep)

    def models(self, query: str, keep: bool) -> None:
        law = self._server.law
        card = {
            "id": law.model,
            "object": "model",
            "created": 0,
            "owned_by": "ridgeline",
            "max_model_len": law.context_tokens,
        }
        self._reply(200, orjson.dumps({"object": "list", "data": [card]}), keep)

    def health(self, query: str, keep: bool) -> None:
        self._reply(200, b"", keep)

    def version(self, query: str, keep: bool) -> None:
        self._reply(200, orjson.dumps({"version": f"ridgeline-simulator {__version__}"}), keep)

    def tokenize(self, query: str, keep: bool) -> None:
        body, law = self._json(), self._server.law
        self._check_model(body)
        special = body.get("add_special_tokens", True) is not False
        ids = _prompt_of(body, "messages" in body, law, special).ids()
        self._reply(200, orjson.dumps({"count": len(ids), "max_model_len": law.context_tokens, "tokens": ids}), keep)

    def metrics(self, query: str, keep: bool) -> None:
        self._reply(200, self._server.metrics(), keep, b"text/plain; version=0.0.4; charset=utf-8")

    def log(self, query: str, keep: bool) -> None:
        self._reply(200, orjson.dumps(self._server.log(with_events="events=0" not in query.split("&"))), keep)

    def reset(self, query: str, keep: bool) -> None:
        self._server.reset()
        self._reply(200, b"{}", keep)

    def _check_model(self, body: dict[str, Any]) -> None:
        name = body.get("model", self._server.law.model)
        if name != self._server.law.model:
            raise _Refused(404, f"The model `{name}` does not exist; served here: `{self._server.law.model}`.", "model")

    def _generate(self, body: dict[str, Any], chat: bool, keep: bool) -> None:
        server, law = self._server, self._server.law
        self._check_model(body)
        if body.get("n", 1) not in (1, None):
            raise _Refused(400, "only n = 1 is simulated", "n")
        prompt = _prompt_of(body, chat, law)
        asked = _whole_number(body, "max_completion_tokens", _whole_number(body, "max_tokens", DEFAULT_OUTPUT_TOKENS))
        prompt_tokens = prompt.count()
        _check_length(law, prompt_tokens, asked)
        output_tokens, finish = _output(law, body, asked)
        stream = body.get("stream") is True
        server_id = f"{'chatcmpl' if chat else 'cmpl'}-{server.begun:08x}"
        answer = formats.Answer(chat, server_id, law.model, int(time.time()), finish)
        job = _Job(
            id=server_id, conn=self, answer=answer, chat=chat, stream=stream, keep=keep, usage=_usage_kind(law, body),
            finish=finish, prompt_tokens=prompt_tokens, cached_tokens=server.cached_tokens(prompt), output_tokens=output_tokens,
            prompt_crc32=prompt.crc32, request_id=self._request_id, peer_port=self._port, received_s=self._read_s,
        )  # fmt: skip
        self._job = job
        if stream:
            head = formats.STREAM_HEAD + (b"\r\n" if keep else b"connection: close\r\n\r\n")
            self.send(head + answer.role() if chat and law.role_chunk == "early" else head)
        server.begin(job)


Route = tuple[str, Callable[[_Connection, str, bool], None]]
ROUTES: dict[str, Route] = {
    "/v1/completions": ("POST", _Connection.completions),
    "/v1/chat/completions": ("POST", _Connection.chat),
    "/v1/models": ("GET", _Connection.models),
    "/tokenize": ("POST", _Connection.tokenize),
    "/health": ("GET", _Connection.health),
    "/version": ("GET", _Connection.version),
    "/metrics": ("GET", _Connection.metrics),
    "/__log__": ("GET", _Connection.log),
    "/__reset__": ("POST", _Connection.reset),
}


def _lognormal(cv: float, *seeds: int) -> float:
    """A log-normal number of mean 1 and the given coefficient of variation."""
    if not cv:
        return 1.0
    variance = math.log1p(cv * cv)
    return math.exp(random.Random(str(seeds)).gauss(-variance / 2, math.sqrt(variance)))


def _whole_number(body: dict[str, Any], name: str, default: int) -> int:
    value = body.get(name)
    if value is None:
        return default
    if type(value) is not int or value < (0 if name == "min_tokens" else 1):
        raise _Refused(400, f"{name}: got {value!r}, expected a whole number of at least 1", name)
    return value


@dataclass(frozen=True, slots=True)
class _Prompt:
    lead: list[int]  # ids of special tokens before the text
    text: str
    given: list[int] | None  # where the prompt came as ids
    crc32: int  # of its text: by it a client can find its request in the log

    def count(self) -> int:
        return formats.count_of(self.text) + len(self.lead) if self.given is None else len(self.given)

    def ids(self) -> list[int]:
        # Made only where needed: it takes longer than all else that a request needs.
        return self.given if self.given is not None else self.lead + formats.ids_of(self.text)


def _prompt_of(body: dict[str, Any], chat: bool, law: Law, special: bool = True) -> _Prompt:
    lead = [formats.BOS_ID] * law.bos_tokens if special else []
    if chat:
        text = "\n".join(_message_texts(body.get("messages")))
        lead += [formats.TEMPLATE_ID] * law.chat_tokens
        return _Prompt(lead, text, None, zlib.crc32(text.encode()))
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return _Prompt(lead, prompt, None, zlib.crc32(prompt.encode()))
    if isinstance(prompt, list) and prompt and all(type(id) is int for id in prompt):
        return _Prompt([], "", prompt, zlib.crc32(orjson.dumps(prompt)))
    raise _Refused(400, "prompt: expected one text, or one list of token ids", "prompt")


def _message_texts(messages: Any) -> list[str]:
    """The texts of a chat's messages; of content in parts, those of the text parts."""
    if not isinstance(messages, list) or not messages or not all(isinstance(said, dict) for said in messages):
        raise _Refused(400, "messages: expected a list of objects with role and content", "messages")
    texts = []
    for said in messages:
        content = said.get("content") or ""
        parts = [{"text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            raise _Refused(400, "messages: a content is neither a text nor a list of parts", "messages")
        texts.append("".join(str(part.get("text", "")) for part in parts))
    return texts


def _check_length(law: Law, prompt_tokens: int, output_tokens: int) -> None:
    total = prompt_tokens + output_tokens
    if total > law.context_tokens:
        raise _Refused(
            400,
            f"This model's maximum context length is {law.context_tokens} tokens. However, you requested {total} tokens "
            f"({prompt_tokens} in the prompt, {output_tokens} in the completion). Please reduce the length of either.",
        )
    if law.kv_tokens and total > law.kv_tokens:
        raise _Refused(400, f"{total} tokens exceed the KV cache's {law.kv_tokens}: this request could never run.")


def _output(law: Law, body: dict[str, Any], asked: int) -> tuple[int, str]:
    """How many tokens come, and the finish reason."""
    if law.ignore_eos == "refused":
        for name in ("ignore_eos", "min_tokens"):
            if name in body:
                raise _Refused(400, f"Unrecognized request argument supplied: {name}", name)
    if law.early_eos_after is None or law.early_eos_after >= asked:
        return asked, "length"
    heeds = law.ignore_eos == "honoured"
    if heeds and body.get("ignore_eos") is True:
        return asked, "length"
    least = _whole_number(body, "min_tokens", 0) if heeds else 0
    if least >= asked:
        return asked, "length"
    return max(law.early_eos_after, least), "stop"


def _usage_kind(law: Law, body: dict[str, Any]) -> Literal["end", "continuous", "none"]:
    options = body.get("stream_options")
    if law.usage == "none" or not isinstance(options, dict) or options.get("include_usage") is not True:
        return "none"
    return "continuous" if options.get("continuous_usage_stats") is True else law.usage


async def serve(law: Law, host: str = "127.0.0.1", port: int = 0) -> Server:
    """Listen on the running loop; port 0 takes a free one, told by the result's `port`.

    Raises RidgelineError if the address cannot be had.
    """
    loop = asyncio.get_running_loop()
    server = Server(law, loop)
    try:
        listener = await loop.create_server(lambda: _Connection(server), host, port, backlog=4096)
    except (OSError, OverflowError) as problem:
        await server.close()
        raise RidgelineError(
            f"simulate: cannot listen on {host}:{port}: {problem}; take another port, or 0", 2
        ) from None
    server._listener = listener
    server.host, server.port = host, listener.sockets[0].getsockname()[1]
    return server


async def _serve_until_told(law: Law, host: str, port: int, log: Callable[[str], None]) -> dict[str, Any]:
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, told.set)
    server = await serve(law, host, port)
    # The collector would stop everything for milliseconds; what lives long is set aside, and it seldom looks.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 1000)
    log(f"simulator: {server.url}")
    await told.wait()
    summary = server.summary()
    await server.close()
    return summary


def _say(line: str) -> None:
    print(line, flush=True)


def run(law: Law, host: str = "127.0.0.1", port: int = 0, log: Callable[[str], None] = _say) -> dict[str, Any]:
    """Serve until SIGINT or SIGTERM; `log` gets one line when it listens.  Returns `Server.summary()`."""
    work = _serve_until_told(law, host, port, log)
    try:
        import uvloop
    except ImportError:  # not on every platform; the pauses are then coarser by some 0.05 ms
        return asyncio.run(work)
    return uvloop.run(work)


def parser() -> argparse.ArgumentParser:
    """One option for each field of Law (`ttft_base_s` is `--ttft-base`), and where to listen."""
    options = argparse.ArgumentParser("ridgeline simulate", description="A server with an exactly stated service law.")
    options.add_argument("--host", default="127.0.0.1")
    options.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    kinds = get_type_hints(Law)
    for item in fields(Law):
        kind, name = kinds[item.name], "--" + item.name.removesuffix("_s").replace("_", "-")
        said: dict[str, Any] = {"dest": item.name, "default": item.default, "help": item.metadata["help"]}
        if kind is bool:
            said["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is Literal:
            said["choices"] = get_args(kind)
        elif item.name.endswith("_s"):
            said |= {"type": _time, "metavar": "TIME"}
        else:
            said |= {"type": kind if kind in (int, float, str) else int, "metavar": "NAME" if kind is str else "N"}
        options.add_argument(name, **said)
    return options


def _time(text: str) -> float:
    try:
        return units.parse(text, "time")
    except RidgelineError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from None


def main(argv: Sequence[str] | None = None) -> int:
    """The command: serves until told to stop; says on stderr how well the law was kept."""
    chosen = vars(parser().parse_args(argv))
    host, port = chosen.pop("host"), chosen.pop("port")
    try:
        summary = run(Law(**chosen), host, port)
    except RidgelineError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.code
    if summary["events"]:
        mean, most = units.seconds(summary["late_mean_s"]), units.seconds(summary["late_max_s"])
        late = units.count(summary["late_over_1ms"])
        print(f"simulator: {summary['events']:,} events, late by {mean} on average, {most} at most, "
              f"{late} by more than 1 ms", file=sys.stderr)  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
