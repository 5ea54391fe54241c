"""What would help: the same point predicted again with one thing changed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from harness import units
from harness.records import RidgelineError
from harness.theory.hardware import Hardware, find
from harness.theory.predict import PointPrediction, predict
from harness.theory.shape import Model

LEAST = 0.02  # a change of less is none
OTHERS = ("L4", "A10", "L40S", "A100-SXM-80GB", "H100-SXM-80GB", "H200-SXM", "B200-SXM", "MI300X")
METRICS = ("ttft_s", "itl_s", "output_tokens_per_s")
QUALITY = "what it does to the answers' quality is not predicted"


def levers(model: Model, hardware: Hardware, load: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each lever that could be predicted: `name`, `kind` (setting, load, hardware), `gpus`, `note`, the three metrics, and
    under `times` how each compares with the point as it is (2: twice).  `load`: the keywords of `predict`.
    The best for throughput per accelerator first; hardware after settings."""
    batch, asked = int(load["batch"]), {key: value for key, value in load.items() if key != "batch"}
    try:
        base = predict(model, hardware, batch=batch, **asked)
    except RidgelineError:
        return []
    gpus = int(asked.get("tp") or 1) * int(asked.get("pp") or 1)
    found = []
    for kind, name, note, chip, change, size in _changes(model, hardware, asked, batch, base):
        try:
            other = predict(model, chip, batch=size, **{**asked, **change})
        except RidgelineError:
            continue
        count = int(change.get("tp", asked.get("tp") or 1)) * int(asked.get("pp") or 1)
        row = _row(base, other, kind, name, note, count)
        if row and kind == "hardware":
            row["usd_per_h"] = chip.usd_per_h
        if row and (kind != "hardware" or not math.isclose(row["times"]["output_tokens_per_s"], 1, abs_tol=LEAST)):
            found.append(row)
    order = ("setting", "load", "hardware")
    return sorted(
        found, key=lambda r: (order.index(r["kind"]), -r["times"]["output_tokens_per_s"] * gpus / r["gpus"], r["name"])
    )


def _changes(
    model: Model, hardware: Hardware, asked: Mapping[str, Any], batch: int, base: PointPrediction
) -> Iterator[tuple[str, str, str, Hardware, dict[str, Any], int]]:
    """(kind, name, note, hardware, what is asked otherwise, batch)."""
    have = asked.get("dtype") or model.dtype
    if have in ("fp32", "bf16", "fp16"):
        for dtype in ("fp8", "int8", "int4"):
            if dtype == "int4" or dtype in hardware.flops:
                yield "setting", f"{dtype} weights", QUALITY, hardware, {"dtype": dtype}, batch
    if (asked.get("kv_dtype") or "fp16") in ("auto", "fp32", "bf16", "fp16") and not hardware.measured:
        yield "setting", "fp8 KV cache", QUALITY, hardware, {"kv_dtype": "fp8"}, batch
    tp = int(asked.get("tp") or 1)
    if tp < 8:
        note = f"tensor parallel over {2 * tp} accelerators instead of {tp}"
        yield "setting", f"TP {2 * tp}", note, hardware, {"tp": 2 * tp}, batch
    if asked.get("mode") != "open":
        if 2 * batch <= base.largest_batch:
            yield "load", f"batch {2 * batch}", "twice the requests in flight", hardware, {}, 2 * batch
        if batch > 1:
            yield "load", f"batch {batch // 2}", "half the requests in flight", hardware, {}, batch // 2
    for name in OTHERS:
        chip = find(name)
        if chip.name != hardware.name and (chip.vendor == hardware.vendor or hardware.measured):
            price = f"${units.number(chip.usd_per_h, 3)}/h, {chip.price_source.partition(',')[0]}"
            note = price if math.isfinite(chip.usd_per_h) else "no price known"
            yield "hardware", chip.name, note, chip, {"calibration": None} if hardware.measured else {}, batch


def _row(
    base: PointPrediction, other: PointPrediction, kind: str, name: str, note: str, gpus: int
) -> dict[str, Any] | None:
    values = {metric: float(getattr(other, metric).value) for metric in METRICS}
    if not other.fits:
        return {"name": name, "kind": kind, "gpus": gpus, "note": "does not fit", "limit": "capacity",
                **dict.fromkeys(METRICS), "times": dict.fromkeys(METRICS, 0.0)} if kind == "hardware" else None  # fmt: skip
    before = {metric: float(getattr(base, metric).value) for metric in METRICS}
    times = {metric: values[metric] / before[metric] if before[metric] else math.nan for metric in METRICS}
    return {"name": name, "kind": kind, "gpus": gpus, "note": note, "limit": other.limit, **values, "times": times}


def work(model: Model, asked: Mapping[str, Any], load: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Bytes that must be moved and FLOPs that must be done, in the mean decode step of `batch` sequences and in the
    prefill of one prompt (its cached share left out): what a roofline is drawn of."""
    tokens, output, batch = float(load["input_tokens"]), float(load["output_tokens"]), float(load["batch"])
    past = tokens * float(load.get("cached_share") or 0.0)
    first, last = tokens + 1.0, tokens + max(1.0, output - 1.0)
    dtype, kv_dtype = asked.get("dtype"), asked.get("kv_dtype")
    kv = batch * float(model.mean_kv_read_bytes(first, last, kv_dtype))
    step = batch * (
        model.matmul_flops_per_token + model.head_flops_per_token + float(model.mean_attention_flops(first, last))
    )
    prompt = (tokens - past) * model.matmul_flops_per_token + model.head_flops_per_token
    return {
        "decode": {"bytes": float(model.read_bytes(dtype, batch)) + kv, "flops": step},
        "prefill": {"bytes": float(model.read_bytes(dtype, tokens - past)),
                    "flops": prompt + float(model.prefill_attention_flops(tokens - past, past))},
    }  # fmt: skip
