"""A model's configuration -> Model: the config.json of a Hugging Face folder, or (`from_gguf`) a GGUF header.

What is not covered (state spaces, linear attention, encoders, cross attention) is refused by name, because a guess would
look like a prediction.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from harness.theory.config import Config
from harness.theory.dtypes import BITS, INT4_GROUP, WHOLE, dtype_named
from harness.theory.families import Experts, Latent, Spec
from harness.theory.families_later import FAMILIES
from harness.theory.gguf_model import from_gguf
from harness.theory.shape import QUANTIZED, Layers, Model, bytes_by_part

__all__ = ["FAMILIES", "Model", "from_config", "from_gguf"]

# model_type of a model with a text part of its own -> the family of that part, where it says none that is covered.
MULTIMODAL = {
    "gemma3": "gemma3_text", "gemma4": "gemma4_text", "mistral3": "mistral", "llama4": "llama4_text", "kimi_k25": "kimi_k2",
    "qwen3_vl": "qwen3", "qwen3_vl_moe": "qwen3_moe",
}  # fmt: skip

# Keys whose presence means another kind of model, whatever model_type says.
FOREIGN = {
    "cross_attention_layers": "cross attention",
    "encoder_layers": "an encoder",
    "ssm_cfg": "a state-space model",
    "linear_num_value_heads": "linear attention",
}


def from_config(config: Mapping[str, Any], name: str = "") -> Model:
    """A Model from the content of config.json.

    Of a multimodal model it is the part that generates text, with its vision tower's parameters where they are known.
    Raises RidgelineError for a family that is not covered, a missing or absurd value, or an unknown quantization.
    """
    c = Config(config, name or str(config.get("_name_or_path") or "") or "config.json")
    text, other, notes = _text_part(c)
    for key, kind in FOREIGN.items():
        if text.values.get(key) not in (None, 0, 1, [], {}):
            raise c.error(f"{kind} ({key}, model_type {c.family!r}) is not covered yet, so there is no prediction")
    if text.family not in FAMILIES:
        known = ", ".join(sorted({*FAMILIES, *MULTIMODAL}))
        raise c.error(
            f"model_type {text.family or None!r} is not covered yet, so there is no prediction; covered: {known}"
        )
    spec = FAMILIES[text.family](text)
    if any(spec.heads % n for n in (*spec.layer_kv_heads, spec.kv_heads)):
        raise c.error(f"{spec.heads} attention heads cannot share {spec.kv_heads} KV heads evenly")
    if spec.layers > 10_000:
        raise c.error(f"{spec.layers} layers: more than 10000 cannot be right")
    if spec.experts and spec.experts.per_token > spec.experts.count:
        raise c.error(f"{spec.experts.per_token} experts for a token of {spec.experts.count} experts cannot be right")
    return _with_storage(_build(text, spec, other, notes), text)


def _text_part(c: Config) -> tuple[Config, int, tuple[str, ...]]:
    """(configuration of the text part, parameters of the others as far as they are known, notes)."""
    inner = c.values.get("text_config")
    if inner is None and c.values.get("vision_config") is None:
        return c, 0, ()
    if c.family not in MULTIMODAL or not isinstance(inner, Mapping):
        raise c.error(f"a multimodal model (model_type {c.family!r}) is not covered yet, so there is no prediction")
    shared = ("torch_dtype", "dtype", "quantization_config", "tie_word_embeddings")
    stated = inner.get("model_type")
    family = stated if isinstance(stated, str) and stated in FAMILIES else MULTIMODAL[c.family]
    values = {**{k: c.values[k] for k in shared if k in c.values}, **inner, "model_type": family}
    vision = c.values.get("vision_config")
    if c.family == "gemma3" and isinstance(vision, Mapping):
        return Config(values, c.name), _siglip(Config(vision, c.name), Config(inner, c.name).count("hidden_size")), ()
    note = f"{c.name}: the vision tower's weights are not counted"
    return Config(values, c.name), 0, (note,)


def _siglip(c: Config, text_hidden: int) -> int:
    """Parameters of Gemma 3's vision tower (SigLIP) and of its projection into the text."""
    hidden, ffn, patch = c.count("hidden_size"), c.count("intermediate_size"), c.count("patch_size")
    layer = 4 * hidden * (hidden + 1) + 2 * hidden * ffn + ffn + hidden + 4 * hidden
    patches = (c.count("image_size") // patch) ** 2
    tower = 3 * patch * patch * hidden + hidden + patches * hidden + c.count("num_hidden_layers") * layer + 2 * hidden
    return tower + hidden * text_hidden + hidden


def _build(c: Config, s: Spec, other: int, notes: tuple[str, ...]) -> Model:
    norm = s.hidden * (2 if s.norm_bias else 1)
    layers = Counter(_layer(s, i, norm) for i in range(s.layers))
    return Model(
        name=c.name,
        family=c.family,
        groups=tuple(replace(one, count=n) for one, n in layers.items()),
        hidden=s.hidden,
        vocab=s.vocab,
        tied=s.tied,
        positions=s.positions * s.hidden,
        final_norm=norm * (2 if s.embedding_norm else 1),
        head_bias=s.vocab if s.head_bias else 0,
        dtype="",
        stored_bytes={},
        max_context=c.count("max_position_embeddings", "n_positions", "n_ctx", "seq_length", default=0),
        notes=notes,
        other=other,
    )


def _layer(s: Spec, i: int, norm: int) -> Layers:
    kv_heads = s.layer_kv_heads[i] if s.layer_kv_heads else s.kv_heads
    s = replace(s, head_dim=s.layer_head_dims[i]) if s.layer_head_dims else s
    made = 1 if s.keys_as_values and s.keys_as_values[i] else 2
    keeps = s.keeps_kv[i] if s.keeps_kv else True
    experts = s.experts if s.experts and (s.routed[i] if s.routed else True) else None
    ffn = (3 if s.gated else 2) * s.hidden * s.ffn
    ffn_bias = ((2 if s.gated else 1) * s.ffn + s.hidden) * s.ffn_bias
    attention, biases = _mla(s, s.latent) if s.latent else _attention(s, kv_heads, made * keeps)
    layer = Layers(
        count=1,
        attention=attention + biases + s.attention_extra,
        attention_matmul=attention,
        ffn=ffn + ffn_bias,
        ffn_matmul=ffn,
        norms=s.norms * norm,
        heads=s.heads,
        kv_heads=1 if s.latent else kv_heads,
        head_dim=s.head_dim,
        window=s.windows[i] if s.windows else 0,
        keeps_kv=keeps,
    )
    if s.latent:
        kept = s.latent.rank + s.latent.rope
        layer = replace(layer, value_dim=s.latent.value, latent=kept, rope_dim=s.latent.rope)
    return _routed(layer, s, experts) if experts else layer


def _attention(s: Spec, kv_heads: int, made: int) -> tuple[int, int]:
    """(entries of the matrices, biases); keys and values are `made` by so many: a layer that uses another's cache has none."""
    q, kv = s.heads * s.head_dim, kv_heads * s.head_dim * made
    return s.hidden * (q + kv) + q * s.hidden, (q + kv) * s.qkv_bias + s.hidden * s.out_bias


def _mla(s: Spec, m: Latent) -> tuple[int, int]:
    """(entries of the matrices, norms of the latents)."""
    q = s.heads * (m.nope + m.rope)
    queries = (s.hidden + q) * m.query_rank if m.query_rank else s.hidden * q
    keys = s.hidden * (m.rank + m.rope) + m.rank * s.heads * (m.nope + m.value)
    return queries + keys + s.heads * m.value * s.hidden, m.query_rank + m.rank


def _routed(layer: Layers, s: Spec, e: Experts) -> Layers:
    """The layer with routed experts in place of its FFN."""
    matrices = 3 if s.gated else 2
    expert, router = matrices * s.hidden * e.ffn, s.hidden * e.count
    gate = s.hidden * e.shared_gate
    shared = matrices * s.hidden * e.shared_ffn + gate
    return replace(
        layer,
        ffn=shared,
        ffn_matmul=shared,
        experts=e.count,
        experts_per_token=e.per_token,
        expert=expert + ((matrices - 1) * e.ffn + s.hidden) * e.bias,
        expert_matmul=expert,
        router=router + e.count * e.router_bias,
        router_matmul=router,
    )


def _with_storage(model: Model, c: Config) -> Model:
    """The model with dtype and bytes: from torch_dtype (or dtype), and quantization_config where there is one."""
    stated = c.values.get("torch_dtype") or c.values.get("dtype")
    notes = model.notes
    if not isinstance(stated, str):
        stated, notes = "fp16", (*notes, "the configuration states no dtype: taken as 16 bit")
    base = dtype_named(stated)
    if base not in WHOLE:
        raise c.error(f"torch_dtype {stated!r} must be one of {', '.join(WHOLE)}")
    quantization = c.values.get("quantization_config")
    if not isinstance(quantization, Mapping):
        stored = bytes_by_part(model, {}, BITS[base])
        return replace(model, dtype=base, compute_dtype=base, matmul_dtype=base, stored_bytes=stored, notes=notes)
    dtype, bits, quantized_activations = _quantization(c, quantization)
    base = "bf16" if base == "fp32" else base  # quantized kernels have no fp32 activations
    quantized = dict.fromkeys(_quantized_parts(quantization, model.layers), bits)
    stored = bytes_by_part(model, quantized, BITS[base])
    matmul = dtype if quantized_activations else base
    return replace(model, dtype=dtype, compute_dtype=base, matmul_dtype=matmul, stored_bytes=stored, notes=notes)


def _quantized_parts(q: Mapping[str, Any], layers: int) -> list[str]:
    """The parts whose matrices are quantized, as far as the modules that are left out are named by kind."""
    listed = q.get("modules_to_not_convert") or q.get("ignored_layers") or q.get("ignore") or q.get("exclude_modules")
    modules = {"attention": "self_attn", "ffn": "shared_expert"}
    spared = {part for part, module in modules.items() if _spares(listed, module, layers)}
    if q.get("quant_method") == "mxfp4":  # for experts only, whatever the list says
        spared = {"attention", "ffn"}
    parts = [part for part in QUANTIZED if part not in spared]
    return [*parts, "lm_head"] if q.get("lm_head") is True else parts


def _spares(listed: Any, module: str, layers: int) -> bool:
    """Whether the list leaves this module out everywhere: by a pattern, or in most layers one by one."""
    names = [str(name) for name in listed if module in str(name)] if isinstance(listed, list) else []
    numbers = [number[1] for name in names if (number := re.search(r"layers\.(\d+)\.", name))]
    return len(numbers) < len(names) or len(set(numbers)) > layers / 2


MODELOPT = {"fp8": "fp8", "nvfp4": "nvfp4", "mxfp4": "fp4"}  # quant_algo -> ours, activations too


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
    if method == "modelopt" and (algo := MODELOPT.get(str(q.get("quant_algo")).lower())):
        return algo, BITS[algo], True
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
    more = scale / size if isinstance(size, int) and size > 0 else 0.0
    return dtype, bits + more, bool(group.get("input_activations"))
