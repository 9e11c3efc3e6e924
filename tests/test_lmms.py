"""The model class for lmms-eval: its logic always, and lmms-eval itself where there is an environment with it."""

import io
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from PIL import Image, ImageFile

import pvm_jax
from pvm_jax.data.digits_task import Spec, make_example
from pvm_jax.evals import lmms
from pvm_jax.evals.extract import final_text
from pvm_jax.evals.lmms import PVMJax, cut, read_settings
from pvm_jax.evals.results import ResultError

ROOT = Path(__file__).parents[1]
BASE = ROOT / "assets" / "digits_base"
LMMS_PYTHON = os.environ.get("PVM_JAX_LMMS_PYTHON")


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).convert("RGB").save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Mosaics to read, with short answers."""
    made = [make_example(np.random.default_rng(i), Spec("train", 23)) for i in range(20)]
    return [{"question": e.question, "answer": e.answer, "picture": png(e.image)} for e in made]


@pytest.fixture(scope="module")
def model():
    # Of eight devices; five rows do not divide by them.
    return PVMJax(checkpoint=str(BASE), min_pixels=0, max_pixels=0, system_prompt="", batch_size=5, data=-1.0)


@pytest.fixture(scope="module")
def expected(rows) -> list[str]:
    """What the model answers outside lmms-eval."""
    model, processor = pvm_jax.load(BASE)
    out = pvm_jax.generate(model, processor, [{"messages": message(row)} for row in rows], max_new_tokens=32)
    return [answer.text for answer in out]


def message(row: dict) -> list[dict]:
    content = [{"type": "image", "image": row["picture"]}, {"type": "text", "text": row["question"]}]
    return [{"role": "user", "content": content}]


def request(rows: list, index: int, **given) -> SimpleNamespace:
    """As lmms-eval's chat tasks make it; `args` are all that the model reads."""

    def messages(row: dict) -> list[dict]:
        content = [{"type": "image", "url": row["picture"]}, {"type": "text", "text": row["question"]}]
        return [{"role": "user", "content": content}]

    return SimpleNamespace(args=("context", messages, {"until": ["\n\n"]} | given, index, "digits", "test"))


# ---- Settings and texts -----------------------------------------------------------------------------------------


def test_stop_strings_are_those_of_the_task():
    assert read_settings({"until": ["\n\n"]}, {}, 128).until == ()
    assert read_settings({"until": ["\n\n", "ASSISTANT:", ""]}, {}, 128).until == ("ASSISTANT:",)
    assert read_settings({"until": "END"}, {}, 128).until == ("END",)
    assert read_settings({"until": None}, {}, 128).until == ()
    assert cut("a b END c\n\nSTOP", ("STOP", "END")) == "a b "
    assert cut("a\n\nb", ()) == "a\n\nb"


def test_settings_of_tasks_and_checkpoints():
    recommended = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "eos_token_id": [1]}
    greedy = read_settings({"temperature": 0, "do_sample": True, "num_beams": 1}, recommended, 128)
    assert greedy.sampling.temperature == 0 and greedy.max_new_tokens == 128
    drawn = read_settings({"temperature": 0.6, "top_k": None, "top_p": 0.5, "max_new_tokens": 9}, recommended, 128)
    assert (drawn.sampling.temperature, drawn.sampling.top_k, drawn.sampling.top_p) == (0.6, 20, 0.5)
    assert drawn.max_new_tokens == 9
    assert read_settings({"top_k": -1.0}, {}, 128).sampling.top_k == 0
    with pytest.raises(ResultError, match="num_beams: expected 1, got 4"):
        read_settings({"num_beams": 4}, {}, 128)
    with pytest.raises(ResultError, match=r"until: expected strings, got \[3\]"):
        read_settings({"until": [3]}, {}, 128)


def test_text_that_goes_to_the_task():
    assert final_text("<think>A or B</think>\n<answer> B </answer>") == "B"
    assert final_text("<think>A or B</think>\n B") == "B"
    assert final_text(" B") == "B"


def test_messages():
    parts = [{"type": "image", "url": "a.png"}, {"type": "video", "url": "b.mp4"}, {"type": "text", "text": "Why?"}]
    made = lmms.conversation([{"role": "user", "content": parts}], "Be brief.")
    assert made[0] == {"role": "system", "content": "Be brief."}
    assert made[1]["content"] == [
        {"type": "image", "image": "a.png"},
        {"type": "video", "video": "b.mp4"},
        {"type": "text", "text": "Why?"},
    ]
    with pytest.raises(ValueError, match="expected text, images and videos, got 'audio'"):
        lmms.conversation([{"role": "user", "content": [{"type": "audio", "url": "c.wav"}]}], "")


@pytest.mark.parametrize(
    "given, message",
    [
        ({}, "expected checkpoint=DIR"),
        ({"checkpoint": "x", "pretrained": "y", "foo": 1}, "expected no foo, pretrained"),
        ({"checkpoint": "x", "batch_size": "auto"}, "batch_size: expected a whole number of at least 1, got 'auto'"),
        ({"checkpoint": "x", "text": "some"}, "text: expected all or answer, got 'some'"),
    ],
)
def test_mistakes_in_model_args(given, message):
    with pytest.raises(ResultError, match=message):
        PVMJax(**given)


# ---- Answers ----------------------------------------------------------------------------------------------------


def test_answers_are_those_of_generate_in_any_batch(model, rows, expected):
    broken = [*rows[:6], rows[6] | {"picture": rows[6]["picture"][:-200]}]  # cut off
    model.task_dict = {"digits": {"test": broken}}
    order = [3, 6, 0, 5, 1, 4, 2]
    ImageFile.LOAD_TRUNCATED_IMAGES = True  # as lmms-eval leaves it
    try:
        answers = model.generate_until([request(broken, i, max_new_tokens=32) for i in order])
        assert ImageFile.LOAD_TRUNCATED_IMAGES
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False
    assert [text for text, _ in answers] == [expected[i] if i != 6 else "" for i in order]
    assert answers[0][1]["output_tokens"] > 5 and answers[0][1]["input_tokens"] > 36 and answers[1][1] == {}
    with pytest.raises(ResultError, match=r"none of 1 samples could be asked; the first: digits/test/6: .*truncated"):
        model.generate_until([request(broken, 6)])


def test_stop_strings_cut_and_settings_do_not_mix(model, rows, expected):
    model.task_dict = {"digits": {"test": rows}}
    stop = expected[0][4:7]
    requests = [request(rows, 0, max_new_tokens=32, until=[stop]), request(rows, 0, max_new_tokens=32)]
    (first, _), (second, _) = model.generate_until(requests)
    assert first == expected[0].partition(stop)[0] and second == expected[0]


def test_repeats_draw_anew_and_runs_draw_the_same(model, rows):
    model.task_dict = {"digits": {"test": rows}}
    requests = [request(rows, i, max_new_tokens=8, temperature=3.0) for i in (0, 0, 1)]
    first = model.generate_until(requests)
    assert first[0] != first[1]
    assert model.generate_until(requests[1:])[::-1] == [first[2], first[0]]  # now the first time that 0 is asked


def test_other_kinds_of_tasks_and_other_prompts(model, rows):
    with pytest.raises(ResultError, match="only generates"):
        model.loglikelihood([])
    with pytest.raises(ResultError, match="several rounds"):
        model.generate_until_multi_round([])

    class Task:
        model_name = "pvm_jax"

        def doc_to_messages(self, doc):
            return []

    asked = SimpleNamespace(args=("", Task().doc_to_messages, {}, 0, "digits", "test"))
    with pytest.raises(ResultError, match="expected a task with the prompts of qwen3_vl, got those of pvm_jax"):
        model.generate_until([asked])


# ---- lmms-eval itself -------------------------------------------------------------------------------------------

TASK = """
task: digits_local
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 32, temperature: 0}}
lmms_eval_specific_kwargs:
  default: {{post_prompt: ", by default"}}
  qwen3_vl: {{post_prompt: ""}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
UTILS = """
import io
from PIL import Image

def doc_to_visual(doc):
    return [Image.open(io.BytesIO(doc["picture"]))]

def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"] + lmms_eval_specific_kwargs["post_prompt"]
"""


@pytest.mark.skipif(not LMMS_PYTHON, reason="no lmms-eval: set PVM_JAX_LMMS_PYTHON as docs/lmms_eval.md says")
def test_lmms_eval_runs_a_task(rows, expected, tmp_path):
    """The documented command on a task of 20 rows, one of them with a damaged image."""
    rows = [row | {"picture": b"no image"} if i == 7 else row for i, row in enumerate(rows)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "digits_local.yaml").write_text(TASK.format(rows=tmp_path / "rows.parquet"))
    (tmp_path / "utils.py").write_text(UTILS)
    command = [LMMS_PYTHON, "-m", "lmms_eval", "--model", "pvm_jax", "--tasks", "digits_local", "--batch_size", "8"]
    command += ["--model_args", f"checkpoint={BASE},min_pixels=0,max_pixels=0,system_prompt="]
    command += ["--include_path", tmp_path, "--log_samples", "--output_path", tmp_path / "out"]
    environment = os.environ | tiny.devices(1) | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "out").rglob("*samples_digits_local.jsonl")
    samples = sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    answers = [sample["filtered_resps"] for sample in samples]
    assert answers == ["" if i == 7 else text.strip() for i, text in enumerate(expected)]
    assert "1 of 20 samples could not be asked; the first: digits_local/test/7" in done.stderr
    (file,) = (tmp_path / "out").rglob("*results.json")
    right = sum(answer == row["answer"] for answer, row in zip(answers, rows))
    assert json.loads(file.read_text())["results"]["digits_local"]["exact_match,none"] == right / 20
    assert right > 10
