"""What is asked, character by character, and what becomes of the answers."""

import dataclasses
import json

import benchmark_files as made
import pytest

import configs.grpo
from pvm_jax import grading
from pvm_jax.data.images import DataError
from pvm_jax.evals import asking
from pvm_jax.evals.benchmarks import open_benchmark
from pvm_jax.evals.prompts import INSTRUCTION, in_place, shown
from pvm_jax.evals.protocols import VERSIONS, task
from pvm_jax.evals.questions import Question, Verdict
from pvm_jax.evals.results import ResultError
from pvm_jax.sampling import Sampling

THINK = (
    "\nThink about the question first and put your thoughts between <think> and </think>, then give the final answer "
    "between <answer> and </answer>."
)
LETTER = "Answer with the option's letter from the given choices directly."
MATHVISION = "Answer the question with the option's letter from the given choices directly."

# Benchmark, position in its file: prompts of lmms_default, of pvm_reasoning without its last line, and of plain too.
PROMPTS = {
    ("mmmu", 0): (
        "<image>Question: <image 1> What does a unit cost?\nOptions:\nA. $6\nB. $7\nC. $8\nD. $9\n"
        "Answer with the option letter only.",
        "<image> What does a unit cost?\nA. $6\nB. $7\nC. $8\nD. $9",
    ),
    ("mmmu", 1): (
        "<image><image><image><image><image><image><image>Question: After <image 1>, <image 2> and <image 3> comes\n"
        "Options:\nA. <image 4>\nB. <image 5>\nC. <image 6>\nD. <image 7>\nAnswer with the option letter only.",
        "After <image>, <image> and <image> comes\nA. <image>\nB. <image>\nC. <image>\nD. <image>",
    ),
    ("mmmu", 2): (
        "<image>Question: Read the ratio off <image 1>.\nOptions:\n\n"
        "Please select the correct answer from the options above.",
        "Read the ratio off <image>.",
    ),
    ("mmmu", 3): (
        '<image>Question: <image 1> 图中是什么？\nOptions:\nA. it\'s\nB. a "sign"\nC. None\nD. 山\n'
        "Answer with the option letter only.",
        '<image> 图中是什么？\nA. it\'s\nB. a "sign"\nC. None\nD. 山',
    ),
    ("mmbench_en", 1): (
        "<image>A cat is on a mat. Where is the cat? There are several options:\nA. roof\nB. mat\n\n" + LETTER,
        "<image>A cat is on a mat.\nWhere is the cat?\nA. roof\nB. mat",
    ),
    ("mmbench_en", 2): (
        "<image>Which is largest? There are several options:\nA. ant\nB. cow\nC. fly\nD. hen\n\n" + LETTER,
        "<image>Which is largest?\nA. ant\nB. cow\nC. fly\nD. hen",
    ),
    ("mmbench_cn", 0): (
        "<image>一只猫在垫子上。 问题0：哪一个？ There are several options:\nA. 选项mat\nB. 选项roof\n\n"
        "请直接使用所提供的选项字母作为答案回答。",
        "<image>一只猫在垫子上。\n问题0：哪一个？\nA. 选项mat\nB. 选项roof",
    ),
    ("mmbench_cn", 6): (
        "<image>问题2：哪一个？ There are several options:\nA. 选项red\nB. 选项green\nC. 选项blue\n\n"
        "请直接使用所提供的选项字母作为答案回答。",
        "<image>问题2：哪一个？\nA. 选项red\nB. 选项green\nC. 选项blue",
    ),
    ("mmstar", 0): (
        "<image>Question: Which is in the picture?\nOptions: A: a red car, parked, B: a bus, C: a tram, B: the old one"
        ", D: noneAnswer with the option letter only.",
        "<image>Which is in the picture?\nA. a red car, parked\nB. a bus\nC. a tram, B: the old one\nD. none",
    ),
    ("mmstar", 1): (
        "<image>Question: Is it day?\nOptions: A: yes, B: no, C: both, D: neitherAnswer with the option letter only.",
        "<image>Is it day? Please answer yes or no.\nA. yes\nB. no\nC. both\nD. neither",
    ),
    ("mmstar", 2): (
        "<image>Question: 山上有什么？\nOptions: A: 树, B: 雪, C: 人, D: 无Answer with the option letter only.",
        "<image>山上有什么？\nA. 树\nB. 雪\nC. 人\nD. 无",
    ),
    ("mmt", 0): (
        "<image>Question: \nWhich of nine?\nA: n1\nB: n2\nC: n3\nD: n4\nE: n5\nF: n6\nG: n7\nH: n8\nI: n9\n"
        "Answer the question using a single character from the given options.",
        "<image>Which of nine?\nA. n1\nB. n2\nC. n3\nD. n4\nE. n5\nF. n6\nG. n7\nH. n8\nI. n9",
    ),
    ("mmt", 1): (
        "<image>Question: \nWhich face is glad?\nA: left\nB: right\n"
        "Answer the question using a single character from the given options.",
        "<image> Which face is glad? \nA. left \nB. right",
    ),
    ("mmt", 2): (
        "<image><image><image>Question: \nWhich pictures agree?\nA: first two\nB: last two\nC: all\n"
        "Answer the question using a single character from the given options.",
        "<image><image><image>Which pictures agree?\nA. first two\nB. last two\nC. all",
    ),
    ("mathverse", 0): (
        "<image>Please directly answer the question and provide the correct option letter, e.g., A, B, C, D.\n"
        "Question: How large is angle 1?\nChoices:\nA:40°\nB:60°\nC:120°\nD:140°",
        "<image>How large is angle 1?\nChoices:\nA:40°\nB:60°\nC:120°\nD:140°",
    ),
    ("mathverse", 4): (
        "<image>According to the question shown in the image, please directly answer the question and provide the "
        "correct option letter, e.g., A, B, C, D.",
        "<image>Answer the question that the image shows.",
    ),
    ("mathverse", 5): (
        "Please directly answer the question and provide the correct option letter, e.g., A, B, C, D.\n"
        "Question: How large is angle 1?\nChoices:\nA:40°\nB:60°\nC:120°\nD:140°",
        "How large is angle 1?\nChoices:\nA:40°\nB:60°\nC:120°\nD:140°",
    ),
    ("mathverse", 6): (
        "<image>Please directly answer the question and provide the final value, e.g., 1, 2.5, 300.\n"
        "Question: How long is AB?",
        "<image>How long is AB?",
    ),
    ("mathvision", 0): (
        '<image>Please solve the problem step by step and put your answer in one "\\boxed{}".Which piece fits?\n'
        "<image1>\nChoices: A. A\nB. B\nC. C\nD. D\nE. E\n" + MATHVISION,
        "Which piece fits?\n<image>\nA. A\nB. B\nC. C\nD. D\nE. E",
    ),
    ("mathvision", 1): (
        '<image>Please solve the problem step by step and put your answer in one "\\boxed{}".How many?\n<image1>',
        "How many?\n<image>",
    ),
    ("mathvision", 2): (
        '<image>Please solve the problem step by step and put your answer in one "\\boxed{}".What is $\\frac{1}{2}$ of '
        "it?\nChoices: A. $\\frac{1}{4}$\nB. $\\frac{1}{3}$\nC. $\\sqrt{2}$\nD. 1\n" + MATHVISION,
        "<image>What is $\\frac{1}{2}$ of it?\nA. $\\frac{1}{4}$\nB. $\\frac{1}{3}$\nC. $\\sqrt{2}$\nD. 1",
    ),
    ("ai2d", 0): (
        "<image>What eats the fox?\nA. grass\nB. hawk\nC. none of them\nD. 2\n" + LETTER,
        "<image>What eats the fox?\nA. grass\nB. hawk\nC. none of them\nD. 2",
    ),
    ("ai2d", 1): (
        "<image>Which letter is the sun?\nA. D\nB. C\nC. B\nD. A\n" + LETTER,
        "<image>Which letter is the sun?\nA. D\nB. C\nC. B\nD. A",
    ),
}

# Rule, new tokens, where answers end, headline
LMMS = {
    "mmmu": ("mmmu", 128, (), "accuracy"),
    "mmbench_en": ("mmbench_static", 1024, ("ASSISTANT:",), "circular"),
    "mmbench_cn": ("mmbench_static", 256, (), "circular"),
    "mmstar": ("mmstar", 128, (), "macro l2_category"),
    "mmt": ("mmt", 8, (), "accuracy"),
    "mathverse": ("strict", 16384, ("</s>", "Q:", "<|im_end|>"), "accuracy"),
    "mathvision": ("mathvision", 16384, (), "accuracy"),
    "ai2d": ("ai2d", 16, (), "accuracy"),
}


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory):
    files = made.write_all(tmp_path_factory.mktemp("benchmarks"))
    return {key: open_benchmark(key[0], path) for key, path in files.items()}


@pytest.mark.parametrize("layout", ("tsv", "parquet"))
@pytest.mark.parametrize("name", made.MAKERS)
def test_prompts(name, layout, benchmarks):
    rows = [position for benchmark, position in PROMPTS if benchmark == name]
    assert len(rows) >= 2
    for position in rows:
        lmms, own = PROMPTS[name, position]
        question = benchmarks[name, layout][position]
        assert task("lmms_default", name).prompt(question) == lmms
        assert task("pvm_reasoning", name).prompt(question) == own + THINK
        assert task("plain", name).prompt(question) == own


def test_system_and_images_of_the_messages(benchmarks):
    question = benchmarks["mmmu", "parquet"][1]
    system, user = task("lmms_default", "mmmu").messages(question)
    assert system == {"role": "system", "content": "You are a helpful assistant."}
    assert [part["type"] for part in user["content"]] == ["image"] * 7 + ["text"]
    assert [made.number_of(part["image"]) for part in user["content"][:7]] == [101, 102, 103, 104, 105, 106, 107]
    (user,) = task("pvm_reasoning", "mmmu").messages(question)
    images = [part["image"] for part in user["content"] if part["type"] == "image"]
    assert user["role"] == "user" and [made.number_of(image) for image in images] == list(range(101, 108))


def test_only_images_that_mmmu_mentions_are_shown():
    question = Question("1", "See <image 3> and <image 1>, <image 3>.", "A", {"A": "x"}, images=(b"1", b"2", b"3"))
    *images, text = task("lmms_default", "mmmu").messages(question)[1]["content"]
    assert [part["image"] for part in images] == [b"1", b"3"] and "See <image 3> and <image 1>" in text["text"]
    unnamed = dataclasses.replace(question, text="See.")
    assert shown(task("lmms_default", "mmmu").messages(unnamed)).startswith("<image><image><image>Question: See.")
    too_many = dataclasses.replace(question, text="<image 4>", index="val_7")
    with pytest.raises(DataError, match="index val_7: <image 4> is named, and there are 3"):
        task("lmms_default", "mmmu").messages(too_many)


@pytest.mark.parametrize(
    ("text", "images", "parts"),
    [
        ("no place", "ab", "ab|no place"),
        ("<image 2> then <image 1>", "ab", "b| then |a"),
        ("<image> and <image>", "ab", "a| and |b"),
        ("<image 2><image>", "abc", "cba"),  # c has no place
        ("<image 1> again <image 1>", "a", "a| again <image 1>"),
        ("<image1> <image2>", "a", "a| <image2>"),
        ("a <image> without one", "", "a <image> without one"),
    ],
)
def test_images_in_place(text, images, parts):
    found = in_place(text, list(images))
    merged = ""
    for before, part in zip([None, *found], found):
        texts = part["type"] == "text"
        merged += "|" if before and (texts or before["type"] == "text") else ""
        merged += part["text"] if texts else part["image"]
    assert merged == parts


def test_tags_in_a_question_are_removed_from_lmms_prompts():
    question = Question("1", "What <image> is it?", "A", {"A": "x", "B": "y"}, images=(b"1",))
    assert task("lmms_default", "ai2d").prompt(question) == f"<image>What  is it?\nA. x\nB. y\n{LETTER}"


def test_settings():
    for name, (rule, tokens, stop, headline) in LMMS.items():
        made_task = task("lmms_default", name)
        assert (made_task.rule, made_task.max_new_tokens, made_task.stop, made_task.headline) == (
            (rule, tokens, stop, headline)
        )
        assert (made_task.sampling, made_task.seeds) == (Sampling(), (0,))
        assert (made_task.min_pixels, made_task.max_pixels) == (200_704, 1_605_632)
        reasoning = task("pvm_reasoning", name)
        assert (reasoning.rule, reasoning.max_new_tokens, reasoning.seeds) == ("strict", 16_384, (0, 1, 2, 3))
        assert (reasoning.sampling, reasoning.system) == (Sampling(temperature=0.7), "")
    assert task("pvm_reasoning", "mathverse").headline == "vision"
    assert task("plain", "file").sampling == Sampling()


def test_the_instruction_is_that_of_training():
    assert configs.grpo.INSTRUCTION == INSTRUCTION


@pytest.mark.parametrize("protocol", VERSIONS)
def test_about_is_json_and_whole(protocol):
    about = json.loads(json.dumps(task(protocol, "mmstar").about()))
    assert about["version"] == VERSIONS[protocol] == 1
    assert {"protocol", "benchmark", "template", "rule", "max_new_tokens", "sampling", "seeds", "min_pixels"} <= set(
        about
    )
    assert bool(about["unknown_of_the_paper"]) == (protocol == "pvm_reasoning")
    assert ("{question}" in about["template"]) and about["sampling"]["top_p"] == 1.0


# ---- Verdicts ------------------------------------------------------------------------------------------------------

CHOICE = Question("1", "?", "B", {"A": "cat", "B": "dog", "C": "hen"})


@pytest.mark.parametrize("protocol", VERSIONS)
@pytest.mark.parametrize("name", made.MAKERS)
def test_letters_with_and_without_tags(name, protocol):
    judged = task(protocol, name)
    for completion in ("B", "B.", "<think>A?</think><answer>B</answer>"):
        assert (judged.verdict(CHOICE, completion).answer, judged.verdict(CHOICE, completion).right) == ("B", True)
    assert judged.verdict(CHOICE, "A").right is False
    empty = judged.verdict(CHOICE, "<think>It may be B")
    assert (empty.answer, empty.right) == (None, False)


def test_any_of_several_answers_is_right():
    question = Question("1", "?", "24/7", fields={"answers": '["24/7", "3.43"]'})
    judged = task("pvm_reasoning", "mmmu")
    assert [judged.verdict(question, f"<answer>{x}</answer>").right for x in ("24/7", "3.43", "5")] == [
        True,
        True,
        False,
    ]


def test_an_answer_ends_where_the_toolkit_ends_it():
    assert task("lmms_default", "mathverse").verdict(CHOICE, "B\nQ: next? C").answer == "B"
    assert task("lmms_default", "mmbench_en").verdict(CHOICE, "B ASSISTANT: C").answer == "B"


def test_a_random_letter_only_when_asked_for():
    judged = task("lmms_default", "mmmu")
    lot = task("lmms_default", "mmmu", random_seed=1)
    assert judged.verdict(CHOICE, "no idea").answer is None
    questions = [dataclasses.replace(CHOICE, index=str(i)) for i in range(40)]
    drawn = [lot.verdict(question, "no idea") for question in questions]
    assert {verdict.answer for verdict in drawn} == {"A", "B", "C"}
    assert all(verdict.right == (verdict.answer == "B") for verdict in drawn)
    assert drawn == [lot.verdict(question, "no idea") for question in questions]
    assert lot.verdict(CHOICE, "A").answer == "A" and lot.about()["random_seed"] == 1


def test_unknown_names():
    for call, sentence in (
        (lambda: task("lmms", "mmmu"), "protocol 'lmms' is not known; there are|did you mean"),
        (lambda: task("pvm_reason", "mmmu"), "did you mean pvm_reasoning"),
        (lambda: task("plain", "mathvers"), "benchmark 'mathvers' is not known; did you mean mathverse"),
        (lambda: task("lmms_default", "file"), "no prompt for other files; take 'plain' or 'pvm_reasoning'"),
    ):
        with pytest.raises(ResultError, match=sentence):
            call()


def test_an_answer_that_the_grader_is_lost_on_says_so():
    """It counts as wrong, and may be right. One that needs no algebra does not mention it."""

    def lost(given, gold):
        return [grading.Verdict(False, "timeout") for _ in given]

    judged, question = task("plain", "file"), Question("1", "?", "x^2+x")
    assert judged.verdict(question, "x(x+1)", lost) == Verdict("x(x+1)", False, "timeout")
    assert judged.verdict(question, "x^2+x", lost) == Verdict("x^2+x", True)
    several = dataclasses.replace(question, fields={"answers": json.dumps(["x^2+x", "x(x+1)"])})
    assert judged.verdict(several, "x(x+1)", lost) == Verdict("x(x+1)", True), "another one of the right answers"
    record = asking.make_record("own", judged, asking.Asked(question, None), 0, "x(x+1)", grade=lost)
    assert (record.right, record.ungraded) == (False, "timeout")
