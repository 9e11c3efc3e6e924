"""Evaluation on digits: scoring, intervals, summaries, results and their comparison; and the commands themselves."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from pvm_jax.config import ModelConfig
from pvm_jax.data import digits
from pvm_jax.data.digits_task import Spec
from pvm_jax.data.digits_tokenizer import write_model_directory
from pvm_jax.data.images import DataError
from pvm_jax.data.processor import Processor
from pvm_jax.evals import compare, scoring
from pvm_jax.evals.digits import Protocol, evaluate, make_evaluator, summarise, table
from pvm_jax.evals.intervals import share, wilson
from pvm_jax.evals.plugins import find_run
from pvm_jax.evals.results import ResultError, read_summary, write_results
from pvm_jax.models.qwen3_vl import Qwen3VL
from pvm_jax.sharding import make_mesh
from pvm_jax.training.metrics import read_metrics

ROOT = Path(__file__).parents[1]
SMALL = {
    "demo": {
        "sft_easy": (4, Spec("train", 40, verbose=0.0, blocks=1.0)),
        "sft_64": (4, Spec("train", 40, verbose=0.0)),
        "sft_256": (4, Spec("train", 60)),
        "prompts": (4, Spec("train", 40)),
        "test_64": (6, Spec("test", 40)),
        "test_128": (4, Spec("test", 100, 60, verbose=1.0)),
        "test_256": (2, Spec("test", 60)),
        "test_505": (2, Spec("test", 113, 99, verbose=1.0)),
    }
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "SPLITS", SMALL)
        return digits.prepare(tmp_path_factory.mktemp("digits_data"), "demo")


@pytest.fixture(scope="module")
def base_data(tmp_path_factory) -> dict[str, Path]:
    """{config: directory} of what the base's runs read, a few rows each."""
    small = {
        "base": {
            "easy": (3, Spec("train", 40, blocks=1.0)),
            "short": (3, Spec("train", 40)),
            "chains": (3, Spec("train", 60, blank=True)),
            "spans": (3, Spec("train", 60, blank=True)),
        },
        "text": {"ends": (3, Spec("train", 16, verbose=0.0, blank=True))},
    }
    folder = tmp_path_factory.mktemp("digits_base_data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "SPLITS", small)
        return {config: digits.prepare(folder, config) for config in small}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return write_model_directory(tmp_path_factory.mktemp("digits_model"))


@pytest.fixture(scope="module")
def processor(model_dir) -> Processor:
    return Processor.from_pretrained(model_dir)


def make_model(model_dir: Path, pvm: bool, slots: int = 0) -> Qwen3VL:
    raw = json.loads((model_dir / "config.json").read_text())
    if pvm:
        raw["text_config"] |= {"pvm_layers": [1, 3], "pvm_hidden_size": 32, "pvm_memory_mask": "causal"}
        raw["text_config"]["pvm_slots"] = slots
    model = Qwen3VL(ModelConfig.from_hf(raw), rngs=nnx.Rngs(0), init="fan_in")
    if pvm:
        for name in ("1", "3"):
            model.text.layers[name].pvm_block.gate_alpha[...] = jnp.full((1, 1), 2.0)
    return model


# ---- Scoring ------------------------------------------------------------------------------------------------------


def test_scorer_marks_the_tokens_that_greedy_decoding_would_choose(model_dir, processor):
    """The row is rewritten token by token with the model's own choices; then all of them are right."""
    model = make_model(model_dir, pvm=True)
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    from PIL import Image

    sample = {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": Image.fromarray(image)}]},
            {"role": "assistant", "content": "Reading Au one one Av two three"},
        ]
    }
    batch = processor([sample, sample])
    scorer = scoring.make_scorer(model, chunk=7)
    columns = np.flatnonzero(batch.loss_weights[0] > 0)
    tokens = batch.tokens.copy()
    forward = tiny.compiled(lambda model, batch: model.logits(model(batch)))
    for column in columns:
        logits = forward(model, dataclasses.replace(batch, tokens=tokens))
        tokens[:, column] = np.asarray(logits[:, column - 1].argmax(-1))
    batch = dataclasses.replace(batch, tokens=tokens)
    right = np.asarray(scorer(batch, np.arange(2)))
    assert right[:, columns].all()
    assert not right[:, 0].any()
    tokens = tokens.copy()
    tokens[1, columns[3]] = (tokens[1, columns[3]] + 1) % 400
    changed = np.asarray(scorer(dataclasses.replace(batch, tokens=tokens), np.arange(2)))
    assert not changed[1, columns[3]]
    assert changed[1, columns[:3]].all()
    assert changed[0, columns].all()


def test_chosen_tokens_in_chunks_equal_those_of_all_logits(model_dir):
    model = make_model(model_dir, pvm=False)
    hidden = jax.random.normal(jax.random.key(0), (2, 13, 96))
    expected = model.logits(hidden).argmax(-1)
    for chunk in (4, 13, 50):
        np.testing.assert_array_equal(scoring.chosen_tokens(model, hidden, chunk), expected)


def test_memory_order_gives_pvm_another_rows_image(model_dir, processor, data):
    """With the backbone blind, swapping the memory equals swapping the images."""
    from pvm_jax.data.loader import Loader, Stream
    from pvm_jax.data.sources import open_source

    source = open_source(data, split="test_128[:2]")
    loader = Loader([Stream(source, samples=2, length=192, patches=144)], processor, seed=0, pack=False)
    batch, _ = next(loader.epoch())
    batch = dataclasses.replace(batch, vision_masked=np.ones(2, bool))
    swapped = dataclasses.replace(batch, patches=batch.patches[::-1].copy())
    scorer = scoring.make_scorer(make_model(model_dir, pvm=True))
    own, other, moved = (np.asarray(scorer(b, o)) for b, o in ((batch, [0, 1]), (batch, [1, 0]), (swapped, [0, 1])))
    np.testing.assert_array_equal(other, moved)
    model = make_model(model_dir, pvm=True)

    hidden = tiny.compiled(lambda model, b, order: model(b, memory=model.encode_images(b).tokens[order]))
    orders = np.array([[0, 1], [1, 0]])
    assert not np.allclose(*(hidden(model, batch, order) for order in orders), atol=1e-3)
    assert own.shape == other.shape


# ---- Intervals and summaries --------------------------------------------------------------------------------------


def test_wilson_interval_against_published_values():
    np.testing.assert_allclose(wilson(8, 10), (0.4902, 0.9433), atol=1e-4)
    np.testing.assert_allclose(wilson(0, 10), (0.0, 0.2775), atol=1e-4)
    np.testing.assert_allclose(wilson(10, 10), (0.7225, 1.0), atol=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)
    assert share(0, 0)["value"] is None


def record(split, condition, positions, right, text=(1, 1), exact=False, tokens=10):
    return {
        "split": split, "condition": condition, "id": "x", "tokens": tokens, "exact": exact,
        "read_positions": positions, "reads_right": right, "text_right": text[0], "text_count": text[1],
    }  # fmt: skip


def test_summary_counts_reads_by_position():
    records = [
        record("long", "normal", [2, 9, 10], [1, 1, 0], (5, 6), tokens=20),
        record("long", "normal", [3, 19], [0, 1], (6, 6), exact=True, tokens=30),
        record("long", "vision_masked", [3], [0]),
    ]
    summary = summarise(records, edges=(0, 10, 20, 40))["long"]
    normal = summary["normal"]
    assert (normal["samples"], normal["tokens"]) == (2, [20, 30])
    assert [(b["from"], b["to"], b["right"], b["count"]) for b in normal["by_position"]] == [
        (0, 10, 2, 3),
        (10, 20, 1, 2),
    ]
    assert (normal["reads"]["right"], normal["reads"]["count"]) == (3, 5)
    assert (normal["text"]["right"], normal["text"]["count"]) == (11, 12)
    assert (normal["exact"]["right"], normal["exact"]["count"]) == (1, 2)
    assert summary["vision_masked"]["reads"]["right"] == 0


# ---- The evaluation -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def protocol(data):
    return Protocol(path=str(data), splits=("test_64", "test_128"), samples=4, length=(192,))


@pytest.fixture(scope="module")
def evaluated(model_dir, processor, protocol):
    return evaluate(make_model(model_dir, pvm=True), processor, protocol)


def test_every_sample_is_scored_once_in_every_condition(evaluated):
    summary, records = evaluated
    assert {(s, c): v["samples"] for s, by in summary.items() for c, v in by.items()} == {
        ("test_64", "normal"): 6, ("test_64", "vision_masked"): 6, ("test_64", "other_memory"): 6,
        ("test_128", "normal"): 4, ("test_128", "vision_masked"): 4, ("test_128", "other_memory"): 4,
    }  # fmt: skip
    assert len({(r["split"], r["condition"], r["id"]) for r in records}) == len(records) == 30
    for r in records:
        size, at = (14, 2) if r["split"] == "test_128" else (None, None)
        if size:
            assert r["read_positions"] == [at + size * i for i in range(r["tokens"] // size)]
        assert r["text_count"] + len(r["read_positions"]) == r["tokens"] + 1
    assert "vision_masked" in table(summary)


def test_shards_of_a_mesh_give_the_same_records(model_dir, processor, protocol, evaluated):
    mesh = make_mesh(data=1, fsdp=2, tensor=1, devices=jax.devices()[:2])
    one = dataclasses.replace(protocol, splits=("test_128",), conditions=("normal",))
    _, records = evaluate(make_model(model_dir, pvm=True), processor, one, mesh)
    expected = [r for r in evaluated[1] if r["split"] == "test_128" and r["condition"] == "normal"]
    assert records == expected


@pytest.mark.parametrize(("pvm", "slots"), [(False, 0), (True, 4)])
def test_models_without_image_memory_have_no_such_ablation(model_dir, processor, protocol, pvm, slots):
    small = dataclasses.replace(protocol, splits=("test_128",), limit=2)
    summary, _ = evaluate(make_model(model_dir, pvm, slots), processor, small)
    assert set(summary["test_128"]) == {"normal", "vision_masked"}


def test_evaluator_of_the_training_loop_returns_sums_and_counts(model_dir, processor, protocol):
    options = dataclasses.asdict(protocol) | {"splits": ("test_128",), "conditions": ("normal",), "limit": 2}
    metrics = make_evaluator(processor, "digits", **options)(make_model(model_dir, pvm=False))
    assert set(metrics) == {f"test_128/normal/{name}" for name in ("exact", "reads", "text")}
    assert metrics["test_128/normal/exact"][1] == 2


def test_the_next_evaluation_of_a_run_compiles_nothing(model_dir, processor, protocol):
    """A training loop puts its model together anew each time."""
    options = dataclasses.asdict(protocol) | {"splits": ("test_128",), "conditions": ("normal",), "limit": 2}
    evaluator, model = make_evaluator(processor, "digits", **options), make_model(model_dir, pvm=False)
    first = evaluator(model)
    compiled = scoring._score._cache_size()
    assert evaluator(nnx.merge(*nnx.split(model))) == first
    assert scoring._score._cache_size() == compiled


def test_settings_that_cannot_be_used_are_refused(data):
    with pytest.raises(DataError, match=r"conditions: expected some of .*, got \['blind'\]"):
        Protocol(path=str(data), splits=("test_64",), conditions=("blind",))
    with pytest.raises(DataError, match="samples: expected at least 2"):
        Protocol(path=str(data), splits=("test_64",), samples=1)
    with pytest.raises(
        ResultError, match=r"config.evals.x.module: expected a Python module, got 'pvm_jax.evals.digit'"
    ):
        find_run("pvm_jax.evals.digit", "x")
    with pytest.raises(ResultError, match="expected a module with `run`"):
        find_run("pvm_jax.evals.scoring", "x")


# ---- Results and their comparison ---------------------------------------------------------------------------------


def test_comparison_shows_every_result_and_draws_a_picture(tmp_path, capsys):
    files = []
    for name, right in (("base", [1, 0]), ("pvm", [1, 1])):
        rows = [record("test_505", "normal", [3, 400], right, tokens=500), record("test_64", "normal", [3], [1])]
        rows += [record("test_505", "other_memory", [3], [0], tokens=500)] if name == "pvm" else []
        files.append(str(write_results(tmp_path / name, "digits", {"checkpoint": name}, summarise(rows), rows)))
    compare.main([*files, f"--out={tmp_path / 'reads.png'}"])
    shown = capsys.readouterr().out
    late = next(line for line in shown.splitlines() if "392-511" in line)
    assert late.split()[-4:] == ["0.000", "(0.000-0.793)", "1.000", "(0.207-1.000)"]
    other = next(line for line in shown.splitlines() if "another image" in line)
    assert other.split()[-3] == "-"
    assert (tmp_path / "reads.png").read_bytes()[:4] == b"\x89PNG"
    assert len((tmp_path / "pvm" / "digits.jsonl").read_text().splitlines()) == 3


def test_the_picture_has_as_many_curves_as_results(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    drawn = []
    monkeypatch.setattr(pyplot, "close", lambda figure: drawn.extend(figure.axes[0].get_legend().get_texts()))
    summary = summarise([record("test_505", "normal", [3, 400], [1, 0], tokens=500)])
    compare.plot({f"run {i}": summary for i in range(9)}, "test_505", tmp_path / "reads.png")
    assert [text.get_text() for text in drawn] == [f"run {i}" for i in range(9)]


def test_comparison_of_what_is_no_result_says_so(tmp_path):
    with pytest.raises(ResultError, match=r"expected a result file that eval\.py wrote, found none"):
        read_summary(tmp_path / "no.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ResultError, match="does not parse"):
        read_summary(tmp_path / "bad.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ResultError, match="no `summary`"):
        read_summary(tmp_path / "other.json")
    with pytest.raises(ResultError, match="expected a different name for each of 2 files"):
        compare.compare([str(tmp_path / "a.json"), str(tmp_path / "b.json")], None, None, None)


# ---- The commands -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", ["", "paper", "slots", "smoke", "paper,smoke"])
def test_sft_configurations(argument):
    sys.path.insert(0, str(ROOT))
    from configs import digits_sft

    config = digits_sft.get_config(argument)
    assert config.is_locked
    masked = {stream.get("vision_masked", 0.0) for stream in config.data.streams.values()}
    assert masked == ({0.0} if "paper" in argument else {0.0, 1.0})
    if "paper" in argument:
        assert (config.optimizer.learning_rate, config.optimizer.b2, config.optimizer.multipliers) == (1e-4, 0.999, ())
    with pytest.raises(ValueError, match="expected some of paper, slots, smoke"):
        digits_sft.get_config("papers")
    sys.path.remove(str(ROOT))


def test_the_whole_experiment_in_miniature(data, tmp_path):
    """Shipped checkpoint -> PVM -> SFT -> GRPO -> evaluation -> comparison, by the commands that the documentation
    gives."""
    environment = tiny.without_torch(1)  # one device, as on a newcomer's machine

    def command(*argv) -> str:
        argv = [sys.executable, *map(str, argv)]
        done = subprocess.run(argv, cwd=ROOT, env=environment, timeout=400, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    base, pvm, sft = ROOT / "assets" / "digits_base", tmp_path / "pvm", tmp_path / "sft"
    add = ("--pvm_layers=0", "--pvm_hidden_size=128", "--pvm_init=fan_in")
    command("-m", "pvm_jax.convert", "from_hf", base, pvm, *add)
    given = (f"--config.model.path={pvm}", f"--config.data.path={data}")
    command("train.py", "--config=configs/digits_sft.py:smoke", f"--workdir={sft}", *given)
    given = (f"--config.model.path={sft}", f"--config.data.path={data}")
    command("train.py", "--config=configs/digits_grpo.py:smoke", f"--workdir={tmp_path / 'grpo'}", *given)
    lines = read_metrics(tmp_path / "grpo")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all({"reward/words", "reward/exact", "loss"} < set(line) and line["sampler_gap"] < 1e-4 for line in lines)
    for name, checkpoint in (("base", base), ("sft", sft)):
        given = (f"--config.checkpoint={checkpoint}", f"--config.evals.digits.path={data}")
        command("eval.py", "--config=configs/digits_eval.py:smoke", f"--workdir={tmp_path / 'eval' / name}", *given)
    files = [tmp_path / "eval" / name / "digits.json" for name in ("base", "sft")]
    shown = command("-m", "pvm_jax.evals.compare", *files, f"--out={tmp_path / 'reads.png'}")
    assert "another image's memory" in shown
    assert (tmp_path / "reads.png").stat().st_size > 10_000
    result = json.loads(files[1].read_text())
    assert result["checkpoint"] == str(sft)
    assert result["options"]["limit"] == 2
    assert set(result["summary"]["test_505"]) == {"normal", "vision_masked", "other_memory"}


def test_base_configurations_train_steps_of_every_kind_of_batch(base_data, tmp_path):
    """Both runs of the base, the second on the result of the first."""
    environment = tiny.without_torch(1)

    def train(argument: str, workdir: Path, *given: str) -> set[str]:
        argv = [sys.executable, "train.py", f"--config=configs/digits_base.py:{argument}", f"--workdir={workdir}"]
        argv += [f"--config.data.path={base_data['base']}", *given]
        done = subprocess.run(argv, cwd=ROOT, env=environment, timeout=400, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        assert all(np.isfinite(line["loss"]) for line in lines)
        return {key for line in lines for key in line if key.startswith("loss/")}

    assert train("smoke", tmp_path / "see") == {"loss/easy", "loss/short"}
    text = f"--config.data.streams.ends.path={base_data['text']}"
    # One shape for all: each is a program to compile.
    shapes = [f"--config.data.streams.{name}.length=(192,)" for name in ("chains", "ends", "spans")]
    shapes += ["--config.data.length=(192,)", "--config.data.streams.ends.patches=(144,)"]
    kinds = train("long,smoke", tmp_path / "long", f"--config.model.path={tmp_path / 'see'}", text, *shapes)
    assert kinds == {"loss/chains", "loss/ends", "loss/short", "loss/spans"}


def test_evaluation_without_a_checkpoint_says_what_to_pass(tmp_path):
    argv = [sys.executable, "eval.py", "--config=configs/digits_eval.py", f"--workdir={tmp_path}"]
    done = subprocess.run(argv, cwd=ROOT, timeout=200, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "error: config.checkpoint: expected a model directory; pass --config.checkpoint=DIR"
    )
