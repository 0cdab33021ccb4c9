"""Define the graph file's keys, their types and bounds. `ranvier schema` prints them as JSON Schema for editors."""

from __future__ import annotations

import difflib
from typing import Any, Literal

import pydantic
from pydantic import ConfigDict, Field

from ranvier.actors.protocol.host_spec import Deadlines

from .actor_section import ActorSection, Hedge, Quorum, RestartSection
from .edge_end import End, end
from .errors import GraphError, Problem
from .load import Document, spelled_out
from .sections import Name, Port, Section
from .training_section import PARTS, TrainingSection

_DEADLINES = Deadlines()


class ModelSection(Section):
    """Name the model that the built-in kinds read, and how they hold its weights."""

    source: str = Field(
        min_length=1,
        max_length=4096,
        description="package://NAME/FILE of an installed package; ./folder, ./file.gguf or ./file.safetensors beside the graph "
        "file; or hf://ORG/NAME (optionally @REVISION, /FILE.gguf) of the Hugging Face hub, from its cache or fetched "
        "once; other "
        "paths need --set model.source=PATH",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16", description="dtype of weights, activations and KV cache"
    )
    weights: Literal["dtype", "int8", "int4", "stored"] = Field(
        "dtype",
        description="how the matrices of blocks and head are held in memory: in dtype; int8 or int4 (rounded, with a scale for "
        "each row and 32 columns); stored (GGUF's Q4_0, Q4_1 and Q8_0 as they are, its other types as int8; other quantised "
        "matrices as int4 or int8 where these hold them without rounding, else in dtype); all but dtype need dtype: bfloat16, "
        "a family that the built-in blocks run, a processor with AVX2, and a C compiler at install",
    )
    products: Literal["repeatable", "fast"] | None = Field(
        None,
        description="repeatable: a token's numbers do not depend on the tokens that are computed beside it, so that batches, "
        "recoveries and the cut of a prompt change no bit (bfloat16, families that the kernels run, AVX2); fast: they "
        "may, where "
        "that is faster; default: repeatable if it costs this processor at most 5 %, which is so without AMX; `ranvier show` "
        "prints the choice",
    )


class EdgeSection(Section):
    """Describe one edge: a connection from an output port to an input port."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)

    source: Port = Field(alias="from", description="actor.port")
    target: Port = Field(alias="to", description="actor.port")
    feedback: bool = Field(False, description="whether the edge closes a cycle: it carries results back to the start")
    at_most: int | None = Field(
        None, ge=1, le=1 << 40, description="for feedback of a custom actor: maximum number of rounds of a row"
    )
    until: str | None = Field(
        None, description="output port with one number per row; a number other than 0 ends the rounds of its row"
    )
    codec: str = Field(
        "raw",
        max_length=40,
        description="how tensors are written: raw, bfloat16, float16, int8, topk or topk:SHARE, each optionally followed by "
        "+lz4 or +zstd; auto or auto:FORM chooses by the link's speed",
    )
    gradient_codec: str = Field(
        "raw",
        max_length=40,
        description="how gradients are encoded in training; the codec's error is added to the next gradient",
    )
    tap: str | None = Field(
        None,
        max_length=4096,
        description="statistics: norm, mean, largest magnitude, share of NaN and infinity, of each message; "
        "./file.py:function: called with the tensor and its rows, may return another tensor",
    )
    credits: int = Field(8, ge=0, le=1 << 20, description="messages that may be in flight or unread")
    credit_bytes: int = Field(64 << 20, ge=1, le=1 << 40, description="bytes that may be in flight or unread")

    @property
    def start(self) -> End:
        """Return the sending end."""
        return end(self.source)

    @property
    def finish(self) -> End:
        """Return the receiving end."""
        return end(self.target)


class SupervisionSection(Section):
    """Set the deadlines, in seconds, after which a host counts as failed."""

    start_deadline_s: float = Field(
        _DEADLINES.start_deadline_s,
        gt=0,
        strict=False,
        description="seconds from the start of a host until it must run",
    )
    heartbeat_interval_s: float = Field(
        _DEADLINES.heartbeat_interval_s,
        gt=0,
        le=60,
        strict=False,
        description="seconds between two heartbeats of a host",
    )
    heartbeat_deadline_s: float = Field(
        _DEADLINES.heartbeat_deadline_s, gt=0, strict=False,
        description="seconds without a heartbeat after which a host counts as lost",
    )  # fmt: skip
    progress_deadline_s: float = Field(
        _DEADLINES.progress_deadline_s, gt=0, strict=False,
        description="seconds that one step may take before its host counts as hung",
    )  # fmt: skip
    join_deadline_s: float = Field(
        _DEADLINES.join_deadline_s, gt=0, strict=False,
        description="seconds after which a request that no actor works on ends with an error: one of its inputs never comes",
    )  # fmt: skip
    stop_deadline_s: float = Field(
        _DEADLINES.stop_deadline_s,
        gt=0,
        le=60,
        strict=False,
        description="seconds that a host has to stop before it is killed",
    )


class TraceSection(Section):
    """Trace a sample of the messages instead of all."""

    sample: float = Field(
        1.0,
        gt=0,
        le=1,
        strict=False,
        description="share of sessions, or in training of micro-batches, whose messages are traced",
    )
    megabytes: int = Field(0, ge=0, le=1 << 20, description="maximum size of each process's file, in MiB; 0: no limit")


class RecordSection(Section):
    """Keep whole messages, for `ranvier replay` and `ranvier diverge`."""

    edges: Literal["all"] | list[str] = Field(
        "all", description="all, or a list of edges (a.x -> b.y), ports (a.x) and actors (a: all its edges)"
    )
    megabytes: int = Field(256, ge=1, le=1 << 20, description="maximum size of each process's recording, in MiB")


class TelemetrySection(Section):
    """Export spans and metrics to other tools."""

    otlp: str | None = Field(
        None, pattern=r"^https?://", max_length=2048,
        description="address that receives spans of requests by OTLP over HTTP, such as http://127.0.0.1:4318",
    )  # fmt: skip
    metrics: str | None = Field(
        None,
        description="loopback address where Prometheus may read /metrics, such as 127.0.0.1:9464; port 0: any free port",
    )


class RunsSection(Section):
    """Limit the run folders that are kept. The oldest are removed when a run begins."""

    newest: int = Field(50, ge=1, le=1 << 20, description="maximum number of run folders")
    gigabytes: float = Field(2.0, ge=0, le=1e9, strict=False, description="maximum size of all together, in 10^9 bytes")


class GraphFile(Section):
    """Describe a graph: actors, edges and settings."""

    ranvier: Literal[1] = Field(description="version of the file format")
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        description="name of the graph, and start of the run folder's name",
    )
    model: ModelSection | None = Field(None, description="the model that the built-in kinds read")
    actors: dict[Name, ActorSection] = Field(min_length=1, max_length=1024, description="the actors by name")
    pipeline: list[Name] | None = Field(None, min_length=1, description="actors in a row; short for their edges")
    edges: list[EdgeSection] = Field(default_factory=list, max_length=65536, description='"a.x -> b.y" or a mapping')
    transport: Literal["ipc", "local"] | str = Field(
        "ipc",
        description="ipc (ZeroMQ), tcp://127.0.0.1 (ZeroMQ; every actor gets a free port of that address), or local (Unix "
        "sockets and shared memory, without ZeroMQ)",
    )
    keys: str | None = Field(
        None,
        max_length=4096,
        description="folder beside the graph file with keys for tcp; `ranvier keys new` makes them",
    )
    prefill_chunk: int | None = Field(
        None,
        ge=1,
        le=1 << 16,
        description="maximum number of prompt tokens in one message; default: what was measured to be fastest, 192 where the "
        "kernels use AMX, else 128",
    )
    max_frame_bytes: int = Field(
        1 << 30, ge=1 << 16, le=1 << 40, description="maximum size of a tensor; a larger one is refused"
    )
    shared_from_bytes: int = Field(
        1 << 20, ge=0, le=1 << 40,
        description="with transport: local, tensors of at least this many bytes go through shared memory; 0: none",
    )  # fmt: skip
    trace: bool | TraceSection = Field(
        True, description="whether every message is traced, or {sample: 0.01, megabytes: 64} for a sample"
    )
    record: RecordSection | None = Field(
        None, description="edges whose whole messages are kept: {edges: all, megabytes: 256}"
    )
    telemetry: TelemetrySection = Field(
        default_factory=lambda: TelemetrySection(),
        description="OpenTelemetry and Prometheus: {otlp: http://127.0.0.1:4318, metrics: 127.0.0.1:9464}",
    )
    runs: RunsSection = Field(
        default_factory=lambda: RunsSection(), description="which run folders are kept: {newest: 50, gigabytes: 2}"
    )
    journal: bool = Field(
        False,
        description="whether requests and their tokens are kept in a file, so that they can continue after the process was "
        "killed: ranvier run --resume RUN",
    )
    restart: Literal["never"] | RestartSection = Field(
        default_factory=lambda: RestartSection(),
        description="restarts of a lost actor: never, or {max: 5, window_s: 60, backoff_s: 0.2}",
    )
    supervision: SupervisionSection = Field(
        default_factory=lambda: SupervisionSection(), description="deadlines after which a host counts as failed"
    )
    training: TrainingSection | None = Field(None, description="how `ranvier train` trains the graph")

    @property
    def sampling(self) -> TraceSection:
        """Return which messages are traced if tracing is on."""
        return self.trace if isinstance(self.trace, TraceSection) else TraceSection()


def validate(document: Document) -> GraphFile:
    """Return the file's data as a `GraphFile`. Edges that are written as text become mappings first.

    Raises:
        GraphError: the file has wrong keys or values. The error lists all of them, each with its position.
    """
    data = dict(document.data)
    problems: list[Problem] = []
    if isinstance(data.get("edges"), list):
        data["edges"] = [_spelled_out(document, index, edge, problems) for index, edge in enumerate(data["edges"])]
    if problems:
        raise GraphError(document.file, problems)
    try:
        return GraphFile.model_validate(data)
    except pydantic.ValidationError as error:
        for found in error.errors():
            if not _of_other_form(document, found):
                problems.append(_problem(document, found))
    raise GraphError(document.file, problems)


def _spelled_out(document: Document, index: int, edge: Any, problems: list[Problem]) -> Any:
    if not isinstance(edge, str):
        return edge
    if "->" not in edge:
        at = document.at("edges", index)
        problems.append(Problem(f"edge {edge!r} has no arrow; write actor.port -> actor.port", at))
    return spelled_out(edge)


def _is_form(part: Any) -> bool:
    """Return whether a part of an error's path names a form of the value (a literal or a section), not a key."""
    return _is_word(part) or part in ("list[str]", "Hedge", "Quorum", "RestartSection", "TraceSection")


def _is_word(part: Any) -> bool:
    return str(part).startswith("literal[") or part == "bool"


def _of_other_form(document: Document, found: Any) -> bool:
    """Return whether the error is about a form that the value was not meant to have."""
    for index, part in enumerate(found["loc"]):
        if _is_form(part):
            given = document.data
            for key in found["loc"][:index]:
                given = given[key]
            if part == "list[str]":
                return not isinstance(given, list)
            return isinstance(given, dict | list) if _is_word(part) else not isinstance(given, dict)
    return False


def _problem(document: Document, found: Any) -> Problem:
    path = tuple(part for part in found["loc"] if part != "[key]" and not _is_form(part))
    kind, given = found["type"], found.get("input")
    word = ".".join(map(str, path))
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(str(path[-1]), _fields_at(path[:-1]), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(_fields_at(path[:-1]))}"
        return Problem(f"unknown key {path[-1]!r}; {hint}", document.at_key(*path))
    if kind == "missing":
        return Problem(f"key {path[-1]!r} is missing; add it", document.at(*path[:-1]))
    if kind == "string_pattern_mismatch":
        expected = "actor.port" if path[-1] in ("from", "to") else "lower-case letters, digits and _"
        if word == "telemetry.otlp":
            return Problem(f"{word}: {given!r:.80} is not an address; expected http://address:port", document.at(*path))
        if word == "name":
            expected = "letters, digits and . _ -"
        return Problem(f"{word}: {given!r:.80} is not a name; expected {expected}", document.at(*path))
    return Problem(f"{word}: {found['msg']}, got {given!r:.80}; change the value", document.at(*path))


def _fields_at(path: tuple[Any, ...]) -> list[str]:
    """Return the keys that are allowed at `path`."""
    if path[-1:] == ("policy",):
        return list(Hedge.model_fields)
    if path[-1:] == ("restart",):
        return list(RestartSection.model_fields)
    if path == ("trace",):
        return list(TraceSection.model_fields)
    if path[-1:] == ("join",):
        return list(Quorum.model_fields)
    sections: dict[str, type[Section]] = {
        "model": ModelSection, "actors": ActorSection, "edges": EdgeSection, "supervision": SupervisionSection,
        "training": TrainingSection, "record": RecordSection, "telemetry": TelemetrySection, "runs": RunsSection,
    }  # fmt: skip
    if path[:1] == ("training",) and len(path) > 1:
        return list(PARTS[str(path[1])].model_fields)
    section = sections.get(str(path[0]), GraphFile) if path else GraphFile
    return [field.alias or name for name, field in section.model_fields.items()]
