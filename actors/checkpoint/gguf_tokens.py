"""Find the special tokens of a GGUF file: by the ids in its metadata, and the ends of a text also by their names.

Many files name one end of a text (`tokenizer.ggml.eos_token_id`), while the model ends its turns with another. llama.cpp
recognises those by their names (`llama-vocab.cpp`), and so does this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError

ENDS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>",
    "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
    "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]",  # what follows a text that was to be filled in
    "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",  # what begins another file
)  # fmt: skip
"""Names of tokens that end a text."""
_IDS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")


def numbered(fields: Mapping[str, Any], key: str, where: str) -> int | None:
    """Return the id of a token that the metadata names; None if it does not.

    Raises:
        CheckpointError: the id is not one of the vocabulary.
    """
    number, tokens = fields.get(key), fields.get("tokenizer.ggml.tokens")
    if number is None:
        return None
    if isinstance(tokens, list) and not (isinstance(number, int) and 0 <= number < len(tokens)):
        raise CheckpointError(f"{where}: {key}: expected an id from 0 to {len(tokens) - 1}, got {number!r:.40}")
    return int(number)


def ends_of_text(fields: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """Return the ids of all tokens that end a text, those of the metadata first.

    Raises:
        CheckpointError: an id of the metadata is not one of the vocabulary.
    """
    found = [numbered(fields, f"tokenizer.ggml.{name}_token_id", where) for name in _IDS]
    tokens = fields.get("tokenizer.ggml.tokens")
    wanted = {*ENDS, "<|plamo:eos|>"}
    ids = {token: number for number, token in enumerate(tokens) if token in wanted} if isinstance(tokens, list) else {}
    by_name = {name: ids[name] for name in ENDS if name in ids}
    calls = "<|call|>" in by_name or "<|calls|>" in by_name
    if ("<|return|>" in by_name and calls) or ("<|flush|>" in by_name and calls):
        by_name.pop("<|end|>", None)  # there it ends a part of an answer
    if "<|tool_response>" in by_name or "<|plamo:eos|>" in ids:
        by_name.pop("</s>", None)  # there it is an ordinary token
    return tuple(dict.fromkeys([*(number for number in found if number is not None), *by_name.values()]))
