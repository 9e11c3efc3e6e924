"""LoRA: W x + (alpha / rank) B A x, in training, on a mesh, after a restart, in generation and in both exports."""

import json
import re
import shutil
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pvm_reference
import pytest
import tiny
import torch
import training_runs
from flax import nnx
from safetensors.numpy import load_file

import pvm_jax
from configs.common import LORA_ONLY, PVM_AND_LORA
from pvm_jax import convert, orbax_io
from pvm_jax.checkpoint import Checkpoint, base_record, flatten, load_model, load_params, open_checkpoint
from pvm_jax.config import ConfigError, ModelConfig
from pvm_jax.data.processor import Processor
from pvm_jax.lora import LINEAR_MAPS, LoRAConfig, with_lora
from pvm_jax.lora_files import name_of_base
from pvm_jax.models.qwen3_vl import Qwen3VL
from pvm_jax.training.freeze import Partition
from pvm_jax.training.losses import cross_entropy
from pvm_jax.training.setup import add_lora
from pvm_jax.training.stage import TrainingError
from pvm_jax.training.step import loss_and_gradients

ALL = LoRAConfig(rank=3, alpha=6.0, targets="proj")
logits = tiny.compiled(lambda model, batch: model.logits(model(batch)))


def config(lora: LoRAConfig | None = ALL, tied: bool = True, pvm_layers: tuple[int, ...] = (3,)) -> ModelConfig:
    """Four layers in groups 0, 1-2 and 3; the first is also DeepStack's."""
    raw = tiny.hf_config(tied, pvm_layers, "causal" if pvm_layers else None)
    raw["text_config"]["num_hidden_layers"] = 4
    raw["vision_config"] |= {"depth": 1, "deepstack_visual_indexes": [0]}
    return ModelConfig.from_hf(with_lora(raw, lora))


def build(sizes: ModelConfig, change=lambda name, value: value) -> Qwen3VL:
    """A model whose values depend on their names alone; `change(name, value)` has the last word."""
    model = nnx.eval_shape(lambda: Qwen3VL(sizes, rngs=nnx.Rngs(0)))
    for name, variable in flatten(nnx.state(model)).items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        shape = variable.shape
        value = np.ones(shape) if "norm" in name else rng.standard_normal(shape) / np.sqrt(shape[-1])
        if name.endswith("gate_alpha"):
            value = np.full(shape, 0.5)
        variable.set_value(jnp.asarray(change(name, value), jnp.float32))
    return model


def values(model: Qwen3VL) -> dict[str, np.ndarray]:
    return {name: np.asarray(variable[...]) for name, variable in flatten(nnx.state(model)).items()}


def factors(adapted: dict[str, np.ndarray], name: str, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A [L,r,in] and B [L,out,r] of a weight."""
    a, b = adapted[f"{name}_lora/a"], adapted[f"{name}_lora/b"]
    a, b = a.reshape(len(a), a.shape[1], -1), b.reshape(len(b), -1, b.shape[-1])
    assert a.shape[2] * b.shape[1] * len(a) == weight.size
    return a, b


def merged(adapted: dict[str, np.ndarray], lora: LoRAConfig):
    """The `change` of `build` that adds adapters to the weights."""

    def change(name: str, value: np.ndarray) -> np.ndarray:
        if f"{name}_lora/a" not in adapted:
            return value
        a, b = factors(adapted, name, value)
        return value + lora.alpha / lora.rank * np.einsum("LOR,LRI->LOI", b, a).reshape(value.shape)

    return change


@pytest.fixture(scope="module")
def batch(pvm_checkpoint):
    image, text = tiny.image, tiny.text
    return Processor.from_pretrained(pvm_checkpoint)(
        [
            {"messages": [tiny.user(image(0, 64, 96), text(0, 8)), tiny.assistant(text(1, 12))]},
            {"messages": [tiny.user("count to three"), tiny.assistant("one two three")]},
        ]
    )


# ---- The model ---------------------------------------------------------------------------------------------------

SOME = LoRAConfig(rank=2, alpha=1.0, targets=r"layers\.[123]\.(mlp\.down|self_attn\.[ko])_proj")


@pytest.mark.parametrize(
    ("lora", "tied", "pvm_layers"), [(ALL, True, (3,)), (SOME, False, ())], ids=["all, tied, PVM", "some, untied"]
)
def test_adapters_compute_what_merged_weights_compute(batch, lora, tied, pvm_layers):
    adapted = build(config(lora, tied, pvm_layers))
    names = {name for name in values(adapted) if "_lora/" in name}
    assert len(names) == 2 * 3 * 7 if lora is ALL else len(names) == 2 * 3, names
    base = build(config(None, tied, pvm_layers))
    whole = build(config(None, tied, pvm_layers), merged(values(adapted), lora))
    got, expected, without = (np.asarray(logits(m, batch)) for m in (adapted, whole, base))
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
    assert np.abs(without - expected).max() > 0.1 * np.abs(expected).max()


def test_new_adapters_change_no_bit(batch):
    adapted = build(config(), lambda name, value: 0 * value if name.endswith("_lora/b") else value)
    np.testing.assert_array_equal(logits(adapted, batch), logits(build(config(None)), batch))


def test_new_adapters_start_where_they_can_learn():
    model = Qwen3VL(config(), rngs=nnx.Rngs(0))
    for name, value in values(model).items():
        if name.endswith("_lora/b"):
            assert not value.any()
        if name.endswith("down_proj_lora/a"):
            np.testing.assert_allclose(value.std(), 1 / np.sqrt(96), rtol=0.2)


def test_layers_are_grouped_by_what_is_adapted():
    assert config().layer_groups() == config(None).layer_groups() == ((0,), (1, 2), (3,))
    assert config(LoRAConfig(2, 2.0, r"layers\.2\.")).layer_groups() == ((0,), (1,), (2,), (3,))
    assert config(LoRAConfig(2, 2.0, "mlp")).lora.modules(3) == LINEAR_MAPS[4:]


def test_adapters_lie_on_the_mesh_as_their_weights_do():
    state = flatten(nnx.state(nnx.eval_shape(lambda: Qwen3VL(config(), rngs=nnx.Rngs(0)))))
    names = ("self_attn/q_proj_lora/a", "self_attn/q_proj_lora/b", "self_attn/o_proj_lora/a", "mlp/down_proj_lora/b")
    assert [state[f"text/layers/1-2/{name}"].get_metadata("axes") for name in names] == [
        ("layers", "rank", "embed"),
        ("layers", "heads", "head_dim", "rank"),
        ("layers", "rank", "heads", "head_dim"),
        ("layers", "embed", "rank"),
    ]


# ---- Gradients ---------------------------------------------------------------------------------------------------


class Cross:
    """A stage with the SFT loss."""

    def make_extra(self, rngs):
        return None

    def loss_fn(self, model, batch):
        return cross_entropy(model.logits, model(batch), batch.tokens, batch.loss_weights, chunk=32)


def gradients(model: Qwen3VL, batch, table) -> dict[str, np.ndarray]:
    partition = Partition(model, table)
    step = jax.jit(lambda t, f, b: loss_and_gradients(Cross(), partition, t, f, b)[-1])
    return jax.device_get(step(*partition.split(model), batch))


def test_gradients_are_those_of_the_merged_weights_by_the_chain_rule(batch):
    adapted = build(config())
    held = values(adapted)
    got = gradients(adapted, batch, LORA_ONLY)
    assert set(got) == {name for name in held if "_lora/" in name}
    whole = build(config(None), merged(held, ALL))
    of_weights = gradients(whole, batch, ((r"(self_attn|mlp)/\w_proj|/mlp/\w+_proj", True), ("", False)))
    checked = 0
    for name, g in of_weights.items():
        if "pvm_block" in name:
            continue
        a, b = factors(held, name, g)
        g = ALL.scale * g.reshape(len(a), b.shape[1], -1)
        for leaf, expected in (("a", np.swapaxes(b, 1, 2) @ g), ("b", g @ np.swapaxes(a, 1, 2))):
            found = got[f"{name}_lora/{leaf}"].reshape(expected.shape)
            # Two models, W x + B A x and (W + B A) x: rounding of fp32 differs all the way.
            np.testing.assert_allclose(found, expected, atol=3e-5 * np.abs(expected).max(), rtol=0, err_msg=name)
            checked += 1
    assert checked == len(got) == 2 * 3 * 7


def test_nothing_below_the_first_adapted_layer_is_differentiated(batch):
    """Loops in the traced gradient: layers 1-2 are a scan, which has a second one for its backward pass or none."""

    def scans(targets: str, table=LORA_ONLY) -> int:
        model = build(config(LoRAConfig(2, 2.0, targets)))
        partition = Partition(model, table)
        step = jax.make_jaxpr(lambda t, f, b: loss_and_gradients(Cross(), partition, t, f, b)[-1])
        return str(step(*partition.split(model), batch)).count("= scan[")

    assert scans(r"layers\.0\.") == scans(r"layers\.3\.") + 1


def test_tables_train_adapters_alone_or_with_pvm():
    names = list(values(build(config())))
    chosen = {id(t): set(Partition(build(config()), t).trainable) for t in (LORA_ONLY, PVM_AND_LORA)}
    lora, pvm = ({n for n in names if part in n} for part in ("_lora/", "pvm_block/"))
    assert chosen[id(LORA_ONLY)] == lora and chosen[id(PVM_AND_LORA)] == lora | pvm and len(pvm) == 15


# ---- What a user can get wrong -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 33}, "lora.rank: expected 1 to 32, the smaller side of layers.0.self_attn.k_proj, got 33"),
        ({"rank": 65, "targets": "mlp"}, "config.model.lora.rank: expected 1 to 64, the smaller side of layers.0.mlp."),
        ({"rank": -1}, "config.model.lora.rank: expected 1 to 32"),
        ({"rank": 2, "alpha": 0.0}, "config.model.lora.alpha: expected a number above 0, got 0.0"),
        ({"rank": 2, "targets": "qkv"}, "expected to find 'qkv' in some of layers.0.self_attn.q_proj to layers.3.mlp"
         ".down_proj, found it in none; a layer's linear maps are self_attn.q_proj, self_attn.k_proj"),
        ({"rank": 2, "targets": "(q"}, "config.model.lora.targets: expected a regular expression, got '(q'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_sentence(options, message):
    with pytest.raises(TrainingError, match=re.escape(message)) as caught:
        add_lora(config(None), **options)
    assert "\n" not in str(caught.value)


def test_other_adapters_than_the_checkpoints_are_refused():
    assert add_lora(config()) == add_lora(config(), rank=3, alpha=6.0) == config()
    with pytest.raises(TrainingError, match=r"own adapters \(rank 3, alpha 6, targets 'proj'\) or none, got rank 2"):
        add_lora(config(), rank=2)


def test_a_config_file_is_checked_too():
    raw = with_lora(tiny.hf_config(), LoRAConfig(99, 1.0, "q_proj"))
    with pytest.raises(ConfigError, match=r"x\.json: text_config\.lora_rank: expected 1 to 64, the smaller side"):
        ModelConfig.from_hf(raw, "x.json")
    assert with_lora(raw, None) == tiny.hf_config()


# ---- Training, and what becomes of it ----------------------------------------------------------------------------

FLAGS = (
    "--config=configs/sft.py:4b,lora,smoke",
    "--config.model.lora.rank=3",
    "--config.model.lora.alpha=6.0",
    "--config.model.lora.targets=proj",
    "--config.optimizer.eps=1e-4",  # with less, rounding decides the sign of small updates
)


@pytest.fixture(scope="module")
def setting(tmp_path_factory, small_checkpoint):
    return training_runs.Setting.write(tmp_path_factory.mktemp("data"), small_checkpoint, FLAGS)


@pytest.fixture(scope="module")
def finished(setting, tmp_path_factory) -> Path:
    """The workdir of four steps on a small model with PVM; adapters and PVM trained."""
    with pytest.MonkeyPatch.context() as patch:
        workdir = tmp_path_factory.mktemp("finished") / "run"
        training_runs.run(patch, setting, workdir)
    return workdir


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory) -> dict[str, Path]:
    """Both exports by the command line."""
    folder = tmp_path_factory.mktemp("exported")
    for kind in ("merged", "peft"):
        assert convert.main(["to_hf", str(finished), str(folder / kind), f"--lora={kind}"]) == 0
    return {kind: folder / kind for kind in ("merged", "peft")}


def test_a_run_keeps_its_adapters_beside_the_base(finished, small_checkpoint):
    checkpoint = open_checkpoint(finished)
    assert checkpoint.config.lora == LoRAConfig(3, 6.0, "proj")
    source = checkpoint.source()
    stored = [name for name in source.top.shapes if "_lora/" in name]
    assert len(stored) == 2 * 2 * 7 and all(np.abs(source.read(name)).max() > 0 for name in stored)
    assert not source.top.holds("text/layers/0/mlp/up_proj")
    base = open_checkpoint(small_checkpoint).source()
    np.testing.assert_array_equal(source.read("text/layers/0/mlp/up_proj"), base.read("text/layers/0/mlp/up_proj"))


def test_the_merged_export_answers_as_the_run_does(finished, exported, batch):
    run, whole = load_model(finished, scan=True), load_model(exported["merged"], scan=True)
    assert whole.config.lora is None and run.config.lora is not None
    expected = np.asarray(logits(run, batch))
    np.testing.assert_allclose(logits(whole, batch), expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
    unmerged = load_model(exported["peft"], scan=True)
    assert np.abs(np.asarray(logits(unmerged, batch)) - expected).max() > 1e-2 * np.abs(expected).max()


def test_generation_uses_the_adapters(finished, exported):
    question = {"messages": [tiny.user(tiny.image(3, 64, 64), "what is shown?")]}
    answers = []
    for path in (finished, exported["merged"]):
        model, processor = pvm_jax.load(path, dtype="float32")
        answers.append(pvm_jax.generate(model, processor, [question], max_new_tokens=6, temperature=0.0)[0])
    assert answers[0].token_ids == answers[1].token_ids
    np.testing.assert_allclose(answers[0].logprobs, answers[1].logprobs, atol=1e-4)


def test_the_peft_export_read_by_torch(finished, exported, small_checkpoint):
    """Its tensors and settings by hand, on transformers' model with PEFT's formula in hooks."""
    folder = exported["peft"] / "adapter"
    settings = json.loads((folder / "adapter_config.json").read_text())
    tensors = {name: torch.from_numpy(value) for name, value in load_file(folder / "adapter_model.safetensors").items()}
    assert {k: settings[k] for k in ("peft_type", "r", "lora_alpha", "bias", "base_model_name_or_path")} == {
        "peft_type": "LORA", "r": 3, "lora_alpha": 6, "bias": "none", "base_model_name_or_path": "peft"
    }  # fmt: skip
    base, before = load_file(exported["peft"] / "model.safetensors"), load_file(small_checkpoint / "model.safetensors")
    assert all(np.array_equal(base[name], before[name]) for name in before if "pvm_block" not in name)
    assert "lora_rank" not in (exported["peft"] / "config.json").read_text()

    model = pvm_reference.load(exported["peft"])
    modules = dict(model.named_modules())
    names = {name for prefix in settings["target_modules"] for name in modules if name == prefix}
    assert len(names) == 14 and len(tensors) == 28
    for name in names:
        a, b = (tensors[f"base_model.model.{name}.lora_{leaf}.weight"] for leaf in "AB")
        assert a.shape == (3, modules[name].in_features) and b.shape == (modules[name].out_features, 3)
        scale = settings["lora_alpha"] / settings["r"]
        modules[name].register_forward_hook(
            lambda module, args, output, a=a, b=b, scale=scale: output + scale * (args[0] @ a.T) @ b.T
        )
    sample = tiny.conversations()["image"]
    expected = oracle.logits(model, oracle.inputs(small_checkpoint, sample))
    ours = load_model(finished, scan=True)
    got = np.asarray(logits(ours, Processor.from_pretrained(small_checkpoint)([sample])))[0, : len(expected)]
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)


def lora_run(base: Path | None, workdir: Path, trained: str = "text/layers/0/mlp/up_proj_lora/a") -> Checkpoint:
    """A workdir with one trained parameter."""
    (workdir / "model").mkdir(parents=True)
    raw = tiny.hf_config() if base is None else json.loads((base / "config.json").read_text())
    (workdir / "model/config.json").write_text(json.dumps(raw))
    (workdir / "model/base.json").write_text(json.dumps(base_record(base)))
    orbax_io.save(workdir / "checkpoints/1/trainable", {trained: np.zeros((1, 2, 3), np.float32)})
    return open_checkpoint(workdir)


def test_an_adapter_has_the_name_that_its_base_has_elsewhere(stock_checkpoint, tmp_path):
    """And no path of the machine that it was trained on."""
    hub, dst = tmp_path / "models--Owner--Some-VL/snapshots/0a1b", tmp_path / "export"
    folder = tmp_path / "Some-VL-local"
    for copy in (hub, folder):
        shutil.copytree(stock_checkpoint, copy)
        raw = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(raw | {"_name_or_path": "Qwen/What-It-Was-Tuned-From"}))
    assert convert.main(["from_hf", str(folder), str(tmp_path / "native")]) == 0
    bases = {"hub": hub, "folder": folder, "native": tmp_path / "native", "scratch": None}
    names = {name: name_of_base(lora_run(base, tmp_path / "runs" / name), dst) for name, base in bases.items()}
    assert names == {"hub": "Owner/Some-VL", "folder": "Some-VL-local", "native": "export", "scratch": "export"}
    assert name_of_base(lora_run(hub, tmp_path / "runs/more", "text/norm"), dst) == "export", "its weights are others"


def test_the_name_of_the_base_can_be_given(finished, tmp_path, capsys):
    arguments = ["to_hf", str(finished), str(tmp_path / "hf"), "--base_name=Qwen/Some-VL"]
    assert convert.main(arguments) == 2
    assert "error: --base_name: expected --lora=peft with it" in capsys.readouterr().err
    assert convert.main([*arguments, "--lora=peft"]) == 0
    settings = json.loads((tmp_path / "hf/adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "Qwen/Some-VL"


def test_an_unknown_kind_of_export_is_refused(finished, tmp_path):
    with pytest.raises(convert.UsageError, match="--lora: expected one of merged, peft, got 'pefft'"):
        convert.convert_to_hf(finished, tmp_path / "hf", lora="pefft")


def test_a_checkpoint_without_adapters_has_no_peft_export(small_checkpoint, tmp_path, capsys):
    assert convert.main(["from_hf", str(small_checkpoint), str(tmp_path / "native")]) == 0
    assert convert.main(["to_hf", str(tmp_path / "native"), str(tmp_path / "hf"), "--lora=peft"]) == 2
    assert "--lora: expected a checkpoint with LoRA" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_a_run_goes_on_bit_for_bit(setting, finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/4")
    training_runs.run(monkeypatch, setting, tmp_path / "run")
    whole, again = (open_checkpoint(path).source().top for path in (finished, tmp_path / "run"))
    for name in whole.shapes:
        np.testing.assert_array_equal(again.read(name), whole.read(name), err_msg=name)


def test_a_mesh_trains_what_one_device_trains(setting, finished, tmp_path, monkeypatch):
    mesh = ("--config.mesh.fsdp=4", "--config.mesh.tensor=2")
    training_runs.run(monkeypatch, setting, tmp_path / "mesh", *mesh, devices=8)
    np.testing.assert_allclose(training_runs.losses(tmp_path / "mesh"), training_runs.losses(finished), rtol=1e-5)
    alone, spread = (open_checkpoint(path).source().top for path in (finished, tmp_path / "mesh"))
    for name in alone.shapes:
        np.testing.assert_allclose(spread.read(name), alone.read(name), atol=1e-5, err_msg=name)


def test_another_stage_on_top_keeps_the_adapters(setting, finished, tmp_path, monkeypatch):
    """A run that trains PVM alone from the first one's workdir: adapters are frozen, and read from there."""
    flags = [flag for flag in setting.flags if "lora" not in flag and "model.path" not in flag]
    flags = ("--config=configs/sft.py:4b,smoke", *flags, f"--config.model.path={finished}")
    own = training_runs.Setting(setting.folder, flags)
    training_runs.run(monkeypatch, own, tmp_path / "next", "--config.steps=2")
    name = "text/layers/0/self_attn/q_proj_lora/b"
    source = open_checkpoint(tmp_path / "next").source()
    assert not source.top.holds(name) and source.holds(name)
    want = {name: jax.ShapeDtypeStruct(source.shape(name), np.float32)}
    np.testing.assert_array_equal(
        load_params(tmp_path / "next", want)[name], open_checkpoint(finished).source().read(name)
    )


def test_frozen_new_adapters_are_refused(setting, tmp_path, monkeypatch):
    with pytest.raises(
        TrainingError, match=r"expected config.freeze to train the new adapters, it freezes 'text/layers/0"
    ):
        training_runs.run(monkeypatch, setting, tmp_path / "run", '--config.freeze=(("pvm_block/",True),("",False))')
