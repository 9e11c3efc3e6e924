"""Several processes: the same batches, losses and stops as one; whoever is lost, late or failed is named.

What processes say to each other is tested with clusters in threads over a store in memory; two real processes over
loopback then train, lose one of them, and go on as one.
"""

import collections
import dataclasses
import itertools
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import grpo_stages
import jax
import numpy as np
import pytest
import test_loader
import tiny
import training_runs
from test_loader import Memory, processor  # noqa: F401  a fixture

from pvm_jax import distributed
from pvm_jax.checkpoint import load_model
from pvm_jax.data.images import DataError
from pvm_jax.data.loader import Loader, Stream
from pvm_jax.data.processor import Processor
from pvm_jax.data.share import Share
from pvm_jax.distributed import Cancelled, Cluster, DistributedError
from pvm_jax.evals import agreement, asking, digits, harness, protocols
from pvm_jax.evals.plugins import Evaluation
from pvm_jax.evals.questions import Question
from pvm_jax.evals.results import ResultError
from pvm_jax.sharding import MESH_AXES, local_rows, make_mesh, take_rows
from pvm_jax.training.checkpoints import complete_steps
from pvm_jax.training.stage import TrainingError


class Store:
    """The coordination service's key-value store, in memory."""

    def __init__(self):
        self.values: dict[str, str] = {}
        self.changed = threading.Condition()

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        with self.changed:
            assert allow_overwrite or key not in self.values
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, milliseconds / 1000):
                raise jax.errors.JaxRuntimeError(f"DEADLINE_EXCEEDED: GetKeyValue() timed out with key: {key}")
            return self.values[key]

    def key_value_dir_get(self, prefix: str) -> list[tuple[str, str]]:
        with self.changed:
            return [(key, value) for key, value in self.values.items() if key.startswith(prefix)]

    def key_value_delete(self, key: str) -> None:
        with self.changed:
            self.values.pop(key, None)


class Ended(BaseException):
    """Stands for the end of a process."""


@pytest.fixture
def ended(monkeypatch) -> Iterator[list[tuple[str, str]]]:
    """Clusters over a store in memory that poll quickly; (thread, sentence) of those that ended their process."""
    store, sentences = Store(), []

    def end(sentence: str) -> None:
        sentences.append((threading.current_thread().name, sentence))
        raise Ended

    monkeypatch.setattr(distributed, "_store", lambda: store)
    monkeypatch.setattr(distributed, "_POLL", 0.02)
    monkeypatch.setattr(distributed, "_exit", end)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)  # Ended in a watching thread
    yield sentences

    def gone() -> None:
        raise Ended

    monkeypatch.setattr(distributed, "_store", gone)  # ends the threads of clusters that were left by an exception
    for thread in threading.enumerate():
        if thread.name == "watch":
            thread.join(timeout=10)


def together(count: int, work, limit: float = 30.0) -> list:
    """`work(i)` in a thread each; their results, or the exceptions that they raised."""
    results: list = [None] * count

    def one(i: int) -> None:
        try:
            results[i] = work(i)
        except (Exception, Ended) as error:
            results[i] = error

    threads = [threading.Thread(target=one, args=(i,), name=f"process {i}") for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(limit)
        assert not thread.is_alive(), "they wait for each other"
    return results


# ---- Saying and waiting ------------------------------------------------------------------------------------------


def test_exchange_gives_everybody_everything(ended):
    clusters = [Cluster(i, 3) for i in range(3)]
    assert together(3, lambda i: clusters[i].exchange("sizes", f"text {i}")) == [["text 0", "text 1", "text 2"]] * 3
    assert Cluster().exchange("sizes", "alone") == ["alone"]


def test_barrier_names_the_processes_that_do_not_come(ended):
    clusters = [Cluster(i, 4, start_limit=0.1) for i in range(4)]
    clusters[2]._tell("alive", "1 tpu-b")
    results = together(4, lambda i: clusters[i].barrier("ready") if i in (0, 1) else None)
    expected = "barrier/ready: process 2 (host tpu-b) and process 3 did not come within 0.1 s"
    assert [str(r) for r in results[:2]] == [expected, expected]
    assert isinstance(results[0], DistributedError)


def test_exchange_of_a_batch_nobody_needs_ends(ended):
    cluster, asked = Cluster(0, 2, start_limit=5.0), threading.Event()
    threading.Timer(0.1, asked.set).start()
    with pytest.raises(Cancelled):
        cluster.exchange_of_step(3, "text", asked.is_set)


def test_processes_that_do_not_agree_say_in_what(ended):
    same = {"step": 3, "config.mesh": {"fsdp": -1}, "config.frozen": ("a",)}

    def agree(name: str, of_process_1: dict) -> list:
        facts = [same, of_process_1]
        return together(2, lambda i: Cluster(i, 2).agree(name, facts[i]))

    assert agree("equal", dict(same)) == [None, None]
    for name, other, message in (
        (
            "a value",
            same | {"step": 2},
            "a value: expected the same in all processes, got step = 2 in process 1 and 3 in",
        ),
        (
            "a key",
            same | {"jax": "0.10"},
            "got jax = '0.10' in process 1 and None in process 0; start the same command",
        ),
    ):
        for error in agree(name, other):
            assert isinstance(error, DistributedError) and message in str(error)


def test_a_connection_that_comes_back_is_no_end(ended, monkeypatch):
    """The third to sixth call of the store fails, in exchanges and in watching threads."""
    store, calls = distributed._store(), collections.Counter()

    class Flaky:
        def __getattr__(self, name: str):
            def call(*arguments, **options):
                thread = threading.current_thread()
                calls[thread] += 1
                if 3 <= calls[thread] <= 6:
                    raise jax.errors.JaxRuntimeError("UNAVAILABLE: failed to connect to all addresses")
                return getattr(store, name)(*arguments, **options)

            return call

    flaky = Flaky()
    monkeypatch.setattr(distributed, "_store", lambda: flaky)

    def work(i: int) -> list[list[str]]:
        with Cluster(i, 2, silence_limit=5.0) as cluster:
            given = [cluster.exchange(f"turn {turn}", str(i)) for turn in range(4)]
            deadline = time.monotonic() + 10
            while calls[cluster._thread] < 10 and cluster._thread.is_alive() and time.monotonic() < deadline:
                time.sleep(0.01)
            assert cluster._thread.is_alive()
            return given

    assert together(2, work) == [[["0", "1"]] * 4] * 2
    assert len(calls) == 4 and min(calls.values()) > 6 and ended == []

    broken = jax.errors.JaxRuntimeError("UNAVAILABLE: failed to connect to all addresses")
    gone = types.SimpleNamespace(key_value_set=lambda *_, **__: (_ for _ in ()).throw(broken))
    monkeypatch.setattr(distributed, "_store", lambda: gone)
    with pytest.raises(jax.errors.JaxRuntimeError, match="failed to connect"):
        Cluster(0, 2, silence_limit=0.2).exchange("never", "")


def test_one_of_several_hosts_that_was_not_told_so(monkeypatch):
    assert Cluster().devices() == f"{jax.device_count()} {jax.devices()[0].device_kind}"
    monkeypatch.setattr(jax, "process_count", lambda: 16)
    assert Cluster(0, 16).devices().endswith(" in 16 processes")
    with pytest.raises(DistributedError, match=r"expected 1 process, .* JAX finds 16: .* --distributed"):
        Cluster().devices()


def test_sizes_of_old_batches_are_forgotten(ended):
    clusters = [Cluster(i, 2) for i in range(2)]
    said = together(2, lambda i: [clusters[i].exchange_of_step(step, "text", lambda: False) for step in range(5)])
    assert said == [[["text"] * 2] * 5] * 2
    assert len(distributed._store().key_value_dir_get("pvm_jax/batch/")) <= 4


def test_workdir_that_is_not_shared(ended, tmp_path):
    clusters = [Cluster(i, 2, start_limit=1.0) for i in range(2)]
    assert together(2, lambda i: clusters[i].check_shared(tmp_path / "w")) == [None, None]
    assert list((tmp_path / "w").iterdir()) == []
    distributed._store().values.clear()  # of another run
    again = [Cluster(i, 2, start_limit=1.0) for i in range(2)]
    results = together(2, lambda i: again[i].check_shared(tmp_path / f"of host {i}"))
    for i, error in enumerate(results):
        assert str(error) == (
            f"--workdir={tmp_path}/of host {i}: process 1 cannot see what process 0 writes there; "
            "expected a directory that all hosts share"
        )


def test_a_process_at_work_is_waited_for_longer_than_one_that_starts(ended, tmp_path):
    clusters = [Cluster(i, 2, start_limit=0.1) for i in range(2)]

    def work(i: int) -> None:
        time.sleep(0.4 * i)
        clusters[i].check_shared(tmp_path, distributed.PATIENCE)

    assert together(2, work) == [None, None]
    assert isinstance(together(2, lambda i: clusters[0].barrier("ready") if i == 0 else None)[0], DistributedError)


# ---- Failing and stopping ----------------------------------------------------------------------------------------


def test_one_failure_ends_all_with_its_message(ended):
    clusters = [Cluster(i, 3, silence_limit=5.0) for i in range(3)]

    def work(i: int) -> None:
        with clusters[i]:
            if i == 1:
                raise DistributedError("the disk of this host is full")
            time.sleep(0.3)  # in a collective

    results = together(3, work)
    assert isinstance(results[1], Ended)
    said = dict(ended)
    assert said["process 1"] == "the disk of this host is full"
    watchers = [sentence for name, sentence in ended if name == "watch"]
    host = socket.gethostname()
    assert watchers == [f"process 1 (host {host}) failed: the disk of this host is full"] * 2


def test_guard_tells_before_anything_is_closed(ended):
    with pytest.raises(Ended), Cluster(0, 2).guard():
        raise DistributedError("no")
    assert ended == [("MainThread", "no")]
    assert distributed._store().values["pvm_jax/watch/error/0"] == "no"
    with pytest.raises(ZeroDivisionError), Cluster().guard():
        raise ZeroDivisionError


def test_process_0_ends_when_all_have_heard_why(ended, monkeypatch):
    """What processes say to each other ends with process 0, which waits for ten looks of the others."""
    monkeypatch.setattr(distributed, "_POLL", 0.2)
    clusters, heard, over = [Cluster(i, 3, silence_limit=9.0) for i in range(3)], [], threading.Event()
    end = distributed._exit

    def recorded(sentence: str) -> None:
        if threading.current_thread().name == "process 0":
            heard.extend(clusters[0]._read()["seen"])
            over.set()
        end(sentence)

    monkeypatch.setattr(distributed, "_exit", recorded)

    def work(i: int) -> None:
        with clusters[i]:
            if i == 0:
                raise DistributedError("no")
            over.wait(timeout=20)

    together(3, work)
    assert sorted(heard) == [1, 2]


def test_a_collective_that_breaks_leaves_the_word_to_the_process_that_broke_it(ended):
    """Process 0 notices first that process 1 is gone, and does not know why."""
    clusters = [Cluster(i, 2, silence_limit=2.0) for i in range(2)]

    def work(i: int) -> None:
        with clusters[i]:
            if i == 0:
                raise jax.errors.JaxRuntimeError("UNAVAILABLE: connection closed by peer")
            time.sleep(0.3)
            raise DistributedError("the disk of this host is full")

    together(2, work)
    first = next(sentence for name, sentence in ended if name == "watch")
    assert first == f"process 1 (host {socket.gethostname()}) failed: the disk of this host is full"


def test_silent_process_is_named_and_a_finished_one_is_not(ended):
    """Process 1 has finished long ago when process 2 falls silent."""
    clusters = [Cluster(i, 3, silence_limit=1.0) for i in range(3)]

    def work(i: int) -> None:
        if i == 2:
            for beat in range(8):
                clusters[2]._tell("alive", f"{beat} tpu-b")
                time.sleep(0.1)
            return
        with clusters[i]:
            deadline = time.monotonic() + 20
            while i == 0 and not ended and time.monotonic() < deadline:
                time.sleep(0.05)

    together(3, work)
    assert [sentence for _, sentence in ended] == [
        "no sign of life from process 2 (host tpu-b) for 1 s; start the run again, it goes on from its last checkpoint"
    ]


def test_a_process_that_was_suspended_accuses_nobody(ended, monkeypatch):
    """Its clock has gone on by 100 seconds between two looks at signs that come every 0.3."""
    cluster, wakes = Cluster(0, 2, silence_limit=5.0), time.monotonic() + 0.5
    clock = types.SimpleNamespace(
        sleep=time.sleep, monotonic=lambda: time.monotonic() + (100 if time.monotonic() > wakes else 0)
    )
    monkeypatch.setattr(distributed, "time", clock)
    with cluster:
        for beat in range(5):
            Cluster(1, 2)._tell("alive", f"{beat} tpu-b")
            time.sleep(0.3)
    assert ended == []


@pytest.mark.parametrize("seed", range(4))
def test_sigterm_stops_all_processes_after_the_same_step(ended, seed):
    """A step is a collective that waits for the other process; hosts run up to two steps ahead of it. The signal
    reaches one process (even seeds) or both."""
    rng = np.random.default_rng(seed)
    clusters = [Cluster(i, 2) for i in range(2)]
    begun = [threading.Semaphore(0), threading.Semaphore(0)]
    pauses = rng.random((2, 200)) * 0.01
    signal_at = int(rng.integers(0, 40))

    def work(i: int) -> int:
        with clusters[i] as cluster:
            if cluster.stop_after(0):
                return 0
            for step in range(1, 200):
                begun[i].release()
                if step > 2:  # the result of step - 2 needs the other process to have begun it
                    assert begun[1 - i].acquire(timeout=10)
                time.sleep(pauses[i][step])
                if step == signal_at and (i == 1 or seed % 2):
                    cluster._on_sigterm(signal.SIGTERM, None)
                if cluster.stop_after(step):
                    return step
        return -1

    first, second = together(2, work)
    assert first == second and (first >= signal_at or signal_at == 0)


def test_nobody_agrees_before_all_have_answered(monkeypatch):
    told = []
    cluster = Cluster(0, 3)
    monkeypatch.setattr(cluster, "_tell", lambda *what: told.append(what))
    assert not cluster.stop_after(4)
    cluster._negotiate({1: "7"}, {})  # process 1 wishes to stop: this one answers
    cluster._negotiate({0: "5", 1: "7"}, {})
    assert told == [("stop", "5")] and not cluster._agreement.is_set()
    cluster._negotiate({0: "5", 1: "7"}, {2: "9"})  # process 2 had ended
    assert not cluster.stop_after(8) and cluster.stop_after(9)


def test_sigterm_after_another_process_has_finished(ended):
    """Nobody waits for an answer of a process that gives none any more."""
    clusters = [Cluster(i, 2) for i in range(2)]

    def work(i: int) -> list[bool]:
        with clusters[i] as cluster:
            stops = [cluster.stop_after(step) for step in range(3)]
            if i == 1:
                while 0 not in cluster._read()["done"]:
                    time.sleep(0.01)
                cluster._on_sigterm(signal.SIGTERM, None)
                time.sleep(0.1)
                stops.append(cluster.stop_after(3))
        return stops

    assert together(2, work) == [[False] * 3, [False] * 3 + [True]]


def test_sigterm_reaches_a_single_process():
    before = signal.getsignal(signal.SIGTERM)
    with Cluster(stops=True) as cluster:
        assert not cluster.stop_after(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert cluster.stop_after(2)
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_ends_a_process_that_only_joined(ended):
    """Joining lets JAX catch the signal, for a run that then asks JAX; nobody here does."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with Cluster(0, 2):
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_orderly_exit_is_no_failure(ended):
    with pytest.raises(SystemExit), Cluster(0, 2) as cluster, cluster.guard():
        raise SystemExit(2)
    assert ended == [] and "pvm_jax/watch/error/0" not in distributed._store().values


# ---- Joining -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("host:1", None, 0), "--num_processes: expected all of --coordinator, --num_processes, --process_id or none"),
        (("host", 2, 0), "--coordinator: expected HOST:PORT of process 0, got 'host'"),
        (("host:1", 2, 2), "--process_id: expected 0 to 1 with --num_processes=2, got 2"),
    ],
)
def test_flags_that_do_not_fit(arguments, sentence):
    with pytest.raises(DistributedError, match=f"^{sentence}"):
        distributed.join(*arguments)


def test_one_process_on_a_host_of_slurm_has_all_gpus_also_when_it_is_told_its_number(monkeypatch):
    given = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: given.update(arguments))
    for hosts, own in (("2", []), ("1", None)):
        monkeypatch.setenv("SLURM_NTASKS", "2")
        monkeypatch.setenv("SLURM_STEP_NUM_NODES", hosts)
        distributed.join("host:1", 2, 0)
        assert given["num_processes"] == 2 and given["local_device_ids"] == own
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "0,1")
    distributed.join("host:1", 2, 0)
    assert given["local_device_ids"] is None, "JAX reads the variable"


def test_distributed_asks_the_environment(monkeypatch, tmp_path):
    def nobody(**arguments):
        assert "coordinator_address" not in arguments
        raise ValueError("no cluster here")

    monkeypatch.setattr(jax.distributed, "initialize", nobody)
    setting = training_runs.Setting(tmp_path, ("--config=configs/sft.py:4b,smoke",))
    with pytest.raises(DistributedError, match=r"^cannot join the coordinator that the environment names \(no cluster"):
        training_runs.run(monkeypatch, setting, tmp_path / "w", "--distributed")


def test_coordinator_that_does_not_answer():
    port = free_port()
    script = f"from pvm_jax import distributed; distributed.join('127.0.0.1:{port}', 2, 1, start_limit=2)"
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=training_runs.ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1 and time.monotonic() - began < 120
    assert done.stderr.splitlines()[-1] == (
        f"error: 127.0.0.1:{port} does not answer, or other processes are missing, after 2 s; "
        "start the same command on every host and let port and firewall admit it"
    )


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# ---- Batches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("pack", [True, False])
def test_batches_are_those_of_one_process(ended, processor, count, pack):  # noqa: F811
    """Packed rows and over-long samples included; each process has only its own rows."""
    source = Memory(12)
    options = {"row_multiple": count, "pack": pack}
    alone = test_loader.make(processor, source, samples=6, length=(64, 100), loader=options)
    clusters = [Cluster(i, count) for i in range(count)]

    def rows(i):
        return lambda total: range(i * total // count, (i + 1) * total // count)

    def work(i: int) -> list:
        share = Share(i, count, rows(i), clusters[i].exchange_of_step)
        stream = Stream(source, 6, (64, 100), 64)
        return [Loader([stream], processor, seed=3, share=share, **options).batch(step) for step in range(3)]

    parts = together(count, work)
    skipped = 0
    for step in range(3):
        batch, info = alone.batch(step)
        skipped += len(info.skipped)
        for i in range(count):
            got, got_info = parts[i][step]
            mine = rows(i)(len(batch.tokens))
            assert got_info == dataclasses.replace(info, local_rows=tuple(mine))
            assert test_loader.same(got, take_rows(batch, np.array(mine)))
    assert skipped > 0


def test_each_process_encodes_a_share_and_its_rows(ended, processor):  # noqa: F811
    encoded = [0, 0]

    class Counting:
        def __init__(self, i: int):
            self.i = i

        def encode(self, record):
            encoded[self.i] += 1
            return processor.encode(record)

    clusters = [Cluster(i, 2) for i in range(2)]

    def work(i: int) -> None:
        share = Share(i, 2, lambda total: range(i * total // 2, (i + 1) * total // 2), clusters[i].exchange_of_step)
        stream = Stream(Memory(32), 32, 256, 64)
        Loader([stream], Counting(i), seed=0, row_multiple=2, share=share).batch(0)

    together(2, work)
    assert 32 <= sum(encoded) <= 64 and max(encoded) < 32


class Unread:
    """Prompts of which one cannot be read here, or which are fewer."""

    def __init__(self, prompts, name: str = "", fewer: int = 0):
        self._prompts, self._name, self._count = prompts, name, len(prompts) - fewer

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int):
        if self._prompts[index].id == self._name:
            raise DataError("the network file system of this host does not answer")
        return self._prompts[index]


def test_a_rollout_of_different_prompts_ends_all_processes(ended, small_checkpoint, tmp_path):
    """The second one finds another prompt in place of one that it cannot read, or has fewer to choose from."""
    file = grpo_stages.write_prompts(tmp_path)
    stages = [grpo_stages.make(small_checkpoint, file, data={"bad_rows": "skip"}) for _ in range(2)]
    for i, stage in enumerate(stages):
        stage._setup = dataclasses.replace(stage._setup, share=Share(i, 2, range, Cluster(i, 2).exchange_of_step))
    whole = stages[0]._prompts
    drawn = [prompt.id for prompt in stages[0]._draw(1)[0]]

    class Asked(Exception):
        """The policy was asked for."""

    def policy():
        raise Asked

    def begin(number: int) -> list:
        return together(2, lambda i: stages[i].next_batch(number, policy))

    assert [type(result) for result in begin(0)] == [Asked, Asked]
    stages[1]._prompts = Unread(whole, drawn[1])
    first, second = begin(1)
    assert isinstance(first, TrainingError) and str(first) == str(second)
    found = rf"process 1 prompt p\d \(\d+ tokens, \d+ patches\), and in process 0 {drawn[1]} \(\d+, \d+\); see in "
    assert re.match(rf"rollout 1: expected the same prompts in all processes, found in {found}", str(first))
    stages[1]._prompts = Unread(whole, fewer=1)
    assert all("process 1 8 prompts can be used, and in process 0 9;" in str(error) for error in begin(2))


def test_batches_of_questions_are_the_same_in_all_processes(ended, processor):  # noqa: F811
    """The second process cannot read q2, none of them q5; later a prompt is longer there."""
    task = protocols.task("plain", "file")
    questions = [Question(f"q{i}", tiny.text(i, 4 + 20 * (i % 2)), "?") for i in range(10)]
    clusters, turns = [Cluster(i, 2) for i in range(2)], [itertools.count(), itertools.count()]

    def exchange(i: int) -> agreement.Exchange:
        return lambda text: clusters[i].exchange_of_step(next(turns[i]), text, lambda: False, "questions")

    def batches(i: int, strange: str = "") -> list:
        def content(question, images):
            if question.index == "q5" or (question.index == "q2" and i == 1):
                raise DataError(f"{question.index} cannot be read")
            return task.content(question, images) + [{"type": "text", "text": "more " * 40}] * (
                question.index == strange and i == 1
            )

        own = dataclasses.replace(task, content=content)
        made = asking._batches(processor, own, questions, asking.Shapes(threads=2), 3, exchange(i))
        return [
            (one.question.index, one.error)
            if isinstance(one, asking.Asked)
            else (one[0], [asked.question.index for asked in one[1]])
            for one in made
        ]

    first, second = together(2, batches)
    assert first == second and ("q2", "in process 1: q2 cannot be read") in first
    assert ("q5", "q5 cannot be read") in first
    assert sorted(i for shape, names in first if isinstance(shape, tuple) for i in names) == [
        f"q{i}" for i in (0, 1, 3, 4, 6, 7, 8, 9)
    ]
    assert max(len(names) for shape, names in first if isinstance(shape, tuple)) == 3
    first, second = together(2, lambda i: batches(i, "q7"))
    assert isinstance(first, ResultError) and str(first) == str(second)
    assert re.match(r"expected the same prompts in all processes, found question q7 \(T=\d+, P=\d+\) in pr", str(first))


def test_other_questions_in_one_process_end_all(ended):
    clusters, turns = [Cluster(i, 2) for i in range(2)], itertools.count()

    def check(checksums: str, *asked: list[str]) -> list:
        turn = next(turns)

        def work(i: int) -> None:
            def exchange(text: str) -> list[str]:
                return clusters[i].exchange_of_step(turn, text, lambda: False, "questions")

            agreement.check_same("own", checksums[i], asked[i], [], exchange)

        return together(2, work)

    assert check("aa", ["1", "2"], ["1", "2"]) == [None, None]
    for case in (("ab", ["1"], ["1"]), ("aa", ["1", "2"], ["1"]), ("aa", ["1", "2"], ["1", "3"])):
        first, second = check(*case)
        assert isinstance(first, ResultError) and str(first) == str(second)
        assert str(first).startswith("own: expected the same questions in all processes, found ")


class Device:
    """Enough of a device for a mesh."""

    platform = device_kind = "none"

    def __init__(self, id: int):
        self.id, self.process_index = id, id // 4


@pytest.mark.parametrize(
    ("sizes", "process", "expected"),
    [
        ((4, 1, 2), 0, [0, 1, 2, 3, 4, 5]),
        ((4, 1, 2), 1, [6, 7, 8, 9, 10, 11]),
        ((1, 1, 8), 1, list(range(12))),  # the tensor axis spans both: both have all rows
        ((2, 1, 4), 0, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_rows_of_a_process(monkeypatch, sizes, process, expected):
    """Eight devices, of which each process has four."""
    mesh = jax.sharding.Mesh(np.array([Device(i) for i in range(8)]).reshape(sizes), MESH_AXES)
    monkeypatch.setattr(jax, "process_index", lambda: process)
    assert local_rows(12, mesh).tolist() == expected


# ---- Two processes over loopback ---------------------------------------------------------------------------------


class Pair:
    """A program in two processes of two devices each; with `with`, neither outlives the block."""

    def __init__(self, folder: Path, program: str, *flags: str):
        port = free_port()
        # All that the first pair compiles is there for the next, in the tests' own folder for later runs, too.
        cache = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        env = tiny.without_torch(2, training_runs.ROOT / "tests", training_runs.ROOT) | cache
        self._logs = [folder / f"log-{port}-{i}" for i in range(2)]
        self.processes = []
        for i in range(2):
            argv = [sys.executable, program, *flags, f"--coordinator=127.0.0.1:{port}", "--num_processes=2"]
            with self._logs[i].open("w") as log:
                process = subprocess.Popen(
                    [*argv, f"--process_id={i}"], cwd=training_runs.ROOT, env=env, stdout=log, stderr=log
                )
            self.processes.append(process)

    def __enter__(self) -> "Pair":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def log(self, i: int = 0) -> str:
        return self._logs[i].read_text()

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 900
        while not condition():
            assert self.processes[0].poll() is None and time.monotonic() < deadline, self.log()[-3000:]
            time.sleep(0.05)

    def statuses(self, timeout: float) -> list[int]:
        return [process.wait(timeout) for process in self.processes]


QUESTIONS = {"benchmark": "file:own", "protocol": "plain", "max_new_tokens": 6, "rows": 4,
             "prompt_length": [64], "patches": [16]}  # fmt: skip


UNREADABLE = """\
import sys

from pvm_jax.data.images import DataError
from pvm_jax.data.media import MediaReader

read = MediaReader.read


def failing(self, kind, entry, field):
    if str(entry).endswith("unreadable.png"):
        raise DataError(f"{field}: the network file system does not answer")
    return read(self, kind, entry, field)


if "--process_id=1" in sys.argv:
    MediaReader.read = failing

"""


@pytest.fixture(scope="module")
def setting(tmp_path_factory, small_checkpoint) -> training_runs.Setting:
    """A run that evaluates every four steps on six rows, some of whose answers' tokens count as reads."""
    folder = tmp_path_factory.mktemp("hosts")
    tokenizer = Processor.from_pretrained(small_checkpoint).tokenizer
    rows = []
    for i in range(6):
        tiny.image(i, 32, 64).save(folder / f"{i}.png")
        answer = tiny.text(70 + i, 8)
        offsets = tokenizer(answer, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
        rows.append({"id": f"{i}", "prompt": tiny.text(90 + i, 5), "completion": answer, "images": [f"{i}.png"],
                     "metadata": {"digit_spans": offsets[1::3]}})  # fmt: skip
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    protocol = {"module": "pvm_jax.evals.digits", "path": str(folder / "answers.jsonl"), "splits": ["all"],
                "samples": 4, "length": [64], "patches": [16]}  # fmt: skip
    tiny.image(5, 32, 64).save(folder / "unreadable.png")
    questions = [
        {"index": str(i), "question": tiny.text(40 + i, 5), "answer": "?", "image": f"{i}.png"} for i in range(5)
    ]
    questions.append({"index": "5", "question": tiny.text(45, 5), "answer": "?", "image": "unreadable.png"})
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    own = {"module": "pvm_jax.evals.harness", "path": str(folder / "questions.jsonl"), **QUESTIONS}
    (folder / "hosts.py").write_text(
        UNREADABLE + "from configs import sft, digits_eval\n\n\ndef get_config(argument):\n"
        "    config = (digits_eval if argument == 'eval' else sft).get_config('smoke').unlock()\n"
        f"    config.evals = {{'digits': {protocol!r} | ({{}} if argument == 'eval' else {{'every': 4}})}}\n"
        f"    if argument == 'eval':\n        config.evals.own = {own!r}\n"
        "    return config.lock()\n"
    )
    flags = (f"--config={folder / 'hosts.py'}:sft", "--config.steps=600", "--config.checkpoint.every=3")
    return training_runs.Setting.write(folder, small_checkpoint, flags)


def test_two_processes_train_and_evaluate_as_one_stop_lose_one_and_go_on_as_one(setting, tmp_path, monkeypatch, capsys):
    """Two processes of two devices each, parameters split over all four. SIGTERM to one of them saves and ends both;
    two new ones go on; process 1 is killed; one process with four devices goes on.
    """
    workdir, silence = tmp_path / "w", 10  # seconds that this test waits
    flags = (*setting.flags, f"--workdir={workdir}", f"--silence_limit={silence}")
    with Pair(tmp_path, "train.py", *flags) as pair:
        pair.until(lambda: complete_steps(workdir / "checkpoints") != [])
        pair.processes[1].send_signal(signal.SIGTERM)
        assert pair.statuses(timeout=300) == [distributed.PREEMPTED] * 2, pair.log()[-3000:]
        stopped = max(complete_steps(workdir / "checkpoints"))
        assert f"stopped by SIGTERM after step {stopped} of 600; start again to go on" in pair.log()

    with Pair(tmp_path, "train.py", *flags) as pair:
        pair.until(lambda: max(complete_steps(workdir / "checkpoints")) > stopped)
        pair.processes[1].send_signal(signal.SIGKILL)
        assert pair.processes[0].wait(timeout=silence + 60) == 1
        assert f"resuming from step {stopped}" in pair.log()
        assert pair.log().splitlines()[-1] == (
            f"error: no sign of life from process 1 (host {socket.gethostname()}) for {silence} s; "
            "start the run again, it goes on from its last checkpoint"
        )

    last = max(complete_steps(workdir / "checkpoints"))
    train_until(last + 2, monkeypatch, setting, workdir, start=last)
    assert f"resuming from step {last}" in capsys.readouterr().out
    train_until(last + 2, monkeypatch, setting, tmp_path / "whole")
    got, want = training_runs.without_speeds(workdir), training_runs.without_speeds(tmp_path / "whole")
    assert [line.keys() for line in got] == [line.keys() for line in want]
    assert sum("loss" in line for line in got) == last + 2
    evaluated = [line for line in got if "digits/all/normal/reads" in line]
    assert [line["step"] for line in evaluated] == list(range(4, last + 3, 4))
    for one, other in zip(got, want):
        np.testing.assert_allclose([*one.values()], [*other.values()], rtol=1e-5, err_msg=str(one["step"]))


def test_eval_in_two_processes_writes_the_results_of_one(setting, small_checkpoint, tmp_path):
    """But for a question whose image process 1 cannot read: nobody asks it."""
    config_file = setting.folder / "hosts.py"
    flags = (f"--config={config_file}:eval", f"--config.checkpoint={small_checkpoint}", f"--workdir={tmp_path}")
    with Pair(tmp_path, "eval.py", *flags) as pair:
        assert pair.statuses(timeout=900) == [0, 0], pair.log()[-3000:] + pair.log(1)[-3000:]
        assert "results:" in pair.log() and "results:" not in pair.log(1)
    mesh = make_mesh(fsdp=4, devices=jax.devices()[:4])
    options = runpy.run_path(str(config_file))["get_config"]("eval").to_dict()["evals"]["digits"]
    del options["module"]
    processor = Processor.from_pretrained(small_checkpoint)  # noqa: F811
    model = load_model(small_checkpoint, scan=True, mesh=mesh)
    summary, records, _ = digits.run(Evaluation("digits", model, processor, tmp_path, mesh=mesh), **options)
    assert json.loads((tmp_path / "digits.json").read_text())["summary"] == json.loads(json.dumps(summary))
    assert [json.loads(line) for line in (tmp_path / "digits.jsonl").read_text().splitlines()] == records
    assert len(records) == 6 * 3  # conditions
    given = QUESTIONS | {"path": str(setting.folder / "questions.jsonl")}
    summary, records, _ = harness.run(Evaluation("own", model, processor, tmp_path / "alone", mesh=mesh), **given)
    *made, unread = [json.loads(line) for line in (tmp_path / "own.jsonl").read_text().splitlines()]
    assert made == records[:5] and records[5]["completion"]
    assert unread["completion"] is None and unread["error"].startswith("in process 1: ")
    assert json.loads((tmp_path / "own.json").read_text())["summary"]["scores"] == json.loads(
        json.dumps(summary["scores"])
    )
    assert len({record["completion"] for record in records}) > 2


def train_until(step: int, patch: pytest.MonkeyPatch, setting, workdir, start: int = 0) -> None:
    """Trains on four devices and has itself stopped after a step: with another `steps` it would be another run."""
    with patch.context() as inner:
        inner.syspath_prepend(str(training_runs.ROOT))
        import train

        put, calls = train.put_batch, []

        def counted(*args):
            calls.append(0)
            if start + len(calls) == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return put(*args)

        inner.setattr(train, "put_batch", counted)
        assert training_runs.run(inner, setting, workdir, devices=4) == distributed.PREEMPTED
