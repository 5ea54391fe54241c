"""One run while it goes on: its folder, what plays and records, how far it is, and how it is told to stop."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import recorder, redaction, store
from harness.loadgen import Player
from harness.plan import Point
from harness.progress import Progress
from harness.recording import Recorder
from harness.scenario import Scenario
from harness.wire import Exchange
from harness.workers import Crew

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
    here: tuple[Point, int] | None = None  # what is played
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

    @property
    def over(self) -> bool:
        """Whether nothing more is to be sent."""
        return bool(self.stopped_by or self.stopped_why)

    def sink(self, exchange: Exchange) -> None:
        """An answer of the trial that is played."""
        assert self.recorder is not None and self.here is not None
        point, trial = self.here
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
