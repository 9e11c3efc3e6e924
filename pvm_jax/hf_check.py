"""Logits of a Hugging Face checkpoint here and in transformers, both in fp32 on the CPU; needs torch, and memory for
eight bytes a parameter.

transformers has no PVM. A checkpoint with PVM is compared with its gates set to 0, which shows that everything
around PVM is right; PVM itself is tested against a torch reference in this project's tests.
"""

import dataclasses
import importlib.util
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from PIL import Image

from pvm_jax.checkpoint import Checkpoint, load_model
from pvm_jax.data.processor import Processor
from pvm_jax.models.qwen3_vl import Qwen3VL
from pvm_jax.sharding import make_mesh

TOLERANCE = 1e-4


class CheckError(ValueError):
    """A comparison that cannot be made; the message is one sentence."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """One case: the largest difference of two logits, and the largest logit."""

    case: str
    tokens: int
    largest: float
    scale: float

    @property
    def passed(self) -> bool:
        return bool(self.largest <= TOLERANCE * self.scale)  # False for NaN

    def __str__(self) -> str:
        return (
            f"{self.case}: {self.tokens} tokens, max abs diff {self.largest:.3g}, logits up to {self.scale:.3g}: "
            f"{'ok' if self.passed else 'DIFFERENT'}"
        )


def compare(checkpoint: Checkpoint) -> Iterator[Difference]:
    """Compares logits of a text, an image, and two images of different size with text around them.

    Args:
      checkpoint: of kind "hf", with tokenizer and processor files.

    Raises:
      CheckError: torch is not installed.
    """
    if importlib.util.find_spec("torch") is None:
        raise CheckError(
            "check: expected torch, which runs transformers' side of the comparison, but it is not installed; "
            "pip install torch"
        )
    from transformers import Qwen3VLForConditionalGeneration

    processor = Processor.from_pretrained(checkpoint.files)
    model = load_model(checkpoint, dtype="float32", scan=True, mesh=make_mesh(devices=jax.devices("cpu")[:1]))
    close_gates(model)
    theirs = Qwen3VLForConditionalGeneration.from_pretrained(checkpoint.path, dtype="float32").eval()
    for case, sample in _samples():
        ours, reference = _logits(model, processor, sample), _reference_logits(theirs, processor, sample)
        yield Difference(case, len(ours), float(np.abs(ours - reference).max()), float(np.abs(reference).max()))


def close_gates(model: Qwen3VL) -> None:
    """Sets every PVM gate to 0: the model is then the stock one."""
    for layer in model.text.layers.values():
        if hasattr(layer, "pvm_block"):
            gate = layer.pvm_block.gate_alpha
            gate[...] = jax.numpy.zeros_like(gate[...])


def _samples() -> Iterator[tuple[str, dict[str, Any]]]:
    rng = np.random.default_rng(0)

    def image(height: int, width: int) -> dict[str, Any]:
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        return {"type": "image", "image": Image.fromarray(pixels)}

    def sample(*parts: dict[str, Any]) -> dict[str, Any]:
        return {"id": "check", "messages": [{"role": "user", "content": list(parts)}]}

    def text(value: str) -> dict[str, Any]:
        return {"type": "text", "text": value}

    yield "text", sample(text("Numbers: " + " ".join(str(n) for n in rng.integers(0, 1000, 170))))
    yield "image", sample(image(90, 150), text("What is shown here?"))
    yield "two images", sample(text("First"), image(70, 200), text("and then"), image(130, 60), text("differ how?"))


def _logits(model: Qwen3VL, processor: Processor, sample: dict[str, Any]) -> np.ndarray:
    batch = processor([sample], add_generation_prompt=True)
    with jax.default_matmul_precision("highest"):
        logits = nnx.jit(lambda model, batch: model.logits(model(batch)))(model, batch)
    return np.asarray(logits)[0, batch.segment_ids[0] > 0]


def _reference_logits(model: Any, processor: Processor, sample: dict[str, Any]) -> np.ndarray:
    """transformers' logits for our token ids and patches; it finds positions and corners by itself."""
    import torch

    encoded = processor.encode(sample, add_generation_prompt=True)
    ids = torch.from_numpy(encoded.tokens[None].astype(np.int64))
    arguments = {"input_ids": ids, "mm_token_type_ids": (ids == processor.config.image_token_id).int()}
    if len(encoded.patches):
        coords = [encoded.patch_coords[encoded.patch_segment == i] for i in np.unique(encoded.patch_segment)]
        arguments["image_grid_thw"] = torch.tensor([[1, *(c.max(axis=0) + 1)] for c in coords])
        arguments["pixel_values"] = torch.from_numpy(encoded.patches)
    with torch.no_grad():
        return model(**arguments, attention_mask=torch.ones_like(ids)).logits[0].float().numpy()
