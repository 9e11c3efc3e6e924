"""GRPO after SFT, the paper's second stage (arXiv 2605.00814): `configs/grpo.py:8b`; also 2b, 4b.

Launch, from the result of configs/sft.py:
    python train.py --config=configs/grpo.py:8b --workdir=runs/grpo-8b --config.model.path=runs/sft-8b \\
        --config.data.path=prompts.parquet --config.data.layout=trl
Answers are graded by algebra in process 0, which needs mathruler there: pip install -e '.[grade]'

Recipe (the public script, with TRL's defaults where it says nothing): everything trains but the vision tower; AdamW
1e-6, constant; 8 prompts x 8 completions a step, at most 16,384 new tokens, temperature 1; loss dapo, epsilon 0.2, no
KL term; advantages by group, over their standard deviation; completions that were cut off teach nothing; 0.1 for the
format, 0.9 for the right answer.

Data in the paper: 3.6k prompts of MMK12, ThinkLite-VL-hard, ViRL39K and We-Math2.0-Pro; the mix is not published.
Layouts: docs/data.md.

Planned memory  4B, 8 H100 of 79.1 GiB, --config.micro_batches=8: at most 45.1 GiB a device, while the cache grows; the
                update 20.8 GiB. 8B, v5p:4x4x4 (95.7 GiB): prefill 21.1, growth 21.0, decode 19.4, update 12.6 GiB. 8B,
                v5e:16x16 with --config.mesh.tensor=4 (15.75 GiB): prefill 6.4, growth 5.5, decode 5.0, update 7.8 GiB.
                Commands and the rest: docs/plans.md
Hardware        not measured
Wall time       not measured
Result          paper, mean of eight benchmarks: 8B 70.6 -> 71.5, 4B 67.2 -> 68.4; ours not measured

Arguments, separated by commas: the size, and `smoke`: the same configuration in a few steps of tiny batches.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

import configs.common as common

SIZES = ("2b", "4b", "8b")
ALL_BUT_VISION = (("^visual/", False), ("", True))
INSTRUCTION = (
    "Think about the question first and put your thoughts between <think> and </think>, then give the final answer "
    "between <answer> and </answer>."
)


def get_config(argument: str = "8b") -> ConfigDict:
    words = [word for word in argument.split(",") if word]
    unknown = [word for word in words if word not in (*SIZES, "smoke")]
    sizes = [word for word in words if word in SIZES]
    if unknown or len(sizes) > 1:
        raise ValueError(f"configs/grpo.py: expected one of {', '.join(SIZES)} and perhaps smoke, got {argument!r}")

    config = grpo()
    config.model.remat = True
    config.model.size = sizes[0] if sizes else "8b"
    config.stage.max_new_tokens = 16_384
    config.stage.rewards = (
        ("pvm_jax.training.rewards:format_reward", 0.1),
        ("pvm_jax.training.rewards:accuracy_reward", 0.9),
    )
    config.data.instruction = INSTRUCTION
    config.data.prompt_length = (1024, 2048)
    config.data.length = (4096, 8192, 18_432)
    config.data.patches = (4096, 8192)
    config.data.threads = 16
    config.processor.max_pixels = 1_605_632
    config.optimizer.learning_rate = 1e-6
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 0
    config.checkpoint.every = 50
    config.log_every = 1
    if "smoke" in words:
        shrink(config)
    return config.lock()


def grpo() -> ConfigDict:
    """The skeleton of a run of this stage, unlocked."""
    config = common.get_config()
    config.freeze = ALL_BUT_VISION
    config.stage = ConfigDict(
        {
            "module": "pvm_jax.training.grpo",
            "prompts": 8,
            "completions": 8,
            "max_new_tokens": placeholder(int),
            "temperature": 1.0,
            "rewards": (),
            "reward_errors": "error",  # or "zero": a reward function that fails costs its rows and is counted
            "loss_type": "dapo",  # or "grpo", "bnpo", "dr_grpo"
            "epsilon": 0.2,
            "epsilon_high": placeholder(float),  # None: as epsilon
            "beta": 0.0,  # above 0: a KL term against the model that the run began with
            "scale": "group",  # what advantages are divided by; or "batch", "none"
            "mask_truncated": True,
            "iterations": 1,  # steps that learn from one rollout
            "chunk": 128,
            "sampler_weights": "gathered",  # over mesh.fsdp, once a rollout; "split" needs less memory and more time
            "sampler_gap": 0.1,  # nats a token; above it, sampler and trainer do not agree and a warning says so
            "samples": 8,  # completions of each rollout that go to workdir/completions
        }
    )
    config.data = ConfigDict(
        {
            "path": placeholder(str),
            "layout": "trl",  # docs/data.md has the others
            "instruction": "",
            "system": "",
            "split": "train",
            "image_folder": placeholder(str),
            "rename": (),
            "bad_rows": "skip",  # and counted by reason; or "error"
            "prompt_length": (1024,),  # T of a prompt
            "length": (2048,),  # T of a row to learn from
            "patches": (4096,),
            "pack": True,
            "threads": 4,
        }
    )
    return config


def shrink(config: ConfigDict) -> None:
    """A few small steps on any machine."""
    config.steps = 4
    config.model.remat = False
    config.processor.max_pixels = 4096
    config.stage.prompts = 2
    config.stage.completions = 2
    config.stage.max_new_tokens = 16
    config.data.prompt_length = (128,)
    config.data.length = (192,)
    config.data.patches = (64,)
    config.data.threads = 2
    config.checkpoint.every = 2
