"""What a model's products are computed in, and at which of the hardware's rates."""

from __future__ import annotations

from dataclasses import replace

from harness.records import RidgelineError
from harness.theory.dtypes import BITS, RATE, WEIGHT_ONLY, WHOLE, dtype_named, kind_of
from harness.theory.hardware import Hardware
from harness.theory.shape import Model


def law_dtype(stored: str, used: str) -> str:
    if used in ("fp8", "fp4", "int8") or stored in WHOLE:
        return used
    return "int8_weights" if BITS.get(stored, 4.0) >= 6 else "int4"  # narrow weights, multiplied wide


def as_kept(model: Model, framework: str) -> Model:
    """The model as the files of `framework` hold it: where experts alone are in 4 bit, llama.cpp's have the rest in Q8_0
    (ggml-org/gpt-oss-20b-GGUF has 12.1 GB, gpt-oss-120b-GGUF 63.4)."""
    if (
        framework != "llama.cpp" or model.dtype != "fp4" or not model.moe or model.head_dtype
    ):  # a GGUF file tells its own
        return model
    most = {k: model.params_by_part[k] * BITS["q8_0"] / 8 for k in ("embedding", "attention", "lm_head")}
    return replace(model, stored_bytes={k: min(v, most.get(k, v)) for k, v in model.stored_bytes.items()})


def settled(model: Model, dtype: str | None, notes: list[str]) -> tuple[str | None, str, str]:
    """(dtype of the weights or None for as stored, of the activations, of the layers' matrix products)."""
    if dtype is None or dtype.lower() in ("auto", "", model.dtype):
        return None, model.compute_dtype, model.matmul_dtype
    wanted = dtype_named(dtype)
    if wanted == model.dtype:
        return None, model.compute_dtype, model.matmul_dtype
    if wanted in WHOLE and model.dtype not in WHOLE:
        # As engines take it: --dtype names the activations, and quantized weights stay as they are.
        notes.append(f"the weights stay in {model.dtype}, as they are stored; {wanted} is for the activations")
        matmul = model.matmul_dtype if model.matmul_dtype not in WHOLE else wanted
        return None, wanted, matmul
    if wanted in WHOLE:
        return wanted, wanted, wanted
    activations = "bf16" if model.compute_dtype == "fp32" else model.compute_dtype
    return wanted, activations, activations if wanted in WEIGHT_ONLY else wanted


def rate(
    hardware: Hardware, wanted: str, activations: str, model: Model, weights: str | None, notes: list[str]
) -> tuple[str, float]:
    """(dtype whose rate is taken: `wanted` or the nearest there is, how much faster the true kernels might be)."""
    wanted = RATE.get(wanted, wanted)
    chain = (wanted, activations, "bf16", "fp16", "fp32", "tf32")
    used = next((d for d in chain if d in hardware.flops), None)
    if used is None:
        raise RidgelineError(
            f"hardware {hardware.name} has no rate for {wanted} nor for a wider dtype: name another row"
        )
    stored = weights or model.dtype
    if used == wanted:
        return used, 1.0
    if kind_of(stored) not in hardware.products:
        notes.append(f"{stored} weights are computed at the {used} rate: {hardware.name} states none for {wanted}")
    if used != "fp32":
        return used, 1.0
    # A CPU whose row has fp32 only: its vector registers hold twice as many 16-bit numbers and four times as many of
    # the 8-bit integers that llama.cpp multiplies quantized weights in.
    return used, 2.0 if stored in WHOLE else 4.0
