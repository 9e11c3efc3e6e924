"""PVM-JAX's side: the same measurements, through the functions that generation and training call."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from timing import clock

from pvm_jax import decoding
from pvm_jax.checkpoint import load_model, open_checkpoint
from pvm_jax.config import ModelConfig
from pvm_jax.data.packing import Encoded, pack
from pvm_jax.generate import bucket, make_batch
from pvm_jax.models import Qwen3VL
from pvm_jax.sampling import Sampling, row_keys
from pvm_jax.sharding import make_mesh
from pvm_jax.training.freeze import Partition
from pvm_jax.training.losses import cross_entropy
from pvm_jax.training.optim import OptimizerConfig, make_optimizer, make_schedule
from pvm_jax.training.step import init_state, make_update, put_batch

PVM_ONLY = (("pvm_block/", True), ("", False))
GREEDY = Sampling()


def load(directory: Path) -> Qwen3VL:
    """As `pvm_jax.load` gives it."""
    return load_model(open_checkpoint(directory), dtype=jnp.float32)


def load_for_training(directory: Path) -> Qwen3VL:
    """As `train.py` has it: stacked layers, on a mesh (of one device)."""
    return load_model(open_checkpoint(directory), dtype=jnp.float32, scan=True, mesh=_mesh())


def _mesh() -> Mesh:
    return make_mesh(devices=jax.devices()[:1])


def without_pvm(model: Qwen3VL) -> Qwen3VL:
    """The same weights as a stock Qwen3-VL."""
    config: ModelConfig = dataclasses.replace(model.config, pvm=None)
    graphdef, wanted = nnx.split(nnx.eval_shape(lambda: Qwen3VL(config, rngs=nnx.Rngs(0), scan=model.scan)))
    values = dict(nnx.to_flat_state(nnx.state(model)))
    return nnx.merge(graphdef, nnx.from_flat_state([(path, values[path]) for path, _ in nnx.to_flat_state(wanted)]))


def decode_weight_bytes(model: Qwen3VL) -> int:
    """What a decode step must read: all of the decoder; the embedding table once, as the tied head."""
    state = nnx.state(model)
    return sum(x.nbytes for path, x in nnx.to_flat_state(state) if path[0] != "visual")


class Prefill:
    """Seconds to the first token, from host arrays."""

    def __init__(self, model: Qwen3VL, samples: Sequence[Encoded], sampling: Sampling = GREEDY):
        self.batch = make_batch(samples)
        self.graphdef, self.params = nnx.split(model)
        self.switches, self.settings = decoding.make_settings(model, sampling, (), ())
        self.keys = row_keys(0, len(samples))

    def run(self) -> tuple[decoding.State, jax.Array, jax.Array]:
        capacity = self.batch.tokens.shape[1] + decoding.CHUNK
        arguments = self.graphdef, self.params, self.batch, self.keys, self.settings
        return decoding.prefill(*arguments, switches=self.switches, capacity=capacity)

    def __call__(self) -> float:
        return clock(self.run)


class Decode:
    """Seconds a step, in the compiled loop, behind a prompt."""

    def __init__(self, model: Qwen3VL, samples: Sequence[Encoded], steps: int, sampling: Sampling = GREEDY):
        self.prefill, self.steps = Prefill(model, samples, sampling), steps
        self.state = self.prefill.run()[0]

    def arguments(self) -> tuple:
        """The state is donated, so each run gets a copy."""
        p = self.prefill
        return p.graphdef, p.params, jax.tree.map(jnp.copy, self.state), np.int32(self.steps), p.settings

    def __call__(self) -> float:
        arguments = jax.block_until_ready(self.arguments())
        return clock(lambda: decoding.decode(*arguments, switches=self.prefill.switches)) / self.steps

    def cost(self) -> dict[str, float]:
        """Flops and bytes of one step as compiled (XLA counts a loop's body once), and the size of the cache."""
        compiled = decoding.decode.lower(*self.arguments(), switches=self.prefill.switches).compile()
        cost = compiled.cost_analysis()
        cache = self.state.cache
        return {
            "flops": cost["flops"],
            "bytes": cost["bytes accessed"],
            "cache_bytes": sum(x.nbytes for x in jax.tree.leaves((cache.keys, cache.values, cache.memory))),
        }


class Generate:
    """Seconds of a whole greedy call."""

    def __init__(self, model: Qwen3VL, samples: Sequence[Encoded], tokens: int):
        self.model, self.samples, self.tokens = model, samples, tokens

    def __call__(self) -> float:
        start = time.perf_counter()
        decoding.complete(self.model, make_batch(self.samples), max_new_tokens=self.tokens)
        return time.perf_counter() - start


class _Loss:
    """What `training.sft` computes of a batch."""

    def loss_fn(self, model: Qwen3VL, batch):
        return cross_entropy(model.logits, model(batch), batch.tokens, batch.loss_weights)


class Train:
    """Seconds of one optimizer step on PVM alone, as `train.py` makes it, from host arrays.

    Samples are packed into rows of `row` tokens (None: one a row).
    """

    def __init__(self, model: Qwen3VL, samples: Sequence[Encoded], row: int | None = None):
        if row is None:
            self.batch = make_batch(samples)
        else:
            # Samples of one row share its patches, so a row has room for as many images as it has samples.
            patches = max(len(s.patches) for s in samples) * (row // min(len(s.tokens) for s in samples))
            self.batch = pack(samples, length=row, patches=bucket(patches))
        self.mesh = _mesh()
        partition = Partition(model, PVM_ONLY)
        trainable, self.frozen = partition.split(model)
        config = OptimizerConfig(1e-4, warmup_steps=0)
        schedule = make_schedule(config, 1000)
        optimizer = make_optimizer(config, schedule, partition.trainable)
        self.state = init_state(optimizer, jax.tree.map(jnp.copy, trainable), self.mesh)
        self.update = jax.jit(make_update(_Loss(), partition, optimizer, schedule), donate_argnums=0)

    def __call__(self) -> float:
        start = time.perf_counter()
        self.state, metrics = self.update(self.state, self.frozen, put_batch(self.batch, self.mesh, 1))
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - start
