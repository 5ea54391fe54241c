"""The load generator's end of the pipe to the recorder: frames go in, records come out on disk."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from harness import recorder, store

BACKLOG_BYTES = 16 * 2**20  # more than this between us and the recorder, and sending waits
F_SETPIPE_SZ = 1031  # <fcntl.h>, Linux


class Recorder:
    """The other process, which turns bytes into records on disk."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        self.process, self.pipe = process, process.stdin

    @classmethod
    async def start(cls, journal: Path, secret: str) -> Recorder:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "harness.recorder", str(journal), stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"RIDGELINE_KEY": secret})  # fmt: skip
        with contextlib.suppress(OSError, AttributeError):
            pipe = process.stdin.transport.get_extra_info("pipe")  # type: ignore[union-attr]
            fcntl.fcntl(pipe.fileno(), F_SETPIPE_SZ, 2**20)
        assert process.stdout is not None
        await process.stdout.readline()  # a process that starts up would share the core with the first requests
        return cls(process)

    def room(self) -> bool:
        return self.pipe.transport.get_write_buffer_size() < BACKLOG_BYTES

    def put(self, frame: bytes) -> None:
        """Hand a frame over.  After the recorder died, as on a full disk, none is taken: close() tells why."""
        if not self.pipe.is_closing():
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
        return said.decode("utf-8", "replace").strip() if self.process.returncode else ""
