"""Persistent Visual Memory: a gated cross-attention over visual tokens, beside the FFN (arXiv 2605.00814, section 4).

With h [T,D] the hidden state after self-attention's residual and V [M,D] the merged visual tokens:

    q = rms_q(W_q · norm_in(W_text · h))
    k = rms_k(W_k · W_vis · V)          v = W_v · W_vis · V         no rotary embedding
    a = W_o · softmax over V (q k / sqrt(H)) v
    m = a + SwiGLU(norm_post(a))
    y = h + FFN(norm(h)) + gate * rms(W_up · m) * is_text

The softmax runs over visual tokens alone, so that what a query retrieves does not depend on the text's length.

What differs from the public release:
  * keys and values are projected once, when an image enters, and carried as a value (`project`); the release
    projects them again in every decode step and keeps the image on the module, where the next one replaces it;
  * the memory mask is a choice (`memory_mask`): the release's `all` lets text retrieve from images that come later;
  * `slots` learned vectors can stand in for the image: the control of the digits experiment.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pvm_jax.config import PVMConfig, TextConfig
from pvm_jax.models.attention_kernels import MemoryRule, retrieve
from pvm_jax.models.layers import Make, SwiGLU, einsum, rms_norm

# One PVM layer's projected memory: keys and values [B,K,M,H].
ProjectedMemory = tuple[Array, Array]


class CrossAttention(nnx.Module):
    """Latent attention; its few heads are replicated over the tensor axis (logical axis names of their own)."""

    def __init__(self, make: Make, pvm: PVMConfig):
        heads, kv_heads, dim, width = pvm.num_heads, pvm.num_key_value_heads, pvm.head_dim, pvm.hidden_size
        self.q_proj = make.weight((heads, dim), (width,), ("latent_heads", "head_dim", "latent"))
        self.k_proj = make.weight((kv_heads, dim), (width,), ("latent_heads", "head_dim", "latent"))
        self.v_proj = make.weight((kv_heads, dim), (width,), ("latent_heads", "head_dim", "latent"))
        self.o_proj = make.weight((width,), (heads, dim), ("latent", "latent_heads", "head_dim"))
        self.q_norm = make.ones((dim,), ("head_dim",))
        self.k_norm = make.ones((dim,), ("head_dim",))


class PVMBlock(nnx.Module):
    """One layer's memory branch. `gate_alpha` starts at 0 and the expander does not, else no gradient ever flows."""

    def __init__(self, make: Make, pvm: PVMConfig, text: TextConfig):
        width = pvm.hidden_size
        self.text_reducer = make.weight((width,), (text.hidden_size,), ("latent", "embed"))
        self.vision_reducer = make.weight((width,), (text.hidden_size,), ("latent", "embed"))
        # N(0, 0.02) under either init: the weight-free norm behind it makes its scale irrelevant.
        self.output_expander = make.normal((text.hidden_size, width), ("embed", "latent"))
        self.input_norm = make.ones((width,), ("latent",))
        self.post_attn_norm = make.ones((width,), ("latent",))
        self.cross_attn = CrossAttention(make, pvm)
        self.mlp = SwiGLU(make, width, pvm.intermediate_size, axes=("latent", "latent_mlp"))
        self.gate_alpha = make.zeros((1,), ("gate",))
        if pvm.slots:
            self.slots = make.normal((pvm.slots, text.hidden_size), ("memory", "embed"))
        self.has_slots = pvm.slots > 0
        self.eps = text.rms_norm_eps

    def project(self, tokens: Float[Array, "B M D"]) -> ProjectedMemory:
        """Keys and values of the merged visual tokens (or of the learned slots), each [B,K,M,H]."""
        if self.has_slots:
            slots = self.slots[...].astype(tokens.dtype)
            tokens = jnp.broadcast_to(slots, (tokens.shape[0], *slots.shape))
        latent = einsum("BMD,RD->BMR", tokens, self.vision_reducer)
        k = rms_norm(einsum("BMR,KHR->BKMH", latent, self.cross_attn.k_proj), self.cross_attn.k_norm, self.eps)
        return k, einsum("BMR,KHR->BKMH", latent, self.cross_attn.v_proj)

    def queries(self, h: Float[Array, "B T D"]) -> Float[Array, "B T N H"]:
        """What hidden states ask the memory for."""
        attn = self.cross_attn
        latent = rms_norm(einsum("BTD,RD->BTR", h, self.text_reducer), self.input_norm, self.eps)
        return rms_norm(einsum("BTR,NHR->BTNH", latent, attn.q_proj), attn.q_norm, self.eps)

    def __call__(
        self,
        h: Float[Array, "B T D"],
        memory: ProjectedMemory,
        mask: Bool[Array, "B T M"] | MemoryRule,
        is_text: Bool[Array, "B T"],
    ) -> Float[Array, "B T D"]:
        """What the branch adds to the FFN's output; exactly 0 for visual queries and where the mask shows nothing."""
        retrieved = retrieve(self.queries(h), *memory, mask)
        a = einsum("BTNH,RNH->BTR", retrieved, self.cross_attn.o_proj)
        m = a + self.mlp(rms_norm(a, self.post_attn_norm, self.eps))
        y = rms_norm(einsum("BTR,DR->BTD", m, self.output_expander), None, self.eps)
        gate = self.gate_alpha[...].astype(jnp.float32)
        return (gate * y * is_text[..., None]).astype(h.dtype)


def memory_mask(
    kind: str,
    columns: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    memory_index: Int[Array, "B M"],
    memory_segment_ids: Int[Array, "B M"],
) -> Bool[Array, "B T M"]:
    """Which visual tokens each token may retrieve from, always within its own sample.

    "all": every one, also of images that come later (the release). "causal": those at or before its own column.

        tokens  v0 a v1 b      all     a: v0 v1   b: v0 v1
                               causal  a: v0      b: v0 v1
    """
    mask = (segment_ids[:, :, None] == memory_segment_ids[:, None, :]) & (memory_segment_ids > 0)[:, None, :]
    if kind == "causal":
        mask &= memory_index[:, None, :] <= columns[:, :, None]
    return mask
