"""A decoder by its numbers: parameters, FLOPs and bytes as named terms.

A Model is its layers in groups of the same shape, and what lies around them.  `architecture` builds it from a
configuration; nothing here knows a file format.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from harness.records import RidgelineError

PARTS = ("embedding", "attention", "ffn", "norms", "lm_head")
Number = TypeVar("Number", float, npt.NDArray[np.float64])

# Bits of a stored weight.  int4 is what GPTQ and AWQ store at a group size of 128: 4 bits, and for each group a 16-bit
# scale and a 4-bit zero point.  fp4 is MX's: 4 bits and an 8-bit scale for every 32 weights.
INT4_GROUP = 128
BITS: dict[str, float] = {
    "fp32": 32,
    "fp16": 16,
    "bf16": 16,
    "fp8": 8,
    "int8": 8,
    "fp4": 4 + 8 / 32,
    "int4": 4 + (16 + 4) / INT4_GROUP,
}
WHOLE = ("fp32", "fp16", "bf16")  # dtypes of a whole model; the others leave embeddings, norms and lm_head in 16 bit
SPELLINGS = {
    "float32": "fp32",
    "float": "fp32",
    "f32": "fp32",
    "float16": "fp16",
    "half": "fp16",
    "f16": "fp16",
    "bfloat16": "bf16",
    "float8": "fp8",
    "fp8_e4m3": "fp8",
    "fp8_e5m2": "fp8",
    "float8_e4m3fn": "fp8",
    "nvfp4": "fp4",
    "mxfp4": "fp4",
    "awq": "int4",
    "gptq": "int4",
    "w4a16": "int4",
    "w8a8": "int8",
}


def dtype_named(name: str) -> str:
    """One of BITS for any usual spelling ("bfloat16", "torch.float16", "half"); RidgelineError otherwise."""
    plain = name.strip().lower().removeprefix("torch.")
    plain = SPELLINGS.get(plain, plain)
    if plain not in BITS:
        raise RidgelineError(f"dtype {name!r} is not known; use one of {', '.join(BITS)}")
    return plain


@dataclass(frozen=True, slots=True)
class Layers:
    """`count` layers of the same shape; parameters and widths are those of one layer."""

    count: int
    attention: int  # parameters, biases included
    attention_matmul: int  # of these, entries of matrices
    ffn: int
    ffn_matmul: int
    norms: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int = 0  # tokens of sliding-window attention; 0: the whole context

    @property
    def kv_values(self) -> int:
        """Elements of KV cache a layer keeps for one token: a key and a value for each KV head."""
        return 2 * self.kv_heads * self.head_dim

    def span(self, context: Number) -> Number:
        """Positions that a token attends to at this context."""
        return np.minimum(context, self.window) if self.window else context


@dataclass(frozen=True, slots=True)
class Model:
    """A decoder by its numbers.  `dtype` names the stored weights: one of BITS, or a GGML type such as "q4_1"."""

    name: str
    family: str
    groups: tuple[Layers, ...]
    hidden: int
    vocab: int
    tied: bool
    positions: int  # parameters of a learned position table (looked up, never multiplied)
    final_norm: int
    head_bias: int
    dtype: str
    stored_bytes: dict[str, float]  # by part, as the files hold it
    compute_dtype: str = "bf16"  # what activations, attention and 16-bit weights are in
    matmul_dtype: str = "bf16"  # what the layers' matrices are multiplied in, where the hardware can
    max_context: int = 0  # 0: not stated
    notes: tuple[str, ...] = ()

    @property
    def layers(self) -> int:
        return sum(g.count for g in self.groups)

    @property
    def kv_heads(self) -> int:
        return max(g.kv_heads for g in self.groups)

    @property
    def params_by_part(self) -> dict[str, int]:
        """Parameters by part; they add up to `params`.  A tied lm_head is the embedding and counts once."""
        return {
            "embedding": self.vocab * self.hidden + self.positions,
            "attention": sum(g.count * g.attention for g in self.groups),
            "ffn": sum(g.count * g.ffn for g in self.groups),
            "norms": sum(g.count * g.norms for g in self.groups) + self.final_norm,
            "lm_head": (0 if self.tied else self.vocab * self.hidden) + self.head_bias,
        }

    @property
    def params(self) -> int:
        return sum(self.params_by_part.values())

    def bytes_by_part(self, dtype: str | None = None) -> dict[str, float]:
        """Bytes of the weights in memory by part: as stored, or as they would be in another dtype."""
        if dtype is None:
            return dict(self.stored_bytes)
        return bytes_by_part(self, dict.fromkeys(("attention", "ffn"), BITS[dtype]), 32 if dtype == "fp32" else 16)

    def weight_bytes(self, dtype: str | None = None) -> float:
        """Bytes of all weights."""
        return sum(self.bytes_by_part(dtype).values())

    def read_bytes(self, dtype: str | None = None) -> float:
        """Bytes of weights that one step reads: all, but of the embedding only a row a token, unless it is the lm_head
        as well."""
        parts = self.bytes_by_part(dtype)
        table = self.vocab * self.hidden / (self.vocab * self.hidden + self.positions) if self.tied else 0.0
        return sum(parts.values()) - parts["embedding"] * (1 - table)

    @property
    def matmul_flops_per_token(self) -> float:
        """FLOPs of a token through the layers' matrices: 2 for each entry; attention and lm_head are apart."""
        return 2.0 * sum(g.count * (g.attention_matmul + g.ffn_matmul) for g in self.groups)

    @property
    def head_flops_per_token(self) -> float:
        """FLOPs of the lm_head for a token whose successor is asked for: the last of a prompt, each in decoding."""
        return 2.0 * self.vocab * self.hidden

    def attention_flops(self, context: Number) -> Number:
        """FLOPs of one new token's attention over `context` positions: 4 · heads · head_dim a position and layer."""
        return _total(g.count * 4.0 * g.heads * g.head_dim * g.span(context) for g in self.groups)

    def prefill_attention_flops(self, tokens: int) -> float:
        """FLOPs of causal attention over a prompt: token i attends to min(i, window) positions."""
        return sum(g.count * 4.0 * g.heads * g.head_dim * _causal_positions(tokens, g.window) for g in self.groups)

    def kv_bytes_per_token(self, kv_dtype: str | None = None) -> float:
        """Bytes of KV cache a token adds while no window is full."""
        return self.kv_element_bytes(kv_dtype) * sum(g.count * g.kv_values for g in self.groups)

    def kv_bytes(self, context: Number, kv_dtype: str | None = None) -> Number:
        """Bytes of KV cache that a sequence of `context` tokens attends to; a layer keeps no more than its window."""
        return self.kv_element_bytes(kv_dtype) * _total(g.count * g.kv_values * g.span(context) for g in self.groups)

    def kv_element_bytes(self, kv_dtype: str | None = None) -> float:
        """Bytes of an element of the KV cache: by default 4 for a model computed in fp32, else 2."""
        # Scales of quantized caches are a few per mille and differ by engine: left out.
        bits = {"int4": 4.0, "fp4": 4.0}
        dtype = kv_dtype or ("fp32" if self.compute_dtype == "fp32" else "fp16")
        return bits.get(dtype, BITS[dtype]) / 8

    def as_dict(self) -> dict[str, Any]:
        """What a report says of the model."""
        return {
            "name": self.name,
            "family": self.family,
            "params": self.params,
            "params_by_part": self.params_by_part,
            "weight_bytes": self.weight_bytes(),
            "kv_bytes_per_token": self.kv_bytes_per_token(),
            "dtype": self.dtype,
            "layers": self.layers,
            "hidden": self.hidden,
            "heads": self.groups[0].heads,
            "kv_heads": self.groups[0].kv_heads,
            "head_dim": self.groups[0].head_dim,
            "vocab": self.vocab,
            "tied_embeddings": self.tied,
            "sliding_window": max(g.window for g in self.groups) or None,
            "notes": list(self.notes),
        }


def _total(terms: Iterable[Number]) -> Number:
    return sum(terms)  # type: ignore[return-value]


def _causal_positions(tokens: int, window: int) -> float:
    n, w = tokens, min(window or tokens, tokens)
    return w * (w + 1) / 2 + (n - w) * w


def bytes_by_part(model: Model, bits: Mapping[str, float], other_bits: float) -> dict[str, float]:
    return {part: n * bits.get(part, other_bits) / 8 for part, n in model.params_by_part.items()}
