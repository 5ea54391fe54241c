"""Experts, latent attention, windows by layer and shared caches: known counts, and algebra."""

from __future__ import annotations

import numpy as np
import pytest

from harness.theory import catalogue, hardware
from harness.theory.architecture import from_config
from harness.theory.sweep import sweep
from tests.test_theory_architecture import llama

MIXTRAL = llama(4096, 14336, 32, 32, 8, 32000, model_type="mixtral", num_local_experts=8, num_experts_per_tok=2)
DEEPSEEK = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3,
    "topk_method": "noaux_tc",
}
DEEPSEEK_V3 = llama(7168, 18432, 61, 128, 128, 129280, model_type="deepseek_v3") | DEEPSEEK
GPT_OSS = {"model_type": "gpt_oss", "head_dim": 64, "num_experts_per_tok": 4, "sliding_window": 128}
GPT_OSS_120B = llama(2880, 2880, 36, 64, 8, 201088, num_local_experts=128) | GPT_OSS
HUNYUAN = {"model_type": "hunyuan", "num_experts": 16, "moe_topk": 1, "num_shared_expert": 1, "use_cla": True}


def test_experts_are_parameters_of_which_a_token_meets_a_few():
    model = from_config(MIXTRAL)
    assert (model.params, model.active_params) == (46_702_792_704, 12_879_925_248)
    parts = model.params_by_part
    assert parts["experts"] == 32 * 8 * 3 * 4096 * 14336
    assert parts["ffn"] == 0
    assert model.matmul_flops_per_token == 2 * (parts["attention"] + parts["router"] + parts["experts"] / 4)
    assert from_config(DEEPSEEK_V3).params == 671_026_419_200
    assert from_config(GPT_OSS_120B).params == 116_829_156_672


def test_a_step_reads_the_experts_it_meets_and_a_large_one_all_of_them():
    model = from_config(MIXTRAL)
    always = model.weight_bytes() - model.bytes_by_part()["experts"] - model.bytes_by_part()["embedding"]
    reads = model.read_bytes(tokens=np.array([1.0, 2.0, 1e6]))
    expert = 2 * 32 * 3 * 4096 * 14336
    # One token meets two of eight; the second meets each of the six others with 1/4.
    assert reads == pytest.approx([always + 2 * expert, always + (2 + 6 / 4) * expert, always + 8 * expert])


def test_expected_distinct_experts_are_what_random_routing_gives():
    group = from_config(DEEPSEEK_V3).groups[-1]
    rng = np.random.default_rng(5)
    for tokens in (1, 8, 64):
        met = [len({e for _ in range(tokens) for e in rng.permutation(256)[:8]}) for _ in range(200)]
        assert group.distinct_experts(float(tokens)) == pytest.approx(np.mean(met), rel=0.02)


def test_where_some_experts_are_liked_better_fewer_are_met():
    """Poisson visits at rates drawn from a gamma distribution, whose mean lets one token meet its eight."""
    group, shape, rng = from_config(DEEPSEEK_V3).groups[-1], 0.8, np.random.default_rng(5)
    mean = shape * ((1 - 8 / 256) ** (-1 / shape) - 1)
    rates = rng.gamma(shape, mean / shape, 200_000)
    for tokens in (1.0, 8.0, 64.0):
        met = 256 * np.mean(1 - np.exp(-rates * tokens))
        assert group.distinct_experts(tokens, shape) == pytest.approx(met, rel=0.02)
    assert group.distinct_experts(1.0, shape) == pytest.approx(8) == pytest.approx(group.distinct_experts(1.0))
    assert group.distinct_experts(64.0, 1e6) == pytest.approx(group.distinct_experts(64.0), rel=1e-3)


def test_the_steps_of_gpt_oss_grow_less_with_the_batch_than_even_routing_has_it():
    """gpt-oss-120b on eight H100s, vLLM, 922 tokens in and out (InferenceX pull request 828): 3.72 ms with 4, 7.36 with 64."""
    h100 = hardware.find("H100-SXM")
    for batch, ms in ((4, 3.72), (16, 4.83), (64, 7.36)):
        found = sweep(catalogue.find("openai/gpt-oss-120b"), h100, batch=batch, input_tokens=922, output_tokens=922, mode="closed",
                      framework="vllm", tp=8)  # fmt: skip
        assert found.columns["itl_s"].value[0] * 1e3 == pytest.approx(ms, rel=0.1)


def test_latent_attention_keeps_576_elements_a_layer_and_token_for_all_heads():
    model = from_config(DEEPSEEK_V3)
    assert model.kv_bytes_per_token() == 2 * 61 * (512 + 64)
    assert model.kv_heads == 1, "every accelerator of a tensor-parallel group holds it whole"
    assert [(g.count, g.experts) for g in model.groups] == [(3, 0), (58, 256)]


def test_latent_attention_is_expanded_in_prefill_and_absorbed_in_decoding():
    model = from_config(DEEPSEEK_V3)
    assert model.attention_flops(1000.0) == 61 * 2 * 128 * (576 + 512) * 1000.0
    assert model.prefill_attention_flops(1.0) == 61 * 2 * 128 * (192 + 128)
    # The expansion of the latent, or its absorption into query and output: the same matrices either way.
    layer = model.groups[0]
    assert layer.attention_matmul == 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168


def test_decoding_with_latent_attention_reads_at_an_intensity_of_hundreds():
    model = from_config(DEEPSEEK_V3)
    assert model.attention_flops(1.0) / model.kv_read_bytes(1.0) == pytest.approx(242, abs=1)


def test_windows_alternate_by_layer():
    model = from_config(GPT_OSS_120B)
    assert [(g.count, g.window) for g in model.groups] == [(18, 128), (18, 0)]
    full = 2 * 2 * 8 * 64
    assert model.kv_bytes(1000.0) == 18 * full * (128 + 1000)


def test_layers_that_share_a_cache_keep_nothing_and_read_it_each():
    model = from_config(llama(6400, 18304, 64, 80, 8, 128512, tie_word_embeddings=True, use_qk_norm=True) | HUNYUAN)
    assert model.params == pytest.approx(389e9, rel=2e-3)
    assert model.active_params == pytest.approx(52e9, rel=0.02)
    assert model.kv_read_bytes(100.0) == 2 * model.kv_bytes(100.0)


@pytest.mark.parametrize("config", [MIXTRAL, DEEPSEEK_V3, GPT_OSS_120B, MIXTRAL | {"sliding_window": 5}])
def test_means_and_sums_over_a_growing_context_are_exact(config):
    model = from_config(config)
    contexts = np.arange(3.0, 18.0)
    assert model.mean_kv_read_bytes(3.0, 17.0) == pytest.approx(np.mean(model.kv_read_bytes(contexts)))
    assert model.mean_attention_flops(3.0, 17.0) == pytest.approx(np.mean(model.attention_flops(contexts)))
    whole = model.prefill_attention_flops(np.array([20.0, 8.0]))
    assert whole[1] + model.prefill_attention_flops(12.0, past=8.0) == pytest.approx(whole[0]), "chunks add up"


def test_mx_4_bit_is_for_experts_only():
    model = from_config(GPT_OSS_120B | {"quantization_config": {"quant_method": "mxfp4"}})
    parts, params = model.bytes_by_part(), model.params_by_part
    assert parts["experts"] == params["experts"] * 4.25 / 8
    assert parts["attention"] == 2 * params["attention"]
    # The files on the hub take 65.2 GB; biases of experts stay in 16 bit there, and are 0.1 of it.
    assert model.weight_bytes() == pytest.approx(65.2e9, rel=5e-3)


def test_fp8_spares_the_router():
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    model = from_config(DEEPSEEK_V3 | {"quantization_config": fp8})
    assert model.bytes_by_part()["router"] == 2 * model.params_by_part["router"]
    assert model.weight_bytes() == pytest.approx(672.9e9, rel=2e-3)
