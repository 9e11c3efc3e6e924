"""Evaluation of a checkpoint.

    python eval.py --config=configs/digits_eval.py --workdir=DIR --config.checkpoint=CHECKPOINT

CHECKPOINT is a Hugging Face directory, a native checkpoint or a training workdir. Each entry of `config.evals` names
a module with `run(evaluation, **options) -> (summary, records, text)` and perhaps `check(name, **options)`, which is
called before the model is loaded; the text is printed, and `DIR/NAME.json`
(summary, and all that decided it) and `DIR/NAME.jsonl` (one record per sample) are written. Several hosts evaluate
together with the flags of train.py; process 0 writes.
"""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import config_flags

from pvm_jax import cli, distributed
from pvm_jax.checkpoint import checksum, load_model, open_checkpoint
from pvm_jax.data.processor import Processor
from pvm_jax.evals.plugins import Evaluation, check_options, find_run
from pvm_jax.evals.results import ResultError, versions, write_results
from pvm_jax.sharding import make_mesh

config_flags.DEFINE_config_file(
    "config", None, "File with get_config(), e.g. configs/digits_eval.py.", lock_config=True
)
flags.DEFINE_string("workdir", None, "Directory of the results; made if it is not there.")
flags.mark_flags_as_required(["config", "workdir"])
cli.refuse_addresses("workdir")
distributed.define_flags()


def main(argv: list[str]) -> None:
    with distributed.join(**distributed.flag_values()) as cluster:
        evaluate(flags.FLAGS.config.to_dict(), Path(flags.FLAGS.workdir), cluster)


def evaluate(config: dict[str, Any], workdir: Path, cluster: distributed.Cluster) -> None:
    # ---- Configuration -------------------------------------------------------------------------------------------
    evaluations = {name: dict(options) for name, options in config["evals"].items()}
    runs = {name: find_run(options.pop("module", None), name) for name, options in evaluations.items()}
    for name, options in evaluations.items():
        check_options(config["evals"][name]["module"], name, options)  # before anything that takes long
    path = config["checkpoint"]
    if path is None:
        raise ResultError("config.checkpoint: expected a model directory; pass --config.checkpoint=DIR")

    # ---- Model ---------------------------------------------------------------------------------------------------
    devices = cluster.devices()
    mesh = make_mesh(**config["mesh"])
    checkpoint = open_checkpoint(path)
    found = checksum(checkpoint)  # before a run that goes on has another latest step
    cluster.agree("evaluation", {"config.checkpoint": found} | versions())
    processor = Processor.from_pretrained(checkpoint.files, **config["processor"])
    dtype = config["dtype"] or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    model = load_model(checkpoint, dtype=jnp.dtype(dtype), scan=True, mesh=mesh)

    # ---- Evaluations ---------------------------------------------------------------------------------------------
    cluster.check_shared(workdir, distributed.PATIENCE)
    main_process = cluster.index == 0
    about = {
        "checkpoint": str(path),
        "checksum": found,
        "dtype": dtype,
        "config": {key: config[key] for key in ("processor", "mesh")},
        "devices": devices,
        "versions": versions(),
    }
    for name, run in runs.items():
        evaluation = Evaluation(
            name=name,
            model=model,
            processor=processor,
            workdir=workdir,
            about=about,
            mesh=mesh,
            writes=main_process,
            barrier=functools.partial(cluster.barrier, limit=distributed.PATIENCE),
        )
        summary, records, text = run(evaluation, **evaluations[name])
        if not main_process:
            continue
        print(text)
        about_this = about | {"options": json.loads(json.dumps(evaluations[name]))}
        print(f"\nresults: {write_results(workdir, name, about_this, summary, records)}")
    cluster.barrier("results written", distributed.PATIENCE)  # who leaves waits for the others for a short time only


if __name__ == "__main__":
    cli.run(main)
