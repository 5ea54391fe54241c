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


def passes_for(s: Setup, tokens: Array) -> Array:
    """Passes that a prefill of so many tokens in all takes: the framework's chunk each."""
    return np.maximum(1.0, np.ceil(tokens / s.framework.chunk))


def waited_share(s: Setup, prompts: Array, tokens: Array) -> Array:
    """The share of a prefill after which a prompt's own pass has ended, on average: prompts are taken in order, and each
    pass but the last is full."""
    passes, each = passes_for(s, prompts * tokens), s.framework.chunk / tokens
    last = prompts - (passes - 1) * each
    ends = each * s.framework.chunk * passes * (passes - 1) / 2 + last * prompts * tokens
    return np.asarray(np.maximum(ends / (prompts**2 * tokens), (prompts + 1) / (2 * prompts)))


def one_by_one(s: Setup, size: Array, tokens: Array, cached_share: float) -> tuple[Pass, Terms, Array]:
    """`size` requests that a server takes as they come: (the whole prefill, the mean request's part of it up to its own
    first token, what passes from then until all are prefilled).

    The first prompt to come is in the first pass alone, unless the server `gathers`; the others are in the next ones.
    """
    together = prefill_all(s, size, tokens, cached_share)
    share = waited_share(s, size, tokens)
    if s.framework.gathers:
        return together, {k: v * share for k, v in together.terms.items()}, together.total * (1 - share)
    first, n = prefill_all(s, np.ones_like(size), tokens, cached_share), np.maximum(size - 1, 1.0)
    others, alone = prefill_all(s, n, tokens, cached_share), size < 2
    share = np.where(alone, 0.0, (size - 1) / size * waited_share(s, n, tokens))
    own = {k: v + others.terms[k] * share for k, v in first.terms.items()}
    rest = {k: np.where(alone, 0.0, v) for k, v in others.terms.items()}
    whole = Pass({k: v + rest[k] for k, v in first.terms.items()}, together.hidden, together.bound)
    return whole, own, others.total * np.where(alone, 0.0, 1 - share)


def prefill_all(s: Setup, prompts: Array, tokens: Array, cached_share: float = 0.0) -> Pass:
    """`prompts` prompts in as many passes as the framework's chunk asks for, over the stages of a pipeline."""
    past = tokens * cached_share
    one = prefill_pass(s, prompts, tokens - past, past)
    passes = passes_for(s, prompts * tokens)
    again = {"launch": one.terms["launch"], "host": s.factors.overhead * s.framework.step_s + 0 * passes}
    terms = {k: v + (passes - 1) * again[k] if k in again else v for k, v in one.terms.items()}
    bubbles = (1 + (s.pp - 1) / np.maximum(prompts, passes)) / s.pp if s.pp > 1 and not s.framework.layered else 1.0
    return Pass(terms, one.hidden, one.bound / s.pp).scaled_terms(bubbles)


def static(
    s: Setup, batch: Array, tokens: Array, output: Array, cached_share: float = 0.0, *, progressive: bool = False
) -> Timing:
    """`batch` requests at once, prefilled together; those whose cache does not fit wait for a round of the largest.

    `progressive`: a first token counts when its own pass of the prefill has ended, not the whole batch's.
    """
    largest = memory.largest_batch(s, tokens + output)
    size = np.clip(batch, 1.0, np.maximum(largest, 1.0))
    prefill, own, early, step, took = _round(s, size, tokens, output, cached_share, progressive)
    full = np.floor(batch / size)
    rest = batch - full * size
    busy, waiting = full * took, (full - 1) / 2 * took
    if np.any(rest > 0):
        *_, last = _round(s, np.maximum(rest, 1.0), tokens, output, cached_share, progressive)
        waiting = np.where(rest > 0, (full * size * waiting + rest * full * took) / batch, waiting)
        busy = busy + np.where(rest > 0, last, 0.0)
    late: Array | float = 0.0
    if s.framework.grows and np.any(waiting > 0):  # a prompt is taken in where it fits itself, and waits later
        room = np.minimum(memory.largest_batch(s, tokens + 1), s.framework.sequences * s.dp)
        first = np.clip(batch, size, np.maximum(size, room))
        own = _prefill(s, first, tokens, cached_share, progressive)[1]
        late = waiting * (first - size) / np.maximum(batch - size, 1e-9)
        waiting = waiting - late
    ttft, itl = dict(own), dict(step.terms)
    steps = np.maximum(output - 1, 0)
    if progressive:  # over a connection, as a server is asked
        ttft["host"], busy = ttft["host"] + s.request_s, busy + s.request_s
        itl["prefills of others"] = early / np.maximum(steps, 1)
        if np.any(late > 0):
            itl["waiting for memory"] = late / np.maximum(steps, 1)
    if np.any(waiting > 0):
        ttft["waiting for memory"] = waiting
    past = tokens * cached_share
    whole = prefill_pass(s, batch, tokens - past, past).bound / s.pp
    mean = np.maximum(s.weights_s() / s.gpus * s.tp, whole * (batch + 1) / (2 * batch))  # as if one after the other
    step_bound = decode_step(s, size, tokens + 1, tokens + np.maximum(1, steps)).bound / s.pp
    busy_bound = whole + steps * decode_step(s, batch, tokens + 1, tokens + np.maximum(1, steps)).bound / s.pp
    return Timing(ttft, itl, prefill.hidden, step.hidden, batch, busy, size, largest, np.minimum(mean, whole), step_bound,
                  busy_bound)  # fmt: skip


def _round(
    s: Setup, size: Array, tokens: Array, output: Array, cached_share: float, progressive: bool
) -> tuple[Pass, Terms, Array, Pass, Array]:
    """One batch: its prefill, what the mean first token waits of it, what passes after that, a step, and all of it in s."""
    prefill, own, early = _prefill(s, size, tokens, cached_share, progressive)
    step = decode_step(s, size, tokens + 1, tokens + np.maximum(1.0, output - 1))
    return prefill, own, early, step, prefill.total + (output - 1) * step.total


def _prefill(s: Setup, size: Array, tokens: Array, cached_share: float, progressive: bool) -> tuple[Pass, Terms, Array]:
    """(the prefill of `size` prompts, the mean one's part of it, what passes after that)."""
    if progressive:
        return one_by_one(s, size, tokens, cached_share)
    prefill = prefill_all(s, size, tokens, cached_share)
    return prefill, prefill.terms, 0 * size


# On those first engines (frameworks.TUNED_LATENT) prefills took 3 to 9 times as long as the laws of today's kernels say; nor does
# a table tell whether all requests came at once, as there (dstackai/benchmarks' DeepSeek-R1): then a first token waits for all.
UNTUNED_PREFILL = 9.0


def latest_s(s: Setup, clients: Array, tokens: Array, cached_share: float = 0.0) -> Array:
    """When the mean first token has come at the latest where kernels are untuned and arrivals unknown: 0 where they are not."""
    if not s.framework.untuned:
        return np.zeros_like(clients)
    return UNTUNED_PREFILL * total(one_by_one(s, clients, tokens, cached_share)[1])


# Lengths are nominal: benchmarks draw them from 0.8 to 1 of it, 0.9 on average.
SLACK = 1.1
# Where weights are fp8 or nvfp4 and the cache's dtype is not told, it may be fp8 too: what waits is what would with a cache of
# half the bytes, as of two that are as likely the shorter wait errs by less of itself.  And where weights leave less than
# this share of the memory, engines are told to take more of it.
UNTOLD, LEAST_SPACE = 2.0, 0.04
WAVES = 10  # requests for each of the clients in a closed loop, where nothing else is known: benchmarks' usual choice


def closed(
    s: Setup, clients: Array, tokens: Array, output: Array, waves: Array | float = WAVES, cached_share: float = 0.0
) -> Timing:
    """`clients` that each send their next request when the last has ended, in steady state but for the first burst.

    While a request decodes, each of the others in flight is prefilled once: that work stretches its steps.  A prompt
    waits for the step that runs, for prompts before it (a finite-source queue by approximate mean value analysis,
    Schweitzer 1979, with constant service), and the first of its client's `waves` requests waits behind half of the
    others.  Where the cache does not hold all, the rest wait for a slot.
    """
    slots, largest = _slots(s, tokens, output, cached_share)
    running = np.clip(clients, 1.0, np.maximum(slots, 1.0))
    prefill, joint, together, step, itl = _served(s, running, tokens, output, cached_share)
    if np.all(np.isinf(waves)):  # an offline run: no client to send each token to
        itl["stream"] = np.zeros_like(running)
    decoding = total(itl) * np.maximum(output - 1, 0)
    groups = running / together  # of prompts in the same pass: replicas of the attention prefill one each
    wait = _queue(joint, decoding, groups)
    if s.framework.mixed:  # where every step has prompts: those of half the step that runs and of one's own
        wait = np.maximum(wait, 1.5 * itl["prefills of others"])
    wait = wait + np.maximum(groups - 1, 0.0) / 2 * joint / waves
    by_clock = np.isinf(waves)  # who comes by the clock meets as many as there are, a client one fewer
    found = np.where(by_clock, 1 - np.exp(-running), 1 - 1 / running)
    ttft = {**prefill.terms, **_beside(s, step, found), "waiting for prefills": wait * s.factors.queue}
    ttft["host"] = ttft["host"] + s.request_s
    if s.factors.slot:
        ttft["waiting for a slot"] = s.factors.slot * decoding / np.maximum(clients - 1, 1)
    cycle = total(ttft) + decoding
    waiting = np.maximum(clients / np.maximum(running * _doubt(s), 1.0) - 1, 0.0) * cycle * (1 - 0.5 / waves)
    if np.any(waiting > 0):
        ttft["waiting for memory"] = waiting
    return _loaded(s, ttft, itl, prefill, step, clients, cycle * clients / running, running, largest, tokens, output,
                   cached_share, looped=True)  # fmt: skip


def open_loop(s: Setup, rate: float, tokens: Array, output: Array, cached_share: float = 0.0) -> Timing:
    """`rate` requests a second by the clock, Poisson: what is in flight follows by Little's law, and a prompt waits as in
    M/G/1 with the prefills' share of the time as its load (Pollaczek-Khinchine, service constant).  Beyond saturation
    the queue grows without end: the waiting is infinite."""
    slots, largest = _slots(s, tokens, output, cached_share)
    running = np.ones_like(tokens)
    for _ in range(40):  # damped; it climbs to the least fixed point, or to the slots where there is none below
        prefill, _, _, step, itl = _served(s, running, tokens, output, cached_share)
        found = rate * (prefill.total + total(itl) * np.maximum(output - 1, 0))
        running = np.clip(0.5 * (running + found), 1.0, np.maximum(slots, 1.0))
    load = rate / s.dp * prefill.total
    saturated = (found > slots * (1 + 1e-3)) | (load >= 1)
    wait = np.where(saturated, np.inf, load * prefill.total / (2 * np.maximum(1 - load, 1e-9))) * s.factors.queue
    ttft = {**prefill.terms, **_beside(s, step, 1 - np.exp(-running)), "waiting for prefills": wait}
    ttft["host"] = ttft["host"] + s.request_s
    seconds = np.where(saturated, running / np.maximum(found, 1e-300), 1.0) ** -1
    return _loaded(s, ttft, itl, prefill, step, np.full_like(tokens, rate), seconds, running, largest, tokens, output,
                   cached_share, looped=False)  # fmt: skip


def _slots(s: Setup, tokens: Array, output: Array, cached_share: float) -> tuple[Array, Array]:
    """(sequences that the cache holds while each is on average half generated, or that come up while one is generated
    where a step takes no more than a chunk of prompts; whole ones that fit for certain)."""
    half = s.model.kv_bytes(tokens + output / 2, s.kv_dtype) * s.kv_copies
    largest = memory.largest_batch(s, tokens + output)
    slots = np.maximum(SLACK * memory.kv_space_bytes(s) / half, np.minimum(largest, 1.0))
    slots = np.minimum(slots, s.framework.sequences * s.dp)
    if s.framework.mixed:
        slots = np.minimum(slots, 1 + s.dp * s.framework.chunk * output / (tokens * (1 - cached_share)))
    return np.maximum(slots, 0.0), largest


def _doubt(s: Setup) -> float:
    """How many times the sequences may fit that are taken to, by what a table does not tell."""
    space, least = memory.kv_space_bytes(s), LEAST_SPACE * memory.usable_bytes(s.hardware) * s.gpus
    narrow = s.kv_dtype is None and (s.dtype or s.model.dtype) in ("fp8", "nvfp4")
    return max(1.0, least / max(space, 1.0)) * (UNTOLD if narrow else 1.0)


def _beside(s: Setup, step: Pass, others: Array) -> Terms:
    """What others' decoding adds to a first token, where with a chance of `others` there are some: half of the step that
    runs, and where prompts go in mixed passes what their own has to do for those beside it."""
    terms = {"waiting for a step": others * step.total / 2}
    if s.framework.mixed:
        beside = sum(
            step.terms[k]
            for k in ("kv cache", "attention", "activations", "ridge", "matmul", "link volume")
            if k in step.terms
        )
        terms["waiting for those beside"] = others * beside
    return terms


def _served(
    s: Setup, running: Array, tokens: Array, output: Array, cached_share: float
) -> tuple[Pass, Array, Array, Pass, Terms]:
    """(the prefill of one prompt, the time of those that come up in one step together, how many these are, the decoding
    step of those running, the time between two tokens by its terms)."""
    prefill = prefill_all(s, np.ones_like(running), tokens, cached_share)
    step = decode_step(s, running, tokens + 1, tokens + np.maximum(1.0, output - 1))
    # Prompts that come up in the same step share a pass.
    together = np.maximum(1.0, running / s.dp / output)
    joint = prefill_all(s, together * s.dp, tokens, cached_share)
    own = joint.total / together
    once = ("launch", "host", "link latency")  # a pass of both needs these but once
    shared: Array | float = 0.0
    if s.framework.mixed:
        # Behind the reads there is only the room that the step's own matrix work leaves: none beyond the ridge.
        taken = np.minimum(step.terms["weights"], step.hidden["matmul"])
        shared = sum(np.minimum(step.terms[k], joint.terms[k]) for k in once if k in step.terms)
        shared = (shared + step.terms["weights"] - taken) / together
    itl = {**step.terms, "prefills of others": (running - 1) / s.dp / output
           * np.maximum(own - passes_for(s, tokens) * shared, 0.3 * own)}  # fmt: skip
    plain, stream = total(itl), running * s.framework.stream_s * s.factors.overhead
    itl["stream"] = kernels.smooth_max(plain, stream, 3.0) - plain
    return prefill, joint.total, together * s.dp, step, itl


def _loaded(
    s: Setup, ttft: Terms, itl: Terms, prefill: Pass, step: Pass, requests: Array, seconds: Array, running: Array,
    largest: Array, tokens: Array, output: Array, cached_share: float, *, looped: bool,
) -> Timing:  # fmt: skip
    one = np.ones_like(running)
    alone = decode_step(s, one, tokens + 1, tokens + np.maximum(1.0, output - 1)).bound
    # Whatever the order of passes, all operations are done, and in a closed loop the weights are read once for each token of the
    # longest.  By the clock requests overlap without end, and any number of prompts may share a pass.
    together = requests if looped else np.full_like(requests, 1e6)
    busy = prefill_all(s, together, tokens, cached_share).bound * requests / together
    least = np.maximum(busy, (output - 1) * alone if looped else 0.0) / s.pp
    if not looped:  # in a second no more ends than comes
        least = np.maximum(least, 1.0)
    # Answers of a token or two leave no steps that others' prefills would stretch.
    return Timing(ttft, itl, prefill.hidden, step.hidden, requests, np.maximum(seconds, least), running, largest,
                  prefill.bound / s.pp, alone / s.pp, least)  # fmt: skip


def _queue(service: Array, elsewhere: Array, customers: Array) -> Array:
    """Mean wait at a server with constant `service` time of `customers` that spend `elsewhere` between their visits."""
    wait = np.zeros_like(service)
    for _ in range(30):
        there = service + wait
        queue = (customers - 1) * there / (there + elsewhere)
        wait = 0.5 * (wait + np.where(customers > 1, service * (queue - 0.5 * queue * service / there), 0.0))
    return wait
