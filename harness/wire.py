"""The measured hot path: one connection, one request in flight, a timestamp for each socket read, parsing after the fact.

Between reads only byte work is done: append, compare the tail with the last chunk of a message, bound the length.  The
HTTP parser (httptools) sees the head, and then the rest at once when the message may be over.  What the bytes mean is
found out by the recorder, in another process.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import socket
import ssl
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

from harness.endings import ERROR_BYTES, EVENT_BYTES, HEAD_BYTES, KEPT_BYTES, most_bytes, most_events
from harness.framing import unframe
from harness.records import NAN, RidgelineError

clock = time.perf_counter  # CLOCK_MONOTONIC on Linux: shared by all processes of one machine

LOOK_BYTES = 64  # an event of text is longer: how many came is looked at when so many bytes for each allowed one have
LAST_CHUNK = b"0\r\n\r\n"  # how a chunked message without trailers ends (RFC 9112, 7.1); text may look like it
DONE_LAST = b"[DONE]\n\n\r\n" + LAST_CHUNK  # what no text can look like: in JSON a line feed is escaped
MARKERS = (b"data: [DONE]", b"data:[DONE]")  # how a stream ends
BLANK_LINES = (b"\n\n", b"\r\n\r\n", b"\r\r")
FRAMING = 8  # a chunk of one byte costs six bytes more
_SEAM = re.compile(rb"\r\n[0-9a-fA-F]+\r\n")  # between two chunks
QUIET_S = 0.05  # after a read, the end of the message is awaited so long before what came is looked at


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
    if re.search("[@?#]", text):  # first: such a text may hold a secret, and is not to be shown
        raise RidgelineError("--url: holds a user, password, query or fragment; give http://HOST:PORT, and the key by "
                             "--api-key-env NAME instead")  # fmt: skip
    if not re.fullmatch("[!-~]+", text):  # it becomes a line of HTTP
        raise RidgelineError(f"--url: got {url!r}; a space or a letter beyond ASCII has to be written as %XX")
    try:
        parts = urlsplit(text)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as problem:
        raise RidgelineError(f"--url: got {url!r}: {problem}; give http://HOST:PORT") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RidgelineError(f"--url: got {url!r}; give http://HOST:PORT or https://HOST")
    path = parts.path.rstrip("/")
    for known in ("/v1/chat/completions", "/v1/completions", "/v1"):
        if path.endswith(known):
            path = path[: -len(known)]
            break
    headers = (("Authorization", f"Bearer {key}"),) if key else ()
    return Target(parts.scheme, parts.hostname, port, path, headers)


class Exchange:
    """One request and all that came back, as bytes with stamps.

    `reads` are as the socket gave them, head and framing included (`http`), or bodies that a library unframed.
    """

    __slots__ = (
        "coding",
        "connect_s",
        "counted",
        "end_s",
        "ending",
        "events",
        "has_text",
        "head_reads",
        "http",
        "keep_alive",
        "look_at",
        "max_bytes",
        "max_events",
        "note",
        "parsed",
        "payload",
        "reads",
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
        self.max_events, self.max_bytes = most_events(output_tokens), most_bytes(output_tokens)
        self.look_at = LOOK_BYTES * self.max_events
        self.reads: list[bytes] = []
        self.stamps_s = array("d")
        self.size = self.events = self.since_event = self.status = 0
        self.parsed = self.counted = self.head_reads = 0  # reads so far: given to the parser, counted, before the body
        self.sent_s = self.end_s = self.connect_s = self.tls_s = NAN
        self.ending = self.note = self.coding = ""
        self.http = self.keep_alive = True
        self.resent = self.has_text = False

    @property
    def begun(self) -> bool:
        """Whether anything came after the head."""
        return bool(self.status) and len(self.reads) > self.head_reads

    def body(self) -> tuple[bytes, list[int]]:
        """The body so far, and how much of it had come with each read."""
        ends = list(itertools.accumulate(map(len, self.reads)))
        whole = b"".join(self.reads)
        return unframe(whole, ends) if self.http else (whole, ends)


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
        exchange.stamps_s.append(now)
        exchange.reads.append(data)
        exchange.size += len(data)
        if not self.streaming:
            self.settle(exchange)
        elif data.endswith(LAST_CHUNK):
            before = exchange.reads[-2][-32:] if len(data) < 32 else b""
            if (before + data).endswith(DONE_LAST):
                self._done(exchange)
            else:
                self.settle(exchange)
        if exchange.size > exchange.look_at and self.exchange is exchange:
            self._bound(exchange)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        exchange = self.exchange
        if exchange is None:
            self.on_idle_close(self)
        else:
            self._lost(exchange, exc)
        # Wire and parser hold each other, and nobody collects what does so while a run goes on.
        del self.parser

    def _lost(self, exchange: Exchange, exc: Exception | None) -> None:
        self.settle(exchange)
        if not exchange.status:
            self.finish("disconnected_before_response", str(exc or "the server closed the connection"))
        elif exc is None and not self.framed:
            self.finish("complete")
        else:
            self.finish("stream_reset" if exc else "eof", str(exc or "the server closed the connection"))

    # -- httptools' side

    def on_message_begin(self) -> None:
        if not self.complete:
            self.framed = self.streaming = False

    def on_header(self, name: bytes, value: bytes) -> None:
        exchange = self.exchange
        if exchange is None or self.complete:
            return
        lower = name.lower()
        # A server that states a keep-alive timeout holds a thread per connection (llama.cpp's does): an idle connection
        # of ours would keep one of its few threads busy and make others wait, which we would then measure.
        if lower == b"keep-alive":
            exchange.keep_alive = False
        elif lower == b"location":
            exchange.note = f"Location: {value[:1024].decode('latin-1')}"
        elif lower == b"content-encoding" and value.lower() != b"identity":
            exchange.coding = value[:64].decode("latin-1")
        elif lower == b"content-length":
            self.framed = True
            if value == b"0" and self.parser.get_status_code() == 200:
                exchange.keep_alive = False  # a completion of nothing: what yet comes is not the next one's answer
        elif lower == b"transfer-encoding":
            self.framed = True
            self.streaming = value.lower() == b"chunked"

    def on_headers_complete(self) -> None:
        if (exchange := self.exchange) and not self.complete:
            exchange.status = self.parser.get_status_code()
            exchange.head_reads = len(exchange.reads) - (not exchange.reads[-1].endswith(b"\r\n\r\n"))
            self.streaming = self.streaming and exchange.status == 200
            self.keeps = self.parser.should_keep_alive()

    def on_message_complete(self) -> None:
        if exchange := self.exchange:
            if exchange.status < 200:
                exchange.status = 0  # informational: the answer is yet to come
                return
            # A second answer to one request is no part of it, and this connection is not to be trusted.
            exchange.keep_alive = exchange.keep_alive and self.parser.should_keep_alive() and not self.complete
            self.complete = True

    # -- ours

    framed = False  # the message's end is told by its framing, not by the connection's
    streaming = False  # chunked: no read but the last needs the parser
    complete = False
    keeps = True  # the head allows another request on this connection

    def settle(self, exchange: Exchange) -> None:
        """Give the parser all that it has not seen, and end the exchange if the message is over."""
        fresh = b"".join(exchange.reads[exchange.parsed :])
        exchange.parsed = len(exchange.reads)
        if not fresh:
            return
        try:
            self.parser.feed_data(fresh)
        except httptools.HttpParserUpgrade:
            self.finish("malformed_http", "the server switched protocols")
        except httptools.HttpParserError as problem:
            exchange.keep_alive = False
            if not self.complete:
                self.finish("malformed_http", str(problem))
        if self.complete:
            self.finish("complete", end_s=exchange.stamps_s[-1])

    def _done(self, exchange: Exchange) -> None:
        """The end of a stream, without a parser: of answers that end together, the last would hold up the next first
        tokens.  The recorder unframes all of it."""
        exchange.keep_alive = exchange.keep_alive and self.keeps
        self.parser = httptools.HttpResponseParser(self)  # the old one is inside the message
        self.complete = True
        self.finish("complete", end_s=exchange.stamps_s[-1])

    def look(self, exchange: Exchange) -> None:
        """What no tail told, when nothing came for QUIET_S: a message with trailers, or [DONE] with no end after it."""
        if exchange.parsed < len(exchange.reads):
            self.settle(exchange)
            tail = _SEAM.sub(b"", b"".join(exchange.reads[-64:])[-512:])
            if self.exchange is exchange and tail.rstrip().endswith(MARKERS):
                exchange.keep_alive = False
                self.finish("complete", end_s=exchange.stamps_s[-1])

    def _bound(self, exchange: Exchange) -> None:
        """The limits of an answer that is larger than usual."""
        fresh = b"".join(exchange.reads[exchange.counted :])
        exchange.counted = len(exchange.reads)
        exchange.look_at = exchange.size + LOOK_BYTES * max(100, exchange.max_events - exchange.events)
        if not exchange.status:
            if exchange.size > HEAD_BYTES:
                self.finish("malformed_http", f"more than {HEAD_BYTES} bytes of header")
            return
        if exchange.status != 200:
            if exchange.size > ERROR_BYTES:  # enough to tell what it says
                exchange.keep_alive = False
                self.finish("complete")
            return
        ends = fresh.count(b"\n\n") or fresh.count(b"\r\n\r\n")
        exchange.events += ends
        exchange.since_event = 0 if ends else exchange.since_event + len(fresh)
        if exchange.events > exchange.max_events:
            self.finish("runaway", f"stopped after {exchange.events} events")
        elif exchange.since_event > EVENT_BYTES or exchange.size > exchange.max_bytes:
            self._bound_bytes(exchange)

    def _bound_bytes(self, exchange: Exchange) -> None:
        """Much came: what of?  A blank line may have come in pieces, or be two CRs, so the body is looked at as a whole."""
        body, ends = exchange.body()
        last = 0 if exchange.coding else max(0, *(body.rfind(blank) for blank in BLANK_LINES))
        exchange.since_event = 0 if exchange.coding else len(body) - last
        ending, note = "", ""
        if exchange.since_event > EVENT_BYTES:
            ending, note = "event_too_large", f"an event of more than {EVENT_BYTES} bytes"
        elif exchange.size - FRAMING * len(body) > HEAD_BYTES:
            ending, note = "malformed_http", f"more than {HEAD_BYTES} bytes of framing"
        elif exchange.size > exchange.max_bytes:
            ending, note = "runaway", f"stopped after {exchange.size} bytes"
        if ending:  # what is too much is not kept, and its last event is none
            kept = KEPT_BYTES if exchange.coding else min(last + 4, KEPT_BYTES)
            exchange.http, starts = False, [0, *ends[:-1]]
            exchange.reads = [body[start : min(end, kept)] for start, end in zip(starts, ends, strict=True)]
            self.finish(ending, note)

    def send(self, exchange: Exchange) -> None:
        """Write the request now; `sent_s` is the moment after its bytes were handed to the kernel."""
        assert self.transport is not None and self.exchange is None
        self.exchange, self.complete, self.streaming = exchange, False, False
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
                exchange.sent_s = clock()  # told later: whoever sends many must not be called back from within
                asyncio.get_running_loop().call_soon(
                    self.finish, "disconnected_before_response", str(problem), exchange
                )
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
