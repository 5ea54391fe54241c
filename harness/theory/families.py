"""What the configurations of each family of models mean: config.json -> Spec, the numbers that shapes are built from.

The keys and their defaults are those of the `configuration_*.py` and `modeling_*.py` files of Hugging Face
transformers (Apache-2.0), or of the model's own repository where it brings its code along.  A mistake here shows: the
tests hold every family against a published parameter count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from harness.theory.config import Config


@dataclass(frozen=True, slots=True)
class Experts:
    """Routed experts of a layer, and what stands beside them."""

    count: int
    per_token: int
    ffn: int  # width of one
    shared_ffn: int = 0  # width of all shared experts together
    shared_gate: bool = False  # a gate for the shared expert: one more column
    bias: bool = False  # of the experts' matrices
    router_bias: bool = False


@dataclass(frozen=True, slots=True)
class Latent:
    """Latent attention (MLA): queries from a latent of `query_rank` (0: directly), keys and values from `rank`."""

    query_rank: int
    rank: int
    nope: int
    rope: int
    value: int


@dataclass(frozen=True, slots=True)
class Spec:
    """A decoder as its configuration states it.  Tuples are by layer; an empty one means alike everywhere."""

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
    attention_extra: int = 0  # parameters of a layer's query and key norms, or of its attention sinks
    norms: int = 2  # norms a layer, without these
    norm_bias: bool = False
    embedding_norm: bool = False
    positions: int = 0  # entries of a learned position table
    windows: tuple[int, ...] = ()  # 0: none
    experts: Experts | None = None
    routed: tuple[bool, ...] = ()  # which layers have experts
    latent: Latent | None = None
    layer_kv_heads: tuple[int, ...] = ()
    layer_head_dims: tuple[int, ...] = ()
    keys_as_values: tuple[bool, ...] = ()  # True: one matrix makes both, which are kept apart in the cache
    keeps_kv: tuple[bool, ...] = ()  # False: attends to the cache of an earlier layer


def _llama(c: Config) -> Spec:
    hidden, heads = c.count("hidden_size"), c.count("num_attention_heads")
    return Spec(
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


def _windows(c: Config, slides: Callable[[int], bool], key: str = "sliding_window") -> tuple[int, ...]:
    """The window of each layer, 0 for none: from `layer_types` where the configuration lists them, else by rule."""
    window = c.values.get(key)
    if window in (None, 0, -1):
        return ()
    window, layers = c.count(key), c.count("num_hidden_layers")
    types = c.values.get("layer_types")
    if isinstance(types, list) and len(types) == layers:
        return tuple(0 if kind == "full_attention" else window for kind in types)
    return tuple(window if slides(i) else 0 for i in range(layers))


def _mistral(c: Config) -> Spec:
    return replace(_llama(c), windows=_windows(c, lambda i: True))


def _mixtral(c: Config) -> Spec:
    spec = _mistral(c)
    return replace(spec, experts=Experts(c.count("num_local_experts"), c.count("num_experts_per_tok"), spec.ffn))


def _qwen2(c: Config) -> Spec:
    # transformers: the first max_window_layers layers attend to everything.
    first = c.values.get("max_window_layers")
    full = first if isinstance(first, int) else 0
    windows = _windows(c, lambda i: i >= full) if c.flag("use_sliding_window", False) else ()
    return replace(_llama(c), qkv_bias=True, out_bias=False, windows=windows)


def _qwen2_moe(c: Config) -> Spec:
    shared = c.size("shared_expert_intermediate_size")
    return replace(_sparse(c, _qwen2(c)), experts=_experts(c, shared_ffn=shared, shared_gate=shared > 0))


def _qwen3(c: Config) -> Spec:
    biased = c.flag("attention_bias", False)
    spec = _qwen2(c)
    return replace(spec, qkv_bias=biased, out_bias=biased, attention_extra=2 * spec.head_dim)


def _qwen3_moe(c: Config) -> Spec:
    return replace(_sparse(c, _qwen3(c)), experts=_experts(c))


def _experts(c: Config, **more: Any) -> Experts:
    count, chosen = c.count("num_experts", "num_local_experts", "n_routed_experts"), c.count("num_experts_per_tok")
    return Experts(count, chosen, c.count("moe_intermediate_size", "intermediate_size"), **more)


def _sparse(c: Config, spec: Spec) -> Spec:
    """Experts in every `decoder_sparse_step`-th layer, but for those that `mlp_only_layers` names."""
    step, plain = c.count("decoder_sparse_step", default=1), c.values.get("mlp_only_layers")
    dense = set(plain) if isinstance(plain, list) and all(isinstance(i, int) for i in plain) else set()
    return replace(spec, routed=tuple((i + 1) % step == 0 and i not in dense for i in range(spec.layers)))


def _gemma(c: Config) -> Spec:
    return replace(_llama(c), tied=c.flag("tie_word_embeddings", True))


def _gemma2(c: Config) -> Spec:
    return replace(_gemma(c), norms=4, windows=_windows(c, lambda i: i % 2 == 0))


def _gemma3(c: Config) -> Spec:
    # The published files leave out what is the default.
    usual = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262_208}
    c = Config(usual | dict(c.values), c.name)
    pattern = c.count("sliding_window_pattern", default=6)
    spec = replace(_gemma(c), norms=4, windows=_windows(c, lambda i: (i + 1) % pattern != 0))
    return replace(spec, attention_extra=2 * spec.head_dim)


def _phi(c: Config) -> Spec:
    spec = replace(_llama(c), gated=False, norms=1, norm_bias=True, head_bias=True)
    extra = 4 * spec.head_dim if c.flag("qk_layernorm", False) else 0
    return replace(spec, qkv_bias=True, out_bias=True, ffn_bias=True, attention_extra=extra)


def _phi3(c: Config) -> Spec:
    return replace(_llama(c), qkv_bias=False, out_bias=False, windows=_windows(c, lambda i: True))


def _phimoe(c: Config) -> Spec:
    # transformers applies its window to no layer of the published models: it is as long as the context.
    spec = replace(_llama(c), norm_bias=True, head_bias=c.flag("lm_head_bias", False))
    return replace(spec, experts=Experts(c.count("num_local_experts"), c.count("num_experts_per_tok"), spec.ffn))


def _gpt2(c: Config) -> Spec:
    hidden, heads = c.count("n_embd", "hidden_size"), c.count("n_head", "num_attention_heads")
    return Spec(
        layers=c.count("n_layer", "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=1 if c.flag("multi_query", False) else heads,
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


def _gptj(c: Config) -> Spec:
    spec = replace(_gpt2(c), tied=c.flag("tie_word_embeddings", False), positions=0, norms=1)
    return replace(spec, qkv_bias=False, out_bias=False, head_bias=True)


def _gpt_neox(c: Config) -> Spec:
    biased = c.flag("attention_bias", True)
    spec = replace(_llama(c), gated=False, norm_bias=True, ffn_bias=True)
    return replace(spec, qkv_bias=biased, out_bias=biased)


def _bloom(c: Config) -> Spec:
    hidden, heads = c.count("hidden_size", "n_embed"), c.count("n_head", "num_attention_heads")
    usual = {"hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": 4 * hidden}
    layers = c.count("n_layer", "num_hidden_layers")
    spec = _llama(Config({**c.values, **usual, "num_hidden_layers": layers}, c.name))
    spec = replace(spec, gated=False, norm_bias=True, embedding_norm=True, tied=c.flag("tie_word_embeddings", True))
    return replace(spec, qkv_bias=True, out_bias=True, ffn_bias=True)


def _opt(c: Config) -> Spec:
    spec = _llama(Config({"intermediate_size": c.values.get("ffn_dim"), **c.values}, c.name))
    if c.values.get("word_embed_proj_dim", spec.hidden) != spec.hidden or not c.flag("do_layer_norm_before", True):
        raise c.error("OPT with a projected embedding or norms after the layer (opt-350m) is not covered yet")
    biased = c.flag("enable_bias", True)
    spec = replace(spec, kv_heads=spec.heads, tied=c.flag("tie_word_embeddings", True), gated=False, norm_bias=True)
    # Its position table has two rows more than positions.
    positions = c.count("max_position_embeddings") + 2
    return replace(spec, qkv_bias=biased, out_bias=biased, ffn_bias=biased, positions=positions)


def _falcon(c: Config) -> Spec:
    hidden, heads = c.count("hidden_size", "n_embed"), c.count("num_attention_heads", "n_head")
    new = c.flag("new_decoder_architecture", False)
    kv_heads = (
        c.count("num_kv_heads", "n_head_kv", default=heads) if new else 1 if c.flag("multi_query", True) else heads
    )
    parallel = new or c.flag("parallel_attn", True)
    biased = c.flag("bias", False)
    return Spec(
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


def _starcoder2(c: Config) -> Spec:
    biased = c.flag("use_bias", True)
    spec = replace(_mistral(c), gated=False, norm_bias=True, tied=c.flag("tie_word_embeddings", True))
    return replace(spec, qkv_bias=biased, out_bias=biased, ffn_bias=biased)


def _stablelm(c: Config) -> Spec:
    return replace(_llama(c), norm_bias=True, qkv_bias=c.flag("use_qkv_bias", False), out_bias=False)


def _cohere(c: Config) -> Spec:
    spec = replace(_llama(c), norms=1, tied=c.flag("tie_word_embeddings", True))
    extra = (spec.heads + spec.kv_heads) * spec.head_dim if c.flag("use_qk_norm", False) else 0
    pattern = c.count("sliding_window_pattern", default=4)
    windows = _windows(c, lambda i: (i + 1) % pattern != 0) if c.family == "cohere2" else ()
    return replace(spec, attention_extra=extra, windows=windows)


def _olmo2(c: Config) -> Spec:
    spec = _llama(c)
    return replace(spec, attention_extra=(spec.heads + spec.kv_heads) * spec.head_dim)


def _olmoe(c: Config) -> Spec:
    return replace(_olmo2(c), experts=_experts(c))


def _deci(c: Config) -> Spec:
    listed = c.values.get("num_key_value_heads_per_layer")
    layers = c.count("num_hidden_layers")
    if not isinstance(listed, list) or len(listed) != layers:
        raise c.error(f"num_key_value_heads_per_layer must list {layers} numbers, got {listed!r}")
    by_layer = tuple(Config({"num_key_value_heads_per_layer": n}, c.name).count("num_key_value_heads_per_layer") for n in listed)  # fmt: skip
    return replace(_llama(Config({**c.values, "num_key_value_heads": max(by_layer)}, c.name)), layer_kv_heads=by_layer)


def _deepseek(c: Config) -> Spec:
    c = Config({"intermediate_size": c.values.get("moe_intermediate_size"), **c.values}, c.name)
    rank, nope, rope = c.count("kv_lora_rank"), c.count("qk_nope_head_dim"), c.count("qk_rope_head_dim")
    latent = Latent(c.size("q_lora_rank"), rank, nope, rope, c.count("v_head_dim"))
    spec = replace(_llama(c), head_dim=nope + rope, latent=latent)
    if not c.size("n_routed_experts"):
        return spec
    shared = c.size("n_shared_experts") * c.count("moe_intermediate_size")
    # The correction bias of its router came with V3.
    experts = _experts(c, shared_ffn=shared, router_bias=c.values.get("topk_method") == "noaux_tc")
    first, step = c.size("first_k_dense_replace"), c.count("moe_layer_freq", default=1)
    routed = tuple(i >= first and i % step == 0 for i in range(spec.layers))
    return replace(spec, experts=experts, routed=routed)


def _gpt_oss(c: Config) -> Spec:
    spec = _llama(Config({"attention_bias": True, **c.values}, c.name))
    return replace(
        spec,
        attention_extra=spec.heads,  # a sink for each head
        windows=_windows(c, lambda i: i % 2 == 0),
        experts=_experts(c, bias=True, router_bias=True),
    )


def _llama4(c: Config) -> Spec:
    spec = _llama(Config({**c.values, "intermediate_size": c.values.get("intermediate_size_mlp")}, c.name))
    step, width = c.count("interleave_moe_layer_step", default=1), c.count("intermediate_size")
    listed = c.values.get("moe_layers")
    named = isinstance(listed, list) and all(isinstance(i, int) for i in listed)
    moe = set(listed or ()) if named else {i for i in range(spec.layers) if (i + 1) % step == 0}
    # Three of four layers attend within chunks: a token sees half a chunk on average, which is bounded by the whole.
    windows = _windows(c, lambda i: (i + 1) % 4 != 0, "attention_chunk_size")
    experts = Experts(c.count("num_local_experts"), c.count("num_experts_per_tok"), width, shared_ffn=width)
    return replace(spec, windows=windows, experts=experts, routed=tuple(i in moe for i in range(spec.layers)))


def _hunyuan(c: Config) -> Spec:
    """Hunyuan-Large: with cross-layer attention (`use_cla`) one layer of `cla_share_factor` makes keys and values."""
    spec = _llama(Config({"head_dim": c.values.get("attention_head_dim"), **c.values}, c.name))
    width = c.count("moe_intermediate_size", default=spec.ffn)
    experts = Experts(
        c.count("num_experts"), c.count("moe_topk"), width, shared_ffn=c.size("num_shared_expert") * width
    )
    factor = c.count("cla_share_factor", default=2) if c.flag("use_cla", False) else 1
    extra = 2 * spec.head_dim if c.flag("use_qk_norm", False) else 0
    keeps = tuple(i % factor == 0 for i in range(spec.layers))
    return replace(spec, experts=experts, attention_extra=extra, keeps_kv=keeps)


def _glm4_moe(c: Config) -> Spec:
    spec = replace(_llama(c), out_bias=False)
    shared = c.size("n_shared_experts") * c.count("moe_intermediate_size")
    first = c.size("first_k_dense_replace")
    return replace(
        spec,
        attention_extra=2 * spec.head_dim if c.flag("use_qk_norm", False) else 0,
        experts=_experts(c, shared_ffn=shared, router_bias=True),
        routed=tuple(i >= first for i in range(spec.layers)),
    )


def _minimax_m2(c: Config) -> Spec:
    return replace(_olmo2(c), experts=_experts(c, router_bias=c.flag("use_routing_bias", False)))


def _chatglm(c: Config) -> Spec:
    """ChatGLM and GLM-4 with the code of their own repository, whose keys are Megatron's."""
    shared = c.flag("multi_query_attention", False)
    usual = {
        "num_hidden_layers": c.count("num_layers"),
        "intermediate_size": c.count("ffn_hidden_size"),
        "num_key_value_heads": c.count("multi_query_group_num") if shared else c.count("num_attention_heads"),
        "head_dim": c.values.get("kv_channels"),
        "vocab_size": c.count("padded_vocab_size", "vocab_size"),
    }
    biased, every = c.flag("add_qkv_bias", False), c.flag("add_bias_linear", False)
    spec = _llama(Config({**c.values, **usual}, c.name))
    return replace(spec, qkv_bias=biased or every, out_bias=every, ffn_bias=every)


def _glm(c: Config) -> Spec:
    return replace(_llama(Config({"attention_bias": True, **c.values}, c.name)), out_bias=False)


def _mpt(c: Config) -> Spec:
    hidden, heads = c.count("d_model"), c.count("n_heads")
    attention = c.values.get("attn_config")
    attention = attention if isinstance(attention, dict) else {}
    if not c.flag("no_bias", False) or not attention.get("alibi"):
        raise c.error("MPT with biases or learned positions is not covered yet, so there is no prediction")
    usual = {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": attention.get("kv_n_heads"),
        "num_hidden_layers": c.count("n_layers"),
        "intermediate_size": c.count("expansion_ratio", default=4) * hidden,
        "tie_word_embeddings": True,
    }
    return replace(_llama(Config({**c.values, **usual}, c.name)), gated=False)


def _dbrx(c: Config) -> Spec:
    attention, ffn = c.values.get("attn_config"), c.values.get("ffn_config")
    if not isinstance(attention, dict) or not isinstance(ffn, dict):
        raise c.error("attn_config and ffn_config are missing")
    inner = Config({**ffn, **attention}, c.name)
    usual = {
        "hidden_size": c.count("d_model"),
        "num_attention_heads": c.count("n_heads"),
        "num_key_value_heads": inner.count("kv_n_heads"),
        "num_hidden_layers": c.count("n_layers"),
        "intermediate_size": inner.count("ffn_hidden_size"),
    }
    experts = Experts(inner.count("moe_num_experts"), inner.count("moe_top_k"), usual["intermediate_size"])
    return replace(_llama(Config({**c.values, **usual}, c.name)), experts=experts)


def _nemotron(c: Config) -> Spec:
    return replace(_llama(c), gated=False, norm_bias=True)


# model_type -> what its configuration means.
FAMILIES: dict[str, Callable[[Config], Spec]] = {
    "llama": _llama,
    "aquila": _llama,
    "granite": _llama,
    "internlm2": _llama,
    "baichuan": _llama,
    "smollm3": _llama,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "qwen2": _qwen2,
    "qwen2_moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi": _phi,
    "phi3": _phi3,
    "phimoe": _phimoe,
    "gpt2": _gpt2,
    "gpt_bigcode": _gpt2,
    "gptj": _gptj,
    "gpt_neox": _gpt_neox,
    "gpt_oss": _gpt_oss,
    "bloom": _bloom,
    "opt": _opt,
    "falcon": _falcon,
    "starcoder2": _starcoder2,
    "stablelm": _stablelm,
    "cohere": _cohere,
    "cohere2": _cohere,
    "olmo2": _olmo2,
    "olmoe": _olmoe,
    "deci": _deci,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "kimi_k2": _deepseek,
    "llama4_text": _llama4,
    "hunyuan": _hunyuan,
    "glm": _glm,
    "chatglm": _chatglm,
    "glm4_moe": _glm4_moe,
    "minimax_m2": _minimax_m2,
    "mpt": _mpt,
    "dbrx": _dbrx,
    "nemotron": _nemotron,
}
