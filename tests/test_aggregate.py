"""Records -> scores: figures worked out by hand, and what is refused."""

import dataclasses
import json
import math
import random

import benchmark_files as made
import pytest

from pvm_jax.evals.aggregate import aggregate, expected_keys, table
from pvm_jax.evals.benchmarks import open_benchmark
from pvm_jax.evals.protocols import task
from pvm_jax.evals.questions import Question, Record
from pvm_jax.evals.results import ResultError

ROLL = made.ROLL


def record(judged, question, completion, seed=0, name=None, **changes):
    """As the harness makes it."""
    verdict = judged.verdict(question, completion)
    fields = {"text": question.text, "labels": dict(question.labels)}
    return dataclasses.replace(
        Record(
            benchmark=name or judged.benchmark,
            protocol=judged.protocol,
            index=question.index,
            seed=seed,
            question=fields,
            prompt="",
            completion=completion,
            tokens=len(completion),
            prompt_tokens=1,
            finish_reason="stop",
            answer=verdict.answer,
            right=verdict.right,
        ),
        **changes,
    )


def values(summary):
    return {name: score["value"] for name, score in summary["scores"].items()}


# ---- The eight benchmarks ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return made.write_all(tmp_path_factory.mktemp("benchmarks"))


def summarise(files, name, layout, answers, protocol="lmms_default"):
    """The summary when the question at a position gets `answers(position, question)`; by default the right answer."""
    benchmark, judged = open_benchmark(name, files[name, layout]), task(protocol, name)
    records = [record(judged, question, answers(i, question)) for i, question in enumerate(benchmark)]
    return aggregate(judged, expected_keys(name, benchmark, (0,)), records)


@pytest.mark.parametrize("layout", ("tsv", "parquet"))
class TestBenchmarks:
    def test_mmmu(self, files, layout):
        """B is right at the first row and at fillers 7, 10, 13, 16 and 19."""
        summary = summarise(files, "mmmu", layout, lambda i, q: "B")
        assert (summary["metric"], summary["score"], summary["samples"]) == ("accuracy", 6 / 20, 20)
        by = {name: (s["right"], s["count"]) for name, s in summary["by"]["subject"].items()}
        assert by == {"Accounting": (1, 1), "Art_Theory": (0, 1), "Math": (0, 2), "Physics": (5, 16)}

    @pytest.mark.parametrize("name", ("mmbench_en", "mmbench_cn"))
    def test_mmbench(self, files, layout, name):
        """One of four rolls is wrong: 19 of 20 rows, 15 of 16 questions."""
        wrong = str(1 + 2 * ROLL)
        summary = summarise(files, name, layout, lambda i, q: "A" if q.index == wrong else q.answer)
        assert values(summary) == {"accuracy": 19 / 20, "plain": 16 / 16, "circular": 15 / 16}
        assert (summary["metric"], summary["score"], summary["scores"]["circular"]["count"]) == ("circular", 0.9375, 16)
        assert summary["by"]["l2_category"]["reasoning"]["right"] == 3

    def test_mmstar(self, files, layout):
        """11 of 12 scenes and 2 of 8 counts."""
        right = {1, *range(3, 13), 2, 13}
        summary = summarise(files, "mmstar", layout, lambda i, q: q.answer if i in right else "no idea")
        assert values(summary) == {"accuracy": 13 / 20, "macro l2_category": pytest.approx((11 / 12 + 2 / 8) / 2)}
        assert summary["metric"] == "macro l2_category" and summary["score"] == pytest.approx(7 / 12)
        assert (summary["unparsed"]["right"], summary["unparsed"]["count"]) == (7, 20)

    def test_mmt(self, files, layout):
        """2 of 5 emotions and 12 of 15 counts."""
        right = {1, 16, 0, 2, *range(3, 13)}
        summary = summarise(files, "mmt", layout, lambda i, q: q.answer if i in right else "B" if i == 3 else "")
        assert values(summary) == {"accuracy": 14 / 20, "macro l2_category": pytest.approx(0.6)}
        assert (summary["metric"], summary["by"]["l2_category"]["emotion"]["value"]) == ("accuracy", 2 / 5)

    def test_mathverse(self, files, layout):
        """All nine with text enough, and of the twelve that need the image the three of the first problem."""

        def answers(i, question):
            vision = question.labels["problem_version"].startswith("Vision")
            return "17" if vision and question.fields["problem_index"] != "1" else question.answer

        summary = summarise(files, "mathverse", layout, answers, "pvm_reasoning")
        assert values(summary) == {"accuracy": 12 / 21, "vision": 3 / 12}
        assert (summary["metric"], summary["score"]) == ("vision", 0.25)
        assert summary["by"]["problem_version"]["Text Only"]["right"] == 1
        assert summary["by"]["question_type"]["multi-choice"]["count"] == 11
        assert summarise(files, "mathverse", layout, answers)["metric"] == "accuracy"

    def test_mathvision(self, files, layout):
        """A is right at the third row and at fillers 3, 6, 9, 12, 15 and 18."""
        summary = summarise(files, "mathvision", layout, lambda i, q: r"So it is \boxed{A}")
        assert values(summary) == {"accuracy": 7 / 20}
        assert summary["by"]["subject"]["algebra"]["value"] == 7 / 18

    def test_ai2d(self, files, layout):
        """D is right at the second row and at fillers 3, 7, 11, 15 and 19."""
        assert values(summarise(files, "ai2d", layout, lambda i, q: "D.")) == {"accuracy": 6 / 20}


def test_vision_is_left_out_where_no_question_needs_the_image(files):
    benchmark, judged = open_benchmark("mathverse", files["mathverse", "tsv"]), task("pvm_reasoning", "mathverse")
    text = [q for q in benchmark if q.labels["problem_version"] == "Text Lite"]
    summary = aggregate(judged, expected_keys("mathverse", text, (0,)), [record(judged, q, q.answer) for q in text])
    assert (summary["metric"], values(summary)) == ("accuracy", {"accuracy": 1.0})


# ---- Seeds and intervals -------------------------------------------------------------------------------------------

QUESTIONS = [Question(str(i), "?", "A", {"A": "x", "B": "y"}, labels={"level": "12"[i % 2]}) for i in range(10)]
PLAIN = task("plain", "file")


def made_of(rights, **changes):
    """A summary of `rights[seed]`: a string with a 1 for each right question."""
    records = [
        record(PLAIN, question, "A" if row[i] == "1" else "B", seed, "mine", **changes)
        for seed, row in rights.items()
        for i, question in enumerate(QUESTIONS)
    ]
    return aggregate(PLAIN, expected_keys("mine", QUESTIONS, list(rights)), records)


def test_wilson_interval():
    score = made_of({0: "1111111100"})["scores"]["accuracy"]
    assert (score["value"], score["count"], score["spread"]) == (0.8, 10, None)
    assert (score["low"], score["high"]) == (pytest.approx(0.490, abs=5e-4), pytest.approx(0.943, abs=5e-4))


def test_seeds_are_not_more_questions():
    """Four times the same answers say no more about other questions than once."""
    once, four = made_of({0: "1111111100"}), made_of(dict.fromkeys(range(4), "1111111100"))
    for name in ("value", "low", "high", "count"):
        assert four["scores"]["accuracy"][name] == once["scores"]["accuracy"][name]
    assert four["scores"]["accuracy"]["spread"] == 0 and four["seeds"] == [0, 1, 2, 3] and four["samples"] == 10
    assert four["by"]["level"]["1"] == once["by"]["level"]["1"]
    assert four["truncated"]["count"] == 40  # of answers, not of questions


def test_mean_and_spread_over_seeds():
    """0.5 and 0.7: mean 0.6, standard deviation sqrt(0.02)."""
    score = made_of({0: "1111100000", 7: "1111111000"})["scores"]["accuracy"]
    assert (score["value"], score["seeds"]) == (pytest.approx(0.6), {"0": 0.5, "7": 0.7})
    assert score["spread"] == pytest.approx(math.sqrt(0.02))
    six = made_of({0: "1111110000"})["scores"]["accuracy"]
    assert (score["low"], score["high"]) == (pytest.approx(six["low"]), pytest.approx(six["high"]))


def test_circular_of_each_seed():
    """Seed 0 has one roll wrong, seed 1 none: 0 and 1, mean one half."""
    judged = task("pvm_reasoning", "mmbench_en")
    rolls = [Question(str(5 + i * ROLL), "?", "A", {"A": "x", "B": "y"}) for i in range(4)]
    records = [
        record(judged, q, "B" if (i, seed) == (2, 0) else "A", seed) for i, q in enumerate(rolls) for seed in (0, 1)
    ]
    score = aggregate(judged, expected_keys("mmbench_en", rolls, (0, 1)), records)["scores"]["circular"]
    assert (score["value"], score["count"], score["seeds"]) == (0.5, 1, {"0": 0.0, "1": 1.0})
    assert score["spread"] == pytest.approx(math.sqrt(0.5))


def test_interval_of_a_macro_score():
    """Groups of 90 with 45 right and 10 with 10 right: z^2 is about 4, so 47/94 and 12/14."""
    judged = task("lmms_default", "mmstar")
    questions = [
        Question(str(i), "?", "A", dict.fromkeys("ABCD", "x"), labels={"l2_category": "big" if i < 90 else "small"})
        for i in range(100)
    ]
    records = [record(judged, q, "A" if i < 45 or i >= 90 else "B") for i, q in enumerate(questions)]
    score = aggregate(judged, expected_keys("mmstar", questions, (0,)), records)["scores"]["macro l2_category"]
    half = 1.96 * math.sqrt(((47 / 94) * (47 / 94) / 94 + (12 / 14) * (2 / 14) / 14) / 4)
    assert score["value"] == 0.75 and score["count"] == 100
    assert score["high"] - 0.75 == pytest.approx(half, rel=0.02) == pytest.approx(0.75 - score["low"], rel=0.02)
    every = aggregate(judged, expected_keys("mmstar", questions, (0,)), [record(judged, q, "A") for q in questions])
    assert every["score"] == 1 == every["scores"]["macro l2_category"]["high"]
    assert 0.85 < every["scores"]["macro l2_category"]["low"] < 0.97  # all right is not certain


def test_the_order_of_records_does_not_matter():
    records = [
        record(PLAIN, q, "AB"[(i * seed) % 2], seed, "mine") for i, q in enumerate(QUESTIONS) for seed in range(3)
    ]
    keys = expected_keys("mine", QUESTIONS, range(3))
    first = json.dumps(aggregate(PLAIN, keys, records))
    random.Random(0).shuffle(records)
    assert json.dumps(aggregate(PLAIN, keys, records)) == first


# ---- What did not go as it should ----------------------------------------------------------------------------------


def test_faults_are_counted_apart_and_wrong():
    records = [record(PLAIN, question, "A", name="mine") for question in QUESTIONS]
    records[0] = dataclasses.replace(
        records[0], completion=None, answer=None, right=False, error="no image", finish_reason="", tokens=0
    )
    records[1] = dataclasses.replace(records[1], answer=None, right=False, error="the judge did not answer")
    records[2] = dataclasses.replace(records[2], answer=None, right=False)
    records[3] = dataclasses.replace(records[3], answer=None, right=False, finish_reason="length")
    records[4] = dataclasses.replace(records[4], finish_reason="length")
    records[5] = dataclasses.replace(records[5], right=False, ungraded="crash")
    summary = aggregate(PLAIN, expected_keys("mine", QUESTIONS, (0,)), records)
    faults = {name: summary[name]["right"] for name in ("truncated", "unparsed", "broken", "unjudged", "ungraded")}
    assert faults == {"truncated": 2, "unparsed": 2, "broken": 1, "unjudged": 1, "ungraded": 1}
    assert values(summary) == {"accuracy": 5 / 10}
    assert sum(bin["count"] for bin in summary["by_length"]) == 9  # the broken one has no length


def test_by_length():
    lengths = [0, 15, 16, 63, 64, 255, 256, 1024, 4096, 20_000]
    records = [
        record(PLAIN, q, "A" if i % 2 else "B", name="mine", tokens=length)
        for i, (q, length) in enumerate(zip(QUESTIONS, lengths))
    ]
    summary = aggregate(PLAIN, expected_keys("mine", QUESTIONS, (0,)), records)
    assert [(bin["from"], bin["to"], bin["right"], bin["count"]) for bin in summary["by_length"]] == [
        (0, 16, 1, 2),
        (16, 64, 1, 2),
        (64, 256, 1, 2),
        (256, 1024, 0, 1),
        (1024, 4096, 1, 1),
        (4096, 16384, 0, 1),
        (16384, None, 1, 1),
    ]


def test_keys_that_are_missing_double_or_strange():
    records = [record(PLAIN, question, "A", name="mine") for question in QUESTIONS]
    keys = expected_keys("mine", QUESTIONS, (0,))
    for given, sentence in (
        (
            records[:-2],
            r"mine: the record of index '8', seed 0 \(and 1 more\) is missing; was the evaluation interrupted",
        ),
        ([*records, records[3]], "mine: the record of index '3', seed 0 is there more than once"),
        ([*records, dataclasses.replace(records[3], seed=1)], "index '3', seed 1 belongs to no question; was it made"),
        (
            [*records, dataclasses.replace(records[3], benchmark="other")],
            "other: the record of index '3', seed 0 belongs",
        ),
    ):
        with pytest.raises(ResultError, match=sentence):
            aggregate(PLAIN, keys, given)
    for strange in ([], [("mine", "0", 0), ("mine", "0", 1), ("mine", "1", 0)]):
        one = {key[1:]: key for key in strange}
        given = [dataclasses.replace(records[int(index)], seed=seed) for index, seed in one]
        with pytest.raises(ResultError, match="expected keys of one benchmark, every question under every seed"):
            aggregate(PLAIN, strange, given)


# ---- Tables --------------------------------------------------------------------------------------------------------


def test_table_says_what_the_summary_says():
    summary = made_of({0: "1111100000", 1: "1111111000"}, tokens=40)
    assert table(summary) == (
        "mine, plain version 1: 10 questions, 2 seeds; with 95 % intervals\n"
        "* accuracy                  60.0 % (31.3-83.2)  +-14.1 %  10\n"
        "level: 1                    70.0 % (29.9-92.7)             5\n"
        "level: 2                    50.0 % (17.0-83.0)             5\n"
        "answers of 16 to 63 tokens  60.0 % (31.3-83.2)            10\n"
        "truncated                   0.0 %                          0\n"
        "unparsed                    0.0 %                          0\n"
        "broken                      0.0 %                          0\n"
        "unjudged                    0.0 %                          0\n"
        "ungraded                    0.0 %                          0"
    )
    score = json.loads(json.dumps(summary))["scores"]["accuracy"]
    shown = [f"{100 * score[name]:.1f}" for name in ("value", "low", "high", "spread")]
    assert shown == ["60.0", "31.3", "83.2", "14.1"]
