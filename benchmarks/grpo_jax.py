"""PVM-JAX's side of grpo.py: rollouts and steps through the functions that `train.py` calls."""

import dataclasses
import io
import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax_side
import numpy as np
from flax import nnx
from timing import Measure, Parts

from configs import digits_grpo
from pvm_jax.checkpoint import open_checkpoint
from pvm_jax.convert import convert_from_hf, convert_to_hf
from pvm_jax.data.digits import SPLITS
from pvm_jax.data.digits_task import make_example
from pvm_jax.data.packing import Encoded
from pvm_jax.data.processor import Processor
from pvm_jax.generate import bucket
from pvm_jax.models import Qwen3VL
from pvm_jax.sampling import Sampling
from pvm_jax.sharding import make_mesh
from pvm_jax.training.optim import OptimizerConfig, make_optimizer, make_schedule
from pvm_jax.training.policy_loss import PolicyBatch
from pvm_jax.training.rollout import Shapes, draw, learning_batch
from pvm_jax.training.setup import Blueprint, ModelOptions, load_stage
from pvm_jax.training.stage import Setup
from pvm_jax.training.step import compiled, init_state, make_update, put_batch

BASE = Path(__file__).parents[1] / "assets" / "digits_base"


# ---- A shared prefill -----------------------------------------------------------------------------------------------


def rollout_sides(model: Qwen3VL, prompt: Encoded, completions: int, tokens: int) -> dict[str, Measure]:
    """Seconds of `completions` of one prompt, `tokens` each.

    rollout        as GRPO draws them
    parts          one prefill of the prompt, and the compiled loop of decode steps on as many rows
    prefill each   the same rollout of a prompt for each completion
    """
    sampling = Sampling(temperature=1.0)
    prefill = jax_side.Prefill(model, [prompt], sampling)
    decode = jax_side.Decode(model, [prompt] * completions, tokens - 1, sampling)
    shapes = Shapes((bucket(len(prompt.tokens)),), (), (len(prompt.patches),))
    endless = SimpleNamespace(eos_token_ids=(), banned_token_ids=())

    def rollout(prompts: Sequence[Encoded], group: int) -> float:
        start = time.perf_counter()
        draw(model, endless, prompts, group, temperature=1.0, max_new_tokens=tokens, shapes=shapes, key=(0, 0))
        return time.perf_counter() - start

    return {
        "parts": lambda: prefill() + (tokens - 1) * decode(),
        "rollout": lambda: rollout([prompt], completions),
        "prefill each": lambda: rollout([prompt] * completions, 1),
    }


# ---- A step ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Task:
    """The model and the prompts of both sides.

    Attributes:
      native, exported: the model, as PVM-JAX and as Hugging Face's files.
      prompts: as many as a step draws, in TRL's layout.
      config: configs/digits_grpo.py, resolved.
    """

    native: Path
    exported: Path
    prompts: Path
    config: dict[str, Any]


def make_task(directory: Path, *, quick: bool) -> Task:
    """The tiny model of the digits with new PVM in layer 0, and prompts with mosaics of training digits.

    The memory mask is the release's, which is what torch's side computes. The learning rate is 0: AdamW does all its
    work, and every round samples from the same policy.
    """
    native, exported, prompts = (directory / name for name in ("native", "exported", "prompts.jsonl"))
    convert_from_hf(BASE, native, pvm_layers=(0,), pvm_hidden_size=128, pvm_init="fan_in", pvm_memory_mask="all")
    convert_to_hf(native, exported)
    config = digits_grpo.get_config("smoke" if quick else "").to_dict()
    config["model"]["path"] = str(native)
    config["data"] |= {"path": str(prompts), "layout": "trl", "threads": 2}
    config["optimizer"]["learning_rate"] = 0.0
    spec = SPLITS["demo"]["prompts"][1]
    rows = []
    for i in range(config["stage"]["prompts"]):
        example = make_example(np.random.default_rng(i), spec)
        (directory / f"{i}.png").write_bytes(_png(example.image))
        rows.append({"id": str(i), "prompt": example.question, "images": [f"{i}.png"], "solution": example.answer})
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Task(native, exported, prompts, config)


def _png(gray: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(gray).convert("RGB").save(file, "png")
    return file.getvalue()


def endless(processor: Processor) -> Processor:
    """The same without ends: its stop tokens are never drawn."""
    made = dataclasses.replace(processor, eos_token_ids=())
    banned = np.union1d(processor.banned_token_ids, np.asarray(processor.eos_token_ids, np.int32))
    vars(made)["banned_token_ids"] = banned  # what the cached property would compute
    return made


class Step:
    """Seconds of a whole step as `train.py` makes it: prompts, rollout, rewards, packing, update."""

    def __init__(self, task: Task, *, ends: bool):
        config = task.config
        source = open_checkpoint(task.native)
        processor = Processor.from_pretrained(source.files)
        self.processor = processor if ends else endless(processor)
        self.mesh = make_mesh(devices=jax.devices()[:1])
        setup = Setup(source.config, self.processor, config["data"], 0, freeze=config["freeze"], mesh=self.mesh)
        # A completion without an end teaches nothing by default: here that would be all of them.
        self.stage = load_stage(setup, config["stage"] | {"mask_truncated": ends})
        blueprint = Blueprint(source.config, ModelOptions(str(task.native)), self.stage, config["freeze"], self.mesh)
        self.partition = blueprint.partition
        adamw = OptimizerConfig(**config["optimizer"])
        schedule = make_schedule(adamw, config["steps"])
        optimizer = make_optimizer(adamw, schedule, self.partition.trainable)
        self.frozen = blueprint.parameters(source, 0, self.partition.frozen)
        self.state = init_state(optimizer, blueprint.parameters(source, 0, self.partition.trainable), self.mesh)
        update = make_update(self.stage, self.partition, optimizer, schedule)
        self.update = compiled(update, self.state, self.mesh)
        self.parts, self.number = Parts(), 0
        # Two rollouts in turn, so that rounds see the shapes that the warm-up has compiled: this one and the next.
        self()

    def policy(self) -> nnx.Module:
        return self.partition.merge(self.state.trainable, self.frozen)

    def gradient_norm(self) -> tuple[PolicyBatch, float]:
        """Of the completions of the last step, and these; with random advantages, as rewards may all be the same."""
        shapes = dataclasses.replace(self.stage._shapes, pack=False)  # a completion a row, all of them
        whole, *_ = learning_batch(self.stage._now[0], shapes, range, indifferent=True)
        random = np.random.default_rng(0).standard_normal((len(whole.advantages), 1), np.float32)
        batch = dataclasses.replace(whole, advantages=np.where(whole.batch.loss_weights > 0, random, 0))
        self.state, metrics = self.update(self.state, self.frozen, put_batch(batch, self.mesh, 1))
        return batch, float(metrics["grad_norm"][0])

    def __call__(self) -> float:
        start = time.perf_counter()
        drawn = self.stage.next_batch(self.number % 2, self.policy)
        self.state, metrics = self.update(self.state, self.frozen, put_batch(drawn.batch, self.mesh, 1))
        jax.block_until_ready((self.state, metrics))
        total = time.perf_counter() - start
        self.number += 1
        self.batch = drawn.batch
        self.parts.add(
            total, drawn.seconds["rollout"], drawn.seconds["rewards"], int(drawn.metrics["completion_tokens"][0])
        )
        return total
