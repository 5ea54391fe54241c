"""A scenario, played: engine, preflight, prompts, the sweep, the records; then the summary from what is on disk."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import math
import os
import platform
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from harness import __version__, client, recorder, store, tokens
from harness.arrivals import ARRIVALS
from harness.client import Client
from harness.loadgen import Player, Timers
from harness.progress import Progress
from harness.records import Request, RidgelineError
from harness.scenario import Scenario, Workload, dump
from harness.wire import Exchange, Target, clock, resolve

BACKLOG_BYTES = 64 * 2**20  # more than this between us and the recorder, and sending waits
GRACE_S = 10.0  # after Ctrl-C, requests in flight may end for so long
F_SETPIPE_SZ = 1031  # <fcntl.h>, Linux


@dataclass(slots=True)
class Outcome:
    """How a run ended; the figures are in the folder."""

    folder: Path
    state: str
    code: int


@dataclass(slots=True)
class Point:
    """One line of the report: a batch size or a rate."""

    index: int
    batch_size: int | None
    rate: float | None

    @property
    def label(self) -> str:
        return f"batch size {self.batch_size}" if self.batch_size else f"{self.rate:g} requests/s"


def points_of(workload: Workload) -> list[Point]:
    if workload.mode == "open":
        return [Point(i, None, rate) for i, rate in enumerate(workload.rates)]
    return [Point(i, size, None) for i, size in enumerate(workload.batch_sizes)]


def counts_of(workload: Workload, point: Point) -> tuple[int, int | None]:
    """(warm-up requests, measured requests) of one trial; None measured: as many as the duration allows."""
    if workload.mode == "wave":
        size = point.batch_size or 1
        warm = math.ceil(workload.warmup / size) * size
        if workload.requests:
            return warm, math.ceil(workload.requests / size) * size
        return warm, workload.waves * size if workload.waves else None if workload.duration_s else 3 * size
    if workload.requests or workload.duration_s is None:
        return workload.warmup, workload.requests or (4 * (point.batch_size or 1) if point.batch_size else 100)
    if point.rate:
        return workload.warmup, max(1, math.ceil(point.rate * workload.duration_s))
    return workload.warmup, None


def trial_requests(workload: Workload, point: Point, trial: int, first: int, prompts: tokens.Prompts,
                   numbers: Iterator[int]) -> Iterator[Request]:  # fmt: skip
    """The requests of one trial in the order of sending.  `numbers` hands out ids that are unique in the run."""
    warm, measured = counts_of(workload, point)
    size = point.batch_size or 1
    due: Any = None
    if point.rate:
        rng = np.random.default_rng([workload.seed, point.index, trial])
        due = ARRIVALS[workload.arrivals](rng, point.rate, warm + (measured or 0), workload.burstiness)
    for i in itertools.count() if measured is None else range(warm + measured):
        number = next(numbers)
        scheduled_s = float(due[i]) if due is not None else None
        yield Request(number, prompts.at(number), workload.output_tokens, scheduled_s, i // size, i < warm)


def schedule(workload: Workload) -> list[tuple[int, Point]]:
    """(trial, point) in the order of play: shuffled within each trial when there are several, so that a drift of the
    machine does not pass for an effect of the batch size."""
    rng = np.random.default_rng([workload.seed, 7])
    points = points_of(workload)
    order = []
    for trial in range(workload.trials):
        these = [points[i] for i in rng.permutation(len(points))] if workload.trials > 1 else points
        order += [(trial, point) for point in these]
    return order


class Recorder:
    """The other process, which turns bytes into records on disk."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        self.process, self.pipe = process, process.stdin

    @classmethod
    async def start(cls, folder: Path, secret: str) -> Recorder:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "harness.recorder", str(folder / store.JOURNAL), stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | {"RIDGELINE_KEY": secret},
            start_new_session=True)  # fmt: skip
        with contextlib.suppress(OSError, AttributeError):
            pipe = process.stdin.transport.get_extra_info("pipe")  # type: ignore[union-attr]
            fcntl.fcntl(pipe.fileno(), F_SETPIPE_SZ, 2**20)
        return cls(process)

    def room(self) -> bool:
        return self.pipe.transport.get_write_buffer_size() < BACKLOG_BYTES

    def event(self, **values: Any) -> None:
        self.pipe.write(recorder.pack(b"E", store.clean(values)))

    async def close(self) -> str:
        """Wait until all is on disk; what it complained of, or ""."""
        self.pipe.close()
        assert self.process.stderr is not None
        said = await self.process.stderr.read()
        await self.process.wait()
        return said.decode("utf-8", "replace").strip() if self.process.returncode else ""


@dataclass(slots=True)
class Session:
    """What one run needs while it goes on."""

    scenario: Scenario
    folder: Path
    progress: Progress
    info: dict[str, Any]
    t0_s: float
    player: Player | None = None
    recorder: Recorder | None = None
    stopped_by: int = 0
    now: dict[str, Any] = field(default_factory=lambda: {"done": 0, "errors": 0, "total": None, "label": ""})

    def save(self) -> None:
        store.write_json(self.folder / store.RUN, self.info)

    def stop(self, number: int, task: asyncio.Task[Any]) -> None:
        """First signal: send no more, let what is in flight end within the grace.  Second: at once."""
        if self.stopped_by or self.player is None:
            self.stopped_by = number
            task.cancel()
            return
        self.stopped_by = number
        self.progress.line(f"stopping: {len(self.player.busy)} requests in flight may end within {GRACE_S:g} s "
                           "(once more: at once)")  # fmt: skip
        self.player.stop()
        asyncio.get_running_loop().call_later(GRACE_S, task.cancel)

    def sink(self, point: Point, trial: int, exchange: Exchange) -> None:
        assert self.recorder is not None
        request: Request = exchange.tag
        self.now["done"] += 1
        self.now["errors"] += exchange.ending != "complete" or exchange.status != 200
        header = {
            "id": request.id, "point": point.index, "trial": trial, "wave": request.wave, "warmup": request.warmup,
            "scheduled_s": None if request.scheduled_s is None else self._since(self.player.start_s) + request.scheduled_s,  # type: ignore[union-attr]
            "sent_s": _null(self._since(exchange.sent_s)), "connect_s": _null(exchange.connect_s),
            "end_s": _null(self._since(exchange.end_s)), "status": exchange.status, "ending": exchange.ending,
            "note": exchange.note, "output_tokens": request.output_tokens, "n": len(exchange.stamps_s),
        }  # fmt: skip
        stamps = exchange.stamps_s
        for i, stamp_s in enumerate(stamps):
            stamps[i] = stamp_s - self.t0_s
        self.recorder.pipe.write(recorder.pack(b"X", header, stamps, exchange.ends, exchange.body))

    def _since(self, at_s: float) -> float:
        return at_s - self.t0_s

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


def _null(value: float) -> float | None:
    return None if math.isnan(value) else value


def provenance(scenario: Scenario, command: list[str]) -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    from harness import machine, selftest

    versions = {}
    for name in ("aiohttp", "httptools", "numpy", "orjson", "plotly", "pyarrow", "tokenizers", "uvloop"):
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
        "points": [{"batch_size": p.batch_size, "rate": p.rate} for p in points_of(scenario.workload)],
        "machine": machine.describe(),
        "selftest": selftest.kept(),
        "python": platform.python_version(),
        "versions": versions,
    }


async def play(scenario: Scenario, command: list[str], out: str | None, results: Path, progress: Progress) -> Outcome:
    """Run a scenario to its end.  Raises RidgelineError before the first request if anything is missing; afterwards
    every record is on disk whatever happens."""
    task = asyncio.current_task()
    assert task is not None
    folder, lock = store.create(out, scenario.name, results)
    session = Session(scenario, folder, progress, provenance(scenario, command), clock())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, session.stop, number, task)
    try:
        store.write_text(folder / "scenario.yaml", dump(scenario))
        try:
            async with _server(session) as (target, engine):
                await _measure(session, target, engine)
        except asyncio.CancelledError:
            if not session.stopped_by:
                raise
        session.info["state"] = "interrupted" if session.stopped_by else "complete"
    except RidgelineError as problem:
        session.info["state"], session.info["error"] = "failed", str(problem)
        _leave_nothing_empty(session)
        raise
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        if (folder / store.JOURNAL).exists():
            session.save()
        lock.close()
        with contextlib.suppress(OSError):
            (folder / ".lock").unlink()
    if not (folder / store.JOURNAL).exists():
        _leave_nothing_empty(session)
        raise RidgelineError("interrupted before the first request", 128 + session.stopped_by)
    store.write_parquet(folder / store.PARQUET, store.load(folder).records)
    return Outcome(folder, session.info["state"], 128 + session.stopped_by if session.stopped_by else 0)


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

    key = client.key_from(session.scenario.api_key_env)
    spec = session.scenario.engine
    if spec.kind == "url":
        yield client.target_from(spec.url, key), None
        return
    async with engines.launched(
        engines.from_scenario(session.scenario), session.folder, session.progress.line
    ) as engine:
        yield client.target_from(engine.url, key), engine


async def _measure(session: Session, target: Target, engine: Any) -> None:
    scenario, workload = session.scenario, session.scenario.workload
    async with client.session(target) as http:
        ask = Client(target, http, workload.api)
        await _preflight(session, ask, engine)
        needed = _prompts_needed(workload)
        session.progress.line(f"{ask.model} at {target.url}: preparing {needed or 'as many as needed'} prompts of "
                              f"{workload.input_tokens} tokens")  # fmt: skip
        where = session.info["engine"].get("model_path")
        counter = await tokens.find(scenario.tokenizer, where, ask)
        prompts = await tokens.build(counter, ask.input_tokens, needed or tokens.POOL, workload.input_tokens, workload.seed,
                                     workload.same_prompt, lambda n: session.progress.tick(f"{n} prompts"))  # fmt: skip
    session.info["prompts"] = {"source": prompts.source, "detail": prompts.detail, "offset": prompts.offset,
                               "proven": prompts.proven}  # fmt: skip
    session.info["t0_monotonic_s"] = session.t0_s
    session.save()
    address = await resolve(target)
    tls = ssl.create_default_context() if target.scheme == "https" else None
    limits = scenario.limits
    timers = Timers(limits.connect_s, limits.first_token_s, limits.idle_s, limits.total_s)
    session.recorder = await Recorder.start(
        session.folder, dict(target.headers).get("Authorization", "").removeprefix("Bearer ")
    )
    probe = _start_probe(session.folder, target)
    try:
        await _sweep(session, target, address, tls, timers, ask, prompts)
    finally:
        if session.player:
            session.player.close()
        _stop_probe(probe)
        if said := await asyncio.shield(session.recorder.close()):
            raise RidgelineError(f"{session.folder / store.JOURNAL}: the records could not be written: "
                                 f"{said.splitlines()[-1]}", 2)  # fmt: skip


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
    await ask.negotiate(scenario.workload.output_tokens)
    session.info["request"] = ask.as_dict()


def _prompts_needed(workload: Workload) -> int | None:
    total = 0
    for point in points_of(workload):
        warm, measured = counts_of(workload, point)
        if measured is None:
            return None
        total += (warm + measured) * workload.trials
    return total


async def _sweep(session: Session, target: Target, address: tuple[Any, ...], tls: ssl.SSLContext | None, timers: Timers,
                 ask: Client, prompts: tokens.Prompts) -> None:  # fmt: skip
    workload = session.scenario.workload
    numbers = itertools.count()
    here: tuple[Point, int] = (points_of(workload)[0], 0)

    def encode(request: Request) -> bytes:
        path, body = ask.body(request.prompt, request.output_tokens)
        return target.request_bytes(path, body)

    assert session.recorder is not None
    player = Player(target, address, tls, timers, encode, lambda x: session.sink(*here, x), session.recorder.room)
    session.player = player
    watch = asyncio.ensure_future(session.recorder.process.wait())
    watch.add_done_callback(lambda _: player.stop())  # no records, no requests
    shown = asyncio.ensure_future(session.show())
    try:
        for trial, point in schedule(workload):
            if session.stopped_by or watch.done():
                break
            here = (point, trial)
            warm, measured = counts_of(workload, point)
            label = point.label + (f", trial {trial + 1} of {workload.trials}" if workload.trials > 1 else "")
            session.now.update(done=0, errors=0, total=warm + measured if measured else None, label=label)
            requests = trial_requests(workload, point, trial, 0, prompts, numbers)
            slots = point.batch_size or workload.max_in_flight
            ahead = 0 if measured and measured <= 4096 else max(256, 2 * slots)
            session.recorder.event(event="trial_start", point=point.index, trial=trial, at_s=clock())
            before = _machine_times()
            senses = await player.play(requests, slots, barrier=workload.mode == "wave", ahead=ahead,
                                       until_s=workload.duration_s or float("inf"))  # fmt: skip
            session.recorder.event(event="trial_end", point=point.index, trial=trial,
                                   senses=senses.as_dict() | _machine_shares(before))  # fmt: skip
            session.progress.line(f"{label}: {session.now['done']} requests in "
                                  f"{senses.ended_s - senses.started_s:.1f} s, {session.now['errors']} failed")  # fmt: skip
    finally:
        shown.cancel()
        watch.cancel()


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


def _start_probe(folder: Path, target: Target) -> subprocess.Popen[bytes]:
    key = dict(target.headers).get("Authorization", "").removeprefix("Bearer ")
    return subprocess.Popen(
        [sys.executable, "-m", "harness.probe", target.url, str(folder / store.SERVER)], stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"RIDGELINE_KEY": key},
        start_new_session=True)  # fmt: skip


def _stop_probe(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
