"""What a process that stamps notices of itself: time on and off its core, clocks that step, pauses of the collector.

Sources: Linux Documentation/scheduler/sched-stats.rst (schedstat: time on a cpu, time waiting on a run queue, in ns),
clock_gettime(2) (CLOCK_MONOTONIC stands still while the machine is suspended, CLOCK_BOOTTIME does not).
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import time
from typing import Any

STEP_S = 0.5  # the wall clock moved by so much against the monotonic one: somebody set it


class Watch:
    """From its making until `stop`.  `tick` is called at each sweep of the loop and costs some microseconds.

    What the system does not tell is None: no schedstat outside Linux, no CLOCK_BOOTTIME on others.
    """

    def __init__(self) -> None:
        self.schedstat = -1
        with contextlib.suppress(OSError):
            self.schedstat = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        self.start_s = time.perf_counter()
        self.used = resource.getrusage(resource.RUSAGE_SELF)
        self.before = self._scheduled()
        self.last_waited_s = self.before[0] if self.before else 0.0
        self.wait_s: list[float] = []  # time on the run queue between one tick and the next
        self.wall_s, self.boot_s = _offsets()
        self.wall_steps_s: list[float] = []
        self.suspended_s = 0.0
        self.gc_s: list[float] = []
        self.gc_started_s = 0.0
        gc.callbacks.append(self._collected)

    def _scheduled(self) -> tuple[float, int] | None:
        """Seconds for which this thread was ready to run and did not, and how often it was put on a core."""
        if self.schedstat < 0:
            return None
        _, waited_ns, slices = os.pread(self.schedstat, 96, 0).split()
        return int(waited_ns) / 1e9, int(slices)

    def _collected(self, phase: str, _info: dict[str, int]) -> None:
        now_s = time.perf_counter()
        if phase == "start":
            self.gc_started_s = now_s
        else:
            self.gc_s.append(now_s - self.gc_started_s)

    def tick(self) -> None:
        if now := self._scheduled():
            self.wait_s.append(now[0] - self.last_waited_s)
            self.last_waited_s = now[0]
        wall_s, boot_s = _offsets()
        if abs(wall_s - self.wall_s) > STEP_S:
            self.wall_steps_s.append(wall_s - self.wall_s)
            self.wall_s = wall_s
        if boot_s is not None and self.boot_s is not None:
            self.suspended_s = max(self.suspended_s, boot_s - self.boot_s)

    def stop(self) -> dict[str, Any]:
        """What was noticed, in seconds and shares of the wall time."""
        self.tick()
        gc.callbacks.remove(self._collected)
        used, lasted_s = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter() - self.start_s
        waits = sorted(self.wait_s)
        waited_s = slices = None
        if (after := self._scheduled()) and self.before:
            waited_s, slices = after[0] - self.before[0], after[1] - self.before[1]
            os.close(self.schedstat)
        return {
            "wait_share": waited_s / lasted_s if waited_s is not None and lasted_s > 0 else None,
            "wait_mean_s": waited_s / slices if waited_s is not None and slices else None,
            "wait_max_s": waits[-1] if waits else None,
            "involuntary_switches": used.ru_nivcsw - self.used.ru_nivcsw,
            "gc_max_s": max(self.gc_s, default=0.0),
            "wall_step_s": max(self.wall_steps_s, key=abs, default=0.0),
            "suspended_s": self.suspended_s,
        }


def _offsets() -> tuple[float, float | None]:
    """How far the wall clock and the boot clock are ahead of the monotonic one."""
    now_s = time.clock_gettime(time.CLOCK_MONOTONIC)
    boot = getattr(time, "CLOCK_BOOTTIME", None)
    return time.time() - now_s, time.clock_gettime(boot) - now_s if boot is not None else None
