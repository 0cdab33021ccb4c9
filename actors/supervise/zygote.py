"""Run the zygote, the process that hosts are forked from. It imports torch once, opens no socket and starts no thread.

Importing torch takes 1.6 s and 140 MB; four hosts on two cores would spend over 3 s on it. A fork of the zygote starts in
20 ms and shares those pages. Commands come on standard input, events go to standard output (zygote_protocol.py).

The zygote also prevents hanging orphans. Its standard input ends when the supervisor is gone, for whatever reason. Then it
kills every host and every process that their actors have started, removes the hosts' sockets, and exits.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import os
import select
import signal
import sys
from pathlib import Path

from ranvier.transport import system

from ..component import devices
from .zygote_protocol import Begin, Command, Event, Exited, Imported, NotStarted, Reader, Start, Started, pack

FOR_TRAINING = ("ranvier.actors.training.host", "torch._dynamo")
"""Modules of a training host. torch imports the second one when the first optimiser is made, which takes 1 s."""
SHARED = ("ranvier.actors.host.together",)
OF_OUR_OWN = ("ranvier.actors.model.causal", "ranvier.actors.model.hf_layers")


def main() -> int:
    lifeline = int(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor handles Ctrl-C
    import torch  # noqa: F401

    import ranvier.actors.host.host
    import ranvier.actors.model.causal  # noqa: F401

    # orphans of processes that the actors' code starts become children of this process, which ends them
    system.adopt_orphans()
    gc.collect()
    gc.freeze()  # objects alive now stay, and a collection in a host must not copy their pages
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
        self._wake_read, self._wake_write = os.pipe()
        for end in (self._wake_read, self._wake_write):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self._wake_write)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def report(self, event: Event) -> None:
        """Send an event to the launcher. If the launcher is gone, `run` notices the end of standard input."""
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
                except Exception as error:  # no process or memory is left, or an import failed
                    self.report(NotStarted(command.specs[0].process, f"its process cannot be started: {error}"))

    def _start(self, command: Start) -> None:
        spec = command.specs[0]
        modules = {each.implementation.partition(":")[0] for each in command.specs}
        wanted = [module for module in OF_OUR_OWN if module in modules]
        if spec.training is not None:
            wanted += FOR_TRAINING
        if len(command.specs) > 1:
            wanted += SHARED
        if not sys.modules.keys() >= set(wanted):  # imported once here, not in every host: transformers takes 2 s
            for module in wanted:
                importlib.import_module(module)
            gc.freeze()
        for model in {each.model for each in command.specs if each.model is not None}:
            self._know(Path(model))
        if spec.device != devices.CPU:
            devices.make_sure_of_fork(", ".join(("torch", *wanted)))
        pid = os.fork()
        if pid == 0:
            try:
                code = self._become_host(command)
            except BaseException as error:
                faulthandler.dump_traceback()
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                code = 1
            os._exit(code)  # skips the exit handlers, which are the zygote's
        self._children[pid] = spec.process
        self.report(Started(spec.process, pid))

    def _know(self, model: Path) -> None:
        """Read the headers of a model's files once for all hosts. Errors are ignored here: each host reports them itself."""
        from ..checkpoint import known_checkpoint
        from ..errors import CheckpointError

        with contextlib.suppress(CheckpointError):
            known_checkpoint(model)

    def _become_host(self, command: Start) -> int:
        # The signal comes when the parent's thread ends; the zygote has only one. If the zygote is gone already, the
        # lifeline ends this host.
        system.end_with_parent()
        os.setpgid(0, 0)  # so that processes of the actor's code can be killed with the host
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
        specs = command.specs
        system.name_process(f"rv:{specs[0].log_name}")
        code: int
        if len(specs) > 1:
            code = importlib.import_module(*SHARED).main(specs, self._lifeline)
        else:
            module = "ranvier.actors.host.host" if specs[0].training is None else "ranvier.actors.training.host"
            code = importlib.import_module(module).main(specs[0], self._lifeline)
        return code

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in self._children:  # otherwise it is an orphan of a host
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
        while left := system.orphans():  # each may leave children of its own
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


def _opened_log(path: str) -> int:
    """Open the file for the output of a process, or /dev/null if that fails: a full disk must not stop a host."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY)


if __name__ == "__main__":
    sys.exit(main())
