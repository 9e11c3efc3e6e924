"""LoRA's settings: which linear maps of the decoder have a low-rank adapter, and of what size (arXiv 2106.09685).

Instead of W x an adapted map computes W x + (alpha / rank) B A x (`pvm_jax.models.layers.LoRA`). In config.json the
settings are `lora_rank`, `lora_alpha` and `lora_targets` under `text_config`; `pvm_jax.lora_files` exports what was
trained.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

LINEAR_MAPS = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
"""The linear maps of a decoder layer, by Hugging Face's names."""
IS_LORA = re.compile(r"_lora/[ab]$")
"""Found in the names of adapters, as in text/layers/0-2/self_attn/q_proj_lora/a."""


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Adapters of one rank.

    Attributes:
      rank: r, of every adapter.
      alpha: what an adapter adds is scaled by alpha / rank.
      targets: a regular expression, searched for in names such as "layers.3.self_attn.q_proj". "self_attn" adapts all
        of attention, "mlp" all of the FFN, "proj" both; r"layers\\.(2|3)\\.mlp" the FFN of two layers. Linear maps of
        PVM's own are never adapted.
    """

    rank: int
    alpha: float
    targets: str

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def modules(self, layer: int) -> tuple[str, ...]:
        """Those of `LINEAR_MAPS` that are adapted in a decoder layer."""
        return tuple(name for name in LINEAR_MAPS if re.search(self.targets, f"layers.{layer}.{name}"))

    def problem(self, sizes: Mapping[str, tuple[int, int]], layers: int) -> tuple[str, str] | None:
        """The field that does not fit a model, and why; None if all do.

        Args:
          sizes: (outputs, inputs) of the linear maps of a layer, of which there are `layers`.
        """
        try:
            adapted = [(min(sizes[name]), layer, name) for layer in range(layers) for name in self.modules(layer)]
        except re.error as error:
            return "targets", f"expected a regular expression, got {self.targets!r} ({error})"
        if not adapted:
            return "targets", (
                f"expected to find {self.targets!r} in some of layers.0.self_attn.q_proj to "
                f"layers.{layers - 1}.mlp.down_proj, found it in none; a layer's linear maps are "
                f"{', '.join(LINEAR_MAPS)}"
            )
        most, layer, name = min(adapted)
        if not 1 <= self.rank <= most:
            return "rank", f"expected 1 to {most}, the smaller side of layers.{layer}.{name}, got {self.rank}"
        if not self.alpha > 0:
            return "alpha", f"expected a number above 0, got {self.alpha}"
        return None


def with_lora(raw: Mapping[str, Any], lora: LoRAConfig | None) -> dict[str, Any]:
    """The content of a config.json with these adapters, or without any."""
    text = {key: value for key, value in raw["text_config"].items() if not key.startswith("lora_")}
    if lora:
        text |= {f"lora_{field}": value for field, value in dataclasses.asdict(lora).items()}
    return {**raw, "text_config": text}
