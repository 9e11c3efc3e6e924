"""Meshes and one table from logical axis names to mesh axes.

Every parameter names its logical axes where it is declared (`layers.Make`); everything about how it lies on the
devices follows from `RULES`. A single device is a mesh of one.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pvm_jax.data.batch import Batch

# Axes: data (replicas), fsdp (parameters and batch split), tensor (heads and FFN width split).
MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Logical axis -> mesh axis. Latent axes of PVM are small (4 query heads on 1 KV head): replicated over `tensor`.
RULES: Mapping[str, str | None] = {
    "embed": "fsdp",
    "vision_embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "head_dim": None,
    "layers": None,
    "qkv": None,
    "latent": None,
    "latent_heads": None,
    "latent_mlp": None,  # 1,945 wide at 4B
    "memory": None,
    "gate": None,
    "patch": None,
    "position": None,
    "vision_merged": None,
}

# Batch is defined where no jax is imported; here it becomes a pytree.
jax.tree_util.register_dataclass(Batch, [f.name for f in dataclasses.fields(Batch)], [])


class ShardingError(ValueError):
    """A parameter or batch that does not divide over the mesh; the message names it, the axis and the way out."""


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of data x fsdp x tensor devices; -1 for one of them takes all that are left.

    Raises:
      ShardingError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise ShardingError(f"mesh: expected positive sizes and at most one -1, got data x fsdp x tensor = {sizes}")
    if -1 in sizes:
        known = -int(np.prod(sizes))
        sizes[sizes.index(-1)] = len(devices) // known if len(devices) % known == 0 else 0
    if np.prod(sizes) != len(devices):
        raise ShardingError(
            f"mesh: expected data x fsdp x tensor to use all {len(devices)} devices, got {data} x {fsdp} x {tensor}; "
            "set one of mesh.data, mesh.fsdp, mesh.tensor to -1 to take what is left"
        )
    return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES)


def partition_spec(path: str, shape: tuple[int, ...], axes: tuple[str, ...], mesh: Mesh) -> PartitionSpec:
    """The layout of one parameter.

    Raises:
      ShardingError: two of its axes want the same mesh axis, or a dimension does not divide.
    """
    spec: list[str | None] = []
    for size, axis in zip(shape, axes, strict=True):
        target = RULES[axis]
        if target is not None and mesh.shape[target] == 1:
            target = None
        if target in spec and target is not None:
            raise ShardingError(f"{path} {shape}: two of its axes {axes} lie on mesh axis {target!r}")
        if target is not None and size % mesh.shape[target]:
            raise ShardingError(
                f"{path} {shape}: axis {axis!r} of {size} does not divide over mesh.{target} = {mesh.shape[target]}; "
                f"choose a mesh.{target} that divides {size}"
            )
        spec.append(target)
    return PartitionSpec(*spec)


def param_shardings(state: nnx.State, mesh: Mesh) -> nnx.State:
    """NamedShardings for a model's parameters (values or shapes), in the same tree."""

    def one(path: tuple[Any, ...], variable: nnx.Variable) -> nnx.Variable:
        name = "/".join(map(str, path))
        spec = partition_spec(name, variable.shape, variable.get_metadata("axes"), mesh)
        return variable.replace(NamedSharding(mesh, spec))

    return nnx.map_state(one, state)


def batch_shardings(mesh: Mesh) -> Batch:
    """Rows over data and fsdp; positions have their rows on the second axis."""
    rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    fields = {f.name: rows for f in dataclasses.fields(Batch)}
    return Batch(**fields | {"positions": NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))})


def shard_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Host arrays -> arrays on the mesh.

    Raises:
      ShardingError: the number of rows does not divide over data x fsdp.
    """
    rows, ways = batch.tokens.shape[0], mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % ways:
        raise ShardingError(
            f"batch: expected rows divisible by mesh data x fsdp = {ways}, got {rows}; change the number of rows"
        )
    return jax.tree.map(jax.device_put, batch, batch_shardings(mesh))
