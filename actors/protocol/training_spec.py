"""What a host is told when its graph is to be trained: its links in both directions, its losses, its share of the schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ranvier.transport.format.tensor_spec import TensorSpec
from ranvier.transport.links.link import LinkSpec

INPUT, INPUT_GRADIENT, OUTPUT, OUTPUT_GRADIENT = "input", "input gradient", "output", "output gradient"
TARGET, LOSS, NORM, SHARED, RING = "target", "loss", "norm", "shared", "ring"
"""Roles of links at one host. Data comes at an INPUT and its gradient goes out at the INPUT_GRADIENT; a LOSS goes to the
gateway, a TARGET comes from it; by NORM links every stage tells every other, and the first one the gateway, of its gradients;
SHARED links connect those who hold the same weight; RING links go from each replica of an actor to the next."""

LOGITS = "logits"
"""The output of a model's last layers that losses are taken of: [tokens, vocabulary]."""
BALANCE = "balance"
"""The output of a mixture's layers that losses are taken of: [], the balancing loss, summed over the layers."""
WAITED = " waited_us"
"""How a host's counter of waiting ends, after the role of the link that was waited for."""
TRAINING, VALIDATION = 1, 2
"""The sessions of a training run: micro-batches are counted in each by itself, as the positions of its rows."""


def folder_of(root: Path, done: int) -> Path:
    """Where shards lie after so many rounds."""
    return root / f"round-{done:08d}"


@dataclass(frozen=True, slots=True)
class TrainingLink:
    """One end of a link: what it is for, the port (for SHARED: the other actor and the weight, `actor/weight`), which way it
    goes. It is for the micro-batches whose number, divided by the `every` replicas at its other end, leaves `at`."""

    role: str
    port: str
    link: LinkSpec
    outgoing: bool
    every: int = 1
    at: int = 0

    def carries(self, number: int) -> bool:
        """Whether it is for that micro-batch."""
        return number % self.every == self.at

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> TrainingLink:
        link = dict(plain["link"])
        link["tensors"] = tuple((name, TensorSpec(t["dtype"], tuple(t["shape"]))) for name, t in link["tensors"])
        return cls(**{**plain, "link": LinkSpec(**link)})


@dataclass(frozen=True, slots=True)
class Loss:
    """One term of what is minimised: of which output, how, against which target of the data, and how much it counts."""

    port: str
    kind: str
    target: str | None = None
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Optimizer:
    """Steepness and pace of the updates. `kind` is `sgd` or `adamw`; `decay` of the learning rate `constant`, `linear` or
    `cosine`, down to `least` times `lr` at the last update."""

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
    """A host's part in a training run.

    `actions` is its line of the schedule for one round of `micro_batches`; a round is a step, or, where updates are
    asynchronous (`stashes`), as many as lie between two pauses. After each `validate_every` rounds come `validation`
    forwards, after each `save_every` a shard is saved. Rounds are counted from `first`; there are `rounds` in all.
    """

    links: tuple[TrainingLink, ...]
    losses: tuple[Loss, ...]
    actions: tuple[str, ...]
    micro_batches: int
    of_step: int
    """Micro-batches of a step: what the gateway sends, and what it is told of, at once."""
    rounds: int
    updates: int
    optimizer: Optimizer
    kind: str = ""
    share: float = 1.0
    """What a micro-batch counts of an update."""
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
    """Each takes every so manyth micro-batch; gradients are summed over all before an update."""
    average_every: int = 0
    """Or each updates by itself, and after so many updates the weights are averaged (local SGD, Stich 2019)."""
    lora: tuple[int, float] | None = None
    """Rank and scale of what is learned beside the matrices of blocks, which themselves stay."""
    shared: Mapping[str, str] = field(default_factory=dict)
    """Weights that other actors hold, too, and who of them adds the gradients up."""

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> TrainingSpec:
        fields = dict(plain)
        fields["links"] = tuple(TrainingLink.from_plain(link) for link in fields["links"])
        fields["losses"] = tuple(Loss(**loss) for loss in fields["losses"])
        fields["actions"] = tuple(fields["actions"])
        optimizer = dict(fields["optimizer"])
        optimizer["betas"] = tuple(optimizer["betas"])
        fields["optimizer"] = Optimizer(**optimizer)
        fields["lora"] = tuple(fields["lora"]) if fields["lora"] is not None else None
        return cls(**fields)
