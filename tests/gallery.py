"""The committed example: `python -m tests.gallery share RUN` makes a run folder fit to be published, and
`python -m tests.gallery shoot PAGE FOLDER` takes the README's pictures of a page.  `make gallery` does the second."""

from __future__ import annotations

import re
import shutil
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import store
from harness.records import RidgelineError

KEPT = (store.RUN, store.PARQUET, store.SERVER, "engine.log", "scenario.yaml")
LOG_CHARS = 8000  # a report has the end of it


@dataclass(frozen=True, slots=True)
class Shot:
    """One picture: what the page is scrolled to, and the window (CSS pixels) that sees it."""

    name: str
    anchor: str
    width: int
    height: int
    scheme: str = "light"


SHOTS = (
    Shot("verdict", "verdict", 1280, 800),
    Shot("versus", "versus", 1280, 800, "dark"),
    Shot("phone", "plane", 360, 740),
)


def share(folder: Path) -> None:
    """Leave only what a report is made from, and take this machine's folders and name out of its texts."""
    if store.journals(folder):
        store.derive(folder)  # with all that the journal tells: it goes
    if not store.load(folder).events:
        raise RidgelineError(f"{folder}: neither a journal nor columns that tell of the trials; measure it anew")
    for path in folder.iterdir():
        if path.name not in KEPT:
            path.unlink()
    for path in folder.iterdir():
        if path.suffix != ".parquet":
            text = anonymous(path.read_text(encoding="utf-8", errors="replace"))
            store.write_text(path, text[-LOG_CHARS:] if path.suffix == ".log" else text)


def anonymous(text: str, here: str = "", home: str = "", host: str = "") -> str:
    """The text without the working folder, the home, any other folder of two levels or more, and the host's name."""
    for place in sorted((here or str(Path.cwd()), home or str(Path.home())), key=len, reverse=True):
        text = text.replace(f"{place}/", "").replace(place, ".")
    text = re.sub(r"\bfile:/+\S+", "file:…", text)
    text = re.sub(r"(?<![\w:/.])/(?!v\d)(?:[\w.+-]+/)+", "…/", text)
    name = host or socket.gethostname()
    return re.sub(rf"\b{re.escape(name)}\b", "host", text) if len(name) > 3 else text


def shoot(page: Path, folder: Path) -> None:
    """PNG files of the page, drawn by the same browser that the tests use."""
    from playwright.sync_api import sync_playwright

    path = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    if path is None:
        raise RidgelineError("no chromium on this machine (Debian: apt-get install chromium)")
    folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--disable-gpu", "--no-sandbox", "--hide-scrollbars"]
        )
        for shot in SHOTS:
            _take(browser, page, shot, folder / f"{page.stem}-{shot.name}.png")
        browser.close()


def _take(browser: Any, page: Path, shot: Shot, out: Path) -> None:
    context = browser.new_context(
        viewport={"width": shot.width, "height": shot.height},
        color_scheme=shot.scheme,
        offline=True,
        reduced_motion="reduce",
    )
    tab = context.new_page()
    tab.goto(page.resolve().as_uri())
    tab.wait_for_selector(".chart:not([data-drawn])", state="detached")
    if shot.anchor != "verdict":  # the verdict is what one sees first, head and all
        tab.evaluate(f"document.getElementById('{shot.anchor}').scrollIntoView()")
        tab.wait_for_timeout(200)
    tab.screenshot(path=out)
    context.close()
    print(f"{out}: {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["share", run]:
            share(Path(run))
        case ["shoot", page, folder]:
            shoot(Path(page), Path(folder))
        case _:
            sys.exit(__doc__)
