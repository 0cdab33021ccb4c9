"""Cut a mixture-of-experts layer into actors: `attention` (up to the router), `experts`, and `combine`.

Only the tokens that are routed to an expert travel to it. Method: Shazeer et al. 2017; Jiang et al. 2024 (Mixtral).

Shape suffixes: T tokens, H hidden, E experts, k choices per token.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from ..checkpoint.config import ModelConfig
from ..component.actor import Actor, Batch, Context
from ..component.routing import expert_ports, gather, scatter
from . import weights
from .blocks import activate
from .causal import BlocksActor, blocks_of
from .inside import Inside
from .tensors import Matrix, finite, needed, product, read_matrices, read_slot

Held = dict[str, Matrix]


def _fed_forward(config: ModelConfig, held: Held, hidden_TH: torch.Tensor) -> torch.Tensor:
    gate_TI, up_TI = product(hidden_TH, held["up"]).chunk(2, dim=-1)
    return product(activate(config, gate_TI) * up_TI, held["down"])


class Attention(BlocksActor):
    """Run attention and the router of one layer, from `hidden` [tokens, H].

    `residual`, `index` and `weight` go to `combine`; each expert's tokens go out on their own port, `expertN`. A shared
    expert, which every token passes through, also runs here; its output is part of the residual.
    """

    def load(self, context: Context) -> None:
        checkpoint, dtype = needed(context)
        assert context.layers is not None
        self.layer = blocks_of(context, context.layers)
        self.blocks = self.layer
        self.blocks.inside = Inside(())
        self.config: ModelConfig = checkpoint.config
        self.gate_EH = read_slot(weights.gate(self.config, context.layers[0]), checkpoint, dtype, context.device)
        slots = weights.shared_expert(self.config, context.layers[0])
        self.shared = read_matrices(slots, checkpoint, dtype, context)

    def step(self, batch: Batch) -> Mapping[str, torch.Tensor | Batch]:
        residual_TH, normed_TH = self.layer.attention_alone(batch.rows, batch["hidden"])
        if self.shared:
            opened_T1 = product(normed_TH, self.shared["gate"]).sigmoid()
            residual_TH = residual_TH + opened_T1 * _fed_forward(self.config, self.shared, normed_TH)
        scores_TE = F.linear(normed_TH, self.gate_EH).float().softmax(-1)
        weight_Tk, index_Tk = scores_TE.topk(self.config.experts_per_token, dim=-1)
        if self.config.normalises_choices:
            weight_Tk = weight_Tk / weight_Tk.sum(-1, keepdim=True)
        routed = scatter(batch.rows, normed_TH, index_Tk, expert_ports((0, self.config.experts - 1)))
        return {"residual": residual_TH, "index": index_Tk, "weight": weight_Tk, **routed}

    def held_bytes(self) -> int:
        return super().held_bytes() + self.gate_EH.nbytes + sum(tensor.nbytes for tensor in self.shared.values())


class Experts(Actor):
    """Run some experts of one layer: for each, `expertN` [tokens, H] -> `expertN` [tokens, H]."""

    writes = False
    places = True
    makes_new = True
    stateless = True

    def load(self, context: Context) -> None:
        checkpoint, dtype = needed(context)
        assert context.layers is not None and context.experts is not None
        self.config = checkpoint.config
        self.held = {
            number: read_matrices(weights.expert(self.config, context.layers[0], number), checkpoint, dtype, context)
            for number in range(context.experts[0], context.experts[1] + 1)
        }
        context.progress(1.0)

    def step(self, batch: Batch) -> Mapping[str, torch.Tensor | Batch]:
        made: dict[str, torch.Tensor | Batch] = {}
        for number, held in self.held.items():
            port = f"expert{number}"
            made[port] = Batch(batch.rows_of(port), {port: _fed_forward(self.config, held, batch[port])})
        return made

    def held_bytes(self) -> int:
        return sum(tensor.nbytes for held in self.held.values() for tensor in held.values())


class Combine(Actor):
    """Add the weighted outputs of the experts to the residual, in the order of the tokens.

    `residual` [tokens, H], `index` and `weight` [tokens, k], `expertN` -> `hidden` [tokens, H].
    """

    writes = False
    places = True
    makes_new = True
    stateless = True

    def load(self, context: Context) -> None:
        checkpoint, _ = needed(context)
        self.ports = expert_ports((0, checkpoint.config.experts - 1))

    def step(self, batch: Batch) -> Mapping[str, torch.Tensor | Batch]:
        mixed_TH = gather(batch["index"], batch["weight"], batch.tensors, self.ports)
        hidden_TH = batch["residual"] + mixed_TH
        return {"hidden": finite(self, "hidden", hidden_TH)}
