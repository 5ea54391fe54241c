"""The committed example: current, small, offline, and without a trace of the machine that made it."""

from __future__ import annotations

import html
import re
import shutil
from pathlib import Path

import pytest

from harness import command, store
from tests import gallery

ROOT = Path(__file__).parent.parent
EXAMPLE, RECORDS = ROOT / "reports" / "example.html", ROOT / "results" / "reference" / "example"
FOLDERS = re.compile(r"(?<![\w:/.<…])/(?:work|tmp|home|root|Users|mnt|opt|usr|var|srv|data)/")


def test_the_example_is_small_and_the_readme_shows_it() -> None:
    assert 100_000 < EXAMPLE.stat().st_size < 1_000_000
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"reports/(example[\w.-]+)", readme))
    assert named == {"example.html", *(f"example-{shot.name}.png" for shot in gallery.SHOTS)}
    for name in named - {"example.html"}:
        picture = (ROOT / "reports" / name).read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) < 300_000


def test_the_example_is_of_the_stored_records(tmp_path: Path) -> None:
    folder = shutil.copytree(RECORDS, tmp_path / "example")
    asked = store.info(RECORDS)["scenario"]["workload"]
    planned = sum(asked["batch_sizes"]) * asked["waves"] * asked["trials"]
    assert store.load(RECORDS).events  # without them nothing tells how the client fared, and all would seem valid
    summary = command.summarise(folder)
    points, page = summary["points"], html.unescape(EXAMPLE.read_text(encoding="utf-8"))
    assert summary["verdict_sentence"] in page
    assert len(points) == 4 and sum(point["requests"] for point in points) == planned
    assert all(f"{point['ttft_s']['n']}</td>" in page for point in points)
    assert 'id="verdict"' in page and store.read_json(folder / store.RUN)["model"] in page


@pytest.mark.parametrize(
    "path", [EXAMPLE, *(p for p in sorted(RECORDS.iterdir()) if p.suffix != ".parquet")], ids=lambda p: p.name
)
def test_nothing_of_the_machine_is_in_it(path: Path) -> None:
    text = re.sub(r'id="plotly">[^<]*', "", path.read_text(encoding="utf-8"))
    assert not FOLDERS.findall(text)
    assert not re.findall(r"https?://(?!127\.0\.0\.1)[^\s\"<]+", text)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("at /home/me/proj/.venv/bin/python", "at .venv/bin/python"),
        ("cwd /home/me/proj.", "cwd .."),
        ("in /home/me/models/x.gguf", "in models/x.gguf"),
        ('"/opt/cuda/lib64/libx.so"', '"…/libx.so"'),
        (
            "file:///var/run/sock and http://127.0.0.1:1/v1/chat/completions",
            "file:… and http://127.0.0.1:1/v1/chat/completions",
        ),
        ("POST /v1/chat/completions, 3/4 of 5", "POST /v1/chat/completions, 3/4 of 5"),
        ("on gpu-node-17, not gpu-node-171", "on host, not gpu-node-171"),
    ],
)
def test_a_shared_text_has_no_folder_and_no_host(text: str, left: str) -> None:
    assert gallery.anonymous(text, "/home/me/proj", "/home/me", "gpu-node-17") == left
