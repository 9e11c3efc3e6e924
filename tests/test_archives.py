"""Images in archives are those of the folder they were made from; damage and attacks become one sentence."""

import io
import os
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from test_loader import processor  # noqa: F401  a fixture

from pvm_jax.data.archives import TarArchive, ZipArchive, open_archive
from pvm_jax.data.images import DataError, open_image
from pvm_jax.data.sources import ParquetRows, RowGroups, open_source

COUNT = 6
LONG = "/".join(["a_folder_with_a_long_name"] * 9)  # beyond the 100 bytes of a tar header


@pytest.fixture
def folder(tmp_path) -> Path:
    """pictures/0.png .. 5.png, 5 of them in deep folders, and a text file."""
    pictures = tmp_path / "pictures"
    (pictures / LONG).mkdir(parents=True)
    for i in range(COUNT):
        tiny.image(i, 40, 52).save(pictures / name(i))
    (pictures / "notes.txt").write_text("no picture " * 100)
    return tmp_path


def name(i: int) -> str:
    return f"{LONG}/{i}.png" if i % 2 else f"{i}.png"


def zipped(folder: Path, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(folder / "pictures.zip", "w", method) as file:
        for path in sorted((folder / "pictures").rglob("*")):
            file.write(path, path.relative_to(folder / "pictures"))
    return folder / "pictures.zip"


def tarred(folder: Path, form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(folder / "pictures.tar", "w:", format=form) as file:
        file.add(folder / "pictures", ".")  # members are called ./0.png, as `tar -C pictures .` writes them
    return folder / "pictures.tar"


MAKERS = {
    "zip, deflated": zipped,
    "zip, stored": lambda folder: zipped(folder, zipfile.ZIP_STORED),
    "tar, pax": tarred,
    "tar, gnu": lambda folder: tarred(folder, tarfile.GNU_FORMAT),
}


def rows(folder: Path, *names: str) -> Path:
    """A parquet file with the columns of OpenMMReasoner-SFT: content is always a list of parts, url a struct."""

    def part(kind: str, text: str | None = None, url: str | None = None) -> dict:
        return {"type": kind, "text": text, "image_url": url and {"url": url}}

    table = [
        {
            "id": image,
            "messages": [
                {"role": "system", "content": [part("text", "Think first.")]},
                {"role": "user", "content": [part("image_url", url=image), part("text", "How many?")]},
                {"role": "assistant", "content": [part("text", "<think>One.</think><answer>1</answer>")]},
            ],
            "token_count": 7,
        }
        for image in names
    ]
    text_only = {"role": "user", "content": [part("text", "1 + 1?")]}
    table.append({"id": "text", "messages": [text_only, table[0]["messages"][2]], "token_count": 3})
    pq.write_table(pa.Table.from_pylist(table), folder / "m1_sft.parquet", row_group_size=2)
    return folder / "m1_sft.parquet"


@pytest.mark.parametrize("kind", MAKERS)
def test_archives_give_what_the_folder_gives(folder, processor, kind):  # noqa: F811
    """OpenMMReasoner's layout, encoded from several threads in a mixed order."""
    file = rows(folder, *map(name, range(COUNT)))
    plain = open_source(file, image_folder=folder / "pictures")
    packed = open_source(file, image_folder=str(MAKERS[kind](folder)))
    order = np.random.default_rng(0).permutation(COUNT + 1).tolist() * 3
    before = set(folder.rglob("*"))
    with ThreadPoolExecutor(4) as pool:
        encoded = list(pool.map(lambda i: processor.encode(packed[i]), order))
    assert set(folder.rglob("*")) == before
    for i, got in zip(order, encoded):
        want = processor.encode(plain[i])
        assert got.tokens.tolist() == want.tokens.tolist() and got.loss_mask.tolist() == want.loss_mask.tolist()
        assert got.loss_mask.any() and bool(len(got.patches)) == (i < COUNT)
        assert np.array_equal(got.patches, want.patches)


def test_several_archives_and_folders_are_looked_through_in_order(folder):
    first, second = folder / "parts" / "1.zip", folder / "parts" / "2.zip"
    first.parent.mkdir()
    for path, members in ((first, {"a": b"1"}), (second, {"a": b"2", "b": b"3"})):
        with zipfile.ZipFile(path, "w") as file:
            for member, content in members.items():
                file.writestr(member, content)
    file = rows(folder, "a", "b", "0.png")
    source = open_source(file, image_folder=[str(folder / "parts" / "*.zip"), folder / "pictures"])
    found = [source[i]["messages"][1]["content"][0]["image"] for i in range(3)]
    assert [member.read() for member in found[:2]] == [b"1", b"3"]
    assert found[2] == str(folder / "pictures" / "0.png")


def test_a_video_in_an_archive(folder, processor):  # noqa: F811
    frames = [tiny.image(i, 40, 52) for i in range(6)]
    frames[0].save(folder / "pictures" / "moves.gif", save_all=True, append_images=frames[1:], duration=250)
    row = {"question": "<video>?", "answer": "a", "video": "moves.gif"}
    (folder / "rows.jsonl").write_text(str(row).replace("'", '"'))
    plain, packed = (open_source(folder / "rows.jsonl", image_folder=f) for f in (folder / "pictures", tarred(folder)))
    got, want = processor.encode(packed[0]), processor.encode(plain[0])
    assert np.array_equal(got.patches, want.patches) and len(got.patches)
    assert got.tokens.tolist() == want.tokens.tolist()


# ---- What is in an archive ---------------------------------------------------------------------------------------


def test_large_zip_headers_and_members_written_twice(tmp_path):
    """A member begins behind its own header, whose length the table of contents does not know."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file, file.open("x", "w", force_zip64=True) as member:
        member.write(b"long header")
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as file:
        file.writestr("y", b"old")
        with pytest.warns(UserWarning, match="Duplicate name"):
            file.writestr("y", b"new")
        file.writestr("empty", b"")
        file.mkdir("folder")
    archive = open_archive(tmp_path / "a.zip")
    assert {n: archive.find(n).read() for n in ("x", "y", "empty")} == {"x": b"long header", "y": b"new", "empty": b""}
    assert len(archive) == 3 and archive.find("folder") is None and archive.find("z") is None


def test_links_in_a_tar_file(folder):
    pictures = folder / "pictures"
    os.link(pictures / "0.png", pictures / "hard.png")
    (pictures / "soft.png").symlink_to("/etc/passwd")
    archive = open_archive(tarred(folder))
    assert archive.find("hard.png").read() == archive.find("0.png").read() == (pictures / "0.png").read_bytes()
    assert archive.find("soft.png") is None and len(archive) == COUNT + 2


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_no_name_leads_out_of_an_archive(folder, kind):
    secret = folder / "secret.png"
    tiny.image(9, 40, 52).save(secret)
    path = folder / "set" / f"evil.{kind}"
    path.parent.mkdir()
    names = ("../secret.png", "/secret.png", "a/../../secret.png", "a/../good.png")
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            for member in names:
                file.writestr(member, b"evil")
    else:
        with tarfile.open(path, "w:") as file:
            for member in names:
                info = tarfile.TarInfo(member)
                info.size = 4
                file.addfile(info, io.BytesIO(b"evil"))
    archive = open_archive(path)
    assert len(archive) == 1 and archive.find("./good.png").read() == b"evil"
    source = open_source(rows(folder, "../secret.png", "a/../../../secret.png", "../set/evil.zip"), image_folder=path)
    for i in range(3):
        with pytest.raises(
            DataError, match=r"no image file at .*evil\.(zip|tar)/(a/)?\.\./.* relative paths start from"
        ):
            source[i]


# ---- What is wrong with an archive -------------------------------------------------------------------------------


def test_missing_and_broken_pictures_name_archive_and_member(folder):
    path = zipped(folder)
    source = open_source(rows(folder, "absent.png", "notes.txt"), image_folder=path)
    with pytest.raises(DataError, match=rf"^{folder}/m1_sft.parquet row 0, .*: no image file at {path}/absent.png; "):
        source[0]
    member = source[1]["messages"][1]["content"][0]["image"]
    with pytest.raises(DataError, match=rf"^sample 7 \(notes.txt in {path}\): expected an image, but PIL does not"):
        open_image(member, "sample 7")


@pytest.mark.parametrize("kind", MAKERS)
def test_damage_names_archive_and_member(folder, kind):
    path = MAKERS[kind](folder)
    whole = path.read_bytes()
    start = whole.index(b"0.png") + 40 if "deflated" in kind else whole.index(b"\x89PNG")
    archive = open_archive(path)
    with path.open("r+b") as file:
        file.truncate(start + 20)
    with pytest.raises(DataError, match=rf"^{path}: the archive is damaged at .*0.png \(it ends after \d+ of \d+ byt"):
        archive.find("0.png").read()
    if kind.startswith("zip"):  # tar files have no checksums
        flipped = whole[:start] + bytes([whole[start] ^ 255]) + whole[start + 1 :]
        for damaged, problem in (
            (flipped, ""),
            (b"\0" * len(whole), "no member begins where the table of contents says"),
        ):
            path.write_bytes(damaged)
            with pytest.raises(DataError, match=rf"^{path}: the archive is damaged at 0.png \({problem}"):
                archive.find("0.png").read()


def test_a_member_is_never_larger_than_promised(tmp_path):
    """A megabyte of zeros whose table of contents says ten bytes."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a", b"\0" * 2**20)
    content = bytearray((tmp_path / "a.zip").read_bytes())
    at = content.index(b"PK\1\2") + 24
    content[at : at + 4] = (10).to_bytes(4, "little")
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(DataError, match=r"a.zip: the archive is damaged at a \(its checksum differs"):
        open_archive(tmp_path / "a.zip").find("a").read()


def test_tar_files_with_a_broken_header_in_the_middle(folder):
    """tarfile takes it for the end of the archive; the members behind it would be missing in silence."""
    path = tarred(folder)
    content = bytearray(path.read_bytes())
    second = content.index(b"ustar", content.index(b"\x89PNG"))
    content[second - 200] ^= 255
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"^{path}: not a tar file that can be read \(byte \d+ should begin a member"):
        open_archive(path)


def test_archives_that_cannot_be_read_in_place(folder, tmp_path):
    encrypted = bytearray(zipped(folder).read_bytes())
    encrypted[encrypted.index(b"PK\1\2") + 8] |= 1
    (tmp_path / "secret.zip").write_bytes(encrypted)
    with zipfile.ZipFile(tmp_path / "lzma.zip", "w", zipfile.ZIP_LZMA) as file:
        file.writestr("a", b"a" * 99)
    for unreadable in ("broken.zip", "broken.tar", "images.tar.gz", "images.rar"):
        (tmp_path / unreadable).write_bytes(b"neither one nor the other" * 99)
    for file, sentence in (
        ("secret.zip", "secret.zip: expected members that are stored or deflated, got an encrypted one"),
        ("lzma.zip", r"lzma.zip: expected members .*, got method 14 \(a\); write the archive again, or unpack"),
        ("broken.zip", "broken.zip: not a zip file that can be read"),
        ("broken.tar", "broken.tar: not a tar file that can be read"),
        ("images.tar.gz", "images.tar.gz: a compressed tar file has to be unpacked .* decompress it to .tar"),
        ("images.rar", "images.rar: expected a folder or .zip or .tar file of images"),
        ("absent", "image_folder: no folder or archive matches '.*absent'"),
    ):
        with pytest.raises(DataError, match=sentence) as error:
            open_source(rows(folder, "0.png"), image_folder=tmp_path / file)
        assert "\n" not in str(error.value)


def test_kinds_by_suffix(folder):
    assert isinstance(open_archive(zipped(folder)), ZipArchive)
    assert isinstance(open_archive(tarred(folder).rename(folder / "P.TAR")), TarArchive)


# ---- Row groups --------------------------------------------------------------------------------------------------


def test_row_groups_are_kept_up_to_a_number_of_bytes(folder, monkeypatch):
    """All of a file that fits is read once, however small its groups; else the groups used last stay."""
    file = rows(folder, *map(name, range(COUNT)))
    reads = []
    read = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, i, **kwargs: (reads.append(i), read(self, i, **kwargs))[1]
    )
    source = open_source(file, image_folder=folder / "pictures")
    for i in [*range(COUNT + 1)] * 2:
        source[i]
    assert reads == [0, 1, 2, 3]
    reads.clear()
    two = 2 * read(pq.ParquetFile(file), 0).nbytes
    few = ParquetRows(file, RowGroups(limit=two))
    for i in (0, 2, 0, 4, 0, 2):  # group 1 goes when 2 comes, and must be read again
        assert few.row(i)["id"] == name(i)
    assert reads == [0, 1, 2, 1]
