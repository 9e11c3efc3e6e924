"""`train.py` as a user runs it: on a tiny checkpoint and a JSONL file, by command line."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
import training_runs
from training_runs import SPEEDS, without_speeds

from pvm_jax import cli, distributed
from pvm_jax.checkpoint import load_params, open_checkpoint
from pvm_jax.data.processor import Processor
from pvm_jax.training.metrics import Meter, MetricWriter, read_metrics
from pvm_jax.training.report import NonFiniteLoss, Reporter
from pvm_jax.training.setup import Evaluator
from pvm_jax.training.stage import StageBatch, TrainingError
from pvm_jax.training.workdir import refuse_other_configuration, refuse_other_data

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Twelve rows with an image each, answers of 5 to 11 words; in the layout of somebody's own data."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "pictures").mkdir()
    rows = []
    for i in range(12):
        tiny.image(i, 32, 64).save(folder / "pictures" / f"{i}.png")
        rows.append({"id": f"row{i}", "prompt": tiny.text(i, 6), "completion": tiny.text(50 + i, 5 + i % 7),
                     "images": [f"{i}.png"]})  # fmt: skip
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def common(pvm_checkpoint, data) -> list[str]:
    """The command line of a small run."""
    return [
        "--config=configs/sft.py:4b,smoke",
        f"--config.model.path={pvm_checkpoint}",
        f"--config.data.path={data}",
        f"--config.data.image_folder={data.parent / 'pictures'}",
        "--config.data.length=(64,)",
        "--config.data.patches=(16,)",
        "--config.data.rows=2",
        "--config.optimizer.learning_rate=0.01",
    ]


@pytest.fixture(scope="module")
def train():
    """`train.py` as a module."""
    sys.path.insert(0, str(ROOT))
    import train

    yield train
    sys.path.remove(str(ROOT))


@pytest.fixture
def run(train, common, monkeypatch):
    """`run(workdir, *flags, devices=1)`: trains in this process."""

    def call(workdir: Path, *arguments: str, devices: int = 1) -> None:
        config = [argument for argument in arguments if argument.startswith("--config=")] or common[:1]
        rest = [argument for argument in arguments if argument not in config]
        setting = training_runs.Setting(ROOT, (*config, *common[1:]))
        training_runs.run(monkeypatch, setting, workdir, *rest, devices=devices)

    return call


def losses(workdir: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(workdir)}


@pytest.fixture(scope="module")
def finished(train, common, tmp_path_factory) -> Path:
    """The workdir of a run of four steps."""
    with pytest.MonkeyPatch.context() as patch:
        workdir = tmp_path_factory.mktemp("finished") / "run"
        run.__wrapped__(train, common, patch)(workdir)
    return workdir


# ---- What a run leaves -------------------------------------------------------------------------------------------


def test_metrics_of_every_step(finished, data):
    lines = read_metrics(finished)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    expected = {"loss", "grad_norm", "grad_norm_pvm", "learning_rate", "gate/1", "gate/4", "padding",
                "skipped_samples", *(name for name in SPEEDS if not name.endswith("/"))}  # fmt: skip
    assert expected <= set(lines[0])
    assert all(np.isfinite(list(line.values())).all() for line in lines)
    assert lines[0]["learning_rate"] == 0.0 and lines[1]["learning_rate"] == np.float32(0.01)
    assert lines[1]["gate/1"] != lines[0]["gate/1"]
    assert 0 < lines[0]["padding"] < 1 and 0 < lines[0]["waiting_for_data"] <= 1
    assert any((finished / "tensorboard").iterdir())


def test_workdir_is_a_model_and_holds_only_what_was_trained(finished, pvm_checkpoint):
    checkpoint = open_checkpoint(finished)
    assert checkpoint.config.pvm.layers == tiny.PVM_LAYERS
    limits = Processor.from_pretrained(checkpoint.files).images.max_pixels  # those of the run, not of the checkpoint
    assert limits == 4096 < Processor.from_pretrained(pvm_checkpoint).images.max_pixels
    gate, frozen = "text/layers/1/pvm_block/gate_alpha", "text/layers/0/mlp/up_proj"
    wanted = {gate: jax.ShapeDtypeStruct((1, 1), np.float32), frozen: jax.ShapeDtypeStruct((1, 96, 64), np.float32)}
    trained, before = load_params(checkpoint, wanted), load_params(pvm_checkpoint, wanted)
    assert abs(trained[gate][0, 0]) == np.float32(read_metrics(finished)[-1]["gate/1"])
    assert trained[gate] != before[gate]
    np.testing.assert_array_equal(trained[frozen], before[frozen])
    assert json.loads((finished / "model" / "base.json").read_text())["path"] == str(pvm_checkpoint)
    on_disk = sum(f.stat().st_size for f in (finished / "checkpoints" / "4").rglob("*") if f.is_file())
    assert on_disk < (pvm_checkpoint / "model.safetensors").stat().st_size
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == ["2", "4"]


def test_a_finished_run_started_again_changes_nothing(finished, run):
    """Also in micro-batches, as a user starts it after a step that found no memory."""
    before = without_speeds(finished)
    run(finished, "--config.micro_batches=2", "--config.model.remat=True", "--config.model.attention=xla")
    assert without_speeds(finished) == before


def test_hosts_compare_what_they_are_about_to_run(finished, run, train, monkeypatch, capsys):
    told = []
    monkeypatch.setattr(train, "check_writable", told.append)
    monkeypatch.setattr(distributed.Cluster, "agree", lambda self, name, facts: told.append(facts))
    run(finished)
    folder, facts = told
    assert folder == finished and facts["latest checkpoint"] == 4 and facts["jax"] == jax.__version__
    assert "config.checkpoint.every" in facts and "config.compilation_cache" not in facts
    assert capsys.readouterr().out.startswith(f"{jax.device_count()} ")


def test_a_run_goes_on_with_as_many_rows_alone(finished, run, data):
    lines = data.read_text()
    data.write_text(lines + lines.splitlines()[0] + "\n")
    try:
        with pytest.raises(
            TrainingError, match=r"holds a run on other data, which differs in rows.train \(there 12, here 1"
        ):
            run(finished)
    finally:
        data.write_text(lines)


def test_what_a_checkpoint_says_about_data(tmp_path):
    now = {"rows": {"a": 3, "b": 4}, "steps": 9}
    for before in ({}, {"metrics": {}}, now):  # there were none in older ones
        refuse_other_data(tmp_path, before, now)
    with pytest.raises(
        TrainingError, match=r"differs in rows.b \(there 5, here 4\); steps \(there 8, here 9\): samples"
    ):
        refuse_other_data(tmp_path, {"rows": {"a": 3, "b": 5}, "steps": 8}, now)


def test_sharded_run_has_the_losses_of_one_device(finished, run, tmp_path):
    """Data, parameter and tensor axes of two devices each, and two micro-batches."""
    run(tmp_path / "w", "--config.mesh.data=2", "--config.mesh.fsdp=1", "--config.mesh.tensor=2", devices=4)
    np.testing.assert_allclose(list(losses(tmp_path / "w").values()), list(losses(finished).values()), rtol=1e-4)


def test_run_from_another_runs_workdir(finished, run, tmp_path):
    """A training workdir as `model.path`: what it trained is where the new run begins."""
    run(tmp_path / "w", f"--config.model.path={finished}", "--config.steps=1")
    assert read_metrics(tmp_path / "w")[0]["gate/1"] == read_metrics(finished)[-1]["gate/1"]


def test_everything_from_random_values_becomes_a_hugging_face_checkpoint(run, pvm_checkpoint, tmp_path):
    from pvm_jax.convert import convert_to_hf

    workdir = tmp_path / "w"
    options = ("--config.model.init=random", '--config.freeze=(("",True),)', "--config.steps=2")
    run(workdir, *options)
    assert json.loads((workdir / "model" / "base.json").read_text()) == {"path": None, "checksum": None}
    convert_to_hf(workdir, tmp_path / "hf")
    name = "text/layers/2-3/mlp/up_proj"
    wanted = {name: jax.ShapeDtypeStruct((2, 96, 64), np.float32)}
    ours, exported, base = (load_params(p, wanted)[name] for p in (workdir, tmp_path / "hf", pvm_checkpoint))
    np.testing.assert_array_equal(ours, exported)
    assert np.std(ours) < 0.03 < np.std(base)

    with pytest.raises(TrainingError, match=r"init='random' with \d+ frozen parameters"):
        run(tmp_path / "w2", "--config.model.init=random")


# ---- Resuming ----------------------------------------------------------------------------------------------------


def command(common: list[str], workdir: Path, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """A process of its own on one device, without torch and TensorFlow."""
    argv = [sys.executable, "train.py", *common, f"--workdir={workdir}", *arguments]
    return argv, tiny.without_torch(1)


def test_killed_and_restarted_run_has_the_same_losses_bit_for_bit(common, tmp_path):
    """kill -9 at a random moment after the second checkpoint, wherever that is: in a step or in a save.

    Without torch and tensorflow. Lines are written every three steps, checkpoints every two: the sums of an
    unfinished line must survive, too.
    """
    options = ("--config.steps=40", "--config.checkpoint.every=2", "--config.log_every=3")
    argv, env = command(common, tmp_path / "whole", *options)
    subprocess.run(argv, cwd=ROOT, env=env, check=True, timeout=900, capture_output=True)

    argv, env = command(common, tmp_path / "killed", *options)
    process = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 900
    while not (tmp_path / "killed" / "checkpoints" / "4").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(np.random.default_rng().random() * 0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(read_metrics(tmp_path / "killed"))
    resumed = subprocess.run(argv, cwd=ROOT, env=env, check=True, timeout=900, capture_output=True, text=True)
    assert re.search(r"resuming from step \d+", resumed.stdout)
    assert before < 14, "killed too late to show anything"
    assert without_speeds(tmp_path / "killed") == without_speeds(tmp_path / "whole")
    for item in ("trainable", "optimizer"):
        assert (tmp_path / "killed" / "checkpoints" / "40" / item).is_dir()


def test_half_written_checkpoint_is_never_resumed_from(finished, run, tmp_path, capsys):
    workdir = tmp_path / "w"
    run(workdir, "--config.steps=4", "--config.checkpoint.every=2")
    (workdir / "checkpoints" / "4").rename(workdir / "checkpoints" / "4.orbax-checkpoint-tmp")
    run(workdir, "--config.steps=4", "--config.checkpoint.every=2")
    assert "resuming from step 2" in capsys.readouterr().out
    assert without_speeds(workdir) == without_speeds(finished)


def test_lines_beyond_the_checkpoint_are_written_again(tmp_path):
    writer = MetricWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write(step, {"loss": step / 3})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # cut off by a kill
    writer = MetricWriter(tmp_path, 2)
    writer.write(3, {"loss": 7.0})
    writer.close()
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1 / 3}, {"step": 2, "loss": 2 / 3}, {"step": 3, "loss": 7.0}]


def test_meter_divides_sums_once_and_goes_on_from_a_checkpoint():
    meter = Meter()
    meter.add({"loss": (6.0, 2.0), "reads": (0.0, 0.0)})
    meter = Meter(json.loads(json.dumps(meter.sums())))
    meter.add({"loss": (1.0, 8.0)})
    assert meter.take() == {"loss": 0.7}  # not the mean of 3 and 1/8
    assert meter.take() == {}


# ---- Mistakes ----------------------------------------------------------------------------------------------------


def test_metric_beyond_its_bound_is_said(tmp_path, capfd):
    """Two steps: 3 of 4 tokens' worth is within a bound of 1, 5 of 4 is not."""
    reporter = Reporter(tmp_path, 0, 2, every=1)
    for step, gap in ((1, 3.0), (2, 5.0)):
        drawn = StageBatch(batch=None, ids=("a",), tokens=4, bounds={"gap": 1.0})
        reporter.step(step, drawn, {"loss": (1.0, 1), "grad_norm": (1.0, 1), "finite": (True, 1), "gap": (gap, 4)})
    reporter.flush()
    reporter.close()
    said = [line for line in capfd.readouterr().out.splitlines() if "warning" in line]
    assert said == ["warning: step 2: gap is 1.25, expected at most 1"]


def test_a_line_after_the_last_step_alone(tmp_path):
    reporter = Reporter(tmp_path, 0, 3, every=0)
    for step in (1, 2, 3):
        drawn = StageBatch(batch=None, ids=("a",), tokens=4)
        reporter.step(step, drawn, {"loss": (step, 1), "grad_norm": (1.0, 1), "finite": (True, 1)})
    reporter.flush()
    reporter.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(3, 2.0)]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"module": "pvm_jax.evals.harness"},
            r"config.evals.mmstar.every: expected steps between evaluations, 0: only",
        ),
        ({"every": 3}, r"config.evals.mmstar.module: expected a Python module, found nothing"),
        ({"module": "pvm_jax.evals.harness", "every": 3, "sedds": 1}, r"config.evals.mmstar: unknown keys \['sedds'\]"),
    ],
)
def test_an_evaluator_that_cannot_be_is_named(processor_dir, entry, message):
    with pytest.raises(ValueError, match=message):
        Evaluator.make("mmstar", Processor.from_pretrained(processor_dir), entry)


def test_what_is_printed_tells_whether_data_is_the_bottleneck(tmp_path, capsys):
    """Half of the first line's time is spent waiting for batches, none of the second's; compiling counts nowhere.

    Half of the third line's time went to something else than data.
    """
    reporter = Reporter(tmp_path, 0, 6, every=2)
    for step in range(1, 7):
        with reporter.waiting():
            time.sleep(0.2 if step not in (3, 4) else 0.0)
        with reporter.paused():
            time.sleep(0.3)
        time.sleep(0.2)
        drawn = StageBatch(batch=None, ids=("a",), tokens=96, metrics={"padding": (32, 128)},
                           seconds={"rollout": 0.19} if step > 4 else {})  # fmt: skip
        reporter.step(step, drawn, {"loss": (1.0, 1), "grad_norm": (1.0, 1), "finite": (True, 1)})
        if step % 2 == 0:
            reporter.flush()
    reporter.close()
    lines = read_metrics(tmp_path)
    first, second, third = (line["waiting_for_data"] for line in lines)
    assert 0.3 < first < 0.7 and second < 0.1 and third < 0.15
    assert ["time/rollout" in line for line in lines] == [False, False, True] and 0.3 < lines[2]["time/rollout"] < 0.7
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    said = r"step {}/6  loss 1.0000  tokens/s \d+  padding 25 %  waiting for data \d+ %"
    assert re.fullmatch(said.format(2), printed[0]) and re.fullmatch(said.format(6) + r"  rollout \d\d %", printed[2])


def test_loss_that_is_not_finite_stops_the_run_and_names_the_samples(run, tmp_path):
    overflow = ("--config.optimizer.learning_rate=1e38", "--config.optimizer.warmup_ratio=0.0")
    with pytest.raises(NonFiniteLoss, match=r"step 2: the loss is \S+ and the gradient norm \S+, .*row\d+, row\d+"):
        run(tmp_path / "w", *overflow, "--config.checkpoint.every=1")
    assert sorted(p.name for p in (tmp_path / "w" / "checkpoints").iterdir()) == ["1"]


def test_workdir_of_another_configuration_is_refused(finished, run):
    message = r"differs in optimizer.learning_rate \(there 0.01, here 0.02\); seed \(there 0, here 5\)"
    with pytest.raises(TrainingError, match=message):
        run(finished, "--config.seed=5", "--config.optimizer.learning_rate=0.02")


GRPO = {"model": {"path": "x", "attention": "xla", "lora": {"rank": 0, "alpha": None, "targets": "proj"}}, "steps": 3,
        "stage": {"module": "pvm_jax.training.grpo", "beta": 0.0, "sampler_weights": "gathered"},
        "data": {"path": "y", "position_shift": 0}}  # fmt: skip
FASTER = {"model": GRPO["model"] | {"attention": "splash", "remat": True}, "micro_batches": 4,
          "stage": GRPO["stage"] | {"sampler_weights": "split"}}  # fmt: skip


def of_before() -> dict:
    """The same run, by a configuration without the keys that came later."""
    stage = {"module": "pvm_jax.training.grpo", "beta": 0.0}
    return {"model": {"path": "x"}, "stage": stage, "data": {"path": "y"}, "steps": 3}


@pytest.mark.parametrize("begun", [of_before(), GRPO | FASTER])
def test_a_run_goes_on_with_what_changes_no_numbers(tmp_path, begun):
    (tmp_path / "config.json").write_text(json.dumps(begun))
    refuse_other_configuration(tmp_path, GRPO)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", {"path": "x", "lora": {"rank": 4}}, "model.lora.rank (there 0, here 4)"),
        ("data", {"path": "y", "position_shift": 9}, "data.position_shift (there 0, here 9)"),
        ("stage", of_before()["stage"] | {"beta": 0.1}, "stage.beta (there 0.0, here 0.1)"),
        ("stage", of_before()["stage"] | {"other": 1}, "stage.other (there None, here 1)"),
    ],
)
def test_a_key_that_a_run_had_not_means_what_it_did_then(tmp_path, key, value, message):
    (tmp_path / "config.json").write_text(json.dumps(of_before()))
    with pytest.raises(TrainingError, match=re.escape(f"differs in {message}:")):
        refuse_other_configuration(tmp_path, of_before() | {key: value})


@pytest.mark.parametrize(
    "stage", [GRPO["stage"] | {"loss_type": "bnpo"}, {"module": "pvm_jax.training.visual_labels"}, {"module": "mine"}]
)
def test_micro_batches_stay_where_a_loss_may_depend_on_them(tmp_path, stage):
    (tmp_path / "config.json").write_text(json.dumps(GRPO | {"stage": stage, "micro_batches": 1}))
    with pytest.raises(TrainingError, match=r"differs in micro_batches \(there 1, here 2\):"):
        refuse_other_configuration(tmp_path, GRPO | {"stage": stage, "micro_batches": 2})


def test_a_model_is_no_workdir(run, pvm_checkpoint, tmp_path):
    """Its config.json would be replaced by that of the run."""
    for name, weights in (("hf", "model-00001-of-00002.safetensors"), ("native", "params/a")):
        model = tmp_path / name
        (model / weights).parent.mkdir(parents=True)
        for file in (weights, "config.json"):
            (model / file).write_text("{}")
        with pytest.raises(
            TrainingError, match=rf"--workdir={model}: expected the directory of a run, found a model; "
        ):
            run(model)
        assert len(list(model.iterdir())) == 2 and (model / "config.json").read_text() == "{}"


def test_weights_that_changed_since_are_refused(run, pvm_checkpoint, tmp_path):
    import shutil

    base = tmp_path / "base"
    shutil.copytree(pvm_checkpoint, base)
    run(tmp_path / "w", f"--config.model.path={base}", "--config.steps=1")
    content = bytearray((base / "model.safetensors").read_bytes())
    content[-1000:] = bytes(1000)
    (base / "model.safetensors").write_bytes(content)
    with pytest.raises(TrainingError, match=r"base.json: this run began with the weights of .*put the weights back"):
        run(tmp_path / "w", f"--config.model.path={base}", "--config.steps=1")


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("--config.sedd=3", "error: --config.sedd: no such key; did you mean --config.seed?"),
        ("--config.learning_rate=3", "no such key; did you mean --config.optimizer.learning_rate?"),
        ("--config.data.patch=3", "--config.data.patch: no such key; did you mean --config.data.pat"),
        ("--config.seed=x", "error: flag --config.seed=x: invalid literal for int()"),
        ("--config=configs/none.py", "No such file or directory: 'configs/none.py'"),
        ("--workdir=gs://bucket/run", "--workdir=gs://bucket/run: expected a directory; mount a bucket"),
        (
            "--config=configs/sft.py:9b",
            "configs/sft.py: expected one of 2b, 4b, 8b, 32b and perhaps lora or smoke, got '9b'",
        ),
    ],
)
def test_command_line_that_cannot_be_used_exits_with_2_and_one_sentence(run, tmp_path, capsys, argument, sentence):
    with pytest.raises(SystemExit) as exit:
        run(tmp_path / "w", argument)
    assert exit.value.code == cli.USAGE_ERROR
    error = capsys.readouterr().err
    assert sentence in error and len(error.splitlines()) == 1
    assert not (tmp_path / "w").exists()


def test_mistakes_print_one_sentence_and_no_traceback(common, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    argv, env = command(common, tmp_path / "w", f"--config.data.path={tmp_path / 'empty.jsonl'}")
    done = subprocess.run(argv, cwd=ROOT, env=env, timeout=900, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"error: the data set is empty: no rows in {tmp_path / 'empty.jsonl'}"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.model.path="], r"config.model.path: expected a model directory; pass --config.model.path=DIR"),
        (["--config.data.path="], r"config.data.path: expected JSONL or parquet files .* pass --config.data.path"),
        (["--config.model.init=rnadom"], r"config.model.init: expected one of .*'random'.*got 'rnadom'"),
        (["--config.stage.module=pvm_jax.training.sff"], r"config.stage.module: expected a Python module, got"),
        (["--config.stage.module=pvm_jax.config"], r"expected a module with a function make_stage"),
        (["--config.steps=0"], r"config.steps: expected at least one step, got 0"),
        (["--config.micro_batches=3"], r"rows = 2 is not a multiple of 3"),
    ],
)
def test_settings_that_do_not_fit_are_named(run, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "w", *arguments)


# ---- Stages and configurations -----------------------------------------------------------------------------------

STAGE = """
import jax.numpy as jnp
from flax import nnx
from pvm_jax.training import sft
from pvm_jax.training.stage import Loss

def make_stage(setup, *, chunk, weight=1.0):
    return Biased(sft.make_loader(setup), chunk)

class Heads(nnx.Module):
    def __init__(self):
        self.bias = nnx.Param(jnp.full((3,), 2.0))

class Biased(sft.SFT):
    def make_extra(self, rngs):
        return Heads()

    def loss_fn(self, model, batch):
        loss = super().loss_fn(model, batch)
        penalty = jnp.sum(jnp.square(model.extra.bias[...])) * loss.count
        return Loss(loss.sum + penalty, loss.count, loss.metrics | {"penalty": (penalty, loss.count)})
"""

EVALUATOR = """
def make_evaluator(processor, name, *, shift):
    def evaluate(model):
        gate = model.text.layers["1"].pvm_block.gate_alpha[...]
        return {"gate": (abs(float(gate[0, 0])) * 4 + shift, 4), "nothing": (0, 0)}
    return evaluate
"""


def test_stage_with_parameters_of_its_own_and_an_evaluator(run, tmp_path, monkeypatch):
    """A stage and an evaluator are modules that the configuration names; the stage's heads train, exports lack them."""
    (tmp_path / "biased_stage.py").write_text(STAGE)
    (tmp_path / "gate_evaluator.py").write_text(EVALUATOR)
    config = (
        "from configs import sft\n\n\ndef get_config(argument):\n    config = sft.get_config(argument).unlock()\n"
        "    config.evals = {'probe': {'module': 'gate_evaluator', 'every': 2, 'shift': 0}}\n    return config.lock()\n"
    )
    (tmp_path / "probe.py").write_text(config)
    monkeypatch.syspath_prepend(str(tmp_path))
    workdir = tmp_path / "w"
    run(workdir, f"--config={tmp_path / 'probe.py'}:smoke", "--config.stage.module=biased_stage")

    lines = read_metrics(workdir)
    penalties = [line["penalty"] for line in lines if "penalty" in line]
    assert penalties[0] == 12.0 and penalties[-1] < 12.0  # three squares of 2, and they shrink
    probes = {line["step"]: line["probe/gate"] for line in lines if "probe/gate" in line}
    gates = {line["step"]: line["gate/1"] for line in lines if "gate/1" in line}
    assert probes == {2: gates[2], 4: gates[4]}
    assert not any("probe/nothing" in line for line in lines)
    names = {p.name for p in (workdir / "checkpoints" / "4").iterdir()}
    assert {"trainable", "optimizer", "meta"} <= names
    assert all(not name.startswith("extra/") for name in load_params(workdir, {}))


@pytest.mark.parametrize("argument", ["2b", "4b", "8b", "32b", "8b,smoke"])
def test_sft_configurations_are_locked_and_follow_the_paper(train, argument):
    from configs import sft

    config = sft.get_config(argument)
    assert config.is_locked
    adamw = config.optimizer
    assert (adamw.learning_rate, adamw.b1, adamw.b2, adamw.eps) == (1e-4, 0.9, 0.999, 1e-8)
    assert (adamw.weight_decay, adamw.clip_norm, adamw.schedule, adamw.warmup_ratio) == (0.0, 1.0, "cosine", 0.1)
    assert config.data.loss_normalization == "sample" and config.data.vision_masked == 0.0
    if "smoke" not in argument:
        assert config.data.samples == 64 and config.epochs == 1.0
