"""Show which tokens the hidden states of each layer would give (logit lens, nostalgebraist 2020).

Shape suffixes: L places between layers, P positions, k tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ranvier.actors.component.actor import Context
from ranvier.actors.component.kinds import BUILT_IN, make

from ..check.checked import Graph
from ..file.errors import RequestError
from ..plan.plan import implementation_of

if TYPE_CHECKING:
    import torch

MOST_AT_ONCE = 256
"""Positions whose logits are held at once."""


@dataclass(frozen=True, slots=True, eq=False)
class Lens:
    """Hold the likeliest tokens of every place between layers.

    `places` are their names. `tokens` int64 [L, P, k] and `probabilities` float32 [L, P, k] begin with the likeliest ones.
    """

    places: tuple[str, ...]
    tokens: torch.Tensor
    probabilities: torch.Tensor

    def table(self, words: Callable[[Sequence[int]], str], position: int = -1) -> str:
        """Return a line for each place: its likeliest tokens at a position, as `words` writes them, and their probabilities."""
        rows = []
        for place, tokens, shares in zip(
            self.places, self.tokens[:, position].tolist(), self.probabilities[:, position].tolist(), strict=True
        ):
            said = "  ".join(f"{words([token])!r} {share:.2f}" for token, share in zip(tokens, shares, strict=True))
            rows.append(f"{place:<12} {said}")
        return "\n".join(rows)


class Reader:
    """Turn hidden states into logits as the model's own head does, in float32 in this process.

    Raises:
        RequestError: the graph does not generate tokens from layers.
    """

    def __init__(self, graph: Graph) -> None:
        if graph.checkpoint is None or not graph.generates or not graph.checkpoint.config.offers_places:
            raise RequestError(f"graph {graph.name}: nothing can be read between the layers of its model")
        from ranvier.actors.model.head import Head

        head = make(implementation_of(BUILT_IN["head"], graph.checkpoint), None)
        assert isinstance(head, Head)
        head.load(Context("lens", {}, lambda _: None, graph.checkpoint, "float32"))
        self.layers = graph.checkpoint.config.layers
        self.logits = head.logits
        """Return the logits of hidden states [P, H], float32 [P, V]."""

    def lens(self, hidden: Mapping[str, torch.Tensor], top: int) -> Lens:
        """Return the likeliest tokens of hidden states [P, H] by place."""
        import torch

        with torch.inference_mode():
            found = [self._likeliest(hidden_PH, top) for hidden_PH in hidden.values()]
        return Lens(
            tuple(hidden), torch.stack([tokens for tokens, _ in found]), torch.stack([shares for _, shares in found])
        )

    def _likeliest(self, hidden_PH: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        parts = []
        for part_PH in torch.split(hidden_PH, MOST_AT_ONCE):
            shares_PV = self.logits(part_PH).softmax(-1)
            parts.append(shares_PV.topk(min(top, shares_PV.shape[1])))
        return torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])
