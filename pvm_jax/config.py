"""Frozen model configurations, read from a Hugging Face `config.json`.

Qwen3-VL's own keys keep their names. PVM adds five under `text_config`:

    pvm_layers         decoder layers that carry a PVM block (absent or empty: a stock Qwen3-VL)
    pvm_hidden_size    R, the latent width
    pvm_memory_mask    "all" (the public release, and what an absent key means) or "causal"
    pvm_silencing      false: the branch also adds to image tokens (an ablation; absent: true, as in the paper)
    pvm_slots          > 0: keys and values come from so many learned vectors instead of the image.
                       The control of the digits experiment, not a part of the paper.

Training with LoRA adds three:

    lora_rank          rank of the adapters (absent or 0: none)
    lora_alpha         they are scaled by lora_alpha / lora_rank
    lora_targets       regular expression that chooses the linear maps, see `LoRAConfig`
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pvm_jax.lora import LINEAR_MAPS, LoRAConfig

MEMORY_MASKS = ("all", "causal")


class ConfigError(ValueError):
    """A configuration that cannot be built; the message names the file, the field and the way out."""


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower: E = hidden_size, C = in_channels * temporal_patch_size * patch_size**2."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    num_position_embeddings: int
    deepstack_visual_indexes: tuple[int, ...]
    in_channels: int = 3
    patch_size: int = 16
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches that become one visual token."""
        return self.spatial_merge_size**2


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The decoder: D = hidden_size, F = intermediate_size, N = num_attention_heads, K = num_key_value_heads."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]

    @property
    def linear_maps(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of a layer's linear maps, by Hugging Face's names."""
        heads, kv = (n * self.head_dim for n in (self.num_attention_heads, self.num_key_value_heads))
        width, ffn = self.hidden_size, self.intermediate_size
        attention = ((heads, width), (kv, width), (kv, width), (width, heads))
        return dict(zip(LINEAR_MAPS, (*attention, (ffn, width), (ffn, width), (width, ffn)), strict=True))


@dataclasses.dataclass(frozen=True)
class PVMConfig:
    """Persistent Visual Memory; sizes as in the public release's configuration file.

    With the 8B model (D 4096, F 12288, 32 heads on 8, head_dim 128) and R = 512: 4 query heads, 1 KV head and a
    latent FFN of width 1536.
    """

    layers: tuple[int, ...]
    hidden_size: int
    memory_mask: str
    silencing: bool
    slots: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    text: TextConfig
    vision: VisionConfig
    pvm: PVMConfig | None
    tie_word_embeddings: bool
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    lora: LoRAConfig | None = None

    def layer_groups(self, scan: bool = True) -> tuple[tuple[int, ...], ...]:
        """Runs of decoder layers whose parameters are stacked and scanned together.

        Layers of a run are alike: DeepStack layers, layers between PVM layers, each PVM layer on its own, and all with
        the same LoRA.
        8B: (0-2) (3-7) (8) (9-15) (16) (17-23) (24) (25-35). `scan=False` puts every layer on its own: XLA:CPU
        copies each slice of a scanned weight, which doubles the memory traffic of a decode step.
        """
        pvm = set(self.pvm.layers) if self.pvm else set()
        deepstack = len(self.vision.deepstack_visual_indexes)

        def kind(i: int) -> tuple:
            place = ("pvm", i) if i in pvm else ("deepstack",) if i < deepstack else ("plain",)
            return (*place, self.lora.modules(i) if self.lora else ())

        groups: list[list[int]] = []
        for i in range(self.text.num_hidden_layers):
            if scan and groups and kind(i) == kind(i - 1):
                groups[-1].append(i)
            else:
                groups.append([i])
        return tuple(map(tuple, groups))

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], source: str = "config.json") -> "ModelConfig":
        """Reads the dictionary of a Hugging Face `config.json`; `source` is named in errors.

        Raises:
          ConfigError: another architecture, a missing key, or sizes that do not fit together.
        """
        return _Reader(source).model(raw)

    @classmethod
    def load(cls, directory: str | Path) -> "ModelConfig":
        """Reads `directory/config.json`."""
        return cls.from_hf(read_json(Path(directory) / "config.json"), str(Path(directory) / "config.json"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a ConfigError that says what is wrong with it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: expected a file, found none; is this a model directory?") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ConfigError(f"{path}: expected JSON, but it does not parse ({e})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


class _Reader:
    """Takes values out of nested dictionaries and says which key of which file was wrong."""

    def __init__(self, source: str):
        self.source = source

    def fail(self, field: str, message: str) -> ConfigError:
        return ConfigError(f"{self.source}: {field}: {message}")

    def get(self, raw: Mapping[str, Any], section: str, key: str, kind: type, default: Any = None) -> Any:
        value = raw.get(key, default)
        field = f"{section}.{key}" if section else key
        if value is None:
            raise self.fail(field, f"expected {kind.__name__}, found nothing")
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.fail(field, f"expected {kind.__name__}, got {value!r}")
        if kind is int and value < 0:
            raise self.fail(field, f"expected a number of at least 0, got {value}")
        return value

    def ints(self, raw: Mapping[str, Any], section: str, key: str, default: Any = None) -> tuple[int, ...]:
        value = raw.get(key, default)
        if not isinstance(value, list | tuple) or not all(type(v) is int for v in value):
            raise self.fail(f"{section}.{key}", f"expected a list of integers, got {value!r}")
        return tuple(value)

    def section(self, raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        value = raw.get(key)
        if not isinstance(value, Mapping):
            raise self.fail(key, f"expected an object, got {value!r}")
        return value

    def model(self, raw: Mapping[str, Any]) -> ModelConfig:
        model_type = raw.get("model_type")
        if model_type != "qwen3_vl":
            hint = " (mixture-of-experts sizes are not supported yet)" if model_type == "qwen3_vl_moe" else ""
            raise self.fail("model_type", f"expected 'qwen3_vl', got {model_type!r}{hint}")
        text = self.text(self.section(raw, "text_config"))
        vision = self.vision(self.section(raw, "vision_config"))
        if vision.out_hidden_size != text.hidden_size:
            raise self.fail(
                "vision_config.out_hidden_size",
                f"expected text_config.hidden_size = {text.hidden_size}, got {vision.out_hidden_size}",
            )
        if len(vision.deepstack_visual_indexes) > text.num_hidden_layers:
            raise self.fail(
                "vision_config.deepstack_visual_indexes",
                f"expected at most {text.num_hidden_layers} entries (one decoder layer each), "
                f"got {len(vision.deepstack_visual_indexes)}",
            )
        return ModelConfig(
            text=text,
            vision=vision,
            pvm=self.pvm(raw["text_config"], text),
            tie_word_embeddings=self.get(raw, "", "tie_word_embeddings", bool, False),
            image_token_id=self.get(raw, "", "image_token_id", int),
            video_token_id=self.get(raw, "", "video_token_id", int),
            vision_start_token_id=self.get(raw, "", "vision_start_token_id", int),
            vision_end_token_id=self.get(raw, "", "vision_end_token_id", int),
            lora=self.lora(raw["text_config"], text),
        )

    def text(self, raw: Mapping[str, Any]) -> TextConfig:
        s = "text_config"
        heads = self.get(raw, s, "num_attention_heads", int)
        hidden = self.get(raw, s, "hidden_size", int)
        # transformers 5 writes one `rope_parameters`; published files have `rope_scaling` beside `rope_theta`.
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        theta = rope.get("rope_theta", raw.get("rope_theta"))
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ("default", "mrope"):
            raise self.fail(f"{s}.rope_parameters.rope_type", f"expected 'default', got {rope_type!r}")
        if self.get(raw, s, "attention_bias", bool, False):
            raise self.fail(f"{s}.attention_bias", "expected false (no Qwen3-VL has attention biases), got true")
        if raw.get("hidden_act", "silu") != "silu":
            raise self.fail(f"{s}.hidden_act", f"expected 'silu', got {raw['hidden_act']!r}")
        config = TextConfig(
            vocab_size=self.get(raw, s, "vocab_size", int),
            hidden_size=hidden,
            intermediate_size=self.get(raw, s, "intermediate_size", int),
            num_hidden_layers=self.get(raw, s, "num_hidden_layers", int),
            num_attention_heads=heads,
            num_key_value_heads=self.get(raw, s, "num_key_value_heads", int, heads),
            head_dim=self.get(raw, s, "head_dim", int, hidden // max(heads, 1)),
            rms_norm_eps=self.get(raw, s, "rms_norm_eps", float, 1e-6),
            rope_theta=self.get({"rope_theta": theta}, s, "rope_theta", float),
            mrope_section=self.ints(rope, f"{s}.rope_parameters", "mrope_section", [24, 20, 20]),
        )
        if config.num_key_value_heads == 0 or heads % config.num_key_value_heads:
            raise self.fail(
                f"{s}.num_key_value_heads",
                f"expected a divisor of num_attention_heads = {heads}, got {config.num_key_value_heads}",
            )
        if len(config.mrope_section) != 3 or sum(config.mrope_section) != config.head_dim // 2:
            raise self.fail(
                f"{s}.rope_parameters.mrope_section",
                f"expected three sizes that add up to head_dim / 2 = {config.head_dim // 2}, "
                f"got {list(config.mrope_section)}",
            )
        return config

    def vision(self, raw: Mapping[str, Any]) -> VisionConfig:
        s = "vision_config"
        depth = self.get(raw, s, "depth", int)
        config = VisionConfig(
            depth=depth,
            hidden_size=self.get(raw, s, "hidden_size", int),
            intermediate_size=self.get(raw, s, "intermediate_size", int),
            num_heads=self.get(raw, s, "num_heads", int),
            out_hidden_size=self.get(raw, s, "out_hidden_size", int),
            num_position_embeddings=self.get(raw, s, "num_position_embeddings", int),
            deepstack_visual_indexes=self.ints(raw, s, "deepstack_visual_indexes", []),
            in_channels=self.get(raw, s, "in_channels", int, 3),
            patch_size=self.get(raw, s, "patch_size", int, 16),
            temporal_patch_size=self.get(raw, s, "temporal_patch_size", int, 2),
            spatial_merge_size=self.get(raw, s, "spatial_merge_size", int, 2),
        )
        if raw.get("hidden_act", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
            raise self.fail(f"{s}.hidden_act", f"expected 'gelu_pytorch_tanh', got {raw['hidden_act']!r}")
        if config.num_heads == 0 or config.hidden_size % config.num_heads or config.head_dim % 4:
            raise self.fail(
                f"{s}.num_heads",
                f"expected a divisor of hidden_size = {config.hidden_size} that leaves a head_dim divisible by 4 "
                f"(rows and columns rotate half each), got {config.num_heads}",
            )
        taps = config.deepstack_visual_indexes
        if list(taps) != sorted(set(taps)) or any(i >= depth for i in taps):
            raise self.fail(
                f"{s}.deepstack_visual_indexes",
                f"expected increasing blocks below depth = {depth}, got {list(taps)}",
            )
        side = round(config.num_position_embeddings**0.5)
        if side * side != config.num_position_embeddings:
            raise self.fail(
                f"{s}.num_position_embeddings",
                f"expected a square number, got {config.num_position_embeddings}",
            )
        return config

    def pvm(self, raw: Mapping[str, Any], text: TextConfig) -> PVMConfig | None:
        s = "text_config"
        layers = self.ints(raw, s, "pvm_layers", [])
        if not layers:
            return None
        if len(set(layers)) != len(layers) or not all(0 <= i < text.num_hidden_layers for i in layers):
            raise self.fail(
                f"{s}.pvm_layers",
                f"expected different layers from 0 to {text.num_hidden_layers - 1}, got {list(layers)}",
            )
        width = self.get(raw, s, "pvm_hidden_size", int)
        if width == 0 or width % text.head_dim:
            raise self.fail(
                f"{s}.pvm_hidden_size",
                f"expected a multiple of head_dim = {text.head_dim} (each PVM head is one head wide), got {width}",
            )
        mask = self.get(raw, s, "pvm_memory_mask", str, "all")
        if mask not in MEMORY_MASKS:
            raise self.fail(f"{s}.pvm_memory_mask", f"expected one of {list(MEMORY_MASKS)}, got {mask!r}")
        heads = width // text.head_dim
        kv_heads = max(1, heads // (text.num_attention_heads // text.num_key_value_heads))
        if heads % kv_heads:
            raise self.fail(
                f"{s}.pvm_hidden_size",
                f"expected PVM heads divisible by its KV heads, got {heads} and {kv_heads}",
            )
        return PVMConfig(
            layers=tuple(sorted(layers)),
            hidden_size=width,
            memory_mask=mask,
            silencing=self.get(raw, s, "pvm_silencing", bool, True),
            slots=self.get(raw, s, "pvm_slots", int, 0),
            num_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=text.head_dim,
            intermediate_size=int(width * text.intermediate_size / text.hidden_size),
        )

    def lora(self, raw: Mapping[str, Any], text: TextConfig) -> LoRAConfig | None:
        s = "text_config"
        rank = self.get(raw, s, "lora_rank", int, 0)
        if rank == 0:
            return None
        lora = LoRAConfig(rank, self.get(raw, s, "lora_alpha", float), self.get(raw, s, "lora_targets", str))
        if problem := lora.problem(text.linear_maps, text.num_hidden_layers):
            field, message = problem
            raise self.fail(f"{s}.lora_{field}", message)
        return lora
