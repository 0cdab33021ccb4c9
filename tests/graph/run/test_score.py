"""Check the log-probability of every token against transformers, from Python and from the command."""

from __future__ import annotations

import json
import math
import pydoc_data.topics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trio

import ranvier
from ranvier.graph.run import scoring


def expected(oracle: Any, ids: list[int]) -> torch.Tensor:
    """Return the oracle's log-probability of each token except the first."""
    with torch.inference_mode():
        logits = oracle(torch.tensor([ids])).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@pytest.mark.parametrize("cut", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_scores_are_the_oracles(cut: int, tiny: Any, runs: Path, graph_file: Callable[..., Path], split: Any) -> None:
    """Score several texts at once, in chunks and beside a generation, as the oracle does.

    The scores of the windows add up."""
    folder, oracle = tiny("plain")
    path = graph_file(model={"source": "unset", "dtype": "float32"}, prefill_chunk=16, **split(cut, 6))
    graph = ranvier.load(path, overrides={"model.source": str(folder)})
    texts = [list(range(3, 60)), [5, 9], [int(n) for n in torch.randint(0, 320, (200,))]]
    scored: dict[int, list[float]] = {}
    made: list[scoring.Score] = []
    generated: list[int] = []

    async def main() -> None:
        async with ranvier.launch(graph, runs=runs) as run:

            async def one(index: int) -> None:
                scored[index] = await run.score(texts[index])

            async def generate() -> None:
                generated.extend([token.id async for token in run.generate([7, 8], max_tokens=5, stop_tokens=())])

            async with trio.open_nursery() as nursery:
                nursery.start_soon(generate)
                for index in range(len(texts)):
                    nursery.start_soon(one, index)
            made.append(await scoring.score(run, texts[2], 64, lambda _: None))
            for ids, words in (([5], "at least two tokens"), ([], "empty"), ([1, 999], "not in the vocabulary")):
                with pytest.raises(ranvier.RequestError, match=words):
                    await run.score(ids)

    trio.run(main)
    for index, ids in enumerate(texts):
        assert (torch.tensor(scored[index]) - expected(oracle, ids)).abs().max() < 1e-4
    windows = [expected(oracle, texts[2][start : start + 64]) for start in range(0, 200, 64)]
    assert made[0].tokens == sum(map(len, windows))
    assert made[0].nll == pytest.approx(-float(torch.cat(windows).sum()), rel=1e-6)
    assert len(generated) == 5


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_perplexity_of_smollm2_is_transformers_to_five_digits(oracle: Any, runs: Path, tmp_path: Path) -> None:
    """Give transformers' perplexity to five digits.

    The command scores 20 kB of English over four processes in float32."""
    text = "".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))[:20_000]
    (tmp_path / "text.txt").write_text(text)
    example = Path(__file__).resolve().parents[3] / "examples" / "smollm2.yaml"
    done = subprocess.run(
        [sys.executable, "-m", "ranvier", "score", str(example), "--text", str(tmp_path / "text.txt"), "--json",
         "--set", "model.dtype=float32", "--runs", str(runs)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    from ranvier.graph.sessions import tokenizer

    graph = ranvier.load(example)
    assert graph.checkpoint is not None
    ids = tokenizer.of(graph.checkpoint).encode(text, special=True)
    windows = [ids[start : start + 512] for start in range(0, len(ids) - 1, 512)]
    scores = torch.cat([expected(oracle, window).double() for window in windows])
    assert told["tokens"] == len(scores)
    assert f"{told['perplexity']:.5g}" == f"{math.exp(-float(scores.mean())):.5g}"
