"""Shapes of the released Qwen3-VL sizes, for plans and tests that have no checkpoint at hand.

Sources: the `config.json` files of Qwen3-VL-{2B,4B,8B,32B}-Instruct; PVM's layers and width from the public release for
4B and 8B. For 2B and 32B nothing is published: 2B takes the layers of 4B, whose tower it shares, and 32B layers at the
same depth as 8B's, a quarter, a half and three quarters.
"""

from typing import Any

PVM_LAYERS = {"2b": (5, 11, 17), "4b": (5, 11, 17), "8b": (8, 16, 24), "32b": (16, 32, 48)}
PVM_HIDDEN_SIZE = 512

# (vision depth, width, F, DeepStack taps)
_LARGE_TOWER = (27, 1152, 4304, [8, 16, 24])
_SMALL_TOWER = (24, 1024, 4096, [5, 11, 17])
# size: (D, F, layers, heads, tied), tower
_SIZES = {
    "2b": ((2048, 6144, 28, 16, True), _SMALL_TOWER),
    "4b": ((2560, 9728, 36, 32, True), _SMALL_TOWER),
    "8b": ((4096, 12288, 36, 32, False), _LARGE_TOWER),
    "32b": ((5120, 25600, 64, 64, False), _LARGE_TOWER),
}
SIZES = tuple(_SIZES)


def hf_config(size: str, pvm: bool = False) -> dict[str, Any]:
    """`config.json` of a released size, reduced to the keys that decide shapes; with `pvm`, those of new PVM blocks."""
    (width, ffn, layers, heads, tied), (depth, vision_width, vision_ffn, taps) = _SIZES[size]
    config = {
        "model_type": "qwen3_vl",
        "tie_word_embeddings": tied,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "text_config": {
            "vocab_size": 151936,
            "hidden_size": width,
            "intermediate_size": ffn,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-6,
            "rope_theta": 5000000,
            "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20]},
        },
        "vision_config": {
            "depth": depth,
            "hidden_size": vision_width,
            "intermediate_size": vision_ffn,
            "num_heads": 16,
            "out_hidden_size": width,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": taps,
        },
    }
    if pvm:
        config["text_config"] |= {
            "pvm_layers": list(PVM_LAYERS[size]),
            "pvm_hidden_size": PVM_HIDDEN_SIZE,
            "pvm_memory_mask": "causal",
        }
    return config
