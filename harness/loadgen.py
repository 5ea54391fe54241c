"""Plays a plan on time.  Wave, closed loop and open loop are one loop: a request goes when it is due and may go.

Due is a matter of `scheduled_s` (None: at once).  May go is a matter of slots: at most `slots` in flight, and in a
wave a slot opens only when all of the wave before have ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import itertools
import resource
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from harness import background, dialects
from harness.lag import Lag
from harness.records import NAN, Request, RidgelineError
from harness.senses import Watch
from harness.wire import QUIET_S, Exchange, Target, Wire, clock, connect

CONNECT_AT_ONCE = 64  # a storm of connections would be refused, and measured
TICK_S = 0.02  # how often the scheduler and the clocks are looked at
TIMERS_EVERY = 5  # ticks between looks at the timers of all requests in flight
GONE_S = 45.0  # a server may restart; one that takes no connection for so long will not come back
HAND_OVER_S = 0.001  # what has ended is handed to the recorder in small portions, between reads
HAND_OVER_TIMES = 100  # a backlog is handed over in so many portions at most, so within an eighth of a second


@dataclass(frozen=True, slots=True)
class Timers:
    """Limits of one request, in seconds."""

    connect_s: float = 10.0
    first_token_s: float = 300.0
    idle_s: float = 60.0
    total_s: float = 900.0


@dataclass(slots=True)
class Senses:
    """What the load generator noticed of itself while it played one stretch of the plan."""

    started_s: float = 0.0
    ended_s: float = 0.0
    cpu_s: float = 0.0
    lag: dict[str, Any] = field(default_factory=dict)  # see lag.Lag.as_dict
    max_in_flight: int = 0
    reconnects: int = 0
    connect_errors: int = 0
    noticed: dict[str, Any] = field(default_factory=dict)  # see senses.Watch.stop

    def as_dict(self) -> dict[str, Any]:
        wall_s = self.ended_s - self.started_s
        return (
            {
                "started_s": self.started_s,
                "ended_s": self.ended_s,
                "cpu_share": self.cpu_s / wall_s if wall_s > 0 else None,
                "max_in_flight": self.max_in_flight,
                "reconnects": self.reconnects,
                "connect_errors": self.connect_errors,
            }
            | self.lag
            | self.noticed
        )


class Player:
    """Sends requests and hands each finished exchange to `sink`.  One at a time plays; connections live on between."""

    def __init__(self, target: Target, address: tuple[Any, ...], tls: ssl.SSLContext | None, timers: Timers,
                 encode: Callable[[Request], bytes], sink: Callable[[Exchange], None],
                 room: Callable[[], bool] = lambda: True) -> None:  # fmt: skip
        background.return_memory()
        self.target, self.address, self.tls, self.timers = target, address, tls, timers
        self.encode, self.sink, self.room = encode, sink, room
        self.idle: list[Wire] = []
        self.busy: dict[Wire, Exchange] = {}
        self.opening = 0
        self.senses = Senses()
        self.queue: deque[tuple[Request, bytes]] = deque()
        self.held: dict[int, tuple[Request, bytes]] = {}  # by the id of the turn that must have ended
        self.live: set[int] = set()  # serialised, and not yet ended
        self.slots = 0
        self.barrier = False
        self.wave = -1
        self.start_s = 0.0
        self.until_s = float("inf")
        self.stopping = False
        self.lag: Lag | None = None
        self.refused_s = NAN  # since when no connection opens
        self.gone = 0.0  # for how long none did, when that ended the play
        self.refill: Callable[[], bool] = lambda: False
        self.done: asyncio.Future[None] | None = None
        self.tasks: set[asyncio.Task[None]] = set()
        self.ended: deque[Exchange] = deque()
        self.portion = 0  # how many of them are handed over at a time

    # -- connections

    async def prepare(self, count: int) -> None:
        """Have `count` idle connections open before the clock starts.  Raises RidgelineError when none can be had."""
        self._allow_files(count)
        self.idle = [wire for wire in self.idle if wire.open]
        while len(self.idle) < count:
            batch = min(CONNECT_AT_ONCE, count - len(self.idle))
            found = await asyncio.gather(*(self._open() for _ in range(batch)), return_exceptions=True)
            self.idle += [wire for wire in found if isinstance(wire, Wire)]
            if failed := [problem for problem in found if isinstance(problem, BaseException)]:
                self.senses.connect_errors += len(failed)
                if len(failed) == batch:
                    raise RidgelineError(
                        f"{self.target.url}: no connection could be opened ({failed[0] or type(failed[0]).__name__}); "
                        "is the server up, and does it take this many connections?", 6)  # fmt: skip
                return

    async def _open(self) -> Wire:
        wire = Wire(self._ended, self._idle_closed)
        return await connect(self.target, self.address, self.tls, wire, self.timers.connect_s)

    def _allow_files(self, count: int) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        need = count + 64
        if soft < need:
            if hard != resource.RLIM_INFINITY and hard < need:
                raise RidgelineError(
                    f"{count} connections need {need} open files; this shell allows {hard} (ulimit -n)"
                )
            resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))

    def _idle_closed(self, wire: Wire) -> None:
        if wire in self.idle:
            self.idle.remove(wire)

    def close(self) -> None:
        """Close all connections; what was still in flight is recorded as cancelled."""
        self.stop()
        for wire in list(self.busy):
            wire.finish("cancelled", "the run was stopped")
        for wire in self.idle:
            wire.close()
        self.idle.clear()
        self._hand_over(everything=True)

    # -- playing

    async def play(self, requests: Iterator[Request], slots: int, *, barrier: bool = False, ahead: int = 0,
                   until_s: float = float("inf"),
                   start: Callable[[], Awaitable[float]] | None = None) -> Senses:  # fmt: skip
        """Play `requests` to the end, or start none after `until_s` seconds.

        `slots` caps what is in flight (0: no cap).  With `barrier`, requests of one `wave` number go together, and the
        next wave when all have ended.  Bodies are serialised before the clock starts: all of a wave, or `ahead` of a
        long plan.  `start` is awaited when all is ready and gives the moment (of `clock`) to begin at.  Returns what the
        generator noticed of itself.
        """
        self.senses = Senses()
        self.slots, self.barrier, self.wave, self.stopping = slots, barrier, -1, False
        self.done = asyncio.get_running_loop().create_future()
        self._serialise(requests, ahead or 1 << 30)
        self.refill = lambda: self._serialise(requests, 64)
        await self.prepare(min(slots or ahead or 64, max(1, len(self.queue))))
        gc.freeze()
        gc.disable()
        try:
            if start is not None:
                await asyncio.sleep(max(0.0, await start() - clock()))
            self.start_s = self.senses.started_s = clock()
            self.until_s = self.start_s + until_s
            cpu_s, watch, lag = _cpu_s(), Watch(), Lag()
            self.lag = lag
            sweeper = asyncio.ensure_future(self._sweep(watch, lag))
            try:
                self.pump()
                await self.done
            finally:
                sweeper.cancel()
                lag.stop()
            self.senses.ended_s, self.senses.cpu_s = clock(), _cpu_s() - cpu_s
            self.senses.noticed, self.senses.lag = watch.stop(), lag.as_dict()
        finally:
            self._hand_over(everything=True)
            gc.enable()
            gc.unfreeze()
        return self.senses

    def _serialise(self, requests: Iterator[Request], count: int) -> bool:
        while count > 0 or not self.queue:
            request = next(requests, None)
            if request is None:
                break
            if request.after in self.live:
                self.held[request.after] = (request, self.encode(request))
            else:
                self.queue.append((request, self.encode(request)))
            self.live.add(request.id)
            count -= 1
        return bool(self.queue)

    def stop(self) -> None:
        """Start no further request; play() returns when those in flight have ended."""
        self._drop()
        self.refill = lambda: False
        self.pump()

    def _drop(self) -> None:
        self.stopping = True
        self.queue.clear()
        self.held.clear()
        self.live.clear()

    def pump(self) -> None:
        """Send all that is due and may go.  Called at the start, at each ending, and when the next one falls due."""
        while not self.stopping and (self.queue or self.refill()):  # once over, an endless plan is asked for no more
            request = self.queue[0][0]
            now = clock()
            in_flight = len(self.busy) + self.opening
            if now >= self.until_s and not (self.barrier and request.wave == self.wave):
                self._drop()
                break
            if not self.room():  # the recorder is behind: wait for it rather than fill the memory
                asyncio.get_running_loop().call_later(0.05, self.pump)
                return
            if self.barrier and request.wave != self.wave:
                if in_flight:
                    return
                wanted = sum(1 for queued, _ in self.queue if queued.wave == request.wave)
                if len([wire for wire in self.idle if wire.open]) < wanted and self._start(self._reopen(wanted)):
                    return
                self.wave = request.wave
            elif not self.barrier and self.slots and in_flight >= self.slots:
                return
            if request.scheduled_s is not None and (wait_s := self.start_s + request.scheduled_s - now) > 0:
                asyncio.get_running_loop().call_later(max(0.0, wait_s - 0.0005), self.pump)
                return
            self._send(*self.queue.popleft())
        if not (self.busy or self.opening or self.queue or self.held) and self.done and not self.done.done():
            self.done.set_result(None)

    def _start(self, work: Any) -> bool:
        self.opening += 1
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return True

    async def _reopen(self, wanted: int) -> None:
        """Connections for the next wave, opened between waves so that no latency holds them."""
        with contextlib.suppress(RidgelineError):  # each request of the wave will say so in its own record
            await self.prepare(wanted)
        self.opening -= 1
        self.wave = self.queue[0][0].wave if self.queue else self.wave
        self.pump()

    def _send(self, request: Request, payload: bytes) -> None:
        exchange = Exchange(request, payload, request.output_tokens)
        while self.idle:
            wire = self.idle.pop()
            if wire.open:
                self._go(wire, exchange)
                return
        self._start(self._send_on_new(exchange))

    def _go(self, wire: Wire, exchange: Exchange) -> None:
        self.busy[wire] = exchange
        self.senses.max_in_flight = max(self.senses.max_in_flight, len(self.busy))
        wire.send(exchange)
        if self.barrier and self.lag:
            self.lag.released_s = exchange.sent_s

    async def _send_on_new(self, exchange: Exchange) -> None:
        try:
            wire = await self._open()
        except OSError as problem:
            self.opening -= 1
            self.senses.connect_errors += 1
            exchange.end_s = clock()
            self.refused_s = self.refused_s if self.refused_s == self.refused_s else exchange.end_s
            if exchange.end_s - self.refused_s > GONE_S and not self.gone:
                self.gone = exchange.end_s - self.refused_s
                self.stop()
            exchange.ending = _refusal(problem)
            exchange.note = str(problem) or f"no connection within {self.timers.connect_s} s"
            self._deliver(exchange)
            asyncio.get_running_loop().call_later(0.1, self.pump)  # not at once: a dead server is not to be hammered
            return
        self.opening -= 1
        self.refused_s = NAN
        self._go(wire, exchange)

    def _ended(self, wire: Wire, exchange: Exchange) -> None:
        self.busy.pop(wire, None)
        if exchange.ending == "disconnected_before_response" and wire.uses > 1 and not exchange.resent:
            # The server closed an idle connection while we wrote on it: not an answer, and nothing of it was read.
            exchange.resent, exchange.ending = True, ""
            self.senses.reconnects += 1
            self._start(self._send_on_new(exchange))
            return
        if wire.open:
            self.idle.append(wire)
        self._deliver(exchange)
        self.pump()

    def _follow(self, ended: Exchange) -> None:
        """The next turn of a session is due when this one has ended and the user has thought, and never before its own
        time.  In an open loop its lateness counts from there; in a closed one it takes the next free slot."""
        turn = ended.tag.id
        request, payload = self.held[turn]
        due_s = ended.end_s - self.start_s + request.think_s
        if ended.tag.scheduled_s is not None:
            due_s = max(due_s, request.scheduled_s or 0.0)
            self.held[turn] = (replace(request, scheduled_s=due_s), payload)
        wait_s = self.start_s + due_s - clock()
        if wait_s > 0:
            asyncio.get_running_loop().call_later(wait_s, self._release, turn)
        else:
            self._release(turn, False)

    def _release(self, turn: int, pump: bool = True) -> None:
        """Turns that are due go before new sessions, the first to be due first."""
        if turn in self.held:
            at = next((i for i, (queued, _) in enumerate(self.queue) if queued.after is None), len(self.queue))
            self.queue.insert(at, self.held.pop(turn))
        if pump:
            self.pump()

    def _deliver(self, exchange: Exchange) -> None:
        self.live.discard(exchange.tag.id)
        if exchange.tag.id in self.held:
            self._follow(exchange)
        # Answers of equal length end together, and the next first tokens are due: the recorder can wait a little.
        if not self.ended:
            asyncio.get_running_loop().call_later(HAND_OVER_S, self._hand_over)
        self.ended.append(exchange)

    def _hand_over(self, everything: bool = False) -> None:
        self.portion = max(self.portion, -(-len(self.ended) // HAND_OVER_TIMES))
        for _ in range(len(self.ended) if everything else self.portion):
            if not self.ended:
                break
            self.sink(self.ended.popleft())
        if not self.ended:
            self.portion = 0
        else:
            asyncio.get_running_loop().call_later(HAND_OVER_S, self._hand_over)

    async def _sweep(self, watch: Watch, lag: Lag) -> None:
        """The timers of every request, and the senses that are looked at now and then."""
        timers = self.timers
        for tick in itertools.count():
            due = clock() + TICK_S
            await asyncio.sleep(TICK_S)
            now = clock()
            if lag.fd < 0:
                lag.note(now, now - due)
            watch.tick()
            if tick % TIMERS_EVERY:
                continue
            for wire, exchange in list(self.busy.items()):
                age = now - exchange.sent_s
                last = exchange.stamps_s[-1] if exchange.begun else NAN
                if age > timers.total_s:
                    wire.finish("timeout_total", f"not over after {timers.total_s:g} s")
                elif age > timers.first_token_s and not _has_text(exchange):
                    wire.finish("timeout_ttft", f"no text came within {timers.first_token_s:g} s")
                elif now - last > timers.idle_s and _has_text(exchange):
                    wire.finish("timeout_idle", f"silent for {timers.idle_s:g} s")
                elif now - last > QUIET_S:
                    wire.look(exchange)


def _refusal(problem: OSError) -> str:
    """The class of a connection that did not open."""
    if isinstance(problem, TimeoutError):
        return "connect_timeout"
    if isinstance(problem, ssl.SSLError):
        return "tls"
    return {errno.EADDRNOTAVAIL: "client_ports", errno.EMFILE: "client_files", errno.ENFILE: "client_files"}.get(
        problem.errno or 0, "connect")  # fmt: skip


def _has_text(exchange: Exchange) -> bool:
    """Whether an answer that is late holds generated text: pings and a role are none.  What has some is asked once."""
    if not exchange.has_text and exchange.begun:
        body = exchange.body()[0]
        exchange.has_text = bool(exchange.coding) or exchange.status != 200 or dialects.has_text(body)
    return exchange.has_text


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
