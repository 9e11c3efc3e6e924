"""transformers' own Qwen3-VL processor, made to run without torchvision: the oracle of the processor's tests.

Everything is transformers' code except what torchvision does to the pixels of videos: frames are resized by PIL, as in
`pvm_jax.data.video`, and the normalisation is written out.
"""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.video_processing_utils import BaseVideoProcessor


class _WithoutTorchvision(BaseVideoProcessor):
    def resize(self, image, size, resample=None, **unused):
        frames = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in image[0]]
        resized = [np.asarray(frame.resize((size.width, size.height), resample=int(resample))) for frame in frames]
        return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)[None]

    def normalize(self, image, mean, std, **unused):
        return (image - mean[:, None, None]) / std[:, None, None]

    def convert_to_rgb(self, video):
        return video


class VideoProcessor(Qwen3VLVideoProcessor, _WithoutTorchvision):
    """Qwen3VLVideoProcessor, whose `super()` is the class above."""


class _Processor(Qwen3VLProcessor):
    def check_argument_for_proper_class(self, name, argument):
        """The real one looks up classes that exist only with torchvision."""


class HFProcessor:
    """Calls transformers' processor with a sample of ours."""

    def __init__(self, directory: Path):
        self.config = AutoConfig.from_pretrained(directory)
        self.processor = _Processor(
            image_processor=Qwen2VLImageProcessorPil.from_pretrained(directory),
            tokenizer=AutoTokenizer.from_pretrained(directory),
            video_processor=VideoProcessor.from_pretrained(directory),
        )

    def __call__(self, sample: Mapping[str, Any], add_generation_prompt: bool = False) -> dict[str, np.ndarray]:
        """`input_ids`, `mm_token_type_ids`, `pixel_values`, `image_grid_thw`, ... of one sample, as numpy arrays."""
        messages = sample["messages"]
        text = self.processor.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
        images = [part["image"] for part in parts if part["type"] == "image"]
        videos = [part for part in parts if part["type"] == "video"]
        visual = {}
        if images:
            visual["images"] = images
        if videos:
            visual["videos"] = [np.stack([np.asarray(frame) for frame in part["video"]]) for part in videos]
            visual["video_metadata"] = [
                {
                    "total_num_frames": len(part["video"]),
                    "fps": part.get("fps"),
                    "frames_indices": list(range(len(part["video"]))),
                }
                for part in videos
            ]
            visual["do_sample_frames"] = False
        return {name: np.asarray(value) for name, value in self.processor(text=[text], **visual).items()}

    def positions(self, inputs: Mapping[str, np.ndarray]) -> tuple[np.ndarray, int]:
        """MRoPE positions [3,T] and the next position, by the model's `get_rope_index`."""
        model = SimpleNamespace(config=self.config)
        model.get_vision_position_ids = Qwen3VLModel.get_vision_position_ids.__get__(model)
        tensors = {
            name: torch.from_numpy(inputs[name])
            for name in ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw")
            if name in inputs
        }
        positions, delta = Qwen3VLModel.get_rope_index(model, **tensors)
        return positions[:, 0].numpy(), int(delta) + inputs["input_ids"].shape[1]
