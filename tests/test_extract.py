"""What completions answer: a table of our own, the toolkits' rules, and texts made to break or to stall a rule."""

import re
import time
from collections import defaultdict
from pathlib import Path

import pytest

from pvm_jax.evals import choices, extract, free_answers
from pvm_jax.evals.extract import RULES, final_text, random_letter, verdict
from pvm_jax.evals.questions import Question, Verdict
from pvm_jax.grading import Grader

TABLE = Path(__file__).parent / "golden" / "answers.tsv"
ANIMALS = {"A": "cat", "B": "dog", "C": "black cat", "D": "horse"}


def read_table() -> dict[str, list[tuple[Question, str, Verdict]]]:
    """Heading -> question, completion, expected verdict."""
    sets, table, heading = {}, defaultdict(list), ""
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if found := re.fullmatch(r"#   (\w+): (.*)", line):
            sets[found[1]] = dict(part.split("=", 1) for part in found[2].split(" | "))
        elif line.startswith("## "):
            heading = line[3:]
        elif not line.startswith("#"):
            options, gold, answer, right, completion = line.split("\t")
            question = Question("0", "?", gold, {} if options == "open" else sets[options])
            expected = Verdict(None if answer == "-" else answer, {"y": True, "n": False}[right])
            table[heading].append((question, completion.replace("↵", "\n"), expected))
    return table


ROWS = read_table()


@pytest.fixture(scope="module")
def grade():
    grader = Grader(children=1)
    yield grader.grade
    grader.close()


@pytest.mark.parametrize("heading", ROWS)
def test_table(heading, grade):
    wrong = []
    for question, completion, expected in ROWS[heading]:
        found = verdict(question, completion, grade=grade)
        if found != expected:
            wrong.append(f"{completion!r} of {dict(question.options)}: expected {expected}, got {found}")
    assert not wrong, "\n".join(wrong)


def test_table_holds_what_it_should():
    rows = [row for rows in ROWS.values() for row in rows]
    assert len(rows) >= 300 and len({(str(q), text) for q, text, _ in rows}) == len(rows)
    assert sum(not e.right for *_, e in rows) >= 40 and sum(e.answer is None for *_, e in rows) >= 40
    assert sum(bool(re.search("[\u4e00-\u9fff]", text)) for _, text, _ in rows) >= 40
    assert sum(not q.options for q, *_ in rows) >= 60
    assert all(e.answer in q.options for q, _, e in rows if q.options and e.answer is not None)
    assert not [text for _, text, e in rows if e.right and e.answer is None]


@pytest.mark.parametrize("rule", RULES)
def test_tags_change_no_verdict(rule, grade):
    grade = grade if rule == "strict" else None
    for rows in ROWS.values():
        for question, completion, expected in rows:
            plain = expected if rule == "strict" else verdict(question, completion, rule, grade)
            tagged = f"<think>\nIs it A, (B) or 5? The answer is C.\n</think>\n\n<answer>\n{completion}\n</answer>"
            assert verdict(question, tagged, rule, grade) == plain, (rule, completion)


def test_every_rule_keeps_the_contract():
    for rule in RULES:
        for rows in ROWS.values():
            for question, completion, _ in rows:
                found = verdict(question, completion, rule)
                assert isinstance(found, Verdict) and found.answer != "", (rule, completion)
                assert found.answer is not None or not found.right, (rule, completion)
                if rule not in ("mathvision", "exact") and question.options:
                    right = found.answer == question.answer.upper()
                    assert found.answer in (None, *question.options) and found.right == right, (rule, completion)


@pytest.mark.parametrize(
    "completion, text",
    [
        ("<think>A</think> B ", "B"),
        ("A</think>B", "B"),
        ("A<think>B", "A"),
        ("A<think>B</think>C<think>D</think>E", "ACE"),
        ("<think>A<think>B</think>C", "C"),
        ("A</think>B</think>C", "C"),
        ("<think>A<answer>B</answer>\n", "B"),
        ("<think>A<answer>B</answer> or not", ""),
        ("<think>A<answer>B", ""),
        ("<answer>A</answer><answer>B</answer>C", "B"),
        ("<answer>A</answer><answer>B", "B"),
        ("<answer>A<answer>B</answer>C</answer>", "B"),
        ("A</answer>B", "A"),
        ("<Answer>A</ANSWER>", "A"),
        ("", ""),
    ],
)
def test_final_text(completion, text):
    assert final_text(completion) == text


ANIMAL = Question("1", "?", "B", ANIMALS)
LONG = Question("1", "?", "B", {"A": "it fell", "B": "it stood", "C": "it flew"})
MATH = Question("1", "?", "B", {"A": "$12$", "B": "$\\frac{1}{2}$", "C": "3", "D": "4", "E": "5"})
OPEN = Question("1", "?", "['8.40', 'about eight']")
WORD = Question("1", "?", "x")
LETTERED = Question("1", "?", "E", dict(zip("ABCDE", "PQRST", strict=True)))

# rule, question, completion, answer; the odd ones are what the toolkit does, too.
TOOLKITS = [
    ("mmmu", ANIMAL, "(B)", "B"),
    ("mmmu", ANIMAL, "B.", "B"),
    ("mmmu", ANIMAL, "(A) is out, (B) is in", "B"),
    ("mmmu", ANIMAL, "(B) and not A , as all can see", "B"),
    ("mmmu", ANIMAL, "A dog, so B or D it is", "D"),
    ("mmmu", ANIMAL, "MANIA and ANIMA end there", "A"),  # a letter before a space, wherever it stands
    ("mmmu", ANIMAL, "B.dog, C.black cat", "B"),  # of several "X." none is " X ": the first option
    ("mmmu", ANIMAL, "on that sofa there is a dog", "B"),
    ("mmmu", ANIMAL, "it is a dog", None),  # too short for texts
    ("mmmu", ANIMAL, "dog dog dog dog dog and one black cat", "A"),  # "cat" begins last
    ("mmmu", ANIMAL, "", None),
    ("mmmu", ANIMAL, "none of them", None),
    ("mmmu", OPEN, "so the total is 8.4", "8.4"),
    ("mmmu", OPEN, "we find x = 8.4", "8.4"),
    ("mmmu", OPEN, "It is about eight meters", "about eight meters"),
    ("mmmu", OPEN, "8.404", "8.404"),  # two decimals
    ("mmmu", OPEN, "", None),
    ("mmmu", WORD, "it is x squared", "x squared"),
    ("mmt", ANIMAL, "(B)", "B"),
    ("mmt", ANIMAL, "I say B", "B"),
    ("mmt", ANIMAL, "B.", "B"),
    ("mmt", ANIMAL, "B.dog", "B"),
    ("mmt", ANIMAL, "MANIA B", "B"),
    ("mmt", ANIMAL, "(A) or (B) , B then", "B"),
    ("mmt", ANIMAL, "(A) or (B)", "A"),
    ("mmt", ANIMAL, "on that sofa there is a dog", None),
    ("mmstar", ANIMAL, "B", "B"),
    ("mmstar", ANIMAL, "B because of A", "B"),  # first
    ("mmstar", ANIMAL, "(A) was close, but I say B", "B"),  # last
    ("mmstar", ANIMAL, "the answer is (B), seen from (A) far", "A"),  # after the claim the last letter counts
    ("mmstar", ANIMAL, "the answer is B, as seen (from far)", "B"),
    ("mmstar", ANIMAL, "see A. or (B), yes", "B"),
    ("mmstar", ANIMAL, "see A: or B. yes", "B"),
    ("mmstar", ANIMAL, "see B) for it: x", "B"),
    ("mmstar", ANIMAL, "sofaB", "B"),  # any B at all
    ("mmstar", ANIMAL, "答案是B吧", "B"),
    ("mmstar", ANIMAL, "b", None),
    ("mmstar", ANIMAL, "  ", None),
    ("mmbench", ANIMAL, "B", "B"),
    ("mmbench", ANIMAL, "B. dog", "B"),
    ("mmbench", ANIMAL, "The answer is (B).", "B"),
    ("mmbench", ANIMAL, "A dog", "A"),
    ("mmbench", ANIMAL, "A dog on the sofa", "B"),
    ("mmbench", ANIMAL, "A large one it is", None),
    ("mmbench", ANIMAL, "B or C", None),
    ("mmbench", ANIMAL, "a black cat", None),  # which holds "cat"
    ("mmbench", ANIMAL, "E", None),
    ("mmbench", ANIMAL, "**B**", None),
    ("mmbench_static", ANIMAL, "**B**", "B"),
    ("mmbench_static", ANIMAL, "B or C", "B"),
    ("mmbench_static", ANIMAL, "A dog on the sofa", "B"),
    ("mmbench_static", ANIMAL, "nothing", None),
    ("ai2d", ANIMAL, " B. dog", "B"),
    ("ai2d", ANIMAL, "B.", "B"),
    ("ai2d", ANIMAL, "b", "B"),
    ("ai2d", ANIMAL, "(B)", "B"),
    ("ai2d", ANIMAL, "B dog", None),
    ("ai2d", ANIMAL, "The answer is B.", None),
    ("ai2d", ANIMAL, "Z. dog", None),
    ("mathvision", MATH, "\\boxed{A} \\boxed{B}", "B"),
    ("mathvision", MATH, "\\boxed{\\text{(B)}}", "B"),
    ("mathvision", MATH, "\\boxed{b}", "B"),
    ("mathvision", MATH, "\\boxed{x = \\frac{1}{2}}", "\\frac{1}{2}"),
    ("mathvision", MATH, "\\boxed{0.5}", "0.5"),
    ("mathvision", MATH, "\\boxed{0.503}", "0.503"),  # two decimals
    ("mathvision", MATH, "The answer is B. I am sure.", "B"),
    ("mathvision", MATH, "the final answer is 0.5\nor so", "0.5"),
    ("mathvision", MATH, "So it must be (B).", "B"),
    ("mathvision", MATH, "(B)\nsince x is small", "B"),
    ("mathvision", MATH, "the value is 0.5.", "0.5"),
    ("mathvision", MATH, "", None),
    ("mathvision", MATH, "well " * 100, None),
]
WRONG = [
    ("mathvision", MATH, "\\boxed{C}"),
    ("mathvision", MATH, "\\boxed{0.6}"),
    ("mathvision", MATH, "\\boxed{12}"),
    ("mmmu", OPEN, "so the total is 8.5"),
    ("mmmu", OPEN, "84"),
    ("mmmu", WORD, "it is next"),
    ("mmmu", LONG, "I am sure that it flew"),
]


@pytest.mark.parametrize("rule, question, completion, answer", TOOLKITS)
def test_toolkits(rule, question, completion, answer):
    found = verdict(question, completion, rule)
    assert found.answer == answer
    if not question.options or rule == "mathvision":
        assert found.right == (answer is not None)


@pytest.mark.parametrize("rule, question, completion", WRONG)
def test_toolkits_find_wrong_answers_wrong(rule, question, completion):
    found = verdict(question, completion, rule)
    assert found.answer is not None and not found.right


def test_mmstar_knows_four_letters():
    assert verdict(LETTERED, "E", "mmstar").answer is None
    assert verdict(LETTERED, "E", "mmbench") == Verdict("E", True)


def test_algebra_is_the_graders(grade):
    question = Question("1", "?", "x(x+1)")
    assert verdict(question, "x^2+x", grade=grade).right
    assert not verdict(question, "x^2+x").right
    assert verdict(MATH, "\\boxed{2/4}", "mathvision").right, "by value"
    formula = Question("1", "?", "B", {"A": "$x$", "B": "$x^2+x$"})
    assert verdict(formula, "\\boxed{x(x+1)}", grade=grade) == Verdict("B", True)
    assert verdict(formula, "\\boxed{x(x+1)}", "mathvision", grade) == Verdict("x(x+1)", True)

    def refused(given, gold):
        raise AssertionError(f"algebra on words: {given}")

    assert not verdict(Question("1", "?", "cat"), "act", grade=refused).right


@pytest.mark.parametrize(
    "text, value",
    [("-1,234.5", -1234.5), ("2e3", 2000), ("3/4", 0.75), ("-\\frac{3}{4}", -0.75), ("$.5$", 0.5), ("−2", -2)]
    + [(text, None) for text in ("", ".", "-", "1/0", "x", "1,23", "12 cm", "1" * 1000, "1e999", "nan", "inf")],
)
def test_number(text, value):
    assert free_answers.number(text) == value


def test_accepted():
    assert free_answers.accepted("['a', 'b']") == ["a", "b"]
    assert free_answers.accepted("['a', 2]") == ["['a', 2]"]
    assert free_answers.accepted("[1, 2]") == ["[1, 2]"]
    assert free_answers.accepted("['a'" + "(" * 10_000 + "]") == ["['a'" + "(" * 10_000 + "]"]
    assert free_answers.accepted("['a', __import__('os')]") == ["['a', __import__('os')]"]


def test_random_letters_are_only_for_those_who_ask():
    assert random_letter(ANIMAL, 3) == random_letter(ANIMAL, 3) in ANIMALS
    assert {random_letter(ANIMAL, seed) for seed in range(50)} == set(ANIMALS)
    assert len({random_letter(Question(str(i), "?", "B", ANIMALS), 0) for i in range(50)}) == 4
    for rule in RULES:
        assert verdict(ANIMAL, "I have no idea whatsoever", rule).answer is None or rule == "exact"


HOSTILE = ["A ", "(A) ", "A\n", "B. dog", "answer ", "answer is ", "answer to ", "not ", "A is ", "选A", "<think>"]
HOSTILE += [
    "<answer>",
    "</answer>",
    "\\boxed{",
    "}",
    "\ud800",
    " ",
    "\n",
    "**",
    "x = ",
    "so it is 1",
    "1,111,",
    "9" * 50,
]


@pytest.mark.parametrize("piece", HOSTILE)
def test_a_long_text_takes_no_longer_than_its_length(piece):
    """A tenth of a megabyte each; a rule that is quadratic in it takes minutes."""
    text = piece * (100_000 // len(piece))
    start = time.process_time()
    for question in (ANIMAL, OPEN):
        for rule in RULES:
            assert isinstance(verdict(question, text, rule), Verdict)
            verdict(question, f"<answer>{text}", rule)
    assert time.process_time() - start < 20


def test_the_end_of_a_long_text_is_read():
    for question, rules in ((ANIMAL, ("strict", "mmmu", "mmt", "mmstar")), (OPEN, ("strict", "mmmu"))):
        text = "It takes long to say this. " * 20_000 + f"\n\nThe answer is {'B' if question is ANIMAL else 8.4}."
        for rule in rules:
            assert verdict(question, text, rule).right, rule


@pytest.mark.parametrize(
    "module, name, heading",
    [
        (choices, "_DENIED", "denied, several, none, no letter"),
        (choices, "_SUPPOSED", "denied, several, none, no letter"),
        (choices, "_ANOTHER", "denied, several, none, no letter"),
        (choices, "_LISTED_BEFORE", "denied, several, none, no letter"),
        (choices, "_REASON", "conclusions"),
        (choices, "_RIGHT", "conclusions"),
        (choices, "_CHOICE", "Chinese"),
        (choices, "_BOLD", "conclusions"),
        (choices, "_MENTION", "conclusions"),
        (extract, "_THINK", "thinking and tags"),
        (extract, "_ANSWER", "thinking and tags"),
        (free_answers, "_CLAIM", "open"),
        (free_answers, "_THEREFORE", "open"),
        (free_answers, "_HEDGE", "open"),
        (free_answers, "_COUNTED", "open"),
        (free_answers, "_SCALE", "open"),
        (free_answers, "_EQUATION", "open"),
    ],
)
def test_the_table_can_fail(module, name, heading, grade, monkeypatch):
    """Each pattern is needed by some row: without it the table is red."""
    monkeypatch.setattr(module, name, re.compile(r"(?!)"))
    assert any(verdict(q, text, grade=grade) != expected for q, text, expected in ROWS[heading])
