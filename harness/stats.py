"""Quantiles, and intervals over trials.  The trial is the unit: requests of one trial share its luck."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from harness.records import NAN, Floats

# Student's t, two-sided 95 %, by degrees of freedom 1..30 (any statistics textbook); beyond, the normal's value is near.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
        2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip

# Samples below which the 95 % rank interval of a percentile is unbounded: solve 1 - q^n - (1-q)^n >= 0.95.
SAMPLES_NEEDED = {"p90": 36, "p95": 72, "p99": 368}


def quantile(values: Floats, q: float) -> float:
    """The q-quantile by linear interpolation (numpy's default, as vllm bench serve reports); NaN of nothing."""
    return float(np.quantile(values, q)) if len(values) else NAN


def mean(values: Floats) -> float:
    return float(np.mean(values, dtype=np.float64)) if len(values) else NAN


def interval(per_trial: list[float]) -> tuple[float, float]:
    """95 % interval of the mean over trials (Student's t); NaNs below three trials, where it would say nothing."""
    values = [value for value in per_trial if not math.isnan(value)]
    n = len(values)
    if n < 3:
        return NAN, NAN
    t = _T95[n - 2] if n - 2 < len(_T95) else 1.96
    half = t * float(np.std(values, ddof=1)) / math.sqrt(n)
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def within(row: Mapping[str, Any], precision: float, names: Sequence[str] = ("ttft_s", "itl_s")) -> bool:
    """Whether the 95 % intervals over trials of these metrics and of output tokens/s are within ± `precision` of their
    means.  `row` is a point's summary; a metric that was not measured does not count."""
    spans = [(row[name]["mean"], row[name]["low"], row[name]["high"]) for name in names]
    spans.append((row["output_tokens_per_s"], row["output_tokens_per_s_low"], row["output_tokens_per_s_high"]))
    known = [(middle, low, high) for middle, low, high in spans if not math.isnan(middle)]
    return bool(known) and all((high - low) / 2 <= precision * middle for middle, low, high in known)
