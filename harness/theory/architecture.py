"""A model's configuration -> Model: the config.json of a Hugging Face folder, or (`from_gguf`) a GGUF header.

Dense decoders only: what is not covered (mixture of experts, latent attention, state spaces, encoders) is refused by
name, because a guess would look like a prediction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from harness.theory.config import Config
from harness.theory.gguf_model import from_gguf
from harness.theory.shape import BITS, INT4_GROUP, WHOLE, Layers, Model, bytes_by_part, dtype_named

__all__ = ["FAMILIES", "Model", "from_config", "from_gguf"]


@dataclass(frozen=True, slots=True)
class _Dense:
    """What tells the dense families apart."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool
    gated: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    ffn_bias: bool = False
    head_bias: bool = False
    qk_norm: int = 0  # parameters of the query and key norms of a layer
    norms: int = 2  # norms a layer, without these
    norm_bias: bool = False
    positions: int = 0  # entries of a learned position table
    windows: tuple[int, ...] = ()  # by layer; empty: none


def _llama(c: Config) -> _Dense:
    hidden, heads = c.count("hidden_size"), c.count("num_attention_heads")
    return _Dense(
        layers=c.count("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=c.count("num_key_value_heads", default=heads),
        head_dim=c.count("head_dim", default=max(1, hidden // heads)),
        ffn=c.count("intermediate_size"),
        vocab=c.count("vocab_size"),
        tied=c.flag("tie_word_embeddings", False),
        qkv_bias=c.flag("attention_bias", False),
        out_bias=c.flag("attention_bias", False),
        ffn_bias=c.flag("mlp_bias", False),
    )


def _mistral(c: Config) -> _Dense:
    return replace(_llama(c), windows=_windows(c, lambda i: True))


def _qwen2(c: Config) -> _Dense:
    # transformers: the first max_window_layers layers attend to everything.
    first = c.values.get("max_window_layers")
    full = first if isinstance(first, int) else 0
    windows = _windows(c, lambda i: i >= full) if c.flag("use_sliding_window", False) else ()
    return replace(_llama(c), qkv_bias=True, out_bias=False, windows=windows)


def _qwen3(c: Config) -> _Dense:
    biased = c.flag("attention_bias", False)
    shape = _qwen2(c)
    return replace(shape, qkv_bias=biased, out_bias=biased, qk_norm=2 * shape.head_dim)


def _gemma(c: Config) -> _Dense:
    return replace(_llama(c), tied=c.flag("tie_word_embeddings", True))


def _gemma2(c: Config) -> _Dense:
    return replace(_gemma(c), norms=4, windows=_windows(c, lambda i: i % 2 == 0))


def _phi3(c: Config) -> _Dense:
    return replace(_llama(c), qkv_bias=False, out_bias=False, windows=_windows(c, lambda i: True))


def _gpt2(c: Config) -> _Dense:
    hidden, heads = c.count("n_embd", "hidden_size"), c.count("n_head", "num_attention_heads")
    return _Dense(
        layers=c.count("n_layer", "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=max(1, hidden // heads),
        ffn=c.count("n_inner", default=4 * hidden),
        vocab=c.count("vocab_size"),
        tied=c.flag("tie_word_embeddings", True),
        gated=False,
        qkv_bias=True,
        out_bias=True,
        ffn_bias=True,
        norm_bias=True,
        positions=c.count("n_positions", "n_ctx"),
    )


def _gptj(c: Config) -> _Dense:
    shape = replace(_gpt2(c), tied=c.flag("tie_word_embeddings", False), positions=0, norms=1)
    return replace(shape, qkv_bias=False, out_bias=False, head_bias=True)


def _opt(c: Config) -> _Dense:
    shape = _llama(Config({"intermediate_size": c.values.get("ffn_dim"), **c.values}, c.name))
    if c.values.get("word_embed_proj_dim", shape.hidden) != shape.hidden or not c.flag("do_layer_norm_before", True):
        raise c.error("OPT with a projected embedding or norms after the layer (opt-350m) is not covered yet")
    biased = c.flag("enable_bias", True)
    shape = replace(shape, kv_heads=shape.heads, tied=c.flag("tie_word_embeddings", True), gated=False, norm_bias=True)
    # Its position table has two rows more than positions.
    positions = c.count("max_position_embeddings") + 2
    return replace(shape, qkv_bias=biased, out_bias=biased, ffn_bias=biased, positions=positions)


def _falcon(c: Config) -> _Dense:
    hidden, heads = c.count("hidden_size", "n_embed"), c.count("num_attention_heads", "n_head")
    new = c.flag("new_decoder_architecture", False)
    kv_heads = (
        c.count("num_kv_heads", "n_head_kv", default=heads) if new else 1 if c.flag("multi_query", True) else heads
    )
    parallel = new or c.flag("parallel_attn", True)
    biased = c.flag("bias", False)
    return _Dense(
        layers=c.count("num_hidden_layers", "n_layer"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=max(1, hidden // heads),
        ffn=c.count("ffn_hidden_size", default=4 * hidden),
        vocab=c.count("vocab_size"),
        tied=c.flag("tie_word_embeddings", True),
        gated=False,
        qkv_bias=biased,
        out_bias=biased,
        ffn_bias=biased,
        norms=c.count("num_ln_in_parallel_attn", default=2) if new else 1 if parallel else 2,
        norm_bias=True,
    )


# model_type -> what its configuration means.
FAMILIES: dict[str, Callable[[Config], _Dense]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "phi3": _phi3,
    "gpt2": _gpt2,
    "gptj": _gptj,
    "opt": _opt,
    "falcon": _falcon,
}

# Keys whose presence means another kind of model, whatever model_type says.
FOREIGN = {
    "num_local_experts": "mixture of experts",
    "num_experts": "mixture of experts",
    "n_routed_experts": "mixture of experts",
    "moe_num_experts": "mixture of experts",
    "kv_lora_rank": "latent attention (MLA)",
    "cross_attention_layers": "cross attention",
    "text_config": "a multimodal model",
    "vision_config": "a multimodal model",
    "encoder_layers": "an encoder",
    "ssm_cfg": "a state-space model",
}


def _windows(c: Config, slides: Callable[[int], bool]) -> tuple[int, ...]:
    """The window of each layer, 0 for none: from `layer_types` where the configuration lists them, else by rule."""
    window = c.values.get("sliding_window")
    if window in (None, 0, -1):
        return ()
    window, layers = c.count("sliding_window"), c.count("num_hidden_layers")
    types = c.values.get("layer_types")
    if isinstance(types, list) and len(types) == layers:
        return tuple(window if kind == "sliding_attention" else 0 for kind in types)
    return tuple(window if slides(i) else 0 for i in range(layers))


def from_config(config: Mapping[str, Any], name: str = "") -> Model:
    """A Model from the content of config.json.

    Raises RidgelineError for a family that is not covered, a missing or absurd value, or an unknown quantization.
    """
    c = Config(config, name or str(config.get("_name_or_path") or "") or "config.json")
    for key, kind in FOREIGN.items():
        if config.get(key) not in (None, 0, 1, [], {}):
            raise c.error(f"{kind} ({key}, model_type {c.family!r}) is not covered yet, so there is no prediction")
    if c.family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise c.error(
            f"model_type {c.family or None!r} is not covered yet, so there is no prediction; covered: {known}"
        )
    shape = FAMILIES[c.family](c)
    if shape.heads % shape.kv_heads:
        raise c.error(f"{shape.heads} attention heads cannot share {shape.kv_heads} KV heads evenly")
    if shape.layers > 10_000:
        raise c.error(f"{shape.layers} layers: more than 10000 cannot be right")
    return _with_storage(_build(c, shape), c)


def _build(c: Config, s: _Dense) -> Model:
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    attention = s.hidden * (q + 2 * kv) + q * s.hidden
    ffn = (3 if s.gated else 2) * s.hidden * s.ffn
    norm = s.hidden * (2 if s.norm_bias else 1)
    one = Layers(
        count=1,
        attention=attention + (q + 2 * kv) * s.qkv_bias + s.hidden * s.out_bias + s.qk_norm,
        attention_matmul=attention,
        ffn=ffn + ((2 if s.gated else 1) * s.ffn + s.hidden) * s.ffn_bias,
        ffn_matmul=ffn,
        norms=s.norms * norm,
        heads=s.heads,
        kv_heads=s.kv_heads,
        head_dim=s.head_dim,
    )
    return Model(
        name=c.name,
        family=c.family,
        groups=_grouped(one, s.windows or (0,) * s.layers),
        hidden=s.hidden,
        vocab=s.vocab,
        tied=s.tied,
        positions=s.positions * s.hidden,
        final_norm=norm,
        head_bias=s.vocab if s.head_bias else 0,
        dtype="",
        stored_bytes={},
        max_context=c.count("max_position_embeddings", "n_positions", "n_ctx", default=0),
    )


def _grouped(one: Layers, windows: Sequence[int]) -> tuple[Layers, ...]:
    return tuple(replace(one, count=windows.count(w), window=w) for w in dict.fromkeys(windows))


def _with_storage(model: Model, c: Config) -> Model:
    """The model with dtype and bytes: from torch_dtype (or dtype), and quantization_config where there is one."""
    stated = c.values.get("torch_dtype") or c.values.get("dtype")
    notes: tuple[str, ...] = ()
    if not isinstance(stated, str):
        stated, notes = "fp16", ("the configuration states no dtype: taken as 16 bit",)
    base = dtype_named(stated)
    if base not in WHOLE:
        raise c.error(f"torch_dtype {stated!r} must be one of {', '.join(WHOLE)}")
    quantization = c.values.get("quantization_config")
    if not isinstance(quantization, Mapping):
        stored = bytes_by_part(model, {}, BITS[base])
        return replace(model, dtype=base, compute_dtype=base, matmul_dtype=base, stored_bytes=stored, notes=notes)
    dtype, bits, quantized_activations = _quantization(c, quantization)
    base = "bf16" if base == "fp32" else base  # quantized kernels have no fp32 activations
    quantized = {"attention": bits, "ffn": bits} | ({"lm_head": bits} if quantization.get("lm_head") is True else {})
    stored = bytes_by_part(model, quantized, BITS[base])
    matmul = dtype if quantized_activations else base
    return replace(model, dtype=dtype, compute_dtype=base, matmul_dtype=matmul, stored_bytes=stored, notes=notes)


def _quantization(c: Config, q: Mapping[str, Any]) -> tuple[str, float, bool]:
    """(dtype, bits of a weight with its scales, whether activations are quantized too) of a quantization_config."""
    method = str(q.get("quant_method") or "").lower()
    if method in ("gptq", "awq", "gptq_marlin", "awq_marlin"):
        bits = q.get("bits", q.get("w_bit"))
        group = q.get("group_size", q.get("q_group_size", INT4_GROUP))
        if bits not in (2, 3, 4, 8) or not isinstance(group, int):
            raise c.error(
                f"quantization_config: {method} with bits {bits!r} and group_size {group!r} is not understood"
            )
        # A group size of -1 is one group for a whole column: its scale is below one per mille.
        return ("int8" if bits == 8 else "int4"), bits + ((16 + bits) / group if group > 0 else 0.0), False
    if method in ("fp8", "fbgemm_fp8"):
        block = q.get("weight_block_size")
        blocked = isinstance(block, list) and block and all(isinstance(n, int) and n > 0 for n in block)
        return "fp8", 8.0 + (32 / math.prod(block) if blocked and isinstance(block, list) else 0.0), True
    if method == "bitsandbytes":
        if q.get("load_in_8bit"):
            return "int8", 8.0, False
        # NF4: a scale for every 64 weights, 32 bit, or 8 bit and another for every 256 of them.
        return "int4", 4.0 + ((8 + 32 / 256) / 64 if q.get("bnb_4bit_use_double_quant") else 32 / 64), False
    if method == "mxfp4":
        return "fp4", BITS["fp4"], False
    if method == "compressed-tensors":
        return _compressed_tensors(c, q)
    raise c.error(f"quantization_config: quant_method {method or None!r} is not covered yet, so there is no prediction")


def _compressed_tensors(c: Config, q: Mapping[str, Any]) -> tuple[str, float, bool]:
    groups = q.get("config_groups")
    group = next(iter(groups.values())) if isinstance(groups, Mapping) and len(groups) == 1 else None
    w = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(group, Mapping) or not isinstance(w, Mapping):
        raise c.error("quantization_config: compressed-tensors with other than one group of weights is not covered yet")
    bits, kind, size = w.get("num_bits"), w.get("type"), w.get("group_size")
    known = {(8, "float"): "fp8", (8, "int"): "int8", (4, "int"): "int4", (4, "float"): "fp4"}
    dtype = known.get((bits, kind)) if isinstance(bits, int) and isinstance(kind, str) else None
    if dtype is None or not isinstance(bits, int):
        raise c.error(f"quantization_config: weights of {bits!r} bits, type {kind!r}, are not covered yet")
    scale = 8 if dtype == "fp4" else 16
    return (
        dtype,
        bits + (scale / size if isinstance(size, int) and size > 0 else 0.0),
        bool(group.get("input_activations")),
    )
