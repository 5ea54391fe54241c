"""HTTP/1.1 bytes as a socket gave them -> the body, and how much of it had come with each read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import httptools


class _Body:
    """What httptools calls: only with the pieces of a body."""

    __slots__ = ("on_body", "pieces")

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.on_body: Callable[[bytes], None] = self.pieces.append


def unframe(raw: memoryview | bytes, ends: Sequence[int]) -> tuple[bytes, list[int]]:
    """`ends[i]` bytes of `raw` (a response from its first byte, perhaps cut) had come with read i; returns the body and
    the same counts for it.  Where the framing is broken, what came before stands: that it broke is the wire's to say."""
    body = _Body()
    parser = httptools.HttpResponseParser(body)
    view, at, pieces = memoryview(raw), 0, [0]
    try:
        for end in ends:
            parser.feed_data(view[at:end])
            at = end
            pieces.append(len(body.pieces))
    except (httptools.HttpParserError, httptools.HttpParserUpgrade):
        pieces += [len(body.pieces)] * (len(ends) + 1 - len(pieces))
    sizes = list(accumulate(map(len, body.pieces), initial=0))
    return b"".join(body.pieces), [sizes[n] for n in pieces[1:]]
