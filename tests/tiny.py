"""Tiny Qwen3-VL checkpoints with random weights, made by transformers, and inputs that can reveal a bug.

Every parameter is drawn away from its initialization (norm scales are not 1, biases not 0), all parts of
the real architecture are there (DeepStack taps, a vocabulary padded beyond the tokenizer, 4 query heads on
2), and one PVM layer is also a DeepStack layer.
"""

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

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
TOKENS = 512  # known to the tokenizer; special tokens are the last eight
VOCAB = 544  # rows of the embedding
TOKEN_ID = {token: TOKENS - len(SPECIAL_TOKENS) + i for i, token in enumerate(SPECIAL_TOKENS)}
PVM_LAYERS = (1, 4)
PVM_WIDTH = 32


def devices(count: int) -> dict[str, str]:
    """The environment of a process with so many simulated devices.

    LLVM translates without optimizing, and fusions go the old and shorter way to it, which take a fifth and then a
    third off the time of a first run. XLA's own passes (fusion, sharding, buffers), whose results the tests read, do
    not change by that. jaxlib 0.10 to 0.12 know both flags.
    """
    flags = ("--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false")
    return {"XLA_FLAGS": " ".join((f"--xla_force_host_platform_device_count={count}", *flags))}


def without_torch(count: int, *folders: Path | str) -> dict[str, str]:
    """As `devices`, for a child process in which there is neither torch nor TensorFlow; the folders go on PYTHONPATH.

    Users need neither, and tensorboardX would import torch, which takes longer than the rest together.
    """
    path = (Path(__file__).parent / "without_torch", *folders)
    return os.environ | devices(count) | {"PYTHONPATH": os.pathsep.join(map(str, path))}


# Qwen3-VL's chat format (a system turn only if given, images where they stand), in a template of our own.
CHAT_TEMPLATE = """\
{%- set counts = namespace(image=0, video=0) -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{%- set counts.image = counts.image + 1 -%}
{%- if add_vision_id -%}{{- 'Picture ' ~ counts.image ~ ': ' -}}{%- endif -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'video' -%}
{%- set counts.video = counts.video + 1 -%}
{%- if add_vision_id -%}{{- 'Video ' ~ counts.video ~ ': ' -}}{%- endif -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- else -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

_WORDS = """
the cell in row column reads digit one two three four five six seven eight nine zero and then total image
what is shown here there are look at left right upper lower first second next after before picture video
answer question because number sum of a to it small large dark light noise stands between above below
so we count again from start until end where every pixel has its own place in grid memory stays visible
The What How many Which Look yes no maybe think about therefore however circle square red green blue yellow
"""


def text(seed: int, words: int) -> str:
    """English-looking text; about 1.3 tokens a word."""
    rng = np.random.default_rng(seed)
    vocabulary = _WORDS.split()
    picked = [vocabulary[i] for i in rng.integers(len(vocabulary), size=words)]
    return " ".join(w + ("." if rng.random() < 0.1 else "") for w in picked)


def image(seed: int, height: int, width: int) -> Image.Image:
    """Noise in colour over a gradient: every patch differs, and no transposition goes unseen."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(0, 120, height)[:, None, None] + np.linspace(0, 60, width)[None, :, None]
    return Image.fromarray((rng.integers(0, 70, (height, width, 3)) + slope).astype(np.uint8))


def user(*parts: Any) -> dict:
    """A user turn: strings are text, images are images, a list of images is a video of 2 frames a second."""

    def part(p):
        if isinstance(p, str):
            return {"type": "text", "text": p}
        return {"type": "video", "video": p, "fps": 2.0} if isinstance(p, list) else {"type": "image", "image": p}

    return {"role": "user", "content": [part(p) for p in parts]}


def assistant(answer: str) -> dict:
    return {"role": "assistant", "content": answer}


def conversations() -> dict[str, dict]:
    """The inputs of the parity tests, by name."""
    frames = [image(20 + i, 64, 96) for i in range(5)]
    return {
        "text": {"messages": [user(text(1, 460)), assistant(text(2, 60))]},
        "image": {"messages": [user(image(3, 75, 141), "what is shown?"), assistant(text(4, 40))]},
        "two_images": {
            "messages": [
                {"role": "system", "content": "look closely."},
                user(image(5, 131, 47), "and then", image(6, 64, 160), text(7, 20)),
                assistant(text(8, 25)),
            ]
        },
        "turns": {
            "messages": [
                user(image(9, 90, 60), "first picture"),
                assistant(text(10, 15)),
                user("now this one", image(11, 40, 101), text(12, 5)),
                assistant(text(13, 20)),
            ]
        },
        "video": {"messages": [user(frames, "what happens?", image(30, 50, 50)), assistant(text(14, 20))]},
        "short": {"messages": [user("count to three"), assistant("one two three")]},
    }


def hf_config(tied: bool = True, pvm_layers: tuple[int, ...] = (), memory_mask: str | None = None) -> dict[str, Any]:
    """`config.json` of the tiny model, with PVM's keys if it has PVM layers."""
    config = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "image_token_id": TOKEN_ID["<|image_pad|>"],
        "video_token_id": TOKEN_ID["<|video_pad|>"],
        "vision_start_token_id": TOKEN_ID["<|vision_start|>"],
        "vision_end_token_id": TOKEN_ID["<|vision_end|>"],
        "tie_word_embeddings": tied,
        "text_config": {
            "model_type": "qwen3_vl_text",
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 4096,
            "rope_theta": 5000000,
            "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True},
            "tie_word_embeddings": tied,
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 2],
            "hidden_act": "gelu_pytorch_tanh",
            "in_channels": 3,
            "patch_size": 16,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
        },
    }
    if pvm_layers:
        config["architectures"] = ["PVMQwen3VLForConditionalGeneration"]
        config["text_config"] |= {"pvm_layers": list(pvm_layers), "pvm_hidden_size": PVM_WIDTH}
    if memory_mask:
        config["text_config"]["pvm_memory_mask"] = memory_mask
    return config


def small_config() -> dict[str, Any]:
    """Two text layers, the upper one with PVM, and one of the vision tower: for tests that compile many programs."""
    config = hf_config(pvm_layers=(1,), memory_mask="causal")
    config["text_config"]["num_hidden_layers"] = 2
    config["vision_config"] |= {"depth": 1, "deepstack_visual_indexes": [0]}
    return config


def deep_config() -> dict[str, Any]:
    """Twelve text layers and twelve vision blocks: numbers that sort otherwise as text."""
    config = hf_config(pvm_layers=(2, 11), memory_mask="causal")
    config["text_config"]["num_hidden_layers"] = 12
    config["vision_config"] |= {"depth": 12, "deepstack_visual_indexes": [2, 10]}
    return config


@dataclasses.dataclass
class Checkpoints:
    """Writes each variant once, to a temporary folder that is renamed: safe with several workers."""

    root: Path

    def __call__(
        self,
        tied: bool = True,
        dtype: str = "float32",
        pvm_layers: tuple[int, ...] = (),
        memory_mask: str | None = None,
        shard_bytes: int = 10**9,
    ) -> Path:
        layers = "".join(map(str, pvm_layers)) or "none"
        name = f"{'tied' if tied else 'untied'}-{dtype}-pvm_{layers}-{memory_mask}-{shard_bytes}"

        def write(directory: Path) -> None:
            write_processor_files(directory)
            write_weights(directory, hf_config(tied, pvm_layers, memory_mask), dtype, shard_bytes)

        return self._once(name, write)

    def small(self) -> Path:
        return self._of("small", small_config())

    def deep(self) -> Path:
        return self._of("deep", deep_config())

    def _of(self, name: str, config: dict[str, Any]) -> Path:
        def write(directory: Path) -> None:
            write_processor_files(directory)
            write_weights(directory, config, "float32", 10**9)

        return self._once(name, write)

    def processor_files(self) -> Path:
        def write(directory: Path) -> None:
            write_processor_files(directory)
            (directory / "config.json").write_text(json.dumps(hf_config(), indent=2))

        return self._once("processor", write)

    def _once(self, name: str, write: Callable[[Path], None]) -> Path:
        final = self.root / name
        if not final.exists():
            partial = self.root / f"{name}.partial.{os.getpid()}"
            partial.mkdir(parents=True)
            write(partial)
            try:
                partial.rename(final)
            except OSError:  # another worker was first; both wrote the same bytes
                shutil.rmtree(partial)
        return final


def write_processor_files(directory: Path) -> None:
    """A Qwen2Tokenizer of 512 tokens, the chat template, and preprocessor files with small limits."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([text(seed, 300) for seed in range(20)], trainer)
    learned = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(m) for m in learned["merges"]],
        unk_token=None,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    assert len(tokenizer) == TOKENS, f"the training text is too small: {len(tokenizer)} tokens"

    common = {
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
    }
    files = {
        "preprocessor_config.json": common
        | {
            "size": {"shortest_edge": 32 * 32 * 2, "longest_edge": 32 * 32 * 16},
            "image_processor_type": "Qwen2VLImageProcessorFast",
        },
        "video_preprocessor_config.json": common
        | {
            "size": {"shortest_edge": 32 * 32 * 2, "longest_edge": 32 * 32 * 6 * 16},
            "video_processor_type": "Qwen3VLVideoProcessor",
        },
        "generation_config.json": {
            "bos_token_id": TOKEN_ID["<|endoftext|>"],
            "pad_token_id": TOKEN_ID["<|endoftext|>"],
            "eos_token_id": [TOKEN_ID["<|im_end|>"], TOKEN_ID["<|endoftext|>"]],
            "do_sample": True,
            "temperature": 0.7,
            "top_p": 0.8,
            "top_k": 20,
        },
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2))


def write_weights(directory: Path, config: dict[str, Any], dtype: str, shard_bytes: int) -> None:
    """`config.json` and safetensors with random weights, by transformers' own writer."""
    import pvm_reference
    import torch

    model = pvm_reference.build(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            parameter.copy_(_draw(name, parameter.shape, generator))
    generation = (directory / "generation_config.json").read_text()
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=shard_bytes)
    (directory / "generation_config.json").write_text(generation)  # the writer above knows one stop token only
    # In the layout of the published files (rope_scaling beside rope_theta), not of transformers 5.
    (directory / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2))


def _draw(name: str, shape, generator):
    import torch

    noise = torch.randn(shape, generator=generator)
    if name.endswith("gate_alpha"):
        return 0.5 + 0.1 * noise
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.2 * noise
    if name.endswith("bias"):
        return 0.2 * noise
    if "embed_tokens" in name or "pos_embed" in name or "lm_head" in name:
        return 0.3 * noise
    return noise / np.sqrt(noise[0].numel())


AS_USERS = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
"""Compiler options without what `devices` sets, for tests of the last bit."""


def compiled(function: Callable, options: dict[str, Any] | None = None) -> Callable:
    """`function(model, *args)` under jit. nnx.jit also rebuilds its arguments with None for arrays, which typed
    dataclasses such as VisualTokens rightly refuse here."""
    import jax
    from flax import nnx

    @functools.partial(jax.jit, static_argnums=0, compiler_options=options)
    def call(graphdef, state, *args):
        return function(nnx.merge(graphdef, state), *args)

    return lambda model, *args: call(*nnx.split(model), *args)
