"""Rows as people write them become records; bad rows become one sentence with file, row and field."""

import base64
import io
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tfds_scenes
import tiny
from PIL import Image

from pvm_jax.data.images import DataError
from pvm_jax.data.sources import open_source


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    tiny.image(seed, 40, 52).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """A folder with pictures/0.png .. 3.png and an empty file."""
    (tmp_path / "pictures").mkdir()
    for i in range(4):
        (tmp_path / "pictures" / f"{i}.png").write_bytes(png(i))
    return tmp_path


def jsonl(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def picture(folder, number: int) -> dict:
    return {"type": "image", "image": str(folder / "pictures" / f"{number}.png")}


def turn(content, role="user", **more) -> dict:
    return {"role": role, "content": content} | more


ANSWER = turn("Two cats.", "assistant")


def all_parts(messages: list) -> list:
    return [m | {"content": [text(m["content"])] if isinstance(m["content"], str) else m["content"]} for m in messages]


def good_rows(folder):
    """(row, messages of its record) for every form of docs/data.md."""
    image = "pictures/0.png"
    data_uri = "data:image/png;base64," + base64.b64encode(png(1)).decode()
    first, second = picture(folder, 0), picture(folder, 1)
    asked = turn([first, text("\nWhat is shown?")])
    return {
        "messages": (
            {"messages": [turn("<image>\nWhat is shown?"), ANSWER], "images": [image]},
            [asked, ANSWER],
        ),
        "several images, system, turns": (
            {
                "messages": [
                    turn("Be brief.", "system"),
                    turn("A <image> and B <image>"),
                    ANSWER,
                    turn("and <image>?"),
                    ANSWER,
                ],
                "images": [image, "pictures/1.png", image],
            },
            [
                turn("Be brief.", "system"),
                turn([text("A "), first, text(" and B "), second]),
                ANSWER,
                turn([text("and "), first, text("?")]),
                ANSWER,
            ],
        ),
        "parts that take the row's images": (
            {"messages": [turn([{"type": "image"}, text("<image> as text")]), ANSWER], "images": [image]},
            [turn([first, text("<image> as text")]), ANSWER],
        ),
        "OpenAI's parts": (
            {
                "messages": [
                    turn([{"type": "image_url", "image_url": {"url": image}, "text": None}, text("What?")]),
                    turn([text("Two cats.")], "assistant"),
                ]
            },
            [turn([first, text("What?")]), turn([text("Two cats.")], "assistant")],
        ),
        "base64 in a part": (
            {"messages": [turn([{"type": "image_url", "image_url": {"url": data_uri}}]), ANSWER]},
            [turn([{"type": "image", "image": png(1)}]), ANSWER],
        ),
        "base64 without a prefix": (
            {"messages": [turn("<image>"), ANSWER], "images": [base64.b64encode(png(1)).decode()]},
            [turn([{"type": "image", "image": png(1)}]), ANSWER],
        ),
        "base64 in a struct": (
            {
                "messages": [turn("<image>"), ANSWER],
                "images": [{"bytes": base64.b64encode(png(1)).decode(), "path": None}],
            },
            [turn([{"type": "image", "image": png(1)}]), ANSWER],
        ),
        "prompt and completion": (
            {"prompt": "<image>\nWhat is shown?", "completion": "Two cats.", "image": image},
            [asked, ANSWER],
        ),
        "TRL's images without a place come first": (
            {"prompt": [turn("What?")], "completion": [ANSWER], "images": [image, "pictures/1.png"]},
            [turn([first, second, text("What?")]), ANSWER],
        ),
        "loss on the completion only": (
            {"prompt": [turn("What?"), turn("A dog.", "assistant"), turn("Sure?")], "completion": [ANSWER]},
            [turn("What?"), turn("A dog.", "assistant", loss=False), turn("Sure?"), ANSWER],
        ),
        "question and answer, a list in `image`": (
            {"question": "<image> or <image>?", "answer": "Two cats.", "image": [image, "pictures/1.png"]},
            [turn([first, text(" or "), second, text("?")]), ANSWER],
        ),
        "no image": (
            {"question": "How many cats?", "answer": "Two cats.", "image": ""},
            [turn("How many cats?"), ANSWER],
        ),
        "a video from frames": (
            {
                "messages": [turn("<video>What happens?"), ANSWER],
                "videos": [{"frames": [image, "pictures/1.png"], "fps": 4}],
            },
            [
                turn(
                    [
                        {"type": "video", "video": [first["image"], second["image"]], "fps": 4},
                        text("What happens?"),
                    ]
                ),
                ANSWER,
            ],
        ),
        "characters without loss": (
            {"question": "q", "answer": "Au is seven", "metadata": {"no_loss": [[0, 2], [6, 11]]}},
            [
                turn("q"),
                turn([text("Au") | {"loss": False}, text(" is "), text("seven") | {"loss": False}], "assistant"),
            ],
        ),
        "<image> in an answer is text": (
            {"messages": [turn("How is a picture written in HTML?"), turn("<img>, not <image>", "assistant")]},
            [turn("How is a picture written in HTML?"), turn("<img>, not <image>", "assistant")],
        ),
    }


NAMES = sorted(good_rows(Path()))


@pytest.mark.parametrize("name", NAMES)
def test_every_form_of_row(folder, name):
    row, messages = good_rows(folder)[name]
    assert open_source(jsonl(folder / "rows.jsonl", row))[0]["messages"] == messages


@pytest.mark.parametrize("name", NAMES)
def test_parquet_gives_the_records_of_jsonl(folder, name):
    row, messages = good_rows(folder)[name]
    if any(isinstance(m["content"], list) for m in row.get("messages", [])):  # a column has one type: all are lists
        row, messages = {**row, "messages": all_parts(row["messages"])}, all_parts(messages)
    pq.write_table(pa.Table.from_pylist([row]), folder / "rows.parquet")
    assert open_source(folder / "rows.parquet")[0]["messages"] == messages


def test_the_examples_of_the_documentation(tmp_path):
    (tmp_path / "17").mkdir()
    for name in "ab":
        tiny.image(1, 40, 52).save(tmp_path / "17" / f"{name}.jpg")
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    rows, decoder = [], json.JSONDecoder()
    for block in re.findall("```json\n(.*?)```", page, re.DOTALL):
        while block := block.strip():
            row, end = decoder.raw_decode(block)
            rows, block = [*rows, row], block[end:]
    source = open_source(jsonl(tmp_path / "train.jsonl", *rows))
    assert len(source) == 5
    for i in range(len(source)):
        user_content = next(m["content"] for m in source[i]["messages"] if m["role"] == "user")
        assert user_content[0] == {"type": "image", "image": str(tmp_path / "17" / "a.jpg")}


def test_parquet_with_bytes_and_many_row_groups(folder):
    """Hugging Face's image struct and raw bytes; every row group is visited in a mixed order, from threads."""
    rows = [
        {"id": i, "prompt": f"<image>{i}", "completion": f"{i}!", "images": [{"bytes": png(i % 3), "path": f"{i}.png"}]}
        for i in range(30)
    ]
    pq.write_table(pa.Table.from_pylist(rows[:25]), folder / "a.parquet", row_group_size=3)
    pq.write_table(
        pa.Table.from_pylist([{**r, "images": [r["images"][0]["bytes"]]} for r in rows[25:]]), folder / "b.parquet"
    )
    source = open_source([str(folder / "*.parquet")])
    order = np.random.default_rng(0).permutation(30).tolist() * 3
    with ThreadPoolExecutor(4) as pool:
        records = list(pool.map(source.__getitem__, order))
    for i, record in zip(order, records):
        expected = [{"type": "image", "image": png(i % 3)}, text(str(i))]
        assert record == {"id": str(i), "messages": [turn(expected), turn(f"{i}!", "assistant")]}


def test_files_follow_each_other(folder):
    jsonl(folder / "b.jsonl", {"question": "q", "answer": "2"}, {"question": "q", "answer": "3"})
    jsonl(folder / "a.jsonl", "", {"question": "q", "answer": "0"}, "  ", {"question": "q", "answer": "1"})
    jsonl(folder / "empty.jsonl")
    source = open_source([str(folder / "[ab].jsonl"), folder / "empty.jsonl", folder / "a.jsonl"])
    assert [source[i]["messages"][1]["content"] for i in range(len(source))] == list("012301")
    assert [source[i]["id"] for i in (0, 3)] == ["a.jsonl:0", "b.jsonl:1"]
    assert source.describe(1) == f"{folder}/a.jsonl row 1 (line 4)"
    with pytest.raises(IndexError):
        source[6]


def test_a_folder_stands_for_its_files(folder):
    (folder / "deep" / "er").mkdir(parents=True)
    jsonl(folder / "deep" / "er" / "x.jsonl", {"question": "q", "answer": "a"})
    (folder / "deep" / "notes.txt").write_text("no data")
    assert len(open_source(folder / "deep")) == 1


def test_columns_can_be_renamed_and_images_lie_elsewhere(folder):
    rows = jsonl(folder / "rows.jsonl", {"problem": "<image>?", "solution": "4", "picture": "1.png"})
    source = open_source(
        rows,
        image_folder=folder / "pictures",
        rename={"problem": "question", "solution": "answer", "picture": "image"},
    )
    assert source[0]["messages"] == [turn([picture(folder, 1), text("?")]), turn("4", "assistant")]


def test_prompts_alone(folder):
    rows = jsonl(folder / "rows.jsonl", {"prompt": "why?"}, {"messages": [turn("why?")]})
    source = open_source(rows, require_answer=False)
    assert source[0]["messages"] == source[1]["messages"] == [turn("why?")]


def test_tfds_directory(tmp_path):
    source = open_source(tfds_scenes.write(tmp_path, "flat"))
    assert len(source) == tfds_scenes.Scenes.SIZES["train"]
    for i in range(len(source)):
        record = source[i]
        number = record["metadata"]["number"]
        content, answer = (message["content"] for message in record["messages"])
        assert content[1] == text(f"which number is picture {number}?")
        pixels = np.asarray(Image.open(io.BytesIO(content[0]["image"])))
        assert np.array_equal(pixels, np.asarray(tiny.image(number, 40, 52)))
        silent = [text("number") | {"loss": False}, text(f" {number}")]
        assert answer == (silent if number % 2 else f"number {number}")
        assert record["id"] == f"scenes/flat/1.0.0:train:{i}"


def test_tfds_messages_several_images_and_parts_of_splits(tmp_path):
    source = open_source(tfds_scenes.write(tmp_path, "chat"), split="train[1:]")
    assert len(source) == tfds_scenes.Scenes.SIZES["train"] - 1
    for i in range(len(source)):
        number = int(source[i]["id"].removeprefix("chat-"))
        content = source[i]["messages"][0]["content"]
        images = [part["image"] for part in content if isinstance(content, list) and part["type"] == "image"]
        assert len(images) == number
        for k, image in enumerate(images):
            assert np.array_equal(np.asarray(image), np.asarray(tiny.image(number + k, 40, 52)))


def test_reading_needs_neither_jax_nor_torch_nor_tensorflow(tmp_path):
    directory = tfds_scenes.write(tmp_path, "flat")
    code = f"""
import sys
from pvm_jax.data.sources import open_source
assert open_source({str(directory)!r})[0]["messages"]
assert not {{"jax", "torch", "tensorflow"}} & set(sys.modules), "imported"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


BAD_ROWS = {
    "more images than places": (
        {"messages": [turn("<image>?"), ANSWER], "images": ["pictures/0.png", "pictures/1.png"]},
        "images: expected one for each place .* got 2 images and 1 places",
    ),
    "fewer images than places": (
        {"messages": [turn("<image><image>?"), ANSWER], "images": ["pictures/0.png"]},
        "images: expected one for each place .* got 1 images and 2 places",
    ),
    "image without a place": (
        {"messages": [turn("?"), ANSWER], "image": "pictures/0.png"},
        "images: expected one for each place .* got 1 images and 0 places",
    ),
    "place without an image": (
        {"question": "<image>?", "answer": "a"},
        "images: expected one for each place .* got 0 images and 1 places",
    ),
    "video without a place": (
        {"messages": [turn("?"), ANSWER], "videos": [["pictures/0.png"]]},
        "videos: expected one for each place .* got 1 videos and 0 places",
    ),
    "missing image": (
        {"messages": [turn("<image>?"), ANSWER], "images": ["pictures/9.png"]},
        r"images\[0\]: no image file at .*/pictures/9.png; relative paths start from image_folder",
    ),
    "missing image in a part": (
        {"messages": [turn([{"type": "image", "image": "9.png"}]), ANSWER]},
        r"messages\[0\].content\[0\]: no image file at .*/9.png",
    ),
    "image on the web": (
        {"messages": [turn([{"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}]), ANSWER]},
        r"content\[0\]: https://x.org/a.png is not on this machine",
    ),
    "image of a wrong type": (
        {"messages": [turn("<image>"), ANSWER], "images": [7]},
        r"images\[0\]: expected a path, bytes, base64 or .*, got 7",
    ),
    "broken base64": (
        {"messages": [turn("<image>"), ANSWER], "images": ["data:image/png;base64,abc"]},
        r"images\[0\]: not base64",
    ),
    "video without frames": ({"messages": [turn("<video>"), ANSWER], "videos": [[]]}, r"videos\[0\]: a video without"),
    "unknown role": ({"messages": [turn("?"), turn("!", "bot")]}, r"messages\[1\].role: unknown role 'bot'; expected"),
    "image in an answer": (
        {"messages": [turn("?"), turn([{"type": "image", "image": "pictures/0.png"}], "assistant")]},
        r"messages\[1\].content\[0\]: image in the assistant's turn",
    ),
    "unknown type of part": (
        {"messages": [turn([{"type": "audio", "audio": "a.wav"}]), ANSWER]},
        r"messages\[0\].content\[0\].type: unknown type 'audio'",
    ),
    "text that is none": (
        {"messages": [turn([{"type": "text", "text": 7}]), ANSWER]},
        r"messages\[0\].content\[0\].text: expected text, got 7",
    ),
    "part that is none": ({"messages": [turn([7]), ANSWER]}, r"messages\[0\].content\[0\]: expected .*, got 7"),
    "content that is none": (
        {"messages": [turn(None), ANSWER]},
        r"messages\[0\].content: expected text or a list of parts, got None",
    ),
    "empty answer": ({"question": "?", "answer": " \n"}, "answer: the answer is empty"),
    "empty answer in a chat": ({"messages": [turn("?"), turn("", "assistant")]}, r"messages\[1\]: the answer is empty"),
    "missing answer": ({"prompt": "?"}, "completion: expected text or a list of messages"),
    "no answer in a chat": ({"messages": [turn("?")]}, "no assistant turn"),
    "no messages": ({"messages": []}, "messages: expected text or a list of messages"),
    "other fields": ({"text": "?"}, "expected `messages`, or `prompt` and `completion`, or .*; the row has text"),
    "span beyond the answer": (
        {"question": "?", "answer": "abc", "no_loss": [[1, 4]]},
        "no_loss: expected ascending .* within 3 characters",
    ),
    "span that is none": ({"question": "?", "answer": "abc", "no_loss": [3]}, "no_loss: expected ascending"),
    "span of a list": (
        {"prompt": "?", "completion": [ANSWER], "no_loss": [[0, 1]]},
        "no_loss: counts characters of a string",
    ),
    "not JSON": ('{"question": "?", "answer"}', "not JSON .*; expected one JSON object a line"),
    "not UTF-8": (b'{"question": "\xff', "not JSON .*utf-8"),
    "a list": ("[1, 2]", "expected a JSON object, got a list"),
}


@pytest.mark.parametrize("name", sorted(BAD_ROWS))
def test_bad_row_is_one_sentence_with_file_row_and_field(folder, name):
    row, sentence = BAD_ROWS[name]
    good = json.dumps({"question": "?", "answer": "a"}).encode()
    row = row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
    (folder / "rows.jsonl").write_bytes(good + b"\n\n" + row + b"\n" + good + b"\n")
    source = open_source(folder / "rows.jsonl")
    with pytest.raises(DataError, match=sentence) as error:
        source[1]
    assert str(error.value).startswith(f"{folder}/rows.jsonl row 1 (line 3)")
    assert "\n" not in str(error.value)
    assert source[0]["messages"] == source[2]["messages"]


def test_bad_files(folder):
    empty = jsonl(folder / "empty.jsonl")
    (folder / "notes.txt").write_text("no data")
    (folder / "broken.parquet").write_bytes(b"PAR1 but not really PAR1")
    for files, sentence in (
        (empty, "the data set is empty: no rows in .*empty.jsonl"),
        ([], "the data set is empty"),
        (folder / "absent.jsonl", "no file matches .*absent.jsonl"),
        (folder / "notes.txt", "notes.txt: expected .jsonl or .parquet"),
        (folder / "pictures", "pictures: no .jsonl or .parquet file and no TFDS data set"),
        (folder / "broken.parquet", "broken.parquet: not a parquet file"),
    ):
        with pytest.raises(DataError, match=sentence):
            open_source(files)


def test_damaged_row_group(folder):
    path = folder / "rows.parquet"
    table = pa.Table.from_pylist([{"question": f"{i}" * 999, "answer": "a"} for i in range(4)])
    pq.write_table(table, path, row_group_size=2, compression="gzip", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[4:60] = b"\xff" * 56
    path.write_bytes(content)
    source = open_source(path)
    assert source[3]["messages"][1]["content"] == "a"
    with pytest.raises(DataError, match=r"rows.parquet row 1: row group 0 is damaged"):
        source[1]


def test_tfds_split_that_is_not_there(tmp_path):
    directory = tfds_scenes.write(tmp_path, "flat")
    with pytest.raises(DataError, match="no split 'dev'; it has test, train"):
        open_source(directory, split="dev[:10%]")
    rows = len(open_source(directory, split="test"))
    for split in ("test[1:", f"test[{rows}:]", "test[1:1]", f"test[:{rows + 1}]"):
        with pytest.raises(
            DataError, match=rf"expected a split as in test\[:10\] .* of its {rows} rows, got "
        ) as error:
            open_source(directory, split=split)
        assert str(error.value).endswith(repr(split))
