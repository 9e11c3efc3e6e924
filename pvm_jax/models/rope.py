"""Rotary embeddings: interleaved MRoPE for the decoder, rows and columns for the vision tower.

Tables are fp32. The rotation pairs channel i with channel i + H/2.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def mrope_axes(sections: tuple[int, int, int]) -> np.ndarray:
    """Which of (t, h, w) drives each of the H/2 frequencies.

    Qwen3-VL interleaves: t h w t h w ..., until the h and w sections are used up; the rest is t. (Qwen2.5-VL had
    three consecutive chunks instead.) Source: transformers, modeling_qwen3_vl.py, recomposition_frequencies.

        >>> mrope_axes((4, 2, 2)).tolist()
        [0, 1, 2, 0, 1, 2, 0, 0]
    """
    axes = np.zeros(sum(sections), np.int32)
    for axis in (1, 2):
        axes[axis : 3 * sections[axis] : 3] = axis
    return axes


def inverse_frequencies(dim: int, theta: float) -> np.ndarray:
    """theta ** -(0, 2, 4, ...)/dim, fp32 [dim / 2]."""
    return (1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float32) / dim)).astype(np.float32)


def mrope(
    positions: Int[Array, "3 B T"], head_dim: int, theta: float, sections: tuple[int, int, int]
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """cos and sin of the decoder, fp32 [B,T,H/2]."""
    by_frequency = jnp.moveaxis(positions[mrope_axes(sections)], 0, -1)
    angles = by_frequency.astype(jnp.float32) * inverse_frequencies(head_dim, theta)
    return jnp.cos(angles), jnp.sin(angles)


def rope_2d(
    coords: Int[Array, "B P 2"], head_dim: int, theta: float = 10000.0
) -> tuple[Float[Array, "B P half"], Float[Array, "B P half"]]:
    """cos and sin of the vision tower, fp32 [B,P,H/2]: first half of the frequencies by row, second by column."""
    angles = coords[..., None].astype(jnp.float32) * inverse_frequencies(head_dim // 2, theta)
    angles = angles.reshape(*coords.shape[:-1], head_dim // 2)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
) -> Float[Array, "B T N H"]:
    """Rotates every head in the dtype of x and the tables together (fp32 tables rotate in fp32)."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
