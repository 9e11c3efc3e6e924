"""transformers' side of a comparison: inputs of one sample made by its tokenizer and PIL image processor.

Nothing here uses `pvm_jax`, so that an error in our processor cannot hide an error in our model.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

MERGE = 2


def inputs(directory: Path, sample: dict, add_generation_prompt: bool = False) -> dict[str, torch.Tensor]:
    """Keyword arguments of `Qwen3VLForConditionalGeneration` for one conversation, batch 1.

    Videos are lists of frames whose sizes need no resizing (multiples of 32, within the pixel limits), since
    transformers' video processor needs torchvision.
    """
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(directory)
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(directory)
    rendered = tokenizer.apply_chat_template(
        sample["messages"], tokenize=False, add_generation_prompt=add_generation_prompt
    )
    result: dict[str, Any] = {}
    images, videos = _media(sample["messages"])
    if images:
        out = image_processor(images, return_tensors="pt")
        result |= {"pixel_values": out["pixel_values"], "image_grid_thw": out["image_grid_thw"]}
        rendered = _expand(rendered, "<|image_pad|>", [_pads("<|image_pad|>", g) for g in out["image_grid_thw"]])
    if videos:
        pixels, grids = zip(*(_video_patches(frames) for frames, _ in videos))
        blocks = [_video_block(g, fps, len(frames)) for g, (frames, fps) in zip(grids, videos)]
        rendered = _expand(rendered, "<|video_pad|>", blocks)
        result |= {"pixel_values_videos": torch.cat(pixels), "video_grid_thw": torch.stack(grids)}
    ids = tokenizer(rendered, return_tensors="pt")["input_ids"]
    image_id, video_id = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    types = (ids == image_id).int() + 2 * (ids == video_id).int()
    return result | {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types}


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


def _media(messages: list[dict]) -> tuple[list, list]:
    parts = [p for m in messages if not isinstance(m["content"], str) for p in m["content"]]
    images = [p["image"] for p in parts if p["type"] == "image"]
    return images, [(p["video"], p["fps"]) for p in parts if p["type"] == "video"]


def _expand(rendered: str, pad: str, blocks: list[str]) -> str:
    """Replaces the i-th `pad` by `blocks[i]`."""
    first, *rest = rendered.split(pad)
    assert len(rest) == len(blocks)
    return first + "".join(block + after for block, after in zip(blocks, rest))


def _pads(pad: str, grid) -> str:
    return pad * int(grid[1] * grid[2] // MERGE**2)


def _video_block(grid, fps: float, frames: int) -> str:
    """`<0.2 seconds><|vision_start|>...<|vision_end|>` for each pair of frames; an odd last one pairs with itself."""
    index = list(range(frames)) + [frames - 1] * (frames % 2)
    seconds = [(a + b) / 2 / fps for a, b in zip(index[::2], index[1::2])]
    pads = _pads("<|video_pad|>", grid)
    return "".join(f"<{s:.1f} seconds><|vision_start|>{pads}<|vision_end|>" for s in seconds)


def _video_patches(frames: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches [P,C] in merge-block order and the grid (t, h, w)."""
    frames = frames + frames[-1:] * (len(frames) % 2)
    video = torch.from_numpy(np.stack([np.asarray(f) for f in frames])).float() / 255
    t, h, w = video.shape[0] // 2, video.shape[1] // 16, video.shape[2] // 16
    x = ((video - 0.5) / 0.5).reshape(t, 2, h // MERGE, MERGE, 16, w // MERGE, MERGE, 16, 3)
    # axes: t, pair, block row, row in block, pixel row, block column, column in block, pixel column, C
    x = x.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, -1)
    return x, torch.tensor([t, h, w])
