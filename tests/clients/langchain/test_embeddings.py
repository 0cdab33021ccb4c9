"""LangChain's standard tests of embeddings, through langchain-openai. Token ids of OpenAI's vocabulary are not sent."""

from __future__ import annotations

import os
from typing import Any

from langchain_openai import OpenAIEmbeddings
from langchain_tests.integration_tests import EmbeddingsIntegrationTests


class TestEmbeddings(EmbeddingsIntegrationTests):
    @property
    def embeddings_class(self) -> type[OpenAIEmbeddings]:
        return OpenAIEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {
            "model": os.environ["RANVIER_MODELS"].split(",")[-1],
            "check_embedding_ctx_length": False,
            "max_retries": 0,
        }
