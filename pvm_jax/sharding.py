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
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from pvm_jax.data.batch import Batch

# Axes: data (replicas), fsdp (parameters and batch split), tensor (heads and FFN width split).
MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
# Of devices, or of none: what is only traced and lowered needs none.
AnyMesh = Mesh | AbstractMesh

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
    "rank": None,
}

# Batch is defined where no jax is imported; here it becomes a pytree.
jax.tree_util.register_dataclass(Batch, [f.name for f in dataclasses.fields(Batch)], [])


class ShardingError(ValueError):
    """A parameter or batch that does not divide over the mesh; the message names it, the axis and the way out."""


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, devices: list[jax.Device] | None = None, **others: int
) -> Mesh:
    """A mesh of data x fsdp x tensor devices; -1 for one of them takes all that are left.

    Raises:
      ShardingError: the sizes do not multiply to the number of devices, or there are `others`.
    """
    if others:
        raise ShardingError(f"mesh: expected axes {', '.join(MESH_AXES)}, got {', '.join(sorted(others))} as well")
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


def mesh_of(tree: Any) -> AnyMesh | None:
    """The mesh that the arrays of a pytree lie on; None if that is a single device."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
            return sharding.mesh
    return None


def ways_of(mesh: AnyMesh | None) -> int:
    """Over how many devices the rows of a batch are spread."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def _layout(path: str, shape: tuple[int, ...], axes: tuple[str, ...], mesh: AnyMesh) -> tuple[PartitionSpec, list[str]]:
    """The layout of one parameter, and everything that is wrong with it."""
    spec: list[str | None] = []
    problems: list[str] = []
    for size, axis in zip(shape, axes, strict=True):
        target = RULES.get(axis)
        if axis not in RULES:
            problems.append(f"{path} {shape}: expected axes that sharding.RULES knows, got {axis!r}")
        elif target is not None and target not in mesh.shape:
            problems.append(f"{path} {shape}: axis {axis!r} lies on {target!r}, the mesh has {mesh.axis_names}")
            target = None
        if target is not None and mesh.shape[target] == 1:
            target = None
        if target in spec and target is not None:
            problems.append(f"{path} {shape}: two of its axes {axes} lie on mesh axis {target!r}")
            target = None  # a sharding with it twice cannot even be made
        elif target is not None and size % mesh.shape[target]:
            problems.append(
                f"{path} {shape}: axis {axis!r} of {size} does not divide over mesh.{target} = {mesh.shape[target]}; "
                f"choose a mesh.{target} that divides {size}"
            )
        spec.append(target)
    return PartitionSpec(*spec), problems


def param_shardings(state: nnx.State, mesh: AnyMesh) -> nnx.State:
    """NamedShardings for a model's parameters (values or shapes), in the same tree.

    Raises:
      ShardingError: all problems of all parameters, a line each.
    """
    problems: list[str] = []

    def one(path: tuple[Any, ...], variable: nnx.Variable) -> nnx.Variable:
        name = "/".join(map(str, path))
        spec, wrong = _layout(name, variable.shape, variable.get_metadata("axes"), mesh)
        problems.extend(wrong)
        return variable.replace(NamedSharding(mesh, spec))

    shardings = nnx.map_state(one, state)
    if problems:
        raise ShardingError("\n".join(problems))
    return shardings


def gathered(sharding: Any) -> Any:
    """How a parameter lies where `fsdp` does not split it; `data` and `tensor` stay as they are.

    What lies on no mesh, or is not split over `fsdp`, keeps its sharding.
    """
    if not isinstance(sharding, NamedSharding) or "fsdp" not in sharding.spec:
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*(None if axis == "fsdp" else axis for axis in sharding.spec)))


def batch_shardings(mesh: AnyMesh) -> Batch:
    """Rows over data and fsdp; positions have their rows on the second axis."""
    rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    fields = {f.name: rows for f in dataclasses.fields(Batch)}
    return Batch(**fields | {"positions": NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))})


def local_rows(rows: int, mesh: Mesh) -> np.ndarray:
    """Which rows of a batch of `rows` lie on the devices of this process, in ascending order.

    Two processes of four devices each and a mesh of data 4 x tensor 2: the first has rows 0 to rows / 2.
    """
    blocks, mine = _blocks(mesh)
    size = rows // blocks
    return np.concatenate([np.arange(i * size, (i + 1) * size) for i in mine])


def _blocks(mesh: Mesh) -> tuple[int, list[int]]:
    """Into how many blocks a batch's rows are split, and which of them lie (also) on devices of this process."""
    grid = mesh.devices.reshape(-1, mesh.shape["tensor"])
    here = jax.process_index()
    return len(grid), [i for i, devices in enumerate(grid) if any(d.process_index == here for d in devices)]


def shard_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Host arrays with the rows of this process (`local_rows`; of one process: all) -> arrays on the mesh.

    Raises:
      ShardingError: the number of rows does not divide over data x fsdp.
    """
    return jax.tree.map(lambda x, s: put_rows(x, s), batch, batch_shardings(mesh))


def put_rows(x: Any, sharding: NamedSharding) -> jax.Array:
    """One array of `shard_batch`; its rows stand on the axis that `sharding` splits."""
    axis = sharding.spec.index(BATCH_AXES)
    blocks, mine = _blocks(sharding.mesh)
    if x.shape[axis] % len(mine):
        raise ShardingError(
            f"batch: expected rows divisible by mesh data x fsdp = {blocks}, got "
            f"{x.shape[axis] * blocks // len(mine)}; change the number of rows"
        )
    shape = list(x.shape)
    shape[axis] = shape[axis] // len(mine) * blocks
    return jax.make_array_from_process_local_data(sharding, np.asarray(x), tuple(shape))


def take_rows(batch: Batch, rows: np.ndarray) -> Batch:
    """These rows of a batch on the host."""
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(Batch)}
    taken = {name: x[:, rows] if name == "positions" else x[rows] for name, x in fields.items()}
    return Batch(**taken)
