"""What is wrong before the first request is said by its key and its place."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from harness import client, command, preflight, tokens
from harness.records import RidgelineError
from harness.wire import Target, parse_url


def said_of(tmp_path: Path, text: str, **flags: Any) -> str:
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(RidgelineError) as problem:
        command.planned(path, flags)
    assert problem.value.code == 2
    return str(problem.value).removeprefix(str(tmp_path) + "/")


@pytest.mark.parametrize(("text", "said"), [
    ("workload:\n  prompts: none.jsonl", "s.yaml:2: workload.prompts: none.jsonl: cannot be read: No such file"),
    ("workload:\n  prompts: /", "s.yaml:2: workload.prompts: /: cannot be read: is a folder"),
    ("workload:\n  input_tokens: {file: no.csv}", "s.yaml:2: workload.input_tokens.file: no.csv: cannot be read"),
    ("workload:\n  mode: open\n  trace: no.csv", "s.yaml:3: workload.trace: no.csv: cannot be read"),
    ('workload:\n  prompts: "\\0"', "s.yaml:2: workload.prompts: "),
    ("theory:\n  dtype: banana", "s.yaml:2: theory.dtype: dtype 'banana' is not known; use one of fp32"),
    ("theory:\n  tp: 1\n  kv_dtype: 9bit", "s.yaml:3: theory.kv_dtype: dtype '9bit' is not known"),
    ("theory:\n  calibration: no.json", "s.yaml:2: theory.calibration: calibration no.json: No such file"),
    ("theory:\n  calibration: s.yaml", "s.yaml:2: theory.calibration: "),
    ("engine:\n  url: ftp://h", "s.yaml:2: engine.url: got 'ftp://h'; give http://HOST:PORT"),
    ("engine:\n  url: http://me:pass@h", "s.yaml:2: engine.url: holds a user, password"),
    ("variants:\n  a:\n    url: http://h:x", "s.yaml:3: variants.a.url: got 'http://h:x'"),
])  # fmt: skip
def test_a_file_or_address_that_is_wrong_is_named_by_key_and_line(text: str, said: str, tmp_path: Path) -> None:
    found = said_of(tmp_path, text)
    assert found.startswith(said)
    assert "pass" not in found.replace("password", "")


def test_a_dtype_may_be_spelt_as_tables_and_engines_do(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("theory: {dtype: torch.bfloat16, kv_dtype: auto}")
    theory = command.planned(tmp_path / "s.yaml", {}).theory
    assert (theory.dtype, theory.kv_dtype) == ("bf16", None)


def test_what_an_option_has_set_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    text = "workload:\n  batch_sizes: [1]\n  waves: 2\nengine:\n  url: http://h"
    assert said_of(tmp_path, text, workload={"batch_sizes": [0]}).startswith("the options: workload.batch_sizes[0]: ")
    assert said_of(tmp_path, text, workload={"prompts": "no"}).startswith("the options: workload.prompts: no: ")
    assert said_of(tmp_path, text, engine={"url": "ftp://x"}).startswith("the options: engine.url: ")
    # A rule over several keys is of the file's part as much as of the option's.
    assert said_of(tmp_path, text, workload={"mode": "closed"}).startswith(
        "s.yaml:3: workload.waves: belongs to mode wave"
    )


def test_a_tokenizer_that_is_none_is_said_of_its_key(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("name: a\ntokenizer: nowhere\n")
    with pytest.raises(RidgelineError, match=r"s\.yaml:2: tokenizer: nowhere: no tokenizer\.json there"):
        preflight.here(command.planned(path, {}), tmp_path)


def test_more_at_once_than_this_machine_takes_is_said_of_its_key(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("workload:\n  mode: closed\n  batch_sizes:\n  - 1\n  - 65536\n")
    with pytest.raises(
        RidgelineError, match=r"s\.yaml:3: workload\.batch_sizes: 65536 requests at once need"
    ) as problem:
        preflight.here(command.planned(path, {}), tmp_path)
    assert problem.value.code == 2


def test_a_first_answer_that_hangs_is_waited_for_aloud_and_given_up_in_its_time(
    rig: str, ridgeline: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    """The pages come at once, and the completion never: what is waited for is said before it is given up."""
    (tmp_path / "s.yaml").write_text(f"engine: {{url: {rig}/first-hang-first}}\nlimits: {{preflight_s: 2.5}}\n")
    done = ridgeline("run", "s.yaml", timeout=30)
    assert done.returncode == 6
    told, error = done.stderr.splitlines()
    assert told.startswith("waiting for a first answer of ") and told.endswith("at most 2.5 s (limits.preflight_s)")
    assert "within 2.5 s" in error and "limits.preflight_s" in error
    assert not (tmp_path / "results").exists() or not list((tmp_path / "results").iterdir())


def test_a_rate_limit_before_the_run_says_when_to_come_again(
    rig: str, ridgeline: Callable[..., CompletedProcess[str]]
) -> None:
    done = ridgeline("run", "--url", f"{rig}/first-http-429-later")
    assert done.returncode == 6 and done.stderr.count("error: ") == 1
    assert "ended as http_429: slow down (Retry-After: 1); the server limits how much may be asked" in done.stderr


@pytest.fixture
def odd() -> Iterator[Callable[[bytes], Target]]:
    """serve(bytes) -> a server that answers all that comes with them."""
    listening = socket.create_server(("127.0.0.1", 0))
    answer = b""

    def handle() -> None:
        with contextlib.suppress(OSError):
            while True:
                there, _ = listening.accept()
                there.recv(65536)
                there.sendall(answer)
                there.close()

    def serve(said: bytes) -> Target:
        nonlocal answer
        answer = said
        return parse_url(f"http://127.0.0.1:{listening.getsockname()[1]}")

    threading.Thread(target=handle, daemon=True).start()
    yield serve
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()


def page(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


@pytest.mark.parametrize("said", [b"[1]", b"null", b"5", b"{}", b'{"count": true}', b'{"count": -5}', b'{"count": 1e3}', b'{"tokens": "abc"}',
                                  b'{"count": 1000000000000}', b'{"count": 350}', b'{"tokens": []}', b"rubbish"])  # fmt: skip
def test_a_server_that_counts_no_tokens_is_not_asked_to(said: bytes, odd: Callable[[bytes], Target]) -> None:
    async def found() -> tokens.Counter:
        target = odd(page(said))
        async with client.session(target) as http:
            return await tokens.find(None, None, client.Client(target, http))

    assert asyncio.run(found()).source == "usage"


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: zz\r\n\r\n"])
def test_what_is_no_http_is_said_in_one_line(answer: bytes, odd: Callable[[bytes], Target]) -> None:
    async def ask() -> None:
        target = odd(answer)
        async with client.session(target) as http:
            await client.Client(target, http).find_model(None)

    with pytest.raises(
        RidgelineError, match=r"what answers there is no HTTP/1\.1 \([^\n]+\); is this the server's HTTP port\?$"
    ):
        asyncio.run(ask())


def test_a_path_that_a_server_made_up_is_nowhere_here() -> None:
    for root in ("/" + "a" * 5000, "/\0", "relative", 7, None):
        assert client.local_model_path({"root": root}, {}) is None


def test_what_needs_no_model_has_one_time_for_all() -> None:
    async def slow() -> None:
        async with preflight.within(parse_url("http://127.0.0.1:1"), 0.05):
            await asyncio.sleep(5)

    with pytest.raises(RidgelineError, match=r"took longer than 0\.05 s") as problem:
        asyncio.run(slow())
    assert problem.value.code == 6
