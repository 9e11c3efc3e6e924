"""Which part of which picture a token looks at: by self-attention, and by PVM's retrieval.

Visual tokens stand in the text row by row of their picture's grid, one for each 32 x 32 pixels of the picture as it was
scaled for the model (both axes on their own, to multiples of 32). Divided evenly, the grid therefore covers the picture
as it came:

    a picture of 90 x 60 pixels, scaled to 96 x 64, has a grid of 2 rows and 3 columns;
    its visual token 4 is row 1, column 1: pixels 30 to 60 across, 30 to 60 down

A video has one grid for every two frames, and the two share its visual tokens.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pvm_jax.analysis.results import AnalysisError, Picture
from pvm_jax.data.images import open_image
from pvm_jax.data.packing import PATCHES_PER_TOKEN, Encoded
from pvm_jax.data.processor import Processor
from pvm_jax.data.video import read_frames

MERGE = round(PATCHES_PER_TOKEN**0.5)


def attention_maps(
    weights: Float[Array, "B Q N S"], memory_index: Int[Array, "B M"], heads: bool
) -> dict[str, Float[Array, "B Q ..."]]:
    """Self-attention's weights on each visual token: mean over heads [B,Q,M], with `heads` each one's [B,Q,N,M]."""
    at = jnp.maximum(memory_index, 0)[:, None, None, :]
    on = jnp.where((memory_index >= 0)[:, None, None, :], jnp.take_along_axis(weights, at, axis=-1), 0)
    return {"attention": on.mean(axis=2)} | ({"attention_heads": on} if heads else {})


def pictures(processor: Processor, sample: Mapping[str, Any], encoded: Encoded) -> tuple[Picture, ...]:
    """The images and frames of a sample, in the order of its visual tokens.

    Raises:
      DataError: one of them cannot be read.
    """
    shown = []
    for label, frame in _frames(processor, sample):
        segment = encoded.patch_coords[encoded.patch_segment == len(shown) + 1]
        rows, columns = (int(n) // MERGE for n in segment.max(axis=0) + 1)
        shown.append(Picture(label, frame, rows, columns, shown[-1].stop if shown else 0))
    return tuple(shown)


def _frames(processor: Processor, sample: Mapping[str, Any]):
    """(label, frame) of every picture; of each temporal patch of a video its first."""
    counts = {"image": 0, "video": 0}
    for i, message in enumerate(sample["messages"]):
        for j, part in enumerate(message["content"] if not isinstance(message["content"], str) else ()):
            where = f"sample {sample.get('id', '?')}: messages[{i}].content[{j}]"
            if part["type"] in counts:
                counts[part["type"]] += 1
            if part["type"] == "image":
                yield f"image {counts['image']}", open_image(part["image"], where)
            elif part["type"] == "video":
                frames, indices, rate = read_frames(part["video"], processor.video, part.get("fps"), where)
                size = processor.video.pixels.temporal_patch_size
                for first in range(0, len(frames), size):
                    these = [min(k, len(frames) - 1) for k in range(first, first + size)]
                    begin, end = (indices[k] / rate for k in (these[0], these[-1]))
                    label = f"video {counts['video']}, {begin:.1f}-{end:.1f} s"
                    yield label, frames[these[0]]


def rectangle(picture: Picture, token: int) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a visual token (0 .. M-1), in pixels of the picture.

    Raises:
      AnalysisError: the token belongs to another picture.
    """
    if not picture.start <= token < picture.stop:
        raise AnalysisError(
            f"{picture.label}: expected one of its visual tokens {picture.start} to {picture.stop - 1}, got {token}"
        )
    row, column = divmod(token - picture.start, picture.columns)
    width, height = (side / parts for side, parts in zip(picture.pixels.size, (picture.columns, picture.rows)))
    return column * width, row * height, (column + 1) * width, (row + 1) * height


def heat(picture: Picture, weights: Float[np.ndarray, "*lead M"]) -> Float[np.ndarray, "*lead rows columns"]:
    """The part of a map over all visual tokens (a row of `results.Maps`) that is this picture's, as its grid."""
    return weights[..., picture.start : picture.stop].reshape(*weights.shape[:-1], picture.rows, picture.columns)
