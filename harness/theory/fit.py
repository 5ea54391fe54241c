"""Least squares for a handful of parameters: robust Levenberg-Marquardt with a prior, in log space if the caller wants.

Used to derive the kernel curves (tests/derive_efficiency.py) and to calibrate efficiencies on a few measured cells.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def least_squares(
    residuals: Callable[[Array], Array],
    start: Array,
    *,
    low: Array | float = -np.inf,
    high: Array | float = np.inf,
    robust: float = np.inf,
    redescending: bool = False,
    steps: int = 60,
) -> Array:
    """The parameters[k] that make residuals(parameters)[n] small, between `low` and `high`.

    `robust`: residuals beyond it count by their size, no longer by its square (soft-L1 by reweighting, as in Triggs et
    al., Bundle adjustment, 2000).  Jacobian by forward differences; damping by Marquardt's rule.
    """
    x = np.clip(np.asarray(start, dtype=np.float64), low, high)
    r = residuals(x)
    damping, cost = 1e-2, _cost(r, robust, redescending)
    for _ in range(steps):
        jacobian = _jacobian(residuals, x, r, high)
        weight = (1.0 + (r / robust) ** 2) ** (-1.0 if redescending else -0.5)
        gradient, normal = jacobian.T @ (weight * r), jacobian.T @ (weight[:, None] * jacobian)
        improved = False
        while damping < 1e8:
            step = np.linalg.solve(normal + damping * np.diag(np.diag(normal) + 1e-12), -gradient)
            tried = np.clip(x + step, low, high)
            r_tried = residuals(tried)
            if (cost_tried := _cost(r_tried, robust, redescending)) < cost:
                improved = cost - cost_tried > 1e-9 * cost
                x, r, cost, damping = tried, r_tried, cost_tried, damping / 4
                break
            damping *= 4
        if not improved:
            break
    return x


def _cost(r: Array, robust: float, redescending: bool) -> float:
    if np.isinf(robust):
        return float(r @ r)
    if redescending:
        return float(np.sum(robust**2 * np.log1p((r / robust) ** 2)))
    return float(np.sum(2 * robust**2 * (np.sqrt(1 + (r / robust) ** 2) - 1)))


def _jacobian(residuals: Callable[[Array], Array], x: Array, r: Array, high: Array | float) -> Array:
    columns = []
    for i in range(len(x)):
        h = 1e-5 * max(1.0, abs(x[i]))
        moved = x.copy()
        moved[i] += h if moved[i] + h <= np.broadcast_to(high, x.shape)[i] else -h
        columns.append((residuals(moved) - r) / (moved[i] - x[i]))
    return np.stack(columns, axis=1)
