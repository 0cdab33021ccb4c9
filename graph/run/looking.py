"""Offer the calls of a run that ask its model about a text, and look inside it."""

from __future__ import annotations

import contextlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from ranvier.actors.component.session import SessionInfo

from ..file.errors import RequestError
from ..inside import patches, places
from ..inside.collection import ROWS_PER_FILE, Collected, Shards, how_of, label_of, positions_of
from ..inside.features import Features, Found
from ..inside.lens import Lens, Reader
from ..inside.ops import Op, Where, Wish
from ..plan.plan import Plan
from ..sessions.generation import Generation, logprobs_of
from ..sessions.stream import Stream
from .request_checks import checked_logprobs, listed
from .requests import Requests

if TYPE_CHECKING:
    import torch

Prompt = str | Sequence[dict[str, str]] | Sequence[int]
"""A user's message, a list of chat messages, or token ids."""


class Looking(ABC):
    """Ask the model of a run about a text, and look inside it."""

    plan: Plan
    _requests: Requests
    _reader: Reader | None = None

    @property
    @abstractmethod
    def generate(self) -> Callable[..., Generation]:
        """Return the method that generates tokens."""

    @abstractmethod
    def _check_open(self) -> None:
        """Raise `LinkClosed` if the run is over."""

    async def score(
        self, ids: Sequence[int], *, traceparent: str | None = None, edits: Sequence[Op] = ()
    ) -> list[float]:
        """Return the log-probability (natural logarithm) of each token of `ids` but the first, given all earlier ones.

        `edits` are changes inside the model, as for `generate`.

        Raises:
            RequestError: there are fewer than two tokens or too many, or the graph is not a causal language model.
            Overloaded: there is no room now.
            ActorFailed: an actor was lost.
        """
        return list((await self._scored(ids, None, traceparent, edits)).scores)

    async def ranked(
        self, ids: Sequence[int], logprobs: int, *, traceparent: str | None = None, edits: Sequence[Op] = ()
    ) -> list[tuple[float, dict[int, float]]]:
        """Return the same as `score`, each with the log-probabilities of the `logprobs` likeliest tokens there, by id.

        Errors are those of `score`.
        """
        numbers = (await self._scored(ids, checked_logprobs(logprobs), traceparent, edits)).numbers
        return [logprobs_of(numbers["logprobs", position]) for position in range(len(ids) - 1)]

    async def _scored(
        self, ids: Sequence[int], logprobs: int | None, traceparent: str | None, edits: Sequence[Op]
    ) -> Stream:
        self._check_open()
        graph, requests = self.plan.graph, self._requests
        if not graph.generates or graph.checkpoint is None:
            raise RequestError(f"graph {graph.name} is not a language model; score needs one")
        if graph.checkpoint.config.encoder is not None:
            raise RequestError(f"graph {graph.name} is an encoder–decoder model; score is for causal ones")
        requests.check(list(ids), 1, spare=1)
        if len(ids) < 2:
            raise RequestError("score: expected at least two tokens, got 1")
        root, caller = requests.traced(traceparent)
        changes = [*patches.of(self), *listed("edits", edits)]
        info = SessionInfo(
            session=0, epoch=0, capacity=len(ids), log=tuple(ids), score=True, logprobs=logprobs, traceparent=root,
            edits=places.edits_of(graph, changes, len(ids), len(ids)),
        )  # fmt: skip
        with contextlib.closing(requests.client(info, caller)) as client:
            await client.event()
        return client.stream

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

    async def collect(
        self,
        prompts: Iterable[Prompt],
        reads: Sequence[str],
        folder: str | Path,
        *,
        at: Where = "all",
        labels: Sequence[int] | None = None,
        dtype: str = "float32",
        rows_per_file: int = ROWS_PER_FILE,
        at_once: int = 8,
        **options: Any,
    ) -> Collected:
        """Write what is inside the model for many prompts into safetensors files (see `inside/collection.py`).

        A call with the same arguments after an interruption goes on with the first prompt that is in no file. Memory holds
        `at_once` prompts and one file.

        Args:
            prompts: the prompts, always in the same order.
            reads: names of places.
            folder: where the files go.
            at: the positions that are read (see `ranvier.ops`).
            labels: a whole number for each prompt, for probes.
            dtype: `float32`, `bfloat16` or `float16`.
            rows_per_file: a file is written when it has so many rows.
            at_once: how many prompts run at the same time.
            options: see `read`.

        Raises:
            RequestError, Overloaded, ActorFailed, Expired: see `generate`. Also: the folder holds something else.
            OSError: a file cannot be written.
        """
        wishes = [Wish(each, at) for each in reads]
        names = [place.name for wish in wishes for place in places.named(wish.places, places.offered(self.plan.graph))]
        edits = [*patches.of(self), *options.get("edits", ())]
        how = how_of(at, {**options, "edits": edits})
        shards = Shards(Path(folder), names, dtype, rows_per_file, labels=labels is not None, how=how)
        following = enumerate(prompts)
        for number, prompt in itertools.islice(following, shards.prompts):
            shards.skip(number, prompt)
        while group := list(itertools.islice(following, at_once)):
            found = await self._read_all(group, wishes, options)
            for number, prompt in group:
                values, tokens = found[number]
                row = prompt, values, positions_of(at, tokens), label_of(labels, number)
                await trio.to_thread.run_sync(shards.add, *row)
        return await trio.to_thread.run_sync(shards.done)

    async def _read_all(
        self, prompts: Iterable[tuple[int, Prompt]], reads: Sequence[Wish], options: Mapping[str, Any]
    ) -> dict[int, tuple[Mapping[str, torch.Tensor], int]]:
        """Return what is read of some prompts at once, and their numbers of tokens, by the number of the prompt."""
        found: dict[int, tuple[Mapping[str, torch.Tensor], int]] = {}
        failures: list[Exception] = []

        async def one(number: int, prompt: Prompt) -> None:
            try:
                generation = self.generate(prompt, reads=reads, **options, max_tokens=1)
                async for _ in generation:
                    pass
                found[number] = generation.reads, generation.result.prompt_tokens
            except Exception as error:
                failures.append(error)
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for number, prompt in prompts:
                nursery.start_soon(one, number, prompt)
        if failures:
            raise failures[0]
        return found

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
