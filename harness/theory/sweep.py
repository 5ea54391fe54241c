"""Predictions for many points of one model on one kind of hardware at once: arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from harness.records import RidgelineError
from harness.theory import intervals, load, memory
from harness.theory.calibration import Calibration
from harness.theory.frameworks import find
from harness.theory.hardware import Hardware
from harness.theory.roofline import LIMIT_OF, Room, Setup, setup, with_draft
from harness.theory.shape import Model

Array = npt.NDArray[np.float64]
Terms = dict[str, Array]

DEFAULT_ROOM = Room()
MODES = ("wave", "closed", "open", "static")
METRICS = ("ttft_s", "itl_s", "e2e_s", "output_tokens_per_s", "mem_bytes")


@dataclass(frozen=True, slots=True)
class Column:
    """One metric of n points: value, 90 % interval and strict bound, float[n]; `terms` add up to the value (a rate's:
    the requests' tokens and the seconds they are divided by)."""

    value: Array
    low: Array
    high: Array
    bound: Array
    terms: Terms


@dataclass(frozen=True, slots=True)
class Sweep:
    """The predictions of n points; NaN where a point does not fit (`fits`)."""

    setup: Setup
    mode: str
    batch: Array
    input_tokens: Array
    output_tokens: Array
    columns: dict[str, Column]
    hidden: dict[str, Terms]
    largest: Array
    running: Array
    fits: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.batch)

    def limit(self, metric: str, at: int) -> str:
        """What binds a point: the kind with the largest share of the value."""
        if not self.fits[at]:
            return "capacity"
        return limit_of({name: float(v[at]) for name, v in self.columns[metric].terms.items()})


def limit_of(terms: Mapping[str, float]) -> str:
    shares: dict[str, float] = {}
    for name, value in terms.items():
        kind = LIMIT_OF[name.removeprefix("prefill ").removeprefix("decode ")]
        shares[kind] = shares.get(kind, 0.0) + value
    return max(shares, key=lambda kind: shares[kind]) if shares else "latency"


def sweep(
    model: Model,
    hardware: Hardware,
    *,
    batch: npt.ArrayLike,
    input_tokens: npt.ArrayLike,
    output_tokens: npt.ArrayLike,
    dtype: str | None = None,
    kv_dtype: str | None = None,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    dp: int = 1,
    cp: int = 1,
    mode: str = "wave",
    rate: float | None = None,
    framework: str | None = None,
    cached_share: float = 0.0,
    waves: npt.ArrayLike = load.WAVES,
    draft: tuple[Model, int, float] | None = None,
    calibration: Calibration | None = None,
    room: Room = DEFAULT_ROOM,
) -> Sweep:
    """Predict points whose `batch`, `input_tokens` and `output_tokens` are broadcast against each other.

    `mode`: "wave" and "static" release the batch at once ("wave" counts each request's own first token, "static" that
    of the batch), "closed" keeps it in flight, "open" sends `rate` requests a second to each of which `batch` is only a
    first guess.  `draft`: a model that speculates, how many tokens at a time, and how often one is accepted.
    `room`: what the engine was told of memory.  `cached_share` of each prompt is found in a prefix cache.  Raises RidgelineError for values that make
    no sense; a point that does not fit is no error.
    """
    b, i, o = (np.atleast_1d(np.asarray(x, dtype=np.float64)) for x in (batch, input_tokens, output_tokens))
    b, i, o = (x.ravel() for x in np.broadcast_arrays(b, i, o))
    for name, values in {"batch": b, "input_tokens": i, "output_tokens": o}.items():
        if not np.all((values >= 1) & (values <= 1e8)):
            wrong = values[~((values >= 1) & (values <= 1e8))][0]
            raise RidgelineError(f"{name} must be from 1 to 100000000, got {wrong:g}")
    if mode not in MODES:
        raise RidgelineError(f"mode {mode!r} must be one of {', '.join(MODES)}")
    if not 0 <= cached_share < 1:
        raise RidgelineError(
            f"the share of a prompt in the prefix cache must be from 0 to below 1, got {cached_share:g}"
        )
    s = setup(model, hardware, find(framework, hardware, dtype or model.dtype, offline=mode == "static", family=model.family), dtype=dtype, kv_dtype=kv_dtype, tp=tp, pp=pp,
              ep=ep, dp=dp, cp=cp, factors=calibration.factors_for(model, hardware) if calibration else None)  # fmt: skip
    s = replace(s, memory=room)
    if draft:
        s = with_draft(s, *draft)
    if mode in ("wave", "static"):
        timing = load.static(s, b, i, o, cached_share, progressive=mode == "wave")
    elif mode == "open" and rate is not None:
        timing = load.open_loop(s, rate, i, o, cached_share)
    else:
        timing = load.closed(
            s, b, i, o, np.asarray(waves, dtype=np.float64) if mode == "closed" else np.inf, cached_share
        )
    latest = load.latest_s(s, b, i, cached_share) if mode == "closed" and not calibration else np.zeros_like(b)
    return _columns(s, mode, b, i, o, timing, calibration, latest)


def _columns(
    s: Setup, mode: str, b: Array, i: Array, o: Array, t: load.Timing, calibration: Calibration | None, latest: Array
) -> Sweep:
    fits = t.largest >= 1
    steps = np.maximum(o - 1, 0)
    e2e = {name if name.startswith("waiting") else f"prefill {name}": v for name, v in t.ttft.items()}
    e2e |= {f"decode {name}": steps * v for name, v in t.itl.items()}
    if mode == "static":  # its end is that of the whole batch, not of the mean request
        rest = t.busy_s - load.total({name: v for name, v in e2e.items() if name != "waiting for memory"})
        e2e["waiting for memory"] = np.maximum(rest, 0.0)
    values = {"ttft_s": load.total(t.ttft), "itl_s": np.where(steps > 0, load.total(t.itl), np.nan)}
    values["e2e_s"] = load.total(e2e)
    values["output_tokens_per_s"] = t.requests * o / t.busy_s
    values["mem_bytes"] = memory.peak_bytes(s, t.running, i, o)
    tokens = {"output tokens": t.requests * o, "seconds": t.busy_s}
    terms = {"ttft_s": t.ttft, "itl_s": t.itl, "e2e_s": e2e, "output_tokens_per_s": tokens,
             "mem_bytes": memory.peak_terms(s, t.running, i, o)}  # fmt: skip
    bounds = {"ttft_s": t.ttft_bound_s, "itl_s": t.itl_bound_s, "e2e_s": t.ttft_bound_s + steps * t.itl_bound_s,
              "output_tokens_per_s": t.requests * o / t.busy_bound_s,
              "mem_bytes": np.full_like(b, s.model.weight_bytes(s.dtype))}  # fmt: skip
    full = t.running < 0.99 * b if mode == "closed" else np.zeros(len(b), bool)
    columns = {}
    for metric in METRICS:
        value = np.where(fits, values[metric], np.nan) if metric != "mem_bytes" else values[metric]
        low, high = intervals.around(value, intervals.group(metric, mode, s, calibration), full)
        if metric == "ttft_s":
            high = np.where(np.isfinite(high), np.maximum(high, latest), high)
        if metric == "mem_bytes":
            low, high = memory.interval(s, value, low, high)
        if metric == "output_tokens_per_s":
            high = np.minimum(high, np.maximum(bounds[metric], value))
        else:
            low = np.maximum(low, np.minimum(bounds[metric], value))
        columns[metric] = Column(value, low, high, np.where(fits, bounds[metric], np.nan), terms[metric])
    hidden = {"ttft_s": t.hidden_ttft, "itl_s": t.hidden_itl}
    return Sweep(s, mode, b, i, o, columns, hidden, t.largest, t.running, fits)
