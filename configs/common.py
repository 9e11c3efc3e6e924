"""What every training configuration has; a configuration of its own starts from `get_config()` and fills it in.

Values given on the command line win: `--config.optimizer.learning_rate=3e-4`, `--config.data.length="(1024,2048)"`.
A `placeholder` is a value that may stay open.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

PVM_ONLY = (("pvm_block/", True), ("^extra/", True), ("", False))
"""(regular expression, trainable), the first that is found in a parameter's name decides; see training/freeze.py."""
LORA_ONLY = ((r"_lora/[ab]$", True), ("^extra/", True), ("", False))
PVM_AND_LORA = ((r"_lora/[ab]$", True), *PVM_ONLY)
EVERYTHING = (("", True),)


def get_config() -> ConfigDict:
    """The skeleton, unlocked."""
    return ConfigDict(
        {
            "seed": 0,
            "steps": placeholder(int),  # optimizer steps; None: as many as `epochs` takes
            "epochs": 1.0,
            "micro_batches": 1,  # gradient accumulation: parts in which a batch goes through the model
            "freeze": PVM_ONLY,
            "model": {
                "path": placeholder(str),  # Hugging Face directory, native checkpoint, or training workdir
                "init": "checkpoint",  # "random": only config.json, tokenizer and processor come from `path`
                "random_init": "normal",  # or "fan_in"
                "dtype": placeholder(str),  # None: float32 on CPUs, bfloat16 on accelerators
                "remat": False,  # recompute each layer in the backward pass
                "attention": "auto",  # by platform: "splash" on TPU, "cudnn" on CUDA, else the reference, "xla"
                "size": placeholder(str),  # released size of which pvm_jax.plan takes shapes where there is no path
                "lora": {  # low-rank adapters that the model gains; `freeze` must let them train
                    "rank": 0,  # 0: none
                    "alpha": placeholder(float),  # they are scaled by alpha / rank; None: not at all
                    "targets": "proj",  # regular expression, in names as layers.3.self_attn.q_proj; all match "proj"
                },
            },
            "processor": {
                # height x width of an image after the resize; None: the checkpoint's limits. 1,024 pixels are a token.
                "min_pixels": placeholder(int),
                "max_pixels": placeholder(int),
                "video_min_pixels": placeholder(int),
                "video_max_pixels": placeholder(int),
            },
            "stage": {"module": "pvm_jax.training.sft", "chunk": 128},  # chunk: columns per loss chunk
            "data": {
                "path": placeholder(str),  # JSONL or parquet: file, folder or glob; or a TFDS directory
                "split": "train",  # of a TFDS directory
                # A folder, .zip or .tar, or a glob of them; None: the folder of the file that names the image.
                "image_folder": placeholder(str),
                "rename": (),  # ((column, field), ...) where columns have other names than data/records.py knows
                "samples": 64,  # in each batch
                "length": (1024, 2048, 4096),  # T, tokens a row: the smallest that holds a batch's longest sample
                "patches": (4096, 8192, 16384),  # P, vision patches a row; four are a visual token
                "rows": placeholder(int),  # B; None: as few as hold the samples, packed
                "vision_masked": 0.0,  # visual attention dropout: share of batches; an addition of this project
                "position_shift": 0,  # answers are moved by 0 to so many positions at random; an addition, too
                "loss_normalization": "sample",  # every sample weighs the same; "token": every answer token
                "overlong": "skip",  # a sample beyond the largest bucket is left out and reported; or "error"
                "bad_rows": "error",  # the same choice for rows that cannot be read
                "pack": True,
                "threads": 4,
                "streams": {},  # several kinds of batches in turn, by name: see training/sft.py
            },
            "optimizer": {
                "learning_rate": 1e-4,
                "schedule": "cosine",  # or "constant"
                "schedule_steps": placeholder(int),  # where the cosine ends; None: at the last step
                "warmup_ratio": 0.1,
                "warmup_steps": placeholder(int),  # wins over the ratio
                "floor": 0.0,  # the cosine ends at floor x learning_rate
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.0,  # on matrices only
                "clip_norm": 1.0,
                "multipliers": (),  # ((regular expression, factor on the learning rate), ...)
            },
            "mesh": {"data": 1, "fsdp": -1, "tensor": 1},  # -1: the devices that are left
            "checkpoint": {"every": 500, "keep": 2},  # 0: only the last step
            "evals": {},  # {name: {"module": ..., "every": steps, options}}: see docs/evaluation.md
            "log_every": 10,  # 0: only after the last step
            "compilation_cache": placeholder(str),  # directory of compiled programs, shared by runs
        }
    )
