"""Fetch from the hub what is read, and nothing twice."""

from __future__ import annotations

from huggingface_hub.utils import filter_repo_objects

from ranvier.graph.file.source import HUB_FILES
from ranvier.graph.sessions.tokenizer_folder import OTHER_FILES


def test_no_weights_are_fetched_twice() -> None:
    """Leave out copies of the weights in other layouts and folders."""
    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "model.safetensors"]
    other = ["consolidated.safetensors", "original/model.safetensors", "onnx/model.safetensors", "onnx/config.json"]
    assert list(filter_repo_objects([*wanted, *other], allow_patterns=HUB_FILES)) == wanted


def test_every_file_of_a_tokenizer_is_fetched() -> None:
    """Fetch all files that a tokenizer or a template is read from."""
    wanted = [
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
        "chat_template.jinja", "additional_chat_templates/rag.jinja", "generation_config.json", *OTHER_FILES,
    ]  # fmt: skip
    assert list(filter_repo_objects(wanted, allow_patterns=HUB_FILES)) == wanted
