"""The ledger: what the seed articles say, what it should be, and why.

Every value is computed here: the seeds' by their own formulas and figures (`seeds`), the corrected ones by the same
formulas with the right inputs, by the model's shape (`catalogue`), or from what others measured (`claims.csv`: rows of
Argonne's LLM-Inference-Bench, BSD-3-Clause, medians of repeats, and of premAI-io/benchmarks, MIT).
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from statistics import median

from harness.records import NAN
from harness.theory import catalogue, hardware, seeds
from harness.theory.seeds import COMPLETION_TOKENS, GPUS, H100_BYTES_PER_S, H100_FLOPS, LLAMA_2_7B_PARAMS, PROMPT_TOKENS

ARTICLES = {
    "000": "LLM Inference Essentials (S. Skvortsov, Nebius)",
    "001": "How LLM Inference Works (A. Bhayani)",
    "002": "LLM Inference Arithmetics (L. Baggi)",
    "003": "A guide to LLM inference and performance (V. Shenoy, P. Kiely, Baseten)",
    "004": "LLM Inference Optimization 101 (DigitalOcean)",
    "SB": "How to Scale Your Model, inference chapter (jax-ml/scaling-book)",
}
VERDICTS = ("holds", "rounded", "corrected", "wrong", "depends")
MEMORY_SHARE = 0.9  # what an engine takes of the memory: vLLM's default gpu_memory_utilization


@dataclass(frozen=True, slots=True)
class Row:
    """One claim.  `seed` and `corrected` are in `unit` (SI; "x" is a ratio); `seed` is NaN where it gives no number.

    `verdict` is one of VERDICTS: "depends" where the claim is neither true nor false without its conditions.
    """

    article: str
    claim: str
    seed: float
    corrected: float
    unit: str
    verdict: str
    why: str
    source: str


@cache
def ledger() -> tuple[Row, ...]:
    """All rows, by article."""
    return (*_essentials(), *_how_it_works(), *_arithmetics(), *_guide(), *_optimization(), *_scaling_book())


# What the articles print, where it is not what their formulas give.
PRINTED_TOKEN_S = {"T4": 46e-3, "A10": 23e-3, "A100-SXM-80GB": 6e-3}
PRINTED_PREFILL_S = {"T4": 75e-3, "A10": 39e-3, "A100-SXM-80GB": 16e-3}
PRINTED_TOTAL_S = {"T4": 6.98, "A10": 3.49, "A100-SXM-80GB": 0.92}
PRINTED_KV_TOKENS = 19_230
WEIGHTS = 2 * LLAMA_2_7B_PARAMS


def _guide() -> Iterator[Row]:
    """[003]"""
    a10, model = GPUS["A10"], catalogue.find("Llama-2-7b-hf")
    yield Row("003", "ops:byte of an A10", 208.3, seeds.ops_to_byte(a10.flops, a10.bytes_per_s), "FLOP/B", "holds",
              "125 TFLOP/s is the full rate; with fp32 accumulation it may be half, so this too is disputed",
              "hardware row A10")  # fmt: skip
    yield Row("003", "bytes of Llama 2 7B's weights", WEIGHTS, model.weight_bytes(), "B", "rounded",
              f"the model has {model.params:,} parameters, not 7.0 billion", "its config.json and weights' files")  # fmt: skip
    yield Row("003", "arithmetic intensity of decoding attention", seeds.attention_intensity(4096, 128),
              seeds.decode_attention_intensity(32, 32), "FLOP/B", "wrong",
              "62.4 is that of an unfused prefill; in decoding each cached key and value is read for one query (MHA) or "
              "for the queries of its group (GQA)", "the article's own table of loads and stores, for one query")  # fmt: skip
    projections = 2.0 * sum(g.count * g.attention_matmul for g in model.groups) * PROMPT_TOKENS
    scores = model.prefill_attention_flops(float(PROMPT_TOKENS))
    whole = model.matmul_flops_per_token * PROMPT_TOKENS + scores
    yield Row("003", "attention is the most expensive part: its share of a 350-token prefill", NAN,
              (projections + scores) / whole, "x", "wrong",
              f"most of it is the FFN; the scores themselves are {scores / whole:.1%}", "the model's shape")  # fmt: skip
    for gpu, row in GPUS.items():
        yield from _guide_gpu(gpu, row)
    t4, a100 = GPUS["T4"], GPUS["A100-SXM-80GB"]
    yield Row("003", "time per token on a T4, at 320 GB/s", PRINTED_TOKEN_S["T4"],
              seeds.time_per_token_s(WEIGHTS, hardware.find("T4").bytes_per_s), "s", "corrected",
              "clock times bus width gives 320 GB/s; for 300 no source was found", "hardware row T4")  # fmt: skip
    yield Row("003", "an A100 is faster than a T4", 7.5, _total_s(t4) / _total_s(a100), "x", "corrected",
              "7.5 follows from a time per token cut to 6 ms", "seeds' arithmetic, untruncated")  # fmt: skip
    yield Row("003", "a request on an A100 costs more than on a T4", 10.0,
              seeds.request_usd(_total_s(a100), a100.usd_per_min) / seeds.request_usd(_total_s(t4), t4.usd_per_min), "x",
              "wrong", "10x is the price of a minute; the A100 needs fewer of them", "the article's own prices")  # fmt: skip
    yield Row("003", "KV cache of Llama 2 7B for a token", seeds.kv_bytes_per_token(32, 4096), model.kv_bytes_per_token(),
              "B", "holds", "d_model is the width of keys and values only with MHA", "its config.json")  # fmt: skip
    tokens = seeds.kv_tokens(seeds.spare_bytes(a10.mem_bytes, WEIGHTS), seeds.kv_bytes_per_token(32, 4096))
    yield Row("003", "tokens that fit beside it on an A10", PRINTED_KV_TOKENS, tokens, "tokens", "rounded",
              "the article divides by 0.00052 GB", "seeds' arithmetic, unrounded")  # fmt: skip
    spare = MEMORY_SHARE * a10.mem_bytes - model.weight_bytes()
    fits = seeds.batch_that_fits(seeds.kv_tokens(spare, model.kv_bytes_per_token()), 4096)
    yield Row("003", "sequences of 4,096 tokens that fit there", seeds.batch_that_fits(PRINTED_KV_TOKENS, 4096), fits,
              "sequences", "corrected", "an engine takes 90 % of the memory, and activations need some of it",
              "vLLM's default gpu_memory_utilization")  # fmt: skip
    yield from _twice_as_long()


def _guide_gpu(gpu: str, row: seeds.SeedGpu) -> Iterator[Row]:
    token = seeds.time_per_token_s(WEIGHTS, row.bytes_per_s)
    prefill = seeds.prefill_s(LLAMA_2_7B_PARAMS, PROMPT_TOKENS, row.flops)
    yield Row("003", f"time per token on {gpu}", PRINTED_TOKEN_S[gpu], token, "s", "rounded",
              "truncated to whole milliseconds", "seeds' arithmetic, untruncated")  # fmt: skip
    yield Row("003", f"prefill of 350 tokens on {gpu}", PRINTED_PREFILL_S[gpu], prefill, "s", "holds",
              "2 P a token", "seeds' arithmetic")  # fmt: skip
    total = seeds.generation_s(prefill, token, COMPLETION_TOKENS)
    yield Row("003", f"350 in and 150 out on {gpu}", PRINTED_TOTAL_S[gpu], total, "s", "corrected",
              "the truncation again, and the prefill yields the first token: 149 steps for 150 tokens",
              "seeds' arithmetic, untruncated")  # fmt: skip
    yield Row("003", f"cost of that request on {gpu}", seeds.request_usd(PRINTED_TOTAL_S[gpu], row.usd_per_min),
              seeds.request_usd(_total_s(row), row.usd_per_min), "USD", "corrected", "the truncation again",
              "the article's own prices")  # fmt: skip


def _total_s(row: seeds.SeedGpu) -> float:
    """The article's total without its truncation, with its count of 150 steps."""
    token = seeds.time_per_token_s(WEIGHTS, row.bytes_per_s)
    prefill = seeds.prefill_s(LLAMA_2_7B_PARAMS, PROMPT_TOKENS, row.flops)
    return seeds.generation_s(prefill, token, COMPLETION_TOKENS, first_from_prefill=False)


def _essentials() -> Iterator[Row]:
    """[000]"""
    nvl, sxm = hardware.find("H100-NVL-94GB"), hardware.find("H100-SXM-80GB")
    source = "hardware rows H100-NVL-94GB, H100-SXM-80GB"
    why = "the larger figure needs 2:4 sparsity; dense weights reach half of it"
    yield Row("000", "peak FLOP/s of an H100 NVL, 16 bit", H100_FLOPS["NVL, sparse (the seed)"], nvl.flops["bf16"],
              "FLOP/s", "wrong", why, source)  # fmt: skip
    yield Row("000", "peak FLOP/s of an H100 SXM, 16 bit", H100_FLOPS["SXM, sparse (the seed)"], sxm.flops["bf16"],
              "FLOP/s", "wrong", why, source)  # fmt: skip
    yield Row("000", "critical batch of an H100 SXM",
              seeds.critical_batch(H100_FLOPS["SXM, sparse (the seed)"], H100_BYTES_PER_S),
              seeds.critical_batch(sxm.flops["bf16"], sxm.bytes_per_s), "sequences", "wrong", why, source)  # fmt: skip
    a10 = GPUS["A10"]
    alone = seeds.token_usd(LLAMA_2_7B_PARAMS, 1, a10.flops, a10.bytes_per_s, a10.usd_per_min * 60)
    critical = seeds.critical_batch(a10.flops, a10.bytes_per_s)
    yield Row("000", "an output token costs more than an input token", 3.0, alone.output / alone.input, "x", "depends",
              f"critical batch / batch: this on an A10 for a request alone, 3 at a batch of {critical / 3:.0f}",
              "seeds' arithmetic")  # fmt: skip


def _how_it_works() -> Iterator[Row]:
    """[001]"""
    big, small = catalogue.find("Llama-2-13b-hf"), catalogue.find("Llama-2-7b-hf")
    kv = big.kv_bytes_per_token()
    shape = "its config.json"
    yield Row("001", "KV cache of LLaMA-2-13B for a token", 1e6, kv, "B", "rounded", "2 · 2 bytes · 40 layers · 5,120",
              shape)  # fmt: skip
    yield Row(
        "001", "the same for 4,000 tokens", 4e9, 4000 * kv, "B", "rounded", "the rounded figure times 4,000", shape
    )
    yield Row("001", "that beside the weights (\"comparable\")", 1.0, 4000 * kv / big.weight_bytes(), "x", "wrong",
              f"{big.weight_bytes() / 1e9:.0f} GB of weights; a batch of eight such sequences is comparable", shape)  # fmt: skip
    entry = next(e for e in catalogue.entries() if "meta-llama/Llama-2-7b-hf" in e.names)
    int4 = entry.model(quantization={"quant_method": "awq", "bits": 4})
    yield Row("001", "a 7B model in INT4", 3.5e9, int4.weight_bytes(), "B", "corrected",
              "each group of 128 weights has a scale and a zero, and embeddings stay in 16 bit", "AWQ's layout")  # fmt: skip
    yield Row("001", "a 7B model in FP16", 14e9, small.weight_bytes(), "B", "rounded", "6.74 billion parameters", shape)
    n = PROMPT_TOKENS
    yield Row("001", "pairs of positions in a 350-token prefill (\"all tokens can see all other tokens\")", float(n * n),
              n * (n + 1) / 2, "pairs", "wrong", "a decoder's mask is causal: a token sees those before it",
              "the causal mask")  # fmt: skip
    yield from _five_times()
    yield from _int8()
    a10 = GPUS["A10"]
    tokens = seeds.kv_tokens(seeds.spare_bytes(a10.mem_bytes, WEIGHTS), small.kv_bytes_per_token())
    request = [PROMPT_TOKENS + COMPLETION_TOKENS]
    held = tokens // seeds.contiguous_slots(request, 4096), tokens // seeds.paged_slots(request)
    yield Row("001", "vLLM's throughput over naive engines (\"2-4x\")", 3.0, held[1] / held[0], "x", "depends",
              f"of requests of 500 tokens an A10 holds {held[0]} where each reserves 4,096 slots and {held[1]} in blocks of "
              "16; the gain in throughput is at most that, and least where requests are long or few",
              "seeds' arithmetic; PagedAttention, arXiv:2309.06180")  # fmt: skip


def _arithmetics() -> Iterator[Row]:
    """[002]"""
    params = LLAMA_2_7B_PARAMS
    gemma = catalogue.find("gemma-2b")
    share = gemma.params_by_part["embedding"] / gemma.params
    yield Row("002", "parameters of Gemma 2B (\"closer to a 3B\")", 3e9, gemma.params, "parameters", "holds",
              f"{share:.0%} of them are the embedding of 256,000 tokens, which the name leaves out", "its config.json")  # fmt: skip
    yield Row("002", "compute of training over inference, per token", 3.0,
              seeds.training_flops(params, 1) / seeds.prefill_s(params, 1, 1.0), "x", "holds",
              "one forward pass and two backward; activations computed again add a third", "seeds' arithmetic")  # fmt: skip
    yield Row("002", "memory to train a 7B model with Adam, without activations", sum(seeds.training_bytes(params)),
              sum(seeds.mixed_precision_bytes(params)), "B", "corrected",
              "Adam's two moments and a master copy of the weights are kept in 32 bit", "ZeRO, arXiv:1910.02054")  # fmt: skip
    yield Row("002", "TTFT of 8 requests of 350 tokens together, over one alone (\"a larger batch decreases it\")", NAN, 8.0,
              "x", "wrong", "filling the cache of more sequences takes longer, as the article's own reason says: "
              "prefill is compute-bound from the first", "seeds' arithmetic")  # fmt: skip


def _optimization() -> Iterator[Row]:
    """[004]"""
    model, gpu = catalogue.find("Llama-2-7b-hf"), GPUS["A100-SXM-80GB"]
    context = float(PROMPT_TOKENS + COMPLETION_TOKENS)
    weights, kv = model.read_bytes(), model.kv_read_bytes(context)
    critical = seeds.critical_batch(gpu.flops, gpu.bytes_per_s)

    def step(batch: float) -> float:
        return seeds.decode_step_s(weights, batch * kv, gpu.bytes_per_s, model.params, batch, gpu.flops)

    yield Row("004", "step time at the critical batch over that at batch 1 (\"without any performance penalty\")", 1.0,
              step(critical) / step(1), "x", "wrong",
              f"KV reads grow with the batch: at {critical:.0f} sequences of 500 tokens (Llama 2 7B, A100) they outweigh the "
              "weights", "scaling-book's step time")  # fmt: skip
    yield Row("004", "decoding is memory-bound for its cache: share of KV in the bytes of a step at 500 tokens", NAN,
              kv / (kv + weights), "x", "wrong", "at batch 1 it is the weights that are read; the cache counts at large "
              "batch or long context", "the model's shape")  # fmt: skip


def _scaling_book() -> Iterator[Row]:
    """[SB]"""
    rate, flops, kv, batch = 16 * 819e9, 16 * 197e12, 8192 * 100e3, 256
    yield Row("SB", "step of a 30B int8 model at batch 256 on 16 TPU v5e, if reads and compute overlap",
              max((30e9 + batch * kv) / rate, 2 * 30e9 * batch / flops),
              seeds.decode_step_s(30e9, batch * kv, rate, 30e9, batch, flops), "s", "corrected",
              "KV reads do not hide behind the matrix work of the same step; the overlapped form is the strict bound",
              "the book's own formula, at its general form")  # fmt: skip


# --- the three claims that only measurements can judge ----------------------------------------------------------------


@cache
def _claims(claim: str) -> tuple[dict[str, str], ...]:
    text = resources.files("harness.theory").joinpath("claims.csv").read_text("utf-8")
    return tuple(row for row in csv.DictReader(text.splitlines()) if row["claim"] == claim)


def _twice_as_long() -> Iterator[Row]:
    """[003] Measured end-to-end time over the article's own formula, one request at a time."""
    ratios: dict[str, list[float]] = {}
    for row in _claims("twice as long"):
        params, gpu = catalogue.find(row["model"]).params, hardware.find(row["hardware"])
        token = seeds.time_per_token_s(2 * params, gpu.bytes_per_s)
        prefill = seeds.prefill_s(params, int(row["input_tokens"]), gpu.flops.get("fp16", gpu.flops["bf16"]))
        predicted = seeds.generation_s(prefill, token, int(row["output_tokens"]), first_from_prefill=False)
        ratios.setdefault(row["engine"], []).append(float(row["value"]) / predicted)
    every = [ratio for found in ratios.values() for ratio in found]
    within = sum(ratio <= 2 for ratio in every)
    medians = ", ".join(f"{engine} {median(found):.1f}" for engine, found in sorted(ratios.items()))
    yield Row("003", "reality takes up to twice as long", 2.0, median(every), "x", "depends",
              f"{within} of {len(every)} measured cells (7B and 8B, 16 bit, batch 1, 1024 in and out) are within 2x, the worst "
              f"is {max(every):.1f}x; medians by engine: {medians}", "Argonne LLM-Inference-Bench (BSD-3-Clause)")  # fmt: skip


def _five_times() -> Iterator[Row]:
    """[001] 1,000 tokens take 10 s with a KV cache and 50 s without."""

    def ratio(gpu: seeds.SeedGpu, tokens: int) -> float:
        args = (LLAMA_2_7B_PARAMS, 1, tokens, gpu.flops, gpu.bytes_per_s)
        return seeds.recompute_s(*args) / seeds.cached_s(*args)

    by_gpu = ", ".join(f"{name} {ratio(gpu, 1000):.1f}" for name, gpu in GPUS.items())
    a100 = GPUS["A100-SXM-80GB"]
    crossing = int(seeds.critical_batch(a100.flops, a100.bytes_per_s))
    yield Row("001", "1,000 tokens without a KV cache over with one (\"nearly 5x\")", 5.0, ratio(a100, 1000), "x", "depends",
              f"it is no constant: a 7B model at 1,000 tokens gives {by_gpu}; on the A100 {ratio(a100, crossing):.1f} up to "
              f"{crossing} tokens, where computing them again hides behind reading the weights, and {ratio(a100, 4000):.0f} at "
              "4,000", "seeds' arithmetic; no public measurement was found")  # fmt: skip


def _int8() -> Iterator[Row]:
    """[001] FP16 to INT8 "cut our response times by more than half"."""
    cells: dict[tuple[str, ...], dict[str, float]] = {}
    impossible = set()
    for row in _claims("INT8 halved"):
        key = (row["engine"], row["model"].split("/")[-1], row["hardware"], f"batch {row['batch']}")
        cells.setdefault(key, {})[row["dtype"]] = float(row["value"])
        read_s = catalogue.find(row["model"]).read_bytes() / hardware.find(row["hardware"]).bytes_per_s
        if row["metric"] == "itl_s" and row["dtype"] == "fp16" and float(row["value"]) < read_s:
            impossible.add(key)
    gains = {key: cell["fp16"] / cell["int8"] for key, cell in cells.items() if key not in impossible}
    best = max(gains, key=lambda key: gains[key])
    slower = sum(gain < 1 for gain in gains.values())
    yield Row("001", "FP16 to INT8 makes responses faster (\"by more than half\")", 2.0, median(gains.values()), "x", "depends",
              "2.0 is the bound of memory-bound decoding: half the weight bytes. "
              f"Of {len(gains)} measured pairs {slower} got slower (weights widened before each product, or a large batch); "
              f"the best gained {gains[best]:.2f}x ({', '.join(best)}). {len(impossible)} more, up to "
              f"{max(cells[k]['fp16'] / cells[k]['int8'] for k in impossible):.2f}x, are left out: their 16-bit time is less "
              "than the stated GPU needs to read the weights",
              "premAI-io/benchmarks (MIT); Argonne LLM-Inference-Bench (BSD-3-Clause)")  # fmt: skip
