"""How far measurements lie from predictions: 90 % intervals by kind of point, from residuals on public measurements.

`intervals.csv` has, by metric, mode, framework, number of accelerators, whether the kernels of the hardware were measured,
kind of model, calibration and whether more is asked of the server than its memory holds, the factors below and above a prediction between which 90 % of the measurements lie (made by
`python -m tests.validation_page`; its head says from what).  The first row that matches counts; "*" matches all.
"""

from __future__ import annotations

import csv
from functools import cache
from importlib import resources

import numpy as np
import numpy.typing as npt

from harness.theory import kernels
from harness.theory.calibration import Calibration
from harness.theory.frameworks import named
from harness.theory.roofline import Setup

Array = npt.NDArray[np.float64]
KEYS = ("metric", "mode", "framework", "devices", "kernels", "model", "calibrated", "full")


@cache
def _rows() -> tuple[tuple[tuple[str, ...], float, float], ...]:
    text = resources.files("harness.theory").joinpath("intervals.csv").read_text("utf-8")
    rows = csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
    return tuple((tuple(row[k] for k in KEYS), float(row["low"]), float(row["high"])) for row in rows)


def group(metric: str, mode: str, s: Setup, calibration: Calibration | None) -> tuple[str, ...]:
    """What decides an interval, in the order of KEYS but for the last."""
    return (
        metric,
        "closed" if mode == "open" else "static" if mode == "wave" else mode,
        named(s.framework.name),
        "one" if s.gpus == 1 else "several",
        "measured" if kernels.measured_itself(s.hardware) else "alike",
        "moe" if s.model.moe else "dense",
        calibration.closeness(s.model, s.hardware) if calibration else "no",
    )


@cache
def factors(key: tuple[str, ...]) -> tuple[float, float]:
    """(low, high) of the first row that matches."""
    return next((low, high) for row, low, high in _rows() if all(r in ("*", k) for r, k in zip(row, key, strict=True)))


def around(value: Array, key: tuple[str, ...], full: npt.NDArray[np.bool_]) -> tuple[Array, Array]:
    """The interval's ends of each value; `full`: more is in flight than the memory holds."""
    free, waits = factors((*key, "no")), factors((*key, "yes"))
    return value * np.where(full, waits[0], free[0]), value * np.where(full, waits[1], free[1])
