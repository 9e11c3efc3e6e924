"""Rows of data sets, as people write them -> one record: {"id", "messages"}, and "metadata" if the row has it.

Three forms of row are understood (docs/data.md has an example of each):

    messages                 chat messages; loss on every assistant turn
    prompt, completion       strings or chat messages, as TRL writes them; loss on the completion only
    question, answer         the same under other names

with images in `image` or `images` and videos in `video` or `videos`. In content given as one string, `<image>` and
`<video>` stand for the row's next image or video (in user turns; elsewhere they are text). Content given as a list of
parts is taken literally: an image part takes the row's next image unless it has its own.

Text without loss is marked where it stands, and the processor's loss mask honours it: `"loss": False` in a message or
in a text part. `no_loss`, in the row or in its metadata, gives such parts as [start, end) in characters of the answer.

Differences from TRL: string prompts and completions become a user and an assistant turn of the chat template instead
of raw text; `<image>` in a user's string is where the image goes, and only without it do images come first.
"""

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pvm_jax.data.images import DataError
from pvm_jax.data.media import MediaReader, Place

ROLES = ("system", "user", "assistant", "tool")
FORMS = (("messages",), ("prompt", "completion"), ("question", "answer"))
MEDIA = ("image", "video")
_PLACEHOLDER = re.compile("(<image>|<video>)")
Adapt = Callable[[Mapping[str, Any], str], Mapping[str, Any]]


def renaming(pairs: Any) -> dict[str, str]:
    """`config.data.rename` as a dictionary.

    Raises:
      DataError: it is no sequence of (column, field).
    """
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        raise DataError(f"config.data.rename: expected pairs such as (('q', 'question'),), got {pairs!r}")
    return dict(pairs)


class RowReader:
    """Turns the rows of one data set into records.

    Args:
      places: what relative paths of images and videos start from.
      rename: {column of the data set: field of this module}, e.g. {"problem": "question"}.
      require_answer: whether a row without an answer to learn, or with an empty one, is an error.
      adapt: (row, where) -> a row in one of the forms above, for data sets in another (`prompts.py`); after `rename`.
    """

    def __init__(
        self,
        places: Sequence[Place],
        rename: Mapping[str, str] | None = None,
        require_answer: bool = True,
        adapt: Adapt | None = None,
    ):
        self._media = MediaReader(places)
        self._rename = dict(rename or {})
        self._require_answer = require_answer
        self._adapt = adapt

    def record(self, row: Mapping[str, Any], where: str, default_id: str) -> dict[str, Any]:
        """The record of a row; `where` ("data.jsonl row 3 (line 4)") begins the sentence of a DataError."""
        row = {self._rename.get(name, name): value for name, value in row.items() if value is not None}
        if self._adapt is not None:
            row = self._adapt(row, where)
        form = next((form for form in FORMS if form[0] in row), None)
        if form is None:
            expected = ", or ".join(" and ".join(f"`{field}`" for field in form) for form in FORMS)
            raise DataError(f"{where}: expected {expected}; the row has {', '.join(row) or 'no fields'}")
        pair = len(form) == 2
        metadata = parsed(row.get("metadata"))
        if pair:
            spans = row.get("no_loss") or (metadata.get("no_loss") if isinstance(metadata, dict) else None)
            messages = self._pair(row, form, spans, where)
        else:
            messages = _message_list(parsed(row["messages"]), f"{where}, messages")

        queues = {kind: _Queue(kind, self._column(row, kind, where), where) for kind in MEDIA}
        normal = [self._message(message, field, queues) for message, field in messages]
        if pair:
            _put_first(normal, queues)
        for queue in queues.values():
            queue.check_counts()
        if self._require_answer:
            _check_answers(normal, [field for _, field in messages], where)
        record = {"id": str(row.get("id", default_id)), "messages": normal}
        extra = {"metadata": metadata, "tools": parsed(row.get("tools"))}
        return record | {name: value for name, value in extra.items() if value}

    def _pair(self, row: Mapping, form: tuple[str, str], spans: Any, where: str) -> "_Located":
        """The messages of a prompt and its completion; assistant turns within the prompt get no loss."""
        prompt, completion = (row.get(name) for name in form)
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        messages = _message_list(prompt, f"{where}, {form[0]}")
        messages = [(m | {"loss": False} if m.get("role") == "assistant" else m, field) for m, field in messages]
        field = f"{where}, {form[1]}"
        if isinstance(completion, str):
            content = _parts_without_loss(completion, spans, f"{where}, no_loss") if spans else completion
            return [*messages, ({"role": "assistant", "content": content}, field)]
        if spans:
            raise DataError(f"{where}, no_loss: counts characters of a string, and `{form[1]}` is not one")
        if completion is None and not self._require_answer:
            return messages
        return messages + _message_list(completion, field)

    def _column(self, row: Mapping, kind: str, where: str) -> list[dict]:
        """The parts made from the row's images or videos."""
        name = f"{kind}s" if f"{kind}s" in row else kind
        entries = row.get(name)
        if entries is None or (isinstance(entries, str) and not entries):
            return []  # an empty string is how some data sets write a row without an image
        if not isinstance(entries, list | tuple) or name == "video":
            return [self._media.read(kind, entries, f"{where}, {name}")]
        return [self._media.read(kind, entry, f"{where}, {name}[{i}]") for i, entry in enumerate(entries)]

    def _message(self, message: dict, field: str, queues: "dict[str, _Queue]") -> dict[str, Any]:
        """The message with its content as text or as parts that carry their own images and videos."""
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise DataError(f"{field}.role: unknown role {role!r}; expected one of {', '.join(ROLES)}")
        if content is None and "tool_calls" in message:
            content = ""
        if isinstance(content, str):
            if role == "user" and _PLACEHOLDER.search(content):
                content = [
                    queues[piece[1:-1]].next_part() if _PLACEHOLDER.fullmatch(piece) else _text(piece)
                    for piece in _PLACEHOLDER.split(content)
                    if piece
                ]
        elif isinstance(content, list | tuple):
            content = [self._part(part, f"{field}.content[{i}]", role, queues) for i, part in enumerate(content)]
        else:
            raise DataError(f"{field}.content: expected text or a list of parts, got {content!r:.60}")
        return message | {"content": content}

    def _part(self, part: Any, field: str, role: str, queues: "dict[str, _Queue]") -> dict[str, Any]:
        if isinstance(part, str):
            return _text(part)
        if not isinstance(part, Mapping):
            raise DataError(f"{field}: expected {{'type': 'text', 'text': ...}} or alike, got {part!r:.60}")
        part = {name: value for name, value in part.items() if value is not None}  # parquet has every key
        kind = part.get("type", next((name for name in ("text", *MEDIA) if name in part), None))
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise DataError(f"{field}.text: expected text, got {part.get('text')!r:.60}")
            return {name: part[name] for name in ("type", "text", "loss") if name in part} | {"type": "text"}
        base = str(kind).removesuffix("_url")
        if base not in MEDIA:
            raise DataError(f"{field}.type: unknown type {kind!r}; expected text, image, image_url or video")
        if role not in ("user", "tool"):
            raise DataError(f"{field}: {base} in the {role}'s turn; images and videos belong in the user's")
        own = next((part[name] for name in (kind, base, "path", "url", "bytes") if name in part), None)
        if isinstance(own, Mapping) and "url" in own:
            own = own["url"]
        made = queues[base].next_part() if own is None else self._media.read(base, own, field)
        return made | ({"fps": part["fps"]} if "fps" in part else {})


class _Queue:
    """The images (or videos) of a row, handed out to their places in the messages."""

    def __init__(self, kind: str, parts: list[dict], where: str):
        self._kind, self._parts, self._where = kind, parts, where
        self.places = 0  # how many the messages ask for

    def next_part(self) -> dict[str, Any]:
        """The next part; a stand-in once there are none left, which `check_counts` reports with both totals."""
        self.places += 1
        return dict(self._parts[self.places - 1]) if self.places <= len(self._parts) else {"type": self._kind}

    def all_parts(self) -> list[dict[str, Any]]:
        self.places = len(self._parts)
        return self._parts

    def check_counts(self) -> None:
        if self.places != len(self._parts):
            kind = self._kind
            raise DataError(
                f"{self._where}, {kind}s: expected one for each place in the messages, got {len(self._parts)} {kind}s "
                f"and {self.places} places; a place is <{kind}> in the user's text (as a text part it is only text)",
                "images and places differ",
            )


_Located = list[tuple[dict[str, Any], str]]  # messages, each with the name of its field


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def parsed(value: Any) -> Any:
    """JSON in a string (how TFDS rows hold what is nested) is parsed; other values stay as they are."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def _message_list(value: Any, field: str) -> _Located:
    if not isinstance(value, list | tuple) or not value or not all(isinstance(m, Mapping) for m in value):
        raise DataError(f"{field}: expected text or a list of messages with role and content, got {value!r:.60}")
    return [({k: v for k, v in m.items() if v is not None}, f"{field}[{i}]") for i, m in enumerate(value)]


def _put_first(messages: list[dict[str, Any]], queues: dict[str, _Queue]) -> None:
    """Images that a prompt has no place for come first in it, as in TRL's rows."""
    if any(part["type"] in MEDIA for m in messages if isinstance(m["content"], list) for part in m["content"]):
        return
    parts = [part for queue in queues.values() for part in queue.all_parts()]
    first = next((m for m in messages if m["role"] == "user"), None)
    if parts and first:
        content = first["content"]
        first["content"] = parts + ([_text(content)] if isinstance(content, str) else content)


def _parts_without_loss(answer: str, spans: Any, field: str) -> list[dict[str, Any]]:
    """The answer cut at `spans`, whose pieces get no loss.

    _parts_without_loss("a b c", [[2, 3]], ...) has the texts "a ", "b" (no loss) and " c".
    """
    valid = isinstance(spans, list | tuple) and all(
        isinstance(span, list | tuple) and len(span) == 2 and all(isinstance(edge, int) for edge in span)
        for span in spans
    )
    edges = [0, *itertools.chain.from_iterable(spans), len(answer)] if valid else []
    if not valid or edges != sorted(edges):
        raise DataError(f"{field}: expected ascending [start, end) within {len(answer)} characters, got {spans!r:.60}")
    parts = []
    for i, (start, end) in enumerate(itertools.pairwise(edges)):
        if end > start:
            parts.append(_text(answer[start:end]) | ({"loss": False} if i % 2 else {}))
    return parts


def _check_answers(messages: list[dict[str, Any]], fields: list[str], where: str) -> None:
    """Some assistant turn must be there to learn, and none of those may be empty."""
    answers = [(m, field) for m, field in zip(messages, fields) if m["role"] == "assistant" and m.get("loss", True)]
    if not answers:
        raise DataError(f"{where}: no assistant turn, so there is nothing to learn")
    for message, field in answers:
        content = message["content"]
        text = content if isinstance(content, str) else "".join(part["text"] for part in content)
        if not text.strip() and "tool_calls" not in message:
            raise DataError(f"{field}: the answer is empty")
