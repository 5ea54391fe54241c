"""Which hardware to buy for a load, with no server: every way to serve, at the batch that keeps the objectives.

A way is an accelerator, a precision of the weights and how many accelerators share a layer (tp).  For each, every batch
kept in flight up to the largest whose cache fits is predicted at once (`theory.sweep`), and the percentiles that the
objectives name (`theory.tails`).  The planned batch is the one with the most tokens per second among those at which even
the upper ends of the 90 % intervals meet every objective; what one could hope for is the batch at which the predicted
values meet them.  A way whose hardware has no known price is never called cheap: it is told below what price it would be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.records import NAN, RidgelineError
from harness.theory import design, memory, tails
from harness.theory.calibration import Calibration
from harness.theory.dtypes import WHOLE
from harness.theory.hardware import Hardware
from harness.theory.roofline import Room
from harness.theory.shape import Model
from harness.theory.sweep import Sweep, limit_of, sweep

Array = npt.NDArray[np.float64]

MOST_SEQUENCES = 1024  # in flight on one replica: engines' own limits are 256 to 1,024 (vLLM's max_num_seqs)
HOURS_A_MONTH = 730.0  # 365 · 24 / 12
WORTH = 0.01  # a saving below this share of the cost changes no answer: then the choice itself is measured
STATISTICS = {"mean": NAN, "p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
TIMES = ("ttft", "itl", "tpot", "e2e")
NARROW = ("fp8", "int4")  # what weights can be quantized to; int4 is weight-only, so any matrix unit will do
# From the best: keeps the objectives by the upper ends of its intervals, by the lower ones at least, never; a single sequence does not fit; cannot be predicted.
STATES = ("meets", "may meet", "misses", "does not fit", "cannot be predicted")


@dataclass(frozen=True, slots=True)
class Objective:
    """A time that must not be exceeded: `metric` is one of TIMES, `share` of the requests (or gaps) that keep to it (NaN:
    the mean)."""

    name: str
    metric: str
    share: float
    bound_s: float


@dataclass(frozen=True, slots=True)
class Load:
    """What is to be served: tokens of a prompt and of an answer, and requests per second (None: as many as it can)."""

    input_tokens: int
    output_tokens: int
    rate: float | None = None


@dataclass(frozen=True, slots=True)
class Span:
    """A value and its 90 % interval; NaN where it is not known."""

    value: float = NAN
    low: float = NAN
    high: float = NAN

    def times(self, factor: float) -> Span:
        return Span(self.value * factor, self.low * factor, self.high * factor)

    def under(self, numerator: float) -> Span:
        """numerator / self: the ends change places."""
        return Span(*(numerator / v if v else NAN for v in (self.value, self.high, self.low)))


@dataclass(frozen=True, slots=True)
class Curve:
    """A way to serve at every batch from 1: one replica's requests and output tokens per second, and the percentiles of
    the objectives by name.  float[n]; `terms` of each percentile add up to it."""

    found: Sweep
    batch: Array
    tokens_per_s: tuple[Array, Array, Array]
    times: dict[str, tuple[Array, Array, Array]]
    terms: dict[str, dict[str, Array]]

    def at(self, place: int) -> Span:
        return Span(*(float(v[place]) for v in self.tokens_per_s))

    def time(self, name: str, place: int) -> Span:
        return Span(*(float(v[place]) for v in self.times[name]))


@dataclass(frozen=True, slots=True)
class Point:
    """A measured point: requests in flight, output tokens per second of the server, the objectives' percentiles by name
    and the names of those that have too few samples to be sure of."""

    batch: float
    tokens_per_s: Span
    times: dict[str, Span]
    verdict: str
    thin: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Run:
    """What was measured of one server; `unlike` says why it is no answer to this question, where it is none."""

    name: str
    hardware: Hardware
    dtype: str
    tp: int
    points: tuple[Point, ...]
    unlike: str = ""


@dataclass(frozen=True, slots=True)
class Way:
    """One way to serve, and where it would be run.  Rates are of one replica, which is `tp` accelerators.

    `batch` is planned, `hoped` what would do if the predicted values themselves held (0: none); `binding` is what allows no larger
    batch: the name of an objective, "memory", "sequences" (the engine's own limit) "throughput" (a larger batch gives no
    more) or "measured" (none larger was); `limit` (one of records.LIMITS) is what the time that binds is made of at the next larger batch.  Costs are
    of output tokens, at this batch (with a rate: at that rate, on `replicas`).  A `run` was measured; the others are
    predicted.
    """

    hardware: Hardware
    dtype: str
    tp: int
    allowed: bool
    state: str
    reason: str = ""
    curve: Curve | None = None
    batch: int = 0
    hoped: int = 0
    binding: str = ""
    limit: str = "capacity"
    tokens_per_s: Span = Span()
    hoped_tokens_per_s: float = NAN
    times: Mapping[str, Span] | None = None
    replicas: Span = Span()
    in_flight: float = NAN
    usd_per_million: Span = Span()
    usd_per_month: Span = Span()
    run: Run | None = None

    @property
    def gpus(self) -> int:
        """Accelerators in all; those of one replica where nothing is known of how many it takes."""
        return self.tp * int(self.replicas.value) if math.isfinite(self.replicas.value) else self.tp

    @property
    def works(self) -> bool:
        return self.state in STATES[:2]

    @property
    def priced(self) -> bool:
        return math.isfinite(self.hardware.usd_per_h)


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer.  `verdict`: "yes", "only with" (a precision that was not asked for), "cannot tell" or "no"; `choice` is
    what to buy (None: nothing), `ways` all that was looked at, `best` the best of each hardware, `lever` the best way
    with weights narrower than asked for, where it costs less."""

    model: Model
    load: Load
    objectives: tuple[Objective, ...]
    ways: tuple[Way, ...]
    verdict: str
    choice: Way | None
    best: tuple[Way, ...]
    lever: Way | None
    framework: str
    calibration: Calibration | None


def objective(name: str, bound_s: float) -> Objective:
    """The objective of a name such as ttft_p95, itl_p50, tpot_mean or e2e_p99.  Raises RidgelineError."""
    metric, _, statistic = name.partition("_")
    if metric not in TIMES or statistic not in STATISTICS:
        raise RidgelineError(
            f"--slo: unknown objective {name!r}; a plan knows {', '.join(TIMES)} with {', '.join('_' + s for s in STATISTICS)}"
            " (such as ttft_p95)"
        )
    if not (math.isfinite(bound_s) and bound_s > 0):
        raise RidgelineError(f"--slo {name}: got {bound_s:g} s, expected more than 0")
    return Objective(name, metric, STATISTICS[statistic], bound_s)


def precisions(model: Model, hardware: Hardware) -> tuple[str, ...]:
    """The weights as published, and what they can be quantized to here; 16 bit are those this hardware multiplies."""
    own = model.dtype
    if own not in WHOLE:
        return (own,)  # quantized as published: engines keep them so
    if own == "bf16" and "bf16" not in hardware.flops and "fp16" in hardware.flops:
        own = "fp16"
    return (own, *(d for d in NARROW if d != "fp8" or "fp8" in hardware.flops))


def curve(
    model: Model, hardware: Hardware, load: Load, objectives: Sequence[Objective], *, dtype: str, tp: int,
    kv_dtype: str | None, framework: str | None, calibration: Calibration | None,
) -> Curve | None:  # fmt: skip
    """A way to serve at every batch that fits; None if not one sequence does.  Raises RidgelineError as `sweep`."""
    shared: dict[str, Any] = {
        "input_tokens": load.input_tokens, "output_tokens": load.output_tokens, "dtype": dtype, "kv_dtype": kv_dtype,
        "tp": tp, "mode": "open", "framework": framework, "calibration": calibration}  # fmt: skip
    largest = int(min(sweep(model, hardware, batch=1, **shared).largest[0], MOST_SEQUENCES))
    if not largest:
        return None
    found = sweep(model, hardware, batch=np.arange(1, largest + 1), **shared)
    speed, times, terms = found.columns["output_tokens_per_s"], {}, {}
    for o in objectives:
        metric = {"tpot": "itl_s"}.get(o.metric, f"{o.metric}_s")
        column = found.columns[metric]
        terms[o.name] = tails.terms_at(found, f"{o.metric}_s", o.share)
        value = np.asarray(sum(terms[o.name].values()))
        value = np.where(np.isfinite(column.value), value, np.nan)
        times[o.name] = (value, value * column.low / column.value, value * column.high / column.value)
    return Curve(found, found.batch, (speed.value, speed.low, speed.high), times, terms)


def _meets(curve: Curve, objectives: Sequence[Objective], end: int) -> int:
    """How many batches from 1 keep every objective by its value (end 0), low (1) or high end (2)."""
    kept = np.ones(len(curve.batch), bool)
    for o in objectives:
        values = curve.times[o.name][end]
        kept &= ~(values > o.bound_s)  # a time that does not exist (no gap with one token) breaks no bound
    return int(np.argmin(kept)) if not kept.all() else len(kept)


def _planned(way: Way, curve: Curve, load: Load, objectives: Sequence[Objective]) -> Way:
    sure, hoped, never = (_meets(curve, objectives, end) for end in (2, 0, 1))
    end = 2 if sure else 0
    first = max(sure or hoped, 1)  # those that keep it; at least batch 1, so that a miss has its figures
    place = int(np.argmax(curve.tokens_per_s[0][:first]))
    state = STATES[0] if sure else STATES[1] if never else STATES[2]
    binding, beyond = _binding(curve, objectives, place, first, end)
    on = curve.terms.get(binding) or curve.found.columns["itl_s"].terms
    limit = "capacity" if binding in ("memory", "sequences") else limit_of({k: float(v[beyond]) for k, v in on.items()})
    top = int(np.argmax(curve.tokens_per_s[0][: max(hoped, first)])) + 1 if hoped else 0
    times = {o.name: curve.time(o.name, place) for o in objectives}
    return _costed(replace(
        way, state=state, curve=curve, batch=place + 1, hoped=top, binding=binding, limit=limit, times=times,
        tokens_per_s=curve.at(place), hoped_tokens_per_s=curve.at(top - 1).value if top else NAN,
    ), load)  # fmt: skip


def _binding(curve: Curve, objectives: Sequence[Objective], place: int, first: int, end: int) -> tuple[str, int]:
    """(what allows no larger batch than `place` among the `first` that are kept by their ends, the place where it shows)"""
    if place + 1 < first:
        return "throughput", place + 1
    beyond = 0 if not _meets(curve, objectives, end) else min(first, len(curve.batch) - 1)
    over = {o.name: curve.times[o.name][end][beyond] / o.bound_s for o in objectives}
    broken = {name: ratio for name, ratio in over.items() if ratio > 1}
    if broken:
        return max(broken, key=lambda name: broken[name]), beyond
    return "sequences" if len(curve.batch) == MOST_SEQUENCES else "memory", beyond


def _costed(way: Way, load: Load) -> Way:
    """With replicas for the load, and what they cost."""
    rates = way.tokens_per_s.times(1 / load.output_tokens)
    usd_per_s = way.hardware.usd_per_h * way.tp / 3600
    if load.rate is None:
        replicas, in_flight, cost = Span(1.0, 1.0, 1.0), float(way.batch), way.tokens_per_s.under(usd_per_s * 1e6)
    else:
        each = rates.under(load.rate)
        replicas = Span(
            *(float(math.ceil(v - 1e-9)) if math.isfinite(v) else NAN for v in (each.value, each.low, each.high))
        )
        in_flight = _in_flight(way, load.rate / replicas.value)
        cost = replicas.times(usd_per_s * 1e6 / (load.rate * load.output_tokens))
    month = replicas.times(way.hardware.usd_per_h * way.tp * HOURS_A_MONTH)
    return replace(way, replicas=replicas, in_flight=in_flight, usd_per_million=cost, usd_per_month=month)


def _in_flight(way: Way, rate: float) -> float:
    """The batch at which a replica serves so many requests a second."""
    if way.curve is None:
        return NAN
    output = way.curve.found.output_tokens[0]
    served = np.maximum.accumulate(way.curve.tokens_per_s[0]) / output
    return float(np.interp(rate, np.r_[0.0, served], np.r_[0.0, way.curve.batch]))


def _unfit(model: Model, hardware: Hardware, dtype: str, tp: int) -> str:
    has = memory.usable_bytes(hardware) * tp * Room().share
    return f"{model.weight_bytes(dtype) / 1e9:.1f} GB of weights, {has / 1e9:.1f} GB that an engine can use"


def ways_of(
    model: Model, hardware: Hardware, load: Load, objectives: Sequence[Objective], *, dtypes: Sequence[str] | None,
    tps: Sequence[int], kv_dtype: str | None, framework: str | None, calibration: Calibration | None,
) -> list[Way]:  # fmt: skip
    """Every way of one hardware: `dtypes` (None: as published) are allowed, the others are levers."""
    own = precisions(model, hardware)
    allowed = (
        own[:1] if dtypes is None else tuple(dict.fromkeys(own[0] if d in ("auto", *WHOLE) else d for d in dtypes))
    )
    found = []
    for dtype in dict.fromkeys((*allowed, *own)):
        for tp in tps:
            way = Way(hardware, dtype, tp, dtype in allowed, STATES[4])
            try:
                whole = curve(model, hardware, load, objectives, dtype=dtype, tp=tp, kv_dtype=kv_dtype,
                              framework=framework, calibration=calibration)  # fmt: skip
            except RidgelineError as problem:
                found.append(replace(way, reason=str(problem)))
                continue
            if whole is None:
                found.append(replace(way, state=STATES[3], reason=_unfit(model, hardware, dtype, tp)))
                continue
            found.append(_planned(way, whole, load, objectives))
    return found


def measured_way(run: Run, load: Load, objectives: Sequence[Objective]) -> Way:
    """A run as a way to serve: its point with the most tokens per second among those that keep every objective; invalid
    points are left out, and suspect ones or percentiles of too few samples only may."""
    way = Way(run.hardware, run.dtype, run.tp, not run.unlike, STATES[4], run.unlike, run=run)
    points = sorted(
        (p for p in run.points if p.verdict != "invalid" and p.tokens_per_s.value > 0), key=lambda p: p.batch
    )
    if not points:
        return replace(way, reason="no valid point was measured")
    kept = [p for p in points if all(p.times[o.name].value <= o.bound_s for o in objectives)]
    point = max(kept, key=lambda p: p.tokens_per_s.value) if kept else points[0]
    sure = point.verdict == "valid" and not point.thin
    state = STATES[2] if not kept else STATES[0] if sure else STATES[1]
    larger = [p for p in points if p.batch > point.batch and p not in kept]
    broken = {o.name: p.times[o.name].value / o.bound_s for p in (larger[:1] if kept else [point]) for o in objectives}
    binding = max(broken, key=lambda name: broken[name]) if broken else "measured"
    whole = round(point.batch)
    return _costed(replace(
        way, state=state, batch=whole, hoped=whole, binding=binding, limit="", times=point.times,
        tokens_per_s=point.tokens_per_s, hoped_tokens_per_s=point.tokens_per_s.value,
    ), load)  # fmt: skip


def _rank(way: Way, by_price: bool) -> tuple[Any, ...]:
    """The smaller the better: state, then price (or, without, tokens per accelerator), then size."""
    cost = way.usd_per_million.value  # with a rate it is the month's price over the month's tokens: the same order
    per_gpu = way.tokens_per_s.value / way.tp if way.tokens_per_s.value > 0 else 0.0
    known = by_price and math.isfinite(cost)
    return (
        STATES.index(way.state),
        not way.hoped,
        not known and by_price,
        cost if known else -per_gpu,
        way.gpus,
        way.hardware.name,
    )


def pick(ways: Sequence[Way]) -> Way | None:
    """The best of these; None of none.  Without any price: the one that makes most of an accelerator."""
    priced = any(way.priced and way.works for way in ways)
    return min(ways, key=lambda way: _rank(way, priced), default=None)


def plan(
    model: Model, hardware: Sequence[Hardware], load: Load, objectives: Sequence[Objective], *,
    dtypes: Sequence[str] | None = None, tps: Sequence[int] = (1, 2, 4, 8), kv_dtype: str | None = None,
    framework: str | None = None, calibration: Calibration | None = None, runs: Sequence[Run] = (),
) -> Plan:  # fmt: skip
    """Every way of each hardware, and the one to buy.

    Raises RidgelineError where nothing can be predicted, or the model fits on none of them in any precision.
    """
    ways = [way for row in hardware
            for way in ways_of(model, row, load, objectives, dtypes=dtypes, tps=tps, kv_dtype=kv_dtype,
                               framework=framework, calibration=calibration)]  # fmt: skip
    if not any(way.curve for way in ways):
        first = min(ways, key=lambda way: STATES.index(way.state))
        if first.state == STATES[4]:
            raise RidgelineError(first.reason)
        raise RidgelineError(
            f"{model.name} fits on none of {', '.join(row.name for row in hardware)}: {first.reason}; name hardware with "
            "more memory, or more of --tp"
        )
    ways += [measured_way(run, load, objectives) for run in runs]
    asked = [w for w in ways if w.allowed]
    levers = [w for w in ways if not w.allowed and w.run is None]
    choice, lever = pick(asked), pick([w for w in levers if w.state == STATES[0]])
    if choice and choice.state == STATES[0]:
        verdict = "yes"
        lever = lever if lever and _rank(lever, True) < _rank(choice, True) else None
    elif lever:
        verdict, choice, lever = "only with", lever, None
    else:
        verdict = "cannot tell" if choice and choice.works else "no"
    best = tuple(way for row in hardware if (way := pick([w for w in asked if w.hardware is row and w.run is None])))
    return Plan(model, load, tuple(objectives), tuple(ways), verdict, choice if verdict != "no" else None, best,
                lever, framework or "generic", calibration)  # fmt: skip


def break_even_usd_per_h(way: Way, against: Way, load: Load) -> float:
    """The price of an accelerator's hour below which `way` costs less than `against`; NaN where that has no price."""
    if load.rate is not None:
        return against.usd_per_month.value / HOURS_A_MONTH / (way.replicas.value * way.tp)
    return against.usd_per_million.value * way.tokens_per_s.value / 1e6 * 3600 / way.tp


def at_utilisation(way: Way, share: float) -> float:
    """US dollars for a million output tokens where the accelerators do this share of what they can."""
    return way.hardware.usd_per_h * way.tp / 3600 / (way.tokens_per_s.value * share) * 1e6


@dataclass(frozen=True, slots=True)
class Advice:
    """The single measurement that would make the answer surer: `way` at `point`'s batch, and what it is expected to save
    of the cost (a share): by a larger batch that the objectives are then known to allow, or by another choice."""

    way: Way
    point: design.Measurement
    metric: str
    saves: float


def advice(found: Plan) -> Advice | None:
    """Among the choice and the best of each other hardware, the one whose measurement saves most; None without a choice.

    A measurement of a way takes the doubt of its cost from s to s' (in logarithms, as the binding time's doubt falls).
    The choice may then turn out to be wrong: of two costs d apart the expected saving is u·f(d / u) - d·F(-d / u), with
    u² = s² - s'² and f, F the normal law (value of information for two alternatives, Raiffa and Schlaifer 1961).
    """
    if found.choice is None or found.choice.curve is None:
        return None
    first = found.choice
    rivals = [w for w in found.best
              if w.works and w.curve and w.priced == first.priced and w.hardware.name != first.hardware.name]  # fmt: skip
    nearest = min(rivals, key=_cost, default=None)
    told = [_advice(found, way, first, nearest if way is first else way) for way in (first, *rivals)]
    best = max(told, key=lambda a: a.saves)
    return best if best.saves > WORTH else told[0]


def _advice(found: Plan, way: Way, first: Way, rival: Way | None) -> Advice:
    assert way.curve is not None
    objective = next((o for o in found.objectives if o.name == way.binding), None)
    metric = {"ttft": "ttft_s", "e2e": "e2e_s"}.get(objective.metric, "itl_s") if objective else "itl_s"
    batches = [2**k for k in range(11) if 2**k <= len(way.curve.batch)]
    known = found.calibration if _measured_before(found, way) else None
    if cell := design.of_calibration(known.next_cell if known else None):
        point, metric = cell, "e2e_s"  # what that very server would be surer by, given its cells
    else:
        point = design.surest(way.curve.found, metric, way.batch, batches, found.calibration)
    share = 1 - (point.doubt_after / point.doubt) ** 2 if point.doubt > 0 else 0.0
    speed = way.tokens_per_s
    spread = math.log(speed.high / speed.low) / (2 * NormalDist().inv_cdf(0.95)) * math.sqrt(max(share, 0.0))
    gain = _regret(math.log(_cost(rival) / _cost(first)), spread) if rival else 0.0
    if way is first and way.hoped:
        gain += share * math.log(way.hoped_tokens_per_s / speed.value)
    return Advice(way, point, metric, 1 - math.exp(-gain))


def _measured_before(found: Plan, way: Way) -> bool:
    """Whether the calibration is of this very model and hardware."""
    return found.calibration is not None and found.calibration.closeness(found.model, way.hardware) == "same"


def _cost(way: Way) -> float:
    """What a token costs: in dollars, or where nothing has a price in accelerators' seconds."""
    known = way.usd_per_million.value
    return known if math.isfinite(known) else way.tp / way.tokens_per_s.value


def _regret(apart: float, spread: float) -> float:
    if not (spread > 0 and math.isfinite(apart)):
        return 0.0
    law, z = NormalDist(), apart / spread
    return spread * law.pdf(z) - apart * law.cdf(-z)
