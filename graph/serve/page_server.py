"""Show the page of a run of another process: `ranvier page RUN`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn
import uvloop
from starlette.applications import Starlette
from starlette.routing import Route

from ..bridge.problems import Problem
from ..page.pages import Pages
from ..page.sources import Attached
from .app import answering, on_problem
from .connections import BoundedProtocol
from .guard import Door, Guard, names_of
from .server import bound

MOST_BYTES = 1 << 16
"""Most bytes of a request's body. The page sends none."""
CLOSED_S = 1


def serve_page(run_dir: Path, host: str, port: int, on_ready: Callable[[str], None]) -> None:
    """Serve the page of a run until SIGINT or SIGTERM. Call `on_ready` with its address.

    Raises:
        RequestError: the address is taken or cannot be.
        TraceError: the folder is no run's.
    """
    source = Attached(run_dir)
    pages = Pages({source.name: source}, faults=False, logs=True)
    gets, _ = pages.routes()
    routes = [Route(path, answering(endpoint)) for path, endpoint in gets.items()]
    app = Starlette(routes=routes, exception_handlers={Problem: on_problem, Exception: on_problem})
    door = Door(names_of(host, ()), most_bytes=MOST_BYTES)
    config = uvicorn.Config(
        Guard(app, door, frozenset()), http=BoundedProtocol, log_config=None, access_log=False, lifespan="off", ws="none",
        timeout_graceful_shutdown=CLOSED_S, server_header=False,
    )  # fmt: skip

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            pages.close()
            super().handle_exit(sig, frame)

    with bound(host, port) as listening:
        name = f"[{host}]" if ":" in host else host
        on_ready(f"http://{name}:{listening.getsockname()[1]}/")
        server = Server(config)
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again once it has ended
            uvloop.run(server.serve(sockets=[listening]))
