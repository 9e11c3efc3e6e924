"""The sampler against formulas in numpy and against transformers' own logits processors."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pvm_jax.sampling import (
    GENERATED,
    IN_PROMPT,
    GenerationError,
    Sampling,
    extend_history,
    prompt_history,
    row_keys,
    sample,
)

VOCAB = 29
NO_BANS = np.zeros(VOCAB, bool)


def noise(rows: int, seed: int = 0, scale: float = 2.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal((rows, VOCAB))).astype(np.float32)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)


def run(sampling: Sampling, logits, keys=None, banned=NO_BANS, history=None):
    switches, values = sampling.split()
    keys = row_keys(list(range(len(logits))), len(logits)) if keys is None else keys
    tokens, logprobs = jax.jit(sample, static_argnames="switches")(
        jnp.asarray(logits), keys, jnp.asarray(banned), history, switches, values
    )
    return np.asarray(tokens), np.asarray(logprobs)


def draws(sampling: Sampling, logits: np.ndarray, banned=NO_BANS, history=None, count: int = 20_000):
    """How often each id is drawn for one row of logits, as frequencies."""
    if history is not None:
        history = jnp.broadcast_to(history, (count, VOCAB))
    tokens, _ = run(sampling, np.broadcast_to(logits, (count, VOCAB)), None, banned, history)
    return np.bincount(tokens, minlength=VOCAB) / count


def assert_distribution(frequencies: np.ndarray, probs: np.ndarray, count: int = 20_000) -> None:
    """Same support, and every frequency within 4.5 standard errors; the seeds are fixed, so never flaky."""
    np.testing.assert_array_equal(frequencies[probs == 0], 0)
    error = np.sqrt(probs * (1 - probs) / count)
    assert (np.abs(frequencies - probs) <= 4.5 * error + 1e-9).all()


def normalized(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum()


def test_greedy_takes_the_largest_logit_and_scores_it_at_temperature_1():
    logits = noise(5)
    tokens, logprobs = run(Sampling(), logits)
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    np.testing.assert_allclose(logprobs, log_softmax(logits).max(-1), atol=1e-6)


def test_banned_ids_are_never_chosen_and_leave_the_distribution():
    logits = noise(4)
    banned = np.zeros(VOCAB, bool)
    banned[logits.argmax(-1)] = True
    masked = np.where(banned, -np.inf, logits)
    tokens, logprobs = run(Sampling(), logits, banned=banned)
    np.testing.assert_array_equal(tokens, masked.argmax(-1))
    np.testing.assert_allclose(logprobs, log_softmax(masked).max(-1), atol=1e-6)
    assert_distribution(draws(Sampling(temperature=1.0), logits[0], banned), normalized(np.exp(log_softmax(masked[0]))))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_temperature_divides_the_logits_of_the_draw_and_of_the_log_probability(temperature):
    logits = noise(1, scale=1.0)
    expected = log_softmax(logits / temperature)
    tokens, logprobs = run(Sampling(temperature=temperature), np.repeat(logits, 64, 0))
    np.testing.assert_allclose(logprobs, expected[0, tokens], atol=2e-6)
    assert_distribution(draws(Sampling(temperature=temperature), logits[0]), np.exp(expected[0]))


@pytest.mark.parametrize("k", [1, 4, VOCAB, 1000])
def test_top_k_keeps_the_k_largest(k):
    logits = noise(1)[0]
    kept = np.argsort(-logits)[:k]
    probs = np.zeros(VOCAB)
    probs[kept] = normalized(np.exp(logits[kept]))
    assert_distribution(draws(Sampling(temperature=1.0, top_k=k), logits), probs)


def top_p_probs(probs: np.ndarray, top_p: float) -> np.ndarray:
    order = np.argsort(-probs)
    before = np.cumsum(probs[order]) - probs[order]  # mass of the more probable ones
    kept = order[before < top_p]
    out = np.zeros_like(probs)
    out[kept] = probs[kept]
    return normalized(out)


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.8, 0.999])
def test_top_p_keeps_the_fewest_tokens_that_reach_the_mass(top_p):
    logits = noise(1, seed=3)[0]
    expected = top_p_probs(np.exp(log_softmax(logits)), top_p)
    assert_distribution(draws(Sampling(temperature=1.0, top_p=top_p), logits), expected)


def test_top_p_keeps_ties_and_the_documented_example():
    logits = np.full(VOCAB, -np.inf, np.float32)
    logits[[3, 7, 11, 12]] = np.log([0.5, 0.3, 0.1, 0.1])
    kept = np.flatnonzero(draws(Sampling(temperature=1.0, top_p=0.7), logits))
    np.testing.assert_array_equal(kept, [3, 7])
    kept = np.flatnonzero(draws(Sampling(temperature=1.0, top_p=0.85), logits))
    np.testing.assert_array_equal(kept, [3, 7, 11, 12])


def test_min_p_is_relative_to_the_most_probable_token():
    logits = noise(1, seed=4)[0]
    probs = np.exp(log_softmax(logits))
    expected = normalized(np.where(probs >= 0.2 * probs.max(), probs, 0))
    assert_distribution(draws(Sampling(temperature=1.0, min_p=0.2), logits), expected)


def test_cuts_follow_each_other_as_in_transformers():
    """top-p sees the distribution renormalized over the k survivors, at the temperature asked for."""
    import torch
    from transformers.generation import logits_process as hf

    logits = noise(1, seed=5)[0]
    scores = torch.tensor(logits)[None]
    for warper in (
        hf.TemperatureLogitsWarper(1.3),
        hf.TopKLogitsWarper(12),
        hf.TopPLogitsWarper(0.85),
        hf.MinPLogitsWarper(0.1),
    ):
        scores = warper(None, scores)
    expected = scores.softmax(-1)[0].numpy()
    assert 1 < (expected > 0).sum() < 12
    sampling = Sampling(temperature=1.3, top_k=12, top_p=0.85, min_p=0.1)
    assert_distribution(draws(sampling, logits), expected.astype(np.float64))


def history_of(prompt: list[int], generated: list[int]):
    history = prompt_history(jnp.asarray([prompt]), jnp.ones((1, len(prompt)), bool), VOCAB)
    for token in generated:
        history = extend_history(history, jnp.asarray([token]))
    return history


def test_history_marks_prompt_and_generated_ids_and_skips_padding():
    tokens = jnp.asarray([[5, 6, 5, 0], [7, 0, 0, 0]])
    valid = jnp.asarray([[True, True, True, False], [True, False, False, False]])
    history = np.asarray(extend_history(prompt_history(tokens, valid, VOCAB), jnp.asarray([6, 9])))
    expected = np.zeros((2, VOCAB), int)
    expected[0, 5], expected[0, 6], expected[1, 7], expected[1, 9] = (
        IN_PROMPT,
        GENERATED,
        IN_PROMPT,
        GENERATED,
    )
    np.testing.assert_array_equal(history, expected)


def test_repetition_penalty_is_that_of_transformers_and_counts_the_prompt():
    import torch
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    logits = noise(1, seed=6)
    prompt, generated = [1, 2, 3, int(logits.argmax())], [8, 9, int(logits.argmin())]
    scores = RepetitionPenaltyLogitsProcessor(1.8)(torch.tensor([prompt + generated]), torch.tensor(logits.copy()))
    history = history_of(prompt, generated)
    sampling = Sampling(temperature=0.7, repetition_penalty=1.8)
    frequencies = draws(sampling, logits[0], history=history)
    assert_distribution(frequencies, (scores / 0.7).softmax(-1)[0].numpy().astype(np.float64))
    tokens, logprobs = run(Sampling(repetition_penalty=1.8), logits, history=history)
    assert tokens[0] == int(scores.argmax()) != int(logits.argmax())
    np.testing.assert_allclose(logprobs, log_softmax(logits)[0, tokens], atol=1e-6)  # the model's own


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_presence_penalty_counts_generated_ids_only_and_only_once(temperature):
    logits = noise(1, seed=7)[0]
    order = np.argsort(-logits)
    history = history_of([int(order[0]), int(order[1])], [int(order[1]), int(order[2]), int(order[2])])
    penalized = logits.copy()
    penalized[order[1:3]] -= 1.5
    frequencies = draws(Sampling(temperature=temperature, presence_penalty=1.5), logits, history=history)
    assert_distribution(frequencies, np.exp(log_softmax(penalized / temperature)))
    tokens, _ = run(Sampling(presence_penalty=1.5), logits[None], history=history)
    assert tokens[0] == penalized.argmax()


def test_a_draw_depends_on_its_own_key_alone():
    logits = noise(6, seed=8, scale=0.5)
    keys = row_keys(0, 6)
    sampling = Sampling(temperature=1.0, top_p=0.9)
    together, scores = run(sampling, logits, keys)
    for i in (0, 3, 5):
        alone, score = run(sampling, logits[i : i + 1], keys[i : i + 1])
        assert alone[0] == together[i]
        np.testing.assert_allclose(score[0], scores[i], atol=1e-6)
    assert len(set(map(int, run(sampling, np.repeat(logits[:1], 64, 0))[0]))) > 5


def test_numbers_do_not_recompile_and_unused_work_is_not_compiled():
    def lowered(sampling):
        switches, values = sampling.split()
        history = jnp.zeros((2, VOCAB), jnp.int8) if switches.history else None
        args = (jnp.asarray(noise(2)), row_keys(0, 2), jnp.asarray(NO_BANS), history)
        return jax.jit(sample, static_argnames="switches").lower(*args, switches, values).as_text()

    def works(text):
        """Draws random bits; calls top-k; bisects the bits of probabilities."""
        return "threefry" in text, "top_k" in text, re.search(r"bitcast_convert.*xf32>.*xi32>", text) is not None

    assert lowered(Sampling(temperature=0.5, top_p=0.5)) == lowered(Sampling(temperature=0.9, top_p=0.8))
    assert works(lowered(Sampling(top_k=5, top_p=0.5))) == (False, False, False)
    assert works(lowered(Sampling(temperature=1.0))) == (True, False, False)
    assert works(lowered(Sampling(temperature=1.0, top_k=5))) == (True, True, False)
    assert works(lowered(Sampling(temperature=1.0, top_k=5, top_p=0.5))) == (True, True, True)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("presence_penalty", float("inf")),
        ("repetition_penalty", 0.0),
    ],
)
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(GenerationError, match=rf"^{field}: expected .*, got"):
        Sampling(**{field: value})
