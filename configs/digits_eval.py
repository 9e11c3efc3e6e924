"""Evaluation on digit mosaics of digits that were never trained on, by length of the answer.

Launch, from the repository's root:
    python -m pvm_jax.data.prepare_digits runs/data
    python eval.py --config=configs/digits_eval.py --workdir=runs/eval-base --config.checkpoint=assets/digits_base
    python -m pvm_jax.evals.compare runs/eval-*/digits.json --out=runs/reads.png

Whole answers, drawn (`sampled`):
    python -m pvm_jax.data.prepare_digits runs/data --questions
    python eval.py --config=configs/digits_eval.py:sampled --workdir=runs/drawn-grpo --config.checkpoint=runs/demo/grpo

Splits: answers of 7-64, 66-128, 140-256 and 490-505 tokens. What is measured: pvm_jax/evals/digits.py.

Arguments:
    brief    what ablations compare, in less time: `late`, answers of 490-505 tokens with the backbone as it is and
             blind, and `short`, exact match of the others
    sampled  whole answers, drawn at temperature 1, twice each, and compared word for word by the harness of the
             benchmarks
    smoke    two samples a split
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

ARGUMENTS = ("brief", "sampled", "smoke")


def get_config(argument: str = "") -> ConfigDict:
    words = [word for word in argument.split(",") if word]
    if unknown := [word for word in words if word not in ARGUMENTS]:
        raise ValueError(f"configs/digits_eval.py: expected some of {', '.join(ARGUMENTS)}, got {unknown}")
    smoke = "smoke" in words
    config = ConfigDict(
        {
            "checkpoint": placeholder(str),  # Hugging Face directory, native checkpoint, or training workdir
            "dtype": placeholder(str),  # None: float32 on CPUs, bfloat16 on accelerators
            "processor": {"min_pixels": placeholder(int), "max_pixels": placeholder(int)},
            "mesh": {"data": 1, "fsdp": -1, "tensor": 1},  # -1: the devices that are left
            "evals": {
                "digits": {
                    "module": "pvm_jax.evals.digits",
                    "path": "runs/data/digits/demo/2.2.0",
                    "splits": ("test_64", "test_128", "test_256", "test_505"),
                    "conditions": ("normal", "vision_masked", "other_memory"),
                    "samples": 2 if smoke else 16,
                    "length": (576,) if smoke else (320, 576),
                    "patches": (144,),
                    "limit": 2 if smoke else placeholder(int),
                }
            },
        }
    )
    if "brief" in words:
        every = config.evals.digits.to_dict()
        late = {"splits": ("test_505",), "conditions": ("normal", "vision_masked"), "length": (576,)}
        short = {"splits": ("test_64", "test_128", "test_256"), "conditions": ("normal",), "length": (320,)}
        config.evals = {"late": every | late, "short": every | short}
    if "sampled" in words:
        config.evals = {"sampled": sampled()}
    return config.lock()


def sampled() -> dict:
    return {
        "module": "pvm_jax.evals.harness",
        "benchmark": "file:digits",
        "path": "runs/data/digits-questions.jsonl",
        "protocol": "plain",
        "rule": "exact",
        "temperature": 1.0,
        "seeds": 2,
        "max_new_tokens": 512,
        "rows": 64,
        "prompt_length": (64,),
        "patches": (144,),
    }
