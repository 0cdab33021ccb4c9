"""Define `ranvier serve`: run graphs, and answer the clients of OpenAI's interface."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from ..check.check import load as load_graph
from ..check.checked import Graph
from ..file.errors import RequestError
from ..run import run_folder
from ..run.paths import folder_of_runs
from .command_line import (
    GRAPH,
    AllowCode,
    Log,
    Set,
    Verbose,
    graph_argument,
    interruptible,
    log_form,
    overrides,
    say,
    shown,
)


def serve_command(
    context: typer.Context,
    graphs: Annotated[
        list[Path],
        graph_argument(f"One for each model: {GRAPH}.", "GRAPH..."),
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen at. Another one than loopback needs --api-key-file.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0: any free one.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option("--api-key-file", metavar="FILE", help="Answer only clients with a key of this file, one a line."),
    ] = None,
    certfile: Annotated[
        Path | None,
        typer.Option("--certfile", metavar="FILE", help="Serve over TLS with this certificate chain (PEM)."),
    ] = None,
    keyfile: Annotated[
        Path | None, typer.Option("--keyfile", metavar="FILE", help="The certificate's private key (PEM).")
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", metavar="NAME", help="A further name that clients call this server by."),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-origin", metavar="ORIGIN", help="Let web pages of this origin ask, such as https://chat.example."
        ),
    ] = None,
    queue: Annotated[
        int, typer.Option(min=0, help="Most requests that may wait for room; more are refused with 429.")
    ] = 256,
    deadline: Annotated[
        float | None, typer.Option(min=0.001, help="End an answer with an error after this many seconds.")
    ] = None,
    stop_after: Annotated[
        float,
        typer.Option("--stop-after", min=0, help="Seconds that running answers have to end when the server stops."),
    ] = 20.0,
    resume_window: Annotated[
        float,
        typer.Option(
            "--resume-window", min=0, help="Seconds for which an answer is kept for a client that lost its connection."
        ),
    ] = 60.0,
    allow_faults: Annotated[
        bool,
        typer.Option(
            "--allow-faults", help="Let the page kill, stop and slow actors and cut tcp edges; loopback only."
        ),
    ] = False,
    allow_code: AllowCode = False,
    settings: Set = None,
    runs: Annotated[
        Path, typer.Option("--runs", help="Create the run folders in this folder.")
    ] = run_folder.DEFAULT_ROOT,
    log: Log = None,
    verbose: Verbose = False,
) -> None:
    """Serve graphs over an OpenAI-compatible API, with a page. A graph's name is its model name. Ctrl-C ends it."""
    try:
        from ..serve.guard import is_loopback, read_keys
        from ..serve.server import Options, serving
    except ImportError as error:
        raise RequestError(f"serve needs {error.name}; pip install 'ranvier[serve]'") from None
    from ..run.launch import launch

    if allow_faults and not is_loopback(host):
        raise RequestError(f"--allow-faults: others can reach {host}; faults are only for loopback")
    checked = [load_graph(path, allow_code=allow_code, overrides=overrides(settings)) for path in graphs]
    _check_names(checked)
    options = Options(
        host=host, port=port, queue=queue, deadline_s=deadline, stop_s=stop_after, resume_window_s=resume_window,
        keys=read_keys(api_key_file) if api_key_file is not None else (), allow_hosts=tuple(allow_host or ()),
        allow_origins=tuple(allow_origin or ()), certfile=certfile, keyfile=keyfile,
        faults=allow_faults,
        say=lambda what: say(what, error=True),
    )  # fmt: skip
    if not is_loopback(host) and certfile is None:
        say(f"warning: keys and texts cross the network as they are; serve {host} over TLS with --certfile", error=True)

    async def main() -> None:
        async with contextlib.AsyncExitStack() as running:
            started = {}
            zygotes = [context.obj]  # the first graph takes the one that was started before
            for graph in checked:
                say(f"starting {graph.name}", error=True)
                zygote = zygotes.pop() if zygotes else None
                run = await running.enter_async_context(
                    launch(
                        graph,
                        runs=folder_of_runs(runs),
                        log=log_form(log, verbose),
                        zygote=zygote,
                        cuttable=allow_faults,
                    )
                )
                started[graph.name] = run
            address = await running.enter_async_context(serving(started, options))
            first = checked[0].name
            shown(f"{address}/v1\n")  # a server goes on when nobody reads what it prints
            say(f"page: {address}/", error=True)
            key = " -H 'Authorization: Bearer KEY'" if options.keys else ""
            say(
                f"try: curl {address}/v1/chat/completions{key} -H 'Content-Type: application/json' "
                f"""-d '{{"model": "{first}", "messages": [{{"role": "user", "content": "Hello"}}]}}'""",
                error=True,
            )
            await stop.wait()
            say(f"stopping: running answers have {stop_after:g} s", error=True)

    import trio

    stop = trio.Event()
    interruptible(main, first=stop.set)


def _check_names(graphs: list[Graph]) -> None:
    """Check that the graphs generate text or embed it, and that no two have one name.

    Raises:
        RequestError: they do not.
    """
    for name, count in Counter(graph.name for graph in graphs).items():
        if count > 1:
            raise RequestError(f"{count} graphs are called {name}; clients choose by the name, so give each its own")
    for graph in graphs:
        if not (graph.generates or graph.embeds):
            raise RequestError(
                f"graph {graph.name} neither generates text nor turns `token` into `embedding`; serve offers nothing else"
            )
