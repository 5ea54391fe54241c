"""A GGUF header -> Model: parameters and bytes are those of its tensors, exactly."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from harness.theory.config import Config
from harness.theory.gguf import GGML_TYPES, Elided, tensor_bytes
from harness.theory.shape import PARTS, Layers, Model

# Architectures of llama.cpp that are decoders with a KV cache in every layer.
GGUF_FAMILIES = (
    "llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "gemma", "gemma2", "gemma3", "phi2", "phi3", "phimoe", "gpt2",
    "gptj", "gptneox", "gpt-oss", "bloom", "falcon", "stablelm", "starcoder2", "command-r", "cohere2", "granite",
    "smollm3", "olmo2", "olmoe", "deepseek2",
)  # fmt: skip
# Architecture -> one of so many layers attends to everything, the others within the window; 0: none does.
FULL_EVERY = {"gemma2": 2, "gemma3": 6, "gpt-oss": 2, "cohere2": 4, "phi3": 0, "llama": 0}
Tensors = Sequence[tuple[str, tuple[int, ...], int]]


def from_gguf(metadata: Mapping[str, Any], tensors: Tensors, name: str = "") -> Model:
    """A Model from a GGUF header (`gguf.read`): parameters and bytes are those of its tensors, exactly.

    Raises RidgelineError for an architecture that is not covered or a header that contradicts itself.
    """
    name = name or str(metadata.get("general.name") or "") or "GGUF"
    arch = metadata.get("general.architecture")
    c = Config({k.removeprefix(f"{arch}."): v for k, v in metadata.items()}, name)
    if arch not in GGUF_FAMILIES:
        raise c.error(
            f"architecture {arch!r} is not covered yet, so there is no prediction; covered: {', '.join(GGUF_FAMILIES)}"
        )
    if (c.values.get("split.count") or 1) != 1:
        raise c.error("a GGUF split over several files is not covered yet; give config.json instead")
    return _gguf_model(c, str(arch), tensors)


def _gguf_model(c: Config, arch: str, tensors: Tensors) -> Model:
    layers, hidden = c.count("block_count"), c.count("embedding_length")
    sizes = {name: math.prod(shape) for name, shape, _ in tensors}
    if layers > 10_000 or sizes.get("token_embd.weight", 0) % hidden or not sizes.get("token_embd.weight"):
        raise c.error("block_count, embedding_length and the tensor token_embd.weight do not fit together")
    stored, matmul, params = _gguf_parts(c, tensors)
    windows, notes = _gguf_windows(c, arch, layers)
    heads = _per_layer(c, "attention.head_count", layers)
    kv_heads = _per_layer(c, "attention.head_count_kv", layers, heads)
    widths = _gguf_widths(c, hidden, max(heads))
    experts: dict[str, Any] = {"experts": c.size("expert_count"), "experts_per_token": c.size("expert_used_count")}
    if experts["experts_per_token"] > experts["experts"]:
        raise c.error(f"expert_used_count {experts['experts_per_token']} is more than there are experts")
    shapes = [
        Layers(
            1,
            **_one_expert(c, params[i], experts["experts"]),
            heads=heads[i],
            kv_heads=1 if widths.get("latent") else kv_heads[i],
            window=windows[i],
            **widths,
            **(experts if params[i]["expert"] else {}),
        )
        for i in range(layers)
        if i in params
    ]
    if len(shapes) != layers:
        raise c.error(f"block_count is {layers}, but tensors stand for {len(shapes)} layers (a split or a cut file?)")
    groups = tuple(replace(one, count=n) for one, n in Counter(shapes).items())
    types = {name: kind for name, _, kind in tensors}
    return Model(
        name=c.name,
        family=arch,
        groups=groups,
        hidden=hidden,
        vocab=sizes["token_embd.weight"] // hidden,
        tied="output.weight" not in sizes,
        positions=sizes.get("position_embd.weight", 0),
        final_norm=sizes.get("output_norm.weight", 0) + sizes.get("output_norm.bias", 0),
        head_bias=sizes.get("output.bias", 0),
        dtype=_dtype(max(matmul, key=lambda t: matmul[t])) if matmul else "fp16",
        head_dtype=_dtype(types.get("output.weight", types["token_embd.weight"])),
        stored_bytes=stored,
        compute_dtype="fp16",
        matmul_dtype="fp16",
        max_context=c.count("context_length", default=0),
        notes=notes,
    )


def _dtype(kind: int) -> str:
    """What `dtypes` calls a GGML type."""
    name = GGML_TYPES[kind].name.lower()
    return {"f32": "fp32", "f16": "fp16", "mxfp4": "fp4"}.get(name, name)


_BLOCK = re.compile(r"blk\.(\d{1,5})\.(.+)")
_NOT_WEIGHTS = ("rope_freqs", "rope_factors")  # constants that the converter writes; no parameters of the model


def _gguf_widths(c: Config, hidden: int, heads: int) -> dict[str, Any]:
    """Widths of a head's key and value; with latent attention also what is cached, whatever the file's age."""
    key = c.count("attention.key_length", default=max(1, hidden // heads))
    if not (rank := c.size("attention.kv_lora_rank")):
        return {"head_dim": key, "value_dim": c.size("attention.value_length")}
    rope = c.count("rope.dimension_count")
    value = c.count("attention.value_length_mla", "attention.value_length")
    key = c.count("attention.key_length_mla", "attention.key_length")
    return {"head_dim": key, "value_dim": value, "latent": rank + rope, "rope_dim": rope}


_ATTENTION_NORMS = ("attn_q_norm", "attn_k_norm", "attn_q_a_norm", "attn_kv_a_norm")


def _part(name: str) -> str:
    if name.startswith(("output.", "lm_head")):
        return "lm_head"
    if "norm" in name:
        # A norm of queries or keys belongs to attention, as in a Hugging Face module tree.
        return "attention" if any(norm in name for norm in _ATTENTION_NORMS) else "norms"
    if "_exps." in name:
        return "experts"
    if "ffn_gate_inp." in name or "exp_probs_b" in name:
        return "router"
    return "embedding" if name.startswith(("token_embd", "position_embd")) else "ffn" if "ffn_" in name else "attention"


def _gguf_parts(c: Config, tensors: Tensors) -> tuple[dict[str, float], dict[int, float], dict[int, Counter[str]]]:
    """(bytes by part, matrix entries by GGML type, layer -> fields of Layers; "expert" is that of all experts)."""
    stored = dict.fromkeys(PARTS, 0.0)
    matmul: dict[int, float] = {}
    params: dict[int, Counter[str]] = {}
    for name, shape, kind in tensors:
        if name.startswith(_NOT_WEIGHTS) or ".rope_" in name:
            continue
        part, n = _part(name), math.prod(shape)
        stored[part] += tensor_bytes(shape, kind)
        if not (block := _BLOCK.fullmatch(name)):
            continue
        if "ssm_" in name or re.search(r"ffn_(gate|up|down)\.\d", name):
            raise c.error(
                f"tensor {name}: state spaces and experts apart are not covered yet, so there is no prediction"
            )
        layer = params.setdefault(int(block[1]), Counter())
        field = "expert" if part == "experts" else part
        layer[field] += n
        if name.endswith(".weight") and len(shape) >= 2 and part != "norms":
            layer[f"{field}_matmul"] += n
            matmul[kind] = matmul.get(kind, 0.0) + n
    return stored, matmul, params


_FIELDS = ("attention", "ffn", "router", "expert")


def _one_expert(c: Config, found: Counter[str], experts: int) -> dict[str, Any]:
    """Parameters of a layer as Layers has them: those of all its experts divided by their number."""
    fields = {f"{name}{end}": found[f"{name}{end}"] for name in _FIELDS for end in ("", "_matmul")}
    if fields["expert"] and (not experts or fields["expert"] % experts or fields["expert_matmul"] % experts):
        raise c.error(f"expert_count {experts} and the tensors of the experts do not fit together")
    one = {name: fields[name] // max(1, experts) for name in ("expert", "expert_matmul")}
    return {**fields, **one, "norms": found["norms"]}


def _per_layer(c: Config, key: str, layers: int, default: list[int] | None = None) -> list[int]:
    value = c.values.get(key)
    if value is None and default is not None:
        return default
    values = value if isinstance(value, list) else [value] * layers
    if isinstance(value, Elided) or len(values) != layers:
        raise c.error(f"{key} does not list {layers} layers")
    return [Config({key: v}, c.name).count(key) for v in values]


def _gguf_windows(c: Config, arch: str, layers: int) -> tuple[list[int], tuple[str, ...]]:
    window = c.count("attention.sliding_window", default=0)
    if not window:
        return [0] * layers, ()
    if arch in FULL_EVERY:
        every = FULL_EVERY[arch]
        return [0 if every and (i + 1) % every == 0 else window for i in range(layers)], ()
    note = f"a sliding window of {window} tokens, whose layers the file does not name, is taken as full attention"
    return [0] * layers, (note,)
