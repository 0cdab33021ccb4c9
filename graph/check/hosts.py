"""Check that actors which share a process agree in what belongs to a process."""

from __future__ import annotations

from collections.abc import Sequence

from ..file.actor_section import ActorSection
from .findings import Findings

OF_A_PROCESS = ("threads", "cpus", "device", "restart", "spares")
"""Keys of an actor that belong to its process."""


class HostCheck(Findings):
    """Check the keys `host` of a graph."""

    def hosts(self) -> None:
        found: dict[str, list[str]] = {}
        for name, section in self.file.actors.items():
            if section.host is not None:
                found.setdefault(section.host, []).append(name)
        for host, names in found.items():
            if host in self.file.actors:
                self._no(names[0], f"host {host!r} has the name of an actor; give the process a name of its own")
            self._agree(host, names)
            for name in names:
                if self.file.actors[name].replicas > 1:
                    self._no(
                        name,
                        f"its {self.file.actors[name].replicas} replicas cannot share host {host!r}; remove one key",
                    )

    def _agree(self, host: str, names: Sequence[str]) -> None:
        first = names[0]
        for key in OF_A_PROCESS:
            expected = _given(self.file.actors[first], key)
            for name in names[1:]:
                got = _given(self.file.actors[name], key)
                if got != expected:
                    self._wrong(
                        f"actor {name}: {key} belongs to the process {host!r}, which it shares: expected {expected} as in "
                        f"{first}, got {got}; make them the same",
                        "actors", name, key if key in self.file.actors[name].model_fields_set else "host",
                    )  # fmt: skip

    def _no(self, name: str, what: str) -> None:
        self._wrong(f"actor {name}: {what}", "actors", name, "host")


def _given(section: ActorSection, key: str) -> object:
    """Return the value of a key as the file may write it."""
    value = section.model_dump()[key]
    return "the default" if value is None else value
