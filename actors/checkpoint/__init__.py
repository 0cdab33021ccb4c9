"""Open model files: check their headers before any weights are read, then read one tensor at a time."""

from .checkpoint import Checkpoint, known_checkpoint, open_checkpoint
from .config import ModelConfig

__all__ = ["Checkpoint", "ModelConfig", "known_checkpoint", "open_checkpoint"]
