"""transformers' side of a comparison, one sample at a time (batch 1).

Nothing here uses `pvm_jax`, so that an error in our processor cannot hide an error in our model.
"""

from pathlib import Path

import numpy as np
import torch
from hf_processor import HFProcessor


def inputs(directory: Path, sample: dict, add_generation_prompt: bool = False) -> dict[str, torch.Tensor]:
    """Keyword arguments of `Qwen3VLForConditionalGeneration` for one conversation, by its own processor."""
    made = HFProcessor(directory)(sample, add_generation_prompt)
    return {name: torch.from_numpy(value) for name, value in made.items()}


@torch.no_grad()
def logits(model, arguments: dict[str, torch.Tensor]) -> np.ndarray:
    """[T,V] fp32."""
    model.model.rope_deltas = None
    return model(**arguments).logits[0].float().numpy()


def positions(model, arguments: dict[str, torch.Tensor]) -> np.ndarray:
    """[3,T]."""
    grids = {k: arguments.get(k) for k in ("image_grid_thw", "video_grid_thw")}
    ids = arguments["input_ids"]
    return model.model.get_rope_index(ids, arguments["mm_token_type_ids"], **grids)[0][:, 0].numpy()
