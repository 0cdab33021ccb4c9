"""Fork zygotes from a process that has imported torch already, so that a test's run does not import it again.

Importing torch takes 1 to 2 s of processor time, which is more than most tests need for all else. The zygote that is forked here
runs the same code from its first line on, with the same pipes, environment, folder and limits as one that is started. A test
whose environment differs from the seed's, and a command that is a process of its own, gets a zygote that is started.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ranvier.actors.supervise.zygote_process import ENVIRONMENT

NOT_COMPARED = ("PYTEST_CURRENT_TEST", "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK", "TORCHINDUCTOR_CACHE_DIR")
"""What pytest sets for each test, and torch when it is imported."""
LIMITS = (
    resource.RLIMIT_NOFILE,
    resource.RLIMIT_FSIZE,
    resource.RLIMIT_AS,
    resource.RLIMIT_CORE,
    resource.RLIMIT_NPROC,
)


class Seed:
    """Hold the process that zygotes are forked from."""

    PIPE = subprocess.PIPE

    def __init__(self) -> None:
        self._python = sys.executable
        environment = {**os.environ, **ENVIRONMENT}
        self._environment = compared(environment)
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__)), str(theirs.fileno())],
                pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, start_new_session=True,
                env=environment,
            )  # fmt: skip

    def Popen(  # noqa: N802, because it takes the place of subprocess.Popen
        self, command: Sequence[str], *, stderr: int, pass_fds: tuple[int], env: Mapping[str, str], **options: Any
    ) -> subprocess.Popen[bytes] | Forked:
        """Fork a zygote. Start one instead if the interpreter or the environment is not the seed's."""
        if command[0] != self._python or compared(env) != self._environment:
            return subprocess.Popen(command, stderr=stderr, pass_fds=pass_fds, env=env, **options)
        stdin, to_it = os.pipe2(os.O_CLOEXEC)
        from_it, stdout = os.pipe2(os.O_CLOEXEC)
        wanted = {
            "environment": dict(env),
            "folder": os.getcwd(),
            "cores": sorted(os.sched_getaffinity(0)),
            "limits": [resource.getrlimit(limit) for limit in LIMITS],
        }
        try:
            pid = self.ask(wanted, [stdin, stdout, stderr, *pass_fds])
        finally:
            os.close(stdin)
            os.close(stdout)
        return Forked(self, pid, to_it, from_it)

    def ask(self, request: Any, descriptors: Sequence[int] = ()) -> Any:
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors)
            return json.loads(self._socket.recv(1 << 16))

    def close(self) -> None:
        self._socket.close()
        self._process.wait(30)


class Forked:
    """Be to a forked zygote what subprocess.Popen is to one that is started."""

    def __init__(self, seed: Seed, pid: int, stdin: int, stdout: int) -> None:
        self.pid, self.returncode = pid, None
        self.stdin, self.stdout = open(stdin, "wb", 0), open(stdout, "rb", 0)  # noqa: SIM115
        self._seed, self._end = seed, os.pidfd_open(pid)

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._end], [], [], 0)[0]:
            self.returncode = self._seed.ask(self.pid)
            os.close(self._end)
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            signal.pidfd_send_signal(self._end, signal.SIGKILL)

    def wait(self) -> int:
        if self.returncode is None:
            select.select([self._end], [], [])
        code = self.poll()
        assert code is not None
        return code


def compared(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in NOT_COMPARED}


# -- the process -------------------------------------------------------------------------------------------------


def main() -> None:
    import torch  # noqa: F401

    import ranvier.actors.host.host
    import ranvier.actors.model.causal  # noqa: F401

    asked = socket.socket(fileno=int(sys.argv[1]))
    while True:
        data, descriptors, _, _ = socket.recv_fds(asked, 1 << 16, 4)
        if not data:
            return
        request = json.loads(data)
        if isinstance(request, int):  # how did this one end?
            answer = os.waitstatus_to_exitcode(os.waitpid(request, 0)[1])
        elif (answer := os.fork()) == 0:
            asked.close()
            _become(request, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        asked.send(json.dumps(answer).encode())


def _become(wanted: dict[str, Any], descriptors: list[int]) -> None:
    code = 1
    try:
        from ranvier.actors.supervise import zygote

        os.setsid()
        for number, descriptor in enumerate(descriptors[:3]):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.environ.clear()
        os.environ.update(wanted["environment"])
        os.chdir(wanted["folder"])
        os.sched_setaffinity(0, wanted["cores"])
        for limit, both in zip(LIMITS, wanted["limits"], strict=True):
            resource.setrlimit(limit, tuple(both))
        sys.argv = ["zygote", str(descriptors[3])]
        code = zygote.main()
    except BaseException:
        traceback.print_exc()
    os._exit(code)


if __name__ == "__main__":
    main()
