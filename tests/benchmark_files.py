"""The eight benchmarks in small: files in both published layouts, with our own questions and tiny images.

    files = write_all(folder)                  # {("mmmu", "tsv"): path, ("mmmu", "parquet"): path, ...}

Columns, types and odd cases are those of the published files (docs/evaluation.md); the questions are made up. The
first rows of each are odd on purpose, the others fill it up to twenty. Image n of a file is a square whose red is n.
"""

import base64
import csv
import functools
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

Rows = list[dict[str, Any]]
ROLL = 1_000_000


@functools.cache
def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


def number_of(image: Any) -> int:
    """The number that `png` put into an image (bytes or a path)."""
    return Image.open(io.BytesIO(image) if isinstance(image, bytes) else image).convert("RGB").getpixel((0, 0))[0]


def coded(*numbers: int) -> str:
    """Images as a TSV has them: base64, of several a Python list of it."""
    texts = [base64.b64encode(png(number)).decode() for number in numbers]
    return texts[0] if len(texts) == 1 else str(texts)


def struct(number: int, path: str | None = None) -> dict[str, Any]:
    """An image as the hub's parquet files have it."""
    return {"bytes": png(number), "path": path}


def write_tsv(path: Path, rows: Rows, bom: bool = False) -> Path:
    """As pandas writes it: a missing cell is empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="", encoding="utf-8-sig" if bom else "utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([["" if row.get(name) is None else row[name] for name in columns] for row in rows])
    return path


def write_parquet(path: Path, rows: Rows) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=6)
    return path


def write_jsonl(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_all(folder: Path) -> dict[tuple[str, str], Path]:
    files = {}
    for name, (tsv, parquet) in MAKERS.items():
        files[name, "tsv"] = write_tsv(folder / f"{name}.tsv", tsv(), bom=name == "mmbench_cn")
        files[name, "parquet"] = write_parquet(folder / f"{name}.parquet", parquet())
    return files


def lettered(options: Sequence[str | None], count: int) -> dict[str, str | None]:
    """Columns A, B, ... of which the last may be empty."""
    return {"ABCDEFGHI"[i]: options[i] if i < len(options) else None for i in range(count)}


# ---- MMMU: 7 images, options as a string that holds a list, open questions with several answers --------------------

# id, question, options, answer
MMMU = [
    ("validation_Accounting_1", "<image 1> What does a unit cost?", ["$6", "$7", "$8", "$9"], "B"),
    (
        "validation_Art_Theory_2",
        "After <image 1>, <image 2> and <image 3> comes",
        ["<image 4>", "<image 5>", "<image 6>", "<image 7>"],
        "C",
    ),
    ("validation_Math_3", "Read the ratio off <image 1>.", [], "['24/7', '3.43']"),
    ("validation_Math_4", "<image 1> 图中是什么？", ["it's", 'a "sign"', "None", "山"], "D"),
    *(
        (f"validation_Physics_{i}", f"<image 1> Filler {i}?", ["one", "two", "three"], "ABC"[i % 3])
        for i in range(5, 21)
    ),
]


def _mmmu_images(index: int) -> list[int]:
    return [101, 102, 103, 104, 105, 106, 107] if index == 1 else [index]


def mmmu_tsv() -> Rows:
    return [
        {"index": i + 1, "id": key, "question": question}
        | lettered(options, 9)
        | {
            "answer": answer,
            "category": key.removeprefix("validation_").rpartition("_")[0],
            "l2-category": "Anything",
            "split": "dev" if i < 2 else "validation",
            "image": coded(*_mmmu_images(i)),
        }
        for i, (key, question, options, answer) in enumerate(MMMU)
    ]


def mmmu_parquet() -> Rows:
    return [
        {"id": key, "question": question, "options": str(options), "explanation": ""}
        | dict.fromkeys(f"image_{n}" for n in range(1, 8))
        | {f"image_{n}": struct(number) for n, number in enumerate(_mmmu_images(i), start=1)}
        | {
            "img_type": "['Tables']",
            "answer": answer,
            "topic_difficulty": "Easy" if i % 2 else "Hard",
            "question_type": "multiple-choice" if options else "open",
            "subfield": "Anything",
        }
        for i, (key, question, options, answer) in enumerate(MMMU)
    ]


# ---- MMBench: circular copies, hints, options that are missing, images shared by index -----------------------------

# index, hint, question, options, answer, category, l2-category, image (of the row that has it)
MMBENCH_EN = [
    (0, "A cat is on a mat.", "Where is the cat?", ["mat", "roof"], "A", "identity", "perception", 0),
    (ROLL, "A cat is on a mat.", "Where is the cat?", ["roof", "mat"], "B", "identity", "perception", 0),
    (1, None, "Which is largest?", ["ant", "cow", "fly", "hen"], "B", "size", "reasoning", 1),
    (1 + ROLL, None, "Which is largest?", ["hen", "ant", "cow", "fly"], "C", "size", "reasoning", 1),
    (1 + 2 * ROLL, None, "Which is largest?", ["fly", "hen", "ant", "cow"], "D", "size", "reasoning", 1),
    (1 + 3 * ROLL, None, "Which is largest?", ["cow", "fly", "hen", "ant"], "A", "size", "reasoning", 1),
    *(
        (i, None, f"Filler {i}?", ["red", "green", "blue"], "ABC"[i % 3], "colour", "perception", i)
        for i in range(2, 16)
    ),
]
MMBENCH_CN = [
    (index, hint and "一只猫在垫子上。", f"问题{index}：哪一个？", [f"选项{x}" for x in options], answer, *rest)
    for index, hint, _, options, answer, *rest in MMBENCH_EN
]


def mmbench_tsv(rows: Sequence[tuple]) -> Rows:
    return [
        {"index": index, "question": question, "hint": hint}
        | lettered(options, 4)
        | {"answer": answer, "category": category, "image": coded(image) if index == image else str(image)}
        | {"source": "ours", "l2-category": l2, "comment": None, "split": "dev"}
        for index, hint, question, options, answer, category, l2, image in rows
    ]


def mmbench_parquet(rows: Sequence[tuple]) -> Rows:
    return [
        {"index": index, "question": question, "hint": hint or "nan", "answer": answer}
        | {letter: option or "nan" for letter, option in lettered(options, 4).items()}
        | {"category": category, "image": struct(image), "source": "ours", "L2-category": l2}
        | {"comment": "nan", "split": "dev"}
        for index, hint, question, options, answer, category, l2, image in rows
    ]


# ---- MMStar: the hub's question holds its options ------------------------------------------------------------------

# question, options, answer, category, l2_category
MMSTAR = [
    (
        "Which is in the picture?",
        ["a red car, parked", "a bus", "a tram, B: the old one", "none"],
        "A",
        "coarse",
        "scene",
    ),
    ("Is it day? Please answer yes or no.", ["yes", "no", "both", "neither"], "B", "coarse", "scene"),
    ("山上有什么？", ["树", "雪", "人", "无"], "C", "fine", "counting"),
    *(
        (f"Filler {i}?", [f"{i}", f"{i + 1}", f"{i + 2}", f"{i + 3}"], "ABCD"[i % 4])
        + (("coarse", "scene") if i < 13 else ("fine", "counting"))
        for i in range(3, 20)
    ),
]


def mmstar_tsv() -> Rows:
    return [
        {"index": i, "question": question}
        | lettered(options, 4)
        | {"answer": answer, "category": category, "l2_category": l2, "image": coded(i)}
        for i, (question, options, answer, category, l2) in enumerate(MMSTAR)
    ]


def mmstar_parquet() -> Rows:
    return [
        {
            "index": i,
            "question": f"{question}\nOptions: " + ", ".join(f"{x}: {text}" for x, text in zip("ABCD", options)),
            "image": struct(i),
            "answer": answer,
            "category": category,
            "l2_category": l2,
            "meta_info": {"source": "ours", "split": "val", "image_path": f"images/{i}.jpg"},
        }
        for i, (question, options, answer, category, l2) in enumerate(MMSTAR)
    ]


# ---- MMT-Bench: up to nine options, several images -----------------------------------------------------------------

# question, options, answer, category, l2-category
MMT = [
    ("Which of nine?", ["n1", "n2", "n3", "n4", "n5", "n6", "n7", "n8", "n9"], "I", "many", "counting"),
    (" Which face is glad? ", ["left ", "right"], "A", "facial_expression", "emotion"),
    ("Which pictures agree?", ["first two", "last two", "all"], "C", "many", "counting"),
    *(
        (f"Filler {i}?", ["w", "x", "y", "z", "v"], "ABCDE"[i % 5])
        + (("many", "counting") if i < 16 else ("mood", "emotion"))
        for i in range(3, 20)
    ),
]


def mmt(indices: int) -> Rows:
    return [
        {"index": indices + i, "question": question}
        | lettered(options, 9)
        | {"answer": answer, "category": category, "l2-category": l2, "split": "VAL"}
        | {"image": coded(20, 21, 22) if i == 2 else coded(i)}
        for i, (question, options, answer, category, l2) in enumerate(MMT)
    ]


# ---- MathVerse: six versions of a question, one of them without text, one without an image -------------------------

VERSIONS = ("Text Dominant", "Text Lite", "Vision Intensive", "Vision Dominant", "Vision Only", "Text Only")
_CHOICE, _VALUE = "the correct option letter, e.g., A, B, C, D.", "the final value, e.g., 1, 2.5, 300."


def mathverse_rows() -> Rows:
    """Four problems in five versions and one without an image; the second and third problem are free-form."""
    problems = [
        ("How large is angle 1?\nChoices:\nA:40°\nB:60°\nC:120°\nD:140°", "D"),
        ("How long is AB?", r"\frac{3}{2}"),
        ("How long is the side?", "12"),
        ("Which is true?\nChoices:\nA:x=1\nB:x=2", "B"),
    ]
    rows = []
    for number, (question, answer) in enumerate(problems):
        for version in VERSIONS[:5] if number else VERSIONS:
            choice, only = "Choices" in question, version == "Vision Only"
            ask = "please directly answer the question and provide " + (_CHOICE if choice else _VALUE)
            rows.append(
                {
                    "problem_index": str(number + 1),
                    "problem_version": version,
                    "question": "" if only else question,
                    "answer": answer,
                    "question_type": "multi-choice" if choice else "free-form",
                    "metadata": {
                        "split": "testmini",
                        "source": "ours",
                        "subject": "Plane Geometry",
                        "subfield": "Angle",
                    },
                    "query_wo": f"According to the question shown in the image, {ask}"
                    if only
                    else f"P{ask[1:]}\nQuestion: {question}",
                    "query_cot": "Think.",
                    "question_for_eval": question,
                    "number": None if version == "Text Only" else len(rows),
                }
            )
    return rows


def mathverse_tsv() -> Rows:
    return [
        {name: value for name, value in row.items() if name not in ("number", "query_wo")}
        | {
            "index": i + 1,
            "metadata": str(row["metadata"]),
            "image": "" if row["number"] is None else coded(row["number"]),
        }
        for i, row in enumerate(mathverse_rows())
    ]


def mathverse_parquet() -> Rows:
    return [
        {name: value for name, value in row.items() if name != "number"}
        | {"sample_index": str(i + 1), "image": None if row["number"] is None else struct(row["number"])}
        for i, row in enumerate(mathverse_rows())
    ]


# ---- MathVision: options or none, LaTeX, a path beside the image ---------------------------------------------------

# question, options, answer, subject, level
MATHVISION = [
    ("Which piece fits?\n<image1>", ["A", "B", "C", "D", "E"], "C", "combinatorial geometry", 2),
    ("How many?\n<image1>", [], "12", "counting", 1),
    (r"What is $\frac{1}{2}$ of it?", [r"$\frac{1}{4}$", r"$\frac{1}{3}$", r"$\sqrt{2}$", "1"], "A", "algebra", 5),
    *((f"Filler {i}?", ["p", "q", "r"], "ABC"[i % 3], "algebra", 3) for i in range(3, 20)),
]


def mathvision_tsv() -> Rows:
    return [
        {"index": i, "question": question, "choices": str(options), "answer": answer, "category": subject}
        | {"image": coded(i)}
        for i, (question, options, answer, subject, _) in enumerate(MATHVISION)
    ]


def mathvision_parquet() -> Rows:
    return [
        {"id": str(i + 1), "question": question, "options": options, "image": f"images/{i + 1}.jpg"}
        | {"decoded_image": struct(i), "answer": answer, "solution": None, "level": level, "subject": subject}
        for i, (question, options, answer, subject, level) in enumerate(MATHVISION)
    ]


# ---- AI2D: the hub's answer counts options from 0 ------------------------------------------------------------------

# question, options, answer
AI2D = [
    ("What eats the fox?", ["grass", "hawk", "none of them", "2"], 1),
    ("Which letter is the sun?", ["D", "C", "B", "A"], 3),
    *((f"Filler {i}?", ["k", "l", "m", "n"], i % 4) for i in range(2, 20)),
]


def ai2d_tsv() -> Rows:
    return [
        {"index": i, "question": question} | lettered(options, 4) | {"answer": "ABCD"[answer], "image": coded(i)}
        for i, (question, options, answer) in enumerate(AI2D)
    ]


def ai2d_parquet() -> Rows:
    return [
        {"question": question, "options": options, "answer": str(answer), "image": struct(i)}
        for i, (question, options, answer) in enumerate(AI2D)
    ]


MAKERS: Mapping[str, tuple] = {
    "mmmu": (mmmu_tsv, mmmu_parquet),
    "mmbench_en": (lambda: mmbench_tsv(MMBENCH_EN), lambda: mmbench_parquet(MMBENCH_EN)),
    "mmbench_cn": (lambda: mmbench_tsv(MMBENCH_CN), lambda: mmbench_parquet(MMBENCH_CN)),
    "mmstar": (mmstar_tsv, mmstar_parquet),
    "mmt": (lambda: mmt(1), lambda: mmt(1)),
    "mathverse": (mathverse_tsv, mathverse_parquet),
    "mathvision": (mathvision_tsv, mathvision_parquet),
    "ai2d": (ai2d_tsv, ai2d_parquet),
}
