"""The experiment on digits: what is called a read, its cell and its position, and what is told of several seeds."""

import dataclasses
import errno
import importlib.util
import json
import re
import shutil
from pathlib import Path

import analysis_traces as made
import numpy as np
import pytest

from pvm_jax.analysis import digits as experiment
from pvm_jax.analysis.results import AnalysisError
from pvm_jax.checkpoint import load_model, open_checkpoint
from pvm_jax.data import digits
from pvm_jax.data.digits_task import Spec
from pvm_jax.data.processor import Processor
from pvm_jax.data.sources import open_source
from pvm_jax.evals import intervals
from pvm_jax.evals.digits import Protocol, evaluate

BASE = Path(__file__).parents[1] / "assets" / "digits_base"
TEXTS = 2


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    splits = {"test_64": (3, Spec("test", 40, 20)), "test_505": (3, Spec("test", 240, 200, verbose=1.0))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "SPLITS", {"demo": splits})
        return str(digits.prepare(tmp_path_factory.mktemp("digits_data"), "demo"))


@pytest.fixture(scope="module")
def processor():
    return Processor.from_pretrained(BASE)


@pytest.fixture(scope="module")
def written(data, tmp_path_factory) -> tuple[Path, str]:
    """The folder and the table of an experiment with two seeds that are one checkpoint."""
    out = tmp_path_factory.mktemp("experiment") / "out"
    return out, experiment.run(data, [f"base={BASE}", f"twice $x^{{$={BASE},{BASE}"], TEXTS, out)


@pytest.fixture(scope="module")
def found(written):
    return json.loads((written[0] / "digits.json").read_text())["models"]["base"][0]


def test_reads_name_their_cells(processor, data):
    """One word for each digit, one digit for each word."""
    rows = open_source(data, split="test_505")
    pairs = set()
    for i, sample in enumerate(experiment.samples(processor, data, "test_505", TEXTS)):
        words = [sample.source.text.pieces[sample.source.text.columns[place]] for place in sample.reads]
        pairs |= set(zip(words, [rows[i]["metadata"]["labels"][cell] for cell in sample.cells], strict=True))
    assert len(pairs) == len({word for word, _ in pairs}) == len({digit for _, digit in pairs}) > 5


def test_reads_are_those_of_the_evaluation(found, processor, data):
    """The same texts, scored by `eval.py`'s evaluator."""
    model = load_model(open_checkpoint(BASE))
    protocol = Protocol(data, ["test_505", "test_64"], ["normal"], samples=2, length=(320,), limit=TEXTS)
    summary, _ = evaluate(model, processor, protocol)
    for condition, split in (("long", "test_505"), ("short", "test_64")):
        theirs = [(b["from"], b["to"], b["count"], b["right"]) for b in summary[split]["normal"]["by_position"]]
        assert [(b["from"], b["to"], b["count"], b["right"]) for b in found[condition]["by_position"]] == theirs
    assert theirs[0][3] > 0


def test_what_conditions_change(found):
    long, near, short, moved = (found[name]["by_position"] for name in experiment.CONDITIONS)
    assert long[-1]["mass"] < 0.7 * long[0]["mass"] and long[0]["on_cell"] > 0.5, "the base looks, and less and less"
    assert near[-1]["mass"] > 1.3 * long[-1]["mass"], "fewer keys"
    assert short[0]["mass"] == pytest.approx(moved[0]["mass"], rel=0.2), "as many keys"
    assert moved[0]["on_cell"] < short[0]["on_cell"], "positions that were never read at"
    for name in ("short", "short, moved", "long, near text"):
        assert found[name]["exponent"] is None, "too short a text, or not the one that a token sees"
    assert found["long"]["exponent"]["count"] == TEXTS
    for rows in (long, near, short, moved):
        assert all(row["memory_on_cell"] is None and row["entropy"] is None for row in rows), "no PVM"
        assert all(row["by_layer"][-1] > row["by_layer"][0] for row in rows)


def test_attention_without_preference_is_over_what_a_token_sees(found, processor, data):
    sources = [sample.source.text for sample in experiment.samples(processor, data, "test_505", TEXTS)]
    for condition, window in (("long", 10**6), ("long, near text", 48)):
        last = found[condition]["by_position"][-1]
        shares = []
        for text in sources:
            prompt = text.columns[0]
            for place in range(last["from"], min(last["to"], len(text.columns))):
                answer = text.columns[place] - prompt  # tokens of the answer before this one
                shares.append(text.visual_tokens / (prompt + min(answer, window)))
        assert last["uniform"] == pytest.approx(np.mean(shares), rel=1e-6)


def test_numbers_over_seeds(written):
    out, table = written
    result = json.loads((out / "digits.json").read_text())
    (one,), two = result["models"]["base"], result["models"]["twice $x^{$"]
    assert two == [one, one]
    for part, row in enumerate(one["long"]["by_position"]):
        mean = experiment.over_seeds([s["long"] for s in two], "reads", part)
        assert mean.value == mean.low == mean.high == pytest.approx(row["right"] / row["count"])
    assert experiment.over_seeds([one["long"]], "reads", 0).low is None
    seeds = [{"by_position": [{"mass": value}]} for value in (0.2, 0.4)]
    mean = experiment.over_seeds(seeds, "mass", 0)
    assert (mean.value, mean.high) == pytest.approx((0.3, 0.3 + 12.7062 * 0.1 * np.sqrt(2) / np.sqrt(2)), rel=1e-4)
    lines = table.splitlines()
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 2 + 2 * (2 + 2 + 1 + 1)
    assert (out / "digits.png").stat().st_size > 20_000


def cell(mean: intervals.Mean, digits: int = 3) -> str:
    half = "" if mean.high is None else f" ± {mean.high - mean.value:.{digits}f}"
    return f"{mean.value:.{digits}f}{half}"


def late(seeds: list[dict], measure: str, digits: int = 3, first: bool = False) -> str:
    """The mean over seeds in the last bin, and with `first` that in the first one."""
    means = [experiment.over_seeds(seeds, measure, part) for part in ((-1, 0) if first else (-1,))]
    if None in means:
        return "-"
    return " ".join([cell(means[0], digits), *(f"({mean.value:.{digits}f})" for mean in means[1:])])


def column(seeds: list[dict]) -> tuple[str, ...]:
    """Of the table in docs/analysis.md, for one model."""
    long, near, moved = ([seed[c] for seed in seeds] for c in ("long", "long, near text", "short, moved"))
    memory = late(long, "memory_on_cell", first=True)
    shares = [
        sum(part["right"] for part in seed["by_position"]) / sum(part["count"] for part in seed["by_position"])
        for seed in moved
    ]
    return (
        late(long, "mass", first=True),
        cell(intervals.mean([seed["exponent"]["value"] for seed in long]), 2),
        late(long, "reads", first=True),
        late(long, "on_cell", first=True),
        memory,
        "-" if memory == "-" else late(long, "entropy", 2, first=True),  # of slots it is no retrieval
        late(near, "reads"),
        late(near, "mass"),
        cell(intervals.mean(shares)),
        late(long, "settled", 1),
    )


def test_the_table_in_the_docs_is_the_record():
    docs = BASE.parents[1] / "docs"
    models = json.loads((docs / "dilution.json").read_text())["models"]
    table = "tokens 392" + (docs / "analysis.md").read_text().split("| tokens 392")[1].split("\n\n")[0]
    header, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    assert header[1:] == list(models) and len(lines) == 10
    for name, shown in zip(models, list(zip(*lines))[1:]):
        assert shown == column(models[name]), name


def test_models_have_names():
    assert experiment._models(["a=x,y", "b=c=z"]) == {"a": ["x", "y"], "b": ["c=z"]}
    for given, sentence in (
        (["runs/demo"], "--model=runs/demo: expected NAME=DIR, or NAME=DIR,DIR,... for its seeds"),
        (["a="], "--model=a=: expected NAME=DIR"),
        (["a=x", "a=y"], "--model=a=y: there is a model 'a' before it; name its seeds in one, a=DIR,DIR"),
    ):
        with pytest.raises(AnalysisError, match=re.escape(sentence)):
            experiment._models(given)


def test_without_matplotlib_nothing_is_measured(data, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(experiment, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(AnalysisError, match="the plots need matplotlib, which is not installed"):
        experiment.run(data, [f"base={BASE}"], TEXTS, tmp_path / "out")


def test_slots_have_no_entropy_over_an_image():
    pictures = (made.picture("image 1", 0, 2, 2),)
    trace = made.trace(made.text(made.words(9), pictures), 0)
    slots = dataclasses.replace(trace, dilution=dataclasses.replace(trace.dilution, pvm_choices=None))
    assert {"entropy", "ratio"} <= set(experiment._tokens(trace))
    assert "entropy" not in experiment._tokens(slots) and "ratio" in experiment._tokens(slots)


def test_what_cannot_be_used(written, data, tmp_path, capsys):
    def complaint(*arguments: str) -> str:
        assert experiment.main([f"--model=base={BASE}", *arguments]) == 1
        return capsys.readouterr().err.splitlines()[-1]

    assert "expected a folder that is not there yet" in complaint(f"--data={data}", f"--out={written[0]}")
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sentence = complaint(f"--data={tmp_path / 'rows.jsonl'}", f"--out={tmp_path / 'out'}")
    assert "expected metadata with `cells` and `digit_spans`, got []" in sentence
    shutil.copytree(data, tmp_path / "data")
    assert "--limit: expected at least 1, got 0" in complaint(f"--data={data}", "--limit=0", f"--out={tmp_path / 'o'}")
    shutil.copytree(BASE, tmp_path / "small")
    limits = tmp_path / "small/preprocessor_config.json"
    limits.write_text(limits.read_text().replace("1048576", str(96 * 96)))
    sentence = complaint(f"--data={data}", f"--out={tmp_path / 'o'}", f"--model=small={tmp_path / 'small'}")
    assert "row 0: expected one image of 6 x 6 visual tokens, one for each cell, got 3 x 3; does the" in sentence
    assert "nowhere" in complaint(f"--data={data}", f"--out={tmp_path / 'o'}", "--model=x=nowhere")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    place = tmp_path / "file/out"
    assert f"--out={place}: expected a place where a folder can be made" in complaint(
        f"--data={data}", f"--out={place}"
    )


def test_everything_is_read_before_the_first_model_is_measured(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(experiment, "measure", lambda *_: pytest.fail("measured"))
    shutil.copytree(BASE, tmp_path / "later")
    (tmp_path / "later/tokenizer.json").unlink()
    given = [f"--model=a={BASE},{tmp_path / 'later'}", f"--data={data}", f"--out={tmp_path / 'out'}"]
    assert experiment.main(given) == 1
    assert "later: " in capsys.readouterr().err

    def full(*_):
        raise OSError(errno.EIO, "broken", "disk")

    monkeypatch.setattr(experiment, "run", full)
    assert experiment.main(given) == 1 and capsys.readouterr().err == "error: [Errno 5] broken: 'disk'\n"
