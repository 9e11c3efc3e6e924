"""Evaluations by the name of their module, as configurations give it."""

import importlib
from collections.abc import Callable
from typing import Any

from pvm_jax.evals.results import ResultError


def find_run(module: str, name: str) -> Callable[..., Any]:
    """`run` of the module that `config.evals.NAME.module` names.

    Raises:
      ResultError: there is no such module or function.
    """
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, something that it imports is not
        raise ResultError(f"config.evals.{name}.module: expected a Python module, got {module!r} ({error})") from None
    if not hasattr(found, "run"):
        raise ResultError(f"config.evals.{name}.module: expected a module with `run`, and {module!r} has none")
    return found.run
