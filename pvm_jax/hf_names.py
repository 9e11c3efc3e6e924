"""The one table between Hugging Face's tensor names and ours; the converter reads it in both directions.

A row says: this tensor, of this shape, is that parameter, of that shape. Shapes are written in the axis alphabet of
`pvm_jax`; `N*H` is one axis of N times H. The two shapes of a row hold the same elements in the same order, so that
a conversion is a reshape and, for layers, a stack along a leading axis L:

    model.language_model.layers.{i}.self_attn.q_proj.weight  N*H D  ->  text/layers/{i}/self_attn/q_proj  N H D

    layers 0, 1 and 2 of one group                                  ->  text/layers/0-2/self_attn/q_proj  3 N H D

PVM's rows carry the names of the public release. `slots` is this project's own (see `pvm_jax.config`).
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

from pvm_jax.config import ModelConfig, VisionConfig
from pvm_jax.models.stack import group_name

_GROUPED = re.compile(r"(text/layers|visual/blocks)/(\d+)(?:-(\d+))?/(.+)")

Shape = tuple[int, ...]
Rows = tuple[tuple[str, str, str, str], ...]

_MLP: Rows = (
    ("mlp.gate_proj.weight", "F D", "mlp/gate_proj", "F D"),
    ("mlp.up_proj.weight", "F D", "mlp/up_proj", "F D"),
    ("mlp.down_proj.weight", "D F", "mlp/down_proj", "D F"),
)
_TEXT: Rows = (
    ("model.language_model.embed_tokens.weight", "V D", "text/embed_tokens", "V D"),
    ("model.language_model.norm.weight", "D", "text/norm", "D"),
)
_HEAD: Rows = (("lm_head.weight", "V D", "lm_head", "V D"),)
_LAYER: Rows = (
    ("input_layernorm.weight", "D", "input_layernorm", "D"),
    ("self_attn.q_proj.weight", "N*H D", "self_attn/q_proj", "N H D"),
    ("self_attn.k_proj.weight", "K*H D", "self_attn/k_proj", "K H D"),
    ("self_attn.v_proj.weight", "K*H D", "self_attn/v_proj", "K H D"),
    ("self_attn.o_proj.weight", "D N*H", "self_attn/o_proj", "D N H"),
    ("self_attn.q_norm.weight", "H", "self_attn/q_norm", "H"),
    ("self_attn.k_norm.weight", "H", "self_attn/k_norm", "H"),
    ("post_attention_layernorm.weight", "D", "post_attention_layernorm", "D"),
    *_MLP,
)
# N, K and F are PVM's own here, D the decoder's width.
_PVM: Rows = (
    ("text_reducer.weight", "R D", "text_reducer", "R D"),
    ("vision_reducer.weight", "R D", "vision_reducer", "R D"),
    ("input_norm.weight", "R", "input_norm", "R"),
    ("cross_attn.q_proj.weight", "N*H R", "cross_attn/q_proj", "N H R"),
    ("cross_attn.k_proj.weight", "K*H R", "cross_attn/k_proj", "K H R"),
    ("cross_attn.v_proj.weight", "K*H R", "cross_attn/v_proj", "K H R"),
    ("cross_attn.o_proj.weight", "R N*H", "cross_attn/o_proj", "R N H"),
    ("cross_attn.q_norm.weight", "H", "cross_attn/q_norm", "H"),
    ("cross_attn.k_norm.weight", "H", "cross_attn/k_norm", "H"),
    ("post_attn_norm.weight", "R", "post_attn_norm", "R"),
    ("mlp.gate_proj.weight", "F R", "mlp/gate_proj", "F R"),
    ("mlp.up_proj.weight", "F R", "mlp/up_proj", "F R"),
    ("mlp.down_proj.weight", "R F", "mlp/down_proj", "R F"),
    ("output_expander.weight", "D R", "output_expander", "D R"),
    ("gate_alpha", "1", "gate_alpha", "1"),
)
_SLOTS: Rows = (("slots", "S D", "slots", "S D"),)
# I input channels, Q frames of a patch, Y and X its height and width: C = I*Q*Y*X. G rows of the position table.
_VISION: Rows = (
    ("patch_embed.proj.weight", "E I Q Y X", "patch_embed/weight", "E I*Q*Y*X"),
    ("patch_embed.proj.bias", "E", "patch_embed/bias", "E"),
    ("pos_embed.weight", "G E", "pos_embed", "G E"),
)
_BLOCK: Rows = (
    ("norm1.weight", "E", "norm1/weight", "E"),
    ("norm1.bias", "E", "norm1/bias", "E"),
    ("norm2.weight", "E", "norm2/weight", "E"),
    ("norm2.bias", "E", "norm2/bias", "E"),
    ("attn.qkv.weight", "3*N*H E", "attn/qkv", "3 N H E"),
    ("attn.qkv.bias", "3*N*H", "attn/qkv_bias", "3 N H"),
    ("attn.proj.weight", "E N*H", "attn/proj", "E N H"),
    ("attn.proj.bias", "E", "attn/proj_bias", "E"),
    ("mlp.linear_fc1.weight", "F E", "mlp/fc1", "F E"),
    ("mlp.linear_fc1.bias", "F", "mlp/fc1_bias", "F"),
    ("mlp.linear_fc2.weight", "E F", "mlp/fc2", "E F"),
    ("mlp.linear_fc2.bias", "E", "mlp/fc2_bias", "E"),
)
# U*E: the features of one 2x2 block. W: the width of the merger's norm, E before the block is joined, U*E after.
_MERGER: Rows = (
    ("norm.weight", "W", "norm/weight", "W"),
    ("norm.bias", "W", "norm/bias", "W"),
    ("linear_fc1.weight", "U*E U*E", "fc1", "U*E U*E"),
    ("linear_fc1.bias", "U*E", "fc1_bias", "U*E"),
    ("linear_fc2.weight", "D U*E", "fc2", "D U*E"),
    ("linear_fc2.bias", "D", "fc2_bias", "D"),
)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a Hugging Face checkpoint."""

    name: str
    shape: Shape


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter of the model and the tensors that it is made of.

    Attributes:
      path: e.g. "text/layers/0-2/self_attn/q_proj".
      shape: with the leading layer axis where `stacked`.
      tensors: one per layer in order, or the only one.
      stacked: whether the leading axis counts layers.
      pvm: whether it belongs to a PVM block.
    """

    path: str
    shape: Shape
    tensors: tuple[Tensor, ...]
    stacked: bool
    pvm: bool = False


def parse_group(path: str) -> tuple[str, range, str] | None:
    """ "text/layers/0-2/mlp/up_proj" -> ("text/layers", range(0, 3), "mlp/up_proj"); None for other parameters."""
    match = _GROUPED.fullmatch(path)
    if not match:
        return None
    prefix, first, last, rest = match.groups()
    return prefix, range(int(first), int(last or first) + 1), rest


def block_groups(vision: VisionConfig) -> tuple[range, ...]:
    """Runs of vision blocks that are stored together; each DeepStack tap ends one."""
    ends = sorted({*(tap + 1 for tap in vision.deepstack_visual_indexes), vision.depth})
    return tuple(range(start, end) for start, end in zip([0, *ends], ends))


def leaves(config: ModelConfig, scan: bool = True) -> tuple[Leaf, ...]:
    """Every parameter of `config`, in the order of the layers.

    Args:
      scan: the grouping of decoder layers, see `ModelConfig.layer_groups`; True is how checkpoints are stored.
    """
    text = _text_dims(config)
    found = list(_plain("", "", _TEXT, text))
    for group in config.layer_groups(scan):
        found += _layers("model.language_model.layers", "text/layers", group, "", _LAYER, text)
        if config.pvm and group[0] in config.pvm.layers:
            rows = _PVM + (_SLOTS if config.pvm.slots else ())
            found += _layers(
                "model.language_model.layers", "text/layers", group, "pvm_block", rows, _pvm_dims(config), pvm=True
            )
    if not config.tie_word_embeddings:
        found += _plain("", "", _HEAD, text)
    vision = _vision_dims(config)
    found += _plain("model.visual.", "visual/", _VISION, vision)
    for group in block_groups(config.vision):
        found += _layers("model.visual.blocks", "visual/blocks", group, "", _BLOCK, vision)
    joined = vision | {"W": vision["U"] * vision["E"]}
    found += _plain("model.visual.merger.", "visual/merger/", _MERGER, vision | {"W": vision["E"]})
    for i in range(len(config.vision.deepstack_visual_indexes)):
        name = f"deepstack_merger_list.{i}."
        found += _plain(f"model.visual.{name}", f"visual/{name.replace('.', '/')}", _MERGER, joined)
    return tuple(found)


def count_parameters(config: ModelConfig) -> tuple[int, int]:
    """(all parameters, those of PVM)."""
    sizes = [(math.prod(leaf.shape), leaf.pvm) for leaf in leaves(config)]
    return sum(n for n, _ in sizes), sum(n for n, pvm in sizes if pvm)


def _text_dims(config: ModelConfig) -> dict[str, int]:
    text = config.text
    return {
        "D": text.hidden_size,
        "F": text.intermediate_size,
        "V": text.vocab_size,
        "N": text.num_attention_heads,
        "K": text.num_key_value_heads,
        "H": text.head_dim,
    }


def _pvm_dims(config: ModelConfig) -> dict[str, int]:
    pvm = config.pvm
    return {
        "D": config.text.hidden_size,
        "F": pvm.intermediate_size,
        "N": pvm.num_heads,
        "K": pvm.num_key_value_heads,
        "H": pvm.head_dim,
        "R": pvm.hidden_size,
        "S": pvm.slots,
    }


def _vision_dims(config: ModelConfig) -> dict[str, int]:
    vision = config.vision
    return {
        "E": vision.hidden_size,
        "F": vision.intermediate_size,
        "N": vision.num_heads,
        "H": vision.head_dim,
        "D": vision.out_hidden_size,
        "G": vision.num_position_embeddings,
        "I": vision.in_channels,
        "Q": vision.temporal_patch_size,
        "Y": vision.patch_size,
        "X": vision.patch_size,
        "U": vision.merge_unit,
    }


def _size(axes: str, dims: Mapping[str, int]) -> Shape:
    """("3*N*H E", {N: 2, H: 4, E: 8}) -> (24, 8)."""
    return tuple(math.prod(int(f) if f.isdigit() else dims[f] for f in axis.split("*")) for axis in axes.split(" "))


def _plain(hf_prefix: str, prefix: str, rows: Rows, dims: Mapping[str, int]) -> Iterator[Leaf]:
    for name, hf_axes, path, axes in rows:
        tensor = Tensor(hf_prefix + name, _size(hf_axes, dims))
        yield Leaf(prefix + path, _size(axes, dims), (tensor,), stacked=False)


def _layers(
    hf_prefix: str,
    prefix: str,
    group: Sequence[int],
    block: str,
    rows: Rows,
    dims: Mapping[str, int],
    pvm: bool = False,
) -> Iterator[Leaf]:
    """The rows of one group of layers; `block` is a module within the layer, or ""."""
    for name, hf_axes, path, axes in rows:
        name, path = (f"{block}.{name}", f"{block}/{path}") if block else (name, path)
        yield Leaf(
            path=f"{prefix}/{group_name(group)}/{path}",
            shape=(len(group), *_size(axes, dims)),
            tensors=tuple(Tensor(f"{hf_prefix}.{i}.{name}", _size(hf_axes, dims)) for i in group),
            stacked=True,
            pvm=pvm,
        )
