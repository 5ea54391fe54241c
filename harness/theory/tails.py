"""Percentiles under load, from the terms of a mean: what a user's objective names is seldom the mean.

A gap between two tokens is a step of the engine, lengthened by the prompts of others that are prefilled in it; how many,
see `prompts_in_a_step`.  A first token waits for the step that runs (anywhere in it with equal chance) and for prompts
before it: as at any queue with a load p below 1, not at all with probability 1 - p, and else about exponentially (exact
for M/M/1).  The quantiles of these parts are added.  No public table of measurements has percentiles: the shape of these
tails is held against a simulation of such an engine, event by event, with Poisson arrivals (tests/test_planning.py).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from harness.theory.load import passes_for
from harness.theory.roofline import Terms
from harness.theory.sweep import Sweep

Array = npt.NDArray[np.float64]
LARGE = 64  # most prompts that are told apart in a step
GUARD = (
    0.1  # share of the gaps allowed beyond a percentile that is kept back: it jumps by whole prompts, and what is in
)
# flight fluctuates
SETTLED = 25  # steps after which the number of prompts has forgotten where it began
METRICS = ("ttft_s", "itl_s", "tpot_s", "e2e_s")


def prompts_in_a_step(rate: Array, plain_s: Array, each_s: Array, most: Array, share: float) -> Array:
    """Quantile of how many prompts a step prefills, where `rate` of them come a second, a step without any takes
    `plain_s`, each lengthens it by `each_s` and `most` fit.  float[n] each.

    A step takes those that came during the step before it, so a long step is followed by one with more prompts: the
    number is a Markov chain whose next value is Poisson with the mean rate · (plain + number · each).
    """
    mean = rate * plain_s / np.maximum(1 - rate * each_s, 0.05)
    top = int(min(most.max(), LARGE, np.ceil(mean.max() + 6 * np.sqrt(mean.max()) + 4)))
    k = np.arange(top + 1.0)
    came = (rate[:, None] * (plain_s[:, None] + k * each_s[:, None]))[:, :, None]  # n, in the step before, in this one
    logs = np.r_[0.0, np.cumsum(np.log(np.arange(1, top + 1)))]
    step = np.exp(k * np.log(np.maximum(came, 1e-300)) - came - logs)
    step[:, :, -1] += np.maximum(1 - step.sum(axis=2), 0.0)  # the rest waits for the next step
    found = step[:, 0]
    for _ in range(SETTLED):
        found = np.einsum("nj,njk->nk", found, step)
    reached = np.argmax(np.cumsum(found, axis=1) >= min(share, 1 - 1e-9), axis=1)
    return np.asarray(np.minimum(reached, most), dtype=np.float64)


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
        s = found.setup
        before = s.request_s  # until its first pass; others are not held up by it
        own = np.asarray(sum(v for name, v in terms.items() if not name.startswith("waiting"))) - before
        load = found.columns["output_tokens_per_s"].value / found.output_tokens * own
        terms["waiting for a step"] = 2 * share * terms["waiting for a step"]
        terms["waiting for prefills"] = wait_factor(load, share) * terms["waiting for prefills"]
        return terms
    passes = passes_for(found.setup, found.input_tokens)
    mean = (found.running - 1) / found.setup.dp / found.output_tokens * passes
    most = np.maximum(1.0, np.floor(found.setup.framework.chunk * passes / found.input_tokens))
    each = _each(terms["prefills of others"], mean)
    plain = np.asarray(sum(v for name, v in terms.items() if name != "prefills of others"))
    rate = found.columns["output_tokens_per_s"].value / found.output_tokens * passes * (found.running > 1)
    rate = rate / found.setup.dp
    terms["prefills of others"] = prompts_in_a_step(rate, plain, each, most, 1 - (1 - GUARD) * (1 - share)) * each
    return terms


def _each(together: Array, mean: Array) -> Array:
    """What one prompt adds to a step, from what `mean` of them add; of a request alone, as of the next batch."""
    return np.where(mean > 0, together / np.maximum(mean, 1e-300), 0.0)


def _first(name: str) -> str:
    return name if name.startswith("waiting") else f"prefill {name}"
