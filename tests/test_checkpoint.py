"""Model directories of all three kinds: found out, loaded in any grouping and already sharded, and checked."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from safetensors import numpy as st

import pvm_jax
from pvm_jax import orbax_io
from pvm_jax.checkpoint import (
    CheckpointError,
    abstract_model,
    abstract_params,
    base_record,
    checksum,
    load_model,
    load_params,
    open_checkpoint,
    save_native,
)
from pvm_jax.config import ConfigError, ModelConfig
from pvm_jax.convert import convert_from_hf, convert_to_hf
from pvm_jax.hf_names import leaves
from pvm_jax.model_files import copy_files, write_json
from pvm_jax.safetensors_io import WeightsError
from pvm_jax.sharding import make_mesh
from pvm_jax.training.checkpoints import Checkpoints
from pvm_jax.training.step import TrainState

GATE = "text/layers/4/pvm_block/gate_alpha"


@pytest.fixture(scope="module")
def native(pvm_checkpoint, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("native") / "checkpoint"
    convert_from_hf(pvm_checkpoint, path)
    return path


def wanted(config: ModelConfig, scan: bool = True, mesh=None) -> dict[str, jax.ShapeDtypeStruct]:
    return abstract_params(nnx.state(abstract_model(config, scan=scan)), mesh)


def values(model: nnx.Module) -> dict[str, np.ndarray]:
    return {"/".join(map(str, path)): np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(model))}


def assert_equal(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for path in want:
        np.testing.assert_array_equal(np.asarray(got[path]), np.asarray(want[path]), err_msg=path)


def by_layer(params: dict) -> dict[str, np.ndarray]:
    """Parameters of layers one by one, whatever their grouping."""
    flat = {}
    for path, value in params.items():
        head, sep, tail = path.partition("text/layers/")
        if not sep:
            flat[path] = np.asarray(value)
            continue
        name, _, rest = tail.partition("/")
        first = int(name.split("-")[0])
        flat |= {f"{head}{sep}{first + i}/{rest}": np.asarray(value[i]) for i in range(len(value))}
    return flat


def write_workdir(workdir: Path, base: Path | None, trainable: dict[str, np.ndarray], steps=(3,)) -> Path:
    """As training leaves it: `trainable` grows by 1 with each step that is written."""
    (workdir / "model").mkdir(parents=True)
    files = open_checkpoint(base).files
    copy_files(files, workdir / "model")
    shutil.copyfile(files / "config.json", workdir / "model" / "config.json")
    write_json(workdir / "model" / "base.json", base_record(base))
    checkpoints = Checkpoints(workdir, keep=9)
    for i, step in enumerate(steps):
        grown = {path: jax.device_put(value + np.float32(i)) for path, value in trainable.items()}
        checkpoints.save(step, TrainState(jnp.asarray(step), grown, {"count": jnp.asarray(step)}), {})
    checkpoints.wait()
    checkpoints.close()
    return workdir


def trained(path: Path, scan: bool = True, pattern: str = "pvm_block") -> dict[str, np.ndarray]:
    """The parameters of `path` that match, doubled: stands in for training."""
    config = open_checkpoint(path).config
    params = load_params(path, {p: w for p, w in wanted(config, scan).items() if pattern in p})
    return {p: np.asarray(v) * 2 for p, v in params.items()}


# ---------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize(
    ("tied", "pvm_layers", "slots", "taps"),
    [(True, (), 0, [0, 2]), (False, (1, 4), 0, [0, 2]), (True, (0, 5), 7, [3]), (False, (3,), 0, [])],
)
def test_the_table_names_every_parameter_of_the_model(scan, tied, pvm_layers, slots, taps):
    raw = tiny.hf_config(tied, pvm_layers)
    raw["text_config"]["pvm_slots"] = slots
    raw["vision_config"]["deepstack_visual_indexes"] = taps
    config = ModelConfig.from_hf(raw)
    table = leaves(config, scan)
    assert {leaf.path: leaf.shape for leaf in table} == {p: w.shape for p, w in wanted(config, scan).items()}
    for leaf in table:
        assert sum(np.prod(t.shape) for t in leaf.tensors) == np.prod(leaf.shape), leaf.path


# ---------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("scan", [True, False])
def test_the_three_kinds_load_alike(pvm_checkpoint, native, tmp_path, scan):
    want = values(load_model(pvm_checkpoint, scan=scan))
    assert_equal(values(load_model(native, scan=scan)), want)
    unchanged = {p: v / 2 for p, v in trained(native).items()}
    workdir = write_workdir(tmp_path / "run", native, unchanged)
    assert_equal(values(load_model(workdir, scan=scan)), want)
    assert [open_checkpoint(p).kind for p in (pvm_checkpoint, native, workdir)] == ["hf", "native", "workdir"]


def test_regrouping_keeps_every_layer(native):
    grouped, single = (values(load_model(native, scan=scan)) for scan in (True, False))
    assert len(single) > len(grouped)
    assert_equal(single, by_layer(grouped) | {p: v for p, v in single.items() if p.startswith("text/layers")})
    assert_equal({p: v[0] if p.startswith("text/layers") else v for p, v in single.items()}, by_layer(grouped))


@pytest.mark.parametrize("kind", ["hf", "native", "workdir"])
@pytest.mark.parametrize("scan", [True, False])
def test_parameters_are_restored_already_sharded(pvm_checkpoint, native, tmp_path, kind, scan):
    path = {"hf": pvm_checkpoint, "native": native}.get(kind) or write_workdir(tmp_path / "r", native, trained(native))
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    want = wanted(open_checkpoint(path).config, scan, mesh)
    params = load_params(path, want)
    for name, value in params.items():
        assert value.sharding.is_equivalent_to(want[name].sharding, value.ndim), name
    split = params["text/embed_tokens"]
    assert split.addressable_shards[0].data.size == split.size // 4
    assert_equal(params, values(load_model(path, scan=scan)))


def test_groups_are_let_go_as_they_are_taken_apart(native, monkeypatch):
    """While layers are regrouped a device holds the model and one group, not the model twice."""
    restored, restore = [], orbax_io.Stored._restore
    monkeypatch.setattr(orbax_io.Stored, "_restore", lambda *args: restored.append(restore(*args)) or restored[-1])
    load_params(native, wanted(open_checkpoint(native).config, scan=False))
    assert restored == [{}]


@pytest.mark.parametrize("kind", ["hf", "native"])
def test_each_parameter_has_the_dtype_that_is_wanted(pvm_checkpoint, native, kind):
    path = {"hf": pvm_checkpoint, "native": native}[kind]
    want = {
        p: jax.ShapeDtypeStruct(w.shape, jnp.float32 if "pvm_block" in p or "/3/" in p else jnp.bfloat16)
        for p, w in wanted(open_checkpoint(path).config, scan=False).items()
    }
    params = load_params(path, want)
    exact = values(load_model(path, scan=False))
    assert_equal(params, {p: exact[p].astype(w.dtype) for p, w in want.items()})
    assert {p: v.dtype for p, v in params.items()} == {p: w.dtype for p, w in want.items()}


def test_load_gives_model_and_processor(pvm_checkpoint, native):
    for path in (pvm_checkpoint, native):
        model, processor = pvm_jax.load(path, dtype="bfloat16")
        assert not model.scan and model.dtype == jnp.bfloat16
        assert {v.dtype for v in values(model).values()} == {jnp.dtype(jnp.bfloat16)}
        assert processor.decode(processor.tokenizer("the cell")["input_ids"]) == "the cell"
    assert pvm_jax.load(str(native), scan=True)[0].scan


def test_importing_the_package_imports_no_jax():
    script = "import pvm_jax, sys; assert not {'jax', 'torch', 'tensorflow'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


# ---------------------------------------------------------------------------------------------- workdirs


def test_a_workdir_is_its_base_and_what_was_trained(native, tmp_path, caplog):
    base, new = values(load_model(native, scan=True)), trained(native)
    workdir = write_workdir(tmp_path / "run", native, new, steps=(5, 40))
    latest = {p: np.asarray(v) + 1 for p, v in new.items()}
    caplog.clear()
    assert_equal(values(load_model(workdir, scan=True)), base | latest)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]  # of Orbax, about a file it lacks
    assert_equal(values(load_model(workdir / "checkpoints" / "5", scan=True)), base | new)
    assert checksum(workdir) != checksum(workdir / "checkpoints" / "5") != checksum(native)
    opened = open_checkpoint(workdir)
    shutil.copytree(workdir / "checkpoints" / "5", workdir / "checkpoints" / "50")
    assert checksum(opened) == checksum(workdir / "checkpoints" / "40") != checksum(workdir), "the run has gone on"


def test_a_workdir_on_a_workdir(native, tmp_path):
    first = write_workdir(tmp_path / "first", native, trained(native))
    second = write_workdir(tmp_path / "second", first, trained(first, pattern="text/norm"))
    want = values(load_model(first, scan=False))
    assert_equal(values(load_model(second, scan=False)), want | {"text/norm": want["text/norm"] * 2})


def test_a_workdir_on_a_base_without_pvm(stock_checkpoint, pvm_checkpoint, tmp_path):
    """The base's groups of layers are then others."""
    workdir = write_workdir(tmp_path / "run", pvm_checkpoint, trained(pvm_checkpoint))
    write_json(workdir / "model" / "base.json", base_record(stock_checkpoint))
    want = by_layer(values(load_model(stock_checkpoint))) | by_layer(trained(pvm_checkpoint))
    for scan in (True, False):
        assert_equal(by_layer(values(load_model(workdir, scan=scan))), want)
    convert_from_hf(stock_checkpoint, tmp_path / "native")
    write_json(workdir / "model" / "base.json", base_record(tmp_path / "native"))
    assert_equal(by_layer(values(load_model(workdir, scan=True))), want)
    convert_to_hf(workdir, tmp_path / "hf")
    assert_equal(by_layer(values(load_model(tmp_path / "hf"))), want)


def test_a_workdir_that_started_from_scratch(native, tmp_path):
    everything = trained(native, pattern="")
    workdir = write_workdir(tmp_path / "run", native, everything | {"extra/head": everything["text/norm"]})
    write_json(workdir / "model" / "base.json", base_record(None))
    assert_equal(values(load_model(workdir, scan=True)), everything)
    convert_to_hf(workdir, tmp_path / "hf")
    assert_equal(values(load_model(tmp_path / "hf", scan=True)), everything)


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_a_bf16_model_is_exported_as_one(checkpoints, tmp_path, dtype):
    base = checkpoints(dtype="bfloat16", pvm_layers=tiny.PVM_LAYERS)
    new = {p: v + 1e-4 for p, v in trained(base).items()}  # fp32, as training keeps them
    convert_to_hf(write_workdir(tmp_path / "run", base, new), tmp_path / "hf", dtype=dtype)
    exported = st.load_file(tmp_path / "hf" / "model.safetensors")
    assert {v.dtype.name for v in exported.values()} == {dtype or "bfloat16"}
    gate = exported["model.language_model.layers.4.pvm_block.gate_alpha"]
    assert gate == np.asarray(new[GATE][0]).astype(gate.dtype)


def test_a_workdir_whose_base_has_gone_or_changed(native, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(native, base)
    workdir = write_workdir(tmp_path / "run", base, trained(native))
    record = workdir / "model" / "base.json"
    base.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=f"{record}: path: expected the checkpoint .* nothing at {base}"):
        load_model(workdir)
    write_json(record, json.loads(record.read_text()) | {"path": str(tmp_path / "moved")})
    load_model(workdir)
    shutil.rmtree(tmp_path / "moved")
    save_native(tmp_path / "moved", tiny.hf_config(pvm_layers=(1, 4)), trained(native, pattern=""), native)
    with pytest.raises(CheckpointError, match=f"{record}: checksum: expected .* its weights are not the same"):
        load_model(workdir)


# ---------------------------------------------------------------------------------------------- fingerprints


def test_a_checksum_follows_the_weights(pvm_checkpoint, native, tmp_path):
    for path in (pvm_checkpoint, native):
        copy = tmp_path / path.name
        shutil.copytree(path, copy)
        (copy / "generation_config.json").unlink()
        assert checksum(copy) == checksum(path)
    assert checksum(native) != checksum(pvm_checkpoint)


@pytest.mark.parametrize("name", ["layers.4.pvm_block.gate_alpha", "embed_tokens.weight"])
def test_a_checksum_sees_one_changed_tensor(pvm_checkpoint, tmp_path, name):
    shutil.copytree(pvm_checkpoint, tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    tensors = st.load_file(file)
    tensors[f"model.language_model.{name}"] *= 1.001
    st.save_file(tensors, file)
    assert checksum(tmp_path / "copy") != checksum(pvm_checkpoint)


# ---------------------------------------------------------------------------------------------- refusals


def test_directories_that_are_no_model(native, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "model" / "base.json").write_text("{}")
    for path, sentence in (
        ("nowhere", "nowhere: expected a model directory, found nothing"),
        ("file", "file: expected a model directory, found a file"),
        ("empty", "empty: expected config.json with safetensors .* found an empty directory"),
        ("run", "run/checkpoints: expected the checkpoint of a training step, found none"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            pvm_jax.load(tmp_path / path)
    with pytest.raises(CheckpointError, match="download it first: hf download Qwen/Qwen3-VL-4B-Instruct"):
        pvm_jax.load("Qwen/Qwen3-VL-4B-Instruct")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="model_type: expected 'qwen3_vl', got 'bert'"):
        load_model(tmp_path / "empty")


def test_parameters_that_are_not_there(native, pvm_checkpoint, stock_checkpoint):
    want = wanted(open_checkpoint(native).config)
    odd = {
        "text/norm": jax.ShapeDtypeStruct((65,), jnp.float32),
        "text/layers/0-1/mlp/up_proj": jax.ShapeDtypeStruct((2, 96, 65), jnp.float32),
        "text/layers/4-6/mlp/up_proj": jax.ShapeDtypeStruct((3, 96, 64), jnp.float32),
        "lm_head": jax.ShapeDtypeStruct((544, 64), jnp.float32),
    }
    for path in (native, pvm_checkpoint):
        with pytest.raises(CheckpointError) as error:
            load_params(path, want | odd)
        assert str(error.value).splitlines() == [
            f"{path}: text/norm: expected shape [65], got [64]",
            f"{path}: text/layers/0-1/mlp/up_proj: expected shape [2, 96, 65], got [2, 96, 64]",
            f"{path}: text/layers/4-6/mlp/up_proj: expected [3, 96, 64], found no such parameter",
            f"{path}: lm_head: expected [544, 64], found no such parameter",
        ]
    with pytest.raises(CheckpointError, match=r"pvm_block/gate_alpha: expected .*, found no such parameter"):
        load_params(stock_checkpoint, want)


def test_a_tree_that_was_not_copied_whole(native, tmp_path):
    shutil.copytree(native, tmp_path / "copy")
    params = tmp_path / "copy" / "params"
    (params / "_METADATA").unlink()
    with pytest.raises(
        CheckpointError, match=r"params: expected .* with _METADATA, found _CHECKPOINT_METADATA, .* whole\?$"
    ):
        pvm_jax.load(tmp_path / "copy")
    shutil.rmtree(params)
    params.mkdir()
    with pytest.raises(CheckpointError, match="found an empty directory; was it copied whole"):
        pvm_jax.load(tmp_path / "copy")


def test_a_broken_hugging_face_directory_is_refused_on_loading(pvm_checkpoint, tmp_path):
    shutil.copytree(pvm_checkpoint, tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    tensors = st.load_file(file)
    del tensors["model.visual.pos_embed.weight"]
    st.save_file(tensors, file)
    with pytest.raises(
        WeightsError, match=r"model.visual.pos_embed.weight: expected a tensor of \[64, 32\], found none"
    ):
        pvm_jax.load(tmp_path / "copy")


def test_save_native_refuses_to_overwrite(native, tmp_path):
    with pytest.raises(FileExistsError, match=f"{native}: expected a directory that does not exist yet"):
        save_native(native, {}, {})
