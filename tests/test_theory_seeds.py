"""The seeds' arithmetic: every figure of the articles, and what it should have been."""

from __future__ import annotations

import pytest

from harness.records import RidgelineError
from harness.theory import seeds
from harness.theory.seeds import GPUS, H100_BYTES_PER_S, H100_FLOPS, LLAMA_2_7B_PARAMS

WEIGHTS = 2 * LLAMA_2_7B_PARAMS
MS = 1e-3


def test_the_a10_does_208_operations_per_byte():
    assert seeds.ops_to_byte(125e12, 600e9) == pytest.approx(208.3, abs=0.05)


def test_attention_intensity_is_62_for_prefill_and_the_group_size_for_decoding():
    assert seeds.attention_intensity(4096, 128) == pytest.approx(62.4, abs=0.05)
    assert seeds.decode_attention_intensity(32, 32) == 1
    assert seeds.decode_attention_intensity(32, 8) == 4
    assert seeds.decode_attention_intensity(64, 8) == 8
    assert seeds.flash_attention_intensity(4096, 128) == pytest.approx(2060, abs=1)
    assert seeds.flash_attention_intensity(4096, 128, causal=True) == pytest.approx(1030, abs=1)


@pytest.mark.parametrize(
    ("model", "layers", "kv_width", "expected"),
    [
        ("Llama-2-7B", 32, 4096, 524_288),
        ("Llama-2-13B", 40, 5120, 819_200),
        ("Llama-3-8B", 32, 8 * 128, 131_072),
        ("Llama-3-70B", 80, 8 * 128, 327_680),
    ],
)
def test_kv_bytes_per_token(model, layers, kv_width, expected):
    assert seeds.kv_bytes_per_token(layers, kv_width) == expected


@pytest.mark.parametrize(
    ("gpu", "token_ms", "prefill_ms", "with_n_s", "with_n_less_1_s"),
    [
        ("T4", 46.7, 75, 7.08, 7.03),
        ("A10", 23.3, 39, 3.54, 3.52),
        ("A100-SXM-80GB", 6.87, 16, 1.046, 1.039),
    ],
)
def test_350_in_and_150_out_of_llama_2_7b(gpu, token_ms, prefill_ms, with_n_s, with_n_less_1_s):
    token = seeds.time_per_token_s(WEIGHTS, GPUS[gpu].bytes_per_s)
    prefill = seeds.prefill_s(LLAMA_2_7B_PARAMS, 350, GPUS[gpu].flops)
    assert token == pytest.approx(token_ms * MS, rel=2e-3)
    assert round(prefill / MS) == prefill_ms
    assert seeds.generation_s(prefill, token, 150, first_from_prefill=False) == pytest.approx(with_n_s, abs=6e-3)
    assert seeds.generation_s(prefill, token, 150) == pytest.approx(with_n_less_1_s, abs=6e-3)


@pytest.mark.parametrize(
    ("gpu", "printed_s", "token_ms", "prefill_ms"),
    [("T4", 6.98, 46, 75), ("A10", 3.49, 23, 39), ("A100-SXM-80GB", 0.92, 6, 16)],
)
def test_the_articles_totals_follow_from_its_truncated_milliseconds(gpu, printed_s, token_ms, prefill_ms):
    assert int(seeds.time_per_token_s(WEIGHTS, GPUS[gpu].bytes_per_s) / MS) == token_ms
    total = seeds.generation_s(prefill_ms * MS, token_ms * MS, 150, first_from_prefill=False)
    assert total == pytest.approx(printed_s, abs=6e-3)


@pytest.mark.parametrize(
    ("gpu", "printed_s", "printed_usd", "corrected_usd"),
    [("T4", 6.98, 0.00122, 0.00124), ("A10", 3.49, 0.00117, 0.00119), ("A100-SXM-80GB", 0.92, 0.00157, 0.00178)],
)
def test_cost_of_a_request(gpu, printed_s, printed_usd, corrected_usd):
    assert seeds.request_usd(printed_s, GPUS[gpu].usd_per_min) == pytest.approx(printed_usd, abs=6e-6)
    assert seeds.request_usd(_total_s(gpu), GPUS[gpu].usd_per_min) == pytest.approx(corrected_usd, abs=1e-5)


def _total_s(gpu):
    token = seeds.time_per_token_s(WEIGHTS, GPUS[gpu].bytes_per_s)
    return seeds.generation_s(seeds.prefill_s(LLAMA_2_7B_PARAMS, 350, GPUS[gpu].flops), token, 150, False)


def test_the_a10_is_the_cheapest_and_the_a100_costs_less_than_twice_the_t4():
    usd = {gpu: seeds.request_usd(_total_s(gpu), row.usd_per_min) for gpu, row in GPUS.items()}
    printed = {"T4": 6.98, "A10": 3.49, "A100-SXM-80GB": 0.92}
    by_print = {gpu: seeds.request_usd(s, GPUS[gpu].usd_per_min) for gpu, s in printed.items()}
    assert min(usd, key=usd.get) == min(by_print, key=by_print.get) == "A10"
    assert usd["A100-SXM-80GB"] / usd["T4"] == pytest.approx(1.44, abs=5e-3)
    assert by_print["A100-SXM-80GB"] / by_print["T4"] == pytest.approx(1.28, abs=5e-3)
    # "~10x" is the price of a minute, not of a request.
    assert GPUS["A100-SXM-80GB"].usd_per_min / GPUS["T4"].usd_per_min == pytest.approx(9.7, abs=0.05)


def test_an_a10_has_room_for_four_sequences_of_4096_tokens():
    spare = seeds.spare_bytes(24e9, WEIGHTS)
    assert spare == 10e9
    tokens = seeds.kv_tokens(spare, seeds.kv_bytes_per_token(32, 4096))
    assert tokens == 19_073
    assert int(10 / 0.00052) == 19_230, "the article divides by a rounded 0.00052 GB"
    assert seeds.batch_that_fits(tokens, 4096) == seeds.batch_that_fits(19_230, 4096) == 4


def test_no_spare_memory_holds_no_tokens():
    assert seeds.kv_tokens(-1.0, 1.0) == 0


def test_the_critical_batch_of_an_h100_is_295_and_591_only_with_sparsity():
    assert seeds.critical_batch(H100_FLOPS["SXM, dense"], H100_BYTES_PER_S) == pytest.approx(295, abs=0.5)
    assert seeds.critical_batch(H100_FLOPS["SXM, sparse (the seed)"], H100_BYTES_PER_S) == pytest.approx(591, abs=0.5)
    assert H100_FLOPS["NVL, sparse (the seed)"] == 2 * H100_FLOPS["NVL, dense"]


def test_the_plane_rises_to_the_critical_batch_and_stays_there():
    flops, rate, params = 989.4e12, H100_BYTES_PER_S, 7e9
    critical = seeds.critical_batch(flops, rate)
    peak = seeds.peak_throughput(params, flops)
    assert seeds.throughput(params, critical / 2, flops, rate) == pytest.approx(peak / 2)
    assert seeds.throughput(params, critical, flops, rate) == pytest.approx(peak)
    assert seeds.throughput(params, 2 * critical, flops, rate) == peak


def test_llama_2_13b_at_4k_has_3_gb_of_kv_beside_26_gb_of_weights():
    kv = 4000 * seeds.kv_bytes_per_token(40, 5120)
    assert kv == pytest.approx(3.3e9, rel=0.01)
    assert kv < 2 * 13e9 / 7, 'seed 001 calls them "comparable"'


def test_loading_is_bytes_over_disk_bandwidth():
    assert seeds.load_s(WEIGHTS, 2e9) == 7.0


def test_training_takes_three_forward_passes_and_four_copies_of_the_weights():
    assert seeds.training_flops(7e9, 1000) == 3 * seeds.prefill_s(7e9, 1000, flops=1.0)
    assert sum(seeds.training_bytes(7e9)) == 4 * WEIGHTS


def test_training_memory_in_mixed_precision_is_16_bytes_a_parameter():
    assert sum(seeds.mixed_precision_bytes(7.5e9)) == 120e9, "ZeRO's own example"


def test_activations_of_gpt_3_are_those_of_the_paper():
    """Korthikanti et al., arXiv:2205.05198: 5·a·s/h is 80 for GPT-3, so the scores are 70 % of a layer's activations."""
    with_scores = seeds.activation_bytes(1, 2048, 12288, 96, heads=96)
    without = seeds.activation_bytes(1, 2048, 12288, 96)
    assert with_scores / without == pytest.approx((34 + 80) / 34)
    assert seeds.activation_bytes(4, 2048, 12288, 96) == 4 * without
    assert seeds.inference_activation_bytes(350, 11008) == 2 * 350 * 11008


def test_an_output_token_costs_critical_batch_over_batch_input_tokens():
    a10 = GPUS["A10"]
    for batch, ratio in ((1, 208.3), (69.44, 3.0), (208.4, 1.0), (1000, 1.0)):
        usd = seeds.token_usd(LLAMA_2_7B_PARAMS, batch, a10.flops, a10.bytes_per_s, a10.usd_per_min * 60)
        assert usd.output / usd.input == pytest.approx(ratio, rel=1e-3)
    alone = seeds.token_usd(LLAMA_2_7B_PARAMS, 1, a10.flops, a10.bytes_per_s, a10.usd_per_min * 60)
    assert alone.request(350, 150) == pytest.approx(seeds.request_usd(_total_s("A10"), a10.usd_per_min))
    assert seeds.usd_per_million_tokens(3.6, 1000.0) == 1.0


def test_own_hardware_breaks_even_where_it_serves_its_price_in_requests():
    api = seeds.TokenUsd(input=1.0, output=3.0)
    assert api.request(1000, 100) == pytest.approx(0.0013)
    # 3.6 $/h is 0.001 $/s: at 2 requests/s of 0.001 $ each, half of them pay for it.
    assert seeds.break_even_share(3.6, 2.0, 0.001) == pytest.approx(0.5)
    a100 = GPUS["A100-SXM-80GB"]
    own = seeds.token_usd(LLAMA_2_7B_PARAMS, 16, a100.flops, a100.bytes_per_s, a100.usd_per_min * 60)
    prompt_heavy, chatty = ((3000, 50), (50, 3000))

    def share(request):
        return own.request(*request) / seeds.TokenUsd(0.5, 1.5).request(*request)

    assert share(prompt_heavy) < share(chatty), "[002]: self-hosting pays for prompt-heavy tasks"


def test_without_a_cache_each_token_takes_the_whole_sequence_again():
    params, flops, rate = 1.0, 2.0, 2.0  # a weight is read in 1 s, a token computed in 1 s
    assert seeds.recompute_s(params, 1, 4, flops, rate) == 1 + 2 + 3 + 4
    assert seeds.cached_s(params, 1, 4, flops, rate) == 4
    assert seeds.recompute_s(params, 1, 4, 1e9, rate) == seeds.cached_s(params, 1, 4, 1e9, rate) == 4


@pytest.mark.parametrize(("gpu", "ratio"), [("T4", 2.4), ("A10", 2.5), ("A100-SXM-80GB", 3.3)])
def test_a_thousand_tokens_without_a_cache_take_two_to_three_times_as_long_not_five(gpu, ratio):
    args = (LLAMA_2_7B_PARAMS, 1, 1000, GPUS[gpu].flops, GPUS[gpu].bytes_per_s)
    assert seeds.recompute_s(*args) / seeds.cached_s(*args) == pytest.approx(ratio, abs=0.06)


def test_blocks_round_up_and_reservations_hold_the_longest():
    lengths = [1, 16, 17, 500]
    assert seeds.paged_slots(lengths) == 16 + 16 + 32 + 512
    assert seeds.contiguous_slots(lengths, 4096) == 4 * 4096
    assert seeds.wasted_share(lengths, seeds.paged_slots(lengths)) == pytest.approx(1 - 534 / 576)
    assert seeds.wasted_share(lengths, seeds.contiguous_slots(lengths, 4096)) > 0.96
    assert seeds.paged_slots(lengths, block=1) == sum(lengths)
    assert seeds.paged_slots([]) == 0
    # On average half a block is empty: under 4 % of 350 + 150 tokens, as PagedAttention claims.
    uniform = list(range(401, 601))
    assert seeds.wasted_share(uniform, seeds.paged_slots(uniform)) == pytest.approx(7.5 / 508, abs=2e-3)
    with pytest.raises(RidgelineError, match="600 tokens"):
        seeds.contiguous_slots(uniform, 512)
    with pytest.raises(RidgelineError, match="block"):
        seeds.paged_slots([1], 0)


# --- scaling-book, inference chapter ----------------------------------------------------------------------------------


def test_scaling_book_30b_int8_on_16_tpu_v5e():
    rate, flops, kv = 16 * 819e9, 16 * 197e12, 8192 * 100e3
    assert seeds.decode_step_s(30e9, 4 * kv, rate, 30e9, 4, flops) == pytest.approx(2.5e-3, abs=5e-5)
    assert seeds.decode_step_s(30e9, 256 * kv, rate, 30e9, 256, flops) == pytest.approx(21e-3, rel=0.01)
    assert (30e9 + 256 * kv) / rate == pytest.approx(18.3e-3, abs=5e-5), "the lower bound only: no overlap in a step"


@pytest.mark.parametrize(
    ("kv_bytes", "rate", "at_1_ms", "at_240_ms"),
    [
        (6.7e9, 820e9, 4.98, 249),
        (6.7e9 / 5, 820e9, 4.17, 52.99),
        (8192 * 819_200, 819e9, 4.99, 249.8),
        (8192 * 819_200 / 5, 819e9, 4.17, 53.1),
    ],
)
def test_scaling_book_llama_2_13b_on_8_tpu_v5e(kv_bytes, rate, at_1_ms, at_240_ms):
    assert seeds.decode_step_s(26e9, kv_bytes, 8 * rate) == pytest.approx(at_1_ms * MS, rel=2e-3)
    assert seeds.decode_step_s(26e9, 240 * kv_bytes, 8 * rate) == pytest.approx(at_240_ms * MS, rel=1e-3)


def test_a_step_of_no_sequences_is_refused():
    with pytest.raises(RidgelineError, match="batch"):
        seeds.decode_step_s(1.0, 0.0, 1.0, batch=0)
