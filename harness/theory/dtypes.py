"""Names of dtypes and the bits of a weight stored in each, in all the spellings that tables and engines use."""

from __future__ import annotations

import re

from harness.records import RidgelineError

# Bits of a stored weight.  int4 is what GPTQ and AWQ store at a group size of 128: 4 bits, and for each group a 16-bit
# scale and a 4-bit zero point.  fp4 is MX's: 4 bits and an 8-bit scale for every 32 weights; nvfp4 has one for every 16.
# nf4 is bitsandbytes': a 32-bit scale for every 64 weights.  w8a16 are 8-bit weights that are multiplied in 16 bit.
INT4_GROUP = 128
BITS: dict[str, float] = {
    "fp32": 32,
    "fp16": 16,
    "bf16": 16,
    "fp8": 8,
    "int8": 8,
    "w8a16": 8,
    "fp6": 6,
    "fp4": 4 + 8 / 32,
    "nvfp4": 4 + 8 / 16,
    "int4": 4 + (16 + 4) / INT4_GROUP,
    "nf4": 4 + 32 / 64,
    "int3": 3 + (16 + 3) / INT4_GROUP,
    "int2": 2 + (16 + 2) / 64,
}
# GGUF's mixtures: bits of a weight of the whole file, embedding and lm_head with it, of Llama-3.1-8B (the table in
# tools/quantize/README.md of ggml-org/llama.cpp@311c2c9f, MIT; it leaves Q3_K_M out: unverified); those of one type
# throughout, by their blocks.
GGUF_BITS = {
    "iq1_s": 2.0042, "iq1_m": 2.1460, "iq2_xxs": 2.3824, "iq2_xs": 2.5882, "iq2_s": 2.7403, "iq2_m": 2.9294,
    "iq3_xxs": 3.2548, "iq3_xs": 3.4977, "iq3_s": 3.6606, "iq3_m": 3.7628, "iq4_xs": 4.4597, "iq4_nl": 4.6818,
    "q2_k_s": 2.9697, "q2_k": 3.1593, "q3_k_s": 3.6429, "q3_k_m": 3.9960, "q3_k_l": 4.2979, "q4_k_s": 4.6672,
    "q4_k_m": 4.8944, "q5_k_s": 5.5704, "q5_k_m": 5.7036, "q6_k": 6.5633, "q8_0": 8.5008,
    "q4_0": 4.5, "q4_1": 5.0, "q5_0": 5.5, "q5_1": 6.0, "tq1_0": 1.6875, "tq2_0": 2.0625,
}  # fmt: skip
BITS |= GGUF_BITS

WHOLE = ("fp32", "fp16", "bf16")  # dtypes of a whole model; the others leave embeddings, norms and lm_head in 16 bit
# Weights that kernels widen before they multiply; the rest are multiplied as they are where the hardware can.
WEIGHT_ONLY = ("w8a16", "fp6", "int4", "nf4", "int3", "int2", *GGUF_BITS)
RATE = {"nvfp4": "fp4"}  # dtype -> the rate that hardware states for its products, where the name differs

# What another spelling means, tried in this order on the name in lower case with "_" for every separator; the particular
# comes before the general.
_SPELLINGS = (
    (r"(torch_)?(fp32|float32|float|f32|tf32|q0f32|32bit)", "fp32"),
    (r"(torch_)?(bf16|bfloat16|bf16_fp16|fp16_bf16|16bit|w16a16)", "bf16"),
    (r"(torch_)?(fp16|float16|half|f16|q0f16|16)", "fp16"),
    (r"nvfp4.*|.*_nvfp4|w4a4|fp4_nv", "nvfp4"),
    (r"mxfp4.*|fp4|mx_?fp4|float4.*|fp4_e2m1.*|w_?mxfp4.*", "fp4"),
    (r"w4a(8|fp8|16).*|w4|w4a8_awq|qserve", "int4"),
    (r"(mx|w)?_?(fp8|float8|f8)(_.*|e[45]m[23].*)?|e[45]m[23](fn)?|.*_fp8(_.*)?|fp8.*|w8a8_fp8", "fp8"),
    (r"w8a16.*|(gptq|awq|bnb|bitsandbytes|eetq|hqq|autogptq|quanto|torchao)_?(w?_?(int|i)?_?8(_?bit)?).*", "w8a16"),
    (r"llm_int8|load_in_8bit|eetq.*|(w?int8)_?(wo|woq|weight_only|weights?|w8a16|gptq|bnb|bitsandbytes)|wint8|int8wo|8_?bit", "w8a16"),
    (r"(w8a8|int8|i8|uint8|s8|smooth_?quant|sq).*|.*_int8", "int8"),
    (r"nf4.*|.*_nf4|(bnb|bitsandbytes)(_?(fp|int)?_?4(_?bit)?)?|qlora|load_in_4bit", "nf4"),
    (r".*int3|.*_?3_?bit|w3a16|q3f16.*", "int3"),
    (r".*int2|.*_?2_?bit|w2a16", "int2"),
    (r"fp6.*|w6a16", "fp6"),
    (r".*(int4|awq|gptq|marlin|hqq|uint4|[_w]?4_?bit|exl2|exllama).*|i4|u4|q4f16.*|w?int4.*|4bit|autoround", "int4"),
)  # fmt: skip
_GGUF = re.compile(r"(?:gguf_|ggml_|ud_)*((?:iq|tq|q)[1-8](?:_(?:k|[01]|nl|xxs|xs|xl|[sml]))*)(?:_gguf|_ggml|_imat)?")
# Q4 alone is what llama.cpp's users mean by it today; XL of unsloth's keeps a little more of it wide.
_GGUF_SHORT = {"q8": "q8_0", "q8_k": "q8_0", "q8_1": "q8_0", "q6": "q6_k", "q6_k_m": "q6_k", "q6_k_l": "q6_k", "q5": "q5_k_m", "q5_k": "q5_k_m",
               "q4": "q4_k_m", "q4_k": "q4_k_m", "q3": "q3_k_m", "q3_k": "q3_k_m", "q2": "q2_k", "q2_k_m": "q2_k",
               "q2_k_l": "q2_k", "q2_k_xl": "q2_k", "q3_k_xl": "q3_k_l", "q4_k_xl": "q4_k_m", "q4_k_l": "q4_k_m",
               "q5_k_xl": "q5_k_m", "q5_k_l": "q5_k_m", "q6_k_xl": "q6_k", "q8_k_xl": "q8_0", "iq4": "iq4_xs"}  # fmt: skip


def kind_of(dtype: str) -> str:
    """The type that most tensors of a GGUF mixture have ("q4_k" of "q4_k_m"); other dtypes as they are."""
    return re.sub(r"(?<=_k)_[sml]$", "", dtype)


UNSAID = ("", "?", "auto", "nan", "none", "null", "unquantized", "default", "as stored", "mixed", "-", "n/a", "na")


def dtype_named(name: str) -> str:
    """One of BITS for any usual spelling ("bfloat16", "torch.float16", "AWQ-INT4", "Q4_K_M"); RidgelineError otherwise."""
    plain = re.sub(r"[^a-z0-9]+", "_", name.strip().lower()).strip("_")
    plain = re.sub(r"_?\d+_?\d*bpw", "_4bit", plain).removeprefix("exl2_").strip("_")
    if plain in BITS:
        return plain
    if found := _GGUF.fullmatch(plain):
        kind = _GGUF_SHORT.get(found[1], found[1])
        if kind in BITS:
            return kind
    for pattern, ours in _SPELLINGS:
        if re.fullmatch(pattern, plain):
            return ours
    raise RidgelineError(f"dtype {name!r} is not known; use one of {', '.join(BITS)}")


def stated(name: str | None) -> str | None:
    """As `dtype_named`, but None where a table says nothing of it ("", "?", "auto")."""
    plain = (name or "").strip().lower()
    return None if plain in UNSAID else dtype_named(plain)
