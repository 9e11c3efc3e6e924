"""Teacher-forced scoring: which tokens of given answers the model would have chosen itself.

One forward pass says whether greedy decoding would reproduce an answer: it does exactly if every token of the answer
is the most probable one given the answer before it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int

from pvm_jax.data.batch import Batch
from pvm_jax.models.qwen3_vl import Qwen3VL
from pvm_jax.sharding import local_rows, shard_batch, take_rows

Scorer = Callable[[Batch, Any], Bool[Array, "B T"]]


def make_scorer(model: Qwen3VL, mesh: Mesh | None = None, chunk: int = 128) -> Scorer:
    """`scorer(batch, memory_order)` -> [B,T], True where column t is the token that the columns before it make most
    probable (column 0 is always False).

    `memory_order` [B]: row b's PVM reads the visual tokens of row `memory_order[b]`; `arange(B)` is the model as it
    is. The backbone keeps its own image either way. One program is compiled per shape of batch.

    Args:
      mesh: rows of a batch are spread over it; None: one device. Of several processes each gives the whole batch.
      chunk: columns at a time: B * chunk * V logits exist at once.
    """
    graph, state = nnx.split(model)
    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())  # each process reads all of it

    def scorer(batch: Batch, memory_order: Any) -> Bool[Array, "B T"]:
        order = np.asarray(memory_order, np.int32)
        if mesh is None:
            placed = jax.device_put(batch)
        else:
            placed = shard_batch(take_rows(batch, local_rows(len(order), mesh)), mesh)
        return _score(state, placed, order, graph, chunk, everywhere)

    return scorer


@functools.partial(jax.jit, static_argnames=("graph", "chunk", "everywhere"))
def _score(
    state: nnx.State,
    batch: Batch,
    memory_order: Int[Array, " B"],
    graph: nnx.GraphDef,
    chunk: int,
    everywhere: NamedSharding | None,
) -> Bool[Array, "B T"]:
    """Out here, so that each evaluation of a training run finds the program of the one before."""
    model = nnx.merge(graph, state)
    visual = model.encode_images(batch)
    hidden = model(batch, visual=visual, memory=visual.tokens[memory_order])
    chosen = chosen_tokens(model, hidden, chunk)[:, :-1]
    right = jnp.pad(chosen, ((0, 0), (1, 0)), constant_values=-1) == batch.tokens
    return right if everywhere is None else jax.lax.with_sharding_constraint(right, everywhere)


def chosen_tokens(model: Qwen3VL, hidden: Array, chunk: int) -> Int[Array, "B T"]:
    """The most probable next token at every column, without the logits of all columns at once."""
    batch, length, width = hidden.shape
    parts = -(-length // chunk)
    padded = jnp.pad(hidden, ((0, 0), (0, parts * chunk - length), (0, 0)))
    split = jnp.moveaxis(padded.reshape(batch, parts, chunk, width), 1, 0)
    chosen = jax.lax.map(lambda h: jnp.argmax(model.logits(h), axis=-1), split)
    return jnp.moveaxis(chosen, 0, 1).reshape(batch, parts * chunk)[:, :length]
