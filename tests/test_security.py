"""The promises of SECURITY.md, each held by a test; the page names them."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from harness import dialects, endings, redaction, scenario, store
from harness.records import RidgelineError
from harness.wire import parse_url
from tests import faults
from tests.conftest import ROOT
from tests.faults import CANARY

Run = Callable[..., "subprocess.CompletedProcess[str]"]
HARNESS = sorted((ROOT / "harness").rglob("*.py"))


def nowhere_in(folder: Path) -> None:
    """The canary is in no file, the packed columns included; files' names too."""
    for path in folder.rglob("*"):
        assert CANARY not in str(path)
        if path.is_file():
            assert CANARY.lower().encode() not in path.read_bytes().lower(), path
        if path.suffix == ".parquet":
            assert CANARY.lower() not in str(pq.read_table(path).to_pylist()).lower()


def watched(tmp_path: Path, *arguments: str, env: dict[str, str]) -> tuple[int, str, set[str]]:
    """Run the command; its exit code, all it printed, and the command lines of all its processes while it ran."""
    process = subprocess.Popen([sys.executable, "-m", "harness", *arguments], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": str(ROOT)} | env)  # fmt: skip
    seen: set[str] = set()

    def look() -> None:
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):
                for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(True)]:
                    with contextlib.suppress(psutil.Error):
                        seen.add(" ".join(one.cmdline()))
            time.sleep(0.05)

    looker = threading.Thread(target=look)
    looker.start()
    said, _ = process.communicate(timeout=120)
    looker.join()
    return process.returncode, said, seen


@pytest.mark.parametrize("by", ["file", pytest.param("variable", marks=pytest.mark.full)])
def test_the_key_is_in_no_artefact_output_or_process_list(by: str, rig: str, tmp_path: Path) -> None:
    """A server that echoes it wherever it can: as its model's name, in errors of every kind, in redirects."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text(f"{CANARY}\n")
    work = tmp_path / "work"
    work.mkdir()
    named = ("--api-key-file", "../secret/key") if by == "file" else ("--api-key-env", "MY_KEY")
    env = {"MY_KEY": CANARY} if by == "variable" else {}
    code, said, seen = watched(work, "run", "--url", rig + "/evil-mixed", *named, "--input-tokens", "64", "--output-tokens", "8",
                               "--batch-sizes", "64", "--mode", "closed", "--requests", str(len(faults.FAULTS)), "--idle-timeout", "1s",
                               "--first-token-timeout", "1s", "--request-timeout", "2s", "--out", "it", env=env)  # fmt: skip
    assert code == 6 and "Traceback" not in said  # more than one in a hundred failed
    found = store.load(work / "it")
    assert {"server_error_in_band", "http_401", "redirect", "aborted_by_server"} <= set(
        found.records.error_class.tolist()
    )
    assert "[redacted]" in str(found.records.error.tolist()) and "[redacted]" in json.dumps(found.run)
    nowhere_in(work)
    assert CANARY.lower() not in said.lower()
    assert any("harness.recorder" in line for line in seen) and not any(CANARY in line for line in seen)
    control = "[\x00-\x08\x0b-\x1f\x7f\u202e]"
    assert not re.search(control, said) and not re.search(control, str(found.records.error.tolist()))
    page = (work / "it" / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page and "\x1b" not in page


@pytest.mark.parametrize(
    "fault",
    [
        "http-401-echoes-key",
        *(pytest.param(n, marks=pytest.mark.full) for n in ("redirect-echoes-key", "error-echoes-key")),
    ],
)
def test_a_key_that_the_first_answer_echoes_is_not_printed(
    fault: str, rig: str, ridgeline: Run, tmp_path: Path
) -> None:
    done = ridgeline("run", "--url", f"{rig}/first-{fault}", env={"OPENAI_API_KEY": CANARY, "RIDGELINE_DEBUG": "1"})
    assert done.returncode == 6 and "[redacted]" in done.stderr
    assert CANARY.lower() not in (done.stdout + done.stderr).lower()
    nowhere_in(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"), [(None, "cannot be read"), ("", "the file is empty"), ("a b", "no HTTP header")]
)
def test_a_key_file_that_holds_no_key_is_named(text: str | None, said: str, ridgeline: Run, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "key").write_text(text)
    done = ridgeline("run", "--url", "http://127.0.0.1:9", "--api-key-file", "key")
    assert done.returncode == 2 and "--api-key-file key" in done.stderr and said in done.stderr


@pytest.mark.parametrize(
    "text", ["engine: {args: [--api-key, x]}", "engine: {args: ['--hf-token=x']}", "engine: {env: {HF_TOKEN: x}}"]
)
def test_a_scenario_may_hold_no_secret(text: str) -> None:
    with pytest.raises(RidgelineError, match=r"f.yaml:1: engine\.(args|env)"):
        scenario.load(text, "f.yaml")


def test_what_only_sounds_like_a_secret_is_none() -> None:
    names = [
        "max_num_batched_tokens",
        "tokenizer",
        "OMP_NUM_THREADS",
        "MONKEY",
        "kv-cache-dtype",
        "VLLM_CPU_KVCACHE_SPACE",
    ]
    assert not any(map(endings.is_secret, names))
    assert all(map(endings.is_secret, ["HF_TOKEN", "api-key", "VLLM_API_KEY", "DB_PASSWORD", "aws_secret_access_key"]))


LEAKY = """
import http.server, os, sys, time
print("args", sys.argv, "env", os.environ.get("LLAMA_API_KEY"), os.environ.get("HF_TOKEN"), flush=True)
os.write(1, b"half a line with " + os.environ["LLAMA_API_KEY"].encode()[:9]); time.sleep(0.1)
os.write(1, os.environ["LLAMA_API_KEY"].encode()[9:] + b" in it\\n")
os.write(2, b"no line end " + b"x" * 200_000 + os.environ["LLAMA_API_KEY"].encode())
time.sleep(60)
"""


def test_an_engine_gets_the_key_by_its_environment_and_its_log_does_not_keep_it(tmp_path: Path) -> None:
    """Not even for a moment, and not when everything of ours was killed."""
    (tmp_path / "engine").write_text(f"#!{sys.executable}\n{LEAKY}")
    (tmp_path / "engine").chmod(0o755)
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(2**20))
    (tmp_path / "s.yaml").write_text("engine: {kind: llama.cpp, binary: ./engine, model: m.gguf}\n")
    process = subprocess.Popen([sys.executable, "-m", "harness", "run", "s.yaml", "--out", "it"], cwd=tmp_path, text=True,
                               stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT), "OPENAI_API_KEY": CANARY,
                                                                         "HF_TOKEN": CANARY[::-1]})  # fmt: skip
    log = tmp_path / "it" / "engine.log"
    until_s = time.monotonic() + 20
    while not (log.exists() and b" in it" in log.read_bytes() and log.stat().st_size > 100_000):
        assert time.monotonic() < until_s
        time.sleep(0.02)
    words = [" ".join(p.cmdline()) for p in psutil.Process(process.pid).children(True)]
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=10)
    time.sleep(1.0)
    text = log.read_text()
    assert text.count("[redacted]") >= 3 and CANARY not in text and CANARY[::-1] not in text
    assert words and CANARY not in str(words)
    nowhere_in(tmp_path)


class Redirecting:
    """Answers completions, and sends every other question elsewhere: to a server that notes who came."""

    def __init__(self) -> None:
        self.came: list[bytes] = []
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.there = self.start(self.elsewhere)
        self.url = f"http://127.0.0.1:{self.start(self.here)}"

    def start(self, handle: Any) -> int:
        server = asyncio.run_coroutine_threadsafe(asyncio.start_server(handle, "127.0.0.1", 0), self.loop).result(10)
        return int(server.sockets[0].getsockname()[1])

    async def elsewhere(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.came.append(await reader.read(65536))
        writer.close()

    async def here(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    (int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0
                )
                body = await reader.readexactly(length)
                path = head.split(b" ")[1].decode()
                what = faults.answer_to(path, body, 0)
                if "/v1/" not in path:
                    place = f"Location: http://127.0.0.1:{self.there}{path}".encode()
                    what = faults.status(307 if len(path) % 2 else 302, b"", place)
                writer.write(faults.OK if isinstance(what, faults.Fault) else what)
                await writer.drain()


def test_the_key_follows_no_redirect(ridgeline: Run, tmp_path: Path) -> None:
    server = Redirecting()
    done = ridgeline("run", "--url", server.url + "/ok", "--input-tokens", "64", "--output-tokens", "8", "--batch-sizes", "2",
                     "--no-report", "--out", "it", env={"OPENAI_API_KEY": CANARY})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(store.load(tmp_path / "it").records) > 3
    assert server.came == []


def test_a_guarded_text_is_in_no_traceback_and_no_log_line(capsys: pytest.CaptureFixture[str]) -> None:
    redaction.guard(CANARY)
    redaction.quiet_logs()
    try:
        raise ValueError(f"Bearer {CANARY}\x1b[31m")
    except ValueError:
        logging.getLogger("asyncio").exception("went wrong with %s", CANARY)
    finally:
        logging.getLogger().handlers.clear()
    said = capsys.readouterr().err
    assert "ValueError" in said and CANARY not in said and "\x1b" not in said


@pytest.mark.parametrize("text", [f"a{CANARY}b", CANARY.upper(), f"{CANARY[:5]}\x00{CANARY[5:]}", "x" * 4090 + CANARY])
def test_a_secret_is_taken_out_before_the_text_is_cut(text: str) -> None:
    said = endings.plain(text, CANARY)
    assert CANARY.lower() not in said.lower() and len(said) <= endings.MESSAGE_CHARS
    assert CANARY[:6].lower() not in said.lower()


@pytest.mark.parametrize(("status", "ending", "note", "coding", "body"), [
    (200, "complete", "", "", "x" * 190 + CANARY + "x"),
    (200, "complete", "", "", "{" + "x" * 189 + CANARY + "x"),
    (200, "complete", "", "", "data: {" + "\x01" * 90 + "x" * (endings.MESSAGE_CHARS - 100) + CANARY + "\n\n"),
    (302, "complete", f"Location: http://h/{CANARY[:10]}", "", ""),
    (200, "complete", "", f"x-{CANARY[:10]}", "data: 1\n\n"),
    (500, "complete", "", "", "\x01" * 70_000 + CANARY[:10]),
], ids=["page", "json", "event", "location", "coding", "error"])  # fmt: skip
def test_half_a_secret_is_in_no_record_either(status: int, ending: str, note: str, coding: str, body: str) -> None:
    """What a server sends is cut in many places, and a cut may go through a key."""
    answer = dialects.interpret(body.encode(), [0.0], [len(body)], status, ending, 8, note, coding, CANARY)
    assert answer.error_class and "[redacted]" in answer.error
    assert CANARY[:6].lower() not in answer.error.lower()


@pytest.mark.parametrize(
    "url", ["http://user:{}@127.0.0.1:99999", "ftp://user:{}@host", "http://[::1?key={}", "http://h/#{}"]
)
def test_an_address_that_holds_a_secret_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(RidgelineError, match="--api-key-env") as refused:
        parse_url(url.format(CANARY))
    assert CANARY not in str(refused.value)


@pytest.mark.parametrize(
    "url", ["http://h/a b", "http://h/a\r\nX-Y: z", "http://h/\u2028a", "http://h/\xfc", "http://h/\0"]
)
def test_an_address_that_is_no_line_of_http_is_refused(url: str) -> None:
    with pytest.raises(RidgelineError, match=r"--url: got .*%XX"):
        parse_url(url)


def test_what_is_no_file_is_not_replaced_by_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/null")
    for path in (tmp_path / "pipe", tmp_path / "device", tmp_path):
        with pytest.raises(RidgelineError, match="is no file"):
            store.write_text(path, "x")
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "device").is_symlink()


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


@pytest.mark.parametrize("path", HARNESS, ids=lambda p: p.stem)
def test_no_code_runs_foreign_data(path: Path) -> None:
    """No pickle, no eval, no shell, no unsafe YAML, no unverified TLS; subprocess arguments are lists."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    imported |= {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & {"pickle", "cPickle", "dill", "marshal", "shelve", "joblib"}
    for call in calls(tree):
        name = ast.unparse(call.func)
        assert name not in (
            "eval",
            "exec",
            "os.system",
            "os.popen",
            "yaml.load",
            "yaml.unsafe_load",
            "ssl._create_unverified_context",
        ), name
        for keyword in call.keywords:
            said = (keyword.arg, ast.unparse(keyword.value))
            assert said not in (
                ("shell", "True"),
                ("allow_pickle", "True"),
                ("verify", "False"),
                ("ssl", "False"),
                ("trust_env", "True"),
            )
            assert keyword.arg != "Loader" or "Safe" in said[1]
        if name in ("subprocess.run", "subprocess.Popen"):
            assert not isinstance(call.args[0], ast.Constant | ast.JoinedStr)
    assert "CERT_NONE" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a/../b", ".", "..", "x" * 300, "con\0trol", "", "-rf", "名前"])
def test_a_run_name_cannot_leave_its_folder(name: str, tmp_path: Path) -> None:
    folder, lock = store.create(None, name, tmp_path / "results")
    lock.close()
    assert folder.resolve().parent == (tmp_path / "results").resolve() and len(folder.name) < 120


def test_the_page_of_promises_names_tests_that_exist() -> None:
    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", page))
    defined = {
        name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert len(named) >= 12 and named <= defined


def test_what_was_said_is_not_kept(rig: str, ridgeline: Run, tmp_path: Path) -> None:
    assert (
        ridgeline(
            "run",
            "--url",
            rig + "/ok",
            "--input-tokens",
            "64",
            "--output-tokens",
            "8",
            "--batch-sizes",
            "2",
            "--waves",
            "1",
            "--out",
            "it",
        ).returncode
        == 0
    )
    opening = b"word word"  # the answers' own text
    for path in (tmp_path / "it").iterdir():
        assert opening not in path.read_bytes(), path
