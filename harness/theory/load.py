"""How passes follow one another: a static batch, a closed loop of clients, an open one; seconds by term, arrays alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from harness.theory import kernels, memory
from harness.theory.roofline import Pass, Setup, Terms, decode_step, prefill_pass

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Timing:
    """What a request meets on average: `ttft` and `itl` add up by their terms; `busy_s` is the time in which `requests`
    of them are served, the batch that runs is `running`, the most that fits `largest` (0: not one).  `*_bound_s`: the
    strict lower bounds."""

    ttft: Terms
    itl: Terms
    hidden_ttft: Terms
    hidden_itl: Terms
    requests: Array
    busy_s: Array
    running: Array
    largest: Array
    ttft_bound_s: Array
    itl_bound_s: Array
    busy_bound_s: Array


def total(terms: Terms) -> Array:
    return np.asarray(sum(terms.values()))


def prefill_all(s: Setup, prompts: Array, tokens: Array) -> Pass:
    """`prompts` prompts in as many passes as the framework's chunk asks for, over the stages of a pipeline."""
    one = prefill_pass(s, prompts, tokens)
    passes = np.maximum(1.0, np.ceil(prompts * tokens / s.framework.chunk))
    again = {"launch": one.terms["launch"], "host": s.factors.overhead * s.framework.step_s + 0 * passes}
    terms = {k: v + (passes - 1) * again[k] if k in again else v for k, v in one.terms.items()}
    bubbles = (1 + (s.pp - 1) / np.maximum(prompts, passes)) / s.pp if s.pp > 1 else 1.0
    return Pass(terms, one.hidden, one.bound / s.pp).scaled_terms(bubbles)


def static(s: Setup, batch: Array, tokens: Array, output: Array) -> Timing:
    """`batch` requests at once, prefilled together; those whose cache does not fit wait for a round of the largest."""
    largest = memory.largest_batch(s, tokens + output)
    size = np.clip(batch, 1.0, np.maximum(largest, 1.0))
    prefill, step, took = _round(s, size, tokens, output)
    full = np.floor(batch / size)
    rest = batch - full * size
    busy, waiting = full * took, (full - 1) / 2 * took
    if np.any(rest > 0):
        _, _, last = _round(s, np.maximum(rest, 1.0), tokens, output)
        waiting = np.where(rest > 0, (full * size * waiting + rest * full * took) / batch, waiting)
        busy = busy + np.where(rest > 0, last, 0.0)
    ttft = dict(prefill.terms)
    if np.any(waiting > 0):
        ttft["waiting for memory"] = waiting
    whole = prefill_pass(s, batch, tokens).bound / s.pp
    weights = s.weights_s()
    steps = np.maximum(output - 1, 0)
    ttft_bound = np.maximum(weights / s.pp, (whole - 0.0) * (batch + 1) / (2 * batch))
    return Timing(
        ttft, step.terms, prefill.hidden, step.hidden, batch, busy, size, largest,
        np.minimum(ttft_bound, whole), step.bound, whole + steps * decode_step(s, batch, tokens + 1, tokens + np.maximum(1, steps)).bound / s.pp,
    )  # fmt: skip


def _round(s: Setup, size: Array, tokens: Array, output: Array) -> tuple[Pass, Pass, Array]:
    prefill = prefill_all(s, size, tokens)
    step = decode_step(s, size, tokens + 1, tokens + np.maximum(1.0, output - 1))
    return prefill, step, prefill.total + (output - 1) * step.total


WAVES = 10  # requests for each of the clients in a closed loop, where nothing else is known: benchmarks' usual choice


def closed(s: Setup, clients: Array, tokens: Array, output: Array, waves: Array | float = WAVES) -> Timing:
    """`clients` that each send their next request when the last has ended, in steady state but for the first burst.

    While a request decodes, each of the others in flight is prefilled once: that work stretches its steps.  A prompt
    waits for the step that runs, for prompts before it (a finite-source queue by Schweitzer's approximate mean value
    analysis, service constant), and the first of its client's `waves` requests waits behind half of the others.  Where
    the cache does not hold all, the rest wait for a slot.
    """
    slots = np.maximum(memory.kv_space_bytes(s) / (s.model.kv_bytes(tokens + output / 2, s.kv_dtype) * s.kv_copies), 0.0)
    largest = memory.largest_batch(s, tokens + output)
    running = np.clip(clients, 1.0, np.maximum(slots, 1.0))
    one = np.ones_like(clients)
    prefill = prefill_all(s, one, tokens)
    step = decode_step(s, running, tokens + 1, tokens + np.maximum(1.0, output - 1))
    own = prefill.total
    shared = sum(step.terms[k] for k in ("weights", "launch", "host", "link latency") if k in step.terms) if s.framework.mixed else 0.0
    passes = np.maximum(1.0, np.ceil(tokens / s.framework.chunk))
    others = (running - 1) * np.maximum(own - passes * shared, 0.3 * own) / output
    itl = {**step.terms, "prefills of others": others}
    stream = running * s.framework.stream_s * s.factors.overhead
    plain = step.total + others
    itl["stream"] = kernels.smooth_max(plain, stream, 3.0) - plain
    decoding = total(itl) * np.maximum(output - 1, 0)
    waiting = _queue(own, decoding, running) * s.factors.queue
    burst = (running - 1) / 2 * own / waves * s.factors.queue
    ttft = {**prefill.terms, "waiting for a step": step.total / 2, "waiting for prefills": waiting + burst}
    cycle = total(ttft) + decoding
    full = np.maximum(clients / running - 1, 0.0) * cycle
    if np.any(full > 0):
        ttft["waiting for memory"] = full
    alone = decode_step(s, one, tokens + 1, tokens + np.maximum(1.0, output - 1)).bound
    bound = prefill_pass(s, one, tokens).bound
    busy_bound = np.maximum(clients * (output - 1) * step.bound / running, clients * bound * 0)
    return Timing(ttft, itl, prefill.hidden, step.hidden, clients, cycle * clients / running, running, largest, bound / s.pp, alone, busy_bound)


def _queue(service: Array, elsewhere: Array, customers: Array) -> Array:
    """Mean wait at a server with constant `service` time of `customers` that spend `elsewhere` between their visits."""
    wait = np.zeros_like(service)
    for _ in range(30):
        there = service + wait
        queue = (customers - 1) * there / (there + elsewhere)
        wait = 0.5 * (wait + np.where(customers > 1, service * (queue - 0.5 * queue * service / there), 0.0))
    return wait
