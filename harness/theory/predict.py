"""One point of a sweep in words: values with their terms, what binds, how sure, and why; and the throughput-batch plane.

The numbers come from `sweep`; here they become sentences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from harness import units
from harness.records import NAN, Prediction
from harness.theory import memory, seeds
from harness.theory.calibration import Calibration
from harness.theory.hardware import Hardware
from harness.theory.roofline import Setup, decode_step
from harness.theory.shape import Model
from harness.theory.sweep import MODES, Sweep, limit_of, sweep

__all__ = ["MODES", "PointPrediction", "plane", "point", "predict"]

Array = npt.NDArray[np.float64]
NAMES = {"ttft_s": "TTFT", "itl_s": "ITL", "e2e_s": "End to end", "mem_bytes": "Memory"}
LEAST_SHARE = 0.01  # smaller terms are named together


@dataclass(frozen=True, slots=True)
class PointPrediction:
    """What theory says of one point.  Times are means over the requests of the point.

    `fits`: the weights and at least one sequence fit; where they do not, the values are NaN.  `largest_batch`: whole
    sequences whose KV cache fits beside the weights.  `joules_per_token`: at the accelerators' rated power, NaN where
    that is not known.  `seed`: the seeds' arithmetic for the same point.
    """

    batch: int
    input_tokens: int
    output_tokens: int
    ttft_s: Prediction
    itl_s: Prediction
    e2e_s: Prediction
    output_tokens_per_s: Prediction
    mem_bytes: Prediction
    limit: str
    largest_batch: int
    fits: bool
    joules_per_token: float
    seed: dict[str, float]
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """As summary.json holds it under `predicted` (without the ratios); NaN is null."""
        metrics = (self.ttft_s, self.itl_s, self.e2e_s, self.output_tokens_per_s, self.mem_bytes)
        return {
            "limit": self.limit,
            "largest_batch": self.largest_batch,
            "fits": self.fits,
            **{p.metric: _prediction_dict(p) for p in metrics},
            "joules_per_token": _null(self.joules_per_token),
            "seed": {key: _null(value) for key, value in self.seed.items()},
            "notes": list(self.notes),
        }


def _null(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _prediction_dict(p: Prediction) -> dict[str, Any]:
    numbers = {"value": _null(p.value), "low": _null(p.low), "high": _null(p.high), "bound": _null(p.bound)}
    terms = {name: _null(value) for name, value in p.terms.items()}
    return {**numbers, "limit": p.limit, "terms": terms, "because": p.because}


def predict(
    model: Model,
    hardware: Hardware,
    *,
    batch: int,
    input_tokens: int,
    output_tokens: int,
    dtype: str | None = None,
    kv_dtype: str | None = None,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    dp: int = 1,
    mode: str = "wave",
    rate: float | None = None,
    framework: str | None = None,
    cached_share: float = 0.0,
    waves: float = 10,
    draft: tuple[Model, int, float] | None = None,
    calibration: Calibration | None = None,
) -> PointPrediction:
    """The prediction for `batch` requests in flight of `input_tokens` and `output_tokens` each.

    As `sweep`, for one point.  Raises RidgelineError for values that make no sense.
    """
    found = sweep(model, hardware, batch=batch, input_tokens=input_tokens, output_tokens=output_tokens, dtype=dtype,
                  kv_dtype=kv_dtype, tp=tp, pp=pp, ep=ep, dp=dp, mode=mode, rate=rate, framework=framework,
                  cached_share=cached_share, waves=waves, draft=draft, calibration=calibration)  # fmt: skip
    return point(found, 0)


def point(found: Sweep, at: int) -> PointPrediction:
    """Point number `at` of a sweep, with its sentences."""
    s, shape = found.setup, (int(found.batch[at]), int(found.input_tokens[at]), int(found.output_tokens[at]))
    seed = _seed(s, *shape)
    memory_needed = _metric(found, "mem_bytes", at, "")
    largest = int(min(found.largest[at], 1e9))
    if not found.fits[at]:
        return _unfit(s, shape, seed, memory_needed)
    ttft = _metric(found, "ttft_s", at, f" For {_prompts(found, at)}.")
    itl = _metric(found, "itl_s", at, f" For {units.count(found.running[at])} sequences in a step.")
    e2e = _e2e(found, at, ttft, itl)
    speed = _speed(found, at, e2e.limit)
    energy = s.hardware.tdp_w * s.gpus / speed.value if speed.value else NAN
    return PointPrediction(
        *shape, ttft, itl, e2e, speed, memory_needed, e2e.limit, largest, True, energy, seed, s.notes
    )


def _prompts(found: Sweep, at: int) -> str:
    together = found.running[at] if found.mode in ("wave", "static") else 1
    return f"{units.count(together)} × {units.count(found.input_tokens[at])} prompt tokens"


def _metric(found: Sweep, metric: str, at: int, work: str) -> Prediction:
    column = found.columns[metric]
    value = float(column.value[at])
    terms = {name: float(v[at]) for name, v in column.terms.items() if v[at] > 0}
    if math.isnan(value):
        because = "With one output token there is no time between tokens."
        return Prediction(metric, NAN, NAN, NAN, "latency", {}, because)
    hidden = {name: float(v[at]) for name, v in found.hidden.get(metric, {}).items() if v[at] > 0}
    limit = "capacity" if metric == "mem_bytes" else limit_of(terms)
    because = _because(metric, terms, value, hidden, _details(found, at, metric)) + work
    return Prediction(metric, value, float(column.low[at]), float(column.high[at]), limit, terms, because,
                      float(column.bound[at]))  # fmt: skip


def _because(
    metric: str, terms: Mapping[str, float], value: float, hidden: Mapping[str, float], details: Mapping[str, str]
) -> str:
    """The value as the sum of its terms, the largest named with its share."""
    show = units.size if metric == "mem_bytes" else units.seconds
    name = NAMES[metric]
    if not math.isfinite(value):
        return f"{name} grows without end: more requests arrive than can be served."

    def part(term: str, amount: float) -> str:
        return f"{term} {show(amount)}" + (f" ({details[term]})" if term in details else "")

    large = {term: amount for term, amount in terms.items() if amount >= LEAST_SHARE * value}
    rest = value - sum(large.values())
    parts = [part(term, amount) for term, amount in large.items()]
    if rest > 1e-9 * value:
        parts.append(f"others {show(rest)}")
    largest = max(terms, key=lambda term: terms[term])
    text = f"{name} {show(value)} = {' + '.join(parts)}; {largest} is {units.percent(terms[largest] / value, 2)} of it."
    behind = [part(term, amount) for term, amount in hidden.items() if amount >= LEAST_SHARE * value]
    return text + (f" Hidden behind these: {', '.join(behind)}." if behind else "")


def _details(found: Sweep, at: int, metric: str) -> dict[str, str]:
    """The quantities behind the terms, in words, with what their kernels reach of the data sheet."""
    s, model = found.setup, found.setup.model
    if metric == "mem_bytes":
        return {}
    together = found.running[at] if found.mode in ("wave", "static") or metric == "itl_s" else 1.0
    tokens = together * (found.input_tokens[at] if metric == "ttft_s" else 1.0)
    work = (
        tokens * model.matmul_flops_per_token / (s.cp if metric == "ttft_s" else 1)
        + together * model.head_flops_per_token
    )
    reads = float(model.read_bytes(s.dtype, tokens))
    rate = s.hardware.bytes_per_s * s.tp  # in context parallel of each that has all the weights
    said = {
        "weights": f"{units.size(reads)} at {units.bandwidth(rate)}, of which kernels reach {units.percent(s.gemm.bandwidth, 2)}",
        "matmul": f"{units.amount(work)}FLOP at {units.flops(s.flops * s.tp)} {s.matmul_dtype}, of which kernels reach "
        f"{units.percent(s.gemm.compute, 2)}",
    }
    if s.gemm.products:
        said["ridge"] = (
            f"what the engine's own products with {units.count(tokens)} rows were measured to take beyond that"
        )
    if metric == "itl_s":
        first, last = found.input_tokens[at] + 1, found.input_tokens[at] + max(1.0, found.output_tokens[at] - 1)
        kv = together * float(model.mean_kv_read_bytes(first, last, s.kv_dtype)) / s.cp
        said["kv cache"] = (
            f"{units.size(kv)}, {units.count(together)} sequences of {units.count((first + last) / 2)} tokens, of the same "
            f"rate {units.percent(s.decode.bandwidth, 2)}"
        )
    return said


def _e2e(found: Sweep, at: int, ttft: Prediction, itl: Prediction) -> Prediction:
    column, steps = found.columns["e2e_s"], int(found.output_tokens[at]) - 1
    terms = {name: float(v[at]) for name, v in column.terms.items() if v[at] > 0}
    value = float(column.value[at])
    waits = bool(found.batch[at] > found.running[at]) and found.mode != "open"
    because = f"End to end {units.seconds(value)} = TTFT {units.seconds(ttft.value)}"
    because += f" + {units.count(steps)} × ITL {units.seconds(itl.value)}." if steps else "."
    limit = "capacity" if waits else limit_of(terms)
    return Prediction("e2e_s", value, float(column.low[at]), float(column.high[at]), limit, terms, because,
                      float(column.bound[at]))  # fmt: skip


def _speed(found: Sweep, at: int, limit: str) -> Prediction:
    """Output tokens per second from the first request sent to the last token received; not a sum but a quotient."""
    column = found.columns["output_tokens_per_s"]
    terms = {name: float(v[at]) for name, v in column.terms.items()}
    value = float(column.value[at])
    because = (
        f"{units.count(terms['output tokens'])} output tokens in {units.seconds(terms['seconds'])} make "
        f"{units.rate(value, 'tokens')}."
    )
    return Prediction("output_tokens_per_s", value, float(column.low[at]), float(column.high[at]), limit, terms, because,
                      float(column.bound[at]))  # fmt: skip


def _seed(s: Setup, batch: int, tokens: int, output: int) -> dict[str, float]:
    """The seeds' arithmetic for the point: all parameters, no KV reads, n steps for n tokens, all prompts at once."""
    itl = seeds.time_per_token_s(s.model.weight_bytes(s.dtype), s.hardware.bytes_per_s * s.tp)
    ttft = seeds.prefill_s(s.model.params, batch * tokens, s.flops * s.tp)
    e2e = seeds.generation_s(ttft, itl, output, first_from_prefill=False)
    return {"ttft_s": ttft, "itl_s": itl, "e2e_s": e2e, "output_tokens_per_s": batch * output / e2e}


def _unfit(s: Setup, shape: tuple[int, int, int], seed: dict[str, float], needed: Prediction) -> PointPrediction:
    weights, has = s.model.weight_bytes(s.dtype) * s.cp, memory.usable_bytes(s.hardware) * s.gpus
    kv = float(s.model.kv_bytes(float(shape[1] + shape[2]), s.kv_dtype))
    because = (
        f"{s.model.name} does not fit: {units.size(weights)} of weights and {units.size(kv)} of KV cache for one "
        f"sequence exceed {units.percent(s.memory.share)} of {units.size(has)} ({s.gpus} × {s.hardware.name}), "
        f"less what a pass needs."
    )
    names = ("ttft_s", "itl_s", "e2e_s", "output_tokens_per_s")
    ttft, itl, e2e, speed = (Prediction(metric, NAN, NAN, NAN, "capacity", {}, because) for metric in names)
    return PointPrediction(*shape, ttft, itl, e2e, speed, needed, "capacity", 0, False, NAN, seed, s.notes)


def plane(
    model: Model,
    hardware: Hardware,
    *,
    input_tokens: int,
    output_tokens: int,
    dtype: str | None = None,
    kv_dtype: str | None = None,
    tp: int = 1,
    pp: int = 1,
    framework: str | None = None,
    calibration: Calibration | None = None,
) -> dict[str, Any]:
    """The throughput-batch plane of decoding (seed 000) at the mean context, with KV reads.

    Arrays over `batch`, output tokens per second: `memory_roof_tokens_per_s` = B / (weights + KV), the line up to the
    ridge; `compute_roof_tokens_per_s` = 1 / matmul, level: both at the full rates of the data sheet.
    `roof_tokens_per_s` is the predicted decode throughput, nowhere above either.  `ridge_batch` is where computing takes
    as long as reading the weights; `largest_batch` what the KV cache admits.
    """
    s = sweep(model, hardware, batch=1, input_tokens=input_tokens, output_tokens=output_tokens, dtype=dtype,
              kv_dtype=kv_dtype, tp=tp, pp=pp, framework=framework, calibration=calibration).setup  # fmt: skip
    matmul = (model.matmul_flops_per_token / s.flops + model.head_flops_per_token / s.head_flops) / tp
    ridge = s.weights_s() / matmul
    top = math.ceil(math.log2(min(65_536, max(256, 4 * ridge))))
    batch: Array = np.unique([*(2.0**k for k in range(top + 1)), max(1.0, float(round(ridge)))])
    first, last = input_tokens + 1.0, input_tokens + max(1.0, output_tokens - 1.0)
    step = decode_step(s, batch, np.full_like(batch, first), np.full_like(batch, last))
    rate = hardware.bytes_per_s * tp
    kv = batch * float(model.mean_kv_read_bytes(first, last, s.kv_dtype)) * s.kv_copies / rate
    weights = model.read_bytes(s.dtype, batch) / rate
    fitting = memory.largest_batch(s, np.array([float(input_tokens + output_tokens)]))
    return {
        "batch": [int(b) for b in batch],
        "roof_tokens_per_s": (batch / step.total).tolist(),
        "memory_roof_tokens_per_s": (batch / (weights + kv)).tolist(),
        "compute_roof_tokens_per_s": np.full(len(batch), 1 / matmul).tolist(),
        "ridge_batch": ridge,
        "largest_batch": int(min(fitting[0], 1e9)),
    }
