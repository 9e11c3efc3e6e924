"""Chunked cross-entropy against the plain formula, and the sums that make every batching equal."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pvm_jax.training.losses import cross_entropy, next_token, token_scores

B, T, D, V = 3, 13, 8, 29


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    weights = rng.random((B, T), np.float32) * (rng.random((B, T)) < 0.4)
    weights[:, 0] = 0
    weights[2] = 0  # a row without targets
    return {
        "head": jnp.asarray(rng.standard_normal((V, D)), jnp.float32),
        "hidden": jnp.asarray(rng.standard_normal((B, T, D)), jnp.float32),
        "tokens": jnp.asarray(rng.integers(V, size=(B, T))),
        "weights": jnp.asarray(weights),
    }


def plain(head, hidden, tokens, weights):
    log_probs = jax.nn.log_softmax(hidden @ head.T)[:, :-1]
    taken = jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0]
    return -jnp.sum(weights[:, 1:] * taken)


def chunked(head, hidden, tokens, weights, chunk):
    return cross_entropy(lambda h: h @ head.T, hidden, tokens, weights, chunk=chunk)


@pytest.mark.parametrize("chunk", [1, 4, 13, 64])
def test_loss_and_gradients_are_those_of_the_plain_formula(inputs, chunk):
    args = inputs["head"], inputs["hidden"], inputs["tokens"], inputs["weights"]
    loss = chunked(*args, chunk)
    np.testing.assert_allclose(loss.sum, plain(*args), rtol=1e-6)
    np.testing.assert_allclose(loss.count, inputs["weights"].sum(), rtol=1e-6)
    ours = jax.grad(lambda h, x: chunked(h, x, *args[2:], chunk).sum, argnums=(0, 1))(*args[:2])
    expected = jax.grad(plain, argnums=(0, 1))(*args)
    for a, b in zip(ours, expected):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_frozen_head_has_the_same_loss_and_gradient_and_is_checked(inputs):
    """With a frozen head each log-probability's gradient is kept instead of computed again."""
    head, hidden, tokens, weights = (inputs[k] for k in ("head", "hidden", "tokens", "weights"))

    def loss(hidden, head, head_trains):
        logits = lambda h: h @ head.T  # noqa: E731
        return cross_entropy(logits, hidden, tokens, weights, chunk=4, head_trains=head_trains).sum

    recomputed, kept = (jax.value_and_grad(loss)(hidden, head, trains) for trains in (True, False))
    np.testing.assert_allclose(kept[0], recomputed[0], rtol=1e-6)
    np.testing.assert_allclose(kept[1], recomputed[1], atol=1e-6)
    with pytest.raises(jax.errors.UnexpectedTracerError):
        jax.grad(loss, argnums=1)(hidden, head, False)


def test_a_trained_heads_gradient_is_added_up_in_fp32():
    """128 chunks against one, computed in bf16: relative distance 0.003; added up in bf16 it would be 0.013."""
    rng = np.random.default_rng(1)
    head = jnp.asarray(rng.standard_normal((64, 16)), jnp.float32)
    hidden = jnp.asarray(rng.standard_normal((4, 512, 16)), jnp.bfloat16)
    tokens = jnp.asarray(rng.integers(64, size=(4, 512)))

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(head, chunk):
        def loss(head):
            cast = head.astype(jnp.bfloat16)
            logits = lambda h: jnp.einsum("VD,BTD->BTV", cast, h, preferred_element_type=jnp.float32)  # noqa: E731
            return cross_entropy(logits, hidden, tokens, jnp.ones((4, 512)), chunk=chunk).sum

        return jax.grad(loss)(head)

    many, one = gradient(head, 4), gradient(head, 512)
    assert many.dtype == jnp.float32
    assert jnp.linalg.norm(many - one) < 0.005 * jnp.linalg.norm(one)


def test_closed_form():
    """Logits [0, 0, log 2]: probabilities 1/4, 1/4, 1/2. Weights belong to the token that is predicted."""
    logits = jnp.log(jnp.array([1.0, 1.0, 2.0]))
    tokens = jnp.array([[2, 0, 2, 1]])
    weights = jnp.array([[9.0, 1.0, 0.0, 0.5]])  # the first token is never a target; token 2 has weight 0
    loss = cross_entropy(lambda h: h + logits, jnp.zeros((1, 4, 3)), tokens, weights)
    np.testing.assert_allclose(loss.sum, 1.5 * np.log(4), rtol=1e-6)
    np.testing.assert_allclose(loss.count, 1.5)
    assert loss.metrics["accuracy"] == (0.0, 2.0)
    np.testing.assert_allclose(loss.metrics["token_loss"], (2 * np.log(4), 2.0), rtol=1e-6)


def test_log_probs_stand_where_their_tokens_stand(inputs):
    """The wanted positions are scored out of order and put back; temperature divides the logits."""
    hidden, head = inputs["hidden"], inputs["head"]
    targets, wanted = next_token(inputs["tokens"]), inputs["weights"] > 0
    scores = token_scores(lambda h: h @ head.T, hidden, targets, wanted, chunk=4, temperature=0.7)
    expected = jax.nn.log_softmax(hidden @ head.T / 0.7)
    expected = jnp.where(wanted, jnp.take_along_axis(expected, targets[..., None], axis=-1)[..., 0], 0)
    np.testing.assert_allclose(scores.log_probs, expected, atol=1e-5)
    most_probable = jnp.argmax(hidden @ head.T, axis=-1)
    np.testing.assert_array_equal(scores.correct, wanted & (most_probable == targets))


def test_packed_rows_equal_separate_rows(inputs):
    """Two samples in one row: the first token of the second has weight 0, so nothing crosses the border."""
    head, hidden, tokens, weights = (inputs[k] for k in ("head", "hidden", "tokens", "weights"))
    one_row = [x[:2].reshape(1, 2 * T, *x.shape[2:]) for x in (hidden, tokens, weights)]
    packed, separate = chunked(head, *one_row, 5), chunked(head, hidden[:2], tokens[:2], weights[:2], 5)
    for a, b in zip(jax.tree.leaves(packed), jax.tree.leaves(separate)):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    crossing = one_row[2].at[0, T].set(1.0)
    assert abs(chunked(head, *one_row[:2], crossing, 5).sum - separate.sum) > 0.1


def test_mean_of_sample_means_is_a_matter_of_weights():
    """Samples of 1 and 3 targets with losses 4 and 1: the mean per sample is 2.5, per token 1.75."""
    nll = np.array([[9.0, 4.0, 9.0, 9.0], [9.0, 1.0, 1.0, 1.0]], np.float32)
    # Two symbols; the logit of the right one (0) is set such that its loss is `nll` of the token after it.
    p = np.exp(-np.concatenate([nll[:, 1:], np.ones((2, 1))], 1))
    hidden = jnp.asarray(np.stack([np.log(p), np.log1p(-p)], -1), jnp.float32)
    tokens = jnp.zeros((2, 4), jnp.int32)
    for weights, mean in (
        ([[0, 1, 0, 0], [0, 1 / 3, 1 / 3, 1 / 3]], 2.5),
        ([[0, 1, 0, 0], [0, 1, 1, 1]], 1.75),
    ):
        loss = cross_entropy(lambda h: h, hidden, tokens, jnp.asarray(weights, jnp.float32))
        np.testing.assert_allclose(loss.sum / loss.count, mean, rtol=1e-5)


@pytest.mark.parametrize("head_trains", [True, False])
def test_no_array_over_the_vocabulary_and_prompts_cost_nothing(head_trains):
    """In the compiled gradient the largest array over V is one chunk; unwanted chunks are behind a conditional."""
    length, chunk, vocabulary = 96, 8, 1031
    args = (
        jax.ShapeDtypeStruct((vocabulary, D), jnp.float32),
        jax.ShapeDtypeStruct((2, length, D), jnp.float32),
        jax.ShapeDtypeStruct((2, length), jnp.int32),
        jax.ShapeDtypeStruct((2, length), jnp.float32),
    )

    def loss(head, hidden, tokens, weights):
        logits = lambda h: h @ head.T  # noqa: E731
        return cross_entropy(logits, hidden, tokens, weights, chunk=chunk, head_trains=head_trains).sum

    step = jax.jit(jax.grad(loss, argnums=(0, 1) if head_trains else 1))
    text = step.lower(*args).compile().as_text()
    shapes = {tuple(map(int, s.split(","))) for s in re.findall(r"f32\[([0-9,]+)\]", text) if str(vocabulary) in s}
    assert shapes, "the vocabulary axis should be visible in the compiled module"
    assert max(int(np.prod(s)) for s in shapes) <= max(2 * chunk, D) * vocabulary
    assert "conditional(" in text
