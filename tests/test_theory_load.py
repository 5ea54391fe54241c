"""Closed loops: what a first token waits for, where memory is full, and what a table does not tell of a benchmark.

Measurements: NVIDIA NIM's performance page (Llama-3.3-70B), gpustack's performance lab and NVIDIA/TensorRT-LLM's pages
(both Apache-2.0), dstackai/benchmarks (MIT); the log of gpt-oss-120b is of vllm-project/vllm issue 33155.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from harness.theory import catalogue, frameworks, hardware, kernels, memory, roofline, validate
from harness.theory.sweep import Sweep, sweep

NIM = {"model": "meta-llama/Llama-3.3-70B-Instruct", "gpu": "H100-SXM-80GB", "n_gpus": 2, "tp": 2, "framework": "NIM 1.8.0 (TensorRT-LLM)",
       "weight_dtype": "fp8", "kv_dtype": "fp8", "kind": "concurrency", "isl": 5000, "osl": 500}  # fmt: skip


def told(**row: object) -> pd.Series:
    """The one row of a table with this in it, predicted."""
    table = validate.read(pd.DataFrame([{"ttft_ms": np.nan, **row}]), "a table")
    return validate.predictions(table).iloc[0]


def served(model: str, clients: float, *, framework: str = "vllm", gpu: str = "H100-SXM", **options: object) -> Sweep:
    given = {"input_tokens": 1024, "output_tokens": 256, "mode": "closed"} | options
    return sweep(catalogue.find(model), hardware.find(gpu), batch=clients, framework=framework, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(("clients", "measured_ms"), [(150, 34_794), (200, 61_680), (250, 88_605)])
def test_more_clients_than_the_memory_holds_wait_for_it(clients, measured_ms):
    assert told(**NIM, batch=clients).pred_ttft_ms == pytest.approx(measured_ms, rel=0.25)


def test_where_the_dtype_of_the_cache_is_not_told_the_shorter_wait_counts():
    row = NIM | {"framework": "vLLM 0.11", "batch": 150}
    sure, doubt = told(**row | {"kv_dtype": "bf16"}), told(**row | {"kv_dtype": ""})
    assert doubt.pred_ttft_ms < 0.6 * sure.pred_ttft_ms
    assert doubt.pred_tpot_ms == pytest.approx(sure.pred_tpot_ms)


def test_a_full_memory_makes_a_prediction_less_sure():
    few, many = (told(**NIM, batch=b) for b in (8, 250))
    width = [(r.pred_tpot_ms_high - r.pred_tpot_ms_low) / r.pred_tpot_ms for r in (few, many)]
    assert width[1] > 1.5 * width[0]


def test_all_at_once_wait_longer_for_a_first_token_than_clients_in_turn():
    row = NIM | {"batch": 64}
    turn, burst = told(**row), told(**row | {"kind": "burst"})
    assert burst.pred_ttft_ms > 2 * turn.pred_ttft_ms
    assert burst.pred_out_tps < turn.pred_out_tps


def test_a_server_in_cpp_takes_little_before_a_first_pass():
    """Llama-3.3-70B on NIM 1.8: 31.2 ms to the first token of 200 alone."""
    assert told(**NIM | {"isl": 200, "osl": 200}, batch=1).pred_ttft_ms == pytest.approx(31.2, rel=0.2)
    at = {
        name: frameworks.find(name, hardware.find("H100-SXM")).request_s
        for name in ("NIM 1.8", "TensorRT-LLM 0.18", "trtllm 1.1", "trtllm")
    }
    assert at["NIM 1.8"] == at["TensorRT-LLM 0.18"] < 0.2 * at["trtllm 1.1"] and at["trtllm"] == at["trtllm 1.1"]
    row = NIM | {"isl": 1000, "osl": 1000, "batch": 50, "kv_dtype": ""}
    names = ("NIM", "TensorRT-LLM 0.18")  # which both read a cache in fp8
    assert len({told(**row | {"framework": name}).pred_tpot_ms for name in names}) == 1


def test_a_lone_client_waits_for_nobody():
    terms = served("meta-llama/Llama-3.1-8B", 1).columns["ttft_s"].terms
    assert {name for name in terms if name.startswith("waiting")} >= {"waiting for a step", "waiting for those beside"}
    assert all(v[0] == 0 for name, v in terms.items() if name.startswith("waiting"))


def test_only_a_mixed_pass_reads_for_those_beside_it():
    mixed, apart = (
        served("meta-llama/Llama-3.1-8B", 64, framework=f).columns["ttft_s"].terms for f in ("vllm", "sglang")
    )
    assert mixed["waiting for those beside"][0] > 0
    assert "waiting for those beside" not in apart


def test_the_host_takes_longer_before_experts_and_latent_attention():
    """SGLang at 1 to 4 clients: Qwen3-8B 28 and 40 ms, Qwen3-235B 99 to 111, DeepSeek-R1 126 to 153."""
    before = [served(m, 1, framework="SGLang 0.5.6", gpu="H200-SXM", tp=tp).setup.request_s for m, tp in
              (("Qwen/Qwen3-8B", 1), ("Qwen/Qwen3-235B-A22B", 8), ("deepseek-ai/DeepSeek-R1", 8))]  # fmt: skip
    assert before[0] < before[1] < before[2]


def test_prompts_that_come_up_in_one_step_share_its_pass():
    """TensorRT-LLM 1.0 offline on an RTX PRO 6000, Qwen3-30B-A3B in nvfp4: 28011 tokens/s with 128 in and 128 out, so that
    64 prompts join in each step; 12540 with 2048 out."""
    row = {"model": "Qwen/Qwen3-30B-A3B", "gpu": "RTX-PRO-6000", "n_gpus": 1, "framework": "TensorRT-LLM 1.0 pytorch",
           "weight_dtype": "nvfp4", "kind": "offline", "isl": 128, "batch": np.nan}  # fmt: skip
    assert told(**row, osl=128).pred_out_tps == pytest.approx(28_011, rel=0.2)
    assert told(**row, osl=2048).pred_out_tps == pytest.approx(12_540, rel=0.2)


def test_the_first_engines_that_ran_deepseek_were_slow():
    """dstack's DeepSeek-R1 on eight MI300X, vLLM 0.7.3: 46.2 ms a token at 4 in flight, 61.9 at 32."""
    row = {"model": "deepseek-ai/DeepSeek-R1", "gpu": "MI300X", "n_gpus": 8, "tp": 8, "weight_dtype": "fp8",
           "kind": "concurrency", "isl": 3200, "osl": 800}  # fmt: skip
    for batch, measured in ((4, 46.2), (32, 61.9)):
        assert told(**row, framework="vLLM 0.7.3dev", batch=batch).pred_tpot_ms == pytest.approx(measured, rel=0.25)
    assert told(**row, framework="vLLM 0.11", batch=4).pred_tpot_ms < 25
    # First tokens came after 7.1 s at 32, in a burst that the row does not tell of: nothing is known better than that.
    early, late = (told(**row, framework=f, batch=32) for f in ("vLLM 0.7.3dev", "vLLM 0.11"))
    assert early.pred_ttft_ms_low < 7110 < early.pred_ttft_ms_high < 5 * 7110
    assert late.pred_ttft_ms_high < 5 * late.pred_ttft_ms
    llama = row | {"model": "meta-llama/Llama-3.1-70B", "batch": 4}
    old, new = (told(**llama, framework=f).pred_tpot_ms for f in ("vLLM 0.7.3", "vLLM 0.11"))
    assert old == pytest.approx(new)


def test_little_compute_beside_much_bandwidth_is_bound_by_whole_tiles():
    """Qwen's docs: Qwen3-8B-FP8, one sequence, SGLang 0.4.6.post1 on an H20: 13.6 s after 1 token, 44.4 after 63,488."""
    row = {"model": "Qwen/Qwen3-8B", "gpu": "H20", "n_gpus": 1, "tp": 1, "weight_dtype": "fp8", "kv_dtype": "bf16",
           "framework": "SGLang 0.4.6.post1", "kind": "static", "osl": 2048}  # fmt: skip
    for isl, measured in ((1, 13.64), (63_488, 44.39)):
        assert told(**row, isl=isl, batch=1).pred_e2e_s == pytest.approx(measured, rel=0.1)
    steps = [told(**(row | {"osl": 2}), isl=1, batch=b).pred_tpot_ms for b in (1, 64, 128)]
    assert steps[1] < 1.5 * steps[0] and steps[2] > 1.5 * steps[1]
    # Where compute is plenty no tile is felt: InferSim's table has 142 us for 16 and for 64 rows, 267 for 128, of an H20 only.
    assert kernels.law(hardware.find("H20"), "gemm", "fp8").tile == 64
    assert kernels.law(hardware.find("H200-SXM"), "gemm", "fp8").tile == 1


@pytest.mark.parametrize(("framework", "gpu", "rows"), [
    ("vllm", "H20", 64), ("vLLM 0.8.5", "H20", 128), ("vLLM 0.7.3", "H20", 1), ("sglang", "GH200", 64), ("vllm", "A100-SXM-80GB", 1),
    *((name, "H20", 1) for name in (None, "llama.cpp", "transformers", "TensorRT-LLM", "TensorRT-LLM 0.20"))])  # fmt: skip
def test_only_engines_that_decode_with_flash_attention_3_compute_its_tiles(framework, gpu, rows):
    assert frameworks.find(framework, hardware.find(gpu)).attention_rows == rows


def test_an_engines_own_experts_lose_less_than_the_library():
    """Argonne's LLM-Inference-Bench: Mixtral-8x7B on one MI300X, vLLM 0.6.1: 256 at once 13.9 s (128 in and out), 231.6 (1,024)."""
    row = {"model": "mistralai/Mixtral-8x7B-v0.1", "gpu": "MI300X", "n_gpus": 1, "tp": 1, "weight_dtype": "fp16",
           "framework": "vLLM 0.6.1", "kind": "static", "batch": 256}  # fmt: skip
    for length, measured in ((128, 13.94), (1024, 231.6)):
        assert told(**row, isl=length, osl=length).pred_e2e_s == pytest.approx(measured, rel=0.15)


def test_a_library_that_reads_slowly_costs_experts_half_as_much():
    """In the logarithm: what is around the experts' own kernels is the library's in full."""
    h100, one = hardware.find("H100-SXM"), np.ones(1)

    def reading_s(model: str, gemm: float) -> float:
        vllm = replace(frameworks.find("vllm", h100), gemm=gemm)
        return float(
            roofline.decode_step(roofline.setup(catalogue.find(model), h100, vllm), one, one, one).terms["weights"][0]
        )

    dense, experts = (
        reading_s(m, 4.0) / reading_s(m, 1.0) for m in ("meta-llama/Llama-2-7b-hf", "mistralai/Mixtral-8x7B-v0.1")
    )
    assert dense == pytest.approx(4.0)
    assert 2.0 < experts < 2.5


def test_experts_in_four_bits_take_more_memory_than_their_file():
    """vLLM logs 64.38 GiB for gpt-oss-120b, whose files hold 60.8."""
    model, row = catalogue.find("openai/gpt-oss-120b"), hardware.find("H100-SXM")
    s = roofline.setup(model, row, frameworks.find("vllm", row))
    held = (model.weight_bytes(s.dtype) + memory.padding_bytes(s)) / 2**30
    assert held == pytest.approx(64.38, rel=0.01)
    qwen = catalogue.find("Qwen/Qwen3-235B-A22B")
    assert memory.padding_bytes(roofline.setup(qwen, row, frameworks.find("vllm", row), tp=8)) == 0


def test_a_tight_memory_still_serves():
    """Qwen3-32B in 16 bit leaves an H100 room for one request of 32,000 tokens (gpustack), Qwen2.5-72B two of them for a few."""
    for model, gpus, tokens in (("Qwen/Qwen3-32B", 1, 32_000), ("Qwen/Qwen2.5-72B-Instruct", 2, 4096)):
        found = told(model=model, gpu="H100-SXM-80GB", n_gpus=gpus, tp=gpus, framework="vLLM 0.11", weight_dtype="bf16", kv_dtype="bf16",
                     kind="concurrency", batch=1, isl=tokens, osl=77)  # fmt: skip
        assert found.reason == ""
        assert found.pred_ttft_ms > 0
