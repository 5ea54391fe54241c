"""Quantiles, and intervals over trials.  The trial is the unit: requests of one trial share its luck."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from harness.records import NAN, Floats, Ints

# Student's t, two-sided 95 %, by degrees of freedom 1..30 (any statistics textbook); beyond, the normal's value is near.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
        2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip

# Samples below which the 95 % rank interval of a percentile is unbounded: solve 1 - q^n - (1-q)^n >= 0.95.
SAMPLES_NEEDED = {"p90": 36, "p95": 72, "p99": 368}


def mean(values: Floats) -> float:
    return float(np.mean(values, dtype=np.float64)) if len(values) else NAN


class Spread:
    """Mean and quantiles of any number of values >= 0 in bounded memory.

    The mean is exact, and so are the quantiles of up to EXACT values.  Beyond, values are counted in bins of equal
    relative width, 2^-11 (the upper bits of a float32, an idea of HdrHistogram), so a quantile is within 0.025 %.
    """

    EXACT = 1 << 20
    _SHIFT = 12
    _LOW, _HIGH = (int(np.float32(x).view(np.int32)) >> 12 for x in (2.0**-24, 2.0**14))  # 60 ns to 4.5 hours

    def __init__(self) -> None:
        self.n, self.total = 0, 0.0
        self.kept: list[Floats] = []
        self.counts: Ints | None = None

    def add(self, values: Floats) -> None:
        """NaNs are missing values and are left out."""
        values = values[~np.isnan(values)] if np.isnan(values).any() else values
        if not len(values):
            return
        self.n += len(values)
        self.total += float(values.sum(dtype=np.float64))
        self.kept.append(values)
        if self.n > self.EXACT:
            self.counts = np.zeros(self._HIGH - self._LOW + 1, np.int64) if self.counts is None else self.counts
            for part in self.kept:
                self.counts += self._binned(part)
            self.kept = []

    def _binned(self, values: Floats) -> Ints:
        bins = np.maximum(values, 0).astype(np.float32).view(np.int32) >> self._SHIFT
        return np.bincount(np.clip(bins, self._LOW, self._HIGH) - self._LOW, minlength=self._HIGH - self._LOW + 1)

    @property
    def mean(self) -> float:
        return self.total / self.n if self.n else NAN

    def quantiles(self, *qs: float) -> list[float]:
        """By linear interpolation (numpy's default, as vllm bench serve reports); NaNs of nothing."""
        if self.counts is None:
            values = np.concatenate(self.kept) if self.kept else np.empty(0)
            return [float(v) for v in np.quantile(values, qs)] if len(values) else [NAN] * len(qs)
        bins = np.searchsorted(np.cumsum(self.counts), [1 + q * (self.n - 1) for q in qs])
        middles = ((bins + self._LOW) << self._SHIFT) + (1 << (self._SHIFT - 1))
        return [float(v) for v in middles.astype(np.int32).view(np.float32)]

    def copy(self) -> Spread:
        other = Spread()
        other.n, other.total, other.kept = self.n, self.total, list(self.kept)
        other.counts = None if self.counts is None else self.counts.copy()
        return other


def interval(per_trial: Sequence[float]) -> tuple[float, float]:
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
