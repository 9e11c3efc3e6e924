r"""Answers to open questions: where a text states them, and whether they are the right ones.

find("So x = 5, and the answer is **5 cm**, since ...")     -> "5 cm"
find("The answer is hard to tell\n" + "hm. " * 100)         -> None
accepts("['0.5', 'one half']", "50%")                      -> True      any of several accepted answers
accepts("5", "about 5 apples")                             -> True
accepts("5", "5 million")                                  -> False
accepts("x+1", "1+x", Grader().grade)                      -> True      algebra, in a child that can be killed
"""

import ast
import re
from collections.abc import Callable, Sequence
from typing import Any

from pvm_jax.answers import compare, normalized
from pvm_jax.grading import MAX_CHARACTERS

Grade = Callable[[Sequence[str | None], Sequence[str]], Sequence[Any]]
"""`grading.Grader().grade`: answers, right ones -> (correct, reason) of each pair."""

_SHORT = 80  # characters: a single line up to here is taken as the answer itself, if it claims nothing
_HEAD, _TAIL = 1_000, 7_000
_MARKUP = re.compile(r"\*\*|__|`|^#+ ")
_CLAIM = re.compile(
    r"(?:\banswer(?: (?:to|for|of)\b[^.:\n]{0,80}?)?[\"']? ?"
    r"(?:is|was|are|would be|should be|must be|will be|equals|:|=)"
    r"|\bans ?[:=]|####"
    r"|答案(?:应该|应当|应)?(?:是|为|:|：)|答[:：]|结果(?:是|为))[ :：]*",
    re.IGNORECASE,
)
_THEREFORE = re.compile(r"(?:\b(?:so|thus|therefore|hence|in conclusion|overall|finally)\b|∴|所以|因此|故|综上)", re.I)
_IS = re.compile(r"(?:(?:\b(?:is|are|was|equals|gives|yields|to be|get|have)\b:?|=|≈|\\approx\b|为|是|等于) ?)(?!$)")
_END = re.compile(
    r"\n|[.!?](?= |$)|[。！？；;]|,? (?:because|since|which|where|due to)\b|, (?:as|so|given|and)\b|[,，] ?因为|，"
)
_DENIED = re.compile(r"(?:not|unclear|unknown|hard|either|neither|probably not|不是|未知)\b|n't\b", re.IGNORECASE)
_HEDGE = re.compile(
    r"(?:(?:approximately|about|around|roughly|nearly|exactly|simply|just|only|approx\.?|equal to|a total of)\b"
    r"|≈|~|\\approx\b|\\sim\b|大约|大概|约) ?:?",
    re.IGNORECASE,
)
_PLAIN = re.compile(r"[-+−]?\$? ?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,40})?(?:\.[0-9]{0,40})?(?:[eE][-+]?[0-9]{1,2})?")
_FRACTION = re.compile(r"(-?)(?:([0-9]{1,40}) ?/ ?([0-9]{1,40})|\\[dt]?frac ?\{([0-9]{1,40})\} ?\{([0-9]{1,40})\})")
_COUNTED = re.compile(r"([-+]?\$?[0-9][0-9,.]*%?)(?: ?[\u4e00-\u9fff]{1,6}| ?[A-Za-z]{2,}[A-Za-z ./²³^]*)")
_SCALE = re.compile(
    r"\b(?:hundred|thousand|million|billion|trillion|dozen|percent|pi|sqrt|times|th|st|nd|rd|or|and|to|half|halves)\b"
    r"|[百千万亿分半至到或和]",
    re.IGNORECASE,
)
_POWER = re.compile(r"^10 ?(?=\^)")
NUMERALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_EQUATION = re.compile(r"([^=≈]{1,80})(?:=|≈|\\approx(?![a-z]))([^=≈]+)")


def find(text: str) -> str | None:
    """What a text says that the answer is; None if it does not say.

    In order: what follows the last "the answer is"; a short line by itself; what follows "is" or "=" in a last sentence
    with "so", "therefore", ...; what follows "=" in the last line.
    """
    text = _MARKUP.sub("", without_middle(text)).strip()
    if not text:
        return None
    claims = [m.end() for m in _CLAIM.finditer(text) if m.end() < len(text)]
    if claims:
        return _clean(_sentence(text[claims[-1] :].lstrip()))
    short = len(text) <= _SHORT and "\n" not in text
    if short and not re.search(r"[.!?。] ?\S", re.sub(r"(?<=[0-9])\.(?=[0-9])|\.\.", "", text)):
        return _clean(text)
    last = text[text.rfind("\n") + 1 :][-4 * MAX_CHARACTERS :].strip()
    sentences = [part for part in re.split(r"(?<=[.。!?]) |(?<=。)", last) if part.strip(" .。")]
    final = sentences[-1] if sentences else ""
    if (states := list(_IS.finditer(final))) and (_THEREFORE.search(final) or "=" in final or "≈" in final):
        return _clean(_sentence(final[states[-1].end() :]))
    return _clean(text) if short else None


def without_middle(text: str) -> str:
    """What a text begins with and what it comes to; all of a text of up to 8,000 characters."""
    return text if len(text) <= _HEAD + _TAIL else f"{text[:_HEAD]}\n\n{text[-_TAIL:]}"


def accepts(gold: str, answer: str, grade: Grade | None = None) -> bool:
    """Whether an answer is (one of) the right one(s): as text, as a number with or without its unit, by algebra.

    Args:
      gold: the right answer, or a list of them written as Python or JSON writes it.
      grade: for pairs that only algebra decides; None: those are wrong.
    """
    open_pairs = []
    for right in accepted(gold):
        for given, wanted in _pairs(answer.replace("π", "\\pi "), right.replace("π", "\\pi ")):
            if len(given) > MAX_CHARACTERS or len(wanted) > MAX_CHARACTERS:
                continue
            same = _same(given, wanted)
            if same:
                return True
            if same is None and (_mathematical(given) or _mathematical(wanted)):
                open_pairs.append((given, wanted))
    if grade is None or not open_pairs:
        return False
    return any(found.correct for found in grade(*map(list, zip(*open_pairs, strict=True))))


def accepted(gold: str) -> list[str]:
    """The answers that count as right: `"['a', 'b']"` holds two, `"[1, 2]"` is one."""
    gold = gold.strip()
    if gold[:2] in ("['", '["') and gold.endswith("]"):
        try:
            items = ast.literal_eval(gold)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return [gold]
        if all(isinstance(item, str) for item in items):
            return items
    return [gold]


def number(text: str) -> float | None:
    r"""The value of `-1,234.5`, `2e3`, `3/4` or `\frac{3}{4}`; None for anything else."""
    text = text[: MAX_CHARACTERS + 1].strip().strip("$").strip()
    if found := _FRACTION.fullmatch(text):
        above, below = (int(found[2] or found[4]), int(found[3] or found[5]))
        return (-1 if found[1] else 1) * above / below if below else None
    if len(text) <= MAX_CHARACTERS and _PLAIN.fullmatch(text) and re.search("[0-9]", text):
        return float(re.sub("[,$ ]", "", text).replace("−", "-"))
    return None


def _sentence(text: str) -> str:
    """Up to the end of the first sentence, or to its reason."""
    part = text[: MAX_CHARACTERS + 1]
    ends = [m.start() for m in _END.finditer(part) if m.start()]
    return part[: ends[0]] if ends else part


def _clean(text: str) -> str | None:
    """Without marks and hedges around it; None if it denies, is empty or too long to be an answer."""
    text = text.strip().strip('*_`"“”').strip().rstrip(".。,，;；!").strip()
    while found := _HEDGE.match(text):
        text = text[found.end() :].strip()
    if len(text) > 2 and text[0] == text[-1] == "$" and "$" not in text[1:-1]:
        text = text[1:-1].strip()
    return None if not text or len(text) > MAX_CHARACTERS or _DENIED.match(text) else text


def _pairs(answer: str, gold: str) -> list[tuple[str, str]]:
    """An answer and the right one, also without a "x =" that only one of them has."""
    pairs = [(answer, gold)]
    left, right = _EQUATION.fullmatch(answer), _EQUATION.fullmatch(gold)
    if left and right and len(left[1].strip()) == len(right[1].strip()) == 1 and left[1].strip() != right[1].strip():
        return []  # x = 2 for y = 2
    if left and not right:
        pairs.append((_HEDGE.sub("", left[2]).strip(" $"), gold))
    if right and not left and len(right[1].strip(" $")) == 1:
        pairs.append((answer, right[2].strip(" $")))
    return pairs


def _same(given: str, gold: str) -> bool | None:
    """Equal, different, or for algebra to say."""
    given, gold = (_POWER.sub(r"1*\g<0>", normalized(text)) for text in (given, gold))
    if (a := _words(given)) is not None and a == _words(gold):
        return True
    if gold.casefold() in ("yes", "no", "true", "false") and re.match(rf"{gold}\b", given, re.IGNORECASE):
        return True
    same = compare(given, gold)
    counted = _COUNTED.fullmatch(given) if same is None and number(gold) is not None else None
    return compare(normalized(counted[1]), gold) if counted and not _SCALE.search(given) else same


def _words(text: str) -> str | None:
    """A text of words and digits in one spelling; None if it holds signs that may be mathematics."""
    text = re.sub(r"(?<=[^\W\d_])[-'’](?=[^\W\d_])", " ", text.casefold())
    text = re.sub(r"[,.!\"“”]+(?= |$)", "", text).strip()
    if re.search(r"[^\w\s]", text):
        return None
    words = text.split()
    if words[:1] in (["a"], ["an"], ["the"]) and len(words) > 1:
        words = words[1:]
    if len(words) == 1 and words[0] in NUMERALS:
        return str(NUMERALS.index(words[0]))
    return " ".join(words) or None


def _mathematical(text: str) -> bool:
    """Algebra takes words for products of letters, "cat" for "act"."""
    return bool(re.search(r"[0-9\\^+*/=√π]", text))
