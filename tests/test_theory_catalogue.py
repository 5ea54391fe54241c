"""Models by name: each count is the published one, and each usual spelling finds its model."""

from __future__ import annotations

import math

import pytest

from harness.records import RidgelineError
from harness.theory import catalogue
from harness.theory.architecture import FAMILIES, MULTIMODAL, from_config

ENTRIES = catalogue.entries()
# Families of which no exact published count was found for the models in the catalogue.
ROUNDED = {"aquila", "deci", "hunyuan", "baichuan", "dbrx", "nemotron", "gemma4_text"}


@pytest.mark.parametrize("fused", [True, False])
def test_the_matrices_that_are_measured_of_a_layer_are_of_its_size_and_in_whole_blocks(fused):
    for model in (catalogue.find(entry.id) for entry in ENTRIES):
        for layer in model.groups:
            shapes = layer.matrices(model.hidden, fused)
            assert all(inner % 32 == 0 and outer > 1 for inner, outer in shapes), (model.name, shapes)
            entries = layer.attention_matmul + (layer.ffn_matmul or layer.expert_matmul)
            assert sum(inner * outer for inner, outer in shapes) == pytest.approx(entries, rel=0.1), model.name


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.id)
def test_the_parameter_count_is_the_published_one(entry):
    model = entry.model()
    if entry.params is None:
        assert math.isnan(entry.stated) == (entry.source == "not stated")
        assert math.isnan(entry.stated) or model.params == pytest.approx(entry.stated, rel=0.02)
        return
    assert model.params + entry.not_parameters == entry.params
    assert entry.source
    assert bool(entry.not_parameters) == bool(entry.what_else)
    assert sum(model.params_by_part.values()) == model.params
    assert sum(model.bytes_by_part().values()) == model.weight_bytes()


def test_every_family_has_a_published_count():
    counted = {entry.config["model_type"] for entry in ENTRIES if entry.params}
    covered = {MULTIMODAL.get(family, family) for family in counted}
    assert covered == set(FAMILIES) - ROUNDED
    assert {entry.config["model_type"] for entry in ENTRIES} >= ROUNDED
    assert sum(entry.params is not None for entry in ENTRIES) > 0.8 * len(ENTRIES)


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [
        ("Mixtral-8x7B", 46.7, 12.9),
        ("DeepSeek-V3", 671, 37),
        ("DeepSeek-V2", 236, 21),
        ("Qwen3-235B-A22B", 235, 22),
        ("Qwen3-30B-A3B", 30.5, 3.3),
        ("Qwen1.5-MoE-A2.7B", 14.3, 2.7),
        ("Phi-3.5-MoE", 41.9, 6.6),
        ("Llama-4-Scout", 109, 17),
        ("Llama-4-Maverick", 400, 17),
        ("OLMoE-1B-7B", 6.9, 1.3),
        ("Kimi-K2", 1026, 32),
        ("Hunyuan-Large", 389, 52),
        ("dbrx-base", 132, 36),
        ("mpt-30b", 30, 30),
        ("Nemotron-4-340B", 341, 341),
        ("Baichuan2-7B", 7.5, 7.5),
        ("ERNIE-4.5-300B-A47B", 300, 47),
        ("Hunyuan-A13B-Instruct", 80.4, 13),
        ("deepseek-moe-16b", 16.4, 2.8),
    ],
)
def test_active_parameters_are_those_that_the_makers_state(name, billions, active):
    model = catalogue.find(name)
    assert model.params / 1e9 == pytest.approx(billions, rel=5e-3)
    assert model.active_params / 1e9 == pytest.approx(active, rel=0.03)


# As they stand in tables of measurements.
@pytest.mark.parametrize(
    ("name", "id"),
    [
        ("Llama-3-8B", "meta-llama/Meta-Llama-3-8B"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "meta-llama/Meta-Llama-3-8B"),
        ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B"),
        ("llama3_1-8b", "meta-llama/Llama-3.1-8B"),
        ("llama_v3_8b", "meta-llama/Meta-Llama-3-8B"),
        ("TheBloke/Mistral-7B-v0.1-GGUF", "mistralai/Mistral-7B-v0.1"),
        ("gpt-6.7b", "gpt3-6.7b"),
        ("vicuna-13b-v1.5", "meta-llama/Llama-2-13b-hf"),
        ("LLAMA 3.1 8B", "meta-llama/Llama-3.1-8B"),
        ("llama2-7b", "meta-llama/Llama-2-7b-hf"),
        ("Llama-2-70b", "meta-llama/Llama-2-70b-hf"),
        ("Llama-3.1-405B", "meta-llama/Llama-3.1-405B"),
        ("Llama-3.3-70B", "meta-llama/Llama-3.3-70B-Instruct"),
        ("meta-llama/Llama-3.1-70B", "meta-llama/Llama-3.1-70B"),
        ("huggyllama/llama-7b", "huggyllama/llama-7b"),
        ("GPT-J 6B", "EleutherAI/gpt-j-6b"),
        ("Falcon 180B", "tiiuae/falcon-180B"),
        ("Mistral-7B", "mistralai/Mistral-7B-v0.1"),
        ("Mistral-7B-Instruct-v0.3", "mistralai/Mistral-7B-v0.3"),
        ("Mixtral-8x7B", "mistralai/Mixtral-8x7B-v0.1"),
        ("Qwen2-7B", "Qwen/Qwen2-7B"),
        ("Qwen/Qwen1.5-7B", "Qwen/Qwen1.5-7B"),
        ("Qwen3-30B-A3B", "Qwen/Qwen3-30B-A3B"),
        ("Qwen3-235B-A22B-Instruct-2507", "Qwen/Qwen3-235B-A22B"),
        ("deepseek-ai/DeepSeek-V3-0324", "deepseek-ai/DeepSeek-V3"),
        ("DeepSeek-R1", "deepseek-ai/DeepSeek-V3"),
        ("DeepSeek-R1-Distill-Llama-70B", "meta-llama/Llama-3.3-70B-Instruct"),
        ("openai/gpt-oss-120b", "openai/gpt-oss-120b"),
        ("bigscience/bloom-7b1", "bigscience/bloom-7b1"),
        ("facebook/opt-6.7b", "facebook/opt-6.7b"),
        ("BAAI/Aquila-7B", "BAAI/Aquila-7B"),
        ("Deci/DeciLM-7B", "Deci/DeciLM-7B"),
        ("gemma-3-27b-it", "google/gemma-3-27b-pt"),
        ("google/gemma-4-31B-it", "google/gemma-4-31B"),
        ("deepseek-r1:32b", "Qwen/Qwen2.5-32B"),
        ("Yi-1.5-34B-Chat", "01-ai/Yi-34B"),
        ("LLaMA v2 7B", "meta-llama/Llama-2-7b-hf"),
        ("gptj", "EleutherAI/gpt-j-6b"),
        ("Qwen-72B-Chat", "Qwen/Qwen1.5-72B"),
        ("Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"),
        ("Qwen3-VL-235B-A22B-Thinking", "Qwen/Qwen3-VL-235B-A22B-Instruct"),
        ("Olmo-3-32B-Think", "allenai/Olmo-3-1125-32B"),
        ("GLM-4.7-Flash", "zai-org/GLM-4.7-Flash"),
        ("GLM-Z1-32B", "zai-org/GLM-4-32B-0414"),
        ("Seed-OSS-36B-Instruct", "ByteDance-Seed/Seed-OSS-36B-Base"),
        ("Kimi-K2-Instruct-0905", "moonshotai/Kimi-K2-Instruct"),
        ("granite-4.1-8b", "ibm-granite/granite-4.1-8b"),
    ],
)
def test_near_variants_of_a_name_find_the_model(name, id):
    found, expected = catalogue.find(name), next(entry for entry in ENTRIES if entry.id == id).model()
    assert (found.name, found.params, found.groups) == (name, expected.params, expected.groups)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.id)
def test_every_name_finds_its_own_row(entry):
    for name in entry.names:
        assert catalogue.find(name).groups == entry.model().groups


@pytest.mark.parametrize(
    ("name", "dtype", "bits"),
    [("Qwen/Qwen3-235B-A22B-FP8", "fp8", 8), ("Llama-3.1-8B-Instruct-AWQ", "int4", 4.16), ("Llama-3.3-70B-FP4", "nvfp4", 4.5),
     ("amd/Llama-3.1-405B-Instruct-FP8-KV", "fp8", 8), ("Meta-Llama-3.1-8B-Instruct-quantized.w8a8", "int8", 8),
     ("Qwen2.5-7B-Instruct-GPTQ", "int4", 4.16), ("Llama-3.3-70B-Instruct-NVFP4", "nvfp4", 4.5)],
)  # fmt: skip
def test_a_name_tells_how_the_weights_are_stored(name, dtype, bits):
    model = catalogue.find(name)
    part = "experts" if model.moe else "ffn"
    assert model.dtype == dtype
    assert model.bytes_by_part()[part] * 8 / model.params_by_part[part] == pytest.approx(bits, abs=0.01)


def test_an_unknown_name_lists_near_ones():
    with pytest.raises(RidgelineError, match="Meta-Llama-3-8B"):
        catalogue.find("Lama-3-8B")
    for name in ("", "///", "nothing like it", "Llama-3.1-9B", "Qwen9-7B"):
        with pytest.raises(RidgelineError, match="not in the catalogue"):
            catalogue.find(name)


def test_a_vision_tower_is_kept_in_memory_and_never_read():
    model = catalogue.find("gemma-3-27b-it")
    assert model.params_by_part["other"] == model.params - model.active_params > 4e8
    assert model.weight_bytes() - model.read_bytes() == 2 * model.params_by_part["other"]


def test_layers_without_a_window_have_heads_of_their_own():
    """Gemma 4, by its model card: 30.7 B; 25.2 B of which 3.8 B work on a token."""
    dense, routed = catalogue.find("gemma-4-31b-it"), catalogue.find("gemma-4-26b-a4b-it")
    assert dense.params == pytest.approx(30.7e9, rel=0.002) and routed.params == pytest.approx(25.2e9, rel=0.002)
    assert routed.active_params == pytest.approx(3.8e9, rel=0.01)
    sliding, full = dense.groups
    assert (sliding.count, sliding.kv_heads, sliding.head_dim) == (50, 16, 256)
    assert (full.count, full.kv_heads, full.head_dim, full.window) == (10, 4, 512, 0)
    small = catalogue.config_of("gemma-4-31b") | {"hidden_size_per_layer_input": 256}
    with pytest.raises(RidgelineError, match="hidden_size_per_layer_input"):
        from_config(small, "E2B")
