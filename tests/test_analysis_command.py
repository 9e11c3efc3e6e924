"""`python -m pvm_jax.analysis`: what it writes and prints, and what it says to mistakes."""

import argparse
import inspect
import json
import shutil

import jax
import numpy as np
import pytest
import tiny

from pvm_jax.analysis import __main__ as command
from pvm_jax.analysis import tracing
from pvm_jax.data import digits
from pvm_jax.data.digits_task import Spec
from pvm_jax.data.sources import open_source
from pvm_jax.sharding import make_mesh


def row(number: int, *parts, answer: str | None = None) -> dict:
    """A row of a data file; images are names of files beside it."""
    made = tiny.user(*[part if isinstance(part, str) else part[1] for part in parts])
    for part, given in zip(made["content"], parts):
        if not isinstance(given, str):
            part |= {"image": given[0]}
    return {"id": f"row {number}", "messages": [made, *([] if answer is None else [tiny.assistant(answer)])]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """An image with an answer, an image with an empty one, and text alone with one."""
    folder = tmp_path_factory.mktemp("rows")
    images = [(f"{i}.png", tiny.image(i, 60 + 30 * i, 90)) for i in range(2)]
    for name, image in images:
        image.save(folder / name)
    rows = [
        row(0, images[0], "what is shown?", answer=tiny.text(1, 60)),
        row(1, "look", images[1], answer=""),
        row(2, "count to three", answer="one two three"),
    ]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return file


@pytest.fixture(scope="module")
def both(small_checkpoint, data, tmp_path_factory):
    """One model with its PVM and without, on all rows: folder, standard output and error, and texts in each pass."""
    import contextlib
    import io

    out = tmp_path_factory.mktemp("analysis") / "out"
    flags = [f"--checkpoint={small_checkpoint}", "--without_pvm", f"--data={data}", f"--out={out}"]
    printed, progress, calls, trace = io.StringIO(), io.StringIO(), [], tracing.trace
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(progress),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(tracing, "trace", lambda *given, **how: calls.append(len(given[1])) or trace(*given, **how))
        assert command.main([*flags, "--names=tiny", "--max_new_tokens=3", "--forced"]) == 0
    return out, printed.getvalue(), progress.getvalue(), calls


def test_what_it_prints_is_what_it_writes(both):
    out, printed, progress, _ = both
    content = json.loads((out / "analysis.json").read_text())
    lines = printed.splitlines()
    for line, cells in zip(lines, [content["table"]["header"], *content["table"]["rows"]]):
        rest = line
        for cell in cells:
            assert cell in rest
            rest = rest.partition(cell)[2]
    assert "note: row 2: The text has no image: no attention falls on visual tokens, and there are no maps." in lines
    assert f"written to {out}: analysis.json, dilution.png, index.html, logit_lens.png, maps.npz, pvm.png" in lines
    assert "\nrow 1: writing an answer\n" in progress and "tiny, PVM silenced: row 2, 3 of 3" in progress
    data = json.loads((out / "index.html").read_text().split('id="data">')[1].split("</script>")[0])
    assert data["rows"] == content["table"]["rows"]
    assert data["measured"]["tiny"]["checksum"] and not data["measured"]["tiny"]["pvm_silenced"]


def test_its_page_in_a_browser(both, browser):
    from selenium.webdriver.common.keys import Keys

    browser.set_window_size(1280, 1000)
    browser.get((both[0] / "index.html").as_uri())
    canvas = "return document.querySelector('.run canvas').toDataURL()"
    before = browser.execute_script(canvas)
    browser.find_element("css selector", ".run .text").send_keys(Keys.END)
    assert "token 71 of 71" in browser.find_element("css selector", "#position").text
    assert browser.execute_script(canvas) != before
    assert browser.get_log("browser") == []


def test_given_written_and_silenced(both):
    out, _, _, _ = both
    tiny_run, silent = json.loads((out / "analysis.json").read_text())["runs"]
    assert [run["name"] for run in (tiny_run, silent)] == ["tiny", "tiny, PVM silenced"]
    given, written, text = tiny_run["samples"]
    assert "".join(given["tokens"]).removesuffix("<|im_end|>\n").removesuffix("<|im_end|>") == tiny.text(1, 60)
    assert len(written["tokens"]) == 3 and not text["pictures"] and text["visual_mass"] == []
    assert given["numbers"]["fit"] and written["numbers"]["no_fit"]
    assert given["pvm_ratio"] and not silent["samples"][0]["pvm_ratio"]
    assert given["lens"]["probability"] != silent["samples"][0]["lens"]["probability"]
    with np.load(out / "maps.npz") as arrays:
        retrieval = arrays["run0/sample0/retrieval"]
        assert not arrays["run1/sample0/pvm_ratio"].any()
    np.testing.assert_allclose(retrieval.sum(-1), 1, atol=1e-5)
    words = tiny_run["words"]
    assert all(words[str(token)] is not None for layer in given["lens"]["token"] for token in layer)


def test_written_answers_of_checkpoints_without_pvm_and_maps_on_a_mesh(
    stock_checkpoint, data, tmp_path, capsys, monkeypatch
):
    """Twice the same one; the first is gone from memory when the second is loaded."""
    alive, load = [], command.load_model

    def watched(*arguments, **options):
        alive.append(sum(array.nbytes for array in jax.live_arrays()))
        return load(*arguments, **options)

    monkeypatch.setattr(command, "load_model", watched)
    flags = [f"--checkpoint={stock_checkpoint},{stock_checkpoint}/", f"--data={data}", f"--out={tmp_path / 'out'}"]
    pixels = ("--max_pixels=4096", "--video_min_pixels=2048", "--video_max_pixels=65536")
    writes = ("--generate", "--forced", "--max_new_tokens=3", "--dtype=bfloat16", "--mesh=fsdp=4,tensor=2")
    # Images have relative paths, which are not looked for beside the rows.
    (tmp_path / "0.png").write_bytes((data.parent / "1.png").read_bytes())
    folder = f"--image_folder={tmp_path}"
    assert command.main([*flags, *pixels, *writes, folder, "--limit=1", "--names=tiny,again", "--no_maps"]) == 0
    assert alive[0] == alive[1]
    printed = capsys.readouterr().out
    assert "note: The checkpoint has no PVM" in printed and printed.splitlines()[1].startswith("tiny")
    assert not (tmp_path / "out/pvm.png").exists() and (tmp_path / "out/dilution.png").exists()
    first, second = json.loads((tmp_path / "out/analysis.json").read_text())["runs"]
    assert first["samples"] == second["samples"] and not first["maps"]
    assert [first[name] for name in command.PIXELS][1:] == [4096, 2048, 65536]
    assert first["dtype"] == "bfloat16" and len(first["samples"][0]["tokens"]) == 3, "not those that are given"
    (picture,) = first["samples"][0]["pictures"]
    assert (picture["width"], picture["height"]) == (90, 90) and picture["rows"] * picture["columns"] <= 4
    with np.load(tmp_path / "out/maps.npz") as arrays:
        assert "run0/sample0/visual_mass" in arrays and not [name for name in arrays if "attention" in name]
    with pytest.raises(SystemExit) as stopped:
        command.main([f"--checkpoint={stock_checkpoint}", flags[1], f"--out={tmp_path / 'other'}", "--without_pvm"])
    assert stopped.value.code == 2
    assert "--without_pvm: expected a checkpoint with PVM, found none in" in capsys.readouterr().err


def test_rows_of_a_split_of_a_tfds_directory(stock_checkpoint, tmp_path, capsys, monkeypatch):
    splits = {"sft_64": (1, Spec("train", 40)), "test_64": (3, Spec("test", 64))}
    monkeypatch.setattr(digits, "SPLITS", {"demo": splits})
    folder = digits.prepare(tmp_path / "data", "demo")
    flags = [f"--checkpoint={stock_checkpoint}", f"--data={folder}", f"--out={tmp_path / 'out'}", "--no_maps"]
    assert command.main(flags) == 1
    assert "no split 'train'; it has sft_64, test_64" in capsys.readouterr().err
    assert command.main([*flags, "--split=test_64[1:]", "--limit=1"]) == 0
    (sample,) = json.loads((tmp_path / "out/analysis.json").read_text())["runs"][0]["samples"]
    answer = open_source(folder, split="test_64")[1]["messages"][-1]["content"]
    answer = answer if isinstance(answer, str) else answer[0]["text"]
    assert sample["name"].endswith("test_64[1:]:0") and "".join(sample["tokens"]).startswith(answer)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--names=a,b"], "--names: expected a different name for each of 1 checkpoints, got ['a', 'b']"),
        (["--limit=0"], "--limit: expected at least 1, got 0"),
        (["--mesh=heads=2"], "expected AXIS=N with AXIS one of data, fsdp, tensor, got 'heads=2'"),
        (["--out=."], "--out=.: expected a folder that is not there yet; remove it or name another"),
    ],
)
def test_a_command_line_that_cannot_be_used(small_checkpoint, data, tmp_path, capsys, flags, sentence):
    given = [f"--checkpoint={small_checkpoint}", f"--data={data}", f"--out={tmp_path / 'out'}", *flags]
    with pytest.raises(SystemExit) as stopped:
        command.main(given)
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "no file matches"),
        ("", "the data set is empty: no rows in"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n{"messages": \n', "rows.jsonl row 1 (line 2): not JSON"),
        (
            '{"messages": [{"role": "user", "content": "<image>"}], "image": "x.png"}',
            "rows.jsonl row 0 (line 1), image",
        ),
        (
            '{"id": "7", "messages": [{"role": "assistant", "content": ""}]}',
            "row 0 (line 1): sample 7: expected a turn for the model to answer, found none",
        ),
    ],
)
def test_data_that_cannot_be_used(small_checkpoint, tmp_path, capsys, content, sentence):
    file = tmp_path / "rows.jsonl"
    if content is not None:
        file.write_text(content)
    assert command.main([f"--checkpoint={small_checkpoint}", f"--data={file}", f"--out={tmp_path / 'out'}"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and sentence in error, error
    assert not (tmp_path / "out").exists()


def test_everything_is_read_before_the_first_model_is_loaded(small_checkpoint, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "load_model", lambda *_, **__: pytest.fail("loaded"))
    shutil.copytree(small_checkpoint, tmp_path / "later")
    given = [f"--checkpoint={small_checkpoint},{tmp_path / 'later'}", f"--data={data}", "--names=first,second"]
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stopped:
        command.main([*given, f"--out={tmp_path / 'file' / 'out'}"])
    assert stopped.value.code == 2
    assert "out: expected a place where a folder can be made ([Errno" in capsys.readouterr().err
    (tmp_path / "later/chat_template.jinja").write_text("{{ raise_exception('not this one') }}")
    assert command.main([*given, f"--out={tmp_path / 'deep' / 'out'}"]) == 1
    assert "row 0 (line 1): sample row 0: " in capsys.readouterr().err
    for file in tmp_path.glob("later/tokenizer*"):
        file.unlink()
    assert command.main([*given, f"--out={tmp_path / 'deep' / 'out'}"]) == 1
    assert "later: " in capsys.readouterr().err


def test_a_checkpoint_that_is_none(tmp_path, data, capsys):
    with pytest.raises(SystemExit):
        command.main(["--checkpoint=", f"--data={data}", f"--out={tmp_path / 'out'}"])
    assert "--checkpoint: expected a directory, got ''" in capsys.readouterr().err
    assert command.main([f"--checkpoint={tmp_path / 'none'}", f"--data={data}", f"--out={tmp_path / 'out'}"]) == 1
    assert "none: expected a model directory, found nothing" in capsys.readouterr().err


def test_it_runs_on_one_host(stock_checkpoint, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(SystemExit):
        command.main([f"--checkpoint={stock_checkpoint}", f"--data={data}", f"--out={tmp_path / 'out'}"])
    assert "the analyses run on one host, here are 2" in capsys.readouterr().err


def test_texts_go_through_together(both):
    """Each of the two runs measures its three texts in one pass, and a mesh gets a text for each of its rows."""
    *_, calls = both
    assert calls == [3, 3]
    assert [command._together(mesh) for mesh in (None, make_mesh(data=2, fsdp=4), make_mesh(tensor=8))] == [4, 8, 4]


def test_an_answer_is_announced_when_its_group_is_begun(monkeypatch, capsys):
    def write(model, processor, given, new_tokens, **options):
        command._say("begun")
        return given

    monkeypatch.setattr(command.texts, "write", write)
    rows = [{"id": name} for name in "abc"]
    options = argparse.Namespace(max_new_tokens=1, forced=False)
    assert inspect.unwrap(command._written)(None, None, rows, 2, options) == rows
    progress = [line.removesuffix(": writing an answer") for line in capsys.readouterr().err.splitlines()]
    assert progress == ["a", "b", "begun", "c", "begun"]


def test_names_are_as_short_as_they_can_be():
    assert command._folders(["a/base", "a/pvm"]) == ["base", "pvm"]
    assert command._folders(["/x/one/model", "/x/two/model"]) == ["one/model", "two/model"]
