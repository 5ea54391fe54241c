"""When requests are due."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from harness import units
from harness.records import Floats, RidgelineError

Pattern = Literal["constant", "poisson", "gamma"]
Stretch = tuple[float, float, float]  # seconds, rate at its start, rate at its end; linear between
DRAWN, DRAWN_IN_ALL = 64, 2**21  # from so many draws for each gap, and no more than this, the gaps are chosen


def offsets_s(
    pattern: Pattern, rng: np.random.Generator, rate: float, n: int, burstiness: float, independent: bool = False
) -> Floats:
    """`n` sorted offsets in seconds, `rate` a second.  Gaps are all 1/rate (constant), exponential (poisson: coefficient of
    variation 1), or gamma of shape `burstiness` (below 1 burstier than Poisson: 1/sqrt(shape); as in vllm bench serve).

    Drawn gaps are one from each n-th of their distribution, in random order, n/rate in all, so that a run of a few hundred
    requests has the rate and the variation of its name: as many draws by themselves would miss the rate by 1/sqrt(n), bursty
    ones by more (stratified sampling; W. G. Cochran, Sampling Techniques, 5).  `independent` ones only add up to n/rate.
    """
    if pattern == "constant":
        return np.arange(n) / rate

    def draw(size: int) -> Floats:
        return rng.standard_exponential(size) if pattern == "poisson" else rng.standard_gamma(burstiness, size)

    if independent:
        gaps = draw(n)
    else:
        each = max(1, min(DRAWN, DRAWN_IN_ALL // n))
        ranked = np.sort(draw(n * each)).reshape(n, each)
        gaps = ranked[np.arange(n), rng.integers(each, size=n)]
        gaps[-1] = np.sqrt(np.mean(ranked[-1] ** 2))  # the longest part is wide: any one of it would move the variation
        gaps = rng.permutation(gaps)
    return np.asarray(np.cumsum(gaps) * n / (rate * gaps.sum()))


def expected(stretches: Sequence[Stretch]) -> float:
    """Requests that fall into the stretches on average."""
    return sum(for_s * (start + end) / 2 for for_s, start, end in stretches)


def rescaled(unit: Floats, stretches: Sequence[Stretch]) -> Floats:
    """Arrivals at one a second -> arrivals at a rate that changes; the last rate stays.

    The inverse of the cumulative rate, in closed form, so what holds of the unit arrivals holds exactly of these in
    rescaled time (D. J. Daley, D. Vere-Jones, An Introduction to the Theory of Point Processes, 7.4).
    """
    for_s, start, end = (np.array(column, float) for column in zip(*stretches, strict=True))
    began_s = np.concatenate([[0.0], np.cumsum(for_s)])
    before = np.concatenate([[0.0], np.cumsum(for_s * (start + end) / 2)])  # requests due before each stretch
    at = np.searchsorted(before, unit, "right") - 1
    more = unit - before[at]
    start, end = np.append(start, end[-1]), np.append(end, end[-1])
    slope = (end - start) / np.append(for_s, 1.0)
    # of start·t + slope·t²/2 = more the root that stays true when slope goes to 0; at rate 0 the first comes at once
    speed = start[at] + np.sqrt(np.maximum(0.0, start[at] ** 2 + 2 * slope[at] * more))
    return np.asarray(began_s[at] + np.divide(2 * more, speed, out=np.zeros(len(unit)), where=speed > 0))


def parse(text: str) -> dict[str, Any]:
    """--rate: numbers (one point each), START:END:TIME (a ramp), RATE@TIME,… (steps) -> keys of the workload."""
    rates: list[float] = []
    ramp: dict[str, float] | None = None
    steps: list[dict[str, float]] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            if "@" in part:
                rate, _, for_s = part.partition("@")
                steps.append({"rate": float(rate), "for_s": units.parse(for_s, "time", "--rate")})
            elif ":" in part:
                start, end, over_s = part.split(":")
                if ramp:
                    raise RidgelineError(f"--rate: got {text!r}, which holds two ramps; give one")
                ramp = {"start": float(start), "end": float(end), "over_s": units.parse(over_s, "time", "--rate")}
            else:
                rates.append(float(part))
        except ValueError:
            raise RidgelineError(
                f"--rate: got {text!r}; give numbers separated by commas (1,2,4), a ramp 1:10:60s, or steps 5@30s,10@30s"
            ) from None
    return {"rates": rates or None, "rate_ramp": ramp, "rate_steps": steps or None}
