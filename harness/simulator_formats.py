"""What the simulator says: its tokenizer, the bytes of its events, its errors and its metrics, in the formats of vLLM."""

from __future__ import annotations

import re
import zlib
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import orjson

VOCABULARY = 32_000
BOS_ID = 1
TEMPLATE_ID = 2
_FIRST_WORD_ID = 256  # ids below stand for special tokens
_TOKEN = re.compile(r"\w+|[^\w\s]")

# Generated text cycles through these.  All are of five letters, so that every event of a stream has the same length.
WORDS = tuple(
    b" " + word.encode()
    for word in [
        "about",
        "above",
        "after",
        "again",
        "along",
        "among",
        "apart",
        "aside",
        "basin",
        "beach",
        "below",
        "birch",
        "brook",
        "brown",
        "cedar",
        "chalk",
        "cliff",
        "cloud",
        "coast",
        "crest",
        "delta",
        "early",
        "earth",
        "field",
        "fjord",
        "forth",
        "frost",
        "glade",
        "gorge",
        "grass",
        "green",
        "grove",
        "heath",
        "hedge",
        "hills",
        "ledge",
        "light",
        "maple",
        "marsh",
        "misty",
        "mound",
        "mount",
        "north",
        "ocean",
        "other",
        "outer",
        "plain",
        "pines",
        "ridge",
        "river",
        "rocky",
        "round",
        "shade",
        "shore",
        "slope",
        "south",
        "stone",
        "storm",
        "sunny",
        "trail",
        "under",
        "upper",
        "water",
        "woods",
    ]
)


# For a text of ASCII only: letters of a word become w, spaces stay, all else p.
_CLASSES = bytes(
    ord("w") if chr(i).isalnum() or i == ord("_") else 32 if chr(i).isspace() else ord("p") for i in range(128)
)
_CLASSES += bytes(128)


def count_of(text: str) -> int:
    """The tokens of a text: each run of letters, digits and underscores is one, each other mark is one."""
    if not text.isascii():
        return len(_TOKEN.findall(text))
    # The same by counting where words begin, twenty times as fast: a wave of arrivals must be parsed before tokens are due.
    classes = b" " + text.encode().translate(_CLASSES)
    return classes.count(b"p") + classes.count(b" w") + classes.count(b"pw")


def ids_of(text: str) -> list[int]:
    """A stable id for each token (CRC-32 folded into the vocabulary), so that equal texts have equal ids."""
    words = _TOKEN.findall(text)
    return [
        _FIRST_WORD_ID + zlib.crc32(word.encode("utf-8", "replace")) % (VOCABULARY - _FIRST_WORD_ID) for word in words
    ]


def usage_of(prompt_tokens: int, output_tokens: int, cached_tokens: int | None) -> dict[str, Any]:
    """The usage object; `cached_tokens` is None where the server has no prefix cache."""
    usage: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + output_tokens,
        "completion_tokens": output_tokens,
    }
    if cached_tokens is not None:
        usage["prompt_tokens_details"] = {"cached_tokens": cached_tokens}
    return usage


def chunk(data: bytes) -> bytes:
    """`data` as one chunk of HTTP/1.1's chunked coding."""
    return b"%x\r\n%b\r\n" % (len(data), data)


LAST_CHUNK = b"0\r\n\r\n"
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nserver: ridgeline-simulator\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n"
)
_REASONS = {200: b"OK", 400: b"Bad Request", 404: b"Not Found", 405: b"Method Not Allowed", 413: b"Content Too Large",
            431: b"Request Header Fields Too Large", 500: b"Internal Server Error", 505: b"HTTP Version Not Supported"}  # fmt: skip


def response(status: int, body: bytes, keep: bool, kind: bytes = b"application/json") -> bytes:
    """A whole response in one piece; `keep` is whether the connection stays open."""
    return b"HTTP/1.1 %d %b\r\nserver: ridgeline-simulator\r\ncontent-type: %b\r\ncontent-length: %d\r\n%b\r\n%b" % (
        status,
        _REASONS.get(status, b""),
        kind,
        len(body),
        b"" if keep else b"connection: close\r\n",
        body,
    )


def error_body(status: int, message: str, param: str | None = None) -> bytes:
    """The error object of OpenAI's API as vLLM fills it."""
    kind = {404: "NotFoundError", 500: "InternalServerError"}.get(status, "BadRequestError")
    return orjson.dumps({"error": {"message": message, "type": kind, "param": param, "code": status}})


class Answer:
    """The bytes of one answer, made ahead as far as they can be: an event is three byte strings joined."""

    __slots__ = ("_chat", "_common", "_end", "_fronts", "_head", "_last", "created", "id", "model")

    def __init__(self, chat: bool, id: str, model: str, created: int, finish: str) -> None:
        self._chat, self.id, self.model, self.created = chat, id, model, created
        kind = b"chat.completion.chunk" if chat else b"text_completion"
        self._common = b'data: {"id":%b,"object":"%b","created":%d,"model":%b,"choices":[' % (
            orjson.dumps(id), kind, created, orjson.dumps(model))  # fmt: skip
        self._head = self._common + (b'{"index":0,"delta":{"content":"' if chat else b'{"index":0,"text":"')
        close = b'"},"logprobs":null,' if chat else b'","logprobs":null,'
        # The last event has its own length; those before it share one, so their size line is made once.
        self._end = close + b'"finish_reason":null,"stop_reason":null,"token_ids":null}]'
        self._last = close + b'"finish_reason":"%b","stop_reason":null,"token_ids":null}]' % finish.encode()
        self._fronts: dict[tuple[int, bool], bytes] = {}

    def event(self, at: int, tokens: int, last: bool, usage: Mapping[str, Any] | None = None) -> bytes:
        """The chunk that carries tokens number `at` up to `at + tokens` (from 0)."""
        text = text_of(at, tokens)
        end = self._last if last else self._end
        if usage is not None:
            return chunk(b'%b%b%b,"usage":%b}\n\n' % (self._head, text, end, orjson.dumps(usage)))
        front = self._fronts.get((tokens, last))
        if front is None:
            front = b"%x\r\n%b" % (len(self._head) + len(text) + len(end) + 3, self._head)
            self._fronts[tokens, last] = front
        return front + text + end + b"}\n\n\r\n"

    def role(self) -> bytes:
        """The empty chunk with which a chat opens."""
        return chunk(
            self._common
            + b'{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}\n\n'
        )

    def tail(self, usage: Mapping[str, Any] | None, done: bool) -> bytes:
        """All that follows the last token: the usage event, the marker, the end of the body."""
        said = chunk(self._common + b'],"usage":%b}\n\n' % orjson.dumps(usage)) if usage is not None else b""
        return said + (chunk(b"data: [DONE]\n\n") if done else b"") + LAST_CHUNK

    def whole(self, tokens: int, finish: str, usage: Mapping[str, Any] | None) -> bytes:
        """The body of an answer that is not streamed."""
        text = text_of(0, tokens).decode()
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish, "stop_reason": None}
        if self._chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        said: dict[str, Any] = {
            "id": self.id,
            "object": "chat.completion" if self._chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": [choice],
        }
        return orjson.dumps(said if usage is None else said | {"usage": usage})


def text_of(at: int, tokens: int) -> bytes:
    """The generated text of tokens number `at` up to `at + tokens`."""
    if tokens == 1:
        return WORDS[at % len(WORDS)]
    return b"".join(WORDS[i % len(WORDS)] for i in range(at, at + tokens))


class Histogram:
    """A Prometheus histogram of seconds."""

    __slots__ = ("_bounds", "_counts", "sum_s")

    def __init__(self, bounds_s: Sequence[float]) -> None:
        self._bounds = tuple(bounds_s)
        self._counts = [0] * (len(self._bounds) + 1)
        self.sum_s = 0.0

    def observe(self, value_s: float, times: int = 1) -> None:
        """`times` observations of `value_s` each."""
        self._counts[bisect_left(self._bounds, value_s)] += times
        self.sum_s += value_s * times

    def lines(self, name: str, labels: str) -> list[str]:
        bounds = [*(f"{bound:g}" for bound in self._bounds), "+Inf"]
        totals = list(accumulate(self._counts))
        lines = [f"# TYPE {name} histogram"]
        lines += [f'{name}_bucket{{{labels},le="{b}"}} {n}' for b, n in zip(bounds, totals, strict=True)]
        return [*lines, f"{name}_sum{{{labels}}} {self.sum_s!r}", f"{name}_count{{{labels}}} {totals[-1]}"]


# The bounds of vLLM 0.32's histograms, so that quantiles read from them are as coarse as there.
TTFT_BOUNDS_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
ITL_BOUNDS_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
E2E_BOUNDS_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)


def metrics_text(
    model: str, gauges: Mapping[str, float], counters: Mapping[str, float], histograms: Mapping[str, Histogram]
) -> bytes:
    """Prometheus' text format; the names come without their `vllm:` and `_total`."""
    label = model.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    labels = f'engine="0",model_name="{label}"'
    lines: list[str] = []
    for name, value in gauges.items():
        lines += [f"# TYPE vllm:{name} gauge", f"vllm:{name}{{{labels}}} {value!r}"]
    for name, value in counters.items():
        lines += [f"# TYPE vllm:{name}_total counter", f"vllm:{name}_total{{{labels}}} {value!r}"]
    for name, histogram in histograms.items():
        lines += histogram.lines(f"vllm:{name}", labels)
    return ("\n".join(lines) + "\n").encode()
