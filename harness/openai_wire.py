"""The official openai client as a second transport: what an application sees, beside what the wire carries.

An OpenAIWire stands where a Wire does, so the load generator, the recorder and the figures are the same.  `sent_s` is when
the application calls `create`, and each chunk is stamped when the client's iterator yields it: the client's own work (its
pool, which opens connections when they are first needed; parsing; waking the task) is in the figures, as an application
would have it.  Its retries are switched off, since they would pass for one slow request.
"""

from __future__ import annotations

import asyncio
import importlib.util
import ssl
from collections.abc import Callable
from typing import Any

import orjson

from harness.loadgen import Player
from harness.records import RidgelineError
from harness.wire import Exchange, Target, Wire, clock

NAMED = frozenset({"model", "messages", "prompt", "max_tokens", "temperature", "stream", "stream_options"})


def require() -> None:
    """Raises RidgelineError if the client is not installed."""
    if importlib.util.find_spec("openai") is None:
        raise RidgelineError(
            "workload.transport openai: the openai client is not installed; `pip install ridgeline[openai]`"
        )


class OpenAIWire(Wire):
    """One slot of the client: a request at a time, in a task of its own as in an application."""

    def __init__(self, client: Any, on_end: Callable[[Wire, Exchange], None],
                 on_idle_close: Callable[[Wire], None]) -> None:  # fmt: skip
        super().__init__(on_end, on_idle_close)
        self.client = client
        self.open = True
        self.task: asyncio.Task[tuple[str, str]] | None = None

    def send(self, exchange: Exchange) -> None:
        assert self.exchange is None
        self.exchange = exchange
        exchange.http = False
        self.uses += 1
        fields = orjson.loads(exchange.payload.partition(b"\r\n\r\n")[2])
        self.task = asyncio.ensure_future(self._ask(exchange, fields))
        self.task.add_done_callback(lambda task: self._over(task, exchange))

    def _over(self, task: asyncio.Task[tuple[str, str]], exchange: Exchange) -> None:
        if not task.cancelled():
            ending, note = task.result()
            self.finish(ending, note, exchange)

    async def _ask(self, exchange: Exchange, fields: dict[str, Any]) -> tuple[str, str]:
        """Ask and read to the end; how it ended, and a note."""
        import openai

        extra = {name: fields.pop(name) for name in set(fields) - NAMED}
        create = (self.client.chat.completions if "messages" in fields else self.client.completions).create
        exchange.sent_s = clock()
        try:
            stream = await create(**fields, extra_body=extra or None)
            exchange.status = stream.response.status_code
            async for chunk in stream:
                now = clock()
                _keep(exchange, now, chunk.model_dump_json(exclude_unset=True).encode())
                if exchange.events > exchange.max_events:
                    return "runaway", f"stopped after {exchange.events} events"
        except openai.APIStatusError as problem:
            exchange.status = problem.status_code
            _keep(exchange, clock(), problem.response.content, event=False)
        except openai.APIConnectionError as problem:
            cause = problem.__cause__ or problem
            refused = type(cause).__name__ in ("ConnectError", "ConnectTimeout")
            return "connect" if refused else "eof" if exchange.status else "disconnected_before_response", str(cause)
        except openai.APIError as problem:  # an error inside the stream: the client takes it out of its event
            _keep(exchange, clock(), orjson.dumps({"error": problem.body or str(problem)}))
        except Exception as problem:
            return "client_error", f"{type(problem).__name__}: {problem}"
        return "complete", ""

    def close(self) -> None:
        self.open = False
        if self.task is not None:
            self.task.cancel()


def _keep(exchange: Exchange, now: float, message: bytes, event: bool = True) -> None:
    """Append what the application got as an event, so that the recorder reads it like any stream."""
    exchange.reads.append(b"data: " + message + b"\n\n" if event else message)
    exchange.size += len(exchange.reads[-1])
    exchange.events += 1
    exchange.stamps_s.append(now)


class OpenAIPlayer(Player):
    """A Player whose connections are those of one shared AsyncOpenAI, as an application has it."""

    def __init__(self, target: Target, address: tuple[Any, ...], tls: ssl.SSLContext | None, *more: Any) -> None:
        import openai

        super().__init__(target, address, tls, *more)
        timeout = openai.Timeout(None, connect=self.timers.connect_s)
        # Proxies of the environment stay off, so certificates must be ours: the same context as the wire's.
        http = openai.DefaultAsyncHttpxClient(trust_env=False, verify=tls or True, timeout=timeout,
                                              limits=_no_limits())  # fmt: skip
        self.client = openai.AsyncOpenAI(api_key=target.key or "none", base_url=f"{target.url}/v1", max_retries=0,
                                         timeout=timeout, http_client=http)  # fmt: skip

    async def _open(self) -> Wire:
        return OpenAIWire(self.client, self._ended, self._idle_closed)


def _no_limits() -> Any:
    """The pool bounds nothing: the load generator says how many are in flight."""
    import openai

    kind = type(openai.DEFAULT_CONNECTION_LIMITS)
    return kind(max_connections=None, max_keepalive_connections=None)
