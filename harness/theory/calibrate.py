"""Fits a handful of efficiency factors to a few measured cells of one server, and says which cell to measure next.

Maximum a posteriori: the residuals are ln(predicted / measured) in units of what a repeat differs by, and each factor is
drawn towards 1 (ln 1 = 0) by the width it has between servers, so that a factor no cell tells of stays where it was.
The next cell is the one whose prediction is least sure given the cells so far (the largest posterior variance, as in
D-optimal design).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from harness.records import RidgelineError
from harness.theory import validate
from harness.theory.calibration import Calibration
from harness.theory.fit import least_squares
from harness.theory.roofline import Factors
from harness.theory.validate import Case

Array = npt.NDArray[np.float64]

MOST = 10  # cells of a server that a fit takes
NOISE = 0.04  # ln(repeat / repeat) of the same cell on the same server
# How far a factor lies from 1 between servers (standard deviation of its logarithm; `slot`: of itself).
WIDTH = {"compute": 0.2, "bandwidth": 0.15, "kv": 0.5, "overhead": 0.7, "link": 0.7, "queue": 0.7, "request": 1.0,
         "narrow": 0.4, "slot": 0.7}  # fmt: skip
# On a CPU: what numpy reaches there says little of an engine's own kernels, and of how many cores it works with.
CPU_WIDTH = {"compute": 0.7, "bandwidth": 0.7}
NAMES = tuple(f.name for f in fields(Factors))
TOLD = ("ttft_ms", "tpot_ms", "e2e_s", "out_tps")  # what is fitted, where it was measured
QUEUED = 0.15  # ln of how far a TTFT under load lies from any model of the queue


@dataclass(frozen=True, slots=True)
class _Cells:
    """Cells of servers of one hardware and framework, and the metrics each was measured by."""

    parts: tuple[tuple[Case, str, pd.DataFrame], ...]

    def residuals(self, factors: Factors) -> Array:
        """ln(predicted / measured) over its noise, of each figure."""
        found = []
        for case, kind, rows in self.parts:
            trial = Calibration(case.hardware.name, (case.model.name,), 0, factors, 0.0)
            got = validate.swept(case, kind, rows, trial)
            for column in TOLD:
                metric, unit = validate.METRICS[column]
                was = rows[column].to_numpy() * unit / (case.replicas if column == "out_tps" else 1)
                if column == "out_tps" and rows.e2e_s.notna().all():
                    continue  # the same measurement once more
                known = (was > 0) & np.isfinite(got.columns[metric].value)
                if column in ("ttft_ms", "e2e_s"):
                    known &= rows.isl.notna().to_numpy()
                noise = math.hypot(NOISE, QUEUED) if column == "ttft_ms" and kind != "static" else NOISE
                found.append(np.log(got.columns[metric].value[known] / was[known]) / noise)
        return np.concatenate(found) if found else np.empty(0)


def _factors(x: Array) -> Factors:
    return Factors(**{n: float(v if n == "slot" else np.exp(v)) for n, v in zip(NAMES, x, strict=True)})


def chosen(rows: pd.DataFrame, most: int = MOST) -> pd.DataFrame:
    """At most so many of the rows: those that span batch and lengths best (each next the farthest from those taken)."""
    if len(rows) <= most:
        return rows
    points = np.log(rows[["batch", "isl", "osl"]].fillna(1.0).clip(lower=1.0).to_numpy())
    taken = [int(np.argmin(points.sum(axis=1)))]
    while len(taken) < most:
        away = np.min(np.linalg.norm(points[:, None] - points[taken][None], axis=2), axis=1)
        away[taken] = -1.0
        taken.append(int(np.argmax(away)))
    return rows.iloc[sorted(taken)]


def calibrate(rows: pd.DataFrame, where: str) -> Calibration:
    """The calibration from measured rows (as `validate.read` returns them) of one hardware; at most MOST cells of each
    server are taken.  Raises RidgelineError if no row can be used, or if the rows are of several kinds of hardware."""
    parts, hardware, models, reasons = [], set(), [], []
    for common, part in validate.servers(rows):
        try:
            case = validate.case_of(common)
        except RidgelineError as problem:
            reasons.append(str(problem))
            continue
        part = part[part.osl.gt(0) & part.batch.gt(0) & part[list(TOLD)].gt(0).any(axis=1)]
        if len(part):
            parts.append((case, str(common["kind"]), chosen(part)))
            hardware.add(case.hardware.name)
            models.append(case.model.name)
    if not parts:
        raise RidgelineError(f"{where}: no measured cell to calibrate on{': ' + reasons[0] if reasons else ''}")
    if len(hardware) > 1:
        raise RidgelineError(
            f"{where}: cells of several kinds of hardware ({', '.join(sorted(hardware))}); give those of one"
        )
    return _fit(_Cells(tuple(parts)), hardware.pop(), tuple(dict.fromkeys(models)))


def _fit(cells: _Cells, hardware: str, models: tuple[str, ...]) -> Calibration:
    free = _free(cells)
    cpu = any(case.hardware.cpu for case, _, _ in cells.parts)
    widths = WIDTH | CPU_WIDTH if cpu else WIDTH
    start, width = np.array([0.0] * len(NAMES)), np.array([widths[n] for n in NAMES])

    def spread_out(x: Array) -> Array:
        whole = start.copy()
        whole[free] = x
        return whole

    def residuals(x: Array) -> Array:
        whole = spread_out(x)
        return np.concatenate([cells.residuals(_factors(whole)), whole[free] / width[free]])

    low = np.where(np.array(NAMES) == "slot", 0.0, -3.0)[free]
    near = least_squares(residuals, start[free], low=low, high=3.0, robust=3.0, steps=25)
    # A cell that went wrong (memory thrashing, first compilation) lies many times its noise off: it must not pull the rest.
    x = least_squares(residuals, near, low=low, high=3.0, robust=3.0, redescending=True, steps=25)
    fitted = cells.residuals(_factors(spread_out(x)))
    if not len(fitted):
        raise RidgelineError("no cell to calibrate on can be predicted: does the model fit the hardware?")
    spread = NOISE * float(np.sqrt(np.mean(np.square(fitted))))
    count = sum(len(rows) for _, _, rows in cells.parts)
    return Calibration(
        hardware, models, count, _factors(spread_out(x)), spread, _next_cell(cells, residuals, spread_out, x)
    )


def _free(cells: _Cells) -> npt.NDArray[np.bool_]:
    """The factors that these cells can tell of at all."""
    loaded = any(kind != "static" for _, kind, _ in cells.parts)
    linked = any(case.tp * case.pp * case.dp > 1 for case, _, _ in cells.parts)
    cpu = any(case.hardware.cpu for case, _, _ in cells.parts)
    told = {"narrow": cpu, "link": linked, "queue": loaded, "request": loaded, "slot": loaded}
    return np.array([told.get(n, True) for n in NAMES])


def _next_cell(
    cells: _Cells, residuals: Callable[[Array], Array], spread_out: Callable[[Array], Array], x: Array
) -> dict[str, Any]:
    """The cell (batch, isl, osl) not measured yet whose end-to-end time is least sure."""
    step = 1e-3
    base = residuals(x)
    jacobian = np.stack([(residuals(x + step * e) - base) / step for e in np.eye(len(x))], axis=1)
    covariance = np.linalg.inv(jacobian.T @ jacobian)
    case, kind, rows = cells.parts[0]
    grid = pd.MultiIndex.from_product([2.0 ** np.arange(8), [128.0, 512.0, 2048.0], [32.0, 128.0, 512.0]],
                                      names=["batch", "isl", "osl"]).to_frame(index=False)  # fmt: skip
    measured = set(map(tuple, rows[["batch", "isl", "osl"]].to_numpy().tolist()))
    grid = grid[[tuple(r) not in measured for r in grid.to_numpy().tolist()]]

    def predicted(x: Array) -> Array:
        trial = Calibration(case.hardware.name, (case.model.name,), 0, _factors(spread_out(x)), 0.0)
        return np.log(validate.swept(case, kind, grid, trial).columns["e2e_s"].value)

    slope = np.stack([(predicted(x + step * e) - predicted(x)) / step for e in np.eye(len(x))], axis=1)
    doubt = np.sqrt(np.einsum("ij,jk,ik->i", slope, covariance, slope))
    best = int(np.argmax(np.where(np.isfinite(doubt), doubt, -1.0)))
    row = grid.iloc[best]
    return {"model": case.model.name, "kind": kind, "batch": int(row.batch), "input_tokens": int(row.isl),
            "output_tokens": int(row.osl), "doubt": float(doubt[best])}  # fmt: skip


def of_points(points: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The measured points of a run (as in summary.json) as cells, each the median of its trials; invalid points are left out.

    `batch` of an open loop is what was in flight on average (Little's law).
    """
    rows = []
    for point in points:
        if point["verdict"] == "invalid" or not point["input_tokens"] or not point["output_tokens"]:
            continue
        batch = point["batch_size"] or point["requests_per_s"] * point["e2e_s"]["mean"]
        means = {column: point[name].get("median_of_trials") or point[name]["mean"]  # older summaries have no median
                 for column, name in (("ttft_ms", "ttft_s"), ("tpot_ms", "itl_s"))}  # fmt: skip
        figures = {column: 1e3 * mean_s if mean_s else math.nan for column, mean_s in means.items()}
        rows.append({"batch": float(max(1, round(batch))), "isl": float(round(point["input_tokens"])),
                     "osl": float(round(point["output_tokens"])), **figures})  # fmt: skip
    names = ["batch", "isl", "osl", *TOLD]
    return pd.DataFrame(rows, columns=names).astype(float)


def calibrate_cells(case: Case, kind: str, rows: pd.DataFrame, where: str) -> Calibration:
    """The calibration from cells (batch, isl, osl and what was measured) of one server."""
    if not len(rows):
        raise RidgelineError(f"{where}: no valid point to calibrate on")
    return _fit(_Cells(((case, kind, chosen(rows)),)), case.hardware.name, (case.model.name,))


class Calibrations:
    """Calibrations for the servers of a table, each from the cells nearest to it: of the same server, else of the same
    model, else of the same framework on the same hardware, else of any on that hardware.  None where there are none."""

    NEAR = (
        (*validate.SERVER, "kind"),
        ("model", "gpu", "framework", "kind"),
        ("gpu", "framework", "n_gpus", "tp", "pp", "kind"),
        ("gpu", "framework", "kind"),
        ("gpu", "framework"),
        ("gpu",),
    )

    def __init__(self, cells: pd.DataFrame) -> None:
        self.cells = cells
        self.fitted: dict[tuple[Any, ...], Calibration | None] = {}

    def of(self, common: dict[Any, Any]) -> Calibration | None:
        """The calibration for a server's rows, fitted once."""
        for columns in self.NEAR:
            key = (columns, *(str(common[c]) for c in columns))
            if key not in self.fitted:
                same = np.ones(len(self.cells), bool)
                for c in columns:
                    same &= (self.cells[c].astype(str) == str(common[c])).to_numpy()
                self.fitted[key] = self._fit(self.cells[same])
            if self.fitted[key]:
                return self.fitted[key]
        return None

    def _fit(self, cells: pd.DataFrame) -> Calibration | None:
        try:
            return calibrate(cells, "cells") if len(cells) else None
        except RidgelineError:
            return None
