"""How late the loop's reads are: the instrument's own account of its error.

A timer of the kernel falls due every PERIOD_S, and its read waits its turn among the sockets': what it waited is what a
token that came at that moment had to wait.  Source: timerfd_create(2).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from harness.records import NAN

PERIOD_S = 0.0037  # a scheduler takes a core away for 4 ms and more; no part of a usual time between tokens
HELD_S = 0.0002  # less is a core's way from sleep to work
HELD_KEPT = 2000
BIN_S = 2e-5
MISSED_KEPT = 1000  # after a long stop, so many of the moments in it stand for all
CLOCK_MONOTONIC, TFD_TIMER_ABSTIME = 1, 1  # <time.h>, <sys/timerfd.h>


class _Times(ctypes.Structure):
    """struct itimerspec: interval and first expiry, as seconds and nanoseconds."""

    _fields_ = [(name, ctypes.c_long) for name in ("every_s", "every_ns", "first_s", "first_ns")]


class Lag:
    """From its making until `stop`: how late each tick was read, and when reads were held up by HELD_S or more.

    Where the system has no such timer, `note` is given what a sleep of the loop overslept instead.
    """

    def __init__(self) -> None:
        self.bins: Counter[int] = Counter()  # ticks that were so many BIN_S late
        self.max_s = NAN
        self.held: list[tuple[float, float]] = []  # (when the tick was read, how late)
        self.least_s = HELD_S  # shorter ones are not kept
        self.released_s = 0.0  # until then a wave was sent, and no token of another could come
        self.due_s = time.perf_counter() + PERIOD_S
        self.fd = _timer(self.due_s)
        if self.fd >= 0:
            asyncio.get_running_loop().add_reader(self.fd, self._read)

    def _read(self) -> None:
        now_s, times = time.perf_counter(), 0
        with contextlib.suppress(BlockingIOError):
            times = int.from_bytes(os.read(self.fd, 8), "little")
        if not times:
            return
        self.note(now_s, now_s - self.due_s)
        for k in range(1, times, 1 + times // MISSED_KEPT):
            self._count(now_s, now_s - self.due_s - k * PERIOD_S)
        self.due_s += times * PERIOD_S

    def _count(self, now_s: float, late_s: float) -> None:
        if now_s - late_s > self.released_s:
            self.bins[int(late_s / BIN_S)] += 1

    def note(self, now_s: float, late_s: float) -> None:
        self._count(now_s, late_s)
        if late_s > self.least_s:
            self.held.append((now_s, late_s))
            if len(self.held) > HELD_KEPT:
                self.held.sort(key=lambda one: one[1])
                self.least_s = self.held[HELD_KEPT // 2][1]
                del self.held[: HELD_KEPT // 2 + 1]
        if not late_s <= self.max_s:
            self.max_s = late_s

    def stop(self) -> None:
        if self.fd >= 0:
            asyncio.get_running_loop().remove_reader(self.fd)
            os.close(self.fd)
            self.fd = -1

    def as_dict(self) -> dict[str, Any]:
        """`held` are [when, how late] of the longest waits; no other was longer than `held_least_s`, and those were late by
        `usual_s` on average."""
        return {
            "lag_p99_s": _quantile(self.bins, 0.99),
            "lag_max_s": self.max_s if self.bins else None,
            "held": [[round(at_s, 6), round(late_s, 6)] for at_s, late_s in sorted(self.held)],
            "held_least_s": self.least_s,
            "usual_s": _mean_below(self.bins, self.least_s),
        }


def _timer(first_s: float) -> int:
    """A timer that is first due at `first_s` of perf_counter, as a file; -1 where the system has none."""
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        fd = int(libc.timerfd_create(CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC))
        times = _Times(0, int(PERIOD_S * 1e9), int(first_s), int(first_s % 1 * 1e9))
        if fd >= 0 and not libc.timerfd_settime(fd, TFD_TIMER_ABSTIME, ctypes.byref(times), None):
            return fd
    return -1


def _mean_below(bins: Mapping[int, int], most_s: float) -> float | None:
    usual = {k: n for k, n in bins.items() if k * BIN_S <= most_s}
    n = sum(usual.values())
    return sum((k + 0.5) * BIN_S * n for k, n in usual.items()) / n if n else None


def _quantile(bins: Mapping[int, int], q: float) -> float | None:
    """The upper edge of the bin that holds it."""
    left = q * sum(bins.values())
    for k in sorted(bins):
        left -= bins[k]
        if left <= 0:
            return (k + 1) * BIN_S
    return None
