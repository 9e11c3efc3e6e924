"""The state of a generation, as a value: key/value cache and visual memory.

Every row of a batch uses the same slot for its next token; which slots of a row hold a real token is a mask. So a
write is one contiguous update, in place inside a loop, whatever the lengths of the rows; positions for the rotary
embedding are kept per row and do not depend on slots.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from pvm_jax.config import ModelConfig
from pvm_jax.models.pvm import ProjectedMemory
from pvm_jax.models.stack import group_name


@struct.dataclass
class KVCache:
    """Attributes:
    keys, values: group name -> [L,B,K,S,H].
    memory: PVM layer (its group's name) -> projected keys and values [B,K,M,H], written when an image enters.
    memory_slots: [B,M] slot at which each visual token stands, -1 = none.
    filled: slots in use, the same in every row; `memory_filled` likewise for visual tokens.
    valid: [B,S] the slot holds a real token of this row; `visual`: and it is an image token.
    vision_masked: [B] rows whose text does not see image tokens in the backbone.
    next_position: [B] rotary position of the next token.
    """

    keys: dict[str, Float[Array, "L B K S H"]]
    values: dict[str, Float[Array, "L B K S H"]]
    memory: dict[str, ProjectedMemory]
    memory_slots: Int[Array, "B M"]
    memory_filled: Int[Array, ""]
    filled: Int[Array, ""]
    valid: Bool[Array, "B S"]
    visual: Bool[Array, "B S"]
    vision_masked: Bool[Array, " B"]
    next_position: Int[Array, " B"]

    @property
    def capacity(self) -> int:
        return self.valid.shape[1]

    @property
    def memory_capacity(self) -> int:
        return self.memory_slots.shape[1]

    def groups(self) -> dict[str, tuple[Array, Array]]:
        """Keys and values by group, as the decoder takes them."""
        return {name: (self.keys[name], self.values[name]) for name in self.keys}

    def append(
        self,
        new: dict[str, tuple[Array, Array]],
        valid: Bool[Array, "B T"],
        visual: Bool[Array, "B T"],
        next_position: Int[Array, " B"],
    ) -> "KVCache":
        """Writes the keys and values of T more tokens, [L,B,K,T,H] by group, behind what is there.

        This is the only write of a step, after all reads: inside a loop XLA then updates the buffers in place.
        """
        at = (0, 0, 0, self.filled, 0)
        return self.replace(
            keys={name: jax.lax.dynamic_update_slice(x, new[name][0], at) for name, x in self.keys.items()},
            values={name: jax.lax.dynamic_update_slice(x, new[name][1], at) for name, x in self.values.items()},
            filled=self.filled + valid.shape[1],
            valid=put(self.valid, valid, self.filled),
            visual=put(self.visual, visual, self.filled),
            next_position=next_position,
        )

    def grow(self, capacity: int) -> "KVCache":
        """The same state with room for `capacity` tokens."""
        extra = capacity - self.capacity

        def pad(x: Array, axis: int) -> Array:
            return jnp.pad(x, [(0, extra if i == axis else 0) for i in range(x.ndim)])

        return self.replace(
            keys={name: pad(x, 3) for name, x in self.keys.items()},
            values={name: pad(x, 3) for name, x in self.values.items()},
            valid=pad(self.valid, 1),
            visual=pad(self.visual, 1),
        )


def put(target: Array, rows: Array, column: Int[Array, ""]) -> Array:
    """Writes `rows` [B,n] into `target` [B,S] from `column` on."""
    return jax.lax.dynamic_update_slice(target, rows, (0, column))


def init_cache(
    config: ModelConfig, scan: bool, batch_size: int, capacity: int, memory_capacity: int, dtype: jnp.dtype
) -> KVCache:
    """An empty cache for `capacity` tokens and `memory_capacity` visual tokens a row."""
    text, pvm = config.text, config.pvm
    names = {group_name(g): len(g) for g in config.layer_groups(scan)}
    kv = {
        name: jnp.zeros((n, batch_size, text.num_key_value_heads, capacity, text.head_dim), dtype)
        for name, n in names.items()
    }
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
