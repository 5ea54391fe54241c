"""The measured hot path: one connection, one request in flight, a timestamp for each socket read, parsing after the fact.

Between reads only byte work is done: HTTP framing in C (httptools), append, count event ends, compare the tail with
[DONE], bound the length.  What the bytes mean is found out by the recorder, in another process.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

from harness.records import NAN, RidgelineError

clock = time.perf_counter  # CLOCK_MONOTONIC on Linux: shared by all processes of one machine

EVENT_BYTES = 16 * 2**20  # one event longer than this is not an answer
RUNAWAY_EVENTS = 4  # events per token asked
ERROR_BYTES = 64 * 1024  # this much of an error's body is kept
MARKERS = (b"data: [DONE]", b"data:[DONE]")  # how a stream ends
LINGER_S = 0.05  # after [DONE] the end of the HTTP message is awaited so long, then the connection is dropped


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go.  `headers` hold the key, so this object is never printed or stored."""

    scheme: str
    host: str
    port: int
    prefix: str
    headers: tuple[tuple[str, str], ...] = ()

    def __repr__(self) -> str:
        return f"Target({self.url})"

    @property
    def key(self) -> str:
        return dict(self.headers).get("Authorization", "").removeprefix("Bearer ")

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.prefix}"

    def request_bytes(self, path: str, body: bytes) -> bytes:
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [
            f"POST {self.prefix}{path} HTTP/1.1",
            f"Host: {host}:{self.port}",
            "Content-Type: application/json",
            "Accept: text/event-stream",
            "Accept-Encoding: identity",
            f"Content-Length: {len(body)}",
            *(f"{name}: {value}" for name, value in self.headers),
        ]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body


def parse_url(url: str, key: str = "") -> Target:
    """A base URL in any of its usual forms (with or without scheme, /v1, a trailing slash, the full path) -> Target."""
    text = url.strip() if "://" in url else f"http://{url.strip()}"
    try:
        parts = urlsplit(text)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as problem:
        raise RidgelineError(f"--url: got {url!r}: {problem}; give http://HOST:PORT") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RidgelineError(f"--url: got {url!r}; give http://HOST:PORT or https://HOST")
    if parts.username or parts.password or parts.query:
        raise RidgelineError("--url: holds a user, password or query; give the key by --api-key-env NAME instead")
    path = parts.path.rstrip("/")
    for known in ("/v1/chat/completions", "/v1/completions", "/v1"):
        if path.endswith(known):
            path = path[: -len(known)]
            break
    headers = (("Authorization", f"Bearer {key}"),) if key else ()
    return Target(parts.scheme, parts.hostname, port, path, headers)


class Exchange:
    """One request and all that came back, as bytes with stamps."""

    __slots__ = (
        "body",
        "chunks",
        "connect_s",
        "end_s",
        "ending",
        "ends",
        "events",
        "keep_alive",
        "max_events",
        "note",
        "payload",
        "resent",
        "sent_s",
        "since_event",
        "size",
        "stamps_s",
        "status",
        "tag",
        "tls_s",
    )  # fmt: skip

    def __init__(self, tag: Any, payload: bytes, output_tokens: int) -> None:
        self.tag = tag
        self.payload = payload
        self.max_events = RUNAWAY_EVENTS * output_tokens + 100
        self.chunks: list[bytes] = []
        self.stamps_s = array("d")
        self.ends = array("L")
        self.size = self.events = self.since_event = self.status = 0
        self.sent_s = self.end_s = self.connect_s = self.tls_s = NAN
        self.ending = self.note = ""
        self.keep_alive = True
        self.resent = False
        self.body = b""


class Wire(asyncio.Protocol):
    """A keep-alive HTTP/1.1 connection.  `on_end(wire, exchange)` is called when a response is over, however it ended."""

    def __init__(self, on_end: Callable[[Wire, Exchange], None], on_idle_close: Callable[[Wire], None]) -> None:
        self.on_end = on_end
        self.on_idle_close = on_idle_close
        self.exchange: Exchange | None = None
        self.transport: asyncio.Transport | None = None
        self.fd = -1
        self.connect_s = self.tls_s = NAN
        self.uses = 0
        self.open = False
        self.parser = httptools.HttpResponseParser(self)

    # -- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.open = True
        plain = transport.get_extra_info("sslcontext") is None and transport.get_extra_info("ssl_object") is None
        self.fd = transport.get_extra_info("socket").fileno() if plain else -1

    def data_received(self, data: bytes) -> None:
        now = clock()
        exchange = self.exchange
        if exchange is None:  # bytes that nobody asked for: this connection is not to be trusted
            self.close()
            return
        before = exchange.size
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.finish("malformed_http", "the server switched protocols")
            return
        except httptools.HttpParserError as problem:
            self.finish("malformed_http", str(problem))
            return
        if exchange.size != before:
            exchange.stamps_s.append(now)
            exchange.ends.append(exchange.size)
        if self.exchange is not exchange or exchange.ending:  # the message was complete
            return
        ends = data.count(b"\n\n") or data.count(b"\r\n\r\n")
        exchange.events += ends
        exchange.since_event = 0 if ends else exchange.since_event + len(data)
        # A marker that came in pieces is in the last pieces: only tiny reads need that look.
        if b"[DONE]" in data[-32:] or (len(data) < 32 and b"[DONE]" in b"".join(exchange.chunks[-8:])):
            asyncio.get_running_loop().call_later(LINGER_S, self._linger, exchange)
        elif exchange.events > exchange.max_events:
            self.finish("runaway", f"stopped after {exchange.events} events")
        elif exchange.since_event > EVENT_BYTES:
            self.finish("event_too_large", f"an event of more than {EVENT_BYTES} bytes")

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        if self.exchange is None:
            self.on_idle_close(self)
        elif not self.exchange.status:
            self.finish("disconnected_before_response", str(exc or "the server closed the connection"))
        elif exc is None and self._ends_with_connection():
            self.finish("complete")
        else:
            self.finish("stream_reset" if exc else "eof", str(exc or "the server closed the connection"))

    # -- httptools' side

    def on_headers_complete(self) -> None:
        assert self.exchange is not None
        self.exchange.status = self.parser.get_status_code()

    def on_header(self, name: bytes, value: bytes) -> None:
        exchange = self.exchange
        if exchange is None:
            return
        lower = name.lower()
        # A server that states a keep-alive timeout holds a thread per connection (llama.cpp's does): an idle connection
        # of ours would keep one of its few threads busy and make others wait, which we would then measure.
        if lower == b"keep-alive":
            exchange.keep_alive = False
        elif lower == b"location" or (lower == b"content-encoding" and value.lower() != b"identity"):
            exchange.note = f"{name.decode('latin-1')}: {value.decode('latin-1')}"
        elif lower == b"content-length" or lower == b"transfer-encoding":
            self.framed = True

    def on_message_begin(self) -> None:
        self.framed = False

    def on_body(self, body: bytes) -> None:
        exchange = self.exchange
        assert exchange is not None
        if exchange.status != 200 and exchange.size > ERROR_BYTES:
            return
        exchange.chunks.append(body)
        exchange.size += len(body)

    def on_message_complete(self) -> None:
        exchange = self.exchange
        if exchange is None or 100 <= exchange.status < 200:
            return
        # The read that completes the message is stamped by data_received after this returns.
        exchange.keep_alive = exchange.keep_alive and self.parser.should_keep_alive()
        asyncio.get_running_loop().call_soon(self.finish, "complete", "", exchange)

    # -- ours

    framed = False

    def _ends_with_connection(self) -> bool:
        return not self.framed

    def send(self, exchange: Exchange) -> None:
        """Write the request now; `sent_s` is the moment after its bytes were handed to the kernel."""
        assert self.transport is not None and self.exchange is None
        self.exchange = exchange
        if not self.uses:
            exchange.connect_s, exchange.tls_s = self.connect_s, self.tls_s
        self.uses += 1
        payload = exchange.payload
        if self.fd >= 0:  # past the loop's own queue, which would write only when all of a wave have been queued
            try:
                written = os.write(self.fd, payload)
            except BlockingIOError:
                written = 0
            except OSError as problem:
                exchange.sent_s = clock()
                self.finish("disconnected_before_response", str(problem))
                return
            if written < len(payload):
                self.transport.write(payload[written:])
        else:
            self.transport.write(payload)
        exchange.sent_s = clock()

    def finish(self, ending: str, note: str = "", only: Exchange | None = None, end_s: float | None = None) -> None:
        """End the exchange under way as `ending`, now or at `end_s`; anything but a complete message costs the connection."""
        exchange = self.exchange
        if exchange is None or (only is not None and only is not exchange):
            return
        self.exchange = None
        exchange.end_s = end_s or clock()
        exchange.ending = ending
        exchange.note = note or exchange.note
        if ending != "complete" or not exchange.keep_alive:
            self.close()
        self.on_end(self, exchange)

    def _linger(self, exchange: Exchange) -> None:
        if self.exchange is exchange and b"".join(exchange.chunks[-32:]).rstrip().endswith(MARKERS):  # not a text of it
            exchange.keep_alive = False
            self.finish("complete", end_s=exchange.stamps_s[-1])

    def close(self) -> None:
        self.open = False
        if self.transport is not None:
            self.transport.abort()


async def connect(target: Target, address: tuple[Any, ...], tls: ssl.SSLContext | None,
                  wire: Wire, timeout_s: float) -> Wire:  # fmt: skip
    """Open one connection; its time to open is kept apart from every latency.  Raises OSError (TimeoutError too)."""
    loop = asyncio.get_running_loop()
    family, kind, proto, _, sockaddr = address
    sock = socket.socket(family, kind, proto)
    sock.setblocking(False)
    start = clock()
    try:
        async with asyncio.timeout(timeout_s):
            await loop.sock_connect(sock, sockaddr)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connected_s = clock()
            if tls:
                await loop.create_connection(lambda: wire, sock=sock, ssl=tls, server_hostname=target.host)
            else:
                await loop.create_connection(lambda: wire, sock=sock)
    except BaseException:
        sock.close()
        raise
    wire.connect_s = connected_s - start
    if tls:
        wire.tls_s = clock() - connected_s
    return wire


async def resolve(target: Target) -> tuple[Any, ...]:
    """The address that all connections of a run use, resolved once.  Raises RidgelineError (code 6)."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except socket.gaierror as problem:
        raise RidgelineError(f"{target.url}: host {target.host!r} does not resolve: {problem.strerror}", 6) from None
    return found[0]
