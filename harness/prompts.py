"""Prompts of an exact token count, each unlike every other from its first tokens on.

A prompt is OPENING + head + excerpt + CLOSING.  The head is a few words that no other prompt of the run has, within
the first 16 tokens (the block of a prefix cache), so that no cache can help; the excerpt is cut until the count is
exact.  A shared prefix stands before the head; a later turn of a session begins with the whole turn before.  How
tokens are counted is the caller's matter: a tokenizer, the server's /tokenize, or its usage.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cache
from importlib import resources

from harness.records import RidgelineError

OPENING = 'Write a concise summary of the following:\n\n"'
CLOSING = '"\n\nCONCISE SUMMARY:'
NEXT_TURN = '\n\nNow do the same with what follows:\n\n"'
HEAD_WORDS = 3
TRIES = 24

# Short common words: one token each in most vocabularies, so that the head stays within a cache's first block.
# Three of them in order give 250,047 heads.
HEADS = (
    "able", "back", "bank", "base", "bird", "blue", "boat", "book", "both", "call", "care", "cold", "come", "cost",
    "dark", "days", "deep", "door", "down", "east", "face", "fact", "fall", "farm", "fast", "feel", "field", "fire",
    "fish", "five", "food", "foot", "form", "four", "free", "full", "game", "girl", "give", "gold", "good", "gray",
    "half", "hall", "hand", "hard", "head", "help", "high", "hold", "home", "hope", "hour", "idea", "iron", "king",
    "land", "last", "late", "left", "life", "line", "long",
)  # fmt: skip

Count = Callable[[str], Awaitable[int]]


@cache
def words() -> tuple[str, ...]:
    """The project's own text, as words."""
    return tuple(resources.files("harness").joinpath("excerpt.txt").read_text(encoding="utf-8").split())


def head(index: int) -> str:
    """The opening words of prompt `index`: distinct for the first 250,047, the first word differing between neighbours."""
    if index >= len(HEADS) ** HEAD_WORDS:
        raise RidgelineError(f"a run has at most {len(HEADS) ** HEAD_WORDS:,} different prompts; got number {index:,}")
    picked = []
    for _ in range(HEAD_WORDS):
        index, at = divmod(index, len(HEADS))
        picked.append(HEADS[at])
    return " ".join(picked).capitalize() + ". "


def excerpt(start: int, length: int) -> str:
    """`length` words of the text from word `start` on (the text is a ring)."""
    ring = words()
    return " ".join(ring[(start + i) % len(ring)] for i in range(length))


def text(before: str, start: int, length: int, pad: str = "", closing: str = CLOSING) -> str:
    """A prompt that begins with `before` and holds `length` words of the text."""
    return f"{before}{excerpt(start, length)}{pad}{closing}"


@dataclass(slots=True)
class Pace:
    """Tokens per word as seen so far: what makes the first guess of the next length a good one."""

    per_word: float = 1.3


async def fit(count: Count, before: str, start: int, tokens: int, pace: Pace, closing: str = CLOSING) -> str:
    """A prompt of exactly `tokens` tokens by `count`.

    First the longest excerpt that is not too long, by secant steps; then single words fill the rest.  Raises
    RidgelineError if the template alone is longer, or no filling is exact.
    """
    floor = await count(text(before, start, 0, "", closing))
    if floor > tokens:
        raise RidgelineError(f"input_tokens: got {tokens}; the prompt's template alone has {floor} tokens")
    fits, over, length = (0, floor), 1 << 30, max(1, int((tokens - floor) / pace.per_word))
    for _ in range(TRIES):
        n = await count(text(before, start, length, "", closing)) if length else floor
        if length >= 8:
            pace.per_word = max(0.2, (n - floor) / length)
        if n == tokens:
            return text(before, start, length, "", closing)
        if n < tokens:
            fits = max(fits, (length, n))
        else:
            over = min(over, length)
        if over - fits[0] <= 1:
            break
        per_word = max(0.2, (n - floor) / max(1, length))
        length = min(max(length + round((tokens - n) / per_word), fits[0] + 1), over - 1)
    return await _pad(count, before, start, tokens, fits[0], closing)


# Fillers that add one token each in common vocabularies; the first that does is used until the count is exact.
_FILLERS = (" and", " the", " a", ".", " !", " so", "\n", " x")


async def _pad(count: Count, before: str, start: int, tokens: int, length: int, closing: str) -> str:
    for shorter in range(min(3, length + 1)):
        pad = ""
        have = await count(text(before, start, length - shorter, "", closing))
        while have < tokens:
            for filler in _FILLERS:
                n = await count(text(before, start, length - shorter, pad + filler, closing))
                if have < n <= tokens:
                    pad, have = pad + filler, n
                    break
            else:
                break
        if have == tokens:
            return text(before, start, length - shorter, pad, closing)
    raise RidgelineError(f"input_tokens: no prompt of exactly {tokens} tokens was found with this tokenizer")
