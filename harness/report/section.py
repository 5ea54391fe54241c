"""What a section of the report is made of.  A new one is a builder here or in a module of its own, and a row of SECTIONS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.report.charts import Figure
from harness.report.tables import Table
from harness.report.view import RunView


@dataclass(frozen=True, slots=True)
class Block:
    """A chart with its finding in one sentence, how to read it, and the same figures as a table.  Ids are unique on the
    page; without a figure only the table is shown, and `missing` says why there is nothing to draw."""

    id: str
    title: str
    finding: str
    read: str
    table: Table
    figure: Figure | None = None
    missing: str = "Nothing to draw: no value was measured or predicted."
    high: bool = False
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Charts:
    """The content of a section of charts: side by side, `stacked` beneath each other, or `tall` ones.  `otherwise` is
    said where there is none."""

    blocks: list[Block]
    tall: bool = False
    stacked: bool = False
    notices: list[str] = field(default_factory=list)
    legend: list[tuple[int, str]] = field(default_factory=list)
    otherwise: str = ""
    lead: str = ""
    marks: str = ""  # what the legend tells of several runs, instead of hatched and solid


@dataclass(frozen=True, slots=True)
class Parts:
    """The content of a section of text and tables; what is empty is left out."""

    lead: str = ""
    tables: Sequence[Table] = ()
    points: Sequence[str] = ()
    command: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """One section: its anchor and heading, the macro of forms.html.j2 that lays it out, and what makes its content
    (None: the section is left out)."""

    id: str
    title: str
    form: str
    build: Callable[[Sequence[RunView]], Any]
