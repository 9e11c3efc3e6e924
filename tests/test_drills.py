"""What goes wrong while a run saves, compiles, steps or evaluates; afterwards its metrics are those of an undisturbed
run, bit for bit."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
import tiny
import training_runs

from pvm_jax import cli, distributed
from pvm_jax.training import checkpoints as checkpoints_module
from pvm_jax.training.checkpoints import (
    CheckpointLost,
    complete_steps,
    damage,
    set_aside_damaged,
    write_files_list,
)
from pvm_jax.training.stage import TrainingError
from pvm_jax.training.step import TrainState

STEPS = 6

EVALUATOR = """
import os, signal

def make_evaluator(processor, name, *, kill_at):
    steps = []
    def evaluate(model):
        steps.append(len(steps))
        if len(steps) == kill_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"calls": (1.0, 1.0)}
    return evaluate
"""


@pytest.fixture(scope="module")
def setting(tmp_path_factory, small_checkpoint) -> training_runs.Setting:
    folder = tmp_path_factory.mktemp("drills")
    (folder / "killing_evaluator.py").write_text(EVALUATOR)
    (folder / "drill.py").write_text(
        "from configs import sft\n\n\ndef get_config(argument):\n    config = sft.get_config(argument).unlock()\n"
        "    config.evals = {'probe': {'module': 'killing_evaluator', 'every': 2, 'kill_at': 0}}\n"
        "    return config.lock()\n"
    )
    flags = (f"--config.steps={STEPS}", "--config.checkpoint.every=2", f"--config={folder / 'drill.py'}:smoke")
    return training_runs.Setting.write(folder, small_checkpoint, flags)


@pytest.fixture
def run(setting, monkeypatch):
    """`run(workdir, *flags) -> exit status` in this process, on one device."""
    monkeypatch.syspath_prepend(str(setting.folder))
    return lambda workdir, *flags: training_runs.run(monkeypatch, setting, workdir, *flags)


@pytest.fixture(scope="module")
def whole(setting, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(setting.folder))
        assert training_runs.run(patch, setting, workdir) == 0
    assert complete_steps(workdir / "checkpoints") == [4, 6]
    return workdir


def same(workdir: Path, whole: Path) -> bool:
    return training_runs.without_speeds(workdir) == training_runs.without_speeds(whole)


def test_sigterm_in_compile_in_a_step_and_in_evaluation(run, whole, tmp_path, monkeypatch, capsys):
    """Each time the step is finished and saved, the status is 75, and the next start goes on from there."""
    import train
    from pvm_jax.training.sft import SFT

    def terminate(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    original = SFT.loss_fn
    with monkeypatch.context() as patch:  # the loss is called while the step is traced for its compilation
        patch.setattr(SFT, "loss_fn", lambda *args: (terminate(), original(*args))[1])
        assert run(tmp_path / "w") == distributed.PREEMPTED == 75
    assert complete_steps(tmp_path / "w" / "checkpoints") == [1]

    put = train.put_batch
    with monkeypatch.context() as patch:
        calls = []
        patch.setattr(
            train, "put_batch", lambda *args: (calls.append(0), len(calls) == 2 and terminate(), put(*args))[2]
        )
        assert run(tmp_path / "w") == distributed.PREEMPTED
    assert complete_steps(tmp_path / "w" / "checkpoints") == [2, 3]

    assert run(tmp_path / "w", "--config.evals.probe.kill_at=1") == distributed.PREEMPTED
    assert complete_steps(tmp_path / "w" / "checkpoints") == [3, 4]
    assert "stopped by SIGTERM after step 4 of 6; start again to go on" in capsys.readouterr().out
    assert run(tmp_path / "w") == 0
    assert same(tmp_path / "w", whole)
    assert signal.getsignal(signal.SIGTERM) is before


KILL = """
import os, runpy, signal, sys
from pvm_jax.training import checkpoints
write = checkpoints.write_files_list
def write_or_die(directory):
    if directory.name.startswith("4"):
        os.kill(os.getpid(), signal.SIGKILL)
    write(directory)
checkpoints.write_files_list = write_or_die
del sys.argv[0]
runpy.run_path("train.py", run_name="__main__")
"""


def test_kill_9_during_an_asynchronous_save(setting, run, whole, tmp_path, capsys):
    """All data of step 4 is written, the directory is about to get its name."""
    argv = [sys.executable, "-c", KILL, "train.py", *setting.flags, f"--workdir={tmp_path / 'w'}"]
    env = tiny.without_torch(1, setting.folder, training_runs.ROOT)
    done = subprocess.run(argv, cwd=training_runs.ROOT, env=env, timeout=900, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    left = {path.name for path in (tmp_path / "w" / "checkpoints").iterdir()}
    assert "2" in left and "4" not in left and any(name.startswith("4.orbax-checkpoint-tmp") for name in left)
    assert run(tmp_path / "w") == 0
    assert "resuming from step 2" in capsys.readouterr().out
    assert same(tmp_path / "w", whole)


def test_truncated_checkpoint_is_set_aside_and_the_one_before_it_used(run, whole, tmp_path, monkeypatch, capsys):
    """Meanwhile other processes wait, for as long as it takes to read checkpoints."""
    limits = []
    monkeypatch.setattr(distributed.Cluster, "barrier", lambda self, name, limit=None: limits.append(limit))
    workdir = tmp_path / "w"
    shutil.copytree(whole, workdir)
    file = max((f for f in (workdir / "checkpoints" / "6").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    size = file.stat().st_size
    os.truncate(file, size // 2)
    assert run(workdir) == 0
    out = capsys.readouterr().out
    warning = f"warning: {file} has {size // 2} bytes instead of {size}: the checkpoint of step 6 is damaged"
    assert warning in out and "resuming from step 4" in out
    assert same(workdir, whole) and set(limits) == {distributed.PATIENCE}
    assert complete_steps(workdir / "checkpoints") == [4, 6] and (workdir / "checkpoints" / "6.damaged").is_dir()


def test_every_kind_of_damage_is_seen(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "w")
    newest = tmp_path / "w" / "checkpoints" / "6"
    file = max((f for f in newest.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    assert damage(newest) is None and set_aside_damaged(tmp_path / "w") == []
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert damage(newest) == f"{file} does not hold what was written"
    file.unlink()
    assert damage(newest) == f"{file} is missing"
    (newest / "_CHECKPOINT_METADATA").write_text("")
    assert damage(newest) == f"{newest / '_CHECKPOINT_METADATA'} is no JSON"
    (newest / "files.json").write_text("{")
    assert damage(newest) == f"{newest / 'files.json'} is no JSON"
    for step in (4, 6):
        (tmp_path / "w" / "checkpoints" / str(step) / "files.json").write_text("[")
    for reason in (r" \(.*6.files.json is no JSON: the checkpoint of step 6 is damaged, .*\)", ""):  # and started again
        with pytest.raises(TrainingError, match=rf"there are only 4.damaged, 6.damaged{reason}; bring back the files"):
            set_aside_damaged(tmp_path / "w")
    assert complete_steps(tmp_path / "w" / "checkpoints") == []


def test_damaged_checkpoints_are_set_aside_down_to_the_first_whole_one(tmp_path):
    """Files of any content; the newest has no list, as if it had been written before there was one."""
    directory = tmp_path / "checkpoints"
    for step in (1, 2, 3, 4):
        (directory / f"{step}").mkdir(parents=True)
        (directory / f"{step}" / "_CHECKPOINT_METADATA").write_text("{}")
        (directory / f"{step}" / "data").write_bytes(b"0123456789")
        write_files_list(directory / f"{step}")
        (directory / f"{step}" / "_CHECKPOINT_METADATA").write_text('{"time": 1}')
    (directory / "4" / "files.json").unlink()
    assert set_aside_damaged(tmp_path) == []

    (directory / "1" / "data").write_bytes(b"9876543210")
    (directory / "3" / "data").write_bytes(b"9876543210")
    (directory / "4").rename(directory / "3.damaged")
    assert set_aside_damaged(tmp_path) == [
        f"{directory / '3' / 'data'} does not hold what was written: the checkpoint of step 3 is damaged, "
        "now called 3.damaged1, and not used"
    ]
    assert complete_steps(directory) == [1, 2]
    os.truncate(directory / "2" / "data", 9)
    assert damage(directory / "2") == f"{directory / '2' / 'data'} has 9 bytes instead of 10"


def test_a_save_waits_for_the_one_before_it(tmp_path, monkeypatch):
    """Each checkpoint gets its own list of files, also when the disk is slower than the steps."""
    write = checkpoints_module.write_files_list
    monkeypatch.setattr(checkpoints_module, "write_files_list", lambda path: (time.sleep(0.3), write(path)))
    state = TrainState(jax.numpy.zeros((), int), {"a": jax.numpy.ones(3)}, {"m": jax.numpy.ones(3)})
    opened = checkpoints_module.Checkpoints(tmp_path)
    for step in (1, 2):
        opened.save(step, state, {})
    opened.save(2, state, {"again": True})
    opened.close()
    for step in (1, 2):
        directory = tmp_path / "checkpoints" / f"{step}"
        assert (directory / "files.json").is_file() and damage(directory) is None


def test_full_disk_during_a_save(run, whole, tmp_path, monkeypatch, capsys):
    """No file may grow beyond 32 KiB from the save of step 4 on: TensorStore's write fails in its thread."""
    save = checkpoints_module.Checkpoints.save
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(self, step, *args):
        if step == 4:
            self.wait()  # the save of step 2 has its room
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, hard))
        save(self, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints_module.Checkpoints, "save", full)
        try:
            with pytest.raises(CheckpointLost) as error:
                run(tmp_path / "w")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    sentence = cli.sentence(error.value)
    assert sentence.startswith(f"{tmp_path / 'w' / 'checkpoints' / '4'} could not be written (")
    assert sentence.endswith("; the checkpoint of step 2 is intact") and "\n" not in sentence
    assert damage(tmp_path / "w" / "checkpoints" / "2") is None
    assert run(tmp_path / "w") == 0
    assert "resuming from step 2" in capsys.readouterr().out
    assert same(tmp_path / "w", whole)


def test_paths_that_cannot_be_used_are_sentences_too(tmp_path):
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")
    expected = "metrics.jsonl could not be written (No space left on device); free some space and start again"
    assert cli.sentence(error) == expected
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError) as error:
        (tmp_path / "file" / "run").mkdir()
    assert cli.sentence(error.value).startswith(
        f"{tmp_path}/file/run: Not a directory; expected a directory, and a part"
    )
    denied = cli.sentence(PermissionError(errno.EACCES, "Permission denied", "/root/run"))
    assert denied == "/root/run: Permission denied; expected a place that this user may read and write"
    assert cli.sentence(PermissionError(errno.EPERM, "not of a file")) is None
    assert cli.sentence(OSError(errno.ENOENT, "?")) is None and cli.sentence(ValueError("a bug")) is None


def test_checkpoint_of_another_model(whole):
    opened = checkpoints_module.Checkpoints(whole)
    other = {"text/layers/1/pvm_block/gate_alpha": jax.ShapeDtypeStruct((1, 2), "float32")}
    with pytest.raises(TrainingError, match=r"expected the trainable parameters of this configuration, but \d+ differ"):
        opened.restore_trainable(6, other)
    opened.close()
