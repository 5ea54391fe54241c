"""HTTP and TLS as servers really speak them: byte-exact answers over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import uvloop

from harness import dialects, store
from harness.framing import unframe
from harness.loadgen import Player, Senses, Timers
from harness.records import Request, RidgelineError
from harness.wire import Exchange, Target, Wire, clock, connect

Answer = Callable[[asyncio.StreamWriter, int], Awaitable[None]]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def event(text: str, finish: str | None = None) -> bytes:
    return (
        b"data: "
        + json.dumps({"choices": [{"text": text, "finish_reason": finish}]}, ensure_ascii=False).encode()
        + b"\n\n"
    )


STREAM = [event("a"), b": ping\n\n", event("ü"), event("c", "length"),
          b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3}}\n\n', b"data: [DONE]\n\n"]  # fmt: skip


def chunked(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)


WHOLE = CHUNKED + chunked(*STREAM, b"")


@contextlib.asynccontextmanager
async def serving(answer: Answer, tls: ssl.SSLContext | None = None) -> AsyncIterator[tuple[Target, list[int]]]:
    """A server that hands each request to `answer(writer, number)`; yields where it is, and each request's connection."""
    came: list[int] = []
    connections = 0
    tasks = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        mine = connections
        tasks.add(asyncio.current_task())
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length:"))
                await reader.readexactly(length)
                came.append(mine)
                await answer(writer, len(came))
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=tls)
    try:
        yield Target("https" if tls else "http", "localhost", server.sockets[0].getsockname()[1], ""), came
    finally:
        server.close()
        for task in tasks:
            task.cancel()


def address_of(target: Target) -> tuple[Any, ...]:
    return (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", target.port))


async def ask(target: Target, count: int = 1, tls: ssl.SSLContext | None = None) -> tuple[list[Exchange], Senses]:
    """`count` requests one after the other, as a run plays them."""
    ended: list[Exchange] = []
    player = Player(target, address_of(target), tls, Timers(idle_s=5.0), lambda _: target.request_bytes("/v1/completions", b"{}"),
                    ended.append)  # fmt: skip
    senses = await player.play(iter([Request(i, "", 3) for i in range(count)]), 1)
    player.close()
    await asyncio.sleep(0)
    return ended, senses


def play(answer: Answer, count: int = 1) -> tuple[list[Exchange], Senses, list[int]]:
    async def go() -> tuple[list[Exchange], Senses, list[int]]:
        async with serving(answer) as (target, came):
            return *(await ask(target, count)), came

    return uvloop.run(within(go()))


async def within(work: Coroutine[Any, Any, Any]) -> Any:
    async with asyncio.timeout(20):
        return await work


def say(*parts: bytes) -> Answer:
    async def answer(writer: asyncio.StreamWriter, number: int) -> None:
        writer.write(b"".join(parts))

    return answer


def body_of(x: Exchange) -> tuple[bytes, list[int]]:
    ends = list(accumulate(map(len, x.reads)))
    return unframe(b"".join(x.reads), ends) if x.http else (b"".join(x.reads), ends)


def meaning(x: Exchange) -> dialects.Answer:
    body, ends = body_of(x)
    return dialects.interpret(body, x.stamps_s, ends, x.status, x.ending, 3, x.note)


def is_whole(x: Exchange) -> None:
    said = meaning(x)
    assert (said.error_class, said.output_tokens, said.input_tokens, said.done) == ("", 3, 7, True), said.error
    assert len(said.arrivals_s) == 3 and list(said.arrivals_s) == sorted(said.arrivals_s)
    assert x.sent_s <= said.arrivals_s[0] and said.arrivals_s[-1] <= x.end_s


@pytest.mark.parametrize("loop", [uvloop.run, asyncio.run], ids=["uvloop", "asyncio"])
@pytest.mark.parametrize("crlf", [False, True], ids=["lf", "crlf"])
@pytest.mark.parametrize("bytewise", [False, True], ids=["whole", "bytewise"])
@pytest.mark.parametrize("framing", ["chunked", "identity", "close"])
def test_every_framing_gives_the_same_tokens(framing: str, bytewise: bool, crlf: bool, loop: Any) -> None:
    parts = [part.replace(b"\n", b"\r\n") for part in STREAM] if crlf else STREAM
    body = b"".join(parts)
    data = {"chunked": CHUNKED + chunked(*parts, b""), "identity": HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body,
            "close": HEAD + b"\r\n" + body}[framing]  # fmt: skip

    async def answer(writer: asyncio.StreamWriter, number: int) -> None:
        for piece in [bytes([b]) for b in data] if bytewise else [data]:
            writer.write(piece)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        if framing == "close":
            writer.close()

    async def go() -> None:
        async with serving(answer) as (target, came):
            ended, _ = await ask(target, 2)
            assert len(ended) == 2
            for x in ended:
                assert body_of(x)[0] == body and (x.ending, x.status) == ("complete", 200)
                is_whole(x)
            assert len(set(came)) == (2 if framing == "close" else 1)
            if bytewise:
                assert len(ended[0].stamps_s) > len(STREAM)

    loop(within(go()))


def test_a_connection_is_used_again_and_its_time_to_open_is_told_once() -> None:
    ended, senses, came = play(say(WHOLE), 5)
    assert came == [1] * 5 and senses.reconnects == 0
    assert ended[0].connect_s > 0 and ended[0].tls_s != ended[0].tls_s
    assert all(x.connect_s != x.connect_s for x in ended[1:])


def test_a_connection_closed_as_we_write_on_it_costs_one_unseen_resend() -> None:
    async def answer(writer: asyncio.StreamWriter, number: int) -> None:
        if number == 2:  # the idle-close race: the request crossed the server's FIN
            writer.close()
        else:
            writer.write(WHOLE)

    ended, senses, came = play(answer, 3)
    assert len(ended) == 3 and came == [1, 1, 2, 2] and senses.reconnects == 1
    for x in ended:
        is_whole(x)
    assert [x.resent for x in ended] == [False, True, False]
    assert ended[1].connect_s > 0


def test_a_server_that_hangs_up_on_every_request_is_asked_once_more_at_most() -> None:
    async def answer(writer: asyncio.StreamWriter, number: int) -> None:
        if number == 1:
            writer.write(WHOLE)
        else:
            writer.close()

    ended, senses, came = play(answer, 3)
    assert [meaning(x).error_class for x in ended] == ["", *["disconnected_before_response"] * 2]
    assert len(came) == 4 and senses.reconnects == 1  # the third request went on a new connection: it is not sent twice


def test_a_connection_that_closed_while_idle_is_not_written_on() -> None:
    async def answer(writer: asyncio.StreamWriter, number: int) -> None:
        writer.write(WHOLE)
        await writer.drain()
        if number == 1:
            writer.close()

    async def go() -> None:
        async with serving(answer) as (target, came):
            ended: list[Exchange] = []
            player = Player(
                target, address_of(target), None, Timers(), lambda _: target.request_bytes("/x", b"{}"), ended.append
            )
            requests = [Request(0, "", 3, 0.0), Request(1, "", 3, 0.1)]
            senses = await player.play(iter(requests), 1)
            player.close()
            assert came == [1, 2] and senses.reconnects == 0
            for x in ended:
                is_whole(x)

    uvloop.run(within(go()))


@pytest.mark.parametrize("header", [b"Connection: close\r\n", b"Keep-Alive: timeout=5, max=100\r\n"])
def test_a_connection_that_the_server_wants_closed_or_holds_a_thread_for_is_not_used_again(header: bytes) -> None:
    ended, senses, came = play(say(HEAD + header + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(*STREAM, b"")), 3)
    assert came == [1, 2, 3] and senses.reconnects == 0
    for x in ended:
        is_whole(x)


@pytest.mark.parametrize("early", [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"])
def test_informational_answers_are_passed_over(early: bytes) -> None:
    ended, _, came = play(say(early, early, WHOLE), 2)
    assert came == [1, 1]
    for x in ended:
        is_whole(x)


@pytest.mark.parametrize("pieces", [1, 14])
def test_done_without_the_end_of_the_message_frees_the_slot(pieces: int) -> None:
    async def answer(writer: asyncio.StreamWriter, number: int) -> None:
        writer.write(CHUNKED + chunked(*STREAM[:-1]))
        for i in range(0, 14, 14 // pieces):
            await asyncio.sleep(0.002)
            writer.write(chunked(STREAM[-1][i : i + 14 // pieces]))

    ended, _, came = play(answer, 2)
    assert came == [1, 2]
    for x in ended:
        is_whole(x)
        assert x.end_s == x.stamps_s[-1] and x.end_s - x.sent_s < 3.0  # the wait for an end is not the server's time


def test_a_text_that_says_done_ends_nothing() -> None:
    async def answer(writer: asyncio.StreamWriter, number: int) -> None:
        writer.write(CHUNKED + chunked(b'data: {"choices":[{"text":"data: [DONE]"}]}\n\n'))
        await asyncio.sleep(0.15)
        writer.write(chunked(event("b"), *STREAM[3:], b""))

    ended, _, _ = play(answer)
    is_whole(ended[0])


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (CHUNKED + chunked(*STREAM[:2]), "truncated"),
        (HEAD + b"Content-Length: 9999\r\n\r\n" + STREAM[0], "truncated"),
        (b"HTTP/1.1 200", "disconnected_before_response"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "malformed_http"),
        (CHUNKED + b"zz\r\n", "malformed_http"),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy", "http_503"),
        (b"HTTP/1.1 307 There\r\nLocation: http://else/\r\nContent-Length: 0\r\n\r\n", "redirect"),
    ],
)
def test_what_is_no_whole_answer_is_a_failure_by_name(data: bytes, expected: str) -> None:
    async def answer(writer: asyncio.StreamWriter, number: int) -> None:
        writer.write(data)
        await writer.drain()
        writer.close()

    ended, _, _ = play(answer)
    assert meaning(ended[0]).error_class == expected


def test_sent_is_when_the_bytes_were_written_whatever_the_loop_does_next() -> None:
    """The loop is held up after send(): the bytes must be on their way already, and not before the stamp's own moment."""
    listener = socket.create_server(("127.0.0.1", 0))
    arrived_s: list[float] = []

    def accept() -> None:
        peer, _ = listener.accept()
        peer.recv(65536)
        arrived_s.append(clock())
        peer.sendall(WHOLE)
        time.sleep(0.5)
        peer.close()

    thread = threading.Thread(target=accept)
    thread.start()
    target = Target("http", "localhost", listener.getsockname()[1], "")

    async def go() -> Exchange:
        over = asyncio.get_running_loop().create_future()
        wire = Wire(lambda _, x: over.set_result(x), lambda _: None)
        await connect(target, address_of(target), None, wire, 5.0)
        exchange = Exchange(None, target.request_bytes("/x", b"{}"), 3)
        before_s = clock()
        wire.send(exchange)
        time.sleep(0.3)
        assert before_s <= exchange.sent_s and len(arrived_s) == 1
        await over
        wire.close()
        return exchange

    exchange = uvloop.run(within(go()))
    thread.join()
    listener.close()
    assert abs(arrived_s[0] - exchange.sent_s) < 0.2


# -- TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca.pem, and server.pem/server.key signed by it for localhost."""
    if shutil.which("openssl") is None:
        pytest.skip("the openssl command is not here to make certificates")
    folder = tmp_path_factory.mktemp("tls")
    (folder / "ext").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    new = ["-newkey", "rsa:2048", "-nodes"]
    for arguments in (
        ["req", "-x509", *new, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=test CA",
         "-addext", "keyUsage=critical,keyCertSign"],
        ["req", *new, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=localhost"],
        ["x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-set_serial", "1", "-days", "2",
         "-extfile", "ext", "-out", "server.pem"],
    ):  # fmt: skip
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)
    return folder


def server_side(folder: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    return context


def test_tls_is_verified_and_its_handshake_is_told_apart_from_the_connection(certificates: Path) -> None:
    async def go() -> None:
        async with serving(say(WHOLE), server_side(certificates)) as (target, came):
            ended, _ = await ask(target, 3, ssl.create_default_context(cafile=str(certificates / "ca.pem")))
            assert came == [1, 1, 1]
            for x in ended:
                is_whole(x)
            assert ended[0].tls_s > 0 and ended[0].connect_s > 0 and ended[1].tls_s != ended[1].tls_s

    uvloop.run(within(go()))


def test_a_certificate_that_no_authority_of_ours_signed_is_refused(certificates: Path) -> None:
    async def go() -> None:
        async with serving(say(WHOLE), server_side(certificates)) as (target, came):
            ours = ssl.create_default_context()
            with pytest.raises(RidgelineError, match=r"CERTIFICATE_VERIFY_FAILED|certificate verify failed") as raised:
                await ask(target, 1, ours)
            assert raised.value.code == 6 and not came
            ended: list[Exchange] = []
            player = Player(target, address_of(target), ours, Timers(), lambda _: b"", ended.append)
            await player._send_on_new(Exchange(Request(0, "", 3), b"", 3))  # a reconnection in the middle of a run
            player._hand_over(everything=True)
            assert meaning(ended[0]).error_class == "tls"

    uvloop.run(within(go()))


@pytest.fixture
def tls_front(certificates: Path) -> Iterator[Callable[[str], str]]:
    """front(url) -> https URL of a proxy that only speaks TLS for it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    def start(url: str) -> str:
        port = int(url.rsplit(":", 1)[1])

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there, back = await asyncio.open_connection("127.0.0.1", port)
            await asyncio.gather(pump(reader, back), pump(there, writer))

        listening = asyncio.start_server(handle, "127.0.0.1", 0, ssl=server_side(certificates))
        server = asyncio.run_coroutine_threadsafe(listening, loop).result(10)
        return f"https://localhost:{server.sockets[0].getsockname()[1]}"

    yield start
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


RUN = ("--batch-sizes", "2", "--waves", "2", "--input-tokens", "64", "--output-tokens", "6", "--no-report")


def test_the_command_speaks_tls_to_a_server_whose_authority_the_environment_names(
    certificates: Path, tls_front: Callable[[str], str], simulated: Callable[..., str], ridgeline_anew: Callable[..., Any], tmp_path: Path
) -> None:  # fmt: skip
    url = tls_front(simulated("--ttft-base", "5ms", "--itl-base", "1ms"))
    done = ridgeline_anew(
        "run", "--url", url, *RUN, "--out", "run", env={"SSL_CERT_FILE": str(certificates / "ca.pem")}
    )
    assert done.returncode == 0, done.stderr
    t = store.load(tmp_path / "run").records
    assert len(t) == 6 and all(t.ok)
    assert sum(t.tls_s > 0) == sum(t.connect_s > 0) == 2  # two connections, opened before the clock started
    refused = ridgeline_anew("run", "--url", url, *RUN)
    assert refused.returncode == 6
    assert "TLS failed" in refused.stderr and "Traceback" not in refused.stderr


def test_proxies_of_the_environment_are_not_asked(simulated: Callable[..., str], ridgeline: Callable[..., Any], tmp_path: Path) -> None:  # fmt: skip
    nowhere = dict.fromkeys(
        ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9"
    )
    done = ridgeline("run", "--url", simulated("--ttft-base", "5ms", "--itl-base", "1ms"), *RUN, "--out", "run",
                     env=nowhere | {"no_proxy": "", "NO_PROXY": ""})  # fmt: skip
    assert done.returncode == 0, done.stderr
    t = store.load(tmp_path / "run").records
    assert all(t.ok) and sum(t.connect_s > 0) == 2 and not any(t.tls_s > 0)


# -- the official client


def openai_transport(answer: Answer, count: int) -> tuple[list[Exchange], list[int]]:
    pytest.importorskip("openai", reason="the openai client is not installed (pip install ridgeline[openai])")
    from harness.openai_wire import OpenAIPlayer

    body = json.dumps({"model": "m", "prompt": "hi", "max_tokens": 3, "stream": True, "ignore_eos": True}).encode()

    async def go() -> tuple[list[Exchange], list[int]]:
        async with serving(answer) as (target, came):
            ended: list[Exchange] = []
            player = OpenAIPlayer(
                target,
                address_of(target),
                None,
                Timers(),
                lambda _: target.request_bytes("/v1/completions", body),
                ended.append,
            )
            await player.play(iter([Request(i, "", 3) for i in range(count)]), 1)
            player.close()
            return ended, came

    return uvloop.run(within(go()))


def test_the_openai_client_yields_the_same_tokens() -> None:
    ended, came = openai_transport(say(WHOLE), 2)
    assert came == [1, 1]
    for x in ended:
        said = meaning(x)
        assert (said.error_class, said.output_tokens, said.input_tokens, len(said.arrivals_s)) == ("", 3, 7, 3), (
            said.error
        )
        assert said.finish_reason == "length" and x.sent_s < said.arrivals_s[0]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy", "http_503"),
        (CHUNKED + chunked(STREAM[0], b'data: {"error":{"message":"boom"}}\n\n', b""), "server_error_in_band"),
        (CHUNKED + chunked(STREAM[0], b""), "truncated"),
        (CHUNKED + chunked(STREAM[0]), "truncated"),
    ],
)
def test_failures_through_the_openai_client_keep_their_class(data: bytes, expected: str) -> None:
    async def answer(writer: asyncio.StreamWriter, number: int) -> None:
        writer.write(data)
        await writer.drain()
        writer.close()

    ended, _ = openai_transport(answer, 1)
    assert meaning(ended[0]).error_class == expected


def test_without_the_openai_client_the_command_names_the_extra(ridgeline: Callable[..., Any]) -> None:
    import importlib.util

    if importlib.util.find_spec("openai"):
        pytest.skip("the openai client is installed")
    done = ridgeline("run", "--url", "http://127.0.0.1:9", *RUN, "--transport", "openai")
    assert done.returncode == 2 and "pip install ridgeline[openai]" in done.stderr
