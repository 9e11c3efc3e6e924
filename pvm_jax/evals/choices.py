r"""Which option of a multiple-choice question a text chooses.

    find("The answer is (B).", options)                        -> "B"
    find("Not a cat. I think it's C", options)                 -> "C"
    find("A cat sits on the mat.", options)                    -> the option that says "cat", if only one does
    find("It is A or B.", options)                             -> None
    find("故选：B", options)                                    -> "B"

In this order, and the first that says anything decides:

1. the whole text is a letter, or the text of one option, or a number equal to one option's;
2. the last conclusion: "the answer is B", "B is correct", "I choose B", "选B", a letter alone in the last line.
   One that names two letters, or a letter that is no option, concludes nothing, and nothing else is asked;
3. a letter at the start, before its text, or an option's text before a mark: "No, because ...";
4. the only letter that is marked as one: "(B)", "option B", "**B**"; in a few words any letter, else only at the end;
5. the only option whose text occurs.

What is denied ("not B", "B is wrong", "不选B") does not count, nor does what is supposed ("if the answer is B").
An "A" before a word is an article unless a conclusion says otherwise, and an "I" is a pronoun.
"""

import re
from collections.abc import Mapping

from pvm_jax.answers import normalized
from pvm_jax.evals.free_answers import MAX_CHARACTERS, NUMERALS, Grade, accepts, number, without_middle

Options = Mapping[str, str]

_SHORT = 80  # characters: in a longer text a number or a letter may mean anything
_WORDS = 8  # in so many words any letter is meant
_MOST = 50  # of claims and of marked letters that are looked at; only a text made to be slow has more

# One typography: full-width ASCII and brackets, no quotes or dollars, no LaTeX or Markdown around letters.
_FOLD = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_FOLD |= dict(zip(map(ord, "【】「」『』〔〕’‘"), "()()()()''", strict=True)) | dict.fromkeys(map(ord, '"“”$'), None)
_LATEX = re.compile(r"\\(?:text|textbf|mathrm|mathbf|textit|mathit|mbox)\s?\{([^{}]{0,80})\}|\\([()\[\]])")
_BOLD = re.compile(r"(\*\*|__|`|\*|~~)\s?\(?([A-Ja-j])\)?[.:]?\s?\1")
_MARKUP = re.compile(r"\*\*|__|`|(?m:^ {0,3}(?:#{1,6}|[-*>•]) )")

# A letter where a claim ends, what may follow an "A" that is no article, and a second letter.
_NO_WORD = r"(?![A-Za-z0-9]|['-][A-Za-z0-9])"
_LETTER = re.compile(
    r"(?:[\s:(\[<{'*]{0,6}(?:(?:the|option|choice|letter|answer|number)\b|选项|选))?[\s:(\[<{'*]{0,6}"
    rf"([A-Za-z]){_NO_WORD}([)\]}}>'.:,]*)",
    re.IGNORECASE,
)
_REASON = re.compile(
    r" ?(?:because|since|as|due|for|which|given|based|and|or|not|where|but|so|is|are|has|[-–—(])(?![A-Za-z])"
    r"|[\u4e00-\u9fff]",
    re.IGNORECASE,
)
_ANOTHER = re.compile(
    r"\s?(?:,|/|&|、|和|或|与|及|,? ?\b(?:and|or)\b) ?(?:(?:option|choice) )?\(?[A-J]\)?(?![A-Za-z0-9])"
    r"(?= ?(?:$|[,.;)\n/&、]|and\b|or\b|are\b|[\u4e00-\u9fff]))",
    re.IGNORECASE,
)
_NEXT_LINE = re.compile(r"[.):][^\n]{0,200}\n\s{0,8}\(?([A-J])[.):]")
_LISTED_BEFORE = re.compile(r"(?<![A-Za-z0-9])[A-J]\)?(?: ?[,/&、和或与及]| and| or|, and|, or) ?\(?$")

# What comes before the letter of a conclusion: "the answer to this question is", "I choose", "答案是", ...
_ABOUT = r"(?: (?:to|for|of|here|in|among|from|that|which|we|I)\b[^.:;\n]{0,80}?)?"
_BE = (
    r"(?:(?:'s|\s(?:is|was|should be|would be|must be|will be|has to be|seems to be|appears to be))"
    r"(?: (?:most|likely|clearly|therefore|thus|definitely|probably|simply|obviously|indeed|actually|then|now)\b){0,2}"
    r"\s?:?|\s?(?:=|:|->|=>|→|⇒|-|–))"
)
_ANSWER = re.compile(
    rf"\bans(?:wer)?\b(?: (?:choice|option|letter)\b)?{_ABOUT}{_BE}"
    r"|(?m:^\s{0,4}(?:the )?(?:final |correct )?answer\s{1,4}(?=[(\['*]?[A-Za-z](?:[.):]|[)\]'*.]{0,3}$)))"
    r"|(?:答案|正解|答)(?:应该|应当|应|就|即)?(?:是|为|选)?(?:选项)?\s?:?",
    re.IGNORECASE,
)
_CHOICE = re.compile(
    r"\b(?:correct|right|best|final|my|true|chosen|selected|appropriate|suitable|closest|matching|valid|accurate)"
    rf" (?:option|choice|letter|one|selection|pick|match|statement|description|candidate|figure|image)\b{_ABOUT}{_BE}"
    r"|(?m:^\s{0,4}(?:choice|option|letter|selection|conclusion|solution|result)\s?[:=])"
    r"|\b(?:choose|chose|choosing|select|selecting|selected|pick|picked|picking|go with|going with|go for|opt for"
    r"|settle on|vote for|answer with|stick with|I'd (?:say|guess)|I would (?:say|guess))\b"
    r"(?: (?:the )?(?:final |correct |best )?(?:answer|choice)\b:?)?"
    r"|\b(?:corresponds? to|corresponding to|match(?:es|ing)?|which is|that is|that's|leaves?|left with|leads? to"
    r"|points? to|gives?|consistent with|agrees with|it's|it is|must be|should be|conclude)(?: us)?(?: with)?"
    r"(?: the)?(?: correct| right)? (?=(?:answer|option|choice|letter) )"
    r"|(?:正确的?选项|正确的?答案|选择|选)(?:应该|应当|应)?(?:了|的是|是|为)?(?:选项)?\s?:?",
    re.IGNORECASE,
)

# What comes after it: "B is correct", "B项正确".
_RIGHT = re.compile(
    r"(?<![A-Za-z0-9])\(?([A-Z])\)?[.,]?(?:(?: (?:is|seems|must be|would be|should be|has to be|appears to be))"
    r"(?: (?:therefore|thus|clearly|definitely|indeed|obviously|probably|likely|the|only|most|my|our|final)\b){0,4}"
    r" (?:correct|right(?! (?:of|next|angle|triangle|hand|side|above|below))|answer|best(?!-)|true|accurate"
    r"|appropriate|suitable|valid)\b|(?:选项|项)?(?:才)?(?:是|为)?(?:唯一)?(?:正确|对的|符合|最佳|最合适|答案))"
)

# What takes a conclusion back when it stands before it in its clause.
_CLAUSE = re.compile(r"[.,;:!?\n。；]")
_SUPPOSED = re.compile(
    r"\b(?:if|whether|unless|suppose|assuming|assume|not|never|cannot|neither|nor|why|instead of|rather than|had)\b"
    r"|n't\b|如果|假设|假如|若|是否|(?:不|别|勿|未|没|非)(?:应该|应当|应|能|会|该|可以|可|是|要)?$",
    re.IGNORECASE,
)

# Passages that say what is not: "not A, B or C" up to the clause's end, "A and B are wrong", "排除A", "A不对".
_LETTERS = r"(?<![A-Za-z0-9])\(?[A-J]\)?"
_DENIED = re.compile(
    r"(?:\b(?:not|no(?= [a-z])(?! doubt)|never|neither|nor|cannot|except|exclud(?:e|ed|es|ing)|eliminat(?:e|ed|es|ing)"
    r"|rul(?:e|es|ed|ing) out|rather than|instead of|unlike|if|whether|suppose|assuming|unless)\b|n't\b)"
    r"(?:(?!\b(?:but|so|rather|instead|leaving|it's|it is)\b)"
    r"(?:[^.;:\n,。；]|,(?= ?(?:and |or |nor )?\(?[A-J]\b)|\.(?=\d))){0,100}"
    rf"|{_LETTERS}[.:]?(?:(?:,| and|, and| or) \(?[A-J]\)?){{0,9}}(?: \([^()]{{1,40}}\))?"
    r" (?:is|are|was|were|seems?|looks?|can be|would be) (?:\w{1,12} ){0,2}"
    r"(?:wrong|incorrect|false|invalid|impossible|unlikely|implausible|ruled out|excluded|eliminated|too|irrelevant)\b"
    r"|(?:不是|不选|不应选|不能选|不该选|排除|并非|而非|除了|不可能是|不会是|如果|假设)[^,。;\n]{0,60}"
    rf"|{_LETTERS}(?:[、,和与及]?\(?[A-J]\)?){{0,9}}(?:选项|项)?(?:是|都|均)?(?:是)?"
    r"(?:不正确|错误|错|不对|不符合|被排除|不是|不可能)",
    re.IGNORECASE,
)

# Letters without a conclusion: marked as letters, before a text, bare, last, first, and alone.
_MENTION = re.compile(
    rf"(?<![A-Za-z0-9])(?:\(([A-J])\)|\[([A-J])\]|(?:(?i:options?|choices?|letter)|选项) ?\(?([A-J])\)?{_NO_WORD}"
    r"|([A-J])(?:选项|项))"
)
_MARKED = re.compile(r"(?<![A-Za-z0-9])\(?([A-J])\)?\s?[.):、-]\s?")
_BARE = re.compile(rf"(?<![A-Za-z0-9'])([A-J]){_NO_WORD}")
_LAST = re.compile(r"(?:^|(\w{1,12}|[^\w\s])\s?|\s)(?<![A-Za-z0-9'])\(?([A-J])\)?[\s.!。)*]{0,8}$")
_BEFORE_LAST = re.compile(
    r"(?:is|be|s|was|so|thus|hence|therefore|say|think|choose|pick|select|answer|option|choice|with)|.*[\u4e00-\u9fff]"
    r"|[^\w\s(']",
    re.IGNORECASE,
)
_LEADING = re.compile(
    r"[\W_]{0,6}(?:(?:option|choice) )?\(?([A-Za-z])(\)?[.):,、]|\)|\s{0,3}\n| [-–—] |(?=[\u4e00-\u9fff]))"
)
_ALONE = re.compile(
    r"[\W_]*(?:(?:the|my|final|correct|best|right) ){0,3}"
    r"(?:(?:ans|answer|option|choice|letter|正确答案|答案|选项|选择|故选|应选|选)(?: is| would be|是|为)?[\W_]*)?"
    r"([A-Za-z])(?:选项|项)?[\W_]*",
    re.IGNORECASE,
)
_NONE = object()


def find(text: str, options: Options, grade: Grade | None = None) -> str | None:
    """The letter of the option that a text chooses; None if it does not say, or says several."""
    text = _folded(text)
    if not text:
        return None
    alone = _ALONE.fullmatch(text) if len(text) <= _SHORT else None
    if alone and alone[1].upper() in options:
        return alone[1].upper()
    letter = _exact(alone[1] if alone else text, options, grade)
    if letter or alone:
        return letter
    said, letter = _conclusion(text, options)
    return letter if said else _unconcluded(text, options)


def concluded(text: str, options: Options) -> str | None:
    """The letter that a text gives as its conclusion in so many words; see the module's second step."""
    return _conclusion(_folded(text), options)[1]


def _folded(text: str) -> str:
    """The text in one typography, without markup; the middle of a very long one is left out."""
    text = without_middle(text).translate(_FOLD)
    text = _LATEX.sub(lambda m: m[1] if m[1] is not None else m[2], text)
    return _MARKUP.sub("", _BOLD.sub(lambda m: f"({m[2].upper()})", text)).strip()


def _exact(text: str, options: Options, grade: Grade | None) -> str | None:
    """The only option whose text, or whose value, this is."""
    if len(text) > MAX_CHARACTERS:
        return None
    key = _key(text)
    found = [letter for letter, option in options.items() if key and key == _key(option)]
    if not found and (re.search(r"[0-9\\]", text) or text.casefold() in NUMERALS):
        found = [letter for letter, option in options.items() if option.strip() and accepts(option, text, grade)]
    return found[0] if len(found) == 1 else None


def _key(text: str) -> str:
    words = normalized(text.translate(_FOLD)).casefold().strip(" .,;!。").split()
    return "".join(words[1:] if words[:1] in (["a"], ["an"], ["the"]) and len(words) > 1 else words)


def _conclusion(text: str, options: Options) -> tuple[bool, str | None]:
    """Whether the text comes to a conclusion, and the letter of the last one; None if that names no single option."""
    last: tuple[int, str | None] | None = None
    for claim in (_ANSWER, _CHOICE):
        for found in list(claim.finditer(text))[-_MOST:]:
            if (last and found.start() < last[0]) or _supposed(text, found.start()):
                continue
            letter = _named(text, found.end(), options, texts=claim is _ANSWER)
            if letter is not _NONE:
                last = found.start(), letter
    for found in list(_RIGHT.finditer(text))[-_MOST:]:
        before = text[max(0, found.start() - 12) : found.start()]
        if (last and found.start() < last[0]) or _supposed(text, found.start()) or _LISTED_BEFORE.search(before):
            continue
        last = found.start(), found[1] if found[1] in options else None
    if letter := _last_line(text, options):
        last = len(text), letter
    return last is not None, last[1] if last else None


def _supposed(text: str, at: int) -> bool:
    """Whether what is said at a place is denied, or only supposed, earlier in its clause."""
    before = text[max(0, at - 60) : at]
    return _SUPPOSED.search(_CLAUSE.split(before)[-1]) is not None


def _named(text: str, at: int, options: Options, texts: bool) -> str | object | None:
    """The letter after a claim; None if it names several or none of the options; _NONE if there is no letter.

    Args:
      texts: whether the claim may be followed by an option's text instead of its letter.
    """
    found, rest = _LETTER.match(text, at), ""
    if found:
        rest = text[found.end() : found.end() + _SHORT]
        letter, marks = found[1], found[2]
        upper = letter.upper()
        ends = not rest.strip() or rest[0] == "\n" or bool(marks)
        article = letter in "AI" and not ends and not _REASON.match(rest)
        article = article and not _key(rest).startswith(_key(options.get(upper, "")) or " ")
        if article or (letter.islower() and not ends):
            found = None
    sentence = re.split(r"\n|[.;。](?= |$)|,? because\b|,? since\b", text[at : at + MAX_CHARACTERS].strip(" :\n"))[0]
    if found and upper in options:
        below = _NEXT_LINE.match(text, found.end() - bool(marks)) if "\n" in text[at : found.end()] else None
        listed = below is not None and ord(below[1]) == ord(upper) + 1  # all options once more
        return None if listed or _ANOTHER.match(text, found.end() - ("," in marks)) else upper
    if texts and (letter := _exact(sentence, options, None)):
        return letter
    return None if found else _NONE


def _last_line(text: str, options: Options) -> str | None:
    """The letter, alone or with its text, that makes up the last line; not if the line before is another option."""
    lines = [line for line in text[-1000:].split("\n") if line.strip()][-2:]
    if len(lines) < 2:
        return None
    letters = [_line_letter(line, options) for line in lines]
    return letters[1] if letters[0] is None or letters[0] == letters[1] else None


def _line_letters(text: str, options: Options) -> set[str]:
    return {letter for line in text.split("\n")[:_MOST] if (letter := _line_letter(line, options))}


def _line_letter(line: str, options: Options) -> str | None:
    alone = _ALONE.fullmatch(line) if len(line) <= _SHORT else None
    if alone:
        return alone[1].upper() if alone[1].upper() in options else None
    found = _MARKED.match(line.strip())
    return found[1] if found and found[1] in options and _key(line[found.end() :]) == _key(options[found[1]]) else None


def _unconcluded(text: str, options: Options) -> str | None:
    """Without a conclusion: a letter or text that leads, else the only one that is left."""
    left = "".join(part for part in re.split(r"(?<=[.!?。\n])", _DENIED.sub(" ", text)) if part[-1:] not in ("?", ""))
    mentioned = {next(filter(None, found)) for found in _MENTION.findall(left)} | _with_text(left, options)
    listed = _with_text(text, options) | _line_letters(text, options)
    leading = _LEADING.match(text)
    if leading and (leading[1].isupper() or leading[2][-1:] in (")", ".")):
        letter = leading[1].upper()
        others = (listed or mentioned) - {letter}
        if letter in options and not others and not _ANOTHER.match(text, leading.end(1)) and not _DENIED.match(text):
            return letter
    if letter := _leading_text(text, options):
        return letter
    if not mentioned:
        mentioned = _bare(left.strip())
    if mentioned:
        letter = mentioned.pop()
        return letter if not mentioned and letter in options else None
    return _contained(text, left, options)


def _with_text(text: str, options: Options) -> set[str]:
    """Letters that are followed by their option's text."""
    found = set()
    for mark in list(_MARKED.finditer(text))[:_MOST]:
        option = _key(options.get(mark[1], ""))
        if option and _key(text[mark.end() : mark.end() + 2 * len(options[mark[1]]) + 8]).startswith(option):
            found.add(mark[1])
    return found


def _bare(text: str) -> set[str]:
    """Letters without marks: all in a few words, else one at the end after "is", "so", a colon, ..."""
    if len(text.split()) <= _WORDS and len(text) <= _SHORT:
        articles = {m.start() for m in re.finditer(r"\b[AI](?= [A-Za-z]{2})", text) if not _REASON.match(text, m.end())}
        return {m[1] for m in _BARE.finditer(text) if m.start() not in articles}
    found = _LAST.search(text[-40:])
    return {found[2]} if found and (found[1] is None or _BEFORE_LAST.fullmatch(found[1])) else set()


def _leading_text(text: str, options: Options) -> str | None:
    """The option, "Yes" for one, that the text starts with, up to a mark."""
    first = re.split(r"[,.:;!\n。]", text[: MAX_CHARACTERS + 1], maxsplit=1)
    found = [x for x, option in options.items() if len(first) == 2 and _key(first[0]) == _key(option) != ""]
    return found[0] if len(found) == 1 else None


def _contained(text: str, left: str, options: Options) -> str | None:
    """The only option whose text stands in what is not denied, other than within a longer one's.

    An option that denies something itself is looked for in all of the text.
    """
    whole, text = text.casefold(), left.casefold()
    found = set()
    for letter, option in sorted(options.items(), key=lambda item: -len(item[1])):
        option = normalized(option.translate(_FOLD)).casefold().strip(" .")
        if not option or (len(text) > _SHORT and (len(option) <= 2 or number(option) is not None)):
            continue
        pattern = re.compile(rf"(?<![a-z0-9])(?<![0-9][.,]){re.escape(option)}(?![a-z0-9]|[.,][0-9])")
        if pattern.search(whole if _DENIED.search(option) else text):
            found.add(letter)
            text = pattern.sub(" ", text)
    more = len(text.split()) <= 3 and re.search(r"\b(?:and|or)\b|[&/、和或]", text)  # than the one option
    return found.pop() if len(found) == 1 and not more else None
