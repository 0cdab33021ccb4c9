"""Define what a host receives for training: its links in both directions, its losses, and its part of the schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ranvier.transport.links.link import LinkSpec

INPUT, INPUT_GRADIENT, OUTPUT, OUTPUT_GRADIENT = "input", "input gradient", "output", "output gradient"
TARGET, LOSS, NORM, SHARED, RING = "target", "loss", "norm", "shared", "ring"
"""Roles of links at one host.

Data arrives at an INPUT, and its gradient leaves at the INPUT_GRADIENT; OUTPUT and OUTPUT_GRADIENT are the other ends. A LOSS
goes to the gateway, and a TARGET comes from it. Over NORM links every stage sends the squared norm of its gradients to every
other stage. The first stage also sends the norm over all stages to the gateway. SHARED links connect actors that hold the same
weight. RING links go from each replica of an actor to the next."""

LOGITS = "logits"
"""Output of a model's last layers from which losses are computed: [tokens, vocabulary]."""
BALANCE = "balance"
"""Output of a mixture's layers from which losses are computed: [], the balancing loss, summed over the layers."""
WAITED = " waited_us"
"""Suffix of a host's counters of waiting time, after the role of the link that was waited for."""
TRAINING, VALIDATION = 1, 2
"""Sessions of a training run. Each counts its own micro-batches, as the positions of its rows."""


def folder_of(root: Path, done: int) -> Path:
    """Return the folder of the shards that are saved after `done` rounds."""
    return root / f"round-{done:08d}"


@dataclass(frozen=True, slots=True)
class TrainingLink:
    """Describe one end of a link: its role, its port and its direction.

    The port of a SHARED link is the other actor and the weight, `actor/weight`. The link carries the micro-batches whose
    number leaves the remainder `at` when it is divided by `every`, the number of replicas at the other end.
    """

    role: str
    port: str
    link: LinkSpec
    outgoing: bool
    every: int = 1
    at: int = 0

    def carries(self, number: int) -> bool:
        """Return whether the link carries the micro-batch of that number."""
        return number % self.every == self.at


@dataclass(frozen=True, slots=True)
class Loss:
    """Describe one term of the loss: its output port, its kind, its target in the data, and its weight."""

    port: str
    kind: str
    target: str | None = None
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Optimizer:
    """Configure the optimiser and its learning rate.

    `kind` is `sgd` or `adamw`. The learning rate rises during `warmup` updates. Then its `decay` is `constant`, or `linear` or
    `cosine` down to `least` times `lr` at the last update.
    """

    kind: str = "adamw"
    lr: float = 1e-3
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup: int = 0
    decay: str = "constant"
    least: float = 0.0
    clip: float | None = None


@dataclass(frozen=True, slots=True)
class TrainingSpec:
    """Describe a host's part in a training run.

    `actions` is the host's line of the schedule for one round of `micro_batches`. A round is one step. If updates are
    asynchronous (`stashes`), a round is all the steps between two pauses. After every `validate_every` rounds come
    `validation` forwards, and after every `save_every` rounds a shard is saved. The host begins with round `first` of `rounds`.
    """

    links: tuple[TrainingLink, ...]
    losses: tuple[Loss, ...]
    actions: tuple[str, ...]
    micro_batches: int
    of_step: int
    """Micro-batches per step. The gateway sends them, and receives their losses, in one message."""
    rounds: int
    updates: int
    optimizer: Optimizer
    kind: str = ""
    share: float = 1.0
    """Weight of one micro-batch in an update."""
    first: int = 0
    context: int = 0
    trains: bool = True
    stashes: bool = False
    recompute: bool = False
    validate_every: int = 0
    validation: int = 0
    save_every: int = 0
    folder: str = ""
    resume: str | None = None
    seed: int = 0
    replicas: int = 1
    """Number of replicas of the actor. They take micro-batches in turn, and sum their gradients before an update."""
    average_every: int = 0
    """If not 0, each replica updates alone, and weights are averaged after this many updates (local SGD, Stich 2019)."""
    lora: tuple[int, float] | None = None
    """Rank and scale of the adapters that are trained beside the blocks' matrices, which do not change (LoRA)."""
    shared: Mapping[str, str] = field(default_factory=dict)
    """Weights that other actors hold, too; each with the actor that sums its gradients."""
