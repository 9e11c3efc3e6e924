"""The GRPO stage as `train.py` runs it, on a small model and prompts with images of different sizes."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import grpo_stages
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import training_runs
from flax import nnx
from grpo_stages import LIMIT, make
from test_multihost import Pair
from training_runs import Setting, without_speeds

from pvm_jax import decoding_weights
from pvm_jax.checkpoint import load_model, open_checkpoint
from pvm_jax.data.images import DataError
from pvm_jax.decoding import Completions
from pvm_jax.distributed import PREEMPTED
from pvm_jax.models import Qwen3VL
from pvm_jax.training import grpo
from pvm_jax.training import rollout as rollouts
from pvm_jax.training.checkpoints import complete_steps
from pvm_jax.training.losses import next_token
from pvm_jax.training.metrics import read_metrics
from pvm_jax.training.policy_loss import policy_loss
from pvm_jax.training.report import Reporter
from pvm_jax.training.rewards import Scores
from pvm_jax.training.stage import StageBatch, TrainingError

REWARDS = "--config.stage.rewards=(('grpo_rewards:even',1.0),)"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    return grpo_stages.write_prompts(tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="module")
def setting(prompts, small_checkpoint) -> Setting:
    flags = (
        "--config=configs/grpo.py:4b,smoke",
        f"--config.model.path={small_checkpoint}",
        f"--config.data.path={prompts}",
        REWARDS,
        "--config.stage.completions=4",
        f"--config.stage.max_new_tokens={LIMIT}",
        "--config.stage.mask_truncated=False",
        "--config.data.prompt_length=(112,)",
        "--config.data.length=(128,)",
        "--config.data.patches=(96,)",
        "--config.optimizer.learning_rate=0.003",
        "--config.stage.samples=3",
    )
    return Setting(prompts.parent, flags)


@pytest.fixture(scope="module")
def finished(setting, tmp_path_factory) -> Path:
    """The workdir of a run of four steps, two rollouts of two steps each."""
    workdir = tmp_path_factory.mktemp("grpo") / "run"
    with pytest.MonkeyPatch.context() as patch:
        assert training_runs.run(patch, setting, workdir, "--config.stage.iterations=2") == 0
    return workdir


# ---- A rollout ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(small_checkpoint):
    return load_model(small_checkpoint, scan=True)


def test_trainer_scores_what_the_sampler_drew(small_checkpoint, prompts, model):
    """fp32, ragged prompts with images, temperature 0.7, ids left out: the same log-probabilities within 1e-4."""
    stage = make(small_checkpoint, prompts, temperature=0.7, micro_batches=2)
    batch = stage.next_batch(0, lambda: model).batch
    learned = batch.batch.loss_weights > 0
    assert learned.sum() > 3 * LIMIT and (batch.batch.segment_ids.max(axis=1) > 1).any()  # several share a row
    scored = stage._score(model, batch)
    np.testing.assert_allclose(scored[learned], batch.sampled[learned], atol=1e-4)
    assert not batch.sampled[~learned].any() and (batch.sampled[learned] < 0).all()
    other = make(small_checkpoint, prompts, temperature=0.7)
    other._objective.banned[:] = False
    assert np.abs(other._score(model, batch)[learned] - batch.sampled[learned]).max() > 1e-3


def test_rollout_is_a_function_of_seed_and_number(small_checkpoint, prompts, model):
    first, again = (make(small_checkpoint, prompts).next_batch(1, lambda: model) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first.batch, again.batch)
    assert first.ids == again.ids and len(first.ids) == 12
    other = make(small_checkpoint, prompts).next_batch(0, lambda: model)
    assert not {i.split("#")[0] for i in other.ids} & {i.split("#")[0] for i in first.ids}  # an epoch has three


def test_rows_hold_prompt_and_completion(small_checkpoint, prompts, model):
    """Against the samples one by one: tokens, positions, advantages; each completion exactly once."""
    stage = make(small_checkpoint, prompts)
    info = stage.next_batch(0, lambda: model)
    made, batch = stage._now[0], info.batch
    members = iter([(i.split("#")[0], int(i.split("#")[1])) for i in info.ids])
    names = [p.id for p in made.prompts]
    for row, segments in enumerate(batch.batch.segment_ids):
        for segment in range(1, segments.max() + 1):
            name, k = next(members)
            i = names.index(name) * 4 + k
            columns = np.flatnonzero(segments == segment)
            prompt, n = made.prompts[i // 4], int(made.completions.lengths[i])
            want = [*prompt.tokens, *made.completions.tokens[i, :n]]
            assert batch.batch.tokens[row, columns].tolist() == want
            answer = columns[-n:]
            positions = [prompt.next_position + np.arange(n)] * 3
            np.testing.assert_array_equal(batch.batch.positions[:, row, answer], positions)
            assert set(batch.advantages[row, answer]) == {made.advantages[i]}
            assert batch.batch.loss_weights[row, columns].sum() == n
    assert next(members, None) is None
    np.testing.assert_allclose(batch.counts.sum(), made.completions.lengths.sum())
    weights = np.arange(1, 13, dtype=np.float32)  # those of `grpo` differ as well
    other, *_ = rollouts.learning_batch(dataclasses.replace(made, weights=weights), stage._shapes, range)
    assert other.batch.loss_weights.sum() == (weights * made.completions.lengths).sum()


def test_completions_that_teach_nothing_take_no_room(small_checkpoint, prompts, model):
    """Cut off: left out of the rows; the divisor of `grpo` still counts them, that of `dapo` does not."""
    cut = make(small_checkpoint, prompts, mask_truncated=True, loss_type="grpo")
    cut.next_batch(0, lambda: model)
    stopped = cut._now[0].completions.stopped
    assert 0 <= stopped.sum() < 12
    assert len(cut._now[1].ids) == max(stopped.sum(), 1)
    assert cut._now[1].batch.counts.sum() == 12
    other = make(small_checkpoint, prompts, mask_truncated=True)
    other.next_batch(0, lambda: model)
    assert other._now[1].batch.counts.sum() == (other._now[0].completions.lengths * stopped).sum()
    none = dataclasses.replace(other._now[0], masked=np.ones(12, bool), weights=np.zeros(12, np.float32),
                               counts=np.zeros(12, np.float32))  # fmt: skip
    batch, members, _ = rollouts.learning_batch(none, other._shapes, range)
    assert not batch.batch.loss_weights.any() and not batch.counts.any() and len(members) == 1


def test_prompts_that_cannot_be_used_are_replaced(small_checkpoint, prompts):
    """By others that (seed, place) determine, whatever was drawn before; the run ends where there are none."""
    lengths = {p.id: len(p.tokens) for number in range(3) for p in make(small_checkpoint, prompts)._draw(number)[1]}
    assert len(lengths) == 9
    limit = sorted(lengths.values())[5]
    small = {"prompt_length": (limit,), "bad_rows": "skip"}
    first, again = (make(small_checkpoint, prompts, data=small) for _ in range(2))
    drawn = [[prompt.id for prompt in first._draw(number)[0]] for number in range(6)]
    assert [[prompt.id for prompt in again._draw(number)[0]] for number in reversed(range(6))] == drawn[::-1]
    assert all(lengths[name] <= limit for names in drawn for name in names)
    assert len({name for names in drawn for name in names}) > 4
    none = make(small_checkpoint, prompts, data=small | {"prompt_length": (4,)})
    with pytest.raises(TrainingError, match=r"sample p\d: it needs data.prompt_length of \d+, and the largest is 4; "):
        none._draw(0)


def test_completions_with_advantage_0_take_no_room(small_checkpoint, prompts, model):
    """The middle group of three: loss and divisor are the same with it and without."""
    stage = make(small_checkpoint, prompts)
    stage.next_batch(0, lambda: model)
    values = np.arange(12, dtype=np.float32) - 5.5
    values[4:8] = 0
    rollout = dataclasses.replace(stage._now[0], advantages=values)
    few, members, _ = rollouts.learning_batch(rollout, stage._shapes, range)
    whole, everyone, _ = rollouts.learning_batch(rollout, stage._shapes, range, indifferent=True)
    assert sorted(members) == [*range(4), *range(8, 12)] and sorted(everyone) == [*range(12)]
    batches = [jax.tree.map(jnp.asarray, batch) for batch in (few, whole)]
    losses = [policy_loss(next_token(b.sampled), b, epsilon=0.2, epsilon_high=0.2) for b in batches]
    np.testing.assert_allclose(losses[0].sum, losses[1].sum, rtol=1e-6)
    assert losses[0].sum != 0 and losses[0].count == losses[1].count == rollout.completions.lengths.sum()


def parameters(directory: Path) -> dict[str, np.ndarray]:
    state = nnx.to_flat_state(nnx.state(load_model(directory, scan=True)))
    return {"/".join(map(str, path)): np.asarray(variable[...]) for path, variable in state}


# ---- A run -------------------------------------------------------------------------------------------------------


def test_metrics_and_samples(finished, small_checkpoint):
    lines = read_metrics(finished)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    both = {"loss", "clipped_low", "clipped_high", "ratio_max", "ratio_min", "sampler_gap", "entropy", "idle"}
    first = both | {"reward", "reward/even", "reward_errors/even", "truncated", "completion_tokens",
                    "groups_without_variance", "reward_deviation"}  # fmt: skip
    assert first <= set(lines[0]) and both <= set(lines[1]) and "reward" not in lines[1]
    assert all(line["sampler_gap"] < 1e-4 for line in lines)  # also where the policy has moved on since
    for line in lines[::2]:  # each rollout's first
        np.testing.assert_allclose([line["ratio_max"], line["ratio_min"]], 1, atol=1e-4)
    assert abs(lines[1]["ratio_max"] - 1) > 1e-3 and 0 < lines[0]["reward"] < 1
    assert "gate/1" in lines[0]
    samples = [json.loads(line) for line in (finished / "completions" / "00000001.jsonl").read_text().splitlines()]
    assert len(samples) == 3 and {"id", "completion", "reward", "rewards", "tokens", "stopped"} <= set(samples[0])
    assert sorted(p.name for p in (finished / "completions").iterdir()) == ["00000000.jsonl", "00000001.jsonl"]


def test_all_but_the_vision_tower_moves(finished, small_checkpoint):
    after, before = parameters(finished), parameters(small_checkpoint)
    moved = {name for name in after if (after[name] != before[name]).any()}
    assert moved == {name for name in after if not name.startswith("visual/")}


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_stopped_anywhere_it_goes_on_with_the_same_numbers(finished, setting, tmp_path, stop):
    """SIGTERM after the first step of a rollout, after its last one, and within the next."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(training_runs.ROOT))
        import train

        put, calls = train.put_batch, []

        def counted(*args):
            calls.append(0)
            if len(calls) == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return put(*args)

        patch.setattr(train, "put_batch", counted)
        assert training_runs.run(patch, setting, tmp_path / "w", "--config.stage.iterations=2") == PREEMPTED
    with pytest.MonkeyPatch.context() as patch:
        assert training_runs.run(patch, setting, tmp_path / "w", "--config.stage.iterations=2") == 0
    assert without_speeds(tmp_path / "w") == without_speeds(finished)
    assert len(list((tmp_path / "w" / "rollouts").glob("*.npz"))) <= 2


def test_drawing_completions_is_no_waiting_for_data(finished):
    """Rollouts are drawn at steps 1 and 3; that costs far more than reading two prompts."""
    lines = read_metrics(finished)
    assert ["time/rollout" in line for line in lines] == [True, False, True, False]
    for line in lines[::2]:
        assert {"time/update", "time/rewards", "time/scoring"} < set(line)
        assert line["waiting_for_data"] < sum(share for name, share in line.items() if name.startswith("time/"))


def test_killed_in_rollout_grading_and_update_it_goes_on_with_the_same_numbers(finished, setting, tmp_path):
    """kill -9 three times in the second rollout; the last time a checkpoint lies within it, so that its file is needed.

    The grading child does not outlive the run.
    """
    workdir = tmp_path / "w"
    flags = ("--config.stage.iterations=2", "--config.checkpoint.every=1")
    env = tiny.without_torch(8, training_runs.ROOT / "tests", training_runs.ROOT)
    for place in (("decode", "2", "2"), ("reward", "1", "2"), ("update", "2", "3")):
        argv = [sys.executable, "tests/dying_train.py", *place, *setting.flags, *flags, f"--workdir={workdir}"]
        done = subprocess.run(argv, cwd=training_runs.ROOT, env=env, timeout=900, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert [line["step"] for line in read_metrics(workdir)] == [1, 2, 3]
    assert max(complete_steps(workdir / "checkpoints")) == 3
    with pytest.MonkeyPatch.context() as patch:
        # The policy is no longer what drew the second rollout: only its file has it.
        patch.setattr(grpo.rollouts, "draw", lambda *_, **__: pytest.fail("drawn again"))
        assert training_runs.run(patch, setting, workdir, *flags) == 0
    assert without_speeds(workdir) == without_speeds(finished)
    child = Path(f"/proc/{(workdir / 'child').read_text()}/stat")
    assert not child.exists() or child.read_text().rpartition(")")[2].split()[0] in "ZX"


def test_missing_rollout_is_one_sentence(finished, small_checkpoint, prompts, model, tmp_path):
    stage = make(small_checkpoint, prompts, workdir=tmp_path, iterations=2)
    sentence = rf"00000001.npz: expected the completions of rollout 1, found nothing; move {tmp_path}/checkpoints/3 out"
    with pytest.raises(TrainingError, match=sentence):
        stage.next_batch(3, lambda: model)


def test_damaged_rollout_is_one_sentence(finished, small_checkpoint, prompts, model, tmp_path):
    whole = (finished / "rollouts" / "00000001.npz").read_bytes()
    stage = make(small_checkpoint, prompts, workdir=tmp_path, iterations=2)
    kept = rollouts.file(tmp_path, 1)
    kept.parent.mkdir()
    middle = len(whole) // 2
    for content in (whole[:middle], b"", whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]):
        kept.write_bytes(content)
        sentence = rf"completions of rollout 1, and the file is damaged \(.*\); move {tmp_path}/checkpoints/3 out of"
        with pytest.raises(TrainingError, match=sentence):
            stage.next_batch(3, lambda: model)


def test_a_rollout_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """A power cut may leave the name without the bytes otherwise."""
    synced, path = [], rollouts.file(tmp_path, 1)
    monkeypatch.setattr(os, "fsync", lambda file: synced.append((path.exists(), os.fstat(file).st_size)))
    numbers = np.zeros(2, np.float32)
    made = Completions(np.zeros((2, 3), np.int32), np.zeros((2, 3), np.float32), np.ones(2, np.int32), numbers > 0)
    rollouts.Rollout(1, (), made, numbers, numbers > 0, numbers, numbers, np.zeros((1, 4), np.float32)).save(path)
    assert synced == [(False, path.stat().st_size)]


def test_rollouts_that_checkpoints_lie_within_are_kept(tmp_path):
    """Two steps a rollout: step 3 lies within rollout 1, step 4 between 1 and 2, step 7 within 3."""
    for folder in ("checkpoints/3", "checkpoints/4", "checkpoints/7.orbax-checkpoint-tmp", "rollouts"):
        (tmp_path / folder).mkdir(parents=True)
    for number in range(7):
        rollouts.file(tmp_path, number).touch()
    rollouts.forget(tmp_path, 2, 6)
    # 3: the step's checkpoint is being written. 5: that of its first step may be about to be.
    assert sorted(int(path.stem) for path in (tmp_path / "rollouts").iterdir()) == [1, 3, 5, 6]


def test_matrices_are_cast_for_decoding_and_compiled_once(model):
    """Trained parameters are fp32 where the model computes in bf16; the second rollout compiles nothing."""
    half = nnx.clone(model)
    half.dtype = jnp.dtype("bfloat16")
    decoding_weights.for_decoding(half)
    compiled = decoding_weights.copied._cache_size()
    cast = decoding_weights.for_decoding(half)
    assert decoding_weights.copied._cache_size() == compiled > 0
    assert cast.text.norm[...].dtype == jnp.float32 and cast.text.embed_tokens[...].dtype == jnp.bfloat16


def test_random_key_of_a_rollout_has_its_number(small_checkpoint, prompts, model, monkeypatch):
    keys, draw = [], grpo.rollouts.draw
    monkeypatch.setattr(
        grpo.rollouts, "draw", lambda *args, key, **more: keys.append(key) or draw(*args, key=key, **more)
    )
    stage = make(small_checkpoint, prompts)
    stage.next_batch(0, lambda: model), stage.next_batch(1, lambda: model)
    assert keys == [(3, 0), (3, 1)]


def test_groups_without_variance_change_nothing(setting, small_checkpoint, tmp_path, monkeypatch):
    """All rewards alike: AdamW's momentum must not move the parameters either."""
    flags = tuple(REWARDS.replace("even", "same") if flag == REWARDS else flag for flag in setting.flags)
    training_runs.run(monkeypatch, Setting(setting.folder, flags), tmp_path / "w", "--config.steps=2")
    lines = read_metrics(tmp_path / "w")
    assert [line["idle"] for line in lines] == [1, 1] and [line["groups_without_variance"] for line in lines] == [1, 1]
    jax.tree.map(np.testing.assert_array_equal, parameters(tmp_path / "w"), parameters(small_checkpoint))


def test_reference_model(setting, tmp_path, monkeypatch):
    """At the first step the policy is the reference: no divergence; at the second it is not."""
    training_runs.run(monkeypatch, setting, tmp_path / "w", "--config.stage.beta=0.1", "--config.steps=2")
    first, second = read_metrics(tmp_path / "w")
    assert abs(first["kl"]) < 1e-6 < second["kl"]


def test_sharded_run_is_that_of_one_device(setting, tmp_path, monkeypatch):
    """Four devices, two micro-batches: losses, rewards and gradient norms of one device (fp32, 1e-4).

    Then the four devices in two processes, which agree on rewards, denominators, old and reference log-probabilities:
    the numbers of one process (1e-5), and the same sample completions, which the first process writes.
    """
    flags = ("--config.data.pack=False", "--config.stage.prompts=4", "--config.steps=3", "--config.stage.iterations=2",
             "--config.stage.beta=0.1", "--config.optimizer.learning_rate=0.001")  # fmt: skip
    training_runs.run(monkeypatch, setting, tmp_path / "one", *flags)
    more = ("--config.micro_batches=2", "--config.mesh.data=2", "--config.mesh.tensor=1")
    training_runs.run(monkeypatch, setting, tmp_path / "four", *flags, *more, devices=4)
    with Pair(tmp_path, "train.py", *setting.flags, *flags, *more, f"--workdir={tmp_path / 'pair'}") as pair:
        assert pair.statuses(timeout=900) == [0, 0], pair.log()[-3000:] + pair.log(1)[-3000:]
    one, four, two = (read_metrics(tmp_path / name) for name in ("one", "four", "pair"))
    for key in ("loss", "grad_norm", "entropy", "kl"):
        np.testing.assert_allclose([x[key] for x in four], [x[key] for x in one], rtol=1e-4, atol=1e-6, err_msg=key)
        np.testing.assert_allclose([x[key] for x in two], [x[key] for x in four], rtol=1e-5, atol=1e-7, err_msg=key)
    assert one[1]["kl"] > 1e-4
    for key in ("reward", "completion_tokens", "groups_without_variance"):
        assert [x[key] for x in two[::2]] == [x[key] for x in four[::2]] == [x[key] for x in one[::2]], key
    for name in ("00000000.jsonl", "00000001.jsonl"):
        one, two = (tmp_path / run / "completions" / name for run in ("one", "pair"))
        assert two.read_text() == one.read_text() != ""


# ---- Bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"completions": 1}, "config.stage.completions: expected at least 2, got 1"),
        ({"loss_type": "ppo"}, "config.stage.loss_type: expected one of .*, got 'ppo'"),
        ({"temperature": 0.0}, "config.stage.temperature: expected a number above 0, got 0.0; greedy completions"),
        ({"sampler_weights": "whole"}, r"sampler_weights: expected one of \['gathered', 'split'\], got 'whole'"),
        ({"top_k": 3}, r"config.stage: unknown keys \['top_k'\]"),
        ({"prompts": 10}, "config.data: expected at least 10 prompts, got 9"),
        ({"temperature": float("nan")}, "config.stage.temperature: expected a number above 0, got nan"),
        ({"max_new_tokens": None}, "config.stage.max_new_tokens: expected at least 1, got None"),
        ({"max_new_tokens": 144}, "max_new_tokens: expected less than the largest config.data.length, 144, got 144"),
        ({"epsilon": float("nan")}, "expected epsilon and epsilon_high above 0 and beta of at least 0, got nan, None"),
        ({"epsilon_high": -0.2}, "expected epsilon and epsilon_high above 0 and beta of at least 0, got 0.2, -0.2"),
        ({"beta": float("nan")}, "expected epsilon and epsilon_high above 0 and beta of at least 0, got 0.2, None and"),
        ({"rewards": (("grpo_rewards:odd", 1.0),)}, "rewards: the module 'grpo_rewards' has no function 'odd'"),
    ],
)
def test_settings_that_cannot_be(small_checkpoint, prompts, options, sentence):
    with pytest.raises(TrainingError, match=sentence):
        make(small_checkpoint, prompts, **options)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"length": ()}, r"config\.data\.length: expected whole numbers above 0, got \(\)"),
        ({"patches": (0,)}, r"config\.data\.patches: expected whole numbers above 0, got \(0,\)"),
        ({"threads": -1}, r"config\.data\.threads: expected at least 1, got -1"),
        (
            {"rename": ("question", "problem")},
            r"config\.data\.rename: expected pairs such as .* got \('question', 'prob",
        ),
    ],
)
def test_data_that_cannot_be(small_checkpoint, prompts, data, sentence):
    with pytest.raises((TrainingError, DataError), match=sentence):
        make(small_checkpoint, prompts, data=data)


def test_prompt_that_leaves_no_room(small_checkpoint, prompts, model):
    stage = make(small_checkpoint, prompts, max_new_tokens=130)
    with pytest.raises(TrainingError, match=r"sample p\d: it needs data.length of \d+, and the largest is 144; mend"):
        stage.next_batch(0, lambda: model)


@pytest.mark.parametrize("reward_errors", ["error", "zero"])
def test_reward_function_that_fails_on_a_row(small_checkpoint, prompts, model, reward_errors):
    """The run ends with the names of function and row, or the row counts as 0."""
    stage = make(small_checkpoint, prompts, rewards=(("grpo_rewards:broken", 1.0),), reward_errors=reward_errors)
    if reward_errors == "zero":
        metrics = stage.next_batch(0, lambda: model).metrics
        assert metrics["reward_errors/broken"] == (4, 12) and metrics["reward"] == (8, 12)
        assert metrics["groups_without_variance"] == (3, 3)  # the prompt's completions, and no others
    else:
        with pytest.raises(TrainingError, match=r"function broken returned nan for row p\d; expected a finite number"):
            stage.next_batch(0, lambda: model)


def test_what_a_reward_function_logs_never_replaces_the_loss(tmp_path):
    reporter = Reporter(tmp_path, 0, 1, every=1)
    drawn = StageBatch(None, ("a",), 1, metrics={"loss": (9.0, 1), "mine": (1.0, 1)})
    reporter.step(1, drawn, {"finite": (1.0, 1.0), "loss": (2.0, 1.0)})
    reporter.flush()
    reporter.close()
    assert {"loss": 2.0, "mine": 1.0}.items() <= read_metrics(tmp_path)[0].items()


def test_samples_of_any_text_and_of_what_functions_log(tmp_path):
    texts = ["\ud83d 2", "\0</answer>", "third"]
    made = Completions(np.zeros((3, 2), np.int32), np.zeros((3, 2), np.float32), np.array([2, 1, 1], np.int32),
                       np.array([True, False, True]))  # fmt: skip
    extras = {"numbers": list(np.float32([1, 2, 3])), "sets": [{1}] * 3, "short": [1], "reward": [7] * 3}
    scores = Scores(np.array([0.5, 1, 0]), {"f": np.array([0.5, np.nan, 0])}, {}, extras)
    rollouts.write_samples(tmp_path / "new" / "0.jsonl", 2, ["a", "b", "c"], texts, scores, made)
    lines = [json.loads(line) for line in (tmp_path / "new" / "0.jsonl").read_text().splitlines()]
    assert lines == [
        {"id": "a", "completion": texts[0], "tokens": 2, "stopped": True, "reward": 0.5, "rewards": {"f": 0.5},
         "numbers": 1.0, "sets": "{1}"},
        {"id": "b", "completion": texts[1], "tokens": 1, "stopped": False, "reward": 1.0, "rewards": {"f": None},
         "numbers": 2.0, "sets": "{1}"},
    ]  # fmt: skip


# ---- The sampler's copy of the policy ----------------------------------------------------------------------------


def test_decoding_reads_matrices_in_the_compute_dtype(small_checkpoint):
    """A decode step is bound by what it reads. Norms, biases and gates stay as they are: they are small, and exact."""
    model = load_model(small_checkpoint, scan=True)
    same = zip(*(jax.tree.leaves(nnx.state(m)) for m in (model, decoding_weights.for_decoding(model))))
    assert all(x is y for x, y in same), "computed in fp32"
    policy = Qwen3VL(open_checkpoint(small_checkpoint).config, rngs=nnx.Rngs(0), dtype=jax.numpy.bfloat16, scan=True)
    before, after = (nnx.to_flat_state(nnx.state(m)) for m in (policy, decoding_weights.for_decoding(policy)))
    dtypes = {"/".join(map(str, path)): variable[...].dtype.name for path, variable in after}
    exact = {name for name, dtype in dtypes.items() if dtype == "float32"}
    assert {v[...].dtype.name for _, v in before} == {"float32"} and set(dtypes.values()) == {"float32", "bfloat16"}
    assert exact == {name for name in dtypes if any(part in name for part in ("norm", "bias", "gate_alpha"))}
    assert any(name.endswith("q_proj") for name in dtypes.keys() - exact)
    for (path, old), (_, new) in zip(before, after):
        np.testing.assert_array_equal(new[...], old[...].astype(new[...].dtype), err_msg=str(path))
