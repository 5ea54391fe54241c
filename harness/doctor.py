"""Is this machine, and the server, fit to be measured now?  Asked before a run and after it: a GPU that somebody else
uses, or a clock that sank, is in no figure by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from harness import client, launch, machine, preflight, selftest, tokens, units
from harness.command import event_loop
from harness.records import RidgelineError
from harness.scenario import Scenario
from harness.server import THROTTLES

LOOK_S = 0.5
BUSY_SHARE = 0.2  # of all cores, by others
SUNK = 0.5  # of the largest clock, under load
BUSY_GPU = 0.05
HOT_C = 85.0

# nvidia-smi --help-query-gpu; `reasons` is a bit mask (server.THROTTLES).
GPU_COLUMNS = {
    "index": "index", "name": "name", "driver": "driver_version", "sm_mhz": "clocks.sm", "sm_max_mhz": "clocks.max.sm",
    "reasons": "clocks_throttle_reasons.active", "temperature_c": "temperature.gpu", "power_w": "power.draw",
    "use_percent": "utilization.gpu", "used_mib": "memory.used", "total_mib": "memory.total",
}  # fmt: skip
APP_COLUMNS = {"pid": "pid", "name": "process_name", "used_mib": "used_gpu_memory"}
State = Literal["ok", "warn", "fail", "absent"]


@dataclass(frozen=True, slots=True)
class Check:
    """`fail`: a run would fail or its figures would not be the server's; `warn`: they may be bent; `absent`: nothing to
    look at."""

    name: str
    state: State
    saw: str
    do: str = ""


def look(scenario: Scenario, results: Path) -> list[Check]:
    """All that can be seen without a request to the model."""
    found = list(_gpus())
    for name, check in {"cores": _cores, "limits": lambda: _limits(scenario, results), "tokenizer": lambda: _tokenizer(scenario),
                        "engine": lambda: _engine(scenario), "client": _client}.items():  # fmt: skip
        found.append(_told(name, check))
    return found


def _told(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except RidgelineError as problem:
        return Check(name, "fail", str(problem))


def failed(checks: Sequence[Check]) -> bool:
    return any(check.state == "fail" for check in checks)


def as_dict(checks: Sequence[Check]) -> dict[str, Any]:
    return {"fit": not failed(checks), "checks": [asdict(check) for check in checks]}


def text(checks: Sequence[Check]) -> str:
    return "\n".join(
        f"{check.state:>6}  {check.name:<10} {check.saw}{f'; {check.do}' if check.do else ''}" for check in checks
    )


# --- GPUs ------------------------------------------------------------------------------------------------------------


def _number(text: str) -> float | None:
    try:
        return float(int(text, 16)) if text.startswith("0x") else float(text)
    except ValueError:
        return None


def _gpus() -> Iterator[Check]:
    cards, apps = machine.smi("gpu", GPU_COLUMNS), machine.smi("compute-apps", APP_COLUMNS)
    if cards is None:
        yield Check("gpu", "absent", "no NVIDIA GPU, or no nvidia-smi")
        return
    yield from gpu_checks(cards, apps or [])


def gpu_checks(cards: Sequence[Mapping[str, str]], apps: Sequence[Mapping[str, str]]) -> Iterator[Check]:
    """What the rows of nvidia-smi tell: cards with driver, clocks and brakes, and who else computes on them."""
    drivers = ", ".join(sorted({card["driver"] for card in cards}))
    names = ", ".join(card["name"] for card in cards)
    yield Check(
        "gpu", "ok" if cards else "absent", f"{names}; driver {drivers}" if cards else "nvidia-smi lists no GPU"
    )
    for card in cards:
        yield _clocks(card)
    if apps:
        listed = ", ".join(f"{app['name']} (process {app['pid']}, {app['used_mib'] or '?'} MiB)" for app in apps)
        yield Check(
            "gpu users",
            "fail",
            f"the GPU is used by {listed}",
            "a measurement wants the GPU to itself: end them, or wait",
        )
    elif cards:
        yield Check("gpu users", "ok", "no process computes on a GPU")


def _clocks(card: Mapping[str, str]) -> Check:
    now, most, mask = (_number(card[name]) for name in ("sm_mhz", "sm_max_mhz", "reasons"))
    heat, use = _number(card["temperature_c"]), _number(card["use_percent"])
    name = f"clocks {card['index']}"
    saw = f"{card['sm_mhz'] or '?'} of {card['sm_max_mhz'] or '?'} MHz, {card['temperature_c'] or '?'} °C, {card['power_w'] or '?'} W"
    brakes = [why for bit, why in THROTTLES.items() if mask and int(mask) & bit]
    if brakes:
        return Check(name, "warn", f"{saw}; slowed by: {', '.join(brakes)}", "let it cool, or raise the power limit; otherwise "
                     "every figure is that of a slowed card")  # fmt: skip
    busy = use is not None and use / 100 > BUSY_GPU
    if busy and now and most and now < SUNK * most:
        return Check(
            name, "warn", f"{saw} while busy", "its clock is far below its largest: see nvidia-smi -q -d CLOCK"
        )
    if heat is not None and heat >= HOT_C:
        return Check(name, "warn", saw, "it is hot already, and will slow down under load")
    return Check(name, "ok", saw)


# --- machine ---------------------------------------------------------------------------------------------------------


def _cores() -> Check:
    """What others take of the cores, over a second in which we do nothing."""
    share = psutil.cpu_percent(LOOK_S) / 100
    saw = f"{machine.usable_cores()} cores, {units.percent(share, 2)} busy, {units.size(psutil.virtual_memory().available, 3)} free"
    if share > BUSY_SHARE:
        return Check("cores", "warn", saw, "the client and a CPU engine want them: end what else runs")
    return Check("cores", "ok", saw)


def _limits(scenario: Scenario, results: Path) -> Check:
    """Open files, local ports and disk, against what the workload needs."""
    folder = results
    while not folder.exists():
        folder = folder.parent
    preflight.here(scenario.model_copy(update={"tokenizer": None}), folder)
    most, need = preflight.in_flight(scenario.workload), preflight.bytes_of(scenario.workload)
    return Check(
        "limits",
        "ok",
        f"files, ports and disk do for {most or 'any'} requests at once and {units.size(need, 2)} of records",
    )


def _tokenizer(scenario: Scenario) -> Check:
    for where in (scenario.tokenizer, scenario.engine.model):
        if where and (found := tokens.tokenizer_file(where)):
            return Check("tokenizer", "ok", str(found))
    if scenario.tokenizer:
        return Check("tokenizer", "fail", f"no tokenizer.json at {scenario.tokenizer}", "give its path or its folder")
    return Check(
        "tokenizer",
        "warn",
        "none on this machine",
        "prompts will be fitted by the server's count; --tokenizer is exact",
    )


def _client() -> Check:
    found = selftest.kept()
    if not found or not found.get("streams"):
        return Check("client", "warn", "its own error on this machine is not known", "run `ridgeline selftest` once")
    return Check("client", "ok", f"true up to {found['streams']} streams on this machine")


# --- engine ----------------------------------------------------------------------------------------------------------


def _engine(scenario: Scenario) -> Check:
    if scenario.engine.kind != "url":
        ready = launch.rehearsed(launch.from_scenario(scenario))
        packages = ", ".join(f"{name} {version}" for name, version in sorted(ready.asked.get("packages", {}).items()))
        return Check(
            "engine", "ok", f"{scenario.engine.kind} can be started ({packages or ready.command[0]}), its port is free"
        )
    if not scenario.engine.url and not os.environ.get("OPENAI_BASE_URL"):
        return Check("engine", "absent", "no server named", "give a scenario or --url to have it looked at")
    return Check("engine", "ok", str(event_loop(_server(scenario))))


async def _server(scenario: Scenario) -> str:
    """One look at the server: model and version.  Raises RidgelineError (code 6)."""
    target = client.target_from(scenario.engine.url, client.key_from(scenario.api_key_env, scenario.api_key_file))
    async with client.session(target) as http:
        ask = client.Client(target, http, scenario.workload.api)
        entry = await ask.find_model(scenario.model)
        said = await client.version_of(ask, entry, {})
    return f"{entry['id']} at {target.url} ({said['kind']} {said['version'] or 'of unknown version'})"
