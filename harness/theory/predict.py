"""The refined roofline for dense models: what a point of a sweep should take at best, term by term.

Prefill of n tokens:  max(weights, matmul) + attention + link.
Decoding step:        max(weights, matmul) + max(kv cache, attention) + link.
Reading the KV cache does not hide behind the matrix work of the same step (scaling-book, inference chapter), so it
adds.  A link of tensor parallelism carries two all-reduces a layer: latency floor plus volume.

First version: every term runs at the full peak of the data sheet and a step has no overhead, so a value is near the
best that can be reached.  The interval is as honest as that: `low` is a strict bound (full overlap, no communication),
`high` is twice the value, because "in the real world, these factors can make inference take up to twice as long" (seed
003).  It is not a 90 % interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from harness import units
from harness.records import NAN, Prediction, RidgelineError
from harness.theory import seeds
from harness.theory.hardware import Hardware
from harness.theory.shape import RATE, WHOLE, Model, Number, dtype_named

Array = npt.NDArray[np.float64]
Terms = dict[str, float]

MODES = ("wave", "closed", "open")
MEMORY_SHARE = 0.9  # what an engine takes of the memory: vLLM's default gpu_memory_utilization
REALITY = 2.0  # seed 003
# Seconds an all-reduce takes however short it is: 5-8 us over NVLink and its like, 43 us on 8 GPUs over PCIe, there in
# proportion to the number of GPUs.  Medians of the TensorRT-LLM kernels that aiconfigurator measured (Apache-2.0).
LINK_FLOOR_S = 6.5e-6
PCIE_FLOOR_S = 43e-6 / 8

# term -> what binds where it is the largest.
LIMIT_OF = {
    "weights": "memory_bandwidth",
    "kv cache": "memory_bandwidth",
    "matmul": "compute",
    "attention": "compute",
    "link latency": "communication",
    "link volume": "communication",
    "waiting for memory": "capacity",
}


@dataclass(frozen=True, slots=True)
class PointPrediction:
    """What theory says of one point.  Times are means over the requests of the point.

    `fits`: the weights and at least one sequence fit; where they do not, the values are NaN.  `largest_batch`: whole
    sequences whose KV cache fits beside the weights.  `seed`: the seeds' arithmetic for the same point.
    """

    batch: int
    input_tokens: int
    output_tokens: int
    ttft_s: Prediction
    itl_s: Prediction
    e2e_s: Prediction
    output_tokens_per_s: Prediction
    limit: str
    largest_batch: int
    fits: bool
    seed: dict[str, float]
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """As summary.json holds it under `predicted` (without the ratios); NaN is null."""
        metrics = (self.ttft_s, self.itl_s, self.e2e_s, self.output_tokens_per_s)
        return {
            "limit": self.limit,
            "largest_batch": self.largest_batch,
            "fits": self.fits,
            **{p.metric: _prediction_dict(p) for p in metrics},
            "seed": {key: _null(value) for key, value in self.seed.items()},
            "notes": list(self.notes),
        }


def _null(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _prediction_dict(p: Prediction) -> dict[str, Any]:
    numbers = {"value": _null(p.value), "low": _null(p.low), "high": _null(p.high)}
    return {**numbers, "limit": p.limit, "terms": p.terms, "because": p.because}


@dataclass(frozen=True, slots=True)
class _Setup:
    """A model on hardware with its dtypes settled; rates are those of all accelerators together."""

    model: Model
    hardware: Hardware
    tp: int
    dtype: str | None  # None: the weights as stored
    kv_dtype: str | None
    matmul_dtype: str
    flops: float
    attention_flops: float
    gain: float  # how much faster narrower kernels might be than the rate we have
    notes: tuple[str, ...]

    @property
    def bytes_per_s(self) -> float:
        return self.hardware.bytes_per_s * self.tp

    @property
    def kv_copies(self) -> float:
        """Tensor parallelism beyond the number of KV heads keeps copies of them."""
        return self.tp / min(self.tp, self.model.kv_heads)

    def weights_s(self, tokens: Number) -> Number:
        return self.model.read_bytes(self.dtype, tokens) / self.bytes_per_s

    def kv_s(self, context: float) -> float:
        return self.model.kv_read_bytes(context, self.kv_dtype) * self.kv_copies / self.bytes_per_s

    def matmul_s(self, tokens: float, heads: float) -> float:
        """`tokens` through the layers, `heads` of them through the lm_head."""
        return (
            tokens * self.model.matmul_flops_per_token / self.flops
            + heads * self.model.head_flops_per_token / self.attention_flops
        )

    def link(self, tokens: float) -> Terms:
        """Two all-reduces a layer of `tokens` activations in 16 bit, in a ring."""
        if self.tp == 1:
            return {}
        rate = self.hardware.link_for(self.tp)
        pcie = rate == self.hardware.pcie_bytes_per_s
        calls = 2 * self.model.layers
        volume = 2 * (self.tp - 1) / self.tp * tokens * self.model.hidden * 2
        floor = PCIE_FLOOR_S * self.tp if pcie else LINK_FLOOR_S
        return {"link latency": calls * floor, "link volume": calls * volume / rate}


def _setup(model: Model, hardware: Hardware, dtype: str | None, kv_dtype: str | None, tp: int) -> _Setup:
    notes = [*hardware.caveats, *model.notes]
    weights, activations, matmul = _dtypes(model, dtype, notes)
    used, gain = _rate(hardware, RATE.get(matmul, matmul), activations, model, weights, notes)
    attention, _ = _rate(hardware, activations, activations, model, weights, [])
    _check_tp(model, hardware, tp)
    return _Setup(
        model=model,
        hardware=hardware,
        tp=tp,
        dtype=weights,
        kv_dtype=None if kv_dtype in (None, "auto") else dtype_named(str(kv_dtype)),
        matmul_dtype=used,
        flops=hardware.flops[used] * tp,
        attention_flops=hardware.flops[attention] * tp,
        gain=gain,
        notes=tuple(notes),
    )


def _dtypes(model: Model, dtype: str | None, notes: list[str]) -> tuple[str | None, str, str]:
    """(dtype of the weights or None for as stored, of the activations, of the layers' matrix products)."""
    if dtype is None or dtype.lower() in ("auto", model.dtype):
        return None, model.compute_dtype, model.matmul_dtype
    wanted = dtype_named(dtype)
    if wanted in WHOLE and model.dtype not in WHOLE:
        # As engines take it: --dtype names the activations, and quantized weights stay as they are.
        notes.append(f"the weights stay in {model.dtype}, as they are stored; {wanted} is for the activations")
        matmul = model.matmul_dtype if model.matmul_dtype not in WHOLE else wanted
        return None, wanted, matmul
    if wanted in WHOLE:
        return wanted, wanted, wanted
    activations = "bf16" if model.compute_dtype == "fp32" else model.compute_dtype
    return (
        wanted,
        activations,
        activations if wanted == "int4" else RATE.get(wanted, wanted),
    )  # int4 kernels widen the weights first


def _rate(
    hardware: Hardware, wanted: str, activations: str, model: Model, weights: str | None, notes: list[str]
) -> tuple[str, float]:
    """(dtype whose rate is taken: `wanted` or the nearest there is, how much faster the true kernels might be)."""
    chain = (wanted, activations, "bf16", "fp16", "fp32", "tf32")
    used = next((d for d in chain if d in hardware.flops), None)
    if used is None:
        raise RidgelineError(
            f"hardware {hardware.name} has no rate for {wanted} nor for a wider dtype: name another row"
        )
    stored = weights or model.dtype
    if used == wanted:
        return used, 1.0
    notes.append(f"{stored} weights are computed at the {used} rate: {hardware.name} states none for {wanted}")
    if used != "fp32":
        return used, 1.0
    # A CPU whose row has fp32 only: its vector registers hold twice as many 16-bit numbers and four times as many of
    # the 8-bit integers that llama.cpp multiplies quantized weights in.
    return used, 2.0 if stored in WHOLE else 4.0


def _check_tp(model: Model, hardware: Hardware, tp: int) -> None:
    if tp < 1 or any(g.heads % tp for g in model.groups):
        raise RidgelineError(f"tp {tp} must be at least 1 and divide the {model.groups[0].heads} heads of {model.name}")
    if tp > 1 and math.isnan(hardware.link_for(tp)):
        raise RidgelineError(f"hardware {hardware.name}: no link or PCIe rate is known, so tp must be 1, got {tp}")


def _prefill(s: _Setup, batch: int, tokens: int) -> Terms:
    """Terms, all of them, of the prefill of `batch` prompts of `tokens` in one pass."""
    return {
        "weights": s.weights_s(float(batch * tokens)),
        "matmul": s.matmul_s(batch * tokens, batch),
        "attention": batch * s.model.prefill_attention_flops(float(tokens)) / s.attention_flops,
        **s.link(batch * tokens),
    }


def _step(s: _Setup, batch: int, first: int, last: int) -> Terms:
    """Terms, all of them, of the mean decoding step while the context grows from `first` to `last` tokens."""
    kv_bytes = s.model.mean_kv_read_bytes(float(first), float(last), s.kv_dtype)
    attention_flops = s.model.mean_attention_flops(float(first), float(last))
    return {
        "weights": s.weights_s(float(batch)),
        "kv cache": batch * kv_bytes * s.kv_copies / s.bytes_per_s,
        "matmul": s.matmul_s(batch, batch),
        "attention": batch * attention_flops / s.attention_flops,
        **s.link(batch),
    }


def _binding(terms: Terms) -> Terms:
    """The terms that add up to the value: of each pair that overlaps, the longer."""
    hidden = {"matmul" if terms["weights"] >= terms["matmul"] else "weights"}
    if "kv cache" in terms:
        hidden.add("attention" if terms["kv cache"] >= terms["attention"] else "kv cache")
    return {name: value for name, value in terms.items() if name not in hidden}


def _limit(terms: Terms) -> str:
    shares: dict[str, float] = {}
    for name, value in terms.items():
        kind = LIMIT_OF[name.removeprefix("prefill ").removeprefix("decode ")]
        shares[kind] = shares.get(kind, 0.0) + value
    return max(shares, key=lambda kind: shares[kind])


def _mixed(parts: list[tuple[float, Terms]]) -> Terms:
    """Terms averaged over requests, each part with its number of requests."""
    total = sum(weight for weight, _ in parts)
    names = dict.fromkeys(name for _, terms in parts for name in terms)
    return {name: sum(w * terms.get(name, 0.0) for w, terms in parts) / total for name in names}


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
    mode: str = "wave",
) -> PointPrediction:
    """The prediction for `batch` requests in flight of `input_tokens` and `output_tokens` each.

    `dtype` of the weights (None or "auto": as stored), `kv_dtype` of the cache, `tp` accelerators in tensor parallel.

    A wave's prompts are prefilled together, so TTFT is the time of batch · input_tokens tokens for each of them: exact
    for static batches.  An engine that takes prompts one after the other gives the first tokens earlier, on average
    after (B + 1) / 2 B of it, and `low` allows for that.  "closed" and "open" are predicted as a wave of `batch`
    requests; for open loop the batch comes from the caller (Little's law).  A batch beyond `largest_batch` runs in
    rounds of the largest, and waiting for a round is a term.  Raises RidgelineError for values that make no sense.
    """
    _check_point(batch, input_tokens, output_tokens, mode)
    s = _setup(model, hardware, dtype, kv_dtype, tp)
    largest = _largest_batch(s, input_tokens + output_tokens)
    seed = _seed(s, batch, input_tokens, output_tokens)
    shape = (batch, input_tokens, output_tokens)
    if largest < 1:
        return _unfit(s, shape, seed)
    rounds = _rounds(s, shape, largest)
    ttft = _ttft(s, shape, rounds)
    itl = _itl(s, shape, rounds)
    e2e = _e2e(shape, ttft, itl, batch > largest)
    speed = _speed(s, shape, rounds, e2e, itl)
    return PointPrediction(*shape, ttft, itl, e2e, speed, e2e.limit, largest, True, seed, s.notes)


def _check_point(batch: int, input_tokens: int, output_tokens: int, mode: str) -> None:
    for name, value in {"batch": batch, "input_tokens": input_tokens, "output_tokens": output_tokens}.items():
        if not 1 <= value <= 100_000_000:
            raise RidgelineError(f"{name} must be from 1 to 100000000, got {value}")
    if mode not in MODES:
        raise RidgelineError(f"mode {mode!r} must be one of {', '.join(MODES)}")


def _largest_batch(s: _Setup, context: int) -> int:
    spare = s.hardware.mem_bytes * s.tp * MEMORY_SHARE - s.model.weight_bytes(s.dtype)
    return max(0, int(spare // (float(s.model.kv_bytes(float(context), s.kv_dtype)) * s.kv_copies)))


@dataclass(frozen=True, slots=True)
class _Round:
    """Requests that run in rounds of `size`: how many, when their round starts on average, and its terms."""

    requests: int
    size: int
    starts_s: float
    ends_s: float
    prefill: Terms
    step: Terms


def _rounds(s: _Setup, shape: tuple[int, int, int], largest: int) -> list[_Round]:
    """All requests at once where they fit, else full rounds of the largest batch and one of the rest."""
    batch, tokens, output = shape
    size = min(batch, largest)
    full, rest = divmod(batch, size)

    def terms(n: int) -> tuple[Terms, Terms, float]:
        prefill, step = _prefill(s, n, tokens), _step(s, n, tokens + 1, tokens + max(1, output - 1))
        return prefill, step, sum(_binding(prefill).values()) + (output - 1) * sum(_binding(step).values())

    prefill, step, took = terms(size)
    rounds = [_Round(full * size, size, (full - 1) / 2 * took, full * took, prefill, step)]
    if rest:
        prefill, step, last = terms(rest)
        rounds.append(_Round(rest, rest, full * took, full * took + last, prefill, step))
    return rounds


def _ttft(s: _Setup, shape: tuple[int, int, int], rounds: list[_Round]) -> Prediction:
    batch, tokens, _ = shape
    terms = _mixed([(r.requests, _binding(r.prefill)) for r in rounds])
    if (waiting := sum(r.requests * r.starts_s for r in rounds) / batch) > 0:
        terms["waiting for memory"] = waiting
    value = sum(terms.values())
    whole = _prefill(s, batch, tokens)
    in_turn = (whole["matmul"] + whole["attention"]) / s.gain * (batch + 1) / (2 * batch)
    low = max(whole["weights"], in_turn)
    size = rounds[0].size
    work = f"{size} × {units.count(tokens)} prompt tokens"
    because = _because("TTFT", terms, value, rounds[0].prefill, _details(s, size * tokens, size)) + f" For {work}."
    return Prediction("ttft_s", value, min(low, value), REALITY * value, _limit(terms), terms, because)


def _itl(s: _Setup, shape: tuple[int, int, int], rounds: list[_Round]) -> Prediction:
    _, tokens, output = shape
    if output == 1:
        because = "With one output token there is no time between tokens."
        return Prediction("itl_s", NAN, NAN, NAN, "latency", {}, because)
    terms = _mixed([(r.requests, _binding(r.step)) for r in rounds])
    value = sum(terms.values())
    low = min(_step_bound(s, r.step) for r in rounds)
    size = rounds[0].size
    details = _details(s, size, size)
    kv = f"{size} sequences of {units.count(tokens + output / 2)} tokens at {units.bandwidth(s.bytes_per_s)}"
    because = _because("ITL", terms, value, rounds[0].step, {**details, "kv cache": kv})
    return Prediction("itl_s", value, low, REALITY * value, _limit(terms), terms, because)


def _step_bound(s: _Setup, step: Terms) -> float:
    """No step is faster: all reads at full bandwidth, all operations at full rate, in full overlap, no link."""
    return max(step["weights"] + step["kv cache"], (step["matmul"] + step["attention"]) / s.gain)


def _e2e(shape: tuple[int, int, int], ttft: Prediction, itl: Prediction, queues: bool) -> Prediction:
    steps = shape[2] - 1
    terms = {f"prefill {name}" if name != "waiting for memory" else name: v for name, v in ttft.terms.items()}
    terms |= {f"decode {name}": steps * value for name, value in itl.terms.items()}
    value = sum(terms.values())
    low = ttft.low + (steps * itl.low if steps else 0.0)
    limit = "capacity" if queues else _limit(terms)
    because = f"End to end {units.seconds(value)} = TTFT {units.seconds(ttft.value)}"
    because += f" + {steps} × ITL {units.seconds(itl.value)}." if steps else "."
    return Prediction("e2e_s", value, low, REALITY * value, limit, terms, because)


def _speed(
    s: _Setup, shape: tuple[int, int, int], rounds: list[_Round], e2e: Prediction, itl: Prediction
) -> Prediction:
    """Output tokens per second from the first request sent to the last token received; not a sum but a quotient."""
    batch, tokens, output = shape
    took = rounds[-1].ends_s
    whole = _prefill(s, batch, tokens)
    prefill_low = max(whole["weights"], (whole["matmul"] + whole["attention"]) / s.gain)
    least = prefill_low + ((output - 1) * itl.low if output > 1 else 0.0)
    value, terms = batch * output / took, {"output tokens": float(batch * output), "seconds": took}
    because = (
        f"{units.count(batch * output)} output tokens in {units.seconds(took)} make {units.rate(value, 'tokens')}."
    )
    return Prediction("output_tokens_per_s", value, value / REALITY, batch * output / least, e2e.limit, terms, because)


def _details(s: _Setup, tokens: int, heads: int) -> dict[str, str]:
    """The quantities behind the terms, in words."""
    matmul = tokens * s.model.matmul_flops_per_token + heads * s.model.head_flops_per_token
    return {
        "weights": f"{units.size(s.model.read_bytes(s.dtype, float(tokens)))} at {units.bandwidth(s.bytes_per_s)}",
        "matmul": f"{units.amount(matmul)}FLOP at {units.flops(s.flops)} {s.matmul_dtype}",
    }


def _because(metric: str, terms: Terms, value: float, every: Mapping[str, float], details: Mapping[str, str]) -> str:
    def part(name: str, seconds: float) -> str:
        return f"{name} {units.seconds(seconds)}" + (f" ({details[name]})" if name in details else "")

    largest = max(terms, key=lambda name: terms[name])
    text = f"{metric} {units.seconds(value)} = {' + '.join(part(n, v) for n, v in terms.items())}; "
    text += f"{largest} is {units.percent(terms[largest] / value, 2)} of it."
    hidden = [part(name, seconds) for name, seconds in every.items() if name not in terms]
    return text + (f" Hidden behind these: {', '.join(hidden)}." if hidden else "")


def _seed(s: _Setup, batch: int, tokens: int, output: int) -> dict[str, float]:
    """The seeds' arithmetic for the point: all parameters, no KV reads, n steps for n tokens, all prompts at once."""
    itl = seeds.time_per_token_s(s.model.weight_bytes(s.dtype), s.bytes_per_s)
    ttft = seeds.prefill_s(s.model.params, batch * tokens, s.flops)
    e2e = seeds.generation_s(ttft, itl, output, first_from_prefill=False)
    return {"ttft_s": ttft, "itl_s": itl, "e2e_s": e2e, "output_tokens_per_s": batch * output / e2e}


def _unfit(s: _Setup, shape: tuple[int, int, int], seed: dict[str, float]) -> PointPrediction:
    weights, has = s.model.weight_bytes(s.dtype), s.hardware.mem_bytes * s.tp
    kv = float(s.model.kv_bytes(float(shape[1] + shape[2]), s.kv_dtype))
    because = (
        f"{s.model.name} does not fit: {units.size(weights)} of weights and {units.size(kv)} of KV cache for one "
        f"sequence exceed {units.percent(MEMORY_SHARE)} of {units.size(has)} ({s.tp} × {s.hardware.name})."
    )
    names = ("ttft_s", "itl_s", "e2e_s", "output_tokens_per_s")
    ttft, itl, e2e, speed = (Prediction(metric, NAN, NAN, NAN, "capacity", {}, because) for metric in names)
    return PointPrediction(*shape, ttft, itl, e2e, speed, "capacity", 0, False, seed, s.notes)


def plane(
    model: Model,
    hardware: Hardware,
    *,
    input_tokens: int,
    output_tokens: int,
    dtype: str | None = None,
    kv_dtype: str | None = None,
    tp: int = 1,
) -> dict[str, Any]:
    """The throughput-batch plane of decoding (seed 000) at the mean context, with KV reads.

    Arrays over `batch`, output tokens per second: `memory_roof_tokens_per_s` = B / (weights + KV), the line up to the
    ridge; `compute_roof_tokens_per_s` = 1 / matmul, level; `roof_tokens_per_s` is the predicted decode throughput,
    nowhere above either.  `ridge_batch` is where computing takes as long as reading the weights; `largest_batch` what
    the KV cache admits.
    """
    _check_point(1, input_tokens, output_tokens, "wave")
    s = _setup(model, hardware, dtype, kv_dtype, tp)
    matmul = s.matmul_s(1, 1)
    ridge = s.weights_s(1.0) / matmul
    top = math.ceil(math.log2(min(65_536, max(256, 4 * ridge))))
    batch: Array = np.unique([*(2.0**k for k in range(top + 1)), max(1.0, float(round(ridge)))])
    step = _step(s, 1, input_tokens + 1, input_tokens + max(1, output_tokens - 1))
    reads = np.maximum(step["kv cache"], step["attention"]) * batch
    link = step.get("link latency", 0.0) + step.get("link volume", 0.0) * batch
    roof = batch / (np.maximum(s.weights_s(batch), matmul * batch) + reads + link)
    return {
        "batch": [int(b) for b in batch],
        "roof_tokens_per_s": roof.tolist(),
        "memory_roof_tokens_per_s": (batch / (s.weights_s(batch) + step["kv cache"] * batch)).tolist(),
        "compute_roof_tokens_per_s": np.full(len(batch), 1 / matmul).tolist(),
        "ridge_batch": ridge,
        "largest_batch": _largest_batch(s, input_tokens + output_tokens),
    }
