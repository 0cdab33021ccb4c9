"""Define `ranvier page`: show the page of a run in progress, or of a training."""

from __future__ import annotations

from typing import Annotated

import typer

from ..file.errors import RequestError
from .command_line import RunFolder, reading, say


def page_command(
    run_dir: RunFolder,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at on loopback; 0: any free one.")] = 8001,
) -> None:
    """Show a run in progress, or a training, in a browser: the graph as it works, latencies, causes. Ctrl-C ends it.

    The run pays only for a question five times a second. `ranvier serve` shows the same page at its own address.
    """
    try:
        from ..serve.page_server import serve_page
    except ImportError as error:
        raise RequestError(f"page needs {error.name}; pip install 'ranvier[serve]'") from None

    def ready(address: str) -> None:
        print(address, flush=True)
        say("open it in a browser; Ctrl-C ends it", error=True)

    with reading(run_dir):
        serve_page(run_dir, "127.0.0.1", port, ready)
