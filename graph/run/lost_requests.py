"""Go on with the requests of a lost run, from its journal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec
import trio

from ranvier.actors.errors import ActorFailed, Cause, Overloaded
from ranvier.actors.protocol.host_spec import GATEWAY
from ranvier.transport.format.errors import RanvierError, ResourceError

from ..file.errors import RequestError
from ..sessions.generation import Generation, Later, Over, Source
from ..sessions.journal import Asked, Ended, Request, Resumed
from ..sessions.stream import Tensors
from ..sessions.text_stream import TextStream
from ..sessions.wire_rows import token_tensor

if TYPE_CHECKING:
    from .requests import Requests


class LostRequests:
    """Hold the requests that a run takes over from a run that was lost. `requests` submits them."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._left: dict[str, Request] = {}
        self._resumed: dict[str, Source] = {}
        self._no_room: dict[str, Later] = {}
        """Requests that wait until another request ends."""
        self._one_is_over = trio.Event()

    def one_is_over(self) -> None:
        """Wake `make_room`: a request has ended."""
        self._one_is_over.set()

    def refuse(self, why: Exception) -> None:
        """End, with this error, the requests that wait for room."""
        for key, later in self._no_room.items():
            self._requests.note(Ended(key, "", str(why)))
            later.begin(Over(why))
        self._no_room.clear()

    @property
    def resumed(self) -> Sequence[str]:
        """Return the ids of the resumed run's requests. See `Run.resumed`."""
        return list(self._left)

    def go_on(self, left: Resumed) -> None:
        """Continue the open requests of a lost run, each after its tokens in the journal.

        Requests that do not fit wait until another request ends (`make_room`).

        Raises:
            ResourceError: this run's journal cannot be written. The journal of the lost run is unchanged.
        """
        for key, request in left.requests.items():
            self._left[key] = request
            reason = request.reason
            if reason is None:
                self._resumed[key] = self._gone_on(key) or self._no_room.setdefault(key, Later())
                continue
            end = request.end or Ended(key, reason)
            self._requests.note(_so_far(request))
            self._requests.note(end)
            self._resumed[key] = Over(ActorFailed(GATEWAY, end.error, Cause.RAISED) if end.error else reason)
        for key in self._no_room:
            self._requests.note(_so_far(self._left[key]))
        self._requests.flush()
        if not self._requests.is_durable():
            raise ResourceError("the journal of the new run cannot be written; make room on the disk, and resume again")
        left.moved_to(self._requests.folder)

    def _gone_on(self, key: str) -> Source | None:
        """Submit a request of the lost run. Return None if there is no room for it now."""
        request, asked = self._left[key], self._here(_so_far(self._left[key]))
        inputs: Tensors = {"prompt": token_tensor(asked.source, "prompt")} if asked.source else {}
        try:
            return self._requests.submit(asked.info, inputs, asked, request.deadline_ns)
        except Overloaded as error:
            if self._requests.gateway.streams:
                return None
            why: RanvierError = error  # no open session could end and make room
        except RanvierError as error:
            why = error
        self._requests.note(asked)
        self._requests.note(Ended(key, "", str(why)))
        return Over(why)

    def _here(self, asked: Asked) -> Asked:
        """Return a request whose grammar finds its tokenizer in this run's folder."""
        if asked.info.grammar is None:
            return asked
        return msgspec.structs.replace(
            asked, info=replace(asked.info, grammar=self._requests.grammars.again(asked.info.grammar))
        )

    async def make_room(self) -> None:
        """Submit the lost run's requests that wait for room, in their order, whenever another request ends."""
        while True:
            await self._one_is_over.wait()
            self._one_is_over = trio.Event()
            for key, later in list(self._no_room.items()):
                source = self._gone_on(key)
                if source is None:
                    break
                del self._no_room[key]
                later.begin(source)
            self._requests.flush()

    def resume(self, request_id: str, after: int | None = None) -> Generation:
        """Return the tokens of a request of the resumed run. See `Run.resume`."""
        source = self._resumed.pop(request_id, None)
        if source is None:
            why = (
                "another client has resumed it"
                if request_id in self._left
                else f"expected a request of the resumed run, such as one of {list(self._left)[:5]}"
            )
            raise RequestError(f"request {request_id!r:.80}: {why}")
        request = self._left[request_id]
        generation = Generation(TextStream(self._requests.codec, request.asked.stop, request.info.sampling.min_tokens))
        generation.request_id = request_id
        generation.is_durable = self._requests.is_durable
        generation.begin(source, request.info, len(request.asked.source or request.info.log))
        generation.recorded(len(request.info.log), request.tokens, after)
        return generation


def _so_far(request: Request) -> Asked:
    """Return the request as it was asked, with the tokens that were made so far."""
    return msgspec.structs.replace(request.asked, tokens=tuple(request.tokens))
