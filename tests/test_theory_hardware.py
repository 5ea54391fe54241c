"""The hardware table: each row with its source, exact names only."""

from __future__ import annotations

import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.records import RidgelineError
from harness.theory import hardware

ROWS = hardware.catalogue()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_has_a_source_and_positive_numbers(row):
    assert row.source
    assert not row.measured
    numbers = [row.mem_bytes, row.bytes_per_s, *row.flops.values()]
    assert all(math.isfinite(n) and n > 0 for n in numbers)
    optional = (row.link_bytes_per_s, row.pcie_bytes_per_s, row.tdp_w, row.usd_per_h)
    assert all(math.isnan(n) or n > 0 for n in optional)
    assert math.isnan(row.usd_per_h) or row.price_source
    assert 1e9 <= row.mem_bytes <= 1e12
    assert 5e10 <= row.bytes_per_s <= 1e13, "GB/s, not another unit"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_no_peak_includes_sparsity(row):
    """Dense rates halve with each doubling of the width, and never quarter."""
    halves = [("fp16", "fp8"), ("bf16", "fp8"), ("fp16", "int8"), ("tf32", "fp16")]
    for wide, narrow in halves:
        if wide in row.flops and narrow in row.flops and row.flops[narrow] > row.flops[wide]:
            assert row.flops[narrow] / row.flops[wide] <= 4.1


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_doubt_names_its_value_and_a_source_can_be_looked_up(row):
    """No row rests on memory alone: what was not found is said value by value."""
    assert row.notes.count("[unverified") == len(re.findall(r"\[unverified: [^\]]{2,}\]", row.notes))
    assert "not checked" not in row.notes
    assert re.search(r"\w\.\w+/|\w/\w|\d{4}\.\d|rows? \w|as [A-Z]", row.source), "an address, a repository or a row"


def test_the_rows_that_the_articles_need_are_there():
    needed = (
        "T4 L4 A10 A100-SXM-40GB A100-PCIe-40GB A100-SXM-80GB A100-PCIe-80GB H100-PCIe-80GB H100-NVL-94GB "
        "H100-SXM-80GB H200-SXM L40S RTX-4090"
    )
    assert set(needed.split()) <= {row.name for row in ROWS}
    assert hardware.find("H100-SXM-80GB").flops["bf16"] == 989.4e12
    assert hardware.find("T4").bytes_per_s == 320e9


@pytest.mark.parametrize("name", ["T4", "A10", "RTX-3090", "B200-SXM", "B300-SXM", "EPYC-9654"])
def test_disputed_and_unverified_values_say_so(name):
    assert any("disputed" in c or "unverified" in c for c in hardware.find(name).caveats)


@pytest.mark.parametrize(
    ("asked", "row"),
    [
        ("l4", "L4"),
        ("L40", "L40"),
        ("nvidia l40s", "L40S"),
        ("H100-SXM", "H100-SXM-80GB"),
        ("h100_sxm", "H100-SXM-80GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-SXM-80GB"),
        ("NVIDIA A100 80GB PCIe", "A100-PCIe-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100-SXM-80GB"),
        ("NVIDIA H200", "H200-SXM"),
        ("Tesla T4", "T4"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("AMD Instinct MI300X", "MI300X"),
        ("A100-80GB-SXM", "A100-SXM-80GB"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX-PRO-6000-Blackwell-Server"),
        ("Intel(R) Arc(TM) Pro B60 Graphics", "Arc-Pro-B60"),
        ("AMD EPYC 9654 96-Core Processor", "EPYC-9654"),
        ("b300_sxm", "B300-SXM"),
        ("MI250-GCD", "MI250-GCD"),
        ("Max1550-PVC", "Max-1550-PVC"),
        ("Gaudi2", "Gaudi2"),
        ("GH200-96GB", "GH200-96GB"),
        ("RTX-PRO-6000", "RTX-PRO-6000-Blackwell-Server"),
        ("NVIDIA H200 141GB HBM3e", "H200-SXM"),
        ("NVIDIA H100 SXM5 80GB HBM3", "H100-SXM-80GB"),
        ("GeForce RTX 4090 24GB", "RTX-4090"),
        ("AMD Instinct MI300X OAM 192GB", "MI300X"),
        ("B200 192GB", "B200-SXM"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX-4070-Ti-SUPER"),
        ("NVIDIA GeForce RTX 5070 Ti", "RTX-5070-Ti"),
        ("DGX Spark", "GB10"),
        ("Strix Halo", "Ryzen-AI-Max-395"),
        ("AMD Radeon RX 7900 XT", "RX-7900-XT"),
        ("TPU7x", "TPU-v7"),
        ("trn3", "Trainium3"),
    ],
)
def test_a_name_or_an_alias_finds_its_row(asked, row):
    assert hardware.find(asked).name == row


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_is_found_by_its_own_name(row):
    assert hardware.find(row.name.upper()) is row


@pytest.mark.parametrize(("asked", "variants"), [("A100", 4), ("NVIDIA H100", 3), ("A100-80GB", 2)])
def test_an_ambiguous_name_is_refused_with_its_variants(asked, variants):
    with pytest.raises(RidgelineError, match="ambiguous") as error:
        hardware.find(asked)
    assert str(error.value).split("name one of ")[1].count(",") == variants - 1


def test_an_unknown_name_lists_near_ones():
    with pytest.raises(RidgelineError, match="H100-SXM-80GB"):
        hardware.find("H100-SMX-80GB")
    for name in ("abacus", "", "gpu", "H200-80GB", "RTX 4090 48GB", "L40 S", "MI300X mk 2"):
        with pytest.raises(RidgelineError, match="ridgeline machine"):
            hardware.find(name)


@pytest.mark.parametrize(("asked", "row"), [("A100", "A100-SXM-80GB"), ("H100", "H100-SXM-80GB"), ("T4", "T4")])
def test_the_usual_variant_of_an_ambiguous_name_says_that_it_was_assumed(asked, row):
    found = hardware.usual(asked)
    assert found.name == row
    assert any("assumed" in caveat and repr(asked) in caveat for caveat in found.caveats) == (asked != row)


def test_prices_carry_their_kind_source_and_date():
    kinds = {price.kind for row in ROWS for price in hardware.prices(row.name)}
    assert kinds == {"list", "on-demand", "3-year TCO model"}
    assert all(price.source and price.date for row in ROWS for price in hardware.prices(row.name))
    assert [p.usd_per_h for p in hardware.prices("A10")] == [1.2072, 1.29]
    assert hardware.find("A10").usd_per_h == 1.2072
    assert "2023" in hardware.find("A10").price_source
    assert math.isnan(hardware.find("MI300X").usd_per_h), "a cost of ownership is no price"


def test_every_kind_of_hardware_is_there():
    assert {row.vendor for row in ROWS} >= {"NVIDIA", "AMD", "Intel", "Google", "AWS", "Apple"}
    assert {"TPU-v5e", "Gaudi3", "MI300X", "Apple-M4-Max-40c", "EPYC-9654", "Xeon-8480+"} <= {row.name for row in ROWS}


USER = """
- name: my-card
  flops: {bf16: 100T, fp8: 200e12}
  mem: 48 GB
  bandwidth: 1.5 TB/s
  link: 50GB/s
  tdp_w: 300
  usd_per_h: 0.9
- name: our H100
  like: H100-SXM
  usd_per_h: 1.75
"""


def test_rows_of_the_user_are_read_with_units_or_like_another():
    mine, ours = hardware.from_yaml(USER, "mine.yaml")
    assert (mine.flops, mine.mem_bytes, mine.bytes_per_s) == ({"bf16": 100e12, "fp8": 200e12}, 48e9, 1.5e12)
    assert (mine.link_for(8), mine.tdp_w, mine.usd_per_h, mine.source) == (50e9, 300, 0.9, "mine.yaml")
    assert not mine.measured
    known = hardware.find("H100-SXM")
    assert (ours.name, ours.usd_per_h, ours.flops, ours.tdp_w) == ("our H100", 1.75, known.flops, known.tdp_w)
    assert hardware.from_yaml("{like: T4}", "a.yaml")[0].name == "T4 (a.yaml)"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "expected a hardware row"),
        ("- 5", "expected a hardware row"),
        ("a: [", "not YAML"),
        ("[" * 5000, "not YAML"),
        ("name: x", "flops"),
        ("{like: H100-SMX}", "H100"),
        ("{like: T4, mem: 16 cows}", "mem_bytes"),
        ("{like: T4, flops: {fp16: fast}}", "flops.fp16"),
        ("{like: T4, flops: {fp17: 1}}", "fp17"),
        ("{like: T4, wheels: 4}", "wheels"),
    ],
)
def test_a_wrong_row_of_the_user_is_refused_where_it_stands(text, named):
    with pytest.raises(RidgelineError, match=named) as error:
        hardware.from_yaml(text, "mine.yaml")
    assert str(error.value).startswith("mine.yaml")


def test_a_bridge_joins_two_and_more_talk_over_pcie():
    bridged, switched = hardware.find("A100-PCIe-80GB"), hardware.find("A100-SXM-80GB")
    assert bridged.link_for(2) == 300e9
    assert bridged.link_for(4) == 32e9
    assert switched.link_for(8) == 300e9
    assert math.isnan(hardware.find("Apple-M4-Max-40c").link_for(2))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_survives_json(row):
    again = hardware.from_row(json.loads(json.dumps(row.as_dict(), allow_nan=False)))
    assert repr(again) == repr(row)


PRODUCTS = {"rows": [1, 2, 512], "s_per_byte": [1e-10, 2e-10, 1e-8], "entry_bytes": 2, "call_s": 1e-5}
MEASURED = {"name": "here", "flops": {"fp32": 1e11}, "mem_bytes": 16e9, "bytes_per_s": 4e10}


def test_measured_products_are_kept_as_they_were():
    row = hardware.from_row(MEASURED | {"products": {"q4_1": PRODUCTS}})
    assert json.loads(json.dumps(row.as_dict()))["products"]["q4_1"] == PRODUCTS | {"kv_s_per_byte": None}
    assert repr(hardware.from_row(row.as_dict())) == repr(row)


def test_a_measured_row_needs_four_fields():
    row = hardware.from_row(MEASURED)
    assert row.measured
    assert math.isnan(row.usd_per_h)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"bytes_per_s": 0}, "bytes_per_s"),
        ({"products": {"bf16": PRODUCTS | {"entry_bytes": 0}}}, "products.bf16.entry_bytes"),
        ({"products": {"bf16": PRODUCTS | {"rows": [1, 2]}}}, "products.bf16"),
        ({"products": {"bf16": PRODUCTS | {"rows": [4, 2, 8]}}}, "products.bf16"),
        ({"products": {"bf16": {"rows": [1]}}}, "products.bf16"),
        ({"products": {"bf16": 3}}, "products.bf16"),
        ({"products": {"q4_k_m": PRODUCTS}}, "unknown dtype 'q4_k_m'; known: bf16, .*q4_k"),
        ({"products": [PRODUCTS]}, "products"),
        ({"bytes_per_s": math.nan}, "bytes_per_s"),
        ({"bytes_per_s": "4e10"}, "bytes_per_s"),
        ({"mem_bytes": None}, "mem_bytes"),
        ({"flops": {}}, "flops"),
        ({"flops": {"fp33": 1.0}}, "fp33"),
        ({"flops": {"fp32": -1.0}}, "flops.fp32"),
        ({"name": ""}, "name"),
        ({"link_group": "two"}, "link_group"),
        ({"bandwith": 1}, "bandwith"),
    ],
)
def test_a_wrong_field_is_named(change, named):
    with pytest.raises(RidgelineError, match=named):
        hardware.from_row(MEASURED | change)


ANYTHING = st.from_type(object).filter(lambda value: value is not NotImplemented)  # which will have no truth value


@settings(deadline=None)  # a busy machine is no bug
@given(st.dictionaries(st.sampled_from([*sorted(MEASURED), "measured", "notes"]), ANYTHING | st.none()))
def test_a_row_is_built_or_refused_in_one_sentence(change):
    try:
        assert hardware.from_row(MEASURED | change).bytes_per_s > 0
    except RidgelineError as error:
        assert "hardware row" in str(error)
