"""How every parameter of a released size lies on a mesh whose `fsdp` and `tensor` are split: the golden tables.

`python tests/golden/sharding.py` writes them again after an intended change; the diff shows what it does.
"""

from pathlib import Path

from flax import nnx
from jax.sharding import AbstractMesh

from pvm_jax.checkpoint import abstract_model
from pvm_jax.config import ModelConfig
from pvm_jax.presets import hf_config
from pvm_jax.sharding import MESH_AXES, param_shardings

SIZES = ("4b", "8b")
MESH = (1, 64, 4)
FOLDER = Path(__file__).parent


def table(size: str) -> str:
    """One line a parameter: path, shape, logical axes, PartitionSpec."""
    state = nnx.state(abstract_model(ModelConfig.from_hf(hf_config(size, pvm=True))))
    shardings = dict(nnx.to_flat_state(param_shardings(state, AbstractMesh(MESH, MESH_AXES))))
    lines = [f"{size}, mesh data x fsdp x tensor = {' x '.join(map(str, MESH))}"]
    for path, variable in nnx.to_flat_state(state):
        shape, axes = "x".join(map(str, variable.shape)), ",".join(variable.get_metadata("axes"))
        spec = ",".join(axis or "-" for axis in shardings[path].get_value().spec)
        lines.append(f"{'/'.join(map(str, path))}  {shape}  {axes}  {spec}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for size in SIZES:
        (FOLDER / f"sharding_{size}.txt").write_text(table(size))
