"""PVM in torch, written from its equations, on transformers' Qwen3-VL: the oracle of the PVM parity tests.

    q = rms_q(W_q rms_in(W_text h))
    k = rms_k(W_k W_vis V),  v = W_v W_vis V
    a = W_o softmax_over_V(q k^T / sqrt(H)) v
    m = a + SwiGLU(rms_post(a))
    y = h + FFN(norm(h)) + gate * rms_free(W_up m) * (1 - is_visual_query)

h is the hidden state after self-attention's residual, before the FFN's norm; V the merged visual tokens as
they enter layer 0, without DeepStack features. One sample at a time (batch 1). The memory grows when a later
forward on the same cache brings new visual tokens.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration


class RMSNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * rms(x)


def rms(x: torch.Tensor) -> torch.Tensor:
    return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def linear(out_features: int, in_features: int) -> nn.Linear:
    return nn.Linear(in_features, out_features, bias=False)


class PVMBlock(nn.Module):
    """Parameter names are the public release's."""

    def __init__(self, text: Any):
        super().__init__()
        width, self.head_dim = text.pvm_hidden_size, text.head_dim
        self.heads = width // text.head_dim
        self.kv_heads = max(1, self.heads // (text.num_attention_heads // text.num_key_value_heads))
        ffn = int(width * text.intermediate_size / text.hidden_size)
        self.text_reducer = linear(width, text.hidden_size)
        self.vision_reducer = linear(width, text.hidden_size)
        self.output_expander = linear(text.hidden_size, width)
        self.input_norm = RMSNorm(width)
        self.post_attn_norm = RMSNorm(width)
        self.cross_attn = nn.ModuleDict(
            {
                "q_proj": linear(self.heads * self.head_dim, width),
                "k_proj": linear(self.kv_heads * self.head_dim, width),
                "v_proj": linear(self.kv_heads * self.head_dim, width),
                "o_proj": linear(width, self.heads * self.head_dim),
                "q_norm": RMSNorm(self.head_dim),
                "k_norm": RMSNorm(self.head_dim),
            }
        )
        self.mlp = nn.ModuleDict(
            {"gate_proj": linear(ffn, width), "up_proj": linear(ffn, width), "down_proj": linear(width, ffn)}
        )
        self.gate_alpha = nn.Parameter(torch.zeros(1))

    def forward(self, h: torch.Tensor, memory: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """h [T,D], memory [M,D], visible [T,M] -> [T,D]; exactly 0 where nothing is visible."""
        attn = self.cross_attn
        latent = self.input_norm(self.text_reducer(h))
        source = self.vision_reducer(memory)
        q = attn["q_norm"](attn["q_proj"](latent).unflatten(-1, (self.heads, self.head_dim)))
        k = attn["k_norm"](attn["k_proj"](source).unflatten(-1, (self.kv_heads, self.head_dim)))
        v = attn["v_proj"](source).unflatten(-1, (self.kv_heads, self.head_dim))
        k, v = (x.repeat_interleave(self.heads // self.kv_heads, dim=1) for x in (k, v))
        scores = torch.einsum("tnh,mnh->tnm", q, k) / self.head_dim**0.5
        scores = scores.float().masked_fill(~visible[:, None], -torch.inf)
        weights = torch.nan_to_num(scores.softmax(-1)).to(v.dtype)
        a = attn["o_proj"](torch.einsum("tnm,mnh->tnh", weights, v).flatten(1))
        x = self.post_attn_norm(a)
        ffn = self.mlp
        m = a + ffn["down_proj"](F.silu(ffn["gate_proj"](x)) * ffn["up_proj"](x))
        return self.gate_alpha * rms(self.output_expander(m))


class PVMQwen3VL(Qwen3VLForConditionalGeneration):
    """transformers' model with PVM beside the FFN of `text_config.pvm_layers`, attached by forward hooks."""

    def __init__(self, config: Qwen3VLConfig):
        super().__init__(config)
        text = config.text_config
        self.causal_memory = getattr(text, "pvm_memory_mask", "all") == "causal"
        language = self.model.language_model
        language.register_forward_pre_hook(self._remember, with_kwargs=True)
        for i in text.pvm_layers:
            layer = language.layers[i]
            layer.pvm_block = PVMBlock(text)
            layer.post_attention_layernorm.register_forward_pre_hook(self._keep_residual(layer))
            layer.mlp.register_forward_hook(self._add_memory(layer))

    def _remember(self, module, args, kwargs) -> None:
        embeds, visual = kwargs["inputs_embeds"], kwargs.get("visual_pos_masks")
        assert embeds.shape[0] == 1, "the reference takes one sample at a time"
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # the name until transformers 5.23
        past = cache.get_seq_length() if cache is not None else 0
        self.columns = past + torch.arange(embeds.shape[1])
        self.is_visual = torch.zeros(embeds.shape[1], dtype=torch.bool) if visual is None else visual[0]
        if past == 0:
            self.memory, self.memory_columns = embeds.new_zeros(0, embeds.shape[2]), self.columns[:0]
        self.memory = torch.cat([self.memory, embeds[0, self.is_visual]])
        self.memory_columns = torch.cat([self.memory_columns, self.columns[self.is_visual]])

    def _keep_residual(self, layer):
        def hook(module, args):
            layer.residual = args[0]

        return hook

    def _add_memory(self, layer):
        def hook(module, args, output):
            visible = (~self.is_visual)[:, None].expand(-1, len(self.memory))
            if self.causal_memory:
                visible = visible & (self.memory_columns[None] <= self.columns[:, None])
            return output + layer.pvm_block(layer.residual[0], self.memory, visible)[None]

        return hook


def build(config: dict[str, Any]) -> Qwen3VLForConditionalGeneration:
    """The torch model of a `config.json`, in fp32, with eager attention."""
    parsed = Qwen3VLConfig.from_dict(config)
    parsed._attn_implementation = "eager"
    kind = PVMQwen3VL if config["text_config"].get("pvm_layers") else Qwen3VLForConditionalGeneration
    return kind(parsed).eval()


def load(directory, dtype: torch.dtype = torch.float32) -> Qwen3VLForConditionalGeneration:
    """The torch model of a checkpoint directory, stock or with PVM."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory)
    has_pvm = bool(getattr(config.text_config, "pvm_layers", None))
    kind = PVMQwen3VL if has_pvm else Qwen3VLForConditionalGeneration
    return kind.from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()
