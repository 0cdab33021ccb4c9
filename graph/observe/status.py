"""Report the status of a run to clients that watch it. The run already knows it, so no host is asked."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from ranvier.actors.protocol.control_protocol import AskStatus, Done
from ranvier.actors.supervise.supervisor import Supervisor

from ..sessions.gateway import Gateway

PAGE = 4096


class Status:
    """Answer `status` at the control socket."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._gateway: Gateway | None = None
        self.more: Callable[[], Mapping[str, Any]] = dict
        """Returns what the run, or the training, has to add."""
        supervisor.on_request[AskStatus] = self._on_command

    def watch(self, gateway: Gateway) -> None:
        """Report the open sessions of this gateway, too."""
        self._gateway = gateway

    def _on_command(self, client: str, _request: AskStatus) -> None:
        self._supervisor.answer(client, Done(json.dumps({**self.snapshot(), **self.more()})))

    def snapshot(self) -> dict[str, Any]:
        """Return the hosts with state, process and last heartbeat, and the open sessions with the tokens they hold."""
        now_s = time.monotonic()
        hosts = [
            {
                "label": host.spec.label, "state": "lost" if host.lost is not None else host.life.state.value,
                "pid": self._supervisor.pids.get(key), "loaded": host.loaded, "heard_s": now_s - host.heard_s,
                "stepping_s": host.stepping_s, "queued": host.queued, "steps": host.steps, "spare": host.spare,
                "capacity_tokens": host.capacity_tokens, "held_bytes": host.held_bytes, "log": host.spec.log_name,
                "lost": str(host.lost.what) if host.lost is not None else None,
            }
            for key, host in self._supervisor.supervision.hosts.items()
        ]  # fmt: skip
        streams = list(self._gateway.streams.values()) if self._gateway is not None else []
        held: dict[str, int] = {}
        for stream in streams:
            for actor, replicas in stream.replicas.items():
                for replica in replicas:
                    label = f"{actor}.{replica}"
                    held[label] = held.get(label, 0) + len(stream.log)
        return {"hosts": hosts, "sessions": len(streams), "held_tokens": held}
