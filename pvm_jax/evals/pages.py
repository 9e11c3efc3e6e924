"""Reports as one HTML page: a template with style, script and the data in it; here `report_page.html`.

What models write is hostile text. It reaches the page as JSON in ASCII without `<`, `>` and `&`, and the page shows it
as text nodes only; its Content-Security-Policy forbids every request. Images are encoded here, as JPEG or PNG,
whichever is smaller.
"""

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

from PIL import Image

from pvm_jax.data.images import DataError, open_image

Images = Callable[[str, str], Sequence[Any]]
Records = Mapping[tuple[str, int], Mapping[str, Any]]

THUMBNAIL = 256
"""Longer side of an image on the page, in pixels."""
TEXT = 12_000
"""Characters of a completion on the page; of a longer one the middle is left out."""
OF_QUESTION = ("text", "answer", "options", "hint", "labels")
OF_ANSWER = ("completion", "tokens", "finish_reason", "answer", "right", "error", "judge", "ungraded")


def write_page(
    parts: Sequence[Mapping[str, Any]], answers: Sequence[Sequence[Records]], images: Images | None, max_samples: int
) -> str:
    """The page.

    Args:
      parts: sections, as `report.as_json` gives them.
      answers: of each section the records of each run.
      images: (benchmark, index) -> the images of a question, as `data.images.open_image` takes them; None: none.
      max_samples: so many questions of a benchmark, evenly spaced, are on the page with all their answers.
    """
    shown = [
        {**part, "samples": _samples(part["benchmark"], runs, images, max_samples)}
        for part, runs in zip(parts, answers)
    ]
    return fill_page(resources.files(__package__).joinpath("report_page.html").read_text(encoding="utf-8"), shown)


def fill_page(template: str, data: Any, style: str = "", script: str = "") -> str:
    """A template whose lines PAGE_STYLE, PAGE_SCRIPT and the mark PAGE_DATA are replaced.

    Args:
      data: as JSON.
      style, script: what follows `page.css` and `page.js`, which all pages share.
    """
    folder = resources.files(__package__)
    parts = {
        "PAGE_STYLE\n": folder.joinpath("page.css").read_text(encoding="utf-8") + style,
        "PAGE_SCRIPT\n": folder.joinpath("page.js").read_text(encoding="utf-8") + script,
        "PAGE_DATA": safe_json(data),  # last: nothing in it is a mark any more
    }
    for mark, content in parts.items():
        before, after = template.split(mark)
        template = before + content + after
    return template


def safe_json(value: Any) -> str:
    """JSON that ends no script element, whatever is in it; lone surrogates stay escapes."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _samples(benchmark: str, runs: Sequence[Records], images: Images | None, max_samples: int) -> dict[str, Any]:
    """{"asked", "questions": [...], "answers": [{"question": its place, "seed", "runs": [record or None]}]}."""
    questions = {index: record for records in runs for (index, _), record in records.items()}
    asked = list(dict.fromkeys(index for records in runs for index, _ in records))
    count = min(len(asked), max(max_samples, 0))
    chosen = {asked[i * len(asked) // count]: i for i in range(count)}
    keys = dict.fromkeys(key for records in runs for key in records)
    seeds = sorted({seed for _, seed in keys})
    return {
        "asked": len(asked),
        "questions": [_question(benchmark, index, questions[index], images) for index in chosen],
        "answers": [
            {"question": place, "seed": seed, "runs": [_answer(records.get((index, seed))) for records in runs]}
            for index, place in chosen.items()
            for seed in seeds
            if (index, seed) in keys
        ],
    }


def _question(benchmark: str, index: str, record: Mapping[str, Any], images: Images | None) -> dict[str, Any]:
    fields = {key: record["question"].get(key) for key in OF_QUESTION}
    try:
        shown = [thumbnail(image) for image in (images(benchmark, index) if images else ())]
    except DataError as error:  # images may be read only now
        shown = [{"error": str(error)}]
    return {"index": index, "prompt": shorten(record["prompt"]), **fields, "images": shown}


def _answer(record: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if record is None:
        return None
    made = {key: record[key] for key in OF_ANSWER}
    return made | {"completion": None if made["completion"] is None else shorten(made["completion"])}


def shorten(text: str) -> str:
    """At most about `TEXT` characters: two thirds of them from the beginning, and the end, where answers stand."""
    if len(text) <= TEXT:
        return text
    head, tail = TEXT * 2 // 3, TEXT // 3
    return f"{text[:head]}\n\n[... {len(text) - head - tail} characters are not on this page ...]\n\n{text[-tail:]}"


def thumbnail(source: Any, size: int = THUMBNAIL) -> dict[str, Any]:
    """{"url", "width", "height"} with the size of the original, or {"error"} for what is no image.

    Args:
      size: of the longer side, at most.
    """
    try:
        image = open_image(source).copy()  # it may be the caller's own
    except DataError as error:
        return {"error": str(error)}
    width, height = image.size
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    kind, content = min((_encoded(image, kind) for kind in ("jpeg", "png")), key=lambda made: len(made[1]))
    url = f"data:image/{kind};base64," + base64.b64encode(content).decode("ascii")
    return {"url": url, "width": width, "height": height}


def _encoded(image: Image.Image, kind: str) -> tuple[str, bytes]:
    file = io.BytesIO()
    image.save(file, kind, quality=80)  # PNG has none
    return kind, file.getvalue()
