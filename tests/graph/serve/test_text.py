"""Answer the endpoints for text as transformers would, and in the forms that OpenAI's client expects.

The server runs SmolLM2 in four processes; the client is OpenAI's own."""

from __future__ import annotations

import math
from typing import Any

import openai
import pytest

CHANGES = {"model.dtype": "float32"}
CHAT = [{"role": "system", "content": "Answer in one sentence."}, {"role": "user", "content": "Why is the sky blue?"}]
GREEDY: dict[str, Any] = {"model": "smollm2", "temperature": 0}


def test_a_chat_is_transformers_text(server: Any, continued: Any) -> None:
    """Give transformers' greedy text, whole and in pieces, with the counts of its tokens."""
    ids, text = continued(CHAT, 24)
    whole = server.client().chat.completions.create(messages=CHAT, max_tokens=24, **GREEDY)
    assert whole.choices[0].message.content == text
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == len(ids) == 24
    chunks = list(
        server.client().chat.completions.create(
            messages=CHAT, max_tokens=24, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


@pytest.mark.slow
def test_an_answer_ends_where_the_model_ends_it(server: Any, continued: Any) -> None:
    """Leave out the token that ends an answer, and say "stop"."""
    asked = [{"role": "user", "content": "What is two plus two?"}]
    _, text = continued(asked, 200)
    made = server.client().chat.completions.create(messages=asked, **GREEDY)
    assert made.choices[0].message.content == text
    assert made.choices[0].finish_reason == "stop"


def test_ignore_eos_goes_on_after_the_end(server: Any) -> None:
    """End an answer at the model's last token, and go on after it with `ignore_eos`."""
    certain = {**GREEDY, "messages": CHAT, "max_tokens": 6, "logit_bias": {"2": 100}}
    for ignored, tokens, reason in ((False, 1, "stop"), (True, 6, "length")):
        status, made, _ = server.post("/v1/chat/completions", {**certain, "ignore_eos": ignored})
        assert (status, made["usage"]["completion_tokens"], made["choices"][0]["finish_reason"]) == (
            200,
            tokens,
            reason,
        )


def test_contents_as_parts_and_nulls_everywhere(server: Any) -> None:
    """Take parts of text as one text, and a null as a field that is left out."""
    plain = server.client().chat.completions.create(messages=CHAT, max_tokens=8, **GREEDY)
    parts = [
        {
            "role": m["role"],
            "content": [{"type": "text", "text": m["content"][:5]}, {"type": "text", "text": m["content"][5:]}],
        }
        for m in CHAT
    ]
    nulls = dict.fromkeys(
        ("top_p", "n", "stop", "seed", "logit_bias", "presence_penalty", "frequency_penalty", "tools", "tool_choice", "user",
         "response_format", "stream", "stream_options", "logprobs", "top_logprobs", "max_completion_tokens", "metadata")
    )  # fmt: skip
    status, made, _ = server.post("/v1/chat/completions", {**GREEDY, "messages": parts, "max_tokens": 8, **nulls})
    assert status == 200
    assert made["choices"][0]["message"]["content"] == plain.choices[0].message.content


def test_completions_of_strings_and_of_ids(server: Any, continued: Any) -> None:
    """Continue prompts of all four forms as transformers does."""
    prompts = ["The capital of France is", "Once upon a time"]
    texts = [continued(prompt, 12)[1] for prompt in prompts]
    client = server.client()
    ids = [server.post("/tokenize", {"content": prompt})[1]["tokens"] for prompt in prompts]
    for prompt, expected in ((prompts[0], texts[:1]), (prompts, texts), (ids[0], texts[:1]), (ids, texts)):
        made = client.completions.create(prompt=prompt, max_tokens=12, **GREEDY)
        assert [choice.text for choice in made.choices] == expected
        assert [choice.index for choice in made.choices] == list(range(len(expected)))
    echoed = client.completions.create(prompt=prompts[0], max_tokens=12, echo=True, n=2, **GREEDY)
    assert [choice.text for choice in echoed.choices] == [prompts[0] + texts[0]] * 2
    pieces = ["", ""]
    for chunk in client.completions.create(prompt=prompts, max_tokens=12, stream=True, **GREEDY):
        pieces[chunk.choices[0].index] += chunk.choices[0].text
    assert pieces == texts


def test_log_probabilities(server: Any, continued: Any, oracle: Any) -> None:
    """Give the oracle's log-probabilities of the tokens and of the likeliest ones, in both forms."""
    import torch

    prompt = "The capital of France is"
    ids = server.post("/tokenize", {"content": prompt})[1]["tokens"]
    made = server.client().completions.create(prompt=prompt, max_tokens=4, logprobs=2, **GREEDY).choices[0]
    new = continued(prompt, 4)[0]
    with torch.inference_mode():
        logits = oracle(torch.tensor([ids + new])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    for row, token in enumerate(new):
        assert math.isclose(made.logprobs.token_logprobs[row], float(logits[row, token]), abs_tol=2e-3)
        best = sorted(made.logprobs.top_logprobs[row].values(), reverse=True)
        assert best == pytest.approx(logits[row].topk(2).values.tolist(), abs=2e-3)
    assert "".join(made.logprobs.tokens) == made.text
    chat = server.client().chat.completions.create(messages=CHAT, max_tokens=3, logprobs=True, top_logprobs=3, **GREEDY)
    for entry in chat.choices[0].logprobs.content:
        assert bytes(entry.bytes).decode() == entry.token
        assert len(entry.top_logprobs) == 3 and entry.top_logprobs[0].token == entry.token


@pytest.mark.slow
def test_a_seed_gives_the_same_text(server: Any) -> None:
    """Draw the same text from the same seed, another from another, and n different ones."""
    client = server.client()

    def drawn(seed: int, n: int = 1) -> list[str]:
        made = client.chat.completions.create(
            model="smollm2", messages=CHAT, max_tokens=16, temperature=1.5, seed=seed, n=n
        )
        return [choice.message.content for choice in made.choices]

    assert drawn(1) == drawn(1) != drawn(2)
    assert len(set(drawn(1, n=3))) == 3 and drawn(1, n=3)[0] == drawn(1)[0]


def test_stop_strings(server: Any, continued: Any) -> None:
    """End before a stop string, streamed or not."""
    text = continued("Once upon a time", 24)[1]
    stop = text.split()[6]
    expected = text[: text.index(stop)]
    made = server.client().completions.create(prompt="Once upon a time", max_tokens=24, stop=[stop], **GREEDY)
    assert (made.choices[0].text, made.choices[0].finish_reason) == (expected, "stop")
    chunks = server.client().completions.create(
        prompt="Once upon a time", max_tokens=24, stop=stop, stream=True, **GREEDY
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected


def test_control_tokens_of_a_chat_are_text(server: Any) -> None:
    """Hold no control token that a client wrote: it stays text in a chat, and is a token in a raw prompt."""
    raw = server.post("/tokenize", {"content": "<|im_end|>"})[1]["tokens"]
    assert raw == [2]
    plain = server.post("/tokenize", {"messages": [{"role": "user", "content": "x"}]})[1]["tokens"]
    spelled = server.post("/tokenize", {"messages": [{"role": "user", "content": "x<|im_end|>"}]})[1]["tokens"]
    assert spelled.count(2) == plain.count(2) and len(spelled) > len(plain)


def test_tokens_and_back(server: Any) -> None:
    """Split a text into tokens, with their pieces, and join them again."""
    text = "Größe: 10 € 🙂"
    made = server.post("/tokenize", {"content": text, "with_pieces": True})[1]
    assert server.post("/detokenize", {"tokens": [each["id"] for each in made["tokens"]]})[1]["content"] == text
    assert made["count"] == len(made["tokens"])


def test_the_models(server: Any) -> None:
    """List the models, and describe each by its name."""
    assert [model.id for model in server.client().models.list()] == ["smollm2"]
    assert server.client().models.retrieve("smollm2").owned_by == "ranvier"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        server.client().models.retrieve("other")
    assert server.ask("GET", "/health")[:2] == (200, {"status": "ok"})
    page = server.ask("GET", "/metrics")[1]
    assert 'ranvier_server_answers_total{model="smollm2"}' in page


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        ({"messages": CHAT}, 400, "model", "missing_required_parameter"),
        ({"model": "other", "messages": CHAT}, 404, "model", "model_not_found"),
        ({**GREEDY, "messages": []}, 400, "messages", "invalid_value"),
        ({**GREEDY, "messages": CHAT, "tempreature": 1}, 400, "tempreature", "unknown_parameter"),
        ({**GREEDY, "messages": CHAT, "max_tokens": "8"}, 400, "max_tokens", "invalid_type"),
        ({**GREEDY, "messages": CHAT, "max_tokens": 0}, 400, "max_tokens", "invalid_value"),
        ({**GREEDY, "messages": CHAT, "top_p": 2}, 400, "top_p", "invalid_value"),
        ({**GREEDY, "messages": CHAT, "n": 1000}, 400, "n", "invalid_value"),
        ({**GREEDY, "messages": CHAT, "top_logprobs": 2}, 400, "top_logprobs", "invalid_value"),
        ({**GREEDY, "messages": CHAT, "logit_bias": {"x": 1}}, 400, "logit_bias", "invalid_value"),
        ({**GREEDY, "messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "messages[0].content[0].text", "missing_required_parameter"),
        ({**GREEDY, "messages": CHAT, "stop": {}}, 400, "stop", "invalid_type"),
        ({**GREEDY, "messages": CHAT, "max_tokens": 100_000}, 400, "messages", "context_length_exceeded"),
        ({**GREEDY, "messages": [{"role": "user", "content": "word " * 9000}]}, 400, "messages", "context_length_exceeded"),
        ({**GREEDY, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 400,
         "messages[0].content", "unsupported_content"),
        ({**GREEDY, "messages": CHAT, "modalities": ["audio"]}, 400, "modalities", "unsupported_value"),
        (b"{", 400, None, None),
        (b"[]", 400, None, None),
        (b'{"model": "smollm2", "messages": [], "temperature": NaN}', 400, None, None),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(server: Any, body: Any, status: int, param: str | None, code: str | None) -> None:
    """Refuse a wrong request in OpenAI's form, with the field that is wrong. A prompt is never cut."""
    found, answer, headers = server.post("/v1/chat/completions", body)
    assert found == status and set(answer["error"]) == {"message", "type", "param", "code"}
    assert headers["x-request-id"]
    if param is not None:
        assert (answer["error"]["param"], answer["error"]["code"]) == (param, code)


def test_an_echo_with_log_probabilities_scores_the_prompt(server: Any, oracle: Any) -> None:
    """Give the oracle's log-probabilities of a prompt's tokens, and whether each was the likeliest, as harnesses ask for."""
    import torch

    prompt = "The capital of France is Paris, and that of Italy is Rome."
    ids = server.post("/tokenize", {"content": prompt})[1]["tokens"]
    with torch.inference_mode():
        logits = oracle(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = [float(logits[i, token]) for i, token in enumerate(ids[1:])]
    for asked in (prompt, ids):
        made = (
            server.client().completions.create(prompt=asked, max_tokens=0, echo=True, logprobs=1, **GREEDY).choices[0]
        )
        assert made.text == prompt == "".join(made.logprobs.tokens)
        assert made.logprobs.token_logprobs[0] is None
        assert made.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=2e-3)
        best = [max(top.values()) for top in made.logprobs.top_logprobs[1:]]
        assert best == pytest.approx(logits[:-1].max(-1).values.tolist(), abs=2e-3)
        assert [
            prompt[at:][: len(t)] for at, t in zip(made.logprobs.text_offset, made.logprobs.tokens, strict=True)
        ] == made.logprobs.tokens
    further = (
        server.client().completions.create(prompt=prompt, max_tokens=2, echo=True, logprobs=1, **GREEDY).choices[0]
    )
    assert len(further.logprobs.tokens) == len(ids) + 2 and further.text.startswith(prompt)


def test_responses_without_state(server: Any, continued: Any) -> None:
    """Answer /v1/responses with transformers' text, whole and as events."""
    _, text = continued(CHAT, 12)
    asked: dict[str, Any] = {
        "model": "smollm2", "temperature": 0, "max_output_tokens": 12, "instructions": CHAT[0]["content"],
        "input": [{"role": "user", "content": [{"type": "input_text", "text": CHAT[1]["content"]}]}],
    }  # fmt: skip
    whole = server.client().responses.create(**asked)
    assert (whole.output_text, whole.status, whole.incomplete_details.reason) == (
        text,
        "incomplete",
        "max_output_tokens",
    )
    made = list(server.client().responses.create(**asked, stream=True))
    assert [event.sequence_number for event in made] == list(range(len(made)))
    assert "".join(event.delta for event in made if event.type == "response.output_text.delta") == text
    assert made[0].type == "response.created" and made[-1].type == "response.incomplete"
    assert made[-1].response.output_text == text
    status, answer, _ = server.post("/v1/responses", {**asked, "previous_response_id": "resp_1"})
    assert status == 400 and answer["error"]["param"] == "previous_response_id"
