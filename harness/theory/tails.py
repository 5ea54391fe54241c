"""Percentiles under load, from the terms of a mean: what a user's objective names is seldom the mean.

A gap between two tokens is a step of the engine, lengthened by the prompts that are prefilled in it.  Others' prompts
arrive independently, so their number in a step is Poisson; the engine's chunk bounds it.  A first token waits for the
step that runs (anywhere in it with equal chance) and for prompts before it: as at any queue with a load p below 1, not
at all with probability 1 - p, and else about exponentially (exact for M/M/1, an upper bound in the tail of M/D/1).
The quantiles of independent parts are added, which errs to the safe side.  No public table of measurements has
percentiles, so the shape of these tails is not validated as the means are.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from harness.theory.load import passes_for
from harness.theory.roofline import Terms
from harness.theory.sweep import Sweep

Array = npt.NDArray[np.float64]
LARGE = 100  # a Poisson law of this mean is normal to a unit
METRICS = ("ttft_s", "itl_s", "tpot_s", "e2e_s")


def poisson_quantile(mean: Array, share: float) -> Array:
    """The smallest k with P(X <= k) >= share, elementwise; by the normal law where the mean is large."""
    mean = np.asarray(mean, dtype=np.float64)
    large = mean > LARGE
    small = np.where(large, 0.0, mean)
    k, chance = np.zeros_like(small), np.exp(-small)
    reached = chance.copy()
    for _ in range(20 * LARGE):  # beyond any quantile: what is left is rounding
        short = reached < share
        if not np.any(short):
            break
        k = np.where(short, k + 1, k)
        chance = np.where(short, chance * small / np.maximum(k, 1), chance)
        reached = np.where(short, reached + chance, reached)
    return np.where(large, np.ceil(mean + NormalDist().inv_cdf(share) * np.sqrt(mean)), k)


def wait_factor(load: Array, share: float) -> Array:
    """Quantile over mean of a wait that is 0 with probability 1 - load and else exponential: ln(p / (1 - q)) / p."""
    p = np.clip(load, 1e-9, 1.0)
    return np.asarray(np.maximum(np.log(p / (1 - share)), 0.0) / p)


def terms_at(found: Sweep, metric: str, share: float) -> Terms:
    """The terms of this quantile of "ttft_s", "itl_s", "tpot_s" or "e2e_s"; float[n] each, they add up to it.  `share`
    NaN is the mean.  `found` is a sweep in mode "open" without a rate: its batch kept in flight.

    TPOT is a mean over an answer and hardly differs between answers: every quantile of it is the mean ITL.
    """
    if metric == "e2e_s":
        steps = np.maximum(found.output_tokens - 1, 0)
        ttft = {_first(name): v for name, v in terms_at(found, "ttft_s", share).items()}
        return ttft | {f"decode {name}": steps * v for name, v in found.columns["itl_s"].terms.items()}
    terms = dict(found.columns["itl_s" if metric == "tpot_s" else metric].terms)
    if math.isnan(share) or metric == "tpot_s":
        return terms
    if metric == "ttft_s":
        own = np.asarray(sum(v for name, v in terms.items() if not name.startswith("waiting")))
        load = found.columns["output_tokens_per_s"].value / found.output_tokens * own
        terms["waiting for a step"] = 2 * share * terms["waiting for a step"]
        terms["waiting for prefills"] = wait_factor(load, share) * terms["waiting for prefills"]
        return terms
    passes = passes_for(found.setup, found.input_tokens)
    mean = (found.running - 1) / found.output_tokens * passes
    most = np.maximum(1.0, np.floor(found.setup.framework.chunk * passes / found.input_tokens))
    each = terms["prefills of others"] / np.maximum(mean, 1e-300)
    terms["prefills of others"] = np.minimum(poisson_quantile(mean, share), most) * each
    return terms


def _first(name: str) -> str:
    return name if name.startswith("waiting") else f"prefill {name}"
