"""Bytes of an event stream -> its events, per the WHATWG rules
(https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream), with the deviations that
`dialects` names.  Servers send hundreds of events that differ only in their text: those are taken in one go."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import orjson

# One dispatched event: its data, the offset of the byte that completed it, its type.  A plain tuple: there are many.
Event = tuple[bytes, int, bytes]


_LINE = re.compile(rb"\r\n|\r|\n")


def events(body: bytes) -> Iterator[Event]:
    """All events of a body.  An event that was never completed by a blank line is dropped, as the standard says."""
    start = 3 if body.startswith(b"\xef\xbb\xbf") else 0
    return _events_by_line(body, start) if start or b"\r" in body else events_from(body, 0)


def events_from(body: bytes, at: int) -> Iterator[Event]:
    """The events that begin at an offset, in a body without CR and byte order mark."""
    while (end := body.find(b"\n\n", at)) >= 0:
        block, at = body[at:end], end + 2
        if block.startswith(b"data: ") and b"\n" not in block:  # the shape of nearly every event
            yield block[6:], at, b""
        elif event := _event(block.split(b"\n"), at):
            yield event
    if body[at:].strip() in (b"data: [DONE]", b"data:[DONE]"):
        yield b"[DONE]", len(body), b""


def _events_by_line(body: bytes, start: int) -> Iterator[Event]:
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
            yield event
        lines = []
    if body[at:].strip() in (b"data: [DONE]", b"data:[DONE]") and not lines:
        yield b"[DONE]", len(body), b""


def _event(lines: Sequence[bytes], end: int) -> Event | None:
    data: list[bytes] = []
    comments: list[bytes] = []
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
        elif not name:
            comments.append(value)
    if kind == b"error" and not data:  # Dynamo says what went wrong in comments
        data = comments or [b"error"]
    return (b"\n".join(data), end, kind) if data else None


class Alike:
    """Events that differ from a fully read one only in the text of their choice, which need no JSON parser.

    One whose text is a JSON string between the same bytes says the same of everything else: one more piece of text, no
    error, no usage, no end.
    """

    def __init__(self) -> None:
        self.before = self.seam = b""  # what stands before a text, and between two
        self.learned = 0

    def learn(self, data: bytes, text: str) -> None:
        """`data` holds one choice with `text` and tells nothing else that is counted."""
        if self.learned >= LEARN_AT_MOST:  # each event differs in more than its text: leave it
            return
        self.learned += 1
        found = list(_TEXT_KEYS.finditer(data))
        said = orjson.dumps(text)[1:] if text.isascii() else b""
        if len(found) == 1 and said and data.startswith(said, found[0].end()):
            at = found[0].end()
            self.before = b"data: " + data[:at]
            self.seam = data[at + len(said) - 1 :] + b"\n\n" + self.before

    def run(self, body: bytes, at: int) -> list[int]:
        """Where each of the alike events ends that follow one another from `at`, but the last; the body has no CR."""
        if not self.before or not body.startswith(self.before, at):
            return []
        first, seam = len(self.before), self.seam
        texts, ends = [], []
        while body.startswith(seam, end := body.find(b'"', at + first)):
            texts.append(body[at + first : end])
            at = end + len(seam) - first
            ends.append(at)
        return ends if _all_plain(texts) else ends[: next(i for i, text in enumerate(texts) if not _all_plain([text]))]


LEARN_AT_MOST = 8
_TEXT_KEYS = re.compile(rb'"(?:text|content|reasoning_content|reasoning)": ?"')
_ESCAPES = re.compile(rb'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_PLAIN = re.compile(rb'[^"\\\x00-\x1f]+(?:\n[^"\\\x00-\x1f]+)*').fullmatch


def _all_plain(texts: Sequence[bytes]) -> bool:
    """Whether each is the inside of a JSON string (RFC 8259, 7), and none is empty."""
    joined = b"\n".join(texts)
    try:
        joined.decode()
    except UnicodeDecodeError:
        return False
    return not texts or bool(_PLAIN(_ESCAPES.sub(b"e", joined) if b"\\" in joined else joined))
