"""Group-relative policy optimization: completions drawn from the policy, rewarded, compared within their group.

A step of the loop is one optimizer step. Every `iterations` steps there is a rollout:

    1. draw `prompts` prompts; which ones is a function of (seed, rollout) alone
    2. continue each `completions` times: one vision pass and one prefill a prompt, at `temperature`
    3. reward every completion (rewards.py), and compare it with the others of its prompt (policy_loss.advantages)
    4. pack prompts and completions into rows, as supervised fine-tuning does; the next `iterations` steps learn from
       them with the clipped loss of policy_loss.py

The distribution that is scored is the one that was sampled from: the same temperature, the same ids left out (vision
tokens and the padding of the vocabulary). `sampler_gap` is the mean distance of the two log-probabilities of a token.

Completions with advantage 0, those of groups that all got the same reward, are left out of step 4 where they change
nothing (not with `beta`, nor for bnpo). What the devices log of tokens (entropy, sampler_gap, ratios) is of the others.

Settings are those that the public PVM release resolves to (TRL's defaults where it says nothing): 8 x 8, temperature 1,
dapo, epsilon 0.2, no KL term, completions that were cut off teach nothing.

What a resumed run needs of an unfinished rollout (`iterations` above 1) is in `workdir/rollouts`.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from absl import logging
from flax import nnx

from pvm_jax.data.images import DataError
from pvm_jax.data.order import permutation
from pvm_jax.data.packing import Encoded
from pvm_jax.data.prompts import Prompt, Prompts, open_prompts, reward_columns
from pvm_jax.data.records import renaming
from pvm_jax.data.share import never
from pvm_jax.training import rollout as rollouts
from pvm_jax.training.freeze import head_trains
from pvm_jax.training.policy_loss import PolicyBatch, advantages, token_weights
from pvm_jax.training.policy_objective import PolicyObjective, Settings
from pvm_jax.training.rewards import Rewards
from pvm_jax.training.rollout import Rollout, Shapes
from pvm_jax.training.stage import Fraction, Loss, Setup, Stage, StageBatch, Stopwatch, TrainingError
from pvm_jax.training.step import put_batch

DATA_KEYS = ("layout", "instruction", "system", "split", "image_folder", "rename", "bad_rows", "threads")
SHAPE_KEYS = ("prompt_length", "length", "patches", "pack")


def make_stage(setup: Setup, **options: Any) -> Stage:
    """The stage of `config.stage.module = "pvm_jax.training.grpo"`."""
    settings = Settings.make(options)
    rewards = Rewards(settings.rewards, settings.reward_errors)
    if setup.share.index == 0:  # which alone will ask them; if it fails, `distributed.Cluster` ends the others
        rewards.check()
    data = {key: value for key, value in setup.data.items() if value is not None}
    if unknown := sorted(set(data) - {"path", *DATA_KEYS, *SHAPE_KEYS}):
        raise TrainingError(f"config.data: unknown keys {unknown}; expected some of {sorted(DATA_KEYS + SHAPE_KEYS)}")
    if missing := sorted({"path", "layout", *SHAPE_KEYS} - set(data)):
        raise TrainingError(f"config.data: expected {', '.join(missing)}; pass --config.data.{missing[0]}=...")
    for key in ("prompt_length", "length", "patches"):
        if not data[key] or not all(isinstance(n, int) and n > 0 for n in data[key]):
            raise TrainingError(f"config.data.{key}: expected whole numbers above 0, got {data[key]!r}")
    if data.get("threads", 1) < 1:
        raise TrainingError(f"config.data.threads: expected at least 1, got {data['threads']}")
    if "rename" in data:
        data["rename"] = renaming(data["rename"])
    prompts = open_prompts(data["path"], **{key: data[key] for key in DATA_KEYS if key in data})
    for reason, count in prompts.skipped.items():
        logging.warning("left out %d rows: %s, e.g. %s", count, reason, prompts.examples[reason])
    shapes = Shapes.make(data, setup.row_multiple)
    if settings.max_new_tokens >= max(shapes.lengths):
        raise TrainingError(
            f"config.stage.max_new_tokens: expected less than the largest config.data.length, {max(shapes.lengths)}, "
            f"got {settings.max_new_tokens}: a row to learn from holds a prompt and its completion"
        )
    return GRPO(setup, settings, shapes, prompts, rewards)


class GRPO:
    """Draws a rollout every `settings.iterations` steps; what is drawn is a function of (seed, step) and the policy."""

    def __init__(
        self,
        setup: Setup,
        settings: Settings,
        shapes: Shapes,
        prompts: Prompts,
        rewards: Rewards,
    ):
        if len(prompts) < settings.prompts:
            raise TrainingError(f"config.data: expected at least {settings.prompts} prompts, got {len(prompts)}")
        self._setup, self._settings, self._shapes = setup, settings, shapes
        self._prompts, self._rewards = prompts, rewards
        banned = np.zeros(setup.model_config.text.vocab_size, bool)
        banned[np.asarray(setup.processor.banned_token_ids, np.int64)] = True
        self._objective = PolicyObjective(settings, banned, head_trains(setup.model_config, setup.freeze))
        self._permutation = functools.lru_cache(2)(permutation)
        self._pool = ThreadPoolExecutor(setup.data.get("threads") or 4, "encode")
        self._reference: nnx.Module | None = None
        self._now: tuple[Rollout, StageBatch] | None = None
        self.steps_per_epoch = max(len(prompts) // settings.prompts, 1) * settings.iterations
        self.data_rows = {"prompts": len(prompts)}

    def make_extra(self, rngs: nnx.Rngs) -> nnx.Module | None:
        return self._objective.make_extra(rngs)

    def next_batch(self, step: int, policy: Callable[[], nnx.Module]) -> StageBatch:
        """The rollout's rows; the policy is asked at its first step alone, or where nothing was kept of it."""
        number, iteration = divmod(step, self._settings.iterations)
        if self._now is None or self._now[0].number != number:
            self._now = self._begin(number, policy, step)
        drawn = self._now[1]
        # What the host knows of a rollout is logged once.
        return drawn if iteration == 0 else dataclasses.replace(drawn, metrics={}, seconds={})

    def loss_fn(self, model: nnx.Module, batch: PolicyBatch) -> Loss:
        return self._objective.loss_fn(model, batch)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    # ---- A rollout -----------------------------------------------------------------------------------------------

    def _begin(self, number: int, policy: Callable[[], nnx.Module], step: int) -> tuple[Rollout, StageBatch]:
        settings, share = self._settings, self._setup.share
        resumed = step % settings.iterations > 0
        drawn, prompts = self._draw(number)
        self._check_agreement(number, drawn, prompts)
        kept = rollouts.file(self._setup.workdir, number)
        metrics: dict[str, Fraction] = {}
        watch = Stopwatch()
        if resumed:
            rollout = Rollout.load(kept, step, number, prompts)
        else:
            model = policy()
            with watch("update"):  # of the step before, which is still running
                jax.block_until_ready(nnx.state(model))
            rollout, metrics = self._draw_and_reward(number, drawn, prompts, model, watch)
        indifferent = settings.beta > 0 or settings.loss_type == "bnpo"
        batch, members, tokens = rollouts.learning_batch(rollout, self._shapes, share.rows, indifferent=indifferent)
        bare = batch
        if settings.beta > 0:
            self._reference = self._reference or self._setup.reference()
            with watch("scoring"):
                batch = dataclasses.replace(batch, reference=self._mine(self._score(self._reference, bare)))
        if settings.iterations > 1:
            if not resumed:
                with watch("scoring"):
                    rollout = dataclasses.replace(rollout, old=self._score(policy(), bare))
                if share.index == 0:
                    rollout.save(kept)
                    rollouts.forget(self._setup.workdir, settings.iterations, number)
            old = self._mine(rollout.old)
            # Rows of another number may be packed otherwise; log-probabilities then stand where nothing is learned.
            if old.shape != batch.advantages.shape or old[batch.batch.loss_weights == 0].any():
                raise TrainingError(
                    f"{kept}: this rollout was begun on another mesh or with other micro-batches, and has other rows; "
                    "go on with those of before, or start again from an older checkpoint"
                )
            batch = dataclasses.replace(batch, old=old)
        info = StageBatch(
            batch=batch,
            ids=tuple(f"{prompts[i // rollout.group].id}#{i % rollout.group}" for i in members),
            tokens=tokens,
            metrics=metrics,
            bounds={"sampler_gap": settings.sampler_gap},
            seconds=watch.seconds,
        )
        return rollout, info

    def _draw(self, number: int) -> tuple[list[Prompt], list[Encoded]]:
        """The prompts of a rollout; one that cannot be used is replaced by another that (seed, rollout) determine."""
        places = range(number * self._settings.prompts, (number + 1) * self._settings.prompts)
        chosen = list(self._pool.map(self._prompt, places))
        return [prompt for prompt, _ in chosen], [encoded for _, encoded in chosen]

    def _prompt(self, place: int) -> tuple[Prompt, Encoded]:
        size, seed = len(self._prompts), self._setup.seed
        reason = ""
        for attempt in range(16):
            index = int(self._permutation(size, seed, place // size)[place % size])
            if attempt:
                index = int(permutation(size, seed, place, attempt)[0])
            try:
                prompt = self._prompts[index]
                sample = {"id": prompt.id, "messages": prompt.messages}
                encoded = self._setup.processor.encode(sample, add_generation_prompt=True)
                problem = self._shapes.check(encoded, self._settings.max_new_tokens)
                reason = f"sample {prompt.id}: {problem}"
            except DataError as error:
                problem = reason = str(error)
            if problem is None:
                return prompt, encoded
            if self._setup.data.get("bad_rows") == "error":
                break
            logging.warning("left out: %s", reason)
        advice = "16 prompts in a row could not be used" if attempt else "or set config.data.bad_rows='skip'"
        raise TrainingError(f"{reason}; mend the row, raise the limit; {advice}")

    def _check_agreement(self, number: int, drawn: Sequence[Prompt], prompts: Sequence[Encoded]) -> None:
        """Each process reads prompts on its own; with other ones in one of them, completions would be of no prompt.

        Raises:
          TrainingError: in each of them, if they differ.
        """
        share = self._setup.share
        if share.count == 1:
            return
        mine = [len(self._prompts), [[p.id, len(e.tokens), len(e.patches)] for p, e in zip(drawn, prompts)]]
        first, *others = map(json.loads, share.exchange(2 * number, json.dumps(mine), never))
        for process, other in enumerate(others, 1):
            if other == first:
                continue
            if other[0] != first[0]:
                what = f"{other[0]} prompts can be used, and in process 0 {first[0]}"
            else:
                a, b = next(pair for pair in zip(other[1], first[1]) if pair[0] != pair[1])
                what = f"prompt {a[0]} ({a[1]} tokens, {a[2]} patches), and in process 0 {b[0]} ({b[1]}, {b[2]})"
            raise TrainingError(
                f"rollout {number}: expected the same prompts in all processes, found in process {process} {what}; "
                "see in its log what was left out, let all hosts read the same files, and start the run again"
            )

    def _draw_and_reward(
        self, number: int, drawn: Sequence[Prompt], prompts: Sequence[Encoded], model: nnx.Module, watch: Stopwatch
    ) -> tuple[Rollout, dict[str, Fraction]]:
        settings, setup = self._settings, self._setup
        group = settings.completions
        with watch("rollout"):
            made = rollouts.draw(
                model,
                setup.processor,
                prompts,
                group,
                temperature=settings.temperature,
                max_new_tokens=settings.max_new_tokens,
                shapes=self._shapes,
                key=(setup.seed, number),
                weights=settings.sampler_weights,
            )
        with watch("rewards"):
            rewards, metrics = self._reward(number, drawn, made)
        masked = ~made.stopped & settings.mask_truncated
        weights, counts = token_weights(made.lengths, masked, settings.loss_type, settings.max_new_tokens)
        by_prompt = rewards.reshape(-1, group)
        rollout = Rollout(
            number,
            prompts,
            made,
            advantages=advantages(rewards, group, settings.scale),
            masked=masked,
            weights=weights,
            counts=counts,
        )
        total = len(rewards)
        return rollout, metrics | {
            "reward": (rewards.sum(), total),
            "reward_deviation": (by_prompt.std(axis=1, ddof=1).sum(), len(by_prompt)),
            "groups_without_variance": ((np.ptp(by_prompt, axis=1) == 0).sum(), len(by_prompt)),
            "completion_tokens": (made.lengths.sum(), total),
            "truncated": ((~made.stopped).sum(), total),
        }

    def _reward(self, number: int, drawn: Sequence[Prompt], made: Any) -> tuple[np.ndarray, dict[str, Fraction]]:
        """Process 0 asks the reward functions, and tells the others: a time limit may strike in one of them alone."""
        settings, setup = self._settings, self._setup
        answer = ""
        if setup.share.index == 0:
            tokens = [made.tokens[i, :n].tolist() for i, n in enumerate(made.lengths)]
            ends = [t[:-1] if stopped else t for t, stopped in zip(tokens, made.stopped, strict=True)]
            texts = [setup.processor.decode(t) for t in ends]
            prompts = [prompt for prompt in drawn for _ in range(settings.completions)]
            scores = self._rewards(
                texts,
                reward_columns(prompts),
                ids=[prompt.id for prompt in prompts],
                prompts=[prompt.messages for prompt in prompts],
                completion_ids=tokens,
                step=number * settings.iterations,
            )
            if settings.samples and setup.workdir is not None:
                path = setup.workdir / "completions" / f"{number:08d}.jsonl"
                rollouts.write_samples(path, settings.samples, [prompt.id for prompt in prompts], texts, scores, made)
            metrics = {name: [float(s), float(n)] for name, (s, n) in scores.metrics.items()}
            answer = json.dumps([scores.total.tolist(), metrics])
        told = setup.share.exchange(2 * number + 1, answer, never)[0]  # 2 * number: `_check_agreement`
        total, metrics = json.loads(told)
        return np.asarray(total, np.float32), {name: tuple(pair) for name, pair in metrics.items()}

    # ---- Passes that are not differentiated ----------------------------------------------------------------------

    def _score(self, model: nnx.Module, batch: PolicyBatch) -> np.ndarray:
        """f32 [B,T] of all processes' rows: log-probabilities of the batch's tokens, each at its own column."""
        setup = self._setup
        graphdef, params = nnx.split(model)
        return np.asarray(self._scoring(graphdef, params, put_batch(batch, setup.mesh, setup.micro_batches)))

    @functools.cached_property
    def _scoring(self) -> Callable[..., jax.Array]:
        return self._objective.scoring(self._setup.mesh, self._setup.micro_batches)

    def _mine(self, values: np.ndarray) -> np.ndarray:
        return values[np.asarray(self._setup.share.rows(len(values)))]
