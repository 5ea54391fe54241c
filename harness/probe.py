"""Samples the server's /metrics beside the run, in a process of its own: parsing them would hold up the loop that stamps.

`python -m harness.probe URL FILE` writes one JSON line per sample until its standard input closes.  The names of
different servers are mapped to one vocabulary; what a server does not tell is absent.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time
import urllib.error
import urllib.request
from typing import Any

PERIOD_S = 0.5

# ours -> theirs (vLLM; llama.cpp; SGLang; TGI).  Counters carry _total in the text format.
NAMES = {
    "running": (
        "vllm:num_requests_running",
        "llamacpp:requests_processing",
        "sglang:num_running_reqs",
        "tgi_batch_current_size",
    ),
    "waiting": ("vllm:num_requests_waiting", "llamacpp:requests_deferred", "sglang:num_queue_reqs", "tgi_queue_size"),
    "kv_use": (
        "vllm:kv_cache_usage_perc",
        "vllm:gpu_cache_usage_perc",
        "llamacpp:kv_cache_usage_ratio",
        "sglang:token_usage",
    ),
    "preemptions": ("vllm:num_preemptions_total",),
    "cache_queries": ("vllm:prefix_cache_queries_total",),
    "cache_hits": ("vllm:prefix_cache_hits_total",),
    "prompt_tokens": ("vllm:prompt_tokens_total", "llamacpp:prompt_tokens_total", "sglang:prompt_tokens_total"),
    "generation_tokens": (
        "vllm:generation_tokens_total",
        "llamacpp:tokens_predicted_total",
        "sglang:generation_tokens_total",
    ),
    "ttft_sum_s": ("vllm:time_to_first_token_seconds_sum", "sglang:time_to_first_token_seconds_sum"),
    "ttft_count": ("vllm:time_to_first_token_seconds_count", "sglang:time_to_first_token_seconds_count"),
    "itl_sum_s": ("vllm:inter_token_latency_seconds_sum", "vllm:time_per_output_token_seconds_sum"),
    "itl_count": ("vllm:inter_token_latency_seconds_count", "vllm:time_per_output_token_seconds_count"),
}
_WANTED = {name: ours for ours, theirs in NAMES.items() for name in theirs}


def read_metrics(text: str) -> dict[str, Any]:
    """Prometheus text -> our vocabulary, summed over engines, with the server's names beside (`names`)."""
    from prometheus_client.parser import text_string_to_metric_families

    values: dict[str, Any] = {}
    names: dict[str, str] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                ours = _WANTED.get(sample.name)
                if ours and names.setdefault(ours, sample.name) == sample.name:
                    values[ours] = values.get(ours, 0.0) + sample.value
    except ValueError:
        pass  # half a page, or not Prometheus: what was read so far counts
    return values | ({"names": names} if names else {})


def sample(url: str, headers: dict[str, str], timeout_s: float = 5.0) -> dict[str, Any]:
    """One reading of /metrics.  Raises OSError or ValueError when there is none."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(f"{url}/metrics", headers=headers)
    with opener.open(request, timeout=timeout_s) as response:
        return read_metrics(response.read(4_000_000).decode("utf-8", "replace"))


def main(url: str, path: str) -> int:
    key = os.environ.get("RIDGELINE_KEY", "")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        os.nice(5)
    except OSError:
        pass
    failures = 0
    with open(path, "a", encoding="utf-8") as out:
        while failures < 5:
            start_s = time.perf_counter()
            try:
                values = sample(url, headers)
                failures = 0
                if values:
                    out.write(json.dumps({"at_s": start_s, "took_s": time.perf_counter() - start_s} | values) + "\n")
                    out.flush()
            except (OSError, ValueError, urllib.error.URLError):
                failures += 1
            wait_s = max(0.0, PERIOD_S - (time.perf_counter() - start_s))
            if select.select([0], [], [], wait_s)[0] and not os.read(0, 4096):
                break
    return 0


if __name__ == "__main__":
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise SystemExit(main(sys.argv[1], sys.argv[2]))
