"""The report as Markdown and as JSON: what stands in it, that it fits, and that no text of a run gets out of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from harness import comparison, gate_text, store
from harness import markdown as md
from harness.report import formats
from harness.report.view import RunView
from tests import report_samples as samples
from tests.conftest import one_object
from tests.gate_samples import figures, trials

GFM = MarkdownIt("gfm-like")  # with HTML and bare links on, as on GitHub
MOST_BYTES = 60_000
HOSTILE = [
    samples.HOSTILE,
    samples.HOSTILE_LINK,
    "![x](http://127.0.0.1/beacon.png) [x](javascript:alert(1)) <https://a.b> http://a.b www.a.b x@a.b",
    "| a | b |\n|---|---|\n| c | d |\n\n# heading\n- item\n```\ncode",
    "# heading", "- item", "1. item", "> quote", "---", "===", "***", "```", "~~~", "    code", "[x]: http://a.b 'y'",
    "*a* **b** _c_ ~~d~~ `e` $f$ @somebody org/repo#1 #1 GH-1 &lt;b&gt; &#60;b&#62; \\<b> \\| x",
]  # fmt: skip
TAGS = {
    "p",
    "h2",
    "h3",
    "strong",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "ul",
    "li",
    "pre",
    "code",
    "details",
    "summary",
}


def rendered(text: str) -> str:
    return str(GFM.render(text))


def tags(html: str) -> set[str]:
    return set(re.findall(r"<\s*(\w+)", html))


@pytest.mark.parametrize("text", HOSTILE)
def test_foreign_text_is_text_wherever_it_stands(text: str) -> None:
    said = md.inert(text)
    assert "\n" not in said and not re.search(r"@\w|\w#\d|(?<!\w)#\d|GH-\d", said)
    for place in (said, f"- {said}", f"**{md.inert('name')}**, {said}", "\n".join(md.table(["a", "b"], [[said, "1"]]))):
        html = rendered(place)
        assert tags(html) <= {"p", "ul", "li", "strong", "table", "thead", "tbody", "tr", "th", "td"}, html
        assert html.count("<tr>") in (0, 2) and html.count("<td") in (0, 2), html


@pytest.mark.parametrize("text", HOSTILE)
def test_a_block_of_code_holds_its_text(text: str) -> None:
    html = rendered("\n".join([*md.code(text), "", "after"]))
    assert tags(html) == {"pre", "code", "p"} and html.endswith("<p>after</p>\n")


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_run_adds_nothing_to_the_report(text: str) -> None:
    runs = [samples.hostile(text), samples.hostile(text)]
    said = formats.markdown(runs)
    html = rendered(said)
    assert tags(html) <= TAGS, tags(html) - TAGS
    assert html.count("<details>") == html.count("</details>") <= 1
    assert len(said.encode()) < MOST_BYTES
    assert not set(said) & set("\u2028\u2029\x00\u202e")


def test_what_decides_is_in_it() -> None:
    run = samples.sample()
    said = formats.markdown([run])
    html = rendered(said)
    assert run.summary["verdict_sentence"] in said
    assert "**▲ suspect**" in said
    assert html.count("<tr>") == 2 + 2 * (1 + len(run.summary["points"]))
    assert "**? cannot tell** no objective was stated" in said
    first = run.summary["points"][0]
    assert f"{first['output_tokens_per_s']:.2f}"[:4] in said and "450.3 ms" in said and "1.18×" in said
    assert "† (n 12)" in said
    assert "2 of 96 failed" in said
    assert "ridgeline run scenarios/quickstart.yaml" in said
    for point in run.summary["points"]:
        for finding in point["findings"]:
            assert f"**{finding['code']}**" in said and finding["saw"][:20] in said


@pytest.mark.parametrize("runs", [[], [samples.empty()], [RunView({}, {})], [samples.empty(), samples.sample()],
                                  [samples.without_theory()], [samples.open_loop()]])  # fmt: skip
def test_a_run_that_lacks_something_still_has_a_report(runs: list[RunView]) -> None:
    said = formats.markdown(runs)
    assert said.startswith("## ") and not re.search(r"\b(nan|None|null|NaN)\b", said)
    json.dumps(formats.data(runs))


def test_many_points_are_cut_and_the_first_is_kept() -> None:
    said = formats.markdown([samples.batches(60)] * 12)
    assert len(said.encode()) < MOST_BYTES and "more lines do not fit" in said and said.startswith("## ")


def test_neither_form_has_a_secret() -> None:
    run = samples.sample()
    data = {
        "api_key": "hunter2",
        "url": "http://user:hunter2@h/v1?key=hunter2",
        "args": ["--api-key", "hunter2", "--port=1"],
    }
    command = ["ridgeline", "run", "--api-key", "hunter2"]
    view = RunView(
        run.summary | {"engine": data}, run.run | {"engine": data, "scenario": {"engine": data}, "command": command}
    )
    for runs in ([view], [run, view]):
        assert "hunter2" not in formats.markdown(runs)
        assert "hunter2" not in json.dumps(formats.data(runs))


def test_the_same_runs_give_the_same_bytes() -> None:
    runs = [samples.sample(), samples.batches(3)]
    assert formats.markdown(runs) == formats.markdown(runs)
    assert json.dumps(formats.data(runs)) == json.dumps(formats.data(runs))


@pytest.mark.full
def test_the_command_writes_each_form_of_two_real_runs(
    simulated: Callable[..., str], ridgeline: Callable[..., Any], tmp_path: Path
) -> None:
    """The second server's tokens take three times as long at batch 1: five short trials see it."""
    for name, itl in (("one", "4ms"), ("two", "12ms")):
        url = simulated("--ttft-base", "10ms", "--itl-base", itl, "--itl-per-batch", "0.1ms", "--slots", "4")
        done = ridgeline("run", "--url", url, "--batch-sizes", "1,2", "--waves", "1", "--trials", "5", "--input-tokens", "64",
                         "--output-tokens", "20", "--no-report", "--out", name)  # fmt: skip
        assert done.returncode == 0, done.stderr
    said = ridgeline("report", "one", "two", "--format", "md")
    assert said.returncode == 0, said.stderr
    assert "### Comparison" in said.stdout and "↓ worse" in said.stdout
    found = one_object(ridgeline("report", "one", "two", "--format", "json").stdout)
    assert [run["points"] for run in found["runs"]] == [
        store.read_json(tmp_path / n / "summary.json")["points"] for n in ("one", "two")
    ]
    itl = next(c for c in found["comparison"]["changes"] if (c["key"], c["metric"]) == ("batch 1", "itl_p50"))
    assert itl["word"] == "worse" and min(itl["trials"]) >= 4 and 1 < itl["harm"] < 3
    assert itl["low"] < itl["harm"] < itl["high"]
    assert found["comparison"]["differs"].keys() >= {"server", "started"}
    done = ridgeline("report", "one", "two", "--format", "md", "-o", "both.md")
    assert "report: both.md" in done.stdout and (tmp_path / "both.md").read_text() == said.stdout
    pages = []
    for seed in ("1", "2"):
        ridgeline("report", "one", "two", env={"PYTHONHASHSEED": seed, "TZ": f"UTC-{seed}", "LC_ALL": "C"})
        pages.append((tmp_path / "one" / "report.html").read_bytes())
    assert pages[0] == pages[1] and b'id="compare"' in pages[0]
    refused = ridgeline("report", "one", "--format", "pdf")
    assert refused.returncode == 2 and "known: html, md, json" in refused.stderr


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_run_adds_nothing_to_the_gates_summary(text: str) -> None:
    base = figures({"b1": trials()}) | {"name": text}
    new = figures({"b1": trials(1.2)}) | {"name": text, "shown": {"engine version": text}}
    new["points"][text[:60]] = new["points"]["b1"]
    found = store.clean(comparison.compare(base, new, comparison.Options()))
    html = rendered(gate_text.markdown(found))
    assert tags(html) <= TAGS and html.count("<table>") == 2 and "<strong>fail</strong>" in html
