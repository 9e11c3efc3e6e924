"""Samples become batches: the chat template, images, videos and indices of one checkpoint, together.

A sample is `{"messages": [...], "id": ...}`; a message's content is text, or a list of parts:

    {"type": "text", "text": "..."}
    {"type": "image", "image": path | bytes | PIL.Image}
    {"type": "video", "video": [frames] | path, "fps": 2.0}

Token ids are those of transformers' `Qwen3VLProcessor` for the same conversation, except where a user types a special
token (see `chat`). transformers is used for the tokenizer and the template alone; neither needs torch.

Each `<|image_pad|>` of the rendered text becomes one token per 2 x 2 patches of its image. Each `<|video_pad|>`
becomes, per temporal patch, `<1.5 seconds>`, `<|vision_start|>`, its tokens, `<|vision_end|>`. The template's own
vision markers stay around the whole video, as in transformers 5; 4.57 replaced them (`video_markers=False`).
"""

import dataclasses
import functools
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32

from pvm_jax.config import ModelConfig
from pvm_jax.data.batch import Batch
from pvm_jax.data.chat import Chat, load_template, read_object
from pvm_jax.data.images import DataError, PixelSettings, process_image
from pvm_jax.data.packing import PATCHES_PER_TOKEN, Encoded, collate
from pvm_jax.data.positions import patch_coords, position_corners, rope_positions
from pvm_jax.data.video import VideoSettings, process_video
from pvm_jax.model_files import write_json

LENGTH_MULTIPLE = 16  # rows of a batch without a given length are padded to this, for fewer compiled shapes


@dataclasses.dataclass(frozen=True)
class _Visual:
    """One image (no timestamps) or video: its patches and the grid, in patches, of each of its frames."""

    patches: np.ndarray
    grid: tuple[int, int]
    timestamps: tuple[float, ...] | None

    @property
    def frames(self) -> int:
        return len(self.timestamps or (0,))


@dataclasses.dataclass(frozen=True)
class Processor:
    """Encodes the conversations of one checkpoint; `from_pretrained` makes it."""

    chat: Chat
    config: ModelConfig
    images: PixelSettings
    video: VideoSettings
    eos_token_ids: tuple[int, ...]
    video_markers: bool = True

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        video_min_pixels: int | None = None,
        video_max_pixels: int | None = None,
        video_markers: bool = True,
    ) -> "Processor":
        """Reads config.json, tokenizer, chat template and preprocessor files of a checkpoint directory.

        Args:
          min_pixels, max_pixels: height * width of an image after the resize, instead of the checkpoint's limits
            (65,536 to 16,777,216 in published ones; one visual token is 1,024 pixels).
          video_min_pixels, video_max_pixels: the same for frames * height * width of a video.

        Raises:
          DataError: a file is missing or does not fit the others.
        """
        from transformers import AutoTokenizer

        directory = Path(directory)
        config = ModelConfig.load(directory)
        try:
            tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        except (OSError, ValueError) as e:
            raise DataError(f"{directory}: expected a tokenizer, but it cannot be read ({e})") from None
        images, video = _preprocessor_sections(directory)
        processor = cls(
            chat=Chat(tokenizer, load_template(directory, tokenizer)),
            config=config,
            images=PixelSettings.from_hf(*images, min_pixels, max_pixels),
            video=VideoSettings.from_hf(*video, video_min_pixels, video_max_pixels),
            eos_token_ids=_eos_token_ids(directory, tokenizer),
            video_markers=video_markers,
        )
        processor._check(str(directory))
        return processor

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, as transformers loads it."""
        return self.chat.tokenizer

    @functools.cached_property
    def banned_token_ids(self) -> Int32[np.ndarray, " banned"]:
        """What must never be sampled: vision tokens, and rows of the embedding without a token (padded vocabulary)."""
        vision = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
        config = self.config
        banned = {self.chat.special_ids[token] for token in vision if token in self.chat.special_ids}
        banned |= {config.image_token_id, config.video_token_id}
        banned |= {config.vision_start_token_id, config.vision_end_token_id}
        banned |= set(range(config.text.vocab_size)) - set(self.tokenizer.get_vocab().values())
        return np.array(sorted(banned), np.int32)

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        """Text of token ids, given as integers in a list or an array."""
        ids = [int(i) for i in ids]
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)

    def encode(
        self, sample: Mapping[str, Any], *, add_generation_prompt: bool = False, targets: bool | None = None
    ) -> Encoded:
        """One sample, unpadded.

        Args:
          add_generation_prompt: end with the opening of an assistant turn, to be continued by the model.
          targets: mark the assistant's turns in `loss_mask`; default: unless there is a generation prompt.

        Raises:
          DataError: in one sentence that names the sample, the message and the part.
        """
        where = f"sample {sample.get('id', '?')}"
        if targets is None:
            targets = not add_generation_prompt
        variables = {"tools": sample["tools"]} if sample.get("tools") else {}
        pieces = self.chat.render(
            sample.get("messages"),
            add_generation_prompt=add_generation_prompt,
            targets=targets,
            where=where,
            **variables,
        )
        ids, learned = self.chat.tokenize(pieces)
        images, videos = self._load_visuals(sample["messages"], where)
        for token, kind, given in (
            (self.config.image_token_id, "image", len(images)),
            (self.config.video_token_id, "video", len(videos)),
        ):
            if ids.count(token) != given:
                raise DataError(
                    f"{where}: expected one placeholder for each {kind}, got {given} {kind}s and {ids.count(token)} "
                    "placeholders; does the chat template show them in this role?"
                )
        return _Assembly(self).build(ids, learned, deque(images), deque(videos), str(sample.get("id", "?")))

    def __call__(
        self,
        samples: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        length: int | None = None,
        patches: int | None = None,
        loss_normalization: Literal["sample", "token"] = "sample",
        targets: bool | None = None,
    ) -> Batch:
        """A batch with one sample a row, padded on the right.

        Args:
          length, patches: T and P; by default the least that holds every sample, T a multiple of 16.

        Raises:
          DataError: a sample is larger than a given `length` or `patches`, or cannot be encoded.
        """
        encoded = [self.encode(s, add_generation_prompt=add_generation_prompt, targets=targets) for s in samples]
        if length is None:
            longest = max((len(e.tokens) for e in encoded), default=0)
            length = max(-(-longest // LENGTH_MULTIPLE), 1) * LENGTH_MULTIPLE
        if patches is None:
            patches = max((len(e.patches) for e in encoded), default=0) or PATCHES_PER_TOKEN
        return collate([[e] for e in encoded], length=length, patches=patches, loss_normalization=loss_normalization)

    def _load_visuals(self, messages: Sequence[Mapping[str, Any]], where: str) -> tuple[list[_Visual], list[_Visual]]:
        images: list[_Visual] = []
        videos: list[_Visual] = []
        for i, message in enumerate(messages):
            parts = message["content"] if not isinstance(message["content"], str) else ()
            for j, part in enumerate(parts):
                at = f"{where}: messages[{i}].content[{j}]"
                if part["type"] == "image":
                    patches, grid = process_image(part["image"], self.images, at)
                    images.append(_Visual(patches, grid, None))
                elif part["type"] == "video":
                    video = process_video(part["video"], self.video, part.get("fps"), at)
                    videos.append(_Visual(video.patches, video.grid, video.timestamps))
        return images, videos

    def _check(self, source: str) -> None:
        """The files of a checkpoint must agree with each other."""
        vision = self.config.vision
        for name, pixels in (("images", self.images), ("videos", self.video.pixels)):
            ours = (pixels.patch_size, pixels.temporal_patch_size, pixels.merge_size)
            model = (vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size)
            if ours != model:
                raise DataError(
                    f"{source}: {name}: expected patch_size, temporal_patch_size and merge_size {model} as in "
                    f"config.json's vision_config, got {ours}"
                )
        if vision.merge_unit != PATCHES_PER_TOKEN:
            raise DataError(f"{source}: expected spatial_merge_size 2, got {vision.spatial_merge_size}")
        special = set(self.chat.special_ids.values())
        for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
            if getattr(self.config, name) not in special:
                raise DataError(
                    f"{source}: {name}: expected a special token of the tokenizer, got {getattr(self.config, name)}"
                )
        largest = max(self.tokenizer.get_vocab().values())
        if largest >= self.config.text.vocab_size:
            raise DataError(
                f"{source}: expected token ids below text_config.vocab_size = {self.config.text.vocab_size}, "
                f"the tokenizer has {largest}"
            )


class _Assembly:
    """Puts the visual tokens of one sample in the places of their placeholders."""

    def __init__(self, processor: Processor):
        self.processor = processor
        self.tokens: list[int] = []
        self.learned: list[bool] = []
        self.visual_index: list[int] = []
        self.spans: list[int | tuple[int, int]] = []
        self.visuals: list[_Visual] = []
        self.count = 0

    def build(self, ids: list[int], learned: list[bool], images: deque, videos: deque, sample_id: str) -> Encoded:
        config = self.processor.config
        marker = 0 if self.processor.video_markers else 1  # tokens to leave out before and behind a video
        start = 0
        for i, token in enumerate(ids):
            if token == config.image_token_id:
                self._add_text(ids[start:i], learned[start:i])
                visual = images.popleft()
                self.visuals.append(visual)
                self._add_grid(visual, token)
                start = i + 1
            elif token == config.video_token_id:
                self._add_text(ids[start : i - marker], learned[start : i - marker])
                self._add_video(videos.popleft())
                start = i + 1 + marker
        self._add_text(ids[start:], learned[start:])
        return self._encoded(sample_id)

    def _add_video(self, video: _Visual) -> None:
        config = self.processor.config
        self.visuals.append(video)
        for seconds in video.timestamps:
            stamp = self.processor.chat.tokenize_text(f"<{seconds:.1f} seconds>")
            self._add_text([*stamp, config.vision_start_token_id])
            self._add_grid(video, config.video_token_id)
            self._add_text([config.vision_end_token_id])

    def _add_text(self, ids: list[int], learned: list[bool] | None = None) -> None:
        self.tokens += ids
        self.learned += learned or [False] * len(ids)
        self.visual_index += [-1] * len(ids)
        self.spans.append(len(ids))

    def _add_grid(self, visual: _Visual, token: int) -> None:
        merge = self.processor.config.vision.spatial_merge_size
        rows, columns = visual.grid[0] // merge, visual.grid[1] // merge
        self.tokens += [token] * (rows * columns)
        self.learned += [False] * (rows * columns)
        self.visual_index += range(self.count, self.count + rows * columns)
        self.spans.append((rows, columns))
        self.count += rows * columns

    def _encoded(self, sample_id: str) -> Encoded:
        vision = self.processor.config.vision
        side = round(vision.num_position_embeddings**0.5)
        positions, following = rope_positions(self.spans)
        coords, index, weight, segments = [], [], [], []
        for visual in self.visuals:
            at = patch_coords(*visual.grid, vision.spatial_merge_size)
            corners, weights = position_corners(at, *visual.grid, side)
            for _ in range(visual.frames):
                segments.append(np.full(len(at), len(segments) + 1, np.int32))
                coords.append(at)
                index.append(corners)
                weight.append(weights)
        patches = [visual.patches for visual in self.visuals] or [np.zeros((0, vision.patch_dim), np.float32)]
        return Encoded(
            tokens=np.array(self.tokens, np.int32),
            positions=positions,
            visual_index=np.array(self.visual_index, np.int32),
            loss_mask=np.array(self.learned, bool),
            patches=patches[0] if len(patches) == 1 else np.concatenate(patches),  # tens of megabytes: no needless copy
            patch_segment=np.concatenate([np.zeros(0, np.int32), *segments]),
            patch_coords=np.concatenate([np.zeros((0, 2), np.int32), *coords]),
            pos_index=np.concatenate([np.zeros((0, 4), np.int32), *index]),
            pos_weight=np.concatenate([np.zeros((0, 4), np.float32), *weight]),
            next_position=following,
            id=sample_id,
        )


_SECTIONS = (
    ("image_processor", ("preprocessor_config.json",)),
    ("video_processor", ("video_preprocessor_config.json", "preprocessor_config.json")),
)


def _preprocessor_sections(directory: Path) -> tuple[tuple[dict, str], tuple[dict, str]]:
    """(image section, its source), (video section, its source), in transformers' order of precedence.

    The newer layout is one processor_config.json with both sections; the published one has a file each. Without a file
    of their own, videos use the image file's settings.
    """
    both = directory / "processor_config.json"
    sections = read_object(both) if both.exists() else {}

    def section(name: str, files: tuple[str, ...]) -> tuple[dict, str]:
        if isinstance(sections.get(name), dict):
            return sections[name], f"{both}: {name}"
        for file in files:
            if (directory / file).exists():
                return read_object(directory / file), str(directory / file)
        raise DataError(f"{directory}: expected {files[-1]} or processor_config.json, found neither")

    images, video = (section(*known) for known in _SECTIONS)
    return images, video


def write_limits(directory: Path, processor: Processor) -> None:
    """Writes a processor's pixel limits into the preprocessor files of `directory`, from which it was made."""
    both = directory / "processor_config.json"
    sections = read_object(both) if both.exists() else {}
    used = (processor.images, processor.video.pixels)
    # Read before anything is written: videos may share the images' file.
    found = [dict(raw) for raw, _ in _preprocessor_sections(directory)]
    for (name, files), raw, pixels in zip(_SECTIONS, found, used, strict=True):
        raw |= {"size": {"shortest_edge": pixels.min_pixels, "longest_edge": pixels.max_pixels}}
        for older in ("min_pixels", "max_pixels"):  # they would have the last word
            raw.pop(older, None)
        if isinstance(sections.get(name), dict):
            sections[name] = raw
            write_json(both, sections)
        else:
            write_json(directory / files[0], raw)


def _eos_token_ids(directory: Path, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end an answer: of generation_config.json if it is there and names any, else the tokenizer's."""
    file = directory / "generation_config.json"
    ids = read_object(file).get("eos_token_id") if file.exists() else None
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        raise DataError(f"{directory}: expected eos_token_id in generation_config.json or the tokenizer, found none")
    ids = [ids] if isinstance(ids, int) else ids
    return tuple(int(i) for i in ids)
