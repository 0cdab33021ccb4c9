"""Give the page its run: one that this process serves, or one of another process, by its folder."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, Protocol

from ranvier.actors.protocol.control_protocol import AskStatus, AskWhy
from ranvier.actors.protocol.host_spec import GATEWAY

from ..bridge.bridge import Bridge
from ..run import client
from ..trace.trace_lines import read_plan
from .layers import Arrow, layers

ANSWER_S = 5.0
WHY_S = 10.0


class Source(Protocol):
    """Provide what a page shows of one run."""

    name: str
    run_dir: Path

    async def state(self) -> dict[str, Any]:
        """Return hosts, sessions and counts now (`Status.snapshot`), without asking a host."""

    async def why(self) -> str:
        """Return who waits for whom, in words, as `ranvier why` prints it."""


class Served:
    """Provide a run that this process serves."""

    def __init__(self, name: str, bridge: Bridge) -> None:
        self.name, self.run_dir, self.bridge = name, bridge.run.dir, bridge

    async def state(self) -> dict[str, Any]:
        bridge = self.bridge

        async def look() -> dict[str, Any]:
            counts, status = bridge.counts, bridge.run.snapshot()
            del status["counters"]
            return {
                **status, "open": bridge.open, "waiting": bridge.waiting, "answered": counts.answered,
                "failed": counts.failed, "left": counts.left, "refused": counts.refused,
            }  # fmt: skip

        return await bridge.call(look)

    async def why(self) -> str:
        return str(await self.bridge.call(self.bridge.run.why))


class Attached:
    """Provide a run of another process, also a training."""

    def __init__(self, run_dir: Path) -> None:
        self.name, self.run_dir = str(read_plan(run_dir).get("name", run_dir.name)), run_dir

    async def state(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads(await asyncio.to_thread(client.ask, self.run_dir, AskStatus(), ANSWER_S))
        return status

    async def why(self) -> str:
        return str(json.loads(await asyncio.to_thread(client.ask, self.run_dir, AskWhy(), WHY_S))["text"])


def described(source: Source) -> dict[str, Any]:
    """Return the graph of a run for the page: its actors in layers, and its edges.

    Raises:
        TraceError: the run folder is damaged.
    """
    plan = read_plan(source.run_dir)
    edges: list[dict[str, Any]] = []
    for edge in plan["edges"]:
        ends = [end.strip() for end in edge["name"].split("->")]
        (begins, _, out), (ends_at, _, into) = (end.partition(".") for end in (ends[0], ends[-1]))
        edges.append({
            "edge": edge.get("index", len(edges)), "name": edge["name"], "source": begins, "target": ends_at, "out": out,
            "into": into, "tensor": edge.get("tensor", ""), "wire": edge["wire"], "back": edge["feedback"],
            "credits": edge["credits_messages"], "codec": edge.get("codec", "raw"),
        })  # fmt: skip
    hosts = plan["hosts"]
    names = [GATEWAY, *(host["actor"] for host in hosts)]
    arrows = [Arrow(edge["source"], edge["target"], edge["back"]) for edge in edges]
    return {
        "name": source.name, "run": source.run_dir.name, "hash": plan.get("hash", ""), "products": plan.get("products"),
        "layers": layers(names, arrows, GATEWAY), "edges": edges,
        "actors": {
            host["actor"]: {
                "kind": host.get("kind", ""), "layers": host.get("layers"), "threads": host.get("threads"),
                "weight_bytes": host.get("weight_bytes"), "replicas": host.get("replicas", 1), "host": host.get("host"),
                "cache_tokens": host.get("cache_tokens"), "device": _device(plan, host["actor"]),
            }
            for host in hosts
        },
    }  # fmt: skip


def _device(plan: dict[str, Any], actor: str) -> str:
    declared = plan.get("expanded", {}).get("actors", {}).get(actor, {})
    return str(declared.get("device", "cpu"))
