"""The same GRPO step with transformers and torch, written out in TRL's order.

Prompts are padded on the left and repeated for each completion, images included; `model.generate` samples; the loss is
dapo with the ratio of one optimizer step a rollout, 1; AdamW over all but the vision tower.

What TRL does besides is left out: its own encoding of prompts and images (they come encoded, outside of the timing),
entropies, and the gathering of metrics.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_side
from timing import Parts
from torch import nn

from pvm_jax.data.prompts import open_prompts, reward_columns
from pvm_jax.training.policy_loss import PolicyBatch
from pvm_jax.training.rewards import Rewards


def load(directory: Path) -> torch_side.Model:
    model = torch_side.load(directory).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("model.visual."))
    return model


class Step:
    """Seconds of a whole step: rollout, rewards, update."""

    def __init__(self, model: torch_side.Model, task: Any, processor: Any, *, with_pvm: bool, ends: bool):
        self.model, self.processor, self.with_pvm, self.ends = model, processor, with_pvm, ends
        self.settings = task.config["stage"]
        self.rewards = Rewards(self.settings["rewards"])
        prompts = open_prompts(task.prompts, layout="trl")
        group = self.settings["completions"]
        self.prompts = [prompts[i] for i in range(len(prompts)) for _ in range(group)]
        samples = [{"id": p.id, "messages": p.messages} for p in (prompts[i] for i in range(len(prompts)))]
        encoded = [processor.encode(sample, add_generation_prompt=True) for sample in samples]
        self.encoded = {e.id: e for e in encoded}
        self.image_token = processor.config.image_token_id
        self.arguments = torch_side.inputs([e for e in encoded for _ in range(group)], self.image_token, left=True)
        self.banned = torch.zeros(processor.config.text.vocab_size, dtype=torch.bool)
        self.banned[torch.from_numpy(np.asarray(processor.banned_token_ids, np.int64))] = True
        self.trainable = [
            p for name, p in model.named_parameters() if p.requires_grad and (with_pvm or "pvm_block" not in name)
        ]
        options = task.config["optimizer"]
        self.clip = options["clip_norm"]
        betas = options["b1"], options["b2"]
        self.optimizer = torch.optim.AdamW(
            self.trainable, options["learning_rate"], betas, weight_decay=0.0, fused=True
        )
        self.parts = Parts()

    def __call__(self) -> float:
        self.model.with_pvm = self.with_pvm
        start = time.perf_counter()
        made, mask = self.rollout()
        rolled = time.perf_counter()
        advantages, mask = self.reward(made, mask)
        rewarded = time.perf_counter()
        self.update(self.arguments, made, mask, advantages, int(mask.sum()))
        total = time.perf_counter() - start
        self.parts.add(total, rolled - start, rewarded - rolled, self.tokens)
        return total

    @torch.no_grad()
    def rollout(self) -> tuple[torch.Tensor, torch.Tensor]:
        """i64 [completions,n] tokens, and where they are a completion's, its stop token included."""
        self.model.model.rope_deltas = None
        length = self.arguments["input_ids"].shape[1]
        stops = list(self.processor.eos_token_ids)
        out = self.model.generate(
            **self.arguments,
            do_sample=True,
            temperature=self.settings["temperature"],
            top_k=0,
            top_p=1.0,
            max_new_tokens=self.settings["max_new_tokens"],
            suppress_tokens=self.banned.nonzero()[:, 0].tolist(),
            eos_token_id=stops or None,
            pad_token_id=0,
        )
        made = out[:, length:]
        ended = torch.isin(made, torch.tensor(stops, dtype=made.dtype))
        before = ended.long().cumsum(1) - ended.long()
        self.stopped = ended.any(1)
        return made, before == 0

    def reward(self, made: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Advantages of the completions; truncated ones leave the mask."""
        lengths = mask.sum(1)
        self.tokens = int(lengths.sum())
        ids = [row[:n].tolist() for row, n in zip(made, lengths, strict=True)]
        texts = [self.processor.decode(tokens) for tokens in ids]
        scores = self.rewards(texts, reward_columns(self.prompts), ids=[p.id for p in self.prompts],
                              prompts=[p.messages for p in self.prompts], completion_ids=ids)  # fmt: skip
        rewards = torch.tensor(scores.total, dtype=torch.float32).view(-1, self.settings["completions"])
        advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
        return advantages.flatten(), mask & self.stopped[:, None] if self.ends else mask

    def update(
        self,
        arguments: dict[str, torch.Tensor],
        made: torch.Tensor,
        mask: torch.Tensor,
        advantages: torch.Tensor,
        count: int,
    ) -> float:
        """One optimizer step; returns the norm of the gradient before it is clipped."""
        model, more = self.model, made.shape[1]
        model.model.rope_deltas = None
        arguments = arguments | {
            "input_ids": torch.cat([arguments["input_ids"], made], 1),
            "attention_mask": torch.cat([arguments["attention_mask"], mask.long()], 1),
            "mm_token_type_ids": nn.functional.pad(arguments["mm_token_type_ids"], (0, more)),
        }
        logits = model(**arguments, use_cache=False, logits_to_keep=more + 1).logits[:, :-1]
        logits = logits.masked_fill(self.banned, -torch.inf) / self.settings["temperature"]
        taken = logits.gather(2, made[..., None])[..., 0] - logits.logsumexp(2)
        ratio = (taken - taken.detach()).masked_fill(~mask, 0).exp()
        clipped = ratio.clamp(1 - self.settings["epsilon"], 1 + self.settings["epsilon"])
        cost = -torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None])
        ((cost * mask).sum() / max(count, 1)).backward()
        norm = nn.utils.clip_grad_norm_(self.trainable, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)

    def gradient_norm(self, batch: PolicyBatch) -> float:
        """Of the completions in a batch of PVM-JAX's, one a row and all of one length."""
        self.model.with_pvm = self.with_pvm
        learned = batch.batch.loss_weights > 0
        made = torch.from_numpy(np.stack([row[where] for row, where in zip(batch.batch.tokens, learned, strict=True)]))
        advantages = [row[where][0] for row, where in zip(batch.advantages, learned, strict=True)]
        prompts = [self._prompt(*row) for row in zip(batch.batch.tokens, learned, batch.batch.segment_ids, strict=True)]
        arguments = torch_side.inputs(prompts, self.image_token, left=True)
        mask = torch.ones_like(made, dtype=torch.bool)
        return self.update(arguments, made.long(), mask, torch.tensor(np.array(advantages)), made.numel())

    def _prompt(self, tokens: np.ndarray, learned: np.ndarray, segments: np.ndarray) -> Any:
        """The prompt that a row begins with."""
        start = tokens[(segments > 0) & ~learned].tolist()
        return next(e for e in self.encoded.values() if e.tokens.tolist() == start)
