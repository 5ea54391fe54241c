"""The server's processes on this machine, by the scheduler's account: how long they ran, and were ready and did not.

Source: Linux Documentation/scheduler/sched-stats.rst (schedstat: time on a cpu, time waiting on a run queue, in ns).
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import psutil


def listening(port: int) -> set[int]:
    """The processes that listen on `port` here, and all that they started; none where the system does not tell, or
    where we are among them."""
    try:
        found = {
            c.pid for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr[1:2] == (port,)
        }
    except (psutil.Error, OSError):
        return set()
    pids: set[int] = set()
    for pid in found:
        with contextlib.suppress(psutil.Error):
            pids |= {child.pid for child in psutil.Process(pid).children(recursive=True)} | {pid} if pid else set()
    return pids if os.getpid() not in pids else set()


class Served:
    """Seconds that the threads of `pids` ran, and waited for a core, since they were first read."""

    def __init__(self, pids: set[int]) -> None:
        self.pids = pids
        self.last: dict[str, tuple[int, int]] = {}
        self.ran_s = self.waited_s = 0.0

    def read(self) -> dict[str, float]:
        """{} where nothing is known of them."""
        now = dict(self._threads())
        if not now:
            return {}
        for path, (ran_ns, waited_ns) in now.items():
            before_ns = self.last.get(path, (ran_ns, waited_ns))
            self.ran_s += (ran_ns - before_ns[0]) / 1e9
            self.waited_s += (waited_ns - before_ns[1]) / 1e9
        self.last = now
        return {"ran_s": self.ran_s, "waited_s": self.waited_s}

    def _threads(self) -> list[tuple[str, tuple[int, int]]]:
        found = []
        for pid in self.pids:
            with contextlib.suppress(OSError, ValueError):
                for task in os.listdir(f"/proc/{pid}/task"):
                    ran, waited, _ = Path(f"/proc/{pid}/task/{task}/schedstat").read_text().split()
                    found.append((f"{pid}/{task}", (int(ran), int(waited))))
        return found
