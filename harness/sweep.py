"""The trials of a run: their order, each of them played, and when a point has had enough."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import os
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil

from harness import machine, openai_wire, stats, store, tokens
from harness.client import Client
from harness.loadgen import Player, Senses, Timers
from harness.plan import Point, counts_of, points_of, searched, trial_requests
from harness.records import Request, RidgelineError
from harness.scenario import Workload
from harness.session import Session
from harness.tally import Tally, count
from harness.wire import Target, clock
from harness.workers import Crew, Job, Merged

MIN_TRIALS = 3  # fewer give no interval
SEEN_S = 5.0  # the recorder may be so far behind the player when a trial's figures are wanted


def schedule(workload: Workload, settled: Callable[[Point], bool] = lambda point: True) -> Iterator[tuple[int, Point]]:
    """(trial, point) in the order of play.  Points take turns in shuffled order when there are several trials, so that
    a drift of the machine does not pass for an effect of the batch size.  Where a precision is asked for, a point that
    is not `settled` gets another trial."""
    rng = np.random.default_rng([workload.seed, 7])
    points = points_of(workload)
    least = max(workload.trials, MIN_TRIALS) if workload.precision else workload.trials
    for group in [points] if workload.interleave else [[point] for point in points]:
        for trial in itertools.count():
            due = [point for point in group if trial < least or not settled(point)]
            if not due:
                break
            yield from ((trial, due[i]) for i in (rng.permutation(len(due)) if least > 1 else range(len(due))))


@dataclass(slots=True)
class Sweep:
    """What plays the trials of a run, one after another."""

    session: Session
    player: Player | Crew
    prompts: tokens.Prompts
    numbers: Iterator[int]
    spent_s: dict[int, float] = field(default_factory=dict)
    settled: dict[int, bool] = field(default_factory=dict)

    async def play(self, gone: Callable[[], bool]) -> None:
        """Every trial that is due, unless the run is stopped or the recorder is `gone`."""
        session = self.session
        async for trial, point in self._due():
            if session.over or gone() or trial == session.upto:
                break
            if (point.index, trial) in session.finished:
                self.settled[point.index] = True
            else:
                await self._judged(point, trial)

    async def _due(self) -> AsyncIterator[tuple[int, Point]]:
        """The workload's trials, or what a search asks for when it has seen the last one."""
        session, workload = self.session, self.session.scenario.workload
        if session.steer is None:
            for trial, point in schedule(
                workload, lambda point: self.settled.get(point.index, workload.precision is None)
            ):
                yield trial, point
            return
        last = None
        for last in searched(session.info["points"]):  # of a run that was taken up
            yield 0, last
        while (following := await session.steer(session, last)) is not None:
            session.info["points"].append(following.as_dict())
            session.save()
            yield 0, following
            last = following

    async def _judged(self, point: Point, trial: int) -> None:
        """One trial, and whether its point needs another."""
        senses = await self.trial(point, trial)
        took_s = senses.ended_s - senses.started_s
        spent_s = self.spent_s[point.index] = self.spent_s.get(point.index, 0.0) + took_s
        precise = self.session.scenario.workload.precision is not None
        self.settled[point.index] = (not precise or trial + 1 >= MIN_TRIALS) and await is_settled(
            self.session, point, spent_s, trial
        )
        now = self.session.now
        self.session.progress.line(f"{now['label']}: {now['done']} requests in {took_s:.1f} s, {now['errors']} failed")

    async def trial(self, point: Point, trial: int) -> Senses | Merged:
        """Play one trial of a point; its begin and end stand in the journal."""
        session, player, workload = self.session, self.player, self.session.scenario.workload
        assert session.recorder is not None
        session.here = (point, trial)
        if isinstance(player, Crew):
            player.point, player.trial = point.index, trial
        warm, measured = counts_of(workload, point)
        label = point.label + (f", trial {trial + 1}" if workload.trials > 1 or workload.precision else "")
        session.now.update(done=0, errors=0, total=warm + measured if measured else None, label=label)
        slots = point.batch_size or workload.max_in_flight
        first_id = next(self.numbers)  # records of this trial with earlier ids, from before a resumption, are not of it
        numbers = self.numbers = itertools.count(first_id)
        session.recorder.event(event="trial_start", point=point.index, trial=trial, at_s=clock(), first_id=first_id,
                               planned=measured)  # fmt: skip
        before = psutil.cpu_times()
        senses = await player.play(
            trial_requests(workload, point, trial, self.prompts, numbers), slots, barrier=workload.mode == "wave",
            ahead=0 if measured and measured <= 4096 else max(256, 2 * slots),
            until_s=workload.duration_s or (point.play and point.play.within_s) or float("inf"),
        )  # fmt: skip
        if player.gone:
            session.stopped_why = f"the server is gone: no connection could be opened for {player.gone:.0f} s"
        felt = senses.as_dict()
        felt["held"] = [[at_s - session.t0_s, late_s] for at_s, late_s in felt.get("held", ())]
        session.recorder.event(event="trial_end", point=point.index, trial=trial, stopped=session.over,
                               senses=felt | _machine_shares(before))  # fmt: skip
        await _sense(session)
        return senses


async def sweep(session: Session, target: Target, address: tuple[Any, ...], tls: ssl.SSLContext | None, timers: Timers,
                ask: Client, prompts: tokens.Prompts) -> None:  # fmt: skip
    """Play the run's trials on this process's own player, or on workers, with progress shown."""
    workload, recorder = session.scenario.workload, session.recorder
    assert recorder is not None

    def encode(request: Request) -> bytes:
        path, body = ask.body(request.prompt, request.output_tokens)
        return target.request_bytes(path, body)

    player = session.player = await _crew(session, target, timers, ask) or _player_of(workload)(
        target, address, tls, timers, encode, session.sink, recorder.room
    )
    watch = asyncio.ensure_future(recorder.process.wait())
    watch.add_done_callback(lambda _: player.stop())  # no records, no requests
    shown = asyncio.ensure_future(session.show())
    try:
        await Sweep(session, player, prompts, itertools.count(session.first_id)).play(watch.done)
    finally:
        shown.cancel()
        watch.cancel()
        if isinstance(player, Crew) and (said := await asyncio.shield(player.dismiss())):
            session.progress.line(f"a worker complained: {said.splitlines()[-1]}")


async def is_settled(session: Session, point: Point, spent_s: float, trial: int) -> bool:
    """Whether a point's intervals are as narrow as asked, or its time is over; from what the recorder has written."""
    workload = session.scenario.workload
    if workload.precision is None or spent_s >= workload.max_time_s:
        return True
    tally = Tally(workload.mode, point.batch_size or 0)
    count({point.index: tally}, (await written(session, point, trial)).blocks)
    return stats.within(tally.row(), workload.precision)


async def written(session: Session, point: Point, trial: int) -> store.Run:
    """The run as it stands on disk, once the end of this trial is there (or the recorder is too late with it)."""
    until_s = clock() + SEEN_S
    while True:
        found = store.load(session.folder)
        ends = ((e["point"], e["trial"]) for e in found.events if e.get("event") == "trial_end")
        if (point.index, trial) in ends or clock() > until_s:
            return found
        await asyncio.sleep(0.05)


def _player_of(workload: Workload) -> type[Player]:
    return openai_wire.OpenAIPlayer if workload.transport == "openai" else Player


async def _crew(session: Session, target: Target, timers: Timers, ask: Client) -> Crew | None:
    """Workers, where the scenario asks for more than one; None: this process plays by itself."""
    wanted, workload = session.scenario.client, session.scenario.workload
    count = machine.usable_cores() if wanted.workers == "auto" else wanted.workers
    if count == 1 and not wanted.ray:
        return None
    if workload.transport == "openai":
        raise RidgelineError(
            "client.workers: workload.transport openai plays in one process; leave workers and ray out"
        )
    if any(counts_of(workload, point)[1] is None for point in points_of(workload)):
        raise RidgelineError("client.workers: a plan without end cannot be dealt out; give workload.requests or waves")
    where = (target.scheme, target.host, target.port, target.prefix)
    journal = str((session.folder / store.JOURNAL).absolute())
    job = Job(where, dataclasses.asdict(timers), ask.api, ask.model, ask.no_stop, ask.usage, journal, session.t0_s)

    def note(ended: int, failed: int) -> None:
        session.now["done"] += ended
        session.now["errors"] += failed

    crew = await Crew.hire(count, wanted.ray, job, target.key, note)
    session.info["client"] = {"workers": count, "ray": wanted.ray, "clock_error_s": max(h.error_s for h in crew.hands)}
    session.save()
    return crew


def _machine_shares(before: Any) -> dict[str, float | None]:
    """How busy this machine's cores were since, and how much of them the hypervisor took."""
    after = psutil.cpu_times()
    total = sum(after) - sum(before)
    if total <= 0:
        return {"machine_cpu_share": None, "steal_share": None}
    idle = (after.idle + getattr(after, "iowait", 0)) - (before.idle + getattr(before, "iowait", 0))
    steal = getattr(after, "steal", 0.0) - getattr(before, "steal", 0.0)
    return {"machine_cpu_share": 1 - idle / total, "steal_share": steal / total}


async def _sense(session: Session) -> None:
    """Have the server's senses read now, between trials, so that its counters' rise is that of this trial alone."""
    if session.probe is not None and session.probe.stdin is not None:
        with contextlib.suppress(OSError):
            os.write(session.probe.stdin.fileno(), b".")
    await asyncio.sleep(0.05)
