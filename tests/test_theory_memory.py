"""KV capacity against what vLLM logged when it started: here on a CPU, and on GPUs in public logs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from harness import cli
from harness.records import RidgelineError
from harness.theory import catalogue, hardware, memory
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
