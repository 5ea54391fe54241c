"""A scenario, played: engine, preflight, prompts, the sweep, the records; then the summary from what is on disk."""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import signal
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from harness import (
    __version__,
    client,
    journal,
    lengths,
    machine,
    openai_wire,
    preflight,
    redaction,
    selftest,
    server,
    store,
    tokens,
)  # fmt: skip
from harness.client import Client
from harness.loadgen import Timers
from harness.plan import asks_of, planned, points_of, prompts_needed
from harness.progress import Progress
from harness.recording import Recorder
from harness.records import RidgelineError
from harness.scenario import Scenario, dump
from harness.session import Session, Steer
from harness.sweep import sweep
from harness.wire import Target, clock, resolve

GRACE_AT_END_S = 2.0  # the same, when the run's own time is over
SEARCH_PROMPTS = 1 << 14  # how many a search needs is not known before; beyond, heads repeat, long out of any cache
READY_S = 5.0  # a server's metrics page may take so long to be read first


@dataclass(slots=True)
class Outcome:
    """How a run ended; the figures are in the folder."""

    folder: Path
    state: str
    code: int
    at_once: bool = False  # stopped twice: nothing more is to be done


def provenance(scenario: Scenario, command: list[str]) -> dict[str, Any]:
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
        "points": []
        if scenario.capacity
        else [
            point.as_dict() | {"planned": planned(scenario.workload, point)} for point in points_of(scenario.workload)
        ],
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
    session = Session(scenario, folder, progress, provenance(scenario, command), clock(), upto=upto, steer=steer)
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
    session.finished = frozenset(journal.ended(found.events))
    workload = session.scenario.workload
    trials = range(workload.trials if session.upto is None else min(session.upto, workload.trials))
    due = {(point.index, trial) for point in points_of(workload) for trial in trials}
    search = session.scenario.capacity is not None
    if search:
        session.info |= {key: found.run[key] for key in ("points", "capacity") if key in found.run}
    if found.state == "complete" and (due <= session.finished or workload.precision or search):
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
    for name in ("scenario.yaml", store.RUN, ".lock"):
        with contextlib.suppress(OSError):
            (session.folder / name).unlink()
    with contextlib.suppress(OSError):
        session.folder.rmdir()


@contextlib.asynccontextmanager
async def _server(session: Session) -> AsyncIterator[tuple[Target, Any]]:
    """The server to ask: started here and stopped at the end, or one that is already there."""
    from harness import engines, launch

    key = client.key_from(session.scenario.api_key_env, session.scenario.api_key_file)
    redaction.guard(key)
    spec = session.scenario.engine
    if spec.kind == "url":
        yield client.target_from(spec.url, key), None
        return
    wanted = launch.from_scenario(session.scenario, key)
    async with engines.launched(wanted, session.folder, session.progress.line) as engine:
        yield client.target_from(engine.url, key), engine


async def _measure(session: Session, target: Target, engine: Any) -> None:
    scenario = session.scenario
    tls = ssl.create_default_context() if target.scheme == "https" else None
    async with client.session(target) as http:
        first_s = min(scenario.limits.preflight_s, scenario.limits.total_s)
        ask = Client(target, http, scenario.workload.api, first_s=first_s)
        address = await (_preflight(session, ask, tls, engine) if scenario.client.preflight else _trust(session, ask))
        prompts = await _prompts(session, ask)
    session.info["prompts"] = {"source": prompts.source, "detail": prompts.detail, "offset": prompts.offset,
                               "proven": prompts.proven}  # fmt: skip
    session.info["t0_monotonic_s"] = session.t0_s
    session.save()
    limits = scenario.limits
    timers = Timers(limits.connect_s, limits.first_token_s, limits.idle_s, limits.total_s)
    session.recorder = await Recorder.start(session.folder / store.JOURNAL, target.key)
    session.probe = await _start_probe(session.folder, target, scenario.engine.same_machine)
    try:
        await sweep(session, target, address, tls, timers, ask, prompts)
    finally:
        if session.player:
            session.player.close()
        _stop_probe(session.probe)
        session.info["senses"] = server.senses(store.load_lines(session.folder / store.SERVER))
        if said := await asyncio.shield(session.recorder.close()):
            raise RidgelineError(f"{session.folder / store.JOURNAL}: the records could not be written: "
                                 f"{said.splitlines()[-1]}; what was written before stands: mend that, then "
                                 f"`ridgeline report {session.folder}` or `ridgeline run --resume {session.folder}`")  # fmt: skip


async def _trust(session: Session, ask: Client) -> tuple[Any, ...]:
    """Take the user's word for everything: no request goes before the first of the plan.  The server's address."""
    ask.model = session.scenario.model or "model"
    session.info |= {"model": ask.model, "engine": {"url": ask.target.url, "launched": False, "kind": "unknown"},
                     "request": ask.as_dict()}  # fmt: skip
    return await resolve(ask.target)


async def _preflight(session: Session, ask: Client, tls: ssl.SSLContext | None, engine: Any) -> tuple[Any, ...]:
    """Find address, model, version and options; everything learned goes into run.json.  Raises RidgelineError (code 6)."""
    scenario = session.scenario
    async with preflight.within(ask.target):
        address = await preflight.address_of(ask.target, tls)
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
    async with preflight.waiting(session.progress, f"a first answer of {ask.model} at {ask.target.url}", ask.first_s):
        await ask.negotiate(min(4, lengths.longest(scenario.workload.model_dump()["output_tokens"]) or 4))
    session.info["request"] = ask.as_dict()
    return address


async def _prompts(session: Session, ask: Client) -> tokens.Prompts:
    """The run's prompts: given ones, or made to length by the nearest way to count."""
    scenario, workload = session.scenario, session.scenario.workload
    asking, say = scenario.client.preflight, session.progress
    needed = SEARCH_PROMPTS if scenario.capacity else prompts_needed(workload)
    asks, texts = asks_of(workload)
    say.line(f"{ask.model} at {ask.target.url}: preparing {needed or 'as many as needed'} prompts"
             + ("" if texts or workload.trace else f" of {lengths.say(workload.model_dump()['input_tokens'])} tokens"))  # fmt: skip
    where = session.info["engine"].get("model_path")
    counter = await tokens.find(scenario.tokenizer, where, ask) if asking else tokens.untold(scenario.tokenizer)
    if texts:
        return tokens.Prompts(texts, "given", str(workload.prompts or workload.trace), 0, False, asks=asks)
    return await tokens.build(counter, ask.input_tokens if asking else tokens.no_answer, asks, needed or 1 << 18, workload.seed,
                              lambda n: say.tick(f"{n} prompts"), workload.same_prompt, workload.shared_prefix)  # fmt: skip


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


def _stop_probe(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
