"""Which trial of which point is played next, and when a point has had enough of them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from harness import stats, store
from harness.plan import Point, points_of
from harness.scenario import Workload
from harness.tally import Tally, count

MIN_TRIALS = 3  # fewer give no interval


def schedule(workload: Workload, settled: Callable[[Point], bool] = lambda point: True) -> Iterator[tuple[int, Point]]:
    """(trial, point) in the order of play.  Points take turns in shuffled order when there are several trials, so that
    a drift of the machine does not pass for an effect of the batch size.  Where a precision is asked for, a point that
    is not `settled` gets another trial."""
    rng = np.random.default_rng([workload.seed, 7])
    points = points_of(workload)
    least = max(workload.trials, MIN_TRIALS) if workload.precision else workload.trials
    for group in [points] if workload.interleave else [[point] for point in points]:
        for trial in itertools.count():
            due = [point for point in group if trial < least or not settled(point)]
            if not due:
                break
            yield from ((trial, due[i]) for i in (rng.permutation(len(due)) if least > 1 else range(len(due))))


async def written(folder: Path, point: Point, trial: int) -> store.Run:
    """The run as it is on disk once the recorder has written that the trial ended."""
    for _ in range(100):
        found = store.load(folder)
        if any(
            e.get("event") == "trial_end" and (e["point"], e["trial"]) == (point.index, trial) for e in found.events
        ):
            break
        await asyncio.sleep(0.05)
    return found


async def is_settled(folder: Path, workload: Workload, point: Point, spent_s: float, trial: int) -> bool:
    """Whether a point's intervals are as narrow as asked, or its time is over; from what the recorder has written."""
    if workload.precision is None or spent_s >= workload.max_time_s:
        return True
    found = await written(folder, point, trial)
    tally = Tally(workload.mode, point.batch_size or 0)
    count({point.index: tally}, found.blocks)
    return stats.within(tally.row(), workload.precision)
