"""For processes that work beside the loop that stamps."""

from __future__ import annotations

import os
import signal


def give_way() -> None:
    """Let the loop that stamps go first, at once: even a low priority would keep the core for a tick of milliseconds
    when that loop wakes up, and every stamp then would be as late.

    This holds only within one session: Linux shares the cores evenly among sessions (autogroup), so these processes
    stay in the session of their parent.  There a Ctrl-C would reach them too, but they end when their input does.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except (AttributeError, OSError):
        os.nice(19)
