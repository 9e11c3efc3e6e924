"""The optimizer step: which parameters move, by how much, and what their gradients cost."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import torch
from flax import nnx

from pvm_jax.checkpoint import flatten
from pvm_jax.config import ModelConfig
from pvm_jax.data.packing import collate
from pvm_jax.data.processor import Processor
from pvm_jax.models.layers import VECTORS
from pvm_jax.models.qwen3_vl import Qwen3VL
from pvm_jax.training.freeze import Partition, describe, trainable_names
from pvm_jax.training.losses import cross_entropy
from pvm_jax.training.optim import OptimizerConfig, make_optimizer, make_schedule
from pvm_jax.training.stage import StageBatch, TrainingError
from pvm_jax.training.step import TrainState, loss_and_gradients, make_update, micro_batch

PVM_ONLY = (("pvm_block/", True), ("", False))


class Cross:
    """A stage with the SFT loss."""

    steps_per_epoch = None

    def make_extra(self, rngs):
        return None

    def next_batch(self, step, policy) -> StageBatch:
        raise NotImplementedError

    def loss_fn(self, model, batch):
        return cross_entropy(model.logits, model(batch), batch.tokens, batch.loss_weights, chunk=32)

    def close(self):
        pass


def build(pvm_layers=(1, 3), scan=True, gate=0.5) -> Qwen3VL:
    """A model of four layers with values from numpy: what JAX draws one by one takes a minute to compile."""
    raw = tiny.hf_config(pvm_layers=pvm_layers, memory_mask="causal")
    raw["text_config"]["num_hidden_layers"] = 4
    raw["vision_config"] |= {"depth": 1, "deepstack_visual_indexes": [0]}
    config = ModelConfig.from_hf(raw)
    model = nnx.eval_shape(lambda: Qwen3VL(config, rngs=nnx.Rngs(0), scan=scan))
    rng = np.random.default_rng(0)
    for name, variable in flatten(nnx.state(model)).items():
        shape = variable.shape
        if name.endswith("gate_alpha"):  # open, unless said otherwise: every parameter of the branch has a gradient
            value = np.full(shape, gate)
        else:
            value = np.ones(shape) if "norm" in name else rng.standard_normal(shape) / np.sqrt(shape[-1])
        variable.set_value(jnp.asarray(value, jnp.float32))
    return model


@pytest.fixture(scope="module")
def processor(pvm_checkpoint) -> Processor:
    return Processor.from_pretrained(pvm_checkpoint)


@pytest.fixture(scope="module")
def model() -> Qwen3VL:
    return build()


@pytest.fixture(scope="module")
def samples() -> list:
    """Four conversations of different length; the second has no image."""
    image, text = tiny.image, tiny.text
    return [
        {"messages": [tiny.user(image(0, 64, 96), text(0, 8)), tiny.assistant(text(1, 12))]},
        {"messages": [tiny.user("count to three"), tiny.assistant("one two three")]},
        {"messages": [tiny.user(image(1, 32, 64), "and", image(2, 64, 32)), tiny.assistant(text(2, 5))]},
        {"messages": [tiny.user(text(3, 20), image(3, 64, 64)), tiny.assistant(text(4, 9))]},
    ]


def gradients(model, batch, micro_batches=1, table=PVM_ONLY):
    partition = Partition(model, table)
    trainable, frozen = partition.split(model)
    step = jax.jit(lambda t, f, b: loss_and_gradients(Cross(), partition, t, f, b, micro_batches))
    return step(trainable, frozen, batch)


def pack_rows(processor, samples, rows):
    encoded = [processor.encode(sample) for sample in samples]
    return collate([[encoded[i] for i in row] for row in rows], length=128, patches=64)


# ---- Schedules and AdamW -----------------------------------------------------------------------------------------


def test_cosine_with_warmup_in_closed_form():
    schedule = make_schedule(OptimizerConfig(2.0), 100)  # 10 % of warm-up, to 0
    expected = {0: 0.0, 1: 0.2, 5: 1.0, 10: 2.0, 55: 1.0, 99: 1 + np.cos(np.pi * 89 / 90)}
    for step, value in expected.items():
        np.testing.assert_allclose(schedule(step), value, atol=1e-6)
    floored = make_schedule(OptimizerConfig(2.0, floor=0.1, warmup_steps=4), 104)
    np.testing.assert_allclose([floored(4), floored(54), floored(104)], [2.0, 1.1, 0.2], rtol=1e-5)
    cut = make_schedule(OptimizerConfig(2.0, schedule_steps=100), 40)  # a run that stops before its schedule ends
    assert [float(cut(s)) for s in (0, 5, 30, 39)] == [float(schedule(s)) for s in (0, 5, 30, 39)]
    constant = make_schedule(OptimizerConfig(2.0, schedule="constant", warmup_ratio=0.0), 100)
    np.testing.assert_allclose([constant(0), constant(99)], [2.0, 2.0])


def test_adamw_is_torchs_with_a_group_per_multiplier():
    """Clipping, weight decay on matrices only, a learning-rate multiplier and the schedule, over six steps."""
    rng = np.random.default_rng(0)
    shapes = {"mlp/up_proj": (4, 5), "norm": (5,), "pvm_block/gate_alpha": (1,)}
    values = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    config = OptimizerConfig(1e-2, weight_decay=0.3, multipliers=(("gate_alpha", 5.0),), clip_norm=0.7)
    schedule = make_schedule(config, 6)
    optimizer = make_optimizer(config, schedule, tuple(shapes))
    params = {n: jnp.asarray(v) for n, v in values.items()}
    state = optimizer.init(params)

    @jax.jit
    def update(grads, state, params):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    theirs = {n: torch.nn.Parameter(torch.tensor(v)) for n, v in values.items()}
    groups = [
        {"params": [theirs["mlp/up_proj"]], "weight_decay": 0.3, "factor": 1.0},
        {"params": [theirs["norm"]], "weight_decay": 0.0, "factor": 1.0},
        {"params": [theirs["pvm_block/gate_alpha"]], "weight_decay": 0.0, "factor": 5.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
    for step in range(6):
        grads = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
        params, state = update({n: jnp.asarray(g) for n, g in grads.items()}, state, params)
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(grads[name])
        torch.nn.utils.clip_grad_norm_(theirs.values(), 0.7)
        for group in adamw.param_groups:
            group["lr"] = float(schedule(step)) * group["factor"]
        adamw.step()
    for name, parameter in theirs.items():
        assert not np.allclose(values[name], params[name], atol=1e-3)
        np.testing.assert_allclose(params[name], parameter.detach().numpy(), atol=1e-6)


def test_weight_decay_spares_vectors_of_every_layer(model):
    """Stacked layers hide how many axes a parameter has; its logical axes tell."""
    for name, variable in flatten(nnx.state(model)).items():
        axes = [axis for axis in variable.get_metadata("axes") if axis not in ("layers", "qkv")]
        is_bias = name.endswith("bias")
        assert bool(VECTORS.search(name)) == (len(axes) == 1 or is_bias), name


def test_optimizer_options_are_checked():
    with pytest.raises(TrainingError, match=r"schedule: expected one of \['cosine', 'constant'\], got 'cosin'"):
        OptimizerConfig(1e-3, schedule="cosin")
    with pytest.raises(TrainingError, match=r"'gate_alhpa' matches no trainable parameter, e.g. 'a/gate_alpha'"):
        config = OptimizerConfig(1e-3, multipliers=(("gate_alhpa", 5.0),))
        make_optimizer(config, make_schedule(config, 10), ("a/gate_alpha",))


# ---- Freezing ----------------------------------------------------------------------------------------------------


def test_first_matching_row_of_the_freezing_table_decides():
    names = ("text/norm", "text/layers/1/pvm_block/gate_alpha", "visual/merger/fc1")
    assert trainable_names(names, PVM_ONLY) == (names[1],)
    assert trainable_names(names, (("visual/", False), ("", True))) == names[:2]
    assert trainable_names(names, (("", True), ("visual/", False))) == names
    with pytest.raises(TrainingError, match=r"no pattern matches the parameter 'text/norm'.*end the table with"):
        trainable_names(names, (("pvm_block/", True),))
    with pytest.raises(TrainingError, match="leaves nothing to train; does the checkpoint have PVM"):
        trainable_names(("text/norm",), PVM_ONLY)


def test_table_of_the_8b_model_counts_the_papers_parameters():
    raw = tiny.hf_config(pvm_layers=(8, 16, 24))
    raw["text_config"] |= {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "pvm_hidden_size": 512,
    }  # fmt: skip
    raw["text_config"]["rope_scaling"]["mrope_section"] = [24, 20, 20]
    raw["vision_config"]["out_hidden_size"] = 4096
    model = nnx.eval_shape(lambda: Qwen3VL(ModelConfig.from_hf(raw), rngs=nnx.Rngs(0)))
    partition = Partition(model, PVM_ONLY)
    variables = flatten(nnx.state(model))
    table = describe({n: variables[n] for n in partition.trainable}, {n: variables[n] for n in partition.frozen})
    assert re.search(r"text/layers/8/pvm_block +9,307,393  trainable  float32", table)
    assert re.search(r"text/layers/9-15 +\d[\d,]+  frozen ", table)
    assert "27,922,179 parameters train" in table


def test_frozen_parameters_get_no_gradient_and_no_state(model, processor, samples):
    partition = Partition(model, PVM_ONLY)
    *_, grads = gradients(model, processor(samples))
    assert set(grads) == set(partition.trainable)
    assert all("pvm_block/" in name for name in grads)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in grads.values())
    config = OptimizerConfig(1e-3)
    state = make_optimizer(config, make_schedule(config, 9), partition.trainable).init(partition.split(model)[0])
    numbers = sum(x.size for x in jax.tree.leaves(state))
    assert numbers == 2 * sum(g.size for g in grads.values()) + 2  # two moments, two counters


def test_gate_alone_moves_at_the_first_step_of_a_closed_branch(processor, samples):
    *_, grads = gradients(build(gate=0.0), processor(samples))
    for name, g in grads.items():
        assert np.isfinite(g).all()
        assert (np.abs(g).max() > 0) == name.endswith("gate_alpha"), name


def test_no_backward_pass_below_the_first_pvm_layer(processor, samples):
    """Flops of the compiled gradient: PVM in the last layer against PVM in the first, same shapes and counts."""
    batch = processor(samples[:1])

    def compiled(layer: int, differentiate: bool = True) -> float:
        # Each layer on its own: the compiler counts the body of a loop once, however often it runs.
        model = build(pvm_layers=(layer,), scan=False)
        partition = Partition(model, PVM_ONLY)

        def step(trainable, frozen, batch):
            if differentiate:
                return loss_and_gradients(Cross(), partition, trainable, frozen, batch)[-1]
            return Cross().loss_fn(partition.merge(trainable, frozen), batch).sum

        return jax.jit(step).lower(*partition.split(model), batch).compile().cost_analysis()["flops"]

    forward, last, first = compiled(3, differentiate=False), compiled(3), compiled(0)
    print(f"flops: forward {forward:.3g}, PVM in the last layer {last:.3g}, in the first {first:.3g}")
    assert forward < last < 1.35 * forward
    assert first > 1.4 * last


def test_scanned_layers_below_the_first_pvm_layer_have_no_backward_loop(processor, samples):
    """Loops in the traced gradient: layers 1-2 are a scan, which has a second one for its backward pass or none."""
    batch = processor(samples[:1])

    def scans(layer: int, table=PVM_ONLY) -> int:
        model = build(pvm_layers=(layer,))
        partition = Partition(model, table)
        step = jax.make_jaxpr(lambda t, f, b: loss_and_gradients(Cross(), partition, t, f, b)[-1])
        return str(step(*partition.split(model), batch)).count("= scan[")

    assert scans(0) == scans(3) + 1
    assert scans(3, (("", True),)) == scans(3) + 1


# ---- Batches -----------------------------------------------------------------------------------------------------


def test_packed_rows_give_the_loss_and_gradients_of_separate_rows(model, processor, samples):
    separate = gradients(model, processor(samples))
    packed_batch = pack_rows(processor, samples, [[0, 1], [2, 3]])
    assert packed_batch.tokens.shape[0] == 2
    packed = gradients(model, packed_batch)
    for a, b in zip(jax.tree.leaves(packed), jax.tree.leaves(separate)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_accumulated_micro_batches_equal_one_big_batch(model, processor, samples):
    """Rows of very different weight: a mean of the parts' means would be another number."""
    batch = processor(samples)
    weights = batch.loss_weights * np.array([[1.0], [9.0], [0.0], [3.0]], np.float32)
    batch = dataclasses.replace(batch, loss_weights=weights)
    whole, parts = gradients(model, batch), gradients(model, batch, micro_batches=2)
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

    each = [gradients(model, micro_batch(batch, i, 2)) for i in range(2)]
    name = "text/layers/3/pvm_block/output_expander"
    mean_of_means = sum(e[-1][name] for e in each) / 2
    assert np.abs(mean_of_means - whole[-1][name]).max() > 1e-3


def test_a_batch_without_targets_has_gradient_zero(model, processor, samples):
    batch = processor(samples[:1])
    batch = dataclasses.replace(batch, loss_weights=np.zeros_like(batch.loss_weights))
    loss, count, _, grads = gradients(model, batch)
    assert loss == 0 and count == 0
    assert all(np.array_equal(g, np.zeros_like(g)) for g in grads.values())


def test_steps_lower_the_loss_and_one_that_is_not_finite_leaves_the_state_alone(model, processor, samples):
    partition = Partition(model, PVM_ONLY)
    trainable, frozen = partition.split(model)
    config = OptimizerConfig(1e-2, warmup_ratio=0.0)
    schedule = make_schedule(config, 10)
    optimizer = make_optimizer(config, schedule, partition.trainable)
    update = jax.jit(make_update(Cross(), partition, optimizer, schedule))
    state = TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))
    batch = processor(samples[:1])

    losses = []
    for step in range(1, 5):
        state, metrics = update(state, frozen, batch)
        assert metrics["finite"][0] == 1 and state.step == step
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    assert losses[-1] < losses[0] - 0.1
    assert {"gate/1", "gate/3", "grad_norm", "grad_norm_pvm", "learning_rate"} <= set(metrics)
    gate = state.trainable["text/layers/3/pvm_block/gate_alpha"]
    np.testing.assert_allclose(metrics["gate/3"][0], np.abs(gate)[0, 0])

    # Nothing to learn from: the momentum of the steps before must not move the parameters either.
    nothing = dataclasses.replace(batch, loss_weights=np.zeros_like(batch.loss_weights))
    rested, metrics = update(state, frozen, nothing)
    assert metrics["idle"][0] == metrics["finite"][0] == 1 and rested.step == state.step + 1
    momentum = optax.tree.get(state.optimizer, "mu")
    for name, value in state.trainable.items():
        assert np.abs(momentum[name]).max() > 0
        np.testing.assert_array_equal(rested.trainable[name], value)

    broken = dataclasses.replace(batch, patches=np.full_like(batch.patches, np.nan))
    kept, metrics = update(state, frozen, broken)
    assert metrics["finite"][0] == 0
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(state)):
        np.testing.assert_array_equal(a, b)
