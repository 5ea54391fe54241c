"""Markdown for pull requests and issues: text of a run stays text there, and the whole stays within what fits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

MOST_BYTES = 60_000  # so that it also fits a pull request's comment
LINE_CHARS = 2000
_BARRED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
_MARKUP = re.compile(r"[\\`*\[\]<>|~$]|(?<!\w)_|_(?!\w)")
_ENTITY = re.compile(r"&(?=#?\w+;)")
_AT_START = re.compile(r"^(\d*)([#+=.)-])(?=[\s#=-]|$)")
_BREAK = "\u200b"  # no width: a mention or an address that it parts is none


def inert(text: str, longest: int = 300) -> str:
    """Foreign text as one line that no renderer takes for markup, an image, a link, a mention or a reference."""
    text = re.sub(r"\s+", " ", _BARRED.sub("\ufffd", text)).strip()
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    text = _MARKUP.sub(r"\\\g<0>", _ENTITY.sub("&amp;", text))
    text = _AT_START.sub(r"\1\\\2", text)
    text = text.replace("://", f":{_BREAK}//").replace("@", f"@{_BREAK}")
    return re.sub(r"(?i)\bwww\.|([#!]|\bgh-)(?=\d)", rf"\g<0>{_BREAK}", text)


def code(text: str) -> list[str]:
    """The lines of a block of code; its fence is longer than any within the text."""
    text = _BARRED.sub("\ufffd", text)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return [fence, *text.splitlines(), fence]


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """The lines of a table.  Cells are Markdown already; the first `left` columns hold words, the others figures."""
    rule = ["---" if place < left else "---:" for place in range(len(head))]
    return [f"| {' | '.join(row)} |" for row in (head, rule, *rows)]


def fitting(parts: Sequence[Sequence[str]], rest: str = "the run folder has all") -> list[str]:
    """The lines of all parts, cut where the whole would pass MOST_BYTES, with a word of what is missing."""
    kept: list[str] = []
    left = MOST_BYTES - 400
    for part in parts:
        for i, line in enumerate(part):
            line = line if len(line) <= LINE_CHARS else line[: LINE_CHARS - 3] + "..."
            left -= len(line.encode()) + 1
            if left < 0:
                return [*kept, "", f"… {len(part) - i} more lines do not fit; {rest}"]
            kept.append(line)
    return kept
