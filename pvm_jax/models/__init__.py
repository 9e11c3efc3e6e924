"""The model: vision tower, decoder, PVM, and the values that a generation carries."""

from pvm_jax.models.cache import KVCache
from pvm_jax.models.qwen3_vl import Qwen3VL
from pvm_jax.models.vision import VisualTokens

__all__ = ["KVCache", "Qwen3VL", "VisualTokens"]
