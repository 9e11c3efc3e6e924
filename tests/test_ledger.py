"""Records on disk: a kill loses nothing that was written, records of another evaluation are refused."""

import dataclasses
import json

import pytest

from pvm_jax.evals.ledger import Ledger, write_records
from pvm_jax.evals.questions import Record
from pvm_jax.evals.results import ResultError, read_records

WHAT = {"benchmark": "mmstar", "checksum": "abc", "seeds": (0, 1)}


def record(index: str, seed: int, completion: str = "A") -> Record:
    return Record("mmstar", "plain", index, seed, {"text": "?"}, "?", completion, 1, 9, "stop", "A", True)


def records(*keys) -> list[Record]:
    return [record(*key) for key in keys]


def opened(workdir, identity=WHAT, writes=True) -> Ledger:
    return Ledger(workdir, "mmstar", identity, (0, 1), writes=writes)


def test_goes_on_where_it_was(tmp_path):
    first = opened(tmp_path)
    first.add(records(("3", 0), ("3", 1)))
    first.add(records(("7", 0), ("7", 1)))
    again = opened(tmp_path)
    assert again.records == first.records
    again.add(records(("5", 0), ("5", 1)))
    assert read_records(again.path) == again.records == [*first.records, *records(("5", 0), ("5", 1))]


@pytest.mark.parametrize("cut", [1, 30, 200, 300])
def test_a_line_that_was_not_finished_is_asked_again(tmp_path, cut):
    first = opened(tmp_path)
    first.add(records(("3", 0), ("3", 1)))
    whole = first.path.read_bytes()
    first.add(records(("7", 0), ("7", 1)))
    longer = first.path.read_bytes()
    # Killed in the middle of the last line, behind the first of two lines, and within it.
    first.path.write_bytes(longer[: len(longer) - cut])
    assert opened(tmp_path).records == records(("3", 0), ("3", 1))
    assert first.path.read_bytes() == whole


def test_another_process_reads_and_writes_nothing(tmp_path):
    opened(tmp_path).add(records(("3", 0), ("3", 1)))
    before = (tmp_path / "mmstar.jsonl").read_bytes()
    other = opened(tmp_path, writes=False)
    other.add(records(("7", 0), ("7", 1)))
    assert len(other.records) == 4 and (tmp_path / "mmstar.jsonl").read_bytes() == before


def test_records_are_replaced_by_their_keys(tmp_path):
    first = opened(tmp_path)
    first.add(records(("3", 0), ("3", 1)))
    other = record("3", 1, "B")
    first.replace([other])
    assert first.records == read_records(first.path) == [record("3", 0), other]


def test_records_of_another_evaluation_are_refused(tmp_path):
    opened(tmp_path)
    with pytest.raises(
        ResultError, match=r"of another evaluation \(checksum was \"abc\" and is \"xyz\"\); use a new w"
    ):
        opened(tmp_path, WHAT | {"checksum": "xyz"})
    (tmp_path / "mmstar.run").unlink()
    with pytest.raises(ResultError, match=r"mmstar\.jsonl: expected mmstar\.run beside it"):
        opened(tmp_path)
    (tmp_path / "mmstar.run").write_text("{")
    with pytest.raises(ResultError, match=r"mmstar\.run: expected JSON"):
        opened(tmp_path)


def test_a_record_is_the_same_from_disk(tmp_path):
    hostile = "\ud800 </script>\u2028 \x00 \n\r \\boxed{1}" + "}" * 1000
    one = dataclasses.replace(record("a/ü\n", 3, hostile), error="x", judge="gpt", answer=None)
    write_records(tmp_path / "r.jsonl", [one, record("b", 0)])
    assert read_records(tmp_path / "r.jsonl") == [one, record("b", 0)]
    assert (tmp_path / "r.jsonl").read_bytes().isascii()


@pytest.mark.parametrize("line", ["{", '{"index": 1}', "[]", "3", ""])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    file = tmp_path / "r.jsonl"
    good = json.dumps(dataclasses.asdict(record("1", 0)))
    file.write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(ResultError, match=r"r\.jsonl, line 2: expected a record"):
        read_records(file)


def test_no_file_and_no_text(tmp_path):
    with pytest.raises(ResultError, match="found no file"):
        read_records(tmp_path / "r.jsonl")
    (tmp_path / "r.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(ResultError, match="expected UTF-8"):
        read_records(tmp_path / "r.jsonl")
