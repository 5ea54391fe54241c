"""What a machine can do at best: data rows, each with its source, and the row of a measured machine.

`hardware.csv` holds dense peaks in TFLOPS or TOPS (tensor rates with fp32 accumulation), memory in GB and GB/s, and
links in GB/s (one direction, one accelerator, summed over its links).  `link_group` is how many accelerators that link
joins where it is a bridge; wider groups talk over PCIe.  `aliases` are further exact names, among them those nvidia-smi
prints; one that stands in several rows is ambiguous and refused.  Values that are disputed or `[unverified: ...]` say
so in `notes`.  `prices.csv` has what an hour costs, with kind and date: the few that a source states.
"""

from __future__ import annotations

import csv
import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from harness import units
from harness.records import NAN, RidgelineError
from harness.theory.dtypes import BITS, kind_of

DTYPES = ("fp32", "tf32", "fp16", "bf16", "fp8", "int8", "fp4", "int4")
GIGA, TERA = 1e9, 1e12

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Products:
    """What an engine's own matrix products take on a CPU: `s_per_byte` of matrices by the `rows` multiplied with them
    (rising), of which an entry takes `entry_bytes`; its decode attention for each byte of the KV cache; the call of a kernel."""

    rows: tuple[float, ...]
    s_per_byte: tuple[float, ...]
    entry_bytes: float
    call_s: float = 0.0
    kv_s_per_byte: float = NAN

    @property
    def read_s_per_byte(self) -> float:
        """Of reading alone: some kernels for one row are slower than those for two."""
        return min(self.s_per_byte)

    @property
    def wide_s_per_byte(self) -> float:
        """Of each row where there are many."""
        return self.s_per_byte[-1] / self.rows[-1]

    def excess_s_per_byte(self, rows: Array) -> Array:
        """By how much products with so many rows take longer than reading, and than their share of a wide product."""
        took = np.exp(np.interp(np.log(np.maximum(rows, 1.0)), np.log(self.rows), np.log(self.s_per_byte)))
        return np.asarray(np.maximum(0.0, took - np.maximum(self.read_s_per_byte, rows * self.wide_s_per_byte)))


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
    products: dict[str, Products] = field(default_factory=dict)  # by the dtype of the weights, where they were measured

    def as_dict(self) -> dict[str, Any]:
        """The row as JSON takes it (NaN is null); `from_row` reads it back."""
        row = asdict(self)
        row["products"] = {dtype: _known(one) for dtype, one in row["products"].items()}
        return _known(row)

    def link_for(self, n: int) -> float:
        """Bytes per second and direction between `n` accelerators of a machine: the link, or PCIe beyond its bridge."""
        bridged = not self.link_group or n <= self.link_group
        if bridged and not math.isnan(self.link_bytes_per_s):
            return self.link_bytes_per_s
        return self.pcie_bytes_per_s

    @property
    def cpu(self) -> bool:
        """Whether it is a whole CPU machine: measured here, or a row of one."""
        return self.measured or self.name.startswith(("EPYC", "Xeon"))

    @property
    def caveats(self) -> tuple[str, ...]:
        """The parts of the notes that say a value is disputed or unverified, or the row itself a guess."""
        parts = (part.strip() for part in self.notes.replace("[unverified", ";[unverified").split(";"))
        doubtful = ("disputed", "[unverified", "assumed")
        return tuple(f"{self.name}: {p.strip('[]')}" for p in parts if p.startswith(doubtful))


def _known(row: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in row.items()}


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
    products = row.get("products") or {}
    if not isinstance(products, Mapping):
        raise RidgelineError(
            f"hardware row {name}: field 'products' must map a dtype to what was measured, got {products!r}"
        )
    kinds = sorted({kind_of(dtype) for dtype in BITS})
    if unknown := sorted(str(kind) for kind in products if kind not in kinds):
        raise RidgelineError(f"hardware row {name}: products: unknown dtype {unknown[0]!r}; known: {', '.join(kinds)}")
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
        products={dtype: _products(name, dtype, one) for dtype, one in products.items()},
    )


def _products(name: str, dtype: str, row: Mapping[str, Any]) -> Products:
    try:
        rows, took = (
            tuple(_positive(name, f"products.{dtype}.{k}", v) for v in row[k]) for k in ("rows", "s_per_byte")
        )
        alike = len(rows) == len(took) > 0 and list(rows) == sorted(set(rows)) and "entry_bytes" in row
    except (KeyError, TypeError):
        alike = False
    if not alike:
        raise RidgelineError(
            f"hardware row {name}: products.{dtype} must have as many rising `rows` as `s_per_byte`, and `entry_bytes`"
        )
    others = {key: _positive(name, f"products.{dtype}.{key}", row[key]) for key in ("entry_bytes", "call_s", "kv_s_per_byte")
              if key == "entry_bytes" or row.get(key)}  # fmt: skip
    return Products(rows, took, **others)


def _positive(name: str, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise RidgelineError(f"hardware row {name}: field {key!r} must be a positive number in SI units, got {value!r}")
    return float(value)


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Price:
    """What an hour of it costs, in US dollars: a list price, on demand, or a model of total cost of ownership."""

    hardware: str
    usd_per_h: float
    kind: str
    source: str
    date: str


def _csv(name: str) -> list[dict[str, str]]:
    """A table of the package: the only files that the theory reads."""
    return list(csv.DictReader(resources.files("harness.theory").joinpath(name).read_text("utf-8").splitlines()))


@cache
def prices(name: str) -> tuple[Price, ...]:
    """The prices of the row of this exact name, in the table's order; most have none, and theirs are the user's to
    give."""
    rows = (row for row in _csv("prices.csv") if row["hardware"] == name)
    return tuple(Price(name, float(row["usd_per_h"]), row["kind"], row["source"], row["date"]) for row in rows)


@cache
def _table() -> tuple[tuple[Hardware, tuple[str, ...]], ...]:
    """(row, its aliases) of hardware.csv."""
    return tuple((_from_csv(row), tuple(a for a in row["aliases"].split(";") if a)) for row in _csv("hardware.csv"))


def _from_csv(row: Mapping[str, str]) -> Hardware:
    def si(key: str, factor: float) -> float | None:
        return float(row[key]) * factor if row[key] else None

    # What somebody can rent it for; a cost of ownership is another thing and never taken for a price.
    price = next((p for p in prices(row["name"]) if p.kind in ("list", "on-demand")), None)
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
            "usd_per_h": price.usd_per_h if price else None,
            "source": row["source"],
            "notes": row["notes"],
            "measured": False,
            "price_source": f"{price.kind}, {price.source}, {price.date}" if price else "",
            "link_group": int(row["link_group"] or 0),
        }
    )


def catalogue() -> list[Hardware]:
    """Every row of the table, in its order."""
    return [row for row, _ in _table()]


VENDORS = {"nvidia", "amd", "intel", "google", "apple", "instinct", "tesla", "geforce"}


# What stands around a name in a table and is no part of it: how many (8x, x4, 2 ×), the chassis, a power limit.
_AROUND = re.compile(
    r"""^\s*\d+\s*[x×*]\s*
    | (?: (?<![a-z])(?<!mi\d\d\d) | (?<=\dgb) | (?<=\dg) | (?<=mi\d\d\dx) ) [x×*]\s*\d+\s*$  # the X of AMD's names is no times
    | \([^)]*\d\s*w\) | @?\s*\d+\s*w\b
    | \b(dgx|hgx)[ _-](?=[abh]\d)
    | \(r\) | \(tm\) | [()]""",
    re.VERBOSE,
)


def _key(name: str) -> str:
    """Case, order and kind of separator do not tell two names apart, nor does the maker; all else does (L40, L4)."""
    plain = re.sub(r"(?<=rtx|gtx)(?=\d)", " ", _AROUND.sub(" ", name.casefold()))
    plain = re.sub(r"\bgtx(?=[ _-][2-5]0\d0)", "rtx", plain)  # which there are no GTX of
    plain = re.sub(r"(?<![^\W_])(\d+) ?gi?b?\b", r"\1gb", plain)
    words = plain.replace("_", " ").replace("-", " ").replace("/", " ").split()
    return "-".join(sorted(word for word in words if word not in VENDORS) or sorted(words))


@cache
def _names() -> dict[str, tuple[Hardware, ...]]:
    """Name or alias -> its rows; a row's own name comes before the aliases of others."""
    names: dict[str, tuple[Hardware, ...]] = {_key(row.name): (row,) for row, _ in _table()}
    own = set(names)
    for row, aliases in _table():
        for alias in {_key(alias) for alias in aliases}:
            if alias not in own:
                names[alias] = (*names.get(alias, ()), row)
    return names


_OBVIOUS = re.compile(r"hbm\d?e?|gddr\d\w?|oam|gpu|accelerator|tensor|core|graphics|nvl72|generation|edition|blackwell")
_SIZE = re.compile(r"(\d+)gi?b")


def _rows(name: str) -> tuple[Hardware, ...]:
    """The rows of a name; else those of the longest name in it, if what is left is obvious (H200-141GB-HBM3e)."""
    if exact := _names().get(_key(name)):
        return exact
    words = set(_key(name).split("-"))
    found: dict[int, list[Hardware]] = {}
    for key, rows in _names().items():
        own = set(key.split("-"))
        fitting = [row for row in rows if own <= words and all(_is_obvious(word, row) for word in words - own)]
        found.setdefault(len(own), []).extend(fitting)
    longest = max((n for n, rows in found.items() if rows), default=0)
    return tuple({row.name: row for row in found.get(longest, ())}.values())


def _is_obvious(word: str, row: Hardware) -> bool:
    size = _SIZE.fullmatch(word)
    if re.fullmatch(r"sxm\d?", word):
        return not any(other in row.name for other in ("PCIe", "NVL", "RTX"))
    return bool(_OBVIOUS.fullmatch(word)) or bool(size and abs(int(size[1]) * GIGA / row.mem_bytes - 1) < 0.08)


def find(name: str) -> Hardware:
    """The row of this name or alias; capitals, order, spaces, hyphens and underscores do not matter.

    Raises RidgelineError for an unknown name (with the nearest ones) and an ambiguous one (with its variants).
    """
    rows = _rows(name)
    if len(rows) == 1:
        return rows[0]
    if rows:
        variants = ", ".join(row.name for row in rows)
        raise RidgelineError(f"hardware {name!r} is ambiguous: name one of {variants}")
    near = difflib.get_close_matches(_key(name), list(_names()), n=8, cutoff=0.4)
    found = list(dict.fromkeys(row.name for key in near for row in _names()[key]))[:5]
    nearest = f"the nearest are {', '.join(found)}" if found else f"known: {', '.join(r.name for r in catalogue())}"
    raise RidgelineError(f"hardware {name!r} is not in the table; {nearest}; for this machine run `ridgeline machine`")


def usual(name: str) -> Hardware:
    """As `find`, but an ambiguous name stands for its variant with the fastest link to all others and the most
    memory (A100: A100-SXM-80GB), and a caveat says that this was assumed.  For tables that others wrote."""
    rows = _rows(name)
    if len(rows) < 2:
        return find(name)
    row = max(rows, key=lambda r: (not r.link_group, r.link_bytes_per_s, r.mem_bytes))
    others = ", ".join(r.name for r in rows if r is not row)
    return replace(row, notes=f"{row.notes}; assumed: {name!r} is taken as {row.name}, not {others}".lstrip("; "))


# --- rows of the user -------------------------------------------------------------------------------------------------

_YAML = {"mem": "mem_bytes", "bandwidth": "bytes_per_s", "link": "link_bytes_per_s", "pcie": "pcie_bytes_per_s"}


def from_yaml(text: str, where: str) -> list[Hardware]:
    """The user's own rows: a YAML list of mappings, or one mapping.  `where` (the file) opens each message.

    Keys are the fields of Hardware in SI units, or mem, bandwidth, link and pcie with a unit ("80 GB", "3.35 TB/s");
    rates in `flops` may be written "989T".  `like: NAME` takes from that row of the table what is not given.
    """
    try:
        rows = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise RidgelineError(f"{where}: not YAML ({' '.join(str(error).split())[:120]})") from error
    rows = [rows] if isinstance(rows, Mapping) else rows
    if not isinstance(rows, list) or not rows or not all(isinstance(row, Mapping) for row in rows):
        raise RidgelineError(f"{where}: expected a hardware row (name, flops, mem, bandwidth) or a list of them")
    return [_from_user({str(key): value for key, value in row.items()}, where) for row in rows]


def _from_user(row: dict[str, Any], where: str) -> Hardware:
    given = {_YAML.get(key, key): value for key, value in row.items() if key != "like"}
    for key in _YAML.values():
        if isinstance(given.get(key), str):
            given[key] = units.parse(given[key].removesuffix("/s"), "bytes", f"{where}: {key}")
    if isinstance(given.get("flops"), Mapping):
        given["flops"] = {
            str(dtype): units.parse(rate, "count", f"{where}: flops.{dtype}") if isinstance(rate, str) else rate
            for dtype, rate in given["flops"].items()
        }
    base: dict[str, Any] = {"measured": False, "source": where}
    if "like" in row:
        try:
            like = find(str(row["like"]))
        except RidgelineError as error:
            raise RidgelineError(f"{where}: like: {error}") from None
        base = like.as_dict() | {"name": f"{like.name} ({where})", "source": f"{where}, else {like.source}"}
    try:
        return from_row(base | given)
    except RidgelineError as error:
        raise RidgelineError(f"{where}: {error}") from None
