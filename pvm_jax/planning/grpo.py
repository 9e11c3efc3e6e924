"""The programs of GRPO at their largest.

    copy      the largest array of the weights as completions are drawn with them, from that which trains
    prefill   all prompts of a rollout at their largest buckets, and the cache's first room
    growth    the last doubling of the cache: the old one and the new one. Taking the rows to go on with, when half of
              the completions have ended, holds one and a half, and of one layer the rows of all devices
    decode    every completion with the largest cache
    scoring   only with `iterations` above 1 or `beta` above 0: log-probabilities of a batch to learn from
    update    every completion at full length in a row of its own

What lies on the devices beside them is counted, too: while completions are drawn the policy is there twice, in fp32
with the optimizer's moments, and its matrices in the compute dtype, by default gathered over `fsdp`; with `beta` the
reference model is always there.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from pvm_jax import decoding
from pvm_jax.decoding_weights import copied, decoding_layout
from pvm_jax.models import KVCache
from pvm_jax.planning.recipe import (
    Inference,
    Recipe,
    Resident,
    Shape,
    Step,
    abstract_batch,
    host_batch,
    on_device,
    train_step,
)
from pvm_jax.sampling import Sampling, row_keys
from pvm_jax.sharding import BATCH_AXES, mesh_of
from pvm_jax.training.freeze import head_trains
from pvm_jax.training.policy_loss import PolicyBatch
from pvm_jax.training.policy_objective import PolicyObjective, Settings
from pvm_jax.training.rollout import Shapes

STOPS = 2
"""Ids that end a completion, of the released tokenizers."""


def programs(recipe: Recipe) -> list[Step]:
    """In the order in which a step runs them.

    Raises:
      TrainingError: settings that cannot be.
    """
    run = _Run(recipe)
    wanted = {
        run.copy: bool(run.copied),
        run.prefill: True,
        run.growth: len(run.rooms) > 1,
        run.decode: bool(run.rooms),
        run.scoring: run.settings.iterations > 1 or run.settings.beta > 0,
        run.update: True,
    }
    return [program() for program, runs in wanted.items() if runs]


class _Run:
    """Shapes of a run."""

    def __init__(self, recipe: Recipe):
        config = recipe.config
        self.recipe = recipe
        self.settings = Settings.make({key: value for key, value in config["stage"].items() if key != "module"})
        shapes = Shapes.make(config["data"], recipe.ways * config["micro_batches"])
        self.completions = self.settings.prompts * self.settings.completions
        self.prompts = Shape(self.settings.prompts, max(shapes.prompt_lengths), max(shapes.patches))
        self.learned = Shape(
            shapes.rows(self.completions), max(shapes.lengths), max(shapes.patches), config["micro_batches"]
        )
        self.rooms = list(decoding.cache_rooms(self.settings.max_new_tokens - 1))
        self.objective = PolicyObjective(self.settings, _special(recipe), head_trains(recipe.model, config["freeze"]))
        self.blueprint = recipe.blueprint(self.objective)
        self._shape_model()

    def _shape_model(self) -> None:
        """The policy as it is trained and as it draws, and what each leaves lying beside the other's programs."""
        partition, abstract = self.blueprint.partition, self.blueprint.abstract
        trainable = {name: abstract[name] for name in partition.trainable}
        self.model = partition.merge(trainable, {name: abstract[name] for name in partition.frozen})
        self.graphdef, self.params = nnx.split(self.model)
        self.mesh = mesh_of(self.params)

        def drawn(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            dtype, sharding = decoding_layout(path, x, self.model.dtype, self.settings.sampler_weights)
            return jax.ShapeDtypeStruct(x.shape, dtype, sharding=sharding)

        self.drawing = jax.tree_util.tree_map_with_path(drawn, self.params)
        pairs = zip(jax.tree.leaves(self.params), jax.tree.leaves(self.drawing), strict=True)
        self.copied = [(x, y) for x, y in pairs if (x.dtype, x.sharding) != (y.dtype, y.sharding)]
        moments = 2 * on_device([*trainable.values()])
        self.reference = on_device(jax.tree.leaves(self.params)) if self.settings.beta > 0 else 0
        self.beside_rollout = Resident(self.reference + on_device([x for x, _ in self.copied]), moments)
        self.beside_scoring = Resident(self.reference, moments)
        self.beside_update = Resident(self.reference)

    # ---- Drawing completions ---------------------------------------------------------------------------------------

    def copy(self) -> Inference:
        trained, drawn = max(self.copied, key=lambda pair: on_device(pair[1:]))
        others = on_device([x for x, _ in self.copied]) - on_device([trained])
        others += on_device(jax.tree.leaves(self.drawing)) - on_device([drawn])
        return Inference(
            "GRPO copy",
            self.recipe,
            f"the last of {len(self.copied)} arrays of the weights, and the largest, {self.settings.sampler_weights}",
            copied,
            (trained, drawn.dtype, drawn.sharding),
            {},
            weights=(trained, drawn),
            resident=dataclasses.replace(self.beside_rollout, weights=self.reference + others),
        )

    def prefill(self) -> Inference:
        prompts, rows = self.prompts, self._on_device(self.prompts.rows)
        spread = self.mesh is not None and prompts.rows % self.recipe.ways == 0
        batch = abstract_batch(self.recipe, prompts) if spread else host_batch(self.recipe.model, prompts)
        capacity = prompts.length + next(iter(self.rooms), 0)
        return Inference(
            "GRPO prefill",
            self.recipe,
            f"{prompts}, {self.settings.completions} completions each",
            decoding.prefill,
            (self.graphdef, self.drawing, batch, self._keys(self.completions), self._decoding_settings()),
            {**self._static(), "capacity": capacity, "samples": self.settings.completions},
            weights=self.drawing,
            gathers=self.settings.sampler_weights == "split",
            cache=(self._cache(prompts.rows, capacity), self._cache(self.completions, capacity)),
            batch=batch,
            tokens=rows * prompts.length,
            scored=rows,
            resident=self.beside_rollout,
        )

    def growth(self) -> Inference:
        old, new = (self.prompts.length + room for room in self.rooms[-2:])
        cache = self._cache(self.completions, old)
        return Inference(
            "GRPO growth",
            self.recipe,
            f"{self.completions} rows of {old:,} tokens to {new:,}",
            decoding.grow,
            (cache,),
            {"capacity": new},
            cache=(cache, self._cache(self.completions, new)),
            resident=dataclasses.replace(
                self.beside_rollout,
                weights=self.beside_rollout.weights + on_device(jax.tree.leaves(self.drawing)),
            ),
        )

    def decode(self) -> Inference:
        state, rows = (
            self._state(self.completions, self.prompts.length + self.rooms[-1]),
            self._on_device(self.completions),
        )
        return Inference(
            "GRPO decode",
            self.recipe,
            f"{self.completions} rows, a cache of {state.cache.capacity:,} tokens",
            decoding.decode,
            (self.graphdef, self.drawing, state, jax.ShapeDtypeStruct((), jnp.int32), self._decoding_settings()),
            self._static(),
            weights=self.drawing,
            gathers=self.settings.sampler_weights == "split",
            cache=state.cache,
            tokens=rows,
            scored=rows,
            resident=self.beside_rollout,
        )

    def _static(self) -> dict[str, Any]:
        return {"switches": self._sampling()[0], "mesh": self.mesh}

    def _sampling(self) -> Any:
        return Sampling(temperature=self.settings.temperature).split()

    def _decoding_settings(self) -> decoding.Settings:
        vocab = self.recipe.model.text.vocab_size
        return decoding.Settings(
            jax.tree.map(lambda _: jax.ShapeDtypeStruct((), jnp.float32), self._sampling()[1]),
            jax.ShapeDtypeStruct((vocab,), jnp.bool_),
            jax.ShapeDtypeStruct((STOPS,), jnp.int32),
        )

    def _keys(self, rows: int) -> Any:
        return jax.eval_shape(functools.partial(row_keys, [0] * rows, rows))

    def _state(self, rows: int, capacity: int) -> decoding.State:
        def shape(dtype: Any, *dims: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(dims, dtype)

        memory = self.prompts.patches // self.recipe.model.vision.merge_unit
        state = decoding.State(
            cache=jax.eval_shape(functools.partial(self.model.init_cache, rows, capacity, memory)),
            tokens=shape(jnp.int32, rows),
            finished=shape(jnp.bool_, rows),
            step=shape(jnp.int32),
            keys=self._keys(rows),
            history=None,
        )
        if self.mesh is None:
            places = jax.tree.map(lambda _: NamedSharding(self.recipe.mesh, PartitionSpec()), state)
        else:
            places = decoding.state_shardings(state, self.recipe.model, self.model.scan, self.mesh)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, places)

    def _cache(self, rows: int, capacity: int) -> KVCache:
        return self._state(rows, capacity).cache

    def _on_device(self, rows: int) -> int:
        """Rows of a device; those that do not divide are computed on every one."""
        return rows if rows % self.recipe.ways else rows // self.recipe.ways

    # ---- Learning --------------------------------------------------------------------------------------------------

    def scoring(self) -> Inference:
        shape, batch = self.learned, self._batch()
        rows = shape.rows // self.recipe.ways // shape.micro_batches
        return Inference(
            "GRPO scoring",
            self.recipe,
            str(shape),
            self.objective.scoring(self.recipe.mesh, shape.micro_batches),
            (self.graphdef, self.params, dataclasses.replace(batch, old=None, reference=None)),
            {},
            weights=self.params,
            batch=batch,
            tokens=rows * shape.length,
            scored=rows * self.settings.chunk,
            resident=self.beside_scoring,
        )

    def update(self) -> Step:
        return train_step(
            "GRPO update",
            self.recipe,
            self.objective,
            self.blueprint,
            self._batch(),
            self.learned,
            head_trains=self.objective.head_trains,
            chunk=self.settings.chunk,
            resident=self.beside_update,
        )

    def _batch(self) -> PolicyBatch:
        shape, rows = self.learned, NamedSharding(self.recipe.mesh, PartitionSpec(BATCH_AXES))

        def values(*dims: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(dims, jnp.float32, sharding=rows)

        each = values(shape.rows, shape.length)
        return PolicyBatch(
            batch=abstract_batch(self.recipe, shape),
            advantages=each,
            sampled=each,
            old=each if self.settings.iterations > 1 else None,
            reference=each if self.settings.beta > 0 else None,
            counts=values(shape.rows),
        )


def _special(recipe: Recipe) -> np.ndarray:
    """Ids that are never drawn, as far as they are known without a tokenizer: no program depends on which."""
    model = recipe.model
    banned = np.zeros(model.text.vocab_size, bool)
    banned[[model.image_token_id, model.video_token_id, model.vision_start_token_id, model.vision_end_token_id]] = True
    return banned
