"""Topologies by name: the devices that a program is compiled for, without having any.

v5e:16x16   TPU slices: generation and shape; needs the extra `tpu` (libtpu, which installs on any Linux machine)
h100:8      CUDA GPUs: card and number, 8 a host; needs the extra `cuda12`
"""

import dataclasses
import os
import re

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh

from pvm_jax.sharding import MESH_AXES

GIB = 2**30
GPUS_PER_HOST = 8


class PlanError(ValueError):
    """A plan that cannot be made or does not fit; the message is one sentence that says what to do."""


@dataclasses.dataclass(frozen=True)
class Tpu:
    """A generation: axes of its slices, memory of a device in bytes (as the compiler counts it), clock in GHz."""

    axes: int
    memory: int
    clock: float
    example: str
    slices: tuple[str, ...]  # smallest first
    options: tuple[tuple[str, str], ...] = ()


_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
TPUS = {
    "v4": Tpu(3, int(31.75 * GIB), 1.05, "v4:4x4x4", _CUBES, (("chip_config_name", "megacore"),)),
    "v5e": Tpu(2, int(15.75 * GIB), 1.5, "v5e:16x16", _FLAT),
    "v5p": Tpu(3, int(95.74 * GIB), 1.75, "v5p:4x4x4", _CUBES),
    "v6e": Tpu(2, int(31.25 * GIB), 1.75, "v6e:8x8", _FLAT),
}

# Cards by name: what XLA must know of them (openxla/xla, backends/gpu/target_config/specs).
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: {memory} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }} registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 2 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{name}"
"""
GPUS = {
    "h100": {"memory": 84942979072, "bandwidth": 3352320000000, "name": "NVIDIA H100 80GB HBM3"},
    "h200": {"memory": 150122528768, "bandwidth": 4915200000000, "name": "NVIDIA H200"},
}
GPU_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

VALID = (
    f"{', '.join(tpu.example for tpu in TPUS.values())} (generation and the slice's shape, not v5e-256) "
    f"or {', '.join(GPUS)} with a number as in h100:8"
)


@dataclasses.dataclass(frozen=True)
class Topology:
    """A parsed name.

    Attributes:
      platform: "tpu" or "cuda".
      shape: of the slice, or (number of GPUs,).
      memory: of a device, in bytes.
      clock: GHz, or None where the compiler reports no cycles.
    """

    name: str
    platform: str
    shape: tuple[int, ...]
    slices: int
    memory: int
    clock: float | None

    @property
    def size(self) -> int:
        return int(np.prod(self.shape)) * self.slices

    def devices(self) -> list[jax.Device]:
        """Descriptions of the devices.

        Raises:
          PlanError: the compiler for this platform is not installed, or knows no such slice.
        """
        family, _, _ = self.name.partition(":")
        try:
            if self.platform == "tpu":
                return _tpu_devices(family, self.name, self.slices)
            hosts, cards = max(self.size // GPUS_PER_HOST, 1), min(self.size, GPUS_PER_HOST)
            found = topologies.get_topology_desc(
                platform="cuda",
                topology_name="",
                target_config=_HOPPER.format(**GPUS[family]),
                topology=f"1x{hosts}x{cards}",
            )
            return list(found.devices)
        except (RuntimeError, NotImplementedError, ValueError, FileNotFoundError) as error:
            extra = "tpu" if self.platform == "tpu" else "cuda12"
            said = " ".join(str(error).split()).split(" === Source")[0]
            raise PlanError(
                f"--topology={self.name}: {said[:300]}; expected one of {VALID}, and the extra installed: "
                f"pip install -e '.[{extra}]'"
            ) from None

    def mesh(self, data: int = 1, fsdp: int = -1, tensor: int = 1) -> Mesh:
        """The mesh of a run on these devices; with several slices, `data` runs over them first."""
        sizes = fill((data, fsdp, tensor), self.size)
        devices = self.devices()
        if self.slices > 1:
            if sizes[0] % self.slices:
                raise PlanError(
                    f"--num_slices={self.slices}: expected mesh.data divisible by it (only gradients cross slices), "
                    f"got {sizes[0]}; pass --config.mesh.data={self.slices}"
                )
            inner = (sizes[0] // self.slices, *sizes[1:])
            grid = mesh_utils.create_hybrid_device_mesh(
                inner, (self.slices, 1, 1), devices=devices, allow_split_physical_axes=True
            )
        elif self.platform == "tpu":
            grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        else:
            grid = np.asarray(devices).reshape(sizes)
        return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def parse(name: str, num_slices: int = 1) -> Topology:
    """A topology by name.

    Raises:
      PlanError: there is none of that name; the message lists the forms.
    """
    family, _, rest = name.partition(":")
    if family in GPUS and re.fullmatch(r"\d+", rest or "1") and int(rest or 1) in GPU_COUNTS:
        if num_slices != 1:
            raise PlanError(f"--num_slices={num_slices}: only TPUs come in slices, got --topology={name}")
        return Topology(f"{family}:{rest or 1}", "cuda", (int(rest or 1),), 1, GPUS[family]["memory"], None)
    tpu = TPUS.get(family)
    if tpu and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", rest) and rest.count("x") == tpu.axes - 1:
        if num_slices < 1:
            raise PlanError(f"--num_slices: expected at least 1, got {num_slices}")
        shape = tuple(map(int, rest.split("x")))
        return Topology(name, "tpu", shape, num_slices, tpu.memory, tpu.clock)
    raise PlanError(f"--topology={name}: no such topology; expected one of {VALID}")


def relatives(topology: Topology) -> list[Topology]:
    """Slices or numbers of cards of the same kind, smallest first."""
    family = topology.name.partition(":")[0]
    names = TPUS[family].slices if topology.platform == "tpu" else GPU_COUNTS
    return [parse(f"{family}:{name}") for name in names]


def fill(sizes: tuple[int, int, int], devices: int) -> tuple[int, int, int]:
    """Mesh sizes with -1 replaced by what is left.

    Raises:
      PlanError: they do not multiply to the number of devices.
    """
    known = int(np.prod([s for s in sizes if s != -1]))
    filled = tuple(devices // known if s == -1 else s for s in sizes)
    if sizes.count(-1) > 1 or int(np.prod(filled)) != devices:
        raise PlanError(
            f"config.mesh: expected data x fsdp x tensor = {devices} devices, got {' x '.join(map(str, sizes))}; "
            "leave one at -1 to take what is left"
        )
    return filled


def _tpu_devices(family: str, name: str, slices: int) -> list[jax.Device]:
    # libtpu would ask the metadata server of a cloud machine, and take a lock as if it owned a chip.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options = dict(TPUS[family].options)
    if slices > 1:
        options["num_slices"] = slices
    if name.endswith((":1x1", ":1x1x1")):
        options["chips_per_host_bounds"] = (1, 1, 1)
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
