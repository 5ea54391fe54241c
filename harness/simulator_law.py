"""The simulator's service law, and what a request asks for under it: numbers in, numbers out.

The law.  A request of n prompt tokens gets a slot at once when one of k is free, else when one frees, first come first
served.  From the time it gets the slot (with no wait: the time at which its last byte was read from the socket):

    first token   after  a + b·n
    next token    after  c + d·batch, where batch is the number of requests that hold a slot, itself included and also
                  those before their first token (as in `vllm:num_requests_running`), when the token before was due

Each token is due at a fixed time computed from the due time before it, never from when that was really sent, so lateness
does not add up.  A slot frees when its last token is due; when the client goes away, at once.  With `tokens_per_event`
k > 1 the first event carries one token, each later one k (the last: what is left) and comes when its last token is due;
batch is then read once per event.  So TTFT, TPOT and E2E do not depend on k.  With `jitter_cv` all times of a request are
multiplied by one log-normal factor of mean 1; with `trial_cv` those of all requests between two resets.

Tokens.  A run of letters, digits and underscores is one, each other mark is one; a text prompt has `bos_tokens` more, a
chat `chat_tokens` on top of that; a prompt of token ids has as many as it has ids.
"""

from __future__ import annotations

import math
import random
import zlib
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

import orjson

from harness import simulator_formats as formats
from harness.records import RidgelineError

Usage = Literal["end", "continuous", "none"]

DEFAULT_OUTPUT_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """What the server does, exactly; the module's text has the formulas.  Seconds and tokens.

    Raises RidgelineError for a value outside its range.
    """

    ttft_base_s: float = field(default=0.05, metadata={"help": "a: time to the first token of an empty prompt"})
    ttft_per_token_s: float = field(default=0.0, metadata={"help": "b: more time to it per prompt token"})
    itl_base_s: float = field(default=0.01, metadata={"help": "c: time from token to token, alone apart from d"})
    itl_per_batch_s: float = field(
        default=0.0, metadata={"help": "d: more time from token to token per running request"}
    )
    slots: int = field(default=0, metadata={"help": "k: requests that run at once; 0: all"})
    tokens_per_event: int = field(default=1, metadata={"help": "tokens in each event after the first"})
    jitter_cv: float = field(default=0.0, metadata={"help": "coefficient of variation of a factor per request"})
    trial_cv: float = field(default=0.0, metadata={"help": "the same per reset of the log"})
    seed: int = field(default=0, metadata={"help": "seed of both"})
    usage: Usage = field(
        default="end", metadata={"help": "usage, when asked for: in the last event, in each, or never"}
    )
    role_chunk: Literal["first", "early", "none"] = field(
        default="first",
        metadata={"help": "a chat's empty role chunk: just before the first token, when parsed, or none"},
    )
    done: bool = field(default=True, metadata={"help": "end streams with data: [DONE]"})
    one_piece: bool = field(
        default=False, metadata={"help": "deliver each stream in one write, when its last token is due"}
    )
    early_eos_after: int | None = field(default=None, metadata={"help": "end of text after so many tokens"})
    ignore_eos: Literal["honoured", "ignored", "refused"] = field(
        default="honoured", metadata={"help": "what ignore_eos and min_tokens in a request do"}
    )
    kv_tokens: int | None = field(
        default=None, metadata={"help": "KV cache: a request also waits until its prompt and max_tokens fit"}
    )
    prefix_cache: bool = field(
        default=False, metadata={"help": "prompt tokens seen before, in blocks of 16 from the start, take no time"}
    )
    context_tokens: int = field(default=32_768, metadata={"help": "longest prompt and output together"})
    bos_tokens: int = field(default=1, metadata={"help": "tokens before each text prompt"})
    chat_tokens: int = field(default=6, metadata={"help": "tokens of the chat template"})
    model: str = field(default="simulated", metadata={"help": "name of the served model"})

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(Law).items():
            value, least = getattr(self, name), _LEAST.get(name, 0)
            if name == "model" or (value is None and type(None) in get_args(kind)):
                continue
            if get_origin(kind) is Literal:
                if value not in get_args(kind):
                    raise RidgelineError(f"law: {name}: got {value!r}; known: {', '.join(get_args(kind))}")
            elif not (math.isfinite(value) and value >= least):
                raise RidgelineError(f"law: {name}: got {value!r}, expected a number of at least {least}")


_LEAST = {"tokens_per_event": 1, "early_eos_after": 1, "kv_tokens": 1, "context_tokens": 2}


def lognormal(cv: float, *seeds: int) -> float:
    """A log-normal number of mean 1 and the given coefficient of variation."""
    if not cv:
        return 1.0
    variance = math.log1p(cv * cv)
    return math.exp(random.Random(str(seeds)).gauss(-variance / 2, math.sqrt(variance)))


class Refused(Exception):
    """A request that gets an error instead of tokens."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param


def _whole_number(body: dict[str, Any], name: str, default: int) -> int:
    value = body.get(name)
    if value is None:
        return default
    if type(value) is not int or value < (0 if name == "min_tokens" else 1):
        raise Refused(400, f"{name}: got {value!r}, expected a whole number of at least 1", name)
    return value


@dataclass(frozen=True, slots=True)
class Prompt:
    lead: list[int]  # ids of special tokens before the text
    text: str
    given: list[int] | None  # where the prompt came as ids
    crc32: int  # of its text: by it a client can find its request in the log

    def count(self) -> int:
        return formats.count_of(self.text) + len(self.lead) if self.given is None else len(self.given)

    def ids(self) -> list[int]:
        # Made only where needed: it takes longer than all else that a request needs.
        return self.given if self.given is not None else self.lead + formats.ids_of(self.text)


def prompt_of(body: dict[str, Any], chat: bool, law: Law, special: bool = True) -> Prompt:
    lead = [formats.BOS_ID] * law.bos_tokens if special else []
    if chat:
        text = "\n".join(_message_texts(body.get("messages")))
        lead += [formats.TEMPLATE_ID] * law.chat_tokens
        return Prompt(lead, text, None, zlib.crc32(text.encode()))
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return Prompt(lead, prompt, None, zlib.crc32(prompt.encode()))
    if isinstance(prompt, list) and prompt and all(type(id) is int for id in prompt):
        return Prompt([], "", prompt, zlib.crc32(orjson.dumps(prompt)))
    raise Refused(400, "prompt: expected one text, or one list of token ids", "prompt")


def _message_texts(messages: Any) -> list[str]:
    """The texts of a chat's messages; of content in parts, those of the text parts."""
    if not isinstance(messages, list) or not messages or not all(isinstance(said, dict) for said in messages):
        raise Refused(400, "messages: expected a list of objects with role and content", "messages")
    texts = []
    for said in messages:
        content = said.get("content") or ""
        parts = [{"text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            raise Refused(400, "messages: a content is neither a text nor a list of parts", "messages")
        texts.append("".join(str(part.get("text", "")) for part in parts))
    return texts


def check_length(law: Law, prompt_tokens: int, output_tokens: int) -> None:
    total = prompt_tokens + output_tokens
    if total > law.context_tokens:
        raise Refused(
            400,
            f"This model's maximum context length is {law.context_tokens} tokens. However, you requested {total} tokens "
            f"({prompt_tokens} in the prompt, {output_tokens} in the completion). Please reduce the length of either.",
        )
    if law.kv_tokens and total > law.kv_tokens:
        raise Refused(400, f"{total} tokens exceed the KV cache's {law.kv_tokens}: this request could never run.")


def output_asked(body: dict[str, Any]) -> int:
    return _whole_number(body, "max_completion_tokens", _whole_number(body, "max_tokens", DEFAULT_OUTPUT_TOKENS))


def output_of(law: Law, body: dict[str, Any], asked: int) -> tuple[int, str]:
    """How many tokens come of those asked for, and the finish reason."""
    if law.ignore_eos == "refused":
        for name in ("ignore_eos", "min_tokens"):
            if name in body:
                raise Refused(400, f"Unrecognized request argument supplied: {name}", name)
    if law.early_eos_after is None or law.early_eos_after >= asked:
        return asked, "length"
    heeds = law.ignore_eos == "honoured"
    if heeds and body.get("ignore_eos") is True:
        return asked, "length"
    least = _whole_number(body, "min_tokens", 0) if heeds else 0
    if least >= asked:
        return asked, "length"
    return max(law.early_eos_after, least), "stop"


def usage_kind(law: Law, body: dict[str, Any]) -> Usage:
    options = body.get("stream_options")
    if law.usage == "none" or not isinstance(options, dict) or options.get("include_usage") is not True:
        return "none"
    return "continuous" if options.get("continuous_usage_stats") is True else law.usage
