"""Turn texts into vectors, as transformers' layers do."""

from __future__ import annotations

import base64
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

GRAPH = Path(__file__).parents[3] / "examples" / "embed" / "embed.yaml"
TEXTS = ["The cat sleeps on the sofa.", "A kitten naps on the couch.", "Interest rates rose again."]
CHANGES = {"model.dtype": "float32", "actors.mean.inputs.hidden": "float32[tokens, 576]"}


@pytest.fixture(scope="module")
def expected(oracle: Any, smollm2: Path) -> list[np.ndarray]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    vectors: list[np.ndarray] = []

    def keep(_layer: Any, _inputs: Any, hidden: Any) -> None:
        whole = (hidden[0] if isinstance(hidden, tuple) else hidden).reshape(-1, 576)
        vectors.append(torch.nn.functional.normalize(whole.float().mean(0), dim=-1).numpy())

    hook = oracle.model.layers[-1].register_forward_hook(keep)
    for text in TEXTS:
        with torch.inference_mode():
            oracle(torch.tensor([tokenizer(text).input_ids]))
    hook.remove()
    return vectors


def test_vectors_are_transformers(server: Any, expected: list[np.ndarray]) -> None:
    """Give transformers' hidden values of each text, in their order, as floats and in base64, of texts and of ids."""
    client = server.client()
    made = client.embeddings.create(model="embed", input=TEXTS)
    assert [each.index for each in made.data] == [0, 1, 2]
    for each, right in zip(made.data, expected, strict=True):
        np.testing.assert_allclose(each.embedding, right, atol=2e-5)
    ids = server.post("/tokenize", {"content": TEXTS[0]})[1]["tokens"]
    assert made.usage.prompt_tokens == made.usage.total_tokens > len(ids)
    for given in (ids, [ids], TEXTS[0]):
        for form in ("float", "base64"):
            again = client.embeddings.create(model="embed", input=given, encoding_format=form)
            found: Any = again.data[0].embedding
            numbers = np.frombuffer(base64.b64decode(found), np.float32) if form == "base64" else found
            np.testing.assert_allclose(numbers, expected[0], atol=2e-5)
            assert again.usage.prompt_tokens == len(ids)


@pytest.mark.parametrize(
    ("body", "param"),
    [({"input": ""}, "input"), ({"input": []}, "input"), ({"input": ["a", ""]}, "input"), ({"input": [[]]}, "input"),
     ({"input": "a", "dimensions": 3}, "dimensions"), ({"input": [10**9]}, None), ({"input": "word " * 9000}, None),
     ({}, "input"), ({"input": {"a": 1}}, "input")],
)  # fmt: skip
def test_what_cannot_be_embedded_is_refused(server: Any, body: dict[str, Any], param: str | None) -> None:
    """Refuse empty inputs, other dimensions, foreign tokens and texts over the context."""
    status, answer, _ = server.post("/v1/embeddings", {"model": "embed", **body})
    assert status == 400 and answer["error"]["message"]
    if param is not None:
        assert answer["error"]["param"] == param


def test_the_model_generates_nothing(server: Any) -> None:
    """List the model with its context, and refuse to chat with it."""
    [model] = server.ask("GET", "/v1/models")[1]["data"]
    assert (model["id"], model["max_model_len"]) == ("embed", 8192)
    asked = {"model": "embed", "messages": [{"role": "user", "content": "Hi"}]}
    status, answer, _ = server.post("/v1/chat/completions", asked)
    assert (status, answer["error"]["code"]) == (400, "unsupported_model")


def test_vectors_come_through_a_recovery(server: Any, expected: list[np.ndarray]) -> None:
    """Give the same vectors after an actor was killed."""
    pids = server.look(lambda run: dict(run.pids))
    os.kill(next(pid for label, pid in pids.items() if "main" in label or "letters" in label), signal.SIGKILL)
    made = server.client().embeddings.create(model="embed", input=TEXTS)
    for each, right in zip(made.data, expected, strict=True):
        np.testing.assert_allclose(each.embedding, right, atol=2e-5)
