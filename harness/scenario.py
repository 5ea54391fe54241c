"""YAML text -> validated Scenario.  An error names file, line, key, what was found and what is allowed."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationError,
    model_validator,
)

from harness import units, yaml_lines
from harness.arrivals import Pattern
from harness.endings import is_secret
from harness.places import TAGS, Places, explain
from harness.records import RidgelineError
from harness.theory import dtypes
from harness.yaml_lines import dotted


def _named(told: Callable[[str | None], str | None]) -> AfterValidator:
    """The name that theory computes with: of a dtype, for any usual spelling, None where it says nothing ("auto")."""

    def check(value: str | None) -> str | None:
        try:
            return told(value)
        except RidgelineError as problem:
            raise ValueError(str(problem)) from None

    return AfterValidator(check)


def _framework(value: str | None) -> str | None:
    from harness.theory import frameworks  # with its tables, which a run alone does not need

    return frameworks.stated(value)


Dtype = Annotated[str | None, _named(dtypes.stated)]


def _written(kind: str) -> BeforeValidator:
    """A quantity may be written with its unit: "500ms", "2 min", "2%"."""

    def read(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return units.parse(value, kind)
        except RidgelineError as problem:
            raise ValueError(str(problem)) from None

    return BeforeValidator(read)


def _checked(module: str, reader: str) -> AfterValidator:
    """A text that `reader` of `module` takes, which stays as written."""

    def check(value: str) -> str:
        try:
            getattr(importlib.import_module(module), reader)(value)  # here: it may know of scenarios itself
        except RidgelineError as problem:
            raise ValueError(str(problem)) from None
        return value

    return AfterValidator(check)


Seconds = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False), _written("time")]
Fraction = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False), _written("fraction")]
Count = Annotated[int, Field(ge=1, le=1_000_000, strict=True)]
Tokens = Annotated[int, Field(ge=1, le=10_000_000, strict=True)]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Engine(Part):
    """The server: started and stopped by the run (vllm, llama.cpp), or already there (url)."""

    kind: Literal["vllm", "llama.cpp", "url"] = "url"
    """vllm and llama.cpp are started by the run; url is a server that is already there."""
    url: str | None = None
    """Base URL of a server that is already there; OPENAI_BASE_URL where absent."""
    same_machine: bool | None = None
    """Whether the server is on this machine, so that its GPUs can be read here; default: by the address."""
    model: str | None = None
    """What to serve: a folder, a GGUF file, or a name that the engine knows."""
    served_name: str | None = None
    """The name under which the engine serves the model."""
    python: str | None = None
    """The interpreter whose environment holds the engine."""
    binary: str | None = None
    """A llama-server binary, instead of an interpreter."""
    args: list[str] = []
    """Further arguments of the server, as a list."""
    env: dict[str, str] = {}
    """Environment variables of the server, none that hold a secret: it inherits those of this shell."""
    slots: Annotated[int, Field(ge=1, le=4096)] = 8
    """Sequences that the engine runs at once (llama.cpp)."""
    context_tokens: Annotated[int, Field(ge=16)] | None = None
    """Context of one sequence; default: what the workload needs."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """Threads of a CPU engine; default: all cores it may use."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port to serve on; 0 picks a free one."""
    ready_timeout_s: Seconds = 900.0
    """How long the engine may take until one real completion came back."""

    @model_validator(mode="after")
    def _no_secret(self) -> Engine:
        """What stands here goes into the run folder and the process list."""
        for name in self.env:
            if is_secret(name):
                raise ValueError(
                    f"env.{name}: sounds like a secret; export it in the shell instead, the server inherits it"
                )
        for word in self.args:
            name = word.partition("=")[0]
            if name.startswith("--") and is_secret(name.removeprefix("--")):
                raise ValueError(f"args: {name} is a secret in the process list; the server gets the key of --api-key-env or "
                                 "--api-key-file by its environment")  # fmt: skip
        return self


class Spread(Part):
    """A distribution of lengths, in tokens."""

    mean: Annotated[float, Field(ge=1, le=1e7, allow_inf_nan=False)]
    """Mean of the lengths themselves."""
    std: Annotated[float, Field(ge=0, le=1e7, allow_inf_nan=False)]
    """Standard deviation of the lengths themselves."""
    min: Tokens | None = None
    """Shorter ones become this long."""
    max: Tokens | None = None
    """Longer ones become this long."""

    @model_validator(mode="after")
    def _agree(self) -> Spread:
        if self.min and self.max and self.min > self.max:
            raise ValueError(f"min: got {self.min}, above max {self.max}")
        return self


class Lengths(Part):
    """Lengths that differ: one of the keys."""

    uniform: tuple[Tokens, Tokens] | None = None
    """[min, max], both included."""
    normal: Spread | None = None
    lognormal: Spread | None = None
    file: str | None = None
    """A .csv or .jsonl file with input_tokens and output_tokens, of which rows are drawn."""

    @model_validator(mode="after")
    def _agree(self) -> Lengths:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"got {', '.join(given) or 'none'}; give one of {', '.join(type(self).model_fields)}")
        if self.uniform and self.uniform[0] > self.uniform[1]:
            raise ValueError(f"uniform: got {list(self.uniform)}; the first is the least")
        return self


# A number or a distribution: the tags keep the messages to the one that was meant.
Length = Annotated[
    Annotated[Tokens, Tag(TAGS[0])] | Annotated[Lengths, Tag(TAGS[1])],
    Discriminator(lambda value: TAGS[isinstance(value, dict | Lengths)]),
]


class Ramp(Part):
    """A rate that rises or falls in a straight line, and then stays."""

    start: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
    end: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
    over_s: Seconds


class Step(Part):
    """A rate that holds for a time."""

    rate: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
    for_s: Seconds


class Workload(Part):
    """What is asked of the server."""

    mode: Literal["wave", "closed", "open"] = "wave"
    """wave: B together, the next B when all have ended; closed: B always in flight; open: by the clock, at a rate."""
    api: Literal["completions", "chat"] = "completions"
    """Which endpoint is asked."""
    transport: Literal["wire", "openai"] = "wire"
    """wire: stamps at the socket; openai: the official client, stamps when its iterator yields (pip install
    ridgeline[openai]), to show what an application sees."""
    batch_sizes: Annotated[list[Annotated[int, Field(ge=1, le=65536, strict=True)]], Field(min_length=1)] = [1, 2, 4, 8]
    """One point each (wave and closed)."""
    rates: list[Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]] = []
    """Requests per second, one point each (open)."""
    rate_ramp: Ramp | None = None
    """{start: 1, end: 10, over_s: 60}: one point whose rate changes linearly, and then stays (open)."""
    rate_steps: list[Step] = []
    """[{rate: 5, for_s: 30}, {rate: 10, for_s: 30}]: one point whose rate changes in steps (open)."""
    trace: str | None = None
    """A .csv or .jsonl file of requests to replay by its own clock (open): timestamp (s) or timestamp_ms, input_tokens or
    input_length, output_tokens or output_length; prompt, session and turn if it has them.  Its first ones are the warm-up."""
    trace_speed: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = 1.0
    """2: the trace in half its time."""
    arrivals: Pattern = "poisson"
    """How the requests of an open loop are spaced."""
    burstiness: Annotated[float, Field(gt=0, le=1e3, allow_inf_nan=False)] = 1.0
    """Shape of gamma arrivals: below 1 is burstier than Poisson."""
    max_in_flight: Annotated[int, Field(ge=0, le=65536)] = 0
    """Cap on what is in flight in an open loop (0: none); waiting for it counts from the scheduled time."""
    input_tokens: Length = 350
    """Tokens of each prompt as the server counts them, template and BOS included: a number, {uniform: [100, 500]},
    {normal: {mean: 350, std: 50, min: 100, max: 900}}, {lognormal: …} likewise, or {file: FILE} of pairs."""
    output_tokens: Length = 150
    """Tokens of each answer: a number or a distribution, as above; drawn from the seed, alike in every trial and point."""
    shared_prefix: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0
    """This share of each prompt, at its beginning, is the same in all requests."""
    prompts: str | None = None
    """A .jsonl file of prompts (prompt, text, or messages), taken in order, then round again; as long as they are."""
    turns: Annotated[int, Field(ge=1, le=1000, strict=True)] = 1
    """Requests in a session (closed, open): each holds the whole one before it, a canned answer of the asked length, so that
    every run sends the same bytes, and input_tokens more.  A rate is then of sessions."""
    think_time_s: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False), _written("time")] = 0.0
    """From the end of a turn to the next turn of its session; another session may take its slot meanwhile."""
    waves: Count | None = None
    """Waves per trial (wave); default 3."""
    requests: Count | None = None
    """Requests per trial; default: four per slot (closed), 100 (open)."""
    duration_s: Seconds | None = None
    """Bound on a trial's length: no request starts later."""
    trials: Annotated[int, Field(ge=1, le=1000, strict=True)] = 1
    """Repeats of each point, in shuffled order."""
    interleave: bool = True
    """Trials of all points in turn, in shuffled order; false: all trials of a point one after the other."""
    precision: Fraction | None = None
    """Trials go on until the 95 % intervals of TTFT, ITL and output tokens/s are within this share of their means
    ("2%"), at least three and for at most max_time_s."""
    max_time_s: Seconds = 600.0
    """Bound on the time of one point where a precision is asked for."""
    warmup: Annotated[int, Field(ge=0, le=100_000, strict=True)] = 1
    """Requests per trial before the measured ones, in waves of the point's own batch size."""
    same_prompt: bool = False
    """One prompt for all requests: shows what a prefix cache does."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 1
    """Prompts, schedule and order follow from it."""

    @model_validator(mode="after")
    def _agree(self) -> Workload:
        timed = [key for key in ("rates", "rate_ramp", "rate_steps", "trace") if getattr(self, key)]
        if self.mode == "open" and not timed:
            raise ValueError(
                "rates: mode open needs at least one rate (requests per second), or rate_ramp, rate_steps or trace"
            )
        if self.mode != "open" and timed:
            raise ValueError(
                f"{timed[0]}: belongs to mode open; mode is {self.mode} (batch_sizes says how many at once)"
            )
        if self.trace and len(timed) > 1:
            raise ValueError(f"{timed[0]}: a trace has its own times; leave {timed[0]} or trace out")
        given = [key for key in ("prompts", "trace") if getattr(self, key)] + ["turns"] * (self.turns > 1)
        if len(given) > 1:
            raise ValueError(f"{given[0]}: cannot go with {given[1]}; leave one out")
        if given and (clash := next((key for key in ("same_prompt", "shared_prefix") if getattr(self, key)), None)):
            raise ValueError(f"{clash}: cannot go with {given[0]}; leave one out")
        if self.turns > 1 and self.mode == "wave":
            raise ValueError("turns: belongs to mode closed or open; in a wave all go at once")
        if self.waves and self.mode != "wave":
            raise ValueError(f"waves: belongs to mode wave; mode is {self.mode} (use requests or duration_s)")
        if self.waves and self.requests:
            raise ValueError("waves and requests: give one of them")
        for key in ("batch_sizes", "rates"):
            values: list[float] = getattr(self, key)
            if len(set(values)) < len(values):
                raise ValueError(f"{key}: holds a value twice")
        return self


class ClientPart(Part):
    """The load generator itself."""

    workers: Annotated[int, Field(ge=1, le=256, strict=True)] | Literal["auto"] = 1
    """Processes to shard the load over; auto: one for each core."""
    ray: str | None = None
    """Address of a Ray cluster to shard the load over; "local" starts one here."""
    preflight: bool = True
    """false: ask nothing before the first request of the plan.  The model is then taken on trust, and prompts have the
    length of --tokenizer's count, or about the one asked."""


class Theory(Part):
    """What the measurement is held against."""

    hardware: str | None = None
    """A row of the hardware table, or `machine` for this one as `ridgeline machine` measured it."""
    model_config_path: str | None = Field(default=None, alias="model_config")
    """A config.json, the folder that holds it, or a GGUF file; default: the served model's own."""
    dtype: Dtype = None
    """Precision of the weights where the configuration does not tell (fp16, bf16, fp8, int8, int4 …)."""
    kv_dtype: Dtype = None
    """Precision of the KV cache."""
    tp: Annotated[int, Field(ge=1, le=1024)] = 1
    """Accelerators that share each layer."""
    pp: Annotated[int, Field(ge=1, le=1024)] = 1
    """Stages, one accelerator (or `tp` of them) each."""
    framework: Annotated[str | None, _named(_framework)] = None
    """What serves, where the engine's kind does not tell: vllm, sglang, tensorrt-llm, llama.cpp, transformers …"""
    calibration: str | None = None
    """A file that `ridgeline calibrate` wrote: predictions are those of this server, not of any."""
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, protected_namespaces=(),
                              use_attribute_docstrings=True)  # fmt: skip


class Limits(Part):
    """When to give up."""

    connect_s: Seconds = 10.0
    """For a connection to open."""
    first_token_s: Seconds = 300.0
    """For the first generated text of an answer."""
    idle_s: Seconds = 60.0
    """Between two reads, once there was text."""
    total_s: Seconds = 900.0
    """For one request."""
    run_s: Seconds | None = None
    """For the whole run, engine and preflight included: then it is stopped, and what was measured is kept."""
    grace_s: Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False), _written("time")] = 5.0
    """For requests in flight when the run is stopped."""
    preflight_s: Seconds = 30.0
    """For the first answer of all; a server that loads its model on demand may need more."""
    max_error_rate: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of failed requests above which the command ends with exit code 6."""


class Variant(Part):
    """The server in another form; what is left out is as in `engine`."""

    args: list[str] = []
    """Arguments of the server, after those of engine.args."""
    env: dict[str, str] = {}
    """Environment variables, besides those of engine.env."""
    url: str | None = None
    python: str | None = None
    binary: str | None = None
    model: str | None = None
    served_name: str | None = None


# What a search chooses itself, point by point, or cannot have.
SEARCHED = ("waves", "requests", "duration_s", "precision", "trace", "rate_ramp", "rate_steps", "trials", "turns", "batch_sizes",
            "rates", "warmup")  # fmt: skip


class Capacity(Part):
    """A search for the highest batch size or rate that meets an objective (`ridgeline find-capacity`): the points follow
    from it, whatever batch_sizes and rates say."""

    max_points: Annotated[int, Field(ge=2, le=100, strict=True)] = 10
    """Points that are measured at most."""
    max_time_s: Seconds = 900.0
    """Time that is measured at most; a point that has begun ends."""
    start: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None = None
    """Batch size or rate to begin with; default: where theory has the edge, if it knows model and hardware, else 8 or 1/s."""


class Scenario(Part):
    """One experiment.  The file is its documentation."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")] = "run"
    """Names the run folder and the report: letters, digits, dot, dash, underscore."""
    description: str = ""
    """What this experiment is for."""
    engine: Engine = Engine()
    model: str | None = None
    """The model to ask for; default: the only one in /v1/models."""
    tokenizer: str | None = None
    """A tokenizer.json or its folder; default: the model's folder, then the server's /tokenize, then its usage."""
    api_key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the key; the key itself never stands here."""
    api_key_file: str | None = None
    """A file that holds the key and nothing else, instead of a variable."""
    workload: Workload = Workload()
    client: ClientPart = ClientPart()
    theory: Theory = Theory()
    limits: Limits = Limits()
    slo: Annotated[str, _checked("harness.slo", "parse")] | None = None
    """What the load must meet, ttft_p95=500ms,itl_p95=50ms: the report answers yes, no, or up to which load."""
    price: Annotated[str, _checked("harness.prices", "usd_per_h")] | None = None
    """US dollars for an hour of one accelerator, 1.2/h; default: a list price where one is known."""
    capacity: Capacity | None = None
    """{max_points: 10, max_time_s: 15min}: search for the highest load that holds `slo` (mode closed or open)."""
    report: str | None = None
    """Where the report goes; default: report.html in the run folder."""
    variants: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,39}$")], Variant] = {}
    """Name -> {args: [--max-num-seqs, "1"]}, {url: …}, {env: …}: one run each, in a folder of its own (a matrix with the
    batch sizes); the first is the base of a comparison."""
    interleave: bool = False
    """Variants take turns, one trial of all points each, in the order ABBA; servers are started anew for each."""
    _places: Places = PrivateAttr(default_factory=Places)

    @property
    def places(self) -> Places:
        return self._places

    def at(self, *path: str) -> str:
        """How an error names a key: `FILE:LINE: workload.batch_sizes`."""
        return f"{self._places.line_of(path)}: {dotted(path)}"

    @model_validator(mode="after")
    def _searchable(self) -> Scenario:
        if self.capacity is None:
            return self
        load, usual = self.workload, Workload()
        if load.mode == "wave":
            raise ValueError("workload.mode: a search needs closed (batch sizes) or open (rates); got wave")
        try:
            importlib.import_module("harness.slo").upper(self.slo, "slo")  # which reads what reads scenarios
        except RidgelineError as problem:
            raise ValueError(str(problem)) from None
        taken = [f"workload.{key}" for key in SEARCHED[:9] if getattr(load, key) != getattr(usual, key)]
        taken += ["client.workers"] * (self.client.workers != 1 or self.client.ray is not None)
        taken += ["variants"] * bool(self.variants)
        if taken:
            raise ValueError(f"{taken[0]}: cannot go with capacity, which sets its points itself; leave it out")
        return self


def load(text: str, where: str = "scenario") -> Scenario:
    """Parse and validate.  Raises RidgelineError (code 2): `where:line: key: what is wrong, what is allowed`."""
    values, lines = yaml_lines.read(text, where)
    return validate(values, where, Places(where, lines))


def validate(values: dict[str, Any], where: str, places: Places | None = None) -> Scenario:
    """Values -> Scenario.  `places`: where each key stands, if in a file.  Raises RidgelineError (code 2)."""
    places = places or Places(where)
    try:
        found = Scenario.model_validate(values)
    except ValidationError as problem:
        raise RidgelineError(explain(problem.errors(include_url=False)[0], places, Scenario)) from None
    found._places = places
    return found


def schema() -> str:
    """The JSON Schema of a scenario, for editors."""
    return json.dumps(Scenario.model_json_schema(by_alias=True), indent=1, sort_keys=True)


def commented() -> str:
    """A scenario with every key, its default and its meaning."""
    lines = ["# A Ridgeline scenario: `ridgeline run THIS_FILE`.  Every key has a default; keep what you change."]
    for name, info in Scenario.model_fields.items():
        part = info.annotation
        if isinstance(part, type) and issubclass(part, Part):
            lines += ["", f"# {(part.__doc__ or '').strip()}", f"{name}:"]
            lines += ["  " + _commented_key(key, inner) for key, inner in part.model_fields.items()]
        else:
            lines.append(_commented_key(name, info))
    return "\n".join(lines) + "\n"


def _commented_key(name: str, info: Any) -> str:
    default = info.get_default(call_default_factory=True)
    value = "" if default is None else json.dumps(default)
    key = info.alias or name
    return f"{'# ' if default is None else ''}{key}: {value}".rstrip() + f"  # {' '.join(info.description.split())}"


def dump(scenario: Scenario) -> str:
    """The scenario as YAML with all that was set, for the run folder."""
    values = scenario.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
