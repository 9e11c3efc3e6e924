"""A text goes through the model in windows of columns, and each layer is watched.

Every window of Q columns passes through all layers, with the keys and values of the columns before it in a cache: what
the layers compute is what they compute in a pass over all T columns at once, and they are the model's own
(`Decoder.run_layers`). The largest arrays are the scores of one layer, [B,N,Q,T], and the cache; nothing is [T,T], so
that memory grows linearly with T. Only windows in which something is measured are watched, the others fill the cache.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jaxtyping import Array, Bool, Int

from pvm_jax.analysis import dilution, logit_lens, retrieval
from pvm_jax.data.batch import Batch
from pvm_jax.models.attention import attention_weights
from pvm_jax.models.cache import KeyValue, cache_shardings
from pvm_jax.models.decoder import Context, DecoderLayer, apply_layer
from pvm_jax.models.layers import rms_norm
from pvm_jax.models.pvm import ProjectedMemory
from pvm_jax.models.qwen3_vl import Qwen3VL
from pvm_jax.models.stack import in_order
from pvm_jax.sharding import AnyMesh, mesh_of, shard_batch

Measures = dict[str, Array]
"""By name, [L,B,Q,...] of all layers, [P,B,Q,...] of those with PVM, [1,B,Q] of the last (what is predicted)."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is measured besides dilution; each combination is a program of its own."""

    lens: bool = True
    maps: bool = True
    heads: bool = False


@functools.partial(jax.tree_util.register_dataclass, data_fields=["batch", "x", "deepstack", "memory"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Entered:
    """What all windows share: the batch without its patches, and what became of them.

    Attributes:
      x: [B,T,D] what enters the first layer.
      deepstack: [n,B,M,D].
      memory: PVM layer -> its projected memory.
    """

    batch: Batch
    x: Any
    deepstack: Any
    memory: Any  # of shapes, too, where programs are only lowered


def walk(
    model: Qwen3VL, batch: Batch, watched: Sequence[bool], wanted: Wanted, text_window: int | None = None
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(first column, measures) of every watched window of a batch, in order.

    A model on a mesh is analysed there, rows spread over data and fsdp, by one process that has all of its devices.

    Args:
      batch: of the host; rows divide over the mesh, and T by the number of windows.
      watched: by window of T / len(watched) columns.
      text_window: of an answer, tokens see no more than so many of its tokens up to themselves; all of the prompt, and
        all visual tokens. An ablation: dilution without a shorter answer.
    """
    graph, params = nnx.split(model)
    mesh = mesh_of(params)
    length = batch.tokens.shape[1] // len(watched)
    placed = jax.device_put(batch) if mesh is None else shard_batch(batch, mesh)
    entered, pairs = _enter(graph, params, placed, mesh=mesh)
    last = max((i for i, yes in enumerate(watched) if yes), default=-1)
    for i in range(last + 1):
        start = np.int32(i * length)
        measure = wanted if watched[i] else None
        pairs, measures = pass_window(
            graph, params, entered, pairs, start, length=length, wanted=measure, text_window=text_window, mesh=mesh
        )
        if watched[i]:
            yield int(start), jax.tree.map(np.asarray, measures)


@functools.partial(jax.jit, static_argnums=0, static_argnames="mesh")
def _enter(graph, params, batch: Batch, *, mesh: AnyMesh | None) -> tuple[Entered, dict[str, KeyValue]]:
    rows, length = batch.tokens.shape
    model = nnx.merge(graph, params)
    visual = model.encode_images(batch)
    batch = dataclasses.replace(batch, patches=batch.patches[:, :0])
    memory = model.text.project_memory(visual.tokens)
    cache = model.init_cache(rows, length, visual.tokens.shape[1])
    pairs = _spread(model, cache.pairs(), rows, mesh)
    return Entered(batch, model.embed(batch, visual), visual.deepstack, memory), pairs


@functools.partial(
    jax.jit, static_argnums=0, static_argnames=("length", "wanted", "text_window", "mesh"), donate_argnums=3
)
def pass_window(
    graph,
    params,
    entered: Entered,
    pairs: dict[str, KeyValue],
    start: Int[Array, ""],
    *,
    length: int,
    wanted: Wanted | None,
    text_window: int | None = None,
    mesh: AnyMesh | None,
) -> tuple[dict[str, KeyValue], Measures]:
    """The cache with the window's keys and values, and what was measured in it (`wanted` None: nothing)."""
    model = nnx.merge(graph, params)
    batch = entered.batch
    logging.info("compiling analysis: %d rows, window %d of %d, %s", *batch.tokens.shape, length, wanted)
    ctx = model.window(batch, start, length)
    if text_window is not None:
        ctx = dataclasses.replace(ctx, mask=ctx.mask & _near(batch, start, length, text_window))
    x = jax.lax.dynamic_slice_in_dim(entered.x, start, length, axis=1)
    apply = None if wanted is None else functools.partial(_watch_layer, batch, wanted)
    _, pairs, kept = model.text.run_layers(x, ctx, entered.deepstack, entered.memory, pairs, start, apply)
    pairs = _spread(model, pairs, batch.tokens.shape[0], mesh)
    if wanted is None:
        return pairs, {}
    measures = _by_layer([kept[name] for name, _ in in_order(model.text.layers)])
    hidden = measures.pop("hidden", None)
    if hidden is not None:
        following = jnp.pad(batch.tokens[:, 1:], ((0, 0), (0, 1)))
        given = jax.lax.dynamic_slice_in_dim(following, start, length, axis=1)
        logits = model.logits_in_loop(trains=False)
        measures |= logit_lens.look(lambda h: logits(rms_norm(h, model.text.norm, model.text.eps)), hidden, given)
    return pairs, measures


def _near(batch: Batch, start: Int[Array, ""], length: int, text_window: int) -> Bool[Array, "B Q T"]:
    """Whether a key is visual, of the prompt, or one of the last `text_window` up to the query."""
    of_answer = (jnp.cumsum(batch.loss_weights > 0, axis=1) > 0) & (batch.visual_index < 0)
    columns = jnp.arange(of_answer.shape[1])
    recent = columns > start + jnp.arange(length)[:, None] - text_window
    return recent | ~of_answer[:, None, :]


def _watch_layer(
    batch: Batch, wanted: Wanted, ctx: Context, memory: ProjectedMemory | None, slot, layer: DecoderLayer, carry, inputs
):
    """`decoder.apply_layer`, and the layer's measures; its queries and keys are the ones that it attended with."""
    seen: dict[str, Array] = {}
    carry, _ = apply_layer(dataclasses.replace(ctx, watch=seen.update), memory, slot, layer, carry, inputs)
    weights = attention_weights(seen["queries"], seen["keys"], ctx.mask)
    kept = dilution.masses(weights, batch.visual_index >= 0)
    if wanted.lens:
        kept["hidden"] = carry[0]
    if wanted.maps:
        kept |= retrieval.attention_maps(weights, batch.memory_index, heads=wanted.heads)
    if memory is not None:
        weights = attention_weights(seen["memory_queries"], memory[0], ctx.memory_mask)
        kept |= dilution.pvm_measures(weights, seen["retrieved"], seen["ffn"])
        kept["pvm_choices"] = ctx.memory_mask.sum(axis=-1, dtype=jnp.int32)
        if wanted.maps and not layer.pvm_block.has_slots:
            kept["retrieval"] = weights
    return carry, kept


def _by_layer(groups: Sequence[Measures]) -> Measures:
    """Measures of groups, [L,...] each, put together; those of PVM come from its layers alone."""
    names = dict.fromkeys(name for group in groups for name in group)
    return {name: jnp.concatenate([group[name] for group in groups if name in group]) for name in names}


def _spread(model: Qwen3VL, pairs: dict[str, KeyValue], rows: int, mesh: AnyMesh | None) -> dict[str, KeyValue]:
    if mesh is None:
        return pairs
    where = cache_shardings(model.config, model.scan, rows, mesh)
    return {
        name: tuple(map(jax.lax.with_sharding_constraint, pair, (where.keys[name], where.values[name])))
        for name, pair in pairs.items()
    }
