"""The text decoder: pre-norm GQA layers with QK-norm, DeepStack after the first ones, PVM beside some FFNs.

Source: transformers, modeling_qwen3_vl.py, Qwen3VLTextModel; PVM as in `pvm.py`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pvm_jax.config import ModelConfig, PVMConfig, TextConfig
from pvm_jax.models import rope
from pvm_jax.models.attention_kernels import MemoryRule, Rule, attend
from pvm_jax.models.cache import KeyValue, LayerCache
from pvm_jax.models.layers import Make, SwiGLU, einsum, rms_norm
from pvm_jax.models.pvm import ProjectedMemory, PVMBlock
from pvm_jax.models.stack import group_layers, group_name, in_order, scan_layers, unstack


@dataclasses.dataclass(frozen=True)
class Context:
    """What all layers of one forward pass share.

    Attributes:
      cos, sin: [B,T,H/2] rotary tables in the compute dtype.
      mask: [B,T,S] self-attention, to the tokens of this pass or, with a cache, to its slots; kernels take a rule.
      is_text: [B,T] False at image tokens.
      visual_index: [B,T] visual token at each place, -1 = text; None in a decode step (nothing to add).
      memory_mask: [B,T,M], or a rule: what PVM may retrieve; None without PVM.
      watch: for analyses: called in each layer, while it is traced, with some of its values by name.
    """

    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]
    mask: Bool[Array, "B T S"] | Rule
    is_text: Bool[Array, "B T"]
    visual_index: Int[Array, "B T"] | None
    memory_mask: Bool[Array, "B T M"] | MemoryRule | None
    watch: Callable[..., None] | None = None


def take_visual(features: Float[Array, "B M D"], visual_index: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Each place's visual feature; text places get some feature that the caller must mask."""
    return jnp.take_along_axis(features, jnp.maximum(visual_index, 0)[:, :, None], axis=1)


class SelfAttention(nnx.Module):
    def __init__(self, make: Make, config: TextConfig):
        width, dim = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = make.weight((heads, dim), (width,), ("heads", "head_dim", "embed"))
        self.k_proj = make.weight((kv_heads, dim), (width,), ("kv_heads", "head_dim", "embed"))
        self.v_proj = make.weight((kv_heads, dim), (width,), ("kv_heads", "head_dim", "embed"))
        self.o_proj = make.weight((width,), (heads, dim), ("embed", "heads", "head_dim"))
        self.q_norm = make.ones((dim,), ("head_dim",))
        self.k_norm = make.ones((dim,), ("head_dim",))
        self.eps = config.rms_norm_eps

    def __call__(
        self, x: Float[Array, "B T D"], ctx: Context, cache: LayerCache | None
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        q = rms_norm(einsum("BTD,NHD->BTNH", x, self.q_proj), self.q_norm, self.eps)
        k = rms_norm(einsum("BTD,KHD->BTKH", x, self.k_proj), self.k_norm, self.eps)
        q, k = (rope.rotate(y, ctx.cos, ctx.sin) for y in (q, k))
        k, v = k.swapaxes(1, 2), einsum("BTD,KHD->BKTH", x, self.v_proj)
        if cache is not None:
            cache, k, v = cache.update(k, v)
        if ctx.watch:
            ctx.watch(queries=q, keys=k)
        out = attend(q, k, v, ctx.mask)
        return einsum("BTNH,DNH->BTD", out, self.o_proj), cache


class DecoderLayer(nnx.Module):
    def __init__(self, make: Make, config: TextConfig, pvm: PVMConfig | None):
        self.input_layernorm = make.ones((config.hidden_size,), ("embed",))
        self.self_attn = SelfAttention(make, config)
        self.post_attention_layernorm = make.ones((config.hidden_size,), ("embed",))
        self.mlp = SwiGLU(make, config.hidden_size, config.intermediate_size)
        if pvm:
            self.pvm_block = PVMBlock(make, pvm, config)
        self.eps = config.rms_norm_eps

    def __call__(
        self,
        x: Float[Array, "B T D"],
        ctx: Context,
        cache: LayerCache | None,
        deepstack: Float[Array, "B M D"] | None,
        memory: ProjectedMemory | None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        out, cache = self.self_attn(rms_norm(x, self.input_layernorm, self.eps), ctx, cache)
        h = x + out
        y = self.mlp(rms_norm(h, self.post_attention_layernorm, self.eps))
        if memory is not None:
            # PVM reads h itself, not the FFN's normalised input.
            retrieved = self.pvm_block(h, memory, ctx.memory_mask, ctx.is_text)
            if ctx.watch:
                ctx.watch(memory_queries=self.pvm_block.queries(h), retrieved=retrieved, ffn=y)
            y = y + retrieved
        x = h + y
        if deepstack is not None:
            x = x + jnp.where(ctx.is_text[..., None], 0, take_visual(deepstack, ctx.visual_index))
        return x, cache


class Decoder(nnx.Module):
    def __init__(self, make: Make, config: ModelConfig, *, scan: bool, remat: bool):
        text = config.text
        pvm_layers = config.pvm.layers if config.pvm else ()
        tied = config.tie_word_embeddings
        self.embed_tokens = make.table(text.vocab_size, text.hidden_size, ("vocab", "embed"), tied)
        self.layers = nnx.Dict(
            {
                group_name(g): DecoderLayer(make.stacked(len(g)), text, config.pvm if g[0] in pvm_layers else None)
                for g in config.layer_groups(scan)
            }
        )
        self.norm = make.ones((text.hidden_size,), ("embed",))
        self.eps = text.rms_norm_eps
        self.remat = remat

    def project_memory(self, tokens: Float[Array, "B M D"]) -> dict[str, ProjectedMemory]:
        """Keys and values of the visual tokens for every PVM layer, by group name."""
        return {
            name: unstack(layer).pvm_block.project(tokens)
            for name, layer in in_order(self.layers)
            if hasattr(layer, "pvm_block")
        }

    def __call__(
        self,
        x: Float[Array, "B T D"],
        ctx: Context,
        deepstack: Float[Array, "n B M D"] | None,
        memory: dict[str, ProjectedMemory],
        cache: dict[str, KeyValue] | None = None,
        slot: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, KeyValue | None]]:
        """Hidden states after the final norm, and the cache with the keys and values of x written at `slot`.

        `deepstack` is None in a decode step: text tokens receive nothing from it.
        """
        x, new_cache, _ = self.run_layers(x, ctx, deepstack, memory, cache, slot)
        return rms_norm(x, self.norm, self.eps), new_cache

    def run_layers(
        self,
        x: Float[Array, "B T D"],
        ctx: Context,
        deepstack: Float[Array, "n B M D"] | None,
        memory: dict[str, ProjectedMemory],
        cache: dict[str, KeyValue] | None,
        slot: Int[Array, ""] | None,
        apply: Callable | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, KeyValue | None], dict[str, Any]]:
        """Hidden states behind the last layer, the cache, and by group [L,...] what `apply` kept of its layers.

        `apply` stands in for `apply_layer`, which keeps nothing.
        """
        new_cache, kept = {}, {}
        taps = 0 if deepstack is None else deepstack.shape[0]
        for name, stacked in in_order(self.layers):
            layers = group_layers(name)
            features = deepstack[layers.start : layers.stop] if layers.start < taps else None
            pair = None if cache is None else cache[name]
            one = functools.partial(apply or apply_layer, ctx, memory.get(name), slot)
            inputs = (jnp.arange(len(layers)), features)
            (x, new_cache[name]), kept[name] = scan_layers(stacked, one, (x, pair), inputs, remat=self.remat)
        return x, new_cache, kept


def apply_layer(ctx: Context, memory: ProjectedMemory | None, slot, layer: DecoderLayer, carry, inputs):
    """One layer of `Decoder.run_layers`, as `stack.scan_layers` calls it; `carry` is (x, keys and values)."""
    x, pair = carry
    index, deepstack = inputs
    cache = None if pair is None else LayerCache(*pair, slot, index)
    x, cache = layer(x, ctx, cache, deepstack, memory)
    return (x, None if cache is None else (cache.keys, cache.values)), None
