"""Define the keys of an actor in a graph file, and of what other sections share with it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from ranvier.actors.component.devices import CPU, PATTERN
from ranvier.actors.protocol.host_spec import Restart

from .sections import Name, Section

_RESTART = Restart()


class Quorum(Section):
    """Start a step as soon as `quorum` of the actor's inputs have arrived."""

    quorum: int = Field(ge=1, le=1024, description="number of inputs that a step needs")


class Hedge(Section):
    """Send each message to several replicas; the first answer counts."""

    hedge: int = Field(ge=2, le=64, description="copies of each message")
    after: str | None = Field(
        None,
        pattern=r"^p[1-9][0-9]$",
        description="send the second copy only when the first took longer than this percentile, such as p95",
    )


class RestartSection(Section):
    """Limit how often a lost actor is restarted."""

    max: int = Field(
        _RESTART.max,
        ge=1,
        le=1 << 20,
        description="maximum number of restarts within the window; one loss more ends the run",
    )
    window_s: float = Field(_RESTART.window_s, gt=0, strict=False, description="length of the window in seconds")
    backoff_s: float = Field(
        _RESTART.backoff_s,
        ge=0,
        le=3600,
        strict=False,
        description="seconds before the first restart; each further restart within the window waits twice as long",
    )
    snapshot_s: float = Field(
        _RESTART.snapshot_s,
        ge=0,
        strict=False,
        description="seconds between snapshots of an actor that offers them; 0: after every step",
    )


class ActorSection(Section):
    """Describe one actor: a component that runs in a separate process, or in one that it shares."""

    kind: str = Field(
        min_length=1,
        max_length=4096,
        description="embedding, blocks, head; first_stage (embedding and blocks), last_stage (blocks and head); model (all in "
        "one); encoder_embedding, encoder, decoder; attention, experts, combine (one layer of a mixture of experts); "
        "an installed "
        "kind (`ranvier actors` lists all), or ./file.py:Class",
    )
    layers: str | int | None = Field(
        None,
        description="for blocks, stages, encoder and decoder: first-last, both included, such as 0-14; each layer is "
        "in exactly one actor",
    )
    experts: str | int | None = Field(None, description="for experts: first-last of a layer's experts, such as 0-3")
    threads: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="threads it may compute with; default: the cores divided by the run's processes, at least 1",
    )
    cpus: list[Annotated[int, Field(ge=0, le=4095)]] | None = Field(
        None,
        min_length=1,
        description="cores its process may run on, such as [0], including ZeroMQ's thread; default: all",
    )
    device: str = Field(
        CPU,
        pattern=rf"^({PATTERN})$",
        description="device that the actor computes on: cpu, or a GPU of NVIDIA's, such as cuda:0 (docs/gpu.md)",
    )
    host: Name | None = Field(
        None,
        description="name of the process that it shares with the actors of the same host; threads, cpus, device, restart and "
        "spares belong "
        "to the process, so they must be the same for its actors, and none of them has replicas; default: a process of its own",
    )
    replicas: int = Field(
        1, ge=1, le=64, description="number of copies of this actor, each a process; `ranvier scale` changes it"
    )
    policy: Literal["sticky", "round_robin", "least_queued", "lowest_latency"] | Hedge = Field(
        "sticky",
        description="how a row's replica is chosen: sticky (always that of its session), round_robin, least_queued (the "
        "shortest queue), lowest_latency, or {hedge: 2} (a copy to each of two; the first answer counts)",
    )
    restart: Literal["never"] | RestartSection | None = Field(
        None, description="what happens when this actor is lost; replaces the graph's `restart`"
    )
    spares: int = Field(0, ge=0, le=8, description="copies kept ready, with their weights, to replace a lost one")
    cache_tokens: int = Field(
        65536,
        ge=1,
        le=1 << 31,
        description="positions that its KV cache holds, over all sessions; memory is taken when they are used",
    )
    batch_tokens: int = Field(
        256,
        ge=1,
        le=1 << 20,
        description="maximum number of tokens batched into one step; a decoding token waits at an actor at most for "
        "the running "
        "step, one step that waits for credit, and one part of a prompt that does not fit beside the token",
    )
    endpoint: str | None = Field(
        None,
        description="address of its inbox: ipc://./name in the graph's folder, or tcp://127.0.0.1:5555 with tcp; a "
        "socket of a dead "
        "run at that path is replaced, a socket of a live run is not; default: chosen by transport",
    )
    weights: str | None = Field(
        None, max_length=4096, description="for a torch module: ./file.safetensors with its state"
    )
    inputs: dict[str, str] = Field(
        default_factory=dict,
        description='for a torch module: inputs that no edge describes, such as x: "float32[rows, 64]"',
    )
    join: Literal["all", "first"] | Quorum = Field(
        "all",
        description="when a step starts: all inputs hold it, the first input holds it, or {quorum: k} inputs hold it",
    )
    args: dict[str, Any] = Field(
        default_factory=dict,
        description="arguments of a custom actor, as context.args; if its class declares arguments, any other is an error",
    )
