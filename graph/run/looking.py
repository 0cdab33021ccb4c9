"""Offer the calls of a run that look inside its model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from ..inside import patches
from ..inside.features import Features, Found
from ..inside.lens import Lens, Reader
from ..inside.ops import Op, Wish
from ..plan.plan import Plan
from ..sessions.generation import Generation

if TYPE_CHECKING:
    import torch

Prompt = str | Sequence[dict[str, str]] | Sequence[int]
"""A user's message, a list of chat messages, or token ids."""


class Looking(ABC):
    """Look inside the model of a run."""

    plan: Plan
    _reader: Reader | None = None

    @property
    @abstractmethod
    def generate(self) -> Callable[..., Generation]:
        """Return the method that generates tokens."""

    async def read(self, prompt: Prompt, *, reads: Sequence[str | Wish], **options: Any) -> Mapping[str, torch.Tensor]:
        """Run a prompt through the model once, and return what is inside: float32 [positions, …] by place.

        `options` are those of `generate`, such as `edits` and `raw`. One token is made and dropped.

        Raises:
            RequestError, Overloaded, ActorFailed, Expired: see `generate`.
        """
        generation = self.generate(prompt, reads=reads, **options, max_tokens=1)
        async for _ in generation:
            pass
        return generation.reads

    async def lens(self, prompt: Prompt, *, top: int = 5, **options: Any) -> Lens:
        """Return the likeliest tokens that the hidden states between all layers would give (logit lens).

        They are computed in this process, in float32. `options` are those of `read`.

        Raises:
            RequestError, Overloaded, ActorFailed, Expired: see `generate`.
        """
        if self._reader is None:
            self._reader = await trio.to_thread.run_sync(Reader, self.plan.graph)
        found = await self.read(prompt, **{"reads": [f"hidden 0-{self._reader.layers}"], **options})
        return await trio.to_thread.run_sync(self._reader.lens, found, top)

    def features(self, place: str, file: str | Path, top: int = 32, *, centred: bool = True) -> RunFeatures:
        """Return the features of a sparse autoencoder, which are found in prompts by `of`. See `Features`.

        Raises:
            RequestError: the file cannot be read, or holds no SAE.
        """
        return RunFeatures(self, Features(place, file, top, centred=centred))

    def patch(self, *ops: Op) -> AbstractContextManager[None]:
        """Make changes inside the model for all requests that are opened in a `with run.patch(…)`."""
        return patches.patched(self, ops)


class RunFeatures:
    """Find features in the prompts of a run. `features` holds their directions."""

    def __init__(self, run: Looking, features: Features) -> None:
        self._run = run
        self.features = features

    async def of(self, prompt: Prompt, **options: Any) -> Found:
        """Return the strongest features of each position of a prompt. `options` are those of `Run.read`."""
        found = await self._run.read(prompt, reads=[self.features.place], **options)
        return await trio.to_thread.run_sync(self.features.strongest, found[self.features.place])
