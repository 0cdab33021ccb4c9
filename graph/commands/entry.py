"""Start the command `ranvier`.

A command that starts a run first starts the process from which hosts are forked. That process imports torch while the
command reads the graph: each takes most of a second. If the graph is wrong, the process is ended again.
"""

from __future__ import annotations

import os
import signal
import sys

STARTING = ("run", "score", "serve", "train")
ASKING = ("--help", "-h")
INTERRUPTED = 130


def _at_once(_number: int, _frame: object) -> None:
    """End at once on Ctrl-C, as long as nothing runs that must be ended in order.

    This does not raise an exception: it could occur inside any library, which might turn it into another error. The
    process from which hosts are forked ends when its standard input closes.
    """
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


def main() -> None:
    """Run the command line. Ctrl-C ends it without a traceback at any time, also during imports."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _at_once)
    zygote, interrupted = None, False
    try:
        from ranvier.actors.supervise.zygote_process import ZygoteProcess, open_standard_streams

        open_standard_streams()
        for name in ("stdin", "stdout", "stderr"):  # None if the parent closed it, as cron and init do
            if getattr(sys, name) is None:
                setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115
        if sys.argv[1:2] and sys.argv[1] in STARTING and not set(ASKING) & set(sys.argv):
            zygote = ZygoteProcess()
        from . import cli

        cli.main(zygote)
    except KeyboardInterrupt:
        interrupted = True
    except SystemExit as error:
        interrupted = error.code == INTERRUPTED
        if not interrupted:
            raise
    finally:
        if zygote is not None:
            zygote.end()
    if interrupted:
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)  # at once: the interpreter would print more about the interrupt
