"""`config.json` of the released Qwen3-VL sizes under the names that the tests use."""

from typing import Any

from pvm_jax import presets

PVM_LAYERS = {size.upper(): list(layers) for size, layers in presets.PVM_LAYERS.items()}


def hf_config(size: str, pvm: bool = False) -> dict[str, Any]:
    """As `presets.hf_config`; the memory mask is the release's, whose files do not have the key."""
    config = presets.hf_config(size.lower(), pvm)
    config["text_config"].pop("pvm_memory_mask", None)
    return config
