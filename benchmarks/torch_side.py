"""transformers' Qwen3-VL, with PVM attached the way the public release computes it, and what is timed of it.

The PVM branch is written from its equations (see `pvm_jax/models/pvm.py`): keys and values are projected from the
visual tokens in every PVM layer of every forward pass, as in the release.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from pvm_jax.data.packing import Encoded


class RMSNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, 1e-6)


class PVMBlock(nn.Module):
    def __init__(self, text: Any):
        super().__init__()
        width, dim = text.pvm_hidden_size, text.head_dim
        heads = width // dim
        kv_heads = max(1, heads // (text.num_attention_heads // text.num_key_value_heads))
        ffn = int(width * text.intermediate_size / text.hidden_size)

        def linear(out: int, into: int) -> nn.Linear:
            return nn.Linear(into, out, bias=False)

        self.text_reducer = linear(width, text.hidden_size)
        self.vision_reducer = linear(width, text.hidden_size)
        self.output_expander = linear(text.hidden_size, width)
        self.input_norm, self.post_attn_norm = RMSNorm(width), RMSNorm(width)
        self.cross_attn = nn.ModuleDict(
            {
                "q_proj": linear(heads * dim, width),
                "k_proj": linear(kv_heads * dim, width),
                "v_proj": linear(kv_heads * dim, width),
                "o_proj": linear(width, heads * dim),
                "q_norm": RMSNorm(dim),
                "k_norm": RMSNorm(dim),
            }
        )
        self.mlp = nn.ModuleDict(
            {"gate_proj": linear(ffn, width), "up_proj": linear(ffn, width), "down_proj": linear(width, ffn)}
        )
        self.gate_alpha = nn.Parameter(torch.full((1,), 0.5))
        self.dim = dim

    def forward(self, h: torch.Tensor, memory: torch.Tensor, is_text: torch.Tensor, real: torch.Tensor):
        """h [B,T,D], memory [B,M,D], is_text [B,T], real [B,M] (not padding) -> [B,T,D]."""
        attn, ffn = self.cross_attn, self.mlp

        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (-1, self.dim))

        latent, source = self.input_norm(self.text_reducer(h)), self.vision_reducer(memory)
        q = attn["q_norm"](heads(attn["q_proj"](latent)))
        k = attn["k_norm"](heads(attn["k_proj"](source)))
        q, k, v = (x.transpose(1, 2) for x in (q, k, heads(attn["v_proj"](source))))
        mask = None if real.all() else real[:, None, None, :]
        retrieved = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        a = attn["o_proj"](retrieved.transpose(1, 2).flatten(2))
        x = self.post_attn_norm(a)
        m = a + ffn["down_proj"](F.silu(ffn["gate_proj"](x)) * ffn["up_proj"](x))
        y = self.output_expander(m)
        return self.gate_alpha * F.rms_norm(y, y.shape[-1:], None, 1e-6) * is_text[..., None]


class Model(Qwen3VLForConditionalGeneration):
    """`with_pvm = False` makes it transformers' own model."""

    def __init__(self, config: Qwen3VLConfig):
        super().__init__(config)
        self.with_pvm = True
        self.model.language_model.register_forward_pre_hook(self._remember, with_kwargs=True)
        for i in config.text_config.pvm_layers:
            layer = self.model.language_model.layers[i]
            layer.pvm_block = PVMBlock(config.text_config)
            layer.post_attention_layernorm.register_forward_pre_hook(self._keep_residual(layer))
            layer.mlp.register_forward_hook(self._add_memory(layer))

    def _remember(self, module, args, kwargs) -> None:
        if not self.with_pvm:
            return
        embeds, visual = kwargs["inputs_embeds"], kwargs.get("visual_pos_masks")
        if visual is None:  # a decode step: the memory is the prompt's
            self.is_text = torch.ones(embeds.shape[:2], dtype=torch.bool)
            return
        self.is_text = ~visual
        rows = [e[v] for e, v in zip(embeds, visual)]
        self.memory = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        self.memory_real = torch.arange(self.memory.shape[1]) < torch.tensor([len(r) for r in rows])[:, None]

    def _keep_residual(self, layer):
        def hook(module, args):
            layer.residual = args[0]

        return hook

    def _add_memory(self, layer):
        def hook(module, args, output):
            if not self.with_pvm:
                return output
            return output + layer.pvm_block(layer.residual, self.memory, self.is_text, self.memory_real)

        return hook


def write_checkpoint(directory: Path, config: dict[str, Any]) -> None:
    """Random weights under Hugging Face's names."""
    torch.manual_seed(0)
    Model(Qwen3VLConfig.from_dict(config)).save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(config))


def load(directory: Path) -> Model:
    return Model.from_pretrained(directory, dtype=torch.float32)


def inputs(samples: Sequence[Encoded], image_token_id: int, *, left: bool = False) -> dict[str, torch.Tensor]:
    """Keyword arguments of the model: one sample a row, padded on the right, or left; `labels` where there are any."""
    length = max(len(s.tokens) for s in samples)

    def pad(rows, value: int) -> torch.Tensor:
        rooms = [(row.tolist(), [value] * (length - len(row))) for row in rows]
        return torch.tensor([[*room, *row] if left else [*row, *room] for row, room in rooms])

    ids = pad([s.tokens for s in samples], 0)
    side = [round(len(s.patches) ** 0.5) for s in samples]
    arguments = {
        "input_ids": ids,
        "attention_mask": pad([s.tokens >= 0 for s in samples], 0).long(),
        "pixel_values": torch.cat([torch.from_numpy(s.patches) for s in samples]),
        "image_grid_thw": torch.tensor([[1, n, n] for n in side]),
        "mm_token_type_ids": (ids == image_token_id).int(),
    }
    if any(s.loss_mask.any() for s in samples):
        learned = pad([s.loss_mask for s in samples], 0).bool()
        arguments["labels"] = torch.where(learned, ids, -100)
    return arguments


class Prefill:
    """Seconds to the logits of the last prompt token."""

    def __init__(self, model: Model, arguments: dict[str, torch.Tensor]):
        self.model, self.arguments = model, arguments

    @torch.inference_mode()
    def __call__(self) -> float:
        start = time.perf_counter()
        self.model.model.rope_deltas = None
        self.out = self.model(**self.arguments, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - start


class Decode:
    """Seconds a greedy step, by bare forward passes on a prefilled cache (less work than `generate` does)."""

    def __init__(self, model: Model, arguments: dict[str, torch.Tensor], steps: int):
        self.model, self.steps = model, steps
        self.length = arguments["input_ids"].shape[1]
        prefill = Prefill(model, arguments)
        prefill()
        self.cache, self.first = prefill.out.past_key_values, prefill.out.logits[:, -1].argmax(-1)
        self.deltas = model.model.rope_deltas

    @torch.inference_mode()
    def __call__(self) -> float:
        if added := self.cache.get_seq_length() - self.length:
            self.cache.crop(-added)
        self.model.model.rope_deltas = self.deltas
        tokens = self.first
        start = time.perf_counter()
        for _ in range(self.steps):
            out = self.model(input_ids=tokens[:, None], past_key_values=self.cache, use_cache=True)
            tokens = out.logits[:, -1].argmax(-1)
        return (time.perf_counter() - start) / self.steps


class Generate:
    """Seconds of a whole greedy call, as users make it."""

    def __init__(self, model: Model, arguments: dict[str, torch.Tensor], tokens: int):
        self.model, self.arguments, self.tokens = model, arguments, tokens

    @torch.inference_mode()
    def __call__(self) -> float:
        self.model.model.rope_deltas = None
        start = time.perf_counter()
        self.model.generate(
            **self.arguments, do_sample=False, max_new_tokens=self.tokens, eos_token_id=None, pad_token_id=0
        )
        return time.perf_counter() - start


class Train:
    """Seconds of one optimizer step on PVM alone: forward and backward of each part, clipping, AdamW.

    `release` trains as the public script does: gradient checkpointing, with gradients flowing into the embeddings so
    that checkpointing works. Otherwise autograd stops below the first PVM layer by itself.
    """

    def __init__(self, model: Model, parts: Sequence[dict[str, torch.Tensor]], *, release: bool):
        self.model, self.parts, self.release = model, parts, release
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("pvm_block" in name)
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=1e-4, weight_decay=0.0)

    def __call__(self) -> float:
        model = self.model.train()
        model.model.rope_deltas = None
        if self.release:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        start = time.perf_counter()
        for arguments in self.parts:
            (model(**arguments, use_cache=False).loss / len(self.parts)).backward()
        nn.utils.clip_grad_norm_(self.trainable, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - start
        if self.release:
            model.gradient_checkpointing_disable()
            model.disable_input_require_grads()
        model.eval()
        return seconds
