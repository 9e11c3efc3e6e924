"""Qwen3-VL with Persistent Visual Memory.

The model maps a `Batch` to hidden states; logits are a separate call, so that losses and decoding choose all, chunks
or the last. Nothing about a request is kept on the module: cache and visual memory go in and out as values.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pvm_jax.config import ModelConfig
from pvm_jax.data.batch import Batch
from pvm_jax.models import cache as kv
from pvm_jax.models import rope
from pvm_jax.models.attention import hide_vision, packed_causal_mask
from pvm_jax.models.attention_kernels import Kernels, MemoryRule, Rule, memory_rule, packed_causal_rule
from pvm_jax.models.decoder import Context, Decoder, take_visual
from pvm_jax.models.layers import Make
from pvm_jax.models.pvm import ProjectedMemory, memory_mask
from pvm_jax.models.vision import VisionTower, VisualTokens
from pvm_jax.sharding import BATCH_AXES, RULES, AnyMesh


class Qwen3VL(nnx.Module):
    """The whole model.

    Args:
      config: sizes.
      rngs: initial values; under `nnx.eval_shape` nothing is allocated.
      dtype: compute dtype. Norm statistics, softmax, rotary tables, the gate and logits are fp32 whatever it is.
      param_dtype: dtype of the parameters as created.
      scan: stack and scan like layers (storage and training) or keep each on its own (decoding on CPU).
      remat: recompute each layer in the backward pass instead of keeping its intermediates.
      init: initializer of the matrices, see `layers.Make`.
      attention: kernels for passes without a cache; None: the XLA reference.
      mesh: where the parameters lie; None where the compiler may choose what to gather when.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        scan: bool = True,
        remat: bool = False,
        init: str = "normal",
        attention: Kernels | None = None,
        mesh: AnyMesh | None = None,
    ):
        make = Make(rngs, jnp.dtype(param_dtype), init=init)
        self.visual = VisionTower(make, config.vision, remat=remat)
        self.text = Decoder(make, config, scan=scan, remat=remat)
        if not config.tie_word_embeddings:
            self.lm_head = make.weight((config.text.vocab_size,), (config.text.hidden_size,), ("vocab", "embed"))
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.scan = scan
        self.attention = attention
        self.mesh = mesh

    def __call__(
        self, batch: Batch, *, memory: Float[Array, "B M D"] | None = None, visual: VisualTokens | None = None
    ) -> Float[Array, "B T D"]:
        """Hidden states after the final norm, in the compute dtype.

        Args:
          batch: packed rows, as numpy or jax arrays.
          memory: visual tokens for PVM to read instead of the batch's own (an ablation: another image's memory).
          visual: the batch's visual tokens, where the caller has them already.
        """
        batch = jax.tree.map(jnp.asarray, batch)
        visual = self.encode_images(batch) if visual is None else visual
        mask, memory_mask = self._masks(batch)
        ctx = self._context(batch, batch.positions, mask=mask, memory_mask=memory_mask)
        projected = self.text.project_memory(visual.tokens if memory is None else memory)
        hidden, _ = self.text(self.embed(batch, visual), ctx, visual.deepstack, projected)
        return hidden

    def encode_images(self, batch: Batch) -> VisualTokens:
        """Visual tokens and DeepStack features of the batch's patches."""
        return self.visual(jax.tree.map(jnp.asarray, batch), self.dtype, self.attention)

    def embed(self, batch: Batch, visual: VisualTokens) -> Float[Array, "B T D"]:
        """What enters the first layer: embeddings, and visual tokens in their places."""
        x = self.text.embed_tokens[...][batch.tokens].astype(self.dtype)
        is_visual = (batch.visual_index >= 0)[:, :, None]
        return jnp.where(is_visual, take_visual(visual.tokens, batch.visual_index), x)

    def window(self, batch: Batch, start: Int[Array, ""], length: int) -> Context:
        """What the layers need to know of the columns start .. start + length - 1 of a batch.

        For passes that go through rows of T columns window by window, with a cache of T slots for the keys and values
        of the windows before: each column sees what it sees in a pass over all of them at once.
        """

        def cut(x: Array, axis: int = 1) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, start, length, axis)

        segments, is_visual = batch.segment_ids, batch.visual_index >= 0
        ids = cut(segments)
        columns = jnp.broadcast_to(start + jnp.arange(length), ids.shape)
        same = (ids[:, :, None] == segments[:, None, :]) & (ids > 0)[:, :, None]
        causal = jnp.arange(segments.shape[1]) <= columns[:, :, None]
        hidden_vision = hide_vision(cut(is_visual), is_visual, batch.vision_masked)
        cos, sin = self._rope(cut(batch.positions, axis=2))
        return Context(
            cos=cos,
            sin=sin,
            mask=same & causal & ~hidden_vision,
            is_text=cut(~is_visual),
            visual_index=cut(batch.visual_index),
            memory_mask=self._memory_mask(columns, ids, batch.memory_index, batch.memory_segment_ids),
        )

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Unembedding, fp32."""
        return _unembed(self._unembedding.astype(hidden.dtype), hidden)

    def logits_in_loop(self, trains: bool = True) -> Callable[[Float[Array, "B ... D"]], Float[Array, "B ... V"]]:
        """`logits`, for calls in a loop over columns; B divides over `data` and `fsdp`.

        Where the matrix is split over `fsdp` it is gathered here; left alone, the compiler gathers it in every call, or
        has each device compute a part of all devices' rows. It is gathered as [D,V], where the parts lie one after the
        other; as [V,D] they would have to be put in order, in a second whole matrix.

        Args:
          trains: the matrix is differentiated. What is gathered then has an axis [W,D,V] of the devices that rows are
            split over: each adds up the gradient of its own rows over the whole loop, and the sum over devices is one
            behind the loop, not one in every call.
        """
        weight = self._unembedding.astype(self.dtype)
        ways = 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        if ways == 1 or (self.mesh.shape["fsdp"] == 1 and not trains):
            return functools.partial(_unembed, weight)
        vocab = RULES["vocab"]
        whole = self._put(weight.T, None, vocab)
        if trains:
            whole = self._put(jnp.broadcast_to(whole, (ways, *whole.shape)), BATCH_AXES, None, vocab)

        def logits(hidden: Array) -> Array:
            columns = (None,) * (hidden.ndim - 2)
            z = _unembed(self._put(whole, None, vocab).T, self._put(hidden, BATCH_AXES))
            return self._put(z, BATCH_AXES, *columns, vocab)

        def logits_by_device(hidden: Array) -> Array:
            rows = self._put(hidden.reshape(ways, -1, *hidden.shape[1:]), BATCH_AXES)
            z = jnp.einsum("WDV,W...D->W...V", whole, rows, preferred_element_type=jnp.float32)
            z = self._put(z, BATCH_AXES, *(None,) * (z.ndim - 2), vocab)
            return z.reshape(*hidden.shape[:-1], -1)

        return logits_by_device if trains else logits

    def _put(self, x: Array, *axes: str | tuple[str, ...] | None) -> Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*axes)))

    @property
    def _unembedding(self) -> Float[Array, "V D"]:
        return (self.text.embed_tokens if self.config.tie_word_embeddings else self.lm_head)[...]

    def init_cache(self, batch_size: int, capacity: int, memory_capacity: int) -> kv.KVCache:
        """An empty cache for `capacity` tokens, `memory_capacity` of them visual."""
        return kv.init_cache(self.config, self.scan, batch_size, capacity, memory_capacity, self.dtype)

    def prefill(self, batch: Batch, cache: kv.KVCache) -> tuple[Float[Array, "B T D"], kv.KVCache]:
        """Appends a batch to the cache: a prompt, or a later turn, whose images join the memory.

        Rows hold one sample each (segment ids 1, then 0); `batch.positions` count from `cache.next_position`. The
        caller makes sure that T more tokens and M more visual tokens fit.
        """
        batch = jax.tree.map(jnp.asarray, batch)
        real = batch.segment_ids > 0
        is_visual = batch.visual_index >= 0
        visual = self.encode_images(batch)
        columns = cache.filled + jnp.broadcast_to(jnp.arange(batch.tokens.shape[1]), batch.tokens.shape)
        positions = batch.positions + cache.next_position[:, None]
        slots = jnp.where(batch.memory_index >= 0, batch.memory_index + cache.filled, -1)
        last = jnp.max(jnp.where(real, positions, -1), axis=(0, 2))
        new = cache.replace(
            memory=self._append_memory(cache, self.text.project_memory(visual.tokens)),
            memory_slots=kv.put(cache.memory_slots, slots, cache.memory_filled),
            memory_filled=cache.memory_filled + batch.memory_index.shape[1],
            filled=cache.filled + batch.tokens.shape[1],
            valid=kv.put(cache.valid, real, cache.filled),
            visual=kv.put(cache.visual, is_visual, cache.filled),
            vision_masked=batch.vision_masked,
            next_position=jnp.maximum(cache.next_position, last + 1),
        )
        causal = jnp.arange(cache.capacity) <= columns[:, :, None]
        hidden_vision = hide_vision(is_visual, new.visual, batch.vision_masked)
        memory_ids = (new.memory_slots >= 0).astype(jnp.int32)
        ctx = self._context(
            batch,
            positions,
            mask=new.valid[:, None, :] & causal & ~hidden_vision,
            memory_mask=self._memory_mask(columns, batch.segment_ids, new.memory_slots, memory_ids),
        )
        x = self.embed(batch, visual)
        hidden, pairs = self.text(x, ctx, visual.deepstack, new.memory, cache.pairs(), cache.filled)
        return hidden, new.with_pairs(pairs)

    def decode(self, tokens: Int[Array, " B"], cache: kv.KVCache) -> tuple[Float[Array, "B D"], kv.KVCache]:
        """Appends one text token to every row; its hidden state [B,D]."""
        rows = tokens.shape[0]
        yes = jnp.ones((rows, 1), bool)
        new = cache.replace(
            filled=cache.filled + 1,
            valid=kv.put(cache.valid, yes, cache.filled),
            visual=kv.put(cache.visual, ~yes, cache.filled),
            next_position=cache.next_position + 1,
        )
        cos, sin = self._rope(jnp.broadcast_to(cache.next_position[:, None], (3, rows, 1)))
        # Every stored visual token stands before this one.
        columns = jnp.full((rows, 1), cache.filled)
        memory_ids = (cache.memory_slots >= 0).astype(jnp.int32)
        ctx = Context(
            cos=cos,
            sin=sin,
            mask=(new.valid & ~(new.visual & cache.vision_masked[:, None]))[:, None],
            is_text=yes,
            visual_index=None,
            memory_mask=self._memory_mask(columns, yes.astype(jnp.int32), cache.memory_slots, memory_ids),
        )
        x = self.text.embed_tokens[...][tokens][:, None].astype(self.dtype)
        hidden, pairs = self.text(x, ctx, None, cache.memory, cache.pairs(), cache.filled)
        return hidden[:, 0], new.with_pairs(pairs)

    def _rope(self, positions: Int[Array, "3 B T"]) -> tuple[Array, Array]:
        text = self.config.text
        cos, sin = rope.mrope(positions, text.head_dim, text.rope_theta, text.mrope_section)
        return cos.astype(self.dtype), sin.astype(self.dtype)

    def _context(self, batch: Batch, positions, mask, memory_mask) -> Context:
        cos, sin = self._rope(positions)
        return Context(cos, sin, mask, batch.visual_index < 0, batch.visual_index, memory_mask)

    def _masks(self, batch: Batch) -> tuple[Array | Rule, Array | MemoryRule | None]:
        """Self-attention's and PVM's masks of a pass without a cache, as rules where a kernel is used."""
        is_visual, pvm = batch.visual_index >= 0, self.config.pvm
        segments, visible = batch.segment_ids, (batch.memory_index, batch.memory_segment_ids)
        columns = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
        if not (self.attention and self.attention.fit(*segments.shape)):
            mask = packed_causal_mask(segments, is_visual, batch.vision_masked)
            return mask, self._memory_mask(columns, segments, *visible)
        rule = packed_causal_rule(self.attention, segments, is_visual, batch.vision_masked)
        if pvm is None or pvm.slots:  # slots are few
            return rule, self._memory_mask(columns, segments, *visible)
        return rule, memory_rule(self.attention, pvm.memory_mask, segments, batch.visual_index, *visible)

    def _memory_mask(self, columns, segment_ids, memory_index, memory_segment_ids) -> Array | None:
        pvm = self.config.pvm
        if pvm is None:
            return None
        if pvm.slots:  # the control: learned slots, which every real token may read
            shape = (*segment_ids.shape, pvm.slots)
            return jnp.broadcast_to((segment_ids > 0)[:, :, None], shape)
        return memory_mask(pvm.memory_mask, columns, segment_ids, memory_index, memory_segment_ids)

    def _append_memory(self, cache: kv.KVCache, new: dict[str, ProjectedMemory]) -> dict[str, ProjectedMemory]:
        if self.config.pvm and self.config.pvm.slots:
            return new
        at = cache.memory_filled
        return {
            name: tuple(jax.lax.dynamic_update_slice(old, y, (0, 0, at, 0)) for old, y in zip(cache.memory[name], pair))
            for name, pair in new.items()
        }


def _unembed(weight: Float[Array, "V D"], hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
    return jnp.einsum("VD,...D->...V", weight, hidden, preferred_element_type=jnp.float32)
