"""How a request can end, and the limits that end it: every class by name, what it means, what to do.

The words here are the ones of the records, the summary and the page `harness/docs/endings.md`, which a test holds equal.
"""

from __future__ import annotations

import re

MESSAGE_CHARS = 4096  # an error's text in a record is cut here
WORD_CHARS = 40  # a finish reason is a word
HALF_CHARS = 4  # of a secret: fewer are an "sk-", or a word's ending
EVENT_BYTES = 2**20  # one event longer than this is not an answer; many of them at once still fit into memory
KEPT_BYTES = 2**18  # of an answer that was cut for its size
ERROR_BYTES = 64 * 2**10  # this much of an error's body is read
HEAD_BYTES = 256 * 2**10  # of header lines and chunk framing, beyond what the content itself explains
RUNAWAY = 4  # a stream of more than this times the tokens asked for is not an answer
EVENTS_SPARE = 100  # comments, roles, usage: events beside those of tokens


def most_events(output_tokens: int) -> int:
    """Events after which a stream is given up."""
    return RUNAWAY * output_tokens + EVENTS_SPARE


def most_bytes(output_tokens: int) -> int:
    """Bytes, unpacked, after which an answer is given up: 4 KiB a token is far more than any dialect spends."""
    return EVENT_BYTES + 2**16 + 2**12 * output_tokens


# class -> (what it means, what to do).  "" is success.  http_STATUS stands for any status but 200.
ENDINGS: dict[str, tuple[str, str]] = {
    "": ("success: status 200, a legal finish reason, no error object, at least one token", ""),
    "connect": ("no connection could be opened", "is the server up, and does it take this many connections?"),
    "connect_timeout": ("no connection within limits.connect_s", "look for a firewall, or a full accept queue"),
    "tls": ("the TLS handshake failed, or the certificate is not trusted", "use the name in the server's certificate; "
            "SSL_CERT_FILE names an authority of your own"),
    "client_ports": ("this machine has no local port left", "fewer at once, or a server that keeps connections open"),
    "client_files": ("this machine has no file descriptor left", "raise ulimit -n"),
    "disconnected_before_response": ("the connection ended before a status line", "see the server's log"),
    "malformed_http": ("what came is not HTTP/1.1: status line, header, chunk, or a flood of them",
                       "is this the server's HTTP port?"),
    "timeout_ttft": ("no generated text within limits.first_token_s", "lower the load, or allow more time"),
    "timeout_idle": ("silence for limits.idle_s inside an answer", "see the server's log; allow more time if it may pause"),
    "timeout_total": ("not over within limits.total_s", "lower the load, or allow more time"),
    "stream_reset": ("the connection was reset inside the answer", "see the server's log, and what lies between"),
    "truncated": ("the answer ended without a finish reason, or its bytes without their announced end",
                  "look for a proxy's timeout, or a server that was drained"),
    "event_too_large": (f"one event of more than {EVENT_BYTES // 2**20} MiB, unpacked", "this is no stream of tokens"),
    "runaway": (f"more than {RUNAWAY} events with text for each token asked, or far more bytes than that takes",
                "the server ignores max_tokens"),
    "encoding": ("an event is no JSON in UTF-8, or the content coding is unknown or broken",
                 "look for a proxy that compresses; identity is asked for"),
    "redirect": ("any 3xx: none is followed, so that no key goes elsewhere", "give the address itself as --url"),
    "context_length": ("a 4xx that says the request is too long", "fewer tokens, or a longer context"),
    "http_STATUS": ("any other status but 200, under its own number", "the server's words stand in the record"),
    "not_an_llm_response": ("200, but no event and no completion: a page, or nothing", "check --url and --api"),
    "empty_output": ("a proper answer without any generated text", "ask for more tokens; see the finish reason"),
    "server_error_in_band": ("200, and then an error object in the stream or the body", "see the server's log"),
    "aborted_by_server": ("a finish reason that is not a legal one (abort, error, cancelled, an unknown word)",
                          "see the server's log"),
    "cancelled": ("still in flight when the run was stopped", ""),
    "client_error": ("our own side failed on this answer", "please report it, with the record's text"),
    "failed_elsewhere": ("an imported result: the tool that measured counts this request as failed",
                         "its words stand in the record"),
}  # fmt: skip

# What is odd about an answer that yet counts as success, or about how a figure of it was come by.
NOTES: dict[str, str] = {
    "no_done": "a finish reason, and no [DONE] after it",
    "not_streamed": "the answer came in one piece: it has no TTFT and no ITL",
    "compressed": "the body was compressed although identity was asked for: arrivals are those of whole packets",
    "token_count_mismatch": "the server's usage cannot be true beside what came; tokens were counted by events",
    "resent": "a kept connection closed as we wrote on it; sent again on a new one, once",
}


def name_of(error_class: str) -> str:
    """The row of ENDINGS that a record's class belongs to."""
    return "http_STATUS" if re.fullmatch(r"http_\d+", error_class) else error_class


# Also the marks that turn the direction of text around, and lone surrogates, which no file can hold.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: str, secret: str = "", limit: int = MESSAGE_CHARS) -> str:
    """Foreign text as it may be kept and shown: no control characters, no secret, not endless.

    In this order: a secret with a control character inside must not come together afterwards, nor be cut in two.  The
    text itself may be the first bytes of a longer one: the beginning of a secret at its end goes too.
    """
    return _without_half(redacted(_CONTROL.sub("", text), secret), secret)[:limit]


def _without_half(text: str, secret: str) -> str:
    """`text` without the beginning of `secret` that it ends with, if that is long enough to tell anything."""
    for length in range(len(secret) - 1, HALF_CHARS - 1, -1):
        if text[-length:].lower() == secret[:length].lower():
            return text[:-length] + "[redacted]"
    return text


def redacted(text: str, *secrets: str) -> str:
    """`text` without `secrets`, whatever their case."""
    for secret in secrets:
        if secret:
            text = re.sub(re.escape(secret), "[redacted]", text, flags=re.IGNORECASE)
    return text


_SECRET_NAMES = re.compile(r"(api|access|auth)_?key$|(^|_)key$|(^|_)token$|secret|passw|credential", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Whether an option or a variable of this name holds a secret: HF_TOKEN does, MAX_BATCHED_TOKENS does not."""
    return bool(_SECRET_NAMES.search(name.replace("-", "_")))
