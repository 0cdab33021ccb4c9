"""Run a whole transformers model in one actor, from a session's tokens to logits, by the library's forward pass.

Most models keep a session's state in a cache. For some models the library keeps it elsewhere; then each step computes
all tokens again. In a few models the tokens of a prompt see each other in both directions; each of their steps is a
step of the library's `generate`.

Shape suffixes: t tokens of one step, H hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import DynamicCache

from ranvier.transport.format.header import Row

from ..checkpoint.config import ModelConfig
from ..component.actor import Look
from .head import last_of
from .hf_hooks import layer_count, watched
from .kv_cache import Reserved


class WholeSession(Reserved):
    """Hold one session: the tokens that later steps read again, and the state that the model keeps for it."""

    def __init__(self, cache: DynamicCache | None, capacity: int) -> None:
        super().__init__(capacity)
        self.past: Any = cache
        self.tokens: list[int] = []
        self.scored = False


class Whole:
    """Run `model` of transformers; `past_name` is the name of its argument for the cache."""

    def __init__(self, model: Any, config: ModelConfig, past_name: str) -> None:
        self._model, self._past_name = model, "mems" if config.family == "xlnet" else past_name
        self._counts = "position_ids" in inspect.signature(model.forward).parameters
        self._own_cache = self._past_name == "mems" or config.family == "minimax"
        self._uncached, self._both_ways = config.uncached, config.both_ways

    def open(self, capacity: int) -> WholeSession:
        cached = not self._uncached and not self._own_cache
        return WholeSession(DynamicCache(config=self._model.config) if cached else None, capacity)

    def watched(self, row: Row, look: Look) -> AbstractContextManager[None]:
        """Report tensors of the layers to `look` while the context is open.

        Tensors with fewer entries than the row has tokens are skipped. If the model sees prompts in both directions,
        only the last token is reported.
        """
        seen = last_of(row) if self._both_ways else row

        def report(layer: int | None, name: str, tensor_1tH: torch.Tensor) -> None:
            if tensor_1tH.dim() == 3 and len(tensor_1tH) == 1 and tensor_1tH.shape[1] >= row.tokens:
                look(layer, name, (seen,), tensor_1tH[0, -seen.tokens :])

        return watched(self._model, layer_count(self._model), report)

    def logits(self, session: WholeSession, token_t: torch.Tensor) -> torch.Tensor:
        """Return the logits [t, V], and extend the session.

        If the model sees prompts in both directions and the session is not scored, only the last row is valid; the
        other rows are NaN.
        """
        if self._both_ways:
            return self._seen_both_ways(session, token_t)
        if self._uncached:
            session.tokens += token_t.tolist()
            made = self._model(input_ids=torch.tensor([session.tokens]), use_cache=False)
        else:
            given: dict[str, Any] = {self._past_name: session.past}
            if self._counts:  # without them, some models count from 0 in each step
                given["position_ids"] = torch.arange(session.length, session.length + len(token_t))[None]
            made = self._model(input_ids=token_t[None], use_cache=True, **given)
            session.past = getattr(made, self._past_name, session.past)
        logits_tV: torch.Tensor = made.logits[0, -len(token_t) :]
        return logits_tV

    def _seen_both_ways(self, session: WholeSession, token_t: torch.Tensor) -> torch.Tensor:
        before = len(session.tokens)
        session.tokens += token_t.tolist()
        if session.scored:  # a prediction depends on where the prompt ends: make it end at each token in turn
            ends = range(before + 1, len(session.tokens) + 1)
            return torch.stack([self._predicted(session.tokens[:end], None)[0] for end in ends])
        last_V, session.past = self._predicted(session.tokens, session.past)
        logits_tV = torch.full((len(token_t), len(last_V)), torch.nan, dtype=last_V.dtype)
        logits_tV[-1] = last_V
        return logits_tV

    def _predicted(self, tokens: list[int], past: Any) -> tuple[torch.Tensor, Any]:
        """Return the logits [V] after `tokens`, and the new state, by one step of the library's `generate`."""
        ids = torch.tensor([tokens])
        inputs = self._model.prepare_inputs_for_generation(ids, use_cache=past is not None, **{self._past_name: past})
        made = self._model(**inputs)
        return made.logits[0, -1], getattr(made, self._past_name, None)
