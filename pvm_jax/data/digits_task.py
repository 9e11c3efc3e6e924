"""Reading mosaics of real handwritten digits: the task of the embedded experiment, in numpy.

A mosaic has 6x6 cells of 32x32 pixels, one digit each, so that one cell is one merged visual token. The question
names an order, a first and a last cell and a style; the answer reads the cells in that order. A terse one adds the
running sum modulo 10 to each read, a verbose one pads each read with words:

    question          Read rows forward from Au to Aw, terse
    terse answer      Reading Au seven seven Av three zero Aw nine nine              3 tokens a read
    verbose answer    Reading Au seven, which somebody wrote by hand in ink a while ago; Av three, ...
                                                                                    14 tokens a read
A digit follows the name of its cell in both, so that the cell's own token looks it up.
Rows are A..F, columns u..z. No cell is read twice, so a digit can only come from the image, never from earlier text.
Words instead of figures because Qwen's pre-tokenizer splits figures from their space; every word here is one token
of the tokenizer in `digits_tokenizer.py`.
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Float, Int, UInt8

GRID = 6
CELLS = GRID * GRID
CELL_PIXELS = 32
DIGIT_PIXELS = 8

NAMES = tuple(row + column for row in "ABCDEF" for column in "uvwxyz")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STYLES = ("terse", "verbose")
ORDERS = ("rows forward", "rows backward", "columns forward", "columns backward")
OPENING = "Reading"
FILLER = "which somebody wrote by hand in ink a while ago"
TOKENS_PER_READ = {"terse": 3, "verbose": 14}


@dataclasses.dataclass(frozen=True)
class Spec:
    """What the examples of one split look like.

    Attributes:
      digits: which digit images, "train" or "test"; no image is in both.
      min_tokens, max_tokens: bounds of the answer's length, in tokens.
      verbose: share of answers in the verbose style.
      blocks: share of easy mosaics, whose cells form blocks of equal digits.
      blank: text-only chains: an empty mosaic under arbitrary digits, which then take no loss.
    """

    digits: str
    max_tokens: int
    min_tokens: int = 7
    verbose: float = 0.4
    blocks: float = 0.0
    blank: bool = False


@dataclasses.dataclass(frozen=True)
class Example:
    """One example; spans are [start, end) in characters of the answer."""

    image: UInt8[np.ndarray, "height width"]
    question: str
    answer: str
    style: str
    order: str
    labels: tuple[int, ...]  # the digit in each of the 36 cells, row by row; -1 where the cell is blank
    cells: tuple[int, ...]  # the cells read, in order
    digit_spans: tuple[tuple[int, int], ...]  # the words that read a digit off the image, one per cell read
    no_loss: tuple[tuple[int, int], ...]  # spans that are not to be learned

    def metadata(self) -> dict:
        """Everything but the image and the texts, as JSON-ready values."""
        names = ("style", "order", "labels", "cells", "digit_spans", "no_loss")
        return {name: getattr(self, name) for name in names}


@functools.cache
def digit_images(split: str) -> tuple[Float[np.ndarray, "n 8 8"], Int[np.ndarray, "n"]]:
    """Images in [0, 1] and labels of scikit-learn's digits: 1,437 for "train", the other 360 for "test".

    Sorted by label, so that the images of one digit are a range.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError("the digits come with scikit-learn: pip install -e '.[demo]'") from None
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    keep = {"train": order[360:], "test": order[:360]}[split]
    keep = keep[np.argsort(data.target[keep], kind="stable")]
    return data.images[keep] / 16.0, data.target[keep]


def reading_path(order: str, start: int, reads: int) -> list[int]:
    """The cells read from `start` on, wrapping around at the last one.

    reading_path("rows backward", 1, 3) == [1, 0, 35]; reading_path("columns forward", 0, 7)[:2] == [0, 6].
    """
    axis, direction = order.split()
    path = np.arange(CELLS).reshape(GRID, GRID)
    path = (path if axis == "rows" else path.T).ravel()
    step = 1 if direction == "forward" else -1
    first = int(np.flatnonzero(path == start)[0])
    return [int(path[(first + step * i) % CELLS]) for i in range(reads)]


def write_answer(style: str, cells: list[int], digits: list[int]) -> tuple[str, list[tuple[int, int]]]:
    """The answer and the span of every digit that had to be read off the image."""
    text, spans, total = OPENING, [], 0
    for cell, digit in zip(cells, digits, strict=True):
        total = (total + digit) % 10
        text += f" {NAMES[cell]} "
        spans.append((len(text), len(text) + len(WORDS[digit])))
        text += WORDS[digit]
        text += f" {WORDS[total]}" if style == "terse" else f", {FILLER};"
    return text, spans


def make_labels(rng: np.random.Generator, blocks: bool) -> Int[np.ndarray, "36"]:
    """A random digit for every cell; with `blocks`, fields of 1x1, 2x2 or 3x3 cells share one."""
    side = int(rng.choice([1, 2, 3])) if blocks else 1
    coarse = rng.integers(0, 10, (GRID // side, GRID // side))
    return np.kron(coarse, np.ones((side, side), np.int64)).ravel()


def draw_mosaic(rng: np.random.Generator, labels: Int[np.ndarray, "36"], digits: str) -> UInt8[np.ndarray, "h w"]:
    """The mosaic of 192x192 pixels. Training digits are shifted by up to a pixel, dimmed and made noisy."""
    images, targets = digit_images(digits)
    first, end = np.searchsorted(targets, labels), np.searchsorted(targets, labels, side="right")
    chosen = images[rng.integers(first, end)]
    if digits == "train":
        shifts = rng.integers(-1, 2, (CELLS, 2))
        padded = np.pad(chosen, ((0, 0), (1, 1), (1, 1)))
        chosen = np.stack([p[1 + y : 9 + y, 1 + x : 9 + x] for p, (y, x) in zip(padded, shifts, strict=True)])
        chosen = chosen * rng.uniform(0.8, 1.15, (CELLS, 1, 1)) + rng.normal(0, 0.08, chosen.shape)
    grid = chosen.reshape(GRID, GRID, DIGIT_PIXELS, DIGIT_PIXELS).swapaxes(1, 2)
    grid = grid.reshape(GRID * DIGIT_PIXELS, GRID * DIGIT_PIXELS)
    pixels = (np.clip(grid, 0, 1) * 255).round().astype(np.uint8)
    scale = CELL_PIXELS // DIGIT_PIXELS
    return pixels.repeat(scale, axis=0).repeat(scale, axis=1)


def make_example(rng: np.random.Generator, spec: Spec) -> Example:
    """Draws one example; the number of cells read is uniform over what the length bounds admit."""
    style = "verbose" if rng.random() < spec.verbose else "terse"
    each = TOKENS_PER_READ[style]
    fewest, most = -(-(spec.min_tokens - 1) // each), min(CELLS, (spec.max_tokens - 1) // each)
    if fewest > most:
        raise ValueError(
            f"no {style} answer has {spec.min_tokens} to {spec.max_tokens} tokens: a read takes {each} tokens "
            f"and a mosaic has {CELLS} cells; change the bounds or the share of verbose answers"
        )
    order = str(rng.choice(ORDERS))
    cells = reading_path(order, int(rng.integers(CELLS)), int(rng.integers(max(fewest, 1), most + 1)))
    labels = make_labels(rng, blocks=rng.random() < spec.blocks)
    answer, spans = write_answer(style, cells, [int(labels[c]) for c in cells])
    if spec.blank:
        image = np.zeros((GRID * CELL_PIXELS, GRID * CELL_PIXELS), np.uint8)
        labels = np.full(CELLS, -1)
    else:
        image = draw_mosaic(rng, labels, spec.digits)
    return Example(
        image=image,
        question=f"Read {order} from {NAMES[cells[0]]} to {NAMES[cells[-1]]}, {style}",
        answer=answer,
        style=style,
        order=order,
        labels=tuple(map(int, labels)),
        cells=tuple(cells),
        digit_spans=tuple(spans),
        no_loss=tuple(spans) if spec.blank else (),
    )
