"""The batch: indices are computed here, on the host, in numpy; the device only does math."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Batch:
    """One packed batch of static shape; numpy on the host, jax on the devices (the fields are a pytree).

    B rows of T tokens hold one or more samples each; P patches a row become M = P / 4 visual tokens a row.
    A row without images has P patches of padding, so that one program serves text, images and video.

    Two samples in one row, the first with one image of 2x4 patches (2 visual tokens `v`), the second text only:

        tokens              <  v  v  >  a  b | c  d  e | 0
        segment_ids         1  1  1  1  1  1 | 2  2  2 | 0
        visual_index       -1  0  1 -1 -1 -1 |-1 -1 -1 |-1
        positions (t)       0  1  1  3  4  5 | 0  1  2 | 0     an image ends at its start + max(rows, columns)
        memory_segment_ids  1  1  0 ..                          0 = padding
        memory_index        1  2 -1 ..                          the column where that visual token stands
    """

    tokens: Any  # i32 [B,T]
    positions: Any  # i32 [3,B,T]   MRoPE (t,h,w); restart with each packed sample
    segment_ids: Any  # i32 [B,T]   0 = padding, 1.. = sample within the row
    loss_weights: Any  # f32 [B,T]  weight of this token AS A TARGET; 0 on prompts, padding, first tokens
    visual_index: Any  # i32 [B,T]  which merged visual token of this row stands here, -1 = text
    patches: Any  # f32 [B,P,C]     in merge-block order
    patch_segment_ids: Any  # i32 [B,P]  one id per image or video frame within the row, 0 = padding
    patch_coords: Any  # i32 [B,P,2]  (row, col) of the patch in its image, for the 2-D rotary embedding
    pos_index: Any  # i32 [B,P,4]   four corners in the learned position table
    pos_weight: Any  # f32 [B,P,4]  their bilinear weights; 0 on padding
    memory_segment_ids: Any  # i32 [B,M]  which sample each merged visual token belongs to, 0 = padding
    memory_index: Any  # i32 [B,M]  the column of each visual token in `tokens`, -1 = padding
    vision_masked: Any  # bool [B]  True: text does not attend to image tokens in the backbone (not in PVM)
