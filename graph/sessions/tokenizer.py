"""Load the tokenizer and the chat templates of a checkpoint, from the files of a folder or from a GGUF file."""

from __future__ import annotations

from ranvier.actors.checkpoint import Checkpoint
from ranvier.actors.errors import CheckpointError, describe

from . import tokenizer_folder
from .text_codec import ChatOptions, TextCodec
from .tokenizer_gguf import from_gguf

__all__ = ["ChatOptions", "TextCodec", "brought_by", "of"]


def brought_by(checkpoint: Checkpoint) -> bool:
    """Return whether the checkpoint has a tokenizer. Without one, prompts are token ids."""
    if checkpoint.gguf is not None:
        return checkpoint.gguf.get("tokenizer.ggml.model", "none") not in ("none", "no_vocab")
    return tokenizer_folder.is_in(checkpoint.path)


def of(checkpoint: Checkpoint) -> TextCodec:
    """Return the tokenizer of a checkpoint, with its chat templates.

    Raises:
        CheckpointError: the checkpoint has no tokenizer, a damaged one, or one of a kind that is not built in.
    """
    try:
        made = (
            from_gguf(checkpoint.gguf, str(checkpoint.path))
            if checkpoint.gguf is not None
            else tokenizer_folder.from_folder(checkpoint.path)
        )
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.path}: tokenizer: damaged: {describe(error)}") from None
    for template in (made.chat_template, *made.templates.values()):
        if not isinstance(template, str | None):
            what = type(template).__name__
            raise CheckpointError(f"{checkpoint.path}: chat template: expected text, got {what}")
    return made
