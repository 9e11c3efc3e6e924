"""The tiny base model of the digits experiment, from scratch: the checkpoint in assets/digits_base.

Launch, from the repository's root:
    python -m pvm_jax.data.prepare_digits runs/data --configs=demo,base
    python train.py --config=configs/digits_base.py --workdir=runs/digits-base
    python -m pvm_jax.convert to_hf runs/digits-base DIR

Only config.json, tokenizer and processor files are taken from `model.path`; weights are random, fan-in scaled.

Recipe: a model that reads mosaics well in short answers and writes long answers without fault, so that what fails
beyond the trained length is reading. Three kinds of batches:
    easy     steps 0-600: 40 % of the mosaics are blocks of equal digits
    short    from step 600: answers of at most 64 tokens
    chains   from step 1,000, in turn with `short`: answers of up to 505 tokens over a blank mosaic, no loss on digits
An auxiliary loss on the visual tokens (pvm_jax/training/visual_labels.py), without which digits stay at chance.
The patch embedding's learning rate is small: its 1,536 inputs are 16 values, 96 times each, and move together.

Argument `smoke`: the same configuration in a few steps.
"""

from ml_collections import ConfigDict

import configs.common as common


def get_config(argument: str = "") -> ConfigDict:
    if argument not in ("", "smoke"):
        raise ValueError(f"configs/digits_base.py: expected no argument or smoke, got {argument!r}")
    config = common.get_config()
    config.steps = 2000
    config.freeze = common.EVERYTHING
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
        "late_step": 1400,
        "place_weight": 0.3,
    }

    data = config.data
    data.path = "runs/data/digits/base/1.0.0"
    data.loss_normalization = "token"
    data.pack = False
    data.threads = 2
    data.samples = 16
    data.length = (128,)
    data.patches = (144,)
    data.streams = {
        "easy": {"split": "easy", "stop": 600},
        "short": {"split": "short", "start": 600},
        "chains": {"split": "chains", "start": 1000, "samples": 4, "length": (576,)},
    }

    optimizer = config.optimizer
    optimizer.learning_rate = 3e-3
    optimizer.warmup_steps = 100
    optimizer.floor = 0.03
    optimizer.b2 = 0.98
    optimizer.weight_decay = 0.05
    optimizer.multipliers = ((r"^visual/patch_embed/weight", 0.02),)
    config.checkpoint.every = 500
    config.log_every = 50
    if argument == "smoke":
        shrink(config)
    return config.lock()


def shrink(config: ConfigDict) -> None:
    """A step or two of each kind of batch."""
    config.steps = 4
    config.log_every = 1
    config.data.samples = 2
    config.data.streams.easy.stop = 1
    config.data.streams.short.start = 1
    config.data.streams.chains.start = 2
    config.data.streams.chains.samples = 1
