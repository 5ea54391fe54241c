"""A scenario, played: engine, preflight, prompts, the sweep, the records; then the summary from what is on disk."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import os
import platform
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from harness import (
    __version__,
    client,
    lengths,
    machine,
    openai_wire,
    preflight,
    recorder,
    redaction,
    server,
    store,
    tokens,
)  # fmt: skip
from harness.client import Client
from harness.loadgen import Player, Timers
from harness.order import MIN_TRIALS, is_settled, schedule
from harness.plan import Point, asks_of, counts_of, points_of, prompts_needed, searched, trial_requests
from harness.progress import Progress
from harness.recording import Recorder
from harness.records import Request, RidgelineError
from harness.scenario import Scenario, Workload, dump
from harness.wire import Exchange, Target, clock, resolve
from harness.workers import Crew, Job

GRACE_AT_END_S = 2.0  # the same, when the run's own time is over
READY_S = 5.0  # a server's metrics page may take so long to be read first


@dataclass(slots=True)
class Outcome:
    """How a run ended; the figures are in the folder."""

    folder: Path
    state: str
    code: int
    at_once: bool = False  # stopped twice: nothing more is to be done


SEARCH_PROMPTS = 1 << 14  # how many a search needs is not known before; beyond, heads repeat, long out of any cache
# (session, the point that has just ended) -> the next one, None at the end
Steer = Callable[["Session", Point | None], Awaitable[Point | None]]


@dataclass(slots=True)
class Session:
    """What one run needs while it goes on."""

    scenario: Scenario
    folder: Path
    progress: Progress
    info: dict[str, Any]
    t0_s: float
    player: Player | Crew | None = None
    recorder: Recorder | None = None
    probe: subprocess.Popen[bytes] | None = None
    stopped_by: int = 0
    stopped_why: str = ""
    at_once: bool = False
    finished: frozenset[tuple[int, int]] = frozenset()  # (point, trial) that a resumed run has already
    first_id: int = 0
    upto: int | None = None  # trials to be had when this play ends; None: all
    steer: Steer | None = None  # of a search: what to measure next
    now: dict[str, Any] = field(default_factory=lambda: {"done": 0, "errors": 0, "total": None, "label": ""})

    def save(self) -> None:
        store.write_json(self.folder / store.RUN, redaction.scrubbed(self.info))

    def stop(self, number: int, task: asyncio.Task[Any]) -> None:
        """First signal: send no more, let what is in flight end within the grace.  Second: at once."""
        if self.stopped_by or self.player is None:
            self.stopped_by, self.at_once = number, bool(self.stopped_by)
            task.cancel()
            return
        self.stopped_by = number
        self.drain(f"{signal.Signals(number).name} (once more: at once)", self.scenario.limits.grace_s, task)

    def drain(self, why: str, grace_s: float, task: asyncio.Task[Any]) -> None:
        """Send no more; what is in flight may end within the grace."""
        if self.stopped_why:
            return
        self.stopped_why = why
        if self.player is None:
            task.cancel()
            return
        self.progress.line(f"stopping: {why}; {len(self.player.busy)} requests in flight may end within {grace_s:g} s")
        self.player.stop()
        asyncio.get_running_loop().call_later(grace_s, task.cancel)

    def sink(self, point: Point, trial: int, exchange: Exchange) -> None:
        assert self.recorder is not None
        self.now["done"] += 1
        self.now["errors"] += exchange.ending != "complete" or exchange.status != 200
        assert isinstance(self.player, Player)
        self.recorder.put(recorder.pack_exchange(exchange, point.index, trial, self.t0_s, self.player.start_s))

    async def show(self) -> None:
        start_s = time.monotonic()
        while True:
            await asyncio.sleep(0.25)
            now, player = self.now, self.player
            total = f"/{now['total']}" if now["total"] else ""
            flying = len(player.busy) if player else 0
            errors = f", {now['errors']} failed" if now["errors"] else ""
            self.progress.tick(f"{now['label']}: {now['done']}{total} requests, {flying} in flight{errors}, "
                               f"{time.monotonic() - start_s:.0f} s")  # fmt: skip


def provenance(scenario: Scenario, command: list[str]) -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    from harness import selftest

    versions = {}
    for name in ("aiohttp", "httptools", "numpy", "orjson", "plotly", "openai", "pyarrow", "tokenizers", "uvloop"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "schema": store.FORMAT,
        "ridgeline": __version__,
        "state": "running",
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "scenario": scenario.model_dump(mode="json", by_alias=True),
        "seed": scenario.workload.seed,
        "transport": scenario.workload.transport,
        "points": [] if scenario.capacity else [point.as_dict() for point in points_of(scenario.workload)],
        "machine": machine.describe(),
        "selftest": selftest.kept(),
        "python": platform.python_version(),
        "versions": versions,
    }


async def play(scenario: Scenario, command: list[str], out: str | None, results: Path, progress: Progress,
               resume: Path | None = None, upto: int | None = None, steer: Steer | None = None) -> Outcome:  # fmt: skip
    """Run a scenario to its end.  Raises RidgelineError before the first request if anything is missing; afterwards
    every record is on disk whatever happens.  `resume`: the folder of a run of this scenario that did not end, or has
    fewer trials than it; `upto`: end when each point has so many trials; `steer`: chooses the points of a search."""
    task = asyncio.current_task()
    assert task is not None
    if scenario.workload.transport == "openai":
        openai_wire.require()
    folder, lock = store.reopen(resume) if resume else store.create(out, scenario.name, results)
    session = Session(scenario, folder, progress, provenance(scenario, command), clock(), upto=upto,
                      steer=steer)  # fmt: skip
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, session.stop, number, task)
    run_s = scenario.limits.run_s
    timer = loop.call_later(run_s, session.drain, f"the run's {run_s:g} s are over", min(GRACE_AT_END_S, scenario.limits.grace_s),
                            task) if run_s else None  # fmt: skip
    try:
        if resume:
            _continue(session)
        preflight.here(scenario, folder)
        store.write_text(folder / "scenario.yaml", dump(scenario))
        try:
            async with _server(session) as (target, engine):
                await _measure(session, target, engine)
        except asyncio.CancelledError:
            if not (session.stopped_by or session.stopped_why):
                raise
        session.info["state"] = "interrupted" if session.stopped_by or session.stopped_why else "complete"
        if session.stopped_why:
            session.info["stopped"] = session.stopped_why
    except RidgelineError as problem:
        session.info["state"], session.info["error"] = "failed", redaction.clean(str(problem))
        _leave_nothing_empty(session)
        raise
    finally:
        if timer:
            timer.cancel()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        if (folder / store.JOURNAL).exists():
            with contextlib.suppress(RidgelineError):  # a full disk: the journal says what there is to say
                session.save()
        lock.close()
        with contextlib.suppress(OSError):
            (folder / ".lock").unlink()
    if not (folder / store.JOURNAL).exists():
        _leave_nothing_empty(session)
        raise RidgelineError(f"stopped before the first request{': ' if session.stopped_why else ''}{session.stopped_why}",
                             _code(session))  # fmt: skip
    if not session.at_once:
        store.derive(folder, lambda n: progress.tick(f"{n:,} requests archived"))
    return Outcome(folder, session.info["state"], _code(session), session.at_once)


def _code(session: Session) -> int:
    return 128 + session.stopped_by if session.stopped_by else 6 if session.stopped_why else 0


def _continue(session: Session) -> None:
    """Take up a run that did not end: which points are finished, and what numbers and times go on from."""
    found = store.load(session.folder)
    session.finished = frozenset(
        (e["point"], e["trial"]) for e in found.events if e.get("event") == "trial_end" and not e.get("stopped")
    )
    workload = session.scenario.workload
    trials = range(workload.trials if session.upto is None else min(session.upto, workload.trials))
    due = {(point.index, trial) for point in points_of(workload) for trial in trials}
    if session.scenario.capacity:
        session.info |= {key: found.run[key] for key in ("points", "capacity") if key in found.run}
    if found.state == "complete" and (due <= session.finished or workload.precision or session.scenario.capacity):
        raise RidgelineError(f"--resume {session.folder}: this run is complete; nothing is left to do")
    before_s = 0.0
    for t in found.blocks(("id", "end_s"), False):
        session.first_id = max(session.first_id, int(t.id.max()) + 1)
        before_s = max(before_s, float(np.nanmax(t.end_s, initial=0.0)))
    session.t0_s = clock() - before_s - 1.0  # times of the records go on from where they ended
    session.info["resumed"] = [
        *found.run.get("resumed", []),
        {"at": session.info["started_at"], "finished": len(session.finished)},
    ]
    session.info["started_at"] = found.run.get("started_at", session.info["started_at"])
    store.cut_torn(session.folder)
    with contextlib.suppress(FileNotFoundError):  # derived from fewer records than there will be
        (session.folder / store.PARQUET).unlink()


def _leave_nothing_empty(session: Session) -> None:
    """A run that failed before its first request leaves a folder only if an engine's log is in it."""
    if (session.folder / store.JOURNAL).exists() or (session.folder / "engine.log").exists():
        return
    for name in ("scenario.yaml", ".lock"):
        with contextlib.suppress(OSError):
            (session.folder / name).unlink()
    with contextlib.suppress(OSError):
        session.folder.rmdir()


@contextlib.asynccontextmanager
async def _server(session: Session) -> AsyncIterator[tuple[Target, Any]]:
    """The server to ask: started here and stopped at the end, or one that is already there."""
    from harness import engines

    key = client.key_from(session.scenario.api_key_env, session.scenario.api_key_file)
    redaction.guard(key)
    spec = session.scenario.engine
    if spec.kind == "url":
        yield client.target_from(spec.url, key), None
        return
    async with engines.launched(
        engines.from_scenario(session.scenario, key), session.folder, session.progress.line
    ) as engine:
        yield client.target_from(engine.url, key), engine


async def _measure(session: Session, target: Target, engine: Any) -> None:
    scenario, workload = session.scenario, session.scenario.workload
    tls = ssl.create_default_context() if target.scheme == "https" else None
    asking = scenario.client.preflight
    address = await (preflight.address_of(target, tls) if asking else resolve(target))
    async with client.session(target) as http:
        ask = Client(target, http, workload.api, first_s=min(scenario.limits.preflight_s, scenario.limits.total_s))
        await (_preflight(session, ask, engine) if asking else _trust(session, ask))
        needed = SEARCH_PROMPTS if scenario.capacity else prompts_needed(workload)
        asks, texts = asks_of(workload)
        session.progress.line(f"{ask.model} at {target.url}: preparing {needed or 'as many as needed'} prompts"
                              + ("" if texts or workload.trace else f" of {lengths.say(workload.model_dump()['input_tokens'])} tokens"))  # fmt: skip
        where = session.info["engine"].get("model_path")
        counter = await tokens.find(scenario.tokenizer, where, ask) if asking else tokens.untold(scenario.tokenizer)
        if texts:
            prompts = tokens.Prompts(texts, "given", str(workload.prompts or workload.trace), 0, False, asks=asks)
        else:
            prompts = await tokens.build(counter, ask.input_tokens if asking else tokens.no_answer, asks, needed or 1 << 18, workload.seed,
                                         lambda n: session.progress.tick(f"{n} prompts"), workload.same_prompt,
                                         workload.shared_prefix)  # fmt: skip
    session.info["prompts"] = {"source": prompts.source, "detail": prompts.detail, "offset": prompts.offset,
                               "proven": prompts.proven}  # fmt: skip
    session.info["t0_monotonic_s"] = session.t0_s
    session.save()
    limits = scenario.limits
    timers = Timers(limits.connect_s, limits.first_token_s, limits.idle_s, limits.total_s)
    session.recorder = await Recorder.start(session.folder / store.JOURNAL, target.key)
    session.probe = await _start_probe(session.folder, target, scenario.engine.same_machine)
    try:
        await _sweep(session, target, address, tls, timers, ask, prompts)
    finally:
        if session.player:
            session.player.close()
        _stop_probe(session.probe)
        session.info["senses"] = server.senses(store.load_lines(session.folder / store.SERVER))
        if said := await asyncio.shield(session.recorder.close()):
            raise RidgelineError(f"{session.folder / store.JOURNAL}: the records could not be written: "
                                 f"{said.splitlines()[-1]}; what was written before stands: mend that, then "
                                 f"`ridgeline report {session.folder}` or `ridgeline run --resume {session.folder}`")  # fmt: skip


async def _trust(session: Session, ask: Client) -> None:
    """Take the user's word for everything: no request goes before the first of the plan."""
    ask.model = session.scenario.model or "model"
    session.info |= {"model": ask.model, "engine": {"url": ask.target.url, "launched": False, "kind": "unknown"},
                     "request": ask.as_dict()}  # fmt: skip


async def _preflight(session: Session, ask: Client, engine: Any) -> None:
    """Find model, version and options; everything learned goes into run.json.  Raises RidgelineError (code 6)."""
    scenario = session.scenario
    entry = await ask.find_model(scenario.model)
    ask.model = str(entry["id"])
    props = await client.props_of(ask) if entry.get("owned_by") == "llamacpp" else {}
    said = await client.version_of(ask, entry, props)
    session.info["model"] = ask.model
    info: dict[str, Any] = {"url": ask.target.url, "launched": engine is not None} | said
    if engine is not None:
        info |= {k: v for k, v in engine.as_dict().items() if v is not None}
    elif path := client.local_model_path(entry, props):
        info["model_path"] = path
    session.info["engine"] = info
    await ask.negotiate(min(4, lengths.longest(scenario.workload.model_dump()["output_tokens"]) or 4))
    session.info["request"] = ask.as_dict()


async def _sweep(session: Session, target: Target, address: tuple[Any, ...], tls: ssl.SSLContext | None, timers: Timers,
                 ask: Client, prompts: tokens.Prompts) -> None:  # fmt: skip
    workload = session.scenario.workload
    numbers = itertools.count(session.first_id)
    here: tuple[Point, int] = (points_of(workload)[0], 0)

    def encode(request: Request) -> bytes:
        path, body = ask.body(request.prompt, request.output_tokens)
        return target.request_bytes(path, body)

    assert session.recorder is not None
    player = await _crew(session, target, timers, ask) or _player_of(workload)(
        target, address, tls, timers, encode, lambda x: session.sink(*here, x), session.recorder.room
    )
    session.player = player
    watch = asyncio.ensure_future(session.recorder.process.wait())
    watch.add_done_callback(lambda _: player.stop())  # no records, no requests
    shown = asyncio.ensure_future(session.show())
    try:
        spent_s: dict[int, float] = {}
        settled: dict[int, bool] = {}
        async for trial, point in _due(session, settled):
            if session.stopped_by or session.stopped_why or watch.done() or trial == session.upto:
                break
            if (point.index, trial) in session.finished:
                settled[point.index] = True
                continue
            here = (point, trial)
            if isinstance(player, Crew):
                player.point, player.trial = point.index, trial
            warm, measured = counts_of(workload, point)
            label = point.label + (f", trial {trial + 1}" if workload.trials > 1 or workload.precision else "")
            session.now.update(done=0, errors=0, total=warm + measured if measured else None, label=label)
            slots = point.batch_size or workload.max_in_flight
            ahead = 0 if measured and measured <= 4096 else max(256, 2 * slots)
            first_id = next(numbers)  # records of this trial with earlier ids, from before a resumption, are not of it
            numbers = itertools.count(first_id)
            session.recorder.event(event="trial_start", point=point.index, trial=trial, at_s=clock(), first_id=first_id,
                                   planned=measured)  # fmt: skip
            requests = trial_requests(workload, point, trial, prompts, numbers)
            before = _machine_times()
            senses = await player.play(requests, slots, barrier=workload.mode == "wave", ahead=ahead,
                                       until_s=workload.duration_s or (point.play and point.play.within_s) or float("inf"))  # fmt: skip
            if player.gone:
                session.stopped_why = f"the server is gone: no connection could be opened for {player.gone:.0f} s"
            session.recorder.event(event="trial_end", point=point.index, trial=trial,
                                   stopped=bool(session.stopped_by or session.stopped_why), senses=senses.as_dict() | _machine_shares(before))  # fmt: skip
            await _sense(session.probe)
            spent_s[point.index] = spent_s.get(point.index, 0.0) + senses.ended_s - senses.started_s
            settled[point.index] = (workload.precision is None or trial + 1 >= MIN_TRIALS) and await is_settled(
                session.folder, workload, point, spent_s[point.index], trial
            )
            session.progress.line(f"{label}: {session.now['done']} requests in "
                                  f"{senses.ended_s - senses.started_s:.1f} s, {session.now['errors']} failed")  # fmt: skip
    finally:
        shown.cancel()
        watch.cancel()
        if isinstance(player, Crew) and (said := await asyncio.shield(player.dismiss())):
            session.progress.line(f"a worker complained: {said.splitlines()[-1]}")


async def _due(session: Session, settled: dict[int, bool]) -> AsyncIterator[tuple[int, Point]]:
    """What is to be played next: the workload's points, or what a search asks for when it has seen the last one."""
    workload = session.scenario.workload
    if session.steer is None:
        for trial, point in schedule(workload, lambda point: settled.get(point.index, workload.precision is None)):
            yield trial, point
        return
    before = searched(session.info["points"])  # of a run that was taken up
    for point in before:
        yield 0, point
    last = before[-1] if before else None
    while (following := await session.steer(session, last)) is not None:
        session.info["points"].append(following.as_dict())
        session.save()
        yield 0, following
        last = following


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


def _machine_times() -> Any:
    import psutil

    return psutil.cpu_times()


def _machine_shares(before: Any) -> dict[str, float | None]:
    """How busy this machine's cores were since, and how much of them the hypervisor took."""
    after = _machine_times()
    total = sum(after) - sum(before)
    if total <= 0:
        return {"machine_cpu_share": None, "steal_share": None}
    idle = (after.idle + getattr(after, "iowait", 0)) - (before.idle + getattr(before, "iowait", 0))
    steal = getattr(after, "steal", 0.0) - getattr(before, "steal", 0.0)
    return {"machine_cpu_share": 1 - idle / total, "steal_share": steal / total}


async def _start_probe(folder: Path, target: Target, same_machine: bool | None) -> subprocess.Popen[bytes]:
    near = target.host in ("localhost", "::1") or target.host.startswith("127.")
    here = ["--here"] if (near if same_machine is None else same_machine) else []
    process = subprocess.Popen(
        [sys.executable, "-m", "harness.probe", target.url, str(folder / store.SERVER), *here], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ | {"RIDGELINE_KEY": target.key})  # fmt: skip
    assert process.stdout is not None
    with contextlib.suppress(TimeoutError):  # until its first sample is written: starting up costs the core
        await asyncio.wait_for(asyncio.to_thread(process.stdout.readline), READY_S)
    return process


async def _sense(probe: subprocess.Popen[bytes] | None) -> None:
    """Have the server's senses read now, between trials, so that its counters' rise is that of this trial alone."""
    with contextlib.suppress(OSError, AttributeError):
        os.write(probe.stdin.fileno(), b".")  # type: ignore[union-attr]
    await asyncio.sleep(0.05)


def _stop_probe(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
