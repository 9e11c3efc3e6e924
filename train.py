"""Training: one loop for every stage.

    python train.py --config=configs/sft.py:8b --workdir=DIR --config.model.path=CHECKPOINT --config.data.path=FILE

Started again with the same flags, it goes on from the workdir's latest checkpoint, exactly.

Several hosts run the same command on one shared workdir, each with

    --coordinator=HOST:PORT --num_processes=N --process_id=I       HOST is that of process 0

or, where the environment says all that (Cloud TPU, GKE, SLURM, Open MPI), with --distributed.

SIGTERM, which clouds send before they take a machine away, ends the run after the step it is in: it is saved and the
exit status is 75. Start it again to go on. A user's mistake or a full disk exits with 1 (a command line that cannot be
used: 2) and one sentence.
"""

import functools
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
from absl import flags
from flax import nnx
from ml_collections import ConfigDict, config_flags

from pvm_jax import cli, distributed
from pvm_jax.checkpoint import open_checkpoint
from pvm_jax.data.processor import Processor
from pvm_jax.data.share import Share
from pvm_jax.evals.results import versions
from pvm_jax.model_files import check_writable
from pvm_jax.sharding import local_rows, make_mesh
from pvm_jax.training.checkpoints import Checkpoints, set_aside_damaged
from pvm_jax.training.freeze import describe
from pvm_jax.training.optim import OptimizerConfig, make_optimizer, make_schedule
from pvm_jax.training.report import Reporter, due
from pvm_jax.training.setup import Blueprint, Evaluator, ModelOptions, add_lora, load_stage, total_steps
from pvm_jax.training.stage import Setup
from pvm_jax.training.step import abstract_state, compiled, init_state, make_update, put_batch
from pvm_jax.training.workdir import claim, refuse_model_directory, refuse_other_data

config_flags.DEFINE_config_file("config", None, "File with get_config(), e.g. configs/sft.py:8b.", lock_config=True)
flags.DEFINE_string("workdir", None, "Directory of checkpoints and metrics; made if it is not there.")
flags.mark_flags_as_required(["config", "workdir"])
cli.refuse_addresses("workdir")
distributed.define_flags()

PER_HOST = ("config.compilation_cache",)
"""What each host may set as it likes."""


def main(argv: list[str]) -> int:
    config = flags.FLAGS.config
    with distributed.join(**distributed.flag_values(), stops=True) as cluster:
        return train(config, Path(flags.FLAGS.workdir), cluster)


def train(config: ConfigDict, workdir: Path, cluster: distributed.Cluster) -> int:
    """Trains to the last step (returns 0), or to a SIGTERM (`distributed.PREEMPTED`)."""
    # ---- Configuration: plain values from here on ----------------------------------------------------------------
    refuse_model_directory(workdir)
    resolved: dict[str, Any] = config.to_dict()
    seed, micro_batches = config.seed, config.micro_batches
    if config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", config.compilation_cache)
    main_process = cluster.index == 0
    say = functools.partial(print, flush=True) if main_process else lambda *_: None
    say(cluster.devices())
    settings = {f"config.{key}": value for key, value in cli.leaves(resolved).items()}
    for key, value in settings.items():
        say(f"{key} = {value!r}")

    # ---- Mesh, data, model ---------------------------------------------------------------------------------------
    mesh = make_mesh(**resolved["mesh"])
    options = ModelOptions(**resolved["model"])
    source = open_checkpoint(options.path)
    model_config = add_lora(source.config, **options.lora)
    processor = Processor.from_pretrained(source.files, **resolved["processor"])
    row_multiple = mesh.shape["data"] * mesh.shape["fsdp"] * micro_batches
    share = Share(cluster.index, cluster.count, functools.partial(local_rows, mesh=mesh), cluster.exchange_of_step)
    setup = Setup(
        model_config,
        processor,
        resolved["data"],
        seed,
        row_multiple,
        config.freeze,
        share,
        workdir=workdir,
        mesh=mesh,
        micro_batches=micro_batches,
        reference=lambda: blueprint.reference(source, seed),
    )
    stage = load_stage(setup, resolved["stage"])
    blueprint = Blueprint(model_config, options, stage, config.freeze, mesh)
    partition = blueprint.partition

    # ---- Optimizer, evaluators, workdir --------------------------------------------------------------------------
    steps = total_steps(config.steps, config.epochs, stage.steps_per_epoch)
    adamw = OptimizerConfig(**resolved["optimizer"])
    schedule = make_schedule(adamw, steps)
    optimizer = make_optimizer(adamw, schedule, partition.trainable)
    evaluators = [Evaluator.make(name, processor, entry) for name, entry in resolved["evals"].items()]
    if main_process:
        check_writable(workdir)
    cluster.check_shared(workdir, distributed.PATIENCE)  # hosts read data and checkpoints at their own speed
    for warning in set_aside_damaged(workdir) if main_process else ():
        say(f"warning: {warning}")
    cluster.barrier("damaged checkpoints set aside", distributed.PATIENCE)
    checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep)
    start = checkpoints.latest() or 0
    shared = {key: value for key, value in settings.items() if key not in PER_HOST}
    cluster.agree("run", {"latest checkpoint": start} | shared | versions())
    if main_process:
        has_weights = options.init == "checkpoint"
        claim(workdir, resolved, source, model_config, processor, has_weights=has_weights, begun=start > 0)
    cluster.barrier("workdir claimed", distributed.PATIENCE)

    # ---- Parameters, in this order of precedence -----------------------------------------------------------------
    # 1. the workdir's latest checkpoint: trainable parameters, optimizer and position; frozen parameters as in 2
    # 2. config.model.path: a training workdir (what it trained over its own base), a native checkpoint, or
    #    Hugging Face weights
    #    new adapters (config.model.lora) by config.seed
    # 3. config.model.init="random": random values by config.seed
    frozen = blueprint.parameters(source, seed, partition.frozen)
    meta: dict[str, Any] = {}
    data = {"rows": dict(stage.data_rows), "steps": steps}
    if start:
        abstract = abstract_state(optimizer, {n: blueprint.abstract[n] for n in partition.trainable}, mesh)
        state, meta = checkpoints.restore(start, abstract)
        refuse_other_data(workdir, meta, data)
        say(f"resuming from step {start} of {workdir}")
    else:
        state = init_state(optimizer, blueprint.parameters(source, seed, partition.trainable), mesh)
    say(describe(state.trainable, frozen))

    # ---- The loop ------------------------------------------------------------------------------------------------
    update = compiled(make_update(stage, partition, optimizer, schedule, micro_batches), state, mesh)
    reporter = Reporter(
        workdir, start, steps, every=config.log_every, main_process=main_process, sums=meta.get("metrics")
    )

    def policy() -> nnx.Module:
        return partition.merge(state.trainable, frozen)

    with closing(stage), closing(checkpoints), closing(reporter), cluster.guard():
        if cluster.stop_after(start):
            return distributed.PREEMPTED
        for step in range(start + 1, steps + 1):
            with reporter.waiting():
                drawn = stage.next_batch(step - 1, policy)
            batch = put_batch(drawn.batch, mesh, micro_batches)
            with reporter.compiling(batch):
                state, metrics = update(state, frozen, batch)
            del batch  # what samples the next one needs its room
            reporter.step(step, drawn, metrics)

            for evaluator in evaluators:
                if due(step, evaluator.every, steps):
                    reporter.flush()
                    with reporter.paused():
                        reporter.write(step, evaluator(policy()))
            stopping = step < steps and cluster.stop_after(step)
            if stopping or due(step, config.checkpoint.every, steps):
                reporter.flush()
                checkpoints.save(step, state, {"metrics": reporter.sums(), **data})
            if stopping:
                checkpoints.wait()
                say(f"stopped by SIGTERM after step {step} of {steps}; start again to go on")
                return distributed.PREEMPTED
        checkpoints.wait()
    say(f"trained {steps} steps; the result is {workdir}")
    return 0


if __name__ == "__main__":
    cli.run(main)
