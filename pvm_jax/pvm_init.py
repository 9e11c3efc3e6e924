"""Initial values of PVM in a checkpoint that has none, and the refusal of values that cannot train.

A tensor's values are a function of (seed, layer, name, shape) alone, so that the order in which a converter streams
tensors, and which other layers have PVM, do not matter.

    gate_alpha                 0
    norm scales                1
    output_expander, slots     N(0, 0.02)
    other projections          `normal`: N(0, 0.02), the public release's; `fan_in`: N(0, 1 / sqrt(inputs)), ours

`fan_in` is an addition of this project: 0.02 is about 1 / sqrt(inputs) at the release's widths and many times too small
for a narrow model. The expander keeps 0.02 in both: the weight-free norm behind it makes its scale irrelevant.
"""

import math
import zlib

import numpy as np

METHODS = ("normal", "fan_in")
STD = 0.02
# Trained gates are of order 1. Memory that nothing was written to has shown 6e13 and 1e36.
LARGEST_GATE = 1e3


def initial(seed: int, layer: int, name: str, shape: tuple[int, ...], method: str) -> np.ndarray:
    """Initial fp32 values of `name` (as in "cross_attn.q_proj.weight") in the PVM block of `layer`.

    Args:
      shape: Hugging Face's, outputs first and inputs last.
      method: one of `METHODS`.
    """
    leaf = name.removesuffix(".weight")
    if leaf == "gate_alpha":
        return np.zeros(shape, np.float32)
    if leaf.endswith("norm"):
        return np.ones(shape, np.float32)
    std = STD if method == "normal" or leaf in ("output_expander", "slots") else 1 / math.sqrt(shape[-1])
    rng = np.random.default_rng([seed, layer, zlib.crc32(name.encode())])
    return rng.standard_normal(shape, np.float32) * np.float32(std)


def problems(where: str, gate: np.ndarray, expander_is_zero: bool) -> list[str]:
    """Why a PVM block with this gate and expander cannot be used; empty if it can.

    Args:
      where: the block, as in "model.safetensors: model.language_model.layers.8.pvm_block".
      gate: `gate_alpha`.
      expander_is_zero: whether every element of `output_expander` is 0.
    """
    value = float(np.asarray(gate, np.float32).ravel()[0])
    if not math.isfinite(value) or abs(value) > LARGEST_GATE:
        return [
            f"{where}.gate_alpha: expected a finite gate of at most {LARGEST_GATE:g}, got {value:g}, which is what "
            "memory looks like that was never written (the public release leaves it so when it loads a stock "
            "Qwen3-VL); convert the stock checkpoint with --pvm_layers instead"
        ]
    if value == 0 and expander_is_zero:
        return [
            f"{where}: expected gate_alpha or output_expander to be different from 0, got 0 in both, and such a "
            "block can never train: the gradient of each is a product with the other, 0 * 0; keep the gate at 0 "
            "and draw the expander from N(0, 0.02)"
        ]
    return []
