"""What the analyses of one text by one model give, as values: numpy arrays and strings.

    C  tokens of the text, prompt and visual tokens included
    T  tokens of its answer, the ones that are measured
    M  its visual tokens, in the order in which they stand in the text
    L  decoder layers     N  their heads     P  PVM layers     R  heads of a PVM layer

**Everything about an answer token is measured where it is predicted**: at the token before it, whose hidden state
becomes its distribution. Measure j of a text belongs to the answer token `text.ids[text.columns[j]]`, and its queries
stand in column `text.columns[j] - 1`.
"""

import dataclasses

import numpy as np
from jaxtyping import Float32, Int32
from PIL import Image


class AnalysisError(ValueError):
    """What cannot be analysed; one sentence that says what was expected, what arrived and what to do."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """One image, or the frames of a video that share their visual tokens.

    Attributes:
      label: "image 1", or "video 1, 0.5-1.0 s": the times of its first and last frame.
      pixels: what to draw on, upright, in RGB, in the size that it came in: the image, or the first of the two frames
        of a temporal patch.
      rows, columns: the grid of its visual tokens. It covers the whole frame, whatever its size: the frame was scaled
        to the grid, each axis on its own.
      start: its first visual token in 0 .. M-1; the rest follow row by row.
    """

    label: str
    pixels: Image.Image
    rows: int
    columns: int
    start: int

    @property
    def stop(self) -> int:
        """One behind its last visual token."""
        return self.start + self.rows * self.columns


@dataclasses.dataclass(frozen=True)
class Text:
    """What was read, and which part of it is measured.

    Attributes:
      name: of the sample.
      ids: token ids.
      pieces: the text of each token; joined they are the whole. A character of several tokens stands at its last one,
        and the others are empty.
      visual_index: which visual token stands in each place, -1 = text.
      columns: places of the measured tokens in `ids`, ascending, never 0; so many tokens there were when each was
        predicted.
      text_before: how many of those were text: t in the paper's bound on the attention to the image.
      pictures: what the visual tokens show, in order.
    """

    name: str
    ids: Int32[np.ndarray, " C"]
    pieces: tuple[str, ...]
    visual_index: Int32[np.ndarray, " C"]
    columns: Int32[np.ndarray, " T"]
    text_before: Int32[np.ndarray, " T"]
    pictures: tuple[Picture, ...]

    @property
    def visual_tokens(self) -> int:
        return int((self.visual_index >= 0).sum())


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """y = scale * t ** exponent; see `dilution.fit_power_law` for what the interval assumes.

    Attributes:
      exponent: -1 is the paper's bound.
      low, high: its interval of 95 %.
      scale: y at t = 1, as the line has it.
      r2: share of the variance of log y, between the bins of t, that the line explains.
      first, last: the range of t.
      bins: how many means the line goes through.
    """

    exponent: float
    low: float
    high: float
    scale: float
    r2: float
    first: float
    last: float
    bins: int


@dataclasses.dataclass(frozen=True)
class Dilution:
    """How much each token looks at the image, and what PVM does about it.

    Attributes:
      visual_mass: Omega_V, the sum of self-attention's weights on visual tokens; 0 for a text without any.
      tvr: the mass on text divided by the mass on visual tokens; infinite where the latter is 0.
      fit: of Omega_V, mean over layers and heads, over `Text.text_before`; None, and `no_fit` says why.
      fits: the same for each layer, mean over heads; None where one of them cannot be fitted, all without `fit`.
      no_fit: one sentence.
      pvm_entropy: of each PVM head's weights over what it may retrieve from, in nats; 0 where that is nothing. None
        without PVM, as the next one.
      pvm_ratio: |gate * branch| / |FFN's output| at each PVM layer, Euclidean norms.
      pvm_choices: how many visual tokens PVM may retrieve from: with a causal memory those of images before the token.
        None without PVM, and where its memory is learned slots instead of the image.
    """

    visual_mass: Float32[np.ndarray, "L N T"]
    tvr: Float32[np.ndarray, "L N T"]
    fit: PowerLaw | None
    fits: tuple[PowerLaw | None, ...]
    no_fit: str | None
    pvm_entropy: Float32[np.ndarray, "P R T"] | None
    pvm_ratio: Float32[np.ndarray, "P T"] | None
    pvm_choices: Int32[np.ndarray, " T"] | None


@dataclasses.dataclass(frozen=True)
class Lens:
    """The final norm and the unembedding applied to the hidden state behind each layer.

    Attributes:
      predicted: the model's own most probable next token, not the text's (`Text.ids[columns]`).
      token: the most probable token at each layer; at the last one `predicted`.
      rank, probability: of `predicted` at each layer; rank 1 is the most probable.
      given_rank, given_probability: of the text's own token.
      kl: from the model's distribution to the layer's, sum of p_final * log(p_final / p_layer), in nats.
      settled: the first layer from which on the most probable token is `predicted`, at most L - 1.
    """

    predicted: Int32[np.ndarray, " T"]
    token: Int32[np.ndarray, "L T"]
    rank: Int32[np.ndarray, "L T"]
    probability: Float32[np.ndarray, "L T"]
    given_rank: Int32[np.ndarray, "L T"]
    given_probability: Float32[np.ndarray, "L T"]
    kl: Float32[np.ndarray, "L T"]
    settled: Int32[np.ndarray, " T"]


@dataclasses.dataclass(frozen=True)
class Maps:
    """Where each token looks, by visual token; `retrieval.heat` turns a row of these into the map of a picture.

    Attributes:
      attention: self-attention's weights on visual tokens, mean over heads, as they are: over M they add up to the
        mean of Omega_V, not to 1.
      attention_heads: by head, where asked for.
      retrieval: PVM's weights; over M they add up to 1, or to 0 where the memory mask shows nothing. None without PVM,
        and where its memory is learned slots instead of the image.
    """

    attention: Float32[np.ndarray, "L T M"]
    attention_heads: Float32[np.ndarray, "L N T M"] | None
    retrieval: Float32[np.ndarray, "P R T M"] | None


@dataclasses.dataclass(frozen=True)
class Trace:
    """One text through one model.

    Attributes:
      text: the same for every model of one tokenizer and processor.
      pvm_layers: which decoder layers the P of PVM's arrays are; empty without PVM.
      pvm_silenced: PVM's gates were taken as 0.
      dilution, lens, maps: lens and maps are None where they were not asked for.
      notes: sentences about what is not there and why, for a reader of the results.
    """

    text: Text
    pvm_layers: tuple[int, ...]
    pvm_silenced: bool
    dilution: Dilution
    lens: Lens | None
    maps: Maps | None
    notes: tuple[str, ...]
