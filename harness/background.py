"""For processes that work beside the loop that stamps."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
LARGE_BYTES = 2**20
SPARE_BYTES = 2**24  # kept: to give back and take again what each answer needs would cost more than to stamp it


def return_memory() -> None:
    """Have the C library (glibc) give large blocks back to the system when they are freed.  By itself it keeps them, once
    it has seen some, and a few answers out of all bounds would leave the process large for the rest of a run."""
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, SPARE_BYTES)


def give_share(pid: int) -> None:
    """A small share of a core for a process that gave way and gets none, if we may."""
    with contextlib.suppress(AttributeError, OSError):
        os.setpriority(os.PRIO_PROCESS, pid, 5)
        os.sched_setscheduler(pid, os.SCHED_BATCH, os.sched_param(0))


def give_way(pid: int = 0) -> None:
    """Let the loop that stamps go first, at once: even a low priority would keep the core for a tick of milliseconds
    when that loop wakes up, and every stamp then would be as late.

    This holds only within one session: Linux shares the cores evenly among sessions (autogroup), so these processes
    stay in the session of their parent.  There a Ctrl-C would reach them too, but they end when their input does.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if not pid else ():
        signal.signal(number, signal.SIG_IGN)
    try:
        os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
    except (AttributeError, OSError):
        if not pid:
            os.nice(19)
