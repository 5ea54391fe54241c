"""A decoder by its numbers: parameters, FLOPs and bytes as named terms.

A Model is its layers in groups of the same shape, and what lies around them.  `architecture` builds it from a
configuration; nothing here knows a file format.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from harness.theory.dtypes import BITS, GGUF_BITS, kind_of

# ffn: what every token meets (a plain FFN, shared experts); experts: the routed ones, with what chooses among them apart,
# as it stays in 16 bit where they are quantized.  other: what text never runs through, such as a vision tower.
PARTS = ("embedding", "attention", "ffn", "router", "experts", "norms", "lm_head", "other")
Number = TypeVar("Number", float, npt.NDArray[np.float64])

HEAD_ENTRIES = 2**25  # of an lm_head, as many as are measured: a whole large one would take minutes
QUANTIZED = ("attention", "ffn", "experts")  # parts that a quantized dtype is for


@dataclass(frozen=True, slots=True)
class Layers:
    """`count` layers of the same shape; parameters and widths are those of one layer.

    A layer with latent attention (MLA, DeepSeek-V2, arXiv:2405.04434) keeps one latent of `latent` elements, the last
    `rope_dim` of them the shared rotary key, for all its heads; it has `kv_heads` 1.
    """

    count: int
    attention: int  # parameters, biases included
    attention_matmul: int  # of these, entries of matrices
    ffn: int  # what every token meets: a plain FFN, or the shared experts
    ffn_matmul: int
    norms: int
    heads: int
    kv_heads: int
    head_dim: int  # width of a head's query and key
    window: int = 0  # tokens of sliding-window attention; 0: the whole context
    value_dim: int = 0  # width of a head's value where it is another; 0: head_dim
    latent: int = 0  # MLA: elements cached for a token; 0: keys and values for each KV head
    rope_dim: int = 0
    keeps_kv: bool = True  # False: attends to the cache of an earlier layer and adds nothing to it
    experts: int = 0  # routed experts; 0: none
    experts_per_token: int = 0
    expert: int = 0  # parameters of one of them
    expert_matmul: int = 0
    router: int = 0
    router_matmul: int = 0

    @property
    def kv_values(self) -> int:
        """Elements of KV cache a layer reads for one position: a key and a value for each KV head, or MLA's latent."""
        return self.latent or self.kv_heads * (self.head_dim + (self.value_dim or self.head_dim))

    @property
    def token_matmul(self) -> int:
        """Entries of matrices that a token is multiplied with: of the experts, only those chosen for it."""
        routed = self.router_matmul + self.experts_per_token * self.expert_matmul
        return self.attention_matmul + self.ffn_matmul + routed

    def matrices(self, hidden: int, fused: bool) -> list[tuple[int, int]]:
        """(inner, outer) of a layer's matrices, of one expert where every token meets no FFN; `fused` as vLLM keeps them: query,
        key and value in one, gate and up in one.  Those of a plain FFN or of latent attention as if of their size."""
        value = self.heads * (self.value_dim or self.head_dim)
        before = max(1, self.attention_matmul // hidden - value)
        ffn = max(1, (self.ffn_matmul or self.expert_matmul) // hidden // 3)
        ffn += -ffn % (256 if ffn % 32 else 1)  # in whole blocks of any quantized type
        if fused:
            return [(hidden, before), (value, hidden), (hidden, 2 * ffn), (ffn, hidden)]
        query = self.heads * self.head_dim
        kv = (before - query) // 2
        into = [query, kv, kv] if kv > 0 and not self.latent else [before]
        return [*((hidden, outer) for outer in into), (value, hidden), (hidden, ffn), (hidden, ffn), (ffn, hidden)]

    def position_flops(self, absorbed: bool) -> float:
        """FLOPs of a query against one position, all heads: 2 for each element of the key, and of the value.

        MLA's prefill expands keys and values from the latent; decoding multiplies the expansion into query and output
        instead (`absorbed`) and works on the latent itself: more FLOPs, far fewer bytes.
        """
        if absorbed and self.latent:
            return 2.0 * self.heads * (self.latent + self.latent - self.rope_dim)
        return 2.0 * self.heads * (self.head_dim + (self.value_dim or self.head_dim))

    def span(self, context: Number) -> Number:
        """Positions that a token attends to at this context."""
        return np.minimum(context, self.window) if self.window else context

    def spans(self, first: Number, last: Number) -> Number:
        """The sum of `span` over the contexts first, first + 1, … last."""
        return self._spans_to(last) - self._spans_to(first - 1)

    def _spans_to(self, n: Number) -> Number:
        w = self.span(n)
        return w * (w + 1) / 2 + (n - w) * w

    def distinct_experts(self, tokens: Number, evenness: float = math.inf) -> Number:
        """Experts that at least one of `tokens` tokens is routed to: E · (1 − (1 − k/E)^tokens), expected.

        Each token chooses k of E alike and by itself: an upper estimate.  Where some experts are liked better, by a gamma
        distribution of this shape (`evenness`), fewer are met: E · (1 − (1 + tokens·((1 − k/E)^(−1/a) − 1))^(−a)).
        """
        if not self.experts:
            return 0.0 * tokens
        passed = 1 - self.experts_per_token / self.experts
        if math.isinf(evenness) or not passed:
            missed: Number = passed**tokens
        else:
            missed = (1 + tokens * (passed ** (-1 / evenness) - 1)) ** -evenness
        return self.experts * (1 - missed)


# How evenly a family's router spreads tokens over experts, where it does not (1 is an exponential distribution).  gpt-oss: from its steps
# by batch on H100s (InferenceX pull request 828) and a DGX Spark (llama.cpp's benches/dgx-spark), which grow less than even routing's.
EVENNESS = {"gpt_oss": 0.8}


@dataclass(frozen=True, slots=True)
class Model:
    """A decoder by its numbers.  `dtype` names the stored weights: one of BITS, or a GGML type such as "q4_1".

    What takes a number of tokens or a context takes an array of them as well.
    """

    name: str
    family: str
    groups: tuple[Layers, ...]
    hidden: int
    vocab: int
    tied: bool
    positions: int  # parameters of a learned position table (looked up, never multiplied)
    final_norm: int  # with a norm of the embedding, where there is one
    head_bias: int
    dtype: str
    stored_bytes: dict[str, float]  # by part, as the files hold it
    compute_dtype: str = "bf16"  # what activations, attention and 16-bit weights are in
    matmul_dtype: str = "bf16"  # what the layers' matrices are multiplied in, where the hardware can
    max_context: int = 0  # 0: not stated
    notes: tuple[str, ...] = ()
    other: int = 0  # parameters that text never runs through, such as a vision tower
    head_dtype: str = ""  # of the lm_head, as a GGUF file has it; empty: not known

    def products(self, dtype: str | None, fused: bool) -> list[tuple[str, list[tuple[int, int]]]]:
        """(type, (inner, outer) of its matrices) of what one layer, and an lm_head of another type, multiply; `dtype` replaces the
        types of the file.  Of a large head a part, which is as fast a row."""
        kind = kind_of(dtype or self.dtype)
        found = [(kind, self.groups[-1].matrices(self.hidden, fused))]
        if not dtype and self.head_dtype not in ("", kind):
            found.append((self.head_dtype, [(self.hidden, min(self.vocab, HEAD_ENTRIES // self.hidden // 256 * 256))]))
        return found

    @property
    def layers(self) -> int:
        return sum(g.count for g in self.groups)

    @property
    def kv_heads(self) -> int:
        """The most that tensor parallelism can split the KV cache by; further accelerators hold copies."""
        return max(g.kv_heads for g in self.groups)

    @property
    def params_by_part(self) -> dict[str, int]:
        """Parameters by part; they add up to `params`.  A tied lm_head is the embedding and counts once."""
        return {
            "embedding": self.vocab * self.hidden + self.positions,
            "attention": sum(g.count * g.attention for g in self.groups),
            "ffn": sum(g.count * g.ffn for g in self.groups),
            "router": sum(g.count * g.router for g in self.groups),
            "experts": sum(g.count * g.experts * g.expert for g in self.groups),
            "norms": sum(g.count * g.norms for g in self.groups) + self.final_norm,
            "lm_head": (0 if self.tied else self.vocab * self.hidden) + self.head_bias,
            "other": self.other,
        }

    @property
    def params(self) -> int:
        return sum(self.params_by_part.values())

    @property
    def active_params(self) -> int:
        """Parameters that one token of text meets: all but the experts it is not routed to, the embedding included."""
        idle = sum(g.count * (g.experts - g.experts_per_token) * g.expert for g in self.groups)
        return self.params - self.other - idle

    @property
    def moe(self) -> bool:
        return any(g.experts for g in self.groups)

    @property
    def mla(self) -> bool:
        return any(g.latent for g in self.groups)

    def bytes_by_part(self, dtype: str | None = None) -> dict[str, float]:
        """Bytes of the weights in memory by part: as stored, or as they would be in another dtype."""
        if dtype is None:
            return dict(self.stored_bytes)
        parts = (*QUANTIZED, "embedding", "lm_head") if dtype in GGUF_BITS else QUANTIZED
        return bytes_by_part(self, dict.fromkeys(parts, BITS[dtype]), 32 if dtype == "fp32" else 16)

    def weight_bytes(self, dtype: str | None = None) -> float:
        """Bytes of all weights."""
        return sum(self.bytes_by_part(dtype).values())

    def experts_read(self, tokens: Number) -> Number:
        """Share of the routed experts' weights that a step of `tokens` tokens reads; 0 for a dense model."""
        all_of_them = sum(g.count * g.experts * g.expert for g in self.groups)
        if not all_of_them:
            return 0.0 * tokens
        even = EVENNESS.get(self.family.replace("-", "_"), math.inf)  # as GGUF spells it
        return _total(g.count * g.distinct_experts(tokens, even) * g.expert for g in self.groups) / all_of_them

    def read_bytes(self, dtype: str | None = None, tokens: Number = 1.0) -> Number:  # type: ignore[assignment]
        """Bytes of weights that one step of `tokens` tokens reads: all but the experts that none is routed to, and of
        the embedding only a row a token, unless it is the lm_head as well."""
        parts = self.bytes_by_part(dtype)
        table = self.vocab * self.hidden / (self.vocab * self.hidden + self.positions) if self.tied else 0.0
        experts = parts.get("experts", 0.0)
        always = sum(parts.values()) - experts - parts.get("other", 0.0) - parts["embedding"] * (1 - table)
        return always + experts * self.experts_read(tokens)

    @property
    def matmul_flops_per_token(self) -> float:
        """FLOPs of a token through the layers' matrices: 2 for each entry it meets; attention and lm_head are apart.

        MLA's expansion of the latent costs the same whether it is done (prefill) or absorbed (decoding).
        """
        return 2.0 * sum(g.count * g.token_matmul for g in self.groups)

    @property
    def head_flops_per_token(self) -> float:
        """FLOPs of the lm_head for a token whose successor is asked for: the last of a prompt, each in decoding."""
        return 2.0 * self.vocab * self.hidden

    def attention_flops(self, context: Number) -> Number:
        """FLOPs of one new token's attention over `context` positions, in decoding."""
        return _total(g.count * g.position_flops(absorbed=True) * g.span(context) for g in self.groups)

    def prefill_attention_flops(self, tokens: Number, past: Number = 0.0) -> Number:  # type: ignore[assignment]
        """FLOPs of causal attention over `tokens` of a prompt that has `past` in the cache: token i attends to
        min(i, window) positions."""
        return _total(
            g.count * g.position_flops(absorbed=False) * g.spans(past + 1.0, past + tokens) for g in self.groups
        )

    def mean_attention_flops(self, first: Number, last: Number) -> Number:
        """`attention_flops` of the mean step while the context grows from `first` to `last` tokens."""
        flops = _total(g.count * g.position_flops(absorbed=True) * g.spans(first, last) for g in self.groups)
        return flops / (last - first + 1)

    def kv_bytes_per_token(self, kv_dtype: str | None = None) -> float:
        """Bytes of KV cache a token adds while no window is full."""
        return self.kv_element_bytes(kv_dtype) * sum(g.count * g.kv_values for g in self.groups if g.keeps_kv)

    def kv_bytes(self, context: Number, kv_dtype: str | None = None) -> Number:
        """Bytes of KV cache that a sequence of `context` tokens keeps; a layer keeps no more than its window."""
        kept = (g for g in self.groups if g.keeps_kv)
        return self.kv_element_bytes(kv_dtype) * _total(g.count * g.kv_values * g.span(context) for g in kept)

    def kv_read_bytes(self, context: Number, kv_dtype: str | None = None) -> Number:
        """Bytes of KV cache that a decoding step reads for a sequence: layers that share a cache read it each."""
        return self.kv_element_bytes(kv_dtype) * _total(g.count * g.kv_values * g.span(context) for g in self.groups)

    def mean_kv_read_bytes(self, first: Number, last: Number, kv_dtype: str | None = None) -> Number:
        """`kv_read_bytes` of the mean step while the context grows from `first` to `last` tokens."""
        values = _total(g.count * g.kv_values * g.spans(first, last) for g in self.groups)
        return self.kv_element_bytes(kv_dtype) * values / (last - first + 1)

    def kv_element_bytes(self, kv_dtype: str | None = None) -> float:
        """Bytes of an element of the KV cache: by default 4 for a model computed in fp32, else 2."""
        # Scales of quantized caches are a few per mille and differ by engine: left out.
        dtype = kv_dtype or ("fp32" if self.compute_dtype == "fp32" else "fp16")
        return {"int4": 4.0, "fp4": 4.0, "nvfp4": 4.0}.get(dtype, BITS[dtype]) / 8

    def as_dict(self) -> dict[str, Any]:
        """What a report says of the model."""
        one = self.groups[-1]
        experts = {"experts": one.experts, "experts_per_token": one.experts_per_token} if self.moe else {}
        return {
            "name": self.name,
            "family": self.family,
            "params": self.params,
            **({"active_params": self.active_params} if self.moe else {}),
            "params_by_part": {part: n for part, n in self.params_by_part.items() if n or part == "lm_head"},
            "weight_bytes": self.weight_bytes(),
            "kv_bytes_per_token": self.kv_bytes_per_token(),
            "dtype": self.dtype,
            "layers": self.layers,
            "hidden": self.hidden,
            "heads": one.heads,
            "kv_heads": one.kv_heads,
            "head_dim": one.head_dim,
            **({"kv_latent": one.latent} if self.mla else {}),
            **experts,
            "vocab": self.vocab,
            "tied_embeddings": self.tied,
            "sliding_window": max(g.window for g in self.groups) or None,
            "notes": list(self.notes),
        }


def _total(terms: Iterable[Number]) -> Number:
    return sum(terms)  # type: ignore[return-value]


def bytes_by_part(model: Model, bits: Mapping[str, float], other_bits: float) -> dict[str, float]:
    return {part: n * bits.get(part, other_bits) / 8 for part, n in model.params_by_part.items()}
