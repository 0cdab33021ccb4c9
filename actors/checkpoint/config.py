"""Describe the architecture of a checkpoint, whichever kind of file it was read from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from ..errors import CheckpointError
from .bounds import MOST_COUNT, MOST_LAYERS, MOST_SIZE, number, whole


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Describe how rotary frequencies are stretched.

    `linear` divides all frequencies by `factor`. `llama3` is Llama 3.1's smooth change between two wavelengths, and `yarn`
    that of Peng et al. 2023, both as in transformers' `modeling_rope_utils`. `factors` has a divisor for each frequency, which
    is how GGUF stores `llama3`. Cos and sin are multiplied by `attention_factor`.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    factors: tuple[float, ...] = ()
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """True if yarn rounds the range of frequencies that it changes outwards, to whole numbers."""

    def __post_init__(self) -> None:
        for name in ("factor", "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow"):
            if not number(getattr(self, name), 0.0, 1e6):
                raise CheckpointError(f"config: rope: expected {name} over 0, got {getattr(self, name)!r}")
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            low, high = self.low_freq_factor, self.high_freq_factor
            raise CheckpointError(
                f"config: rope: expected low_freq_factor under high_freq_factor, got {low} and {high}"
            )
        if not whole(self.original_context, 1, MOST_COUNT):
            raise CheckpointError(f"config: rope: expected a context of at least 1, got {self.original_context!r}")
        if not all(number(factor, 0.0, 1e6) for factor in self.factors):
            raise CheckpointError(f"config: rope: expected all factors over 0, got {self.factors!r:.80}")


LAYER_OF = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer|blk)\.(\d{1,6})\.")
"""Pattern of the layer number in a tensor's name."""
Activation = Literal["silu", "gelu_tanh", "gelu", "relu"]
Positions = Literal["relative", "sinusoidal", "learned"]
"""Positions of an encoder–decoder model: `relative` adds to attention scores (T5), the other two to the embedding."""
Norm = Literal["rms", "rms_plus_one", "layer"]
"""`rms`: root mean square. `rms_plus_one`: the same, weights stored minus one (gemma). `layer`: mean, variance, bias (gpt2)."""


@dataclass(frozen=True, slots=True)
class Seq2Seq:
    """Describe the encoder of an encoder–decoder model, and how both sides are built.

    `start_token` begins every answer; `suppressed` tokens are never chosen.
    """

    layers: int
    heads: int
    intermediate: int
    source_vocab: int
    start_token: int
    suppressed: tuple[int, ...]
    norms_first: bool
    """True if a norm comes before each part of a layer, False if after it. `final_norm`: one more after the last layer."""
    final_norm: bool
    positions: Positions
    buckets: int = 0
    """Number of buckets of relative positions up to `distance` (Raffel et al. 2020)."""
    distance: int = 0
    embedding_norm: bool = False
    head_scale: float = 1.0
    logits_bias: bool = False
    first_token: int | None = None
    """Token that must be generated first, such as the token of a language; None: any."""
    separate: bool = False
    """True if encoder and decoder have separate embeddings."""

    def __post_init__(self) -> None:
        for name, most in (
            ("layers", MOST_LAYERS),
            ("heads", MOST_SIZE),
            ("intermediate", MOST_SIZE),
            ("source_vocab", MOST_SIZE),
        ):
            value = getattr(self, name)
            if not whole(value, 1, most):
                raise CheckpointError(f"config: expected the encoder's {name} as a positive integer, got {value!r}")
        if not whole(self.start_token, 0, MOST_COUNT):
            raise CheckpointError(f"config: expected the id of the start token, got {self.start_token!r}")
        if self.positions == "relative" and not (4 <= self.buckets <= 4096 and self.distance > self.buckets // 4):
            raise CheckpointError(
                f"config: expected 4 to 4096 buckets of relative positions and a distance over a quarter of their "
                f"number, got {self.buckets} buckets and distance {self.distance}"
            )


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Describe a causal model, or the decoder of an encoder–decoder model.

    Widths are in elements. The fields below `tied` are what families add to llama's block.
    """

    family: str
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    context: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied: bool
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    bos_token: int | None = None
    eos_tokens: tuple[int, ...] = ()
    norm: Norm = "rms"
    head_norms: bool = False
    """A norm on each query and key head (qwen3, gemma3)."""
    post_norms: bool = False
    """More norms, after attention and after the feed-forward part (gemma3)."""
    activation: Activation = "silu"
    gated: bool = True
    learned_positions: bool = False
    """Positions are added to the embedding, instead of rotating the heads (gpt2)."""
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    """Factor of the product of query and key; None: one over the square root of the head width."""
    windows: tuple[int, ...] = ()
    """Number of positions that a token sees, itself included, per layer; 0: all. Empty: all in every layer."""
    local_rope_theta: float | None = None
    """Rotary base of the layers with a window, if it differs (gemma3)."""
    logit_softcap: float | None = None
    native: bool = True
    """True if the blocks of this package run it; otherwise transformers' layers do."""
    experts: int = 0
    """Experts per layer; `intermediate` is then the width of one. They run in separate actors (see `runs`)."""
    experts_per_token: int = 0
    normalises_choices: bool = True
    shared_expert: int = 0
    """Width of an expert that every token passes through, weighted by its own gate (qwen2_moe); 0: none."""
    encoder: Seq2Seq | None = None
    uncached: bool = False
    """True if transformers has no cache per session for this model: every step computes all previous tokens again.

    Such a model is `uncut`, too.
    """
    both_ways: bool = False
    """True if the tokens of a prompt see each other in both directions. Such a model is `uncut`, too."""
    recomputed_after: int = 0
    """Number of tokens after which a session is computed again from its start, because all rotary frequencies change; 0: never.

    transformers does so with `longrope` (phi3).
    """
    uncut: str = ""
    """Reason why neither layers nor prompts can be cut; one actor (`kind: model`) then runs all layers. Empty: they can."""

    def __post_init__(self) -> None:
        sizes = dict.fromkeys(("vocab", "hidden", "heads", "kv_heads", "head_dim", "intermediate"), MOST_SIZE)
        for name, most in {**sizes, "layers": MOST_LAYERS, "context": MOST_COUNT}.items():
            value = getattr(self, name)
            if not whole(value, 1, most):
                raise CheckpointError(f"config: expected {name} as a positive integer of at most {most}, got {value!r}")
        if self.native or self.experts:
            self._check_numbers()
        if self.heads % self.kv_heads:
            raise CheckpointError(
                f"config: expected heads as a multiple of {self.kv_heads} key-value heads, got {self.heads}"
            )
        factors = self.rope_scaling.factors if self.rope_scaling is not None else ()
        if factors and len(factors) != self.head_dim // 2:
            raise CheckpointError(
                f"config: rope: expected {self.head_dim // 2} factors, half the width of a head, got {len(factors)}"
            )
        if self.windows and (len(self.windows) != self.layers or min(self.windows) < 0):
            raise CheckpointError(f"config: expected a window for each of {self.layers} layers, got {self.windows}")

    def _check_numbers(self) -> None:
        """Check the numbers that this package's own blocks compute with."""
        if not number(self.norm_eps, 0.0, 0.1):
            raise CheckpointError(f"config: expected a norm's epsilon over 0 and at most 0.1, got {self.norm_eps!r}")
        turned = not self.learned_positions and self.encoder is None
        for base in (self.rope_theta, self.local_rope_theta if self.local_rope_theta is not None else self.rope_theta):
            if turned and not number(base, 1.0, 1e12):
                raise CheckpointError(f"config: expected a rotary base over 1 and at most 1e12, got {base!r}")
        for name in ("attention_scale", "logit_softcap", "embedding_scale"):
            value = getattr(self, name)
            if value is not None and not number(value, 0.0, 1e6):
                raise CheckpointError(f"config: expected {name} over 0, got {value!r}")
        if not whole(self.experts, 0, MOST_LAYERS) or not whole(self.experts_per_token, 0, self.experts):
            raise CheckpointError(
                f"config: expected a number of experts and at most that many per token, got {self.experts} experts and "
                f"{self.experts_per_token} per token"
            )
        if not whole(self.shared_expert, 0, MOST_SIZE):
            raise CheckpointError(
                f"config: expected a whole number as the shared expert's width, got {self.shared_expert!r}"
            )
        if not all(whole(window, 0, MOST_COUNT) for window in self.windows):
            raise CheckpointError(
                f"config: expected each window as a whole number of positions, got {self.windows!r:.80}"
            )
        if not all(whole(token, 0, MOST_COUNT) for token in self.eos_tokens):
            raise CheckpointError(f"config: expected the ids of tokens that end a text, got {self.eos_tokens!r:.80}")

    @property
    def kv_elements_per_token_and_layer(self) -> int:
        """Return the number of elements of key and value together, for one token and one layer."""
        return 2 * self.kv_heads * self.head_dim

    def runs(self, *, blocks: bool) -> bool:
        """Return whether this package's own code, and not transformers' layers, runs an actor of a built-in kind.

        `blocks` is true for an actor that holds whole blocks. Transformers' layers run whole blocks of a mixture of
        experts. The own code runs a mixture only if it is cut into attention, experts and combine.
        """
        return self.native or bool(self.experts and not blocks)

    @property
    def offers_places(self) -> bool:
        """Return whether requests can read and change what is between the layers."""
        return not self.uncut and self.encoder is None

    def window(self, layer: int) -> int:
        """Return how many positions a token of this layer sees; 0: all."""
        return self.windows[layer] if self.windows else 0
