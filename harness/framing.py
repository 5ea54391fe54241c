"""HTTP/1.1 bytes as a socket gave them -> the body, and how much of it had come with each read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import httptools


class _Body:
    """What httptools calls: only with the pieces of a body, and at the end of a message."""

    __slots__ = ("on_body", "parser", "pieces", "whole")

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.on_body: Callable[[bytes], None] = self.pieces.append
        self.whole: int | None = None  # pieces of the first message; what follows it is no part of the answer
        self.parser = httptools.HttpResponseParser(self)

    def on_message_complete(self) -> None:
        if self.whole is None and self.parser.get_status_code() >= 200:
            self.whole = len(self.pieces)


def unframe(raw: memoryview | bytes, ends: Sequence[int]) -> tuple[bytes, list[int]]:
    """`ends[i]` bytes of `raw` (a response from its first byte, perhaps cut) had come with read i; returns the body and
    the same counts for it.  Where the framing is broken, what came before stands: that it broke is the wire's to say."""
    body = _Body()
    view, at, pieces = memoryview(raw), 0, [0]
    try:
        for end in ends:
            body.parser.feed_data(view[at:end])
            at = end
            pieces.append(len(body.pieces))
    except (httptools.HttpParserError, httptools.HttpParserUpgrade):
        pieces += [len(body.pieces)] * (len(ends) + 1 - len(pieces))
    del body.parser  # each holds the other, and nobody collects what does so while a run goes on
    kept = body.pieces[: body.whole]
    sizes = list(accumulate(map(len, kept), initial=0))
    sizes += sizes[-1:] * (len(body.pieces) - len(kept))
    return b"".join(kept), [sizes[n] for n in pieces[1:]]
