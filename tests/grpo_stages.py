"""A small GRPO stage, and prompts for it."""

import json
from pathlib import Path

import jax
import tiny

from pvm_jax.checkpoint import open_checkpoint
from pvm_jax.data.processor import Processor
from pvm_jax.data.share import Share
from pvm_jax.sharding import make_mesh
from pvm_jax.training import grpo
from pvm_jax.training.stage import Setup

SIZES = ((32, 64), (64, 96), (32, 32), (96, 64))
LIMIT = 12
ALONE = Share()


def write_prompts(folder: Path) -> Path:
    """Nine prompts in TRL's layout, with one image, two or none."""
    rows = []
    for i in range(9):
        names = [f"{i}-{k}.png" for k in range((1, 2, 0)[i % 3])]
        for k, name in enumerate(names):
            tiny.image(10 * i + k, *SIZES[(i + k) % len(SIZES)]).save(folder / name)
        rows.append({"id": f"p{i}", "prompt": tiny.text(i, 3 + 2 * i), "images": names, "solution": tiny.text(i, 2)})
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / "prompts.jsonl"


def make(
    small_checkpoint, file, workdir=None, mesh=None, micro_batches=1, data=None, share=ALONE, **options
) -> grpo.GRPO:
    data = {"path": str(file), "layout": "trl", "prompt_length": (112,), "length": (144,), "patches": (96,),
            "pack": True, "bad_rows": "error"} | (data or {})  # fmt: skip
    mesh = mesh or make_mesh(fsdp=1, devices=jax.devices()[:1])
    multiple = mesh.shape["data"] * mesh.shape["fsdp"] * micro_batches
    setup = Setup(
        open_checkpoint(small_checkpoint).config,
        Processor.from_pretrained(small_checkpoint),
        data,
        seed=3,
        row_multiple=multiple,
        share=share,
        workdir=workdir,
        mesh=mesh,
        micro_batches=micro_batches,
    )
    options = {"rewards": (("grpo_rewards:even", 1.0),), "max_new_tokens": LIMIT, "completions": 4, "prompts": 3,
               "mask_truncated": False} | options  # fmt: skip
    return grpo.make_stage(setup, **options)
