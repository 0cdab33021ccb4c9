"""Model files: what is in them, checked before a byte of weights is read; then one tensor at a time."""

from .checkpoint import Checkpoint, TensorEntry, known_checkpoint, open_checkpoint
from .config import ModelConfig

__all__ = ["Checkpoint", "ModelConfig", "TensorEntry", "known_checkpoint", "open_checkpoint"]
