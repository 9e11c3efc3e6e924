"""Qwen3-VL's vision tower: patches in merge-block order in, one token per 2x2 patches and DeepStack features out.

All that depends on an image's grid (coordinates, position-table corners, image ids) is in the batch, computed on the
host; so the tower jits, shards over rows and treats any number of images per row alike. Images of a row do not see
each other: their segment ids differ. Source: transformers, modeling_qwen3_vl.py, Qwen3VLVisionModel.
"""

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Float

from pvm_jax.config import VisionConfig
from pvm_jax.data.batch import Batch
from pvm_jax.models import rope
from pvm_jax.models.attention import SameId
from pvm_jax.models.attention_kernels import Kernels, Rule, attend
from pvm_jax.models.layers import LayerNorm, Make, einsum
from pvm_jax.models.stack import group_name, in_order, scan_layers


@struct.dataclass
class VisualTokens:
    """What the decoder takes from the images of a batch.

    Attributes:
      tokens: [B,M,D] merged visual tokens; they stand in for the placeholders' embeddings and are PVM's memory.
      deepstack: [n,B,M,D] features that are added after decoder layers 0 .. n-1.
    """

    tokens: Float[Array, "B M D"]
    deepstack: Float[Array, "n B M D"]


class PatchEmbed(nnx.Module):
    """The 3-D convolution whose stride is its kernel, as the matrix product that it is."""

    def __init__(self, make: Make, config: VisionConfig):
        self.weight = make.weight((config.hidden_size,), (config.patch_dim,), ("vision_embed", "patch"))
        self.bias = make.zeros((config.hidden_size,), ("vision_embed",))

    def __call__(self, patches: Float[Array, "B P C"]) -> Float[Array, "B P E"]:
        return einsum("BPC,EC->BPE", patches, self.weight) + self.bias[...].astype(patches.dtype)


class VisionAttention(nnx.Module):
    def __init__(self, make: Make, config: VisionConfig):
        width, heads, dim = config.hidden_size, config.num_heads, config.head_dim
        self.qkv = make.weight((3, heads, dim), (width,), ("qkv", "heads", "head_dim", "vision_embed"))
        self.qkv_bias = make.zeros((3, heads, dim), ("qkv", "heads", "head_dim"))
        self.proj = make.weight((width,), (heads, dim), ("vision_embed", "heads", "head_dim"))
        self.proj_bias = make.zeros((width,), ("vision_embed",))

    def __call__(self, x: Float[Array, "B P E"], cos: Array, sin: Array, mask: SameId | Rule) -> Array:
        qkv = einsum("BPE,ANHE->ABPNH", x, self.qkv) + self.qkv_bias[...].astype(x.dtype)[:, None, None]
        q, k = (rope.rotate(qkv[i].astype(jnp.float32), cos, sin).astype(x.dtype) for i in range(2))
        out = attend(q, k.swapaxes(1, 2), qkv[2].swapaxes(1, 2), mask)
        return einsum("BPNH,ENH->BPE", out, self.proj) + self.proj_bias[...].astype(x.dtype)


class Mlp(nnx.Module):
    """Two linear layers with biases around a GELU: tanh approximation in the blocks, exact in the mergers."""

    def __init__(self, make: Make, width: int, hidden: int, out: int, axes: tuple[str, str], *, tanh: bool):
        self.fc1 = make.weight((hidden,), (width,), ("mlp", axes[0]))
        self.fc1_bias = make.zeros((hidden,), ("mlp",))
        self.fc2 = make.weight((out,), (hidden,), (axes[1], "mlp"))
        self.fc2_bias = make.zeros((out,), (axes[1],))
        self.tanh = tanh

    def __call__(self, x: Float[Array, "B P E"]) -> Float[Array, "B P O"]:
        hidden = einsum("BPE,FE->BPF", x, self.fc1) + self.fc1_bias[...].astype(x.dtype)
        hidden = jax.nn.gelu(hidden, approximate=self.tanh)
        return einsum("BPF,OF->BPO", hidden, self.fc2) + self.fc2_bias[...].astype(x.dtype)


class VisionBlock(nnx.Module):
    def __init__(self, make: Make, config: VisionConfig):
        width, axes = config.hidden_size, ("vision_embed", "vision_embed")
        self.norm1 = LayerNorm(make, width, "vision_embed")
        self.norm2 = LayerNorm(make, width, "vision_embed")
        self.attn = VisionAttention(make, config)
        self.mlp = Mlp(make, width, config.intermediate_size, width, axes, tanh=True)

    def __call__(self, x: Float[Array, "B P E"], cos: Array, sin: Array, mask: SameId | Rule) -> Float[Array, "B P E"]:
        x = x + self.attn(self.norm1(x), cos, sin, mask)
        return x + self.mlp(self.norm2(x))


class PatchMerger(Mlp):
    """Four neighbouring patches become one visual token of the decoder's width.

    The final merger normalises each patch before the four are joined; DeepStack's normalise the joined vector.
    """

    def __init__(self, make: Make, config: VisionConfig, *, norm_joined: bool):
        joined = config.hidden_size * config.merge_unit
        super().__init__(make, joined, joined, config.out_hidden_size, ("vision_merged", "embed"), tanh=False)
        self.norm = LayerNorm(make, joined if norm_joined else config.hidden_size, "vision_merged")
        self.merge_unit = config.merge_unit
        self.norm_joined = norm_joined

    def __call__(self, x: Float[Array, "B P E"]) -> Float[Array, "B M D"]:
        batch, patches, width = x.shape
        joined = (batch, patches // self.merge_unit, width * self.merge_unit)
        x = self.norm(x.reshape(joined)) if self.norm_joined else self.norm(x).reshape(joined)
        return super().__call__(x)


class VisionTower(nnx.Module):
    def __init__(self, make: Make, config: VisionConfig, *, remat: bool = False):
        width, taps = config.hidden_size, config.deepstack_visual_indexes
        self.patch_embed = PatchEmbed(make, config)
        self.pos_embed = make.normal((config.num_position_embeddings, width), ("position", "vision_embed"))
        # A group ends at each DeepStack tap, so that the taps are group outputs and not scan outputs of every block.
        starts = sorted({0, *(tap + 1 for tap in taps)} - {config.depth})
        groups = [range(a, b) for a, b in zip(starts, [*starts[1:], config.depth])]
        self.blocks = nnx.Dict({group_name(g): VisionBlock(make.stacked(len(g)), config) for g in groups})
        self.merger = PatchMerger(make, config, norm_joined=False)
        self.deepstack_merger_list = nnx.Dict(
            {str(i): PatchMerger(make, config, norm_joined=True) for i in range(len(taps))}
        )
        self.last_block = tuple(g[-1] for g in groups)
        self.config = config
        self.remat = remat

    def __call__(self, batch: Batch, dtype: jnp.dtype, kernels: Kernels | None = None) -> VisualTokens:
        """Encodes the batch's patches; rows of padding cost the same and yield values that nothing reads."""
        config = self.config
        x = self.patch_embed(batch.patches.astype(dtype))
        x = x + self._position_embedding(batch).astype(dtype)
        cos, sin = rope.rope_2d(batch.patch_coords, config.head_dim)
        ids = batch.patch_segment_ids
        if kernels and kernels.fit(*ids.shape):
            mask = Rule(ids, ids, False, kernels)
        else:
            mask = SameId(ids, ids)

        deepstack = []
        for last, (_, blocks) in zip(self.last_block, in_order(self.blocks)):
            x, _ = scan_layers(blocks, lambda block, x, _: (block(x, cos, sin, mask), None), x, remat=self.remat)
            if last in config.deepstack_visual_indexes:
                deepstack.append(self.deepstack_merger_list[str(len(deepstack))](x))
        tokens = self.merger(x)
        features = jnp.stack(deepstack) if deepstack else jnp.zeros((0, *tokens.shape), tokens.dtype)
        return VisualTokens(tokens=tokens, deepstack=features)

    def _position_embedding(self, batch: Batch) -> Float[Array, "B P E"]:
        """Bilinear interpolation of the learned table: corners and weights come with the batch; fp32."""
        table = self.pos_embed[...].astype(jnp.float32)
        corners = (table[batch.pos_index[..., i]] * batch.pos_weight[..., i, None] for i in range(4))
        return sum(corners)
