"""When requests are due.  Each pattern: (rng, rate per second, n, burstiness) -> n sorted offsets in seconds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from harness.records import Floats


def constant(rng: np.random.Generator, rate: float, n: int, burstiness: float) -> Floats:
    """One each 1/rate seconds."""
    return np.arange(n) / rate


def poisson(rng: np.random.Generator, rate: float, n: int, burstiness: float) -> Floats:
    """Exponential gaps: the coefficient of variation is 1."""
    return np.cumsum(rng.exponential(1 / rate, n))


def gamma(rng: np.random.Generator, rate: float, n: int, burstiness: float) -> Floats:
    """Gamma gaps of shape `burstiness` (below 1 burstier than Poisson, 1 is Poisson): the variation is 1/sqrt(shape).

    The parameter means what it means in vllm bench serve (--burstiness).
    """
    return np.cumsum(rng.gamma(burstiness, 1 / (rate * burstiness), n))


ARRIVALS: dict[str, Callable[[np.random.Generator, float, int, float], Floats]] = {
    "constant": constant,
    "poisson": poisson,
    "gamma": gamma,
}
