"""What settings, prompts and completions become on the host: nothing here is drawn, and the model never runs."""

import dataclasses

import numpy as np
import pytest
from flax import nnx
from grpo_stages import LIMIT, make, write_prompts

import configs.digits_grpo
import configs.grpo
from pvm_jax.data.share import Share
from pvm_jax.decoding import Completions
from pvm_jax.grading import GradingError
from pvm_jax.training import grpo
from pvm_jax.training import rollout as rollouts
from pvm_jax.training.policy_loss import advantages, token_weights
from pvm_jax.training.policy_objective import Settings
from pvm_jax.training.rewards import Rewards
from pvm_jax.training.rollout import Shapes
from pvm_jax.training.stage import TrainingError

# Of twelve completions, four for each of three prompts; those of LIMIT tokens were cut off.
LENGTHS = np.array([3, 12, 5, 12, 1, 2, 12, 4, 6, 7, 8, 9], np.int32)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("prompts"))


def completions() -> Completions:
    tokens = np.random.default_rng(0).integers(100, 200, (12, LIMIT)).astype(np.int32)
    return Completions(tokens, -np.ones((12, LIMIT), np.float32), LENGTHS, LENGTHS < LIMIT)


@pytest.fixture
def undrawn(monkeypatch):
    """The completions that a rollout gets, and the options that they were to be drawn with."""
    made, asked = completions(), []
    monkeypatch.setattr(grpo.rollouts, "draw", lambda *_, **options: asked.append(options) or made)
    return made, asked


def begin(stage: grpo.GRPO):
    """The first step of a stage, and its rollout."""
    info = stage.next_batch(0, lambda: nnx.Linear(1, 1, rngs=nnx.Rngs(0)))
    return info, stage._now[0]


def test_settings_reach_the_rollout(small_checkpoint, prompts, undrawn):
    made, asked = undrawn
    told = {}

    def numbered(completions, prompts, completion_ids, id, solution):
        told.update(tokens=completion_ids, rows=id, messages=prompts, solutions=solution)
        return list(range(12))

    options = {"scale": "none", "loss_type": "dr_grpo", "mask_truncated": True, "temperature": 0.6,
               "sampler_weights": "split", "sampler_gap": 0.3}  # fmt: skip
    stage = make(small_checkpoint, prompts, **options)
    stage._rewards = Rewards([(numbered, 1.0)])
    info, rollout = begin(stage)
    assert {"temperature": 0.6, "max_new_tokens": LIMIT, "weights": "split"}.items() <= asked[0].items()
    np.testing.assert_allclose(rollout.advantages, advantages(np.arange(12, dtype=np.float32), 4, "none"))
    cut = LENGTHS == LIMIT
    weights, counts = token_weights(LENGTHS, cut, "dr_grpo", LIMIT)
    for got, want in ((rollout.masked, cut), (rollout.weights, weights), (rollout.counts, counts)):
        np.testing.assert_array_equal(got, want)
    assert info.bounds == {"sampler_gap": 0.3}
    assert info.metrics["truncated"] == (3, 12) and info.metrics["completion_tokens"] == (LENGTHS.sum(), 12)
    assert told["tokens"] == [made.tokens[i, :n].tolist() for i, n in enumerate(LENGTHS)]
    assert told["rows"] == [prompt.id for prompt in rollout.prompts for _ in range(4)]


def test_completions_with_advantage_0_are_kept_where_they_count(small_checkpoint, prompts, undrawn):
    """All rewards alike. A divergence teaches all the same, and bnpo divides by who is there."""
    rewards = (("grpo_rewards:same", 1.0),)
    assert len(begin(make(small_checkpoint, prompts, rewards=rewards))[0].ids) == 1
    assert len(begin(make(small_checkpoint, prompts, rewards=rewards, loss_type="bnpo"))[0].ids) == 12
    stage = make(small_checkpoint, prompts, rewards=rewards, beta=0.1)
    stage._reference = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    stage._score = lambda model, batch: np.zeros(batch.advantages.shape, np.float32)
    assert len(begin(stage)[0].ids) == 12


def test_a_rollout_goes_on_with_the_rows_it_began_with(small_checkpoint, prompts, undrawn, tmp_path):
    """Other micro-batches are fine as long as completions stand where they stood: `old` belongs to their tokens."""
    policy = lambda: nnx.Linear(1, 1, rngs=nnx.Rngs(0))  # noqa: E731

    def started(micro_batches: int) -> grpo.GRPO:
        return make(small_checkpoint, prompts, workdir=tmp_path, iterations=2, micro_batches=micro_batches)

    first = started(1)
    first._score = lambda model, batch: np.where(batch.batch.loss_weights > 0, -1, 0).astype(np.float32)
    begun = first.next_batch(0, policy)
    np.testing.assert_array_equal(started(2).next_batch(1, policy).batch.old, begun.batch.old)
    message = "this rollout was begun on another mesh or with other micro-batches, and has other rows; go on with those"
    with pytest.raises(TrainingError, match=message):
        started(3).next_batch(1, policy)
    rollout = first._now[0]
    dataclasses.replace(rollout, old=np.roll(rollout.old, 1, axis=0)).save(rollouts.file(tmp_path, 0))
    with pytest.raises(TrainingError, match=message):
        started(1).next_batch(1, policy)


def test_data_settings_reach_the_prompts(small_checkpoint, prompts):
    stage = make(small_checkpoint, prompts, data={"instruction": "Tag it.", "system": "Think."})
    for prompt in stage._draw(0)[0]:
        assert prompt.messages[0] == {"role": "system", "content": "Think."}
        assert "Tag it." in str(prompt.messages[-1]["content"])
    with pytest.raises(TrainingError, match=r"sample p\d: it needs data.patches of \d+, and the largest is 4; mend"):
        [make(small_checkpoint, prompts, data={"patches": (4,)})._draw(number) for number in range(3)]


def test_each_epoch_and_each_seed_has_its_order(small_checkpoint, prompts):
    stage = make(small_checkpoint, prompts, iterations=2)

    def order(epoch: int) -> list[str]:
        return [prompt.id for number in range(3 * epoch, 3 * epoch + 3) for prompt in stage._draw(number)[0]]

    first, second = order(0), order(1)
    assert sorted(first) == sorted(second) == [f"p{i}" for i in range(9)] and first != second
    stage._setup = dataclasses.replace(stage._setup, seed=4)
    assert sorted(order(0)) == sorted(first) and order(0) != first
    assert stage.steps_per_epoch == 6, "three rollouts of two steps"


def test_a_grader_that_is_not_there_is_said_before_anything_is_drawn(small_checkpoint, prompts, monkeypatch):
    """By the process that grades."""

    class Absent:
        def grade(self, given, gold):
            raise GradingError("no grader")

    monkeypatch.setattr("pvm_jax.training.rewards._GRADER", Absent())
    graded = {"rewards": (("grpo_rewards:even", 0.1), ("pvm_jax.training.rewards:accuracy_reward", 0.9))}
    with pytest.raises(GradingError, match="no grader"):
        make(small_checkpoint, prompts, **graded)
    make(small_checkpoint, prompts, share=Share(1, 2), **graded).close()
    make(small_checkpoint, prompts).close()  # nothing to grade


def test_what_a_rollout_asks_the_decoder_for(small_checkpoint, prompts, monkeypatch):
    """The smallest buckets; a random key for each completion; stop tokens; ids that the loss leaves out."""
    asked = {}

    def recorded(model, batch, sampling, **options):
        asked.update(options, batch=batch)
        return completions()

    monkeypatch.setattr(rollouts, "complete", recorded)
    stage = make(small_checkpoint, prompts)
    processor, encoded = stage._setup.processor, stage._draw(0)[1]
    length, patches = max(len(p.tokens) for p in encoded), max(len(p.patches) for p in encoded)
    shapes = Shapes((length - 1, length + 3, 500), (600,), (patches + 4, 400))
    model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    model.dtype = np.dtype(np.float32)
    rollouts.draw(model, processor, encoded, 4, temperature=1.0, max_new_tokens=7, shapes=shapes, key=(3, 0))
    assert (asked["batch"].tokens.shape[1], asked["batch"].patches.shape[1]) == (length + 3, patches + 4)
    assert len(set(asked["seed"])) == 12 == 4 * len(encoded)
    assert (asked["samples"], asked["max_new_tokens"], asked["compact"]) == (4, 7, True)
    assert asked["stop_token_ids"] == processor.eos_token_ids
    assert set(asked["banned_token_ids"]) == set(np.flatnonzero(stage._objective.banned))


@pytest.mark.parametrize("argument", ["2b", "4b", "8b", "4b,smoke"])
def test_configurations_are_locked_and_follow_the_paper(argument):
    config = configs.grpo.get_config(argument)
    assert config.is_locked and config.optimizer.learning_rate == 1e-6
    stage = config.to_dict()["stage"]
    assert stage.pop("module") == grpo.__name__
    settings = Settings.make(stage)
    assert (settings.loss_type, settings.epsilon, settings.epsilon_high, settings.beta) == ("dapo", 0.2, None, 0.0)
    assert [weight for _, weight in settings.rewards] == [0.1, 0.9] and settings.mask_truncated
    drawn = settings.prompts, settings.completions, settings.max_new_tokens
    assert drawn == ((2, 2, 16) if "smoke" in argument else (8, 8, 16_384))
    assert max(config.data.prompt_length) + drawn[2] <= max(config.data.length)


def test_configurations_that_there_are_not():
    with pytest.raises(ValueError, match=r"configs/grpo\.py: expected one of 2b, 4b, 8b and perhaps smoke, got '32b'"):
        configs.grpo.get_config("32b")
    with pytest.raises(ValueError, match=r"configs/digits_grpo\.py: expected no argument or smoke, got 'long'"):
        configs.digits_grpo.get_config("long")
