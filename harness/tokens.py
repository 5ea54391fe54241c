"""How prompts are counted: the model's tokenizer, the server's /tokenize, or its usage; never a download.

Whatever counts, one real request proves it: 350 means `usage.prompt_tokens`, so the constant difference between a
count and the server's usage (BOS, chat template) is measured once and taken into account.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from harness import prompts
from harness.client import GET_S, Client
from harness.lengths import Asks
from harness.records import RidgelineError

Ask = Callable[[str, int], Awaitable[int | None]]  # (prompt, output tokens) -> usage.prompt_tokens, or None


MOST = 10**9  # a larger count is no count


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
            few, many = [await asyncio.wait_for(counter.count(text), GET_S) for text in ("one two", "one two " * 9)]
            if 0 < few < many:
                return counter
        except RidgelineError:
            continue
        except TimeoutError:  # it has no such path, and does not say so
            break
    return Counter("usage", _never, "bisection on the server's usage")


def untold(tokenizer: str | None) -> Counter:
    """The same where no server may be asked: a named tokenizer, or nothing."""
    return local(path) if tokenizer and (path := tokenizer_file(tokenizer)) else Counter("usage", _never)


async def no_answer(text: str, output_tokens: int) -> None:
    """Stands for a request where none may be sent."""


def _server(client: Client, key: str, fixed: dict[str, Any]) -> Counter:
    async def count(text: str) -> int:
        answer = await client.post("/tokenize", fixed | {key: text})
        said = answer if isinstance(answer, dict) else {}
        tokens, ids = said.get("count"), said.get("tokens")
        if type(tokens) is int and 0 <= tokens <= MOST:
            return tokens
        if isinstance(ids, list):
            return len(ids)
        raise RidgelineError(f"{client.target.url}/tokenize: tells no count of tokens; give --tokenizer", 6)

    return Counter("server", count, f"{client.target.url}/tokenize")


async def _never(text: str) -> int:
    raise RidgelineError("no tokenizer")


POOL = 1024  # prompts that are fitted one by one; beyond, a fitted text gets another head of as many tokens
ASKED_POOL = 64  # the same where each count is a request to the server
AT_ONCE = 32
ALL_HEADS = range(len(prompts.HEADS) ** prompts.HEAD_WORDS)


@dataclass(slots=True)
class Prompts:
    """Prompts and what is known of their length."""

    texts: Sequence[str]
    source: str  # tokenizer | server | usage | given | none
    detail: str
    offset: int  # tokens that the server adds to the counted text
    proven: bool  # one real request's usage was the number asked
    same: bool = False
    asks: Asks | None = None  # what each row of a trial asks; None: all alike
    text_of: Sequence[int] = ()  # row -> its text; empty: row itself
    head_of: Sequence[int] = ()  # text -> number of its head; empty: text itself
    root_of: Sequence[int] = ()  # row -> row of its session's first turn; empty: row itself
    heads: Sequence[int] = ALL_HEADS

    def at(self, number: int, place: int | None = None) -> str:
        """The prompt of request `number` of the run, unlike all others unless they are to be the same.  `place`: which
        of its trial it is, where that tells its length and its session."""
        row, asks = number % len(self.texts), self.asks
        apart = asks is not None and not asks.alike and (self.source != "given" or asks.due_s is not None)
        if self.same:
            row = 0
        elif asks is not None and apart and place is not None:
            row = place % len(asks)
            number -= row - self.root_of[row] if self.root_of else 0
        if self.same or self.source == "given":
            return self.texts[row]
        text = self.text_of[row] if self.text_of else row
        had = self.head_of[text] if self.head_of else text
        if had == number:
            return self.texts[text]
        # so late a repeat is in no cache
        old, new = (prompts.head(self.heads[n % len(self.heads)]) for n in (had, number))
        return self.texts[text].replace(old, new, 1)


async def build(counter: Counter, ask: Ask, asks: Asks, n: int, seed: int, say: Callable[[int], None],
                same: bool = False, shared: float = 0.0) -> Prompts:  # fmt: skip
    """A prompt for each row of `asks`, of its own number of tokens by the server's count, for a run of `n` requests.

    `ask` sends one request and returns its usage.  `shared` is the share of each prompt, at its beginning, that is the
    same in all.  Where there are many rows, those of one length have one text under different heads.
    """
    starts = np.random.default_rng(seed).integers(0, len(prompts.words()), len(asks) + 1)
    typical = int(np.median(asks.input_tokens))
    fitter = Fitter(counter.count, asks, starts, shared)
    source, detail, offset, said = counter.source, counter.detail, 0, None
    if source == "usage":
        fitter.count, fitter.at_once, detail = _asking(ask), 4, "bisection on the server's usage"
        short, long = [await ask(prompts.text(fitter.before(0, typical), 0, words), 1) for words in (1, 40)]
        if short is None or long is None:
            source, detail = "none", "no tokenizer, and the server sends no usage"
        elif long <= short:
            source, detail = "none", f"no tokenizer, and the server's usage says {long} tokens of any prompt"
        said = typical
    else:
        for _ in range(3):
            said = await ask(await fitter.one(len(asks), typical - offset), 1)
            if said is None or said == typical:
                break
            offset += said - typical
        else:
            offset = 0  # its usage does not follow the prompt by a constant: the tokenizer's count stands
    fitter.offset = offset
    roots = fitter.roots
    rows = [0] if same else list(range(len(asks)))
    text_of: list[int] = []
    many = source in ("usage", "none") or len(asks) > (ASKED_POOL if source == "server" else POOL)
    if not same and (many or not asks.alike or n > len(asks)):
        if source != "none":
            fitter.heads = await _even(fitter, n)
        if many:
            rows, text_of = _by_length(asks)
    await fitter.measure_shared()
    texts = [fitter.guessed(row) for row in rows] if source == "none" else await fitter.all(rows, say)
    return Prompts(texts, source, detail, offset, source != "none" and said == typical, same, asks, text_of,
                   [roots[row] for row in rows], roots, fitter.heads)  # fmt: skip


def _asking(ask: Ask) -> prompts.Count:
    async def count(text: str) -> int:
        said = await ask(text, 1)
        if said is None:
            raise RidgelineError("the server sends usage for some requests only; give --tokenizer", 6)
        return said

    return count


def _by_length(asks: Asks) -> tuple[list[int], list[int]]:
    """(rows to fit, row -> which of them): rows of one length share a text, but not those of a session."""
    rows: list[int] = []
    text_of: list[int] = []
    known: dict[int, int] = {}
    in_session = set(np.flatnonzero(asks.after >= 0).tolist()) | set(asks.after.tolist())
    for row, tokens in enumerate(asks.input_tokens.tolist()):
        if row in in_session or tokens not in known:
            if row not in in_session:
                known[tokens] = len(rows)
            text_of.append(len(rows))
            rows.append(row)
        else:
            text_of.append(known[tokens])
    return rows, text_of


async def _even(fitter: Fitter, n: int) -> Sequence[int]:
    """Heads that all cost as many tokens, so that one can stand for another: what each word costs in each place
    is counted, and the sum that most heads have is taken.  As many words are tried as `n` prompts need."""
    k = min(len(prompts.HEADS), max(16, round((4 * n) ** (1 / 3))))
    some, same = prompts.HEADS[:k], prompts.HEADS[0]
    trials = [f"{word.capitalize()} {same} {same}. " for word in some]
    trials += [f"{same.capitalize()} {word} {same}. " for word in some]
    trials += [f"{same.capitalize()} {same} {word}. " for word in some]
    costs = np.array(await fitter.gather(fitter.count(prompts.text(prompts.OPENING + head, 0, 4)) for head in trials))
    first, second, third = costs.reshape(3, k)
    whole = first[:, None, None] + second[None, :, None] + third[None, None, :]
    usual = np.bincount(whole.ravel()).argmax()
    a, b, c = np.nonzero(whole == usual)
    return [int(i) for i in np.sort(a + len(prompts.HEADS) * (b + len(prompts.HEADS) * c))]


@dataclass(slots=True)
class Fitter:
    """Makes texts of exact lengths; remembers how long words are with this tokenizer."""

    count: prompts.Count
    asks: Asks
    starts: Any
    shared: float
    at_once: int = AT_ONCE
    offset: int = 0
    heads: Sequence[int] = ALL_HEADS
    pace: prompts.Pace = field(default_factory=prompts.Pace)
    shared_pace: float = 1.3
    opening: int = 10
    roots: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.roots = self.asks.roots().tolist()

    def head(self, row: int) -> str:
        return prompts.head(self.heads[(self.roots[row] if row < len(self.roots) else row) % len(self.heads)])

    async def gather(self, work: Any) -> list[Any]:
        """All results in order, `at_once` at a time: a server is not to be stormed before it is measured."""
        limit = asyncio.Semaphore(self.at_once)

        async def one(task: Awaitable[Any]) -> Any:
            async with limit:
                return await task

        return list(await asyncio.gather(*(one(task) for task in work)))

    async def measure_shared(self) -> None:
        """Tokens per word of the shared text, so that the share is as asked within a word or two."""
        if self.shared:
            words = max(1, int(self.shared * float(np.median(self.asks.input_tokens)) / self.pace.per_word))
            self.opening = await self.count(prompts.OPENING)
            whole = await self.count(prompts.OPENING + prompts.excerpt(0, words))
            self.shared_pace = max(0.2, (whole - self.opening) / words)

    def before(self, row: int, tokens: int) -> str:
        """What stands before the excerpt: the opening, the shared text, the head."""
        words = int((self.shared * tokens - self.opening) / self.shared_pace) if self.shared else 0
        room = int((tokens - self.opening - 12) / self.shared_pace)  # a head and the closing must fit too
        words = max(0, min(words, room))
        return prompts.OPENING + (prompts.excerpt(0, words) + "\n\n" if words else "") + self.head(row)

    async def one(self, row: int, tokens: int, earlier: str = "") -> str:
        """The text of a row: after `earlier` (the turn before) if that fits, else from its beginning."""
        start = int(self.starts[row])
        if earlier:
            words = int(self.asks.output_tokens[self.asks.after[row]] / self.pace.per_word)
            answered = f"{earlier} {prompts.excerpt(start, words)}{prompts.NEXT_TURN}"
            with contextlib.suppress(RidgelineError):
                return await prompts.fit(self.count, answered, start + words, tokens, self.pace)
        try:
            return await prompts.fit(self.count, self.before(row, tokens), start, tokens, self.pace)
        except RidgelineError:
            if self.asks.alike or self.shared:
                raise
        # A length of a distribution or a trace that leaves no room for the template.
        return await prompts.fit(self.count, self.head(row), start, tokens, self.pace, "")

    async def all(self, rows: Sequence[int], say: Callable[[int], None]) -> list[str]:
        """The texts of `rows`, each session's turns one after the other."""
        made: dict[int, str] = {}
        sessions: dict[int, list[int]] = {}
        for row in rows:
            sessions.setdefault(self.roots[row], []).append(row)

        async def session(turns: list[int]) -> None:
            for row in turns:
                tokens = int(self.asks.input_tokens[row]) - self.offset
                made[row] = await self.one(row, tokens, made.get(int(self.asks.after[row]), ""))
            say(len(made))

        await self.gather(session(turns) for turns in sessions.values())
        return [made[row] for row in rows]

    def guessed(self, row: int) -> str:
        """Where nothing counts: about as long as asked."""
        tokens = int(self.asks.input_tokens[row])
        return prompts.text(self.before(row, tokens), int(self.starts[row]), max(1, int((tokens - 16) / 1.35)))
