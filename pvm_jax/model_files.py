"""The files beside a model's weights, and directories that appear complete or not at all."""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Everything that can describe a model, a tokenizer or a processor; no weights and no code.
_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_NOT_CARRIED = ("config.json", "base.json")


class FileSystemError(OSError):
    """A folder that cannot hold what is to be whole or not there at all; the message says what it lacks."""


@contextlib.contextmanager
def new_directory(final: Path) -> Iterator[Path]:
    """A temporary directory beside `final` that takes its name at the end, and goes away on any failure.

    Raises:
      FileExistsError: `final` exists.
      OSError: it is an address.
    """
    _refuse_address(final)
    if final.exists():
        raise FileExistsError(f"{final}: expected a directory that does not exist yet; remove it or name another")
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        yield partial
        partial.chmod(0o777 & ~_umask())  # mkdtemp made it private
        partial.rename(final)
    except BaseException:
        shutil.rmtree(partial)
        raise


def check_writable(folder: Path) -> None:
    """Makes `folder` if need be, and in it a file and a directory that are gone at once: before what takes long.

    Raises:
      OSError: they cannot be made.
      FileSystemError: the directory cannot be renamed, as a checkpoint is when it is whole.
    """
    _refuse_address(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".probe.", dir=folder) as probe:
        partial = Path(probe, "partial")
        partial.mkdir()
        (partial / "file").touch()
        try:
            partial.rename(Path(probe, "whole"))
        except OSError as error:
            raise FileSystemError(
                f"{folder}: expected a file system that renames directories, so that a checkpoint appears whole or not "
                f"at all ({error.strerror}); a bucket that is mounted needs a hierarchical namespace"
            ) from None


def _refuse_address(path: Path) -> None:
    """gs://bucket/x would become a folder called "gs:"."""
    if len(path.parts) > 1 and re.fullmatch(r"\w+:", path.parts[0]):
        raise OSError(f"{path}: expected a directory, got an address; mount a bucket and name where it is mounted")


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def copy_files(source: Path, target: Path) -> None:
    """Copies tokenizer, processor and generation files and the licence; not config.json, which the caller writes."""
    for file in sorted(source.iterdir()):
        carried = file.suffix in _SUFFIXES or file.name.startswith("LICENSE")
        skipped = file.name in _NOT_CARRIED or file.name.endswith(".index.json")
        if file.is_file() and carried and not skipped:
            shutil.copyfile(file, target / file.name)


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
