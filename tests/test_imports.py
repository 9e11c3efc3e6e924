"""PVM-JAX runs where neither torch nor TensorFlow is installed."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).parents[1]


def run(code: str) -> str:
    """Standard output of `code` in a Python that has neither torch nor TensorFlow."""
    argv = [sys.executable, "-c", textwrap.dedent(code)]
    env = tiny.without_torch(8)
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_they_are_absent():
    with pytest.raises(AssertionError, match="No module named 'torch'"):
        run("import torch")
    assert run("import importlib.util as i; print(i.find_spec('torch'), i.find_spec('tensorflow'))") == "None None\n"


def test_every_module_imports():
    out = run("""
        import importlib, json, pkgutil
        import pvm_jax
        names = [m.name for m in pkgutil.walk_packages(pvm_jax.__path__, "pvm_jax.")]
        for name in names:
            importlib.import_module(name)
        print(json.dumps(names))
    """)
    names = json.loads(out.splitlines()[-1])
    expected = {"convert", "checkpoint", "generate", "data.processor", "training.sft", "models.qwen3_vl"}
    assert {f"pvm_jax.{name}" for name in expected} <= set(names)


@pytest.mark.parametrize("program", ["train", "eval"])
def test_the_programs_import(program):
    run(f"import {program}")


def test_load_and_generate(pvm_checkpoint):
    out = run(f"""
        import pvm_jax, tests.tiny as tiny
        model, processor = pvm_jax.load({str(pvm_checkpoint)!r}, dtype="float32")
        question = {{"messages": tiny.conversations()["image"]["messages"][:1]}}
        out = pvm_jax.generate(model, processor, [question], max_new_tokens=2, temperature=0.0)
        print(len(out[0].token_ids), out[0].prompt_tokens)
    """)
    generated, prompt = map(int, out.splitlines()[-1].split())
    assert 1 <= generated <= 2 and prompt > 8
