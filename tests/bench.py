"""What the instrument costs and how true it is, beside its peers: `make bench`.

One table: streams, tokens/s, error of TTFT and ITL (reported minus really sent, by the simulator's log), CPU per token of
the whole process, start-up included, and memory.  The server is kept to one core, each client to another.  Peers are
measured where they are installed (guidellm and aiperf by `make peers`, vllm bench serve by `make vllm`).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from harness import selftest

ROOT = Path(__file__).parent.parent
PEERS = ROOT / ".venv-peers" / "bin"
VLLM = ROOT / ".venv-vllm" / "bin" / "python"
TOKENIZER = ROOT / ".models" / "llama-134m"
Figures = dict[str, float]  # ttft_mean_s, ttft_p50_s, ttft_p99_s, itl_mean_s, itl_p50_s, itl_p99_s, as reported


def run(command: list[str], cores: list[int], folder: str) -> tuple[str, float, float]:
    """stdout, CPU seconds and peak resident bytes of a command and all its children, on `cores`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=600, check=False,
                          preexec_fn=lambda: os.sched_setaffinity(0, cores),
                          env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"})  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(done.stderr[-600:])
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.stdout, cpu_s, after.ru_maxrss * 1024.0


def ours(url: str, n: int, folder: str) -> tuple[list[str], Callable[[str], Figures]]:
    command = [sys.executable, "-m", "harness", "run", "--url", url, "--mode", "closed", "--batch-sizes", str(n),
               "--requests", str(4 * n), "--warmup", "0", "--input-tokens", "64", "--no-report", "--json", "--quiet"]  # fmt: skip

    def read(out: str) -> Figures:
        point = json.loads(out)["points"][0]
        return {f"{m}_{q}_s": point[f"{m}_ms"][q] / 1e3 for m in ("ttft", "itl") for q in ("mean", "p50", "p99")}

    return command, read


def vllm(url: str, n: int, folder: str) -> tuple[list[str], Callable[[str], Figures]]:
    result = Path(folder) / "vllm.json"
    command = [str(VLLM), "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--base-url", url, "--model", "simulated", "--tokenizer", str(TOKENIZER),
               "--dataset-name", "random", "--random-input-len", "64", "--random-output-len", "150", "--ignore-eos",
               "--num-prompts", str(4 * n), "--max-concurrency", str(n), "--save-result", "--result-filename", str(result),
               "--percentile-metrics", "ttft,itl", "--metric-percentiles", "50,99", "--disable-tqdm"]  # fmt: skip

    def read(out: str) -> Figures:
        said = json.loads(result.read_text())
        return {f"{m}_{q}_s": said[f"{q}_{m}_ms"] / 1e3 for m in ("ttft", "itl") for q in ("mean", "p50", "p99")}

    return command, read


def guidellm(url: str, n: int, folder: str) -> tuple[list[str], Callable[[str], Figures]]:
    result = Path(folder) / "guidellm.json"
    command = [str(PEERS / "guidellm"), "benchmark", "run", "--target", url, "--model", "simulated", "--processor", str(TOKENIZER),
               "--profile", "concurrent", "--rate", str(n), "--max-requests", str(4 * n), "--request-type", "text_completions",
               "--data", json.dumps({"prompt_tokens": 64, "output_tokens": 150}), "--output-path", str(result)]  # fmt: skip

    def read(out: str) -> Figures:
        m = json.loads(result.read_text())["benchmarks"][0]["metrics"]
        pick = {"ttft": m["time_to_first_token_ms"]["successful"], "itl": m["inter_token_latency_ms"]["successful"]}
        return {f"{k}_{q}_s": (v["mean"] if q == "mean" else v["percentiles"][q]) / 1e3
                for k, v in pick.items() for q in ("mean", "p50", "p99")}  # fmt: skip

    return command, read


def aiperf(url: str, n: int, folder: str) -> tuple[list[str], Callable[[str], Figures]]:
    command = [str(PEERS / "aiperf"), "profile", "--url", url, "--model", "simulated", "--tokenizer", str(TOKENIZER),
               "--endpoint-type", "completions", "--streaming", "--concurrency", str(n), "--request-count", str(4 * n),
               "--synthetic-input-tokens-mean", "64", "--output-tokens-mean", "150", "--ui", "none",
               "--use-server-token-count", "--extra-inputs", "ignore_eos:true", "--output-artifact-dir", folder]  # fmt: skip

    def read(out: str) -> Figures:
        said = json.loads(next(Path(folder).rglob("profile_export_aiperf.json")).read_text())
        pick = {"ttft": said["time_to_first_token"], "itl": said["inter_token_latency"]}
        return {
            f"{k}_{q}_s": v["avg" if q == "mean" else q] / 1e3 for k, v in pick.items() for q in ("mean", "p50", "p99")
        }

    return command, read


CLIENTS: dict[str, tuple[Path, Any]] = {
    "ridgeline": (Path(sys.executable), ours),
    "vllm bench serve": (VLLM, vllm),
    "guidellm": (PEERS / "guidellm", guidellm),
    "aiperf": (PEERS / "aiperf", aiperf),
}


def truth(url: str) -> Figures:
    sent = [r for r in json.loads(selftest._ask(f"{url}/__log__"))["requests"] if len(r["sent_s"]) == selftest.TOKENS]
    ttft = np.array([r["sent_s"][0] - r["received_s"] for r in sent])
    itl = np.concatenate([np.diff(r["sent_s"]) for r in sent])
    pick = {"ttft": ttft, "itl": itl}
    return {f"{k}_{q}_s": float(v.mean() if q == "mean" else np.quantile(v, float(q[1:]) / 100))
            for k, v in pick.items() for q in ("mean", "p50", "p99")}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", default="16,64,256,512")
    streams = [int(n) for n in parser.parse_args().streams.split(",")]
    client_cores, server_cores = selftest.split_cores()
    columns = [f"{m} {q}" for m in ("TTFT", "ITL") for q in ("mean", "p50", "p99")]
    print(
        f"{'client':>16} {'streams':>7} {'tokens':>8} "
        + " ".join(f"{c:>10}" for c in columns)
        + "  us CPU/token   MB peak"
    )
    print(" " * 34 + "error in ms: what the client reports minus what the server really sent")
    for n in streams:
        for name, (binary, build) in CLIENTS.items():
            if not binary.exists():
                continue
            with tempfile.TemporaryDirectory() as folder, selftest.simulator(server_cores) as url:
                command, read = build(url, n, folder)
                try:
                    out, cpu_s, peak = run(command, client_cores, folder)
                    said, true = read(out), truth(url)
                except (RuntimeError, KeyError, StopIteration, subprocess.TimeoutExpired) as problem:
                    print(f"{name:>16} {n:>7}  failed: {str(problem)[-200:]!r}", flush=True)
                    continue
            tokens = 4 * n * selftest.TOKENS
            errors = " ".join(f"{(said[k] - true[k]) * 1e3:>+10.3f}" for k in true)
            print(
                f"{name:>16} {n:>7} {tokens:>8} {errors}  {cpu_s / tokens * 1e6:>12.1f} {peak / 1e6:>9.0f}", flush=True
            )


if __name__ == "__main__":
    main()
