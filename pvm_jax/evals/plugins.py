"""Evaluations by the name of their module, as configurations give it."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from pvm_jax import cli
from pvm_jax.data.processor import Processor
from pvm_jax.evals.results import ResultError
from pvm_jax.models.qwen3_vl import Qwen3VL


def _alone(name: str) -> None:
    """The barrier of a single process."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What eval.py gives to `run(evaluation, **options) -> (summary, records, text)`.

    Attributes:
      name: of the entry of `config.evals`, and of the files that are written.
      workdir: of these files; shared by all processes.
      about: which checkpoint, in which dtype; plain JSON values.
      mesh: over which batches are spread; None: one device.
      writes: this process writes files and talks; one does.
      barrier: returns when all processes have called it with this name.
    """

    name: str
    model: Qwen3VL
    processor: Processor
    workdir: Path
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mesh: Mesh | None = None
    writes: bool = True
    barrier: Callable[[str], None] = _alone


def check_options(module: str, name: str, options: Mapping[str, Any]) -> None:
    """Has the module look at its options, if it has a function `check` for that; whatever it raises passes through."""
    check = getattr(importlib.import_module(module), "check", None)
    if check is not None:
        check(name, **options)


def find_run(module: str | None, name: str) -> Callable[..., Any]:
    """`run` of the module that `config.evals.NAME.module` names.

    Raises:
      ResultError: there is no such module or function.
    """
    if not module:
        raise ResultError(f"config.evals.{name}.module: expected the name of a Python module")
    found = cli.plug_in(module, f"config.evals.{name}.module", ResultError)
    if not hasattr(found, "run"):
        raise ResultError(f"config.evals.{name}.module: expected a module with `run`, and {module!r} has none")
    return found.run
