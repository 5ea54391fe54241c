"""Which single measurement would make a predicted time surer: a Bayesian linear design over the calibration's factors.

The factors of `calibrate` lie around 1 by their WIDTH between servers.  A point (TTFT and ITL at a batch) tells of them
what its slopes say, to within NOISE; the variance that it leaves of the time asked for is, with slope g of that time, G
of the measured ones, prior C and noise R (all of logarithms): g'Cg - g'CG'(GCG' + R)^-1 GCg.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.theory.calibrate import NAMES, NOISE, QUEUED, WIDTH
from harness.theory.calibration import Calibration
from harness.theory.roofline import Factors
from harness.theory.sweep import Sweep, sweep

Array = npt.NDArray[np.float64]
STEP = 1e-3


@dataclass(frozen=True, slots=True)
class Measurement:
    """A point to measure: the standard deviation of the logarithm of the time asked for, before it and after it."""

    batch: int
    input_tokens: int
    output_tokens: int
    doubt: float
    doubt_after: float


def of_calibration(cell: Any) -> Measurement | None:
    """The next cell that a calibration names (`calibrate`); None where it names none, or not as it should."""
    try:
        lengths = (int(cell["batch"]), int(cell["input_tokens"]), int(cell["output_tokens"]))
        doubt = float(cell["doubt"])
    except (KeyError, TypeError, ValueError):
        return None
    return Measurement(*lengths, doubt, min(doubt, NOISE)) if min(lengths) > 0 and math.isfinite(doubt) else None


def surest(found: Sweep, metric: str, at: int, batches: Sequence[int], calibration: Calibration | None) -> Measurement:
    """The one of `batches` whose measurement leaves the least doubt of `metric` ("ttft_s", "itl_s", "e2e_s") at batch
    `at`; where several leave as little (to a hundredth), the one nearest to it.  `found` is a sweep in mode "open"."""
    grid = np.unique([at, *batches])
    ttft, itl, aim = (_slopes(found, grid, name, calibration) for name in ("ttft_s", "itl_s", metric))
    target = aim[int(np.searchsorted(grid, at))]
    prior = np.diag(np.square([WIDTH[name] for name in NAMES]))
    noise = np.diag(np.square([math.hypot(NOISE, QUEUED), NOISE]))
    before = float(target @ prior @ target)
    after = np.empty(len(grid))
    for place, rows in enumerate(zip(ttft, itl, strict=True)):
        g = np.stack(list(rows))
        known = np.isfinite(g).all(axis=1)  # one output token: there is no ITL
        g, seen = g[known], noise[np.ix_(known, known)]
        gain = prior @ g.T
        after[place] = before - target @ gain @ np.linalg.solve(g @ gain + seen, gain.T @ target) if len(g) else before
    good = grid[np.sqrt(np.maximum(after, 0)) <= math.sqrt(max(after.min(), 0)) + 0.01 * math.sqrt(before)]
    best = int(good[np.argmin(np.abs(np.log(good / at)))])
    left = float(after[int(np.searchsorted(grid, best))])
    lengths = int(found.input_tokens[0]), int(found.output_tokens[0])
    return Measurement(best, *lengths, math.sqrt(max(before, 0.0)), math.sqrt(max(left, 0.0)))


def _slopes(found: Sweep, grid: Array, metric: str, calibration: Calibration | None) -> Array:
    """d ln(metric) / d ln(factor) at each batch of the grid (of `slot`: by the factor itself), float[n, factors]."""
    s = found.setup
    start = calibration.factors_for(s.model, s.hardware) if calibration else Factors()

    def at(factors: Factors) -> Array:
        trial = Calibration(s.hardware.name, (s.model.name,), 0, factors, 0.0)
        got = sweep(s.model, s.hardware, batch=grid, input_tokens=found.input_tokens[0], output_tokens=found.output_tokens[0],
                    dtype=s.dtype, kv_dtype=s.kv_dtype, tp=s.tp, pp=s.pp, mode="open", framework=s.framework.name,
                    calibration=trial)  # fmt: skip
        return np.log(got.columns[metric].value)

    base, given = at(start), asdict(start)
    moved = [given[n] + STEP if n == "slot" else given[n] * math.exp(STEP) for n in NAMES]
    return np.stack([(at(Factors(**given | {n: v})) - base) / STEP for n, v in zip(NAMES, moved, strict=True)], axis=1)
