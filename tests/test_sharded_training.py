"""Losses, gradients and ten steps of SFT on meshes of eight simulated devices, against one device."""

import dataclasses
import re
from typing import NamedTuple

import jax
import numpy as np
import optax
import pytest
import training_runs
from flax import nnx

from pvm_jax.checkpoint import abstract_model, abstract_params, load_params, open_checkpoint
from pvm_jax.config import ModelConfig
from pvm_jax.data.processor import Processor
from pvm_jax.hf_weights import HFWeights
from pvm_jax.sharding import ShardingError, make_mesh, mesh_of, param_shardings
from pvm_jax.training.freeze import Arrays
from pvm_jax.training.optim import OptimizerConfig, make_optimizer, make_schedule
from pvm_jax.training.setup import Blueprint, ModelOptions
from pvm_jax.training.sft import make_stage
from pvm_jax.training.stage import Setup, TrainingError
from pvm_jax.training.step import compiled, init_state, make_update, put_batch

MESHES = ((8, 1, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2))
STEPS = 10
FREEZE = (("pvm_block/", True), ("text/layers/1/", True), ("", False))  # matrices on `fsdp` and `tensor` train, too


class Kept(NamedTuple):
    """State of `keep_gradients`."""

    gradients: Arrays
    inner: optax.OptState


def keep_gradients(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same optimizer, whose state also holds the gradients of the last step."""

    def update(gradients, state, params):
        updates, inner = optimizer.update(gradients, state.inner, params)
        return updates, Kept(gradients, inner)

    return optax.GradientTransformation(
        lambda params: Kept(jax.tree.map(jax.numpy.zeros_like, params), optimizer.init(params)), update
    )


class Run(NamedTuple):
    losses: list[float]
    gradients: dict[str, np.ndarray]  # of the first step
    parameters: dict[str, np.ndarray]  # after the last


def test_more_rows_than_samples_are_said(tmp_path, small_checkpoint, caplog):
    setting, source = training_runs.Setting.write(tmp_path, small_checkpoint), open_checkpoint(small_checkpoint)
    data = {"path": str(setting.folder / "train.jsonl"), "samples": 4, "length": 64, "patches": 16}
    setup = Setup(source.config, Processor.from_pretrained(source.files), data, seed=0, row_multiple=4)
    for made, said in ((setup, []), (dataclasses.replace(setup, row_multiple=8), ["4 samples for 8 rows"])):
        make_stage(made).close()
        assert len(caplog.messages) == len(said) and all(words in caplog.text for words in said)


@pytest.fixture(scope="module")
def stage(tmp_path_factory, small_checkpoint):
    setting = training_runs.Setting.write(tmp_path_factory.mktemp("sharded"), small_checkpoint)
    source = open_checkpoint(small_checkpoint)
    processor = Processor.from_pretrained(source.files, max_pixels=4096)
    data = {"path": str(setting.folder / "train.jsonl"), "samples": 8, "rows": 8, "length": 64, "patches": 16}
    stage = make_stage(Setup(source.config, processor, data, seed=0, row_multiple=8, freeze=FREEZE))
    yield stage
    stage.close()


@pytest.fixture(scope="module")
def train(stage, small_checkpoint):
    """`train(data, fsdp, tensor) -> Run`, on as many devices."""
    source = open_checkpoint(small_checkpoint)

    def call(*shape: int) -> Run:
        mesh = make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
        blueprint = Blueprint(source.config, ModelOptions(str(small_checkpoint)), stage, FREEZE, mesh)
        partition = blueprint.partition
        config = OptimizerConfig(learning_rate=1e-3)
        schedule = make_schedule(config, STEPS)
        optimizer = keep_gradients(make_optimizer(config, schedule, partition.trainable))
        frozen = blueprint.parameters(source, 0, partition.frozen)
        state = init_state(optimizer, blueprint.parameters(source, 0, partition.trainable), mesh)
        lies = jax.tree.map(lambda x: x.sharding, state)
        update = compiled(make_update(stage, partition, optimizer, schedule), state, mesh)
        losses, gradients = [], {}
        for step in range(STEPS):
            batch = put_batch(stage.next_batch(step, lambda: None).batch, mesh, 1)
            state, metrics = update(state, frozen, batch)
            losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
            gradients = gradients or jax.device_get(state.optimizer.gradients)
        assert jax.tree.map(lambda x: x.sharding, state) == lies  # moments stay with their parameters
        return Run(losses, gradients, jax.device_get(state.trainable))

    return call


@pytest.fixture(scope="module")
def alone(train) -> Run:
    return train(1, 1, 1)


@pytest.mark.parametrize("shape", MESHES)
def test_a_mesh_gives_what_one_device_gives(train, alone, shape):
    run = train(*shape)
    np.testing.assert_allclose(run.losses, alone.losses, rtol=1e-5)
    for name, expected in alone.gradients.items():
        scale = np.abs(expected).max()
        np.testing.assert_allclose(run.gradients[name], expected, atol=1e-5 * scale, rtol=0, err_msg=name)
    assert max(np.abs(x).max() for x in alone.gradients.values()) > 1e-3
    for name, expected in alone.parameters.items():
        np.testing.assert_allclose(run.parameters[name], expected, atol=1e-5, rtol=1e-5, err_msg=name)


def test_parameters_and_moments_are_spread(stage, small_checkpoint):
    """Nothing large lies whole on a device; what a device holds adds up to its share."""
    mesh = make_mesh(1, 4, 2)
    source = open_checkpoint(small_checkpoint)
    blueprint = Blueprint(source.config, ModelOptions(str(small_checkpoint)), stage, FREEZE, mesh)
    trainable = blueprint.parameters(source, 0, blueprint.partition.trainable)
    state = init_state(optax.adam(1e-3), trainable, mesh)
    moments = state.optimizer[0]
    for name, value in trainable.items():
        if "pvm_block" not in name and value.size > 256:
            share = value.addressable_shards[0].data.size / value.size
            assert share <= 0.25, name
            assert moments.mu[name].sharding == moments.nu[name].sharding == value.sharding
    assert mesh_of(trainable) is mesh and mesh_of(np.zeros(3)) is None


def test_weights_are_read_a_shard_at_a_time(small_checkpoint, monkeypatch):
    """Of a Hugging Face checkpoint nothing is read that does not go to a device of this process, and only once a
    device: a host never holds more than its own part."""
    read, pieces = HFWeights._part, []

    def recorded(self, path, index, dtype):
        piece = read(self, path, index, dtype)
        pieces.append((path, piece.size))
        return piece

    monkeypatch.setattr(HFWeights, "_part", recorded)
    mesh = make_mesh(1, 4, 2)
    state = nnx.state(abstract_model(ModelConfig.load(small_checkpoint)))
    params = load_params(small_checkpoint, abstract_params(state, mesh))
    for path, size in pieces:
        assert size == params[path].addressable_shards[0].data.size, path
    assert max(size for _, size in pieces) <= max(x.size for x in params.values()) / 4


# ---- Mistakes ----------------------------------------------------------------------------------------------------


def test_all_that_does_not_divide_is_said_at_once(small_checkpoint):
    model = abstract_model(ModelConfig.load(small_checkpoint))
    with pytest.raises(ShardingError) as error:
        param_shardings(nnx.state(model), make_mesh(1, 1, 8))
    lines = str(error.value).splitlines()
    assert len(lines) > 3 and all("does not divide over mesh.tensor = 8; choose a mesh.tensor that" in x for x in lines)
    assert any(re.match(r"text/layers/0/self_attn/q_proj \(.*\): axis 'heads' of 4 does not", x) for x in lines)
    assert abstract_params(nnx.state(model), make_mesh(1, 4, 2))


@pytest.mark.parametrize(
    ("axes", "names", "sentence"),
    [
        (("embed", "vision_embed"), None, r"two of its axes \('embed', 'vision_embed'\) lie on mesh axis 'fsdp'"),
        (("embed", "width"), None, r"expected axes that sharding.RULES knows, got 'width'"),
        (("embed", "mlp"), ("data", "fsdp"), r"axis 'mlp' lies on 'tensor', the mesh has \('data', 'fsdp'\)"),
    ],
)
def test_layouts_that_cannot_be(axes, names, sentence):
    mesh = make_mesh(1, 4, 2)
    if names:
        mesh = jax.sharding.Mesh(mesh.devices[..., 0], names)
    state = nnx.State({"block": {"kernel": nnx.Param(np.zeros((8, 8)), axes=axes)}})
    with pytest.raises(ShardingError, match=rf"^block/kernel \(8, 8\): {sentence}$"):
        param_shardings(state, mesh)


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"data": 3}, r"expected data x fsdp x tensor to use all 8 devices, got 3 x 1 x 1; set one of mesh.data"),
        ({"fsdp": -1, "tensor": 3}, r"to use all 8 devices, got 1 x -1 x 3"),
        ({"data": -1, "fsdp": -1}, r"at most one -1, got data x fsdp x tensor = \[-1, -1, 1\]"),
        ({"fsdp": 4, "model": 2}, r"mesh: expected axes data, fsdp, tensor, got model as well"),
    ],
)
def test_meshes_that_cannot_be(sizes, sentence):
    with pytest.raises(ShardingError, match=sentence):
        make_mesh(**sizes)


def test_batch_that_does_not_divide():
    mesh = make_mesh(1, 8, 1)
    with pytest.raises(ShardingError, match=r"expected rows divisible by mesh data x fsdp = 8, got 12; change"):
        put_batch({"advantages": np.zeros((12, 3))}, mesh, 1)
    with pytest.raises(TrainingError, match=r"8 rows, which do not divide into config.micro_batches = 2 x mesh .* = 8"):
        put_batch({"advantages": np.zeros((8, 3))}, mesh, 2)
