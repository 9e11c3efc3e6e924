"""Visual signal dilution: how much of self-attention is left for the image, and PVM's part beside it.

Source: arXiv 2605.00814. Omega_V(t), the mass of a token's self-attention on visual tokens, is bounded by
beta / (beta + mu * t) where t text tokens compete for it (theorem 3.1), which for long texts is a power law of exponent
-1. The textual dominance TVR(t) is the mass on text divided by the mass on visual tokens.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from scipy.special import stdtrit

from pvm_jax.analysis.results import AnalysisError, PowerLaw
from pvm_jax.evals.intervals import Mean, mean

BINS = 8
"""Of equal width in log t, that a fit averages in."""
MIN_BINS = 6
MIN_SPAN = 4.0
"""The largest t of a fit over its smallest."""


def masses(weights: Float[Array, "B Q N S"], visual: Bool[Array, "B S"]) -> dict[str, Float[Array, "B Q N"]]:
    """Self-attention's mass on visual tokens and on text."""
    on = visual.astype(weights.dtype)
    return {
        "visual_mass": jnp.einsum("BQNS,BS->BQN", weights, on),
        "text_mass": jnp.einsum("BQNS,BS->BQN", weights, 1 - on),
    }


def pvm_measures(
    weights: Float[Array, "B Q R M"], retrieved: Float[Array, "B Q D"], ffn: Float[Array, "B Q D"]
) -> dict[str, Array]:
    """Entropy of each head's retrieval [B,Q,R] in nats, and |retrieved| / |ffn| [B,Q].

    `retrieved` is what PVM adds to the FFN's output, its gate included.
    """
    safe = jnp.where(weights > 0, weights, 1)
    over, under = (jnp.linalg.norm(y.astype(jnp.float32), axis=-1) for y in (retrieved, ffn))
    return {"pvm_entropy": -jnp.sum(safe * jnp.log(safe), axis=-1), "pvm_ratio": over / under}


def textual_dominance(
    visual_mass: Float[np.ndarray, "*shape"], text_mass: Float[np.ndarray, "*shape"]
) -> Float[np.ndarray, "*shape"]:
    """TVR; infinite where nothing falls on visual tokens."""
    with np.errstate(divide="ignore"):
        return text_mass / visual_mass


def fit_power_law(t: np.ndarray, y: np.ndarray) -> PowerLaw:
    """Least squares of log y over log t, on the means of log y in bins of equal width in log t.

    Bins, so that the fit weighs every factor of t alike: of the tokens of a long text nine in ten lie in its last
    decade. And because neighbouring tokens resemble each other (autocorrelation), so that an interval from single
    tokens, taken as independent, is far too narrow.

    The interval is Student's, from the scatter of the bins' means around the line, which may differ between bins (HC3:
    the first ones hold few tokens). It assumes that the means deviate from the line independently of each other: with
    noise that lasts 10 tokens, from t = 30 to 1,030, it holds the exponent in 92 of 100 texts, with 40 tokens in 89. It
    is too narrow where a text goes through longer phases, or where the curve is no power law (look at the curve). And
    it says how well this text's exponent is known; how much exponents differ between texts is seen only with several
    of them (`mean_exponent`).

    Args:
      t: [T] positive.
      y: [T] positive.

    Raises:
      AnalysisError: too few tokens or too small a range of t, and what is needed; or y is not positive.
    """
    if not len(t):
        raise AnalysisError("a power law needs tokens, here there are none")
    first, last = float(np.min(t)), float(np.max(t))
    if not last >= MIN_SPAN * first > 0:
        raise AnalysisError(
            f"a power law needs an answer during which the text before it grows {MIN_SPAN:g}-fold, here it grows from "
            f"{first:g} to {last:g} tokens; continue the answer until {MIN_SPAN * first:g} stand before its last token"
        )
    blind = int(np.sum(~(np.asarray(y) > 0)))
    if blind:
        raise AnalysisError(
            f"a power law needs attention on the image at every token, here it is 0 at {blind} of {len(y)}"
        )
    log_t, log_y = np.log(np.asarray(t, np.float64)), np.log(np.asarray(y, np.float64))
    edges = np.linspace(log_t.min(), log_t.max(), BINS + 1)
    bin_of = np.clip(np.searchsorted(edges, log_t, side="right") - 1, 0, BINS - 1)
    filled = np.unique(bin_of)
    if len(filled) < MIN_BINS:
        raise AnalysisError(
            f"a power law needs tokens in at least {MIN_BINS} of {BINS} equal parts of log t, here they are in "
            f"{len(filled)}; measure a longer answer"
        )
    x, z = (np.array([v[bin_of == b].mean() for b in filled]) for v in (log_t, log_y))
    exponent, low, high, intercept, r2 = _line(x, z)
    return PowerLaw(exponent, low, high, math.exp(intercept), r2, first, last, len(filled))


def _line(x: np.ndarray, z: np.ndarray) -> tuple[float, float, float, float, float]:
    """Slope, its interval of 95 %, intercept and R² of the least-squares line."""
    dx, dz = x - x.mean(), z - z.mean()
    square = float(dx @ dx)
    slope = float(dx @ dz) / square
    left = dz - slope * dx
    # What each point would miss the line by, had the line been drawn without it (HC3).
    missed = left / (1 - 1 / len(x) - dx**2 / square)
    half = float(stdtrit(len(x) - 2, 0.975)) * math.sqrt(float(np.sum((dx * missed) ** 2))) / square
    total = float(dz @ dz)
    r2 = 1 - float(left @ left) / total if total > 0 else 1.0
    return slope, slope - half, slope + half, float(z.mean() - slope * x.mean()), r2


@dataclasses.dataclass(frozen=True)
class Fits:
    """The fields `fit`, `fits` and `no_fit` of `results.Dilution`."""

    fit: PowerLaw | None
    fits: tuple[PowerLaw | None, ...]
    no_fit: str | None


def fit_masses(text_before: np.ndarray, visual_mass: Float[np.ndarray, "L N T"]) -> Fits:
    """Power laws of Omega_V overall and by layer, or the sentence that says why there is none."""

    def fit(y: np.ndarray) -> PowerLaw | str:
        try:
            return fit_power_law(text_before, y)
        except AnalysisError as error:
            return str(error)

    overall = fit(visual_mass.mean(axis=(0, 1), dtype=np.float64))
    if isinstance(overall, str):
        return Fits(None, (None,) * len(visual_mass), overall)
    layers = [fit(layer.mean(axis=0, dtype=np.float64)) for layer in visual_mass]
    return Fits(overall, tuple(None if isinstance(one, str) else one for one in layers), None)


def mean_exponent(fits: Sequence[PowerLaw | None]) -> Mean | None:
    """The mean exponent of several texts' fits; None if none of them could be fitted."""
    return mean([fit.exponent for fit in fits if fit is not None])
