"""Configurations to parameters, bytes and FLOPs: the published counts, exactly."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import models
from harness.records import RidgelineError
from harness.theory.architecture import FAMILIES, MULTIMODAL, from_config
from harness.theory.dtypes import dtype_named


def llama(hidden, ffn, layers, heads, kv_heads, vocab, **more):
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "torch_dtype": "bfloat16",
    } | more


LLAMA_2_7B = llama(4096, 11008, 32, 32, 32, 32000, torch_dtype="float16")
LLAMA_3_8B = llama(4096, 14336, 32, 32, 8, 128256)
MISTRAL_7B = llama(4096, 14336, 32, 32, 8, 32000, model_type="mistral", sliding_window=4096)
GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257}
GEMMA_2_2B = llama(2304, 9216, 26, 8, 4, 256000, model_type="gemma2", head_dim=256, sliding_window=4096)
OPT = llama(768, 3072, 12, 12, 12, 50272, model_type="opt", max_position_embeddings=2048)
FALCON = {"model_type": "falcon", "hidden_size": 4544, "num_attention_heads": 71, "num_hidden_layers": 32}
FALCON_40B = {"model_type": "falcon", "hidden_size": 8192, "num_attention_heads": 128, "num_hidden_layers": 60}
GPTJ = {"model_type": "gptj", "n_embd": 4096, "n_head": 16, "n_layer": 28, "n_positions": 2048, "vocab_size": 50400}

# Name -> (config.json, parameters as the weights' files on the Hugging Face hub count them).
PUBLISHED = {
    "Llama-2-7B": (LLAMA_2_7B, 6_738_415_616),
    "Llama-2-13B": (llama(5120, 13824, 40, 40, 40, 32000), 13_015_864_320),
    "Llama-2-70B": (llama(8192, 28672, 80, 64, 8, 32000), 68_976_648_192),
    "Llama-3-8B": (LLAMA_3_8B, 8_030_261_248),
    "Llama-3-70B": (llama(8192, 28672, 80, 64, 8, 128256), 70_553_706_496),
    "Llama-3.2-1B": (llama(2048, 8192, 16, 32, 8, 128256, tie_word_embeddings=True), 1_235_814_400),
    "SmolLM2-135M": (llama(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True), 134_515_008),
    "Mistral-7B": (MISTRAL_7B, 7_241_732_096),
    "Qwen2.5-7B": (llama(3584, 18944, 28, 28, 4, 152064, model_type="qwen2"), 7_615_616_512),
    "Qwen2.5-0.5B": (
        llama(896, 4864, 24, 14, 2, 151936, model_type="qwen2", tie_word_embeddings=True),
        494_032_768,
    ),
    "Qwen3-8B": (llama(4096, 12288, 36, 32, 8, 151936, model_type="qwen3", head_dim=128), 8_190_735_360),
    "Gemma-2B": (llama(2048, 16384, 18, 8, 1, 256000, model_type="gemma", head_dim=256), 2_506_172_416),
    "Gemma-2-2B": (GEMMA_2_2B, 2_614_341_888),
    "Phi-3-mini": (llama(3072, 8192, 32, 32, 32, 32064, model_type="phi3", sliding_window=2047), 3_821_079_552),
    "GPT-2": (GPT2, 124_439_808),
    "GPT-J-6B": (GPTJ, 6_050_882_784),
    "OPT-125M": (OPT, 125_239_296),
    "Falcon-7B": (FALCON | {"multi_query": True, "vocab_size": 65024}, 6_921_720_704),
    "Falcon-40B": (
        FALCON_40B | {"new_decoder_architecture": True, "num_kv_heads": 8, "vocab_size": 65024},
        41_303_293_952,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_parameter_count_is_the_published_one(name):
    config, params = PUBLISHED[name]
    model = from_config(config, name)
    assert model.params == params
    assert sum(model.params_by_part.values()) == params
    assert sum(model.bytes_by_part().values()) == model.weight_bytes()


def test_gemma_2b_has_two_and_a_half_billion_parameters_and_a_fifth_is_its_vocabulary():
    parts = from_config(PUBLISHED["Gemma-2B"][0]).params_by_part
    assert sum(parts.values()) == pytest.approx(2.5e9, rel=0.01)
    assert parts["embedding"] / sum(parts.values()) == pytest.approx(0.21, abs=0.01)
    assert parts["lm_head"] == 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Llama-2-7B", 524_288), ("Llama-2-13B", 819_200), ("Llama-3-8B", 131_072), ("Llama-3-70B", 327_680)],
)
def test_kv_bytes_per_token(name, expected):
    model = from_config(PUBLISHED[name][0])
    assert model.kv_bytes_per_token() == expected
    assert model.kv_bytes_per_token("fp8") == expected / 2
    assert model.kv_bytes(1000.0) == 1000 * expected


def test_weights_in_16_bit_take_two_bytes_each_and_a_step_reads_all_but_the_embedding():
    model = from_config(LLAMA_3_8B)
    assert model.weight_bytes() == 2 * 8_030_261_248
    assert model.read_bytes() == model.weight_bytes() - 2 * 128256 * 4096
    tied = from_config(PUBLISHED["SmolLM2-135M"][0])
    assert tied.read_bytes() == tied.weight_bytes()
    gpt2 = from_config(GPT2 | {"torch_dtype": "float16"})
    assert gpt2.read_bytes() == pytest.approx(gpt2.weight_bytes() - 2 * 1024 * 768), "positions are looked up"


def test_a_token_costs_two_flops_for_each_weight_it_meets():
    model = from_config(LLAMA_2_7B)
    norms_and_embedding = 32000 * 4096 + 65 * 4096
    assert model.matmul_flops_per_token + model.head_flops_per_token == 2 * (model.params - norms_and_embedding)


def test_prefill_attention_is_the_sum_over_its_tokens():
    for config in (LLAMA_3_8B, MISTRAL_7B | {"sliding_window": 7}):
        model = from_config(config)
        expected = sum(model.attention_flops(float(i)) for i in range(1, 33))
        assert model.prefill_attention_flops(32) == pytest.approx(expected)


def test_a_sliding_window_bounds_the_cache_of_its_layers():
    assert from_config(MISTRAL_7B).kv_bytes(10_000.0) == from_config(MISTRAL_7B).kv_bytes(4096.0)
    half = from_config(GEMMA_2_2B)
    assert [(g.count, g.window) for g in half.groups] == [(13, 4096), (13, 0)]
    contexts = half.kv_bytes(np.array([4096.0, 8192.0]))
    assert contexts[1] / contexts[0] == 1.5
    listed = GEMMA_2_2B | {"layer_types": ["full_attention"] * 25 + ["sliding_attention"]}
    assert [(g.count, g.window) for g in from_config(listed).groups] == [(25, 0), (1, 4096)]
    assert from_config(llama(8, 8, 4, 2, 2, 8, model_type="qwen2", sliding_window=64)).groups[0].window == 0


@pytest.mark.parametrize(
    ("quantization", "dtype", "bits", "matmul"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "int4", 4 + 20 / 128, "bf16"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 64}, "int4", 4 + 20 / 64, "bf16"),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, "int8", 8, "bf16"),
        ({"quant_method": "fp8"}, "fp8", 8, "fp8"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8", 8 + 32 / 128**2, "fp8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "int4", 4.5, "bf16"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "group_0": {"weights": {"num_bits": 8, "type": "int"}, "input_activations": {"num_bits": 8}}
                },
            },
            "int8",
            8,
            "int8",
        ),
    ],
)
def test_quantized_layers_keep_a_16_bit_embedding(quantization, dtype, bits, matmul):
    plain = from_config(LLAMA_3_8B)
    model = from_config(LLAMA_3_8B | {"quantization_config": quantization})
    parts = plain.params_by_part
    layers = parts["attention"] + parts["ffn"]
    assert model.dtype == dtype
    assert model.matmul_dtype == matmul
    assert model.params == plain.params
    assert model.weight_bytes() == pytest.approx(layers * bits / 8 + (plain.params - layers) * 2)
    assert model.kv_bytes_per_token() == plain.kv_bytes_per_token()


def test_awq_is_about_four_and_a_quarter_bits_a_weight():
    config = llama(8192, 28672, 80, 64, 8, 128256, quantization_config={"quant_method": "awq", "bits": 4})
    model = from_config(config)
    parts = model.bytes_by_part()
    assert (parts["ffn"] + parts["attention"]) * 8 / 68.45e9 == pytest.approx(4.16, abs=0.02)
    assert model.weight_bytes() == pytest.approx(39.8e9, rel=0.01)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "mixtral", "num_local_experts": 8}, "num_experts_per_tok"),
        ({"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 4}, "4 experts for a token"),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, "qk_nope_head_dim"),
        ({"linear_num_value_heads": 32}, "linear attention"),
        ({"model_type": "mamba"}, "mamba"),
        ({"model_type": None}, "model_type"),
        ({"text_config": {"hidden_size": 8}}, "multimodal"),
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": -5}, "vocab_size"),
        ({"num_hidden_layers": 1e9}, "num_hidden_layers"),
        ({"num_hidden_layers": 50_000}, "layers"),
        ({"num_key_value_heads": 5}, "KV heads"),
        ({"torch_dtype": "float17"}, "float17"),
        ({"quantization_config": {"quant_method": "magic"}}, "magic"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 5}}, "gptq"),
    ],
)
def test_what_is_not_covered_is_refused_by_name(change, named):
    with pytest.raises(RidgelineError, match=named):
        from_config(LLAMA_3_8B | change, "some-model")


# Keys of every family at once, so that each has what it needs until one of them is changed.
EVERYTHING = LLAMA_3_8B | {
    **dict.fromkeys(
        ("num_local_experts", "num_experts", "n_routed_experts", "decoder_sparse_step", "moe_num_experts"), 4
    ),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "n_shared_experts", "first_k_dense_replace", "moe_k"), 2),
    **dict.fromkeys(("moe_num_shared_experts", "moe_layer_start_index", "moe_layer_interval"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp"), 64),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 32),
    **dict.fromkeys(("n_embd", "n_layer", "n_head", "n_positions", "sliding_window_pattern"), 32),
    **dict.fromkeys(("num_layers", "multi_query_group_num", "d_model", "n_heads", "n_layers"), 32),
    "ffn_hidden_size": 64,
    "padded_vocab_size": 1000,
    "no_bias": True,
    "attn_config": {"alibi": True, "kv_n_heads": 4},
    "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    "attention_chunk_size": 128,
    "max_position_embeddings": 2048,
    "num_key_value_heads_per_layer": [4] * 32,
    "use_cla": True,
    "cla_share_factor": 2,
    "mlp_only_layers": [0],
    "moe_layers": [1],
    "topk_method": "noaux_tc",
}
OTHERS = ("quantization_config", "layer_types", "sliding_window", "max_window_layers", "head_dim", "text_config")
KEYS = sorted({*EVERYTHING, *OTHERS, "vision_config"})
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.sampled_from(sorted(FAMILIES)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_built_from_keys_that_are_all_there(family):
    model = from_config(EVERYTHING | {"model_type": family})
    assert model.params == sum(model.params_by_part.values()) >= model.active_params > 0


@settings(deadline=None, max_examples=200)  # a busy machine is no bug
@given(
    st.dictionaries(st.sampled_from(KEYS), JSON | st.integers(0, 64), max_size=4),
    st.sampled_from(sorted({*FAMILIES, *MULTIMODAL})),
)
def test_any_configuration_is_read_or_refused_in_one_sentence(change, family):
    try:
        model = from_config(EVERYTHING | {"model_type": family} | change)
    except RidgelineError:
        return
    assert model.params == sum(model.params_by_part.values())
    assert math.isfinite(model.weight_bytes())
    assert 0 < model.read_bytes(tokens=3.0) <= model.weight_bytes()


def test_lists_by_layer_that_are_alike_are_one_number_and_others_are_refused():
    """Hunyuan-A13B writes its experts so: `"moe_topk": [8, 8, ...]`."""
    alike = EVERYTHING | {"model_type": "hunyuan_v1_moe", "moe_topk": [2] * 32, "moe_intermediate_size": [64] * 32}
    assert from_config(alike).groups == from_config(EVERYTHING | {"model_type": "hunyuan_v1_moe"}).groups
    with pytest.raises(RidgelineError, match="moe_topk that differs by layer"):
        from_config(alike | {"moe_topk": [2, 4]})


def test_windows_of_later_families_are_where_their_configurations_say():
    """Three of four layers of OLMo 3 and EXAONE 4 see a window; the last layer of EXAONE 4 always sees everything."""
    olmo = from_config(EVERYTHING | {"model_type": "olmo3", "sliding_window": 128, "num_hidden_layers": 8})
    exaone = {"model_type": "exaone4", "sliding_window": 128, "sliding_window_pattern": "LLLG", "num_hidden_layers": 7}
    assert {g.window: g.count for g in olmo.groups} == {128: 6, 0: 2}
    assert {g.window: g.count for g in from_config(EVERYTHING | exaone).groups} == {128: 5, 0: 2}


@pytest.mark.parametrize(("spelling", "dtype"), [("torch.bfloat16", "bf16"), ("half", "fp16"), ("FLOAT32", "fp32")])
def test_dtypes_are_known_by_their_usual_spellings(spelling, dtype):
    assert dtype_named(spelling) == dtype


def test_a_multimodal_model_is_its_text_part_and_says_what_is_not_counted():
    text = {k: v for k, v in LLAMA_3_8B.items() if k != "torch_dtype"} | {
        "model_type": "qwen3_vl_text",
        "head_dim": 128,
    }
    outer = {"model_type": "qwen3_vl", "torch_dtype": "float16", "vision_config": {}, "tie_word_embeddings": True}
    model = from_config(outer | {"text_config": text}, "seer")
    alone = from_config(text | {"model_type": "qwen3", "tie_word_embeddings": True, "torch_dtype": "float16"})
    assert (model.groups, model.params, model.dtype) == (alone.groups, alone.params, "fp16")
    assert model.notes == ("seer: the vision tower's weights are not counted",)


FP8 = {"quant_method": "fp8"}


@pytest.mark.parametrize(
    ("listed", "spared"),
    [
        (["lm_head"], False),
        (["*self_attn*"], True),
        (["re:.*self_attn.*", "lm_head"], True),
        ([f"model.layers.{i}.self_attn.q_proj" for i in range(32)], True),
        (["model.layers.31.self_attn.q_proj", "model.layers.31.self_attn.k_proj"], False),
        ("self_attn", False),
    ],
)
def test_attention_stays_in_16_bit_where_it_is_left_out_of_most_layers(listed, spared):
    model = from_config(LLAMA_3_8B | {"quantization_config": FP8 | {"ignored_layers": listed}})
    assert model.bytes_by_part()["attention"] == model.params_by_part["attention"] * (2 if spared else 1)
    assert model.bytes_by_part()["ffn"] == model.params_by_part["ffn"]


# --- from the disk ----------------------------------------------------------------------------------------------------


def test_a_folder_or_its_config_json_is_loaded(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_2_7B))
    assert models.load(folder).params == 6_738_415_616
    assert models.load(folder / "config.json").name == "tiny"
    assert models.load(folder, "Llama-2-7B").name == "Llama-2-7B"


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"vocab_size": ' + b"9" * 5000 + b"}"]
)
def test_a_broken_config_json_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(RidgelineError, match="model configuration"):
        models.load(tmp_path)


def test_a_folder_without_a_model_and_no_file_at_all_are_refused(tmp_path):
    with pytest.raises(RidgelineError, match=r"neither config\.json"):
        models.load(tmp_path)
    with pytest.raises(RidgelineError, match="No such file"):
        models.load(tmp_path / "gone.json")
    with pytest.raises(RidgelineError, match="not in the catalogue"):
        models.load(tmp_path / "gone")
    (tmp_path / "weights.bin").touch()
    with pytest.raises(RidgelineError, match="give a folder"):
        models.load(tmp_path / "weights.bin")


def test_modelopts_own_file_says_how_the_weights_are_stored(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_8B))
    stated = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(stated))
    assert models.load(tmp_path).dtype == "fp8"
    (tmp_path / "hf_quant_config.json").write_text("{")
    with pytest.raises(RidgelineError, match="hf_quant_config"):
        models.load(tmp_path)


def test_a_name_is_looked_up_in_the_catalogue():
    assert models.load("Llama-2-7B").params == 6_738_415_616
    assert models.load("meta-llama/Llama-3.1-8B", "served").name == "served"
