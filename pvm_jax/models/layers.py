"""Parameters and the few operations that every module shares.

Weights keep Hugging Face's axis order (outputs first, inputs last), only split into heads: `q_proj` is `[N,H,D]`.
A checkpoint therefore becomes parameters by reshaping alone, and `W[out,in]` is also the layout in which XLA:CPU
reads a weight fastest when it decodes a few rows.
"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pvm_jax.lora import LoRAConfig

INITS = ("normal", "fan_in")
VECTORS = re.compile(r"norm|bias|gate_alpha")
"""Found in the names of vectors and scalars. Parameters of layers are stacked: the number of axes would not tell."""
# Up to so many activation rows a product counts as a decode step's, see `_few_rows`.
_FEW_ROWS = 32


@dataclasses.dataclass(frozen=True)
class Make:
    """Declares parameters: shape, logical axes and initializer on one line.

    Attributes:
      rngs: source of the initial values.
      dtype: parameter dtype.
      stack: None, or L: a leading axis of L layers (logical axis `layers`), as scanned groups store them.
      init: "normal", N(0, 0.02) for every matrix as in the public models, or "fan_in", N(0, 1/sqrt(inputs)).
      lora, adapted: size of LoRA, and which linear maps of a layer have it, see `linear`.
    """

    rngs: nnx.Rngs
    dtype: jnp.dtype = jnp.float32
    stack: int | None = None
    init: str = "normal"
    lora: LoRAConfig | None = None
    adapted: tuple[str, ...] = ()

    def stacked(self, layers: int) -> "Make":
        return dataclasses.replace(self, stack=layers)

    def adapting(self, names: tuple[str, ...]) -> "Make":
        return dataclasses.replace(self, adapted=names)

    def linear(
        self, name: str, out: tuple[int, ...], inputs: tuple[int, ...], axes: tuple[str, ...]
    ) -> tuple[nnx.Param, "LoRA | None"]:
        """A `weight`, and its adapter if `name`, as in "self_attn.q_proj", is adapted."""
        weight = self.weight(out, inputs, axes)
        return weight, LoRA(self, self.lora, out, inputs, axes) if name in self.adapted else None

    def weight(self, out: tuple[int, ...], inputs: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
        """A matrix that maps `inputs` axes to `out` axes, stored as `[*out, *inputs]`."""
        std = 0.02 if self.init == "normal" else 1 / math.sqrt(math.prod(inputs))
        return self.normal((*out, *inputs), axes, std)

    def table(self, rows: int, width: int, axes: tuple[str, str], tied: bool) -> nnx.Param:
        """Embeddings [rows, width]. Under "fan_in" a look-up has one input, and a tied table is the head's matrix."""
        std = 0.02 if self.init == "normal" else 1 / math.sqrt(width if tied else 1)
        return self.normal((rows, width), axes, std)

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


class LoRA(nnx.Module):
    """What a low-rank adapter adds to a linear map: (alpha / rank) B A x. The sum W + B A is never formed.

    A [r,*inputs] starts at N(0, 1/sqrt(inputs)), B [*out,r] at 0, so that the model starts as it was, bit for bit.
    """

    def __init__(
        self, make: Make, config: LoRAConfig, out: tuple[int, ...], inputs: tuple[int, ...], axes: tuple[str, ...]
    ):
        std = 1 / math.sqrt(math.prod(inputs))
        self.a = make.normal((config.rank, *inputs), ("rank", *axes[len(out) :]), std)
        self.b = make.zeros((*out, config.rank), (*axes[: len(out)], "rank"))
        self.rank = config.rank
        self.scale = config.scale

    def __call__(self, x: Float[Array, "rows in"]) -> Float[Array, "rows out"]:
        a = self.a[...].astype(x.dtype).reshape(self.rank, -1)
        b = self.b[...].astype(x.dtype).reshape(-1, self.rank)
        return self.scale * _product(_product(x, a), b)


def einsum(equation: str, x: Array, w: nnx.Param | Array, lora: LoRA | None = None) -> Array:
    """`jnp.einsum(equation, x, w)` of activations [..., *inputs] and a weight [*out, *inputs], in x's dtype.

    Both are flattened to one matrix each: with several contracted axes XLA:CPU would transpose the whole weight in
    every call. Few rows (a decode step) go through `_few_rows`.

    `lora` adapts the weight.

    Worked example: `einsum("BTNH,DNH->BTD", x, o_proj)` is `x.reshape(B * T, N * H) @ o_proj.reshape(D, N * H).T`.
    """
    w = w[...].astype(x.dtype)
    left, right, result = equation.replace("->", ",").split(",")
    inputs = [axis for axis in left if axis in right]
    assert left.endswith("".join(inputs)) and right.endswith("".join(inputs)), equation
    rows, out = x.shape[: x.ndim - len(inputs)], w.shape[: w.ndim - len(inputs)]
    x = x.reshape(math.prod(rows), -1)
    w = w.reshape(math.prod(out), -1)
    y = _product(x, w)
    if lora is not None:
        y += lora(x)
    natural = left[: len(rows)] + right[: len(out)]
    return jnp.einsum(f"{natural}->{result}", y.reshape(*rows, *out))


def _product(x: Array, w: Array) -> Array:
    """x [n,in] @ w[out,in].T."""
    return _few_rows(x, w) if x.shape[0] <= _FEW_ROWS else x @ w.T


def _few_rows(x: Array, w: Array) -> Array:
    """x [n,in] @ w[out,in].T for small n.

    XLA:CPU streams the weight faster as the left operand (12 to 25 % less time at 1 and 8 rows); the barrier keeps
    it from turning the product around again.
    """

    def weight_first(x: Array, w: Array) -> Array:
        return jax.lax.optimization_barrier(w @ x.T).T

    return jax.lax.platform_dependent(x, w, cpu=weight_first, default=lambda x, w: x @ w.T)


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

    def __init__(self, make: Make, width: int, hidden: int, axes: tuple[str, str] = ("embed", "mlp")):
        self.gate_proj, self.gate_proj_lora = make.linear("mlp.gate_proj", (hidden,), (width,), axes[::-1])
        self.up_proj, self.up_proj_lora = make.linear("mlp.up_proj", (hidden,), (width,), axes[::-1])
        self.down_proj, self.down_proj_lora = make.linear("mlp.down_proj", (width,), (hidden,), axes)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate = einsum("BTD,FD->BTF", x, self.gate_proj, self.gate_proj_lora)
        up = einsum("BTD,FD->BTF", x, self.up_proj, self.up_proj_lora)
        return einsum("BTF,DF->BTD", jax.nn.silu(gate) * up, self.down_proj, self.down_proj_lora)
