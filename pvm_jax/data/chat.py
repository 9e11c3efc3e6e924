"""Messages become token ids and a loss mask, through the checkpoint's own chat template.

Text of users and data sets never becomes a special token. Before rendering, every special token spelled out in it is
broken by a mark, a private-use character that occurs nowhere in the conversation; the template sees ordinary strings
and may search, split or strip them. After rendering, what still reads as a special token was written by the template.
The text between those is tokenized run by run, marks removed, with special tokens switched off. Tokenizers split at
special tokens before anything else, so the ids equal those of one pass over the whole rendered text.

All assistant turns are learned, except where `"loss": False` stands in a message or in a part of text.
"""

import copy
import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from pvm_jax.data.images import DataError

ROLES = ("system", "user", "assistant", "tool")
_PRIVATE_USE = 0xF0000  # plane 15 of Unicode


@dataclasses.dataclass(frozen=True)
class Piece:
    """A special token written by the template, or the text between two of them."""

    text: str
    special: bool
    learned: Bool[np.ndarray, " characters"]


@dataclasses.dataclass(frozen=True)
class _Marks:
    """Three characters that occur in no string of a conversation: they tell its text from the template's."""

    broken: str  # behind the first character of what would read as a special token
    unlearned: str  # before and ...
    learned: str  # ... after a part of text that is not to be learned

    @classmethod
    def unused_in(cls, value: Any, where: str) -> "_Marks":
        text = "\0".join(_strings(value))
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as e:
                raise DataError(f"{where}: expected Unicode text, got half a surrogate pair ({e})") from None
        free = (chr(code) for code in itertools.count(_PRIVATE_USE) if chr(code) not in text)
        return cls(*itertools.islice(free, 3))

    def positions(self, text: str) -> Bool[np.ndarray, " characters"]:
        """Which characters are marks."""
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        return np.isin(codes, [ord(mark) for mark in (self.broken, self.unlearned, self.learned)])


def load_template(directory: str | Path, tokenizer: Any) -> str:
    """The chat template of a checkpoint directory, in transformers' order of precedence.

    `chat_template` in processor_config.json, chat_template.json (published files), chat_template.jinja, and what the
    tokenizer read from tokenizer_config.json; of several named templates the one called "default".

    Raises:
      DataError: none of them has one.
    """
    directory = Path(directory)
    for name in ("processor_config.json", "chat_template.json"):
        if (directory / name).exists():
            template = read_object(directory / name).get("chat_template")
            if template is not None:
                return _default_template(template, str(directory / name))
    if (directory / "chat_template.jinja").exists():
        return (directory / "chat_template.jinja").read_text(encoding="utf-8")
    if tokenizer.chat_template is None:
        raise DataError(
            f"{directory}: expected a chat template in chat_template.jinja, chat_template.json or "
            "tokenizer_config.json, found none"
        )
    return _default_template(tokenizer.chat_template, str(directory / "tokenizer_config.json"))


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a DataError that says what is wrong with it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: expected a file, found none") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        raise DataError(f"{path}: expected JSON, but it does not parse ({e})") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _default_template(template: Any, source: str) -> str:
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, Mapping):
        if "default" not in template:
            raise DataError(f"{source}: expected a chat template named 'default', got {sorted(template)}")
        template = template["default"]
    return template


class Chat:
    """Renders and tokenizes conversations with one tokenizer and template. Safe to share between threads."""

    def __init__(self, tokenizer: Any, template: str):
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(f"expected a fast tokenizer (tokenizer.json), got {type(tokenizer).__name__}")
        self.tokenizer = tokenizer
        self.template = template
        self.special_ids = {
            token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        longest_first = sorted(self.special_ids, key=len, reverse=True)
        if not longest_first or len(longest_first[-1]) < 2:
            raise DataError(f"expected special tokens of two characters and more, got {longest_first}")
        self._special = re.compile("|".join(map(re.escape, longest_first)))
        self._plain = _without_special_tokens(tokenizer)

    def __getstate__(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer, "template": self.template}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(state["tokenizer"], state["template"])

    def render(
        self,
        messages: Any,
        *,
        add_generation_prompt: bool = False,
        targets: bool = True,
        where: str = "sample",
        **variables: Any,
    ) -> list[Piece]:
        """The conversation as the template writes it, and which of its characters are learned.

        An assistant turn's targets are the difference of two renderings: the turns before it with the generation
        prompt, and the turns up to it. With Qwen's template that is the answer, `<|im_end|>` and the newline:

            <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
                                                                  ^^^^^^^^^^^^^^^^^

        Args:
          messages: see `processor`; checked here, one sentence for each way to get them wrong.
          targets: False: nothing is learned, and the template need not be one that only ever appends.
          variables: handed to the template (`tools`, `add_vision_id`, ...).

        Raises:
          DataError: the template refuses the messages, or rewrites earlier text when a turn follows.
        """
        check_messages(messages, where)
        marks = _Marks.unused_in((messages, variables), where)
        turns = [self._protect_message(message, marks) for message in messages]
        variables = {name: self._protect(value, marks.broken) for name, value in variables.items()}

        @functools.cache  # the last answer's turns are the whole conversation
        def text(count: int, prompt: bool) -> str:
            return self._apply(turns[:count], prompt, variables, where)

        whole = text(len(turns), add_generation_prompt)
        learned = np.zeros(len(whole), bool)
        for i, message in enumerate(messages):
            if not targets or message["role"] != "assistant" or not message.get("loss", True):
                continue
            if i == 0:
                raise DataError(f"{where}: messages[0]: expected a system or user turn before the first answer")
            before, through = text(i, True), text(i + 1, False)
            if not through.startswith(before) or not whole.startswith(through):
                raise DataError(
                    f"{where}: messages[{i}]: the chat template changes earlier text when this turn is added "
                    f"(...{before[-40:]!r} became ...{through[: len(before)][-40:]!r}), so that what the model would "
                    "learn is not what it would generate; split the conversation before this turn"
                )
            learned[len(before) : len(through)] = True
        for part in re.finditer(f"{marks.unlearned}[^{marks.learned}]*{marks.learned}", whole):
            learned[part.start() : part.end()] = False
        return self._pieces(whole, learned, marks)

    def tokenize(self, pieces: Sequence[Piece]) -> tuple[list[int], list[bool]]:
        """Token ids and, for each, whether it is learned: all its characters are.

        A token that starts before the answer and reaches into it (a newline of the prompt merged with one that begins
        the answer) is not: no model that continues the prompt could produce it.
        """
        ids: list[int] = []
        learned: list[bool] = []
        for piece in pieces:
            if piece.special:
                ids.append(self.special_ids[piece.text])
                learned.append(bool(piece.learned.all()))
            else:
                encoded = self._plain.encode(piece.text, add_special_tokens=False)
                ids += encoded.ids
                start, end = np.array(encoded.offsets).reshape(-1, 2).T
                unlearned = np.append(0, np.cumsum(~piece.learned))  # before each character
                learned += (unlearned[np.maximum(end, start + 1)] == unlearned[start]).tolist()
        return ids, learned

    def tokenize_text(self, text: str) -> list[int]:
        """Ids of plain text; special tokens spelled out in it stay text."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def _pieces(self, text: str, learned: np.ndarray, marks: _Marks) -> list[Piece]:
        """Splits at the special tokens that no mark breaks, then removes the marks."""
        kept = ~marks.positions(text)
        cuts = [0, *(at for found in self._special.finditer(text) for at in found.span()), len(text)]
        pieces = []
        for i, (start, end) in enumerate(itertools.pairwise(cuts)):  # text, special, text, ..., special, text
            here = kept[start:end]
            run = "".join(itertools.compress(text[start:end], here))
            if run:
                pieces.append(Piece(run, i % 2 == 1, learned[start:end][here]))
        return pieces

    def _apply(self, messages: list, prompt: bool, variables: Mapping[str, Any], where: str) -> str:
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=prompt,
                **variables,
            )
        except jinja2.TemplateError as e:
            raise DataError(f"{where}: the chat template refuses these messages ({e})") from None

    def _protect_message(self, message: Mapping[str, Any], marks: _Marks) -> dict[str, Any]:
        turn = self._protect({key: value for key, value in message.items() if key != "loss"}, marks.broken)
        if isinstance(turn["content"], str):
            return turn
        joined = ""
        for part in turn["content"]:
            if part["type"] != "text":
                joined = ""
                continue
            # Two parts of text must not become a special token together either.
            if self._special.search(joined + part["text"]):
                part["text"], joined = marks.broken + part["text"], ""
            joined += part["text"]
            if not part.pop("loss", True):
                part["text"] = marks.unlearned + part["text"] + marks.learned
        return turn

    def _protect(self, value: Any, mark: str) -> Any:
        """A copy with every special token in every string broken by the mark behind its first character."""
        if isinstance(value, str):
            while self._special.search(value):  # again, for special tokens that overlap
                value = self._special.sub(lambda found: found[0][0] + mark + found[0][1:], value)
            return value
        if isinstance(value, Mapping):
            return {self._protect(key, mark): self._protect(item, mark) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._protect(item, mark) for item in value]
        return value


def check_messages(messages: Any, where: str) -> None:
    """Refuses, with one sentence, what a template would drop in silence."""
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError(f"{where}: messages: expected a list of turns, got {messages!r}")
    for i, message in enumerate(messages):
        at = f"{where}: messages[{i}]"
        if not isinstance(message, Mapping):
            raise DataError(f"{at}: expected an object with role and content, got {type(message).__name__}")
        if message.get("role") not in ROLES:
            raise DataError(f"{at}: role: expected one of {list(ROLES)}, got {message.get('role')!r}")
        if not isinstance(message.get("loss", True), bool):
            raise DataError(f"{at}: loss: expected true or false, got {message['loss']!r}")
        content = message.get("content")
        if isinstance(content, str):
            continue
        if not isinstance(content, list | tuple):
            raise DataError(f"{at}: content: expected text or a list of parts, got {content!r}")
        for j, part in enumerate(content):
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind not in ("text", "image", "video"):
                raise DataError(f"{at}: content[{j}]: type: expected text, image or video, got {kind!r}")
            if not isinstance(part.get("loss", True), bool):
                raise DataError(f"{at}: content[{j}]: loss: expected true or false, got {part['loss']!r}")
            if part.get(kind) is None or (kind == "text" and not isinstance(part["text"], str)):
                raise DataError(f"{at}: content[{j}]: {kind}: expected a value, got {part.get(kind)!r}")


def _without_special_tokens(tokenizer: Any) -> Any:
    """A private copy of the tokenizer's backend that reads special tokens as text (`split_special_tokens`).

    A copy, because the switch is a state of the backend: flipping it on the shared one would race between threads.
    Added tokens that are not special (`<think>`) stay tokens, as they do in transformers.
    """
    plain = copy.deepcopy(tokenizer.backend_tokenizer)
    plain.encode_special_tokens = True
    plain.no_truncation()
    plain.no_padding()
    return plain


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [s for pair in value.items() for item in pair for s in _strings(item)]
    if isinstance(value, list | tuple):
        return [s for item in value for s in _strings(item)]
    return []
