"""GRPO's numbers against TRL's formulas written out by hand, each beside the number that a likely bug would give."""

import dataclasses
import doctest
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pvm_jax.data.batch import Batch
from pvm_jax.training import policy_loss as pl
from pvm_jax.training.freeze import Partition
from pvm_jax.training.losses import next_token, token_scores
from pvm_jax.training.policy_loss import PolicyBatch, advantages, policy_loss, token_weights
from pvm_jax.training.step import loss_and_gradients

LENGTHS, MASKED, LIMIT = np.array([2, 4, 3]), np.array([False, False, True]), 8
# By completion: log-probabilities now, when drawn, under the reference; the third was cut off.
NOW = ((-1.0, -0.5), (-0.2, -2.0, -1.5, -0.1), (-0.3, -0.3, -0.3))
OLD = ((-1.3, -0.5), (-0.2, -1.6, -1.5, -0.6), (-1.0, -1.0, -1.0))
REFERENCE = ((-0.9, -0.7), (-0.2, -2.5, -1.0, -0.1), (-2.0, -2.0, -2.0))
ADVANTAGES = (0.7, -1.2, 0.5)


def only_weights(loss_weights) -> Batch:
    """The one field of a batch that the loss reads."""
    return Batch(**{f.name: None for f in dataclasses.fields(Batch)} | {"loss_weights": jnp.asarray(loss_weights)})


def packed(loss_type: str, rows=((0, 1), (2,)), length: int = 10, reference: bool = False, old: bool = True):
    """The completions packed into rows, each behind a prompt of one token; log-probabilities by column, too."""
    weights, counts = token_weights(LENGTHS, MASKED, loss_type, LIMIT)
    columns = {name: np.zeros((len(rows), length), np.float32) for name in ("w", "a", "old", "ref", "now")}
    share = np.zeros(len(rows), np.float32)
    for r, members in enumerate(rows):
        at = 0
        for i in members:
            span = slice(at + 1, at + 1 + LENGTHS[i])
            for name, values in (("w", weights), ("a", ADVANTAGES)):
                columns[name][r, span] = values[i]
            for name, table in (("old", OLD), ("ref", REFERENCE), ("now", NOW)):
                columns[name][r, span] = table[i]
            share[r] += counts[i]
            at = span.stop
    batch = PolicyBatch(
        only_weights(columns["w"]),
        jnp.asarray(columns["a"]),
        jnp.asarray(columns["old"]) + 0.01,
        jnp.asarray(columns["old"]) if old else None,
        jnp.asarray(columns["ref"]) if reference else None,
        jnp.asarray(share),
    )
    return next_token(jnp.asarray(columns["now"])), batch


def loss(loss_type: str, **arguments):
    beta = 0.1 if arguments.get("reference") else 0.0
    log_probs, batch = packed(loss_type, **arguments)
    return policy_loss(log_probs, batch, epsilon=0.2, epsilon_high=0.3, beta=beta, loss_type=loss_type)


def by_hand(i: int, beta: float = 0.0) -> list[float]:
    """The cost of each token of completion i, from the equation."""
    costs = []
    for now, old, ref in zip(NOW[i], OLD[i], REFERENCE[i]):
        r, a = np.exp(now - old), ADVANTAGES[i]
        clipped = min(max(r, 0.8), 1.3)
        costs.append(-min(r * a, clipped * a) + beta * (np.exp(ref - now) - (ref - now) - 1))
    return costs


def test_closed_forms_in_the_docstrings():
    results = doctest.testmod(pl)
    assert results.attempted >= 4 and not results.failed


def test_advantages():
    """Group (1, 0, 0, 1): deviation sqrt(1/3) = 0.57735 unbiased; 0.5 / (0.57735 + 1e-4) = 0.865875.

    The biased deviation would give 0.5 / 0.5001 = 0.9998, without eps 0.866025, over both groups 0.82.
    """
    rewards = np.array([1, 0, 0, 1, 0.1, 0.1, 0.1, 0.1], np.float32)
    got = advantages(rewards, 4)
    np.testing.assert_allclose(got[:4], [0.865875, -0.865875, -0.865875, 0.865875], atol=2e-6)
    np.testing.assert_allclose(got[4:], 0, atol=1e-6)  # no variance, no advantage: not 0 / 0
    np.testing.assert_allclose(advantages(rewards, 4, "none")[:4], [0.5, -0.5, -0.5, 0.5])
    np.testing.assert_allclose(advantages(rewards, 4, "batch")[0], 0.5 / (rewards.std(ddof=1) + 1e-4), rtol=1e-6)


def test_cost_of_a_token_golden():
    """Completion 0: r = exp(0.3) = 1.349859 is clipped to 1.3: -0.91 (unclipped -0.944901; clipped at 1.2: -0.84);
    then r = 1: -0.7. Completion 1 has A = -1.2: r = exp(-0.4) = 0.670320 is clipped to 0.8, cost 0.96 (unclipped
    0.804384), and r = exp(0.5) = 1.648721 is not clipped: 1.978466 (clipped to 1.3: 1.56).
    """
    np.testing.assert_allclose(by_hand(0), [-0.91, -0.7], atol=1e-6)
    np.testing.assert_allclose(by_hand(1), [1.2, 0.96, 1.2, 1.978466], atol=1e-6)


@pytest.mark.parametrize(
    ("loss_type", "expected", "bugs"),
    [
        # sum of costs 3.728466 over the 6 tokens that teach; not over all 9, not the mean of row means
        ("dapo", 3.728466 / 6, (3.728466 / 9,)),
        ("bnpo", 3.728466 / 6, (3.728466 / 9,)),
        # means -0.805 and 1.334616 and 0 for the one that was cut off; not over 2 completions, not over tokens
        ("grpo", (-0.805 + 1.3346165) / 3, ((-0.805 + 1.3346165) / 2, 3.728466 / 6)),
        ("dr_grpo", 3.728466 / 24, (3.728466 / 16,)),
    ],
)
def test_loss_types_golden(loss_type, expected, bugs):
    got = loss(loss_type)
    np.testing.assert_allclose(got.sum / got.count, expected, rtol=1e-5)
    assert all(abs(bug / expected - 1) > 0.1 for bug in bugs)


@pytest.mark.parametrize("loss_type", pl.LOSS_TYPES)
def test_packed_equals_unpacked(loss_type):
    together, apart = loss(loss_type), loss(loss_type, rows=((0,), (1,), (2,)))
    np.testing.assert_allclose([together.sum, together.count], [apart.sum, apart.count], rtol=1e-6)
    for name, fraction in together.metrics.items():
        np.testing.assert_allclose(fraction, apart.metrics[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_sums_over_parts_are_the_whole(loss_type):
    """Micro-batches and hosts add up sum and count; bnpo alone is a mean of means."""
    log_probs, batch = packed(loss_type, rows=((0,), (1,), (2,)))
    whole = loss(loss_type, rows=((0,), (1,), (2,)))
    parts = []
    for row in (slice(i, i + 1) for i in range(3)):
        values = (batch.advantages[row], batch.sampled[row], batch.old[row], None, batch.counts[row])
        one = PolicyBatch(only_weights(batch.batch.loss_weights[row]), *values)
        parts.append(policy_loss(log_probs[row], one, epsilon=0.2, epsilon_high=0.3, loss_type=loss_type))
    np.testing.assert_allclose(sum(p.sum for p in parts), whole.sum, rtol=1e-6)
    np.testing.assert_allclose(sum(p.count for p in parts), whole.count, rtol=1e-6)


class Shift(Partition):
    """Of a policy with one parameter, which is added to all log-probabilities."""

    def __init__(self):
        pass

    def merge(self, trainable, frozen):
        return trainable["shift"]


class Shifted:
    """The stage that trains it."""

    steps_per_epoch = None

    def __init__(self, loss_type: str):
        self.loss_type = loss_type

    def unused(self, *_):
        raise NotImplementedError

    make_extra = next_batch = close = unused

    def loss_fn(self, shift, batch):
        log_probs, learned = batch
        return policy_loss(log_probs + shift, learned, epsilon=0.2, epsilon_high=0.3, loss_type=self.loss_type)


def in_two_micro_batches(loss_type: str, rows) -> tuple[float, float]:
    """The loss and its slope."""
    batch, shift = packed(loss_type, rows=rows), {"shift": jnp.zeros(())}
    total, count, _, gradients = loss_and_gradients(Shifted(loss_type), Shift(), shift, {}, batch, micro_batches=2)
    return float(total / count), float(gradients["shift"])


@pytest.mark.parametrize(
    ("loss_type", "value", "slope"),
    [
        # Slopes of the costs, -r A where nothing is clipped: 0 and -0.7; 1.2, 0, 1.2 and 1.978466.
        ("dapo", 3.728466 / 6, 3.678466 / 6),
        ("grpo", (-0.805 + 1.3346165) / 3, (-0.7 / 2 + 4.378466 / 4) / 3),
        ("dr_grpo", 3.728466 / 24, 3.678466 / 24),
        # The mean over micro-batches of each one's mean: -0.805 and 1.3346165; not 0.621411, the mean over tokens
        ("bnpo", (-0.805 + 1.3346165) / 2, (-0.7 / 2 + 4.378466 / 4) / 2),
    ],
)
def test_two_micro_batches_golden(loss_type, value, slope):
    """Rows 0 and 2, then 1 and 3: completions 0 and 2, of which the latter was cut off, then 1 and an empty row."""
    np.testing.assert_allclose(in_two_micro_batches(loss_type, ((0,), (1,), (2,), ())), (value, slope), rtol=1e-5)


def test_micro_batch_that_teaches_nothing_counts_in_bnpo():
    """As in TRL, which divides by max(tokens, 1) and then by the micro-batches: half of 3.728466 / 6."""
    value, _ = in_two_micro_batches("bnpo", ((0,), (2,), (1,), ()))
    np.testing.assert_allclose(value, 3.728466 / 12, rtol=1e-5)


def test_divergence_from_the_reference():
    """beta (exp(x) - x - 1) with x = log p_ref - log p: 0.1 * (0.005171 + 0.018731 + 0 + 0.106531 + 0.148721 + 0)."""
    plain, with_reference = loss("dapo"), loss("dapo", reference=True)
    np.testing.assert_allclose(with_reference.sum - plain.sum, 0.0279154, rtol=1e-4)
    np.testing.assert_allclose(with_reference.sum, sum(by_hand(0, 0.1) + by_hand(1, 0.1)), rtol=1e-5)
    np.testing.assert_allclose(with_reference.metrics["kl"], (0.279154, 6), rtol=1e-4)


def test_metrics():
    got = loss("dapo").metrics
    assert got["clipped_high"] == (1, 6)  # exp(0.3) with A > 0
    assert got["clipped_low"] == (1, 6)  # exp(-0.4) with A < 0; exp(0.5) with A < 0 is not clipped
    np.testing.assert_allclose(got["ratio_max"], (np.exp(0.5), 1), rtol=1e-6)  # not exp(0.7): that one is masked
    np.testing.assert_allclose(got["ratio_min"], (np.exp(-0.4), 1), rtol=1e-6)
    np.testing.assert_allclose(got["sampler_gap"], (6 * 0.01, 6), rtol=1e-4)  # not against what is learned since: 1.22


def test_clipped_shares_follow_the_sign_of_the_advantage():
    """The same ratios with opposite advantages: exp(0.5) is clipped now, exp(0.3) and exp(-0.4) are not."""
    log_probs, batch = packed("dapo")
    opposite = dataclasses.replace(batch, advantages=-batch.advantages)
    got = policy_loss(log_probs, opposite, epsilon=0.2, epsilon_high=0.3).metrics
    assert got["clipped_high"] == (1, 6) and got["clipped_low"] == (0, 6)


def test_what_teaches_nothing_cannot_overflow():
    """Prompts, padding and masked completions, however unlikely they were: exp(200) is not finite."""
    log_probs, batch = packed("dapo", reference=True)
    wanted = batch.batch.loss_weights > 0
    odd = dataclasses.replace(
        batch, old=jnp.where(wanted, batch.old, -200), reference=jnp.where(wanted, batch.reference, 200)
    )
    settings = {"epsilon": 0.2, "epsilon_high": 0.3, "beta": 0.1}
    plain, got = (
        jax.value_and_grad(lambda x: policy_loss(x, b, **settings).sum)(log_probs)  # noqa: B023
        for b in (batch, odd)
    )
    np.testing.assert_array_equal(got[0], plain[0])
    np.testing.assert_array_equal(got[1], plain[1])


def test_first_pass_has_ratio_one_and_the_policy_gradient():
    """Without `old` the ratio is 1 whatever the sampler said, and the gradient of a token is -A."""
    log_probs, batch = packed("dapo", old=False)
    got = policy_loss(log_probs, batch, epsilon=0.2, epsilon_high=0.2)
    np.testing.assert_allclose(got.sum, -(2 * 0.7 - 4 * 1.2), rtol=1e-6)
    assert got.metrics["ratio_max"] == got.metrics["ratio_min"] == (1, 1)
    gradient = jax.grad(lambda x: policy_loss(x, batch, epsilon=0.2, epsilon_high=0.2).sum)(log_probs)
    np.testing.assert_allclose(gradient[0, :6], [-0.7, -0.7, 0, 1.2, 1.2, 1.2], atol=1e-6)


def test_batch_that_teaches_nothing(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "MASKED", np.ones(3, bool))
    for loss_type in pl.LOSS_TYPES:
        log_probs, batch = packed(loss_type)
        value, gradient = jax.value_and_grad(
            lambda x: policy_loss(x, batch, epsilon=0.2, epsilon_high=0.2, loss_type=loss_type).sum  # noqa: B023
        )(log_probs)
        assert value == 0 and not np.asarray(gradient).any()


def test_scored_distribution_is_the_sampled_one():
    """Temperature and banned ids as in sampling; entropy of the same distribution, against the plain formula."""
    rng = np.random.default_rng(0)
    hidden, head = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 7, 8), (19, 8)))
    banned = jnp.isin(jnp.arange(19), jnp.array([3, 11]))
    targets = jnp.asarray(rng.choice(np.flatnonzero(~np.asarray(banned)), (2, 7)))
    wanted = jnp.asarray(rng.random((2, 7)) < 0.6)
    got = token_scores(
        lambda h: h @ head.T, hidden, targets, wanted, chunk=3, temperature=0.5, banned=banned, entropy=True
    )
    p = jax.nn.softmax(jnp.where(banned, -jnp.inf, hidden @ head.T / 0.5))
    np.testing.assert_allclose(
        got.log_probs, jnp.where(wanted, jnp.log(jnp.take_along_axis(p, targets[..., None], -1)[..., 0]), 0), atol=1e-5
    )
    entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0), -1)
    np.testing.assert_allclose(got.entropy, jnp.where(wanted, entropy, 0), atol=1e-5)
    gradient = jax.grad(
        lambda h: jnp.sum(token_scores(lambda x: x @ head.T, h, targets, wanted, banned=banned, entropy=True)[0])
    )(hidden)
    assert np.isfinite(gradient).all() and np.asarray(gradient).any()


@pytest.mark.parametrize("group", [3, 6, 7, 12])
def test_equal_rewards_have_no_advantage(group):
    """Also where the mean of equal numbers is off by a rounding: 6 times 0.9 gave -6.0e-4 in fp32."""
    for reward in (0.1, 0.9, 1e20):
        assert not advantages(np.full(2 * group, reward, np.float32), group).any()
