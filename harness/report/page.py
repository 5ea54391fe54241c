"""Runs -> one self-contained HTML page.  Pure: no clock, no network, the same runs give the same bytes."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from harness.report import verdict as head
from harness.report import view
from harness.report.charts import PALETTE, RUN_COLOURS, SHARED, Figure
from harness.report.section import Charts, Section
from harness.report.sections import SECTIONS
from harness.report.verdict import verdict
from harness.report.view import RunView

__all__ = ["PLOTLY_SHA256", "PLOTLY_VERSION", "RunView", "document", "plotly_source", "render", "verdict"]

# The npm package plotly.js-basic-dist-min (MIT), compressed with `gzip -9 -n`; the hash is of the source as published.
PLOTLY_VERSION = "4.1.1"
PLOTLY_SHA256 = "99784e3abfb07b142a15e521a439e6d9addceadb3f79553fd24c72774f0649ba"
OF_ALL = (
    "verdict",
    "compare",
)  # sections that tell of every run, however many there are; the others of as many as have room
_EAGER = 2  # charts drawn at once; the others when they come near


def render(runs: Sequence[RunView]) -> str:
    """The whole report of one run, or of several side by side, as one HTML document."""
    runs = view.named(runs)
    fit = runs[: view.room(runs)]
    shown = [view.thinned(run, view.MOST_OF_FEW // len(fit)) for run in fit] if len(fit) < 3 else fit
    cut = sum(len(view.points(run)) for run in fit) - sum(len(view.points(run)) for run in shown)
    meta = head.meta(runs) + (
        [f"{cut} of the points are in no chart or table here, but in summary.json"] if cut else []
    )
    contents = ((section, section.build(runs if section.id in OF_ALL else shown)) for section in SECTIONS)
    built = [(section, content) for section, content in contents if content is not None]
    return document(built, title=head.title(runs), meta=meta,
                    description=verdict(runs[0].summary) if runs else "An empty report.")  # fmt: skip


def document(
    built: Sequence[tuple[Section, Any]], *, title: str, description: str, meta: Sequence[str], forms: str = "forms.html.j2",
    source: str = "from the run's records alone", styles: Sequence[str] = ("style.css",),
) -> str:  # fmt: skip
    """One self-contained page: each section's content laid out by its form, a macro of the file `forms`; `styles` are its style sheets."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    blocks = [block for _, content in built if isinstance(content, Charts) for block in content.blocks]
    figures, texts = _pooled({block.id: block.figure for block in blocks if block.figure is not None})
    script = _asset("page.js")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=FunctionLoader(_asset)
    )
    environment.globals.update(glyphs=view.VERDICTS, severities=view.SEVERITIES)
    html = environment.get_template("template.html.j2").render(
        title=title,
        description=description,
        meta=meta,
        built=built,
        forms_file=forms,
        source=source,
        csp=_policy(script),
        # Markup marks our own style and script, and JSON made inert; no text of a run passes here.
        style=Markup(_palette_css() + "".join(map(_asset, styles))),
        script=Markup(script),
        data=Markup(
            _json(
                {"figures": figures, "texts": texts, "layout": SHARED, "dark": dict(PALETTE.values()), "eager": _EAGER}
            )
        ),
        plotly=_packed() if figures else "",
        plotly_version=PLOTLY_VERSION,
        licence=_asset("plotly-LICENSE.txt"),
    )
    return html.rstrip("\n") + "\n"


def _pooled(figures: Mapping[str, Figure]) -> tuple[dict[str, Figure], list[list[str]]]:
    """The figures with the place of their tooltips in a list of all: what is measured and predicted of a point share one."""
    pool: dict[tuple[str, ...], int] = {}

    def trace(data: Mapping[str, Any]) -> dict[str, Any]:
        said = data.get("hovertext")
        return {**data, "hovertext": pool.setdefault(tuple(said), len(pool))} if isinstance(said, list) else dict(data)

    found = {id: {**figure, "data": [trace(data) for data in figure["data"]]} for id, figure in figures.items()}
    return found, [list(texts) for texts in pool]


def _asset(name: str) -> str:
    # Universal newlines: a browser hashes a script with LF only, whatever the checkout made of it.
    return files(__package__).joinpath(name).read_text("utf-8")


@cache
def _compressed() -> bytes:
    return files(__package__).joinpath(f"plotly-basic-{PLOTLY_VERSION}.min.js.gz").read_bytes()


def plotly_source() -> bytes:
    """The vendored plotly.js, as published."""
    return gzip.decompress(_compressed())


def _packed() -> str:
    return base64.b64encode(_compressed()).decode("ascii")


def _policy(script: str) -> str:
    """The page may run its own script and plotly, and may load nothing.  Plotly writes inline styles."""
    own = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    plotly = base64.b64encode(bytes.fromhex(PLOTLY_SHA256)).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{own}' 'sha256-{plotly}'; style-src 'unsafe-inline'; "
        "img-src data: blob:; connect-src 'none'; base-uri 'none'; form-action 'none'"
    )


def _json(data: Any) -> str:
    """JSON that no HTML parser can take for markup."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)  # ASCII: U+2028/9 are escaped
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _palette_css() -> str:
    light = "".join(f"--{name}:{pair[0]};" for name, pair in PALETTE.items())
    dark = "".join(f"--{name}:{pair[1]};" for name, pair in PALETTE.items())
    runs = "".join(f"--run{k}:var(--{name});" for k, name in enumerate(RUN_COLOURS))
    return (
        f":root{{color-scheme:light;{light}{runs}}}\n"
        f"@media screen and (prefers-color-scheme:dark){{:root:not([data-theme=light]){{color-scheme:dark;{dark}}}}}\n"
        f"@media screen{{:root[data-theme=dark]{{color-scheme:dark;{dark}}}}}\n"
    )
