"""Short final answers: where they stand in a completion, and comparisons that need no algebra.

    final_answer("<think>12 / 4</think><answer>B. 3</answer>")  -> "B. 3"
    compare("B.", "B")          -> True       option letters, with or without brackets, a full stop or their text
    compare("50%", "0.5")       -> True       numbers exactly, percent either way
    compare("12 cm", "0.12 m")  -> True       units are converted; one that is missing is forgiven
    compare("12 cm", "12 m")    -> False
    compare("x+1", "1+x")       -> None       not for this module to decide: see grading.py

Everything here takes time linear in the text, evaluates nothing, and may be given whatever a model wrote.
"""

import dataclasses
import re
from fractions import Fraction

_ANSWER_START, _ANSWER_END = "<answer>", "</answer>"
_BOX = "\\boxed{"

# LaTeX and typography that carry no meaning in a short answer; applied in this order.
_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\left(?![a-z])|\\right(?![a-z])|\\[!,]", ""),
        (r"\\[;: ]|~", " "),
        (r"\\[dt]frac", r"\\frac"),
        (r"\\([%$])", r"\1"),
        (r"\^\s*(\\circ|\{\s*\\circ\s*\})|°", " degrees"),
        (r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r"\1"),
        (r"²", "^2"),
        (r"³", "^3"),
        (r"\s+", " "),
    )
)
_SIGNS = {ord(c): "-" for c in "−–﹣"} | {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # full-width ASCII
_DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))

# A letter in brackets or with a mark behind it, alone or before the option's text.
_OPTION = re.compile(r"(?:(?:option|choice) )?(?:[(\[]([a-j])[)\]][.:]?|([a-j])[.:)]?)", re.IGNORECASE)
_OPTION_AND_TEXT = re.compile(r"(?:\(([A-J])\)[.:]?|([A-J])[.:)]) (\S.*)")
_ANY_OPTION = re.compile(r"\b[A-J]\b")

_DECIMAL = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]*)?"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?) ?\$? ?(?:(?P<decimal>{_DECIMAL})(?: ?(?:e|(?:\\times|\\cdot|\*|×) ?10 ?\^ ?)"
    r"(?P<exponent>\{-?[0-9]{1,3}\}|[-+]?[0-9]{1,3}))?"
    r"|(?P<above>[0-9]+) ?/ ?(?P<below>[0-9]+)|\\frac ?\{(?P<top>-?[0-9]+)\} ?\{(?P<bottom>[0-9]+)\})"
    r" ?(?P<unit>%|[A-Za-z][A-Za-z. ]*)?(?:\^ ?\{?(?P<power>[23])\}?)?"
)

# name: kind, size in the kind's first unit, spellings. A plural "s" is understood.
_UNITS: dict[str, tuple[str, Fraction]] = {}
for _kind, _sizes in {
    "length": {
        "m meter metre": "1",
        "mm millimeter millimetre": "0.001",
        "cm centimeter centimetre": "0.01",
        "dm decimeter decimetre": "0.1",
        "km kilometer kilometre": "1000",
        "in inch inches": "0.0254",
        "ft foot feet": "0.3048",
        "yd yard": "0.9144",
        "mi mile": "1609.344",
    },
    "mass": {"g gram": "1", "mg milligram": "0.001", "kg kilogram": "1000"},
    "time": {"s sec second": "1", "min minute": "60", "h hr hour": "3600", "day": "86400", "week": "604800"},
    "month": {"month": "1", "year": "12"},
    "volume": {"l liter litre": "1", "ml milliliter millilitre": "0.001"},
    "angle": {"degree deg": "1"},
    "money": {"dollar usd": "1"},
    "unit": {"unit": "1"},
}.items():
    for _names, _size in _sizes.items():
        for _name in _names.split():
            _UNITS[_name] = _UNITS[_name + "s"] = _kind, Fraction(_size)


def final_answer(completion: str) -> str | None:
    """The text of the last `<answer>...</answer>`, stripped; None if there is none."""
    end = completion.rfind(_ANSWER_END)
    start = completion.rfind(_ANSWER_START, 0, max(end, 0))
    return completion[start + len(_ANSWER_START) : end].strip() if start >= 0 else None


def unboxed(text: str) -> str:
    r"""What the last `\boxed{...}` holds; the text itself if there is none, or its braces do not match."""
    start = text.rfind(_BOX)
    depth = 0
    for brace in re.finditer(r"[{}]", text[start:]) if start >= 0 else ():
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            return text[start + len(_BOX) : start + brace.start()].strip()
    return text.strip()


def normalized(text: str) -> str:
    r"""The answer without box, dollar signs around it, LaTeX for upright text, empty space and a full stop.

    >>> normalized("$\\boxed{ 12\\,\\text{cm}^2 }$.")
    '12cm^2'
    """
    text = unboxed(text.strip()).translate(_SIGNS)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = text.strip().rstrip(".。 ")
    for before, after in _DELIMITERS:
        inner = text[len(before) : -len(after)]
        if text.startswith(before) and text.endswith(after) and inner and before not in inner:
            return inner.strip().rstrip(".。 ")
    return text


def compare(given: str, gold: str) -> bool | None:
    """Whether two answers, both `normalized`, are the same; None if that takes algebra.

    True only if they are alike as text, option or quantity; False only if both are options, or both quantities.
    """
    if _key(given) == _key(gold):
        return bool(given)
    options = _option(given), _option(gold)
    if None not in options:
        return options[0] == options[1]
    quantities = _quantity(given), _quantity(gold)
    if None not in quantities:
        return quantities[0].equals(quantities[1])
    return None


@dataclasses.dataclass(frozen=True)
class _Quantity:
    value: Fraction  # of what is written: 50 for 50 %
    fraction: bool  # written as a fraction
    unit: str = ""  # "%" or a key of _UNITS
    power: int = 1

    def equals(self, other: "_Quantity") -> bool | None:
        values = [self.value, other.value]
        if self.unit and other.unit and "%" not in (self.unit, other.unit):
            (kind, size), (other_kind, other_size) = _UNITS[self.unit], _UNITS[other.unit]
            if (kind, self.power) != (other_kind, other.power):
                return False
            values = [self.value * size**self.power, other.value * other_size**other.power]
        elif self.unit != other.unit:
            lone = self.unit or other.unit
            if len(lone) == 1 and lone != "%":
                return None  # 3 m may be metres, or three times m
            if lone == "%" and values[0] != values[1]:
                values = [q.value / 100 if q.unit == "%" else q.value for q in (self, other)]
        if values[0] == values[1] and (self.fraction or other.fraction):
            return None  # 2/4 for 1/2: how strict to be with fractions is the grader's to say
        return values[0] == values[1]


def _key(text: str) -> str:
    return "".join(text.casefold().split())


def _option(text: str) -> str | None:
    """The letter of an answer that names an option, in upper case."""
    if found := _OPTION.fullmatch(text):
        return (found[1] or found[2]).upper()
    found = _OPTION_AND_TEXT.fullmatch(text)
    if found and not _ANY_OPTION.search(found[3]):  # "A. and C." names two
        return found[1] or found[2]
    return None


def _quantity(text: str) -> _Quantity | None:
    """A number, maybe with a unit."""
    found = _NUMBER.fullmatch(text)
    if not found:
        return None
    unit, power = (found["unit"] or "").strip(" .").lower(), int(found["power"] or 1)
    for words, exponent in (("square ", 2), ("sq ", 2), ("sq. ", 2), ("cubic ", 3)):
        if unit.startswith(words) and power == 1:
            unit, power = unit.removeprefix(words), exponent
    if (unit and unit != "%" and unit not in _UNITS) or (power > 1 and unit in ("", "%")):
        return None
    above, below = found["above"] or found["top"], found["below"] or found["bottom"]
    if above is not None:
        if not int(below):
            return None
        value = Fraction(int(above), int(below))
    else:
        if not re.search("[0-9]", found["decimal"]):
            return None
        exponent = int((found["exponent"] or "0").strip("{}"))
        value = Fraction("0" + found["decimal"].replace(",", "").rstrip(".")) * Fraction(10) ** exponent
    return _Quantity(-value if found["sign"] == "-" else value, above is not None, unit, power)
