"""Context parallelism of prefill and decoding, and fully sharded training: published figures and invariants."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from typer.testing import CliRunner

from harness import cli
from harness.records import RidgelineError
from harness.theory import catalogue, hardware, memory, ring, training
from harness.theory.frameworks import find
from harness.theory.predict import point
from harness.theory.roofline import setup
from harness.theory.sweep import sweep

LLAMA = catalogue.find("Llama-3.1-8B")
H100, L40S = hardware.find("H100-SXM"), hardware.find("L40S")


def swept(row, cp, tokens, **more):
    return sweep(LLAMA, row, batch=1, input_tokens=tokens, output_tokens=16, cp=cp, **more)


def test_a_long_prefill_is_shared_and_its_ring_hides():
    one, eight = (swept(H100, cp, 131_000).columns["ttft_s"].value[0] for cp in (1, 8))
    assert 7 < one / eight <= 8
    found = swept(H100, 8, 131_000)
    assert found.columns["ttft_s"].terms["ring"][0] == 0
    assert found.hidden["ttft_s"]["ring"][0] > 0


def test_a_short_prefill_over_pcie_waits_for_its_ring():
    found = swept(L40S, 8, 512)
    assert found.columns["ttft_s"].terms["ring"][0] > 0
    told = point(found, 0).ttft_s
    assert "+ ring " in told.because
    assert sum(told.terms.values()) == pytest.approx(told.value)


@pytest.mark.parametrize("tokens", [64, 4096, 100_000])
@pytest.mark.parametrize("row", [H100, L40S], ids=lambda row: row.name)
def test_what_is_sent_is_either_waited_for_or_hidden(row, tokens):
    s = setup(LLAMA, row, find("vllm", row), cp=4)
    ones, length = np.ones(1), np.full(1, float(tokens))
    attention = np.full(1, 1e-3)
    exposed, hidden = ring.exchange(s, ones, length, 0.0, attention)
    nothing_beside, _ = ring.exchange(s, ones, length, 0.0, 0 * attention)
    assert exposed + hidden == pytest.approx(nothing_beside)
    assert hidden <= 0.75e-3
    volume = 3 * tokens / 4 * LLAMA.kv_bytes_per_token() / row.link_for(4)
    assert nothing_beside > volume, "no faster than the link"


def test_every_accelerator_holds_the_weights_and_its_part_of_the_cache():
    one, four = (setup(LLAMA, H100, find("vllm", H100), cp=cp) for cp in (1, 4))
    assert memory.kv_space_bytes(four) == pytest.approx(4 * memory.kv_space_bytes(one))
    assert (
        swept(H100, 4, 512, framework="transformers").columns["mem_bytes"].terms["weights"] == 4 * LLAMA.weight_bytes()
    )
    reads = [swept(H100, cp, 100_000).columns["itl_s"].terms["kv cache"][0] for cp in (1, 4)]
    assert reads[1] == pytest.approx(reads[0] / 4, rel=0.01)


def test_without_it_nothing_changes_and_other_splits_are_refused():
    plain = sweep(LLAMA, H100, batch=1, input_tokens=2048, output_tokens=16)
    assert swept(H100, 1, 2048).columns["e2e_s"].value[0] == plain.columns["e2e_s"].value[0]
    assert "ring" not in plain.columns["ttft_s"].terms
    for wrong in ({"cp": 0}, {"cp": 2, "pp": 2}):
        with pytest.raises(RidgelineError, match="cp"):
            sweep(LLAMA, H100, batch=1, input_tokens=64, output_tokens=16, **wrong)


# --- training ---------------------------------------------------------------------------------------------------------


def test_the_shards_are_those_of_zero():
    """ZeRO, figure 1: 7.5 billion parameters with Adam need 120 GB, 1.9 GB each when split over 64."""
    parts = training.seeds.mixed_precision_bytes(7.5e9)
    assert sum(parts) == pytest.approx(120e9)
    assert sum(parts) / 64 == pytest.approx(1.9e9, rel=0.02)
    found = training.step(LLAMA, H100, gpus=64, batch=1, context=4096).memory
    assert found["weights"] + found["gradients"] + found["optimizer"] == pytest.approx(16 * LLAMA.params / 64)


def test_sharding_sends_half_as_much_again():
    assert training.sent_bytes(1e9, 8) / training.sent_bytes(1e9, 8, sharded=False) == pytest.approx(1.5)
    assert training.sent_bytes(1e9, 8) == pytest.approx(3 * 2e9 * 7 / 8)
    assert training.sent_bytes(1e9, 1) == 0


# Tokens/s of each accelerator: foundation-model-stack/fms-fsdp's README and pytorch/torchtitan's docs/performance.md.
RUNS = [
    ("Llama-2-7b", "A100-SXM-80GB", 128, 2, 4096, False, 50e9, 3700),
    ("Llama-2-7b", "H100-SXM", 96, 2, 4096, False, 100e9, 7500),
    ("Llama-2-13b", "A100-SXM-80GB", 128, 2, 4096, False, 50e9, 1800),
    ("Llama-2-13b", "H100-SXM", 96, 2, 4096, False, 100e9, 3800),
    ("codellama-34b", "A100-SXM-80GB", 128, 2, 4096, True, 50e9, 700),
    ("codellama-34b", "H100-SXM", 96, 2, 4096, True, 100e9, 1550),
    ("Meta-Llama-3-8B", "A100-SXM-80GB", 64, 1, 8192, False, math.nan, 2904),
    ("Meta-Llama-3-70B", "A100-SXM-80GB", 64, 1, 8192, True, math.nan, 331),
]


def test_public_runs_reach_as_much_of_it_as_is_said():
    shares = []
    for model, gpu, gpus, batch, context, again, link, measured in RUNS:
        found = training.step(catalogue.find(model), hardware.find(gpu), gpus=gpus, batch=batch, context=context,
                              recompute=again, link_bytes_per_s=link)  # fmt: skip
        assert found.fits, "as it did"
        shares.append(measured / (found.tokens_per_s / gpus))
    assert (min(shares), max(shares)) == pytest.approx(training.REACHED, abs=0.02)


@pytest.mark.parametrize("again", [True, False])
def test_terms_add_up_and_training_is_three_forward_passes(again):
    found = training.step(LLAMA, H100, gpus=8, batch=2, context=4096, recompute=again)
    assert found.tokens_per_s == pytest.approx(8 * 2 * 4096 / sum(found.step.values()))
    assert found.step["backward"] == 2 * found.step["forward"]
    assert found.step["recompute"] == (found.step["forward"] if again else 0)
    slow = training.step(LLAMA, H100, gpus=8, batch=2, context=4096, recompute=again, link_bytes_per_s=1e9)
    assert slow.step["exposed communication"] > 0.9 * slow.sent_bytes / 1e9 - sum(found.step.values())
    kept = training.step(LLAMA, H100, gpus=8, batch=2, context=4096, recompute=not again).memory["activations"]
    assert (kept > found.memory["activations"]) == again


def test_the_command_says_it_in_sentences_and_in_json():
    ask = ["training", "--model", "Llama-3.1-8B", "--hardware", "H100-SXM,A10", "--gpus", "8", "--link", "50GB/s"]
    text = CliRunner().invoke(cli.app, ask).output
    assert "Memory 27.51 GB = weights 2.008 GB" in text
    assert "it does not fit" in text, "an A10"
    assert "reached 53 % to 86 % of it" in text
    found = json.loads(CliRunner().invoke(cli.app, [*ask, "--json"]).output)["training"]["H100-SXM-80GB"]
    assert found["fits"]
    assert sum(found["memory"].values()) == pytest.approx(27.51e9, rel=1e-3)
    bad = CliRunner().invoke(cli.app, [*ask[:-4], "--gpus", "0"])
    assert isinstance(bad.exception, RidgelineError)
