"""What a machine can do at best: data rows, each with its source, and the row of a measured machine.

`hardware.csv` holds dense peaks in TFLOPS or TOPS (tensor rates with fp32 accumulation), memory in GB and GB/s, links
in GB/s (one direction, one accelerator, summed over its links) and US dollars an hour.  `link_group` is how many
accelerators that link joins where it is a bridge; wider groups talk over PCIe.  `aliases` are further exact names,
among them those nvidia-smi prints; one that stands in several rows is ambiguous and refused.  Values that are disputed
or `[unverified: ...]` say so in `notes`.
"""

from __future__ import annotations

import csv
import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib import resources
from typing import Any

from harness.records import NAN, RidgelineError

DTYPES = ("fp32", "tf32", "fp16", "bf16", "fp8", "int8", "fp4", "int4")
GIGA, TERA = 1e9, 1e12


@dataclass(frozen=True, slots=True)
class Hardware:
    """One accelerator, or one whole CPU machine.  SI units; NaN where nothing is known.

    `flops` maps a dtype to dense FLOP/s (or OP/s) and holds only the dtypes the hardware has.
    """

    name: str
    vendor: str
    flops: dict[str, float]
    mem_bytes: float
    bytes_per_s: float
    link_bytes_per_s: float = NAN
    pcie_bytes_per_s: float = NAN
    tdp_w: float = NAN
    usd_per_h: float = NAN
    source: str = ""
    notes: str = ""
    measured: bool = False
    price_source: str = ""
    link_group: int = 0  # 0: the link joins every accelerator of the machine

    def as_dict(self) -> dict[str, Any]:
        """The row as JSON takes it (NaN is null); `from_row` reads it back."""
        row = asdict(self)
        return {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in row.items()}

    def link_for(self, n: int) -> float:
        """Bytes per second and direction between `n` accelerators of a machine: the link, or PCIe beyond its bridge."""
        bridged = not self.link_group or n <= self.link_group
        if bridged and not math.isnan(self.link_bytes_per_s):
            return self.link_bytes_per_s
        return self.pcie_bytes_per_s

    @property
    def caveats(self) -> tuple[str, ...]:
        """The parts of the notes that say a value is disputed or unverified."""
        parts = (part.strip() for part in self.notes.replace("[unverified", ";[unverified").split(";"))
        return tuple(f"{self.name}: {p.strip('[]')}" for p in parts if p.startswith(("disputed", "[unverified")))


def from_row(row: Mapping[str, Any]) -> Hardware:
    """A row built from a mapping with the fields of Hardware as keys, as `Hardware.as_dict` writes them.

    Needs name, flops (dtype -> FLOP/s), mem_bytes and bytes_per_s; null or absent means unknown elsewhere.  A row
    without `measured` counts as measured.  Raises RidgelineError naming the field.
    """
    known = {f.name for f in fields(Hardware)}
    if unknown := sorted(set(row) - known):
        raise RidgelineError(f"hardware row: unknown field {unknown[0]!r}; known: {', '.join(sorted(known))}")
    name = row.get("name")
    if not isinstance(name, str) or not name.strip():
        raise RidgelineError("hardware row: field 'name' must be a text that is not empty")
    flops = row.get("flops")
    if not isinstance(flops, Mapping) or not flops:
        raise RidgelineError(f"hardware row {name}: field 'flops' must map a dtype ({', '.join(DTYPES)}) to FLOP/s")
    if unknown := sorted(str(d) for d in flops if d not in DTYPES):
        raise RidgelineError(f"hardware row {name}: flops: unknown dtype {unknown[0]!r}; known: {', '.join(DTYPES)}")
    group = row.get("link_group") or 0
    if not isinstance(group, int) or group < 0:
        raise RidgelineError(f"hardware row {name}: field 'link_group' must be a whole number, got {group!r}")
    return Hardware(
        name=name.strip(),
        vendor=str(row.get("vendor") or ""),
        flops={dtype: _positive(name, f"flops.{dtype}", value) for dtype, value in flops.items()},
        mem_bytes=_positive(name, "mem_bytes", row.get("mem_bytes")),
        bytes_per_s=_positive(name, "bytes_per_s", row.get("bytes_per_s")),
        **{
            key: NAN if row.get(key) is None else _positive(name, key, row[key])
            for key in ("link_bytes_per_s", "pcie_bytes_per_s", "tdp_w", "usd_per_h")
        },
        source=str(row.get("source") or ""),
        notes=str(row.get("notes") or ""),
        measured=bool(row.get("measured", True)),
        price_source=str(row.get("price_source") or ""),
        link_group=group,
    )


def _positive(name: str, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise RidgelineError(f"hardware row {name}: field {key!r} must be a positive number in SI units, got {value!r}")
    return float(value)


@cache
def _table() -> tuple[tuple[Hardware, tuple[str, ...]], ...]:
    """(row, its aliases) of hardware.csv: the one file that the theory reads, and it is part of the package."""
    text = resources.files("harness.theory").joinpath("hardware.csv").read_text("utf-8")
    return tuple(
        (_from_csv(row), tuple(a for a in row["aliases"].split(";") if a)) for row in csv.DictReader(text.splitlines())
    )


def _from_csv(row: Mapping[str, str]) -> Hardware:
    def si(key: str, factor: float) -> float | None:
        return float(row[key]) * factor if row[key] else None

    return from_row(
        {
            "name": row["name"],
            "vendor": row["vendor"],
            "flops": {dtype: float(row[dtype]) * TERA for dtype in DTYPES if row[dtype]},
            "mem_bytes": si("mem_gb", GIGA),
            "bytes_per_s": si("mem_bw_gb_s", GIGA),
            "link_bytes_per_s": si("link_gb_s", GIGA),
            "pcie_bytes_per_s": si("pcie_gb_s", GIGA),
            "tdp_w": si("tdp_w", 1),
            "usd_per_h": si("usd_h", 1),
            "source": row["source"],
            "notes": row["notes"],
            "measured": False,
            "price_source": row["usd_h_source"],
            "link_group": int(row["link_group"] or 0),
        }
    )


def catalogue() -> list[Hardware]:
    """Every row of the table, in its order."""
    return [row for row, _ in _table()]


def _key(name: str) -> str:
    """Case and the kind of separator do not tell two names apart; everything else does (L40 is not L4)."""
    return "-".join(name.casefold().replace("_", " ").replace("-", " ").split())


@cache
def _names() -> dict[str, tuple[Hardware, ...]]:
    """Name or alias -> its rows; a row's own name comes before the aliases of others."""
    names: dict[str, tuple[Hardware, ...]] = {_key(row.name): (row,) for row, _ in _table()}
    own = set(names)
    for row, aliases in _table():
        for alias in map(_key, aliases):
            if alias not in own:
                names[alias] = (*names.get(alias, ()), row)
    return names


def find(name: str) -> Hardware:
    """The row of this exact name or alias; capitals, spaces, hyphens and underscores do not matter.

    Raises RidgelineError for an unknown name (with the nearest ones) and an ambiguous one (with its variants).
    """
    rows = _names().get(_key(name), ())
    if len(rows) == 1:
        return rows[0]
    if rows:
        variants = ", ".join(row.name for row in rows)
        raise RidgelineError(f"hardware {name!r} is ambiguous: name one of {variants}")
    near = difflib.get_close_matches(_key(name), list(_names()), n=8, cutoff=0.4)
    found = list(dict.fromkeys(row.name for key in near for row in _names()[key]))[:5]
    nearest = f"the nearest are {', '.join(found)}" if found else f"known: {', '.join(r.name for r in catalogue())}"
    raise RidgelineError(f"hardware {name!r} is not in the table; {nearest}; for this machine run `ridgeline machine`")
