"""The load generator's end of the pipe to the recorder: frames go in, records come out on disk."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from harness import background, recorder, store

BACKLOG_BYTES = 8 * 2**20  # more than this between us and the recorder, and sending waits
LATE_S, MIND_S, HELP_S = 1.0, 0.1, 1.0
F_SETPIPE_SZ = 1031  # <fcntl.h>, Linux


class Recorder:
    """The other process, which turns bytes into records on disk.

    It works when the loop that stamps leaves it a core.  On a machine that leaves it none, what was handed over would be
    lost with it if both were killed: when it is LATE_S behind it gets a small share of its own, where the system allows us
    to give it one.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        self.process, self.pipe = process, process.stdin
        self.handed = 0  # bytes
        self.waiting: deque[tuple[int, float]] = deque()  # (handed, when): what is not known to be on disk
        self.helped_s = 0.0
        self.tasks = [asyncio.ensure_future(self._hear()), asyncio.ensure_future(self._mind())]

    @classmethod
    async def start(cls, journal: Path, secret: str) -> Recorder:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "harness.recorder", str(journal), stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"RIDGELINE_KEY": secret})  # fmt: skip
        with contextlib.suppress(OSError, AttributeError):
            pipe = process.stdin.transport.get_extra_info("pipe")  # type: ignore[union-attr]
            fcntl.fcntl(pipe.fileno(), F_SETPIPE_SZ, 2**20)
        assert process.stdout is not None
        try:
            await process.stdout.readline()  # a process that starts up would share the core with the first requests
        except asyncio.CancelledError:  # it must not make the journal of a run that is over
            process.kill()
            await process.wait()
            raise
        return cls(process)

    async def _hear(self) -> None:
        """It tells how many bytes it has dealt with after each flush."""
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            while self.waiting and self.waiting[0][0] <= int(line):
                self.waiting.popleft()

    async def _mind(self) -> None:
        while True:
            await asyncio.sleep(MIND_S)
            now_s = time.monotonic()
            if self.waiting and now_s - self.waiting[0][1] > LATE_S:
                if not self.helped_s:
                    background.give_share(self.process.pid)
                self.helped_s = now_s
            elif self.helped_s and now_s - self.helped_s > HELP_S:
                background.give_way(self.process.pid)
                self.helped_s = 0.0

    def room(self) -> bool:
        return self.pipe.transport.get_write_buffer_size() < BACKLOG_BYTES

    def put(self, frame: bytes) -> None:
        """Hand a frame over.  After the recorder died, as on a full disk, none is taken: close() tells why."""
        if not self.pipe.is_closing():
            self.handed += len(frame)
            self.waiting.append((self.handed, time.monotonic()))
            with contextlib.suppress(OSError, RuntimeError):
                self.pipe.write(frame)

    def event(self, **values: Any) -> None:
        self.put(recorder.pack(b"E", store.clean(values)))

    async def close(self) -> str:
        """Wait until all is on disk; what it complained of, or ""."""
        with contextlib.suppress(OSError, RuntimeError):
            self.pipe.close()
        assert self.process.stderr is not None
        said = await self.process.stderr.read()
        await self.process.wait()
        for task in self.tasks:
            task.cancel()
        if not (code := self.process.returncode):
            return ""
        told = said.decode("utf-8", "replace").strip()  # nothing, where it was killed
        return told or f"the recorder ended with {f'signal {-code}' if code < 0 else code}, perhaps for want of memory"
