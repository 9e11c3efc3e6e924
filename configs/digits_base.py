"""The tiny base model of the digits experiment, from scratch: the checkpoint in assets/digits_base.

Launch, from the repository's root (`make base`):
    python -m pvm_jax.data.prepare_digits runs/data --configs=base,text
    python train.py --config=configs/digits_base.py --workdir=runs/digits-base
    python train.py --config=configs/digits_base.py:long --workdir=runs/digits-base-long
    python -m pvm_jax.convert to_hf runs/digits-base-long runs/digits-base-hf

In the first run only config.json, tokenizer and processor files are taken from `model.path`; weights are random,
fan-in scaled. The second goes on from the first.

Recipe: a model that reads mosaics well in short answers and has seen long ones as text, so that what fails beyond the
trained length is reading. Kinds of batches:
    easy     first run, steps 0-600: 40 % of the mosaics are blocks of equal digits
    short    from step 600, and in the second run: answers of at most 37 tokens, two reads of a verbose answer
    chains   second run: answers of up to 505 tokens over a blank mosaic, without loss on the digits
    spans    second run: the same with up to 64 tokens, mostly verbose: the third cell of an answer and its end, which
             `short` gives away in the question ("from Au to Av")
    ends     second run, steps 0-900: terse answers of at most 16 tokens without an image. Where an answer ends is
             learned from them in 250 steps, and from mosaics, at some time, in a thousand or more
The first run has an auxiliary loss on the visual tokens (pvm_jax/training/visual_labels.py), without which digits
stay at chance. The patch embedding's learning rate is small: its 1,536 inputs are 16 values, 96 times each, and move
together.

Wall time       about 11 and 17 minutes on two CPU cores, other work beside them
Result          reads 0.995 in answers of 7-64 tokens, 0.62 from token 392 on (held-out digits); text right at 0.98 to
                0.99: what it still gets wrong are cells early in verbose answers of more than four reads, before two
                reads show the direction, and their ends

Arguments, separated by commas: `long`, the second run; `smoke`, the same configuration in a few steps.
"""

from ml_collections import ConfigDict

import configs.common as common

ARGUMENTS = ("long", "smoke")
TEXT = "runs/data/digits/text/2.0.0"


def get_config(argument: str = "") -> ConfigDict:
    words = [word for word in argument.split(",") if word]
    if unknown := [word for word in words if word not in ARGUMENTS]:
        raise ValueError(f"configs/digits_base.py: expected some of {', '.join(ARGUMENTS)}, got {unknown}")
    config = common.get_config()
    config.freeze = common.EVERYTHING
    data = config.data
    data.loss_normalization = "token"
    data.pack = False
    data.threads = 2
    data.samples = 48
    data.length = (96,)
    data.patches = (144,)
    optimizer = config.optimizer
    optimizer.floor = 0.03
    optimizer.b2 = 0.98
    optimizer.weight_decay = 0.05
    optimizer.multipliers = ((r"^visual/patch_embed/weight", 0.02),)
    config.checkpoint.every = 500
    config.log_every = 50
    if "long" in words:
        write_long(config)
    else:
        see(config)
    if "smoke" in words:
        shrink(config)
    return config.lock()


def see(config: ConfigDict) -> None:
    """The first run."""
    config.steps = 1600
    config.model.path = "assets/digits_base"
    config.model.init = "random"
    config.model.random_init = "fan_in"
    config.stage = {
        "module": "pvm_jax.training.visual_labels",
        "chunk": 128,
        "classes": 10,
        "side": 6,
        "weight": 0.5,
        "late_weight": 0.1,
        "late_step": 1200,
        "place_weight": 0.3,
    }
    config.optimizer.learning_rate = 3e-3
    config.optimizer.floor = 0.3
    config.optimizer.warmup_steps = 100
    config.data.path = "runs/data/digits/base/2.0.0"
    config.data.streams = {
        "easy": {"split": "easy", "stop": 600},
        "short": {"split": "short", "start": 600},
    }


def write_long(config: ConfigDict) -> None:
    """The second run."""
    config.steps = 2000
    config.model.path = "runs/digits-base"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 40
    config.data.path = "runs/data/digits/base/2.0.0"
    config.data.streams = {
        "chains": {"split": "chains", "samples": 6, "length": (576,)},
        "ends": {"path": TEXT, "split": "ends", "samples": 128, "length": (48,), "patches": (4,), "stop": 900},
        "spans": {"split": "spans", "samples": 48, "length": (128,)},
        "short": {"split": "short"},
    }


def shrink(config: ConfigDict) -> None:
    """A step or two of each kind of batch."""
    config.steps = 4
    config.log_every = 1
    config.checkpoint.every = 2
    for stream in config.data.streams.values():
        stream.samples = 2
        if "start" in stream:
            stream.start = 0
        if "stop" in stream:
            stream.stop = config.steps
