"""What servers say: Request -> (path, body); stamped bytes -> tokens, usage and the class of the ending.

Sans-I/O, so streams recorded from real servers are its tests.  The parser follows the WHATWG event-stream rules
(https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream) on bytes, with one deviation:
a final `data: [DONE]` without its blank line is accepted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson

from harness.records import Floats

APIS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
LEGAL_FINISH = frozenset(
    {"stop", "length", "tool_calls", "function_call", "content_filter", "eos_token", "stop_sequence"}
)
ABORTED_FINISH = frozenset({"abort", "aborted", "error", "cancelled", "canceled"})
MESSAGE_BYTES = 4096  # an error's text in a record is cut here
RUNAWAY = 4  # a stream of more than this times the tokens asked for is not an answer

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


# One dispatched event: its data, the offset of the byte that completed it, its type.  A plain tuple: there are many.
Event = tuple[bytes, int, bytes]


_LINE = re.compile(rb"\r\n|\r|\n")


def events(body: bytes) -> list[Event]:
    """All events of a body.  An event that was never completed by a blank line is dropped, as the standard says."""
    start = 3 if body.startswith(b"\xef\xbb\xbf") else 0
    if b"\r" in body or start:
        return _events_by_line(body, start)
    found: list[Event] = []
    at = 0
    blocks = body.split(b"\n\n")
    for block in blocks[:-1]:
        at += len(block) + 2
        if block.startswith(b"data: ") and b"\n" not in block:  # the shape of nearly every event
            found.append((block[6:], at, b""))
        elif event := _event(block.split(b"\n"), at):
            found.append(event)
    if blocks[-1].strip() in (b"data: [DONE]", b"data:[DONE]"):
        found.append((b"[DONE]", len(body), b""))
    return found


def _events_by_line(body: bytes, start: int) -> list[Event]:
    found: list[Event] = []
    lines: list[bytes] = []
    at = start
    for ending in _LINE.finditer(body, start):
        line = body[at : ending.start()]
        at = ending.end()
        if line:
            lines.append(line)
            continue
        # The blank line is complete at its CR: the LF of a CRLF may come with the next read.
        if event := _event(lines, ending.start() + 1):
            found.append(event)
        lines = []
    if body[at:].strip() in (b"data: [DONE]", b"data:[DONE]") and not lines:
        found.append((b"[DONE]", len(body), b""))
    return found


def _event(lines: Sequence[bytes], end: int) -> Event | None:
    data: list[bytes] = []
    kind = b""
    for line in lines:
        name, _, value = line.partition(b":")
        value = value[1:] if value.startswith(b" ") else value
        if name == b"data":
            data.append(value)
        elif name == b"event":
            kind = value
        elif name == b"error":  # llama.cpp before 2025 sent its errors as a field of this name
            data, kind = [value], b"error"
    return (b"\n".join(data), end, kind) if data else None


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


def text_of(choice: Mapping[str, Any]) -> str:
    """The generated text of a choice: content, reasoning or the arguments of a tool call; "" for a role-only chunk."""
    delta = choice.get("delta") or choice.get("message")
    if not isinstance(delta, Mapping):
        text = choice.get("text")
        return text if isinstance(text, str) else ""
    for key in ("content", "reasoning_content", "reasoning"):
        if isinstance(text := delta.get(key), str) and text:
            return text
    calls = delta.get("tool_calls")
    if isinstance(calls, list) and calls:
        return str(calls)
    return ""


def interpret(body: bytes, stamps_s: Sequence[float], ends: Sequence[int], status: int, ending: str,
              output_tokens: int, note: str = "") -> Answer:  # fmt: skip
    """Read a whole response.

    `stamps_s[i]` is when the first `ends[i]` bytes of the body had arrived (both ascending, same length); an event
    arrived with the read that completed it.  `ending` is what the wire saw: "complete", or an error class of its own.
    Success means a legal finish reason (or [DONE]), no error object of any dialect, and at least one token.
    """
    answer = Answer()
    if status and status != 200:
        answer.error_class = _status_class(status, body)
        answer.error = _clip(_message(body) or note)
        return answer
    stream = body.lstrip(b"\xef\xbb\xbf \r\n")
    if stream.startswith(b"{"):
        _read_unary(answer, stream)
    else:
        _read_stream(answer, body, stamps_s, ends)
    _count(answer)
    _classify(answer, body, ending, output_tokens, note)
    return answer


class _Alike:
    """Events that differ from a fully read one only in the text of their choice, which need no JSON parser.

    Servers send hundreds of events of one shape.  One whose text is a plain JSON string between the same bytes says
    the same of everything else: one more piece of text, no error, no usage, no end.
    """

    def __init__(self) -> None:
        self.before, self.after = b"no event begins with this", b""
        self.text_at = self.missed = 0

    def __call__(self, data: bytes) -> bool:
        if not data.startswith(self.before) or not data.endswith(self.after):
            return False
        return bool(_PLAIN(data, self.text_at, len(data) - len(self.after)))

    def learn(self, data: bytes, text: str) -> None:
        """`data` holds one choice with `text` and tells nothing else that is counted."""
        if self.missed > 8:  # each event differs in more than its text: leave it
            return
        self.missed += 1
        found = list(_TEXT_KEYS.finditer(data))
        said = orjson.dumps(text)[1:] if text.isascii() else b""
        if len(found) == 1 and said and data.startswith(said, found[0].end()):
            self.text_at = found[0].end()
            self.before, self.after = data[: self.text_at], data[self.text_at + len(said) - 1 :]


_PLAIN = re.compile(rb"[ !#-\[\]-~]+").fullmatch  # a JSON string without escapes, quotes and bytes beyond ASCII
_TEXT_KEYS = re.compile(rb'"(?:text|content|reasoning_content|reasoning)": ?"')


def _read_stream(answer: Answer, body: bytes, stamps_s: Sequence[float], ends: Sequence[int]) -> None:
    said = 0  # completion tokens by usage so far, where the server tells continuously
    alike = _Alike()
    choice_ends: list[int] = []  # of events with a choice
    text_at: list[int] = []  # which of those held text
    for data, end, kind in events(body):
        answer.events += 1
        if not kind and alike(data):
            text_at.append(len(choice_ends))
            choice_ends.append(end)
            answer.arrival_tokens.append(1)
            continue
        if data == b"[DONE]":
            answer.done = True
            break
        try:
            message = orjson.loads(data)
        except orjson.JSONDecodeError:
            _fail(answer, "encoding", "an event is no JSON: " + data[:200].decode("utf-8", "replace"))
            continue
        if not isinstance(message, dict):
            continue
        if problem := _in_band_error(message, kind):
            _fail(answer, "server_error_in_band", problem)
            continue
        before = said
        said = _take_usage(answer, message, said)
        choices = message.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None
        if choice is None:
            continue
        if choice.get("finish_reason"):
            answer.finish_reason = str(choice["finish_reason"])
        if text := text_of(choice):
            ids = choice.get("token_ids")
            tokens = len(ids) if isinstance(ids, list) and ids else said - before if said > before > 0 else 1
            text_at.append(len(choice_ends))
            answer.arrival_tokens.append(tokens)
            if tokens == 1 and not choice.get("finish_reason") and not message.get("usage") and not ids:
                alike.learn(data, text)
        choice_ends.append(end)
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


def _read_unary(answer: Answer, body: bytes) -> None:
    """An answer in one piece: its tokens count, but it has no first token to time."""
    try:
        message = orjson.loads(body)
    except orjson.JSONDecodeError:
        return
    if problem := _in_band_error(message, b""):
        _fail(answer, "server_error_in_band", problem)
        return
    _take_usage(answer, message, 0)
    choices = message.get("choices")
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        answer.finish_reason = str(choices[0].get("finish_reason") or "")
        answer.events = 1 if text_of(choices[0]) else 0


def _take_usage(answer: Answer, message: Mapping[str, Any], said: int) -> int:
    """The last usage wins and is never summed: servers that send it continuously repeat it."""
    usage = message.get("usage")
    if not isinstance(usage, Mapping):
        return said
    if isinstance(prompt := usage.get("prompt_tokens"), int):
        answer.input_tokens = prompt
    details = usage.get("prompt_tokens_details")
    if isinstance(details, Mapping) and isinstance(cached := details.get("cached_tokens"), int):
        answer.cached_tokens = cached
    if isinstance(completion := usage.get("completion_tokens"), int):
        answer.output_tokens, answer.token_source = completion, "usage"
        return completion
    return said


def _count(answer: Answer) -> None:
    if answer.output_tokens is None and answer.arrival_tokens:
        answer.output_tokens, answer.token_source = sum(answer.arrival_tokens), "chunks"


def _classify(answer: Answer, body: bytes, ending: str, asked: int, note: str) -> None:
    if answer.error_class == "server_error_in_band":
        return
    if ending == "complete" or answer.done:
        if answer.error_class:
            return
        if not answer.events:
            _fail(answer, "not_an_llm_response" if body else "empty_output", body[:200].decode("utf-8", "replace"))
        elif answer.finish_reason in ABORTED_FINISH:
            _fail(answer, "aborted_by_server", f"finish_reason is {answer.finish_reason!r}")
        elif not answer.finish_reason and not answer.done:
            _fail(answer, "truncated", "the stream ended with neither a finish_reason nor [DONE]")
        elif not answer.output_tokens and not answer.arrival_tokens:
            _fail(answer, "empty_output", "the answer holds no token")
        elif len(answer.arrival_tokens) > RUNAWAY * asked:
            _fail(answer, "runaway", f"{len(answer.arrival_tokens)} events with text for {asked} tokens asked")
    elif ending == "eof":
        _fail(answer, "truncated", note or "the connection ended inside the answer", force=True)
    else:
        _fail(answer, ending, note, force=True)


def _fail(answer: Answer, error_class: str, message: str, force: bool = False) -> None:
    if force or not answer.error_class:
        answer.error_class, answer.error = error_class, _clip(message)


def _in_band_error(message: Mapping[str, Any], kind: bytes) -> str:
    """The text of an error object in any known dialect, or "".  `"error": null`, "" and {} are no errors."""
    error = message.get("error")
    if isinstance(error, Mapping) and error:
        return str(error.get("message") or error)
    if isinstance(error, str) and error:
        return error
    if kind == b"error" or message.get("object") == "error" or message.get("type") == "error":
        return str(message.get("message") or message)
    return ""


def _status_class(status: int, body: bytes) -> str:
    if 300 <= status < 400:
        return "redirect"
    if status == 400 and re.search(rb"context.{0,20}length|maximum.{0,20}(context|model)|exceed", body[:4096], re.I):
        return "context_length"
    return f"http_{status}"


def _message(body: bytes) -> str:
    """The human part of an error body: the message of its JSON, else its text."""
    try:
        said = orjson.loads(body[:1_000_000])
    except orjson.JSONDecodeError:
        return body[:MESSAGE_BYTES].decode("utf-8", "replace")
    if isinstance(said, Mapping):
        return _in_band_error(said, b"") or str(said.get("message") or said.get("detail") or said)
    return str(said)


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def _clip(text: str) -> str:
    return _CONTROL.sub("", text)[:MESSAGE_BYTES]
