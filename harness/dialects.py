"""What servers say: Request -> (path, body); stamped bytes -> tokens, usage and the class of the ending.

Sans-I/O, so streams recorded from real servers are its tests.  The parser follows the WHATWG event-stream rules
(https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream) on bytes, with four deviations:
an event of empty data tells nothing, a final `data: [DONE]` without its blank line is accepted, and so are errors in a
field `error:` and in an event `error` without data.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson

from harness.endings import (
    ENDINGS,
    ERROR_BYTES,
    EVENT_BYTES,
    MESSAGE_CHARS,
    RUNAWAY,
    WORD_CHARS,
    most_bytes,
    name_of,
    plain,
)  # fmt: skip
from harness.eventstream import Alike, events, events_from
from harness.records import Floats

APIS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
# vLLM, SGLang, TGI, llama.cpp, Anthropic and Gemini styles, in lower case.
LEGAL_FINISH = frozenset({"stop", "length", "tool_calls", "function_call", "content_filter", "repetition", "eos_token",
                          "stop_sequence", "end_turn", "max_tokens", "tool_use", "eos", "limit"})  # fmt: skip
TOKENS_AT_MOST = 10**9  # a larger count is no count
MISMATCH = 0.10  # usage may differ from what came by so much before it is doubted
GZIP, DEFLATE, RAW_DEFLATE = 31, 15, -15  # zlib's wbits
SLICE = 2**16  # unpacked at once: what follows a stream is copied, and a body may be a million streams of nothing

# Extra body fields that make the output length exact, most demanding first; a probe finds which the server takes.
NO_STOP: tuple[tuple[str, ...], ...] = (("ignore_eos", "min_tokens"), ("ignore_eos",), ("min_tokens",), ())


def encode(api: str, model: str, prompt: str, output_tokens: int, no_stop: Sequence[str] = (), stream: bool = True,
           usage: bool = True) -> tuple[str, bytes]:  # fmt: skip
    """The path and the body of one request.  Sampling is greedy, so that a repeat asks for the same work."""
    body: dict[str, Any] = {"model": model, "max_tokens": output_tokens, "temperature": 0, "stream": stream}
    if api == "chat":
        body["messages"] = [{"role": "user", "content": prompt}]
    else:
        body["prompt"] = prompt
    if stream and usage:
        body["stream_options"] = {"include_usage": True}
    extras = {"ignore_eos": True, "min_tokens": output_tokens}
    body.update({name: extras[name] for name in no_stop})
    return APIS[api], orjson.dumps(body)


@dataclass(slots=True)
class Answer:
    """What one response said.  `arrivals_s` are the stamps of events with generated text (as given: seconds);
    `first_event_s` and `last_event_s` those of the first and the last event with a choice, whatever it held."""

    arrivals_s: Floats = field(default_factory=lambda: np.empty(0))
    arrival_tokens: list[int] = field(default_factory=list)
    input_tokens: int | None = None
    output_tokens: int | None = None
    token_source: str = "none"
    cached_tokens: int | None = None
    finish_reason: str = ""
    done: bool = False
    error_class: str = ""
    error: str = ""
    events: int = 0
    first_event_s: float = float("nan")
    last_event_s: float = float("nan")
    choice_events: int = 0
    notes: list[str] = field(default_factory=list)
    one_piece: bool = False
    text: bool = False


def text_of(choice: Mapping[str, Any]) -> str:
    """The generated text of a choice: content, reasoning, a refusal, or the arguments of a tool call; "" for a role-only
    chunk."""
    delta = choice.get("delta") or choice.get("message")
    if not isinstance(delta, Mapping):
        text = choice.get("text")
        return text if isinstance(text, str) else ""
    for key in ("content", "reasoning_content", "reasoning", "refusal"):
        if isinstance(text := delta.get(key), str) and text:
            return text
    calls = delta.get("tool_calls") or delta.get("function_call")
    return "…" if calls or (isinstance(delta.get("content"), list) and delta["content"]) else ""


def interpret(body: bytes, stamps_s: Sequence[float], ends: Sequence[int], status: int, ending: str,
              output_tokens: int, note: str = "", coding: str = "", secret: str = "") -> Answer:  # fmt: skip
    """Read a whole response.  Never raises: a failure of ours is a class too, since no record may be lost.

    `stamps_s[i]` is when the first `ends[i]` bytes of the body had arrived (both ascending, same length); an event
    arrived with the read that completed it.  `ending` is what the wire saw: "complete", or an error class of its own;
    `coding` the Content-Encoding.  `secret` is kept out of every text.  Success means status 200, a legal finish reason,
    no error object of any dialect, and at least one token.
    """
    answer = Answer()
    try:
        _interpret(answer, body, stamps_s, ends, status, ending, output_tokens, note, coding)
    except Exception as problem:
        _fail(answer, "client_error", f"{type(problem).__name__}: {problem}", force=True)
    if answer.error_class and not answer.error:
        answer.error = ENDINGS[name_of(answer.error_class)][0]
    answer.error = plain(answer.error, secret)
    answer.finish_reason = plain(answer.finish_reason, secret, WORD_CHARS)
    return answer


def _interpret(answer: Answer, body: bytes, stamps_s: Sequence[float], ends: Sequence[int], status: int, ending: str,
               asked: int, note: str, coding: str) -> None:  # fmt: skip
    problem = ""
    if coding:
        most = most_bytes(asked) if status == 200 else ERROR_BYTES
        body, ends, problem = decoded(body, ends, coding, most)
    if status >= 200 and status != 200:
        answer.error_class = _status_class(status, body)
        answer.error = _message(body) or note or f"status {status}, and no words with it"
        return
    if not (stamps_s and body):
        _classify(answer, body, "malformed_http" if not status and ending == "complete" else ending, asked, note)
        return
    if coding or body.startswith(b"\x1f\x8b"):
        answer.notes.append("compressed")
    stream = body.lstrip(b"\xef\xbb\xbf \r\n")
    if stream.startswith(b"{"):
        _read_unary(answer, stream)
    else:
        _read_stream(answer, body, stamps_s, ends)
    _count(answer, asked)
    if problem == "encoding" or (body.startswith(b"\x1f\x8b") and not coding):
        _fail(answer, "encoding", f"the body is not what its Content-Encoding says: {coding or '(none)'}")
    _classify(answer, body, problem if problem in ("event_too_large", "runaway") else ending, asked, note)


def decoded(body: bytes, ends: Sequence[int], coding: str, most: int) -> tuple[bytes, list[int], str]:
    """Unpack a compressed body read by read, so that stamps stay true: (at most `most` bytes, their ends, problem).
    The problem is "", "encoding" (the body then as it came), "runaway" or "event_too_large"."""
    kinds = {"gzip": GZIP, "x-gzip": GZIP, "deflate": DEFLATE if body[:1] in (b"\x78", b"\x58") else RAW_DEFLATE}
    if coding.strip().lower() not in kinds:
        return body, list(ends), "encoding"
    wbits = kinds[coding.strip().lower()]
    unpacker, at, found, out_ends = zlib.decompressobj(wbits), 0, bytearray(), []
    try:
        for end in ends:
            while at < end and len(found) <= most:
                piece, at = body[at : min(at + SLICE, end)], min(at + SLICE, end)
                while piece and len(found) <= most:
                    found += unpacker.decompress(piece, most + 1 - len(found))
                    piece = unpacker.unconsumed_tail
                    if unpacker.eof:  # a stream may be several, one after the other; zeros after it are padding
                        piece, unpacker = unpacker.unused_data.lstrip(b"\0"), zlib.decompressobj(wbits)
            out_ends.append(len(found))
    except zlib.error:
        rest = [len(found)] * (len(ends) - len(out_ends))
        return (bytes(found), out_ends + rest, "encoding") if found else (body, list(ends), "encoding")
    if len(found) > most:
        longest = max(map(len, re.split(rb"\n\n|\r\n\r\n|\r\r", bytes(found))))
        return bytes(found), out_ends, "event_too_large" if longest > EVENT_BYTES else "runaway"
    return bytes(found), out_ends, ""


def _loads(data: bytes) -> Any:
    """JSON; the slow parser takes what the quick one refuses and servers yet send: NaN, halves of surrogate pairs.
    Raises ValueError, or RecursionError."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return json.loads(data)


def _read_stream(answer: Answer, body: bytes, stamps_s: Sequence[float], ends: Sequence[int]) -> None:
    said = 0  # completion tokens by usage so far, where the server tells continuously
    alike, follow = Alike(), b"\r" not in body
    choice_ends: list[int] = []  # of events with a choice
    text_at: list[int] = []  # which of those held text
    coming = events(body)
    while event := next(coming, None):
        data, end, kind = event
        answer.events += 1
        if (words := data.strip()) == b"[DONE]":
            answer.done = True
            break
        if not words and not kind:  # a keep-alive, as some servers write it
            continue
        try:
            message = _loads(data)
        except (ValueError, RecursionError):
            text = data[:MESSAGE_CHARS].decode("utf-8", "replace")
            if kind == b"error":
                _fail(answer, "server_error_in_band", text, force=True)
            else:
                _fail(answer, "encoding", f"an event is no JSON: {text}")
            continue
        if problem := _in_band_error(message, kind):
            _fail(answer, "server_error_in_band", problem, force=answer.error_class == "encoding")
            continue
        if not isinstance(message, dict):
            continue
        before = said
        said = _take_usage(answer, message, said)
        choice = _choice(message)
        if choice is None:
            continue
        if choice.get("finish_reason") and not _illegal(answer.finish_reason):  # a bad end is not mended by a good one
            answer.finish_reason = str(choice["finish_reason"])[:MESSAGE_CHARS]
        if text := text_of(choice):
            ids = choice.get("token_ids")
            tokens = len(ids) if isinstance(ids, list) and ids else said - before if said > before > 0 else 1
            text_at.append(len(choice_ends))
            answer.arrival_tokens.append(tokens)
            if tokens == 1 and not choice.get("finish_reason") and not message.get("usage") and not ids:
                alike.learn(data, text)
        choice_ends.append(end)
        if follow and (run := alike.run(body, end)):
            text_at += range(len(choice_ends), len(choice_ends) + len(run))
            choice_ends += run
            answer.arrival_tokens += [1] * len(run)
            answer.events += len(run)
            coming = events_from(body, run[-1])
    answer.text = bool(text_at)
    _stamp(answer, choice_ends, text_at, stamps_s, ends)


def _stamp(
    answer: Answer, choice_ends: Sequence[int], text_at: Sequence[int], stamps_s: Sequence[float], ends: Sequence[int]
) -> None:
    """An event arrived with the read that completed it."""
    answer.choice_events = len(choice_ends)
    if not choice_ends:
        return
    stamps = np.asarray(stamps_s, np.float64)
    reads = np.minimum(np.searchsorted(np.asarray(ends, np.int64), np.asarray(choice_ends)), len(stamps) - 1)
    arrived_s = stamps[reads]
    answer.first_event_s, answer.last_event_s = float(arrived_s[0]), float(arrived_s[-1])
    answer.arrivals_s = arrived_s[text_at] if text_at else arrived_s[:0]


def has_text(body: bytes) -> bool:
    """Whether the part of a body that has come holds generated text; an answer in one piece counts as such."""
    if body.lstrip().startswith(b"{"):
        return True
    answer = Answer()
    _read_stream(answer, body, [0.0], [len(body)])
    return answer.text


def _choice(message: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The first choice: we ask for one, and the texts of others would count twice."""
    choices = message.get("choices")
    if not isinstance(choices, list):
        return None
    return next((c for c in choices if isinstance(c, dict) and not c.get("index")), None)


def _read_unary(answer: Answer, body: bytes) -> None:
    """An answer in one piece: its tokens count, but it has no first token to time."""
    answer.one_piece = True
    try:
        message = _loads(body)
    except (ValueError, RecursionError):
        _fail(answer, "encoding", "the body is no JSON: " + body[:200].decode("utf-8", "replace"))
        return
    if problem := _in_band_error(message, b""):
        _fail(answer, "server_error_in_band", problem)
        return
    _take_usage(answer, message, 0)
    if choice := _choice(message):
        answer.finish_reason = str(choice.get("finish_reason") or "")[:MESSAGE_CHARS]
        answer.events, answer.text = 1, bool(text_of(choice))


def _whole(value: Any) -> int | None:
    """A count as a server may tell it, or None: no truth value, no fraction, nothing negative or absurd."""
    return value if type(value) is int and 0 <= value <= TOKENS_AT_MOST else None


def _take_usage(answer: Answer, message: Mapping[str, Any], said: int) -> int:
    """The last usage wins and is never summed: servers that send it continuously repeat it."""
    usage = message.get("usage")
    if not isinstance(usage, Mapping):
        return said
    if (prompt := _whole(usage.get("prompt_tokens"))) is not None:
        answer.input_tokens = prompt
    details = usage.get("prompt_tokens_details")
    if isinstance(details, Mapping) and (cached := _whole(details.get("cached_tokens"))) is not None:
        answer.cached_tokens = cached
    if (completion := _whole(usage.get("completion_tokens"))) is not None:
        answer.output_tokens, answer.token_source = completion, "usage"
        return completion
    return said


def _count(answer: Answer, asked: int) -> None:
    """The tokens: usage, unless it cannot be true beside what came.  No token is in two events, and no server that
    heeds max_tokens gives more than were asked."""
    seen, said = len(answer.arrival_tokens), answer.output_tokens
    if not seen:
        return
    too_few = said is not None and said < seen - max(1.0, MISMATCH * seen)
    too_many = said is not None and said > asked + max(1.0, MISMATCH * asked) and seen <= asked
    if too_few or too_many:
        answer.notes.append("token_count_mismatch")
    if too_few or too_many or sum(answer.arrival_tokens) > RUNAWAY * (asked + seen):
        answer.arrival_tokens = [1] * seen
    if said is None or too_few or too_many:
        answer.output_tokens, answer.token_source = sum(answer.arrival_tokens), "chunks"


def _illegal(finish_reason: str) -> bool:
    return bool(finish_reason) and finish_reason.lower() not in LEGAL_FINISH


def _classify(answer: Answer, body: bytes, ending: str, asked: int, note: str) -> None:
    if answer.error_class == "server_error_in_band":
        return
    if ending != "complete" and not answer.done:
        if ending == "eof":
            _fail(answer, "truncated", note or "the connection ended inside the answer", force=True)
        else:
            _fail(answer, ending, note, force=True)
    elif answer.error_class:
        return
    elif not answer.events:
        _fail(answer, "not_an_llm_response", body[:200].decode("utf-8", "replace") or "the body is empty")
    elif _illegal(answer.finish_reason):
        _fail(answer, "aborted_by_server", f"finish_reason is {answer.finish_reason!r}")
    elif len(answer.arrival_tokens) > RUNAWAY * asked:
        _fail(answer, "runaway", f"{len(answer.arrival_tokens)} events with text for {asked} tokens asked")
    elif not answer.finish_reason and (answer.text or not answer.done):
        _fail(answer, "truncated", "the stream ended without a finish_reason")
    elif not answer.text:
        _fail(answer, "empty_output", "the answer holds no generated text")
    elif answer.one_piece:
        answer.notes.append("not_streamed")
    elif not answer.done:
        answer.notes.append("no_done")


def _fail(answer: Answer, error_class: str, message: str, force: bool = False) -> None:
    if force or not answer.error_class:
        answer.error_class, answer.error = error_class, message


def _in_band_error(message: Any, kind: bytes) -> str:
    """The text of an error object in any known dialect, or "".  `"error": null`, "" and {} are no errors."""
    if not isinstance(message, Mapping):
        parts = message if isinstance(message, list) else ()  # Gemini puts its error into a list
        found = (_in_band_error(part, b"") for part in parts if isinstance(part, Mapping))
        return next(filter(None, found), _said(message) if kind == b"error" else "")
    if error := message.get("error"):
        return _said(error) or "error"
    choice = _choice(message)
    if choice and (error := choice.get("error")):
        return _said(error) or "error"
    if kind == b"error" or message.get("object") == "error" or message.get("type") == "error":
        return _said(message) or "error"
    if "choices" not in message and "usage" not in message:  # a web framework's own words
        for name in ("message", "detail", "errors"):
            if (said := message.get(name)) and isinstance(said, str | list):
                return _said(said)
    return ""


def _said(value: Any) -> str:
    """The words of an error, whatever its shape; bounded, and never deep enough to fail."""
    if isinstance(value, Mapping):
        for name in ("message", "detail", "error"):
            if isinstance(text := value.get(name), str) and text:
                return text
    if isinstance(value, str):
        return value
    try:
        return orjson.dumps(value).decode()
    except (TypeError, ValueError):
        return type(value).__name__


_TOO_LONG = re.compile(
    rb"context.{0,20}(length|size|window)|maximum.{0,20}(context|model)|exceed.{0,60}(context|token)|"
    rb"(context|token).{0,60}exceed|inputs.{0,20}tokens",
    re.I,
)


def _status_class(status: int, body: bytes) -> str:
    if 300 <= status < 400:
        return "redirect"
    if status in (400, 413, 422) and _TOO_LONG.search(body[:MESSAGE_CHARS]):
        return "context_length"
    return f"http_{status}"


def _message(body: bytes) -> str:
    """The human part of an error body: the message of its JSON, else its text."""
    try:
        said = _loads(body)
    except (ValueError, RecursionError):
        return body.decode("utf-8", "replace")
    return _in_band_error(said, b"") or _said(said)
