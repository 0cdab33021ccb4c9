"""Check the calls of a run as Python code sees them: blocking, after the run's end, with wrong arguments, under asyncio."""

from __future__ import annotations

import asyncio
import inspect
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from loops import by_asyncio

import ranvier

CUSTOM = Path(__file__).resolve().parent.parent / "custom"


@pytest.fixture
def graph(tiny: Any, graph_file: Callable[..., Path], split: Any) -> tuple[ranvier.Graph, Any]:
    """Return a graph of a small llama with a tokenizer's vocabulary of ids, and its oracle."""
    folder, oracle = tiny("plain")
    path = graph_file(model={"source": "unset", "dtype": "float32"}, **split(2, 6))
    return ranvier.load(path, overrides={"model.source": str(folder)}), oracle


@pytest.fixture
def run(graph: tuple[ranvier.Graph, Any], runs: Path) -> Iterator[ranvier.BlockingRun]:
    """Return a run of that graph."""
    with ranvier.start(graph[0], runs=runs) as started:
        yield started


def greedy(oracle: Any, prompt: list[int], count: int) -> list[int]:
    """Return the oracle's next tokens."""
    with torch.inference_mode():
        made = oracle.generate(
            torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    ids: list[int] = made[0, len(prompt) :].tolist()
    return ids


def test_start_takes_the_options_of_launch() -> None:
    """Offer the same options, with the same defaults, in both forms."""
    both = [inspect.signature(form).parameters.values() for form in (ranvier.launch, ranvier.start)]
    first, second = ([(each.name, each.kind, each.annotation) for each in parameters] for parameters in both)
    assert first == second
    both = [inspect.signature(kind.generate).parameters for kind in (ranvier.Run, ranvier.BlockingRun)]
    assert both[0] == both[1]


def test_everything_a_run_offers(run: ranvier.BlockingRun, graph: tuple[ranvier.Graph, Any]) -> None:
    """Generate, score and look at a run without awaiting, with the oracle's numbers."""
    oracle = graph[1]
    generation = run.generate([5, 6, 7], max_tokens=6, stop_tokens=())
    tokens = [token.id for token in generation]
    assert tokens == greedy(oracle, [5, 6, 7], 6)
    assert generation.result.token_ids == tokens
    assert (generation.result.prompt_tokens, generation.result.finish_reason) == (3, "length")
    assert list(generation) == []
    with torch.inference_mode():
        expected = oracle(torch.tensor([[5, 6, 7]])).logits[0, :2].float().log_softmax(-1)
    assert run.score([5, 6, 7]) == pytest.approx([float(expected[0, 6]), float(expected[1, 7])], abs=1e-4)
    status = run.status()
    assert (status["requests"], status["tokens"], status["sessions"]) == (2, 6, 0)
    assert {host["state"] for host in status["hosts"]} == {"running"}
    assert len(run.pids) == len(status["hosts"])
    assert (run.alarms, run.recoveries, run.resumed, run.metrics) == ([], [], [], None)
    assert "gateway.0" in run.counters
    assert run.dir.is_dir()
    assert run.plan.graph is graph[0]
    assert "no session is open" in str(run.why())
    with pytest.raises(ranvier.RequestError, match="has no tokenizer"):
        _ = run.codec


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "max_tokens: expected 1 to the model's context of 512, got 0"),
    ({"max_tokens": 1000}, "max_tokens: expected 1 to the model's context of 512, got 1000"),
    ({"max_tokens": 2.5}, "max_tokens: expected a whole number, got float"),
    ({"deadline_s": -1}, "deadline_s: expected a finite number over 0, got -1"),
    ({"deadline_s": "soon"}, "deadline_s: expected a number, got str"),
    ({"deadline_s": float("nan")}, "deadline_s: expected a finite number over 0, got nan"),
    ({"stop": "END"}, "stop: expected a list, got str; write ['END']"),
    ({"stop": [5]}, "stop: expected strings, got int; give ids as stop_tokens"),
    ({"stop": ["END"]}, "stop strings need a tokenizer, and the model has none; use stop_tokens"),
    ({"stop_tokens": 5}, "stop_tokens: expected a list, got int; write [5]"),
    ({"stop_tokens": ["a"]}, "stop_tokens: expected a whole number, got str"),
    ({"sampling": 0.7}, 'sampling: expected ranvier.Sampling or "model", got 0.7'),
    ({"traceparent": "00-xyz"}, "traceparent"),
    ({"prompt": []}, "the prompt is empty"),
    ({"prompt": b"bytes"}, "prompt: expected text, a list of chat messages, or a list of token ids, got bytes"),
    ({"prompt": None}, "prompt: expected text, a list of chat messages, or a list of token ids, got NoneType"),
    ({"prompt": {"role": "user"}}, "prompt: expected text, a list of chat messages, or a list of token ids, got dict"),
    (
        {"prompt": [1, "a"]},
        "prompt: expected text, a list of chat messages, or a list of token ids, got a list of int, str",
    ),
    ({"prompt": [999]}, "token 999 is not in the vocabulary of 320"),
    ({"prompt": "text"}, "has no tokenizer; give token ids"),
]


def test_generate_checks_its_arguments_when_it_is_called(run: ranvier.BlockingRun) -> None:
    """Refuse wrong arguments at the call, not at the first token, and go on with the next request."""
    for wrong, words in WRONG:
        with pytest.raises(ranvier.RequestError) as raised:
            run.generate(**{"prompt": [1, 2], **wrong})
        assert words in str(raised.value), wrong
    assert run.status()["requests"] == 0
    assert len(list(run.generate([1, 2], max_tokens=2, stop_tokens=()))) == 2


def test_a_generation_that_is_dropped_is_cancelled(run: ranvier.BlockingRun) -> None:
    """Free the session of a generation that nobody reads any more, and of one that is closed."""
    for drop in (lambda generation: generation.close(), lambda _: None):
        generation = run.generate([1, 2], max_tokens=200, stop_tokens=())
        next(generation)
        assert run.status()["sessions"] == 1
        drop(generation)
        del generation
        deadline_s = time.monotonic() + 10
        while run.status()["sessions"]:
            assert time.monotonic() < deadline_s


def test_after_the_end_every_call_raises(graph: tuple[ranvier.Graph, Any], runs: Path) -> None:
    """Raise a RanvierError from every call of a run that is over. What was known stays readable."""
    with ranvier.start(graph[0], runs=runs) as run:
        open_one = run.generate([1, 2], max_tokens=200, stop_tokens=())
        next(open_one)
    calls: list[Callable[[], Any]] = [
        lambda: run.generate([1, 2]), lambda: run.generate("text"), lambda: next(open_one), lambda: run.score([1, 2]),
        lambda: run.call(x=torch.zeros(1)), lambda: run.scale("blocks_0", 1), lambda: run.resume("a"), run.why, run.status,
        lambda: run.tokens("hello"),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ranvier.RanvierError, match="the run is over"):
            call()
    open_one.close()
    run.close()
    assert run.counters["gateway.0"] is not None
    assert run.alarms == []
    assert run.dir.is_dir()


async def first_error(generation: ranvier.Generation) -> str:
    """Return the text of the error that ends a generation. Tokens that had arrived come first."""
    try:
        async for _ in generation:
            pass
    except ranvier.RanvierError as error:
        return str(error)
    return "no error"


def test_after_the_end_every_awaited_call_raises(graph: tuple[ranvier.Graph, Any], runs: Path) -> None:
    """Raise a RanvierError from every call of an awaited run that is over."""

    async def main() -> None:
        async with ranvier.launch(graph[0], runs=runs) as run:
            open_one = run.generate([1, 2], max_tokens=200, stop_tokens=())
            await anext(open_one)
        for call in (run.why, lambda: run.score([1, 2]), lambda: run.call(x=torch.zeros(1)), lambda: run.scale("a", 1)):
            with pytest.raises(ranvier.RanvierError, match="the run is over"):
                await call()
        for at_once in (run.status, lambda: run.generate([1]), lambda: run.generate("a"), lambda: run.resume("a"),
                        lambda: run.tokens("hello")):  # fmt: skip
            with pytest.raises(ranvier.RanvierError, match="the run is over"):
                at_once()
        assert await first_error(open_one) == "the run is over"

    trio.run(main)


def test_calls_in_other_threads_end_with_the_run(graph: tuple[ranvier.Graph, Any], runs: Path) -> None:
    """Raise a RanvierError in a thread that waits for a token while another thread closes the run."""
    ends: list[BaseException] = []
    with ranvier.start(graph[0], runs=runs) as run:
        generations = [run.generate([1, 2], max_tokens=250, stop_tokens=()) for _ in range(3)]

        def read(generation: ranvier.BlockingGeneration) -> None:
            try:
                for _ in range(100):
                    list(generation)
                    generation = run.generate([1, 2], max_tokens=250, stop_tokens=())
            except BaseException as error:
                ends.append(error)

        threads = [threading.Thread(target=read, args=(generation,)) for generation in generations]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert [type(end).__mro__[1] for end in ends] == [ranvier.RanvierError] * 3, ends


def test_calls_and_their_errors(graph_file: Callable[..., Path], tmp_path: Path, runs: Path) -> None:
    """Answer calls from code that does not await, and raise the errors of actors there."""
    shutil.copy(CUSTOM / "faulty.py", tmp_path / "faulty.py")

    def faulty(**args: Any) -> ranvier.Graph:
        path = graph_file(
            actors={"bad": {"kind": "./faulty.py:Faulty", "args": args}},
            edges=["gateway.x -> bad.x", "bad.y -> gateway.y"], restart="never",
        )  # fmt: skip
        return ranvier.load(path, allow_code=True)

    with ranvier.start(faulty(at_step="raise"), runs=runs) as run:
        assert run.call(x=torch.tensor([1.0]))["y"].tolist() == [2.0]
        with pytest.raises(ranvier.ActorFailed, match="thirteen"):
            run.call(x=torch.tensor([13.0]))
        with pytest.raises(ranvier.RequestError, match=r"expected the inputs \['x'\], got \['z'\]"):
            run.call(z=torch.tensor([12.0]))
        with pytest.raises(ranvier.RequestError, match=r"expected float32\[tokens\]"):
            run.call(x=torch.zeros(2, 2))
        with pytest.raises(ranvier.RequestError, match="does not generate tokens"):
            run.generate("hello")
        with pytest.raises(ranvier.RequestError, match="is not a language model"):
            run.score([1, 2])
    with pytest.raises(ranvier.ActorFailed, match="ValueError while loading"):
        ranvier.start(faulty(at_load="raise"), runs=runs)


def test_asyncio_is_told_what_to_do(graph: tuple[ranvier.Graph, Any], runs: Path, tmp_path: Path) -> None:
    """Refuse to launch under asyncio, and name a way that works; then do as it says."""

    async def wrong() -> None:
        async with ranvier.launch(graph[0], runs=runs):
            pass

    with pytest.raises(
        ranvier.RequestError, match=r"launch: expected .*trio.*await asyncio.to_thread\(ranvier.start, graph\)"
    ):
        by_asyncio(wrong)
    with pytest.raises(ranvier.RequestError, match=r"train: expected .*asyncio.to_thread\(trio.run, functools.partial"):
        by_asyncio(lambda: ranvier.train(graph[0], tmp_path / "out"))

    async def right() -> list[int]:
        run = await asyncio.to_thread(ranvier.start, graph[0], runs=runs)
        try:
            return [
                token.id for token in await asyncio.to_thread(list, run.generate([5, 6], max_tokens=3, stop_tokens=()))
            ]
        finally:
            await asyncio.to_thread(run.close)

    assert by_asyncio(right) == greedy(graph[1], [5, 6], 3)
    assert list(runs.iterdir())
