"""Read a chaos file: which tcp links of a run fail, and how (`ranvier run --chaos FILE`).

    links:
      - {from: lower, to: upper, latency_s: 0.02, jitter_s: 0.2}
      - {to: head, cut_after_s: 1, cut_for_s: 10}       # from any sender

The first entry that fits a link applies. `transport/wires/chaos_proxy.py` describes the numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pydantic
import trio
from pydantic import ConfigDict, Field

from ranvier.transport.format.host_id import host_id
from ranvier.transport.wires.chaos_proxy import ChaosProxy, Faults, MessageProxy

from ..file import load
from ..file.errors import GraphError, Problem
from ..file.sections import Section

_Share = Field(0.0, ge=0, le=1, strict=False)
_Seconds = Field(0.0, ge=0, le=3600, strict=False)
_Bytes = Field(0, ge=0, le=1 << 40)


class ChaosLink(Section):
    """Describe the faults of the links between two actors.

    An actor that is not named stands for any actor, and for the gateway.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)

    source: str | None = Field(None, alias="from")
    target: str | None = Field(None, alias="to")
    latency_s: float = _Seconds
    jitter_s: float = _Seconds
    bytes_per_s: int = _Bytes
    slice_bytes: int = _Bytes
    cut_after_s: float = _Seconds
    cut_for_s: float = _Seconds
    reset_after_bytes: int = _Bytes
    hole_after_s: float = _Seconds
    hole_for_s: float = _Seconds
    flip: float = _Share
    repeat: float = _Share
    reorder: float = _Share
    seed: int = 0

    def fits(self, source: str, target: str) -> bool:
        return self.source in (None, source) and self.target in (None, target)

    @property
    def faults(self) -> Faults:
        return Faults(**self.model_dump(exclude={"source", "target"}))


class ChaosFile(Section):
    """Describe a whole chaos file."""

    links: list[ChaosLink] = Field(min_length=1, max_length=1024)


def read(path: Path) -> list[ChaosLink]:
    """Return the links of a chaos file.

    Raises:
        GraphError: the file is not a valid chaos file; the error has the position of each problem.
    """
    document = load.read(path)
    try:
        return ChaosFile.model_validate(document.data).links
    except pydantic.ValidationError as error:
        raise GraphError(
            document.file,
            [
                Problem(
                    f"{'.'.join(map(str, found['loc']))}: {found['msg']}; change the value", document.at(*found["loc"])
                )
                for found in error.errors()
            ],
        ) from None


class Detours:
    """Route the faulty links of one run through proxies.

    For one sender, a proxy replaces the inbox of one receiver. Proxies run while `run` does. `keys` is the folder of the
    run's keys.
    """

    def __init__(self, links: Sequence[ChaosLink], keys: Path | None) -> None:
        self._links = links
        self._nursery: trio.Nursery
        self._keys = keys
        self._proxies: dict[tuple[str, str], ChaosProxy] = {}
        self._behind: dict[tuple[str, str], MessageProxy] = {}
        self._before: Counter[str] = Counter()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the proxies until cancelled."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    def address(self, source: str, target: str, address: str) -> str:
        """Return the address by which `source` reaches `target`, which listens at `address`.

        `source` and `target` are identities. If a fault applies to their link, the result is a proxy, started if
        necessary.
        """
        if not address.startswith("tcp://"):
            return address
        if (source, target) not in self._proxies:
            actors = host_id(source).actor, host_id(target).actor
            link = next((link for link in self._links if link.fits(*actors)), None)
            if link is None:
                return address
            counters: Counter[str] = Counter()
            if link.faults.of_messages:
                assert self._keys is not None  # every tcp link has keys
                behind = MessageProxy(source, target, address, link.faults, self._keys, counters)
                self._behind[source, target], address = behind, behind.address
                self._nursery.start_soon(behind.run)
            proxy = self._proxies[source, target] = ChaosProxy(address, link.faults, counters)
            self._nursery.start_soon(proxy.run)
        return self._proxies[source, target].address

    def forget(self, peer: str) -> None:
        """Stop the proxies of a host that is gone."""
        for key in [key for key in self._proxies if peer in key]:
            proxy = self._proxies.pop(key)
            proxy.stop()
            if key in self._behind:
                self._behind.pop(key).stop()
            self._before += proxy.counters

    def cut(self, source: str, target: str, seconds: float) -> int:
        """Cut the links between two actors for some time, in both directions of the edge. Return how many there are.

        Only links that have a proxy can be cut.
        """
        found = [
            proxy for ends, proxy in self._proxies.items() if {host_id(end).actor for end in ends} == {source, target}
        ]
        for proxy in found:
            proxy.cut_for(seconds)
        return len(found)

    @property
    def proxies(self) -> Sequence[ChaosProxy]:
        return tuple(self._proxies.values())

    @property
    def counters(self) -> Counter[str]:
        """Return what the proxies did to the links, summed over all links."""
        return sum((proxy.counters for proxy in self._proxies.values()), self._before)
