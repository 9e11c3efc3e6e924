"""A model's weights as a decode step wants them: in the compute dtype, and whole on each device that reads them.

A decode step is bound by the bytes that it reads. A weight that `fsdp` splits is gathered for every token; here it is
gathered once, before many tokens are drawn. Weights that lie as they should are not copied: on a mesh of `data` and
`tensor` alone, and in the compute dtype, that is all of them.
"""

import functools
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from pvm_jax.models.layers import VECTORS
from pvm_jax.sharding import gathered

WEIGHTS = ("gathered", "split")
"""How matrices lie while tokens are drawn. "gathered": whole over `fsdp`. "split": as they are, and every decode step
gathers them, layer by layer; for models of which a whole copy, 1 / mesh.tensor of it a device, does not fit."""


def for_decoding(model: nnx.Module, weights: str = "gathered") -> nnx.Module:
    """The model as tokens are drawn with it: a decode step reads matrices in the compute dtype, and moves none.

    What lies that way already is not copied.

    Args:
      weights: one of WEIGHTS.
    """
    graphdef, params = nnx.split(model)
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    layouts = [decoding_layout(path, x, model.dtype, weights) for path, x in leaves]
    values = [x if layout == (x.dtype, x.sharding) else copied(x, *layout) for (_, x), layout in zip(leaves, layouts)]
    return nnx.merge(graphdef, jax.tree.unflatten(structure, values))


# One array a call: what gathering needs beside its result lies there for one at a time. Of the module, so that programs
# are compiled once and not at every rollout.
@functools.partial(jax.jit, static_argnums=(1, 2))
def copied(x: jax.Array, dtype: np.dtype, sharding: Any) -> jax.Array:
    """A parameter as `decoding_layout` says. It is cast before it is gathered: the narrow one travels."""
    x = x.astype(dtype)
    return jax.lax.with_sharding_constraint(x, sharding) if isinstance(sharding, NamedSharding) else x


def decoding_layout(path: tuple[Any, ...], x: Any, dtype: Any, weights: str) -> tuple[np.dtype, Any]:
    """Dtype and sharding, while tokens are drawn, of a parameter at `path` in the model's tree.

    The vision tower, which is read once a prompt, stays split.

    Args:
      dtype: what is computed in.
    """
    name = "/".join(str(getattr(entry, "key", entry)) for entry in path)
    exact = dtype == np.float32 or VECTORS.search(name)
    whole = weights == "gathered" and not name.startswith("visual/")
    return x.dtype if exact else np.dtype(dtype), gathered(x.sharding) if whole else x.sharding
