"""The state of a generation, as a value: key/value cache and visual memory.

Every row of a batch uses the same slot for its next token; which slots of a row hold a real token is a mask. So a
write is one contiguous update, in place inside a loop, whatever the lengths of the rows; positions for the rotary
embedding are kept per row and do not depend on slots.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from pvm_jax.config import ModelConfig
from pvm_jax.models.stack import group_name
from pvm_jax.sharding import BATCH_AXES, AnyMesh, ways_of

# A group's keys and values: [L,B,K,S,H] without those of the axes L, B, K that have length 1. XLA:CPU copies a buffer
# that is written in one shape and read in another in every step of a loop; without such axes the shapes are the same
# and the update is in place.
KeyValue = tuple[Array, Array]


@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Layer `index` of a group's keys and values, and the slot for the next tokens."""

    keys: Array
    values: Array
    slot: Int[Array, ""]
    index: Int[Array, ""]

    def update(
        self, k: Float[Array, "B K T H"], v: Float[Array, "B K T H"]
    ) -> tuple["LayerCache", Float[Array, "B K S H"], Float[Array, "B K S H"]]:
        """Stores T tokens from `slot` on; the new cache and all of this layer's keys and values."""
        keys, values = (self._put(x, y) for x, y in ((self.keys, k), (self.values, v)))
        return dataclasses.replace(self, keys=keys, values=values), self._get(keys, k), self._get(values, v)

    def _put(self, target: Array, new: Array) -> Array:
        new = new.reshape(_drop_ones(new.shape[:2]) + new.shape[2:])
        at = [0] * (new.ndim - 2) + [self.slot, 0]
        if target.ndim > new.ndim:
            new, at = new[None], [self.index, *at]
        return jax.lax.dynamic_update_slice(target, new, at)

    def _get(self, target: Array, new: Array) -> Array:
        if target.ndim > len(_drop_ones(new.shape[:2])) + 2:
            target = jax.lax.dynamic_index_in_dim(target, self.index, 0, keepdims=False)
        return target.reshape(*new.shape[:2], *target.shape[-2:])


def _drop_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n > 1)


@struct.dataclass
class KVCache:
    """Attributes:
    keys, values: group name -> [L,B,K,S,H] without axes of length 1, see `KeyValue`.
    memory: PVM layer (its group's name) -> projected keys and values [B,K,M,H], written when an image enters.
    memory_slots: [B,M] slot at which each visual token stands, -1 = none.
    filled: slots in use, the same in every row; `memory_filled` likewise for visual tokens.
    valid: [B,S] the slot holds a real token of this row; `visual`: and it is an image token.
    vision_masked: [B] rows whose text does not see image tokens in the backbone.
    next_position: [B] rotary position of the next token.
    """

    # Not typed as arrays: JAX builds this class with shapes, layouts and other stand-ins as leaves, too.
    keys: dict[str, Any]
    values: dict[str, Any]
    memory: dict[str, tuple[Any, Any]]
    memory_slots: Any
    memory_filled: Any
    filled: Any
    valid: Any
    visual: Any
    vision_masked: Any
    next_position: Any

    @property
    def capacity(self) -> int:
        return self.valid.shape[1]

    @property
    def memory_capacity(self) -> int:
        return self.memory_slots.shape[1]

    def pairs(self) -> dict[str, KeyValue]:
        """Keys and values by group, as the decoder takes them."""
        return {name: (self.keys[name], self.values[name]) for name in self.keys}

    def with_pairs(self, pairs: dict[str, KeyValue]) -> "KVCache":
        """This state with the keys and values that the decoder returned."""
        return self.replace(
            keys={name: pair[0] for name, pair in pairs.items()},
            values={name: pair[1] for name, pair in pairs.items()},
        )

    def grow(self, capacity: int) -> "KVCache":
        """The same state with room for `capacity` tokens."""
        extra = capacity - self.capacity

        def pad(x: Array, axis: int) -> Array:
            return jnp.pad(x, [(0, extra if i == axis else 0) for i in range(x.ndim)])

        return self.replace(
            keys={name: pad(x, x.ndim - 2) for name, x in self.keys.items()},
            values={name: pad(x, x.ndim - 2) for name, x in self.values.items()},
            valid=pad(self.valid, 1),
            visual=pad(self.visual, 1),
        )


def take_cache_rows(
    cache: KVCache, rows: Int[Array, " R"], config: ModelConfig, scan: bool, mesh: AnyMesh | None = None
) -> KVCache:
    """A cache of R rows, row i of which is row `rows[i]` of `cache`; `mesh`: over which its rows are spread."""

    def pick(x: Array) -> Array:
        return jnp.take(x, rows, axis=0)

    def pick_layers(x: Float[Array, "L B K S H"]) -> Float[Array, "L R K S H"]:
        if mesh is None:
            return jnp.take(x, rows, axis=1)
        # Rows change devices: XLA adds up, whole on every device, what each of them has of the rows. A layer at a time
        # that is little, of all layers it would be the new cache as often as there are devices.
        place = NamedSharding(mesh, PartitionSpec(*_row_and_head_axes(config, len(rows), mesh)))
        return jax.lax.map(lambda layer: jax.lax.with_sharding_constraint(pick(layer), place), x)

    return _with_rows(cache, config, scan, pick_layers, pick)


def repeat_cache_rows(cache: KVCache, times: int, config: ModelConfig, scan: bool) -> KVCache:
    """A cache with each row as often as said, one after the other: several answers to one prompt."""

    def repeat(x: Array, axis: int = 0) -> Array:
        return jnp.repeat(x, times, axis=axis)

    return _with_rows(cache, config, scan, lambda x: repeat(x, axis=1), repeat)


def _with_rows(
    cache: KVCache,
    config: ModelConfig,
    scan: bool,
    pick_layers: Callable[[Array], Array],
    pick: Callable[[Array], Array],
) -> KVCache:
    """Other rows of a cache: `pick_layers` takes them from [L,B,K,S,H], `pick` from [B,...]."""
    old, heads = cache.valid.shape[0], config.text.num_key_value_heads

    def pick_group(x: Array, layers: int) -> Array:
        full = pick_layers(x.reshape(layers, old, heads, *x.shape[-2:]))
        return full.reshape(*_drop_ones(full.shape[:3]), *x.shape[-2:])

    layers = {group_name(group): len(group) for group in config.layer_groups(scan)}
    return cache.replace(
        keys={name: pick_group(x, layers[name]) for name, x in cache.keys.items()},
        values={name: pick_group(x, layers[name]) for name, x in cache.values.items()},
        memory=jax.tree.map(pick, cache.memory),
        memory_slots=pick(cache.memory_slots),
        valid=pick(cache.valid),
        visual=pick(cache.visual),
        vision_masked=pick(cache.vision_masked),
        next_position=pick(cache.next_position),
    )


def put(target: Array, rows: Array, column: Int[Array, ""]) -> Array:
    """Writes `rows` [B,n] into `target` [B,S] from `column` on."""
    return jax.lax.dynamic_update_slice(target, rows, (0, column))


def init_cache(
    config: ModelConfig, scan: bool, batch_size: int, capacity: int, memory_capacity: int, dtype: jnp.dtype
) -> KVCache:
    """An empty cache for `capacity` tokens and `memory_capacity` visual tokens a row."""
    text, pvm = config.text, config.pvm
    kv = {}
    for group in config.layer_groups(scan):
        lead = _drop_ones((len(group), batch_size, text.num_key_value_heads))
        kv[group_name(group)] = jnp.zeros((*lead, capacity, text.head_dim), dtype)
    memory = {}
    if pvm:
        shape = (batch_size, pvm.num_key_value_heads, pvm.slots or memory_capacity, pvm.head_dim)
        memory = {str(i): (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for i in pvm.layers}
    return KVCache(
        keys=kv,
        values=jax.tree.map(jnp.zeros_like, kv),
        memory=memory,
        memory_slots=jnp.full((batch_size, memory_capacity), -1, jnp.int32),
        memory_filled=jnp.zeros((), jnp.int32),
        filled=jnp.zeros((), jnp.int32),
        valid=jnp.zeros((batch_size, capacity), bool),
        visual=jnp.zeros((batch_size, capacity), bool),
        vision_masked=jnp.zeros((batch_size,), bool),
        next_position=jnp.zeros((batch_size,), jnp.int32),
    )


def _row_and_head_axes(config: ModelConfig, batch_size: int, mesh: AnyMesh) -> tuple[Any, Any]:
    rows = BATCH_AXES if batch_size % ways_of(mesh) == 0 else None
    return rows, "tensor" if config.text.num_key_value_heads % mesh.shape["tensor"] == 0 else None


def cache_shardings(config: ModelConfig, scan: bool, batch_size: int, mesh: AnyMesh) -> KVCache:
    """Where the parts of a cache lie: rows over data and fsdp, key/value heads over tensor.

    PVM's memory has one key/value head: every device of a row has it. Rows or heads that do not divide lie whole.
    """
    text, pvm = config.text, config.pvm
    rows, heads = _row_and_head_axes(config, batch_size, mesh)

    def on(*axes: Any) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*axes))

    kv = {}
    for group in config.layer_groups(scan):
        lengths = ((None, len(group)), (rows, batch_size), (heads, text.num_key_value_heads))
        kv[group_name(group)] = on(*(axis for axis, length in lengths if length > 1), None, None)
    return KVCache(
        keys=kv,
        values=dict(kv),
        memory={str(i): (on(rows), on(rows)) for i in pvm.layers} if pvm else {},
        memory_slots=on(rows),
        memory_filled=on(),
        filled=on(),
        valid=on(rows),
        visual=on(rows),
        vision_masked=on(rows),
        next_position=on(rows),
    )
