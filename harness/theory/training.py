"""Training under fully sharded data parallelism: bytes on each accelerator and seconds of a step, as named terms.

FSDP (Zhao et al., arXiv:2304.11277) is ZeRO's third stage (Rajbhandari et al., arXiv:1910.02054): parameters, gradients and
optimizer states are split over all accelerators; each layer's parameters are gathered before its forward pass and again
before its backward pass, and its gradients are summed and scattered after.  That is 3 (N - 1) / N of the 16-bit weights
through each link in a step, half as much again as the all-reduce of plain data parallelism (ZeRO, section 7).

The forward pass is that of a prefill by the kernels' laws, the backward takes twice as long: an upper estimate of the speed.
`REACHED` says what eight public runs reached of it, with nothing fitted to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from harness import units
from harness.records import RidgelineError
from harness.theory import kernels, memory, seeds
from harness.theory.frameworks import find
from harness.theory.hardware import Hardware
from harness.theory.roofline import prefill_pass, setup
from harness.theory.shape import Model

# Least and most, Llama 7B to 70B on 64 to 128 A100 and 96 H100 (foundation-model-stack/fms-fsdp and pytorch/torchtitan, their
# tables of tokens per second; tests/test_theory_parallel.py has the rows).
REACHED = (0.53, 0.86)
UPDATE_BYTES = (
    28  # of a parameter in Adam's step: its gradient read, master copy and two moments read and written, weight written
)


@dataclass(frozen=True, slots=True)
class Training:
    """`memory` in bytes of one accelerator, `step` in seconds: terms that add up.  `hidden` (s) overlaps with the step;
    `sent_bytes` go through each accelerator's link in a step.  `because` puts the numbers into sentences."""

    memory: dict[str, float]
    step: dict[str, float]
    hidden: dict[str, float]
    sent_bytes: float
    tokens_per_s: float
    fits: bool
    because: tuple[str, str]


def sent_bytes(params: float, gpus: int, sharded: bool = True) -> float:
    """Bytes that each of `gpus` sends in a step, 16 bit: two all-gathers and a reduce-scatter, or one all-reduce."""
    return (3 if sharded else 2) * 2 * params * (gpus - 1) / gpus


def step(
    model: Model,
    hardware: Hardware,
    *,
    gpus: int,
    batch: int,
    context: int,
    recompute: bool = True,
    link_bytes_per_s: float = math.nan,
) -> Training:
    """One step of `batch` sequences of `context` tokens on each of `gpus`, mixed precision with Adam.

    `recompute` keeps a layer's input only and runs its forward pass again before the backward.  `link_bytes_per_s`: per
    direction; by default that of one machine's accelerators.  Raises RidgelineError for what makes no sense.
    """
    for name, value in {"gpus": gpus, "batch": batch, "context": context}.items():
        if not 1 <= value <= 1e8:
            raise RidgelineError(f"{name} must be from 1 to 100000000, got {value}")
    rate = hardware.link_for(gpus) if math.isnan(link_bytes_per_s) else link_bytes_per_s
    if gpus > 1 and not rate > 0:
        raise RidgelineError(f"hardware {hardware.name}: no link rate is known; give --link")
    held = _memory(model, gpus, batch, context, recompute)
    s = setup(model, hardware, replace(find("generic", hardware), all_logits=True), dtype="bf16")
    forward = float(prefill_pass(s, np.array([float(batch)]), np.array([float(context)])).total[0])
    law = kernels.link(hardware, min(gpus, 8))
    gather = 0.0
    if gpus > 1:
        gather = sent_bytes(model.params, gpus) / 3 / rate / law.bandwidth + (model.layers + 1) * law.latency_s
    backward, again = 2 * forward, forward if recompute else 0.0
    late = max(0.0, gather - forward) + max(0.0, 2 * gather - backward - again)
    update = UPDATE_BYTES * model.params / gpus / hardware.bytes_per_s
    terms = {
        "forward": forward,
        "backward": backward,
        "recompute": again,
        "exposed communication": late,
        "update": update,
    }
    whole, total = sum(held.values()), sum(terms.values())
    fits = whole <= memory.usable_bytes(hardware)
    sends = sent_bytes(model.params, gpus)
    has = units.size(memory.usable_bytes(hardware))
    talk = (f" Each accelerator sends {units.size(sends)} in it (two all-gathers, one reduce-scatter), "
            f"{units.seconds(3 * gather)}, of which {units.seconds(3 * gather - late)} hide behind computing.")  # fmt: skip
    said = (f"{_sum('Memory', held, units.size)} Of {has} of each {hardware.name}: it {'fits' if fits else 'does not fit'}.",
            _sum("Step", terms, units.seconds) + (talk if gpus > 1 else ""))  # fmt: skip
    return Training(
        held, terms, {"communication": 3 * gather - late}, sends, gpus * batch * context / total, fits, said
    )


def _memory(model: Model, gpus: int, batch: int, context: int, recompute: bool) -> dict[str, float]:
    """Gathered: the layer at work and the one fetched ahead of it, with the gradients of one before they are scattered."""
    parts = seeds.mixed_precision_bytes(model.params)
    layer = max(g.attention + g.ffn + g.norms + g.router + g.experts * g.expert for g in model.groups)
    unit = max(layer, (1 if model.tied else 2) * model.vocab * model.hidden)
    kept = seeds.activation_bytes(batch, context, model.hidden, 1 if recompute else model.layers)
    inputs = 2.0 * batch * context * model.hidden * model.layers if recompute else 0.0
    return {
        "weights": parts.weights / gpus,
        "gradients": parts.gradients / gpus,
        "optimizer": parts.optimizer / gpus,
        "gathered": 3 * 2.0 * unit if gpus > 1 else 0.0,
        "activations": kept + inputs,
        "logits": 6.0 * batch * context * model.vocab,
        "runtime": memory.CONTEXT_BYTES,
    }


def _sum(name: str, terms: Mapping[str, float], show: Callable[[float], str]) -> str:
    total, largest = sum(terms.values()), max(terms, key=lambda term: terms[term])
    parts = " + ".join(f"{term} {show(value)}" for term, value in terms.items() if value)
    return f"{name} {show(total)} = {parts}; {largest} is {units.percent(terms[largest] / total, 2)} of it."
