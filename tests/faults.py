"""A rig of faults: a raw TCP server that sends exact bytes at exact times, and what each fault must be called.

`python -m tests.faults` serves them all: POST /NAME/v1/completions plays the fault NAME (by its number for `mixed`) to
every request for TOKENS tokens; any other request, such as a preflight's, gets a whole answer (POST /first-NAME plays it
to those too).
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import socket
import struct
import sys
import zlib
from dataclasses import dataclass
from typing import Any

TOKENS = 8  # asked for, and told one by one by a healthy answer
PROMPT_TOKENS = 7
CANARY = "sk-canary-4711-Zq"
HOSTILE = f"=cmd|' /C calc'!A0\x1b[2J\x1b]0;title\x07</script><script>alert(1)</script>{CANARY}\u202e"


@dataclass(frozen=True)
class Endless:
    """The same bytes for ever, `pause_s` between them."""

    piece: bytes
    pause_s: float = 0.0


@dataclass(frozen=True)
class Slowly:
    """Bytes in pieces of `size`, `pause_s` between them."""

    data: bytes
    size: int = 1
    pause_s: float = 0.0


RESET, CLOSE, HANG = "reset", "close", "hang"
Step = bytes | float | str | Endless | Slowly


@dataclass(frozen=True)
class Fault:
    """What is sent, the class it must end in, the tokens that must be counted (None: none) and the record's notes."""

    name: str
    expected: str
    tokens: int | None
    steps: tuple[Step, ...]
    notes: str = ""


# -- bytes

SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
HEAD = SSE + b"Transfer-Encoding: chunked\r\n\r\n"
DONE = b"data: [DONE]\n\n"
END = b"0\r\n\r\n"


def data(value: Any) -> bytes:
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def token(text: str = "word ", finish: str | None = None, **more: Any) -> bytes:
    return data({"choices": [{"index": 0, "text": text, "finish_reason": finish}], **more})


def delta(finish: str | None = None, **content: Any) -> bytes:
    return data({"choices": [{"index": 0, "delta": content, "finish_reason": finish}]})


def usage(completion: Any = TOKENS, prompt: Any = PROMPT_TOKENS) -> bytes:
    return data({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}})


def c(*parts: bytes) -> bytes:
    """HTTP chunks."""
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)


def sized(body: bytes, head: bytes = SSE, length: int | None = None) -> bytes:
    return head + b"Content-Length: %d\r\n\r\n" % (len(body) if length is None else length) + body


def status(code: int, body: bytes = b"", *headers: bytes) -> bytes:
    lines = b"".join(header + b"\r\n" for header in headers)
    return b"HTTP/1.1 %d Status\r\n%bContent-Length: %d\r\n\r\n%b" % (code, lines, len(body), body)


def three(*more: Step) -> tuple[Step, ...]:
    return (HEAD, *(c(token()) for _ in range(3)), *more)


TEXT = [token() for _ in range(TOKENS - 1)] + [token(finish="length")]
WHOLE = [*TEXT, usage(), DONE]
BODY = b"".join(WHOLE)
OK = HEAD + c(*WHOLE) + END
UNARY = {"choices": [{"text": "word " * TOKENS, "finish_reason": "length"}],
         "usage": {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": TOKENS}}  # fmt: skip


def stream(*parts: bytes) -> bytes:
    return HEAD + c(*parts) + END


def packed(body: bytes, coding: bytes = b"gzip", code: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %b\r\nContent-Encoding: %b\r\nContent-Length: %d\r\n\r\n%b" % (code, coding, len(body), body)


def bomb(piece: bytes, times: int) -> bytes:
    """gzip of `times` pieces, the piece packed once.  Its checksum is wrong: whoever comes to it has unpacked it all."""
    packer = zlib.compressobj(9, wbits=31)
    first, again = (packer.compress(piece) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    return first + again * (times - 1) + packer.flush()


def raw_deflate(body: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(body) + packer.flush()


def in_band(*events: bytes) -> tuple[Step, ...]:
    return (HEAD, c(token(), token(), *events, DONE), END)


CUT = gzip.compress(token() * 3)
HUGE = json.dumps({"choices": [{"index": 0, "text": "x" * 2**20, "finish_reason": None}]}).encode()


def good(name: str, *steps: Step, tokens: int | None = TOKENS, notes: str = "") -> Fault:
    return Fault(name, "", tokens, steps, notes)


FAULTS: tuple[Fault, ...] = (
    # -- odd, and yet whole
    good("ok", OK),
    good("ok-sized", sized(BODY)),
    good("ok-until-close", SSE + b"\r\n" + BODY, CLOSE),
    good("ok-http-1.0", b"HTTP/1.0 200 OK\r\n\r\n" + BODY, CLOSE),
    good("bytewise", Slowly(OK)),
    good("crlf", stream(*(part.replace(b"\n", b"\r\n") for part in WHOLE))),
    good("crlf-split", Slowly(stream(*(part.replace(b"\n", b"\r\n") for part in WHOLE)), 7)),
    good("cr-only", stream(*(part.replace(b"\n", b"\r") for part in WHOLE))),
    good("one-chunk", stream(BODY)),
    good("chunks-cut-events", HEAD + c(*(BODY[i : i + 11] for i in range(0, len(BODY), 11))) + END),
    good("slow-head", 0.2, OK),
    good("slow-header-bytes", Slowly(HEAD, 4, 0.005), c(*WHOLE) + END),
    good("drip", HEAD, *(step for part in WHOLE for step in (0.02, c(part))), END),
    good("comments-first", HEAD, c(b": ping\n\n", b":\n\n"), 0.05, c(*WHOLE), END),
    good("comments-between", stream(*(b": ping\n" + part for part in WHOLE))),
    good("bom", stream(b"\xef\xbb\xbf", *WHOLE)),
    good("unicode-separators", stream(*(data(json.dumps({"choices": [{"text": f"a\u2028b\u2029c\x85{i}", "finish_reason":
         "length" if i == TOKENS - 1 else None}]}, ensure_ascii=False).encode()) for i in range(TOKENS)), usage(), DONE)),
    good("data-on-two-lines", stream(*(part.replace(b'"choices"', b'\ndata: "choices"', 1) for part in WHOLE))),
    good("no-space", stream(*(part.replace(b"data: ", b"data:", 1) for part in WHOLE))),
    good("other-fields", stream(*(b"id: 7\nretry: 10\nevent: message\nfoo: bar\n" + part for part in WHOLE))),
    good("no-done", stream(*TEXT, usage()), notes="no_done"),
    good("done-without-blank-line", stream(*TEXT, usage(), b"data: [DONE]")),
    good("done-linger", HEAD + c(*WHOLE), HANG),
    good("error-after-done", stream(*WHOLE, data({"error": "too late"}))),
    good("reset-after-done", HEAD + c(*WHOLE), 0.02, RESET),
    good("trailers", HEAD + c(*WHOLE) + b"0\r\nX-Time: 1\r\n\r\n"),
    good("trailer-flood", HEAD + c(*WHOLE) + b"0\r\n", Endless(b"X-Trailer: 0123456789\r\n" * 500)),
    good("chunk-extensions", HEAD + b"".join(b"%x;a=b\r\n%b\r\n" % (len(p), p) for p in WHOLE) + END),
    good("header-spelling", b"HTTP/1.1 200 ok\r\ntransfer-ENCODING:chunked\r\nx:\r\n\r\n" + c(*WHOLE) + END),
    good("informational", b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n", 0.02, OK),
    good("second-answer", OK + status(500, b"not asked for")),
    good("rubbish-after", OK + b"rubbish rubbish rubbish\r\n\r\n"),
    good("closes-in-silence", OK, 0.005, CLOSE),
    good("two-boms", stream(b"\xef\xbb\xbf" * 2, *WHOLE)),
    good("empty-data", stream(b"data\n\n", b"data: \n\n", *(part + b"data:\n\n" for part in WHOLE))),
    good("last-chunk-in-a-comment", stream(*(part.replace(b"\n", b"\r\n") + b": 0\r\n\r\n" for part in WHOLE))),
    good("deep-beside", stream(data(b'{"choices":[],"x":' + b"[" * 900 + b"]" * 900 + b"}"), *WHOLE)),
    good("large-event", stream(token("x" * 900_000), *TEXT[1:], usage(), DONE)),
    good("refusal", stream(*(delta(refusal="no ") for _ in range(7)), delta("stop", refusal="."), usage(), DONE)),
    good("choices-of-no-kind", stream(*(data({"choices": odd}) for odd in (None, {}, [[1]], "a")), *WHOLE)),
    good("error-false", stream(token(error=False), token(error=0), token(error=[]), *TEXT[3:], usage(), DONE)),
    good("usage-first", stream(usage(), *TEXT, DONE)),
    good("usage-continuous", stream(*(token(finish="length" if i == TOKENS else None, usage={"prompt_tokens": PROMPT_TOKENS,
         "completion_tokens": i}) for i in range(1, TOKENS + 1)), DONE)),
    good("usage-none", stream(*TEXT, DONE)),
    good("usage-null", stream(*(token(finish="length" if i == TOKENS - 1 else None, usage=None) for i in range(TOKENS)), DONE)),
    good("usage-high", stream(*TEXT, usage(999_999), DONE), notes="token_count_mismatch"),
    good("usage-low", stream(*TEXT, usage(1), DONE), notes="token_count_mismatch"),
    good("usage-zero", stream(*TEXT, usage(0), DONE), notes="token_count_mismatch"),
    good("usage-negative", stream(*TEXT, usage(-5), DONE)),
    good("usage-astronomic", stream(*TEXT, usage(10**30), DONE)),
    good("usage-leap", stream(token(usage={"completion_tokens": 1}), token(usage={"completion_tokens": 10**9}), *TEXT[2:], DONE),
         notes="token_count_mismatch"),
    good("usage-words", stream(*TEXT, usage("eight"), DONE)),
    good("usage-true", stream(*TEXT, usage(True), DONE)),
    good("usage-list", stream(*TEXT, data({"choices": [], "usage": [1, 2]}), DONE)),
    good("token-ids-absurd", stream(token(token_ids=1), data({"choices": [{"text": "a", "token_ids": list(range(5000))}]}),
         *TEXT[2:], DONE)),
    good("error-null", stream(*(token(finish="length" if i == TOKENS - 1 else None, error=None) for i in range(TOKENS)), DONE)),
    good("error-empty", stream(token(error=""), token(error={}), *TEXT[2:], DONE)),
    good("role-gap", HEAD + c(delta(role="assistant", content="")), 0.2, c(*WHOLE) + END),
    good("empty-deltas", stream(*(part for text in TEXT for part in (token(""), text)), usage(), DONE)),
    good("four-tokens-an-event", stream(token("a b c d "), token("e f g h", "length"), usage(), DONE)),
    good("reasoning", stream(*(delta(reasoning_content="hm ") for _ in range(4)), *(delta(content="a ") for _ in range(3)),
         delta("stop", content="b"), usage(), DONE)),
    good("tool-call", stream(*(delta(tool_calls=[{"function": {"arguments": "{"}}]) for _ in range(7)), delta("tool_calls",
         tool_calls=[{"function": {"arguments": "}"}}]), usage(), DONE)),
    good("two-choices", stream(*(part for text in TEXT for part in (text, data({"choices": [{"index": 1, "text": "other"}]}))),
         usage(), DONE)),
    good("duplicate-event", stream(TEXT[0], *TEXT, usage(), DONE)),
    good("early-end", stream(token(), token(finish="stop"), usage(2), DONE), tokens=2),
    good("overlong", stream(*[token()] * 15, token(finish="stop"), usage(16), DONE), tokens=16),
    good("finish-in-capitals", stream(*TEXT[:-1], token(finish="STOP"), usage(), DONE)),
    good("lone-surrogate", stream(*TEXT[:-1], data(b'{"choices":[{"text":"\\ud83d","finish_reason":"stop"}]}'), usage(), DONE)),
    good("not-a-number", stream(*TEXT[:-1], data(b'{"choices":[{"text":"a","logprob":NaN,"finish_reason":"stop"}]}'), usage(), DONE)),
    good("one-piece", sized(json.dumps(UNARY).encode()), notes="not_streamed"),
    good("one-piece-no-usage", sized(json.dumps({"choices": UNARY["choices"]}).encode()), tokens=None, notes="not_streamed"),
    good("gzip", packed(gzip.compress(BODY)), notes="compressed"),
    good("gzip-in-reads", HEAD.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n"), Slowly(c(gzip.compress(BODY)) + END, 60, 0.005),
         notes="compressed"),
    good("gzip-members", packed(b"".join(map(gzip.compress, WHOLE))), notes="compressed"),
    good("gzip-no-end", packed(gzip.compress(BODY)[:-8]), notes="compressed"),
    good("deflate", packed(zlib.compress(BODY), b"deflate"), notes="compressed"),
    good("deflate-raw", packed(raw_deflate(BODY), b"deflate"), notes="compressed"),
    good("hostile-text", stream(*(token("</script><img src=x onerror=alert(1)>\x1b[2J=cmd|'/c calc'!A1", "length" if i == 7 else None)
         for i in range(TOKENS)), usage(), DONE)),
    # -- connections that end
    Fault("reset-first", "disconnected_before_response", None, (RESET,)),
    Fault("close-first", "disconnected_before_response", None, (CLOSE,)),
    Fault("half-status-line", "disconnected_before_response", None, (b"HTTP/1.1 20", CLOSE)),
    Fault("half-head", "disconnected_before_response", None, (HEAD[:40], CLOSE)),
    Fault("continue-then-close", "disconnected_before_response", None, (b"HTTP/1.1 100 Continue\r\n\r\n", CLOSE)),
    Fault("reset-0", "stream_reset", None, (HEAD, 0.05, RESET)),
    Fault("reset-3", "stream_reset", 3, three(0.05, RESET)),
    Fault("eof-0", "truncated", None, (HEAD, CLOSE)),
    Fault("eof-3", "truncated", 3, three(CLOSE)),
    Fault("eof-after-finish", "truncated", 8, (HEAD, c(*TEXT), CLOSE)),
    Fault("clean-end-3", "truncated", 3, three(END)),
    Fault("close-delimited-3", "truncated", 3, (SSE + b"\r\n" + token() * 3, CLOSE)),
    Fault("no-finish", "truncated", 8, (stream(*[token()] * 8, usage(), DONE),)),
    Fault("half-event", "truncated", 3, three(c(token()[:20]), CLOSE)),
    Fault("half-event-clean", "truncated", 3, three(c(token(finish="length")[:-2]), END)),
    Fault("half-chunk", "truncated", 3, three(c(token())[:-8], CLOSE)),
    Fault("length-too-short", "truncated", 3, (sized(BODY, length=3 * len(token())),)),
    Fault("length-too-long", "truncated", 8, (sized(BODY.removesuffix(DONE), length=10**6), CLOSE)),
    Fault("gzip-cut", "truncated", 3, (sized(CUT, SSE + b"Content-Encoding: gzip\r\n", 9999), 0.02, CLOSE), "compressed"),
    # -- silence
    Fault("hang-first", "timeout_ttft", None, (HANG,)),
    Fault("hang-after-head", "timeout_ttft", None, (HEAD, HANG)),
    Fault("hang-after-role", "timeout_ttft", None, (HEAD + c(delta(role="assistant", content="")), HANG)),
    Fault("header-drip", "timeout_ttft", None, (SSE, Endless(b"X-Slow: 1\r\n", 0.1))),
    Fault("pings-only", "timeout_ttft", None, (HEAD, Endless(c(b": ping\n\n"), 0.1))),
    Fault("stall-3", "timeout_idle", 3, three(HANG)),
    Fault("stall-in-event", "timeout_idle", 3, three(c(token()[:9]), HANG)),
    Fault("length-too-long-hang", "timeout_idle", 8, (sized(BODY.removesuffix(DONE), length=10**6), HANG)),
    Fault("pings-after-3", "timeout_total", 3, three(Endless(c(b": ping\n\n"), 0.1))),
    Fault("byte-drip-after-3", "timeout_total", 3, three(Endless(c(b"x"), 0.05))),
    # -- too much
    Fault("endless", "runaway", -1, (HEAD, Endless(c(token()) * 50))),
    Fault("endless-null-content", "runaway", None, (HEAD, Endless(c(delta(content=None)) * 50))),
    Fault("endless-no-choices", "runaway", None, (HEAD, Endless(c(data({"choices": []})) * 50))),
    Fault("endless-usage", "runaway", -1, (HEAD, Endless(c(usage()) * 50))),
    Fault("gzip-of-many-members", "event_too_large", None, (packed(gzip.compress(b"0" * 2**16) * 3000),), "compressed"),
    Fault("gzip-of-empty-members", "not_an_llm_response", None, (packed(gzip.compress(b"") * 40_000),)),
    Fault("endless-comments", "runaway", None, (HEAD, Endless(c(b": ping\n\n") * 100))),
    Fault("endless-blank-lines", "runaway", None, (HEAD, Endless(c(b"\n" * 4096)))),
    Fault("endless-done-in-text", "runaway", -1, (HEAD, Endless(c(token("data: [DONE]")) * 50))),
    Fault("endless-large-events", "runaway", -1, (HEAD, Endless(c(data(HUGE))))),
    Fault("endless-until-close", "runaway", -1, (SSE + b"\r\n", Endless(token() * 50))),
    Fault("endless-line", "event_too_large", 3, three(Endless(c(b"data: " + b"x" * 65536)))),
    Fault("endless-line-no-chunks", "event_too_large", 3, (SSE + b"\r\n" + token() * 3, Endless(b"y" * 65536))),
    Fault("endless-json", "event_too_large", None, (SSE + b"\r\n{\"choices\":[{\"text\":\"", Endless(b"z" * 65536))),
    Fault("endless-cr-line", "event_too_large", None, (HEAD, Endless(c(b": x\r" * 9999)))),
    Fault("overlong-40", "runaway", 40, (stream(*[token()] * 39, token(finish="stop"), usage(40), DONE),)),
    Fault("gzip-bomb", "event_too_large", None, (packed(bomb(b"0" * 2**20, 512)),), "compressed"),
    Fault("gzip-bomb-of-events", "runaway", -1, (packed(bomb(token() * 9999, 200)),), "compressed"),
    Fault("deflate-bomb", "event_too_large", None, (packed(zlib.compress(b"0" * 2**26, 9), b"deflate"),), "compressed"),
    Fault("gzip-bomb-500", "http_500", None, (packed(bomb(b"error " * 2**16, 512), code=b"500 Oops"),)),
    Fault("header-flood", "malformed_http", None, (SSE, Endless(b"X-More: 0123456789\r\n" * 500))),
    Fault("header-endless", "malformed_http", None, (SSE + b"X-Long: ", Endless(b"0" * 8192))),
    Fault("continue-flood", "malformed_http", None, (Endless(b"HTTP/1.1 100 Continue\r\n\r\n" * 500),)),
    Fault("chunk-extension-flood", "malformed_http", 3, three(b"5;", Endless(b"x" * 8192))),
    Fault("status-line-endless", "malformed_http", None, (b"HTTP/1.1 200 ", Endless(b"O" * 8192))),
    Fault("error-endless", "http_500", None, (b"HTTP/1.1 500 Oops\r\n\r\n", Endless(b"no " * 4096))),
    # -- what is not HTTP
    Fault("ssh", "malformed_http", None, (b"SSH-2.0-OpenSSH_9.6\r\n", CLOSE)),
    Fault("tls-alert", "malformed_http", None, (b"\x15\x03\x01\x00\x02\x02\x16", CLOSE)),
    Fault("http-2", "malformed_http", None, (b"\x00\x00\x12\x04\x00\x00\x00\x00\x00" + bytes(18), CLOSE)),
    Fault("no-head", "malformed_http", None, (BODY, CLOSE)),
    Fault("upgrade", "malformed_http", None, (b"HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n", HANG)),
    Fault("bad-chunk", "malformed_http", 3, three(b"zz\r\n", HANG)),
    Fault("bad-chunk-negative", "malformed_http", 3, three(b"-5\r\nhello\r\n", CLOSE)),
    Fault("bad-chunk-huge", "malformed_http", 3, three(b"FFFFFFFFFFFFFFFFFF\r\n", HANG)),
    Fault("bad-chunk-end", "malformed_http", 3, three(b"5\r\nhelloXX", HANG)),
    Fault("length-negative", "malformed_http", None, (SSE + b"Content-Length: -1\r\n\r\n" + BODY, CLOSE)),
    Fault("length-twice", "malformed_http", None, (SSE + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", CLOSE)),
    Fault("length-and-chunked", "malformed_http", None, (SSE + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n" + c(*WHOLE), CLOSE)),
    # -- statuses
    *(Fault(f"http-{code}", f"http_{code}", None, (status(code, b'{"error":{"message":"said so"}}'),)) for code in
      (201, 202, 299, 400, 401, 403, 404, 405, 413, 418, 422, 429, 500, 501, 502, 503, 504, 529)),
    Fault("http-204", "http_204", None, (b"HTTP/1.1 204 No Content\r\n\r\n",)),
    Fault("http-429-later", "http_429", None, (status(429, b"slow down", b"Retry-After: 1"),)),
    Fault("http-503-date", "http_503", None, (status(503, b"", b"Retry-After: Fri, 31 Dec 1999 23:59:59 GMT"),)),
    Fault("http-500-stall", "http_500", None, (b"HTTP/1.1 500 Oops\r\nContent-Length: 99\r\n\r\nhalf", HANG)),
    Fault("http-500-reset", "http_500", None, (b"HTTP/1.1 500 Oops\r\nContent-Length: 99\r\n\r\nhalf", 0.02, RESET)),
    Fault("http-400-context", "context_length", None, (status(400, b'{"message":"maximum context length is 512 tokens"}'),)),
    Fault("http-422-inputs", "context_length", None, (status(422, b'{"error":"`inputs` tokens + `max_new_tokens` must be <= 512"}'),)),
    *(Fault(f"redirect-{code}", "redirect", None, (status(code, b"", b"Location: http://127.0.0.2:9/elsewhere"),)) for code in
      (301, 302, 303, 307, 308)),
    Fault("redirect-loop", "redirect", None, (status(307, b"", b"Location: /redirect-loop/v1/completions"),)),
    Fault("redirect-nowhere", "redirect", None, (status(302),)),
    # -- what is no completion
    Fault("html-200", "not_an_llm_response", None, (sized(b"<!doctype html><title>Welcome</title>", b"HTTP/1.1 200 OK\r\n"),)),
    Fault("empty-body", "not_an_llm_response", None, (sized(b""),)),
    Fault("no-length-but-a-body", "not_an_llm_response", None, (sized(BODY, length=0),)),
    Fault("no-length-and-a-body-later", "not_an_llm_response", None, (sized(b""), 0.02, BODY)),
    Fault("json-lines", "encoding", None, (sized(b"\n".join(part[6:].strip() for part in WHOLE)),)),
    Fault("empty-chunked", "not_an_llm_response", None, (HEAD + END,)),
    Fault("blank-200", "not_an_llm_response", None, (sized(b" \r\n\r\n "),)),
    Fault("comments-only", "not_an_llm_response", None, (stream(b": ping\n\n", b": pong\n\n"),)),
    Fault("other-json", "not_an_llm_response", None, (sized(b'{"hello": "world"}'),)),
    Fault("json-list", "not_an_llm_response", None, (sized(b"[1, 2, 3]"),)),
    Fault("binary", "not_an_llm_response", None, (sized(bytes(range(256)) * 9),)),
    Fault("done-only", "empty_output", None, (stream(DONE),)),
    Fault("no-tokens", "empty_output", 0, (stream(token("", "stop"), usage(0), DONE),)),
    Fault("empty-content", "empty_output", None, (stream(*[token("")] * 8, token("", "stop"), DONE),)),
    # -- errors within a 200
    Fault("error-vllm", "server_error_in_band", 2, in_band(data({"error": {"message": "EngineCore died", "code": 500}}))),
    Fault("error-first", "server_error_in_band", None, (stream(data({"error": {"message": "boom"}}), DONE),)),
    Fault("error-tgi", "server_error_in_band", 2, in_band(data({"error": "overloaded", "error_type": "generation"}))),
    Fault("error-sglang", "server_error_in_band", 2, in_band(data({"object": "error", "message": "abort", "code": 400}))),
    Fault("error-llama.cpp", "server_error_in_band", 2, in_band(b'error: {"code":500,"message":"slot lost"}\n\n')),
    Fault("error-llama.cpp-text", "server_error_in_band", 2, in_band(b"error: slot lost\n\n")),
    Fault("error-event", "server_error_in_band", 2, in_band(b'event: error\ndata: {"message":"gone"}\n\n')),
    Fault("error-event-text", "server_error_in_band", 2, in_band(b"event: error\ndata: Internal Server Error\n\n")),
    Fault("error-anthropic", "server_error_in_band", 2,
          in_band(b"event: error\n" + data({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}))),
    Fault("error-code-200", "server_error_in_band", 2, in_band(data({"error": {"code": 200, "message": "fine"}}))),
    Fault("error-without-words", "server_error_in_band", 2, in_band(data({"error": {"message": ""}}))),
    Fault("error-event-null", "server_error_in_band", 2, in_band(b"event: error\ndata: null\n\n")),
    Fault("error-event-empty", "server_error_in_band", 2, in_band(b"event: error\ndata:\n\n")),
    Fault("error-typed", "server_error_in_band", 2, in_band(data({"type": "error", "message": "no"}))),
    Fault("error-framework", "server_error_in_band", 2, in_band(data({"detail": "Internal Server Error"}))),
    Fault("error-list", "server_error_in_band", 2, in_band(data({"error": ["a", {"b": 1}]}))),
    Fault("error-in-choice", "server_error_in_band", 2, in_band(data({"choices": [{"index": 0, "error": {"message": "x"}}]}))),
    Fault("error-after-finish", "server_error_in_band", 8, (stream(*TEXT, data({"error": {"message": "late"}}), DONE),)),
    Fault("error-then-eof", "server_error_in_band", 3, three(c(data({"error": {"message": "x"}})), CLOSE)),
    Fault("error-one-piece", "server_error_in_band", None, (sized(b'{"error": {"message": "boom", "code": 500}}'),)),
    Fault("error-deep", "server_error_in_band", 2, in_band(data(b'{"error":' + b'{"a":' * 300 + b"1" + b"}" * 300 + b"}"))),
    Fault("error-echoes-key", "server_error_in_band", 2, in_band(data({"error": f"key {CANARY} \x1b[31mred ={CANARY.upper()}"}))),
    Fault("http-401-echoes-key", "http_401", None, (status(401, b'{"error":{"message":"Incorrect API key provided: %b"}}' % CANARY.encode()),)),
    Fault("error-long-echoes-key", "http_400", None, (status(400, b"x" * 4090 + CANARY.encode() * 3),)),
    Fault("redirect-echoes-key", "redirect", None, (status(302, b"", b"Location: http://127.0.0.2/?key=" + CANARY.encode()),)),
    Fault("finish-echoes-key", "aborted_by_server", 8, (stream(*TEXT[:-1], token(finish=CANARY), usage(), DONE),)),
    Fault("finish-abort-then-stop", "aborted_by_server", 8,
          (stream(*TEXT[:-1], token(finish="abort"), token("", "stop"), usage(), DONE),)),
    Fault("finish-empty", "truncated", 8, (stream(*TEXT[:-1], token(finish=""), usage(), DONE),)),
    Fault("finish-object", "aborted_by_server", 8, (stream(*TEXT[:-1], data({"choices": [{"text": "a", "finish_reason": {"type": "stop"}}]}),
          usage(), DONE),)),
    *(Fault(f"finish-{word}", "aborted_by_server", 8, (stream(*TEXT[:-1], token(finish=word), usage(), DONE),)) for word in
      ("abort", "error", "cancelled", "timeout", "banana")),
    Fault("finish-endless-word", "aborted_by_server", 8, (stream(*TEXT[:-1], token(finish="=" * 99_999), usage(), DONE),)),
    # -- what cannot be read
    Fault("bad-utf-8", "encoding", 7, (stream(*TEXT[:-1], data(b'{"choices":[{"text":"\xff\xfe","finish_reason":"stop"}]}'), DONE),)),
    Fault("two-objects-in-an-event", "encoding", 7, (stream(TEXT[0].strip() + TEXT[0][6:], *TEXT[1:], DONE),)),
    Fault("line-break-in-a-string", "encoding", 7, (stream(b'data: {"choices":[{"text":"a\ndata: b"}]}\n\n', *TEXT[1:], DONE),)),
    Fault("overlong-utf-8", "encoding", 7, (stream(*TEXT[:-1], data(b'{"choices":[{"text":"\xc0\xaf","finish_reason":"stop"}]}'), DONE),)),
    Fault("gzip-twice", "encoding", None, (packed(gzip.compress(gzip.compress(BODY)), b"gzip, gzip"),), "compressed"),
    Fault("bad-json", "encoding", 7, (stream(*TEXT[:-1], b"data: {half\n\n", DONE),)),
    Fault("plain-text-event", "encoding", 7, (stream(*TEXT[:-1], b"data: hello\n\n", DONE),)),
    Fault("bad-json-one-piece", "encoding", None, (sized(b'{"choices": [{"text":'),)),
    Fault("nul-in-json", "encoding", 7, (stream(*TEXT[:-1], b'data: {"choices":\0[]}\n\n', DONE),)),
    Fault("deep-json", "encoding", 7, (stream(*TEXT[:-1], data(b"[" * 200_000), DONE),)),
    Fault("gzip-lie", "encoding", 8, (packed(BODY),), "compressed"),
    Fault("gzip-unmarked", "encoding", None, (sized(gzip.compress(BODY)),), "compressed"),
    Fault("gzip-broken", "encoding", None, (packed(gzip.compress(BODY)[:12] + b"rubbish" * 9),), "compressed"),
    Fault("brotli", "encoding", None, (packed(b"\x8b\x03\x80" + bytes(40), b"br"),), "compressed"),
)  # fmt: skip
BY_NAME = {fault.name: fault for fault in FAULTS}
assert len(BY_NAME) == len(FAULTS)


# -- the server


async def play(fault: Fault, writer: asyncio.StreamWriter) -> bool:
    """Send a fault; whether the connection may go on."""
    for step in fault.steps:
        if isinstance(step, bytes):
            writer.write(step)
            await writer.drain()
        elif isinstance(step, float):
            await asyncio.sleep(step)
        elif isinstance(step, Slowly):
            for at in range(0, len(step.data), step.size):
                writer.write(step.data[at : at + step.size])
                await writer.drain()
                await asyncio.sleep(step.pause_s)
        elif isinstance(step, Endless):
            while not writer.is_closing():
                writer.write(step.piece)
                await writer.drain()
                await asyncio.sleep(step.pause_s)
        elif step == HANG:
            await asyncio.sleep(600)
        elif step == RESET:
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
            return False
        else:
            return False
    return True


def answer_to(path: str, body: bytes, count: int) -> Fault | bytes:
    """What a request gets: a fault, or the bytes of a healthy server."""
    if path.endswith("/v1/models"):
        name = HOSTILE if path.startswith("/evil-") else "faulty"
        return status(200, json.dumps({"data": [{"id": name}]}).encode(), b"Content-Type: application/json")
    if not path.endswith("/completions"):
        return status(404, b"{}")
    asked = json.loads(body or b"{}")
    tokens = asked.get("max_tokens", 0)
    name = path.split("/")[1].removeprefix("evil-")
    if name.startswith("first-"):
        return BY_NAME[name.removeprefix("first-")]
    if tokens == TOKENS:
        return FAULTS[count % len(FAULTS)] if name == "mixed" else BY_NAME[name]
    prompt = asked.get("prompt") or asked["messages"][0]["content"]
    words = len(prompt.split())
    return stream(*[token()] * (tokens - 1), token(finish="length"), usage(tokens, words), DONE)


async def serve() -> None:
    counts: dict[str, int] = {}

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                lines = head.split(b"\r\n")
                length = next((int(line[15:]) for line in lines if line.lower().startswith(b"content-length:")), 0)
                body = await reader.readexactly(length)
                path = lines[0].split(b" ")[1].decode()
                what = answer_to(path, body, counts.get(path, 0))
                if isinstance(what, Fault):
                    counts[path] = counts.get(path, 0) + 1
                    if not await play(what, writer):
                        break
                else:
                    writer.write(what)
                    await writer.drain()
        with contextlib.suppress(ConnectionError):
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0, limit=2**22)
    print(f"faults: http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await asyncio.to_thread(sys.stdin.read)  # until whoever started us is gone
    os._exit(0)  # with all that hangs


if __name__ == "__main__":
    asyncio.run(serve())
