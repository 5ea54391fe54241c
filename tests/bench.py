"""What the instrument costs and how true it is, beside its peers: `make bench`.

One table: streams, tokens/s, error of TTFT and ITL (reported minus really sent, by the simulator's log), CPU per token of
the whole process, start-up included, and memory.  The server is kept to one core, each client to another.  vllm bench
serve is measured in the same run where `make vllm` installed it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from harness import selftest

ROOT = Path(__file__).parent.parent
VLLM = ROOT / ".venv-vllm" / "bin" / "python"
TOKENIZER = ROOT / ".models" / "llama-134m"
Figures = dict[str, float]  # ttft_mean_s, ttft_p50_s, ttft_p99_s, itl_mean_s, itl_p50_s, itl_p99_s, as reported


def run(command: list[str], cores: list[int], folder: str) -> tuple[str, float, float]:
    """stdout, CPU seconds of a command and all that it waited for, and the largest process's peak bytes, on `cores`."""
    out, err = Path(folder) / "stdout", Path(folder) / "stderr"
    with out.open("w") as o, err.open("w") as e:
        process = subprocess.Popen(command, stdout=o, stderr=e, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
                                   preexec_fn=lambda: os.sched_setaffinity(0, cores))  # fmt: skip
        _, status, used = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(err.read_text()[-600:])
    return out.read_text(), used.ru_utime + used.ru_stime, used.ru_maxrss * 1024.0


def ours(url: str, n: int, folder: str) -> tuple[list[str], Callable[[str], Figures]]:
    command = [sys.executable, "-m", "harness", "run", "--url", url, "--mode", "closed", "--batch-sizes", str(n),
               "--requests", str(4 * n), "--warmup", "0", "--input-tokens", "64", "--no-report", "--json", "--quiet"]  # fmt: skip

    def read(out: str) -> Figures:
        point = json.loads(out)["points"][0]
        return {f"{m}_{q}_s": point[f"{m}_ms"][q] / 1e3 for m in ("ttft", "itl") for q in ("mean", "p50", "p99")}

    return command, read


# The CPU build's own command fails (it looks for a distribution named vllm); its benchmark is the same module.
VLLM_BENCH = (
    "import sys; from vllm.benchmarks.serve import add_cli_args, main; "
    "from vllm.utils.argparse_utils import FlexibleArgumentParser; "
    "p = FlexibleArgumentParser(); add_cli_args(p); main(p.parse_args(sys.argv[1:]))"
)


def vllm(url: str, n: int, folder: str) -> tuple[list[str], Callable[[str], Figures]]:
    result = Path(folder) / "vllm.json"
    command = [str(VLLM), "-c", VLLM_BENCH, "--base-url", url, "--model", "simulated", "--tokenizer", str(TOKENIZER),
               "--dataset-name", "random", "--random-input-len", "64", "--random-output-len", "150", "--ignore-eos",
               "--num-prompts", str(4 * n), "--max-concurrency", str(n), "--save-result", "--result-filename", str(result),
               "--percentile-metrics", "ttft,itl", "--metric-percentiles", "50,99", "--disable-tqdm"]  # fmt: skip

    def read(out: str) -> Figures:
        said = json.loads(result.read_text())
        return {f"{m}_{q}_s": said[f"{q}_{m}_ms"] / 1e3 for m in ("ttft", "itl") for q in ("mean", "p50", "p99")}

    return command, read


CLIENTS: dict[str, tuple[Path, Any]] = {
    "ridgeline": (Path(sys.executable), ours),
    "vllm bench serve": (VLLM, vllm),
}


def truth(url: str) -> Figures:
    sent = selftest.truth(url)
    pick = {"ttft": sent.ttft_s, "itl": sent.itl_s}
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
                except (RuntimeError, KeyError, OSError) as problem:
                    print(f"{name:>16} {n:>7}  failed: {str(problem)[-200:]!r}", flush=True)
                    continue
            tokens = 4 * n * selftest.TOKENS
            errors = " ".join(f"{(said[k] - true[k]) * 1e3:>+10.3f}" for k in true)
            print(
                f"{name:>16} {n:>7} {tokens:>8} {errors}  {cpu_s / tokens * 1e6:>12.1f} {peak / 1e6:>9.0f}", flush=True
            )


if __name__ == "__main__":
    main()
