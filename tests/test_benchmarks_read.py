"""Files of benchmarks -> questions: both published layouts of each, files of users, and what can be wrong with them."""

import base64
import hashlib
import json
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import benchmark_files as made
import pytest

from pvm_jax.data.images import DataError, open_image
from pvm_jax.evals.benchmarks import open_benchmark
from pvm_jax.evals.results import ResultError

NAMES = tuple(made.MAKERS)
LAYOUTS = ("tsv", "parquet")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return made.write_all(tmp_path_factory.mktemp("benchmarks"))


@pytest.fixture(scope="module")
def benchmarks(files):
    return {key: open_benchmark(key[0], path) for key, path in files.items()}


def numbers(question):
    return [made.number_of(image) for image in question.images]


# ---- Both layouts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_both_layouts_are_the_same_questions(name, benchmarks):
    tsv, parquet = benchmarks[name, "tsv"], benchmarks[name, "parquet"]
    assert (tsv.layout, parquet.layout) == LAYOUTS
    assert len(tsv) == len(parquet) >= 20
    assert tsv.broken == parquet.broken == {}
    for one, other in zip(tsv, parquet):
        assert (one.text, one.answer, one.hint) == (other.text, other.answer, other.hint)
        assert list(one.options.items()) == list(other.options.items())
        assert numbers(one) == numbers(other)
        shared = one.labels.keys() & other.labels.keys()
        assert {k: one.labels[k] for k in shared} == {k: other.labels[k] for k in shared}


def test_mmmu(benchmarks):
    cost, order, ratio, sign, *_ = benchmarks["mmmu", "parquet"]
    assert (cost.index, cost.answer) == ("validation_Accounting_1", "B")
    assert cost.labels == {"subject": "Accounting", "difficulty": "Hard", "question_type": "multiple-choice"}
    assert numbers(order) == [101, 102, 103, 104, 105, 106, 107]
    assert order.options == {"A": "<image 4>", "B": "<image 5>", "C": "<image 6>", "D": "<image 7>"}
    assert order.labels["subject"] == "Art_Theory"
    assert (ratio.options, ratio.answer, json.loads(ratio.fields["answers"])) == ({}, "24/7", ["24/7", "3.43"])
    assert sign.options == {"A": "it's", "B": 'a "sign"', "C": "None", "D": "山"}
    assert benchmarks["mmmu", "tsv"][1].labels == {"subject": "Art_Theory"}


def test_mmbench(benchmarks):
    for layout in LAYOUTS:
        english, chinese = benchmarks["mmbench_en", layout], benchmarks["mmbench_cn", layout]
        assert [q.index for q in english][:4] == ["0", "1000000", "1", "1000001"]
        assert english[0].options == {"A": "mat", "B": "roof"}
        assert (english[0].hint, english[2].hint) == ("A cat is on a mat.", "")
        assert [numbers(q) for q in english][:6] == [[0], [0], [1], [1], [1], [1]]  # TSV: "0", "1" for the copies
        assert english[2].labels == {"category": "size", "l2_category": "reasoning"}
        assert (chinese[0].hint, chinese[0].text) == ("一只猫在垫子上。", "问题0：哪一个？")


def test_mmstar_takes_options_out_of_the_question(benchmarks):
    for layout in LAYOUTS:
        question = benchmarks["mmstar", layout][0]
        assert question.text == "Which is in the picture?"
        assert question.options == {"A": "a red car, parked", "B": "a bus", "C": "a tram, B: the old one", "D": "none"}
        assert question.fields == {}


def test_mmstar_keeps_a_question_whose_options_are_written_otherwise(tmp_path):
    rows = made.mmstar_parquet()[:2]
    rows[0]["question"] = "Which?\nOptions: A. car\nB. bus\nC. tram\nD. none"
    rows[1]["question"] = "Which is the answer?"
    first, second = open_benchmark("mmstar", made.write_parquet(tmp_path / "m.parquet", rows))
    assert first.text == rows[0]["question"] and first.fields == {"options_in_text": "true"}
    assert first.options == {"A": "car", "B": "bus", "C": "tram", "D": "none"}
    assert second.options == {"A": "A", "B": "B", "C": "C", "D": "D"}


def test_mmt(benchmarks):
    nine, face, pictures, *_ = benchmarks["mmt", "tsv"]
    assert list(nine.options) == list("ABCDEFGHI") and nine.answer == "I"
    assert face.text == " Which face is glad? " and list(face.options.values()) == ["left ", "right"]
    assert numbers(pictures) == [20, 21, 22]
    assert face.labels == {"category": "facial_expression", "l2_category": "emotion"}


def test_mathverse(benchmarks):
    for layout in LAYOUTS:
        benchmark = benchmarks["mathverse", layout]
        choice, only, no_image, free = benchmark[0], benchmark[4], benchmark[5], benchmark[6]
        assert choice.options == {"A": "40°", "B": "60°", "C": "120°", "D": "140°"} == only.options
        assert choice.text.endswith("D:140°") and only.text == "" and only.answer == "D"
        assert (free.options, free.answer) == ({}, r"\frac{3}{2}")
        assert (numbers(no_image), numbers(free)) == ([], [6])
        assert only.labels == {
            "problem_version": "Vision Only",
            "question_type": "multi-choice",
            "subject": "Plane Geometry",
            "subfield": "Angle",
        }
    assert ("query_wo" in benchmarks["mathverse", "tsv"][0].fields) is False


def test_mathverse_metadata_as_json(tmp_path):
    rows = made.mathverse_tsv()[:1]
    rows[0]["metadata"] = '{"subject": "Solid Geometry", "split": null}'
    (question,) = open_benchmark("mathverse", made.write_tsv(tmp_path / "m.tsv", rows))
    assert question.labels["subject"] == "Solid Geometry"


def test_mathvision(benchmarks):
    pieces, count, half, *_ = benchmarks["mathvision", "parquet"]  # the path in `image` is of a file that is not there
    assert pieces.options == {x: x for x in "ABCDE"} and numbers(pieces) == [0]
    assert (count.options, count.answer, count.labels["level"]) == ({}, "12", "1")
    assert half.options["A"] == r"$\frac{1}{4}$"


def test_ai2d_answers_by_number(benchmarks):
    eats, sun, *_ = benchmarks["ai2d", "parquet"]
    assert (eats.answer, eats.options["B"]) == ("B", "hawk")
    assert (sun.answer, sun.options["D"]) == ("D", "A")  # the letter, not the option that reads like one


# ---- Splits, several files, checksums ------------------------------------------------------------------------------


def test_split_by_column(files):
    assert [q.index for q in open_benchmark("mmmu", files["mmmu", "tsv"], split="dev")] == ["1", "2"]
    with pytest.raises(DataError, match=r"mmmu.tsv: split 'test' is empty; found dev, validation"):
        open_benchmark("mmmu", files["mmmu", "tsv"], split="test")


def test_split_by_name_of_the_file(tmp_path):
    (tmp_path / "Math").mkdir()
    made.write_parquet(tmp_path / "Math/dev-00000-of-00001.parquet", made.mmmu_parquet()[:3])
    made.write_parquet(tmp_path / "Math/validation-00000-of-00001.parquet", made.mmmu_parquet()[3:])
    both, dev = open_benchmark("mmmu", tmp_path), open_benchmark("mmmu", tmp_path, split="dev")
    assert (len(both), len(dev), dev.split) == (20, 3, "dev")
    assert both[3].index == "validation_Math_4" and numbers(both[3]) == [3]
    assert len(both.files) == 2 and [*dev.files.values()] == [dev.checksum] == [*both.files.values()][:1]
    with pytest.raises(DataError, match=r"split 'val' is empty; found dev, validation"):
        open_benchmark("mmmu", tmp_path, split="val")


def test_checksum_is_of_the_file(files, benchmarks):
    for key, path in files.items():
        assert benchmarks[key].checksum == hashlib.sha256(path.read_bytes()).hexdigest()


def test_rows_without_an_index_count_over_all_files(tmp_path):
    for part in range(2):
        made.write_parquet(
            tmp_path / f"test-0000{part}-of-00002.parquet", made.ai2d_parquet()[10 * part : 10 * part + 10]
        )
    benchmark = open_benchmark("ai2d", tmp_path / "test-*.parquet")
    assert [q.index for q in benchmark] == [str(i) for i in range(20)] and numbers(benchmark[13]) == [13]


# ---- Memory and threads --------------------------------------------------------------------------------------------


def test_images_are_not_kept(tmp_path):
    """Cells of 1 MB, eight times Python's default limit of a field; reading 20 of them holds a few at a time."""
    rows = made.ai2d_tsv()
    for row in rows:
        row["image"] = base64.b64encode(made.png(row["index"]) + bytes(3 * 2**18)).decode()
    path = made.write_tsv(tmp_path / "big.tsv", rows)
    tracemalloc.start()
    benchmark = open_benchmark("ai2d", path)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 2**18 and peak < 14 * 2**20, (kept, peak)
    assert len(benchmark[7].images[0]) > 700_000 and numbers(benchmark[7]) == [7]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_read_the_same(layout, benchmarks):
    benchmark = benchmarks["mmstar", layout]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(numbers, list(benchmark) * 4)) == [[i] for i in range(20)] * 4


# ---- Files of users ------------------------------------------------------------------------------------------------


def test_user_jsonl(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/9.png").write_bytes(made.png(9))
    rows = [
        {"question": "Sum?", "answer": 12, "image": "pictures/9.png", "category": "sums"},
        {
            "id": "b",
            "question": "<image> or <image>?",
            "options": ["cat", "3"],
            "answer": 3,
            "images": [made.coded(1)] * 2,
        },
        {"question": "Which?", "A": "x", "B": "y", "answer": "(b)", "image": {"bytes": made.coded(2)}},
        {"question": "No image?", "choices": {"A": "yes", "C": "no"}, "answer": "no"},
        {"question": "Any?", "answer": ["one", "1"], "image": "1"},
    ]
    rows[4]["image"] = "b"  # the images of that row
    benchmark = open_benchmark("file:mine", made.write_jsonl(tmp_path / "mine.jsonl", rows))
    assert (benchmark.name, benchmark.kind, benchmark.layout, benchmark.broken) == ("mine", "file", "file", {})
    assert [q.index for q in benchmark] == ["row 0", "b", "row 2", "row 3", "row 4"]
    assert [q.answer for q in benchmark] == ["12", "B", "B", "C", "one"]
    assert [numbers(q) for q in benchmark] == [[9], [1, 1], [2], [], [1, 1]]
    assert benchmark[0].labels == {"category": "sums"}
    assert benchmark[4].fields == {"answers": '["one", "1"]'}


@pytest.mark.parametrize("write", [made.write_tsv, made.write_parquet])
def test_user_tables(write, tmp_path):
    (tmp_path / "a.png").write_bytes(made.png(5))
    suffix = "tsv" if write is made.write_tsv else "parquet"
    rows = [{"question": 'Q\n\t"1"?', "answer": "x", "image_path": "a.png"}, {"question": "2?", "answer": "y"}]
    one, two = open_benchmark("file:mine", write(tmp_path / f"mine.{suffix}", rows))
    assert (one.text, numbers(one), numbers(two)) == ('Q\n\t"1"?', [5], [])


def test_windows_line_ends_and_other_line_breaks(tmp_path):
    rows = [{"index": i, "question": "a\u2028b\x85c?", "answer": "x", "image": made.coded(i)} for i in range(3)]
    path = made.write_tsv(tmp_path / "w.tsv", rows)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n\r\n"))  # an empty line behind every row, too
    benchmark = open_benchmark("file:w", path)
    assert {question.text for question in benchmark} == {"a\u2028b\x85c?"}
    assert [numbers(question) for question in benchmark] == [[0], [1], [2]]


# ---- Wrong files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_under_another_name_is_refused(layout, files):
    for name in NAMES:
        for other in set(NAMES) - {name}:
            with pytest.raises(DataError, match=f"{name}.{layout}: expected "):
                open_benchmark(other, files[name, layout])


def refused(name, path, sentence, error=DataError, **options):
    with pytest.raises(error) as caught:
        open_benchmark(name, path, **options)
    assert sentence in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


def test_unknown_names(files, tmp_path):
    path = files["mmstar", "tsv"]
    refused("mmstarr", path, "benchmark 'mmstarr' is not known; did you mean mmstar", ResultError)
    refused("MMBench-EN", path, "did you mean mmbench_en", ResultError)
    refused("zzz", path, "there are mmmu, mmbench_en,", ResultError)
    refused("file:mmmu", path, "file:mmmu: expected a name", ResultError)
    refused("mmstar", tmp_path / "none.tsv", "no file matches")
    refused("mmstar", tmp_path, "no .tsv or .parquet or .jsonl file in this folder")


def test_wrong_columns_are_listed(tmp_path):
    path = made.write_tsv(tmp_path / "m.tsv", [{"index": 1, "question": "?", "A": "x", "answer": "A"}])
    refused("mmstar", path, "m.tsv: expected the columns of mmstar (index, question, A, B, C, D, answer, category, ")
    refused("mmstar", path, "found index, question, A, answer")


def test_mmbench_in_the_other_language(files):
    refused(
        "mmbench_en", files["mmbench_cn", "tsv"], "few of whose questions have Chinese characters; 20 of the first 20"
    )
    refused("mmbench_cn", files["mmbench_en", "parquet"], "most of whose questions have Chinese characters; 0 of the")


def test_files_that_are_not_what_their_ending_says(files, tmp_path):
    (tmp_path / "p.tsv").write_bytes(files["mmstar", "parquet"].read_bytes())
    refused("mmstar", tmp_path / "p.tsv", "p.tsv: not a TSV in UTF-8, as its name says")
    (tmp_path / "t.parquet").write_bytes(files["mmstar", "tsv"].read_bytes())
    refused("mmstar", tmp_path / "t.parquet", "t.parquet: not a parquet file that can be read")
    (tmp_path / "l.tsv").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused("mmstar", tmp_path / "l.tsv", "Git LFS pointer")
    (tmp_path / "a.csv").write_text("question,answer\n")
    refused("mmstar", tmp_path / "a.csv", "a.csv: expected a file that ends in .tsv, .parquet, .jsonl")


def test_no_rows(tmp_path):
    path = tmp_path / "m.tsv"
    path.write_text("index\tquestion\tanswer\n")
    refused("file:m", path, "m.tsv: expected rows, found only a header or nothing")
    path.write_text("")
    refused("file:m", path, "m.tsv: expected rows")


def test_two_rows_with_one_index(tmp_path):
    rows = made.mmstar_tsv()
    rows[7]["index"] = 3
    path = made.write_tsv(tmp_path / "m.tsv", rows)
    refused("mmstar", path, f"{path} row 7: index '3' is that of {path} row 3 too; every row needs its own")


# ---- Wrong rows: they stay, and do not stop the others -------------------------------------------------------------


def test_broken_rows_are_kept_and_named(tmp_path):
    rows = made.mmstar_tsv()
    rows[1]["answer"] = "E"
    rows[2]["answer"] = None
    rows[4]["question"] = None
    path = made.write_tsv(tmp_path / "m.tsv", rows)
    benchmark = open_benchmark("mmstar", path)
    assert len(benchmark) == 20 and [q.index for q in benchmark] == [str(i) for i in range(20)]
    assert benchmark.broken == {
        "1": f"{path} row 1, answer: expected one of the options A, B, C, D, got 'E'",
        "2": f"{path} row 2, answer: expected one, the cell is empty; splits whose answers are not published have none",
        "4": f"{path} row 4, question: expected text, the cell is empty",
    }
    assert benchmark[1].labels == {"category": "coarse", "l2_category": "scene"}
    assert numbers(benchmark[3]) == [3]


def test_broken_cells(tmp_path):
    rows = made.ai2d_parquet()
    rows[0]["answer"] = "4"
    assert list(open_benchmark("ai2d", made.write_parquet(tmp_path / "a.parquet", rows)).broken.values()) == [
        f"{tmp_path}/a.parquet row 0, answer: expected the number of one of 4 options, from 0, got '4'"
    ]
    rows = made.mmmu_parquet()
    rows[0]["options"] = "__import__('os').system('true')"
    (sentence,) = open_benchmark("mmmu", made.write_parquet(tmp_path / "m.parquet", rows)).broken.values()
    assert 'options: expected a list of at most 26 options, got "__import__' in sentence
    rows = made.mmbench_tsv(made.MMBENCH_EN)
    rows[3]["index"] = "x1"
    (sentence,) = open_benchmark("mmbench_en", made.write_tsv(tmp_path / "b.tsv", rows)).broken.values()
    assert sentence.endswith("row 3, index: expected a whole number, got 'x1'")


def test_a_row_that_is_cut_off(tmp_path):
    path = made.write_tsv(tmp_path / "m.tsv", made.mmstar_tsv())
    path.write_bytes(path.read_bytes()[: -len(made.coded(19)) - 20])
    benchmark = open_benchmark("mmstar", path)
    (sentence,) = benchmark.broken.values()
    assert "row 19: expected 10 cells as in the header, got" in sentence and len(benchmark) == 20


def test_a_line_that_is_not_json(tmp_path):
    path = made.write_jsonl(tmp_path / "m.jsonl", [{"question": "a?", "answer": "x"}] * 2)
    path.write_text(path.read_text() + "{oops\n")
    benchmark = open_benchmark("file:m", path)
    assert list(benchmark.broken) == ["row 2"] and "row 2 (line 3): not JSON" in benchmark.broken["row 2"]


def test_nothing_that_can_be_used(tmp_path):
    rows = [row | {"answer": "?"} for row in made.mmmu_parquet()]
    assert any(row["question_type"] == "open" for row in rows)
    path = made.write_parquet(tmp_path / "m.parquet", rows)
    refused(
        "mmmu", path, f"mmmu: none of 20 rows can be used; the first: {path} row 0, answer: expected one, the cell is"
    )


def test_wrong_images_show_when_asked_for(tmp_path):
    rows = made.mmbench_tsv(made.MMBENCH_EN)
    rows[0]["image"] = None
    rows[6]["image"] = "1000001"  # which itself names another row
    rows[7]["image"] = made.coded(7)[:-20] + "!" * 20
    rows[8]["image"] = "SGVsbG8g" * 20  # "Hello Hello ..."
    rows[9]["image"] = "gone.png"
    benchmark = open_benchmark("mmbench_en", made.write_tsv(tmp_path / "m.tsv", rows))
    assert benchmark.broken == {}
    for position, sentence in (
        (0, "m.tsv row 0: expected an image, and the row has none"),
        (6, "m.tsv row 6, image: expected an image in row 1000001, which names another row"),
        (7, "m.tsv row 7, image[0]: not base64 ("),
        (9, "m.tsv row 9, image[0]: no image file at "),
    ):
        with pytest.raises(DataError) as caught:
            list(benchmark[position].images)
        assert sentence in str(caught.value), str(caught.value)
    with pytest.raises(DataError):  # bytes, but of no image
        open_image(benchmark[8].images[0], "image")
    assert numbers(benchmark[10]) == [6]


def test_a_quote_that_is_not_closed(tmp_path):
    """Read leniently it would swallow the rows behind it."""
    (tmp_path / "m.tsv").write_text('index\tquestion\tanswer\n0\ta\tx\n1\tb\t"x\n2\tc\tx\n3\td\tx\n')
    refused("file:m", tmp_path / "m.tsv", "not a TSV in UTF-8, as its name says")


def test_several_answers_that_are_options(tmp_path):
    rows = [
        {"question": "?", "options": ["cat", "dog", "cow"], "answer": ["dog", "(C)"]},
        {"question": "?", "answer": []},
    ]
    benchmark = open_benchmark("file:m", made.write_jsonl(tmp_path / "m.jsonl", rows))
    assert (benchmark[0].answer, benchmark[0].fields["answers"]) == ("B", '["B", "C"]')
    assert list(benchmark.broken) == ["1"] and "answer: expected one" in benchmark.broken["1"]
