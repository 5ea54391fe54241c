"""The refined roofline: known answers, and what must hold for every point."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.records import LIMITS, RidgelineError
from harness.theory import catalogue, frameworks, hardware
from harness.theory.architecture import from_config
from harness.theory.predict import plane, predict

SHAPE = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
}
LLAMA_3_8B = from_config(SHAPE, "Llama-3-8B")
LLAMA_2_7B = from_config(
    SHAPE | {"intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000, "torch_dtype": "float16"},
    "Llama-2-7B",
)
WINDOWED = from_config(SHAPE | {"model_type": "mistral", "sliding_window": 512, "vocab_size": 32000}, "windowed")
A10, T4, A100 = hardware.find("A10"), hardware.find("T4"), hardware.find("A100-SXM-80GB")
CPU = hardware.from_row({"name": "cpu", "flops": {"fp32": 1.5e11}, "mem_bytes": 64e9, "bytes_per_s": 4e10})

MODELS = st.sampled_from([LLAMA_3_8B, LLAMA_2_7B, WINDOWED])
GPUS = st.sampled_from([hardware.find(n) for n in ("A10", "A100-SXM-80GB", "H100-SXM", "L40S", "MI300X", "TPU-v5p")])
POINTS = st.fixed_dictionaries(
    {"batch": st.integers(1, 2000), "input_tokens": st.integers(1, 4000), "output_tokens": st.integers(1, 2000)}
)
STANDARD = {"batch": 1, "input_tokens": 350, "output_tokens": 150}


def at(model=LLAMA_2_7B, gpu=A100, **point):
    return predict(model, gpu, **(STANDARD | point))


# --- known answers ----------------------------------------------------------------------------------------------------


def test_one_stream_of_llama_2_7b_reads_its_weights_once_a_token():
    itl = at().itl_s
    read, cache = (6_738_415_616 - 32000 * 4096) * 2 / 2039e9, 425 * 524_288 / 2039e9
    assert itl.bound == pytest.approx(read + cache, rel=1e-3), "at the data sheet's rate nothing is faster"
    assert 0.6 < read / itl.terms["weights"] < 0.9, "kernels reach most of it (theory.md: 0.66 measured at M = 1)"
    assert itl.terms["kv cache"] > cache
    assert itl.limit == "memory_bandwidth"


def test_a_prompt_of_350_tokens_is_computed():
    ttft = at(gpu=A10).ttft_s
    assert ttft.limit == "compute"
    assert ttft.bound == pytest.approx(0.039, rel=0.07), "seed 003's 39 ms, less the lm_head of 349 tokens"
    assert 1.2 < ttft.value / ttft.bound < 3


def test_a_prompt_of_one_token_is_bound_by_reading_the_weights():
    assert at(input_tokens=1, mode="static").ttft_s.limit == "memory_bandwidth"
    assert at(input_tokens=1).ttft_s.limit == "latency", "of a server: what a request costs before its first pass"


def test_the_seed_stands_beside_the_refined_value():
    seed = at(gpu=A10).seed
    assert seed["itl_s"] == pytest.approx(6.738e9 * 2 / 600e9, rel=1e-3)
    assert seed["ttft_s"] == pytest.approx(350 * 2 * 6.738e9 / 125e12, rel=1e-3)
    assert seed["e2e_s"] == pytest.approx(seed["ttft_s"] + 150 * seed["itl_s"]), "the article's n steps"


def test_llama_3_8b_in_16_bit_does_not_fit_a_t4_and_says_so():
    point = at(LLAMA_3_8B, T4)
    assert (point.fits, point.limit, point.largest_batch) == (False, "capacity", 0)
    assert math.isnan(point.e2e_s.value)
    assert "does not fit" in point.e2e_s.because
    assert at(LLAMA_3_8B, T4, dtype="int4").fits
    assert point.as_dict()["e2e_s"]["value"] is None


def test_the_largest_batch_fills_nine_tenths_of_the_memory():
    point = at(LLAMA_3_8B, A10)
    usable = 23028 * 2**20  # what nvidia-smi shows for an A10
    spare = 0.9 * usable - 2 * 8_030_261_248
    assert 0.7 * spare / (500 * 131_072) < point.largest_batch < spare / (500 * 131_072), "a pass needs room too"


def test_beyond_the_largest_batch_requests_wait_for_memory():
    largest = at(LLAMA_3_8B, A10).largest_batch
    fits, beyond = (at(LLAMA_3_8B, A10, batch=b) for b in (largest, 2 * largest))
    assert fits.limit != "capacity"
    assert beyond.limit == beyond.e2e_s.limit == "capacity"
    assert beyond.itl_s.value == pytest.approx(fits.itl_s.value)
    request_s = frameworks.find("", A10).request_s  # once, not for each round
    assert beyond.output_tokens_per_s.value == pytest.approx(fits.output_tokens_per_s.value, rel=1e-3)
    assert beyond.ttft_s.terms["waiting for memory"] == pytest.approx((fits.e2e_s.value - request_s) / 2)


def test_one_output_token_comes_from_the_prefill():
    point = at(output_tokens=1)
    assert math.isnan(point.itl_s.value)
    assert point.e2e_s.value == point.ttft_s.value


def test_the_plane_bends_at_the_ridge():
    p = plane(LLAMA_3_8B, A10, input_tokens=350, output_tokens=150)
    assert p["ridge_batch"] == pytest.approx(208.3, abs=0.1), "in 16 bit it is the ops:byte ratio"
    for roof, memory, compute, batch in zip(
        p["roof_tokens_per_s"], p["memory_roof_tokens_per_s"], p["compute_roof_tokens_per_s"], p["batch"], strict=True
    ):
        assert roof <= memory * (1 + 1e-9)
        assert roof <= compute
        if batch <= p["ridge_batch"] / 4:
            assert roof > memory / 2
    assert p["largest_batch"] == at(LLAMA_3_8B, A10).largest_batch
    json.dumps(p, allow_nan=False)


# --- dtypes -----------------------------------------------------------------------------------------------------------


def test_a_dtype_the_hardware_lacks_is_computed_in_the_nearest_and_said_so():
    for gpu, dtype, rate in [(T4, "bf16", "fp16"), (A100, "fp8", "fp16"), (CPU, "bf16", "fp32")]:
        point = at(LLAMA_2_7B, gpu, dtype=dtype)
        assert any(f"at the {rate} rate" in note for note in point.notes)


def test_int4_weights_are_read_narrow_and_multiplied_wide():
    wide, narrow = at(batch=8), at(batch=8, dtype="int4")
    assert narrow.itl_s.terms["weights"] < wide.itl_s.terms["weights"] / 3
    assert narrow.ttft_s.terms["matmul"] > 0.8 * wide.ttft_s.terms["matmul"]


def test_fp8_doubles_the_rate_of_the_layers_on_an_h100():
    h100 = hardware.find("H100-SXM")
    ratio = at(gpu=h100).ttft_s.terms["matmul"] / at(gpu=h100, dtype="fp8").ttft_s.terms["matmul"]
    assert 1.3 < ratio < 2, "twice on paper; kernels reach less of the peak in fp8"


def test_a_16_bit_dtype_of_a_quantized_model_is_that_of_its_activations():
    awq = from_config(SHAPE | {"quantization_config": {"quant_method": "awq", "bits": 4}})
    assert at(awq, dtype="half").itl_s.terms == at(awq).itl_s.terms
    assert any("stay in int4" in note for note in at(awq, dtype="half").notes)


def test_a_narrow_cache_is_read_faster_and_holds_more():
    assert 0.45 < at(kv_dtype="fp8").itl_s.terms["kv cache"] / at().itl_s.terms["kv cache"] < 0.7
    assert at(kv_dtype="fp8").largest_batch >= 2 * at().largest_batch


def test_disputed_hardware_says_so_at_every_point():
    assert any("disputed" in note for note in at(gpu=A10).notes)


# --- parallelism ------------------------------------------------------------------------------------------------------


def test_tensor_parallelism_divides_the_work_and_adds_the_link():
    one, eight = at(LLAMA_3_8B, batch=16), at(LLAMA_3_8B, batch=16, tp=8)
    assert eight.itl_s.terms["weights"] == pytest.approx(one.itl_s.terms["weights"] / 8)
    assert 5e-6 < eight.itl_s.terms["link latency"] / 64 < 12e-6, "two all-reduces a layer, 5-8 us each over NVLink"
    assert eight.itl_s.terms["link volume"] > 64 * 2 * 7 / 8 * 16 * 4096 * 2 / 300e9


def test_more_accelerators_than_kv_heads_hold_copies():
    sixteen, eight = (at(LLAMA_3_8B, A100, tp=tp).itl_s.terms["kv cache"] for tp in (16, 8))
    assert sixteen == eight


def test_a_pcie_link_has_the_higher_floor():
    over_pcie = at(LLAMA_3_8B, hardware.find("L40S"), tp=8).itl_s.terms["link latency"]
    assert over_pcie > 2 * at(LLAMA_3_8B, tp=8).itl_s.terms["link latency"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch": 0}, "batch"),
        ({"input_tokens": 0}, "input_tokens"),
        ({"output_tokens": -1}, "output_tokens"),
        ({"mode": "burst"}, "mode"),
        ({"dtype": "fp5"}, "fp5"),
        ({"kv_dtype": "fp5"}, "fp5"),
        ({"tp": 3}, "heads"),
        ({"tp": 0}, "heads"),
        ({"tp": 2, "gpu": CPU}, "link"),
    ],
)
def test_what_makes_no_sense_is_refused(change, named):
    with pytest.raises(RidgelineError, match=named):
        at(**change)


@pytest.mark.parametrize(("tp", "fits"), [(2, True), (5, True), (20, True), (4, False), (8, False)])
def test_kv_heads_are_shared_whole_or_copied_as_engines_do(tp, fits):
    """phi-4 has 40 heads and 10 KV heads: 4 and 8 divide the heads, and no engine would start with them."""
    phi = catalogue.find("microsoft/phi-4")
    if fits:
        assert at(phi, A100, tp=tp).itl_s.value > 0
        return
    with pytest.raises(
        RidgelineError, match=f"tp {tp} must divide the 10 KV heads of microsoft/phi-4 or be a multiple"
    ):
        at(phi, A100, tp=tp)


# --- for every point --------------------------------------------------------------------------------------------------


@settings(deadline=None)  # a busy machine is no bug
@given(MODELS, GPUS, POINTS, st.sampled_from([1, 2, 8]))
def test_the_terms_add_up_and_lie_in_their_interval(model, gpu, point, tp):
    p = predict(model, gpu, **point, tp=tp)
    if not p.fits:
        return
    for metric in (p.ttft_s, p.e2e_s, *((p.itl_s,) if point["output_tokens"] > 1 else ())):
        assert sum(metric.terms.values()) == pytest.approx(metric.value)
        assert all(value >= 0 for value in metric.terms.values())
        assert 0 < metric.low <= metric.value * (1 + 1e-9) <= metric.high
        assert metric.limit in LIMITS
    speed = p.output_tokens_per_s
    assert speed.terms["output tokens"] / speed.terms["seconds"] == pytest.approx(speed.value)
    assert speed.low <= speed.value <= speed.high * (1 + 1e-9)
    assert (p.limit == "capacity") == (point["batch"] > p.largest_batch)
    json.dumps(p.as_dict(), allow_nan=False)


@settings(deadline=None)  # a busy machine is no bug
@given(MODELS, GPUS, POINTS, st.floats(1, 10), st.sampled_from(["bytes_per_s", "mem_bytes", "flops"]))
def test_better_hardware_is_never_slower(model, gpu, point, factor, what):
    better = {d: f * factor for d, f in gpu.flops.items()} if what == "flops" else getattr(gpu, what) * factor
    old, new = predict(model, gpu, **point), predict(model, replace(gpu, **{what: better}), **point)
    if not old.fits or (what == "mem_bytes" and point["batch"] > old.largest_batch):
        return  # a larger wave makes each of its own steps longer; what it gains is throughput
    for metric in ("ttft_s", "itl_s", "e2e_s"):
        assert not getattr(new, metric).value > getattr(old, metric).value * (1 + 1e-9)


@settings(deadline=None)  # a busy machine is no bug
@given(MODELS, GPUS, POINTS, st.integers(1, 500))
def test_more_of_anything_is_never_faster(model, gpu, point, more):
    old = predict(model, gpu, **point)
    for key in point:
        new = predict(model, gpu, **(point | {key: point[key] + more}))
        if new.batch <= new.largest_batch:
            assert new.ttft_s.value >= old.ttft_s.value * (1 - 1e-9)
            assert new.e2e_s.value >= old.e2e_s.value * (1 - 1e-9)


@settings(deadline=None)  # a busy machine is no bug
@given(MODELS, GPUS, POINTS)
def test_a_larger_batch_never_lowers_the_throughput_while_it_fits(model, gpu, point):
    old = predict(model, gpu, **point)
    new = predict(model, gpu, **(point | {"batch": 2 * point["batch"]}))
    if new.fits and new.batch <= new.largest_batch:
        assert new.output_tokens_per_s.value >= old.output_tokens_per_s.value * (1 - 1e-9)
