"""The simulator over real sockets: what the law says is what comes out, and the log says how truly."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from harness import dialects, simulator, simulator_formats, simulator_law
from harness.records import RidgelineError


@dataclass
class Simulated:
    port: int
    process: subprocess.Popen[str]

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        link = self.connect()
        try:
            link.request(method, path, None if body is None else json.dumps(body), {"content-type": "application/json"})
            answer = link.getresponse()
            return answer.status, answer.read()
        finally:
            link.close()

    def stream(self, prompt: str = "one two", tokens: int = 8, api: str = "completions", **extras: Any) -> bytes:
        key = {"prompt": prompt} if api == "completions" else {"messages": [{"role": "user", "content": prompt}]}
        body = {"max_tokens": tokens, "stream": True, "stream_options": {"include_usage": True}}
        status, answer = self.ask("POST", dialects.APIS[api], body | key | extras)
        assert status == 200, answer
        return answer

    def wave(self, n: int, **said: Any) -> list[bytes]:
        with ThreadPoolExecutor(n) as pool:
            return list(pool.map(lambda _: self.stream(**said), range(n)))

    def log(self) -> dict[str, Any]:
        log: dict[str, Any] = json.loads(self.ask("GET", "/__log__")[1])
        return log

    def metrics(self) -> dict[str, float]:
        text = self.ask("GET", "/metrics")[1].decode()
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return {sample.name: sample.value for sample in samples if "le" not in sample.labels}


@contextmanager
def simulated(*options: str) -> Iterator[Simulated]:
    command = [sys.executable, "-m", "harness.simulator", "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        line = process.stdout.readline()
        try:
            found = re.fullmatch(r"simulator: http://127\.0\.0\.1:(\d+)\n", line)
            assert found, line
            yield Simulated(int(found[1]), process)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            assert process.wait(10) == 0
            assert process.stdout.read() == "", "exactly one line on stdout"
            errors = process.stderr.read() if process.stderr else ""
            assert "Traceback" not in errors, errors


@pytest.fixture(scope="module")
def quick() -> Iterator[Simulated]:
    with simulated("--ttft-base", "5ms", "--itl-base", "1ms") as server:
        yield server


def read(body: bytes, tokens: int = 8) -> dialects.Answer:
    return dialects.interpret(body, [0.0], [len(body)], 200, "complete", tokens)


def due(request: dict[str, Any]) -> list[float]:
    """When events were due, after the request was read: what the law says, with this machine's noise taken out."""
    pairs = zip(request["sent_s"], request["late_s"], strict=True)
    return [sent - late - request["received_s"] for sent, late in pairs]


def gaps(request: dict[str, Any]) -> list[float]:
    return [late - early for early, late in pairwise(due(request))]


# ---- the law


def test_the_law_is_recovered_from_what_was_due() -> None:
    """a, b, c and d by algebra from four medians: two prompt lengths, two batch sizes."""
    law = ("--ttft-base", "40ms", "--ttft-per-token", "0.1ms", "--itl-base", "10ms", "--itl-per-batch", "1ms")
    with simulated(*law) as server:
        ttfts, itls = [], []
        for words, batch in ((99, 1), (399, 8)):
            server.ask("POST", "/__reset__")
            server.wave(batch, prompt="word " * words, tokens=30)
            requests = server.log()["requests"]
            assert [request["prompt_tokens"] for request in requests] == [words + 1] * batch
            ttfts.append(statistics.median(due(request)[0] for request in requests))
            itls.append(statistics.median(gap for request in requests for gap in gaps(request)))
    per_token, per_batch = (ttfts[1] - ttfts[0]) / 300, (itls[1] - itls[0]) / 7
    assert ttfts[0] - 100 * per_token == pytest.approx(0.040, abs=1e-6)
    assert per_token == pytest.approx(0.1e-3, abs=1e-8)
    assert itls[0] - per_batch == pytest.approx(0.010, abs=1e-6)
    assert per_batch == pytest.approx(1e-3, abs=1e-6)


def test_a_client_sees_the_first_token_when_the_law_says(quick: Simulated) -> None:
    seen = []
    for _ in range(15):
        with socket.create_connection(("127.0.0.1", quick.port)) as link:
            body = json.dumps({"prompt": "a", "stream": True, "max_tokens": 2}).encode()
            head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
            link.sendall(head + body)
            sent_s, got = time.perf_counter(), b""
            while b'"text"' not in got:
                got += link.recv(65536)
            seen.append(time.perf_counter() - sent_s)
    # The least delayed of them: a shared machine can only add.
    assert 0.004 <= min(seen) < 0.006  # the send itself lies before our stamp and after theirs


def test_lateness_does_not_add_up(quick: Simulated) -> None:
    quick.ask("POST", "/__reset__")
    quick.stream(tokens=400)
    (request,) = quick.log()["requests"]
    assert due(request)[-1] == pytest.approx(0.005 + 399 * 0.001, abs=1e-6)
    assert min(request["late_s"]) >= 0
    assert statistics.quantiles(request["late_s"], n=4)[0] < 0.0005


def test_a_request_without_a_slot_waits_for_the_first_that_frees() -> None:
    with simulated("--ttft-base", "200ms", "--itl-base", "5ms", "--slots", "2") as server:
        server.wave(4, tokens=5)
        requests = sorted(server.log()["requests"], key=lambda request: request["received_s"])
    service_s = 0.200 + 4 * 0.005
    assert all(request["slot_s"] == request["received_s"] for request in requests[:2])
    for early, late in zip(requests[:2], requests[2:], strict=True):
        assert late["slot_s"] - early["slot_s"] == pytest.approx(service_s, abs=1e-4), (
            "slots free when due, not when sent"
        )


def test_a_request_waits_until_its_tokens_fit_the_kv_cache() -> None:
    with simulated("--ttft-base", "20ms", "--kv-tokens", "25") as server:
        server.wave(2, prompt="one two", tokens=10)
        first, second = server.log()["requests"]
        assert second["slot_s"] >= first["sent_s"][-1] - first["late_s"][-1] - 1e-6
        status, body = server.ask("POST", "/v1/completions", {"prompt": "a", "max_tokens": 30})
        assert status == 400 and b"KV cache" in body


def test_a_client_that_leaves_frees_its_slot_at_once() -> None:
    with simulated("--ttft-base", "1ms", "--itl-base", "50ms", "--slots", "1") as server:
        link = server.connect()
        link.request("POST", "/v1/completions", json.dumps({"prompt": "a", "max_tokens": 1000, "stream": True}))
        link.getresponse().read(1)
        waiter = server.connect()
        waiter.request("POST", "/v1/completions", json.dumps({"prompt": "a", "max_tokens": 1}))
        time.sleep(0.1)
        left_s = time.perf_counter()
        link.sock.shutdown(socket.SHUT_RDWR)
        assert waiter.getresponse().status == 200
        gone, served = server.log()["requests"]
        assert gone["state"] == "disconnected" and served["state"] == "finished"
        assert served["slot_s"] == pytest.approx(left_s, abs=0.5)
        assert server.metrics()["vllm:num_requests_running"] == 0
        link.close()
        waiter.close()


def test_jitter_is_the_same_for_the_same_seed() -> None:
    factors = []
    for seed in ("1", "1", "2"):
        with simulated("--ttft-base", "1ms", "--itl-base", "0", "--jitter-cv", "0.2", "--seed", seed) as server:
            for _ in range(5):
                server.stream(tokens=1)
            factors.append([request["factor"] for request in server.log()["requests"]])
    assert factors[0] == factors[1] != factors[2]
    assert len(set(factors[0])) == 5


def test_jitter_has_mean_one_and_the_stated_variation() -> None:
    factors = [simulator_law.lognormal(0.3, 0, i) for i in range(20_000)]
    assert statistics.fmean(factors) == pytest.approx(1, abs=0.01)
    assert statistics.stdev(factors) == pytest.approx(0.3, rel=0.05)


# ---- what is said


@pytest.mark.parametrize("api", dialects.APIS)
@pytest.mark.parametrize("per_event", [1, 4])
def test_a_stream_says_every_token_once(api: str, per_event: int) -> None:
    with simulated("--ttft-base", "1ms", "--itl-base", "0.1ms", "--tokens-per-event", str(per_event)) as server:
        body = server.stream(tokens=14, api=api)
    answer = read(body, 14)
    assert (answer.error_class, answer.finish_reason, answer.done) == ("", "length", True)
    assert answer.input_tokens == 2 + 1 + (6 if api == "chat" else 0)
    assert answer.output_tokens == 14 and answer.token_source == "usage"
    assert len(answer.arrivals_s) == (14 if per_event == 1 else 1 + 4)
    events = [json.loads(data) for data, _, _ in list(dialects.events(body))[:-1]]
    text = "".join(dialects.text_of(event["choices"][0]) for event in events if event["choices"])
    assert simulator_formats.count_of(text) == 14


def test_tokens_per_event_leave_the_last_token_in_its_place() -> None:
    with simulated("--ttft-base", "10ms", "--itl-base", "2ms", "--tokens-per-event", "4") as server:
        server.stream(tokens=14)
        (request,) = server.log()["requests"]
    assert request["tokens"] == [1, 4, 4, 4, 1]
    assert due(request)[-1] == pytest.approx(0.036, abs=1e-6)


def test_every_event_is_one_chunk(quick: Simulated) -> None:
    with socket.create_connection(("127.0.0.1", quick.port)) as link:
        body = b'{"prompt":"a","stream":true,"max_tokens":3}'
        link.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
            + body
        )
        raw = b""
        while data := link.recv(65536):
            raw += data
    head, _, rest = raw.partition(b"\r\n\r\n")
    assert b"connection: close" in head and b"text/event-stream" in head
    chunks = []
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        chunks.append(rest[: int(size, 16)])
        assert rest[int(size, 16) :][:2] == b"\r\n"
        rest = rest[int(size, 16) + 2 :]
    assert [chunk.count(b"data: ") for chunk in chunks] == [1, 1, 1, 1, 0]
    assert chunks[-2] == b"data: [DONE]\n\n"


@pytest.mark.parametrize("api", dialects.APIS)
def test_an_answer_in_one_piece_says_the_same(quick: Simulated, api: str) -> None:
    answer = read(quick.stream(tokens=5, api=api, stream=False), 5)
    assert (answer.error_class, answer.output_tokens, answer.finish_reason) == ("", 5, "length")


@pytest.mark.parametrize(
    ("option", "usages", "done"),
    [("--usage=continuous", 4, True), ("--usage=none", 0, True), ("--usage=end", 1, True), ("--no-done", 1, False)],
)
def test_quirks_are_as_asked(option: str, usages: int, done: bool) -> None:
    with simulated("--ttft-base", "1ms", "--itl-base", "1ms", option) as server:
        body = server.stream(tokens=3)
    assert body.count(b'"usage":') == usages
    assert read(body, 3).done is done


@pytest.mark.parametrize(("role", "before_first"), [("first", 1), ("early", 1), ("none", 0)])
def test_the_role_chunk_is_no_token(role: str, before_first: int) -> None:
    with simulated("--ttft-base", "1ms", "--itl-base", "1ms", "--role-chunk", role) as server:
        body = server.stream(tokens=3, api="chat")
    assert body.count(b'"role":"assistant"') == before_first
    assert len(read(body, 3).arrivals_s) == 3


def test_one_piece_delivers_nothing_before_the_last_token() -> None:
    with simulated("--ttft-base", "50ms", "--itl-base", "20ms", "--one-piece") as server:
        link = server.connect()
        start_s = time.perf_counter()
        link.request("POST", "/v1/completions", json.dumps({"prompt": "a", "max_tokens": 6, "stream": True}))
        first = link.getresponse().read(1)
        assert first == b"d" and time.perf_counter() - start_s >= 0.149
        link.close()


@pytest.mark.parametrize(
    ("heeds", "extras", "tokens", "finish"),
    [
        ("honoured", {}, 3, "stop"),
        ("honoured", {"ignore_eos": True}, 8, "length"),
        ("honoured", {"min_tokens": 5}, 5, "stop"),
        ("honoured", {"min_tokens": 8}, 8, "length"),
        ("ignored", {"ignore_eos": True, "min_tokens": 8}, 3, "stop"),
    ],
)
def test_an_early_end_of_text_can_be_forbidden(heeds: str, extras: dict[str, Any], tokens: int, finish: str) -> None:
    with simulated("--ttft-base", "1ms", "--itl-base", "0", "--early-eos-after", "3", "--ignore-eos", heeds) as server:
        answer = read(server.stream(tokens=8, **extras))
    assert (answer.output_tokens, answer.finish_reason) == (tokens, finish)


def test_a_strict_server_refuses_what_it_does_not_know() -> None:
    with simulated("--ignore-eos", "refused") as server:
        status, body = server.ask("POST", "/v1/completions", {"prompt": "a", "ignore_eos": True})
        assert status == 400 and b"ignore_eos" in body


# ---- tokens


@pytest.mark.parametrize(
    ("text", "count"),
    [("", 0), ("one two", 2), ("Don't stop.", 5), ("a_b1\n\tc", 2), ("…«x»", 4), ("привет мир!", 3), ("  --  ", 2)],
)
def test_a_token_is_a_word_or_a_mark(text: str, count: int) -> None:
    assert simulator_formats.count_of(text) == count == len(simulator_formats.ids_of(text))


def test_tokenize_and_usage_agree(quick: Simulated) -> None:
    for prompt in ("one two three", "Well, it's so."):
        for api, body in (
            ("completions", {"prompt": prompt}),
            ("chat", {"messages": [{"role": "user", "content": prompt}]}),
        ):
            said = json.loads(quick.ask("POST", "/tokenize", body)[1])
            assert said["count"] == len(said["tokens"]) == read(quick.stream(prompt, api=api)).input_tokens
            assert said["max_model_len"] == 32768
    ids = said["tokens"]
    assert read(quick.stream(prompt=ids)).input_tokens == len(ids), "token ids get no BOS"
    bare = json.loads(quick.ask("POST", "/tokenize", {"prompt": "one two", "add_special_tokens": False})[1])
    assert bare["count"] == 2


def test_a_prompt_seen_before_is_cached_and_quicker() -> None:
    with simulated("--ttft-base", "1ms", "--ttft-per-token", "1ms", "--itl-base", "0", "--prefix-cache") as server:
        prompt = " ".join(f"w{i}" for i in range(100))
        answers = [
            read(server.stream(prompt, 1), 1),
            read(server.stream(prompt, 1), 1),
            read(server.stream("x " + prompt, 1), 1),
        ]
        cold, warm, other = server.log()["requests"]
        metrics = server.metrics()
    assert [answer.cached_tokens for answer in answers] == [0, 96, 0]
    assert [round(1e3 * due(request)[0]) for request in (cold, warm, other)] == [102, 6, 103]
    assert metrics["vllm:prefix_cache_queries_total"] == 101 + 101 + 102
    assert metrics["vllm:prefix_cache_hits_total"] == 96


# ---- the other paths


def test_metrics_count_what_was_served(quick: Simulated) -> None:
    before = quick.metrics()
    quick.stream(tokens=11)
    after = quick.metrics()
    grown = {name: after[name] - before[name] for name in after}
    assert grown["vllm:prompt_tokens_total"] == 3
    assert grown["vllm:generation_tokens_total"] == 11
    assert grown["vllm:time_to_first_token_seconds_count"] == 1
    assert grown["vllm:time_to_first_token_seconds_sum"] >= 0.005
    assert grown["vllm:inter_token_latency_seconds_count"] == 10
    assert (
        after["vllm:num_requests_running"]
        == after["vllm:num_requests_waiting"]
        == after["vllm:kv_cache_usage_perc"]
        == 0
    )


def test_what_runs_and_what_waits_is_told_meanwhile() -> None:
    with simulated("--ttft-base", "1s", "--slots", "2", "--kv-tokens", "1000") as server:
        links = [server.connect() for _ in range(3)]
        for link in links:
            link.request("POST", "/v1/completions", json.dumps({"prompt": "a b c", "max_tokens": 1}))
        time.sleep(0.3)
        metrics = server.metrics()
        for link in links:
            assert link.getresponse().status == 200
            link.close()
    assert (metrics["vllm:num_requests_running"], metrics["vllm:num_requests_waiting"]) == (2, 1)
    assert metrics["vllm:kv_cache_usage_perc"] == pytest.approx(2 * 4 / 1000)


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/v1/completions", {"model": "gpt", "prompt": "a"}, 404, "The model `gpt` does not exist"),
        ("/v1/chat/completions", {"model": "gpt", "messages": [{"content": "a"}]}, 404, "`gpt`"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 40_000}, 400, "maximum context length is 32768 tokens"),
        ("/v1/completions", {"prompt": 3}, 400, "prompt"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
        ("/v1/completions", [], 400, "not a JSON object"),
        ("/v1/chat/completions", {"messages": "hello"}, 400, "messages"),
        ("/v1/nothing", {}, 404, "/v1/completions"),
        ("/health", {}, 405, "GET"),
    ],
)
def test_a_mistake_gets_an_error_in_the_shape_of_openai(
    quick: Simulated, path: str, body: Any, status: int, says: str
) -> None:
    got, answer = quick.ask("POST", path, body)
    error = json.loads(answer)["error"]
    assert (got, error["code"]) == (status, status)
    assert says in error["message"]


def test_models_health_and_version_answer(quick: Simulated) -> None:
    (card,) = json.loads(quick.ask("GET", "/v1/models")[1])["data"]
    assert (card["id"], card["max_model_len"]) == ("simulated", 32768)
    assert quick.ask("GET", "/health") == (200, b"")
    assert "version" in json.loads(quick.ask("GET", "/version")[1])


def test_a_connection_serves_many_requests(quick: Simulated) -> None:
    link = quick.connect()
    for stream in (True, False, True):
        link.request("POST", "/v1/completions", json.dumps({"prompt": "a", "max_tokens": 2, "stream": stream}))
        answer = link.getresponse()
        assert answer.status == 200 and answer.read() and not answer.will_close
    link.close()


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"nonsense\r\n\r\n", b"400"),
        (b"GET /health HTTP/1.0\r\n\r\n", b"505"),
        (b"GET /health HTTP/1.1\r\nx: " + b"y" * 70_000, b"431"),
        (b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: 40000000\r\n\r\n" + b"y" * 33_000_000, b"413"),
    ],
)
def test_what_is_no_request_is_refused_and_cut(quick: Simulated, raw: bytes, status: bytes) -> None:
    with socket.create_connection(("127.0.0.1", quick.port), timeout=10) as link:
        try:
            link.sendall(raw)
            assert link.recv(65536).split()[1] == status
        except ConnectionError:
            assert status == b"413", "cut while it was still being sent"
    assert quick.ask("GET", "/health")[0] == 200


def test_a_request_that_comes_byte_by_byte_is_timed_from_its_last(quick: Simulated) -> None:
    quick.ask("POST", "/__reset__")
    body = b'{"prompt":"a","max_tokens":1}'
    raw = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    with socket.create_connection(("127.0.0.1", quick.port)) as link:
        for at in range(0, len(raw), 20):
            link.sendall(raw[at : at + 20])
            time.sleep(0.002)
            sent_s = time.perf_counter()
        assert link.recv(65536).startswith(b"HTTP/1.1 200")
    (request,) = quick.log()["requests"]
    assert sent_s - 0.03 < request["received_s"] <= sent_s


def test_the_log_finds_a_request_by_its_prompt_and_forgets_on_reset(quick: Simulated) -> None:
    quick.ask("POST", "/__reset__")
    quick.stream("find me")
    (request,) = quick.log()["requests"]
    assert request["prompt_crc32"] == zlib.crc32(b"find me")
    assert quick.log()["summary"]["events"] == 8
    quick.ask("POST", "/__reset__")
    assert quick.log()["requests"] == []


def test_many_streams_keep_their_pace_and_own_up_to_lateness() -> None:
    """64 streams at 100 tokens/s.  On a busy machine they may be late, but never in secret."""
    with simulated("--ttft-base", "50ms", "--itl-base", "10ms") as server:
        for body in server.wave(64, tokens=50):
            assert read(body, 50).output_tokens == 50
        log = server.log()
    late = [value for request in log["requests"] for value in request["late_s"]]
    assert len(late) == log["summary"]["events"] == 64 * 50
    assert log["summary"]["late_max_s"] == pytest.approx(max(late), rel=1e-5)
    assert log["summary"]["late_over_1ms"] == pytest.approx(sum(value > 0.001 for value in late), abs=2)
    for request in log["requests"]:
        assert due(request)[0] == pytest.approx(0.050, abs=1e-5)
        assert gaps(request) == pytest.approx([0.010] * 49, abs=1e-5)


# ---- as a library and as a command


def test_it_serves_inside_a_running_loop() -> None:
    async def talk() -> list[int]:
        server = await simulator.serve(simulator.Law(ttft_base_s=0.001, itl_base_s=0.001))
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        body = b'{"prompt":"a","max_tokens":4,"stream":true}'
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        await reader.readuntil(b"0\r\n\r\n")
        tokens: list[int] = server.log()["requests"][0]["tokens"]
        await server.close()
        assert await reader.read() == b""
        writer.close()
        return tokens

    assert asyncio.run(talk()) == [1, 1, 1, 1]


def test_it_stops_cleanly_while_streams_run() -> None:
    with simulated("--itl-base", "1s") as server:
        link = server.connect()
        link.request("POST", "/v1/completions", json.dumps({"prompt": "a", "max_tokens": 100, "stream": True}))
        link.getresponse().read(1)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 0
        link.close()


def test_a_port_that_is_taken_is_one_clear_line(quick: Simulated) -> None:
    command = [sys.executable, "-m", "harness.simulator", "--port", str(quick.port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: simulate: cannot listen on 127\.0\.0\.1:\d+: .*\n", done.stderr)


@pytest.mark.parametrize(
    "wrong",
    [
        {"ttft_base_s": -1.0},
        {"itl_base_s": float("nan")},
        {"tokens_per_event": 0},
        {"usage": "never"},
        {"kv_tokens": 0},
    ],
)
def test_a_law_out_of_range_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(RidgelineError, match=next(iter(wrong))):
        simulator.Law(**wrong)
