"""KV capacity against what vLLM logged when it started: here on a CPU, and on GPUs in public logs."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from harness import cli
from harness.records import RidgelineError
from harness.theory import catalogue, hardware, memory, validate
from harness.theory.architecture import from_config
from harness.theory.frameworks import find
from harness.theory.roofline import Room, setup

# The model of which vLLM 0.32 on a CPU, VLLM_CPU_KVCACHE_SPACE=1, bf16, logged "CPU KV cache size: 29,056 tokens".
LLAMA_134M = {"model_type": "llama", "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
              "num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 64, "vocab_size": 32000,
              "max_position_embeddings": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}  # fmt: skip


def held(model, row, room, **options):
    s = setup(model, row, find("vllm", row), **options)
    return memory.kv_capacity(replace(s, memory=room))


def test_on_a_cpu_it_is_the_space_in_whole_blocks_as_vllm_logs_it():
    cpu = hardware.find("EPYC-9654")
    assert held(from_config(LLAMA_134M, "llama"), cpu, Room(kv_bytes=2.0**30)) == (29_056, 128)


# (model, GPU, share, most tokens of a pass, tokens of the log), each of one GPU in 16 bit.
LOGGED = [
    # vllm-project/vllm pull request 2031: 7351 blocks; the pass is the context of 4096, the default then.
    ("Llama-2-7b", "A100-SXM-80GB", 0.9, 4096, 7351 * 16),
    # vllm-project/vllm issue 10517, vLLM 0.6: 1952 and 1478 blocks; the pass is max_model_len, 20000 and 29000.
    ("Llama-3.1-8B", "RTX-3090", 0.9, 20_000, 1952 * 16),
    ("Llama-3.1-8B", "RTX-3090", 0.9, 29_000, 1478 * 16),
    # A log of vLLM's V1 engine in a public repository: 43,296 tokens, 5.29 GiB, with the defaults of its LLM class.
    ("Llama-3.1-8B", "RTX-A5000", 0.9, 8192, 43_296),
]


@pytest.mark.parametrize(("model", "gpu", "share", "tokens", "logged"), LOGGED)
def test_from_the_share_of_a_gpu_it_is_near_what_vllm_logged(model, gpu, share, tokens, logged):
    found, block = held(catalogue.find(model), hardware.find(gpu), Room(share, tokens))
    assert found % block == 0
    assert block == 16
    assert found == pytest.approx(logged, rel=0.05)


def test_tensor_parallelism_and_a_narrow_cache_hold_more():
    model, row = catalogue.find("Llama-3.1-8B"), hardware.find("A100-SXM-80GB")
    one, _ = held(model, row, Room())
    assert held(model, row, Room(), tp=2)[0] > 2 * one
    assert held(model, row, Room(), kv_dtype="fp8")[0] == pytest.approx(2 * one, abs=16)
    assert held(model, row, Room(0.5))[0] < one
    assert held(catalogue.find("Llama-3.1-405B"), row, Room())[0] == 0


def test_the_command_tells_the_capacity():
    args = ["predict", "--model", "Llama-2-7b", "--hardware", "A100-SXM-80GB", "--batch-sizes", "1,8", "--framework", "vllm",
            "--gpu-memory-utilization", "0.9", "--max-num-batched-tokens", "4096"]  # fmt: skip
    cache = json.loads(CliRunner().invoke(cli.app, [*args, "--json"]).output)["predictions"][0]["kv_cache"]
    assert cache["tokens"] == pytest.approx(117_616, rel=0.05)
    assert cache["tokens"] * 524_288 <= cache["bytes"] < (cache["tokens"] + 16) * 524_288
    assert f"{cache['tokens']:,} tokens (blocks of 16)" in CliRunner().invoke(cli.app, args).output
    told = CliRunner().invoke(cli.app, [*args, "--kv-space", "1GiB", "--json"]).output
    found = json.loads(told)["predictions"][0]
    assert found["kv_cache"]["tokens"] == 2048
    assert found["points"][0]["largest_batch"] == 4


@pytest.mark.parametrize("room", [{"share": 0.0}, {"share": 1.5}, {"kv_bytes": -1.0}, {"batched_tokens": -1}])
def test_what_makes_no_sense_is_refused(room):
    with pytest.raises(RidgelineError, match="must be above 0"):
        Room(**room)


A100 = {"gpu": "A100-SXM-80GB", "kind": "static"}
# (model, framework, dtype, batch, isl, osl, GB as published): peaks of other people's tables, that nothing was fitted to.
PEAKS = [
    # huggingface/optimum-benchmark, running-llamas (Apache-2.0): MB of 1e6 bytes as torch counts them.  Two caches at the end,
    # and exllamav2's scratch space.
    ("meta-llama/Llama-2-13b-hf", "transformers+flash-attn2", "fp16", 16, 256, 512, 46.387),
    ("huggyllama/llama-7b", "transformers GPTQ exllamav2", "int4", 1, 256, 512, 5.609),
    ("huggyllama/llama-65b", "transformers GPTQ exllamav2", "int4", 4, 256, 512, 51.488),
    # QwenLM/Qwen2.5, speed benchmark (Apache-2.0): GiB as torch counts them.  The FFN's width at the end of the prefill.
    ("Qwen/Qwen2.5-0.5B-Instruct", "transformers 4.46+flash-attn2", "bf16", 1, 30720, 2048, 2.34),
    ("Qwen/Qwen2.5-14B-Instruct", "transformers 4.46+flash-attn2", "bf16", 1, 1, 2048, 28.08),
    ("Qwen/Qwen2.5-14B-Instruct", "transformers 4.46+flash-attn2", "bf16", 1, 30720, 2048, 36.85),
    ("Qwen/Qwen2.5-14B-Instruct", "transformers 4.46+flash-attn2", "int8", 1, 14336, 2048, 19.98),
    # The Qwen2 documentation's speed benchmark (Apache-2.0): GiB.  The logits of the whole prompt, before transformers 4.45.
    ("Qwen/Qwen2-0.5B-Instruct", "transformers 4.38.2+flash-attn2", "bf16", 1, 30720, 2048, 27.61),
    ("Qwen/Qwen2-7B-Instruct", "transformers 4.38.2+flash-attn2", "bf16", 1, 6144, 2048, 20.26),
    # casper-hansen/AutoAWQ's README (MIT): GiB on an RTX 4090, here of an A100.  Joined matrices; attention in full.
    ("lmsys/vicuna-7b-v1.5", "AutoAWQ 0.1.6", "int4", 1, 64, 64, 4.50),
    ("Llama-2-13b", "AutoAWQ 0.1.6", "int4", 3, 64, 64, 8.57),
    ("MPT-7b", "AutoAWQ 0.1.6", "int4", 1, 64, 64, 3.67),
    ("TinyLlama-1.1B", "AutoAWQ 0.1.6", "int4", 1, 2048, 2048, 2.10),
    ("Mistral-7B-v0.1", "AutoAWQ 0.1.6", "int4", 8, 2048, 2048, 16.82),
    ("deepseek-coder-33b", "AutoAWQ 0.1.6", "int4", 1, 2048, 2048, 19.87),
    # NVIDIA/FasterTransformer, docs/gpt_guide.md (Apache-2.0): GiB of the whole process; only GPT 1.3B was fitted to.
    ("gpt-6.7b", "FasterTransformer", "fp16", 1, 128, 8, 15.55),
    ("gpt-6.7b", "FasterTransformer", "fp16", 32, 512, 32, 28.73),
    # premAI-io/benchmarks (MIT), MB of 1e6 bytes by nvidia-smi of an A100, here in GiB; no length of the prompt is told.
    ("Llama-2-7b", "Nvidia TensorRT-LLM", "fp32", 1, 16, 512, 73.97),
    ("Llama-2-7b", "Nvidia TensorRT-LLM", "int4", 1, 16, 512, 71.95),
    ("Mistral-7B-v0.1", "Optimum Nvidia", "fp16", 1, 16, 512, 74.04),
    ("Llama-2-7b", "ctranslate", "fp32", 1, 16, 512, 27.89),
    ("Llama-2-7b", "exllamav2", "int4", 1, 16, 512, 6.71),
    ("Mistral-7B-v0.1", "exllamav2", "int4", 1, 16, 512, 8.81),
    ("Llama-2-7b", "vllm", "fp16", 1, 16, 512, 72.58),
]
COLUMNS = ["model", "framework", "weight_dtype", "batch", "isl", "osl", "mem_gb"]


def test_peaks_are_near_what_others_published():
    """Median error below 2 %, none above 12 %; the intervals hold them all."""
    found = validate.predictions(validate.read(pd.DataFrame(PEAKS, columns=COLUMNS).assign(**A100), "peaks"))
    error = (found.pred_mem_gb / found.mem_gb - 1).abs()
    assert error.median() < 0.02
    assert error.max() < 0.12
    assert found.mem_gb.between(found.pred_mem_gb_low, found.pred_mem_gb_high).all()


def test_less_than_the_weights_alone_can_only_be_gib():
    """Qwen2.5-7B has 15.23e9 bytes of weights: 14.38 "GB" are GiB, then so are the other rows of that source and no others."""
    rows = pd.DataFrame([
        ("Qwen/Qwen2.5-7B-Instruct", "transformers", "bf16", 1, 1, 128, 14.38, "a"),
        ("Qwen/Qwen2.5-7B-Instruct", "transformers", "int4", 1, 1, 128, 5.5, "a"),
        ("Qwen/Qwen2.5-7B-Instruct", "transformers", "bf16", 1, 1, 128, 15.5, "b"),
        ("Qwen/Qwen2.5-7B-Instruct", "vllm", "bf16", 1, 1, 128, 70.0, "b"),
        ("no such model", "transformers", "fp5", 1, 1, 128, 1.0, "b"),
    ], columns=[*COLUMNS, "dataset"]).assign(**A100)  # fmt: skip
    assert list(validate.memory_units(validate.read(rows, "units"))) == [2**30, 2**30, 1e9, 2**30, 1e9]
    alone = validate.memory_units(validate.read(rows.drop(columns="dataset"), "units"))
    assert list(alone) == [2**30, 2**30, 2**30, 2**30, 2**30], "without a source they are one"


def test_more_than_there_is_can_only_be_gb():
    """premAI's 83.98 "GB" of an A100, whose 80 GB are GiB: its rows count 1e9; of two minds, each framework as usual."""
    rows = pd.DataFrame([
        ("Llama-2-7b", "DeepSpeed", "fp16", 1, 16, 512, 83.98, "a"),
        ("Llama-2-7b", "vllm", "fp16", 1, 16, 512, 77.93, "a"),
        ("Llama-2-7b", "vllm", "fp16", 1, 16, 512, 77.93, "b"),
    ], columns=[*COLUMNS, "dataset"]).assign(**A100)  # fmt: skip
    assert list(validate.memory_units(validate.read(rows, "units"))) == [1e9, 1e9, 2**30]
    both = pd.concat([rows, rows.assign(framework="transformers", mem_gb=12.9)])
    assert list(validate.memory_units(validate.read(both.reset_index(drop=True), "units"))[:3]) == [1e9, 2**30, 2**30]


def test_the_peak_is_that_of_the_prefill_or_of_decoding():
    model, row = catalogue.find("Qwen2.5-7B"), hardware.find("A100-SXM-80GB")
    s = setup(model, row, find("transformers 4.46", row))
    short, long = (memory.peak_terms(s, np.ones(1), np.full(1, n), np.full(1, 2048.0)) for n in (1.0, 30720.0))
    kv = model.kv_bytes_per_token()
    assert short["kv cache"] == pytest.approx(2049 * kv), "at the end of decoding"
    assert long["kv cache"] == pytest.approx(30720 * kv), "at the end of the prefill"
    assert long["activations"] == pytest.approx(30720 * 2 * (3 * 18944 + 4 * 3584))


def test_attention_in_full_is_kept_by_old_releases_only():
    row = hardware.find("A100-SXM-80GB")
    assert find("transformers", row, offline=True).score_bytes == 8
    for name in ("transformers+flash-attn2", "transformers 4.46", "vllm"):
        assert find(name, row, offline=True).score_bytes == 0
