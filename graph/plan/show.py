"""Format the plan for people: as tables, a mermaid diagram or a dot graph."""

from __future__ import annotations

from collections.abc import Sequence

from ranvier.actors.checkpoint import Checkpoint
from ranvier.actors.checkpoint.quant_methods import FLOATS
from ranvier.actors.errors import counted
from ranvier.actors.model.weights import forms
from ranvier.actors.protocol.host_spec import GATEWAY

from ..file.schema import ModelSection
from .plan import Plan, PlannedEdge, PlannedHost


def amount(count: float) -> str:
    """Format a number of bytes with a unit, such as 56.6 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("the last unit takes everything")


def text(plan: Plan) -> str:
    """Return tables of the processes, their layers and weights, and of the bytes per token on every edge."""
    lines = [f"graph {plan.graph.name} ({plan.hash})"]
    if plan.graph.checkpoint is not None and plan.graph.file.model is not None:
        config = plan.graph.checkpoint.config
        native = all(config.runs(blocks=actor.kind.holds_blocks) for actor in plan.graph.actors.values())
        lines.append(
            f"model {plan.graph.file.model.source}: {config.family}, {config.layers} layers of {config.hidden}, "
            f"vocabulary {config.vocab}, {plan.graph.file.model.dtype}"
            + (f", {plan.products} products" if plan.products is not None else "")
            + ("" if native else "; run by transformers' own layers, slower")
        )
        lines += _weights(plan.graph.checkpoint, plan.graph.file.model) if native else []
        lines += [f"warning: {warning}" for warning in plan.graph.warnings]
    head: tuple[str, ...] = (
        "actor",
        "kind",
        "replicas",
        "layers",
        "threads",
        "weights",
        "bytes",
        "KV per token",
        "KV tokens",
    )
    rows: list[tuple[str, ...]] = [
        (h.actor, h.kind, _replicas(h), _layers(h), str(h.threads), amount(h.weight_bytes), str(h.weight_bytes),
         amount(h.cache_bytes_per_token) if h.cache_tokens else "-", str(h.cache_tokens or "-"))
        for h in plan.hosts
    ]  # fmt: skip
    if any(host.host is not None for host in plan.hosts):
        head = (head[0], "host", *head[1:])
        rows = [(row[0], host.host or "-", *row[1:]) for row, host in zip(rows, plan.hosts, strict=True)]
    lines += ["", *_table(head, rows)]
    total = sum(host.weight_bytes * host.replicas for host in plan.hosts)
    lines += [f"{counted(plan.processes, 'process')}, {amount(total)} ({total} bytes) of weights", ""]
    lines += _table(("edge", "carries", "per token", "wire", "codec", "credits", ""), [
        (e.name, e.tensor, _cost(e), e.wire, e.codec, f"{e.credits_messages} / {amount(e.credits_bytes)}",
         "feedback" if e.feedback else "")
        for e in plan.edges
    ])  # fmt: skip
    return "\n".join(lines)


def _weights(checkpoint: Checkpoint, model: ModelSection) -> list[str]:
    """Say how quantised matrices are stored, and how they are held in memory."""
    found = forms(checkpoint, model.weights, model.dtype)
    if all(stored in FLOATS for stored, _, _ in found):
        return []
    return [f"weights in memory: {', '.join(f'{count} x {stored} as {held}' for stored, held, count in found)}"]


def mermaid(plan: Plan) -> str:
    """Return the graph as a mermaid flowchart, for documentation pages."""
    lines = ["flowchart LR", f"    {GATEWAY}([{GATEWAY}])"]
    for host in plan.hosts:
        if host.host is None:
            lines.append(_box(host))
    for name in dict.fromkeys(host.host for host in plan.hosts if host.host is not None):
        lines += [f"    subgraph {name}", *(f"    {_box(host)}" for host in plan.hosts if host.host == name), "    end"]
    for checked, edge in zip(plan.graph.edges, plan.edges, strict=True):
        arrow = "-.->" if edge.feedback else "-->"
        lines.append(f'    {checked.source} {arrow}|"{checked.out}, {_cost(edge)}"| {checked.target}')
    return "\n".join(lines)


def _box(host: PlannedHost) -> str:
    return f'    {host.actor}["{host.actor}<br/>{_label(host)}"]'


def dot(plan: Plan) -> str:
    """Return the graph in the language of Graphviz."""
    lines = [f'digraph "{plan.graph.name}" {{', "  rankdir=LR;", "  node [shape=box];", f"  {GATEWAY} [shape=oval];"]
    lines += [f'  {host.actor} [label="{host.actor}\\n{_label(host)}"];' for host in plan.hosts]
    for index, name in enumerate(dict.fromkeys(host.host for host in plan.hosts if host.host is not None)):
        inside = "; ".join(host.actor for host in plan.hosts if host.host == name)
        lines.append(f'  subgraph cluster_{index} {{ label="{name}"; {inside}; }}')
    for checked, edge in zip(plan.graph.edges, plan.edges, strict=True):
        style = ", style=dashed" if edge.feedback else ""
        lines.append(f'  {checked.source} -> {checked.target} [label="{checked.out}, {_cost(edge)}"{style}];')
    return "\n".join([*lines, "}"])


def _label(host: PlannedHost) -> str:
    layers = f" {_layers(host)}" if host.layers else ""
    copies = f", {_replicas(host)}" if host.replicas > 1 else ""
    return f"{host.kind}{layers}, {amount(host.weight_bytes)}{copies}"


def _replicas(host: PlannedHost) -> str:
    return f"{host.replicas} x {host.policy}" if host.replicas > 1 else "1"


def _layers(host: PlannedHost) -> str:
    if host.layers is None:
        return "-"
    first, last = host.layers
    return f"{first}-{last}" if last > first else str(first)


def _cost(edge: PlannedEdge) -> str:
    if edge.bytes_per_token is None:
        return "-"
    if edge.codec == "raw":
        return f"{edge.bytes_per_token} B"
    return f"{edge.bytes_per_token} -> {edge.wire_bytes_per_token} B"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[index]) for row in [head, *rows]) for index in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
    ]
