"""Let openai's own tests ask our server: a pytest plugin (`-p served_here`).

The tests were written against a mock that accepts any body. Two things differ here: names of OpenAI's models become that of
ours, and values that OpenAI's service itself refuses, such as a maximum of 0 tokens, become values in range. Answers are
bounded, since the tests do not bound them.
"""

from __future__ import annotations

import os
from typing import Any

from openai import AsyncOpenAI, OpenAI

MODEL, EMBEDDER = os.environ["RANVIER_MODELS"].split(",")
IN_RANGE: dict[str, Any] = {
    "max_tokens": 16,
    "max_completion_tokens": 16,
    "best_of": 1,
    "logit_bias": {"5": 0},
    "seed": 5,
}
NOT_HERE = {
    "access_programs", "audio", "background", "background_options", "context_management", "conversation", "image",
    "dimensions", "previous_response_id", "suffix", "truncation", "web_search_options",
}  # fmt: skip
"""Fields that the server refuses, since it has nothing to do for them."""
NOT_IN_TOOLS = {"allowed_callers", "async", "defer_loading", "output_schema"}


def ours(options: Any) -> Any:
    """Return the options of a request as our server takes them."""
    body = options.json_data
    if options.url.startswith("/models/gpt"):
        options.url = f"/models/{MODEL}"
    if options.url in ("/chat/completions", "/completions", "/responses", "/embeddings") and isinstance(body, dict):
        body = {name: IN_RANGE.get(name, value) for name, value in body.items() if name not in NOT_HERE}
        body["model"] = EMBEDDER if options.url == "/embeddings" else MODEL
        if options.url == "/responses":
            body = {"input": "string", "max_output_tokens": 16, **body}
            body.pop("prompt", None)
            body["tools"] = [{n: v for n, v in tool.items() if n not in NOT_IN_TOOLS} for tool in body.get("tools", ())]
        elif options.url != "/embeddings":
            body.setdefault("max_tokens", 16)
        if options.url == "/embeddings":  # the client asks for base64, and in its strict form then refuses it
            body["encoding_format"] = "float"
        if body.get("echo"):  # the first token of a prompt has no log-probability, which the types do not foresee
            body.pop("logprobs", None)
        if not body.get("stream"):
            body.pop("stream_options", None)
        options.json_data = body
    return options


def pytest_configure() -> None:
    sync, asynchronous = OpenAI._prepare_options, AsyncOpenAI._prepare_options
    OpenAI._prepare_options = lambda self, options: sync(self, ours(options))

    async def prepared(self: AsyncOpenAI, options: Any) -> Any:
        return await asynchronous(self, ours(options))

    AsyncOpenAI._prepare_options = prepared
