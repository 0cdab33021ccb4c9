"""The keys under `training:` in a graph file."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ranvier.actors.protocol.training_spec import Optimizer

from .sections import Name, Port, Section

_OPTIMIZER = Optimizer()


class DataSection(Section):
    """What is learned from: one of `text`, `tokens`, `tensors`, `source`."""

    text: str | None = Field(None, max_length=4096, description="./file.txt, cut into windows of `context` tokens")
    tokens: str | None = Field(
        None,
        max_length=4096,
        description="./file with token ids, cut in the same way: .bin (16 bits each), .npy, or .safetensors with one tensor",
    )
    tensors: str | None = Field(
        None, max_length=4096, description="./file.safetensors with a tensor for each input and target"
    )
    source: str | None = Field(
        None, max_length=4096, description="./file.py:Class, called with (step, validation) for a dict of tensors"
    )
    args: dict[str, Any] = Field(default_factory=dict, description="arguments of the class")
    context: int = Field(128, ge=1, le=1 << 20, description="tokens of one sequence")
    held_out: float = Field(0.1, ge=0, lt=1, strict=False, description="share at the end that is for validation alone")


class LossSection(Section):
    """One term of what is minimised."""

    of: Port = Field(description="actor.port of an output; actor.logits of a model's head")
    kind: Literal["cross_entropy", "mse", "l1", "mean"] = Field(
        "cross_entropy", description="mean: it is a loss already"
    )
    target: Name | None = Field(None, description="the tensor of the data that it should be")
    weight: float = Field(1.0, strict=False, description="what it counts beside the others")


class OptimizerSection(Section):
    """How weights are updated."""

    kind: Literal["sgd", "adamw"] = "adamw"
    lr: float = Field(_OPTIMIZER.lr, gt=0, strict=False, description="learning rate, at its highest")
    momentum: float = Field(_OPTIMIZER.momentum, ge=0, lt=1, strict=False, description="of sgd")
    betas: tuple[float, float] = Field(_OPTIMIZER.betas, strict=False, description="of adamw")
    eps: float = Field(_OPTIMIZER.eps, gt=0, strict=False, description="of adamw")
    weight_decay: float = Field(_OPTIMIZER.weight_decay, ge=0, strict=False)
    warmup: int = Field(0, ge=0, description="updates in which the learning rate rises")
    decay: Literal["constant", "linear", "cosine"] = Field("constant", description="how it falls afterwards")
    least: float = Field(0.0, ge=0, le=1, strict=False, description="down to this share of it")
    clip: float | None = Field(None, gt=0, strict=False, description="largest norm of all gradients together")


class EverySection(Section):
    """So often."""

    every: int = Field(ge=1, description="steps")
    batches: int = Field(8, ge=1, le=1 << 20, description="micro-batches of a validation")


class LoraSection(Section):
    """Low-rank adaptation (LoRA, Hu et al. 2021): the matrices of blocks stay, and a product of two narrow ones beside each
    learns."""

    rank: int = Field(8, ge=1, le=4096, description="width of the narrow matrices")
    alpha: float = Field(16.0, gt=0, strict=False, description="their product counts alpha / rank times")


class TrainingSection(Section):
    """How the graph is trained."""

    data: DataSection
    loss: list[LossSection] = Field(
        default_factory=list,
        max_length=64,
        description="terms that are added up; of a model with a head: the cross entropy of the next token if none is given",
    )
    batch: int = Field(ge=1, le=1 << 24, description="examples or sequences of one step")
    micro_batches: int = Field(
        1, ge=1, le=1 << 16, description="into so many parts it is cut, which stages work on at once"
    )
    steps: int = Field(ge=1, le=1 << 40)
    schedule: str = Field(
        "1f1b",
        max_length=4096,
        description="gpipe, 1f1b, eager, interleaved, zero-bubble, async, or ./file as `ranvier show --schedule` prints",
    )
    accumulate: int = Field(1, ge=1, description="async: micro-batches of an update")
    optimizer: OptimizerSection = Field(default_factory=lambda: OptimizerSection())
    validate_: EverySection | None = Field(None, alias="validate", description="look at what is held out")
    save: EverySection | None = Field(None, description="write a checkpoint; one is written at the end in any case")
    lora: LoraSection | None = Field(None, description="learn small matrices beside those of blocks, and nothing else")
    frozen: list[Name] = Field(default_factory=list, description="actors that learn nothing")
    average_every: int = Field(
        0,
        ge=0,
        description="replicas update by themselves and average their weights after so many updates; 0: their gradients",
    )
    recompute: bool = Field(False, description="compute activations again in the backward pass instead of keeping them")
    seed: int = Field(0, ge=0, lt=1 << 31)


PARTS: dict[str, type[Section]] = {
    "data": DataSection, "loss": LossSection, "optimizer": OptimizerSection, "validate": EverySection, "save": EverySection,
    "lora": LoraSection,
}  # fmt: skip
