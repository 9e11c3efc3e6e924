"""The digit mosaics: task, TFDS builder, tokenizer and files of the tiny model, labels on visual tokens."""

import dataclasses
import functools
import itertools
import json

import numpy as np
import pytest
from sklearn.datasets import load_digits

from pvm_jax.config import ModelConfig
from pvm_jax.data import digits
from pvm_jax.data.digits_task import CELLS, NAMES, WORDS, Spec, digit_images, make_example, make_labels, reading_path
from pvm_jax.data.digits_tokenizer import SPECIAL_TOKENS, task_words, write_model_directory
from pvm_jax.data.images import DataError
from pvm_jax.data.loader import Loader, Stream
from pvm_jax.data.processor import Processor
from pvm_jax.data.sources import open_source

SMALL = {
    "demo": {
        "train_64": (6, Spec("train", 64)),
        "test_64": (5, Spec("test", 64)),
        "test_128": (3, Spec("test", 128, 66, verbose=1.0)),
    },
    "base": {"chains": (3, Spec("train", 128, 66, verbose=0.5, blank=True))},
    "text": {"ends": (3, Spec("train", 16, verbose=0.0, blank=True))},
}


def example(seed: int, **spec):
    return make_example(np.random.default_rng(seed), Spec(**({"digits": "test", "max_tokens": 128} | spec)))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return write_model_directory(tmp_path_factory.mktemp("digits_model"))


@pytest.fixture(scope="module")
def processor(model_dir):
    return Processor.from_pretrained(model_dir)


@pytest.fixture(scope="module")
def data_dirs(tmp_path_factory):
    """Small configs, built once: {config: directory}."""
    folder = tmp_path_factory.mktemp("digits_data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "SPLITS", SMALL)
        return {config: digits.prepare(folder, config) for config in SMALL}


# ---- The task -----------------------------------------------------------------------------------------------------


def test_train_and_test_share_no_digit_image():
    (train, train_labels), (test, test_labels) = digit_images("train"), digit_images("test")
    assert (len(train), len(test)) == (1437, 360)
    assert not {x.tobytes() for x in train} & {x.tobytes() for x in test}
    together = sorted(x.tobytes() for x in np.concatenate([train, test]))
    assert together == sorted((x / 16.0).tobytes() for x in load_digits().images)
    assert np.bincount(test_labels, minlength=10).min() > 20
    assert np.all(np.diff(train_labels) >= 0)


@pytest.mark.parametrize(
    ("order", "start", "path"),
    [
        ("rows forward", 34, [34, 35, 0, 1]),
        ("rows backward", 1, [1, 0, 35, 34]),
        ("columns forward", 24, [24, 30, 1, 7]),
        ("columns backward", 6, [6, 0, 35, 29]),
    ],
)
def test_reading_orders_wrap_around(order, start, path):
    assert reading_path(order, start, 4) == path
    assert sorted(reading_path(order, start, CELLS)) == list(range(CELLS))


@pytest.mark.parametrize("verbose", [0.0, 1.0])
def test_answers_read_the_cells_and_terse_ones_add_them_up(verbose):
    for seed in range(20):
        e = example(seed, verbose=verbose, max_tokens=505)
        words = e.answer.replace(",", "").replace(";", "").split()
        each = words[1:]
        size = 3 if verbose == 0 else 12  # verbose: two of the 14 tokens are punctuation
        last = [WORDS[t] for t in np.cumsum([e.labels[c] for c in e.cells]) % 10] if verbose == 0 else ["ago"]
        read = [(each[i], each[i + 1], each[i + size - 1]) for i in range(0, len(each), size)]
        lasts = itertools.cycle(last)
        assert read == [(NAMES[c], WORDS[e.labels[c]], next(lasts)) for c in e.cells]
        assert [e.answer[a:b] for a, b in e.digit_spans] == [WORDS[e.labels[c]] for c in e.cells]
        assert len(set(e.cells)) == len(e.cells)
        words = e.question.replace(",", "").split()
        assert (words[4], words[6]) == (NAMES[e.cells[0]], NAMES[e.cells[-1]])
        assert reading_path(e.order, e.cells[0], len(e.cells)) == list(e.cells)


def test_blocks_share_a_digit():
    sides = set()
    for seed in range(30):
        labels = make_labels(np.random.default_rng(seed), blocks=True).reshape(6, 6)
        sides |= {s for s in (1, 2, 3) if (labels == np.kron(labels[::s, ::s], np.ones((s, s), int))).all()}
    assert sides == {1, 2, 3}


def test_bounds_that_no_answer_meets_are_refused():
    with pytest.raises(ValueError, match="no verbose answer has 400 to 402 tokens: a read takes 14 tokens"):
        example(0, verbose=1.0, min_tokens=400, max_tokens=402)


# ---- Tokenizer and processor files --------------------------------------------------------------------------------


def test_every_word_of_the_task_is_one_token(processor):
    tokenizer = processor.tokenizer
    for word in task_words():
        assert len(tokenizer(word)["input_ids"]) == 1, word
    assert [tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS] == [
        processor.chat.special_ids[t] for t in SPECIAL_TOKENS
    ]
    other = "Größe: 17 \U0001f642\n"
    assert processor.decode(tokenizer(other)["input_ids"]) == other


@pytest.mark.parametrize(("style", "length"), [(0.0, (66, 109)), (1.0, (66, 128)), (1.0, (490, 505))])
def test_answer_lengths_in_tokens(processor, style, length):
    for seed in range(10):
        e = example(seed, verbose=style, min_tokens=length[0], max_tokens=length[1])
        ids = processor.tokenizer(e.answer)["input_ids"]
        assert length[0] <= len(ids) <= length[1]
        assert len(ids) == 1 + len(e.cells) * (3 if style == 0 else 14)


def test_a_cell_is_one_visual_token_and_not_rescaled(processor, data_dirs):
    source = open_source(data_dirs["demo"], split="test_64")
    encoded = processor.encode(source[0])
    assert encoded.patches.shape == (4 * CELLS, 1536)
    labels = source[0]["metadata"]["labels"]
    images, targets = digit_images("test")
    for token, label in enumerate(labels):
        # four patches of one visual token, back to the 8x8 digit: one pixel of 16 (4x4) each, [-1, 1]
        patches = encoded.patches[4 * token : 4 * token + 4].reshape(2, 2, 3, 2, 16, 16)[:, :, 0, 0, ::4, ::4]
        digit = (patches.transpose(0, 2, 1, 3).reshape(8, 8) + 1) / 2
        distance = np.abs(images - digit).max(axis=(1, 2))
        assert distance.min() < 0.003
        assert targets[distance.argmin()] == label


def test_shipped_files_are_those_that_the_code_writes(model_dir, repository):
    shipped = repository / "assets" / "digits_base"
    for file in sorted(model_dir.iterdir()):
        assert (shipped / file.name).read_text() == file.read_text(), file.name
    assert sum(f.stat().st_size for f in shipped.iterdir()) < 8 * 2**20


@pytest.fixture(scope="module")
def repository(request):
    return request.config.rootpath


def test_model_configuration_has_every_part_of_the_architecture(model_dir):
    config = ModelConfig.load(model_dir)
    assert config.vision.deepstack_visual_indexes
    assert not config.tie_word_embeddings
    assert config.vision.num_position_embeddings == 4 * CELLS


# ---- Builder ------------------------------------------------------------------------------------------------------


def test_rows_of_the_builder_are_the_examples(data_dirs):
    source = open_source(data_dirs["demo"], split="test_128")
    assert len(source) == 3
    for i in range(3):
        record = source[i]
        user, assistant = record["messages"]
        assert user["content"][0]["type"] == "image"
        meta = record["metadata"]
        text = assistant["content"]
        assert [text[a:b] for a, b in meta["digit_spans"]] == [WORDS[meta["labels"][c]] for c in meta["cells"]]


def test_building_again_gives_the_same_rows(data_dirs, tmp_path, monkeypatch):
    longer = {"demo": {name: (count + 2, spec) for name, (count, spec) in SMALL["demo"].items()}}
    monkeypatch.setattr(digits, "SPLITS", longer)
    again = digits.prepare(tmp_path, "demo")

    def rows(directory):
        source = open_source(directory, split="train_64")
        return {json.dumps(source[i]["metadata"]): source[i]["messages"][1]["content"] for i in range(len(source))}

    first, second = rows(data_dirs["demo"]), rows(again)
    assert len(second) == len(first) + 2
    assert first.items() <= second.items()


def test_unknown_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"digits have the configs \['demo', 'base', 'long', 'text'\], got 'demos'"):
        digits.prepare(tmp_path, "demos")


@pytest.mark.parametrize(("config", "split", "patches"), [("base", "chains", 4 * CELLS), ("text", "ends", 0)])
def test_chains_and_ends_show_no_digits_which_take_no_loss(config, split, patches, processor, data_dirs):
    source = open_source(data_dirs[config], split=split)
    for i in range(len(source)):
        encoded = processor.encode(source[i])
        assert len(encoded.patches) == patches
        assert np.all(encoded.patches == -1)
        meta = source[i]["metadata"]
        assert set(meta["labels"]) == {-1}
        answer = np.flatnonzero(encoded.tokens == processor.chat.special_ids["<|im_start|>"])[-1] + 3
        size = 3 if meta["style"] == "terse" else 14
        unlearned = answer + 2 + size * np.arange(len(meta["cells"]))
        rest = np.setdiff1d(np.arange(answer, len(encoded.tokens)), unlearned)
        assert not encoded.loss_mask[unlearned].any()
        assert encoded.loss_mask[rest].all()
        read = processor.decode(encoded.tokens[unlearned]).split()
        assert set(read) <= set(WORDS)


# ---- Labels on visual tokens --------------------------------------------------------------------------------------


@pytest.fixture
def labelled(processor, data_dirs):
    from pvm_jax.training.visual_labels import Auxiliary, LabelledLoader

    def make(split="train_64", config="demo", **options):
        source = open_source(data_dirs[config], split=split)
        stream = Stream(source, samples=3, length=288, patches=432, name="x")
        options = {"classes": 10, "side": 6, "late_step": 1} | options
        return source, LabelledLoader(Loader([stream], processor, seed=0), Auxiliary(**options))

    return make


def test_labels_stand_at_their_visual_tokens_in_packed_rows(labelled):
    source, loader = labelled()
    ahead = loader.prefetch(0)
    (batch, info), (later, _) = next(ahead), next(ahead)
    ahead.close()
    assert max(len(row) for row in info.rows) > 1, "the rows should be packed"
    for row, samples in enumerate(info.rows):
        expected = [label for index in samples for label in source[index]["metadata"]["labels"]]
        assert batch.labels[row, : len(expected), 0].tolist() == expected
        assert batch.labels[row, 7].tolist() == [expected[7], 1, 1]
        assert np.all(batch.labels[row, len(expected) :] == -1)
    assert (batch.weight[0], later.weight[0]) == (np.float32(0.5), np.float32(0.1))


def test_blank_mosaics_have_no_labels(labelled):
    batch, _ = next(loader_batches(labelled("chains", "base")[1]))
    assert np.all(batch.labels == -1)


def loader_batches(loader):
    ahead = loader.prefetch(0)
    yield next(ahead)
    ahead.close()


def test_labels_that_do_not_fit_are_refused(labelled):
    from pvm_jax.training.stage import TrainingError

    _, loader = labelled(side=5)
    with pytest.raises(TrainingError, match="expected metadata with `labels` for 5 x 5 visual tokens"):
        next(loader_batches(loader))


def test_head_loss_in_closed_form():
    import jax.numpy as jnp

    from pvm_jax.training.visual_labels import head_loss

    tokens = jnp.array([[[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]]])
    head = jnp.array([[np.log(3.0), 0.0], [0.0, 0.0]], jnp.float32)
    total, right, count = head_loss(tokens, head, jnp.array([[0, 1, -1]]))
    np.testing.assert_allclose(total, -np.log(3 / 4) - np.log(1 / 2), rtol=1e-6)
    assert (float(right), float(count)) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("init", "tied", "deviation"), [("fan_in", False, 1), ("fan_in", True, 0.1), ("normal", False, 0.02)]
)
def test_deviation_of_fresh_embeddings(init, tied, deviation):
    """A look-up has one input; a tied table of width 100 is the head's matrix, too."""
    from flax import nnx

    from pvm_jax.models.layers import Make

    table = Make(nnx.Rngs(0), init=init).table(500, 100, ("vocab", "embed"), tied)
    np.testing.assert_allclose(np.std(table[...]), deviation, rtol=0.02)


def test_auxiliary_loss_adds_its_weight_and_reaches_the_vision_tower(labelled, model_dir):
    import jax
    from flax import nnx

    from pvm_jax.models.qwen3_vl import Qwen3VL
    from pvm_jax.training.visual_labels import Auxiliary, VisualLabels

    _, loader = labelled()
    auxiliary = Auxiliary(classes=10, side=6)
    stage = VisualLabels(loader, auxiliary, width=96)
    batch = jax.tree.map(jax.numpy.asarray, next(loader_batches(loader))[0])
    model = Qwen3VL(ModelConfig.load(model_dir), rngs=nnx.Rngs(0), init="fan_in")
    model.extra = stage.make_extra(nnx.Rngs(1))

    def loss(model, weight):
        value = stage.loss_fn(model, dataclasses.replace(batch, weight=jax.numpy.full_like(batch.weight, weight)))
        return value.sum / value.count

    @functools.partial(jax.jit, static_argnums=0)
    def with_gradient(graph, state, weight):
        return jax.value_and_grad(lambda state: loss(nnx.merge(graph, state), weight))(state)

    of_weight = [with_gradient(*nnx.split(model), w) for w in (0.0, 0.5, 1.0)]
    losses = [float(value) for value, _ in of_weight]
    np.testing.assert_allclose(losses[2] - losses[1], losses[1] - losses[0], rtol=1e-4)
    # untrained: about chance for the class and 0.3 x chance for row and column
    assert abs(losses[2] - losses[0] - (np.log(10) + 0.6 * np.log(6))) < 1.0
    gradient = of_weight[-1][1]
    assert float(jax.numpy.abs(gradient.extra.label[...]).max()) > 0
    assert float(jax.numpy.abs(gradient.visual.patch_embed.weight[...]).max()) > 0


def test_metadata_without_spans_is_refused(processor, data_dirs):
    """An evaluation of other data says so instead of scoring nothing."""
    from pvm_jax.evals.digits import _answer

    source = open_source(data_dirs["demo"], split="test_64")
    loader = Loader([Stream(source, samples=2, length=128, patches=144)], processor, seed=0, pack=False)
    batch, info = next(loader.epoch())

    class Other:
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return {"id": "row", "messages": source[index]["messages"]}

        def describe(self, index):
            return f"other.jsonl row {index}"

    with pytest.raises(DataError, match=r"other.jsonl row \d: expected metadata with `digit_spans`, found none"):
        _answer(Other(), info, batch, 0, processor)
