"""Hugging Face <-> native: every bit comes back, every problem is named, a failure leaves nothing."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tiny
from flax import nnx
from safetensors import numpy as st

from pvm_jax import cli, convert, hf_check, orbax_io, pvm_init
from pvm_jax.checkpoint import CheckpointError, load_model, open_checkpoint
from pvm_jax.config import ModelConfig
from pvm_jax.convert import convert_from_hf, convert_to_hf
from pvm_jax.data.processor import Processor
from pvm_jax.hf_names import count_parameters, leaves
from pvm_jax.hf_weights import HFWeights, MadePVM
from pvm_jax.model_files import check_writable
from pvm_jax.safetensors_io import SafetensorsReader, SafetensorsWriter, WeightsError

GATE = "model.language_model.layers.4.pvm_block.gate_alpha"
EXPANDER = "model.language_model.layers.4.pvm_block.output_expander.weight"
EMBEDDING = "model.language_model.embed_tokens.weight"
DOWN = "model.language_model.layers.2.mlp.down_proj.weight"


def tensors(directory: Path) -> dict[str, np.ndarray]:
    """All tensors, by the safetensors library."""
    return {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in st.load_file(file).items()}


def assert_same(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert (got[name].dtype, got[name].shape) == (want[name].dtype, want[name].shape), name
        assert got[name].tobytes() == want[name].tobytes(), name


@pytest.fixture
def edited(tmp_path):
    """`edited(source, change, config=) -> Path`: a copy whose tensors `change` has changed in place."""

    def make(source: Path, change=lambda tensors: None, config=lambda raw: None) -> Path:
        copy = tmp_path / "edited"
        shutil.copytree(source, copy)
        changed = tensors(copy)
        change(changed)
        for file in [*copy.glob("*.safetensors"), *copy.glob("*.index.json")]:
            file.unlink()
        st.save_file(changed, copy / "model.safetensors")
        raw = json.loads((copy / "config.json").read_text())
        config(raw)
        (copy / "config.json").write_text(json.dumps(raw))
        return copy

    return make


def problems(source: Path, tmp_path: Path, **options) -> list[str]:
    """The sentences of a refused conversion, which must also have left nothing behind."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(WeightsError) as error:
        convert_from_hf(source, tmp_path / "refused", **options)
    assert sorted(tmp_path.iterdir()) == before
    assert str(error.value).splitlines() == list(error.value.problems)
    return list(error.value.problems)


# ---------------------------------------------------------------------------------------------- both ways


@pytest.mark.parametrize("pvm_layers", [(), tiny.PVM_LAYERS], ids=["stock", "pvm"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_bit_exact(checkpoints, tmp_path, tied, dtype, pvm_layers):
    source = checkpoints(tied=tied, dtype=dtype, pvm_layers=pvm_layers, shard_bytes=200_000 if tied else 10**9)
    convert_from_hf(source, tmp_path / "native")
    summary = convert_to_hf(tmp_path / "native", tmp_path / "back", max_shard_size=300_000)
    assert len(summary.notes) == (1 if pvm_layers else 0)
    want = tensors(source)
    assert_same(tensors(tmp_path / "back"), want)
    assert summary.parameters == sum(v.size for v in want.values())
    assert summary.size_bytes == sum(v.nbytes for v in want.values())
    assert summary.pvm_parameters == sum(v.size for k, v in want.items() if "pvm_block" in k)
    for file in source.iterdir():
        if file.suffix != ".safetensors" and "index" not in file.name:
            for copy in (tmp_path / "native" / file.name, tmp_path / "back" / file.name):
                assert copy.read_text().strip() == file.read_text().strip(), file.name


def test_shards_and_index(checkpoints, tmp_path):
    source = checkpoints(tied=False, dtype="bfloat16")
    convert_from_hf(source, tmp_path / "native")
    convert_to_hf(tmp_path / "native", tmp_path / "sharded", max_shard_size="100KB")
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert {f.name for f in files} == set(index["weight_map"].values())
    assert len(files) > 5 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    for file in files:
        held = st.load_file(file)
        assert all(index["weight_map"][name] == file.name for name in held)
        assert len(held) == 1 or sum(v.nbytes for v in held.values()) <= 100_000
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in tensors(source).values())
    convert_from_hf(tmp_path / "sharded", tmp_path / "again")
    convert_to_hf(tmp_path / "again", tmp_path / "one_file")
    assert [f.name for f in (tmp_path / "one_file").glob("model*")] == ["model.safetensors"]
    assert_same(tensors(tmp_path / "one_file"), tensors(source))


def test_what_the_release_does_not_know_is_said(stock_checkpoint, tmp_path):
    options = {"pvm_layers": (1,), "pvm_hidden_size": 32, "pvm_slots": 4, "pvm_silencing": False}
    convert_from_hf(stock_checkpoint, tmp_path / "native", **options)
    note = convert_to_hf(tmp_path / "native", tmp_path / "hf").notes[-1]
    assert note.startswith(
        "the release's model code does not know the memory mask 'causal' and learned slots and PVM on image tokens:"
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype_option_casts_and_is_recorded(stock_checkpoint, tmp_path, dtype):
    convert_from_hf(stock_checkpoint, tmp_path / "native", dtype=dtype)
    convert_to_hf(tmp_path / "native", tmp_path / "back")
    want = {
        k: v.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype) for k, v in tensors(stock_checkpoint).items()
    }
    assert_same(tensors(tmp_path / "back"), want)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == dtype


def test_tensors_of_mixed_dtypes_are_aligned_for_torch(stock_checkpoint, edited, tmp_path):
    from safetensors.torch import load_file

    name = "model.visual.merger.norm.bias"

    def mix(changed):
        changed["model.language_model.norm.weight"] = np.ones(64, ml_dtypes.bfloat16)
        changed[name] = np.arange(32, dtype=np.float16)

    convert_from_hf(edited(stock_checkpoint, mix), tmp_path / "native")
    convert_to_hf(tmp_path / "native", tmp_path / "back")
    loaded = load_file(tmp_path / "back" / "model.safetensors")
    np.testing.assert_array_equal(loaded[name].numpy(), np.arange(32))


# ---------------------------------------------------------------------------------------------- PVM is added


def pvm_of(directory: Path, tmp_path: Path, layer: int, **options) -> dict[str, np.ndarray]:
    """PVM tensors of `layer` in a fresh conversion."""
    name = f"made{len(list(tmp_path.iterdir()))}"
    convert_from_hf(directory, tmp_path / name, pvm_hidden_size=tiny.PVM_WIDTH, **options)
    convert_to_hf(tmp_path / name, tmp_path / f"{name}_hf")
    marker = f"layers.{layer}.pvm_block."
    return {k.partition(marker)[2]: v for k, v in tensors(tmp_path / f"{name}_hf").items() if marker in k}


def test_pvm_added_to_a_stock_checkpoint(stock_checkpoint, pvm_checkpoint, tmp_path):
    block = pvm_of(stock_checkpoint, tmp_path, 4, pvm_layers=(1, 4), pvm_seed=7)
    released = {k.partition("layers.4.pvm_block.")[2]: v.shape for k, v in tensors(pvm_checkpoint).items()}
    released.pop("")
    assert {k: v.shape for k, v in block.items()} == released
    assert block["gate_alpha"] == 0
    for name, value in block.items():
        if name.endswith("norm.weight"):
            assert (value == 1).all(), name
        elif name != "gate_alpha":
            assert abs(value.std() / 0.02 - 1) < 0.15, name
    text = json.loads((tmp_path / "made0" / "config.json").read_text())["text_config"]
    recorded = {k: v for k, v in text.items() if k.startswith("pvm_")}
    assert recorded == {
        "pvm_layers": [1, 4],
        "pvm_hidden_size": tiny.PVM_WIDTH,
        "pvm_memory_mask": "causal",
        "pvm_seed": 7,
        "pvm_init": "normal",
    }


def test_initial_values_depend_on_seed_layer_and_name_alone(stock_checkpoint):
    def made(layers, seed, path):
        config = ModelConfig.from_hf(tiny.hf_config(pvm_layers=layers))
        return HFWeights(stock_checkpoint, config, MadePVM(seed, "normal")).read(f"text/layers/{path}")

    q_proj = made((1, 4), 7, "4/pvm_block/cross_attn/q_proj")
    np.testing.assert_array_equal(made((4,), 7, "4/pvm_block/cross_attn/q_proj"), q_proj)
    assert not np.array_equal(made((4,), 8, "4/pvm_block/cross_attn/q_proj"), q_proj)
    assert not np.array_equal(made((1, 4), 7, "1/pvm_block/cross_attn/q_proj"), q_proj)
    gate, up = (made((4,), 7, f"4/pvm_block/mlp/{name}_proj") for name in ("gate", "up"))
    assert not np.array_equal(gate, up)


def test_fan_in_scales_all_but_the_expander(stock_checkpoint, tmp_path):
    block = pvm_of(stock_checkpoint, tmp_path, 4, pvm_layers=(4,), pvm_init="fan_in", pvm_slots=36)
    for name, value in block.items():
        if value.ndim == 2:
            std = 0.02 if name in ("output_expander.weight", "slots") else value.shape[1] ** -0.5
            assert abs(value.std() / std - 1) < 0.15, name
    assert block["slots"].shape == (36, 64)


def test_new_pvm_changes_no_logit(stock_checkpoint, tmp_path):
    convert_from_hf(stock_checkpoint, tmp_path / "pvm", pvm_layers=(1, 4), pvm_hidden_size=32)
    processor = Processor.from_pretrained(stock_checkpoint)
    batch = processor([tiny.conversations()["image"]])
    logits = nnx.jit(lambda model, batch: model.logits(model(batch)))
    stock, pvm = (load_model(path, scan=True) for path in (stock_checkpoint, tmp_path / "pvm"))
    want = np.asarray(logits(stock, batch))
    np.testing.assert_array_equal(np.asarray(logits(pvm, batch)), want)
    pvm.text.layers["4"].pvm_block.gate_alpha[...] += 0.1
    assert np.abs(np.asarray(logits(pvm, batch)) - want).max() > 1e-3


@pytest.mark.parametrize(
    ("text", "vision", "layers", "expected"),
    [
        ((4096, 12288, 36, 32), (27, 1152, 4304, (8, 16, 24)), (8, 16, 24), 27_922_179),
        ((2560, 9728, 36, 32), (24, 1024, 4096, (5, 11, 17)), (5, 11, 17), 22_728_963),
    ],
    ids=["8B", "4B"],
)
def test_parameters_of_the_papers_models(text, vision, layers, expected):
    raw = tiny.hf_config(pvm_layers=layers)
    width, ffn, depth, heads = text
    raw["text_config"] |= {
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "pvm_hidden_size": 512,
        "rope_scaling": {"mrope_section": [24, 20, 20]},
    }
    raw["vision_config"] |= {
        "depth": vision[0],
        "hidden_size": vision[1],
        "intermediate_size": vision[2],
        "num_heads": 16,
        "deepstack_visual_indexes": list(vision[3]),
        "out_hidden_size": width,
    }
    assert count_parameters(ModelConfig.from_hf(raw))[1] == expected


# ---------------------------------------------------------------------------------------------- refusals


def test_every_problem_is_reported_at_once(pvm_checkpoint, edited, tmp_path):
    def damage(changed):
        del changed["model.visual.pos_embed.weight"]
        changed["model.language_model.layers.9.mlp.up_proj.weight"] = np.zeros((2, 3), np.float32)
        changed[DOWN] = changed[DOWN].T.copy()
        changed["model.language_model.norm.weight"] = np.zeros(64, np.float64)

    source = edited(pvm_checkpoint, damage)
    file = source / "model.safetensors"
    assert sorted(problems(source, tmp_path)) == sorted(
        [
            f"{source}: model.visual.pos_embed.weight: expected a tensor of [64, 32], found none",
            f"{file}: model.language_model.layers.9.mlp.up_proj.weight: expected no such tensor, got one of [2, 3]",
            f"{file}: {DOWN}: expected shape [64, 96], got [96, 64]",
            f"{file}: model.language_model.norm.weight: expected a dtype of F32, F16, BF16, got F64",
        ]
    )


def test_pvm_tensors_without_pvm_layers_in_the_config(pvm_checkpoint, edited, tmp_path):
    source = edited(pvm_checkpoint, config=lambda raw: raw["text_config"].update(pvm_layers=[1]))
    found = problems(source, tmp_path)
    assert len(found) == 15
    assert all("layers.4.pvm_block" in p and "does text_config.pvm_layers" in p for p in found)


def test_truncated_file(stock_checkpoint, edited, tmp_path):
    source = edited(stock_checkpoint)
    file = source / "model.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as f:
        f.truncate(size - 1000)
    assert problems(source, tmp_path) == [
        f"{file}: expected {size} bytes, got {size - 1000}; it is truncated, copy it again"
    ]
    with file.open("r+b") as f:
        f.truncate(500)
    (problem,) = problems(source, tmp_path)
    assert problem.startswith(f"{file}: expected a safetensors header of ") and problem.endswith("it is truncated")
    file.write_bytes(b"")
    (problem,) = problems(source, tmp_path)
    assert "it is truncated" in problem


def test_unreadable_headers(stock_checkpoint, edited, tmp_path):
    source = edited(stock_checkpoint)
    file = source / "model.safetensors"
    for header, expected in (
        (b"{nonsense", "expected a JSON header"),
        (b"[1, 2]  ", "expected a JSON object as header"),
        (b'{"a": {"dtype": "F32", "shape": [2]}}', "a: expected dtype, shape and data_offsets"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "a: expected 2 elements of F32"),
    ):
        file.write_bytes(len(header).to_bytes(8, "little") + header)
        (problem,) = problems(source, tmp_path)
        assert problem.startswith(f"{file}: {expected}"), problem


def test_broken_index(checkpoints, tmp_path):
    source = tmp_path / "sharded"
    shutil.copytree(checkpoints(shard_bytes=200_000), source)
    index = source / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    files = sorted(set(raw["weight_map"].values()))

    gone = [name for name, file in raw["weight_map"].items() if file == files[2]]
    (source / files[2]).rename(tmp_path / "away")
    assert problems(source, tmp_path) == [
        f"{source / files[2]}: expected this file, which {index.name} names for {len(gone)} tensors, found none"
    ]
    (tmp_path / "away").rename(source / files[2])

    moved, unlisted = gone[0], gone[1]
    changed = {"weight_map": raw["weight_map"] | {moved: files[0]}}
    del changed["weight_map"][unlisted]
    index.write_text(json.dumps(changed))
    assert sorted(problems(source, tmp_path)) == sorted(
        [
            f"{index}: {moved}: expected in {files[0]}, found in {files[2]}",
            f"{index}: {unlisted}: found in {files[2]}, but the index does not list it",
        ]
    )
    for text in ("{", "[]", '{"weight_map": [1]}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}'):
        index.write_text(text)
        (problem,) = problems(source, tmp_path)
        assert problem.startswith(f"{index}: ") and "weight_map" in problem, problem


def test_directory_without_weights(stock_checkpoint, edited, tmp_path):
    source = edited(stock_checkpoint)
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    assert problems(source, tmp_path) == [
        f"{source}: expected model.safetensors or model.safetensors.index.json, got pytorch_model.bin"
    ]


def test_tied_head_in_the_files(stock_checkpoint, edited, tmp_path):
    source = edited(stock_checkpoint, lambda changed: changed.update({"lm_head.weight": changed[EMBEDDING]}))
    convert_from_hf(source, tmp_path / "native")
    convert_to_hf(tmp_path / "native", tmp_path / "back")
    assert_same(tensors(tmp_path / "back"), tensors(stock_checkpoint))
    shutil.rmtree(source)
    source = edited(stock_checkpoint, lambda changed: changed.update({"lm_head.weight": changed[EMBEDDING] + 1}))
    (problem,) = problems(source, tmp_path)
    assert "lm_head.weight: expected the values of" in problem and "tie_word_embeddings" in problem


def test_untied_head_is_missing(stock_checkpoint, edited, tmp_path):
    source = edited(stock_checkpoint, config=lambda raw: raw.update(tie_word_embeddings=False))
    (problem,) = problems(source, tmp_path)
    assert "lm_head.weight: expected a tensor of [544, 64], found none; if" in problem
    assert "set tie_word_embeddings to true" in problem


@pytest.mark.parametrize("value", [np.nan, np.inf, 6e13, -1e36])
def test_gate_that_was_never_written(pvm_checkpoint, edited, tmp_path, value):
    source = edited(pvm_checkpoint, lambda changed: changed.update({GATE: np.array([value], np.float32)}))
    (problem,) = problems(source, tmp_path)
    assert f"{GATE}: expected a finite gate" in problem and "never written" in problem


def test_gate_without_an_axis(pvm_checkpoint, edited, tmp_path):
    source = edited(pvm_checkpoint, lambda changed: changed.update({GATE: np.array(0.25, np.float32)}))
    convert_from_hf(source, tmp_path / "native")
    convert_to_hf(tmp_path / "native", tmp_path / "back")
    assert tensors(tmp_path / "back")[GATE].tolist() == [0.25]


def dead(changed):
    changed[GATE] = np.zeros(1, np.float32)
    changed[EXPANDER] = np.zeros_like(changed[EXPANDER])


def test_zero_gate_and_zero_expander_are_refused(pvm_checkpoint, edited, tmp_path):
    (problem,) = problems(edited(pvm_checkpoint, dead), tmp_path)
    assert "layers.4.pvm_block: expected gate_alpha or output_expander to be different from 0" in problem
    assert "can never train" in problem and "0 * 0" in problem


def test_zero_gate_alone_is_the_usual_start(pvm_checkpoint, edited, tmp_path):
    source = edited(pvm_checkpoint, lambda changed: changed.update({GATE: np.zeros(1, np.float32)}))
    convert_from_hf(source, tmp_path / "native")
    load_model(tmp_path / "native")


def test_dead_pvm_is_refused_in_a_native_checkpoint(pvm_checkpoint, edited, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(pvm_init, "problems", lambda *_: [])
        convert_from_hf(edited(pvm_checkpoint, dead), tmp_path / "native")
    with pytest.raises(CheckpointError, match=r"text/layers/4/pvm_block: expected gate_alpha .* can never train"):
        load_model(tmp_path / "native")


def test_layers_of_different_dtypes(stock_checkpoint, edited, tmp_path):
    def half(changed):
        changed[DOWN] = changed[DOWN].astype(np.float16)

    source = edited(stock_checkpoint, half)
    (problem,) = problems(source, tmp_path)
    assert problem == (
        f"{source / 'model.safetensors'}: {DOWN}: expected F32 as in the layers that it is stored with, got F16; "
        "choose one with --dtype"
    )
    convert_from_hf(source, tmp_path / "native", dtype="float32")
    load_model(source)  # nothing is stacked on disk


@pytest.mark.parametrize("failure", [OSError("No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(stock_checkpoint, tmp_path, monkeypatch, failure):
    native = tmp_path / "native"
    convert_from_hf(stock_checkpoint, native)

    def fail(*_):
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(convert.HFWeights, "pieces", fail)
        with pytest.raises(type(failure)):
            convert_from_hf(stock_checkpoint, tmp_path / "broken")
    with monkeypatch.context() as patch:
        patch.setattr(orbax_io.Stored, "read", fail)
        with pytest.raises(type(failure)):
            convert_to_hf(native, tmp_path / "broken")
    assert list(tmp_path.iterdir()) == [native]


# ---------------------------------------------------------------------------------------------- command line


def run(*argv, capsys) -> tuple[int, str, list[str]]:
    """(exit status, stdout, stderr without the progress bar) of the command line."""
    try:
        status = convert.main([str(a) for a in argv])
    except SystemExit as e:
        status = e.code
    out, err = capsys.readouterr()
    return status, out, [line for line in err.replace("\r", "\n").splitlines() if line and "param/s" not in line]


def test_command_line_converts_both_ways(stock_checkpoint, tmp_path, capsys):
    native, back = tmp_path / "deep" / "native", tmp_path / "back"
    options = ("--pvm_layers=1,4", "--pvm_hidden_size=32", "--pvm_seed=3", "--dtype=bfloat16", "--pvm_memory_mask=all")
    status, out, err = run("from_hf", stock_checkpoint, native, *options, capsys=capsys)
    assert (status, err) == (0, [])
    total = sum(v.size for v in tensors(stock_checkpoint).values())
    assert out.startswith(f"{native}: {total + 27_842:,} parameters, 27,842 of them PVM")
    assert open_checkpoint(native).config.pvm.memory_mask == "all"
    status, out, _ = run("to_hf", native, back, "--max_shard_size=500KB", capsys=capsys)
    assert status == 0 and f"{back}: {total + 27_842:,} parameters" in out
    assert out.count("note: ") == 1 and "note: transformers by itself leaves PVM out" in out
    assert tensors(back)[EMBEDDING].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--pvm_layers=1,6", "--pvm_hidden_size=32"], "pvm_layers: expected different layers from 0 to 5, got [1, 6]"),
        (["--pvm_layers=1", "--pvm_hidden_size=24"], "pvm_hidden_size: expected a multiple of head_dim = 16"),
        (["--pvm_layers=1"], "--pvm_hidden_size: expected with --pvm_layers (512 in the paper), got none"),
        (["--pvm_layers=1;4"], "--pvm_layers: expected numbers with commas, as in 8,16,24, got '1;4'"),
        (["--pvm_hidden_size=32"], "--pvm_hidden_size: expected only with --pvm_layers"),
        (["--no_pvm_silencing"], "--no_pvm_silencing: expected only with --pvm_layers"),
        (["--pvm_memory_mask=all"], "--pvm_memory_mask: expected a checkpoint with PVM or --pvm_layers"),
        (["--pvm_layers=1", "--pvm_hidden_size=32", "--pvm_seed=-1"], "--pvm_seed: expected a number of at least 0"),
        (["--dtype=int8"], "--dtype: invalid choice: 'int8'"),
        (["--pvm_layer"], "--pvm_layer"),
    ],
)
def test_mistakes_are_one_sentence_and_status_2(stock_checkpoint, tmp_path, capsys, options, sentence):
    status, _, err = run("from_hf", stock_checkpoint, tmp_path / "native", *options, capsys=capsys)
    assert status == 2 and list(tmp_path.iterdir()) == []
    assert len(err) == 1 and err[0].startswith("error: ") and sentence in err[0], err


def test_mistakes_of_place(stock_checkpoint, pvm_checkpoint, tmp_path, capsys):
    native = tmp_path / "native"
    convert_from_hf(pvm_checkpoint, native)
    for argv, sentence in (
        (("from_hf", pvm_checkpoint, native), f"{native}: expected a directory that does not exist yet"),
        (("to_hf", native, tmp_path), f"{tmp_path}: expected a directory that does not exist yet"),
        (("from_hf", native, tmp_path / "x"), f"{native}: expected a Hugging Face directory, got a native checkpoint"),
        (("from_hf", "Qwen/Qwen3-VL-8B-Instruct", tmp_path / "x"), "hf download Qwen/Qwen3-VL-8B-Instruct"),
        (("to_hf", native, "gs://bucket/x"), "gs:/bucket/x: expected a directory, got an address; mount a bucket"),
        (("to_hf", native, tmp_path / "x", "--max_shard_size=5TB"), "--max_shard_size: expected bytes or a number"),
        (
            ("from_hf", pvm_checkpoint, tmp_path / "x", "--pvm_layers=2", "--pvm_hidden_size=32"),
            "--pvm_layers: expected a checkpoint without PVM",
        ),
    ):
        status, _, err = run(*argv, capsys=capsys)
        assert status == 2 and len(err) == 1 and sentence in err[0], err
    assert list(tmp_path.iterdir()) == [native]


def test_the_memory_mask_of_a_pvm_checkpoint_can_be_chosen(checkpoints, tmp_path):
    released = checkpoints(pvm_layers=tiny.PVM_LAYERS)
    convert_from_hf(released, tmp_path / "kept")
    convert_from_hf(released, tmp_path / "chosen", pvm_memory_mask="causal")
    assert open_checkpoint(tmp_path / "kept").config.pvm.memory_mask == "all"
    assert open_checkpoint(tmp_path / "chosen").config.pvm.memory_mask == "causal"


# ---------------------------------------------------------------------------------------------- check


def test_check_against_transformers(pvm_checkpoint, capsys, monkeypatch):
    status, out, _ = run("check", pvm_checkpoint, capsys=capsys)
    lines = out.splitlines()
    assert status == 0 and len(lines) == 4, out
    assert lines[0].startswith("PVM gates are set to 0")
    assert [line.split(":")[0] for line in lines[1:]] == ["text", "image", "two images"]
    assert int(lines[1].split()[1]) >= 600

    monkeypatch.setattr(hf_check, "close_gates", lambda model: None)
    status, out, _ = run("check", pvm_checkpoint, capsys=capsys)
    assert status == 1
    # Without an image there is nothing in PVM's memory.
    assert [line.endswith("ok") for line in out.splitlines()[1:]] == [True, False, False], out


def test_check_of_a_native_checkpoint(stock_checkpoint, tmp_path, capsys):
    convert_from_hf(stock_checkpoint, tmp_path / "native")
    status, out, _ = run("check", tmp_path / "native", capsys=capsys)
    assert status == 0 and out.count(": ok") == 3


def test_check_without_torch(stock_checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(hf_check.importlib.util, "find_spec", lambda name: None)
    status, _, err = run("check", stock_checkpoint, capsys=capsys)
    assert status == 2 and len(err) == 1 and "pip install torch" in err[0]


# ---------------------------------------------------------------------------------------------- memory

MEASURE = """
import sys, threading, time
from pathlib import Path
from pvm_jax.convert import convert_from_hf, convert_to_hf

def resident():  # mapped files included
    for line in open("/proc/self/status"):
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024

peak, done = 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.002)

source, target = map(Path, sys.argv[1:])
import jax; jax.devices()
start = resident()
thread = threading.Thread(target=watch); thread.start()
convert_from_hf(source, target / "native"); forth, peak = peak - start, 0
convert_from_hf(source, target / "half", dtype="bfloat16"); half, peak = peak - start, 0
convert_to_hf(target / "native", target / "back"); back = peak - start
done = True; thread.join()
print(forth, half, back)
"""


def test_peak_memory_is_a_tensor_and_a_constant(tmp_path):
    """A model of 263 MB, 17 MB of them in the largest parameter.

    The constant is Orbax's own cache of 100 MB and what malloc keeps; a process that held the model, as Orbax's
    handler of numpy arrays does, would need one to two times its size.
    """
    raw = tiny.hf_config(pvm_layers=(3, 7, 11, 15))
    raw["text_config"] |= {"num_hidden_layers": 20, "hidden_size": 512, "intermediate_size": 2048}
    raw["vision_config"] |= {"out_hidden_size": 512}
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(raw))
    size, largest = write_random(source, ModelConfig.from_hf(raw))
    assert size > 250e6 and largest < 20e6
    command = [sys.executable, "-c", MEASURE, str(source), str(tmp_path)]
    # One arena: what a thread has freed, another can use, so that the measure is of what is held.
    env = os.environ | {"MALLOC_ARENA_MAX": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=env)
    assert result.returncode == 0, result.stderr
    peaks = [float(x) * 2**20 for x in result.stdout.split()]
    assert len(peaks) == 3 and max(peaks) < 0.6 * size, (peaks, size)


@pytest.fixture
def small_chunks(monkeypatch):
    """16 KiB a chunk: [3,4100] is three of [1,4100], [5000] two of [2500], [1025,7] two of [513,7], the last padded."""
    monkeypatch.setattr(orbax_io, "_CHUNK_BYTES", 2**14 + 2**9)
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 4100), "text/b": (5000,), "text/c": (1025, 7), "d": (5,), "e": ()}
    return {path: rng.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()}


def lazy(value: np.ndarray, size: int = 999) -> orbax_io.Lazy:
    """Pieces of `size` elements, all in the same memory."""

    def pieces():
        flat, buffer = value.reshape(-1), np.empty(size, value.dtype)
        for start in range(0, flat.size, size):
            piece = buffer[: flat.size - start]
            piece[...] = flat[start : start + size]
            yield piece

    return orbax_io.Lazy(value.shape, value.dtype, pieces)


def test_parameters_are_written_in_pieces_and_synced(tmp_path, monkeypatch, small_chunks):
    synced = set()
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (sync(handle), synced.add(os.fstat(handle).st_ino)))
    monkeypatch.setattr(orbax_io, "_sync", lambda path: None)
    orbax_io.save(tmp_path / "params", {path: lazy(value) for path, value in small_chunks.items()})
    stored = orbax_io.Stored(tmp_path / "params")
    for path, value in small_chunks.items():
        np.testing.assert_array_equal(stored.read(path), value)
    chunks = {file for file in (tmp_path / "params").rglob("*") if file.name[0].isdigit()}
    assert sorted(str(file.relative_to(tmp_path / "params")) for file in chunks) == [
        *("a/0.0", "a/1.0", "a/2.0", "d/0", "e/0"),
        *("text.b/0", "text.b/1", "text.c/0.0", "text.c/1.0"),
    ]
    assert synced == {file.stat().st_ino for file in chunks}
    assert (tmp_path / "params" / "text.c" / "1.0").stat().st_size == 4 * 513 * 7


def test_all_other_files_are_synced_too(tmp_path, monkeypatch, small_chunks):
    synced = set()
    monkeypatch.setattr(orbax_io, "_sync", synced.add)
    orbax_io.save(tmp_path / "params", {"d": lazy(small_chunks["d"]), "array": small_chunks["a"]})
    assert synced == {tmp_path / "params", *(tmp_path / "params").rglob("*")}


@pytest.mark.parametrize("damage", [lambda file: os.truncate(file, 1000), os.remove], ids=["truncated", "missing"])
def test_a_damaged_chunk_is_not_read(tmp_path, small_chunks, damage):
    orbax_io.save(tmp_path / "params", {"a": lazy(small_chunks["a"])})
    damage(tmp_path / "params" / "a" / "1.0")
    with pytest.raises(ValueError, match=r"[Cc]hunk|a/1\.0"):
        orbax_io.Stored(tmp_path / "params").read("a")


@pytest.mark.parametrize("change, why", [(-1, "they end before"), (1, "there are more")])
def test_pieces_of_another_size(tmp_path, small_chunks, change, why):
    value = small_chunks["text/b"]
    wrong = orbax_io.Lazy((value.size - change,), value.dtype, lazy(value).pieces)
    with pytest.raises(ValueError, match=f"text.b: expected pieces of {wrong.nbytes} bytes, {why}"):
        orbax_io.save(tmp_path / "params", {"text/b": wrong})
    assert not (tmp_path / "params").exists()


def test_file_that_shrinks_while_it_is_read(stock_checkpoint, edited):
    source = edited(stock_checkpoint)
    weights = HFWeights(source, ModelConfig.load(source))
    os.truncate(source / "model.safetensors", 200_000)
    with pytest.raises(WeightsError, match=r"model.safetensors: .*: expected \d+ bytes more, the file ends"):
        for leaf in leaves(ModelConfig.load(source)):
            weights.read(leaf.path)


def test_a_file_system_without_renamed_directories_is_said_before_anything_long(tmp_path, monkeypatch):
    """As a mounted bucket has it, whose objects have names and lie in no directories."""
    rename = Path.rename

    def refusing(self, target):
        if self.is_dir() and any(self.iterdir()):
            raise OSError(errno.EMFILE, "Too many open files", str(self))
        return rename(self, target)

    check_writable(tmp_path / "w")
    monkeypatch.setattr(Path, "rename", refusing)
    with pytest.raises(OSError, match=r"w: expected a file system that renames directories, .* \(Too many") as caught:
        check_writable(tmp_path / "w")
    assert cli.sentence(caught.value) == str(caught.value)
    assert list((tmp_path / "w").iterdir()) == []


def test_a_file_is_stored_once(tmp_path, monkeypatch):
    """Tensors come in any order; a mounted bucket stores a file whenever it is closed."""
    opened, open_ = [], Path.open

    def recorded(self, *arguments, **options):
        opened.append(self.name)
        return open_(self, *arguments, **options)

    shapes = {name: ((3, 4), np.dtype(np.float32)) for name in "abcd"}
    values = {name: np.full((3, 4), i, np.float32) for i, name in enumerate(shapes)}
    with monkeypatch.context() as patch, SafetensorsWriter(tmp_path, shapes, 100) as writer:
        patch.setattr(Path, "open", recorded)
        for name in "cadb":
            writer.write(name, values[name])
    assert opened == [], "again"
    assert_same(tensors(tmp_path), values)
    with pytest.raises(ValueError, match="closed file"):
        writer.write("a", values["a"])


def write_random(directory: Path, config: ModelConfig) -> tuple[int, int]:
    """Noise for every tensor, so that nothing compresses; (bytes of all, of the largest parameter)."""
    table = leaves(config)
    shapes = {tensor.name: (tensor.shape, np.dtype(np.float32)) for leaf in table for tensor in leaf.tensors}
    rng = np.random.default_rng(0)
    with SafetensorsWriter(directory, shapes, 10**8) as writer:
        for name, (shape, _) in shapes.items():
            writer.write(name, rng.standard_normal(shape, np.float32))
    sizes = [4 * int(np.prod(leaf.shape)) for leaf in table]
    return sum(sizes), max(sizes)


def test_reader_and_library_agree(checkpoints):
    source = checkpoints(tied=False, dtype="bfloat16", pvm_layers=tiny.PVM_LAYERS)
    reader = SafetensorsReader(source)
    assert_same({name: np.array(reader.read(name)) for name in reader.entries}, tensors(source))
