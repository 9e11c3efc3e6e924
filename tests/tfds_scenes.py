"""A tiny TFDS data set of noise images. In a module of its own: TFDS records where a builder's class lives."""

import json
from pathlib import Path

import tensorflow_datasets as tfds
import tiny


class Scenes(tfds.core.GeneratorBasedBuilder):
    """`flat`: question, answer, one image, metadata. `chat`: messages as JSON in a Text feature, several images."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="flat"), tfds.core.BuilderConfig(name="chat")]
    SIZES = {"train": 5, "test": 2}

    def _info(self) -> tfds.core.DatasetInfo:
        image = tfds.features.Image(shape=(None, None, 3), encoding_format="png")
        text = tfds.features.Text()
        if self.builder_config.name == "flat":
            features = {"image": image, "question": text, "answer": text, "metadata": text}
        else:
            features = {"images": tfds.features.Sequence(image), "messages": text, "id": text}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager) -> dict:
        return {split: self._generate_examples(size) for split, size in self.SIZES.items()}

    def _generate_examples(self, size: int):
        for i in range(size):
            yield i, (self._flat if self.builder_config.name == "flat" else self._chat)(i)

    def _flat(self, i: int) -> dict:
        return {
            "image": tiny.image(i, 40, 52),
            "question": f"which number is picture {i}?",
            "answer": f"number {i}",
            "metadata": json.dumps({"no_loss": [[0, 6]] if i % 2 else [], "number": i}),
        }

    def _chat(self, i: int) -> dict:
        turns = [{"role": "user", "content": "<image>" * i + "how many?"}, {"role": "assistant", "content": f"{i}."}]
        return {
            "images": [tiny.image(i + k, 40, 52) for k in range(i)],
            "messages": json.dumps(turns),
            "id": f"chat-{i}",
        }


def write(data_dir: Path, config: str) -> Path:
    """Writes the data set and returns the directory to read it from."""
    builder = Scenes(data_dir=str(data_dir), config=config, file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir)
