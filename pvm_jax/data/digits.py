"""TFDS builder of the digit mosaics (`digits_task.py`); needs neither TensorFlow nor a download.

`prepare` (or `python -m pvm_jax.data.prepare_digits DATA_DIR`) writes `DATA_DIR/digits/demo/2.2.0`, to be read by
`tfds.builder_from_directory`. Config `demo` has what SFT and evaluation need (SFT answers of 7-64 and 100-256
tokens; test answers by length, the longest 490-505), `long` SFT answers as long as the longest of the test, `base` and
`text` what the tiny base model is trained on.
Features of a row:

    image      192x192 PNG; config `text` has none
    question   the user's text
    answer     the assistant's text
    metadata   JSON: style, order, labels of the 36 cells, cells read, `digit_spans` and `no_loss` (`[start, end)` in
               characters of the answer: the digits read off the image; the words that take no loss)
"""

import base64
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from pvm_jax.data.digits_task import Spec, make_example
from pvm_jax.data.sources import TfdsRows

SPLITS: dict[str, dict[str, tuple[int, Spec]]] = {
    "demo": {
        "sft_easy": (1600, Spec("train", 64, verbose=0.3, blocks=1.0)),
        "sft_64": (2400, Spec("train", 64, verbose=0.3)),
        "sft_256": (1600, Spec("train", 256, 100, verbose=0.8)),
        "prompts": (1600, Spec("train", 256, 16, verbose=0.7)),
        "test_64": (128, Spec("test", 64)),
        "test_128": (96, Spec("test", 128, 66, verbose=0.5)),
        "test_256": (96, Spec("test", 256, 140, verbose=1.0)),
        "test_505": (96, Spec("test", 505, 490, verbose=1.0)),
    },
    "base": {
        "easy": (14400, Spec("train", 23, blocks=0.4)),
        "short": (24000, Spec("train", 23)),
        "chains": (4000, Spec("train", 505, verbose=0.75, blank=True)),
        "spans": (12000, Spec("train", 100, verbose=0.8, blank=True)),
    },
    "long": {
        "sft_505": (1600, Spec("train", 505, 100, verbose=0.8)),
    },
    "text": {
        "ends": (16000, Spec("train", 16, verbose=0.0, blank=True)),
    },
}


TESTS = ("test_64", "test_128", "test_256", "test_505")


class Digits(tfds.core.GeneratorBasedBuilder):
    """Mosaics of scikit-learn's handwritten digits, with questions, reasoning and answers."""

    VERSION = tfds.core.Version("2.2.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in SPLITS]

    def _info(self) -> tfds.core.DatasetInfo:
        features = {name: tfds.features.Text() for name in ("question", "answer", "metadata")}
        if self._has_images:
            features["image"] = tfds.features.Image(shape=(None, None, 3), encoding_format="png")
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    @property
    def _has_images(self) -> bool:
        return self.builder_config.name != "text"

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        splits = SPLITS[self.builder_config.name]
        return {name: self._generate_examples(name, *splits[name]) for name in splits}

    def _generate_examples(self, split: str, count: int, spec: Spec) -> Iterator[tuple[int, dict]]:
        for i in range(count):
            # Each row has its own generator: a longer split begins with the rows of a shorter one.
            example = make_example(np.random.default_rng([zlib.crc32(split.encode()), i]), spec)
            row = {
                "question": example.question,
                "answer": example.answer,
                "metadata": json.dumps(example.metadata(), separators=(",", ":")),
            }
            yield i, row | ({"image": _png(example.image)} if self._has_images else {})


def write_questions(directory: str | Path, file: str | Path, splits: Sequence[str] = TESTS) -> Path:
    """Splits of `prepare`'s directory as a file of questions for `pvm_jax.evals.harness`: JSON lines, images in them.

    The index of a question is its split and row, its category the split.
    """
    file = Path(file)
    with file.open("w", encoding="utf-8") as lines:
        for split in splits:
            rows = TfdsRows(Path(directory), split)
            for i in range(len(rows)):
                row = rows.row(i)
                image = base64.b64encode(row["image"]).decode()
                texts = {name: row[name] for name in ("question", "answer")}
                lines.write(json.dumps({"index": f"{split}/{i}", **texts, "category": split, "image": image}) + "\n")
    return file


def _png(gray: np.ndarray) -> bytes:
    """An RGB file, encoded for speed."""
    file = io.BytesIO()
    Image.fromarray(gray).convert("RGB").save(file, "png", compress_level=1)
    return file.getvalue()


def prepare(data_dir: str | Path, config: str = "demo") -> Path:
    """Writes one config of the data set unless it is there; returns the directory to read it from."""
    if config not in SPLITS:
        raise ValueError(f"digits have the configs {list(SPLITS)}, got {config!r}")
    builder = Digits(data_dir=str(data_dir), config=config, file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir)
