"""How prompts are counted: the model's tokenizer, the server's /tokenize, or its usage; never a download.

Whatever counts, one real request proves it: 350 means `usage.prompt_tokens`, so the constant difference between a
count and the server's usage (BOS, chat template) is measured once and taken into account.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness import prompts
from harness.client import Client
from harness.records import RidgelineError

Ask = Callable[[str, int], Awaitable[int | None]]  # (prompt, output tokens) -> usage.prompt_tokens, or None


@dataclass(slots=True)
class Counter:
    """`count` is tokens of a text by `source`; `ids` gives the tokens themselves where they are known."""

    source: str  # tokenizer | server | usage | none
    count: prompts.Count
    detail: str = ""
    ids: Callable[[str], list[int]] | None = None


def tokenizer_file(path: str | Path) -> Path | None:
    """The tokenizer.json at or in `path`, if there is one."""
    found = Path(path)
    if found.is_dir():
        found = found / "tokenizer.json"
    return found if found.is_file() and found.suffix == ".json" else None


def local(path: Path) -> Counter:
    """Count with a tokenizer file.  Raises RidgelineError if it is none."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as problem:  # the library raises bare Exception
        raise RidgelineError(
            f"--tokenizer {path}: cannot be read: {str(problem)[:200]}; give a tokenizer.json"
        ) from None

    async def count(text: str) -> int:
        return len(tokenizer.encode(text).ids)

    return Counter("tokenizer", count, str(path), lambda text: list(tokenizer.encode(text).ids))


async def find(tokenizer: str | None, model_path: str | None, client: Client) -> Counter:
    """The nearest way to count: a named tokenizer, the model's folder, the server's /tokenize; else by usage."""
    if tokenizer:
        if not (path := tokenizer_file(tokenizer)):
            raise RidgelineError(f"--tokenizer {tokenizer}: no tokenizer.json there; give its path or its folder")
        return local(path)
    if model_path and (path := tokenizer_file(model_path)):
        return local(path)
    # vLLM's /tokenize takes a prompt, llama.cpp's a content; both answer with the tokens.
    for key, fixed in (("prompt", {"model": client.model}), ("content", {"add_special": True})):
        counter = _server(client, key, fixed)
        try:
            if await counter.count("one two three") > 0:
                return counter
        except (RidgelineError, KeyError, TypeError):
            continue
    return Counter("usage", _never, "bisection on the server's usage")


def _server(client: Client, key: str, fixed: dict[str, Any]) -> Counter:
    async def count(text: str) -> int:
        answer = await client.post("/tokenize", fixed | {key: text})
        tokens = answer.get("count")
        return int(tokens) if isinstance(tokens, int) else len(answer["tokens"])

    return Counter("server", count, f"{client.target.url}/tokenize")


async def _never(text: str) -> int:
    raise RidgelineError("no tokenizer")


POOL = 1024  # prompts that are fitted one by one; beyond, a fitted text gets another head of as many tokens


@dataclass(slots=True)
class Prompts:
    """Prompts and what is known of their length."""

    texts: list[str]
    source: str  # tokenizer | server | usage | none
    detail: str
    offset: int  # tokens that the server adds to the counted text
    proven: bool  # one real request's usage was the number asked
    same: bool = False

    def at(self, index: int) -> str:
        """Prompt number `index`, unlike all others unless they are to be the same."""
        if self.same or index < len(self.texts):
            return self.texts[0 if self.same else index]
        base = index % len(self.texts)
        return self.texts[base].replace(prompts.head(base), prompts.head(index), 1)


async def build(
    counter: Counter, ask: Ask, n: int, tokens: int, seed: int, same: bool, say: Callable[[int], None]
) -> Prompts:
    """`n` prompts of `tokens` tokens by the server's own count.  `ask` sends one request and returns its usage."""
    rng = np.random.default_rng(seed)
    n = 1 if same else min(n, POOL)
    if counter.source == "usage":
        return await _by_usage(ask, n, tokens, rng, same)
    starts = [int(start) for start in rng.integers(0, len(prompts.words()), n + 1)]
    offset, guess, said = 0, 0, None
    for _ in range(3):
        probe, guess = await prompts.fit(counter.count, prompts.head(n), starts[n], tokens - offset, guess)
        said = await ask(probe, 1)
        if said is None or said == tokens:
            break
        offset += said - tokens
    texts: list[str] = []
    while len(texts) < n:
        some = range(len(texts), min(n, len(texts) + 32))
        fitted = await asyncio.gather(*(
            prompts.fit(counter.count, prompts.head(i), starts[i], tokens - offset, guess) for i in some))  # fmt: skip
        texts += [text for text, _ in fitted]
        say(len(texts))
    return Prompts(texts, counter.source, counter.detail, offset, said == tokens, same)


async def _by_usage(ask: Ask, n: int, tokens: int, rng: np.random.Generator, same: bool) -> Prompts:
    """With no tokenizer anywhere: one excerpt is cut by bisection on the server's usage, and only the heads differ.

    A head's words are whole words between spaces, so the count of one holds for all that use words of equal count;
    the words are tried one by one first.
    """
    start = int(rng.integers(0, len(prompts.words())))

    async def count(text: str) -> int:
        said = await ask(text, 1)
        if said is None:
            raise RidgelineError("no usage")
        return said

    try:
        base, _ = await prompts.fit(count, prompts.head(0), start, tokens)
    except RidgelineError as problem:
        if str(problem) != "no usage":
            raise
        length = max(1, int((tokens - 16) / 1.35))
        texts = [prompts.text(prompts.head(i), start, length) for i in range(n)]
        return Prompts(texts, "none", "no tokenizer, and the server sends no usage", 0, False, same)
    if same:
        return Prompts([base], "usage", "bisection on the server's usage", 0, True, True)
    texts = [base]
    first = prompts.head(0)
    per_word: dict[str, bool] = {}
    index = 0
    while len(texts) < n:
        index += 1
        head = prompts.head(index)
        for word in head.rstrip(". ").split():
            if word not in per_word:
                trial = base.replace(first, _with(first, word), 1)
                per_word[word] = await count(trial) == tokens
        if all(per_word[word] for word in head.rstrip(". ").split()):
            texts.append(base.replace(first, head, 1))
    return Prompts(texts, "usage", "bisection on the server's usage", 0, True)


def _with(head: str, word: str) -> str:
    """The head with `word` in its first place if it is capitalised, else in its second: where it will stand."""
    parts = head.rstrip(". ").split()
    parts[0 if word[0].isupper() else 1] = word
    return " ".join(parts) + ". "
