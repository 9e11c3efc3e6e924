"""The optimizer step: gradients of the trainable parameters over micro-batches, one update, metrics."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from pvm_jax.data.batch import Batch
from pvm_jax.sharding import BATCH_AXES, AnyMesh, put_rows, shard_batch
from pvm_jax.training.freeze import Arrays, Partition
from pvm_jax.training.stage import Objective, TrainingError

GATE = re.compile(r"text/layers/(\d+)/pvm_block/gate_alpha$")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that an optimizer step changes. Random keys are not here: what is drawn is a function of (seed, step).

    Holds arrays, or their shapes with shardings.
    """

    step: Any  # i32 []
    trainable: Arrays
    optimizer: Any  # optax state; its moments are dictionaries with the names of `trainable`


def init_state(optimizer: optax.GradientTransformation, trainable: Arrays, mesh: Mesh) -> TrainState:
    """The state before the first step; the optimizer's arrays are made where they lie."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(optimizer, _shapes(trainable), mesh))
    moments = jax.jit(optimizer.init, out_shardings=shardings.optimizer)(trainable)
    return TrainState(jax.device_put(jnp.zeros((), jnp.int32), shardings.step), trainable, moments)


def abstract_state(optimizer: optax.GradientTransformation, trainable: Arrays, mesh: AnyMesh) -> TrainState:
    """Shapes, dtypes and shardings of a state; moments lie as their parameters do, counters on every device.

    Args:
      trainable: `jax.ShapeDtypeStruct`s with shardings.
    """
    replicated = NamedSharding(mesh, PartitionSpec())

    def one(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        like = trainable.get(str(getattr(path[-1], "key", "")))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=like.sharding if like else replicated)

    moments = jax.tree_util.tree_map_with_path(one, jax.eval_shape(optimizer.init, trainable))
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated), trainable, moments)


def _shapes(arrays: Arrays) -> Arrays:
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in arrays.items()}


def put_batch(batch: Any, mesh: Mesh, micro_batches: int) -> Any:
    """Host arrays -> arrays on the mesh, rows over `data` and `fsdp`; a `Batch` may be part of a larger pytree.

    Of several processes each gives its own rows, see `sharding.local_rows`.

    Raises:
      TrainingError: the rows of a micro-batch do not divide over the mesh.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))

    def one(x: Any) -> Any:
        placed = shard_batch(x, mesh) if isinstance(x, Batch) else put_rows(x, rows)
        count = (placed.tokens if isinstance(x, Batch) else placed).shape[0]
        if count % (ways * micro_batches):
            raise TrainingError(
                f"a batch has {count} rows, which do not divide into config.micro_batches = {micro_batches} "
                f"x mesh data x fsdp = {ways}; change config.data's rows or samples, or micro_batches"
            )
        return placed

    return jax.tree.map(one, batch, is_leaf=lambda x: isinstance(x, Batch))


def compiled(update: Callable[..., Any], state: TrainState, mesh: AnyMesh) -> Callable[..., Any]:
    """`update` of `make_update`, compiled: `state` is donated and stays where it lies, metrics are on every device.

    Args:
      state: arrays, or shapes with shardings.
    """
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(update, donate_argnums=0, out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())))


def micro_batch(batch: Any, index: Any, parts: int) -> Any:
    """Micro-batch `index` of `parts`, on every leaf: rows index, index + parts, ...

    Rows that lie on one device stay there. Inside of a loop only this part is read; an array of all parts, in the
    order in which they are taken, would be a second copy of the batch.
    """

    def one(path: tuple[Any, ...], x: Any) -> Array:
        axis = 1 if getattr(path[-1], "name", "") == "positions" else 0
        grouped = x.reshape(*x.shape[:axis], x.shape[axis] // parts, parts, *x.shape[axis + 1 :])
        return jax.lax.dynamic_index_in_dim(grouped, index, axis + 1, keepdims=False)

    return jax.tree_util.tree_map_with_path(one, batch)


def loss_and_gradients(
    stage: Objective, partition: Partition, trainable: Arrays, frozen: Arrays, batch: Any, micro_batches: int = 1
) -> tuple[Array, Array, dict[str, tuple[Array, Array]], Arrays]:
    """Sum and count of the loss, the stage's metrics, and the gradients of sum / count.

    Sums are accumulated over the micro-batches and divided once, so that the result is that of one big batch
    whatever the weights in each part. A batch without targets has gradient 0.
    """

    def total(trainable: Arrays, batch: Any):
        loss = stage.loss_fn(partition.merge(trainable, frozen), batch)
        return loss.sum, (loss.count, loss.metrics)

    def one(batch: Any):
        return jax.value_and_grad(total, has_aux=True)(trainable, batch)

    if micro_batches == 1:
        result = one(batch)
    else:

        def part(index: Any) -> Any:
            return one(micro_batch(batch, index, micro_batches))

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(part, 0))
        result = jax.lax.fori_loop(0, micro_batches, lambda i, sums: jax.tree.map(jnp.add, sums, part(i)), zeros)
    (loss, (count, metrics)), gradients = result
    scale = jnp.where(count > 0, 1 / jnp.where(count > 0, count, 1), 0)
    return loss, count, metrics, {name: g * scale for name, g in gradients.items()}


def make_update(
    stage: Objective,
    partition: Partition,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    micro_batches: int = 1,
) -> Callable[[TrainState, Arrays, Any], tuple[TrainState, dict[str, tuple[Array, Array]]]]:
    """`update(state, frozen, batch) -> (state, metrics)`, to be compiled with `state` donated.

    A step whose loss or gradient is not finite leaves the state as it was; its `finite` metric says so. One whose
    gradient is 0 throughout (`idle`) leaves the parameters as they were: AdamW's momentum would move them on.
    """

    def update(state: TrainState, frozen: Arrays, batch: Any):
        loss, count, metrics, gradients = loss_and_gradients(
            stage, partition, state.trainable, frozen, batch, micro_batches
        )
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, moments = optimizer.update(gradients, state.optimizer, state.trainable)
        updates = jax.tree.map(lambda u: jnp.where(norm > 0, u, 0), updates)
        proposed = TrainState(state.step + 1, optax.apply_updates(state.trainable, updates), moments)
        proposed = jax.tree.map(lambda new, old: jnp.where(finite, new, old), proposed, state)

        one = jnp.ones(())
        metrics = metrics | {
            "loss": (loss, count),
            "finite": (finite.astype(jnp.float32), one),
            "idle": ((norm == 0).astype(jnp.float32), one),
            "grad_norm": (norm, one),
            "learning_rate": (jnp.asarray(schedule(state.step), jnp.float32), one),
        }
        branch = {name: g for name, g in gradients.items() if "pvm_block/" in name}
        if branch:
            metrics["grad_norm_pvm"] = (optax.tree.norm(branch), one)
        for name, value in proposed.trainable.items():
            if match := GATE.match(name):
                metrics[f"gate/{match[1]}"] = (jnp.abs(value).reshape(()), one)
        return proposed, metrics

    return update
