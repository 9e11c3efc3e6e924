"""The programs of a run, of shapes alone: what `train.py` would compile, without weights, data or devices."""

from collections.abc import Callable

from pvm_jax.planning import grpo, sft
from pvm_jax.planning.recipe import Recipe, Step
from pvm_jax.planning.topology import PlanError

PROGRAMS: dict[str, Callable[[Recipe], list[Step]]] = {
    "pvm_jax.training.sft": sft.programs,
    "pvm_jax.training.grpo": grpo.programs,
}
"""By `config.stage.module`; a new stage adds its own."""


def programs(recipe: Recipe) -> list[Step]:
    """The programs of a run.

    Raises:
      PlanError: the stage has not registered any.
    """
    module = recipe.config["stage"]["module"]
    if module not in PROGRAMS:
        raise PlanError(f"config.stage.module: expected one of {list(PROGRAMS)}, which have plans, got {module!r}")
    return PROGRAMS[module](recipe)
