"""The grid of ablations: its rows, its runner on a grid of stand-ins and on the real commands, its numbers."""

import contextlib
import errno
import functools
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import tiny
from flax import nnx

from pvm_jax import convert
from pvm_jax.analysis import ablation
from pvm_jax.analysis import ablation_jobs as jobs
from pvm_jax.analysis.ablation_book import DATA, RUN, Base, Book
from pvm_jax.analysis.ablation_tables import markdown, numbers, over_seeds, pooled
from pvm_jax.checkpoint import checksum
from pvm_jax.cli import leaves
from pvm_jax.config import ModelConfig
from pvm_jax.data import digits
from pvm_jax.data.digits_task import Spec
from pvm_jax.models.qwen3_vl import Qwen3VL
from pvm_jax.training.freeze import flatten, trainable_names
from pvm_jax.training.setup import add_lora

ROOT = Path(__file__).parents[1]

BASE = checksum(ROOT / "assets/digits_base")

# Two rows whose "training" takes no time: results depend on row and seed, and each command leaves a line behind.
STAND_IN = '''
import json, types
BASE = "@base"
ROWS = {"base": ("nothing",), "a": ("something",)}
RATE = 0.1
CONVERT = """
import sys, pathlib
pathlib.Path(sys.argv[1], "start").mkdir()
open(pathlib.Path(sys.argv[1]).parent / "converted.txt", "a").write(" ".join(["made", *sys.argv[2:]]) + "\\\\n")
"""
TRAIN = """
import os, sys, pathlib, time
folder = pathlib.Path(sys.argv[1])
if (folder.parent / "slow").exists():
    def save(*_):
        (folder.parent / "saved").touch()
        sys.exit(75)
    import signal
    signal.signal(signal.SIGTERM, save)
    (folder.parent / "slow").unlink()
    time.sleep(60)
cores = getattr(os, "sched_getaffinity", lambda _: [])(0)
(folder / "cores.txt").write_text(" ".join(map(str, cores)) + "\\\\n" + os.environ["GLIBC_TUNABLES"])
give_up = time.monotonic() + 20
while (folder.parent / "together").exists() and len(list(folder.parent.glob("*/cores.txt"))) < 2:
    time.sleep(0.01)
    if time.monotonic() > give_up:
        sys.exit("alone")
(folder / "train/checkpoints").mkdir(parents=True, exist_ok=True)
open(folder.parent / "done.txt", "a").write(folder.name + " train\\\\n")
print("1,234 parameters train (5 %)")
sys.exit((folder.parent / "broken").exists() and "no room left")
"""
EVAL = """
import json, sys, pathlib
folder = pathlib.Path(sys.argv[1])
def part(right, tokens):
    share = {"right": right, "count": 100}
    return {"tokens": tokens, "exact": share, "reads": share, "text": share, "by_position": [share]}
(folder / "eval").mkdir(parents=True, exist_ok=True)
right = 90 + 2 * int(sys.argv[2])
about = {"dtype": "float32", "devices": "8 cpu", "options": {"path": "x", "samples": 16}}
late = {"long": {"normal": part(right, [9, 20]), "vision_masked": part(10, [9, 20])}}
for name, summary in (("late", late), ("short", {"brief": {"normal": part(99, [1, 8])}})):
    (folder / "eval" / f"{name}.json").write_text(json.dumps(about | {"summary": summary}))
"""
SAMPLES, DTYPE, RATHER = 16, None, []

def get_config(argument, data):
    assert argument in ("a", "a,smoke"), argument
    values = {"seed": 0, "model": {"path": "x"}, "rate": RATE}
    return types.SimpleNamespace(to_dict=lambda: values)

def evaluation(smoke):
    options = {"module": "m", "path": "y", "samples": 2 if smoke else SAMPLES}
    return types.SimpleNamespace(to_dict=lambda: {"dtype": DTYPE, "evals": {"late": options, "short": options}})

def commands(name, seed, run, data, smoke, base):
    found = {"convert": ["python", "-c", CONVERT, run, *RATHER], "train": ["python", "-c", TRAIN, run, data]}
    rest = (["smoke"] if smoke else []) + ([base] if base else [])
    return (found if name == "a" else {}) | {"eval": ["python", "-c", EVAL, run, str(seed), *rest]}
'''


@pytest.fixture
def grid(tmp_path, monkeypatch):
    """`grid(*arguments)` runs the stand-ins in `tmp_path`."""
    (tmp_path / "stand_in.py").write_text(textwrap.dedent(STAND_IN).replace("@base", str(ROOT / "assets/digits_base")))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "stand_in", raising=False)
    files = [f"--runs={tmp_path / 'runs'}", f"--out={tmp_path / 'out' / 'grid.json'}"]
    return lambda *arguments: ablation.main(["--grid=stand_in", *files, *arguments])


def done(tmp_path: Path) -> list[str]:
    return (tmp_path / "runs/done.txt").read_text().splitlines()


def test_a_grid_is_run_once_and_goes_on(grid, tmp_path, capsys):
    grid("--seeds=0,1")
    assert done(tmp_path) == ["a-0 train", "a-1 train"]
    grid("--seeds=2,1")
    assert done(tmp_path) == ["a-0 train", "a-1 train", "a-2 train"]
    book = json.loads((tmp_path / "out/grid.json").read_text())
    assert list(book["runs"]) == ["base/0", "a/0", "a/1", "a/2"], "what is not trained has one seed, the first"
    assert book["rows"]["a"] == {"title": "something", "config": {"rate": 0.1}}
    run = book["runs"]["a/2"]
    assert run["trainable"] == 1234 and run["numbers"]["reads_late"] == {"right": 94, "count": 100}
    assert all(command.startswith("python -c") for command in run["commands"]) and run["versions"]["jax"]
    assert run["conditions"] == {"dtype": "float32", "device": "cpu", "evaluation.late.samples": 16,
                                 "evaluation.short.samples": 16, "base": BASE}  # fmt: skip
    shown = capsys.readouterr().out
    assert "3 runs, 2 of them recorded" in shown and "[1/1] a/2: convert" in shown
    table = (tmp_path / "out/grid.md").read_text()
    assert "| `a` | something | 1,234 | 3 | 0.920 ± 0.050 | 0.920 ± 0.050 | 0.100 ± 0.000 |" in table
    assert "| `base` | nothing | 0 | 1 | 0.900 | 0.900 | 0.100 |" in table and table.strip() in shown
    assert (tmp_path / "out/grid.png").stat().st_size > 5000
    assert not list((tmp_path / "runs").glob("*/train/checkpoints"))


@pytest.mark.skipif(jobs.own_cores() < 2 or not hasattr(os, "sched_getaffinity"), reason="binds to one of two cores")
def test_jobs_run_together_each_on_cores_of_its_own(grid, tmp_path, monkeypatch):
    """Each run waits for the other one."""
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/together").touch()
    before = os.sched_getaffinity(0)
    grid("--rows=a", "--seeds=0,1", "--jobs=2")
    assert os.sched_getaffinity(0) == before
    assert sorted(json.loads((tmp_path / "out/grid.json").read_text())["runs"]) == ["a/0", "a/1"]
    lines = [(tmp_path / f"runs/a-{seed}/cores.txt").read_text().splitlines() for seed in (0, 1)]
    first, second = ({int(core) for core in cores.split()} for cores, _ in lines)
    assert len(first) == len(second) == len(before) // 2 and not first & second and first | second <= before
    assert {allocator for _, allocator in lines} == {jobs.ALLOCATOR}
    cores = [run["cores"] for run in json.loads((tmp_path / "out/grid.json").read_text())["runs"].values()]
    assert cores == [len(first), len(second)]


def test_what_has_not_begun_does_not_begin_after_an_interruption(grid, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ablation.Book, "tables", interrupted)
    with pytest.raises(SystemExit, match="stopped; the same command goes on from here"):
        grid("--rows=a", "--seeds=0,1,2,3,4,5")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ablation")]
    assert len(done(tmp_path)) <= 2, "the one that was done, and the one that had begun meanwhile"
    with jobs.locked(tmp_path / "runs/lock", "--runs"):
        pass


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_an_ended_grid_lets_its_command_save(grid, tmp_path, end):
    """As a terminal does, which sends SIGINT to all of a process group, and as schedulers do, by SIGTERM."""
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "slow").touch()
    arguments = ["--grid=stand_in", "--rows=a", "--seeds=0,1", f"--runs={runs}", f"--out={tmp_path / 'out/grid.json'}"]
    # A shell has what it starts in the background ignore SIGINT; these tests, too, where that is how they were started.
    heed = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    process = subprocess.Popen(
        [sys.executable, "-c", heed + "runpy.run_module('pvm_jax.analysis.ablation', run_name='__main__')", *arguments],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while (runs / "slow").exists() and process.poll() is None:
        time.sleep(0.05)
    (os.killpg if end == signal.SIGINT else os.kill)(process.pid, end)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and error == "stopped; the same command goes on from here\n"
    assert (runs / "saved").exists() and not (runs / "done.txt").exists() and not (runs / "a-1").exists()
    grid("--rows=a", "--seeds=0,1")
    assert done(tmp_path) == ["a-0 train", "a-1 train"]


def test_a_command_ends_with_its_grid(tmp_path):
    """By SIGTERM, so that it can save; and none is begun any more."""
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('saved', flush=True)))\n"
        "print('begun', flush=True)\n"
        "time.sleep(60)"
    )
    stopped, log = threading.Event(), tmp_path / "log"

    def stop_when_begun():
        while not log.exists() or "begun" not in log.read_text():
            time.sleep(0.01)
        stopped.set()

    threading.Thread(target=stop_when_begun, daemon=True).start()
    with pytest.raises(jobs.Stopped):
        jobs.call(["-c", code], log, {}, stopped=stopped)
    assert log.read_text() == "begun\nsaved\n"
    with pytest.raises(jobs.Stopped):
        jobs.call(["-c", code], tmp_path / "other", {}, stopped=stopped)
    assert not (tmp_path / "other").exists()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Two checkpoints that differ in one weight."""
    folder = tmp_path_factory.mktemp("bases")
    for name in ("first", "second"):
        shutil.copytree(ROOT / "assets/digits_base", folder / name)
    with (folder / "second/model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    return str(folder / "first"), str(folder / "second")


def test_each_seed_on_a_base_of_its_own(grid, tmp_path, bases):
    first, second = bases
    grid("--seeds=0,1", f"--bases={first},{second}")
    runs = json.loads((tmp_path / "out/grid.json").read_text())["runs"]
    assert list(runs) == ["base/0", "a/0", "base/1", "a/1"], "a base is evaluated for each seed"
    for name, run in runs.items():
        assert run["commands"][-1].endswith(f" {bases[int(name[-1])]}") and run["base"]["path"] == bases[int(name[-1])]
    assert runs["a/0"]["base"]["checksum"] != runs["a/1"]["base"]["checksum"]
    assert [name[:3] for name in done(tmp_path)] == ["a-0", "a-1"]
    moved = shutil.copytree(second, tmp_path / "moved")
    grid("--seeds=1", f"--bases={moved}")
    assert len(done(tmp_path)) == 2, "what is recorded counts wherever its base lies now"
    with pytest.raises(
        SystemExit, match=rf"another base \(there 'seed 0 on {first} \(\w+\)', here 'seed 0 on {second} "
    ):
        grid("--seeds=0,1", f"--bases={second},{first}")
    with pytest.raises(
        SystemExit, match=rf"another base \(there 'seed 0 on {first} \(\w+\)', here 'seed 2 on {first} "
    ):
        grid("--seeds=2", f"--bases={first}")
    with pytest.raises(SystemExit, match="--bases: expected another base for each seed, got the same weights twice"):
        grid("--seeds=2,3", f"--bases={second},{moved}")


def test_bases_are_not_mixed(grid, bases):
    grid("--rows=a", "--seeds=0")
    with pytest.raises(
        SystemExit, match=r"another kind of base \(there \"the grid's own base\", here 'a base for each"
    ):
        grid("--rows=a", "--seeds=1", f"--bases={bases[0]}")
    grid("--rows=base", "--seeds=1", f"--bases={bases[0]}")
    with pytest.raises(SystemExit, match=r"another kind of base \(there 'a base for each seed', here \"the grid's own"):
        grid("--rows=base", "--seeds=1")


def test_two_grids_do_not_share_a_folder_of_runs(grid, tmp_path):
    """Nor does one with a command that a killed one has left behind: the folder is held until that ends."""
    with (
        jobs.locked(tmp_path / "runs/lock", "--runs"),
        pytest.raises(SystemExit, match="another grid, or a command that one has"),
    ):
        grid("--seeds=0")
    linger = "import subprocess; print(subprocess.Popen(['sleep', '60'], close_fds=False).pid, flush=True)"
    run = ablation.Run("a", 0, tmp_path / "run", {"train": ["python", "-c", linger]})
    with jobs.locked(tmp_path / "runs/lock", "--runs") as lock:
        run.do({}, lock)
    try:
        with pytest.raises(SystemExit, match="works there; wait for it, or name another place"):
            grid("--seeds=0")
    finally:
        os.kill(int((tmp_path / "run/train.log").read_text()), signal.SIGKILL)
    for _ in range(100):  # the killed process takes a moment to go
        with contextlib.suppress(SystemExit):
            grid("--seeds=0")
            break
        time.sleep(0.1)
    assert done(tmp_path) == ["a-0 train"]


def test_two_grids_do_not_share_a_record(grid, tmp_path):
    with (
        jobs.locked(tmp_path / "out/.grid.json.lock", "--out"),
        pytest.raises(SystemExit, match=r"--out=.*grid.json: another grid, or a command"),
    ):
        grid("--seeds=0")
    assert not (tmp_path / "runs/a-0").exists()


def test_a_full_disk_ends_the_grid_with_a_sentence(grid, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "seconds.json")

    monkeypatch.setattr(ablation.Run, "result", full)
    with pytest.raises(SystemExit, match=r"the first: a/0: seconds.json could not be written \(No space left on devic"):
        grid("--rows=a", "--seeds=0,1,2,3,4,5")
    assert len(done(tmp_path)) <= 2, "the one that failed, and the one that had begun meanwhile"


def test_a_disk_that_is_full_for_a_command_ends_the_grid(grid, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/broken").touch()
    monkeypatch.setattr(ablation, "_last", lambda _: "x could not be written (No space left on device); free some")
    with pytest.raises(SystemExit, match=r"5 runs failed; the first: a/0: train ended with status 1: x could not be"):
        grid("--rows=a", "--seeds=0,1,2,3,4")
    assert len(done(tmp_path)) <= 2 and "No space left" in capsys.readouterr().out


def test_a_row_whose_runs_were_deleted_is_left_out(grid, tmp_path):
    grid("--seeds=0")
    file = tmp_path / "out/grid.json"
    book = json.loads(file.read_text())
    del book["runs"]["a/0"]
    file.write_text(json.dumps(book))
    grid("--tables")
    assert "`a`" not in (tmp_path / "out/grid.md").read_text()


def test_the_record_of_another_grid_is_left_alone(grid, tmp_path, monkeypatch):
    grid("--seeds=0")
    before = (tmp_path / "out/grid.md").read_text()
    monkeypatch.setattr(sys.modules["stand_in"], "ROWS", {"b": ("another",)})
    for arguments in (["--tables"], ["--seeds=1"]):
        with pytest.raises(SystemExit, match=r"grid.json: expected rows of stand_in, found a, base; it is another gri"):
            grid(*arguments)
    assert (tmp_path / "out/grid.md").read_text() == before


def test_jobs_are_for_cpus(grid, monkeypatch):
    monkeypatch.setattr(ablation, "device", lambda: ("gpu", "NVIDIA H100"))
    monkeypatch.setattr(ablation.Book, "check", lambda *_: None)
    with pytest.raises(SystemExit, match="--jobs: expected 1 where runs compute on one and the same gpu, got 2"):
        grid("--seeds=0", "--jobs=2")


def test_checkpoints_stay_if_asked(grid, tmp_path):
    grid("--rows=a", "--seeds=5", "--keep")
    assert (tmp_path / "runs/a-5/train/checkpoints").is_dir()


def test_a_run_that_fails_is_named_and_not_recorded(grid, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/broken").touch()
    with pytest.raises(SystemExit, match=r"1 runs failed; the first: a/0: train ended with status 1: no room left \("):
        grid("--seeds=0")
    assert list(json.loads((tmp_path / "out/grid.json").read_text())["runs"]) == ["base/0"]


def test_a_row_of_another_configuration_is_refused(grid, tmp_path):
    grid("--rows=a", "--seeds=0")
    file = tmp_path / "out/grid.json"
    file.write_text(file.read_text().replace('"rate": 0.1', '"rate": 0.2'))
    with pytest.raises(
        SystemExit, match=r"row 'a' was recorded with another configuration \(rate: there 0.2, here 0.1\)"
    ):
        grid("--rows=a", "--seeds=1")


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"RATHER": ["wide"]}, (), "row 'a' was recorded with another command (there 'python', here 'wide')"),
        ({"SAMPLES": 8}, (), "row 'a' was recorded with another setting (evaluation.late.samples: there 16, here 8)"),
        ({"DTYPE": "bfloat16"}, (), "recorded with another setting (dtype: there 'float32', here 'bfloat16')"),
        ({"BASE": "second"}, (), f"recorded with another setting (base: there '{BASE}', here '"),
        ({}, ("--smoke",), "row 'a' was recorded with another command (there None, here 'smoke')"),
        ({}, ("--runs=elsewhere", "--data=other"), None),
    ],
)
def test_runs_that_do_not_compare_are_refused(grid, tmp_path, monkeypatch, bases, change, arguments, message):
    grid("--rows=a", "--seeds=0")
    for name, value in change.items():
        monkeypatch.setattr(sys.modules["stand_in"], name, bases[1] if name == "BASE" else value)
    monkeypatch.chdir(tmp_path)
    if message is None:
        grid("--rows=a", "--seeds=0", *arguments)
    else:
        with pytest.raises(SystemExit, match=re.escape(message)):
            grid("--rows=a", "--seeds=1", *arguments)
    assert done(tmp_path) == ["a-0 train"]


def test_another_device_is_refused_and_so_is_a_record_without_one(grid, tmp_path, monkeypatch):
    grid("--rows=a", "--seeds=0")
    monkeypatch.setattr(ablation, "device", lambda: ("cpu", "TPU v5"))
    with pytest.raises(SystemExit, match=r"another setting \(device: there 'cpu', here 'TPU v5'\); name another --out"):
        grid("--rows=a", "--seeds=1")
    file = tmp_path / "out/grid.json"
    book = json.loads(file.read_text())
    del book["runs"]["a/0"]["conditions"]
    file.write_text(json.dumps(book))
    with pytest.raises(
        SystemExit, match=r"run 'a/0' was recorded without `conditions`.*delete it there to have it run"
    ):
        grid("--rows=a", "--seeds=1")
    assert done(tmp_path) == ["a-0 train"]
    grid("--rows=a", "--tables")
    del book["runs"]["a/0"]
    file.write_text(json.dumps(book))
    grid("--rows=a", "--seeds=0")


def test_a_conversion_by_other_options_is_not_taken(grid, tmp_path, monkeypatch, bases):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/broken").touch()
    for options in ([], [], ["wide"]):
        with pytest.raises(SystemExit, match="no room left"):
            grid("--rows=a", "--seeds=0")
        monkeypatch.setattr(sys.modules["stand_in"], "RATHER", options)
    with pytest.raises(SystemExit, match="no room left"):
        grid("--rows=a", "--seeds=0")
    assert (tmp_path / "runs/converted.txt").read_text() == "made\nmade wide\n"
    monkeypatch.setattr(sys.modules["stand_in"], "BASE", bases[1])
    with pytest.raises(SystemExit, match="no room left"):
        grid("--rows=a", "--seeds=0")
    assert (tmp_path / "runs/converted.txt").read_text() == "made\nmade wide\nmade wide\n", "from another base"
    (tmp_path / "runs/a-0/start.txt").unlink()
    (tmp_path / "runs/broken").unlink()
    grid("--rows=a", "--seeds=0")
    assert (tmp_path / "runs/converted.txt").read_text() == "made\n" + 3 * "made wide\n", "of unknown options"


def test_seconds_are_those_of_all_attempts_or_unknown(grid, tmp_path):
    folder = tmp_path / "runs/a-0"
    folder.mkdir(parents=True)
    (folder / "seconds.json").write_text('{"train": 1000.0}')
    (folder / "eval.log").touch()  # of an attempt that left no time
    grid("--rows=a", "--seeds=0")
    seconds = json.loads((tmp_path / "out/grid.json").read_text())["runs"]["a/0"]["seconds"]
    assert 1000 < seconds["train"] < 1100 and seconds["eval"] is None and 0 < seconds["convert"] < 100
    assert set(json.loads((folder / "seconds.json").read_text()).values()) == {0.0}, "it would start from nothing"


def test_seconds_of_a_killed_attempt_are_unknown(tmp_path):
    look = "import sys, pathlib; print(pathlib.Path(sys.argv[1], 'seconds.json').read_text())"
    run = ablation.Run("a", 0, tmp_path, {"train": ["python", "-c", look, str(tmp_path)]})
    assert run.do({})["train"] > 0
    assert json.loads((tmp_path / "train.log").read_text()) == {"train": None}, "while it runs"


def test_the_record_is_not_overwritten_by_a_smoke_test(grid, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"--smoke: expected another --out than docs/ablation.json, which is the rec"):
        grid("--smoke", f"--out={tmp_path / 'docs/ablation.json'}")


def test_without_matplotlib_nothing_runs(grid, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(SystemExit, match="the picture needs matplotlib, which is not installed; pip install"):
        grid("--seeds=0")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--rows=a,b", "--rows: expected some of base, a, got 'b'"),
        ("--rows=", "--rows: expected some of base, a, got ''"),
        ("--grid=", "--grid: expected a Python module, got ''"),
        ("--seeds=0;1", "--seeds: expected numbers with commas, as in 0,1,2, got '0;1'"),
        ("--grid=no_such_grid", "--grid: expected a Python module, got 'no_such_grid'"),
        ("--tables", "grid.json: expected recorded runs, found none"),
        ("--out=grid.md", "--out: expected a name that ends in .json (tables lie beside it), got grid.md"),
        ("--jobs=0", "--jobs: expected 1 or more, got 0"),
        ("--jobs=1000", "--jobs: expected at most one run for each of the "),
        ("--bases=x", "--bases: expected one checkpoint for each of 3 seeds, got 'x'"),
        ("--bases=x,,y", "--bases: expected one checkpoint for each of 3 seeds, got 'x,,y'"),
        ("--bases=x,y,z", "x: expected a model directory, found nothing"),
        ("--seeds=0,1,0", "--seeds: expected each once, got 0,1,0"),
        ("--rows=a,a", "--rows: expected each once, got a,a"),
        ("--grid=json", "--grid: expected a module with ROWS and BASE, as configs.digits_ablation, got json"),
    ],
)
def test_mistakes_are_one_sentence(grid, argument, message):
    with pytest.raises(SystemExit, match=re.escape(message)) as caught:
        grid(argument)
    assert "\n" not in str(caught.value)


def test_a_record_that_cannot_be_written_is_said_before_anything_runs(grid, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"^error: \[Errno \d+\] .*file'$"):
        grid("--seeds=0", f"--out={tmp_path / 'file' / 'grid.json'}")
    assert not (tmp_path / "runs").exists()


def test_intervals_in_closed_form():
    shares = [{"right": right, "count": 100} for right in (90, 92, 94)]
    mean, half = over_seeds(shares)
    assert mean == pytest.approx(0.92) and half == pytest.approx(4.302653 * 0.02 / 3**0.5, rel=1e-6)
    assert over_seeds(shares[:1]) == (0.9, None)
    assert pooled([{"right": 8, "count": 10}]) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert pooled(shares) == pytest.approx(pooled([{"right": 276, "count": 300}]))
    assert "-" in markdown({"a": "x"}, {"a/0": {"trainable": 1, "numbers": {"reads_late": shares[0]}}}).splitlines()[2]


def test_late_reads_are_those_of_the_last_positions_of_the_longest_split():
    share = {"right": 1, "count": 2}
    long = {"tokens": [9, 20], "exact": share, "reads": share, "text": share}
    found = numbers({
        "brief": {"normal": {**long, "tokens": [1, 8], "by_position": [{"right": 0, "count": 9}]}},
        "long": {"normal": {**long, "by_position": [{"right": 5, "count": 9}, {"right": 3, "count": 9}]}},
    })  # fmt: skip
    assert found["reads_late"] == {"right": 3, "count": 9} and "blind" not in found
    assert set(found) == {"text", "reads", "reads_late", "exact/brief", "exact/long"}


# ---- configs/digits_ablation.py ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        from configs import digits_ablation

        yield digits_ablation


def test_every_row_has_a_configuration_and_commands_that_fit_the_base(rows):
    sizes = ModelConfig.load(ROOT / rows.BASE)
    for name, (_, options, change) in rows.ROWS.items():
        given = rows.commands(name, 1, "runs/x")
        assert list(given) == ["convert"] * bool(options) + ["train"] * bool(change) + ["eval"]
        if change is None:
            continue
        config = rows.get_config(name)
        assert config.is_locked and all("samples" in stream for stream in config.data.streams.values())
        assert rows.get_config(f"{name},smoke").steps == 4
        assert (add_lora(sizes, **config.model.lora).lora is not None) == name.startswith("lora")
        if options:
            convert._parser().parse_args(given["convert"][3:])
    with pytest.raises(ValueError, match="expected one of slots, pvm, lora_all"):
        rows.get_config("pvn")


def test_rows_change_what_their_titles_say(rows):
    base = rows.get_config("pvm")
    assert not any(s.get("vision_masked") for s in rows.get_config("fan_in").data.streams.values())
    assert rows.get_config("dropout").to_dict() == base.to_dict(), "only the conversion differs"
    assert rows.get_config("paper_long").optimizer.learning_rate == 1e-4
    assert rows.get_config("lora_shift").data.position_shift == 450 and base.data.position_shift == 0
    splits = {n: {s.split for s in rows.get_config(n).data.streams.values()} for n in ("pvm_64", "lora_64", "lora_505")}
    assert splits == {"pvm_64": {"sft_64", "sft_easy"}, "lora_64": {"sft_64"}, "lora_505": {"sft_64", "sft_505"}}
    assert rows.get_config("pvm_505", "x").data.streams.long.path == "x/digits/long/2.2.0"


def test_what_each_row_trains_and_changes(rows):
    """Against tests/golden/ablation.txt: row, parameters that train, how it starts, and what differs from `pvm`."""
    base = json.loads((ROOT / rows.BASE / "config.json").read_text())
    pvm = leaves(json.loads(json.dumps(rows.get_config("pvm").to_dict())))

    @functools.cache
    def shapes(sizes: ModelConfig) -> dict[str, int]:
        model = nnx.eval_shape(lambda: Qwen3VL(sizes, rngs=nnx.Rngs(0)))
        return {name: variable.size for name, variable in flatten(nnx.state(model)).items()}

    lines = []
    for name, (_, options, change) in rows.ROWS.items():
        if change is None:
            continue
        config, raw = rows.get_config(name), base
        if options:
            given = vars(convert._parser().parse_args(rows.commands(name, 1, "x")["convert"][3:]))
            fields = {field: given[f"pvm_{field}"] for field in convert._PVMOptions.__dataclass_fields__}
            raw = convert._PVMOptions(**fields | {"seed": 0, "init": "normal"}).applied(base, ROOT)
        sizes = shapes(add_lora(ModelConfig.from_hf(raw), **config.model.lora))
        count = sum(sizes[parameter] for parameter in trainable_names(tuple(sizes), config.freeze))
        own = leaves(json.loads(json.dumps(config.to_dict())))
        changed = {".".join(key.split(".")[:3]) for key in own.keys() | pvm.keys() if own.get(key) != pvm.get(key)}
        start = " ".join(option.removeprefix("--pvm_") for option in options) if options else "base"
        lines.append(f"{name} | {count:,} | {start} | {' '.join(sorted(changed)) or '-'}")
    assert "\n".join(lines) + "\n" == (ROOT / "tests/golden/ablation.txt").read_text()


@pytest.mark.parametrize("record", ["ablation", "ablation_bases"])
def test_the_record_is_of_today_s_rows(rows, record, monkeypatch):
    """Configurations and commands as they are recorded are those that the grid has now."""
    monkeypatch.chdir(ROOT)
    book = Book(ROOT / f"docs/{record}.json")
    assert len(book.rows) >= 6
    for name in book.rows:
        (one, *_) = [run for key, run in book.runs.items() if key.rpartition("/")[0] == name]
        bases = {0: Base(**one["base"])} if "base" in one else None
        (run,) = ablation.plan(rows, [name], [0], Path("runs"), "runs/data", False, bases)
        here = ablation.conditions(rows, False) | ({} if bases else {"base": BASE})
        book.check(
            name,
            ablation.configuration(rows, run, "runs/data", False),
            lambda seed, base, name=name: rows.commands(name, seed, RUN, DATA, False, base),
            lambda here=here: here,
            bases,
        )


def test_commands_are_printed(rows, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    ablation.main(["--rows=slots,lora_mlp", "--seeds=2", "--print"])
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "# slots/2: learned slots instead of the image" and shown[4].startswith("# lora_mlp/2: ")
    recorded = json.loads((ROOT / "docs/ablation.json").read_text())["runs"]
    here = [line.replace("runs/ablation-a/", "runs/ablation/") for line in recorded["slots/2"]["commands"]]
    assert shown[1:4] == here and len(shown) == 7


TRAINS, SEEDS, LATE, BLIND, SHORT, MIDDLE, LONG = 2, 3, 4, 6, 7, 9, 10
"""Columns of the whole table."""


@pytest.mark.parametrize(
    "record, file, header, columns",
    [
        ("ablation", "docs/analysis.md", "| row | trains | seeds |", (TRAINS, SEEDS, LATE, BLIND, SHORT, MIDDLE, LONG)),
        ("ablation", "README.md", "| | trains | reads late |", (TRAINS, LATE, BLIND)),
        ("ablation_bases", "docs/analysis.md", "| row, three bases |", (SEEDS, LATE, BLIND, SHORT, MIDDLE, LONG)),
    ],
)
def test_the_tables_in_the_docs_are_the_record(rows, record, file, header, columns):
    """docs/*.md of a record and docs/analysis.md have every row that is recorded, README.md some of them."""
    book = json.loads((ROOT / f"docs/{record}.json").read_text())
    titles = {name: book["rows"][name]["title"] for name in rows.ROWS if name in book["rows"]}
    assert titles == {name: rows.ROWS[name][0] for name in titles}
    whole = markdown(titles, book["runs"])
    assert (ROOT / f"docs/{record}.md").read_text() == whole + "\n"
    recorded = {cells[1]: cells for cells in map(_cells, whole.splitlines()[2:])}
    text = (ROOT / file).read_text()
    table = re.search(rf"^{re.escape(header)}[^\n]*\n\|[ -|]*\n((\|[^\n]*\n)+)", text, re.M)[1]
    shown = [_cells(line) for line in table.splitlines()]
    assert len(shown) >= 6
    for title, *cells in shown:
        assert cells == [recorded[title][i] for i in columns], f"{file}: {title}"
    if file == "docs/analysis.md":
        assert [title for title, *_ in shown] == list(titles.values())


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_by_the_real_commands(tmp_path, monkeypatch):
    """Conversion, four steps with shifted positions, evaluation; as on a newcomer's machine, one device."""
    small = {
        "demo": {
            **{f"sft_{kind}": (6, Spec("train", 40)) for kind in ("easy", "64", "256")},
            "test_64": (3, Spec("test", 64)),
            "test_128": (3, Spec("test", 128, 66)),
            "test_256": (3, Spec("test", 256, 140, verbose=1.0)),
            "test_505": (3, Spec("test", 505, 490, verbose=1.0)),
        }
    }
    monkeypatch.setattr(digits, "SPLITS", small)
    digits.prepare(tmp_path / "data", "demo")
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    for name, value in tiny.without_torch(1).items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "grid.json"
    ablation.main(["--rows=pvm_shift", "--seeds=1", "--smoke", f"--data={tmp_path / 'data'}", f"--out={out}",
                   f"--runs={tmp_path / 'runs'}"])  # fmt: skip
    (run,) = json.loads(out.read_text())["runs"].values()
    assert run["trainable"] == 209_089 and set(run["seconds"]) == {"convert", "train", "eval"}
    assert {"reads_late", "blind_late", "exact/test_64", "exact/test_505"} <= set(run["numbers"])
    assert run["numbers"]["exact/test_505"]["count"] == 2
    assert not (tmp_path / "runs/pvm_shift-1/start").exists()
    assert (tmp_path / "runs/pvm_shift-1/train/metrics.jsonl").exists()
