"""Fingerprints of weights, cheap enough to be taken at every start and stable when files are copied or moved.

Training changes nearly all of a tensor, not a few bytes of it: a sample of every tensor is enough to see it.
"""

import hashlib
from pathlib import Path
from typing import BinaryIO

from pvm_jax.safetensors_io import SafetensorsReader

_PIECE_BYTES, _PIECES = 4096, 16


def of_safetensors(directory: Path) -> str:
    """SHA-256 over name, dtype, shape and 64 KiB (16 pieces of 4 KiB, first and last included) of every tensor."""
    digest = hashlib.sha256()
    entries = SafetensorsReader(directory).entries
    opened: dict[Path, BinaryIO] = {}
    try:
        for name in sorted(entries):
            entry = entries[name]
            if entry.file not in opened:
                opened[entry.file] = entry.file.open("rb")
            digest.update(f"{name}\0{entry.dtype}\0{entry.shape}\0".encode())
            _sample(digest, opened[entry.file], entry.start, entry.end)
    finally:
        for file in opened.values():
            file.close()
    return digest.hexdigest()


def of_orbax(directory: Path) -> str:
    """SHA-256 over name, size and a sample of every file of an Orbax tree.

    Its small files are read whole; they hold the time of the save. Two saves therefore never have the same
    fingerprint, even of equal values.
    """
    digest = hashlib.sha256()
    for file in sorted(p for p in directory.rglob("*") if p.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(directory).as_posix()}\0{size}\0".encode())
        with file.open("rb") as f:
            _sample(digest, f, 0, size)
    return digest.hexdigest()


def _sample(digest, file: BinaryIO, start: int, end: int) -> None:
    last = max(end - _PIECE_BYTES, start)
    for at in sorted({start + (last - start) * i // (_PIECES - 1) for i in range(_PIECES)}):
        file.seek(at)
        digest.update(file.read(min(_PIECE_BYTES, end - at)))
