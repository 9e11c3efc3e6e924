"""Which parameters train: one ordered table of (regular expression, trainable).

    PVM_ONLY = (("pvm_block/", True), ("^extra/", True), ("", False))

Names are paths such as `text/layers/8/pvm_block/gate_alpha`; the first row that is found in a name decides, and
a name that no row matches is an error. Trainable and frozen parameters then travel apart, as two flat
dictionaries: `jax.grad` sees the first one only, so frozen weights get no gradient and no optimizer state, and
nothing below the lowest trainable layer is differentiated at all.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx

from pvm_jax.checkpoint import flatten
from pvm_jax.config import ModelConfig
from pvm_jax.training.stage import TrainingError

Table = Sequence[tuple[str, bool]]
Arrays = dict[str, Any]
"""Parameters (or their gradients, shapes, shardings) by name."""


def trainable_names(names: Sequence[str], table: Table) -> tuple[str, ...]:
    """The names that train, in the order given.

    Raises:
      TrainingError: a name matches no row of the table, or nothing trains.
    """
    chosen = [name for name in names if trains(name, table)]
    if not chosen:
        raise TrainingError(
            f"config.freeze: {list(table)} leaves nothing to train; does the checkpoint have PVM? "
            "(`python -m pvm_jax.convert from_hf SRC DST --pvm_layers=...` adds it; for LoRA, configs/common.py has "
            "LORA_ONLY and PVM_AND_LORA)"
        )
    return tuple(chosen)


def trains(name: str, table: Table) -> bool:
    """Whether the parameter `name` trains; TrainingError if no row matches."""
    for pattern, trainable in table:
        if re.search(pattern, name):
            return trainable
    raise TrainingError(
        f"config.freeze: no pattern matches the parameter {name!r}; end the table with ('', False) or ('', True)"
    )


def head_trains(config: ModelConfig, table: Table) -> bool:
    """Whether the vocabulary projection trains."""
    return trains("text/embed_tokens" if config.tie_word_embeddings else "lm_head", table)


class Partition:
    """A model's parameters as two flat dictionaries of arrays, and the way back to the model."""

    def __init__(self, model: nnx.Module, table: Table):
        """`model` may be abstract (`nnx.eval_shape`)."""
        self._graph, state = nnx.split(model)
        self._variables = flatten(state)
        self._paths = {"/".join(map(str, path)): path for path, _ in nnx.to_flat_state(state)}
        self.trainable = trainable_names(tuple(self._variables), table)
        chosen = set(self.trainable)
        self.frozen = tuple(name for name in self._variables if name not in chosen)

    def split(self, model: nnx.Module) -> tuple[Arrays, Arrays]:
        """(trainable, frozen) arrays of a model of the same structure."""
        values = {name: variable[...] for name, variable in flatten(nnx.state(model)).items()}
        return {n: values[n] for n in self.trainable}, {n: values[n] for n in self.frozen}

    def merge(self, trainable: Mapping[str, Any], frozen: Mapping[str, Any]) -> nnx.Module:
        """The model that holds these arrays (or tracers)."""
        values = {**frozen, **trainable}
        pairs = [(self._paths[n], variable.replace(values[n])) for n, variable in self._variables.items()]
        return nnx.merge(self._graph, nnx.from_flat_state(pairs))


def describe(trainable: Mapping[str, Any], frozen: Mapping[str, Any]) -> str:
    """A table of modules: parameters, whether they train, dtype; then the totals.

    >>> text/layers/8/pvm_block     9,307,393  trainable  float32
    """
    rows: Counter[tuple[str, str, str]] = Counter()
    for label, arrays in (("trainable", trainable), ("frozen", frozen)):
        for name, array in arrays.items():
            rows[_module(name), label, str(array.dtype)] += array.size
    totals = {label: sum(n for (_, kind, _), n in rows.items() if kind == label) for label in ("trainable", "frozen")}
    share = totals["trainable"] / max(sum(totals.values()), 1)
    width = max(len(module) for module, _, _ in rows)
    lines = [f"{'module':<{width}}  {'parameters':>14}  {'':9}  dtype"]
    # Modules in the order of the network: numbers inside names count as numbers.
    for (module, label, dtype), count in sorted(rows.items(), key=lambda row: _natural(row[0][0])):
        lines.append(f"{module:<{width}}  {count:>14,}  {label:<9}  {dtype}")
    lines.append(f"{totals['trainable']:,} parameters train ({share:.2%}), {totals['frozen']:,} are frozen")
    return "\n".join(lines)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _module(name: str) -> str:
    """The row of the table that a parameter belongs to."""
    parts = name.split("/")
    if "pvm_block" in parts:
        return "/".join(parts[: parts.index("pvm_block") + 1])
    depth = 3 if parts[1:2] in (["layers"], ["blocks"], ["deepstack_merger_list"]) else 2
    return "/".join(parts[: max(1, min(depth, len(parts) - (depth == 3)))])
