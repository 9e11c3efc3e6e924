"""The model that both sides run, and their inputs: random weights, random images, random text.

Nothing here needs a tokenizer. The checkpoint is written by transformers in Hugging Face's format, PVM blocks under
the public release's names, and read by both sides.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from pvm_jax.config import ModelConfig
from pvm_jax.data.packing import Encoded
from pvm_jax.data.positions import patch_coords, position_corners, rope_positions

MERGE = 2


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured: the model, and how much work each measurement does.

    Attributes:
      config: config.json.
      decode: (batch, visual tokens).
      prefill: (batch, visual tokens).
      text: tokens of a prompt that are not visual (the two markers included).
      steps: decode steps a measurement.
      sft: (samples, visual tokens, prompt text, answer) of one training step.
      ragged: total lengths of the samples of one training step on ragged rows; `ragged_visual` tokens each.
      row: tokens a packed row.
      rollout: (visual tokens, new tokens) of a prompt with several completions.
    """

    config: dict[str, Any]
    decode: tuple[tuple[int, int], ...]
    prefill: tuple[tuple[int, int], ...]
    text: int
    steps: int
    sft: tuple[int, int, int, int]
    ragged: tuple[int, ...]
    ragged_visual: int
    row: int
    rollout: tuple[tuple[int, int], ...]


def config(width: int, layers: int, heads: int, ffn: int, vocab: int, vision: int, depth: int, pvm: Sequence[int]):
    """config.json of a tied Qwen3-VL with head_dim 64, GQA of 3 and PVM of width 128."""
    return {
        "architectures": ["PVMQwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "image_token_id": vocab - 3,
        "video_token_id": vocab - 4,
        "vision_start_token_id": vocab - 2,
        "vision_end_token_id": vocab - 1,
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "qwen3_vl_text",
            "vocab_size": vocab,
            "hidden_size": width,
            "intermediate_size": ffn,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 3,
            "head_dim": 64,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 8192,
            "rope_theta": 5000000,
            "rope_scaling": {"rope_type": "default", "mrope_section": [12, 10, 10], "mrope_interleaved": True},
            "tie_word_embeddings": True,
            "pvm_layers": list(pvm),
            "pvm_hidden_size": 128,
            "pvm_memory_mask": "all",
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "depth": depth,
            "hidden_size": vision,
            "intermediate_size": 4 * vision,
            "num_heads": vision // 64,
            "out_hidden_size": width,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": list(range(1, depth, 2))[:3],
            "hidden_act": "gelu_pytorch_tanh",
            "in_channels": 3,
            "patch_size": 16,
            "temporal_patch_size": 2,
            "spatial_merge_size": MERGE,
        },
    }


FULL = Sizes(
    config=config(768, 12, 12, 2304, 32_000, vision=384, depth=6, pvm=(3, 6, 9)),
    decode=((1, 64), (8, 64), (1, 1024), (8, 1024)),
    prefill=((1, 64), (8, 64), (1, 1024)),
    text=64,
    steps=32,
    sft=(4, 64, 130, 128),
    ragged=(96, 104, 112, 120, 136, 144, 160, 176, 200, 224, 256, 288, 336, 384, 448, 512),
    ragged_visual=64,
    row=512,
    rollout=((256, 64), (1024, 64)),
)
QUICK = Sizes(
    config=config(192, 3, 3, 256, 512, vision=64, depth=4, pvm=(1,)),
    decode=((1, 16), (2, 16)),
    prefill=((1, 16),),
    text=16,
    steps=4,
    sft=(2, 16, 10, 8),
    ragged=(24, 32, 40, 48),
    ragged_visual=16,
    row=48,
    rollout=((16, 8),),
)


def sample(model: ModelConfig, seed: int, visual: int, text: int, answer: int = 0) -> Encoded:
    """A square image of `visual` tokens between two markers, `text - 2` more of prompt, `answer` to be learned."""
    rng = np.random.default_rng(seed)
    side = round(visual**0.5)
    assert side * side == visual, visual
    words = rng.integers(0, model.image_token_id - 1, text - 2 + answer)
    marks = model.vision_start_token_id, model.vision_end_token_id
    tokens = np.concatenate([[marks[0]], [model.image_token_id] * visual, [marks[1]], words]).astype(np.int32)
    positions, following = rope_positions([1, (side, side), len(words) + 1])
    grid = (side * MERGE, side * MERGE)
    coords = patch_coords(*grid, MERGE)
    corners, weights = position_corners(coords, *grid, round(model.vision.num_position_embeddings**0.5))
    is_visual = tokens == model.image_token_id
    return Encoded(
        tokens=tokens,
        positions=positions,
        visual_index=np.where(is_visual, np.cumsum(is_visual) - 1, -1).astype(np.int32),
        loss_mask=np.arange(len(tokens)) >= len(tokens) - answer,
        patches=rng.standard_normal((len(coords), model.vision.patch_dim)).astype(np.float32),
        patch_segment=np.ones(len(coords), np.int32),
        patch_coords=coords,
        pos_index=corners,
        pos_weight=weights,
        next_position=following,
        id=str(seed),
    )


def prompts(sizes: Sizes, batch: int, visual: int) -> list[Encoded]:
    model = ModelConfig.from_hf(sizes.config)
    return [sample(model, seed, visual, sizes.text) for seed in range(batch)]


def sft_samples(sizes: Sizes) -> list[Encoded]:
    model, (rows, visual, text, answer) = ModelConfig.from_hf(sizes.config), sizes.sft
    return [sample(model, seed, visual, text, answer) for seed in range(rows)]


def ragged_samples(sizes: Sizes) -> list[Encoded]:
    """Samples of different lengths in random order; half of each one's text is the answer."""
    model, visual = ModelConfig.from_hf(sizes.config), sizes.ragged_visual
    lengths = np.random.default_rng(0).permutation(sizes.ragged)
    texts = [int(n) - visual for n in lengths]
    return [sample(model, seed, visual, t - t // 2, t // 2) for seed, t in enumerate(texts)]
