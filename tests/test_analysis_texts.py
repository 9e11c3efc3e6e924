"""What is analysed: texts given and written, their pictures, and fits of curves with known answers."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import tiny

from pvm_jax.analysis import dilution, texts
from pvm_jax.analysis.results import AnalysisError
from pvm_jax.analysis.retrieval import heat, rectangle
from pvm_jax.analysis.tracing import trace
from pvm_jax.checkpoint import load_model
from pvm_jax.data.images import DataError
from pvm_jax.data.processor import Processor

CONVERSATIONS = tiny.conversations()


@pytest.fixture(scope="module")
def processor(small_checkpoint):
    return Processor.from_pretrained(small_checkpoint)


@pytest.fixture(scope="module")
def model(small_checkpoint):
    return load_model(small_checkpoint, scan=True)


def text_of(processor, *messages):
    return texts.read(processor, [{"id": "it", "messages": list(messages)}])[0].text


# --------------------------------------------------------------------------------------------- texts


def test_what_is_measured(processor):
    """ "turns" has two answers; every token of both, and their ends of turn."""
    text = texts.read(processor, [CONVERSATIONS["turns"]])[0].text
    answers = [m["content"] for m in CONVERSATIONS["turns"]["messages"] if m["role"] == "assistant"]
    measured = "".join(text.pieces[i] for i in text.columns)
    assert measured == "<|im_end|>\n".join([*answers, ""])
    for column, before in zip(text.columns, text.text_before):
        assert before == (text.visual_index[:column] < 0).sum()
    assert text.name == "1" and len(text.pieces) == len(text.ids)


def test_what_is_not_learned_is_not_measured(processor):
    parts = [{"type": "text", "text": "one two"}, {"type": "text", "text": " three", "loss": False}]
    text = text_of(processor, tiny.user("count"), {"role": "assistant", "content": parts})
    measured = "".join(text.pieces[i] for i in text.columns)
    assert measured.startswith("one") and "three" not in measured and "three" in "".join(text.pieces)


def test_pieces_join_to_the_text(processor):
    whole = "naïve → 数字 \U0001f600 ok\ufffd, one"
    ids = processor.tokenizer(whole)["input_ids"]
    pieces = texts.pieces(processor, ids)
    assert "".join(pieces) == whole and len(pieces) == len(ids)
    assert "" in pieces and "\U0001f600" in pieces
    cut = texts.pieces(processor, ids[: pieces.index("\U0001f600")])
    assert "".join(cut) == "naïve → 数字 \ufffd", "a text that ends within a character"


def test_pieces_of_replacement_characters(processor, monkeypatch):
    """A text may really have U+FFFD: it holds nothing back, and the time is linear in the length."""
    whole = "a" + 200 * "\ufffd" + "\U0001f600" + 3 * "\ufffd" + "b\ufffd"
    ids = processor.tokenizer(whole)["input_ids"]
    decode, work = Processor.decode, []
    monkeypatch.setattr(Processor, "decode", lambda self, ids, **how: work.append(len(ids)) or decode(self, ids, **how))
    found = texts.pieces(processor, ids)
    assert "".join(found) == whole and len(found) == len(ids)
    assert max(map(len, found)) <= 2 and found.count("\ufffd") > 190
    assert max(work) <= 8 and len(work) < 16 * len(ids)
    emoji = processor.tokenizer("\U0001f600")["input_ids"]
    broken = texts.pieces(processor, emoji[:-1] * 20)  # bytes of nothing
    assert "".join(broken).count("\ufffd") >= 20 and len(broken) == 20 * (len(emoji) - 1)


def test_forced_answers_never_end(model, processor):
    """Where greedy decoding would stop at once, the answer goes on, with the most probable other token."""
    sample = CONVERSATIONS["image"]
    free = texts.write(model, processor, [sample], 40, forced=False)[0].text
    stop = int(free.ids[free.columns[-1]])
    impatient = dataclasses.replace(processor, eos_token_ids=(int(free.ids[free.columns[3]]), stop))
    ended = texts.write(model, impatient, [sample], 40, forced=False)[0].text
    forced = texts.write(model, impatient, [sample], 40)[0]
    assert len(ended.columns) <= 4
    answer = forced.text.ids[forced.text.columns]
    assert len(answer) == 40 and not np.isin(answer, impatient.eos_token_ids).any()
    prompt = processor.encode(sample | {"messages": sample["messages"][:1]}, add_generation_prompt=True)
    np.testing.assert_array_equal(forced.text.ids[: forced.text.columns[0]], prompt.tokens)
    lens = trace(model, [forced])[0].lens
    free_choice = ~np.isin(lens.predicted, [*impatient.eos_token_ids, *processor.banned_token_ids])
    assert free_choice.sum() > 10
    assert (lens.predicted == answer)[free_choice].all()


# ------------------------------------------------------------------------------------------ pictures


def test_rectangles_cover_the_pictures(processor):
    """Images of odd sizes: each visual token has its share of the picture as it came, row by row."""
    sizes = [(131, 47), (64, 160), (75, 141)]
    images = [tiny.image(i, *size) for i, size in enumerate(sizes)]
    text = text_of(processor, tiny.user(images[0], "and", *images[1:]), tiny.assistant("yes"))
    assert [p.label for p in text.pictures] == ["image 1", "image 2", "image 3"]
    assert text.pictures[-1].stop == text.visual_tokens
    for picture, (height, width) in zip(text.pictures, sizes):
        assert picture.pixels.size == (width, height)
        covered = np.zeros((picture.rows, picture.columns))
        for token in range(picture.start, picture.stop):
            left, top, right, bottom = rectangle(picture, token)
            assert math.isclose(right - left, width / picture.columns)
            assert math.isclose(bottom - top, height / picture.rows)
            row, column = int((top + bottom) / 2 // (bottom - top)), int((left + right) / 2 // (right - left))
            assert token == picture.start + row * picture.columns + column
            covered[row, column] += 1
        assert (covered == 1).all()
    with pytest.raises(AnalysisError, match=r"image 2: expected one of its visual tokens \d+ to \d+, got 0"):
        rectangle(text.pictures[1], 0)


def test_a_visual_token_is_the_part_of_the_picture_that_its_rectangle_says(processor):
    """A white square in a black picture, found again among the patches of its token alone."""
    from PIL import Image

    black = Image.new("RGB", (150, 70))
    sample = {"messages": [tiny.user(tiny.image(3, 64, 64), black), tiny.assistant("yes")]}
    picture = texts.read(processor, [sample])[0].text.pictures[1]
    assert picture.rows > 1 and picture.columns > 2
    token = picture.start + picture.columns + 2
    left, top, right, bottom = rectangle(picture, token)
    lit = black.copy()
    lit.paste((255, 255, 255), (round(left) + 8, round(top) + 8, round(right) - 8, round(bottom) - 8))
    sample["messages"][0]["content"][1]["image"] = lit
    patches = processor.encode(sample, targets=True).patches
    light = (patches > 0.5).reshape(-1, 4, patches.shape[1]).mean(axis=(1, 2))
    np.testing.assert_array_equal(np.flatnonzero(light[picture.start :]) + picture.start, [token])


def test_frames_of_a_video(processor):
    """Five frames at two a second: three temporal patches, the last one twice the same frame; then an image."""
    frames = [tiny.image(20 + i, 64, 96) for i in range(5)]
    text = text_of(processor, tiny.user(frames, "what?", tiny.image(30, 50, 50)), tiny.assistant("yes"))
    labels = [p.label for p in text.pictures]
    assert labels == ["video 1, 0.0-0.5 s", "video 1, 1.0-1.5 s", "video 1, 2.0-2.0 s", "image 1"]
    for picture, first in zip(text.pictures, (0, 2, 4)):
        np.testing.assert_array_equal(picture.pixels, frames[first])
    stops = [(p.start, p.stop) for p in text.pictures]
    assert all(a[1] == b[0] for a, b in itertools.pairwise(stops)) and stops[-1][1] == text.visual_tokens


def test_heat(processor):
    text = text_of(processor, tiny.user(tiny.image(0, 96, 64), tiny.image(1, 64, 128)), tiny.assistant("yes"))
    weights = np.arange(2 * text.visual_tokens, dtype=np.float32).reshape(2, -1)
    for picture in text.pictures:
        got = heat(picture, weights)
        assert got.shape == (2, picture.rows, picture.columns)
        np.testing.assert_array_equal(got[1].ravel(), weights[1, picture.start : picture.stop])


# ---------------------------------------------------------------------------------------------- fits


def test_a_power_law_is_found():
    t = np.arange(20, 2000)
    fit = dilution.fit_power_law(t, 0.4 * t**-0.8)
    np.testing.assert_allclose([fit.exponent, fit.low, fit.high, fit.scale, fit.r2], [-0.8, -0.8, -0.8, 0.4, 1])
    assert (fit.first, fit.last, fit.bins) == (20, 1999, dilution.BINS)


def test_the_interval_is_hc3s():
    """By its formula in matrices: (X'X)^-1 X' diag(e / (1 - h))^2 X (X'X)^-1, and Student's t of 6 degrees, 2.4469."""
    rng = np.random.default_rng(3)
    x = np.sort(rng.normal(size=8))
    z = 1 - 0.7 * x + rng.normal(size=8) * np.linspace(0.5, 0.05, 8)
    design = np.stack([np.ones(8), x], axis=1)
    inverse = np.linalg.inv(design.T @ design)
    coefficients = inverse @ design.T @ z
    leverage = np.einsum("ij,jk,ik->i", design, inverse, design)
    missed = (z - design @ coefficients) / (1 - leverage)
    covariance = inverse @ (design.T * missed**2) @ design @ inverse
    half = 2.446912 * np.sqrt(covariance[1, 1])
    slope, low, high, intercept, _ = dilution._line(x, z)
    expected = (coefficients[1], coefficients[1] - half, coefficients[1] + half, coefficients[0])
    assert (slope, low, high, intercept) == pytest.approx(expected, rel=1e-6)


def test_the_interval_allows_for_autocorrelation():
    """Noise that lasts ten tokens: nine of ten intervals hold the exponent; taken as independent, not half of them."""
    t, held, naive = np.arange(30, 1030), 0, 0
    rng = np.random.default_rng(0)
    x = np.log(t)
    for _ in range(300):
        noise = np.convolve(rng.normal(size=len(t) + 29), np.exp(-np.arange(30) / 10), "valid")
        log_y = -x + 0.1 * noise
        fit = dilution.fit_power_law(t, np.exp(log_y))
        held += fit.low < -1 < fit.high
        _, low, high, *_ = dilution._line(x, log_y)
        naive += low < -1 < high
    assert 0.89 < held / 300 < 0.98, held
    assert naive / 300 < 0.5, naive


@pytest.mark.parametrize(
    ("t", "y", "message"),
    [
        ([], [], "needs tokens, here there are none"),
        (
            range(50, 60),
            [0.1] * 10,
            "an answer during which the text before it grows 4-fold, here it grows from 50 to 59 tokens; "
            "continue the answer until 200 stand before its last token",
        ),
        ([1, 2, 100], [0.1] * 3, "tokens in at least 6 of 8 equal parts of log t, here they are in 3"),
        (range(1, 100), [0.1] * 98 + [0.0], "attention on the image at every token, here it is 0 at 1 of 99"),
    ],
)
def test_too_little_for_a_power_law(t, y, message):
    with pytest.raises(AnalysisError, match=message):
        dilution.fit_power_law(np.array(t), np.array(y))


def test_the_mean_of_exponents():
    fits = [dilution.fit_power_law(np.arange(1, 50), np.arange(1, 50) ** -e) for e in (0.9, 1.0, 1.1)]
    mean = dilution.mean_exponent([*fits, None])
    assert mean.count == 3 and math.isclose(mean.value, -1)
    assert math.isclose(mean.high - mean.low, 2 * 4.302653 * 0.1 / math.sqrt(3), rel_tol=1e-6)  # Student's, 2 degrees
    assert dilution.mean_exponent([None]) is None and dilution.mean_exponent(fits[:1]).low is None


# ----------------------------------------------------------------------------------------- bad input


def test_a_text_without_an_image(model, processor):
    got = trace(model, texts.read(processor, [CONVERSATIONS["short"]]))[0]
    assert not got.dilution.visual_mass.any() and np.isinf(got.dilution.tvr).all()
    assert got.maps.attention.shape[-1] == got.maps.retrieval.shape[-1] == 0
    assert not got.dilution.pvm_entropy.any() and not got.dilution.pvm_ratio.any()
    assert got.dilution.fit is None
    assert got.notes == ("The text has no image: no attention falls on visual tokens, and there are no maps.",)
    assert (got.lens.rank[-1] == 1).all()


@pytest.mark.parametrize(
    ("last", "answered"),
    [
        (tiny.assistant("one"), True),
        (tiny.assistant(" \n"), False),
        (tiny.assistant("") | {"content": [{"type": "text", "text": ""}]}, False),
        (tiny.assistant("") | {"content": [{"type": "text", "text": "one"}]}, True),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "zoom", "arguments": {}}}]}, True),
        (tiny.user("two"), False),
    ],
)
def test_an_empty_answer_is_none(last, answered):
    assert texts.ends_answered({"messages": [tiny.user("hello"), last]}) == answered


def test_what_cannot_be_read(processor):
    with pytest.raises(AnalysisError, match="sample 1: expected an answer to measure, found no assistant's turn"):
        texts.read(processor, [{"messages": [tiny.user("hello")]}])
    unlearned = [tiny.user("hello"), tiny.assistant("one two") | {"loss": False}]
    with pytest.raises(AnalysisError, match='all of its answers are marked "loss": false; take the mark from one, or'):
        texts.read(processor, [{"messages": unlearned}])
    with pytest.raises(DataError, match=r"sample 1: messages\[0\].content\[0\]"):
        texts.read(
            processor, [{"messages": [tiny.user("x", "y") | {"content": [{"type": "image", "image": "no.png"}]}]}]
        )
