r"""What lmms-eval's tasks (commit 75571cf, August 2026) take for the answer, benchmark by benchmark.

For scores that are to be compared with that toolkit's. The rules are written from its behaviour, odd parts included,
with three deliberate differences:

* Nothing is drawn by lot. Where the toolkit draws a letter (MMMU, MMT) or asks a model (MMBench), the answer is None.
* Thinking and tags are gone before a rule sees the text (`extract.final_text`).
* MMMU's open questions are compared as that benchmark's authors do. The toolkit hands over only one of the candidates,
  as a string whose characters are then compared one by one, so that none of these questions can be right.

    mmmu            "(B)"; else "B" before a space; else "B."; else an option's text in more than 5 words. Of several
                    letters the one whose last "(B)", or " B ", comes last. Open questions: any candidate
    mmt             the same without texts; " B " needs both spaces, and decides between several of any form
    mmstar          letters A to D in many forms, the best form wins: first, last, after "the answer is", "(B)", "B.",
                    "B:", "B)", "B "; any B at all. Of several in one form the last
    mmbench         the only letter among the words, bare or with marks; else the only option whose text occurs
    mmbench_static  the same, else mmstar's rule: the toolkit's tasks of that name
    ai2d            "B." at the start, else the whole text without marks
    mathvision      the box, or what follows "the answer is", equal to the letter or to the option's text
"""

import re
import string
from collections.abc import Callable, Sequence

from pvm_jax.answers import unboxed
from pvm_jax.evals import free_answers
from pvm_jax.evals.free_answers import Grade
from pvm_jax.evals.questions import Question, Verdict

_ENDS = ",.!?;:'"  # taken off both ends one kind after the other, as the toolkit does
_LONG = 5  # words: in shorter texts MMMU's rule does not look for options' texts


def mmmu(question: Question, text: str, grade: Grade | None = None) -> Verdict:
    if not question.options:
        return _mmmu_open(question, text)
    text = _padded(text, _ENDS)
    letters = list(question.options)
    for form in ("({})", "{} ", "{}."):
        if found := [letter for letter in letters if form.format(letter) in text]:
            decisive = form if form == "({})" else " {} "
            return _judged(question, _last(found, lambda x, form=decisive: text.rfind(form.format(x))))
    if len(text.split()) > _LONG:
        lower = text.lower()
        texts = {letter: option.lower() for letter, option in question.options.items()}
        if found := [letter for letter in letters if texts[letter] in lower]:
            return _judged(question, _last(found, lambda x: lower.rfind(texts[x])))
    return Verdict(None, False)


def mmt(question: Question, text: str, grade: Grade | None = None) -> Verdict:
    text = _padded(text.strip(), _ENDS)
    for form in ("({})", " {} ", "{}."):
        if found := [letter for letter in question.options if form.format(letter) in text]:
            return _judged(question, _last(found, lambda x: text.rfind(f" {x} ")))
    return Verdict(None, False)


def mmstar(question: Question, text: str, grade: Grade | None = None) -> Verdict:
    return _judged(question, _best_form(text, "ABCD"))


def mmbench(question: Question, text: str, grade: Grade | None = None) -> Verdict:
    return _judged(question, _only_letter(text) or _only_text(question, text))


def mmbench_static(question: Question, text: str, grade: Grade | None = None) -> Verdict:
    letter = _only_letter(text) or _only_text(question, text) or _best_form(text, list(question.options))
    return _judged(question, letter)


def ai2d(question: Question, text: str, grade: Grade | None = None) -> Verdict:
    leading = re.match(r"\s*([A-Z])\.", text)
    answer = leading[1] if leading else text.translate(_NO_MARKS).strip().upper()
    return _judged(question, answer)


def _judged(question: Question, letter: str | None) -> Verdict:
    """A letter that is none of the options' is no answer."""
    if letter not in question.options:
        return Verdict(None, False)
    return Verdict(letter, letter == question.answer.strip().upper())


_NO_MARKS = str.maketrans("", "", string.punctuation)


def _padded(text: str, ends: str) -> str:
    for mark in ends:
        text = text.strip(mark)
    return f" {text} "


def _last(letters: Sequence[str], position: Callable[[str], int]) -> str:
    """The letter that stands last; the first of the options if none has a position."""
    return max(letters, key=position)


_CLAIMED = ("answer", "correct answer", "best answer", "correct option", "best option", "choice", "correct choice")
_CLAIMS = (
    *(f"{article}{noun} is" for noun in _CLAIMED for article in ("the ", "")),
    *("i choose", "i select", "i pick", "my answer is", "my choice is"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)
_FORMS = ("({})", "{}.", "{}:", "{})", "{} ")  # from the best to the worst


def _best_form(text: str, letters: Sequence[str]) -> str | None:
    """The rule that the toolkit shares between tasks; of several letters in the best form found, the last."""
    padded = _padded(text.strip(), _ENDS + '"')
    bare = padded.strip()
    if bare[:1] in letters and bare and not bare[1:2].isalpha():
        return bare[0]
    if bare[-1:] in letters and bare and not bare[-2:-1].isalpha():
        return bare[-1]
    lower = padded.lower()
    starts = [at + len(claim) for claim in _CLAIMS if (at := lower.find(claim)) >= 0]
    if found := [(at, x) for start in starts for x in letters if (at := padded.find(x, start)) >= 0]:
        return max(found)[1]
    for form in (*_FORMS, "{}"):
        if found := [(at, x) for x in letters if (at := padded.rfind(form.format(x))) >= 0]:
            return max(found)[1]
    return None


_WORD_FORMS = ("{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).")


def _only_letter(text: str) -> str | None:
    """The only one of A to E among the words: bare, else in the first of several forms in which just one occurs.

    A bare "A" among more than three words may be an article and does not count.
    """
    listed = text.split()
    words = set(listed)
    found = [x for x in "ABCDE" if x in words]
    if len(found) == 1 and (found != ["A"] or len(listed) <= 3):
        return found[0]
    for form in _WORD_FORMS:
        found = [x for x in "ABCDE" if form.format(x) in words]
        if len(found) == 1:
            return found[0]
    return None


def _only_text(question: Question, text: str) -> str | None:
    lower = text.lower()
    found = [letter for letter, option in question.options.items() if option.lower() in lower]
    return found[0] if len(found) == 1 else None


_SAYS = ("the final answer is", "the answer is", "the correct answer is", "the answer should be")


def mathvision(question: Question, text: str, grade: Grade | None = None) -> Verdict:
    answer = _mathvision_answer(text)
    if not answer or len(answer) > free_answers.MAX_CHARACTERS:
        return Verdict(None, False)
    golds = [question.answer]
    if question.options:
        golds.append(question.options.get(question.answer.strip().upper(), ""))
    letter = answer.upper()
    right = any(gold and _close(answer, gold, grade) for gold in golds)
    if letter in question.options:
        return Verdict(letter, right)
    found = right or not question.options or free_answers.number(answer) is not None
    found = found or any(_close(answer, option, grade) for option in question.options.values())
    return Verdict(answer, right) if found else Verdict(None, False)


def _mathvision_answer(text: str) -> str:
    """The box; else what follows the last claim, up to the end of its sentence; else a letter at an end; else all."""
    text = text.strip()
    if letter := _lone_letter(text):
        return letter
    tail = text[text.rfind("is ") + 3 :] if "is " in text else text
    if free_answers.number(tail.rstrip(".")) is not None:
        return tail.rstrip(".")
    if "\\boxed{" in text:
        text = unboxed(text)
    else:
        for says in (form for said in _SAYS for form in (said, said.capitalize())):
            if (at := text.rfind(says)) >= 0:
                text = text[at + len(says) :].strip().split("\n")[0].split(". ")[0]
    text = text.rsplit("=", 1)[-1].rsplit("\\approx", 1)[-1]
    text = re.sub(r"\\(?:text|mbox|mathrm|mathbf)(?=\{)", "", text[: 4 * free_answers.MAX_CHARACTERS])
    for brackets in (r"\(([A-Ea-e])\)", r"\{([A-Ea-e])\}"):
        text = re.sub(brackets, r"\1", text)
    return text.strip().rstrip(".").lstrip(":").strip()


def _lone_letter(text: str) -> str | None:
    """A to E alone in the first line, or as the last word before a full stop."""
    first = text.split("\n", 1)[0]
    if "\n" in text and (found := re.fullmatch(r"\(([A-E])\)(?: \1)?|([A-E])", first)):
        return found[1] or found[2]
    found = re.fullmatch(r" (?:\(([A-E])\)|([A-E]))\.", text[text.rfind(" ") :]) if " " in text else None
    return (found[1] or found[2]) if found else None


def _close(answer: str, gold: str, grade: Grade | None) -> bool:
    """Equal, or equal as numbers after rounding to two decimals."""
    if answer.casefold() == gold.strip().casefold():
        return True
    values = free_answers.number(answer), free_answers.number(gold)
    if None not in values:
        return round(values[0], 2) == round(values[1], 2)
    return free_answers.accepts(gold, answer, grade)


_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBER = re.compile(r"-?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


def _mmmu_open(question: Question, text: str) -> Verdict:
    """Right if any candidate contains, or as a number equals, any accepted answer.

    Candidates are the shortest of what follows the last "is ", "so ", ... of each line, and the numbers in these.
    """
    lines = text.strip().strip(".").lower().split("\n")
    candidates = []
    for i, line in enumerate(lines):
        keys = (*_KEYS, "=") if i == len(lines) - 1 else _KEYS
        tails = [tail for key in keys if key in line and (tail := line.rsplit(key, 1)[1].strip())]
        if tails and (shortest := min(tails, key=len)) not in tuple(":,.!?;'"):
            candidates.append(shortest)
    candidates = candidates or ["\n".join(lines)]
    if not candidates[-1]:
        return Verdict(None, False)
    numbers = {_round(found) for text in candidates for found in _NUMBER.findall(text)}
    numbers |= {_round(text) for text in candidates}
    right = False
    for gold in free_answers.accepted(question.answer):
        value, gold = _round(gold), gold.strip().lower()
        if value is not None:
            right |= value in numbers
        else:
            golds = (f" {gold}", f"{gold} ") if len(gold) == 1 else (gold,)
            right |= any(g in text for g in golds for text in candidates if _round(text) is None)
    return Verdict(candidates[-1][: free_answers.MAX_CHARACTERS], right)


def _round(text: str) -> float | None:
    """The number that a text is, to two decimals."""
    text = text.strip()
    return round(float(text.replace(",", "")), 2) if _NUMBER.fullmatch(text) else None


RULES = {
    "mmmu": mmmu,
    "mmt": mmt,
    "mmstar": mmstar,
    "mmbench": mmbench,
    "mmbench_static": mmbench_static,
    "ai2d": ai2d,
    "mathvision": mathvision,
}
