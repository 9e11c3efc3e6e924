"""A benchmark put to a model: every question once, the same records whatever the batches, devices and interruptions."""

import dataclasses
import json
import os
import subprocess
import sys
import time

import jax
import pytest
import tiny
from flax import nnx

import configs.eval as eval_config
from pvm_jax.checkpoint import load_model
from pvm_jax.data.images import DataError
from pvm_jax.data.processor import Processor
from pvm_jax.decoding import complete
from pvm_jax.evals import asking, harness, rescore
from pvm_jax.evals.extract import final_text
from pvm_jax.evals.judge import Judge, Judgement
from pvm_jax.evals.ledger import Ledger
from pvm_jax.evals.plugins import Evaluation, find_run
from pvm_jax.evals.questions import Verdict
from pvm_jax.evals.results import ResultError, read_records, write_results
from pvm_jax.sharding import make_mesh

QUESTIONS = 11
BROKEN, LONG = 4, 7
RIGHT = (0, 3, 6)
OPTIONS = {"benchmark": "file:own", "protocol": "plain", "rule": "exact", "max_new_tokens": 6, "rows": 4, "threads": 2,
           "prompt_length": [64], "patches": [32]}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Questions with none to two images of several sizes; one image is damaged, one prompt is too long."""
    folder = tmp_path_factory.mktemp("questions")
    rows = []
    for i in range(QUESTIONS):
        images = [f"{i}-{k}.png" for k in range(i % 3)]
        for k, name in enumerate(images):
            tiny.image(i + k, 32, 32 + 32 * (i % 2)).save(folder / name)
        text = tiny.text(i, 80 if i == LONG else 3 + i)
        rows.append(
            {"index": f"q{i}", "question": text, "answer": "nothing", "images": images, "category": "ab"[i % 2]}
        )
    (folder / f"{BROKEN}-0.png").write_bytes(b"\x89PNG nothing behind it")
    write(folder, rows)
    return folder


def write(folder, rows) -> None:
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def processor(small_checkpoint):
    return Processor.from_pretrained(small_checkpoint, max_pixels=4096)


@pytest.fixture(scope="module")
def model(small_checkpoint):
    return load_model(small_checkpoint, scan=True)


@pytest.fixture(scope="module")
def known(folder, model, processor):
    """Records of one device, and from then on the right answers of some questions are what it says."""
    records = ask(model, processor, folder)
    lines = [json.loads(line) for line in (folder / "own.jsonl").read_text().splitlines()]
    for place in RIGHT:
        lines[place]["answer"] = records[place].completion
    write(folder, lines)
    return ask(model, processor, folder)


def ask(model, processor, folder, mesh=None, **options) -> list:
    given = OPTIONS | {"path": str(folder / "own.jsonl")} | options
    prepared = harness.Prepared.of("own", processor, given)
    return prepared.in_order([record for batch in prepared.answers(model, mesh) for record in batch])


MET: list[str] = []
"""Names of barriers."""


def evaluate(model, processor, folder, workdir, **options):
    evaluation = Evaluation(
        "own", model, processor, workdir, {"checksum": "abc", "dtype": "float32"}, barrier=MET.append
    )
    return harness.run(evaluation, **OPTIONS | {"path": str(folder / "own.jsonl")} | options)


def test_every_question_has_its_record(known, folder):
    assert [record.index for record in known] == [f"q{i}" for i in range(QUESTIONS)]
    assert [record.right for record in known] == [i in RIGHT for i in range(QUESTIONS)]
    for i, record in enumerate(known):
        if i in (BROKEN, LONG):
            assert record.completion is record.answer is None and not record.tokens and record.error
            continue
        assert record.tokens == 6 and record.finish_reason == "length" and record.error is None
        assert record.prompt.count("<image>") == i % 3 and record.question["labels"] == {"category": "ab"[i % 2]}
        assert record.prompt_tokens > record.tokens and record.answer == (" ".join(record.completion.split()) or None)
    assert "4-0.png" in known[BROKEN].error or "q4" in known[BROKEN].error
    assert "the prompt needs prompt_length of" in known[LONG].error and "the largest is 64" in known[LONG].error


@pytest.mark.parametrize("rows, prompt_length", [(3, [64]), (8, [32, 64])])
def test_a_question_is_answered_the_same_in_any_batch(known, model, processor, folder, rows, prompt_length):
    assert ask(model, processor, folder, rows=rows, prompt_length=prompt_length) == known


@pytest.mark.parametrize("devices, weights", [(2, "split"), (8, "gathered")])
def test_shards_do_not_change_a_record(known, small_checkpoint, processor, folder, monkeypatch, devices, weights):
    """Nor does it matter whether each device answers with all of the weights; the tower is read once a question."""
    drawn = []
    monkeypatch.setattr(
        asking, "complete", lambda model, *args, **more: drawn.append(model) or complete(model, *args, **more)
    )
    mesh = make_mesh(fsdp=devices, devices=jax.devices()[:devices])
    model = load_model(small_checkpoint, scan=True, mesh=mesh)
    assert ask(model, processor, folder, mesh, weights=weights) == known
    for one in drawn:
        split = {path[0] for path, x in nnx.to_flat_state(nnx.state(one)) if "fsdp" in x[...].sharding.spec}
        assert split == ({"visual"} if weights == "gathered" else {"visual", "text"})
    assert len({id(one) for one in drawn}) == 1 < len(drawn), "gathered once"


def test_seeds_draw_different_answers_that_batches_do_not_change(model, processor, folder):
    settings = {"temperature": 1.0, "seeds": 3}
    drawn = ask(model, processor, folder, rows=6, **settings)
    assert [(r.index, r.seed) for r in drawn] == [(f"q{i}", seed) for i in range(QUESTIONS) for seed in range(3)]
    whole = [record for record in drawn if record.completion is not None]
    assert len({record.completion for record in whole}) > len(whole) / 2
    assert ask(model, processor, folder, rows=24, **settings) == drawn
    one = ask(model, processor, folder, rows=4, temperature=1.0, seeds=1)
    assert one == [record for record in drawn if record.seed == 0]


def test_summary_and_records_agree(known, model, processor, folder, tmp_path):
    summary, records, text = evaluate(model, processor, folder, tmp_path)
    assert records == [dataclasses.asdict(record) for record in known]
    right = sum(record.right for record in known)
    assert summary["score"] == summary["scores"]["accuracy"]["value"] == right / QUESTIONS == 3 / 11
    assert summary["broken"]["right"] == 2 and summary["truncated"]["right"] == QUESTIONS - 2
    assert f"{100 * right / QUESTIONS:.1f}" in text
    task, data = summary["task"], summary["data"]
    assert task["sampling"]["temperature"] == 0 and task["max_new_tokens"] == 6 and task["rule"] == "exact"
    assert (task["protocol"], task["version"], task["max_pixels"]) == ("plain", 1, 4096)
    assert data["questions"] == QUESTIONS and len(data["checksum"]) == 64


def test_scored_again_without_a_model(known, model, processor, folder, tmp_path):
    summary, records, _ = evaluate(model, processor, folder, tmp_path / "a")
    file = write_results(tmp_path / "a", "own", {"checksum": "abc"}, summary, records)
    result, again, _ = rescore.rescore(file)
    assert again == known and result["checksum"] == "abc"
    assert {k: v for k, v in result["summary"].items() if k != "rescored_from"} == json.loads(json.dumps(summary))
    # A rule that finds the answer among other words; and a verdict that was another one before.
    records[0] |= {"completion": f"The answer is {known[0].completion}", "right": False}
    records[1] |= {"right": True, "judge": "someone"}
    write_results(tmp_path / "a", "own", {}, summary, records)
    result, again, _ = rescore.rescore(file, rule="strict")
    assert again[0].right and again[1].right, "a judge's verdict is kept"
    assert result["summary"]["task"]["rule"] == "strict" and result["summary"]["rescored_from"]["rule"] == "exact"
    before = {tuple(r[k] for k in ("benchmark", "index", "seed")): r["right"] for r in records}
    assert rescore.changed(before, again).startswith("1 answers count as right that did not")
    file.with_suffix(".jsonl").write_text("".join(json.dumps(r) + "\n" for r in records[:-1]))
    with pytest.raises(ResultError, match=r"own\.jsonl: expected records of 11 questions, .* found 10"):
        rescore.rescore(file)


def test_goes_on_where_it_was_interrupted(known, model, processor, folder, tmp_path, monkeypatch):
    """Interrupted behind the first batch, and again in the middle of writing a record."""
    asked = []

    def counted(*args, **kwargs):
        asked.append(0)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return complete(*args, **kwargs)

    monkeypatch.setattr(asking, "complete", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, processor, folder, tmp_path)
    file = tmp_path / "own.jsonl"
    before = read_records(file)
    assert len(before) >= 4
    file.write_bytes(file.read_bytes()[:-40])
    _, records, _ = evaluate(model, processor, folder, tmp_path)
    assert records == [dataclasses.asdict(record) for record in known]
    count = len(asked)
    evaluate(model, processor, folder, tmp_path)
    assert len(asked) == count, "all was there"


def test_an_evaluator_in_training_says_the_same(known, model, processor, folder):
    given = OPTIONS | {"path": str(folder / "own.jsonl")}
    found = harness.make_evaluator(processor, "own", **given)(model)
    assert found["accuracy"] == (3 / 11, 1.0)
    assert found["truncated"] == (QUESTIONS - 2, QUESTIONS) and found["broken"] == (2, QUESTIONS)
    assert found["tokens"] == (6 * (QUESTIONS - 2), QUESTIONS)


def test_an_evaluator_of_several_processes_meets_after_judging(known, model, processor, folder, monkeypatch):
    """Two that say the same: about all questions, about each batch of them, and when the first has judged."""
    said = []
    monkeypatch.setattr(harness.agreement, "exchange", lambda: lambda text: said.append(text) or [text, text])
    found = harness.make_evaluator(processor, "own", **OPTIONS | {"path": str(folder / "own.jsonl")})(model)
    assert found["accuracy"] == (3 / 11, 1.0) and found["broken"] == (2, QUESTIONS)
    assert [len(json.loads(text)) for text in said[:-1]] == [3, 4, 4, 3] and said[-1] == "judged"


@pytest.mark.parametrize("when", ["unparsed", "wrong", "all"])
def test_a_judge_is_asked_and_never_scores_what_it_fails_on(known, processor, folder, monkeypatch, when):
    """The judge fails on q2 and says yes to all others."""
    questions = []

    def judge(self, question, completion):
        questions.append(question.index)
        if question.index == "q2":
            return Judgement(Verdict(None, False), "a model", "it does not answer")
        return Judgement(Verdict(completion, True), "a model")

    monkeypatch.setattr(Judge, "__call__", judge)
    given = {"path": str(folder / "own.jsonl"), "judge": {"base_url": "http://localhost:1", "model": "x"}}
    prepared = harness.Prepared.of("own", processor, OPTIONS | given | {"judge_when": when})
    # q2 and q5 as if no rule had found an answer, q8 as if thinking had been cut off.
    changes = {"q2": {"answer": None}, "q5": {"answer": None}, "q8": {"completion": "<think>", "answer": None}}
    given = [dataclasses.replace(record, **changes.get(record.index, {})) for record in known]
    judged = prepared.judged(given)
    said = {record.index for record in given if final_text(record.completion or "")}
    right = {record.index for record in given if record.right}
    wanted = {"unparsed": {"q2", "q5"}, "wrong": said - right, "all": said}[when]
    assert set(questions) >= {"q2", "q5"} and sorted(questions) == sorted(wanted)
    for before, after in zip(given, judged, strict=True):
        if before.index == "q2":
            assert after == dataclasses.replace(before, error="it does not answer"), "the rule's verdict stays"
        elif before.index in questions:
            assert after.right and after.judge == "a model" and after.error is None
        else:
            assert after == before
    assert prepared.summary(judged)["unjudged"]["right"] == 1


def test_what_could_not_be_judged_is_judged_again(known, model, processor, folder, tmp_path, monkeypatch):
    """Every answer is there, and the judge was away."""
    judging = {"judge": {"base_url": "http://localhost:1", "model": "x"}, "judge_when": "all"}
    prepared = harness.Prepared.of("own", processor, OPTIONS | {"path": str(folder / "own.jsonl")} | judging)
    identity = prepared.about() | {"checksum": "abc", "dtype": "float32"}
    ledger = Ledger(tmp_path, "own", identity, prepared.task.seeds, writes=True)
    away = {record.index for record in known if final_text(record.completion or "")}
    ledger.add([dataclasses.replace(r, error="away") if r.index in away else r for r in known])
    asked = []
    MET.clear()

    def judge(self, question, completion):
        assert MET == ["records of own opened", "records of own read"]
        asked.append(question.index)
        failed = question.index == "q5"
        return Judgement(Verdict(completion, not failed), "a model", "still away" if failed else None)

    monkeypatch.setattr(Judge, "__call__", judge)
    monkeypatch.setattr(asking, "complete", lambda *_, **__: pytest.fail("generated again"))
    _, records, _ = evaluate(model, processor, folder, tmp_path, **judging)
    assert sorted(asked) == sorted(away) and {"q3", "q5"} < away
    assert MET[2:] == ["records of own judged"], "the others wait for the judge"
    errors = {r["index"]: r["error"] for r in records if r["completion"] is not None and r["error"] is not None}
    assert errors == {"q5": "still away"}
    assert all(r["right"] and r["judge"] == "a model" for r in records if r["index"] in away - {"q5"})
    assert {r.index: r.error for r in read_records(tmp_path / "own.jsonl")}["q3"] is None


def test_what_could_not_be_asked_is_asked_again(known, model, processor, folder, tmp_path):
    """Both broken questions are asked in every run; a run in which nothing could be asked is an error."""
    _, records, _ = evaluate(model, processor, folder, tmp_path)
    assert records == [dataclasses.asdict(record) for record in known]
    ledger = Ledger(tmp_path, "own", json.loads((tmp_path / "own.run").read_text()), (0,), writes=False)
    asked = {record.index for record in known} - {record.index for record in ledger.records}
    assert asked == {f"q{BROKEN}", f"q{LONG}"}
    with pytest.raises(ResultError, match=r"own: not one question could be asked; the first: .*"):
        evaluate(model, processor, folder, tmp_path / "short", prompt_length=[8])


@pytest.mark.parametrize("name", eval_config.BENCHMARKS)
def test_configurations_have_the_options_that_there_are(name, tmp_path):
    (tmp_path / "file.tsv").touch()
    entry = eval_config.get_config(name).to_dict()["evals"][name]
    assert find_run(entry.pop("module"), name) is harness.run
    harness.check(name, **entry | {"path": str(tmp_path / "file.tsv")})
    with pytest.raises(ResultError, match=rf"config\.evals\.{name}\.path: expected a value"):
        harness.check(name, **entry)
    with pytest.raises(DataError, match="no file matches"):
        harness.check(name, **entry | {"path": str(tmp_path / "none.tsv")})


def test_what_cannot_be_used_is_one_sentence(processor, folder):
    given = OPTIONS | {"path": str(folder / "own.jsonl")}
    for change, message in (
        ({"max_tokens": 3}, r"config\.evals\.own: unknown keys \['max_tokens'\]; expected some of \['benchmark', "),
        ({"path": None}, r"config\.evals\.own\.path: expected a value; pass --config\.evals\.own\.path="),
        ({"rows": 0}, r"config\.evals\.own\.rows: expected at least 1, got 0"),
        ({"min_pixels": 5000}, r"expected 0 < min_pixels <= max_pixels, got 5000 and 4096"),
        ({"max_pixels": -1}, r"expected 0 < min_pixels <= max_pixels"),
        ({"judge": {"url": "x"}}, r"config\.evals\.own\.judge: unknown keys \['url'\]"),
        ({"judge_when": "never"}, r"judge_when: expected one of \['unparsed', 'wrong', 'all'\], got 'never'"),
        ({"weights": "whole"}, r"config\.evals\.own\.weights: expected one of \['gathered', 'split'\], got 'whole'"),
        ({"rule": "exactly"}, r"config\.evals\.own\.rule: expected one of .*'exact'.*, got 'exactly'"),
    ):
        with pytest.raises(ResultError, match=message):
            harness.Prepared.of("own", processor, given | change)


def test_killed_and_started_again_it_writes_the_same_file(known, small_checkpoint, folder, tmp_path):
    """Real processes: kill -9 as soon as a batch of records is there."""
    config = tmp_path / "own.py"
    config.write_text(
        "from configs import digits_eval\n\n\ndef get_config():\n"
        "    config = digits_eval.get_config().unlock()\n"
        f"    options = {OPTIONS | {'path': str(folder / 'own.jsonl'), 'rows': 2}!r}\n"
        "    config.evals = {'own': {'module': 'pvm_jax.evals.harness'} | options}\n"
        "    config.processor.max_pixels = 4096\n"
        "    return config.lock()\n"
    )
    workdir = tmp_path / "w"
    argv = [sys.executable, "eval.py", f"--config={config}", f"--config.checkpoint={small_checkpoint}"]
    records = workdir / "own.jsonl"
    env = tiny.without_torch(8)
    with subprocess.Popen([*argv, f"--workdir={workdir}"], cwd=ROOT, env=env, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while not (records.is_file() and records.read_bytes().count(b"\n") >= 5):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
    assert not (workdir / "own.json").exists()
    argv.append(f"--workdir={workdir}")
    run = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "answers are there already" in run.stdout
    assert [path.name for path in workdir.glob("*.json")] == ["own.json"], "what a report is given"
    assert [dataclasses.asdict(r) for r in read_records(records)] == [dataclasses.asdict(r) for r in known]
    result = json.loads((workdir / "own.json").read_text())
    assert result["summary"]["score"] == 3 / 11 and result["versions"]["jax"]


ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
