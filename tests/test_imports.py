"""PVM-JAX runs where neither torch nor TensorFlow is installed."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKER = textwrap.dedent("""
    import importlib.abc, sys

    class Blocker(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in {"torch", "torchvision", "tensorflow", "ml_dtypes_torch"}:
                raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)

    sys.meta_path.insert(0, Blocker())
""")


def run(code: str) -> str:
    """Standard output of `code` in a Python that has neither torch nor TensorFlow."""
    program = BLOCKER + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_blocker_blocks():
    with pytest.raises(AssertionError, match="No module named 'torch'"):
        run("import torch")


def test_every_module_imports():
    out = run("""
        import importlib, json, pkgutil
        import pvm_jax
        names = [m.name for m in pkgutil.walk_packages(pvm_jax.__path__, "pvm_jax.")]
        for name in [*names, "train", "eval"]:
            importlib.import_module(name)
        print(json.dumps(names))
    """)
    names = json.loads(out.splitlines()[-1])
    expected = {"convert", "checkpoint", "generate", "data.processor", "training.sft", "models.qwen3_vl"}
    assert {f"pvm_jax.{name}" for name in expected} <= set(names)


def test_load_process_read_and_generate(pvm_checkpoint):
    out = run(f"""
        import json
        import pvm_jax, tests.tiny as tiny
        model, processor = pvm_jax.load({str(pvm_checkpoint)!r}, dtype="float32")
        sample = tiny.conversations()["image"]
        hidden = model(processor([sample]))
        logits = model.logits(hidden)
        question = {{"messages": sample["messages"][:1]}}
        out = pvm_jax.generate(model, processor, [question], max_new_tokens=2, temperature=0.0)
        print(json.dumps([list(hidden.shape), list(logits.shape), len(out[0].token_ids)]))
    """)
    hidden, logits, generated = json.loads(out.splitlines()[-1])
    assert hidden == [1, 96, 64] and logits == [1, 96, 544] and 1 <= generated <= 2
