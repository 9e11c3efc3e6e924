"""Layers stored in stacked groups: one module whose parameters have a leading axis of L layers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
from flax import nnx

Carry = TypeVar("Carry")


def group_name(layers: Sequence[int]) -> str:
    """The key of a group of consecutive layers: "8" or "9-15"."""
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"


def group_layers(name: str) -> range:
    """The layers of a group, from its key: the inverse of `group_name`."""
    first, _, last = name.partition("-")
    return range(int(first), int(last or first) + 1)


def in_order(groups: Mapping[str, nnx.Module]) -> list[tuple[str, nnx.Module]]:
    """The groups from the first layer to the last. NNX sorts keys as text, "16" before "8"; so never iterate them."""
    return sorted(groups.items(), key=lambda item: group_layers(item[0]).start)


def unstack(stacked: nnx.Module) -> nnx.Module:
    """The layer of a group of one."""
    graphdef, params = nnx.split(stacked)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x.squeeze(0), params))


def scan_layers(
    stacked: nnx.Module,
    apply: Callable[[Any, Carry, Any], tuple[Carry, Any]],
    carry: Carry,
    per_layer: Any = None,
    *,
    remat: bool = False,
) -> tuple[Carry, Any]:
    """Runs `carry, kept[i] = apply(layer, carry, per_layer[i])` over the L layers of a group.

    A group of one layer is not a loop: taking layer 0 of a stack of one is free, while XLA:CPU copies what a loop
    slices out of a stack. `remat` keeps only the carries for the backward pass.
    """
    graphdef, params = nnx.split(stacked)

    def body(carry, inputs):
        params, extra = inputs
        return apply(nnx.merge(graphdef, params), carry, extra)

    alone = jax.tree.leaves(params)[0].shape[0] == 1
    if remat:
        # Outside of a loop the compiler could merge the second computation with the first, or begin it early.
        body = jax.checkpoint(body, prevent_cse=alone)
    if alone:
        carry, kept = body(carry, jax.tree.map(lambda x: x.squeeze(0), (params, per_layer)))
        return carry, jax.tree.map(lambda x: x[None], kept)
    return jax.lax.scan(body, carry, (params, per_layer))
