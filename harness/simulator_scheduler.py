"""The simulator's scheduler: who runs, when each token is due, what is logged.

How it keeps time: a timerfd wakes the loop a little early (libuv's own timers have steps of 1 ms) and the rest is polled
away, reading sockets meanwhile.  Requests are stamped when read and parsed later, between due tokens, so that a wave of
arrivals holds up neither stamps nor tokens.
"""

from __future__ import annotations

import asyncio
import ctypes
import math
import os
import sys
import time
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from heapq import heapify, heappop, heappush, heapreplace
from typing import Any, Protocol

from harness import simulator_formats as formats
from harness.simulator_law import Law, Prompt, Usage, lognormal

LOG_REQUESTS = 20_000
LOG_EVENTS = 4_000_000
CACHE_BLOCK_TOKENS = 16  # as vLLM's
CACHE_BLOCKS = 1_000_000
BEHIND_S = 1e-3

# Chosen by measurement: on an idle machine a timerfd wakes the loop 50 to 250 us late.
EARLY_S = 250e-6  # the timer is set this much before the due time
SPIN_S = 20e-6  # the last of it is spent without a look at the sockets, which would take that long
SLICE_S = 200e-6  # sockets are looked at this often, however much is due

now = time.perf_counter  # CLOCK_MONOTONIC on Linux, so stamps of several processes can be compared


class Connection(Protocol):
    """What the scheduler asks of a client's connection."""

    def feed(self, data: bytes, read_s: float) -> None: ...

    def send(self, data: bytes) -> bool: ...

    def answered(self, keep: bool) -> None: ...

    def abort(self) -> None: ...


@dataclass(slots=True, eq=False)
class Job:
    """One request for tokens, from its last byte to its last token; then a line of the log."""

    conn: Connection | None
    answer: formats.Answer
    chat: bool
    stream: bool
    keep: bool
    usage: Usage
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
        self.listener: asyncio.Server | None = None
        self.connections: set[Connection] = set()
        self._inbox: deque[tuple[Connection, bytes, float]] = deque()
        self._due: list[tuple[float, int, Job]] = []  # heap; the number breaks ties in order of arrival
        self._waiting: deque[Job] = deque()
        self._running: dict[Job, None] = {}
        self._reserved_tokens = 0
        self._begun = self._admitted = 0
        self._cache: set[int] = set()
        self._log: deque[Job] = deque()
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
        self._trial_factor = lognormal(self.law.trial_cv, self.law.seed, self._trial)

    async def close(self) -> None:
        """Stop listening, cut what is open."""
        if self._closed:
            return
        self._closed = True
        self._alarm.close()
        if self.listener:
            self.listener.close()
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

    def took(self, conn: Connection, data: bytes, at_s: float) -> None:
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

    def _note(self, job: Job, due_s: float, sent_s: float, step: int) -> None:
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

    def _usage(self, job: Job, made: int) -> dict[str, Any]:
        return formats.usage_of(job.prompt_tokens, made, job.cached_tokens)

    def _whole(self, job: Job) -> bytes:
        usage = None if self.law.usage == "none" else self._usage(job, job.output_tokens)
        return formats.response(200, job.answer.whole(job.output_tokens, job.finish, usage), job.keep)

    def _finish(self, job: Job, conn: Connection, due_s: float) -> None:
        if job.stream:
            conn.send(job.answer.tail(None if job.usage == "none" else self._usage(job, job.made), self.law.done))
        self._e2e.observe(job.sent_s[-1] - job.received_s)
        conn.answered(job.keep)
        self._end(job, "finished", due_s)

    # ---- slots

    def begin(self, job: Job) -> None:
        """Queue a parsed request."""
        self._begun += 1
        self._begun_in_trial += 1
        jitter = lognormal(self.law.jitter_cv, self.law.seed, self._trial, self._begun_in_trial)
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

    def _end(self, job: Job, state: str, at_s: float) -> None:
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

    def gone(self, job: Job) -> None:
        """The client has closed its connection: its slot frees at once."""
        self._end(job, "disconnected", now())
        if len(self._due) > 2 * len(self._running) + 64:
            self._due = [entry for entry in self._due if entry[2].conn]
            heapify(self._due)
        self._wake()

    def cached_tokens(self, prompt: Prompt) -> int | None:
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
