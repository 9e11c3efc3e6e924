"""Benchmarks from files on disk: `configs/eval.py:mmstar`, or several: `configs/eval.py:mmstar,mathverse`.

Launch:
    python eval.py --config=configs/eval.py:mmstar,ai2d --workdir=runs/eval-8b --config.checkpoint=runs/sft-8b \\
        --config.evals.mmstar.path=MMStar.tsv --config.evals.ai2d.path=ai2d/test-*.parquet
    python -m pvm_jax.evals.report runs/eval-base/*.json runs/eval-8b/*.json --out=report.html

Benchmarks: mmmu, mmbench_en, mmbench_cn, mmstar, mmt, mathverse, mathvision, ai2d; `custom` for a file of your own
(docs/evaluation.md has the layouts). Also an argument: the protocol, `pvm_reasoning` (the default: room to reason,
think and answer tags, four seeds), `lmms_default` (prompts and limits of lmms-eval) or `plain`.

Started again with the same flags, an evaluation goes on where it was.

The paper's figures (8B after SFT and GRPO: 71.5, the mean of eight) come from an unpublished protocol; nobody has
measured them with this code.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

BENCHMARKS = ("mmmu", "mmbench_en", "mmbench_cn", "mmstar", "mmt", "mathverse", "mathvision", "ai2d", "custom")
PROTOCOLS = ("pvm_reasoning", "lmms_default", "plain")


def get_config(argument: str = "") -> ConfigDict:
    words = [word for word in argument.split(",") if word]
    names = [word for word in words if word in BENCHMARKS]
    protocols = [word for word in words if word in PROTOCOLS]
    unknown = [word for word in words if word not in names + protocols]
    if unknown or not names or len(protocols) > 1:
        raise ValueError(
            f"configs/eval.py: expected some of {', '.join(BENCHMARKS)} and at most one of {', '.join(PROTOCOLS)}, "
            f"separated by commas, got {argument!r}"
        )
    protocol = protocols[0] if protocols else "pvm_reasoning"
    config = ConfigDict(
        {
            "checkpoint": placeholder(str),  # Hugging Face directory, native checkpoint, or training workdir
            "dtype": placeholder(str),  # None: float32 on CPUs, bfloat16 on accelerators
            "processor": {},
            # -1: the devices that are left, each with the whole model and a share of the questions. Where one device
            # cannot hold it, `tensor` splits it; docs/evaluation.md says how much.
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
            "evals": {name: entry(name, protocol) for name in names},
        }
    )
    return config.lock()


def entry(benchmark: str, protocol: str) -> dict:
    """An entry of `config.evals`; its keys are the fields of `pvm_jax.evals.harness.Options`."""
    return {
        "module": "pvm_jax.evals.harness",
        "benchmark": "file:custom" if benchmark == "custom" else benchmark,
        "path": placeholder(str),
        "split": placeholder(str),
        "protocol": protocol,
        "seeds": placeholder(int),  # answers to each question; None: as the protocol says
        "limit": placeholder(int),  # the first so many questions
        "max_new_tokens": placeholder(int),  # None, here and below: as the protocol says
        "temperature": placeholder(float),
        "min_pixels": placeholder(int),  # of an image
        "max_pixels": placeholder(int),
        "rule": placeholder(str),  # that finds the answer, of pvm_jax.evals.extract
        "rows": 64,  # answers at once
        "prompt_length": (512, 1024, 2048, 4096, 8192, 16_384),  # tokens of a prompt; each is a program
        "patches": (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536),
        "threads": 16,
        "weights": "gathered",  # over mesh.fsdp, before the first question; "split" needs less memory and more time
        # A model behind an OpenAI-compatible endpoint, without a base_url nobody; the key's environment variable.
        "judge": {"base_url": placeholder(str), "model": placeholder(str), "key_variable": ""},
        "random_seed": placeholder(int),  # draws a letter where there is none, as some toolkits do
        "judge_when": "unparsed",  # or "wrong", "all"
    }
