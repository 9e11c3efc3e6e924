"""Answers are compared, graded in a child that may hang or die, and turned into rewards; no text can end a run."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny

from pvm_jax import grading, grading_child
from pvm_jax.answers import compare, final_answer, normalized, unboxed
from pvm_jax.grading import Grader, GradingError, Verdict
from pvm_jax.training import rewards
from pvm_jax.training.rewards import Rewards, accuracy_reward, format_reward
from pvm_jax.training.stage import TrainingError

CHILD = Path(grading_child.__file__)

# A child whose mathruler does what it is told; everything else is the real program.
OBEDIENT = f"""
import os, runpy, sys, time, types

def grade_answer(given, gold):
    if given == "sleep":
        time.sleep(60)
    if given == "wait":
        time.sleep(0.4)
    if given == "spin":
        while True:
            pass
    if given == "power":
        9 ** (9 ** int("9"))
    if given == "exit":
        os._exit(3)
    if given == "raise":
        raise RecursionError
    if given == "allocate":
        bytearray(2**31)
    if given == "write":
        open(gold, "w")
    if given == "start":
        os.system("true")
    if given == "forge":
        print('{{"equal": true}}', flush=True)
    return given in ("right", "allocate", "write", "start")

sys.modules["mathruler"] = types.ModuleType("mathruler")
sys.modules["mathruler.grader"] = types.SimpleNamespace(grade_answer=grade_answer)
runpy.run_path({str(CHILD)!r}, run_name="__main__")
"""


def idle_child(grader: Grader) -> grading._Child:
    """The child that the next answer would go to."""
    child = grader._children.get(timeout=10)
    grader._children.put(child)
    return child


@pytest.fixture
def obedient(tmp_path, monkeypatch):
    """Makes graders whose children run `OBEDIENT`, and closes them."""
    program, graders = tmp_path / "obedient.py", []
    program.write_text(OBEDIENT)
    monkeypatch.setattr(grading, "_PROGRAM", program)

    def make(**options) -> Grader:
        graders.append(Grader(**options))
        return graders[-1]

    yield make
    for grader in graders:
        grader.close()


def message(text: str) -> list:
    return [{"role": "assistant", "content": text}]


def answered(answer: str) -> str:
    return f"<think>so</think>\n<answer>{answer}</answer>"


# ---- answers -------------------------------------------------------------------------------------------------------


def test_the_final_answer():
    assert final_answer("<think>a</think><answer> 12 </answer>") == "12"
    assert final_answer("<think><answer>5</answer>? no</think><answer>6</answer>\n") == "6"  # the last, not the first
    assert final_answer("<answer></answer>") == ""
    assert [final_answer(text) for text in ("12", "<answer>12", "12</answer>", "</answer>12<answer>")] == [None] * 4
    assert unboxed(r"so $\boxed{\frac{1}{2}}$") == r"\frac{1}{2}"
    assert unboxed(r"\boxed{1} or \boxed{2}") == "2"
    assert unboxed(r" \boxed{1 ") == r"\boxed{1"


@pytest.mark.parametrize(
    "given, gold, same",
    [
        ("B.", "B", True),  # mathruler alone: False
        ("(b)", "B", True),
        ("Option B", "B", True),
        ("B. 12 cm", "B", True),
        ("B", "(B) 12 cm", True),
        ("C", "B", False),
        ("A. and C.", "A", None),
        ("50%", "0.5", True),  # mathruler alone: False
        ("50", r"50\%", True),
        ("50%", "5", False),
        ("12 cm", "0.12 m", True),
        ("12 cm", "12 m", False),  # math-verify: True
        ("12 cm^2", "12 cm", False),
        (r"12\,\text{cm}^{2}", "12 square centimeters", True),
        ("12 cm", "12", True),
        ("3 m", "3", None),  # metres, or three times m
        (r"90^\circ", "90", True),
        ("90°", r"$90^{\circ}$.", True),
        ("1,000", "1000.0", True),
        ("1,00", "100", None),
        (r"1.2\times 10^{3}", "1200", True),
        ("-3", "−3", True),
        ("$5", "5", True),
        ("3.14", "3.1416", False),
        (r"\frac{3}{4}", "3/5", False),
        ("2/4", "1/2", None),  # the grader decides how strict to be
        (r"\dfrac{1}{2}", r"\frac{1}{2}", True),
        ("Cat.", "cat", True),
        ("x+1", "1+x", None),
        ("1/0", "0", None),
        ("", "", False),
    ],
)
def test_comparisons_without_algebra(given, gold, same):
    assert compare(normalized(given), normalized(gold)) is same
    assert compare(normalized(gold), normalized(given)) is same


# ---- the grading child ---------------------------------------------------------------------------------------------


def test_rules_start_no_child(obedient):
    grader = obedient(children=1)
    verdicts = grader.grade(["B.", None, "x" * 257, "7", ""], ["B", "1", "1", "8", "1"])
    assert verdicts == [
        Verdict(True, "rule"),
        Verdict(False, "missing"),
        Verdict(False, "unparsable"),
        Verdict(False, "rule"),
        Verdict(False, "unparsable"),
    ]
    assert idle_child(grader).process is None


def test_a_lost_child_costs_one_answer(obedient, tmp_path):
    """Whatever happens to a pair, those around it are graded, by a new child if need be."""
    grader = obedient(children=1, seconds=0.5)
    given = ["right", "exit", "$right$.", "spin", "right  ", "raise", "wrong", "forge", "allocate", "write", "start"]
    start = time.monotonic()
    verdicts = grader.grade(given, ["x+1"] * 9 + [str(tmp_path / "written"), "x+1"])
    assert [tuple(verdict) for verdict in verdicts] == [
        (True, "algebra"),
        (False, "crash"),
        (True, "algebra"),  # what the child gets is normalized
        (False, "timeout"),
        (True, "algebra"),
        (False, "unparsable"),
        (False, "algebra"),
        (False, "algebra"),  # printing is not replying
        (False, "unparsable"),  # no memory
        (False, "unparsable"),  # no files
        (False, "unparsable"),  # no programs
    ]
    assert not (tmp_path / "written").exists()
    assert time.monotonic() - start < 30


def test_a_child_that_sleeps_is_killed_and_one_that_is_kept_waiting_is_not(obedient):
    grader = obedient(children=1, seconds=0.2)
    start = time.monotonic()
    assert grader.grade(["wait", "sleep", "right"], ["x"] * 3) == [
        Verdict(False, "algebra"),
        Verdict(False, "timeout"),
        Verdict(True, "algebra"),
    ]
    assert time.monotonic() - start < 30


def test_cpu_time_ends_what_python_cannot_interrupt():
    """The number is computed in C: no signal handler, thread or alarm of Python's would get a turn."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", OBEDIENT, "0.2", str(2**30)],
        input='["power", "x"]\n',
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == '{"ready": true}\n' and done.returncode == -signal.SIGPROF


def test_the_child_inherits_nothing(obedient, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    grader = obedient(children=1, memory=2**29)
    with open(tmp_path / "open", "w") as file:
        os.set_inheritable(file.fileno(), True)
        grader.grade(["right"], ["x"])
        process = Path(f"/proc/{idle_child(grader).process.pid}")
        assert os.getsid(int(process.name)) != os.getsid(0)  # Ctrl-C is not for it
        files = [os.readlink(link) for link in (process / "fd").iterdir()]
        assert all(re.match(r"pipe:|/dev/null", name) for name in files), files
    assert b"secret" not in (process / "environ").read_bytes()
    assert re.search(rf"Max address space +{2**29} +{2**29} ", (process / "limits").read_text())
    assert re.search(r"Max file size +0 +0 ", (process / "limits").read_text())
    assert (process / "cwd").resolve() == Path("/")


def test_it_ends_with_its_parent_and_is_replaced_when_killed(obedient):
    grader = obedient(children=1)
    grader.grade(["right"], ["x"])
    child = idle_child(grader)
    child.process.kill()  # by the kernel, for memory, say
    child.process.wait()
    assert grader.grade(["right"], ["x"]) == [Verdict(True, "algebra")]  # nobody's answer was lost
    child.process.stdin.close()  # what the end of this process would do
    assert child.process.wait(30) == 0


def test_many_answers_few_children_equal_pairs_once(obedient):
    grader = obedient(children=2)
    given = [f"{i} wrong" for i in range(40)] + ["right"] * 40
    verdicts = grader.grade(given, ["x"] * 80)
    assert [verdict.correct for verdict in verdicts] == [False] * 40 + [True] * 40
    children = [grader._children.get(timeout=10) for _ in range(2)]
    for child in children:
        grader._children.put(child)
    assert sum(child.pairs for child in children) == 41


def test_a_child_is_renewed(obedient, monkeypatch):
    monkeypatch.setattr(grading, "_RENEWED_AFTER", 2)
    grader = obedient(children=1)
    assert all(v.correct for v in grader.grade(["right", "right ", "right  "], ["x", "y", "z"]))
    assert idle_child(grader).pairs == 1


def test_no_grader_is_one_sentence(tmp_path, monkeypatch):
    absent = tmp_path / "absent.py"
    absent.write_text(
        f"import runpy, sys\nsys.modules['mathruler'] = None\nrunpy.run_path({str(CHILD)!r}, run_name='__main__')\n"
    )
    monkeypatch.setattr(grading, "_PROGRAM", absent)
    with pytest.raises(GradingError, match=r"needs mathruler .*; run: pip install -e '\.\[grade\]'"):
        Grader(children=1).grade(["x+1"], ["1+x"])
    absent.write_text("raise SystemExit(1)\n")
    with pytest.raises(GradingError, match="could not start within 120 s and 1024 MiB \\(crash\\); to see why, run"):
        Grader(children=1).grade(["x+1"], ["1+x"])


# ---- rewards -------------------------------------------------------------------------------------------------------

WELL_FORMED = re.compile(r"^<think>.*?</think>\s*<answer>.*?</answer>\s*$", re.DOTALL)  # the release's


def test_format_reward_is_the_release_s_expression():
    tags = ["<think>", "</think>", "<answer>", "</answer>", "x", "\n"]
    rng = np.random.default_rng(0)
    texts = [
        "<think>a</think><answer>b</answer>",
        "<think></think> \n <answer></answer>\n",
        "",
        "</think><answer></answer>",
    ]
    texts += [
        "<think></think><answer></answer",
        " <think></think><answer></answer>",
        "<think></think><answer></answer>.",
    ]
    texts += ["".join(rng.choice(tags, size)) for size in rng.integers(3, 9, 6000)]
    expected = [float(WELL_FORMED.match(text) is not None) for text in texts]
    assert format_reward([message(text) for text in texts]) == expected
    assert expected[:7] == [1, 1, 0, 0, 0, 0, 0] and sum(expected) > 5
    assert format_reward(["<think>a</think><answer>b</answer>"]) == [1.0]  # a string is a completion too


def test_format_reward_takes_linear_time():
    hostile = "<think>" + "</think><answer>" * 30_000 + "</answer>" * 30_000 + "."
    start = time.monotonic()
    assert format_reward([message(hostile), message("<think>" + "</think> " * 100_000)]) == [0.0, 0.0]
    assert time.monotonic() - start < 5


def test_accuracy_reward(monkeypatch):
    pytest.importorskip("mathruler")
    monkeypatch.setattr(rewards, "_GRADER", grader := Grader(children=1, seconds=15.0))
    given = ["1+x", r"\frac{x}{2}", r"\sqrt{8}", "(1, 2)", "2/4", "x+2"]
    gold = ["x+1", "0.5x", r"2\sqrt{2}", "(1,2)", "1/2", "x+1"]
    logged = {}
    found = accuracy_reward([message(answered(a)) for a in given], solution=gold, log_metric=logged.__setitem__)
    grader.close()
    assert found == [1, 1, 1, 1, 0, 0]  # an unreduced fraction is wrong, as in the release
    assert logged == {"graded/" + r: 0.0 for r in grading.REASONS} | {"graded/algebra": 5 / 6, "graded/rule": 1 / 6}
    assert accuracy_reward(["12", answered("12")], solution=["12", "12"]) == [0, 1]


HOSTILE = {
    "a tower of powers": "9**9**9",
    "with carets": "9^9^9",
    "20,000 brackets": "(" * 20_000,
    "200 brackets": "(" * 200,
    "a shell command": "__import__('os').system('touch {}')",
    "a megabyte of digits": "7" * 2**20,
    "250 digits": "7" * 250,
    "a megabyte of boxes": r"\boxed{" * 2**17,
    "unpaired LaTeX": r"\frac{1}{ \left( \sqrt{ $ \begin{array}",
    "half a surrogate pair": "\ud83d 2 \udc00",
    "no characters that print": "\0\x1b[2J\u202e\ufeff",
    "a factorial": "9!!!!!!",
    "a division by zero": "1/0",
    "nothing": "",
    "more tags": "</answer><answer>" * 1000,
}


def test_hostile_completions_are_zero_in_bounded_time(tmp_path, monkeypatch):
    pytest.importorskip("mathruler")
    monkeypatch.setattr(rewards, "_GRADER", grader := Grader(children=1, seconds=2.0))
    special = list(tiny.SPECIAL_TOKENS)
    texts = [answered(text.format(tmp_path / "owned") if "touch" in text else text) for text in HOSTILE.values()]
    texts += [answered(token) for token in special] + list(HOSTILE.values()) + special
    columns = {"solution": ["2.5x"] * len(texts)}
    scores = Rewards([(accuracy_reward, 0.9)])(texts, columns, ids=[str(i) for i in range(len(texts))])
    start = time.monotonic()
    format_reward(texts)
    assert time.monotonic() - start < 5
    assert scores.total.tolist() == [0.0] * len(texts)
    timeouts, calls = scores.metrics["graded/timeout"]
    assert calls == 1 and timeouts * len(texts) > 0.9  # the tower at least
    assert not (tmp_path / "owned").exists()
    assert accuracy_reward([answered("x*5/2")], solution=["2.5x"]) == [1.0]  # and the grader goes on
    grader.close()


# ---- reward functions of the user's --------------------------------------------------------------------------------

IDS = ["rows.jsonl:3", "rows.jsonl:4", "rows.jsonl:5"]
TEXTS = ["a", "bb", "ccc"]


def length(completions, **columns):
    return [len(completion[0]["content"]) for completion in completions]


def test_functions_get_what_trl_gives_them():
    seen = {}

    def everything(completions, prompts, completion_ids, solution, trainer_state, log_metric, log_extra, **columns):
        seen.update(columns, prompts=prompts, ids=completion_ids, solution=solution, step=trainer_state.global_step)
        log_metric("mine", 0.5)
        log_extra("seen", [len(c) for c in completions])
        return [None, True, np.float32(2)]

    def named_only(completions, solution):
        return np.ones(3)

    columns = {"solution": ["1", "2", "3"], "knowledge points": [[], [], ["a"]], "prompts": ["not", "these", "!"]}
    functions = [(everything, 0.5), ("test_rewards:length", 0.1), (named_only, 1)]
    scores = Rewards(functions)(
        TEXTS, columns, ids=IDS, prompts=["p", "q", "r"], completion_ids=[[1], [2], [3]], step=7
    )
    assert seen == {
        "prompts": ["p", "q", "r"],
        "ids": [[1], [2], [3]],
        "solution": ["1", "2", "3"],
        "knowledge points": [[], [], ["a"]],
        "step": 7,
    }
    np.testing.assert_allclose(scores.total, [0.1 + 1, 0.5 + 0.2 + 1, 1 + 0.3 + 1])
    np.testing.assert_array_equal(scores.by_function["everything"], [math.nan, 1, 2])
    assert scores.metrics == {
        "reward/everything": (3.0, 2),  # no opinion is no zero
        "reward/length": (6.0, 3),
        "reward/named_only": (3.0, 3),
        "reward_errors/everything": (0, 3),
        "reward_errors/length": (0, 3),
        "reward_errors/named_only": (0, 3),
        "mine": (0.5, 1),
    }
    assert scores.extras == {"seen": [1, 1, 1]}


def raises(completions, **columns):
    return [1 / (len(c[0]["content"]) - 2) for c in completions]


def leaves(completions, **columns):
    for completion in completions:
        if completion[0]["content"] == "bb":
            sys.exit(0)  # what a completion may do that is evaluated
    return [1.0] * len(completions)


def together(completions, **columns):
    if len(completions) > 1:
        raise KeyError("all")
    return [1.0]


# function, sentence of on_error="error", values and number of failed rows of on_error="zero"
FAULTY = {
    "raises": (raises, "raises raised ZeroDivisionError (division by zero) on row rows.jsonl:4", [-1, 0, 1], 1),
    "raises for all rows only": (
        together,
        "together raised KeyError ('all') on all rows together and on none of them alone (rows rows.jsonl:3 to rows",
        [0, 0, 0],
        3,
    ),
    "too short": (
        lambda **c: [1.0],
        "returned 1 rewards for 3 completions (rows rows.jsonl:3 to rows.jsonl:5)",
        [0] * 3,
        3,
    ),
    "nan": (lambda **c: [1, math.nan, 2], "returned nan for row rows.jsonl:4; expected a finite number", [1, 0, 2], 1),
    "infinite": (lambda **c: [1, 2, math.inf], "returned inf for row rows.jsonl:5", [1, 2, 0], 1),
    "beyond float32": (lambda **c: [1, 2, 1e39], "returned 1e+39 for row rows.jsonl:5", [1, 2, 0], 1),
    "beyond all floats": (lambda **c: [1, 10**5000, 3], "returned an integer beyond float32 for row", [1, 0, 3], 1),
    "the end of Python": (leaves, "leaves raised SystemExit (0) on row rows.jsonl:4", [1, 0, 1], 1),
    "a string": (lambda **c: ["1", 2, 3], "returned '1' for row rows.jsonl:3", [0, 2, 3], 1),
    "a number": (lambda **c: 1.0, "returned 1.0; expected a list of 3 numbers", [0] * 3, 3),
    "nothing": (lambda **c: None, "returned a NoneType; expected a list of 3 numbers", [0] * 3, 3),
    "an array without rows": (lambda **c: np.array(1.0), "returned 1.0; expected a list", [0] * 3, 3),
    "a matrix": (lambda **c: np.ones((3, 2)), "returned a list for row rows.jsonl:3", [0] * 3, 3),
}


@pytest.mark.parametrize("name", FAULTY)
def test_a_faulty_function(name):
    function, sentence, values, failed = FAULTY[name]
    with pytest.raises(TrainingError, match=re.escape(sentence) + r".*; correct it, or count such rows as 0 with"):
        Rewards([(function, 1.0)])(TEXTS, {}, ids=IDS)
    scores = Rewards([(function, 1.0)], on_error="zero")(TEXTS, {}, ids=IDS)
    assert scores.total.tolist() == values
    assert scores.metrics[f"reward_errors/{function.__name__}"] == (failed, 3)


def test_what_a_function_logged_before_it_raised_does_not_count():
    """It is asked again row by row, and logs again."""

    def logs(completions, log_metric, log_extra, **columns):
        log_metric("mine", 1.0)
        log_extra("seen", [completion[0]["content"] for completion in completions])
        return raises(completions)

    scores = Rewards([(logs, 1.0)], on_error="zero")(TEXTS, {}, ids=IDS)
    assert scores.metrics["mine"] == (3.0, 3) and scores.extras == {"seen": TEXTS}


def test_a_missing_column_always_ends_the_run():
    expected = (
        "the reward function accuracy_reward needs solution, and the rows have answer, completion_ids, completions"
    )
    with pytest.raises(TrainingError, match=expected):
        Rewards([(accuracy_reward, 1.0)], on_error="zero")(TEXTS, {"answer": TEXTS}, ids=IDS)


def test_a_module_that_is_there_and_imports_what_is_not_is_no_wrong_name(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("import not_installed\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="No module named 'not_installed'"):
        Rewards([("my_rewards:short", 1.0)])


@pytest.mark.parametrize(
    "functions, options, sentence",
    [
        ([], {}, "expected pairs of a function"),
        ([("no.such.module:f", 1.0)], {}, "rewards: expected a Python module, got 'no.such.module' "),
        ([("pvm_jax.training.rewards:f", 1.0)], {}, "'pvm_jax.training.rewards' has no function 'f'"),
        ([("accuracy_reward", 1.0)], {}, "expected 'module:function', got 'accuracy_reward'"),
        (
            ("test_rewards:length", 1.0),
            {},
            r"such as \(\('module:function', 1.0\),\), got \('test_rewards:length', 1.0\)",
        ),
        ([(length, 1.0, 2.0)], {}, "rewards: expected pairs such as"),
        ([(length, math.nan)], {}, "expected a finite weight for length, got nan"),
        ([(length, 1.0), ("test_rewards:length", 1.0)], {}, "two functions are called 'length'"),
        ([(length, 1.0)], {"on_error": "skip"}, "reward_errors: expected one of error, zero; got 'skip'"),
    ],
)
def test_a_configuration_that_cannot_be(functions, options, sentence):
    with pytest.raises(TrainingError, match=sentence):
        Rewards(functions, **options)


def test_a_function_that_hangs_is_named(monkeypatch, caplog):
    monkeypatch.setattr(rewards, "_PATIENCE", 0.05)

    def slow(completions, **columns):
        time.sleep(0.5)
        return [1.0] * len(completions)

    with caplog.at_level("WARNING"):
        Rewards([(length, 1.0), (slow, 1.0)])(TEXTS, {}, ids=IDS)  # the first is done in time
    assert [record.getMessage() for record in caplog.records] == ["the reward function slow has been running for 0 s"]
