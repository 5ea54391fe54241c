"""The unmeasured side of talking to a server: which models, which options, one request by itself (aiohttp)."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from harness import dialects, endings
from harness.records import RidgelineError
from harness.wire import Target, parse_url

MAX_BODY = 4 * 2**20
GET_S = 2.5  # for a page that needs no model: a server that lets it wait is not to be measured
FIRST_S = 30.0  # for the first answer of a model, unless limits say otherwise
MORE_TIME = "limits.preflight_s gives it more time"
RATE_LIMITED = ("the server limits how much may be asked: wait as long as its Retry-After says, or use a key that may ask "
                "more; nothing is retried here")  # fmt: skip


def key_from(env: str, file: str | None = None) -> str:
    """The key, from the environment or a file, never from the command line.  What was named and is not there is an
    error."""
    where = f"--api-key-file {file}" if file else f"--api-key-env {env}"
    if file:
        try:
            key = Path(file).expanduser().read_text(encoding="utf-8")[:4096].strip()
        except (OSError, UnicodeDecodeError) as problem:
            said = getattr(problem, "strerror", None) or "not a text"
            raise RidgelineError(f"{where}: cannot be read: {said}") from None
    else:
        key = os.environ.get(env, "")
    if not key and (file or env != "OPENAI_API_KEY"):
        raise RidgelineError(f"{where}: {'the file is empty' if file else 'this environment variable is not set'}")
    if any(ord(c) < 33 or ord(c) > 126 for c in key):
        raise RidgelineError(f"{where}: the key holds characters that no HTTP header can carry")
    return key


def target_from(url: str | None, key: str) -> Target:
    found = url or os.environ.get("OPENAI_BASE_URL")
    if not found:
        raise RidgelineError(
            "no server: give --url http://HOST:PORT, set OPENAI_BASE_URL, or name a scenario with an engine"
        )
    return parse_url(found, key)


@dataclass(slots=True)
class Client:
    """One server and model, asked one request at a time."""

    target: Target
    session: aiohttp.ClientSession
    api: str = "completions"
    model: str = ""
    no_stop: tuple[str, ...] = ()
    usage: bool = True
    first_s: float = FIRST_S

    def body(self, prompt: str, output_tokens: int) -> tuple[str, bytes]:
        return dialects.encode(self.api, self.model, prompt, output_tokens, self.no_stop, usage=self.usage)

    async def get(self, path: str) -> Any:
        """JSON of a GET.  Raises RidgelineError (code 6) naming the address and what to look at."""
        url = f"{self.target.url}{path}"
        try:
            async with self.session.get(url, allow_redirects=False, timeout=_within(GET_S)) as response:
                text = await _body(response)
                if response.status in (401, 403):
                    raise RidgelineError(f"{url}: status {response.status}: the server wants a key, or another one; "
                                         "set OPENAI_API_KEY, or name its variable by --api-key-env", 6)  # fmt: skip
                if 300 <= response.status < 400:
                    raise RidgelineError(f"{url}: redirects (status {response.status}), and no redirect is followed, so "
                                         "that no key goes elsewhere; give the address itself as --url", 6)  # fmt: skip
                if response.status != 200:
                    hint = _hint(f"http_{response.status}", "is this an OpenAI-compatible server?")
                    raise RidgelineError(f"{url}: status {response.status}{_again(response)}; {hint}", 6)
                return orjson.loads(text)
        except (aiohttp.ClientError, OSError, TimeoutError) as problem:  # first: a bad certificate is a ValueError too
            raise _unreachable(url, problem, GET_S) from None
        except ValueError:
            raise RidgelineError(f"{url}: the answer is no JSON; is this an OpenAI-compatible server?", 6) from None

    async def post(self, path: str, values: dict[str, Any]) -> Any:
        """JSON of a POST of JSON.  Raises RidgelineError (code 6).  A kept connection may just have been closed by the
        server, so a lost connection is tried once more."""
        url = f"{self.target.url}{path}"
        for last in (False, True):
            try:
                async with self.session.post(url, json=values, allow_redirects=False) as response:
                    text = await _body(response)
                    if response.status != 200:
                        raise RidgelineError(f"{url}: status {response.status}", 6)
                    return orjson.loads(text)
            except (aiohttp.ClientError, OSError, TimeoutError) as problem:
                if last or isinstance(problem, TimeoutError):
                    raise _unreachable(url, problem) from None
            except ValueError:
                raise RidgelineError(f"{url}: the answer is no JSON", 6) from None
        raise AssertionError

    async def once(self, prompt: str, output_tokens: int) -> dialects.Answer:
        """One streamed request, read to its end.  Raises RidgelineError (code 6) if the server cannot be reached."""
        path, body = self.body(prompt, output_tokens)
        url = f"{self.target.url}{path}"
        for last in (False, True):
            try:
                return await self._once(url, body, output_tokens)
            except (aiohttp.ClientError, OSError, TimeoutError) as problem:
                if isinstance(problem, TimeoutError):
                    raise RidgelineError(f"{url}: no whole answer to a first request within {self.first_s:g} s; is the "
                                         f"server overloaded, or does it load its model still? {MORE_TIME}", 6) from None  # fmt: skip
                if last:
                    raise _unreachable(url, problem, self.first_s) from None
        raise AssertionError

    async def _once(self, url: str, body: bytes, output_tokens: int) -> dialects.Answer:
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream", "Accept-Encoding": "identity"}
        async with self.session.post(url, data=body, headers=headers, allow_redirects=False,
                                     timeout=_within(self.first_s)) as response:  # fmt: skip
            data, ending = bytearray(), "complete"
            try:
                async for chunk in response.content.iter_any():
                    data += chunk
                    if len(data) > MAX_BODY or data.endswith(b"data: [DONE]\n\n"):
                        break
            except aiohttp.ClientPayloadError:  # cut, or compressed by a trick
                ending = "eof"
            note = f"Location: {response.headers['Location'][:1024]}" if "Location" in response.headers else ""
            coding = response.headers.get("Content-Encoding", "identity")
            answer = dialects.interpret(bytes(data), [0.0], [len(data)], response.status, ending, output_tokens, note,
                                        "" if coding == "identity" else coding, self.target.key)  # fmt: skip
            answer.error += _again(response)
            return answer

    async def input_tokens(self, prompt: str, output_tokens: int) -> int | None:
        """What the server's usage says of a prompt.  Raises RidgelineError (code 6) if it refuses the request."""
        answer = await self.once(prompt, output_tokens)
        if answer.error_class not in ("", "empty_output", "not_an_llm_response"):
            raise _refused(self, answer)
        return answer.input_tokens

    async def find_model(self, wanted: str | None) -> dict[str, Any]:
        """The entry of /v1/models to ask for: the wanted one, else the only one (or the first, which is said)."""
        try:
            listed = await self.get("/v1/models")
        except RidgelineError:
            if wanted is None or not await self._answers():
                raise
            listed = {}  # some gateways list no models; the name is the user's word then
        data = listed.get("data") if isinstance(listed, dict) else None
        models = [m for m in data or [] if isinstance(m, dict) and isinstance(m.get("id"), str)]
        names = [m["id"] for m in models]
        if wanted is None:
            if not models:
                raise RidgelineError(f"{self.target.url}/v1/models: lists no model; name one by --model", 6)
            return dict(models[0])
        if names and wanted not in names:
            shown = ", ".join(names[:8]) + (" …" if len(names) > 8 else "")
            raise RidgelineError(
                f"{self.target.url}: no model {wanted!r} there; served: {shown}; try --model {names[0]}", 6
            )
        return next((dict(m) for m in models if m["id"] == wanted), {"id": wanted})

    async def _answers(self) -> bool:
        try:
            async with self.session.get(self.target.url, allow_redirects=False, timeout=_within(GET_S)):
                return True
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False

    async def negotiate(self, output_tokens: int) -> None:
        """Find which options the server takes: a length with no stop, and usage in the stream.  Recorded in run.json.
        Raises RidgelineError (code 6) when the server refuses all of them, or took `first_s` over it."""
        try:
            async with asyncio.timeout(self.first_s):
                await self._negotiate(output_tokens)
        except TimeoutError:
            raise RidgelineError(f"{self.target.url}: no first request ended well within {self.first_s:g} s; is the server "
                                 f"overloaded? {MORE_TIME}", 6) from None  # fmt: skip

    async def _negotiate(self, output_tokens: int) -> None:
        refused: dialects.Answer | None = None
        for usage in (True, False):
            for no_stop in dialects.NO_STOP:
                self.usage, self.no_stop = usage, no_stop
                answer = await self.once("Say the numbers from one to ten.", min(4, output_tokens))
                if answer.error_class in ("http_400", "http_422"):
                    refused = refused or answer
                    continue
                if answer.error_class and answer.error_class != "empty_output":
                    raise _refused(self, answer)
                return
        assert refused is not None
        raise _refused(self, refused)

    def as_dict(self) -> dict[str, Any]:
        return {"api": self.api, "model": self.model, "no_stop": list(self.no_stop), "stream_usage": self.usage}


async def _body(response: aiohttp.ClientResponse) -> bytes:
    """All of a body, up to MAX_BODY bytes."""
    data = bytearray()
    async for chunk in response.content.iter_any():
        data += chunk
        if len(data) > MAX_BODY:
            break
    coding = response.headers.get("Content-Encoding", "identity")
    return bytes(data) if coding == "identity" else dialects.decoded(bytes(data), [len(data)], coding, MAX_BODY)[0]


def _within(seconds: float) -> aiohttp.ClientTimeout:
    """Each wait bounded, and the whole."""
    return aiohttp.ClientTimeout(total=seconds, connect=min(seconds, GET_S))


def _unreachable(url: str, problem: BaseException, waited_s: float = FIRST_S) -> RidgelineError:
    if isinstance(problem, aiohttp.ClientConnectorCertificateError | aiohttp.ClientConnectorSSLError):
        return RidgelineError(f"{url}: TLS failed: {problem}; use the name in the server's certificate, and name an "
                              "authority of your own by SSL_CERT_FILE", 6)  # fmt: skip
    if isinstance(problem, TimeoutError):
        return RidgelineError(f"{url}: no answer within {waited_s:g} s; is the server up and not overloaded?", 6)
    if isinstance(problem, aiohttp.ClientResponseError):
        said = problem.message.split("\n")[0].rstrip(" :")
        return RidgelineError(f"{url}: what answers there is no HTTP/1.1 ({said}); is this the server's HTTP port?", 6)
    said = str(getattr(problem, "os_error", None) or problem) or type(problem).__name__
    return RidgelineError(f"{url}: not reachable ({said}); is the server up, and are host and port right?", 6)


def _refused(client: Client, answer: dialects.Answer) -> RidgelineError:
    hint = _hint(answer.error_class, endings.ENDINGS[endings.name_of(answer.error_class)][1])
    said = answer.error[:300]
    return RidgelineError(f"{client.target.url}: a first request ended as {answer.error_class}: {said}; {hint}", 6)


def _hint(error_class: str, otherwise: str) -> str:
    """What to do about a class of ending before a run."""
    if re.fullmatch(r"http_5\d\d", error_class):
        otherwise = "the server is up and cannot answer: see its log, and whether its model is loaded"
    return {
        "http_401": "set OPENAI_API_KEY, or name its variable by --api-key-env",
        "http_403": "set OPENAI_API_KEY, or name its variable by --api-key-env",
        "http_404": "check --model and --api: this path or model is not there",
        "http_429": RATE_LIMITED,
        "context_length": "ask for fewer tokens, or let the server take longer contexts",
        "redirect": "give the address that it redirects to as --url",
    }.get(error_class, otherwise)


def _again(response: aiohttp.ClientResponse) -> str:
    """When a server that has too much to do wants to be asked again, as it says it."""
    again = response.headers.get("Retry-After", "") if response.status in (429, 503) else ""
    return f" (Retry-After: {again[:40]})" if again else ""


def local_model_path(entry: dict[str, Any], props: dict[str, Any]) -> str | None:
    """The served model's own folder or file, if the server says where it is and that is on this machine."""
    for found in (entry.get("root"), props.get("model_path")):
        if (
            isinstance(found, str) and found.startswith("/") and os.path.exists(found)
        ):  # whatever the server calls a path
            return found
    return None


async def props_of(client: Client) -> dict[str, Any]:
    """llama.cpp's /props, or {}."""
    try:
        found = await client.get("/props")
    except RidgelineError:
        return {}
    return found if isinstance(found, dict) else {}


async def version_of(client: Client, entry: dict[str, Any], props: dict[str, Any]) -> dict[str, Any]:
    """What the server says it is: kind and version, or "unknown"."""
    owner = str(entry.get("owned_by", ""))
    if "build_info" in props or owner == "llamacpp":
        return {"kind": "llama.cpp", "version": props.get("build_info")}
    try:
        said = await client.get("/version")
    except RidgelineError:
        said = {}
    version = said.get("version") if isinstance(said, dict) else None
    return {"kind": owner or ("vllm" if version else "unknown"), "version": version}


def session(target: Target, headers: Sequence[tuple[str, str]] = ()) -> aiohttp.ClientSession:
    """A session that ignores proxies of the environment, and unpacks nothing by itself: a bomb would hold up the loop."""
    return aiohttp.ClientSession(headers=dict(target.headers) | dict(headers), trust_env=False, auto_decompress=False,
                                 timeout=_within(FIRST_S))  # fmt: skip
