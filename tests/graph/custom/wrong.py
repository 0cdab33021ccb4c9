"""Define a custom stack of attention layers, with its own KV cache, that computes wrongly as `args` says."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ranvier import Actor, Batch, Context, SessionInfo, TensorSpec

WIDTH = 16


class Attention(nn.Module):
    """Apply one head to a session's positions so far.

    Keys and values are [positions, WIDTH]."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, given: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(self.query(given) @ keys.T / WIDTH**0.5, dim=-1)
        return given + weights @ values


class Stack(Actor):
    """Map `x` to `y`, both float32 [tokens, WIDTH].

    The state of a session is its keys and values. args: `layers`, `seed`, `fault` ("a stale row", "swapped rows" or
    "lower precision"), and `at`, the layer with the fault."""

    inputs = {"x": TensorSpec("float32", ("tokens", WIDTH))}
    outputs = {"y": TensorSpec("float32", ("tokens", WIDTH))}

    def load(self, context: Context) -> None:
        torch.manual_seed(context.args["seed"])
        self.layers = nn.ModuleList(Attention() for _ in range(context.args["layers"]))
        self.fault, self.at = context.args.get("fault"), context.args.get("at")
        self.kept: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def open(self, session: SessionInfo) -> None:
        self.kept[session.session] = [(torch.empty(0, WIDTH), torch.empty(0, WIDTH)) for _ in self.layers]

    def close(self, session: int) -> None:
        del self.kept[session]

    def step(self, batch: Batch) -> Mapping[str, torch.Tensor]:
        hidden = batch["x"]
        for index, layer in enumerate(self.layers):
            wrong = self.fault if index == self.at else None
            if wrong == "swapped rows" and len(hidden) > 1:
                hidden = hidden.flip(0)
            made, start = [], 0
            for row in batch.rows:
                given = hidden[start : start + row.tokens]
                keys, values = self.kept[row.session][index]
                keys, values = torch.cat((keys, layer.key(given))), torch.cat((values, layer.value(given)))
                if wrong == "a stale row" and row.tokens > 4:
                    keys[4] = keys[3]
                self.kept[row.session][index] = keys, values
                if wrong == "lower precision":
                    made.append(layer(given.bfloat16().float(), keys.bfloat16().float(), values))
                else:
                    made.append(layer(given, keys, values))
                start += row.tokens
            hidden = torch.cat(made)
        return {"y": hidden}
