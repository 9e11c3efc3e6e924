"""Rows of the published data sets become prompts with a solution; what cannot is left out and counted by reason."""

import io
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from pvm_jax.data.images import DataError
from pvm_jax.data.processor import Processor
from pvm_jax.data.prompts import LAYOUTS, open_prompts, reward_columns


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    tiny.image(seed, 40, 52).save(buffer, "PNG")
    return buffer.getvalue()


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def picture(content) -> dict:
    return {"type": "image", "image": content}


def user(*parts) -> list:
    return [{"role": "user", "content": list(parts)}]


def parquet(path: Path, *rows) -> Path:
    columns = dict.fromkeys(name for row in rows for name in row)
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in columns}), path)
    return path


def jsonl(path: Path, *rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ASKED = "What is x?"
STRUCT = {"bytes": png(0), "path": "a.png"}
WITHOUT_PLACE = user(picture(png(0)), text(ASKED))
WITH_PLACE = user(picture(png(0)), text("\n" + ASKED))

# layout: rows as published, and (id, messages, solution, other columns) of each
PUBLISHED = {
    "mmk12": [
        (
            {"id": "m-1", "question": ASKED, "answer": "12", "subject": "math", "image": STRUCT},
            ("m-1", WITHOUT_PLACE, "12", {"subject": "math"}),
        ),
    ],
    "thinklite": [
        (
            {"id": "t-1", "problem": f"<image>\n{ASKED}", "answer": "B", "image": png(0)},
            ("t-1", WITH_PLACE, "B", {}),
        ),
        (
            {"id": "t-2", "problem": f"<image>\n{ASKED}", "ground_truth": "3", "choices": ["2", "3"], "image": png(0)},
            ("t-2", WITH_PLACE, "3", {"choices": ["2", "3"]}),
        ),
    ],
    "virl39k": [
        (
            {
                "qid": "v-1",
                "question": f"<image>\n{ASKED}",
                "answer": r"\boxed{\frac{1}{2}}",
                "image": ["images/v-1-0.png"],
                "category": "geometry",
                "PassRate_7BBase": 0.25,
            },
            ("v-1", WITH_PLACE, r"\frac{1}{2}", {"category": "geometry", "PassRate_7BBase": 0.25}),
        ),
        (
            {"qid": "v-2", "question": ASKED, "answer": r"\boxed{2}", "image": [""], "category": "text"},
            ("v-2", [{"role": "user", "content": ASKED}], "2", {"category": "text"}),
        ),
        (
            {
                "qid": "v-3",
                "question": "<image> or <image>?",
                "answer": r"\boxed{A}",
                "image": ["images/v-1-0.png", "images/v-3-1.png"],
            },
            ("v-3", user(picture(png(0)), text(" or "), picture(png(1)), text("?")), "A", {}),
        ),
    ],
    "wemath": [
        (
            {"question_id": 7, "question": ASKED, "image": STRUCT, "answer": "C", "knowledge points": ["angles"]},
            ("7", WITHOUT_PLACE, "C", {"knowledge points": ["angles"]}),
        ),
    ],
    "verl": [
        (
            {
                "prompt": [
                    {"role": "system", "content": "Box it."},
                    {"role": "user", "content": f"<image>\n{ASKED}"},
                ],
                "images": [STRUCT],
                "data_source": "geo",
                "reward_model": {"ground_truth": "12", "style": "rule"},
                "extra_info": {"index": 5},
            },
            (
                "5",
                [{"role": "system", "content": "Box it."}, *WITH_PLACE],
                "12",
                {
                    "data_source": "geo",
                    "reward_model": {"ground_truth": "12", "style": "rule"},
                    "extra_info": {"index": 5},
                },
            ),
        ),
    ],
    "trl": [
        (
            {"prompt": [{"role": "user", "content": ASKED}], "image": STRUCT, "solution": "<answer> 12 </answer>"},
            ("rows.parquet:0", WITHOUT_PLACE, "12", {}),
        ),
        (
            {"prompt": [{"role": "user", "content": ASKED}], "solution": r"So $x=\boxed{12}$.", "source": "mine"},
            ("rows.parquet:1", [{"role": "user", "content": ASKED}], "12", {"source": "mine"}),
        ),
    ],
}


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Images as ViRL39K has them: a zip file beside the rows."""
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("images/v-1-0.png", png(0))
        archive.writestr("images/v-3-1.png", png(1))
    return tmp_path / "images.zip"


def read_images(messages: list) -> list:
    """The messages with the bytes of images that lie in an archive."""
    return [
        m
        | {
            "content": m["content"]
            if isinstance(m["content"], str)
            else [p | {"image": p["image"].read()} if hasattr(p.get("image"), "read") else p for p in m["content"]]
        }
        for m in messages
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_rows(tmp_path, pictures, layout):
    rows, expected = zip(*PUBLISHED[layout])
    prompts = open_prompts(parquet(tmp_path / "rows.parquet", *rows), layout=layout, image_folder=pictures)
    assert prompts.skipped == {} and len(prompts) == len(rows)
    for i, (name, messages, solution, columns) in enumerate(expected):
        found = prompts[i]
        assert (found.id, read_images(found.messages), found.solution) == (name, messages, solution)
        assert {key: value for key, value in found.columns.items() if value is not None} == columns


@pytest.mark.parametrize(
    "answer, solution",
    [
        (12, "12"),
        (12.0, "12"),
        (0.5, "0.5"),
        (["12"], "12"),
        ([12], "12"),
        (" 12 ", "12"),
        (r"$\boxed{12}$", "12"),
        ("", "no answer"),
        ("  ", "no answer"),
        (None, "no answer"),
        (float("nan"), "no answer"),
        ([], "no answer"),
        (r"\boxed{}", "no answer"),
        ("<answer></answer>", "no answer"),
        (["1", "2"], "several answers"),
        (True, "answer neither text nor number"),
        ({"value": 1}, "answer neither text nor number"),
    ],
)
def test_answers_that_are_no_text(tmp_path, answer, solution):
    rows = {"prompt": ASKED, "solution": "0"}, {"prompt": ASKED, "solution": answer}
    prompts = open_prompts(jsonl(tmp_path / "rows.jsonl", *rows), layout="trl")
    if len(prompts) == 2:
        assert prompts[1].solution == solution
    else:
        assert prompts.skipped == {solution: 1}
        assert "rows.jsonl row 1 (line 2)" in prompts.examples[solution]


def test_bad_rows_are_counted_by_reason(tmp_path):
    good = {"question": ASKED, "answer": "1", "image": "a.png"}
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / "empty.png").write_bytes(b"")
    rows = [
        good,
        good | {"answer": ""},
        good | {"question": " "},
        good | {"image": "b.png"},
        good | {"image": ""},
        good | {"image": None},
        good | {"question": "<image> and <image>?"},
        good | {"question": ["no", "messages"]},
        good | {"question": [{"role": "assistant", "content": "a"}]},
        good | {"answer": "2"},
        {"problem": ASKED},
    ]
    path = jsonl(tmp_path / "rows.jsonl", *rows)
    path.write_text(path.read_text() + "not JSON\n")
    prompts = open_prompts(path, layout="wemath", threads=2)
    assert [prompts[i].solution for i in range(len(prompts))] == ["1", "2"]
    assert prompts.describe(1).endswith("rows.jsonl row 9 (line 10)")
    assert prompts.skipped == {
        "no answer": 2,
        "no question": 1,
        "missing image": 3,
        "images and places differ": 1,
        "bad row": 3,
    }
    assert "row 1 (line 2): expected answer with something in it (layout 'wemath')" in prompts.examples["no answer"]
    assert re.search(r"row 3 \(line 4\), images\[0\]: no image file at .*b\.png", prompts.examples["missing image"])
    with pytest.raises(DataError, match=r"row 1 \(line 2\): expected answer"):
        open_prompts(path, layout="wemath", bad_rows="error")
    with pytest.raises(
        DataError, match=r"no row of the data set can be used \(11 no question, 1 bad row\); the first: .*rows.jsonl"
    ):
        open_prompts(path, layout="verl")


def test_the_order_of_rows_does_not_depend_on_threads(tmp_path):
    rows = [{"prompt": ASKED, "solution": str(i) if i % 3 else ""} for i in range(300)]
    path = jsonl(tmp_path / "rows.jsonl", *rows)
    one, many = (open_prompts(path, layout="trl", threads=threads) for threads in (1, 7))
    assert [one[i].solution for i in range(len(one))] == [str(i) for i in range(300) if i % 3]
    assert [one[i] for i in range(len(one))] == [many[i] for i in range(len(many))]
    assert one.skipped == many.skipped == {"no answer": 100}


def test_instruction_and_system_turn(tmp_path):
    (tmp_path / "a.png").write_bytes(png(0))
    own = [{"role": "system", "content": "Box it."}, {"role": "user", "content": ASKED}]
    path = jsonl(
        tmp_path / "rows.jsonl",
        {"prompt": own, "solution": "1"},
        {"prompt": ASKED, "solution": "1", "image": "a.png"},
    )
    instruction = "Put it in <answer></answer>, not in <image>."
    told = open_prompts(path, layout="trl", instruction=instruction)
    assert told[0].messages == [own[0], {"role": "user", "content": f"{ASKED}\n{instruction}"}]
    assert told[1].messages == user(picture(str(tmp_path / "a.png")), text(ASKED), text("\n" + instruction))
    led = open_prompts(path, layout="trl", system="Think.")
    assert [[m["role"] for m in led[i].messages] for i in range(2)] == [["system", "user"]] * 2
    assert led[0].messages[0] == led[1].messages[0] == {"role": "system", "content": "Think."}


def test_text_of_rows_never_becomes_a_special_token(tmp_path, processor_dir):
    processor = Processor.from_pretrained(processor_dir)
    (tmp_path / "a.png").write_bytes(png(0))
    attack = "".join(tiny.SPECIAL_TOKENS)
    rows = [{"prompt": f"<image>{asked}", "solution": "1", "image": "a.png"} for asked in ("x", attack)]
    prompts = open_prompts(jsonl(tmp_path / "rows.jsonl", *rows), layout="trl", instruction=attack, system=attack)
    plain, attacked = (
        processor.encode({"messages": prompts[i].messages}, add_generation_prompt=True).tokens for i in range(2)
    )
    special = list(tiny.TOKEN_ID.values())
    np.testing.assert_array_equal(attacked[np.isin(attacked, special)], plain[np.isin(plain, special)])
    assert processor.decode(attacked, skip_special_tokens=False).count(attack) == 3


def test_columns_for_reward_functions(tmp_path):
    rows = {"id": "a", "prompt": ASKED, "solution": "1", "level": 3}, {"id": "b", "prompt": ASKED, "solution": "2"}
    prompts = open_prompts(jsonl(tmp_path / "rows.jsonl", *rows), layout="trl")
    assert reward_columns([prompts[0], prompts[0], prompts[1]]) == {
        "solution": ["1", "1", "2"],
        "id": ["a", "a", "b"],
        "level": [3, 3, None],
    }


def test_options(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", {"prompt": ASKED, "solution": "1"})
    with pytest.raises(DataError, match=r"layout: expected one of mmk12, thinklite, .*; got 'mmk'"):
        open_prompts(path, layout="mmk")
    with pytest.raises(DataError, match="bad_rows must be one of skip, error; got 'ignore'"):
        open_prompts(path, layout="trl", bad_rows="ignore")
    renamed = open_prompts(path, layout="virl39k", rename={"prompt": "question", "solution": "answer"})
    assert renamed[0].solution == "1"
    named = jsonl(tmp_path / "named.jsonl", {"prompt": ASKED, "reward_model": {"ground_truth": "1"}, "id": "mine"})
    assert open_prompts(named, layout="verl")[0].id == "mine"  # where the layout's own column is missing
