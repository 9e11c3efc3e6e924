"""The files of a training workdir beside its checkpoints, and the refusal of a workdir that belongs to another run.

config.json        the resolved configuration
model/             config.json (PVM's keys included), tokenizer and processor files of the model; base.json
                   {"path", "checksum"} of the checkpoint that holds the frozen weights
checkpoints/STEP/  see `checkpoints.py`
metrics.jsonl, tensorboard/
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pvm_jax.checkpoint import BASE, Checkpoint, base_record
from pvm_jax.cli import leaves
from pvm_jax.config import read_json
from pvm_jax.model_files import copy_files, new_directory, write_json
from pvm_jax.training.stage import TrainingError

# What may change between two starts of one run: where and how fast it computes, and what it reports.
FREE = ("mesh.", "checkpoint.", "evals.", "data.threads", "log_every", "compilation_cache", "distributed")


def claim(workdir: Path, config: Mapping[str, Any]) -> None:
    """Makes the workdir, or checks that it holds a run of this configuration; then writes `config.json`.

    Raises:
      TrainingError: it holds another configuration; the message says which keys differ.
    """
    file = workdir / "config.json"
    config = json.loads(json.dumps(config))  # tuples compare as the lists that JSON makes of them
    if file.exists():
        stored, given = leaves(read_json(file)), leaves(config)
        differ = [
            f"{key} (there {stored.get(key)!r}, here {given.get(key)!r})"
            for key in sorted(stored.keys() | given.keys())
            if stored.get(key) != given.get(key) and not key.startswith(FREE)
        ]
        if differ:
            raise TrainingError(
                f"{workdir} holds a run of another configuration, which differs in {'; '.join(differ)}: "
                "choose another --workdir"
            )
    workdir.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    write_json(partial, config)
    partial.replace(file)


def write_model(workdir: Path, source: Checkpoint, *, has_weights: bool) -> None:
    """Writes `workdir/model`, or checks that the weights are still those that the run began with.

    Args:
      source: the checkpoint that the run starts from.
      has_weights: False where only its config, tokenizer and processor are used.
    """
    record = base_record(source.path if has_weights else None)
    model = workdir / "model"
    if model.exists():
        before = read_json(model / BASE)
        if before.get("checksum") != record["checksum"]:
            raise TrainingError(
                f"{model / BASE}: this run began with the weights of {before.get('path')} (checksum "
                f"{before.get('checksum')}), but those of {record['path']} have {record['checksum']}: "
                "put the weights back or choose another --workdir"
            )
        return
    with new_directory(model) as partial:
        copy_files(source.files, partial)
        write_json(partial / "config.json", read_json(source.files / "config.json"))
        write_json(partial / BASE, record)
