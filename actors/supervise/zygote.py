"""The process that hosts are forked from: it imports torch once, opens no socket and starts no thread.

One import of torch is 1.6 s and 140 MB; four hosts and two cores would spend over 3 s on theirs. A fork of this process
starts in 20 ms and shares those pages. Commands come on standard input, events go to standard output
(zygote_protocol.py).

It is also what guards against orphans that hang: when its standard input ends, so when the supervisor is gone for
whatever reason, it kills every host and whatever their actors have started, removes their sockets, and leaves.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import os
import select
import signal
import sys
from pathlib import Path

from .zygote_protocol import Begin, Command, Event, Exited, Imported, NotStarted, Reader, Start, Started, pack

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
FOR_TRAINING = ("ranvier.actors.training.host", "torch._dynamo")
"""The second is what torch's optimisers import when the first one is made; it takes a second."""
OF_OUR_OWN = ("ranvier.actors.model.causal", "ranvier.actors.model.hf_layers")


def main() -> int:
    lifeline = int(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's to handle
    import torch  # noqa: F401

    import ranvier.actors.host.host
    import ranvier.actors.model.causal  # noqa: F401

    # what the actors' own code starts and leaves behind comes to this process, which ends it
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    gc.collect()
    gc.freeze()  # what is alive now stays, and a collection in a host must not copy its pages
    zygote = Zygote(lifeline)
    zygote.report(Imported())
    return zygote.run()


class Zygote:
    """Fork hosts, reap them, and report how they ended."""

    def __init__(self, lifeline: int) -> None:
        self._lifeline = lifeline
        self._sockets: Path | None = None
        self._children: dict[int, str] = {}
        self._commands: Reader[Command] = Reader(Command)
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._wake_write)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def report(self, event: Event) -> None:
        """Report to the launcher. That it is gone is noticed at standard input."""
        with contextlib.suppress(BrokenPipeError):
            os.write(1, pack(event))

    def run(self) -> int:
        """Obey commands until standard input ends, then kill all hosts. Return the exit code."""
        while True:
            readable, _, _ = select.select([0, self._wake_read], [], [])
            if self._wake_read in readable:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_read, 4096)
                self._reap()
            if 0 in readable:
                data = os.read(0, 1 << 20)
                if not data:
                    return self._end()
                for command in self._commands.feed(data):
                    self._obey(command)

    def _obey(self, command: Command) -> None:
        match command:
            case Begin():
                self._sockets = Path(command.sockets)
                errors = _opened_log(command.errors)
                os.dup2(errors, 2)
                os.close(errors)
            case Start():
                try:
                    self._start(command)
                except Exception as error:  # no process, no memory, or what its kind needs cannot be imported
                    self.report(NotStarted(command.spec.identity, f"its process cannot be started: {error}"))

    def _start(self, command: Start) -> None:
        spec = command.spec
        module = spec.implementation.partition(":")[0]
        wanted = [module] if module in OF_OUR_OWN else []
        if spec.training is not None:
            wanted += FOR_TRAINING
        if not sys.modules.keys() >= set(wanted):  # once here, not in every host: transformers takes two seconds
            for module in wanted:
                importlib.import_module(module)
            gc.freeze()
        if spec.model is not None:
            self._know(Path(spec.model))
        pid = os.fork()
        if pid == 0:
            try:
                code = self._become_host(command)
            except BaseException as error:
                faulthandler.dump_traceback()
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                code = 1
            os._exit(code)  # no farewell of an interpreter that was never ours
        self._children[pid] = spec.identity
        self.report(Started(spec.identity, pid))

    def _know(self, model: Path) -> None:
        """Read the headers of a model's files once for all hosts. What is wrong with them each host finds out itself."""
        from ..checkpoint import known_checkpoint
        from ..errors import CheckpointError

        with contextlib.suppress(CheckpointError):
            known_checkpoint(model)

    def _become_host(self, command: Start) -> int:
        # The signal follows the parent's thread: the zygote has only one. Were it gone already, the lifeline would tell.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.setpgid(0, 0)  # what an actor's own code starts can be ended with it
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for descriptor in (self._wake_read, self._wake_write):
            os.close(descriptor)
        null = os.open(os.devnull, os.O_RDONLY)
        errors = _opened_log(command.stderr)
        os.dup2(null, 0)
        os.dup2(errors, 1)
        os.dup2(errors, 2)
        os.close(null)
        os.close(errors)
        faulthandler.enable()
        spec = command.spec
        with contextlib.suppress(OSError):  # the name in `ps` and `top`, where there is a /proc
            Path("/proc/self/comm").write_text(f"rv:{spec.label}"[:15])
        module = "ranvier.actors.host.host" if spec.training is None else "ranvier.actors.training.host"
        code: int = importlib.import_module(module).main(spec, self._lifeline)
        return code

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in self._children:  # else a host has left it behind
                _kill_group(pid)
                self.report(Exited(self._children.pop(pid), os.waitstatus_to_exitcode(status)))

    def _end(self) -> int:
        for pid in self._children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            _kill_group(pid)
        for pid in self._children:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        while left := _left_behind():  # each may leave others
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)
        if self._sockets is not None:
            with contextlib.suppress(OSError):
                for path in self._sockets.iterdir():
                    path.unlink(missing_ok=True)
                self._sockets.rmdir()
        return 0


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def _left_behind() -> list[int]:
    """Return the processes that have become this one's children, which has one thread and had none but hosts."""
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def _opened_log(path: str) -> int:
    """Open a file for what a process prints. Where the disk is full it goes nowhere: that must not stop a host."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY)


if __name__ == "__main__":
    sys.exit(main())
