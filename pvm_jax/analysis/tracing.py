"""Texts through a model, and everything that is measured on the way: the entry to the analyses.

model, processor = pvm_jax.load(path)
sources = texts.read(processor, samples)        # or texts.write(model, processor, samples, 2048)
traces = tracing.trace(model, sources)
without = tracing.trace(model, sources, silence_pvm=True)
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx

from pvm_jax.analysis import dilution, logit_lens
from pvm_jax.analysis.results import Dilution, Lens, Maps, Trace
from pvm_jax.analysis.texts import Source
from pvm_jax.analysis.walk import Wanted, walk
from pvm_jax.config import ModelConfig
from pvm_jax.data.packing import PATCHES_PER_TOKEN, collate
from pvm_jax.generate import bucket
from pvm_jax.models.qwen3_vl import Qwen3VL
from pvm_jax.sharding import mesh_of, ways_of

MAPS = ("attention", "attention_heads", "retrieval")
"""Measures whose last axis is that of visual tokens."""


def trace(
    model: Qwen3VL,
    sources: Sequence[Source],
    *,
    lens: bool = True,
    maps: bool = True,
    heads: bool = False,
    silence_pvm: bool = False,
    text_window: int | None = None,
    rows: int = 4,
    window: int = 128,
) -> list[Trace]:
    """One trace for each text, in their order.

    Args:
      lens, maps: measure these, too. Maps take L * T * M numbers of a text, so leave them out for the longest.
      heads: self-attention's maps by head as well.
      silence_pvm: take PVM's gates as 0: the same checkpoint without PVM.
      text_window: hide an answer's own tokens from those more than so many behind them, see `walk`.
      rows: texts at once.
      window: columns at once; each layer's scores of rows * heads * window * T numbers are the largest array there is.
    """
    graph, params = nnx.split(silenced(model) if silence_pvm else model)
    model = nnx.merge(graph, params)
    wanted = Wanted(lens=lens, maps=maps, heads=maps and heads)
    ways = ways_of(mesh_of(params))
    rows = -(-min(rows, max(len(sources), 1)) // ways) * ways
    traces = []
    for first in range(0, len(sources), rows):
        part = sources[first : first + rows]
        measures = _measure(model, part, wanted, rows, window, text_window)
        traces += [_trace(model.config, source, one, silence_pvm) for source, one in zip(part, measures)]
    return traces


def silenced(model: Qwen3VL) -> Qwen3VL:
    """The model with PVM's gates at 0: what its backbone computes alone."""
    graph, params = nnx.split(model)

    def gate(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        if path[-1] != "gate_alpha":
            return variable
        return variable.replace(jnp.zeros_like(variable[...], device=variable[...].sharding))

    return nnx.merge(graph, nnx.map_state(gate, params))


def _measure(
    model: Qwen3VL, sources: Sequence[Source], wanted: Wanted, rows: int, window: int, text_window: int | None
) -> list[dict[str, np.ndarray]]:
    """What `walk` measures at the answer's tokens of each text: [L,T,...]."""
    encoded = [source.encoded for source in sources]
    length = -(-bucket(max(len(e.tokens) for e in encoded)) // window) * window
    patches = PATCHES_PER_TOKEN * bucket(max(len(e.patches) for e in encoded) // PATCHES_PER_TOKEN)
    padded = [*encoded, *[encoded[-1]] * (rows - len(encoded))]  # padding; its measures are dropped
    batch = collate([[e] for e in padded], length=length, patches=patches)
    queries = [source.text.columns - 1 for source in sources]
    watched = np.bincount(np.concatenate(queries) // window, minlength=length // window) > 0
    found: list[list[dict[str, np.ndarray]]] = [[] for _ in sources]
    for start, measures in walk(model, batch, watched.tolist(), wanted, text_window):
        for row, (source, at) in enumerate(zip(sources, queries)):
            here = at[(at >= start) & (at < start + window)] - start
            visual = source.text.visual_tokens  # padded to the most of a group
            of_row = {
                name: x[:, row, here, ..., :visual] if name in MAPS else x[:, row, here] for name, x in measures.items()
            }
            found[row].append(of_row)
    return [{name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]} for parts in found]


def _trace(config: ModelConfig, source: Source, measured: dict[str, np.ndarray], silent: bool) -> Trace:
    text, pvm = source.text, config.pvm
    visual_mass, text_mass = (measured[name].swapaxes(1, 2) for name in ("visual_mass", "text_mass"))
    fits = dilution.fit_masses(text.text_before, visual_mass)
    return Trace(
        text=text,
        pvm_layers=pvm.layers if pvm else (),
        pvm_silenced=silent,
        dilution=Dilution(
            visual_mass=visual_mass,
            tvr=dilution.textual_dominance(visual_mass, text_mass),
            fit=fits.fit,
            fits=fits.fits,
            no_fit=fits.no_fit,
            pvm_entropy=measured["pvm_entropy"].swapaxes(1, 2) if pvm else None,
            pvm_ratio=measured.get("pvm_ratio"),
            pvm_choices=measured["pvm_choices"][0] if pvm and not pvm.slots else None,
        ),
        lens=_lens(measured) if "lens_token" in measured else None,
        maps=_maps(measured) if "attention" in measured else None,
        notes=tuple(_notes(config, source, fits.no_fit)),
    )


def _lens(measured: dict[str, np.ndarray]) -> Lens:
    fields = {name.removeprefix("lens_"): x for name, x in measured.items() if name.startswith("lens_")}
    predicted = fields.pop("predicted")[0]
    return Lens(predicted=predicted, settled=logit_lens.settled(fields["token"]), **fields)


def _maps(measured: dict[str, np.ndarray]) -> Maps:
    by_head = {name: measured[name].swapaxes(1, 2) if name in measured else None for name in MAPS[1:]}
    return Maps(measured["attention"], **by_head)


def _notes(config: ModelConfig, source: Source, no_fit: str | None):
    """Sentences about what is missing."""
    if not source.text.pictures:
        yield "The text has no image: no attention falls on visual tokens, and there are no maps."
    elif no_fit:
        yield f"No power law is fitted: {no_fit}."
    if config.pvm is None:
        yield "The checkpoint has no PVM: its entropy, its share and its maps are not there."
    elif config.pvm.slots:
        yield "PVM reads learned slots instead of the image: its entropy is over slots, and it has no maps."
