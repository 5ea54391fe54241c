"""Serves a GGUF file with llama.cpp's own server out of the Python wheel `xllamacpp`, in the words of `llama-server`.

Runs by file path in an interpreter that has xllamacpp but nothing of ours.  The usual options of llama-server have
their usual names; any other `--some-name VALUE` sets the field `some_name` of llama.cpp's parameters, `--no-some-name`
switches it off.  So a scenario's `args` mean the same with this wheel and with a llama-server binary.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

# option of llama-server -> field of xllamacpp.CommonParams; a leading "no-" on the option negates a switch.
FIELDS = {
    "alias": "model_alias", "api-key": "api_keys", "batch-size": "n_batch", "cont-batching": "cont_batching",
    "ctx-size": "n_ctx", "flash-attn": "flash_attn_type", "host": "hostnames", "metrics": "endpoint_metrics",
    "model": "model.path", "parallel": "n_parallel", "props": "endpoint_props", "slots": "endpoint_slots",
    "threads": "cpuparams.n_threads", "threads-batch": "cpuparams_batch.n_threads", "threads-http": "n_threads_http",
    "ubatch-size": "n_ubatch",
}  # fmt: skip
SHORT = {
    "-a": "alias", "-b": "batch-size", "-c": "ctx-size", "-m": "model", "-np": "parallel", "-t": "threads",
    "-tb": "threads-batch", "-ub": "ubatch-size",
}  # fmt: skip


def place(params: Any, option: str) -> tuple[Any, str]:
    """The object and the attribute that an option sets; SystemExit with a sentence when there is none."""
    path = FIELDS.get(option, option.replace("-", "_"))
    *parents, name = path.split(".")
    for parent in parents:
        params = getattr(params, parent)
    if not hasattr(params, name):
        raise SystemExit(f"--{option}: llama.cpp has no parameter {path}; see llama-server --help for their names")
    return params, name


def converted(old: Any, text: str, option: str) -> Any:
    """`text` as a value of the type that the field has now; SystemExit with a sentence when it is none."""
    if isinstance(old, bool):
        return text.lower() in ("1", "true", "on", "yes")
    if isinstance(old, int | float):
        try:
            return type(old)(text)
        except (TypeError, ValueError):  # an enumeration: by the end of its name, as in "q8_0" or "on"
            members = getattr(type(old), "__members__", {})
            wanted = {"on": "enabled", "off": "disabled"}.get(text, text).lower()
            for name, member in members.items():
                if name.lower().endswith("_" + wanted):
                    return member
            raise SystemExit(f"--{option}: got {text!r}; allowed: {', '.join(members) or type(old).__name__}") from None
    if isinstance(old, set):
        return {text}
    if isinstance(old, list):
        return [text]
    return text


def apply(params: Any, arguments: list[str]) -> None:
    """Set each option on `params`."""
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        name, has_value, text = (SHORT.get(word) or word.removeprefix("--")).partition("=")
        if name == word:
            raise SystemExit(f"{word!r} is no option")
        # "--no-perf" is a field of its own, "--no-warmup" switches one off.
        value_off = name.startswith("no-") and not hasattr(params, name.replace("-", "_"))
        target, field = place(params, name.removeprefix("no-") if value_off else name)
        old = getattr(target, field)
        if has_value:
            setattr(target, field, converted(old, text, name))
        elif isinstance(old, bool) and (value_off or not rest or rest[0].startswith("-")):
            setattr(target, field, not value_off)
        elif rest:
            setattr(target, field, converted(old, rest.pop(0), name))
        else:
            raise SystemExit(f"--{name} wants a value")


def main(arguments: list[str]) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    if key := os.environ.get("LLAMA_API_KEY"):  # as llama-server's own environment variable
        params.api_keys = [key]
    apply(params, arguments)
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    try:
        server = xllamacpp.Server(params)  # serves from its own threads until it is dropped
    except RuntimeError as error:
        raise SystemExit(f"llama.cpp's server did not start: {error}") from None
    stopped.wait()
    del server


if __name__ == "__main__":
    main(sys.argv[1:])
