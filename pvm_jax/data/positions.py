"""Where tokens and patches stand: MRoPE positions, patch coordinates, corners of the learned position table.

All of it depends on the grids alone, so it is computed here, in numpy, before the jit boundary. Integers are equal to
transformers' (5.23) `get_rope_index` and `get_vision_position_ids`, the bilinear weights bit for bit to
`get_vision_interpolation_indices_and_weights` (corners aligned, fp32).
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int32


def rope_positions(spans: Sequence[int | tuple[int, int]]) -> tuple[Int32[np.ndarray, "3 T"], int]:
    """MRoPE positions (t, h, w) of one sample, and the position of whatever comes next.

    A span is a number of text tokens, or the (rows, columns) of one image or video frame in merged tokens. Text
    advances all three axes by one. An image starts at the next free position on all axes: t stays, h and w count rows
    and columns; the text behind it starts at its larger side. Frames of a video are images between timestamps.

        >>> positions, following = rope_positions([2, (2, 3), 1])
        >>> positions
        array([[0, 1, 2, 2, 2, 2, 2, 2, 5],
               [0, 1, 2, 2, 2, 3, 3, 3, 5],
               [0, 1, 2, 3, 4, 2, 3, 4, 5]], dtype=int32)
        >>> following
        6
    """
    start, parts = 0, [np.zeros((3, 0), np.int32)]
    for span in spans:
        if isinstance(span, int):
            parts.append(np.broadcast_to(start + np.arange(span, dtype=np.int32), (3, span)))
            start += span
        else:
            rows, columns = span
            h, w = np.divmod(np.arange(rows * columns, dtype=np.int32), np.int32(columns))
            parts.append(start + np.stack([np.zeros_like(h), h, w]))
            start += max(rows, columns)
    return np.concatenate(parts, axis=1).astype(np.int32), start


def patch_coords(rows: int, columns: int, merge_size: int) -> Int32[np.ndarray, "P 2"]:
    """(row, column) of every patch of a rows x columns grid, in merge-block order.

    A grid of 2 x 4 patches is two blocks side by side:

        >>> patch_coords(2, 4, merge_size=2).tolist()
        [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
    """
    m = merge_size
    raster = np.stack(np.divmod(np.arange(rows * columns, dtype=np.int32), np.int32(columns)), axis=-1)
    blocks = raster.reshape(rows // m, m, columns // m, m, 2).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(blocks.reshape(-1, 2))


def position_corners(
    coords: Int32[np.ndarray, "P 2"], rows: int, columns: int, side: int
) -> tuple[Int32[np.ndarray, "P 4"], Float32[np.ndarray, "P 4"]]:
    """Four entries of the learned side x side position table for every patch, and their bilinear weights.

    The corners of the image lie on the corners of the table. An axis with one patch lies at 0; a corner beyond the
    last entry is clamped to it and weighs 0. Three columns on a table of side 4 stand at 0, 1.5 and 3:

        >>> index, weight = position_corners(np.array([[0, 0], [0, 1], [0, 2]], np.int32), 1, 3, side=4)
        >>> index.tolist()
        [[0, 1, 4, 5], [1, 2, 5, 6], [3, 3, 7, 7]]
        >>> weight.tolist()
        [[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
    """
    row_index, row_weight = _axis_corners(coords[:, 0], rows, side)
    column_index, column_weight = _axis_corners(coords[:, 1], columns, side)
    index = row_index[:, :, None] * np.int32(side) + column_index[:, None, :]
    weight = row_weight[:, :, None] * column_weight[:, None, :]
    return index.reshape(-1, 4), weight.reshape(-1, 4)


def _axis_corners(
    at: Int32[np.ndarray, " P"], size: int, side: int
) -> tuple[Int32[np.ndarray, "P 2"], Float32[np.ndarray, "P 2"]]:
    # Multiply, then divide, all in fp32: the order decides the last bit.
    exact = at.astype(np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
    low = np.floor(exact)
    offsets = np.arange(2, dtype=np.float32)
    distance = np.abs(exact[:, None] - low[:, None] - offsets)
    index = np.clip(low[:, None] + offsets, 0, side - 1).astype(np.int32)
    return index, np.clip(np.float32(1) - distance, 0, None)
