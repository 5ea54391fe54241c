"""The plan sharded over processes of this machine, or over a Ray cluster: more than one core, more than one machine.

A Crew has the face of a Player.  Each worker is a Player with a recorder of its own; the requests of a trial are dealt
out in the proportion of the slots, and all workers start at one moment of one clock.  On one machine that clock is
shared; a Ray worker's is aligned by measurement, and the error (half the best round trip) is stated.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from harness import recorder, warden
from harness.loadgen import Player, Timers
from harness.recording import Recorder
from harness.records import Request, RidgelineError
from harness.wire import Exchange, Target, clock, resolve

LEAD_S = 0.02  # between "all are ready" and the common start
RAY_LEAD_S = 0.5  # a Ray worker serialises its bodies within this
PINGS = 30
LINE_BYTES = 2**30  # a message holds all prompts of a shard


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """What a worker needs to know once: where to send, how, and where its journal goes."""

    target: tuple[str, str, int, str]
    timers: dict[str, float]
    api: str
    model: str
    no_stop: tuple[str, ...]
    usage: bool
    journal: str
    t0_s: float


class Worker:
    """One Player and its recorder; the same code in a local process and in a Ray actor."""

    def __init__(self, job: Job, key: str) -> None:
        from harness import client

        headers = (("Authorization", f"Bearer {key}"),) if key else ()
        self.job, self.key, self.target = job, key, Target(*job.target, headers)
        self.ask = client.Client(self.target, None, job.api, job.model, job.no_stop, job.usage)  # type: ignore[arg-type]
        self.player: Player | None = None
        self.recorder: Recorder | None = None
        self.point = self.trial = 0
        self.ended = self.failed = 0

    async def open(self) -> None:
        self.recorder = await Recorder.start(Path(self.job.journal), self.key)
        tls = ssl.create_default_context() if self.target.scheme == "https" else None
        self.player = Player(self.target, await resolve(self.target), tls, Timers(**self.job.timers), self._encode,
                             self._sink, self.recorder.room)  # fmt: skip

    def _encode(self, request: Request) -> bytes:
        path, body = self.ask.body(request.prompt, request.output_tokens)
        return self.target.request_bytes(path, body)

    def _sink(self, exchange: Exchange) -> None:
        assert self.recorder is not None and self.player is not None
        self.ended += 1
        self.failed += exchange.ending != "complete" or exchange.status != 200
        frame = recorder.pack_exchange(exchange, self.point, self.trial, self.job.t0_s, self.player.start_s)
        self.recorder.put(frame)

    async def play(self, start: Callable[[], Awaitable[float]], shard: dict[str, Any]) -> dict[str, Any]:
        """Get ready, learn the common moment from `start`, and play."""
        assert self.player is not None
        self.point, self.trial, self.ended, self.failed = shard["point"], shard["trial"], 0, 0
        requests = [Request(**one) for one in shard["requests"]]
        until_s = shard["until_s"] or float("inf")
        senses = await self.player.play(iter(requests), shard["slots"], until_s=until_s, start=start)
        return senses.as_dict() | {"ended": self.ended, "failed": self.failed}

    def stop(self) -> None:
        if self.player:
            self.player.stop()

    def abort(self) -> None:
        """What is still in flight ends now, as cancelled."""
        if self.player:
            self.player.close()

    async def close(self) -> str:
        if self.player:
            self.player.close()
        return await self.recorder.close() if self.recorder else ""


async def serve() -> None:
    """A worker process: commands come as JSON lines on stdin, answers go as JSON lines to stdout."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=LINE_BYTES)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    worker: Worker | None = None
    dismissed = False

    async def listen() -> Any:
        line = await reader.readline()
        return json.loads(line) if line else {"do": "close"}

    def answer(**values: Any) -> None:
        sys.stdout.write(json.dumps(values) + "\n")
        sys.stdout.flush()

    async def start() -> float:
        nonlocal dismissed
        answer(ready=True)
        message = await listen()
        if "start_s" not in message:
            dismissed = True
            raise RidgelineError("the run was stopped before this worker began")
        return float(message["start_s"])

    while not dismissed and (message := await listen())["do"] != "close":
        try:
            if message["do"] == "open":
                worker = Worker(Job(**message["job"]), os.environ.pop("RIDGELINE_KEY", ""))
                await worker.open()
                loop.add_signal_handler(signal.SIGUSR1, worker.stop)
                loop.add_signal_handler(signal.SIGUSR2, worker.abort)
                answer(opened=True)
            elif message["do"] == "play" and worker:
                answer(senses=await worker.play(start, message))
        except RidgelineError as problem:
            answer(error=str(problem), code=problem.code)
    answer(said=await worker.close() if worker else "")


class LocalHand:
    """A worker process on this machine: the clock is ours."""

    error_s = 0.0
    lead_s = LEAD_S

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    @classmethod
    async def hire(cls, job: Job, key: str) -> LocalHand:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "harness.workers", stdin=subprocess.PIPE, stdout=subprocess.PIPE, limit=2**20,
            env=os.environ | {"RIDGELINE_KEY": key})  # fmt: skip
        hand = cls(process)
        await hand.ask(do="open", job=dataclasses.asdict(job))
        return hand

    async def ask(self, **message: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
        line = await self.process.stdout.readline()
        if not line:
            raise RidgelineError("a worker process died (perhaps for want of memory); its requests are lost", 6)
        said = json.loads(line)
        if "error" in said:
            raise RidgelineError(said["error"], said["code"])
        return dict(said)

    async def ready(self, shard: dict[str, Any]) -> None:
        await self.ask(do="play", **shard)

    async def go(self, start_s: float) -> dict[str, Any]:
        return dict((await self.ask(start_s=start_s))["senses"])

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGUSR1)

    def abort(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGUSR2)

    async def dismiss(self) -> str:
        try:
            said = str((await self.ask(do="close")).get("said", ""))
        except RidgelineError:
            said = ""
        await self.process.wait()
        return said


class RayHand:
    """A Ray actor, on whatever node Ray chose.  Its clock is measured against ours; its journal comes back at the end."""

    lead_s = RAY_LEAD_S

    def __init__(self, actor: Any, journal: Path, offset_s: float, error_s: float) -> None:
        self.actor, self.journal, self.offset_s, self.error_s = actor, journal, offset_s, error_s
        self.shard: dict[str, Any] = {}

    @classmethod
    async def hire(cls, job: Job, key: str, actor_class: Any) -> RayHand:
        actor = actor_class.remote()
        best: tuple[float, float] | None = None
        for _ in range(PINGS):
            before = clock()
            there = await actor.clock.remote()
            after = clock()
            if best is None or after - before < best[0]:
                best = (after - before, there - (before + after) / 2)
        assert best is not None
        offset_s = best[1]
        remote = dataclasses.asdict(job) | {"journal": "", "t0_s": job.t0_s + offset_s}
        await actor.open.remote(remote, key)
        return cls(actor, Path(job.journal), offset_s, best[0] / 2)

    async def ready(self, shard: dict[str, Any]) -> None:
        self.shard = shard
        await self.actor.prepare.remote(shard)

    async def go(self, start_s: float) -> dict[str, Any]:
        senses = dict(await self.actor.play.remote(self.shard, start_s + self.offset_s))
        held = [[at_s - self.offset_s, late_s] for at_s, late_s in senses.get("held", ())]
        return senses | {name: senses[name] - self.offset_s for name in ("started_s", "ended_s")} | {"held": held}

    def stop(self) -> None:
        self.actor.stop.remote()

    def abort(self) -> None:
        """Its close() does so: an actor hears it while it plays."""

    async def dismiss(self) -> str:
        data, said = await self.actor.close.remote()
        self.journal.write_bytes(data)
        return str(said)


def ray_actor(address: str) -> Any:
    """The actor class, on a cluster at `address` ("local" starts one here).  Raises RidgelineError without Ray."""
    try:
        import ray
    except ImportError:
        raise RidgelineError("--ray: Ray is not installed here; `pip install ridgeline[ray]`") from None
    root = str(Path(__file__).parent.parent)
    try:
        ray.init(address=None if address == "local" else address, ignore_reinit_error=True, log_to_driver=False,
                 logging_level="error", include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": root}})  # fmt: skip
    except (ConnectionError, ValueError, OSError) as problem:
        raise RidgelineError(f"--ray {address}: no cluster there: {str(problem)[:200]}", 6) from None

    class RayWorker:
        async def clock(self) -> float:
            return clock()

        async def open(self, job: dict[str, Any], key: str) -> None:
            self.folder = tempfile.TemporaryDirectory(prefix="ridgeline-")
            path = Path(self.folder.name) / "journal.bin"
            self.worker = Worker(Job(**job | {"journal": str(path)}), key)
            await self.worker.open()

        async def prepare(self, shard: dict[str, Any]) -> None:
            assert self.worker.player is not None
            await self.worker.player.prepare(min(shard["slots"] or 64, max(1, len(shard["requests"]))))

        async def play(self, shard: dict[str, Any], start_s: float) -> dict[str, Any]:
            async def start() -> float:
                return start_s

            return await self.worker.play(start, shard)

        async def stop(self) -> None:
            self.worker.stop()

        async def close(self) -> tuple[bytes, str]:
            said = await self.worker.close()
            data = Path(self.worker.job.journal).read_bytes()
            self.folder.cleanup()
            return data, said

    return ray.remote(num_cpus=1)(RayWorker)


class Crew:
    """Several workers with the face of one Player."""

    def __init__(self, hands: Sequence[LocalHand | RayHand], note: Callable[[int, int], None]) -> None:
        self.hands, self.note = hands, note
        self.busy: dict[Any, Any] = {}
        self.point = self.trial = 0
        self.start_s = 0.0
        self.stopping = self.playing = False
        self.gone = 0.0

    @classmethod
    async def hire(cls, n: int, ray: str | None, job: Job, key: str, note: Callable[[int, int], None]) -> Crew:
        """`n` workers, each with a journal of its own beside `job.journal`."""
        path = Path(job.journal)
        jobs = [
            dataclasses.replace(job, journal=str(path.with_name(f"{path.stem}-{i}{path.suffix}"))) for i in range(n)
        ]
        if ray is None:
            return cls(await asyncio.gather(*(LocalHand.hire(one, key) for one in jobs)), note)
        actor = ray_actor(ray)
        return cls(await asyncio.gather(*(RayHand.hire(one, key, actor) for one in jobs)), note)

    async def play(self, requests: Iterator[Request], slots: int, *, barrier: bool = False, ahead: int = 0,
                   until_s: float = float("inf")) -> Merged:  # fmt: skip
        everything = list(requests)
        groups = [list(g) for _, g in groupby(everything, lambda r: r.wave)] if barrier else [everything]
        found: list[list[dict[str, Any]]] = []
        for group in groups:
            if self.stopping or (found and clock() - found[0][0]["started_s"] > until_s):
                break
            found.append(await self._together(group, slots, until_s))
        return Merged(found)

    async def _together(self, requests: list[Request], slots: int, until_s: float) -> list[dict[str, Any]]:
        shards = deal(requests, slots, len(self.hands))
        working = [(hand, shard) for hand, shard in zip(self.hands, shards, strict=True) if shard["requests"]]
        more = {"point": self.point, "trial": self.trial, "until_s": None if until_s == float("inf") else until_s}
        self.playing = True
        await asyncio.gather(*(hand.ready(shard | more) for hand, shard in working))
        self.start_s = clock() + max(hand.lead_s for hand in self.hands)
        senses = await asyncio.gather(*(hand.go(self.start_s) for hand, _ in working))
        self.playing = False
        for one in senses:
            self.note(one.pop("ended"), one.pop("failed"))
        return senses

    def stop(self) -> None:
        self.stopping = True
        for hand in self.hands:
            hand.stop()

    def close(self) -> None:
        pass

    async def dismiss(self) -> str:
        """Let all go, their records on disk; what they complained of.  A worker hears no command while it plays."""
        if self.playing:
            for hand in self.hands:
                hand.abort()
        return "\n".join(filter(None, await asyncio.gather(*(hand.dismiss() for hand in self.hands))))


class Merged:
    """The senses of workers that played together, wave by wave, as one's: the whole stretch, and the worst of each."""

    def __init__(self, together: Sequence[Sequence[dict[str, Any]]]) -> None:
        self.senses = [one for senses in together for one in senses]
        self.at_once = max((sum(one["max_in_flight"] for one in senses) for senses in together), default=0)
        self.started_s = min((s["started_s"] for s in self.senses), default=0.0)
        self.ended_s = max((s["ended_s"] for s in self.senses), default=0.0)

    def as_dict(self) -> dict[str, Any]:
        names = {name for one in self.senses for name in one} - {"held"}
        worst = {
            name: max((s[name] for s in self.senses if s.get(name) is not None), default=None) for name in sorted(names)
        }
        held = [one for s in self.senses for one in s.get("held", ())]  # of one worker: as if it held up all of them
        return worst | {"held": held, "started_s": self.started_s, "ended_s": self.ended_s,
                        "max_in_flight": self.at_once}  # fmt: skip


def deal(requests: Sequence[Request], slots: int, n: int) -> list[dict[str, Any]]:
    """The shard of each of `n` workers: slots as even as can be, requests in the same proportion, turn by turn.  A
    session stays with one worker."""
    shares = [slots // n + (i < slots % n) for i in range(n)] if slots else [0] * n
    turns = [i for turn in range(max(shares)) for i in range(n) if turn < shares[i]] if slots else list(range(n))
    hands: list[list[Request]] = [[] for _ in range(n)]
    whose: dict[int, int] = {}
    turn = 0
    for request in requests:
        hand = None if request.after is None else whose.get(request.after)
        if hand is None:
            hand = turns[turn % len(turns)]
            turn += 1
        whose[request.id] = hand
        hands[hand].append(request)
    return [
        {"slots": share, "requests": [dataclasses.asdict(r) for r in mine]}
        for share, mine in zip(shares, hands, strict=True)
    ]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the crew tells its workers when to stop
    warden.prctl(
        warden.PR_SET_PDEATHSIG, signal.SIGKILL
    )  # and without it, none sends on; the recorder then ends by itself
    try:
        import uvloop
    except ImportError:
        asyncio.run(serve())
    else:
        uvloop.run(serve())
