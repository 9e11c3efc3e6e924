"""What a program must at least hold, and a training step compute, from shapes alone.

Bytes of one device: what cannot be avoided under the recipe, with each layer recomputed in the backward pass
(`config.model.remat`):

    weights       frozen and trainable parameters, as they are sharded; while completions are drawn, both copies
    optimizer     both moments, and in a training step the gradients
    cache         keys, values and visual memory; two of them where one is made from the other
    batch         its arrays
    layer inputs  one hidden state [rows,T,D] for every layer from the first trainable one on, and the gradient of the
                  last one, which the loss keeps
    work          the larger of: one layer's activations with its gathered weights; a chunk's logits and their gradient
                  with the gathered vocabulary projection and, where it trains, its whole gradient in fp32, which each
                  device adds up for its own rows. With fsdp = 1 nothing is gathered

Flops follow the same recipe: frozen layers below the first trainable one run once; those above run forward, again
when they are recomputed, and once more for the gradient of their input. Attention is counted in full blocks.
"""

import dataclasses

import jax

from pvm_jax.config import PVMConfig, TextConfig, VisionConfig
from pvm_jax.models.stack import group_layers
from pvm_jax.planning.recipe import Inference, Recipe, Step, TrainStep, on_device

ABOVE = ("text/norm", "lm_head")
"""Parameters behind the last layer."""


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Of one device; see the module's docstring."""

    weights: int
    optimizer: int
    cache: int
    batch: int
    layer_inputs: int
    work: int

    @property
    def total(self) -> int:
        return sum(dataclasses.asdict(self).values())


def unavoidable(step: Step) -> Bytes:
    """The least that a device holds at the program's peak, with what is resident beside it."""
    if isinstance(step, Inference):
        return Bytes(
            weights=on_device(jax.tree.leaves(step.weights)) + step.resident.weights,
            optimizer=step.resident.optimizer,
            cache=on_device(jax.tree.leaves(step.cache)),
            batch=on_device(jax.tree.leaves(step.batch)),
            layer_inputs=0,
            work=_work(step.recipe, step.tokens, step.scored, gathers=step.gathers),
        )
    shape, text = step.shape, step.recipe.model.text
    rows = shape.rows // step.recipe.ways // shape.micro_batches
    tokens = rows * shape.length
    trainable = on_device([*step.state.trainable.values()])
    return Bytes(
        weights=trainable + on_device([*step.frozen.values()]) + step.resident.weights,
        optimizer=on_device(jax.tree.leaves(step.state.optimizer)) + trainable,
        cache=0,
        batch=on_device(jax.tree.leaves(step.batch)),
        layer_inputs=2 * tokens * text.hidden_size * (text.num_hidden_layers - first_trainable(step) + 1),
        work=_work(step.recipe, tokens, 2 * rows * step.chunk, head_trains=step.head_trains),
    )


def _work(recipe: Recipe, tokens: int, scored: int, *, gathers: bool = True, head_trains: bool = False) -> int:
    """Of `tokens` that go through a layer, and of logits of `scored`; 0 of none."""
    text, mesh = recipe.model.text, recipe.mesh
    tensor = mesh.shape["tensor"]
    heads = text.num_attention_heads + 2 * text.num_key_value_heads
    layer = 2 * tokens * (2 * heads * text.head_dim + 3 * text.intermediate_size) // tensor
    head = 4 * scored * text.vocab_size // tensor
    if gathers and mesh.shape["fsdp"] > 1:
        layer += 2 * layer_weights(text) // tensor
        head += (2 + 4 * head_trains) * text.vocab_size * text.hidden_size // tensor
    return max(layer, head) if tokens else 0


def first_trainable(step: TrainStep) -> int:
    """The first decoder layer that the backward pass reaches: the lowest with PVM, LoRA or weights that train.

    The number of layers if it reaches none, 0 if what lies below them trains.
    """
    return min(_layer(name, step.recipe.model.text.num_hidden_layers) for name in step.state.trainable)


def _layer(name: str, layers: int) -> int:
    """The first decoder layer that the gradient of a parameter passes through."""
    if name.startswith("text/layers/"):
        return group_layers(name.split("/")[2])[0]
    return layers if name.startswith(ABOVE) else 0


def layer_weights(text: TextConfig) -> int:
    """Elements of a decoder layer's matrices."""
    attention = 2 * (text.num_attention_heads + text.num_key_value_heads) * text.head_dim
    return text.hidden_size * (attention + 3 * text.intermediate_size)


def flops(step: TrainStep, *, attention: bool = True) -> float:
    """Floating-point operations of a step of which only PVM trains, all devices together.

    PVM's branches are small and not split over `tensor`: each of its devices computes them.

    Args:
      attention: with the products of scores and of values, which a compiler does not count inside of kernels.
    """
    model, shape = step.recipe.model, step.shape
    text, pvm, first = model.text, model.pvm, first_trainable(step)
    tokens = shape.rows * shape.length
    matrices = 2.0 * tokens * layer_weights(text)
    scores = 4.0 * shape.rows * shape.length**2 * text.num_attention_heads * text.head_dim if attention else 0.0
    # The first PVM layer is recomputed up to its branch; no gradient passes its input.
    above = text.num_hidden_layers - first - 1
    own = 2.0 * tokens * text.hidden_size * 2 * (text.num_attention_heads + text.num_key_value_heads) * text.head_dim
    # Nothing in a layer's gradient needs its last product, which is not computed again.
    last = 2.0 * tokens * text.hidden_size * text.intermediate_size
    layers = text.num_hidden_layers * matrices + above * (2 * matrices - last) + own
    # Backward attention: once again, and four products instead of two.
    layers += scores * (text.num_hidden_layers + above * 3 + 1)
    # Logits forward, and their gradient with them.
    head = 2 * 2.0 * tokens * text.hidden_size * text.vocab_size
    branches = _pvm_flops(pvm, text, tokens, tokens_of_memory(step)) * len(pvm.layers) if pvm else 0.0
    branches *= step.recipe.mesh.shape["tensor"]
    return layers + head + branches + _vision_flops(model.vision, shape.rows, shape.patches, attention)


def tokens_of_memory(step: TrainStep) -> int:
    return step.shape.rows * step.shape.patches // step.recipe.model.vision.merge_unit


def _pvm_flops(pvm: PVMConfig, text: TextConfig, tokens: int, memory: int) -> float:
    """Forward, recomputation, and gradients of weights and inputs; attention is small and left out."""
    heads = 2 * pvm.num_heads * pvm.head_dim
    queries = pvm.hidden_size * (2 * text.hidden_size + heads + 3 * pvm.intermediate_size)
    keys = pvm.hidden_size * (text.hidden_size + 2 * pvm.num_key_value_heads * pvm.head_dim)
    return 2.0 * (4 * tokens * queries + 2 * memory * keys)


def _vision_flops(vision: VisionConfig, rows: int, patches: int, attention: bool) -> float:
    width, joined = vision.hidden_size, vision.hidden_size * vision.merge_unit
    block = 4 * width**2 + 2 * width * vision.intermediate_size
    mergers = 1 + len(vision.deepstack_visual_indexes)
    merger = joined * (joined + vision.out_hidden_size) / vision.merge_unit
    each = vision.depth * block + width * vision.patch_dim + mergers * merger
    scores = 4.0 * rows * patches**2 * width * vision.depth if attention else 0.0
    return 2.0 * rows * patches * each + scores
