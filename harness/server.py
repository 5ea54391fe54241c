"""What servers, GPUs and this machine say of themselves, in one vocabulary: /metrics text -> values, samples -> figures.

Names come from: vLLM docs/design/metrics.md; llama.cpp tools/server/README.md; SGLang
python/sglang/srt/metrics/collector.py; TGI docs/source/reference/metrics.md; TensorRT-LLM
tensorrt_llm/metrics/collector.py (served at /prometheus/metrics, once return_perf_metrics is on).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan as NAN
from typing import Any

# ours -> theirs.  TGI tells no TTFT, and its mean time per token holds the prefill: neither is a figure of ours.
# TensorRT-LLM's time per output token counts each request once, so its mean is ours where answers are equally long.
NAMES = {
    "running": ("vllm:num_requests_running", "llamacpp:requests_processing", "sglang:num_running_reqs",
                "tgi_batch_current_size", "trtllm_num_requests_running"),
    "waiting": ("vllm:num_requests_waiting", "llamacpp:requests_deferred", "sglang:num_queue_reqs", "tgi_queue_size",
                "trtllm_num_requests_waiting"),
    "kv_use": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "llamacpp:kv_cache_usage_ratio",
               "sglang:token_usage", "trtllm_kv_cache_utilization"),
    "preemptions": ("vllm:num_preemptions_total", "sglang:num_retracted_requests_total"),
    "cache_queries": ("vllm:prefix_cache_queries_total",),
    "cache_hits": ("vllm:prefix_cache_hits_total", "sglang:cached_tokens_total", "trtllm_prompt_cached_tokens_total"),
    "prompt_tokens": ("vllm:prompt_tokens_total", "llamacpp:prompt_tokens_total", "sglang:prompt_tokens_total",
                      "tgi_request_input_length_sum", "trtllm_prompt_tokens_total"),
    "generation_tokens": ("vllm:generation_tokens_total", "llamacpp:tokens_predicted_total",
                          "sglang:generation_tokens_total", "tgi_request_generated_tokens_sum",
                          "trtllm_generation_tokens_total"),
    "ttft_sum_s": ("vllm:time_to_first_token_seconds_sum", "sglang:time_to_first_token_seconds_sum",
                   "trtllm_time_to_first_token_seconds_sum"),
    "ttft_count": ("vllm:time_to_first_token_seconds_count", "sglang:time_to_first_token_seconds_count",
                   "trtllm_time_to_first_token_seconds_count"),
    "itl_sum_s": ("vllm:inter_token_latency_seconds_sum", "vllm:time_per_output_token_seconds_sum",
                  "sglang:inter_token_latency_seconds_sum", "sglang:time_per_output_token_seconds_sum",
                  "trtllm_time_per_output_token_seconds_sum"),
    "itl_count": ("vllm:inter_token_latency_seconds_count", "vllm:time_per_output_token_seconds_count",
                  "sglang:inter_token_latency_seconds_count", "sglang:time_per_output_token_seconds_count",
                  "trtllm_time_per_output_token_seconds_count"),
}  # fmt: skip
KINDS = {"vllm:": "vllm", "llamacpp:": "llama.cpp", "sglang:": "sglang", "tgi_": "tgi", "trtllm_": "tensorrt-llm"}
SHARES = ("kv_use",)  # of several engines the fullest counts; all else adds up
_WANTED = {name: ours for ours, theirs in NAMES.items() for name in theirs}

# nvml.h, nvmlClocksEventReasons; idle and the user's own clock settings are no throttling
THROTTLES = {0x04: "power cap", 0x08: "hardware slowdown", 0x20: "thermal (software)", 0x40: "thermal (hardware)",
             0x80: "power brake"}  # fmt: skip


def read_metrics(text: str) -> dict[str, Any]:
    """Prometheus text -> our vocabulary, over all engines, with the server's names beside (`names`).

    What a server does not tell is absent.  The first of a list of names that appears in the page is the one read.
    """
    from prometheus_client.parser import text_string_to_metric_families

    values: dict[str, Any] = {}
    names: dict[str, str] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                ours = _WANTED.get(sample.name)
                if ours and names.setdefault(ours, sample.name) == sample.name:
                    before = values.get(ours, 0.0)
                    values[ours] = max(before, sample.value) if ours in SHARES else before + sample.value
    except ValueError:
        pass  # half a page, or not Prometheus: what was read so far counts
    return values | ({"names": names} if names else {})


def senses(samples: Sequence[Mapping[str, Any]]) -> dict[str, str | None]:
    """What could be sensed beside the run: which server's metrics, which GPUs (or why none)."""
    names: Mapping[str, str] = next((s["names"] for s in samples if s.get("names")), {})
    first = next(iter(names.values()), "")
    gpu = next((s["about_gpu"] for s in samples if "about_gpu" in s), "absent: nothing was sampled")
    return {
        "metrics": next((kind for prefix, kind in KINDS.items() if first.startswith(prefix)), None),
        "host": "psutil" if any("host" in s for s in samples) else None,
        "gpu": gpu,
    }


Spans = Sequence[tuple[float, float]]


def rise(samples: Sequence[Mapping[str, Any]], spans: Spans, *path: str) -> float | None:
    """How far a counter rose over the spans (start, end; seconds on the samples' clock); None if it was never read.

    Each span reaches from the last sample before it to the first after it: the probe takes one when a trial has ended.
    """
    total, known = 0.0, False
    readings = [(s["at_s"], value) for s in samples if (value := _at(s, path)) is not None]
    for start_s, end_s in spans:
        before = next((v for at_s, v in reversed(readings) if at_s <= start_s), None)
        after = next((v for at_s, v in readings if at_s >= end_s), None)
        inside = [v for at_s, v in readings if start_s < at_s < end_s]
        low, high = before if before is not None else next(iter(inside), None), after
        high = high if high is not None else (inside[-1] if inside else None)
        if low is not None and high is not None and high >= low:  # a counter that fell belongs to a new server
            total, known = total + high - low, True
    return total if known else None


def _at(sample: Mapping[str, Any], path: Sequence[str]) -> Any:
    found: Any = sample
    for step in path:
        found = found.get(step) if isinstance(found, Mapping) else None
    return found


def point_figures(samples: Sequence[Mapping[str, Any]], spans: Spans, output_tokens: float) -> dict[str, Any]:
    """A point's figures from beside the run.  Times in seconds, energy in joules, shares of 1; None where not sensed.

    `output_tokens` is what the point's requests gave, warm-up included: the GPUs worked for those too.
    """
    seen = [s for s in samples if any(start <= s["at_s"] <= end for start, end in spans)]
    lasted_s = sum(end - start for start, end in spans)
    figures: dict[str, Any] = {
        "server_ttft_s": _mean(samples, spans, "ttft"),
        "server_itl_s": _mean(samples, spans, "itl"),
        "kv_use_max": _largest(seen, "kv_use"),
        "waiting_max": _largest(seen, "waiting"),
        "preemptions": rise(samples, spans, "preemptions"),
        "host_cpu_max": _largest(seen, "host", "cpu_share"),
        "host_memory_max": _largest(seen, "host", "memory_share"),
        "throttled_s": rise(samples, spans, "host", "throttled_s"),
        "server_ran_s": rise(samples, spans, "served", "ran_s"),
        "server_waited_s": rise(samples, spans, "served", "waited_s"),
    }
    return figures | _gpu_figures(samples, seen, spans, lasted_s, output_tokens)


def _gpu_figures(samples: Sequence[Mapping[str, Any]], seen: Sequence[Mapping[str, Any]], spans: Spans,
                 lasted_s: float, output_tokens: float) -> dict[str, Any]:  # fmt: skip
    gpus = [gpu for s in seen for gpu in s.get("gpu", {}).values()]
    energy_j, power_w = _energy(samples, seen, spans, lasted_s)
    clocks = [gpu["sm_hz"] for gpu in gpus if gpu.get("sm_hz") and gpu.get("use", 0) > 0.5]  # idle ones clock down
    reasons = sorted({said for gpu in gpus for bit, said in THROTTLES.items() if gpu.get("reasons", 0) & bit})
    return {
        "gpu_power_w": power_w,
        "gpu_energy_j": energy_j,
        "joules_per_output_token": energy_j / output_tokens if energy_j is not None and output_tokens > 0 else None,
        "gpu_use_mean": sum(use) / len(use) if (use := [g["use"] for g in gpus if g.get("use") is not None]) else None,
        "gpu_memory_max": max((g["memory_bytes"] for g in gpus if g.get("memory_bytes")), default=None),
        "gpu_temperature_max_c": max((g["temperature_c"] for g in gpus if g.get("temperature_c")), default=None),
        "gpu_sm_hz": [min(clocks), max(clocks)] if clocks else None,
        "gpu_throttled": reasons if gpus else None,
    }


def _energy(samples: Sequence[Mapping[str, Any]], seen: Sequence[Mapping[str, Any]], spans: Spans,
            lasted_s: float) -> tuple[float | None, float | None]:  # fmt: skip
    """(joules, mean watts) of all GPUs: by their energy counters, else by the mean of the sampled power."""
    ids = sorted({i for s in samples for i in s.get("gpu", {})})
    rises = [rise(samples, spans, "gpu", i, "energy_j") for i in ids]
    if ids and lasted_s > 0 and all(r for r in rises):
        energy_j = float(sum(r for r in rises if r))
        return energy_j, energy_j / lasted_s
    watts = [sum(g["power_w"] for g in s["gpu"].values() if g.get("power_w")) for s in seen if s.get("gpu")]
    if not any(watts):
        return None, None
    power_w = float(sum(watts) / len(watts))
    return power_w * lasted_s, power_w


def _mean(samples: Sequence[Mapping[str, Any]], spans: Spans, name: str) -> float | None:
    n, total_s = rise(samples, spans, f"{name}_count"), rise(samples, spans, f"{name}_sum_s")
    return total_s / n if n and total_s is not None else None


def _largest(samples: Sequence[Mapping[str, Any]], *path: str) -> float | None:
    return max((v for s in samples if (v := _at(s, path)) is not None), default=None)


def cached_share(samples: Sequence[Mapping[str, Any]], spans: Spans) -> float:
    """Share of the prompt tokens that a prefix cache answered, by the server's counters; NaN if it tells none."""
    asked = rise(samples, spans, "cache_queries") or rise(samples, spans, "prompt_tokens")
    hits = rise(samples, spans, "cache_hits")
    return hits / asked if asked and hits is not None else NAN
