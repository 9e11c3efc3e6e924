"""The files of a training workdir beside its checkpoints, and the refusal of a workdir that belongs to another run.

config.json        the resolved configuration
model/             config.json (PVM's keys included), tokenizer and processor files of the model; base.json
                   {"path", "checksum"} of the checkpoint that holds the frozen weights
checkpoints/STEP/  see `checkpoints.py`
metrics.jsonl, tensorboard/
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pvm_jax.checkpoint import BASE, PARAMS, Checkpoint, base_record
from pvm_jax.cli import leaves
from pvm_jax.config import ModelConfig, read_json
from pvm_jax.data.processor import Processor, write_limits
from pvm_jax.lora import with_lora
from pvm_jax.model_files import copy_files, new_directory, write_json
from pvm_jax.training.stage import TrainingError

# What may change between two starts of one run: where and how fast it computes, and what it reports. As with the mesh,
# numbers then differ by rounding, with `stage.sampler_weights` those of the model that draws completions.
FREE = (
    "mesh.",
    "model.remat",
    "model.attention",
    "checkpoint.",
    "evals.",
    "data.threads",
    "stage.sampler_weights",
    "log_every",
    "compilation_cache",
)

# Stages whose loss is a sum over the step, whatever its micro-batches (GRPO's but for "bnpo"): these are free, too. As
# with the mesh, rows are then a multiple of another number, by which samples may be packed otherwise; which samples a
# step has, and what each of them weighs, does not change.
SUMMED = ("pvm_jax.training.sft", "pvm_jax.training.grpo")

# What runs did before these keys existed (regular expression of the whole key, value); of any other key: None.
BEFORE = (
    (r"data\.position_shift", 0),
    (r"model\.lora\.rank", 0),
    (r"model\.lora\.targets", "proj"),
)


def claim(
    workdir: Path,
    config: Mapping[str, Any],
    source: Checkpoint,
    model_config: ModelConfig,
    processor: Processor,
    *,
    has_weights: bool,
    begun: bool,
) -> None:
    """Writes `config.json` and `model/`, or checks that they are those of this run.

    Args:
      config: the resolved configuration.
      source: the checkpoint that the run starts from.
      model_config: its configuration, with the adapters that the run adds.
      processor: the run's; where `config.processor` changes its pixel limits, the model is kept with the new ones.
      has_weights: False where only its config, tokenizer and processor are used.
      begun: the workdir has a checkpoint. Without one there is nothing to protect, and a run that failed to start
        may be started again with other settings.

    Raises:
      TrainingError: it holds a run of another configuration (the message says which keys differ), or the weights
        are no longer those that the run began with.
    """
    config = json.loads(json.dumps(config))  # tuples compare as the lists that JSON makes of them
    record = base_record(source.path if has_weights else None)
    model = workdir / "model"
    if begun:
        refuse_other_configuration(workdir, config)
        before = read_json(model / BASE)
        if before.get("checksum") != record["checksum"]:
            raise TrainingError(
                f"{model / BASE}: this run began with the weights of {before.get('path')} (checksum "
                f"{before.get('checksum')}), but those of {record['path']} have {record['checksum']}: "
                "put the weights back or choose another --workdir"
            )
    workdir.mkdir(parents=True, exist_ok=True)
    partial = workdir / "config.json.partial"
    write_json(partial, config)
    partial.replace(workdir / "config.json")
    if begun:
        return
    if (model / BASE).exists():
        shutil.rmtree(model)
    with new_directory(model) as partial:
        copy_files(source.files, partial)
        write_json(partial / "config.json", with_lora(read_json(source.files / "config.json"), model_config.lora))
        write_json(partial / BASE, record)
        if any(config["processor"].values()):
            write_limits(partial, processor)


def refuse_model_directory(workdir: Path) -> None:
    """TrainingError if `workdir` is a model of another kind than a training workdir: its config.json would be lost."""
    if not (workdir / "config.json").is_file() or (workdir / "model" / BASE).is_file():
        return
    if (workdir / PARAMS).is_dir() or any(workdir.glob("*.safetensors")):
        raise TrainingError(
            f"--workdir={workdir}: expected the directory of a run, found a model; choose another --workdir, and pass "
            f"--config.model.path={workdir} to start from that model"
        )


def refuse_other_configuration(workdir: Path, config: Mapping[str, Any]) -> None:
    """TrainingError if the run in `workdir` has another configuration than `config`, as JSON holds it."""
    stored, given = leaves(read_json(workdir / "config.json")), leaves(config)
    there, here = ({key: _value(flat, key) for key in stored.keys() | given.keys()} for flat in (stored, given))
    summed = stored.get("stage.module") in SUMMED and stored.get("stage.loss_type") != "bnpo"
    free = (*FREE, "micro_batches") if summed else FREE
    differ = [
        f"{key} (there {there[key]!r}, here {here[key]!r})"
        for key in sorted(there)
        if there[key] != here[key] and not key.startswith(free)
    ]
    if differ:
        raise TrainingError(
            f"{workdir} holds a run of another configuration, which differs in {'; '.join(differ)}: "
            "choose another --workdir"
        )


def refuse_other_data(workdir: Path, meta: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """TrainingError if the run in `workdir` read other data.

    Args:
      meta: of its checkpoint. Those of before have nothing to compare with.
      data: "rows" of each data set and "steps" of the run, as they are now.
    """
    there, here = (leaves({key: held[key] for key in data if key in held}) for held in (meta, data))
    differ = [
        f"{key} (there {there[key]}, here {here.get(key)})" for key in sorted(there) if there[key] != here.get(key)
    ]
    if differ:
        raise TrainingError(
            f"{workdir} holds a run on other data, which differs in {'; '.join(differ)}: samples would not come in the "
            "order in which they began; put the data back or choose another --workdir"
        )


def _value(flat: Mapping[str, Any], key: str) -> Any:
    """Of a key that a configuration need not have, see `BEFORE`."""
    return flat[key] if key in flat else next((value for pattern, value in BEFORE if re.fullmatch(pattern, key)), None)
