"""PVM-JAX: Persistent Visual Memory on Qwen3-VL.

    import pvm_jax
    model, processor = pvm_jax.load(path, dtype="float32")
    batch = processor([{"messages": [...]}])
    logits = model.logits(model(batch))
    out = pvm_jax.generate(model, processor, conversations, max_new_tokens=64, temperature=0.0)

The axis alphabet of every einsum, comment and signature:

    B batch              N query heads     V vocabulary                  E vision width
    T query length       K kv heads        P patches before the merge    M merged visual tokens = memory length
    S key/cache length   H head dim        C flattened patch             R PVM's latent width
    D text width         F mlp width       L layers stacked in a group

Logical sharding axes are words (`embed`, `heads`, `vocab`), so that the two cannot be mixed up.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from jax.sharding import Mesh

    from pvm_jax.data.processor import Processor
    from pvm_jax.generate import Generation
    from pvm_jax.models.qwen3_vl import Qwen3VL


def load(
    path: "str | Path", dtype: Any = "float32", scan: bool | None = None, mesh: "Mesh | None" = None
) -> "tuple[Qwen3VL, Processor]":
    """The model of a Hugging Face directory, a native checkpoint or a training workdir, and its processor.

    Args:
      path: the directory.
      dtype: of parameters and computation.
      scan: whether like layers are stacked and scanned; None: not on a CPU, where each layer on its own decodes
        faster, but on accelerators.
      mesh: where the parameters go, see `sharding.make_mesh`; None: the first device.

    Raises:
      CheckpointError, WeightsError, ConfigError, DataError: the directory is not a complete model; the message says
      what is expected where.
    """
    # Imported here: pvm_jax.data must be usable without jax.
    from pvm_jax.checkpoint import load_model, open_checkpoint
    from pvm_jax.data.processor import Processor

    checkpoint = open_checkpoint(path)
    processor = Processor.from_pretrained(checkpoint.files)
    return load_model(checkpoint, dtype=dtype, scan=scan, mesh=mesh), processor


def generate(model: "Qwen3VL", processor: "Processor", conversations: Any, **options: Any) -> "list[Generation]":
    """Answers to conversations; the options are those of `generate` in the module `pvm_jax.generate`.

    Once that module is imported, Python binds its name here in place of this function; it can be called likewise.
    """
    from pvm_jax.generate import generate

    return generate(model, processor, conversations, **options)
