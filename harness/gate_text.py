"""A comparison (see `comparison`) -> text for a terminal, Markdown, JUnit XML, annotations of GitHub Actions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree as xml

from harness import markdown as md
from harness import units

ANNOTATIONS = 10
SIGNS = {"pass": "PASS", "fail": "FAIL", "inconclusive": "INCONCLUSIVE", "invalid": "INVALID"}
_BARRED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")  # what XML 1.0 cannot hold

Row = Mapping[str, Any]


def figure(row: Row, value: float | None) -> str:
    return units.rate(value) if row["metric"].endswith("per_s") else units.seconds(value)


def change(row: Row) -> str:
    """+4.1 % [+2.0 %, +6.3 %]"""
    if units.is_missing(row["change"]):
        return units.MISSING
    if units.is_missing(row["change_low"]):
        return f"{_signed(row['change'])} (no interval)"
    return f"{_signed(row['change'])} [{_signed(row['change_low'])}, {_signed(row['change_high'])}]"


def _signed(share: float) -> str:
    text = units.percent(share, 3)
    return text if share < 0 or text.startswith("-") else f"+{text}"


def allowed(row: Row) -> str:
    if row["kind"] == "change":
        return f"{'-' if row['higher_is_better'] else '+'}{units.percent(row['margin'], 3)}"
    at = "at least" if row["higher_is_better"] else "at most"
    return f"{row['kind'].upper() if row['kind'] == 'slo' else 'roof'}: {at} {figure(row, row['base'])}"


def headline(found: Row) -> str:
    base = f" against {found['base']['name']}" if found["base"] else ""
    return f"{SIGNS[found['verdict']]}: {found['new']['name']}{base}: {found['why']}"


def footing(found: Row) -> list[str]:
    """How sure all this is."""
    looks = f", look {found['look']} of {found['looks']}" if found["looks"] > 1 else ""
    lines = [f"false alarms: at most {units.percent(found['alpha'], 3)} for the {found['tests']} tests together{looks}; "
             "the unit is the trial; MDE: the smallest true change that this rule would call a failure in 80 % of cases"]  # fmt: skip
    for row in found["invalid"]:
        where = f"{row['side']} run" + (f", {row['point']}" if row["point"] else "")
        lines.append(f"invalid: {where}: {row['why']}")
    for row in found["answers"]:
        if row["verdict"] == "inconclusive":
            lines.append(f"{row['name']}: {more(row)}")
        lines += [f"{row['name']}: {note}" for note in row["notes"]]
    if found["unmatched"]:
        lines.append(f"measured in one run only, and not compared: {', '.join(found['unmatched'])}")
    for key, (one, two) in found["differs"].items():
        lines.append(f"differs: {key}: {_value(one)} → {_value(two)}")
    return lines


def _value(value: Any) -> str:
    return "none" if value is None else str(value)


def more(row: Row) -> str:
    most = max(row["trials"])
    if row["more_trials"] is None:
        return "inconclusive; at the noise seen 200 trials a side would not settle it"
    return f"inconclusive; about {row['more_trials']} trials a side instead of {most} would settle a change such as was seen"


def terminal(found: Row) -> str:
    lines = [headline(found), "",
             f"{'point':>8} {'metric':<22} {'base':>10} {'new':>10}  {'change [95 %]':<32} {'allowed':<22} {'MDE':>8}  verdict"]  # fmt: skip
    for row in found["answers"]:
        lines.append(f"{row['point']:>8} {row['metric']:<22} {figure(row, row['base']):>10} {figure(row, row['new']):>10}  "
                     f"{change(row):<32} {allowed(row):<22} {_mde(row):>8}  {row['verdict']}")  # fmt: skip
    return "\n".join([*lines, "", *footing(found)])


def _mde(row: Row) -> str:
    return "-" if units.is_missing(row["detectable"]) else units.percent(row["detectable"], 3)


# --- Markdown --------------------------------------------------------------------------------------------------------


def markdown(found: Row) -> str:
    """For a job summary or a comment, below 60 kB: failures first, then as many rows as fit."""
    order = {"fail": 0, "inconclusive": 1, "pass": 2}
    rows = sorted(found["answers"], key=lambda row: order[row["verdict"]])
    head = [f"### {md.inert(headline(found), 2000)}", ""]
    body = md.table(
        ("point", "metric", "baseline", "now", "Δ [95 % CI]", "gate", "MDE", "verdict"), map(_cells, rows), 2
    )
    foot = ["", *(f"- {md.inert(line, 1000)}" for line in footing(found))]
    details = ["", "<details><summary>trials and p values</summary>", ""]
    more_rows = md.table(("point", "metric", "trials", "between-trial CV", "p", "p (Holm)", "p (permutation)"),
                         map(_detail, rows), 2)  # fmt: skip
    return "\n".join([*md.fitting([head, body, foot, details, more_rows]), "", "</details>", ""])


def _cells(row: Row) -> list[str]:
    verdict = f"**{row['verdict']}**" if row["verdict"] == "fail" else row["verdict"]
    figures = [figure(row, row["base"]), figure(row, row["new"]), change(row), allowed(row), _mde(row)]
    return [md.inert(row["point"]), md.inert(row["metric"]), *figures, verdict]


def _detail(row: Row) -> list[str]:
    ps = [units.number(row[name], 2) for name in ("p", "p_holm", "p_permutation")]
    return [
        md.inert(row["point"]),
        md.inert(row["metric"]),
        " / ".join(map(str, row["trials"])),
        units.percent(row["sd"], 3),
        *ps,
    ]


# --- JUnit -----------------------------------------------------------------------------------------------------------


def junit(found: Row) -> str:
    """One test case a gate.  The figures stand in the body of the failure: GitLab shows nothing else, and it drops cases
    that share a name."""
    suite = xml.Element("testsuite", name="ridgeline")
    for row in found["answers"]:
        unit = "" if row["metric"].endswith("per_s") else "_ms"
        kind = "" if row["kind"] == "change" else f".{row['kind']}"
        case = xml.SubElement(suite, "testcase", classname=f"serving.{row['point']}{kind}", name=row["metric"] + unit)
        if row["verdict"] == "fail":
            xml.SubElement(case, "failure", message=_plain(sentence(row))).text = _plain(sentence(row))
        elif row["verdict"] == "inconclusive":
            xml.SubElement(case, "skipped", message=_plain(more(row))).text = _plain(f"{sentence(row)}; {more(row)}")
    for row in found["invalid"]:
        case = xml.SubElement(
            suite, "testcase", classname=f"serving.{row['point'] or 'run'}", name=f"valid_{row['side']}"
        )
        xml.SubElement(case, "error", message="invalid").text = _plain(row["why"])
    if found["code"] == 6:
        case = xml.SubElement(suite, "testcase", classname="serving.run", name="error_rate")
        xml.SubElement(case, "error", message="requests failed").text = _plain(found["why"])
    for name in ("failure", "skipped", "error"):
        suite.set({"failure": "failures", "error": "errors"}.get(name, name), str(len(suite.findall(f"*/{name}"))))
    suite.set("tests", str(len(suite.findall("testcase"))))
    root = xml.Element("testsuites")
    root.append(suite)
    xml.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + xml.tostring(root, encoding="unicode") + "\n"


def sentence(row: Row) -> str:
    """b8 itl_p50: 12.1 ms in the baseline, 14 ms now: +15.7 % [+12 %, +19 %], allowed +3 %"""
    before = "in the baseline" if row["kind"] == "change" else "is the limit"
    return (f"{row['point']} {row['metric']}: {figure(row, row['base'])} {before}, {figure(row, row['new'])} now: "
            f"{change(row)}, allowed {allowed(row)}")  # fmt: skip


def _plain(text: str) -> str:
    return _BARRED.sub("?", text)


# --- GitHub Actions --------------------------------------------------------------------------------------------------


def workflow_commands(found: Row) -> list[str]:
    """Workflow commands, one for each failed gate (GitHub shows ten of a step), or one for what else went wrong."""
    failed = [row for row in found["answers"] if row["verdict"] == "fail"]
    lines = [f"::error title={_property(row['name'])}::{_data(sentence(row))}" for row in failed[:ANNOTATIONS]]
    if lines or found["verdict"] == "pass":
        return lines
    level = "error" if found["verdict"] == "invalid" else "warning"
    return [f"::{level} title=ridgeline {found['verdict']}::{_data(found['why'])}"]


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
