"""Kernels' laws, the terms of a pass, and what follows for one point: every value from its terms, none beats its bound."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from harness import units
from harness.records import LIMITS, RidgelineError
from harness.theory import catalogue, frameworks, hardware, kernels, memory, roofline
from harness.theory.predict import point, predict
from harness.theory.sweep import METRICS, sweep

LLAMA = catalogue.find("meta-llama/Llama-3.1-8B")
BIG = catalogue.find("meta-llama/Llama-3.1-70B")
MIXTRAL = catalogue.find("mistralai/Mixtral-8x7B-v0.1")
DEEPSEEK = catalogue.find("deepseek-ai/DeepSeek-V3")
H100, A100, H200 = (hardware.find(n) for n in ("H100-SXM", "A100-SXM-80GB", "H200-SXM"))
STANDARD = {"batch": 8, "input_tokens": 350, "output_tokens": 150}


def setup(model=LLAMA, gpu=H100, framework="", **options):
    return roofline.setup(model, gpu, frameworks.find(framework, gpu), **options)


def arrays(*values):
    return tuple(np.array([float(v)]) for v in values)


# --- kernels ----------------------------------------------------------------------------------------------------------


def test_a_law_is_found_by_the_beginning_of_a_name_and_an_a10_is_no_a100():
    assert kernels.law(hardware.find("A10"), "gemm", "bf16") != kernels.law(A100, "gemm", "bf16")
    assert kernels.law(H100, "gemm", "bf16").compute == pytest.approx(0.8, abs=0.05), "theory.md: 0.80 at 2048 and up"
    assert not kernels.measured_itself(hardware.find("MI300X"))
    assert kernels.measured_itself(A100)


def test_few_tokens_at_a_time_are_slow_on_a_cpu_and_many_are_not():
    cpu = setup(gpu=replace(H100, measured=True), factors=roofline.Factors(narrow=2.4))
    assert cpu.hardware.cpu
    shares = roofline._narrow(cpu, np.array([1.0, 2.0, 4.0, 7.0, 512.0]))
    assert shares[0] == 2.4 and shares[3] == pytest.approx(1.7) and shares[4] == pytest.approx(1.0, abs=1e-3)
    assert all(np.diff(shares) < 0)


PRODUCTS = hardware.Products((1.0, 2.0, 4.0, 512.0), (1e-10, 3e-10, 4e-10, 2.56e-8), 2.0, call_s=1e-5)


def measured(**options):
    row = {"name": "here", "flops": {"fp32": 2e11, "bf16": 1e12}, "mem_bytes": 64e9, "bytes_per_s": 4e10}
    return setup(gpu=replace(hardware.from_row(row), products={"bf16": PRODUCTS}), **options)


def test_products_that_were_measured_take_what_was_measured():
    rows = np.array([1.0, 2.0, math.sqrt(8), 4.0, 512.0, 2048.0])
    took = roofline.decode_step(measured(), rows, np.full(6, 1.0), np.full(6, 1.0)).terms
    matrices = sum(took[name] for name in ("weights", "matmul", "ridge")) / LLAMA.read_bytes()
    assert matrices * kernels.IN_ENGINE == pytest.approx(
        [1e-10, 3e-10, math.sqrt(12e-20), 4e-10, 2.56e-8, 4 * 2.56e-8], rel=1e-3
    )


def test_a_head_of_another_type_takes_what_was_measured_of_that():
    head = hardware.Products((1.0, 4.0, 512.0), (5e-11, 1e-10, 1.28e-8), 2.0)
    other = replace(measured().hardware, products={"bf16": PRODUCTS, "q8_0": head})
    alike, own = (
        roofline.decode_step(setup(model, other), *arrays(4, 1, 1)).terms
        for model in (LLAMA, replace(LLAMA, head_dtype="q8_0"))
    )
    less = sum(alike[name][0] - own[name][0] for name in ("weights", "matmul", "ridge"))
    assert less * kernels.IN_ENGINE == pytest.approx(LLAMA.stored_bytes["lm_head"] * (4e-10 - 1e-10), rel=1e-3)


def test_a_kernel_for_one_row_may_be_slower_than_that_for_two():
    row = replace(
        measured().hardware, products={"bf16": hardware.Products((1.0, 2.0, 512.0), (2e-10, 1e-10, 2e-8), 2.0)}
    )
    took = roofline.decode_step(setup(gpu=row), np.array([1.0, 2.0]), np.ones(2), np.ones(2)).terms
    matrices = sum(took[name] for name in ("weights", "matmul", "ridge")) / LLAMA.read_bytes()
    assert matrices * kernels.IN_ENGINE == pytest.approx([2e-10, 1e-10], rel=1e-3)


@pytest.mark.parametrize("mode", ["wave", "closed", "static"])
def test_products_that_seem_faster_than_the_row_beat_no_bound(mode):
    """As of few matrices in a cache, or of matrix units for integers that a row measured in fp32 does not know."""
    fast = hardware.Products((1.0, 512.0), (1e-11, 2 * 512 / 4e12), 0.5625, call_s=1e-9, kv_s_per_byte=1e-11)
    row = replace(measured().hardware, flops={"fp32": 2e11}, products={"q4_0": fast})
    found = sweep(
        LLAMA,
        row,
        batch=[1, 4, 64],
        input_tokens=350,
        output_tokens=150,
        dtype="q4_0",
        framework="llama.cpp",
        mode=mode,
    )
    for metric in ("ttft_s", "itl_s", "e2e_s"):
        assert all(found.columns[metric].value >= found.columns[metric].bound)
    assert all(found.columns["output_tokens_per_s"].value <= found.columns["output_tokens_per_s"].bound)


def test_decode_attention_is_read_as_it_was_measured_or_as_the_products_are():
    plain = measured()
    assert plain.decode.bandwidth == pytest.approx(0.7 * 1e10 / 4e10)
    row = replace(plain.hardware, products={"bf16": replace(PRODUCTS, kv_s_per_byte=2e-10)})
    assert setup(gpu=row).decode.bandwidth == pytest.approx(kernels.IN_ENGINE * 5e9 / 4e10)
    row = replace(plain.hardware, products={"q4_1": PRODUCTS})
    assert setup(gpu=row).decode == kernels.law(row, "decode", "bf16"), "of another dtype"


def test_a_cpu_pays_for_every_call_of_a_kernel_and_vllm_several_times():
    took = [float(roofline.decode_step(measured(framework=f), *arrays(1, 400, 400)).terms["launch"][0])
            for f in ("llama.cpp", "vllm")]  # fmt: skip
    assert took[0] == pytest.approx((32 * (4 + 6 + 1) + 1) * 1e-5)
    assert took[1] == pytest.approx(frameworks.CPU_HOST["vllm"][0] * took[0])


def test_the_narrow_factor_is_of_what_few_rows_take_longer():
    twice = measured(factors=roofline.Factors(narrow=2.0))
    once, more = (roofline.decode_step(s, *arrays(2, 400, 400)).terms for s in (measured(), twice))
    assert more["ridge"] == pytest.approx(2 * once["ridge"]) and once["ridge"] > 0
    assert {k: v for k, v in more.items() if k != "ridge"} == {k: v for k, v in once.items() if k != "ridge"}


def test_slower_memory_of_the_same_chip_reaches_a_larger_share():
    shares = [kernels.law(hardware.find(n), "gemm", "bf16").bandwidth for n in ("A100-SXM-40GB", "A100-SXM-80GB")]
    assert shares[0] > shares[1]


@given(st.floats(1e-9, 1.0), st.floats(1e-9, 1.0), st.floats(1.0, 6.0))
def test_the_smooth_maximum_lies_between_the_larger_and_the_sum(a, b, sharpness):
    both = float(kernels.smooth_max(np.array([a]), np.array([b]), sharpness)[0])
    assert max(a, b) * (1 - 1e-9) <= both <= (a + b) * (1 + 1e-9)


def test_small_caches_are_read_at_a_small_share_of_the_bandwidth():
    """theory.md: 0.27 at 16-64 MB of KV cache a layer, 0.7 at 256 MB-1 GB, 0.85 above."""
    law = kernels.law(H100, "decode", "bf16")

    def share(size):
        return size / H100.bytes_per_s / (law.latency_s + size / H100.bytes_per_s / law.bandwidth)

    assert 0.2 < share(16e6) < 0.6 < share(512e6) < share(4e9) < 0.9


# --- passes -----------------------------------------------------------------------------------------------------------


def test_the_terms_of_a_prefill_scale_as_their_work():
    s = setup()
    one, two = (roofline.prefill_pass(s, *arrays(4, n)) for n in (2000, 4000))
    assert two.terms["matmul"][0] == pytest.approx(2 * one.terms["matmul"][0], rel=0.01)
    assert two.terms["attention"][0] > 2.5 * one.terms["attention"][0], "attention grows with the square"


def test_a_cached_prefix_is_not_computed_but_attended_to():
    s = setup()
    whole = roofline.prefill_pass(s, *arrays(1, 4000))
    rest = roofline.prefill_pass(s, *arrays(1, 1000, 3000))
    alone = roofline.prefill_pass(s, *arrays(1, 1000))
    assert alone.total[0] < rest.total[0] < whole.total[0] / 2


def test_few_tokens_read_few_experts():
    s = setup(MIXTRAL, gpu=A100, tp=4)
    one, many = (roofline.decode_step(s, *arrays(b, 500, 600)).terms["weights"][0] for b in (1, 64))
    assert many > 2.5 * one


def test_experts_spread_over_replicas_of_the_attention():
    s = setup(DEEPSEEK, gpu=H200, tp=1, dp=8)
    assert s.gpus == 8
    step = roofline.decode_step(s, *arrays(64, 1000, 1100))
    assert step.terms["link volume"][0] > 0
    assert step.terms["weights"][0] < DEEPSEEK.weight_bytes() / H200.bytes_per_s / 4


def test_pipeline_stages_take_turns_and_overlap_in_the_prefill():
    one, four = setup(BIG, tp=2), setup(BIG, tp=2, pp=4)
    decode = [roofline.decode_step(s, *arrays(8, 500, 600)).terms["weights"][0] for s in (one, four)]
    assert decode[0] == pytest.approx(decode[1]), "a token passes all stages"
    assert four.gpus == 8


@pytest.mark.parametrize(
    ("model", "options", "named"),
    [
        (LLAMA, {"tp": 3}, "heads"),
        (LLAMA, {"pp": 33}, "layers"),
        (LLAMA, {"ep": 2}, "experts"),
        (LLAMA, {"dp": 2}, "experts"),
    ],
)
def test_a_split_that_cannot_be_is_refused(model, options, named):
    with pytest.raises(RidgelineError, match=named):
        setup(model, **options)


def test_eager_kernels_bound_a_small_model_only():
    slow, fast = (predict(LLAMA, A100, batch=1, input_tokens=100, output_tokens=50, framework=f).itl_s.value
                  for f in ("transformers", "vllm"))  # fmt: skip
    assert slow > 1.7 * fast, "premAI: 27 ms against 11.8"
    work = [predict(LLAMA, hardware.find("A10"), batch=1, input_tokens=100, output_tokens=50, framework=f).itl_s.value
            for f in ("transformers", "vllm")]  # fmt: skip
    assert work[0] < 1.2 * work[1], "on slow memory the work hides the launches"


# --- known measurements -----------------------------------------------------------------------------------------------


def test_llama_3_1_8b_in_16_bit_does_not_fit_a_t4():
    found = predict(LLAMA, hardware.find("T4"), **STANDARD)
    assert not found.fits
    assert "does not fit" in found.ttft_s.because


def test_a_batch_doubles_the_time_per_token_where_it_was_measured():
    """theory.md, Llama-2-7B, 128 in, 128 out: at 128 on an A100 (the weights bind until there)."""
    model = catalogue.find("meta-llama/Llama-2-7b-hf")
    found = sweep(
        model, A100, batch=2.0 ** np.arange(10), input_tokens=128, output_tokens=128, framework="tensorrt-llm"
    )
    itl = found.columns["itl_s"].value
    doubled = found.batch[np.argmax(itl > 2 * itl[0])]
    assert 32 <= doubled <= 256


def test_the_seeds_stand_in_the_bound_not_in_the_value():
    found = predict(LLAMA, A100, **STANDARD | {"batch": 1})
    assert found.itl_s.bound < found.itl_s.value < 2 * found.itl_s.bound


# --- words ------------------------------------------------------------------------------------------------------------


def rebuilt(because: str) -> tuple[float, float]:
    """(value, sum of its parts) as the sentence states them."""
    value, parts = because.split("; ")[0].split(" = ", 1)
    parts = re.sub(r"\([^)]*\)", "", parts)
    kind = "size" if "Memory" in value else "time"
    amounts = [re.search(r"[\d.,]+ \S+$", part.strip()) for part in parts.split(" + ")]
    numbers = [units.parse(m.group().replace(",", "").replace(" ", ""), kind) for m in amounts if m]
    total = re.search(r"[\d.,]+ \S+$", value)
    assert total is not None
    return units.parse(total.group().replace(",", "").replace(" ", ""), kind), sum(numbers)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([LLAMA, BIG, MIXTRAL]), st.sampled_from([H100, A100, hardware.find("MI300X")]),
    st.sampled_from([1, 2, 8]), st.sampled_from(["wave", "closed", "static"]),
    st.integers(1, 300), st.integers(1, 4000), st.integers(2, 1000),
)  # fmt: skip
def test_a_value_is_rebuilt_from_its_sentence(model, gpu, tp, mode, batch, tokens, output):
    found = predict(model, gpu, batch=batch, input_tokens=tokens, output_tokens=output, tp=tp, mode=mode)
    if not found.fits:
        return
    for metric in (found.ttft_s, found.itl_s):
        if metric.value >= 120:
            continue  # minutes are words
        value, total = rebuilt(metric.because)
        assert value == pytest.approx(metric.value, rel=1e-3)
        assert total == pytest.approx(value, rel=5e-3)
        largest = max(metric.terms, key=lambda name: metric.terms[name])
        share = metric.terms[largest] / metric.value
        assert f"{largest} is {units.percent(share, 2)} of it" in metric.because


@example(LLAMA, H100, "closed", "", 47, 1, 1)  # all prompts in one pass
@example(BIG, H100, "open", "vllm", 100, 350, 150)  # requests overlap
@example(BIG, H100, "closed", "sglang", 7, 2000, 1)  # nothing but prefills
@example(BIG, H100, "open", "vllm", 500, 8000, 1)
@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([LLAMA, BIG, MIXTRAL, DEEPSEEK]), st.sampled_from([H100, H200, hardware.find("MI300X")]),
    st.sampled_from(["wave", "closed", "static", "open"]),
    st.sampled_from(["", "vllm", "sglang", "tensorrt-llm", "llama.cpp", "transformers"]),
    st.integers(1, 500), st.integers(1, 8000), st.integers(1, 2000),
)  # fmt: skip
def test_terms_add_up_and_nothing_beats_its_bound(model, gpu, mode, framework, batch, tokens, output):
    rate = batch / 10 if mode == "open" else None
    found = sweep(
        model,
        gpu,
        batch=batch,
        input_tokens=tokens,
        output_tokens=output,
        tp=8,
        mode=mode,
        framework=framework,
        rate=rate,
    )
    if not found.fits[0]:
        return
    for metric in METRICS:
        column = found.columns[metric]
        value = column.value[0]
        if math.isnan(value):
            assert (metric, output) == ("itl_s", 1)
            continue
        assert column.low[0] <= value * (1 + 1e-9)
        assert value <= column.high[0] * (1 + 1e-9)
        if metric == "output_tokens_per_s":
            assert value <= column.bound[0] * (1 + 1e-9)
            continue
        assert sum(v[0] for v in column.terms.values()) == pytest.approx(value)
        assert all(v[0] >= 0 for v in column.terms.values())
        assert value >= column.bound[0] * (1 - 1e-9)
    assert point(found, 0).limit in LIMITS


def test_a_sweep_is_the_same_as_its_points():
    batch = [1, 7, 64]
    found = sweep(LLAMA, H100, batch=batch, input_tokens=350, output_tokens=150, mode="closed")
    for at, b in enumerate(batch):
        alone = predict(LLAMA, H100, batch=b, input_tokens=350, output_tokens=150, mode="closed")
        assert alone == point(found, at)


# --- load -------------------------------------------------------------------------------------------------------------


def test_clients_in_a_closed_loop_slow_each_other():
    found = sweep(
        LLAMA, H100, batch=[1, 4, 16, 64], input_tokens=2000, output_tokens=200, mode="closed", framework="vllm"
    )
    ttft, itl = found.columns["ttft_s"].value, found.columns["itl_s"].value
    assert np.all(np.diff(ttft) > 0)
    assert np.all(np.diff(itl) > 0)
    assert found.columns["itl_s"].terms["prefills of others"][0] == 0


def test_an_open_loop_waits_longer_the_nearer_it_is_to_saturation():
    loads = [
        predict(LLAMA, A100, batch=1, input_tokens=1000, output_tokens=100, mode="open", rate=r) for r in (0.1, 2, 6)
    ]
    waits = [p.ttft_s.terms.get("waiting for prefills", 0.0) for p in loads]
    assert waits[0] < waits[1] < waits[2]
    beyond = predict(LLAMA, A100, batch=1, input_tokens=1000, output_tokens=100, mode="open", rate=500)
    assert math.isinf(beyond.ttft_s.value)
    assert beyond.as_dict()["ttft_s"]["value"] is None
    assert "without end" in beyond.ttft_s.because


def test_at_a_low_rate_open_and_closed_agree():
    open_, closed = (predict(LLAMA, A100, batch=1, input_tokens=500, output_tokens=100, mode=m, rate=r)
                     for m, r in (("open", 0.01), ("closed", None)))  # fmt: skip
    assert open_.e2e_s.value == pytest.approx(closed.e2e_s.value, rel=0.02)


def test_prefix_caching_saves_the_prefill():
    cold, warm = (predict(LLAMA, A100, **STANDARD, cached_share=share) for share in (0.0, 0.75))
    assert warm.ttft_s.value < 0.5 * cold.ttft_s.value
    assert warm.itl_s.value == cold.itl_s.value or warm.itl_s.value < cold.itl_s.value


def test_speculation_gains_at_batch_1_and_loses_where_computing_binds():
    """theory.md: Llama-2-7B on an A100 with a draft of 68M and k = 3 gained 39 % at batch 1 and lost 44 % at 64."""
    model, draft = catalogue.find("meta-llama/Llama-2-7b-hf"), catalogue.find("HuggingFaceTB/SmolLM2-135M")
    gain = []
    for batch in (1, 256):
        plain, fast = (predict(model, A100, batch=batch, input_tokens=128, output_tokens=128, framework="vllm", mode="static",
                               draft=d).itl_s for d in (None, (draft, 3, 0.7)))  # fmt: skip
        gain.append(plain.value / fast.value - 1)
        assert fast.terms["draft"] > 0
        assert sum(fast.terms.values()) == pytest.approx(fast.value)
    assert gain[0] > 0.1
    assert gain[1] < gain[0]


# --- memory -----------------------------------------------------------------------------------------------------------


def test_usable_memory_is_what_the_driver_shows():
    """nvidia-smi: 81559 MiB for H100 80 GB, 143771 for H200, 23028 for A10, 15360 for T4."""
    for name, mib in (("H100-SXM", 81559), ("H200-SXM", 143771), ("A10", 23028), ("T4", 15360), ("L40S", 46068)):
        assert memory.usable_bytes(hardware.find(name)) == pytest.approx(mib * 2**20, rel=0.015)


def test_an_engine_with_a_pool_shows_the_pool_and_others_what_they_need():
    pool = predict(LLAMA, A100, **STANDARD, framework="vllm").mem_bytes
    need = predict(LLAMA, A100, **STANDARD, framework="transformers").mem_bytes
    assert pool.value == pytest.approx(0.9 * memory.usable_bytes(A100), rel=0.02)
    assert LLAMA.weight_bytes() < need.value < 1.3 * LLAMA.weight_bytes()
    assert sum(need.terms.values()) == pytest.approx(need.value)


def test_more_memory_holds_more():
    s = setup()
    more = replace(s, hardware=replace(H100, mem_bytes=160e9))
    assert memory.largest_batch(more, np.array([500.0]))[0] > 2 * memory.largest_batch(s, np.array([500.0]))[0]
