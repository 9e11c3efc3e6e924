"""Parameters and the few operations that every module shares.

Weights keep Hugging Face's axis order (outputs first, inputs last), only split into heads: `q_proj` is `[N,H,D]`.
A checkpoint therefore becomes parameters by reshaping alone, and `W[out,in]` is also the layout in which XLA:CPU
reads a weight fastest when it decodes a few rows.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

INITS = ("normal", "fan_in")
# Up to so many activation rows the weight goes first in the matrix product, see `einsum`.
_FEW_ROWS = 32


@dataclasses.dataclass(frozen=True)
class Make:
    """Declares parameters: shape, logical axes and initializer on one line.

    Attributes:
      rngs: source of the initial values.
      dtype: parameter dtype.
      stack: None, or L: a leading axis of L layers (logical axis `layers`), as scanned groups store them.
      init: "normal", N(0, 0.02) for every matrix as in the public models, or "fan_in", N(0, 1/sqrt(inputs)).
    """

    rngs: nnx.Rngs
    dtype: jnp.dtype = jnp.float32
    stack: int | None = None
    init: str = "normal"

    def stacked(self, layers: int) -> "Make":
        return dataclasses.replace(self, stack=layers)

    def weight(self, out: tuple[int, ...], inputs: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
        """A matrix that maps `inputs` axes to `out` axes, stored as `[*out, *inputs]`."""
        std = 0.02 if self.init == "normal" else 1 / math.sqrt(math.prod(inputs))
        return self.normal((*out, *inputs), axes, std)

    def normal(self, shape: tuple[int, ...], axes: tuple[str, ...], std: float = 0.02) -> nnx.Param:
        return self._param(nnx.initializers.normal(std), shape, axes)

    def ones(self, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
        return self._param(nnx.initializers.ones, shape, axes)

    def zeros(self, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
        return self._param(nnx.initializers.zeros, shape, axes)

    def _param(self, init, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
        assert len(shape) == len(axes), (shape, axes)
        if self.stack is not None:
            shape, axes = (self.stack, *shape), ("layers", *axes)
        return nnx.Param(init(self.rngs.params(), shape, self.dtype), axes=axes)


def einsum(equation: str, x: Array, w: nnx.Param | Array) -> Array:
    """`jnp.einsum(equation, x, w)` of activations and a weight, in the activations' dtype.

    With few rows (a decode step) the weight is the left operand: XLA:CPU packs the left operand of a product in
    panels and streams it, and at 8 rows that is 1.1 to 1.5 times as fast as the other order.
    """
    w = w[...].astype(x.dtype)
    left, right, out = equation.replace("->", ",").split(",")
    rows = math.prod(n for n, axis in zip(x.shape, left, strict=True) if axis not in right)
    if rows <= _FEW_ROWS:
        return jnp.einsum(f"{right},{left}->{out}", w, x)
    return jnp.einsum(equation, x, w)


def rms_norm(x: Float[Array, "... D"], weight: nnx.Param | Array | None, eps: float) -> Float[Array, "... D"]:
    """x / rms(x) * weight; statistics in fp32, the quotient rounded to x's dtype before the weight multiplies it."""
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    y = y.astype(x.dtype)
    return y if weight is None else y * weight[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm with bias; statistics and affine map in fp32, as torch computes them."""

    def __init__(self, make: Make, width: int, axis: str, eps: float = 1e-6):
        self.weight = make.ones((width,), (axis,))
        self.bias = make.zeros((width,), (axis,))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + self.eps)
        return (y * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, make: Make, width: int, hidden: int, axis: str = "embed"):
        self.gate_proj = make.weight((hidden,), (width,), ("mlp", axis))
        self.up_proj = make.weight((hidden,), (width,), ("mlp", axis))
        self.down_proj = make.weight((width,), (hidden,), (axis, "mlp"))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate = einsum("BTD,FD->BTF", x, self.gate_proj)
        up = einsum("BTD,FD->BTF", x, self.up_proj)
        return einsum("BTF,DF->BTD", jax.nn.silu(gate) * up, self.down_proj)
