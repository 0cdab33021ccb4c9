"""Simulate a whole graph in one thread and in virtual time, in an order that a seed gives.

The gateway, supervision, links and host cores are the real ones, over wires in memory. Messages are lost, repeated,
late and damaged, and commands are late. Hosts crash and hang, are noticed by their silence, and are replaced within
their budget. Clients leave, and mishaps.py adds faults from outside.

The model is so small that it is computed beside the graph: a token is a number that depends on all tokens before it.
Every actor that keeps state for a session checks that it gets each position once.

Play a seed that fails again with `python tests/simulation/simulate.py --seed N`. Play many with `make simulate
SEEDS=1000`."""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ranvier.actors.component.actor import Actor, Batch, keeps
from ranvier.actors.component.session import SessionInfo
from ranvier.actors.errors import ActorFailed, Expired, Overloaded
from ranvier.actors.host.open_sessions import OpenSessions
from ranvier.actors.host.scheduler import HostCore
from ranvier.actors.protocol.control_protocol import Close, Command, Heartbeat, Hold, Link, Open, StateChanged, Unlink
from ranvier.actors.protocol.host_spec import GATEWAY, Deadlines, HostLink, HostSpec, PortSpec, Restart
from ranvier.actors.protocol.lifecycle import State
from ranvier.actors.supervise.supervision import Supervision
from ranvier.graph.sessions.gateway import Gateway
from ranvier.graph.sessions.placement import Placement
from ranvier.graph.sessions.stream import Delivered, Stream
from ranvier.transport.format.errors import ProtocolError
from ranvier.transport.format.header import Row
from ranvier.transport.format.host_id import HostId, host_id
from ranvier.transport.format.tensor_spec import TensorSpec
from ranvier.transport.links.exchange import Exchange
from ranvier.transport.links.link import LinkSpec
from ranvier.transport.wires.testing import Carried, MemoryNetwork

sys.path.insert(0, str(Path(__file__).parent))
from mishaps import Mishaps

TOKEN = TensorSpec("int64", ("tokens",))
SAMPLED = TensorSpec("int64", ("rows",))
HIDDEN = TensorSpec("int64", ("tokens",))
EDGES = (
    (GATEWAY, "token", "embed", "token", TOKEN, False),
    ("embed", "hidden", "lower", "hidden", HIDDEN, False),
    ("lower", "hidden", "upper", "hidden", HIDDEN, False),
    ("upper", "hidden", "head", "hidden", HIDDEN, False),
    ("head", "token", "embed", "token", TOKEN, True),
    ("head", "sampled", GATEWAY, "sampled", SAMPLED, False),
)
ACTORS = ("embed", "lower", "upper", "head")
CHUNK, CAPACITY = 3, 200
Live = Mapping[str, Mapping[int, int]]


def following(tokens: Sequence[int]) -> int:
    """Return the token after these."""
    state = 7
    for token in tokens:
        state = (state * 31 + token + 1) % 100_003
    return state % 97


def links(actor: str, replica: int, live: Live) -> list[HostLink]:
    """Return the links of one host, or of the gateway, to all live peers."""
    made = []
    for edge, (source, out, target, into, spec, feedback) in enumerate(EDGES):
        for mine, other, outgoing in ((source, target, True), (target, source, False)):
            if mine != actor:
                continue
            for number in live[other]:
                ends = [(mine, replica), (other, number)] if outgoing else [(other, number), (mine, replica)]
                names = [HostId(name, at, live[name][at]) for name, at in ends]
                link = LinkSpec(edge, f"{source}.{out}", names[0], names[1], ((out, spec),), 6, 1 << 20, wire="tcp")
                made.append(HostLink(out if outgoing else into, link, outgoing, feedback and not outgoing))
    return made


class Embed(Actor):
    """Map a token to token + 1."""

    stateless = True

    def step(self, batch: Batch) -> dict[str, torch.Tensor | Batch]:
        return {"hidden": batch["token"] + 1}


class Layers(Actor):
    """Keep what was seen, as a KV cache does, and forget the end of it on request."""

    def __init__(self) -> None:
        self.kept: dict[int, list[int]] = {}

    def open(self, session: SessionInfo) -> None:
        self.kept[session.session] = []

    def rewind(self, session: SessionInfo) -> None:
        kept = self.kept[session.session]
        assert len(kept) >= session.kept, f"expected {session.kept} positions, {len(kept)} are there"
        del kept[session.kept :]

    def close(self, session: int) -> None:
        del self.kept[session]

    def step(self, batch: Batch) -> dict[str, torch.Tensor | Batch]:
        parts = torch.split(batch["hidden"], [row.tokens for row in batch.rows])
        for row, part in zip(batch.rows, parts, strict=True):
            kept = self.kept[row.session]
            assert len(kept) == row.position, f"{row}: expected position {len(kept)}"
            kept += part.tolist()
        return {"hidden": batch["hidden"]}


class Forgetting(Layers):
    """Keep what was seen, and never forget only the end of it."""

    rewind = Actor.rewind


class Head(Actor):
    """Compute the next token from what the layers have seen: the log, then all later tokens."""

    stateless = True

    def __init__(self) -> None:
        self.sessions: dict[int, tuple[SessionInfo, list[int]]] = {}

    def open(self, session: SessionInfo) -> None:
        self.sessions[session.session] = session, list(session.log[: session.kept])

    def close(self, session: int) -> None:
        del self.sessions[session]

    def step(self, batch: Batch) -> dict[str, torch.Tensor | Batch]:
        rows, tokens, on = [], [], []
        parts = torch.split(batch["hidden"], [row.tokens for row in batch.rows])
        for row, part in zip(batch.rows, parts, strict=True):
            info, kept = self.sessions[row.session]
            assert len(kept) == row.position, f"{row}: expected position {len(kept)}"
            kept += [value - 1 for value in part.tolist()]
            if len(kept) < len(info.log):
                continue
            token = following(kept)
            rows.append(Row(row.session, row.epoch, len(kept), 1))
            tokens.append(token)
            on.append(not info.finished(len(kept) - len(info.log) + 1, token))
        if not rows:
            return {}
        goes = [row for row, more in zip(rows, on, strict=True) if more]
        again = [token for token, more in zip(tokens, on, strict=True) if more]
        made: dict[str, torch.Tensor | Batch] = {"sampled": Batch(tuple(rows), {"sampled": torch.tensor(tokens)})}
        if goes:
            made["token"] = Batch(tuple(goes), {"token": torch.tensor(again)})
        return made


class Host:
    """Do the work of one host's step thread, without the thread."""

    def __init__(
        self, actor: str, replica: int, epoch: int, network: MemoryNetwork, layers: type[Actor], batches: int = 1
    ) -> None:
        self.actor, self.replica, self.epoch = actor, replica, epoch
        self.name = str(HostId(actor, replica, epoch))
        self.wire = network.wire(self.name)
        self.offset_ns = 0
        """Time by which the clock of its machine is ahead, in ns."""
        self.exchange = Exchange(self.name, "g", (), lambda: network.clock() + self.offset_ns)
        inputs = {into: spec for _, _, target, into, spec, _ in EDGES if target == actor}
        outputs = {out: spec for source, out, _, _, spec, _ in EDGES if source == actor}
        ports = [[PortSpec(name, spec) for name, spec in side.items()] for side in (inputs, outputs)]
        self.core = HostCore(ports[0], ports[1], (), self.exchange, 8, batches=batches)
        self.component = Embed() if actor == "embed" else Head() if actor == "head" else layers()
        self.open_sessions = OpenSessions(self.component, self.core)
        self.commands: deque[Command] = deque()
        self.hangs = False
        self.failed: list[tuple[Row, str]] = []

    def obey(self) -> None:
        """Carry out the oldest command."""
        command = self.commands.popleft()
        match command:
            case Open():
                self.open_sessions.open(command.info)
            case Hold():
                self.open_sessions.hold(command.session)
            case Close():
                self.open_sessions.close(command.session)
            case Link():
                for link in command.links:
                    self.exchange.add(link.link)
                for link in command.links:
                    self.core.add(link)
                self.exchange.open()
            case Unlink():
                self.core.remove(command.peer)
                self.exchange.remove(command.peer)

    def step(self) -> bool:
        """Take a step, and return whether there was one."""
        work = self.core.take()
        self.core.discarded.clear()
        if work is None:
            return False
        outputs = self.component.step(work.batch)
        self.core.finish(work)
        self.core.complete(work, outputs, 0)
        return True


class Simulation:
    """Play one schedule."""

    def __init__(self, seed: int) -> None:
        self.chance = chance = random.Random(seed)
        self.happened: Counter[str] = Counter()
        self.network = MemoryNetwork(self.fault)
        self.mishaps = Mishaps(seed, self)
        self.batches = self.mishaps.chance.choice((1, 2))
        self.deadlines: dict[Stream, int] = {}
        self.calm = False
        self.badness = chance.choice((0.0, 0.02, 0.1))
        self.live = {actor: {0: 1} for actor in ACTORS} | {GATEWAY: {0: 1}}
        if chance.random() < 0.5:
            self.live[chance.choice(("lower", "upper"))][1] = 1
        me = str(HostId(GATEWAY, 0, 1))
        self.wire = self.network.wire(me)
        self.exchange = Exchange(me, "g", [link.link for link in links(GATEWAY, 0, self.live)], self.network.clock)
        placement = Placement()
        self.layers: type[Actor] = chance.choice((Layers, Layers, Forgetting))
        self.hosts = {}
        for actor in ACTORS:
            for replica in self.live[actor]:
                host = self.hosts[actor, replica] = Host(actor, replica, 1, self.network, self.layers, self.batches)
                placement.join(actor, replica, CAPACITY, keeps(host.component))
                host.commands.append(Link(host.name, "", tuple(links(actor, replica, self.live))))
        self.gateway = Gateway(self.exchange, links(GATEWAY, 0, self.live), placement, CHUNK)
        self.gateway.on_delivered, self.gateway.on_ended = self.mishaps.delivered, self.mishaps.ended
        self.exchange.open()
        self.restart = Restart(chance.choice((1, 20, 20, 20)), 1e6, 0.05)
        specs = [self.spec(host.actor, host.replica, 1) for host in self.hosts.values()]
        self.supervision = Supervision(specs, self.now_s)
        for spec in specs:
            self.say(spec.identity, State.LOADING, State.READY, State.RUNNING)
        self.supervision.begun = True
        self.away: list[tuple[str, int, int, float]] = []
        self.coming: Host | None = None
        self.introduced: list[tuple[Host, Link]] | None = None
        self.streams: list[tuple[Stream, list[int]]] = []
        self.left = chance.randrange(4, 12)
        self.crashes, self.peril = chance.randrange(0, 5), chance.choice((0.005, 0.0005))
        self.leaving = chance.randrange(0, 3)

    def fault(self, crossing: Carried) -> Sequence[Carried]:
        """Apply a random fault to a message."""
        dice = self.chance.random()
        if self.calm or dice > self.badness:
            return [crossing]
        what = self.chance.choice(("lost", "repeated", "late", "damaged"))
        self.happened[what] += 1
        if what == "lost":
            return []
        if what == "repeated":
            return [crossing, crossing]
        if what == "late":
            return [
                Carried(
                    crossing.number, crossing.source, crossing.target, crossing.header, crossing.buffers, 900_000_000
                )
            ]
        return [crossing.damaged()] if crossing.buffers else [crossing]

    @property
    def now_s(self) -> float:
        return self.network.clock() / 1e9

    def spec(self, actor: str, replica: int, epoch: int) -> HostSpec:
        """Return what the supervisor knows of a host, without starting anything."""
        deadlines = Deadlines(heartbeat_deadline_s=2.0)
        return HostSpec(
            actor, replica, epoch, "g", "none", None, {}, None, "float32", None, 0, 1, "cpu", (), (), (), "", "", "", "", 1, 8,
            supervision=deadlines, restart=self.restart,
        )  # fmt: skip

    def say(self, key: str, *states: State) -> None:
        """Report states of a host to the supervisor."""
        for state in states:
            self.supervision.on_message(key, StateChanged(state.value), self.now_s)

    # -- one thing that happens -----------------------------------------------------------------------------------

    def flush(self, exchange: Exchange, name: str) -> None:
        """Send all messages of an outbox."""
        for out in exchange.outbox:
            if out.peer in self.network.wires:
                self.network.wires[name].send(out.peer, out.header, out.buffers)
        exchange.outbox.clear()

    def flush_gateway(self) -> None:
        """Send the gateway's commands and messages, and write its journal."""
        for command, labels in self.gateway.commands:
            for label in labels:
                actor, _, replica = label.partition(".")
                host = self.hosts.get((actor, int(replica)))
                if host is not None:  # a host that has gone gets no command, as in `Supervisor.tell`
                    host.commands.append(command)
        self.gateway.commands.clear()
        self.flush(self.exchange, self.exchange.me)
        self.mishaps.journal.flush()

    def receive_gateway(self) -> None:
        """Let the gateway receive one message."""
        arrival = self.wire.receive(0)
        if arrival is None:
            return
        try:
            received = self.exchange.on_arrival(arrival)
        except ProtocolError:
            self.happened["refused"] += 1
        else:
            if received is not None:
                self.gateway.on_message(received)
        self.flush_gateway()

    def receive(self, host: Host) -> None:
        """Let a host receive one message."""
        arrival = host.wire.receive(0)
        if arrival is None:
            return
        try:
            received = host.exchange.on_arrival(arrival)
            if received is not None:
                host.core.on_message(received)
        except ProtocolError:
            self.happened["refused"] += 1
        self.flush(host.exchange, host.name)

    def submit(self, prompt: Sequence[int], count: int) -> None:
        """Submit a request, and compute the tokens that it must get."""
        info = SessionInfo(0, 0, len(prompt) + count, tuple(prompt), count, logits=False)
        due_ns = 0
        if self.mishaps.chance.random() < 0.2:
            due_ns = self.network.clock() + self.mishaps.chance.randrange(10**9, 10**11)
        try:
            stream = self.gateway.submit(info, deadline_ns=due_ns)
        except Overloaded:
            self.happened["overloaded"] += 1
            return
        except ActorFailed as error:
            if error is not self.supervision.failure:
                raise
            return
        self.mishaps.asked(stream, info)
        if due_ns:
            self.deadlines[stream] = due_ns
        expected = list(prompt)
        for _ in range(count):
            expected.append(following(expected))
        self.streams.append((stream, expected[len(prompt) :]))
        self.flush_gateway()

    def crash(self, host: Host) -> None:
        """Let the process of a host die."""
        self.happened["crashed"] += 1
        self.supervision.on_exit(host.name, -9, "", self.now_s)

    def notice(self) -> None:
        """Fence and remove each host that the supervisor considers lost, and replace it within the budget."""
        for host in self.all_hosts:
            watched = self.supervision.hosts[host.name]
            if watched.lost is not None:
                self.happened["hung"] += host.hangs
                self.lose(host, watched.lost)

    def lose(self, host: Host, failure: ActorFailed) -> None:
        """Remove a lost host, and schedule its replacement if the restart budget allows one."""
        actor, replica = host.actor, host.replica
        delay_s = self.supervision.restart(failure, self.spec(actor, replica, host.epoch), self.now_s)
        if delay_s is not None:
            self.away.append((actor, replica, host.epoch + 1, self.now_s + delay_s))
        if host is self.coming:  # it was a replacement
            self.coming = None
        else:
            del self.hosts[actor, replica]
            del self.live[actor][replica]
            if delay_s is not None:
                self.gateway.on_lost_replica(actor, replica, failure)
        self.forget(host)
        self.supervision.remove(host.name)
        if self.supervision.failure is not None:
            self.happened["budget used up"] += 1
            self.gateway.on_failure(self.supervision.failure)
            self.flush_gateway()
            self.left = 0

    def forget(self, host: Host) -> None:
        """Remove every link to a host."""
        del self.network.wires[host.name]
        for other in [*self.hosts.values(), *([self.coming] if self.coming is not None else [])]:
            other.commands.append(Unlink(host.name))
        self.gateway.remove(host.name)
        self.exchange.remove(host.name)
        self.flush_gateway()

    def replace(self, which: int) -> None:
        """Begin to replace a lost host."""
        actor, replica, epoch, due_s = self.away[which]
        if self.now_s < max(due_s, self.mishaps.no_starts_until_s):
            return
        del self.away[which]
        self.supervision.add(self.spec(actor, replica, epoch), self.now_s, joining=True)
        host = self.coming = Host(actor, replica, epoch, self.network, self.layers, self.batches)
        self.say(host.name, State.LOADING, State.READY)
        live = {**self.live, actor: {**self.live[actor], replica: epoch}}
        self.introduced = []
        for (other, number), told in self.hosts.items():
            between = [
                link
                for link in links(other, number, live)
                if host_id(host.name) in (link.link.source, link.link.target)
            ]
            if between:
                command = Link(host.name, "", tuple(between))
                told.commands.append(command)
                self.introduced.append((told, command))
        for link in links(GATEWAY, 0, live):
            if host_id(host.name) in (link.link.source, link.link.target):
                self.exchange.add(link.link)
                self.gateway.add(link)
        self.exchange.open()
        self.flush_gateway()

    def enter(self) -> None:
        """Send the replacement its links once all peers know it, and activate it once they are open."""
        host = self.coming
        if host is None:
            return
        if self.introduced is not None:
            if any(told in self.hosts.values() and command in told.commands for told, command in self.introduced):
                return
            self.introduced = None
            live = {**self.live, host.actor: {**self.live[host.actor], host.replica: host.epoch}}
            host.commands.append(Link(host.name, "", tuple(links(host.actor, host.replica, live))))
        if host.commands or not host.exchange.ready:
            return
        self.say(host.name, State.RUNNING)
        self.supervision.hosts[host.name].joining = False
        self.coming = None
        self.hosts[host.actor, host.replica] = host
        self.live[host.actor][host.replica] = host.epoch
        self.happened["replaced"] += 1
        self.gateway.on_replaced(host.actor, host.replica, host.replica)
        self.flush_gateway()

    def tick(self) -> None:
        """Advance the time by 0.3 s, and let every process that does not hang do its periodic work."""
        self.network.advance(0.3)
        beat = Heartbeat(0, 0.0, 0, {})
        for host in self.all_hosts:
            if host.hangs:
                continue
            self.supervision.on_message(host.name, beat, self.now_s)
            host.exchange.idle()
            host.exchange.tick()
            self.flush(host.exchange, host.name)
        self.supervision.on_tick(self.now_s)
        self.gateway.on_due(self.network.clock())
        self.exchange.idle()
        self.exchange.tick()
        self.flush_gateway()

    @property
    def all_hosts(self) -> list[Host]:
        """Return all live hosts, and the replacement that is starting."""
        return [*self.hosts.values(), *([self.coming] if self.coming is not None else [])]

    def turn(self) -> None:
        """Let one random thing happen."""
        self.mishaps.turn()
        dice = self.chance.random()
        if dice < 0.02 and self.left:
            self.left -= 1
            prompt = [self.chance.randrange(97) for _ in range(self.chance.randrange(1, 9))]
            self.submit(prompt, self.chance.randrange(1, 13))
        elif dice < 0.02 + self.peril and self.crashes > 0 and self.all_hosts:
            self.crashes -= 1
            self.injure(self.chance.choice(self.all_hosts))
        elif dice < 0.05 and self.away and self.coming is None:
            self.replace(self.chance.randrange(len(self.away)))
        elif dice < 0.053 and self.streams and self.leaving > 0:
            stream, _ = self.chance.choice(self.streams)
            self.leaving -= 1
            self.happened["left"] += not stream.over
            self.gateway.cancel(stream)
            self.flush_gateway()
        elif dice < 0.063:
            self.tick()
        elif dice < 0.25:
            for _ in range(self.chance.choice((1, 1, 4, 16))):
                self.receive_gateway()
        elif self.all_hosts:
            self.turn_of(self.chance.choice(self.all_hosts))
        self.notice()
        self.enter()

    def injure(self, victim: Host) -> None:
        """Crash a host, or let it hang."""
        if self.chance.random() < 0.3:
            victim.hangs = True
        else:
            self.crash(victim)

    def turn_of(self, host: Host) -> None:
        """Let one random thing happen in a host."""
        what = self.chance.random()
        if host.hangs:
            return
        if what >= 0.6:
            host.step()
            self.flush(host.exchange, host.name)
        elif host.commands and what < 0.2:
            host.obey()
            self.flush(host.exchange, host.name)
        else:
            for _ in range(self.chance.choice((1, 1, 4, 16))):
                self.receive(host)

    def play(self, most: int = 60_000) -> Counter[str]:
        """Play the whole schedule, and return what happened.

        Raises AssertionError if a stream has not ended, or not correctly."""
        for turn in range(most):
            if turn > most // 2:
                self.calm, self.crashes, self.mishaps.left = True, 0, 0
            if not self.left and all(stream.over for stream, _ in self.streams):
                break
            self.turn()
        self.check()
        self.mishaps.check()
        for what in ("sessions_resumed", "sessions_replayed"):
            self.happened[what] += self.exchange.counters[what]
        return self.happened

    def check(self) -> None:
        """Check that every stream has ended, after only its expected tokens, each once and in order."""
        for stream, expected in self.streams:
            *delivered, end = stream.events or [None]
            first = len(stream.asked.log)
            tokens = [event.token for event in delivered if isinstance(event, Delivered)]
            assert stream.over, f"session {stream.info.session}: no end; {len(tokens)} of {len(expected)} tokens"
            positions = [event.position for event in delivered if isinstance(event, Delivered)]
            assert positions == list(range(first, first + len(tokens))), "a gap, a repeat, or out of order"
            assert tokens == expected[: len(tokens)], f"session {stream.info.session}: {tokens}, expected {expected}"
            if isinstance(end, Expired):
                assert stream in self.deadlines, end
            elif isinstance(end, Exception):
                assert isinstance(end, ActorFailed), end
                assert end is self.supervision.failure or "times in a row" in str(end), end
                self.happened["given up"] += 1
            elif end != "cancelled":
                assert (end, len(tokens)) == ("length", len(expected)), end
                self.happened["exact"] += 1
        placement = self.gateway.placement
        for replicas in placement.replicas.values():
            for replica in replicas.values():
                assert (replica.reserved_tokens, replica.sessions) == (0, 0), replica


def main() -> int:
    """Play the schedules that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, help="play only this seed")
    parser.add_argument("--seeds", type=int, default=1000, help="number of seeds (default %(default)s)")
    parser.add_argument(
        "--first", type=int, default=random.randrange(1 << 30), help="first seed (default: a random one)"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [options.seed] if options.seed is not None else range(options.first, options.first + options.seeds)
    happened: Counter[str] = Counter()
    began = time.monotonic()
    for seed in seeds:
        try:
            happened += Simulation(seed).play()
        except Exception as error:
            print(
                f"seed {seed}: {type(error).__name__}: {error}\nplay it again: python tests/simulation/simulate.py --seed {seed}"
            )
            raise
    took_s = time.monotonic() - began
    print(f"{len(seeds)} schedules in {took_s:.1f} s, {len(seeds) / took_s * 60:.0f} a minute")
    print(", ".join(f"{count} {what}" for what, count in happened.most_common()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
