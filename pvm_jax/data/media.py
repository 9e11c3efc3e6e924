"""Where an image or a video of a row is: a path, bytes, base64, a struct of these, or pixels -> a message part.

Relative paths are looked up in folders and archives (`open_places`).
"""

import base64
import binascii
import glob
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pvm_jax.data.archives import Archive, Member, open_archive
from pvm_jax.data.images import DataError

# How PNG, JPEG, GIF, WebP and BMP files begin in base64. Its alphabet has no dot, while names of image files have one,
# so that "/9j/..." is told from an absolute path.
_BASE64_IMAGE = re.compile(r"(iVBORw0KGgo|/9j/|R0lGOD|UklGR|Qk)[A-Za-z0-9+/\s]{40,}=*\s*")


class Folder:
    """What an archive is to the files in it, for a folder."""

    def __init__(self, path: str | Path):
        self._path = str(path)

    def __str__(self) -> str:
        return self._path

    def find(self, name: str) -> str | None:
        """The path of the file of that name (a path from here, or an absolute one), or None."""
        path = os.path.join(self._path, name)
        return path if os.path.isfile(path) else None


Place = Folder | Archive


def open_places(image_folder: str | Path | Sequence[str | Path]) -> list[Place]:
    """The folders and archives that paths, or glob patterns, stand for; archives are listed here, once.

    Raises:
      DataError: there is no such folder or archive, or one that cannot be read.
    """
    places: list[Place] = []
    for pattern in [image_folder] if isinstance(image_folder, str | Path) else image_folder:
        path = Path(pattern).expanduser()
        found = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
        if not found:
            raise DataError(f"image_folder: no folder or archive matches {str(pattern)!r}")
        places += [Folder(one) if one.is_dir() else open_archive(one) for one in found]
    return places


class MediaReader:
    """Reads images and videos as far as can be done without decoding them.

    Relative paths are looked up in `places`; the first that has the file gives it.
    """

    def __init__(self, places: Sequence[Place]):
        self._places = tuple(places)

    def read(self, kind: str, entry: Any, field: str) -> dict[str, Any]:
        """The part `{"type": kind, kind: path, member, bytes, PIL image or list of frames}` for an entry of a row.

        `field` begins the sentence of a DataError.
        """
        if kind == "image":
            return {"type": "image", "image": self._file(entry, "image", field)}
        fps = {}
        if isinstance(entry, Mapping):
            fps = {"fps": entry["fps"]} if entry.get("fps") is not None else {}
            entry = next((entry[name] for name in ("frames", "video") if entry.get(name) is not None), entry)
        if isinstance(entry, list | tuple):
            if not entry:
                raise DataError(f"{field}: a video without frames")
            video = [self._file(frame, "frame", f"{field}[{i}]") for i, frame in enumerate(entry)]
        else:
            video = self._file(entry, "video", field)
        return {"type": "video", "video": video} | fps

    def _file(self, entry: Any, what: str, field: str) -> str | bytes | Member | Image.Image:
        if isinstance(entry, Mapping):  # Hugging Face's struct of an image column
            content, path = entry.get("bytes"), entry.get("path")
            if isinstance(content, str):
                return _from_base64(content, field)
            entry = path if content is None else content
        if isinstance(entry, Image.Image):
            return entry
        if isinstance(entry, np.ndarray):
            return Image.fromarray(entry[..., 0] if entry.ndim == 3 and entry.shape[-1] == 1 else entry)
        if isinstance(entry, bytes):
            if not entry:
                raise DataError(f"{field}: the {what} has no bytes", "missing image")
            return entry
        if not isinstance(entry, str) or not entry:
            raise DataError(
                f"{field}: expected a path, bytes, base64 or {{'bytes', 'path'}} of the {what}, got {entry!r:.60}"
            )
        if entry.startswith("data:"):
            return _from_base64(entry.partition(",")[2], field)
        if _BASE64_IMAGE.fullmatch(entry):
            return _from_base64(entry, field)
        if entry.startswith(("http://", "https://")):
            raise DataError(f"{field}: {entry:.80} is not on this machine; download it and give a path")
        return self._find(entry.removeprefix("file://"), what, field)

    def _find(self, name: str, what: str, field: str) -> str | Member:
        if os.path.isabs(name):
            found, tried = Folder("/").find(name), [name]
        else:
            found = next((file for place in self._places if (file := place.find(name)) is not None), None)
            tried = [f"{os.path.join(str(place), name):.200}" for place in self._places]
        if found is None:
            raise DataError(
                f"{field}: no {what} file at {' or '.join(tried)}; relative paths start from image_folder",
                "missing image",
            )
        return found


def _from_base64(text: str, field: str) -> bytes:
    try:
        content = base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error as error:
        raise DataError(f"{field}: not base64 ({error})") from None
    if not content:
        raise DataError(f"{field}: empty base64")
    return content
