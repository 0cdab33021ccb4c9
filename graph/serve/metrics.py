"""Show what the server has done and does, for Prometheus: /metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..bridge.bridge import Bridge

_FIGURES: tuple[tuple[str, str, str, Callable[[Bridge], int]], ...] = (
    ("ranvier_server_answers_total", "counter", "answers that were completed", lambda b: b.counts.answered),
    ("ranvier_server_refused_total", "counter", "requests that the queue had no room for", lambda b: b.counts.refused),
    ("ranvier_server_left_total", "counter", "answers whose client left before their end", lambda b: b.counts.left),
    ("ranvier_server_failed_total", "counter", "answers that ended with an error", lambda b: b.counts.failed),
    ("ranvier_server_tokens_total", "counter", "tokens that were made", lambda b: b.counts.tokens),
    ("ranvier_server_open", "gauge", "requests that are open, those that wait included", lambda b: b.open),
    ("ranvier_server_waiting", "gauge", "requests that wait for room", lambda b: b.waiting),
)


async def page(models: Mapping[str, Bridge]) -> str:
    """Return the page: a line for each figure and model."""
    lines = []
    for name, kind, what, figure in _FIGURES:
        lines += [f"# HELP {name} {what}", f"# TYPE {name} {kind}"]
        lines += [f'{name}{{model="{_quoted(model)}"}} {figure(bridge)}' for model, bridge in models.items()]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
