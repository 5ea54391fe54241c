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
from harness.theory.shape import PARTS, SPELLINGS, Layers, Model

# Architectures of llama.cpp that are dense decoders with keys and values for each KV head.
GGUF_DENSE = (
    "llama",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "phi2",
    "phi3",
    "gpt2",
    "gptj",
    "gptneox",
    "falcon",
    "stablelm",
    "starcoder2",
    "smollm3",
    "olmo2",
)
Tensors = Sequence[tuple[str, tuple[int, ...], int]]


def from_gguf(metadata: Mapping[str, Any], tensors: Tensors, name: str = "") -> Model:
    """A Model from a GGUF header (`gguf.read`): parameters and bytes are those of its tensors, exactly.

    Raises RidgelineError for an architecture that is not covered or a header that contradicts itself.
    """
    name = name or str(metadata.get("general.name") or "") or "GGUF"
    arch = metadata.get("general.architecture")
    c = Config({k.removeprefix(f"{arch}."): v for k, v in metadata.items()}, name)
    if arch not in GGUF_DENSE:
        raise c.error(
            f"architecture {arch!r} is not covered yet, so there is no prediction; covered: {', '.join(GGUF_DENSE)}"
        )
    for key, kind in {"expert_count": "mixture of experts", "attention.kv_lora_rank": "latent attention (MLA)"}.items():
        if c.values.get(key):
            raise c.error(f"{kind} is not covered yet, so there is no prediction")
    if (c.values.get("split.count") or 1) != 1:
        raise c.error("a GGUF split over several files is not covered yet; give config.json instead")
    return _gguf_model(c, str(arch), tensors)


def _gguf_model(c: Config, arch: str, tensors: Tensors) -> Model:
    layers, hidden = c.count("block_count"), c.count("embedding_length")
    sizes = {name: math.prod(shape) for name, shape, _ in tensors}
    if layers > 10_000 or sizes.get("token_embd.weight", 0) % hidden or not sizes.get("token_embd.weight"):
        raise c.error("block_count, embedding_length and the tensor token_embd.weight do not fit together")
    stored, matmul, params = _gguf_parts(c, tensors)
    head_dim = c.count(
        "attention.key_length", default=max(1, hidden // max(_per_layer(c, "attention.head_count", layers)))
    )
    windows, notes = _gguf_windows(c, arch, layers)
    heads = _per_layer(c, "attention.head_count", layers)
    kv_heads = _per_layer(c, "attention.head_count_kv", layers, heads)
    shapes = [
        Layers(1, *params[i], heads=heads[i], kv_heads=kv_heads[i], head_dim=head_dim, window=windows[i])
        for i in range(layers)
        if i in params
    ]
    if len(shapes) != layers:
        raise c.error(f"block_count is {layers}, but tensors stand for {len(shapes)} layers (a split or a cut file?)")
    groups = tuple(replace(one, count=n) for one, n in Counter(shapes).items())
    dtype = GGML_TYPES[max(matmul, key=lambda t: matmul[t])].name.lower() if matmul else "f16"
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
        dtype=SPELLINGS.get(dtype, dtype),
        stored_bytes=stored,
        compute_dtype="fp16",
        matmul_dtype="fp16",
        max_context=c.count("context_length", default=0),
        notes=notes,
    )


_BLOCK = re.compile(r"blk\.(\d{1,5})\.(.+)")
_NOT_WEIGHTS = ("rope_freqs", "rope_factors")  # constants that the converter writes; no parameters of the model


def _part(name: str) -> str:
    if name.startswith(("output.", "lm_head")):
        return "lm_head"
    if "norm" in name:
        # A norm of queries or keys belongs to attention, as in a Hugging Face module tree.
        return "attention" if "attn_q_norm" in name or "attn_k_norm" in name else "norms"
    return "embedding" if name.startswith(("token_embd", "position_embd")) else "ffn" if "ffn_" in name else "attention"


def _gguf_parts(
    c: Config, tensors: Tensors
) -> tuple[dict[str, float], dict[int, float], dict[int, tuple[int, int, int, int, int]]]:
    """(bytes by part, matrix entries by GGML type, layer -> its first five fields of Layers after count)."""
    stored = dict.fromkeys(PARTS, 0.0)
    matmul: dict[int, float] = {}
    params: dict[int, list[int]] = {}
    for name, shape, kind in tensors:
        if name.startswith(_NOT_WEIGHTS) or ".rope_" in name:
            continue
        part, n = _part(name), math.prod(shape)
        stored[part] += tensor_bytes(shape, kind)
        if not (block := _BLOCK.fullmatch(name)):
            continue
        if "ssm_" in name or "_exps" in name:
            raise c.error(f"tensor {name}: state spaces and experts are not covered yet, so there is no prediction")
        layer = params.setdefault(int(block[1]), [0, 0, 0, 0, 0])
        slot = {"attention": 0, "ffn": 2, "norms": 4}[part]
        layer[slot] += n
        if len(shape) >= 2 and part != "norms":
            layer[slot + 1] += n
            matmul[kind] = matmul.get(kind, 0.0) + n
    return stored, matmul, {i: (p[0], p[1], p[2], p[3], p[4]) for i, p in params.items()}


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
    if arch == "gemma2":
        return [window if i % 2 == 0 else 0 for i in range(layers)], ()
    if arch in ("phi3", "llama"):
        return [window] * layers, ()
    note = f"a sliding window of {window} tokens, whose layers the file does not name, is taken as full attention"
    return [0] * layers, (note,)
