"""Which tensors each layer group needs, with their shapes: what `check` looks for, `show` counts and hosts read.

No torch here, so that a graph can be checked in a tenth of a second.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.config import ModelConfig

Need = tuple[str, tuple[int, ...]]
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"


def embedding(config: ModelConfig) -> Iterator[Need]:
    yield EMBEDDING, (config.vocab, config.hidden)


def head(config: ModelConfig) -> Iterator[Need]:
    yield NORM, (config.hidden,)
    yield head_name(config), (config.vocab, config.hidden)


def head_name(config: ModelConfig) -> str:
    """A tied head is read from the embedding's tensor: both ends hold it."""
    return EMBEDDING if config.tied else HEAD


def block(config: ModelConfig, layer: int) -> Iterator[Need]:
    prefix = f"model.layers.{layer}."
    hidden, inner = config.hidden, config.intermediate
    query, value = config.heads * config.head_dim, config.kv_heads * config.head_dim
    yield prefix + "input_layernorm.weight", (hidden,)
    yield prefix + "post_attention_layernorm.weight", (hidden,)
    for name, rows, columns in (("q", query, hidden), ("k", value, hidden), ("v", value, hidden), ("o", hidden, query)):
        yield f"{prefix}self_attn.{name}_proj.weight", (rows, columns)
        if config.attention_bias:
            yield f"{prefix}self_attn.{name}_proj.bias", (rows,)
    for name, rows, columns in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
        yield f"{prefix}mlp.{name}_proj.weight", (rows, columns)
        if config.mlp_bias:
            yield f"{prefix}mlp.{name}_proj.bias", (rows,)


def needs(kind: str, config: ModelConfig, layers: tuple[int, int] | None) -> Iterator[Need]:
    """Every tensor that an actor of a built-in `kind` reads. `layers` are the first and the last, both included."""
    if kind in ("embedding", "first_stage", "model"):
        yield from embedding(config)
    if layers is not None:
        for layer in range(layers[0], layers[1] + 1):
            yield from block(config, layer)
    if kind in ("head", "last_stage") or (kind == "model" and not config.tied):
        yield from head(config)
    elif kind == "model":
        yield NORM, (config.hidden,)  # the tied matrix is there already, once


def check(checkpoint: Checkpoint, kind: str, layers: tuple[int, int] | None) -> int:
    """The number of elements an actor holds.

    Raises:
        CheckpointError: a tensor is missing or of another shape.
    """
    elements = 0
    for name, shape in needs(kind, checkpoint.config, layers):
        checkpoint.require(name, shape)
        count = 1
        for size in shape:
            count *= size
        elements += count
    return elements
