"""What the configurations of further families mean, as `families` does for the first; `FAMILIES` here has them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from harness.theory import families as f
from harness.theory.config import Config
from harness.theory.families import Experts, Spec


def _olmo3(c: Config) -> Spec:
    return replace(f._olmo2(c), windows=f._windows(c, lambda i: (i + 1) % 4 != 0))


def _gemma4(c: Config) -> Spec:
    """Layers without a window have wider and fewer KV heads, whose keys are the values too (transformers' Gemma4TextConfig);
    an FFN stays beside the experts."""
    for key in ("hidden_size_per_layer_input", "num_kv_shared_layers"):
        if c.values.get(key):
            raise c.error(f"{key} (model_type {c.family!r}) is not covered yet, so there is no prediction")
    spec = replace(f._gemma(c), norms=4, windows=f._windows(c, lambda i: (i + 1) % 6 != 0))
    full = tuple(not window for window in spec.windows)
    if c.flag("attention_k_eq_v", False):
        few = c.count("num_global_key_value_heads", default=spec.kv_heads)
        spec = replace(spec, layer_kv_heads=tuple(few if one else spec.kv_heads for one in full), keys_as_values=full)
    if c.flag("enable_moe_block", False):
        width = c.count("moe_intermediate_size")
        experts = Experts(c.count("num_experts"), c.count("top_k_experts"), width, shared_ffn=spec.ffn)
        spec = replace(spec, experts=experts)
    wide = c.count("global_head_dim", default=512)
    wides = tuple(wide if one else spec.head_dim for one in full)
    return replace(spec, layer_head_dims=wides, attention_extra=2 * spec.head_dim)


def _glm4(c: Config) -> Spec:
    return replace(f._glm(c), norms=4)


def _glm4_moe_lite(c: Config) -> Spec:
    """DeepSeek's layer; its router has the correction bias of V3 without saying so."""
    return f._deepseek(Config({"topk_method": "noaux_tc", **c.values}, c.name))


def _granitemoe(c: Config) -> Spec:
    spec = replace(f._llama(c), tied=c.flag("tie_word_embeddings", True))
    return replace(spec, experts=Experts(c.count("num_local_experts"), c.count("num_experts_per_tok"), spec.ffn))


def _seed_oss(c: Config) -> Spec:
    spec = f._llama(Config({"attention_bias": True, **c.values}, c.name))
    return replace(spec, out_bias=c.flag("attention_out_bias", False))


def _ernie(c: Config) -> Spec:
    spec = replace(f._llama(c), tied=c.flag("tie_word_embeddings", True))
    biased = c.flag("use_bias", False)
    return replace(spec, qkv_bias=biased, out_bias=biased, ffn_bias=biased)


def _ernie_moe(c: Config) -> Spec:
    spec, width = _ernie(c), c.count("moe_intermediate_size")
    shared = c.size("moe_num_shared_experts") * width
    experts = Experts(c.count("moe_num_experts"), c.count("moe_k"), width, shared_ffn=shared, router_bias=True)
    first, step = c.size("moe_layer_start_index"), c.count("moe_layer_interval", default=1)
    return replace(spec, experts=experts, routed=tuple(i >= first and (i + 1) % step == 0 for i in range(spec.layers)))


def _hunyuan_dense(c: Config) -> Spec:
    spec = f._llama(c)
    return replace(spec, attention_extra=2 * spec.head_dim if c.flag("use_qk_norm", False) else 0)


def _hunyuan_moe(c: Config) -> Spec:
    """Some of its numbers are lists, one for each layer: covered where all are alike."""

    def one(key: str) -> Any:
        value = c.values.get(key)
        if isinstance(value, list) and len(set(map(str, value))) > 1:
            raise c.error(f"{key} that differs by layer is not covered yet, so there is no prediction")
        return value[0] if isinstance(value, list) and value else value

    plain = Config(
        {**c.values, **{k: one(k) for k in ("moe_topk", "moe_intermediate_size", "num_shared_expert")}}, c.name
    )
    width = plain.count("moe_intermediate_size", default=plain.count("intermediate_size"))
    shared = plain.size("num_shared_expert") * width
    experts = Experts(plain.count("num_experts"), plain.count("moe_topk"), width, shared_ffn=shared)
    return replace(_hunyuan_dense(plain), experts=experts)


def _exaone(c: Config) -> Spec:
    return f._llama(Config({"num_hidden_layers": c.values.get("num_layers"), **c.values}, c.name))


def _exaone4(c: Config) -> Spec:
    spec, pattern = f._llama(c), c.values.get("sliding_window_pattern")
    every = len(pattern) if isinstance(pattern, str) else pattern if isinstance(pattern, int) and pattern > 0 else 4
    windows = f._windows(c, lambda i: (i + 1) % every != 0 and i + 1 < spec.layers)
    return replace(spec, attention_extra=2 * spec.head_dim, windows=windows)


def _apertus(c: Config) -> Spec:
    """Its FFN is not gated; the activation has two parameters a layer, counted with the norms of queries and keys."""
    spec = f._llama(c)
    return replace(spec, gated=False, attention_extra=2 * spec.head_dim + 2)


def _deepseek_moe(c: Config) -> Spec:
    """DeepSeek's first: experts as in V2, attention as in Llama."""
    spec = f._llama(c)
    shared = c.size("n_shared_experts") * c.count("moe_intermediate_size")
    first, step = c.size("first_k_dense_replace"), c.count("moe_layer_freq", default=1)
    routed = tuple(i >= first and i % step == 0 for i in range(spec.layers))
    return replace(spec, experts=f._experts(c, shared_ffn=shared), routed=routed)


# model_type -> what its configuration means, of both modules.
FAMILIES: dict[str, Callable[[Config], Spec]] = f.FAMILIES | {
    "internlm3": f._llama,
    "mimo": f._qwen2,
    "olmo3": _olmo3,
    "gemma4_text": _gemma4,
    "glm4": _glm4,
    "glm4_moe_lite": _glm4_moe_lite,
    "granitemoe": _granitemoe,
    "seed_oss": _seed_oss,
    "ernie4_5": _ernie,
    "ernie4_5_moe": _ernie_moe,
    "hunyuan_v1_dense": _hunyuan_dense,
    "hunyuan_v1_moe": _hunyuan_moe,
    "exaone": _exaone,
    "exaone4": _exaone4,
    "apertus": _apertus,
    "deepseek": _deepseek_moe,
}
