"""What a person sees while something goes on: one moving line on a terminal, else a plain line now and then."""

from __future__ import annotations

import os
import sys
import time

from harness.redaction import clean

QUIET_PERIOD_S = 10.0


class Progress:
    """Writes to stderr only.  A moving line is written by hand: a library's live display would hold up the loop that
    stamps for milliseconds at each refresh."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("CI")
        self.width = 0
        self.last_s = 0.0

    def line(self, text: str) -> None:
        """A line that stays."""
        if not self.quiet:
            self._write(f"{self._clear()}{clean(text)}\n")

    def tick(self, text: str) -> None:
        """Where things stand now; without a terminal every ten seconds at most."""
        now_s = time.monotonic()
        if self.quiet or now_s - self.last_s < (0.2 if self.live else QUIET_PERIOD_S):
            return
        first, self.last_s = self.last_s == 0.0, now_s
        text = clean(text)
        if self.live:
            columns = os.get_terminal_size(2).columns if sys.stderr.isatty() else 80
            text = text[: columns - 1]
            self._write(f"{self._clear()}{text}")
            self.width = len(text)
        elif not first:
            self._write(f"{text}\n")

    def _clear(self) -> str:
        width, self.width = self.width, 0
        return "\r" + " " * width + "\r" if width else ""

    def _write(self, text: str) -> None:
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except (BrokenPipeError, UnicodeEncodeError, ValueError):
            self.quiet = True
