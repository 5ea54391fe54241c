"""A fake engine with an exactly stated service law on a real socket: our signal generator.

`simulator_law` states the law, `simulator_scheduler` keeps it; here are the socket and the command.

Every event is one HTTP chunk and one write; the response's head is written when the request has been parsed, and all that
follows the last token (usage, `[DONE]`, end of body) in one write after it.  `GET /__log__` tells for each request when it
was read and when each event was really written, on CLOCK_MONOTONIC, and how late that was: a client's error is its own
stamp minus ours.  (A chat's role chunk goes with the first token.  An answer that is not streamed, or with `one_piece`,
is one write; its log tells when each event would have been written.)  `POST /__reset__` empties that log.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

import httptools
import orjson

from harness import __version__, units
from harness import simulator_formats as formats
from harness.records import RidgelineError
from harness.simulator_law import Law, Refused, check_length, output_asked, output_of, prompt_of, usage_kind
from harness.simulator_law import lognormal as _lognormal  # noqa: F401  (tests)
from harness.simulator_scheduler import Job, Server, now

BODY_LIMIT_BYTES = 32_000_000
HEAD_LIMIT_BYTES = 65_536
BACKLOG_LIMIT_BYTES = 16_000_000  # what a client may leave unread before its connection is cut


class _Connection(asyncio.Protocol):
    """One client: stamps and hands over what it reads, parses when told to, writes at once."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._parser = httptools.HttpRequestParser(self)
        self._closed = False
        self._clogged = False
        self._job: Job | None = None
        self._fd = -1
        self._port = 0
        self._head_bytes = 0
        self._read_s = 0.0
        self._clear()

    def _clear(self) -> None:
        self._url = b""
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._headed = False
        self._expects = False
        self._request_id = ""

    # asyncio's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._fd = sock.fileno()
        peer = transport.get_extra_info("peername")
        self._port = peer[1] if peer else 0
        self._server.connections.add(self)

    def data_received(self, data: bytes) -> None:
        self._server.took(self, data, now())

    def eof_received(self) -> None:
        self._lost()

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        self._lost()

    def _lost(self) -> None:
        self._closed = True
        job, self._job = self._job, None
        if job:
            self._server.gone(job)

    def abort(self) -> None:
        self._closed = True
        self._transport.abort()

    def send(self, data: bytes) -> bool:
        """Write now, past the loop's own queue (uvloop would write at the end of its turn); False if it had to wait."""
        if self._closed:
            return True
        if self._clogged:
            backlog = self._transport.get_write_buffer_size()
            self._clogged = backlog > 0
            if backlog > BACKLOG_LIMIT_BYTES:
                self._transport.abort()
                return False
        if not self._clogged:
            try:
                wrote = os.write(self._fd, data)
            except BlockingIOError:
                wrote = 0
            except OSError:
                self._transport.abort()  # connection_lost follows and frees the slot
                return True
            if wrote == len(data):
                return True
            data = data[wrote:]
            self._clogged = True
        self._transport.write(data)
        return False

    def answered(self, keep: bool) -> None:
        self._job = None
        if not keep and not self._closed:
            self._closed = True
            self._transport.close()

    # the server's call, then the parser's

    def feed(self, data: bytes, read_s: float) -> None:
        if self._closed:
            return
        self._read_s = read_s
        if not self._headed:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
            if not self._headed and self._head_bytes > HEAD_LIMIT_BYTES:
                raise Refused(431, f"the request's head is longer than {HEAD_LIMIT_BYTES} bytes")
        except Refused as refusal:
            self._reply(refusal.status, formats.error_body(refusal.status, str(refusal), refusal.param), keep=False)
        except httptools.HttpParserUpgrade:
            self._reply(400, formats.error_body(400, "no other protocol is spoken here"), keep=False)
        except httptools.HttpParserError as problem:
            # What our own callbacks raise comes wrapped.
            cause = problem.__context__ if isinstance(problem, httptools.HttpParserCallbackError) else None
            if isinstance(cause, Refused):
                status, text = cause.status, str(cause)
            elif cause is None:
                status, text = 400, "this is not HTTP/1.1"
            else:
                status, text = 500, "a mistake of the simulator's own; its stderr says which"
                traceback.print_exception(cause)
            self._reply(status, formats.error_body(status, text), keep=False)

    def on_message_begin(self) -> None:
        self._clear()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        lower = name.lower()
        if lower == b"x-request-id":
            self._request_id = value[:200].decode("latin-1")
        elif lower == b"expect":
            self._expects = value.lower() == b"100-continue"

    def on_headers_complete(self) -> None:
        self._headed = True
        if self._parser.get_http_version() != "1.1":
            raise Refused(505, "only HTTP/1.1 is spoken here")
        if self._expects:
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body.append(body)
        self._body_bytes += len(body)
        if self._body_bytes > BODY_LIMIT_BYTES:
            raise Refused(413, f"the request's body is longer than {BODY_LIMIT_BYTES} bytes")

    def on_message_complete(self) -> None:
        keep = bool(self._parser.should_keep_alive())
        self._headed, self._head_bytes = False, 0
        if self._job is not None or self._closed:
            self.abort_pipelining()
            return
        try:
            self._route(self._parser.get_method().decode("latin-1"), keep)
        except Refused as refusal:
            self._reply(refusal.status, formats.error_body(refusal.status, str(refusal), refusal.param), keep)

    def abort_pipelining(self) -> None:
        """A second request before the first was answered is a mistake of the client's; interleaved answers would hide it."""
        if not self._closed:
            self._transport.abort()

    def _route(self, method: str, keep: bool) -> None:
        path, _, query = self._url.decode("latin-1").partition("?")
        found = ROUTES.get(path)
        if found is None:
            raise Refused(404, f"no such path: {path}; known: {', '.join(ROUTES)}")
        if method != found[0]:
            raise Refused(405, f"{path} takes {found[0]}, not {method}")
        found[1](self, query, keep)

    def _reply(self, status: int, body: bytes, keep: bool, kind: bytes = b"application/json") -> None:
        self.send(formats.response(status, body, keep, kind))
        if not keep and not self._closed:
            self._closed = True
            self._transport.close()

    def _json(self) -> dict[str, Any]:
        try:
            said = orjson.loads(b"".join(self._body))
        except orjson.JSONDecodeError as problem:
            raise Refused(400, f"the body is not JSON: {problem}") from None
        if not isinstance(said, dict):
            raise Refused(400, "the body is not a JSON object")
        return said

    # what each path does

    def completions(self, query: str, keep: bool) -> None:
        self._generate(self._json(), False, keep)

    def chat(self, query: str, keep: bool) -> None:
        self._generate(self._json(), True, keep)

    def models(self, query: str, keep: bool) -> None:
        law = self._server.law
        card = {
            "id": law.model,
            "object": "model",
            "created": 0,
            "owned_by": "ridgeline",
            "max_model_len": law.context_tokens,
        }
        self._reply(200, orjson.dumps({"object": "list", "data": [card]}), keep)

    def health(self, query: str, keep: bool) -> None:
        self._reply(200, b"", keep)

    def version(self, query: str, keep: bool) -> None:
        self._reply(200, orjson.dumps({"version": f"ridgeline-simulator {__version__}"}), keep)

    def tokenize(self, query: str, keep: bool) -> None:
        body, law = self._json(), self._server.law
        self._check_model(body)
        special = body.get("add_special_tokens", True) is not False
        ids = prompt_of(body, "messages" in body, law, special).ids()
        self._reply(200, orjson.dumps({"count": len(ids), "max_model_len": law.context_tokens, "tokens": ids}), keep)

    def metrics(self, query: str, keep: bool) -> None:
        self._reply(200, self._server.metrics(), keep, b"text/plain; version=0.0.4; charset=utf-8")

    def log(self, query: str, keep: bool) -> None:
        self._reply(200, orjson.dumps(self._server.log(with_events="events=0" not in query.split("&"))), keep)

    def reset(self, query: str, keep: bool) -> None:
        self._server.reset()
        self._reply(200, b"{}", keep)

    def _check_model(self, body: dict[str, Any]) -> None:
        name = body.get("model", self._server.law.model)
        if name != self._server.law.model:
            raise Refused(404, f"The model `{name}` does not exist; served here: `{self._server.law.model}`.", "model")

    def _generate(self, body: dict[str, Any], chat: bool, keep: bool) -> None:
        server, law = self._server, self._server.law
        self._check_model(body)
        if body.get("n", 1) not in (1, None):
            raise Refused(400, "only n = 1 is simulated", "n")
        prompt = prompt_of(body, chat, law)
        asked = output_asked(body)
        prompt_tokens = prompt.count()
        check_length(law, prompt_tokens, asked)
        output_tokens, finish = output_of(law, body, asked)
        stream = body.get("stream") is True
        server_id = f"{'chatcmpl' if chat else 'cmpl'}-{server.begun:08x}"
        answer = formats.Answer(chat, server_id, law.model, int(time.time()), finish)
        job = Job(
            conn=self, answer=answer, chat=chat, stream=stream, keep=keep, usage=usage_kind(law, body),
            finish=finish, prompt_tokens=prompt_tokens, cached_tokens=server.cached_tokens(prompt), output_tokens=output_tokens,
            prompt_crc32=prompt.crc32, request_id=self._request_id, peer_port=self._port, received_s=self._read_s,
        )  # fmt: skip
        self._job = job
        if stream:
            head = formats.STREAM_HEAD + (b"\r\n" if keep else b"connection: close\r\n\r\n")
            self.send(head + answer.role() if chat and law.role_chunk == "early" else head)
        server.begin(job)


Route = tuple[str, Callable[[_Connection, str, bool], None]]
ROUTES: dict[str, Route] = {
    "/v1/completions": ("POST", _Connection.completions),
    "/v1/chat/completions": ("POST", _Connection.chat),
    "/v1/models": ("GET", _Connection.models),
    "/tokenize": ("POST", _Connection.tokenize),
    "/health": ("GET", _Connection.health),
    "/version": ("GET", _Connection.version),
    "/metrics": ("GET", _Connection.metrics),
    "/__log__": ("GET", _Connection.log),
    "/__reset__": ("POST", _Connection.reset),
}


async def serve(law: Law, host: str = "127.0.0.1", port: int = 0) -> Server:
    """Listen on the running loop; port 0 takes a free one, told by the result's `port`.

    Raises RidgelineError if the address cannot be had.
    """
    loop = asyncio.get_running_loop()
    server = Server(law, loop)
    try:
        listener = await loop.create_server(lambda: _Connection(server), host, port, backlog=4096)
    except (OSError, OverflowError) as problem:
        await server.close()
        raise RidgelineError(
            f"simulate: cannot listen on {host}:{port}: {problem}; take another port, or 0", 2
        ) from None
    server.listener = listener
    server.host, server.port = host, listener.sockets[0].getsockname()[1]
    return server


async def _serve_until_told(law: Law, host: str, port: int, log: Callable[[str], None]) -> dict[str, Any]:
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, told.set)
    server = await serve(law, host, port)
    # The collector would stop everything for milliseconds; what lives long is set aside, and it seldom looks.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 1000)
    log(f"simulator: {server.url}")
    await told.wait()
    summary = server.summary()
    await server.close()
    return summary


def _say(line: str) -> None:
    print(line, flush=True)


def run(law: Law, host: str = "127.0.0.1", port: int = 0, log: Callable[[str], None] = _say) -> dict[str, Any]:
    """Serve until SIGINT or SIGTERM; `log` gets one line when it listens.  Returns `Server.summary()`."""
    work = _serve_until_told(law, host, port, log)
    try:
        import uvloop
    except ImportError:  # not on every platform; the pauses are then coarser by some 0.05 ms
        return asyncio.run(work)
    return uvloop.run(work)


def parser() -> argparse.ArgumentParser:
    """One option for each field of Law (`ttft_base_s` is `--ttft-base`), and where to listen."""
    options = argparse.ArgumentParser("ridgeline simulate", description="A server with an exactly stated service law.")
    options.add_argument("--host", default="127.0.0.1")
    options.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    kinds = get_type_hints(Law)
    for item in fields(Law):
        kind, name = kinds[item.name], "--" + item.name.removesuffix("_s").replace("_", "-")
        said: dict[str, Any] = {"dest": item.name, "default": item.default, "help": item.metadata["help"]}
        if kind is bool:
            said["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is Literal:
            said["choices"] = get_args(kind)
        elif item.name.endswith("_s"):
            said |= {"type": _time, "metavar": "TIME"}
        else:
            said |= {"type": kind if kind in (int, float, str) else int, "metavar": "NAME" if kind is str else "N"}
        options.add_argument(name, **said)
    return options


def _time(text: str) -> float:
    try:
        return units.parse(text, "time")
    except RidgelineError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from None


def main(argv: Sequence[str] | None = None) -> int:
    """The command: serves until told to stop; says on stderr how well the law was kept."""
    chosen = vars(parser().parse_args(argv))
    host, port = chosen.pop("host"), chosen.pop("port")
    try:
        summary = run(Law(**chosen), host, port)
    except RidgelineError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.code
    if summary["events"]:
        mean, most = units.seconds(summary["late_mean_s"]), units.seconds(summary["late_max_s"])
        late = units.count(summary["late_over_1ms"])
        print(f"simulator: {summary['events']:,} events, late by {mean} on average, {most} at most, "
              f"{late} by more than 1 ms", file=sys.stderr)  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
