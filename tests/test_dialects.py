"""What real servers sent, and what broken ones might."""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import dialects, endings
from harness.framing import unframe

STREAMS = sorted((Path(__file__).parent / "data" / "sse").glob("*.txt"))


def body_of(path: Path) -> bytes:
    return path.read_bytes().partition(b"\n\n")[2]


def say(*events: object, done: bool = True) -> bytes:
    lines = [b"data: " + (e if isinstance(e, bytes) else json.dumps(e).encode()) + b"\n\n" for e in events]
    return b"".join(lines) + (b"data: [DONE]\n\n" if done else b"")


def token(text: str, finish: str | None = None, **more: object) -> dict[str, object]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish}], **more}


def usage(prompt: int, completion: int) -> dict[str, object]:
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}}


def read(body: bytes, status: int = 200, ending: str = "complete", asked: int = 3) -> dialects.Answer:
    """Read with one stamp per byte, so that an event's stamp is its last byte's offset."""
    return dialects.interpret(body, list(range(1, len(body) + 1)), list(range(1, len(body) + 1)), status, ending, asked)


@pytest.mark.parametrize("path", STREAMS, ids=lambda p: p.stem)
def test_a_recorded_stream_is_a_success_of_150_tokens(path: Path) -> None:
    answer = read(body_of(path), asked=150)
    assert (answer.error_class, answer.output_tokens, answer.token_source) == ("", 150, "usage")
    assert answer.finish_reason == "length"
    assert 340 < (answer.input_tokens or 0) < 400
    assert 145 <= len(answer.arrivals_s) <= 150


def chunked(body: bytes, sizes: list[int]) -> bytes:
    """An HTTP response whose chunks are of these sizes, over and over."""
    parts, at, i = [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"], 0, 0
    while at < len(body):
        piece = body[at : at + sizes[i % len(sizes)]]
        parts.append(b"%x\r\n%b\r\n" % (len(piece), piece))
        at, i = at + len(piece), i + 1
    return b"".join([*parts, b"0\r\n\r\n"])


WHOLE: dict[tuple[Path, bytes], tuple[dialects.Answer, list[dialects.Event]]] = {}


def _cuttings(count: int) -> None:
    """Bytes of a recorded stream, in any line ending, in any HTTP chunks, in any reads: the same events."""

    @settings(max_examples=count, deadline=None)
    @given(st.sampled_from(STREAMS), st.lists(st.integers(0, 45_000), max_size=40), st.sampled_from([b"\n", b"\r\n", b"\r"]),
           st.lists(st.integers(1, 3000), min_size=1, max_size=5))  # fmt: skip
    def check(path: Path, cuts: list[int], line: bytes, sizes: list[int]) -> None:
        body = body_of(path).replace(b"\n", line)
        if (path, line) not in WHOLE:
            WHOLE[path, line] = (
                dialects.interpret(body, [0.0], [len(body)], 200, "complete", 150),
                list(dialects.events(body)),
            )
        whole, events = WHOLE[path, line]
        raw = chunked(body, sizes)
        ends = sorted({min(cut + 1, len(raw)) for cut in cuts} | {len(raw)})
        found, body_ends = unframe(raw, ends)
        assert found == body and list(dialects.events(found)) == events
        answer = dialects.interpret(found, [float(end) for end in ends], body_ends, 200, "complete", 150)
        assert (answer.arrival_tokens, answer.output_tokens, answer.error_class) == (
            whole.arrival_tokens,
            whole.output_tokens,
            "",
        )
        arrivals = list(answer.arrivals_s)
        assert (
            arrivals == sorted(arrivals)
            and set(arrivals) <= set(map(float, ends))
            and len(arrivals) == len(whole.arrivals_s)
        )

    check()


def test_the_same_bytes_give_the_same_events_however_they_were_cut() -> None:
    _cuttings(60)


@pytest.mark.full
def test_ten_thousand_cuttings_give_the_same_events() -> None:
    _cuttings(10_000)


def _mutations(count: int) -> None:
    """Recorded streams with bytes changed, left out, doubled and thrown in: always a class, never a failure of ours."""

    @settings(max_examples=count, deadline=None)
    @given(st.sampled_from(STREAMS), st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 3), st.binary(max_size=12)), max_size=8),
           st.sampled_from(["", "gzip", "deflate"]), st.sampled_from(["complete", "eof", "stream_reset", "timeout_idle"]))  # fmt: skip
    def check(path: Path, changes: list[tuple[int, int, bytes]], coding: str, ending: str) -> None:
        data = bytearray(body_of(path)[:3000])
        if coding and len(changes) % 2:
            data = bytearray(zlib.compress(data, wbits=31 if coding == "gzip" else 15))
        for at, how, more in changes:
            at %= len(data) + 1
            data[at : at + (0, len(more), 9, 0)[how]] = more if how < 3 else bytes(data[at : at + 40])
        ends = [*range(7, len(data), 97), len(data)]
        answer = dialects.interpret(
            bytes(data), [float(i) for i in range(len(ends))], ends, 200, ending, 150, coding=coding
        )
        assert answer.error_class != "client_error", answer.error
        assert endings.name_of(answer.error_class) in endings.ENDINGS
        assert len(answer.arrivals_s) == len(answer.arrival_tokens) and (answer.output_tokens or 0) >= 0
        assert answer.error.encode() is not None and set(answer.notes) <= set(endings.NOTES)

    check()


def test_a_damaged_stream_is_read_without_a_failure_of_ours() -> None:
    _mutations(150)


@pytest.mark.full
def test_ten_thousand_damaged_streams_are_read_without_a_failure_of_ours() -> None:
    _mutations(10_000)


@pytest.mark.parametrize(
    ("name", "body", "datas"),
    [
        ("one BOM is dropped", b"\xef\xbb\xbfdata: 1\n\n", [b"1"]),
        ("CR, LF and CRLF end lines", b"data: 1\r\rdata: 2\n\ndata: 3\r\n\r\n", [b"1", b"2", b"3"]),
        ("comments are nothing", b": ping\n\n:\n\ndata: 1\n\n", [b"1"]),
        ("several data lines join", b"data: a\ndata: b\n\n", [b"a\nb"]),
        ("no space after the colon", b"data:a\n\n", [b"a"]),
        ("an unfinished event is dropped", b"data: 1\n\ndata: 2\n", [b"1"]),
        ("a final [DONE] needs no blank line", b"data: 1\n\ndata: [DONE]", [b"1", b"[DONE]"]),
        ("U+2028 ends no line", "data: a\u2028b\n\n".encode(), ["a\u2028b".encode()]),
        ("a second BOM is not dropped", b"\xef\xbb\xbf\xef\xbb\xbfdata: 1\n\ndata: 2\n\n", [b"2"]),
        ("a field without a colon is empty", b"data\n\ndata\ndata\n\n", [b"", b"\n"]),
        ("one space alone is dropped", b"data:  1 \n\n", [b" 1 "]),
        ("NUL passes through", b"data: a\0b\n\n", [b"a\0b"]),
        ("names are whole and in lower case", b"Data: 1\n\ndatax: 2\n\n data: 3\n\ndata: 4\n\n", [b"4"]),
        ("an event without data is none", b"event: foo\n\ndata: 1\n\n", [b"1"]),
        ("mixed line ends", b"data: 1\r\n\ndata: 2\n\rdata: 3\r\r\ndata: 4\n\n", [b"1", b"2", b"3", b"4"]),
        ("a long comment", b":" + b"x" * 2048 + b"\ndata: 1\n\n", [b"1"]),
        ("other fields are no data", b"id: 7\nretry: 1\ndata: 1\n\n", [b"1"]),
    ],
)
def test_events_follow_the_standard(name: str, body: bytes, datas: list[bytes]) -> None:
    assert [data for data, _, _ in list(dialects.events(body))] == datas


@pytest.mark.parametrize(
    ("expected", "body", "ending"),
    [
        ("", say(token("a"), token("b", "length"), usage(5, 2)), "complete"),
        ("", say(token("a"), token("b", "length"), done=False), "complete"),
        ("", say({"error": None, **token("a")}, token("b", "stop")), "complete"),
        ("truncated", say(token("a"), token("b"), done=False), "complete"),
        ("truncated", say(token("a"), done=False), "eof"),
        ("stream_reset", say(token("a"), done=False), "stream_reset"),
        ("timeout_idle", say(token("a"), done=False), "timeout_idle"),
        ("aborted_by_server", say(token("a"), token("", "abort")), "complete"),
        ("server_error_in_band", say(token("a"), {"error": {"message": "boom"}}), "complete"),
        ("server_error_in_band", say({"error": "boom", "error_type": "generation"}), "complete"),
        ("server_error_in_band", say({"object": "error", "message": "boom"}), "complete"),
        ("server_error_in_band", b'event: error\ndata: {"message":"boom"}\n\n', "complete"),
        ("server_error_in_band", b'error: {"message":"boom"}\n\n', "complete"),
        *[
            (
                "server_error_in_band",
                say(token("a"), done=False) + b"event: error\n" + words + b"\n\n" + say(token("b", "stop")),
                "complete",
            )
            for words in (
                b"data: null",
                b'data: ["boom"]',
                b'data: "boom"',
                b"data: boom",
                b"data:",
                b": boom",
                b"id: 1",
            )
        ],
        (
            "server_error_in_band",
            say(token("a"), b'[{"error": {"code": 429, "message": "quota"}}]', token("b", "stop")),
            "complete",
        ),
        ("server_error_in_band", say(token("a"), {"detail": [{"msg": "boom"}]}, token("b", "stop")), "complete"),
        ("server_error_in_band", say(token("a"), {"errors": [{"message": "boom"}]}, token("b", "stop")), "complete"),
        ("", say(token("a"), {"errors": [], "detail": ""}, token("b", "stop")), "complete"),
        ("aborted_by_server", say(token("a", "abort"), token("b", "stop")), "complete"),
        (
            "",
            say({"choices": [{"delta": {"function_call": {"arguments": "{"}}}]}, token("", "function_call")),
            "complete",
        ),
        ("", say(token("a"), b"[]", b"null", b"[{}]", token("b", "stop")), "complete"),
        ("empty_output", say(token("", "stop"), usage(5, 0)), "complete"),
        ("not_an_llm_response", b"<html>hello</html>", "complete"),
        ("encoding", say(b"{not json"), "complete"),
        ("runaway", say(*[token("a")] * 20, token("", "length")), "complete"),
    ],
)
def test_every_ending_has_its_class(expected: str, body: bytes, ending: str) -> None:
    assert read(body, ending=ending).error_class == expected


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (404, b'{"error":{"message":"no such model"}}', ("http_404", "no such model")),
        (503, b"busy", ("http_503", "busy")),
        (302, b"", ("redirect", "status 302, and no words with it")),
        (400, b'{"message":"maximum context length is 512"}', ("context_length", "maximum context length is 512")),
        (204, b"", ("http_204", "status 204, and no words with it")),
    ],
)
def test_any_status_but_200_is_a_failure_with_the_servers_words(
    status: int, body: bytes, expected: tuple[str, str]
) -> None:
    answer = read(body, status=status)
    assert (answer.error_class, answer.error) == expected


def test_a_role_chunk_is_no_token_and_reasoning_is_one() -> None:
    chunks = [{"role": "assistant", "content": ""}, {"reasoning_content": "hm"}, {"content": "a"}]
    body = say(*[{"choices": [{"index": 0, "delta": delta}]} for delta in chunks], usage(5, 2))
    answer = read(body)
    assert len(answer.arrivals_s) == 2
    assert answer.arrivals_s[0] > body.index(b"hm")


def test_continuous_usage_is_taken_and_never_summed() -> None:
    body = say(
        *[token("a", None, usage={"prompt_tokens": 7, "completion_tokens": n}) for n in (1, 4, 6)], token("", "length")
    )
    answer = read(body, asked=6)
    assert (answer.output_tokens, answer.input_tokens, answer.arrival_tokens) == (6, 7, [1, 3, 2])


def test_without_usage_tokens_are_counted_by_events_and_say_so() -> None:
    answer = read(say(token("a"), token("b", "length")))
    assert (answer.output_tokens, answer.token_source, answer.input_tokens) == (2, "chunks", None)


def test_an_event_is_stamped_by_the_read_that_completed_it() -> None:
    body = say(token("a"), token("b", "length"), done=False)
    first = body.index(b"\n\n") + 2
    answer = dialects.interpret(body, [1.0, 2.0, 3.0], [first - 1, first, len(body)], 200, "complete", 2)
    assert answer.arrivals_s.tolist() == [2.0, 3.0]


def test_control_characters_of_an_error_never_reach_a_terminal() -> None:
    assert "\x1b" not in read(b"\x1b[31mred", status=500).error


@pytest.mark.parametrize("api", dialects.APIS)
def test_a_request_asks_for_the_exact_length_and_for_usage(api: str) -> None:
    path, body = dialects.encode(api, "m", "hi", 7, ("ignore_eos", "min_tokens"))
    said = json.loads(body)
    assert path == dialects.APIS[api]
    assert (said["max_tokens"], said["min_tokens"], said["ignore_eos"]) == (7, 7, True)
    assert said["stream_options"] == {"include_usage": True}


SHAPES: list[Callable[[str], dict[str, Any]]] = [
    lambda text: {"choices": [{"index": 0, "text": text, "finish_reason": None}], "usage": None},
    lambda text: {"choices": [{"index": 0, "text": text, "finish_reason": "stop"}], "usage": None},
    lambda text: {"choices": [{"index": 0, "text": text, "finish_reason": None}], "usage": {"completion_tokens": 4}},
    lambda text: {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]},
    lambda text: {"choices": [{"index": 0, "text": text, "token_ids": [1, 2]}]},
    lambda text: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 9}},
    lambda text: {"error": text},
]
TEXTS = st.lists(
    st.sampled_from(["a", " b", "", 'q"', "\\", "\n", "ü", "\x01", "[DONE]", '"}]}\n\ndata: ']), min_size=1, max_size=9
)
EVENTS = st.tuples(st.sampled_from(SHAPES), TEXTS).map(lambda given: [given[0](text) for text in given[1]])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(EVENTS, max_size=6).map(lambda runs: [one for run in runs for one in run]),
    st.binary(max_size=3),
    st.integers(0, 60),
)
def test_events_of_one_shape_mean_what_a_full_reading_of_each_says(
    messages: list[dict[str, Any]], noise: bytes, at: int
) -> None:
    """Spaces that mean nothing in JSON make each event unlike the one before, so that each is parsed."""
    plain = [orjson.dumps(m) for m in messages]
    if plain:  # bytes that are no JSON string must be seen in either
        at %= len(plain)
        plain[at] = plain[at].replace(b'"a"', b'"' + noise.replace(b"\n", b"").replace(b"\r", b"") + b'"')
    unlike = [b"{" + b" " * (i + 1) + data[1:] for i, data in enumerate(plain)]
    told = []
    for datas in (plain, unlike):
        ends = list(itertools.accumulate(len(data) + 8 for data in datas))
        body = b"".join(b"data: " + data + b"\n\n" for data in datas)
        answer = dialects.interpret(body, [float(i) for i in range(len(ends))], ends, 200, "complete", 150)
        told.append((answer.arrivals_s.tolist(), answer.arrival_tokens, answer.output_tokens, answer.token_source, answer.finish_reason,
                     answer.error_class, answer.events, answer.choice_events))  # fmt: skip
    assert told[0] == told[1]
