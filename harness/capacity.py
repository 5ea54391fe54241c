"""The highest load that meets an objective: points measured so far -> the next one, or the answer and why it ended.

A load is a rate (open loop) or a batch size (closed loop); latencies rise with it.  The search grows until an objective
is missed, then closes in on the edge from both sides: where the curve through the points crosses the bound, by the shape
that queueing theory gives it (a hyperbola with its pole where arrivals outrun completions; in a closed loop straight
lines with a knee), by bisection where that gains too little.  Each point is a noisy look at a curve that only rises:
the points are pooled by isotonic regression (Ayer et al. 1955), and the interval of the edge is what its intervals make
of it, by simulation, never narrower than from a load that met the objective to one that did not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from harness.records import NAN, Floats, Play
from harness.slo import Limit

TOLERANCE = 0.05  # of the edge: an interval as narrow as this ends the search
SIDE = 0.02  # how far beside the estimate a point is set to have the edge between two
JUMP = {"closed": 8.0, "open": 4.0}  # most that the load grows by at once: an overload takes long to drain
LEAST_SD = 0.002  # of a measured latency, whatever its own interval says
DRAWS = 400
LOOKS = 3  # long points at the edge of an open loop: one tail of a queue is a matter of luck, and so is its interval
NEAR = 0.7  # logarithm of value / bound within which a point is at the edge
SHORT = (
    0.4  # of a latency in a short look at an open loop, which may have ended before the queue was as long as it gets
)
MISFIT = 0.05  # of a latency, between the line and the truth
QUEUE, FAILED = "queue", "failed requests"
MOST = {"open": 20_000.0, "closed": 4096.0}
ALONE = 0.2  # requests in flight on average, below which the load explains nothing


@dataclass(frozen=True, slots=True)
class Reading:
    """One objective at one point: the metric's value with its 95 % interval, and the bound, in seconds."""

    metric: str
    bound: float
    value: float
    low: float = NAN
    high: float = NAN

    @property
    def excess(self) -> float:
        """Logarithm of value / bound: above 0 the objective is missed."""
        return math.log(self.value / self.bound) if self.value > 0 else NAN

    @property
    def sd(self) -> float:
        spread = math.log(self.high / self.low) / 3.92 if self.high > 0 and self.low > 0 else 0.25
        return max(LEAST_SD, spread)


@dataclass(frozen=True, slots=True)
class Measured:
    """A point: what was asked, and what its records say.  `served_per_s`: requests that ended in a second.  `saturated`:
    arrivals outran completions (open loop), so its latencies are of no steady state, only of how long it was measured."""

    load: float
    verdict: str
    readings: tuple[Reading, ...]
    saturated: bool = False
    served_per_s: float = NAN
    failed_share: float = 0.0
    ttft_s: float = NAN
    e2e_s: float = NAN
    full: bool = True  # measured for as long as a point at the edge is

    @property
    def usable(self) -> bool:
        return self.verdict != "invalid" and all(r.value > 0 for r in self.readings)


@dataclass(frozen=True, slots=True)
class Goal:
    """What is searched: `start` is the first load."""

    mode: str
    start: float
    max_points: int = 10
    max_time_s: float = 900.0
    max_failed: float = 0.01
    most: float = math.inf  # load that the client can make

    @property
    def ceiling(self) -> float:
        return min(MOST[self.mode], self.most)

    @property
    def whole(self) -> bool:
        return self.mode == "closed"


@dataclass(frozen=True, slots=True)
class Next:
    """Measure here.  `full`: near the edge, where it pays to look long."""

    load: float
    full: bool
    again: bool = False  # the same load once more: it was invalid


@dataclass(frozen=True, slots=True)
class Edge:
    """Where the objective ceases to be met.  `met` and `missed`: the highest load that met it and the lowest above that
    did not (NaN: none); `limit`: the metric that crosses its bound first."""

    load: float
    low: float
    high: float
    met: float
    missed: float
    limit: str


@dataclass(slots=True)
class Curve:
    """One objective over the load: knots in ascending order, pooled so that they only rise."""

    metric: str
    bound: float
    loads: list[float] = field(default_factory=list)
    excess: list[float] = field(default_factory=list)
    raw: list[float] = field(default_factory=list)  # before they were pooled
    sds: list[float] = field(default_factory=list)
    full: list[bool] = field(default_factory=list)


# --- where the edge is -----------------------------------------------------------------------------------------------


def rising(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The nearest sequence that never falls (pool adjacent violators)."""
    blocks: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        blocks.append((value, weight, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (v1, w1, n1), (v2, w2, n2) = blocks[-2:]
            blocks[-2:] = [((v1 * w1 + v2 * w2) / (w1 + w2), w1 + w2, n1 + n2)]
    return [value for value, _, n in blocks for _ in range(n)]


def curves(points: Sequence[Measured], noise: Floats | None = None) -> list[Curve]:
    """A curve for each objective through the usable points that were in a steady state.  `noise` (points × objectives,
    standard normal) shifts each value within its interval."""
    found: dict[tuple[str, float], Curve] = {}
    order = sorted(range(len(points)), key=lambda i: points[i].load)
    for i in order:
        point = points[i]
        if not point.usable or point.saturated or point.failed_share > 0.01:
            continue
        for k, reading in enumerate(point.readings):
            curve = found.setdefault((reading.metric, reading.bound), Curve(reading.metric, reading.bound))
            shift = 0.0 if noise is None else float(noise[i, k]) * reading.sd
            curve.loads.append(point.load)
            curve.raw.append(reading.excess + shift)
            curve.sds.append(reading.sd)
            curve.full.append(point.full)
    for curve in found.values():
        curve.excess = rising(curve.raw, [1 / sd**2 for sd in curve.sds])
    return list(found.values())


def bracket(points: Sequence[Measured], drawn: Sequence[Curve], most_failed: float) -> tuple[float, float]:
    """(highest load that meets all objectives, lowest above it that misses one); NaN where there is none."""
    broken = [p.load for p in points if p.usable and (p.saturated or p.failed_share > most_failed)]
    missed = broken + [x for c in drawn for x, z in zip(c.loads, c.excess, strict=True) if z > 0]
    high = min(missed, default=NAN)
    met = [p.load for p in points if p.usable and not p.load >= high]
    return max(met, default=NAN), high


def crossing(curve: Curve, ceiling: float, pole: float, mode: str) -> float:
    """The load at which a curve meets its bound; inf where nothing says that it does.  Open loop: `pole` is the rate that
    the server completes when more arrive (NaN: not known), `ceiling` one at which more did (inf: none)."""
    x, z = curve.loads, curve.excess
    above = next((i for i, value in enumerate(z) if value > 0), len(z))
    if above == 0:
        return x[0] * math.exp(-min(z[0], 2.0)) if x else math.inf
    y = [math.exp(value) for value in z]  # in units of the bound
    if mode == "open" and above < len(z):
        return min(_leant(curve, pole), ceiling)
    if mode == "open" and pole == pole:
        return _towards_pole(x, y, pole) if x[-1] < pole else min(x[-1] * (1 + 2 * SIDE), math.sqrt(x[-1] * ceiling))
    if above == len(z):
        return math.inf
    a, b = above - 1, above
    found = x[a] + (1 - y[a]) / (y[b] - y[a]) * (x[b] - x[a])
    further = next((i for i in range(b + 1, len(x)) if y[i] > y[b]), None)
    if further is not None:  # a knee lies between: what is beyond it is straight
        found = max(found, x[b] - (y[b] - 1) * (x[further] - x[b]) / (y[further] - y[b]))
    return min(found, x[b])


def _towards_pole(x: Sequence[float], y: Sequence[float], pole: float) -> float:
    """Open loop, where no point is above the bound: y0 + k·x / (pole - x) through the first and the last knot."""
    k, room = (y[-1] - y[0]) * (pole - x[-1]) / x[-1], 1 - y[0]
    return pole * room / (room + max(k, 0.01 * y[0])) if room > 0 else x[-1]


def _leant(curve: Curve, pole: float) -> float:
    """Open loop: where the straight line on logarithmic axes that fits the points near the bound best meets it.  Points
    far from the bound say little.  How steep it is there, where points do not tell, follows from y0 + k·x / (pole - x),
    with y0 the first knot's: a queue before its `pole`, the rate completed in overload (NaN: not known)."""
    x, z, sds = np.log(curve.loads), np.array(curve.raw), np.array(curve.sds)
    near = np.abs(z) < NEAR  # a tail that happened to be calm also seems sure: what is sure is what they are on average
    if near.any():
        sds = np.where(near, np.maximum(sds, np.sqrt(np.mean(sds[near] ** 2))), sds)
    vague = sds**2 + (0.4 * z) ** 2 + MISFIT**2 + np.where(curve.full, 0.0, SHORT**2)
    steep = np.geomspace(1.0, 40.0, 48)[:, None]
    base, found = math.exp(curve.excess[0]), float(x[np.argmin(np.abs(z))])
    for _ in range(4):
        usual = 3.0 if math.isnan(pole) else (1 - min(base, 0.9)) / max(0.03, 1 - math.exp(found) / pole)
        at = np.sum((x - z / steep) / vague, axis=1, keepdims=True) / np.sum(1 / vague)
        wrong = np.sum((z - steep * (x - at)) ** 2 / vague, axis=1) + (np.log(steep[:, 0] / usual) / 0.5) ** 2
        found = float(at[np.argmin(wrong), 0])
    return math.exp(found)


def _in_service(points: Sequence[Measured], high: float) -> float:
    """Closed loop: how many the server works on at once when more wait, by Little's law: their rate times the time that a
    request takes without the wait for its turn."""
    usable = [p for p in points if p.usable and p.ttft_s > 0]
    if not usable:
        return NAN
    alone = min(usable, key=lambda p: p.load)
    over = min((p for p in usable if p.load >= high), key=lambda p: p.load, default=alone)
    if over is alone or not over.ttft_s > 1.5 * alone.ttft_s:
        return NAN
    return over.served_per_s * (over.e2e_s - over.ttft_s + alone.ttft_s)


def _estimate(
    points: Sequence[Measured], drawn: Sequence[Curve], low: float, high: float, mode: str
) -> tuple[float, str]:
    """(the edge between the two, what crosses first)."""
    over = min((p for p in points if p.usable and p.saturated), key=lambda p: p.load, default=None)
    pole, ceiling = (over.served_per_s, over.load) if over else (NAN, math.inf)
    named = [(crossing(curve, ceiling, pole, mode), curve.metric) for curve in drawn]
    slots = _in_service(points, high) if mode == "closed" else NAN
    found, limit = min(named, default=(math.inf, QUEUE))
    if mode == "open" and math.isfinite(found):
        return found, limit
    knee = next((c for c in drawn if c.metric == limit), None)
    if low < slots < high and knee is not None and sum(z > 0 for z in knee.excess) == 1:
        found = slots  # one point beyond a knee does not tell where it is; the work in hand there does
    if not found <= high:
        broken = [p for p in points if p.usable and p.load == high]
        failed = any(p.failed_share > 0.01 for p in broken)
        limit = QUEUE if any(p.saturated for p in broken) else FAILED if failed else limit
        found = pole if low < pole < high else math.sqrt(low * high)
    return min(max(found, low), high), limit


def sound(points: Sequence[Measured]) -> list[Measured]:
    """Without short points that seemed saturated where a long one at no lower a rate was not."""
    calm = max((p.load for p in points if p.usable and p.full and not p.saturated), default=0.0)
    return [p for p in points if p.full or not p.saturated or p.load > calm]


def edge(points: Sequence[Measured], goal: Goal) -> Edge:
    """The answer that the points allow."""
    points = sound(points)
    drawn = curves(points)
    met, missed = bracket(points, drawn, goal.max_failed)
    if math.isnan(met) or math.isnan(missed):
        limit = _worst(points, missed)
        return Edge(0.0 if math.isnan(met) else met, 0.0 if math.isnan(met) else met,
                    missed if math.isnan(met) else math.inf, met, missed, limit)  # fmt: skip
    load, limit = _estimate(points, drawn, met, missed, goal.mode)
    low, high = _interval(points, goal, met, missed)
    if goal.whole:
        load, low = max(met, math.floor(load + 1e-9)), math.floor(low)
        load = met if missed - met <= 1 else load
    return Edge(load, min(low, load), max(high, load), met, missed, limit)


def _worst(points: Sequence[Measured], at: float) -> str:
    usable = [p for p in points if p.usable and (p.load == at or math.isnan(at))]
    if any(p.saturated for p in usable):
        return QUEUE
    if any(p.failed_share > 0.01 for p in usable):
        return FAILED
    readings = [r for p in usable for r in p.readings]
    return max(readings, key=lambda r: r.excess).metric if readings else ""


def _leans(points: Sequence[Measured], met: float, missed: float, goal: Goal) -> bool:
    """Open loop: whether points on both sides of the bound, in a steady state, are near enough for a line through them."""
    return goal.mode == "open" and missed <= 1.5 * met and any(z > 0 for curve in curves(points) for z in curve.raw)


def _interval(points: Sequence[Measured], goal: Goal, met: float, missed: float) -> tuple[float, float]:
    """95 % interval of the edge: what the points' own intervals make of it, and never inside of the bracket."""
    rng = np.random.default_rng(7)
    wide = max(len(p.readings) for p in points)
    found = []
    for _ in range(DRAWS):
        drawn = curves(points, rng.standard_normal((len(points), wide)))
        low, high = bracket(points, drawn, goal.max_failed)
        if math.isnan(high):
            found.append(max(p.load for p in points))
        elif math.isnan(low):
            found.append(min(p.load for p in points))
        else:
            found.append(_estimate(points, drawn, low, high, goal.mode)[0])
    low, high = np.quantile(found, (0.025, 0.975))
    if _leans(points, met, missed, goal):  # the curve says more than the two points beside the edge
        return float(low), float(high)
    return min(float(low), met), max(float(high), missed)


# --- the search ------------------------------------------------------------------------------------------------------


def decide(points: Sequence[Measured], goal: Goal) -> Next | str:
    """The next point, or why the search ends: `found`, `points`, `invalid`, `none` (not even the least load meets the
    objective), `all` (the most that is tried meets it)."""
    if not points:
        return Next(goal.start, False)
    last = points[-1]
    if not last.usable:
        if len(points) > 1 and points[-2].load == last.load and not points[-2].usable:
            return "invalid"
        return Next(last.load, last.full, True) if len(points) < goal.max_points else "points"
    drawn = curves(sound(points))
    met, missed = bracket(sound(points), drawn, goal.max_failed)
    if math.isnan(met) and _alone(points, goal):
        return "none"
    if met >= goal.ceiling:
        return "all"
    if not math.isnan(met) and not math.isnan(missed):
        at = edge(points, goal)
        if _narrow(at, points, goal):
            return "found"
        return Next(_inside(sound(points), at, goal), True) if len(points) < goal.max_points else "points"
    if len(points) >= goal.max_points:
        return "points"
    return Next(_fewer(points, goal), False) if math.isnan(met) else Next(_more(drawn, met, goal), False)


def _narrow(at: Edge, points: Sequence[Measured], goal: Goal) -> bool:
    looked = sum(p.usable and p.full and abs(p.load / at.load - 1) < 0.2 for p in points)
    if goal.mode == "open" and looked < LOOKS:
        return False
    if goal.whole and at.missed - at.met <= 1:
        again = max(sum(p.usable and p.load == load for p in points) for load in (at.met, at.missed))
        return at.high - at.low <= 1 or again >= LOOKS
    return at.high <= at.low * (1 + TOLERANCE)


def _alone(points: Sequence[Measured], goal: Goal) -> bool:
    """Whether the objective was missed where requests hardly met each other."""
    least = min((p for p in points if p.usable), key=lambda p: p.load)
    return least.load <= 1 if goal.whole else not least.saturated and least.load * least.e2e_s < ALONE


def _fewer(points: Sequence[Measured], goal: Goal) -> float:
    """Below the lowest load, which missed the objective."""
    least = min((p for p in points if p.usable), key=lambda p: p.load)
    if goal.whole:
        return max(1.0, math.floor(least.load / JUMP[goal.mode]))
    if least.saturated:
        known = least.served_per_s > 0
        return min(0.7 * least.served_per_s, least.load / 1.5) if known else least.load / JUMP[goal.mode]
    return max(least.load / JUMP[goal.mode], ALONE / 2 / least.e2e_s)


def _more(drawn: Sequence[Curve], met: float, goal: Goal) -> float:
    """Above the highest load, which met the objective: a little beyond where the curves point, never too far at once."""
    ahead = math.inf
    for curve in drawn:
        x, y = curve.loads, [math.exp(z) for z in curve.excess]
        for i in range(len(x) - 1):  # the steepest of the last stretches
            if x[-1] > x[i] and y[-1] > 1.02 * y[i]:
                ahead = min(ahead, x[-1] + (1 - y[-1]) * (x[-1] - x[i]) / (y[-1] - y[i]))
    wanted = min(max(1.05 * ahead, 1.3 * met), JUMP[goal.mode] * met, goal.ceiling)
    return max(met + 1, math.ceil(wanted)) if goal.whole else wanted


def _inside(points: Sequence[Measured], at: Edge, goal: Goal) -> float:
    """Between the two ends: at the estimate, or just beside it where one end is near already."""
    low, high = at.met, at.missed
    over = min((p for p in points if p.usable and p.saturated and p.load >= high), key=lambda p: p.load, default=None)
    if over is not None and not over.full and at.load > (1 - SIDE) * over.load:
        return over.load  # it was too short a look to end the search there
    if _leans(points, low, high, goal):
        below, above = (sum(p.full and (p.load < at.load) == side for p in points) for side in (True, False))
        return at.load * (1 + SIDE if below > above else 1 - SIDE)
    lower, upper = math.log(at.load / low), math.log(high / at.load)
    near = TOLERANCE / 2
    if lower <= near and upper <= near:
        wanted = at.load  # the bracket is narrow, the figures are not
    elif lower <= near:
        wanted = at.load * (1 + SIDE)
    elif upper <= near:
        wanted = at.load * (1 - SIDE)
    else:
        wanted = at.load * (1 - SIDE) if goal.mode == "open" else at.load
    if _slow(points, goal):
        wanted = math.sqrt(low * high)
    wanted = min(max(wanted, low * (1 + SIDE / 2)), high / (1 + SIDE / 2))
    if not goal.whole:
        return wanted if low < wanted < high else math.sqrt(low * high)
    return min(max(round(wanted), low + 1), high - 1) if high - low > 1 else low if at.low < low else high


def _slow(points: Sequence[Measured], goal: Goal) -> bool:
    """Whether the last two points inside the bracket have not halved it."""
    widths = []
    for n in range(1, len(points) + 1):
        some = [p for p in points[:n] if p.usable]
        met, missed = bracket(some, curves(some), goal.max_failed) if some else (NAN, NAN)
        widths.append(math.log(missed / met) if met > 0 and missed > 0 else NAN)
    known = [w for w in widths if w == w]
    return len(known) > 2 and known[-1] > 0.5 * known[-3] and known[-1] > TOLERANCE


# --- how long to look ------------------------------------------------------------------------------------------------

SAMPLES = {False: 100, True: 3000}  # in an open loop, where the tail of a queue is; full or not
LEAST = {False: 100, True: 250}  # in a closed loop, whose figures vary less
ROUNDS = {False: 3, True: 6}  # ... and of each slot
TIMES_E2E = {False: 4, True: 8}  # an open point lasts so many times as long as a request
TIMES_BOUND = 20  # ... and as the objective, so that a queue that grows shows


def plan(step: Next, points: Sequence[Measured], goal: Goal, limits: Sequence[Limit], left_s: float) -> Play:
    """How to play the next point in what is left of the search's time: short while it grows, long at the edge."""
    lasts_s = _lasts(step.load, points)
    ahead = max(1, min(goal.max_points - len(points), 3))
    most_s = max(1.0, left_s / ahead if step.full else min(goal.max_time_s / 30, left_s / 2))
    known_s = lasts_s if lasts_s == lasts_s else 0.0
    if goal.whole:
        size = int(step.load)
        measured = max(LEAST[step.full], ROUNDS[step.full] * size)
        warm = size if known_s else 0
        return Play(warm, measured, max(most_s, 3.5 * known_s), known_s if size > 1 else 0.0, step.full)
    bounds = [limit.bound for limit in limits if limit.metric.startswith(("ttft", "e2e"))]
    wanted_s = max(
        SAMPLES[step.full] / step.load,
        TIMES_E2E[step.full] * known_s,
        TIMES_BOUND * min(bounds, default=0.0) * step.full,
    )
    for_s = min(wanted_s, max(most_s, 4 * known_s))
    warm = math.ceil(step.load * max(1.5 * known_s, 0.1 * for_s))
    return Play(warm, max(1, math.ceil(step.load * for_s)), full=step.full)


def _lasts(load: float, points: Sequence[Measured]) -> float:
    """How long a request is likely to take, by the nearest point below; NaN where nothing was measured yet."""
    calm = [p for p in points if p.usable and not p.saturated and p.e2e_s > 0]
    below = [p for p in calm if p.load <= load]
    nearest = max(below, key=lambda p: p.load, default=min(calm, key=lambda p: p.load, default=None))
    return nearest.e2e_s if nearest else NAN
