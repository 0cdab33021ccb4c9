"""Train a mixture-of-experts layer that is cut into actors as in `model/experts.py`.

Only the tokens that are routed to an expert travel to it, and only their gradients come back.

Shape suffixes as in `layers.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from ..component.actor import Batch, Context
from ..component.routing import expert_ports, gather
from ..model.slots import Slot
from ..protocol.training_spec import BALANCE
from .layers import NativeStage, attention_slots, expert_slots


class AttentionStage(NativeStage):
    """Run attention and the router: `hidden` -> `residual`, `index`, `weight`, `expertN`, and the balancing loss."""

    def _slots_of(self, context: Context) -> Iterator[tuple[str, Slot]]:
        assert self.layers is not None
        yield from attention_slots(self.config, self.layers[0])

    def forward(self, batch: Batch) -> Mapping[str, torch.Tensor]:
        assert self.layers is not None
        residual_TH, normed_TH = self._attention(self.layers[0], batch["hidden"])
        chosen = self._chosen(self.layers[0], normed_TH)
        made = {"residual": residual_TH, "index": chosen.numbers, "weight": chosen.weights, BALANCE: chosen.balance}
        return {**made, **chosen.parts}


class ExpertsStage(NativeStage):
    """Run some experts, each over its own tokens: `expertN` -> `expertN`."""

    def _slots_of(self, context: Context) -> Iterator[tuple[str, Slot]]:
        assert self.layers is not None and context.experts is not None
        self.ports = expert_ports(context.experts)
        for number in range(context.experts[0], context.experts[1] + 1):
            yield from expert_slots(self.config, self.layers[0], number)

    def forward(self, batch: Batch) -> Mapping[str, torch.Tensor]:
        assert self.layers is not None
        return {port: self._up_and_down(f"layer{self.layers[0]}_{port}_", batch[port]) for port in self.ports}


class CombineStage(NativeStage):
    """Combine `residual`, `index`, `weight`, `expertN` -> `hidden`; it has no weights and passes gradients on."""

    def _slots_of(self, context: Context) -> Iterator[tuple[str, Slot]]:
        yield from ()

    def forward(self, batch: Batch) -> Mapping[str, torch.Tensor]:
        ports = expert_ports((0, self.config.experts - 1))
        return {"hidden": batch["residual"] + gather(batch["index"], batch["weight"], batch.tensors, ports)}


STAGES: Mapping[str, type[NativeStage]] = {
    "attention": AttentionStage,
    "experts": ExpertsStage,
    "combine": CombineStage,
}
"""The kinds that are parts of a mixture, and their modules."""
