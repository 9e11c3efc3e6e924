"""Images and videos inside zip and tar files, read where they lie: nothing is ever unpacked.

    archive = open_archive(Path("images.zip"))
    archive.find("17/a.jpg").read()                # its bytes; from any number of threads

Opening an archive lists its members once: a zip file has a table of contents at its end, a tar file is walked from
header to header (about 30,000 a second, and one small read each, which a network disk makes slow). A name is only
looked up in that list, never on disk, so that neither a row nor a member can reach a file outside. Links within a tar
file are followed if they are hard links; symbolic ones are no members.
"""

import array
import dataclasses
import os
import posixpath
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from pvm_jax.data.images import DataError

SUFFIXES = (".zip", ".tar")
_COMPRESSED_TAR = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a member of a zip file: signature, length of its name, of what follows
_ENCRYPTED = 1
_STORED, _DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED


@dataclasses.dataclass(frozen=True)
class Member:
    """A file in an archive; `str(member)` is how messages name it."""

    archive: "Archive"
    name: str

    def read(self) -> bytes:
        """The whole file.

        Raises:
          DataError: the archive is damaged, or the member is packed in a way that cannot be read in place.
        """
        return self.archive.read(self.name)

    def __str__(self) -> str:
        return f"{self.name} in {self.archive.path}"


class Archive:
    """The members of one archive. Reading takes no lock: every read says where in the file it starts."""

    kind = ""

    def __init__(self, path: Path):
        self.path = path
        self._rows: dict[str, int] = {}
        values = array.array("q")  # four numbers a member: a million members should not be a million tuples
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115  as long as the archive is used
            for row, (name, numbers) in enumerate(self._members()):
                values.extend(numbers)
                name = posixpath.normpath(name)
                if not name.startswith(("/", "../")):
                    self._rows[name] = row  # of two members with one name the later counts, as when unpacking
        except (zipfile.BadZipFile, tarfile.TarError, OSError) as error:
            raise DataError(f"{path}: not a {self.kind} file that can be read ({error})") from None
        self._places: Int64[np.ndarray, "members 4"] = np.array(values, np.int64).reshape(-1, 4)

    def __len__(self) -> int:
        return len(self._rows)

    def __str__(self) -> str:
        return str(self.path)

    def find(self, name: str) -> Member | None:
        """The member of that name, or None; `./a.jpg` and `b/../a.jpg` are `a.jpg`."""
        name = posixpath.normpath(name)
        return Member(self, name) if name in self._rows else None

    def read(self, name: str) -> bytes:
        """The bytes of a member, by the name that `find` gave it."""
        return self._content(name, *map(int, self._places[self._rows[name]]))

    def _members(self) -> Iterator[tuple[str, tuple[int, int, int, int]]]:
        """Name of each member, and four numbers for `_content`."""
        raise NotImplementedError

    def _content(self, name: str, start: int, size: int, *more: int) -> bytes:
        raise NotImplementedError

    def _bytes(self, name: str, start: int, size: int) -> bytes:
        content = os.pread(self._file.fileno(), size, start)
        if len(content) != size:
            raise self._damaged(name, f"it ends after {len(content)} of {size} bytes")
        return content

    def _damaged(self, name: str, problem: str) -> DataError:
        return DataError(f"{self.path}: the archive is damaged at {name} ({problem}); make or download it again")


class ZipArchive(Archive):
    """Stored and deflated members, also beyond 4 GB."""

    kind = "zip"

    def _members(self) -> Iterator[tuple[str, tuple[int, int, int, int]]]:
        with zipfile.ZipFile(self.path) as file:
            self._check_methods(file.infolist())
            for info in file.infolist():
                if not info.is_dir():
                    packed = info.compress_size if info.compress_type == _DEFLATED else -1
                    yield info.filename, (info.header_offset, info.file_size, packed, info.CRC)

    def _check_methods(self, infos: list[zipfile.ZipInfo]) -> None:
        for info in infos:
            if info.flag_bits & _ENCRYPTED or info.compress_type not in (_STORED, _DEFLATED):
                found = "an encrypted one" if info.flag_bits & _ENCRYPTED else f"method {info.compress_type}"
                raise DataError(
                    f"{self.path}: expected members that are stored or deflated, got {found} ({info.filename}); "
                    "write the archive again, or unpack it and let image_folder be the folder"
                )

    def _content(self, name: str, start: int, size: int, packed: int, checksum: int) -> bytes:
        signature, *lengths = _LOCAL_HEADER.unpack(self._bytes(name, start, _LOCAL_HEADER.size))
        if signature != b"PK\3\4":
            raise self._damaged(name, "no member begins where the table of contents says")
        start += _LOCAL_HEADER.size + sum(lengths)
        content = self._bytes(name, start, size if packed < 0 else packed)
        if packed >= 0:
            try:
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)  # never more than promised
            except zlib.error as error:
                raise self._damaged(name, str(error)) from None
        if len(content) != size or zlib.crc32(content) != checksum:
            raise self._damaged(name, "its checksum differs")
        return content


class TarArchive(Archive):
    """Tar files without compression. They have no checksums of what is in their members."""

    kind = "tar"

    def _members(self) -> Iterator[tuple[str, tuple[int, int, int, int]]]:
        seen: dict[str, tuple[int, int, int, int]] = {}
        with tarfile.open(self.path, "r:") as file:
            while (info := file.next()) is not None:
                file.members.clear()  # they are kept for extracting, a kilobyte each
                if info.isreg() and not info.issparse():
                    seen[info.name] = info.offset_data, info.size, 0, 0
                elif info.islnk() and info.linkname in seen:
                    seen[info.name] = seen[info.linkname]
                else:
                    continue
                yield info.name, seen[info.name]
            end = file.offset
        if any(os.pread(self._file.fileno(), tarfile.BLOCKSIZE, end)):  # tarfile takes a broken header for the end
            raise tarfile.ReadError(f"byte {end} should begin a member or the end, and does neither")

    def _content(self, name: str, start: int, size: int, *_: int) -> bytes:
        return self._bytes(name, start, size)


def open_archive(path: Path) -> Archive:
    """Lists the members of a zip or tar file.

    Raises:
      DataError: another kind of file, or one that is damaged or compressed as a whole.
    """
    name = path.name.lower()
    if name.endswith(_COMPRESSED_TAR):
        raise DataError(
            f"{path}: a compressed tar file has to be unpacked to reach any of its members; decompress it to .tar, "
            "or make a .zip of it"
        )
    if name.endswith(".zip"):
        return ZipArchive(path)
    if name.endswith(".tar"):
        return TarArchive(path)
    raise DataError(f"{path}: expected a folder or {' or '.join(SUFFIXES)} file of images, got neither")
