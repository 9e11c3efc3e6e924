"""The files around the tiny digits model: tokenizer, chat template, processor and model configuration.

The tokenizer is a real byte-level Qwen2 tokenizer. Its merges spell each word of the task letter by letter and do
nothing else, so that a word of the task is one token and any other text still becomes bytes. The chat template
renders Qwen's chat format (`<|im_start|>role\\n...<|im_end|>\\n`, images and videos between `<|vision_start|>` and
`<|vision_end|>`); tools are left out.
"""

import json
from pathlib import Path

from tokenizers import pre_tokenizers

from pvm_jax.data.digits_task import CELLS, FILLER, NAMES, OPENING, ORDERS, STYLES, WORDS

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

CHAT_TEMPLATE = """\
{%- macro render(content) -%}
{%- if content is string -%}
{{- content -}}
{%- else -%}
{%- for part in content -%}
{%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type == 'video' or 'video' in part -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + render(message.content) + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def task_words() -> list[str]:
    """Every word that is to be one token, with the space before it where it has one."""
    inside = [*STYLES, *" ".join(ORDERS).split(), "from", "to", *FILLER.split(), *WORDS, *NAMES]
    return ["Read", OPENING, "user", "assistant", *(" " + word for word in dict.fromkeys(inside))]


def build_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-level vocabulary and merges: 256 bytes, then each word's prefixes."""
    vocab = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for word in task_words():
        spelled = word.replace(" ", "Ġ")  # how byte-level BPE writes a space
        for end in range(2, len(spelled) + 1):
            if spelled[:end] not in vocab:
                vocab[spelled[:end]] = len(vocab)
                merges.append((spelled[: end - 1], spelled[end - 1]))
    return vocab, merges


def write_tokenizer(directory: str | Path) -> dict[str, int]:
    """Writes a Qwen2Tokenizer directory with the chat template; returns the ids of the special tokens."""
    from transformers import Qwen2Tokenizer

    vocab, merges = build_vocabulary()
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(str(directory))
    return {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}


def model_config(ids: dict[str, int]) -> dict:
    """`config.json` of the tiny model: 0.6 million parameters, every part of the real architecture."""
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "dtype": "float32",
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "qwen3_vl_text",
            "vocab_size": -(-(max(ids.values()) + 1) // 16) * 16,
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 4096,
            "attention_bias": False,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "depth": 2,
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_heads": 4,
            "out_hidden_size": 96,
            "num_position_embeddings": 4 * CELLS,  # the 12x12 patches of a mosaic
            "deepstack_visual_indexes": [0],
            "hidden_act": "gelu_pytorch_tanh",
            "in_channels": 3,
            "patch_size": 16,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
        },
    }


def processor_config() -> dict:
    """`preprocessor_config.json`: as published, but small images stay small (areas are in pixels)."""
    return {
        "size": {"shortest_edge": 32 * 32, "longest_edge": 1024 * 1024},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessorFast",
    }


def video_processor_config() -> dict:
    """`video_preprocessor_config.json`; two frames make one step in time."""
    return {
        **processor_config(),
        "fps": 2,
        "min_frames": 4,
        "max_frames": 16,
        "image_processor_type": None,
        "video_processor_type": "Qwen3VLVideoProcessor",
    }


def write_model_directory(directory: str | Path) -> Path:
    """Everything of a Hugging Face checkpoint but the weights."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(directory)
    generation = {
        "do_sample": False,
        "bos_token_id": None,
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "pad_token_id": ids["<|endoftext|>"],
    }
    video = {key: value for key, value in video_processor_config().items() if value is not None}
    for name, content in (
        ("config.json", model_config(ids)),
        ("generation_config.json", generation),
        ("preprocessor_config.json", processor_config()),
        ("video_preprocessor_config.json", video),
    ):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return directory
