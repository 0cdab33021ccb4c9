"""Define the keys under `training:` in a graph file."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ranvier.actors.protocol.training_spec import Optimizer

from .edge_end import End, end
from .sections import Name, Port, Section

_OPTIMIZER = Optimizer()


class DataSection(Section):
    """Name the training data: one of `text`, `tokens`, `tensors`, `source`."""

    text: str | None = Field(None, max_length=4096, description="./file.txt, cut into windows of `context` tokens")
    tokens: str | None = Field(
        None,
        max_length=4096,
        description="./file with token ids, cut like `text`: .bin (16 bits each), .npy, or .safetensors with one tensor",
    )
    tensors: str | None = Field(
        None, max_length=4096, description="./file.safetensors with a tensor for each input and target"
    )
    source: str | None = Field(
        None,
        max_length=4096,
        description="./file.py:Class; its object is called with (step, validation) and returns a dict of tensors",
    )
    args: dict[str, Any] = Field(default_factory=dict, description="arguments of the class in `source`")
    context: int = Field(128, ge=1, le=1 << 20, description="length of a sequence in tokens")
    held_out: float = Field(0.1, ge=0, lt=1, strict=False, description="share at the end, used only for validation")


class LossSection(Section):
    """Describe one term of the loss that training minimises."""

    of: Port = Field(description="actor.port of an output; actor.logits for a model's head")
    kind: Literal["cross_entropy", "mse", "l1", "mean"] = Field(
        "cross_entropy", description="how the term is computed; mean: the output already is a loss"
    )
    target: Name | None = Field(None, description="tensor of the data that the output is compared with")
    weight: float = Field(1.0, strict=False, description="factor of this term in the sum")

    @property
    def output(self) -> End:
        """Return the actor and the output port that the term is computed from."""
        return end(self.of)


class OptimizerSection(Section):
    """Set how weights are updated."""

    kind: Literal["sgd", "adamw"] = Field("adamw", description="method of the updates")
    lr: float = Field(_OPTIMIZER.lr, gt=0, strict=False, description="highest learning rate")
    momentum: float = Field(_OPTIMIZER.momentum, ge=0, lt=1, strict=False, description="momentum of sgd")
    betas: tuple[float, float] = Field(_OPTIMIZER.betas, strict=False, description="betas of adamw")
    eps: float = Field(_OPTIMIZER.eps, gt=0, strict=False, description="epsilon of adamw")
    weight_decay: float = Field(
        _OPTIMIZER.weight_decay,
        ge=0,
        strict=False,
        description="share of a weight, times lr, that each update takes off",
    )
    warmup: int = Field(0, ge=0, description="number of updates over which the learning rate rises")
    decay: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="how the learning rate falls after warmup"
    )
    least: float = Field(
        0.0, ge=0, le=1, strict=False, description="learning rate at the end of the decay, as a share of lr"
    )
    clip: float | None = Field(None, gt=0, strict=False, description="maximum norm of all gradients together")


class EverySection(Section):
    """Set how often something is done."""

    every: int = Field(ge=1, description="interval in steps")
    batches: int = Field(8, ge=1, le=1 << 20, description="number of micro-batches of a validation")


class LoraSection(Section):
    """Configure low-rank adaptation (LoRA, Hu et al. 2021).

    The matrices of blocks stay fixed. A product of two narrow matrices beside each of them is trained.
    """

    rank: int = Field(8, ge=1, le=4096, description="width of the narrow matrices")
    alpha: float = Field(16.0, gt=0, strict=False, description="their product is multiplied by alpha / rank")


class TrainingSection(Section):
    """Describe how the graph is trained."""

    data: DataSection = Field(description="the training data")
    loss: list[LossSection] = Field(
        default_factory=list,
        max_length=64,
        description="terms that are summed; default for a model with a head: the cross entropy of the next token",
    )
    batch: int = Field(ge=1, le=1 << 24, description="examples or sequences per step")
    micro_batches: int = Field(
        1, ge=1, le=1 << 16, description="number of parts of a batch; stages work on different parts at the same time"
    )
    steps: int = Field(ge=1, le=1 << 40, description="number of steps of the whole training")
    schedule: str = Field(
        "1f1b",
        max_length=4096,
        description="gpipe, 1f1b, eager, interleaved, zero-bubble, async, or ./file in the format of "
        "`ranvier show --schedule`",
    )
    accumulate: int = Field(1, ge=1, description="async: micro-batches per update")
    optimizer: OptimizerSection = Field(
        default_factory=lambda: OptimizerSection(), description="how weights are updated"
    )
    validate_: EverySection | None = Field(None, alias="validate", description="measure the loss on held-out data")
    save: EverySection | None = Field(None, description="write a training checkpoint; the last step always writes one")
    lora: LoraSection | None = Field(None, description="train only low-rank matrices beside those of blocks")
    frozen: list[Name] = Field(default_factory=list, description="actors whose weights are not trained")
    average_every: int = Field(
        0,
        ge=0,
        description="N: each replica updates by itself, and weights are averaged every N updates; 0: gradients are summed",
    )
    recompute: bool = Field(False, description="compute activations again in the backward pass instead of keeping them")
    seed: int = Field(0, ge=0, lt=1 << 31, description="seed of new weights and of dropout")


PARTS: dict[str, type[Section]] = {
    "data": DataSection, "loss": LossSection, "optimizer": OptimizerSection, "validate": EverySection, "save": EverySection,
    "lora": LoraSection,
}  # fmt: skip
