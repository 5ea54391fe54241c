"""Prompts of an exact token count, each unlike every other from its first tokens on.

A prompt is OPENING + head + excerpt + CLOSING.  The head is a few words that no other prompt of the run has, within
the first 16 tokens (the block of a prefix cache), so that no cache can help; the excerpt is cut until the count is
exact.  How tokens are counted is the caller's matter: a tokenizer, the server's /tokenize, or its usage.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import cache
from importlib import resources

from harness.records import RidgelineError

OPENING = 'Write a concise summary of the following:\n\n"'
CLOSING = '"\n\nCONCISE SUMMARY:'
HEAD_WORDS = 3
TRIES = 24

# Short common words: one token each in most vocabularies, so that the head stays within a cache's first block.
# Three of them in order give 262,144 heads.
HEADS = tuple(
    [
        "able",
        "back",
        "bank",
        "base",
        "bird",
        "blue",
        "boat",
        "book",
        "both",
        "call",
        "care",
        "cold",
        "come",
        "cost",
        "dark",
        "days",
        "deep",
        "door",
        "down",
        "east",
        "face",
        "fact",
        "fall",
        "farm",
        "fast",
        "feel",
        "field",
        "fire",
        "fish",
        "five",
        "food",
        "foot",
        "form",
        "four",
        "free",
        "full",
        "game",
        "girl",
        "give",
        "gold",
        "good",
        "gray",
        "half",
        "hall",
        "hand",
        "hard",
        "head",
        "help",
        "high",
        "hold",
        "home",
        "hope",
        "hour",
        "idea",
        "iron",
        "king",
        "land",
        "last",
        "late",
        "left",
        "life",
        "line",
        "long",
    ]
)

Count = Callable[[str], Awaitable[int]]


@cache
def words() -> tuple[str, ...]:
    """The project's own text, as words."""
    return tuple(resources.files("harness").joinpath("excerpt.txt").read_text(encoding="utf-8").split())


def head(index: int) -> str:
    """The opening words of prompt `index`: distinct for the first 262,144, the first word differing between neighbours."""
    if index >= len(HEADS) ** HEAD_WORDS:
        raise RidgelineError(f"a run has at most {len(HEADS) ** HEAD_WORDS:,} different prompts; got number {index:,}")
    picked = []
    for _ in range(HEAD_WORDS):
        index, at = divmod(index, len(HEADS))
        picked.append(HEADS[at])
    return " ".join(picked).capitalize() + ". "


def text(head: str, start: int, length: int, pad: str = "") -> str:
    """A prompt whose excerpt is `length` words of the text from word `start` on (the text is a ring)."""
    ring = words()
    excerpt = " ".join(ring[(start + i) % len(ring)] for i in range(length))
    return f"{OPENING}{head}{excerpt}{pad}{CLOSING}"


async def fit(count: Count, head: str, start: int, tokens: int, guess: int = 0) -> tuple[str, int]:
    """A prompt of exactly `tokens` tokens by `count`, and its excerpt's length in words (the guess for the next).

    First the longest excerpt that is not too long, by secant steps; then single words fill the rest.  Raises
    RidgelineError if the template alone is longer, or no filling is exact.
    """
    floor = await count(text(head, start, 0))
    if floor > tokens:
        raise RidgelineError(f"input_tokens: got {tokens}; the prompt's template alone has {floor} tokens")
    fits, over, length = (0, floor), 1 << 30, guess or max(1, int((tokens - floor) / 1.3))
    for _ in range(TRIES):
        n = await count(text(head, start, length)) if length else floor
        if n == tokens:
            return text(head, start, length), length
        if n < tokens:
            fits = max(fits, (length, n))
        else:
            over = min(over, length)
        if over - fits[0] <= 1:
            break
        per_word = max(0.2, (n - floor) / max(1, length))
        length = min(max(length + round((tokens - n) / per_word), fits[0] + 1), over - 1)
    return await _pad(count, head, start, tokens, fits[0]), fits[0]


# Fillers that add one token each in common vocabularies; the first that does is used until the count is exact.
_FILLERS = (" and", " the", " a", ".", " !", " so", "\n", " x")


async def _pad(count: Count, head: str, start: int, tokens: int, length: int) -> str:
    for shorter in range(min(3, length + 1)):
        pad = ""
        have = await count(text(head, start, length - shorter))
        while have < tokens:
            for filler in _FILLERS:
                n = await count(text(head, start, length - shorter, pad + filler))
                if have < n <= tokens:
                    pad, have = pad + filler, n
                    break
            else:
                break
        if have == tokens:
            return text(head, start, length - shorter, pad)
    raise RidgelineError(f"input_tokens: no prompt of exactly {tokens} tokens was found with this tokenizer")
