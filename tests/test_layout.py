"""Which module may import which, and what no module does: read from the syntax trees, nothing is executed."""

import ast
import functools
import gc
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "pvm_jax").rglob("*.py"))
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
PROGRAMS = [ROOT / "train.py", ROOT / "eval.py"]

# A module imports only from its own level and from those before. The longest matching prefix decides.
LEVELS = (
    ("config", "lora", "cli", "distributed", "safetensors_io", "model_files", "pvm_init", "presets", "data.batch"),
    ("answers", "grading", "grading_child"),
    ("sharding",),
    ("models", "data"),
    ("hf_names", "hf_weights", "orbax_io", "fingerprint", "sampling"),
    ("convert", "checkpoint", "decoding", "decoding_weights", "generate", "hf_check", "lora_files"),
    ("training", "evals", "analysis"),
    ("planning",),
    ("plan",),
)
RANK = {name: rank for rank, names in enumerate(LEVELS) for name in names}


@functools.cache
def tree(file: Path) -> ast.Module:
    """The syntax tree of a file.

    Before Python 3.11.8 and 3.12.2 `ast.parse` fails when another parse runs inside it (python/cpython#106905). Such is
    the report of a failed asyncio task, whose traceback is formatted when the task is collected: so nothing is here.
    """
    gc.disable()
    try:
        return ast.parse(file.read_text(encoding="utf-8"), str(file))
    finally:
        gc.enable()


def name_of(file: Path) -> str:
    """`pvm_jax/data/chat.py` -> `data.chat`; packages by their folder, the package itself is empty."""
    parts = file.relative_to(ROOT / "pvm_jax").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, also inside functions; `from a import b` counts as `a.b`."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import; write the whole name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def tops(file: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(file)}


def ours(file: Path) -> set[str]:
    """Names within the package that a file imports; `pvm_jax.config.ModelConfig` -> `config.ModelConfig`."""
    return {name.removeprefix("pvm_jax.") for name in imports(file) if name.startswith("pvm_jax.")}


def rank(name: str) -> int:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in RANK:
            return RANK[".".join(parts[:end])]
    raise AssertionError(f"pvm_jax/{name.replace('.', '/')}: in no level; add it to LEVELS")


def relative(files: list[Path]) -> list[str]:
    return [str(f.relative_to(ROOT)) for f in files]


def inside(folder: str) -> list[Path]:
    return [f for f in PACKAGE if name_of(f).split(".")[0] == folder]


def test_garbage_collection_does_not_break_the_parse():
    class Parses:
        def __del__(self):
            ast.parse("f(a[1])")

    thresholds = gc.get_threshold()
    try:
        gc.set_threshold(100)  # a file of this package makes thousands of nodes
        for file in PACKAGE[:20]:
            circle = Parses()
            circle.itself = circle
            del circle
            tree.__wrapped__(file)
    finally:
        gc.set_threshold(*thresholds)


def test_there_is_something_to_read():
    assert len(PACKAGE) > 20 and CONFIGS and inside("data") and inside("evals") and inside("training")


@pytest.mark.parametrize("file", PACKAGE, ids=relative(PACKAGE))
def test_imports_go_one_way(file):
    name = name_of(file)
    if not name:  # the package gathers the public functions
        return
    later = {target for target in ours(file) if rank(target) > rank(name)}
    assert not later, f"{file}: imports {sorted(later)}, which is built on it"


def test_models_take_only_the_batch_from_data():
    for file in inside("models"):
        assert {t for t in ours(file) if t.startswith("data")} <= {"data.batch.Batch"}, file


def test_data_is_free_of_jax_and_of_models():
    for file in [*inside("data"), ROOT / "pvm_jax/config.py"]:
        assert not tops(file) & {"jax", "jaxlib", "flax", "optax", "orbax", "torch"}, file
        assert not {t for t in ours(file) if t.startswith(("models", "sharding"))}, file


def test_evals_and_analysis_do_not_know_training():
    for file in inside("evals") + inside("analysis"):
        assert not {t for t in ours(file) if t.startswith("training")}, file
    for file in inside("training"):
        assert not {t for t in ours(file) if t.startswith(("evals", "analysis"))}, file


def test_config_dicts_stop_at_the_door():
    for file in PACKAGE:
        # `python -m pvm_jax.plan` is a program like train.py; nothing imports it.
        assert "ml_collections" not in tops(file) or name_of(file) == "plan", file
        assert "plan" not in {target.split(".")[0] for target in ours(file)}, file
    for file in CONFIGS:
        assert tops(file) <= {"ml_collections", "configs"}, file


def test_torch_and_tensorflow_are_no_run_time_imports():
    for file in [*PACKAGE, *PROGRAMS]:
        allowed = {"torch"} if file.name == "hf_check.py" else set()  # `convert check` compares with torch
        assert not tops(file) & {"torch", "torchvision", "tensorflow"} - allowed, file


UNSAFE_NAMES = {"eval", "exec", "__import__"}
UNSAFE_MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


@pytest.mark.parametrize("file", PACKAGE + CONFIGS + PROGRAMS, ids=relative(PACKAGE + CONFIGS + PROGRAMS))
def test_no_code_from_data(file):
    """Checkpoints and data sets are read, never executed."""
    assert not tops(file) & UNSAFE_MODULES
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Call):
            assert not (isinstance(node.func, ast.Name) and node.func.id in UNSAFE_NAMES), f"line {node.lineno}"
            called = ast.unparse(node.func)
            if re.fullmatch(r"Auto\w+\.from_pretrained", called):  # the only one that would offer to run it
                assert "trust_remote_code" in {keyword.arg for keyword in node.keywords}, f"line {node.lineno}"
            for keyword in node.keywords:
                constant = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                assert keyword.arg != "trust_remote_code" or constant is False, f"line {node.lineno}"
                assert keyword.arg != "allow_pickle" or constant is False, f"line {node.lineno}"


# These call what others wrote: reward functions, and a grader on whatever a model wrote.
GUESTS = {"rewards.py", "grading_child.py"}


@pytest.mark.parametrize("file", PACKAGE + CONFIGS + PROGRAMS, ids=relative(PACKAGE + CONFIGS + PROGRAMS))
def test_no_error_is_swallowed_whole(file):
    """`except Exception` (or a bare one) hides the errors nobody thought of."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}"
            names = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
            raises = any(isinstance(n, ast.Raise) for n in ast.walk(node))
            assert raises or not names & {"Exception", "BaseException"} or file.name in GUESTS, f"line {node.lineno}"


def test_the_rules_can_fail(tmp_path):
    """The readers above on a file that breaks them."""
    file = tmp_path / "bad.py"
    file.write_text("def f():\n    import jax.numpy as jnp\n    from pvm_jax.training.sft import x\n")
    assert tops(file) == {"jax", "pvm_jax"}
    assert ours(file) == {"training.sft.x"}
    assert rank("training.sft.x") > rank("models.pvm") > rank("sharding") > rank("data.batch.Batch")
    with pytest.raises(AssertionError, match="in no level"):
        rank("utils")
