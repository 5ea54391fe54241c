"""A calibration: how one server's times lie to the model's own estimates, by kind of work; fitted by `calibrate`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from harness.records import RidgelineError
from harness.theory.hardware import Hardware
from harness.theory.roofline import Factors
from harness.theory.shape import Model

# What is carried over in full: to other hardware the software's own, to another model what is the same silicon's.  The
# rest goes half of the way (its square root; a slot that is missing here is not missing elsewhere): also `kv`, as an attention
# kernel's efficiency hangs on how many query heads share a KV head.
TO_HARDWARE = ("overhead", "request")
TO_MODEL = ("compute", "bandwidth", "overhead", "link", "narrow")


@dataclass(frozen=True, slots=True)
class Calibration:
    """Factors of `hardware`, fitted to `cells` measured cells of `models`; `spread` is what they leave unexplained (the
    standard deviation of the logarithm), `next_cell` whose measurement would teach most."""

    hardware: str
    models: tuple[str, ...]
    cells: int
    factors: Factors
    spread: float
    next_cell: dict[str, Any] | None = None

    def factors_for(self, model: Model, hardware: Hardware) -> Factors:
        """The factors for this model and hardware, or as much of them as can be carried over."""
        near = self.closeness(model, hardware)
        if near == "same":
            return self.factors
        whole = TO_MODEL if near == "model" else TO_HARDWARE
        given = asdict(self.factors) | {"slot": 0.0}
        return Factors(**{k: v if k in whole else math.sqrt(v) for k, v in given.items()})

    def closeness(self, model: Model, hardware: Hardware) -> str:
        """ "same" server, another "model" on the same hardware, or other "hardware"."""
        if hardware.name != self.hardware:
            return "hardware"
        return "same" if model.name in self.models else "model"

    def as_dict(self) -> dict[str, Any]:
        return {"ridgeline_calibration": 1, **asdict(self), "models": list(self.models)}


def from_dict(data: Any, where: str) -> Calibration:
    """What `as_dict` wrote, read back; RidgelineError names what is wrong."""
    if not isinstance(data, Mapping) or data.get("ridgeline_calibration") != 1:
        raise RidgelineError(f"{where}: is no calibration; `ridgeline calibrate` writes one")
    given = data.get("factors")
    known = {f.name for f in fields(Factors)}
    if not isinstance(given, Mapping) or set(given) - known:
        raise RidgelineError(f"{where}: factors must be of {', '.join(sorted(known))}")
    for name, value in given.items():
        least = 0.0 if name == "slot" else 1e-3
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= 1e3:
            raise RidgelineError(f"{where}: factor {name} must be from {least:g} to 1000, got {value!r}")
    if not isinstance(data.get("hardware"), str) or not isinstance(data.get("models"), list):
        raise RidgelineError(f"{where}: hardware must be a name and models a list of names")
    return Calibration(data["hardware"], tuple(map(str, data["models"])), int(data.get("cells", 0)),
                       Factors(**{k: float(v) for k, v in given.items()}), float(data.get("spread", 0.0)),
                       data.get("next_cell"))  # fmt: skip
