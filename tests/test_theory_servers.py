"""What serving software does to the hardware's work, held against measurements that others published.

Figures with their sources: bitsandbytes' benchmarking/README (MIT), huggingface/optimum-benchmark's artifacts (Apache-2.0),
QwenLM/Qwen2.5's speed benchmark (Apache-2.0), ROCm/vllm's docs (Apache-2.0), vLLM's nightly latency tests (Apache-2.0),
ai-dynamo/aiconfigurator's closed loops (Apache-2.0).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest

from harness.theory import catalogue, frameworks, hardware, load, precision, roofline, sweep, validate
from harness.theory.calibration import Calibration

ROW = {"n_gpus": 1, "kind": "static", "kv_dtype": ""}


def predicted(**row: object) -> dict[str, float]:
    table = validate.read(pd.DataFrame([ROW | {"tp": row.get("n_gpus", 1), "out_tps": 1.0} | row]), "row")
    found = validate.predictions(table).iloc[0]
    assert found.reason == ""
    return found.to_dict()


def test_copying_the_cache_and_repeating_its_heads_takes_longer_the_longer_the_context():
    """Qwen2.5-32B (5 query heads for each KV head), transformers 4.46: 17.54, 12.49, 8.95, 5.59 tokens/s."""
    row = {
        "model": "Qwen/Qwen2.5-32B-Instruct",
        "gpu": "A100-SXM-80GB",
        "weight_dtype": "bf16",
        "batch": 1,
        "osl": 2048,
    }
    for isl, speed in ((1, 17.54), (6144, 12.49), (14336, 8.95), (30720, 5.59)):
        slow = predicted(**row, isl=isl, framework="transformers 4.46+flash-attn2")["pred_out_tps"]
        assert slow == pytest.approx(speed, rel=0.2)
    assert predicted(**row, isl=30720, framework="vLLM 0.6.3")["pred_out_tps"] > 3 * slow


def test_old_releases_keep_two_caches_at_the_peak():
    """Llama-2-7B, 64 sequences of 256 and 512 tokens, 2023: at most 65,110 MB allocated, 19,997 with 8."""
    row = {"model": "meta-llama/Llama-2-7b-hf", "gpu": "A100-SXM-80GB", "weight_dtype": "fp16", "isl": 256, "osl": 512}
    for batch, megabytes in ((8, 19997), (64, 65110)):
        found = predicted(**row, batch=batch, framework="transformers")["pred_mem_gb"]
        assert found * 1e9 == pytest.approx(megabytes * 1e6, rel=0.01)
    assert predicted(**row, batch=64, framework="transformers 4.46")["pred_mem_gb"] < 0.7 * found
    h100 = hardware.find("H100-SXM")
    assert frameworks.find("transformers", h100, offline=True, family="qwen3").cache_copies == 1, "not known in 2023"


def test_narrow_weights_are_written_out_for_more_than_one_token():
    """bitsandbytes 0.45, nf4, Llama-3.1-70B on an H100: 83.3 ms a token at batch 1, 234.8 at 8; int8 129.4 and 131.3."""
    row = {"model": "meta-llama/Llama-3.1-70B", "gpu": "H100-SXM", "isl": 64, "osl": 64,
           "framework": "transformers 4.46 + bitsandbytes 0.45.0"}  # fmt: skip
    for dtype, batch, ms in (("nf4", 1, 83.3), ("nf4", 8, 234.8), ("int8", 1, 129.4), ("int8", 8, 131.3)):
        assert predicted(**row, weight_dtype=dtype, batch=batch)["pred_tpot_ms"] == pytest.approx(ms, rel=0.15)


def test_a_kernel_that_unpacks_as_it_multiplies_slows_with_the_rows():
    """GPTQ by exllamav2 in transformers on an A100 (256 and 512 tokens): Llama-13B 35.8 ms a token at batch 1, 62.4 at 16, 112.7
    at 32; above 50 rows it unpacks first: Llama-7B 101.4 at 64.  The A100's kernel is fitted to the 7B."""
    row = {
        "gpu": "A100-SXM-80GB",
        "weight_dtype": "int4",
        "isl": 256,
        "osl": 512,
        "framework": "transformers GPTQ exllamav2",
    }
    for size, batch, ms in ((13, 1, 35.8), (13, 16, 62.4), (13, 32, 112.7), (65, 8, 127.6), (7, 64, 101.4)):
        found = predicted(**row, model=f"huggyllama/llama-{size}b", batch=batch)
        assert found["pred_tpot_ms"] == pytest.approx(ms, rel=0.12)


def test_paged_attention_that_is_not_split_makes_a_step():
    """Argonne's LLM-Inference-Bench (BSD-3-Clause), vLLM 0.6.1 on one MI300X, 2,048 tokens in and out: Llama-3-8B (32 heads)
    takes 35.7 s with 16 sequences, 110.5 with 32, 191.5 with 64.  The row is fitted to other models."""
    row = {"model": "meta-llama/Meta-Llama-3-8B", "gpu": "MI300X", "weight_dtype": "fp16", "isl": 2048, "osl": 2048,
           "framework": "vLLM 0.6.1"}  # fmt: skip
    taken = {batch: predicted(**row, batch=batch)["pred_e2e_s"] for batch in (16, 32, 64)}
    for batch, seconds in ((16, 35.66), (32, 110.5), (64, 191.5)):
        assert taken[batch] == pytest.approx(seconds, rel=0.15)
    assert taken[32] > 2.2 * taken[16]
    two = {
        batch: predicted(**row, n_gpus=2, batch=batch)["pred_e2e_s"] for batch in (32, 33)
    }  # half of the heads on each
    assert two[33] > 1.3 * two[32]


def test_an_mi300x_runs_as_amds_images_do_unless_an_early_release_is_stated():
    """ROCm/vllm's docs (Apache-2.0), vLLM 0.10 on eight, 128 tokens in and 2,048 out: Llama-3.1-70B in fp8 17.2 s alone and 24.9 with
    32, 405B 48.5 alone and 68.9."""
    row = {"gpu": "MI300X", "n_gpus": 8, "weight_dtype": "fp8", "isl": 128, "osl": 2048}
    for size, batch, seconds in ((70, 1, 17.2), (70, 32, 24.9), (405, 1, 48.5), (405, 32, 68.9)):
        found = {name: predicted(**row, model=f"meta-llama/Llama-3.1-{size}B", batch=batch, framework=name)["pred_e2e_s"]
                 for name in ("vLLM", "vLLM 0.10.0", "vLLM 0.6.1")}  # fmt: skip
        assert found["vLLM"] == found["vLLM 0.10.0"] == pytest.approx(seconds, rel=0.2)
        assert found["vLLM 0.6.1"] > 1.5 * seconds


def test_a_prompt_is_taken_in_where_it_fits_though_its_answer_may_not():
    """Llama-2-7B on an A100, lmdeploy: 64 at once of 128 tokens in and 2,048 out have their first tokens after 0.5 s."""
    row = {"model": "meta-llama/Llama-2-7b-hf", "gpu": "A100-SXM-80GB", "weight_dtype": "fp16", "batch": 64, "isl": 128,
           "ttft_ms": 1.0}  # fmt: skip
    short, lmdeploy = (predicted(**row, osl=osl, framework="lmdeploy") for osl in (128, 2048))
    assert lmdeploy["pred_ttft_ms"] == pytest.approx(short["pred_ttft_ms"]) == pytest.approx(535, rel=0.2)
    assert predicted(**row, osl=2048, framework="TensorRT-LLM")["pred_ttft_ms"] > 5_000, (
        "which keeps room for the whole answer"
    )


@pytest.mark.parametrize("mode", ["static", "wave"])
def test_who_is_taken_in_early_waits_later(mode):
    """Llama-2-7B on an A100 holds 54 answers of 2,048 tokens, and the prompts of 900: vLLM takes 256 at a time."""
    batch = np.array([54.0, 55.0, 108.0, 256.0, 257.0, 512.0, 900.0, 950.0])
    found = sweep.sweep(catalogue.find("meta-llama/Llama-2-7b-hf"), hardware.find("A100-SXM-80GB"), batch=batch, input_tokens=128,
                        output_tokens=2048, framework="vllm", mode=mode).columns  # fmt: skip
    ttft, e2e = found["ttft_s"].value, found["e2e_s"].value
    assert ttft[3] < 2.5 and all(np.diff(ttft) > 0) and ttft[7] < 1.1 * ttft[6]
    assert all(e2e >= found["e2e_s"].bound) and all(np.diff(e2e) > 0) and e2e[5] > 4 * e2e[0]


def test_a_batch_makes_no_steps_but_where_an_engine_changes_its_kernel():
    """Between neighbouring batches that the memory holds, whatever the hardware and the dtype; experts change one by one."""
    batch, changes = np.arange(1.0, 257.0), {"transformers": {1, 50}, "exllama": {32}}
    for gpu in ("A100-SXM-80GB", "RTX-4090", "MI300X", "L4"):
        for framework in ("vllm", "sglang", "tensorrt-llm", "llama.cpp", "transformers", "exllama"):
            for dtype in (None, "int4", "nf4"):
                for model in ("Qwen/Qwen2.5-3B-Instruct", "mistralai/Mixtral-8x7B-v0.1"):
                    found = sweep.sweep(
                        catalogue.find(model), hardware.find(gpu), batch=batch, input_tokens=350, output_tokens=150,
                        dtype=dtype, framework=framework, mode="closed",
                    )  # fmt: skip
                    allowed = changes.get(framework, set()) if dtype and not found.setup.model.moe else set()
                    for metric in ("ttft_s", "itl_s", "output_tokens_per_s"):
                        value = found.columns[metric].value[found.largest >= batch]
                        steep = batch[: max(len(value) - 1, 0)][np.abs(np.diff(np.log(value))) > np.log(2)]
                        assert set(steep) <= allowed, (gpu, framework, dtype, model, metric)


def test_wide_experts_run_like_a_dense_ffn():
    """Mixtral-8x7B on two GPUs, 8 sequences of 32 and 128 tokens: A100 3643.84 ms, H200 1917.44."""
    row = {"model": "mistralai/Mixtral-8x7B-Instruct-v0.1", "n_gpus": 2, "weight_dtype": "bf16", "batch": 8, "isl": 32,
           "osl": 128, "framework": "vLLM 0.6"}  # fmt: skip
    for gpu, seconds in (("A100-SXM-80GB", 3.644), ("H200-SXM", 1.917)):
        assert predicted(**row, gpu=gpu)["pred_e2e_s"] == pytest.approx(seconds, rel=0.25)
    h100 = hardware.find("H100-SXM")
    vllm = frameworks.find("vllm", h100)
    many = roofline.setup(catalogue.find("deepseek-ai/DeepSeek-V3"), h100, vllm, tp=8)
    assert roofline._grouping(many) == vllm.experts


def test_replicas_of_the_attention_prefill_side_by_side():
    """DeepSeek-V3 in nvfp4, TensorRT-LLM with attention in data parallel over 8 B200: 27.06 ms a token at 128 in flight."""
    found = predicted(model="deepseek-ai/DeepSeek-V3", gpu="B200-SXM", weight_dtype="nvfp4", batch=128, isl=8192, osl=1024,
                      kind="concurrency", n_gpus=1, tp=1, ep=8, framework="trtllm 1.2.0rc6.post2")  # fmt: skip
    assert found["pred_tpot_ms"] == pytest.approx(27.06, rel=0.2)


def test_clients_beyond_the_cache_wait_and_do_not_slow_the_others():
    """Llama-3.3-70B in fp8 on two H100, 5000 and 500 tokens (NVIDIA's NIM page): 92.9 ms at 100 clients, 93.2 at 250."""
    row = {"model": "meta-llama/Llama-3.3-70B-Instruct", "gpu": "H100-SXM", "n_gpus": 2, "weight_dtype": "fp8", "kv_dtype": "fp8",
           "isl": 5000, "osl": 500, "kind": "concurrency", "framework": "NIM 1.8.0 (TensorRT-LLM)"}  # fmt: skip
    some, more = (predicted(**row, batch=b) for b in (150, 250))
    assert some["pred_tpot_ms"] == more["pred_tpot_ms"] == pytest.approx(93.0, rel=0.3)
    assert more["pred_ttft_ms"] > 1.5 * some["pred_ttft_ms"] > 10_000


def test_an_mi300x_has_its_own_row():
    """Llama-3.1-405B in fp8 on eight, 128 and 2048 tokens: 48.138 s alone, 55.685 s at 16 (the row is fitted to the 70B)."""
    row = {"model": "meta-llama/Llama-3.1-405B-Instruct", "gpu": "MI300X", "n_gpus": 8, "weight_dtype": "fp8", "kv_dtype": "bf16",
           "isl": 128, "osl": 2048, "framework": "vLLM 0.11.1"}  # fmt: skip
    for batch, seconds in ((1, 48.138), (16, 55.685)):
        assert predicted(**row, batch=batch)["pred_e2e_s"] == pytest.approx(seconds, rel=0.12)


def test_a_step_admits_no_more_prompts_than_its_chunk():
    """Qwen3-14B on an A100, vLLM 0.11 (gpustack's performance lab): 301.7 ms a token at 500 clients, 445.6 at 32,000 tokens."""
    row = {
        "model": "Qwen/Qwen3-14B",
        "gpu": "A100-SXM-80GB",
        "weight_dtype": "bf16",
        "kv_dtype": "bf16",
        "kind": "concurrency",
        "framework": "vLLM 0.11.0",
    }
    for batch, isl, osl, ms in ((500, 2000, 100, 301.7), (100, 32000, 99, 445.6)):
        assert predicted(**row, batch=batch, isl=isl, osl=osl)["pred_tpot_ms"] == pytest.approx(ms, rel=0.15)
    a100, h100 = (hardware.find(name) for name in ("A100-SXM-80GB", "H100-SXM"))
    limits = [(f.sequences, f.chunk) for f in (frameworks.find("vLLM 0.11", a100), frameworks.find("vLLM 0.11", h100))]
    assert limits == [(256, 2048), (1024, 8192)]


def test_quantized_kernels_of_gpt_fast_and_deepspeed():
    """gpt-fast (BSD-3-Clause), Llama-2-70B in int8 on an A100: 19.13 tokens/s.  DeepSpeed-Inference, Bloom-176B in int8 on
    eight (transformers-bloom-inference, Apache-2.0): 89.09 ms a token, in fp16 44.02."""
    fast = predicted(model="meta-llama/Llama-2-70b-hf", gpu="A100-SXM-80GB", weight_dtype="int8", batch=1, isl=5, osl=200,
                     framework="gpt-fast")  # fmt: skip
    assert fast["pred_out_tps"] == pytest.approx(19.13, rel=0.15)
    row = {"model": "bigscience/bloom", "gpu": "A100-SXM-80GB", "n_gpus": 8, "batch": 1, "isl": 10, "osl": 100}
    for dtype, ms in (("int8", 89.09), ("fp16", 44.02)):
        found = predicted(**row, weight_dtype=dtype, framework="DeepSpeed-Inference")
        assert 1e3 / found["pred_out_tps"] == pytest.approx(ms, rel=0.25)


def test_a_cache_factor_goes_half_way_to_another_model():
    h100, other = hardware.find("H100-SXM"), catalogue.find("meta-llama/Llama-3.1-8B")
    fitted = Calibration(
        "H100-SXM-80GB", ("meta-llama/Llama-2-7b-hf",), 10, roofline.Factors(kv=4.0, compute=1.2), 0.05
    )
    assert fitted.closeness(other, h100) == "model"
    carried = fitted.factors_for(other, h100)
    assert (carried.kv, carried.compute) == (2.0, 1.2)


def test_the_first_prompt_of_a_wave_is_prefilled_alone_and_the_others_after_it():
    """vLLM 0.32 on two cores (518 M parameters, prompts of 350 tokens, passes of at most 2048), first tokens of waves of
    1, 2, 4 and 8 in s: 1.01 | 1.02 2.00 | 1.00, 3 x 3.75 | 1.01, 5 x 6.42, 2 x 7.57.  llama.cpp takes both of two at once."""
    model, cores = catalogue.find("meta-llama/Llama-3.2-1B"), hardware.find("EPYC-9654")

    def timed(framework: str, batch: int, *, progressive: bool = True) -> tuple[float, float]:
        s = roofline.setup(model, cores, frameworks.find(framework, cores))
        size, tokens, output = (np.array([float(x)]) for x in (batch, 350, 151))
        found = load.static(s, size, tokens, output, progressive=progressive)
        request_s = s.request_s * progressive
        return float(load.total(found.ttft)[0]) - request_s, float(found.busy_s[0]) - request_s

    whole = {n: timed("vllm", n, progressive=False)[0] for n in (1, 3, 7)}
    assert timed("vllm", 1)[0] == pytest.approx(whole[1])
    assert timed("vllm", 4)[0] == pytest.approx((whole[1] + 3 * (whole[1] + whole[3])) / 4)
    for batch, measured in ((2, 1.51), (4, 3.06), (8, 6.09)):
        assert timed("vllm", batch)[0] / whole[1] == pytest.approx(measured, rel=0.08)
    # what the mean first token does not wait of the prefill, its request waits later: all end when the last does
    later = timed("vllm", 4)[1] - timed("vllm", 4, progressive=False)[1]
    assert later == pytest.approx(whole[1] + whole[3] - timed("vllm", 4, progressive=False)[0])
    assert timed("llama.cpp", 2)[0] == pytest.approx(2 * timed("llama.cpp", 1)[0], rel=0.05)


def test_kernels_launched_from_python_bind_narrow_weights_and_not_wide_ones():
    row = {
        "model": "Qwen/Qwen3-32B",
        "gpu": "A100-PCIe-80GB",
        "kind": "concurrency",
        "batch": 4,
        "isl": 512,
        "osl": 256,
    }
    wide, narrow = (
        [
            predicted(**row, weight_dtype=dtype, framework=f"vLLM 0.19{how}")["pred_out_tps"]
            for how in ("", " --enforce-eager")
        ]
        for dtype in ("bf16", "awq")
    )
    assert wide[1] > 0.9 * wide[0], "reading 65 GB takes longer than launching"
    assert narrow[1] < 0.7 * narrow[0] and narrow[1] < 1.5 * wide[1]
    h100 = hardware.find("H100-SXM")
    names = ("vLLM (eager)", "SGLang disable-cuda-graph", "vllm", "vLLM eagerly")
    assert [frameworks.find(name, h100).eager_decode for name in names] == [True, True, False, False]


def test_gpt_oss_runs_its_experts_in_two_products():
    """gpt-oss-120b on one and two H100s, vLLM 0.10.2, 4 in flight, 229 and 217 tokens (gpustack): 8.31 and 5.75 ms."""
    row = {"model": "openai/gpt-oss-120b", "gpu": "H100-SXM", "kind": "concurrency", "batch": 4, "isl": 229, "osl": 217}
    for gpus, ms in ((1, 8.31), (2, 5.75)):
        found = predicted(**row, n_gpus=gpus, weight_dtype="mxfp4", framework="vLLM 0.10.2")["pred_tpot_ms"]
        assert found == pytest.approx(ms, rel=0.12)


def test_llama_cpp_keeps_what_is_not_an_expert_of_gpt_oss_in_8_bit():
    """ggml-org/gpt-oss-20b-GGUF has 12.1 GB, -120b 63.4; on a GB10 12.8 and 18.5 ms a token after 4,096 (benches/dgx-spark of
    llama.cpp, MIT), 1.17 and 2.25 s before the first."""
    for size, gb, ms, ttft_ms in ((20, 12.1, 12.81, 1166), (120, 63.4, 18.47, 2245)):
        model = catalogue.find(f"openai/gpt-oss-{size}b")
        file = precision.as_kept(model, "llama.cpp").weight_bytes() / 1e9
        assert file == pytest.approx(gb, rel=0.01) and file < model.weight_bytes() / 1e9
        as_file = dataclasses.replace(precision.as_kept(model, "llama.cpp"), head_dtype="q8_0")
        assert precision.as_kept(as_file, "llama.cpp") == as_file, "a GGUF file tells its own"
        found = predicted(model=model.name, gpu="GB10", weight_dtype="mxfp4", batch=1, isl=4096, osl=32, ttft_ms=1.0, tpot_ms=1.0,
                          framework="llama.cpp")  # fmt: skip
        assert found["bound_tpot_ms"] < ms == pytest.approx(found["pred_tpot_ms"], rel=0.15)
        assert found["pred_ttft_ms"] == pytest.approx(ttft_ms, rel=0.2)


def test_deepseek_in_4_bit_waits_for_the_host():
    """AWQ on vLLM, one at a time: 16.1 ms a token on eight H100s (tenstorrent/tt-inference-server issue 356)."""
    row = {
        "model": "deepseek-ai/DeepSeek-R1",
        "gpu": "H100-SXM",
        "n_gpus": 8,
        "kind": "concurrency",
        "batch": 1,
        "isl": 128,
        "osl": 128,
    }
    found = predicted(**row, weight_dtype="awq", framework="vLLM")["pred_tpot_ms"]
    assert found == pytest.approx(16.1, rel=0.1)


def test_a_geforce_sums_up_in_16_bit_faster_than_its_row():
    """exllama on an RTX 4090 (turboderp/exllama's README, MIT): 1,920 tokens of Llama-7B in 138 ms, of 33B in 649."""
    for size, ms in ((7, 138.0), (30, 648.9)):
        row = {"model": f"huggyllama/llama-{size}b", "gpu": "RTX-4090", "weight_dtype": "int4", "batch": 1, "isl": 1920, "osl": 128,
               "ttft_ms": ms}  # fmt: skip
        found = predicted(**row, framework="exllama")
        assert found["bound_ttft_ms"] < ms == pytest.approx(found["pred_ttft_ms"], rel=0.3)
        assert predicted(**row, framework="vllm")["bound_ttft_ms"] == pytest.approx(2 * found["bound_ttft_ms"])


@pytest.mark.parametrize(
    ("model", "speed"),
    [("meta-llama/Llama-2-7b-hf", 141.3), ("EleutherAI/gpt-j-6b", 160.6), ("tiiuae/falcon-40b", 25.2)],
)
def test_nothing_is_launched_from_the_host_of_a_gaudi(model, speed):
    """optimum-habana's own tests on a Gaudi 2 (Apache-2.0): tokens/s of one sequence in bf16."""
    row = {"model": model, "gpu": "Gaudi2", "weight_dtype": "bf16", "batch": 1, "isl": 9, "osl": 100}
    for name in ("transformers", "optimum-habana"):
        assert predicted(**row, framework=name)["pred_out_tps"] == pytest.approx(speed, rel=0.2)


def test_eight_bit_of_llama_cpp_are_of_the_weights_alone():
    row = {"model": "meta-llama/Llama-2-7b-hf", "gpu": "RTX-4090", "batch": 1, "isl": 512, "osl": 128, "ttft_ms": 1.0}
    q8, int8 = (predicted(**row, weight_dtype=d, framework="llama.cpp")["pred_ttft_ms"] for d in ("q8_0", "int8"))
    assert int8 == pytest.approx(q8, rel=0.01)
    multiplied = predicted(**row, weight_dtype="int8", framework="TensorRT-LLM 0.9")["pred_ttft_ms"]
    assert multiplied < 0.6 * int8, "where int8 is multiplied as such"


def test_exllamav2_reads_on_a_desktop_and_launches_on_a_server():
    """Mistral-7B and Llama-2-7B in 4 bit on an A100's server (premAI-io/benchmarks, MIT): 7.92 and 6.26 ms."""
    row = {"model": "meta-llama/Llama-2-7b-hf", "weight_dtype": "int4", "batch": 1, "isl": 5, "osl": 128,
           "framework": "exllamav2"}  # fmt: skip
    server, desktop = (predicted(**row, gpu=gpu)["pred_tpot_ms"] for gpu in ("A100-SXM-80GB", "RTX-4090"))
    assert server == pytest.approx((7.92 * 6.26) ** 0.5, rel=0.15)
    assert desktop < 0.9 * server, "though its memory is half as fast"
    names = ("TabbyAPI", "exllama", "transformers GPTQ exllamav2")
    assert [frameworks.named(name) for name in names] == ["exllamav2", "exllama", "transformers"]
