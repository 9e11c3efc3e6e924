"""Traces made by hand: what an analysis could give, with numbers that a test can recognise."""

import numpy as np
from PIL import Image

from pvm_jax.analysis.measures import Run
from pvm_jax.analysis.results import Dilution, Lens, Maps, Picture, PowerLaw, Text, Trace

SECRETS = "</script><script>window.stolen = 1</script><img src=x onerror='window.stolen = 2'>"
LAYERS, HEADS, PVM_HEADS, VOCAB = 4, 3, 2, 40
PROMPT = 5
"""Text tokens before the images."""


def picture(label: str, start: int, rows: int, columns: int, pixels: int = 32) -> Picture:
    y, x = np.mgrid[: rows * pixels, : columns * pixels] / pixels
    drawn = np.stack([np.sin(x + start), np.cos(y * x / 3), np.sin(y - x)], -1)
    return Picture(label, Image.fromarray(np.uint8(127 + 120 * drawn)), rows, columns, start)


def text(answer: list[str], pictures: tuple[Picture, ...], name: str = "first") -> Text:
    visual = pictures[-1].stop if pictures else 0
    words = ["What ", "is ", "in ", "it", "?"][:PROMPT]
    pieces = (*words, *["<|image_pad|>"] * visual, *answer)
    index = np.full(len(pieces), -1, np.int32)
    index[PROMPT : PROMPT + visual] = np.arange(visual)
    columns = np.arange(PROMPT + visual, len(pieces), dtype=np.int32)
    return Text(
        name=name,
        ids=np.where(index < 0, np.cumsum(index < 0) - 1, VOCAB - 1).astype(np.int32) % VOCAB,
        pieces=pieces,
        visual_index=index,
        columns=columns,
        text_before=columns - np.int32(visual),
        pictures=pictures,
    )


def words(count: int) -> list[str]:
    """An answer with an empty piece, a line break and markup in it."""
    known = [" cell", " in", " row", " two", " reads", " seven", ",", "\n"]
    made = [known[i % len(known)] for i in range(count)]
    return [SECRETS if i == 3 else "" if i == 4 else piece for i, piece in enumerate(made)]


def trace(of: Text, seed: int, pvm_layers: tuple[int, ...] = (1,), notes: tuple[str, ...] = ()) -> Trace:
    """Attention on the image falls as 1/t; retrieval looks at visual token t mod M; everything settles in layer 2."""
    rng = np.random.default_rng(seed)
    count, visual = len(of.columns), of.visual_tokens
    before = of.text_before.astype(np.float32)
    mass = (0.9 * before[0] / before * rng.uniform(0.8, 1.1, (LAYERS, HEADS, count))).astype(np.float32) * bool(visual)
    attention = rng.dirichlet(np.ones(max(visual, 1)), (LAYERS, count))[..., :visual] * mass.mean(1)[..., None]
    retrieval = 0.2 * rng.dirichlet(np.ones(max(visual, 1)), (len(pvm_layers), PVM_HEADS, count))[..., :visual]
    if visual:
        retrieval[..., np.arange(count), np.arange(count) % visual] += 0.8
    law = PowerLaw(-0.98, -1.1, -0.86, 4.2, 0.97, float(before[0]), float(before[-1]), 12)
    fits = visual and count >= 30
    has_pvm, ratios = bool(pvm_layers), rng.uniform(0.2, 0.9, (len(pvm_layers), count)).astype(np.float32)
    with np.errstate(divide="ignore"):
        dominance = ((1 - mass) / mass).astype(np.float32)
    logs = np.log(retrieval, where=retrieval > 0, out=np.zeros_like(retrieval))
    probability = rng.uniform(0.01, 0.4, (LAYERS, count)).astype(np.float32)
    probability[2:] = 0.95
    ids = np.arange(count, dtype=np.int32) % VOCAB
    return Trace(
        text=of,
        pvm_layers=pvm_layers,
        pvm_silenced=False,
        dilution=Dilution(
            visual_mass=mass,
            tvr=dominance,
            fit=law if fits else None,
            fits=(law if fits else None,) * LAYERS,
            no_fit=None if fits else f"a fit needs at least 30 tokens with an image, this text has {count}",
            pvm_entropy=-(retrieval * logs).sum(-1).astype(np.float32) if has_pvm else None,
            pvm_ratio=ratios if has_pvm else None,
            pvm_choices=np.full(count, visual, np.int32) if has_pvm else None,
        ),
        lens=Lens(
            predicted=ids,
            token=np.stack([(ids + 7) % VOCAB] * 2 + [ids] * 2),
            rank=np.stack([np.full(count, 50), np.full(count, 9), np.ones(count), np.ones(count)]).astype(np.int32),
            probability=probability,
            given_rank=np.ones((LAYERS, count), np.int32),
            given_probability=probability,
            kl=(3 * (1 - probability) * (np.arange(LAYERS)[:, None] < 3)).astype(np.float32),
            settled=np.full(count, 2, np.int32),
        ),
        maps=Maps(
            attention=attention.astype(np.float32),
            attention_heads=None,
            retrieval=retrieval.astype(np.float32) if has_pvm else None,
        ),
        notes=notes,
    )


def run(name: str, traces: list[Trace], **about) -> Run:
    return Run(name, {"checkpoint": f"runs/{name}"} | about, traces, {i: f" word{i}" for i in range(VOCAB)})
