"""Where the command `ranvier` begins. A command that starts a run has the hosts' process import torch while it reads the
graph itself: both take most of a second. A graph that is wrong ends that process again."""

from __future__ import annotations

import sys

STARTING = ("run", "score", "train")
ASKING = ("--help", "-h")


def main() -> None:
    zygote = None
    if sys.argv[1:2] and sys.argv[1] in STARTING and not set(ASKING) & set(sys.argv):
        from ranvier.actors.zygote_process import ZygoteProcess

        zygote = ZygoteProcess()
    try:
        from . import cli

        cli.main(zygote)
    finally:
        if zygote is not None:
            zygote.end()


if __name__ == "__main__":
    main()
