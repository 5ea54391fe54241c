"""What the instrument costs and how true it is, beside its peers: `make bench`.

One table: streams, tokens/s as the server sent them, error of TTFT and ITL (reported minus really sent, by the server's
log), CPU per token of the whole process tree, start-up included, and its memory.  The server is kept to one core, each
client to another; it is known_server.c where a C compiler is found, else the simulator, which is slower: it reads a burst
of requests late.  vllm bench serve is measured where `make vllm` installed it, guidellm and aiperf where `make peers` did.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from harness import selftest

ROOT = Path(__file__).parent.parent
SERVER = Path(__file__).parent / "known_server.c"
VLLM = ROOT / ".venv-vllm" / "bin" / "python"
PEERS = ROOT / ".venv-peers" / "bin"
TOKENIZER = ROOT / ".models" / "llama-134m"
QUANTITIES = tuple(f"{metric}_{q}_s" for metric in ("ttft", "itl") for q in ("mean", "p50", "p99"))
SAMPLE_S = 0.5  # between two looks at the memory
Figures = dict[str, float]  # QUANTITIES, as reported


@dataclass(frozen=True, slots=True)
class Call:
    """How to run a client once, and how to read what it says: `said` is given its stdout."""

    command: list[str]
    said: Callable[[str], Figures]
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Used:
    """What a command and all its descendants took."""

    out: str
    cpu_s: float
    peak_bytes: float  # the largest sum of their shares of memory (PSS), looked at every SAMPLE_S


def run(call: Call, cores: Sequence[int], folder: Path, limit_s: float) -> Used:
    """Run to the end on `cores`.  Raises RuntimeError with what it said last if it failed or took longer than `limit_s`."""
    out, err = folder / "stdout", folder / "stderr"
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"} | call.env
    with out.open("w") as o, err.open("w") as e:
        process = subprocess.Popen(call.command, stdout=o, stderr=e, cwd=folder, env=env, start_new_session=True,
                                   preexec_fn=lambda: os.sched_setaffinity(0, cores))  # fmt: skip
        root, cpu_s, peak = psutil.Process(process.pid), 0.0, 0.0
        deadline_s = time.monotonic() + limit_s
        try:
            while time.monotonic() < deadline_s:
                peak = max(peak, _pss_bytes(root))
                if ended := _waited(process.pid, time.monotonic() + SAMPLE_S):
                    process.returncode, cpu_s = ended
                    break
        finally:
            with contextlib.suppress(ProcessLookupError):  # what it left behind, or all of it when its time is over
                os.killpg(process.pid, signal.SIGKILL)
            if process.returncode is None:
                process.wait()
                raise RuntimeError(f"not over after {limit_s:g} s: stopped")
    if process.returncode:
        raise RuntimeError((err.read_text()[-400:] + out.read_text()[-400:]).strip())
    return Used(out.read_text(), cpu_s, peak)


def _waited(pid: int, until_s: float) -> tuple[int, float] | None:
    """Exit code and CPU seconds, those of all waited-for descendants included; None while it runs on at `until_s`."""
    while time.monotonic() < until_s:
        done, status, used = os.wait4(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
        time.sleep(0.02)
    return None


def _pss_bytes(root: psutil.Process) -> float:
    total = 0.0
    with contextlib.suppress(psutil.Error):
        for process in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
    return total


def ours(url: str, n: int, folder: Path) -> Call:
    command = [sys.executable, "-m", "harness", "run", "--url", url, "--mode", "closed", "--batch-sizes", str(n),
               "--requests", str(4 * n), "--warmup", "0", "--input-tokens", "64", "--no-report", "--json", "--quiet"]  # fmt: skip

    def said(out: str) -> Figures:
        point = json.loads(out)["points"][0]
        return {f"{m}_{q}_s": point[f"{m}_ms"][q] / 1e3 for m in ("ttft", "itl") for q in ("mean", "p50", "p99")}

    return Call(command, said)


# The CPU build's own command fails (it looks for a distribution named vllm); its benchmark is the same module.
VLLM_BENCH = (
    "import sys; from vllm.benchmarks.serve import add_cli_args, main; "
    "from vllm.utils.argparse_utils import FlexibleArgumentParser; "
    "p = FlexibleArgumentParser(); add_cli_args(p); main(p.parse_args(sys.argv[1:]))"
)


def vllm(url: str, n: int, folder: Path) -> Call:
    result = folder / "vllm.json"
    command = [str(VLLM), "-c", VLLM_BENCH, "--base-url", url, "--model", "simulated", "--tokenizer", str(TOKENIZER),
               "--dataset-name", "random", "--random-input-len", "64", "--random-output-len", "150", "--ignore-eos",
               "--num-prompts", str(4 * n), "--max-concurrency", str(n), "--save-result", "--result-filename", str(result),
               "--percentile-metrics", "ttft,itl", "--metric-percentiles", "50,99", "--disable-tqdm"]  # fmt: skip

    def said(out: str) -> Figures:
        told = json.loads(result.read_text())
        return {f"{m}_{q}_s": told[f"{q}_{m}_ms"] / 1e3 for m in ("ttft", "itl") for q in ("mean", "p50", "p99")}

    return Call(command, said)


def guidellm(url: str, n: int, folder: Path) -> Call:
    result = folder / "guidellm.json"
    command = [str(PEERS / "guidellm"), "run",
               "--backend", f"kind=openai_http,target={url},model=simulated,request_format=/v1/completions",
               "--profile", f"kind=concurrent,streams={n}", "--constraint", f"kind=max_requests,count={4 * n}",
               "--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=150",
               "--tokenizer", f"kind=huggingface_auto,model={TOKENIZER}", "--output", f"kind=json,path={result}",
               "--disable-console"]  # fmt: skip

    def said(out: str) -> Figures:
        told = json.loads(result.read_text())["benchmarks"][0]["metrics"]
        spread = {
            m: told[key]["successful"]
            for m, key in (("ttft", "time_to_first_token_ms"), ("itl", "inter_token_latency_ms"))
        }
        return {f"{m}_{q}_s": (one["mean"] if q == "mean" else one["percentiles"][q]) / 1e3
                for m, one in spread.items() for q in ("mean", "p50", "p99")}  # fmt: skip

    return Call(command, said)


def hub_of(tokenizer: Path, folder: Path) -> dict[str, str]:
    """A Hugging Face cache with the tokenizer in it as `local/tokenizer`: aiperf 0.13 looks for none elsewhere while it is
    offline, and its services set themselves offline."""
    revision = "0" * 40
    model = folder / "hub" / "hub" / "models--local--tokenizer"
    snapshot = model / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(revision)
    for file in tokenizer.glob("*.json"):
        (snapshot / file.name).symlink_to(file)
    return {"HF_HOME": str(folder / "hub")}


def aiperf(url: str, n: int, folder: Path) -> Call:
    command = [str(PEERS / "aiperf"), "profile", "-m", "simulated", "--tokenizer", "local/tokenizer", "--url", url,
               "--endpoint-type", "completions", "--streaming", "--concurrency", str(n), "--request-count", str(4 * n),
               "--isl", "64", "--isl-stddev", "0", "--osl", "150", "--osl-stddev", "0", "--extra-inputs", "ignore_eos:true",
               "--use-server-token-count", "--no-gpu-telemetry", "--no-server-metrics", "--ui", "none", "--random-seed", "1",
               "--artifact-dir", str(folder / "aiperf")]  # fmt: skip

    def said(out: str) -> Figures:
        told = json.loads((folder / "aiperf" / "profile_export_aiperf.json").read_text())
        spread = {"ttft": told["time_to_first_token"], "itl": told["inter_chunk_latency"]}
        return {f"{m}_{q}_s": one["avg" if q == "mean" else q] / 1e3
                for m, one in spread.items() for q in ("mean", "p50", "p99")}  # fmt: skip

    return Call(command, said, hub_of(TOKENIZER, folder))


@dataclass(frozen=True, slots=True)
class Client:
    needs: Path
    made_by: str
    call: Callable[[str, int, Path], Call]
    itl_of: str = "gaps"  # what its ITL percentiles are taken over: all gaps, or one mean a request


CLIENTS = {
    "ridgeline": Client(Path(sys.executable), "make install", ours),
    "vllm bench serve": Client(VLLM, "make vllm-engine", vllm),
    "guidellm": Client(PEERS / "guidellm", "make peers", guidellm, "requests"),
    "aiperf": Client(PEERS / "aiperf", "make peers", aiperf),
}


def truth(url: str, requests: int, itl_of: str) -> tuple[Figures, float]:
    """What the server really sent, and its tokens/s from the first request to the last token.  Raises RuntimeError if
    that is not `requests` whole answers."""
    sent = selftest.truth(url)
    if len(sent.ttft_s) != requests:
        raise RuntimeError(f"the server sent {len(sent.ttft_s)} whole answers, {requests} were asked")
    pick = {"ttft": sent.ttft_s, "itl": sent.itl_s.mean(axis=1) if itl_of == "requests" else sent.itl_s}
    lasted_s = sent.lasted_s
    return {f"{k}_{q}_s": float(v.mean() if q == "mean" else np.quantile(v, float(q[1:]) / 100))
            for k, v in pick.items() for q in ("mean", "p50", "p99")}, requests * selftest.TOKENS / lasted_s  # fmt: skip


def built(folder: Path) -> Path | None:
    """known_server, compiled into `folder`; None where no compiler can."""
    compiler, made = shutil.which("cc"), folder / "known_server"
    if not compiler or sys.platform != "linux":
        return None
    done = subprocess.run([compiler, "-O2", "-o", str(made), str(SERVER)], capture_output=True, check=False)
    return None if done.returncode else made


def serving(server: Path | None, cores: Sequence[int]) -> contextlib.AbstractContextManager[str]:
    """The base URL of a server of the known timings: `server`, or the simulator."""
    if server is None:
        return selftest.simulator(cores)
    return selftest.started([str(server), "0", str(selftest.TTFT_MS), str(selftest.ITL_MS)], cores)


def line(name: str, n: int, limit_s: float, server: Path | None) -> str:
    """One client measured once at `n` streams, as a row of the table."""
    client_cores, server_cores = selftest.split_cores()
    client, requests = CLIENTS[name], n * selftest.REQUESTS_PER_STREAM
    with tempfile.TemporaryDirectory() as temporary, serving(server, server_cores) as url:
        folder = Path(temporary)
        try:
            call = client.call(url, n, folder)
            used = run(call, client_cores, folder, limit_s)
            said, (true, tokens_per_s) = call.said(used.out), truth(url, requests, client.itl_of)
        except (RuntimeError, KeyError, ValueError, OSError) as problem:
            return f"{name:>16} {n:>7}  failed: {str(problem)[-300:]!r}"
    tokens = requests * selftest.TOKENS
    errors = " ".join(f"{(said[key] - true[key]) * 1e3:>+10.3f}" for key in QUANTITIES)
    return (f"{name:>16} {n:>7} {tokens_per_s:>8,.0f} {errors}  {used.cpu_s / tokens * 1e6:>12.1f} {used.peak_bytes / 1e6:>9.0f} "
            f"{used.peak_bytes / 1e3 / tokens:>9.2f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", default="16,64,256,512")
    parser.add_argument("--clients", default=",".join(CLIENTS), help="which to measure")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one client at one number of streams")
    options = parser.parse_args()
    chosen = options.clients.split(",")
    if unknown := set(chosen) - set(CLIENTS):
        parser.error(f"--clients: {', '.join(sorted(unknown))}: not among {', '.join(CLIENTS)}")
    present = [name for name in chosen if CLIENTS[name].needs.exists()]
    for name in chosen:
        if name not in present:
            print(f"{name} is not installed here and is not measured: `{CLIENTS[name].made_by}` installs it")
    columns = [f"{m} {q}" for m in ("TTFT", "ITL") for q in ("mean", "p50", "p99")]
    print(f"{'client':>16} {'streams':>7} {'tokens/s':>8} " + " ".join(f"{c:>10}" for c in columns)
          + "  us CPU/token   MB peak  kB/token")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        server = built(Path(folder))
        print(" " * 34 + "error in ms: what the client reports minus what "
              + (f"{SERVER.name} really sent" if server else "the simulator really sent (no C compiler here)"))  # fmt: skip
        for n in (int(n) for n in options.streams.split(",")):
            for name in present:
                print(line(name, n, options.limit, server), flush=True)
    if any(CLIENTS[name].itl_of == "requests" for name in present):
        print("guidellm's ITL percentiles are of one mean a request, and are held against the same of what was sent")


if __name__ == "__main__":
    main()
