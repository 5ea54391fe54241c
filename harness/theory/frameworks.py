"""What a serving framework adds to the hardware's work: rows of data (`frameworks.csv`), found by name."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

from harness.records import RidgelineError
from harness.theory import dtypes
from harness.theory.hardware import Hardware


@dataclass(frozen=True, slots=True)
class Framework:
    """`step_s` host time of a step that no GPU work hides, `sequence_s` more for each sequence in it; `launch_s` of a
    kernel launched from the host where no graph is replayed (`eager_*`), which counts where it is longer than the work.
    `request_s` from a request's arrival to its first pass, `routed_s` more of a model with experts and `latent_s` of one with
    latent attention (MLA), whose prefill the host launches kernel by kernel; `stream_s` of sending a token on, which is done beside the
    step and bounds it where many stream; `link_s` more for each transfer between accelerators.

    Times the kernels' own laws: `gemm` (reading weights), `compute`, `attention`, `elementwise` (what lies between the
    matrices: 3.8 where each operation of a norm, a rotation or an activation reads and writes memory by itself, by the
    count of bytes of transformers' LlamaDecoderLayer in eager mode); decode attention also by group size ^ `grouped` (kernels that read a KV head for several of its query heads), experts by `experts`, and `expert_layer_s`
    for each layer with them: routing, permuting, gathering.

    `pool`: share of the memory taken in advance, of "all" of it or for the "cache" alone; 0: as needed.  `chunk`: most
    prompt tokens of a pass.  `mixed`: prefills run in the passes of decoding steps.  `layered`: several accelerators
    hold layers each and work in turn.  `all_logits`: the prefill computes those of every prompt token (releases before LAST_LOGITS).

    `copied`: a step writes the whole cache anew (torch.cat) and repeats its heads for every query head before it attends
    (repeat_kv of transformers' modeling_llama.py).  `widen_above`: with more tokens than that a pass first writes narrow
    weights out in 16 bit (MAX_Q_GEMM_ROWS: 32 in exllamav2, 50 in AutoGPTQ's copy; bitsandbytes' gemv is for one token; AutoAWQ's
    heuristic); up to it the kernel reaches `cores` of the rate in fp32 (0: it has the matrix units; from Llama-7B of huggingface/
    optimum-benchmark on an A100; an RTX's twice as many lanes are not held against a measurement [unverified]).
    `unsplit`: times as long decode attention takes where paged attention does not split sequences (harness.theory.switches).
    `cache_copies`: of the cache that are there at the peak of memory: two in releases before DYNAMIC_CACHE.
    `sequences`: most in a step (vLLM's max_num_seqs).  `score_bytes` of each head's attention matrix that are there at a time
    (0: fused); `scratch_tokens`: of which the kernels of narrow weights keep space for outputs.  `gathers`: what comes at
    once is taken at once; others take the first prompt that comes and prefill it alone, while the rest of its batch is still
    being read.  `attention_rows`: that decode attention computes for each KV head, however few of its query heads there are.
    `calls`: of nothing but a small product, that a kernel costs a CPU beside its work.  `grows`: a sequence takes memory as it
    grows (others put some off while the rest have answers to write: SGLang, TensorRT-LLM).  `half_sums`: products are summed up
    in 16 bit, which a GeForce does at twice the rate of its row (sums in 32 bit).
    `experts_lose`: the power of `gemm` and `compute` that the experts' products take; `experts_read`: `experts` for reading their weights,
    where that differs (0: it does not); `untuned`:
    by kernels not yet made for the model (TUNED_LATENT).
    """

    name: str
    step_s: float = 0.0
    sequence_s: float = 0.0
    launch_s: float = 5e-6
    link_s: float = 0.0
    stream_s: float = 0.0
    request_s: float = 0.0
    routed_s: float = 0.0
    latent_s: float = 0.0
    gemm: float = 1.0
    compute: float = 1.0
    attention: float = 1.0
    elementwise: float = 1.0
    grouped: float = 0.0
    experts: float = 1.4
    expert_layer_s: float = 30e-6
    eager_prefill: bool = True
    eager_decode: bool = False
    pool: float = 0.9
    pool_of: str = "all"
    chunk: int = 8192
    mixed: bool = True
    layered: bool = False
    all_logits: bool = False
    copied: bool = False
    widen_above: float = math.inf
    cores: float = 0.0
    unsplit: float = 1.0
    cache_copies: float = 1.0
    sequences: float = math.inf
    score_bytes: float = 0.0
    scratch_tokens: float = 0.0
    gathers: bool = False
    attention_rows: float = 1.0
    experts_lose: float = 1.0
    experts_read: float = 0.0
    untuned: bool = False
    calls: float = 1.0
    grows: bool = False
    half_sums: bool = False


# Another spelling in a name, its words joined by "-" -> ours; the first that stands in it counts, so the particular comes before
# the general.
SPELLINGS = {
    "autoawq": "autoawq",
    "lightning": "lightning",
    "litgpt": "lightning",
    "lit-gpt": "lightning",
    "onnxruntime-genai": "compiled",
    "onnx-runtime-genai": "compiled",
    "onnx": "onnx",
    "ctranslate": "ctranslate",
    "ctransformers": "llama.cpp",
    "transformers": "transformers",  # with whatever kernels (transformers GPTQ exllamav2)
    "exllamav2": "exllamav2",
    "exllamav3": "exllamav2",
    "tabbyapi": "exllamav2",  # the server of both
    "exllama": "exllama",
    "llama-cpp": "llama.cpp",
    "llamacpp": "llama.cpp",
    "llama-bench": "llama.cpp",
    "ollama": "llama.cpp",
    "lm-studio": "llama.cpp",
    "koboldcpp": "llama.cpp",
    "llamafile": "llama.cpp",
    "optimum-nvidia": "optimum-nvidia",
    "fastertransformer": "fastertransformer",
    "tensorrt": "tensorrt-llm",
    "trtllm": "tensorrt-llm",
    "trt-llm": "tensorrt-llm",
    "nim": "tensorrt-llm",
    "vllm": "vllm",
    "sglang": "sglang",
    "sgl": "sglang",
    "lmdeploy": "lmdeploy",
    "turbomind": "lmdeploy",
    "lightllm": "vllm",
    "text-generation-inference": "vllm",
    "sarathi": "vllm",  # a fork of it
    "llm-d": "vllm",
    "tgi": "vllm",
    "aphrodite": "vllm",
    "lorax": "vllm",
    "deepspeed": "deepspeed",
    "fastgen": "deepspeed",
    "gpt-fast": "gpt-fast",
    "gptfast": "gpt-fast",
    "torchao": "gpt-fast",
    "torch-compile": "gpt-fast",
    "mlc": "compiled",
    "jax": "compiled",
    "jetstream": "compiled",
    "habana": "compiled",  # graphs, where no engine is named before
    "llm-awq": "autoawq",
    "autogptq": "transformers",
    "gptq-for-llama": "transformers",
    "bitsandbytes": "transformers",
    "accelerate": "transformers",
    "huggingface": "transformers",
    "hugging-face": "transformers",
    "hf": "transformers",
    "pytorch": "transformers",
    "torch": "transformers",
}
_UNITS = {"us": 1e-6, "ms": 1e-3}


@cache
def _rows() -> tuple[tuple[dict[str, str], Framework], ...]:
    text = resources.files("harness.theory").joinpath("frameworks.csv").read_text("utf-8")
    rows = csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
    return tuple((row, _framework(row)) for row in rows)


def _framework(row: dict[str, str]) -> Framework:
    given: dict[str, object] = {}
    for column, text in list(row.items())[4:-1]:
        if not text:
            continue
        name, _, unit = column.rpartition("_")
        if unit in _UNITS:
            given[f"{name}_s"] = float(text) * _UNITS[unit]
        elif text in ("yes", "no"):
            given[column] = text == "yes"
        else:
            given[column] = text if column == "pool_of" else float(text)
    label = row["framework"] if row["setting"] in ("*", "served") else f"{row['framework']} (offline, 2024)"
    return Framework(label, **given)  # type: ignore[arg-type]


def named(name: str | None) -> str:
    """The framework's name as the rows have it, for any that it goes by ("TensorRT-LLM 0.9.0"); "generic" for others."""
    plain = re.sub(r"[-_ .]+", "-", (name or "").casefold())
    return next(
        (ours for spelling, ours in SPELLINGS.items() if re.search(rf"(?<![a-z]){re.escape(spelling)}", plain)),
        "generic",
    )


# Since these releases (early 2025) their loops overlap the host with the accelerator by default: vLLM's V1 engine, SGLang's
# overlapped scheduler, TensorRT-LLM's PyTorch backend.  Static batches with them have the host's cost of served ones.
# A launch takes a desktop's CPU, beside which these cards sit, less time than a server's: 0.43 by bitsandbytes' benchmarks, and
# no more by lmdeploy's of llm-awq and the READMEs of AutoAWQ and exllamav2.  A T4's old servers take more: half way (in the
# logarithm) to bitsandbytes' on one machine (1.5 times an H100's).
HOST = {"RTX-30": 0.43, "RTX-40": 0.43, "RTX-50": 0.43, "T4": 1.22}
# Before these releases, in the first weeks of DeepSeek-V3, engines ran latent attention and blockwise fp8 by many general
# kernels.  What that adds to a step lies between 12 and 43 ms on five servers of dstackai/benchmarks' DeepSeek-R1.
TUNED_LATENT = {"vllm": (0, 8), "sglang": (0, 4, 4), "tensorrt-llm": (0, 18)}
UNTUNED_STEP_S = 25e-3
LATENT = ("deepseek_v2", "deepseek_v3")
# DeepSeek-V3 in 4 bit (AWQ) takes vLLM 9 to 12 ms more a step than its reads and launches, on eight H100s, four H200s and eight A100s
# (tenstorrent/tt-inference-server issue 356, QuixiAI's model card).
NARROW_LATENT_STEP_S = 9e-3
# FlashAttention-3 computes 128 rows for a decoding query, later 64 (tile_size_fwd_sm90 and use_one_mma_wg in
# Dao-AILab/flash-attention's hopper/tile_size.h, BSD-3-Clause); these engines decode with it on Hopper since the first of these
# releases, with the narrower tile since about the second [unverified].  It counts where little compute goes with much bandwidth.
FLASH3 = {"vllm": ((0, 8), (0, 10)), "sglang": ((0, 4, 6), (0, 5))}
HOPPER = ("H100", "H200", "H20", "H800", "GH200")
# These compute experts with a Triton kernel of their own, whose losses on a platform lie between none and the library's
# (rocBLAS on MI300X in 2024: 8.8 times the time): half way in the logarithm.
FUSED_EXPERTS = ("vllm", "sglang")
# gpt-oss' experts run as two products which gather, add the bias, activate and scatter by themselves (triton_kernels'
# matmul_ogs, as vLLM's gpt_oss_triton_kernels_moe.py and SGLang call it, both Apache-2.0): less is lost and launched.
# Between gpustack's, anyscale's and InferenceX's closed loops on H100s.
GPT_OSS_READ, GPT_OSS_LAYER_S = 1.5, 10e-6
# Engines that can be told to launch each kernel from Python (--enforce-eager, --disable-cuda-graph), and what a launch takes
# there on an A100's server: 47 and 57 us by Qwen3-14B (vllm issue 20469) and 32B in 4 bit, whose kernels are shorter.
EAGER = re.compile(r"(?<![a-z])eager(?![a-z])|(disable|without|no)[ _-](cuda[ _-]?)?graphs?(?![a-z]|-padding)")
EAGER_ENGINES, EAGER_LAUNCH_S = ("vllm", "sglang"), 50e-6
# Whose 8 bit are of the weights alone, and under which name: they have no kernels that multiply by per-channel int8 alone.
EIGHT_BIT = {"llama.cpp": "q8_0", "exllama": "w8a16", "exllamav2": "w8a16"}
# vLLM runs its layers from Python, which on a CPU nothing hides: (calls, sequence_s).  From one machine: vLLM 0.32 with
# --enforce-eager on two EPYC cores, 134 M and 518 M parameters: 1.0 ms a layer, where a small product takes 14 us, and 1.2 ms
# for each sequence, whose tokens are sent on by the same cores.
CPU_HOST = {"vllm": (6.5, 1.2e-3)}
# Of these, on cards whose rate in their row is that of sums in 32 bit; exllama (cublasHgemm) prefills a 4090 at 180 TFLOP/s of fp16 by its
# README, above the row's 165, llama.cpp multiplies in fp16 or int8.
HALF_SUMS, GEFORCE = ("exllama", "exllamav2", "llama.cpp"), re.compile(r"RTX-[2-5]0[5-9]0")
HALF_SUM_COMPUTE = {"exllama": 0.55, "exllamav2": 0.55}
GROWS = ("vllm", "lmdeploy")  # Scheduler.schedule in vLLM takes blocks for the tokens of the next pass alone
# TensorRT-LLM's server in C++ (releases before 1.0, NIM): 10 and 31 ms to the first token of 200 alone by NIM's pages.
NIM = re.compile(r"(?<![a-z])nim(?![a-z])")
REQUEST_CPP_S = 10e-3
CPU_CHUNK = 2048  # tokens of a pass on a CPU: vLLM's max_num_batched_tokens there, llama.cpp's n_batch
LAST_LOGITS = (4, 45)  # since this release transformers' generate() computes a prompt's last logits only
# Since this one each layer replaces its own cache; before it the old caches of all layers live until the step has ended.
DYNAMIC_CACHE = (4, 36)
# Before it, too, attention was computed in full: scores in 16 bit with the mask added, softmax in 32 bit, cast back to 16.
EAGER_SCORE_BYTES = 8.0
AUTOAWQ_SCORE_BYTES = 10.0  # its fused prefill: scores in 16 bit, in 32 for the softmax, and the softmax's own 32
EXLLAMAV2_TOKENS = 2048.0 * 8  # max_input_len and max_batch_size of AutoGPTQ's exllamav2 kernels
# The release with which transformers began to know a family, where it is later than those two.
KNOWN_SINCE = {"qwen2": (4, 37), "gemma": (4, 38), "phi3": (4, 41), "gemma2": (4, 42), "qwen3": (4, 51), "gemma3": (4, 50),
               "qwen3_moe": (4, 51), "gpt_oss": (4, 55)}  # fmt: skip
# transformers: with bitsandbytes 0.45, whose kernels launch less.
OVERLAPPED = {"vllm": (0, 8), "sglang": (0, 4), "tensorrt-llm": (1, 0), "transformers": (4, 46)}
# vLLM built from its own Dockerfile for ROCm (0.6.1, as Argonne's README has it) took an MI300X two to eight times as long as AMD's
# images from the same months on (ROCm/vllm's docs/dev-docker, Oracle's blog on Llama-3.1-405B): a release that early must be stated.
ROCM_TUNED = (0, 6, 2)


def overlapped(name: str | None, hardware: str = "") -> bool:
    """Whether the name states a release ("vLLM 0.11.0") of OVERLAPPED or a later one; where ROCM_TUNED, no earlier one."""
    if hardware.startswith("MI3") and named(name) == "vllm":
        return (release(name) or ROCM_TUNED) >= ROCM_TUNED
    return (release(name) or (0, 0)) >= OVERLAPPED.get(named(name), (10**6, 0))


def release(name: str | None) -> tuple[int, ...] | None:
    """The first release that a name states: (0, 11, 0) of "vLLM 0.11.0"; NIM's own is not that of the engine in it."""
    if NIM.search((name or "").casefold()):
        return None
    found = re.search(r"\d+(?:\.\d+){1,2}", name or "")
    return tuple(map(int, found[0].split("."))) if found else None


def find(
    name: str | None, hardware: Hardware, dtype: str = "", *, offline: bool = False, family: str = ""
) -> Framework:
    """The row for a framework on this hardware with weights of this dtype; `offline`: as public static batches ran, most
    of which without a release named are of 2023, as far as the model's `family` was known then."""
    ours, plain, told = named(name), (name or "").casefold(), release(name)
    if ours == "transformers" and hardware.name.startswith("Gaudi"):
        ours = "compiled"  # as optimum-habana does: nothing is launched from the host
    row = _find(ours, hardware.name, hardware.measured, _width(dtype), offline and not overlapped(name, hardware.name))
    ran = told or (KNOWN_SINCE.get(family, (4, 0)) if offline else (99, 0))
    row = replace(row, all_logits=row.all_logits and ran < LAST_LOGITS, chunk=CPU_CHUNK if hardware.cpu else row.chunk)
    if hardware.cpu and ours in CPU_HOST:
        row = replace(row, calls=CPU_HOST[ours][0], sequence_s=CPU_HOST[ours][1])
    if family in LATENT and (told or (99,)) < TUNED_LATENT.get(ours, (0,)):
        row = replace(row, step_s=row.step_s + UNTUNED_STEP_S, untuned=True)
    if family == "deepseek_v3" and ours == "vllm" and _width(dtype) == "int4":
        row = replace(row, step_s=row.step_s + NARROW_LATENT_STEP_S)
    if ours == "vllm":
        large, new = _large(hardware), (told or OVERLAPPED["vllm"]) >= OVERLAPPED["vllm"]
        row = replace(row, sequences=1024.0 if large and new else 256.0, chunk=row.chunk if large or not new else 2048)
    if ours in EAGER_ENGINES and not hardware.cpu and EAGER.search(plain):
        row = replace(row, eager_prefill=True, eager_decode=True, launch_s=EAGER_LAUNCH_S)
    if family == "gpt_oss" and ours in FUSED_EXPERTS:
        row = replace(row, experts_read=min(row.experts, GPT_OSS_READ), expert_layer_s=GPT_OSS_LAYER_S)
    hosted = next((v for prefix, v in HOST.items() if hardware.name.startswith(prefix)), 1.0)
    row = replace(row, launch_s=row.launch_s * hosted, gathers=ours == "llama.cpp", grows=ours in GROWS)
    row = replace(row, experts_lose=0.5 if ours in FUSED_EXPERTS else 1.0)
    if hardware.name.split("-")[0] in HOPPER and ours in FLASH3:
        since, narrower = FLASH3[ours]
        at = told or narrower
        row = replace(row, attention_rows=1.0 if at < since else 64.0 if at >= narrower else 128.0)
    if ours == "tensorrt-llm" and (NIM.search(plain) or (told or (1, 0)) < (1, 0)):
        row = replace(row, request_s=min(row.request_s, REQUEST_CPP_S))
    if ours in HALF_SUMS and GEFORCE.match(hardware.name):
        row = replace(row, half_sums=True, compute=row.compute * HALF_SUM_COMPUTE.get(ours, 1.0))
    if row.copied and "exllamav2" in plain:
        row = replace(row, scratch_tokens=EXLLAMAV2_TOKENS)
    if ours == "autoawq":
        row = replace(row, score_bytes=AUTOAWQ_SCORE_BYTES)
    if row.copied and ran < DYNAMIC_CACHE:
        return replace(row, cache_copies=2.0, score_bytes=0.0 if "flash" in plain else EAGER_SCORE_BYTES)
    return row


def stated(name: str | None) -> str | None:
    """The name as it was given.  Raises RidgelineError for one that is not known; "generic" and none are for any."""
    if name and named(name) == "generic" and name.strip().casefold() != "generic":
        known = ", ".join(sorted({ours for ours in SPELLINGS.values() if named(ours) == ours} | {"generic", "mlc"}))
        raise RidgelineError(f"framework {name!r} is not known; use one of {known}")
    return name


def of_engine(kind: str | None, arguments: Iterable[object] = ()) -> str | None:
    """The name of an engine as its command makes it: "vllm --enforce-eager"."""
    flags = (a for a in map(str, arguments) if a.startswith("--") and not a.startswith("--no-") and "=" not in a)
    told = [a for a in flags if EAGER.search(a.casefold())]
    return " ".join([kind, *told]) if kind else None


def of_run(theory: Mapping[str, Any], engine: Mapping[str, Any]) -> str | None:
    """What a run predicts for: the framework that theory was told, else the engine by its kind and arguments."""
    return theory.get("framework") or of_engine(engine.get("kind"), engine.get("args") or ())


def stored(dtype: str | None, name: str) -> str | None:
    """The dtype of the weights as a framework means it: llama.cpp's int8 is Q8_0."""
    return EIGHT_BIT.get(named(name), dtype) if dtype and dtypes.stated(dtype) == "int8" else dtype


def _large(hardware: Hardware) -> bool:
    """Whether vLLM's server takes its larger defaults (vllm/engine/arg_utils.py of 0.8 and later, Apache-2.0)."""
    return hardware.mem_bytes >= 75e9 and not hardware.name.startswith("A100")


def _width(dtype: str) -> str:
    """The dtype by which rows are told apart: fp16 for any 16 bit, w8a16 and int4 for weights of about so many bits."""
    plain = dtypes.stated(dtype) or ""
    if plain in ("", "fp8", "nvfp4", "fp4", *dtypes.WHOLE):
        return "fp16" if plain == "bf16" else plain
    if plain == "nf4":
        return plain
    return "int8" if plain == "int8" else "w8a16" if dtypes.BITS[plain] >= 6 else "int4"


@cache
def _find(name: str, hardware: str, measured: bool, dtype: str, offline: bool) -> Framework:
    setting = "offline" if offline and not measured else "served"
    for row, framework in _rows():
        if (
            row["framework"] == name
            and row["setting"] in ("*", setting)
            and (row["hardware"] == "*" or hardware.startswith(row["hardware"]))
            and row["dtype"] in ("*", dtype)
        ):
            return framework
    raise AssertionError(f"frameworks.csv has no general row of {name}")
