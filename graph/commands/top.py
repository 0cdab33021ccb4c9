"""Show a run in progress as a table that updates itself: `ranvier top`.

The run's process reports what it already knows. The rest is read from the trace while the run writes it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ranvier.actors.protocol.control_protocol import AskStatus
from ranvier.transport.system import resident_bytes, run_on_idle_cores

from ..file.errors import RequestError
from ..run import client
from ..sessions.printable import printable
from ..trace.tail import Tail

ANSWER_S = 5.0
MIB = 1 << 20


class Top:
    """Collect what `ranvier top` shows of one run."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._tail = Tail(run_dir)

    def look(self) -> dict[str, Any]:
        """Return the current state as plain data.

        Raises:
            RequestError: there is no such run in progress.
            NoAnswer: the run's process does not answer.
        """
        status: dict[str, Any] = json.loads(client.ask(self._run_dir, AskStatus(), ANSWER_S))
        self._tail.read()
        rates = self._tail.actors()
        for host in status["hosts"]:
            capacity = host["capacity_tokens"]
            host["resident_bytes"] = resident_bytes(host["pid"]) if host["pid"] else None
            host["kv_use"] = status["held_tokens"].get(host["label"], 0) / capacity if capacity else None
            host.update(rates.get(host["label"], {}))
        return {**status, "edges": self._tail.edges(), "run_dir": str(self._run_dir)}


def show(run_dir: Path, interval_s: float, console: Console) -> None:
    """Show the table until the run is over, or until Ctrl-C, then clear it.

    Raises:
        RequestError: there is no such run in progress.
        NoAnswer: the run's process does not answer.
    """
    run_on_idle_cores()
    top = Top(run_dir)
    status = top.look()
    with Live(console=console, transient=True, auto_refresh=False, screen=console.is_terminal) as live:
        while True:
            live.update(view(status), refresh=True)
            time.sleep(interval_s)
            try:
                status = top.look()
            except (RequestError, client.NoAnswer):
                if not (run_dir / "sockets" / "supervisor").exists():
                    return  # the run has ended
                raise


def view(status: Mapping[str, Any]) -> Group:
    """Return two tables: actors and edges."""
    actors = Table(
        title=_text(f"{status['run_dir']}: {status['sessions']} sessions"),
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for name in ("actor", "state"):
        actors.add_column(name)
    for name in ("pid", "tok/s", "steps/s", "batch", "busy", "queue", "step s", "KV", "MiB"):
        actors.add_column(name, justify="right")
    for host in status["hosts"]:
        batch, resident = host.get("tokens_a_step", {}).get("p50"), host["resident_bytes"]
        actors.add_row(
            _text(host["label"]), _text("spare" if host["spare"] else host["state"]), _text(host["pid"] or "-"),
            _number(host.get("tokens_per_second")), _number(host.get("steps_per_second")), _number(batch),
            _share(host.get("busy")), _text(host["queued"]), f"{host['stepping_s']:.1f}" if host["stepping_s"] > 0.5 else "-",
            _share(host["kv_use"]), _number(resident and resident / MIB),
        )  # fmt: skip
    edges = Table(box=None, pad_edge=False)
    edges.add_column("edge")
    for name in ("messages/s", "KiB/s", "wire µs p50", "p95", "credit µs p95"):
        edges.add_column(name, justify="right")
    for edge in status["edges"]:
        edges.add_row(
            _text(edge["edge"]), _number(edge["messages_per_second"]), _number(edge["bytes_per_second"] / 1024),
            _number(edge["wire_us"]["p50"]), _number(edge["wire_us"]["p95"]), _number(edge["credit_us"]["p95"]),
        )  # fmt: skip
    return Group(actors, "", edges)


def _text(value: object) -> Text:
    """Return untrusted text for a table: control characters are escaped, and nothing is read as markup."""
    return Text(printable(str(value)))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if 0 < value < 10 else f"{value:.0f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
