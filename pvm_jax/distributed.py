"""Several processes, one run: how they find each other, wait for each other, stop together and fail together.

    with distributed.join("10.0.0.1:1234", num_processes=2, process_id=0) as cluster:
        cluster.barrier("ready")                      # DistributedError names the processes that did not come
        texts = cluster.exchange("sizes", "12 34")    # the text of every process, by its number
        for step in ...:
            with cluster.guard():                     # an exception here ends all processes with its message
                ...
            if cluster.stop_after(step):              # SIGTERM anywhere: True after the same step everywhere
                ...

Processes talk through the key-value store of JAX's coordination service, which runs in process 0. A thread in each
process writes a sign of life every second and reads those of the others; it ends its process when another one failed
(with that one's message) or has been silent for `silence_limit` seconds. Ending means `os._exit`: a collective that
another process has left never returns, and every orderly way out (JAX's shutdown, Orbax's last save) waits for all.

When process 0 is killed the coordination service dies with it, and jaxlib itself aborts the others at once (status
134, "the leader task was preempted/died"); no Python code runs any more then.

With one process everything here is free: barriers return, exchanges give back the text, exceptions pass through.
"""

import contextlib
import json
import math
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from absl import flags
from jax._src import distributed as jax_distributed  # the key-value store has no public name

from pvm_jax import cli

PREEMPTED = 75
"""Exit status of a run that SIGTERM stopped and that goes on when it is started again (EX_TEMPFAIL)."""

START_LIMIT = 300.0
SILENCE_LIMIT = 60.0
PATIENCE = 86_400.0
"""Seconds that processes which have begun wait for one at work; one that is lost ends them all much earlier."""
_POLL = 1.0
_ROOT = "pvm_jax"
# What a collective says whose other end is gone; the process that is gone, or the watcher, says why.
_BROKEN = re.compile(r"UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|[Cc]onnection|Gloo|gloo|NCCL")


class DistributedError(ValueError):
    """Processes that cannot work together; the message is one sentence that says which, and what to do."""


class Cancelled(Exception):
    """An exchange that nobody needs any more."""


def define_flags() -> None:
    """The flags of a program that several processes can run together."""
    flags.DEFINE_string("coordinator", None, "HOST:PORT where process 0 listens, the same in all processes.")
    flags.DEFINE_integer("num_processes", None, "How many processes run together; with --coordinator.")
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0; with --coordinator.")
    flags.DEFINE_bool("distributed", False, "Ask the environment for all that: Cloud TPU, GKE, SLURM or Open MPI.")
    flags.DEFINE_float("start_limit", START_LIMIT, "Seconds to wait for other processes to start.")
    flags.DEFINE_float("silence_limit", SILENCE_LIMIT, "Seconds without a sign of life: then a process counts as lost.")


def flag_values() -> dict[str, Any]:
    """The arguments of `join` that the flags of `define_flags` give."""
    names = ("coordinator", "num_processes", "process_id", "start_limit", "silence_limit")
    values = {name: flags.FLAGS[name].value for name in names}
    return values | {"detect": flags.FLAGS["distributed"].value}


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    detect: bool = False,
    stops: bool = False,
    start_limit: float = START_LIMIT,
    silence_limit: float = SILENCE_LIMIT,
) -> "Cluster":
    """Connects this process with the others; to be called before JAX touches a device.

    Args:
      coordinator: HOST:PORT where process 0 listens; then the two numbers are needed, too.
      detect: without a coordinator, ask the environment (Cloud TPU, GKE, SLURM, Open MPI); else this is one process.
      stops: SIGTERM does not end this process, it makes `Cluster.stop_after` true.
      start_limit: seconds to wait for the others, here and at barriers without a limit of their own.
      silence_limit: seconds without a sign of life after which a process counts as lost.

    Raises:
      DistributedError: the arguments do not fit, or the environment describes no cluster. A coordinator that does not
        answer and processes that do not come end this process with a sentence: jaxlib would abort it.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) == 3 and not detect:
        return Cluster(stops=stops, start_limit=start_limit, silence_limit=silence_limit)
    own = {"local_device_ids": _own_devices(os.environ)}
    if len(missing) == 3:
        _initialize(start_limit, "the coordinator that the environment names", **own)
    elif missing:
        raise DistributedError(f"{' and '.join(missing)}: expected all of --{', --'.join(given)} or none of them")
    else:
        _check(coordinator, num_processes, process_id)
        _initialize(
            start_limit,
            coordinator,
            coordinator_address=coordinator,
            num_processes=num_processes,
            process_id=process_id,
            **own,
        )
    limits = {"start_limit": start_limit, "silence_limit": silence_limit}
    return Cluster(jax.process_index(), jax.process_count(), stops=stops, **limits)


def _own_devices(environment: Mapping[str, str]) -> list[int] | None:
    """`local_device_ids` for JAX: none are named, so all, if a launcher began one process on this host.

    JAX takes every process of SLURM and Open MPI for one of a single device, that of its number on the host.
    """
    if environment.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    tasks, hosts = (environment.get(f"SLURM_{name}") for name in ("NTASKS", "STEP_NUM_NODES"))
    alone = (tasks is not None and tasks == hosts) or environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    return [] if alone else None


def _check(coordinator: str, num_processes: int, process_id: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise DistributedError(f"--coordinator: expected HOST:PORT of process 0, got {coordinator!r}")
    if not 0 <= process_id < num_processes:
        raise DistributedError(
            f"--process_id: expected 0 to {num_processes - 1} with --num_processes={num_processes}, got {process_id}"
        )


def _initialize(limit: float, where: str, **arguments: Any) -> None:
    def too_late() -> None:
        if arguments.get("process_id") == 0:
            problem = f"not all of the {arguments['num_processes']} processes came to {where} within {limit:g} s"
        else:
            problem = f"{where} does not answer, or other processes are missing, after {limit:g} s"
        _exit(f"{problem}; start the same command on every host and let port and firewall admit it")

    timer = threading.Timer(limit, too_late)
    timer.daemon = True
    timer.start()
    try:  # JAX's own time limit ends in an abort with a stack trace: let ours be the first
        jax.distributed.initialize(initialization_timeout=int(limit) + 60, **arguments)
    except (ValueError, RuntimeError) as error:
        raise DistributedError(
            f"cannot join {where} ({error}); where nothing is to be detected, pass --coordinator=HOST:PORT, "
            "--num_processes and --process_id, or leave --distributed out"
        ) from None
    finally:
        timer.cancel()


class Cluster:
    """The processes of a run, as one of them sees them; a context for as long as it works with the others."""

    def __init__(
        self,
        index: int = 0,
        count: int = 1,
        *,
        stops: bool = False,
        start_limit: float = START_LIMIT,
        silence_limit: float = SILENCE_LIMIT,
    ):
        self.index, self.count = index, count
        self._stops, self._limit, self._silence = stops, start_limit, silence_limit
        self._requested = False  # SIGTERM arrived here
        self._lock = threading.Lock()
        self._going_to = -1  # the last step that this process will run whatever is asked of it
        self._frozen = False  # that number has been told to the others
        self._agreed: int | None = None  # the last step of all
        self._agreement = threading.Event()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._before: Any = None

    def __enter__(self) -> "Cluster":
        main_thread = threading.current_thread() is threading.main_thread()
        if main_thread and (self._stops or self.count > 1):  # joining has let JAX catch SIGTERM
            self._before = signal.signal(signal.SIGTERM, self._on_sigterm if self._stops else signal.SIG_DFL)
        if self.count > 1:
            self._tell("alive", f"0 {socket.gethostname()}")
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if error is not None and not isinstance(error, SystemExit):
            self._fail(error)
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
        if self.count > 1:
            self._tell("done", str(self._going_to))
            self._done.set()
            self._thread.join()

    def devices(self) -> str:
        """What the processes have together: `16 NVIDIA H100 in 2 processes`.

        Raises:
          DistributedError: JAX counts other processes than have joined, as on hosts of one TPU slice.
        """
        if jax.process_count() != self.count:
            raise DistributedError(
                f"expected {self.count} process{'es' if self.count > 1 else ''}, as the flags say, JAX finds "
                f"{jax.process_count()}: this is one of several hosts; pass --distributed on all of them"
            )
        found = f"{jax.device_count()} {jax.devices()[0].device_kind}"
        return found if self.count == 1 else f"{found} in {self.count} processes"

    # ---- Waiting for each other ----------------------------------------------------------------------------------

    def agree(self, name: str, facts: Mapping[str, Any], limit: float = PATIENCE) -> None:
        """Returns when all processes have called it, each with the same facts (values as JSON has them).

        Raises:
          DistributedError: in all of them, about the first process and fact that differ from process 0's.
        """
        first, *others = map(json.loads, self.exchange(f"agreed/{name}", json.dumps(facts, default=str), limit))
        for i, other in enumerate(others, 1):
            for key in first | other:
                if (here := other.get(key)) != (there := first.get(key)):
                    raise DistributedError(
                        f"{name}: expected the same in all processes, got {key} = {here!r} in {self._names({i})} and "
                        f"{there!r} in process 0; start the same command, in the same environment, on every host"
                    )

    def barrier(self, name: str, limit: float | None = None) -> None:
        """Returns when all processes have called it with this name, which is used once in a run.

        Raises:
          DistributedError: some did not come within `limit` seconds; it names them.
        """
        self.exchange(f"barrier/{name}", "here", limit)

    def exchange(
        self, name: str, text: str, limit: float | None = None, cancelled: Callable[[], bool] = lambda: False
    ) -> list[str]:
        """The texts that the processes gave under this name, by their number.

        Raises:
          DistributedError: as `barrier`.
          Cancelled: `cancelled()` became true while others were missing.
        """
        if self.count == 1:
            return [text]
        limit = self._limit if limit is None else limit
        store, key, deadline = _store(), f"{_ROOT}/{name}", time.monotonic() + limit
        self._patiently(store.key_value_set, f"{key}/{self.index}", text, allow_overwrite=True)
        texts: list[str] = []
        while len(texts) < self.count:
            try:
                texts.append(self._patiently(store.blocking_key_value_get, f"{key}/{len(texts)}", int(1000 * _POLL)))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
                if cancelled():
                    raise Cancelled(name) from None
                if time.monotonic() > deadline:
                    came = {int(path.rpartition("/")[2]) for path, _ in store.key_value_dir_get(f"{key}/")}
                    raise DistributedError(
                        f"{name}: {self._names(set(range(self.count)) - came)} did not come within {limit:g} s"
                    ) from None
        return texts

    def _patiently(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """A call of the store, again while there is no connection, which is no longer than a process may be silent."""
        begun = time.monotonic()
        while True:
            try:
                return call(*arguments, **options)
            except jax.errors.JaxRuntimeError as error:
                if "UNAVAILABLE" not in str(error) or time.monotonic() - begun > self._silence:
                    raise
            time.sleep(_POLL)

    def exchange_of_step(self, step: int, text: str, cancelled: Callable[[], bool], of: str = "batch") -> list[str]:
        """`exchange` for the data of successive steps: whoever completes one knows that all have read the one before,
        and forgets it. Without a time limit: rewards may take their time, and who is lost ends all (`_watch`)."""
        texts = self.exchange(f"{of}/{step}", text, limit=math.inf, cancelled=cancelled)
        if self.count > 1:
            _store().key_value_delete(f"{_ROOT}/{of}/{step - 1}/{self.index}")
        return texts

    def check_shared(self, directory: Path, limit: float | None = None) -> None:
        """That all processes see the same directory; process 0 makes it if need be. `limit`: see `barrier`.

        Raises:
          DistributedError: some process does not find what process 0 wrote there.
        """
        if self.count == 1:
            return
        token = directory / f".shared-{uuid.uuid4().hex}"
        if self.index == 0:
            directory.mkdir(parents=True, exist_ok=True)
            token.touch()
        try:
            name = self.exchange("workdir/token", token.name, limit)[0]
            seen = _appears(directory / name, seconds=min(10.0, self._limit / 2))  # the others wait
            answers = self.exchange("workdir/seen", "yes" if seen else "no")
        finally:
            if self.index == 0:
                token.unlink()
        blind = {i for i, answer in enumerate(answers) if answer == "no"}
        if blind:
            raise DistributedError(
                f"--workdir={directory}: {self._names(blind)} cannot see what process 0 writes there; "
                "expected a directory that all hosts share"
            )

    # ---- Stopping together ---------------------------------------------------------------------------------------

    def stop_after(self, step: int) -> bool:
        """Whether to stop after `step`, because SIGTERM reached any of the processes: the same answer in all of them.

        To be called after each step in order, and before the first one with the number of the step before it. The
        processes agree on the last step that any of them may have begun: one that already waits in a collective for
        another would wait for ever otherwise.
        """
        if self.count == 1:
            return self._requested
        with self._lock:
            if not self._frozen:
                self._going_to = step + 1
                return False
        self._agreement.wait()
        return step >= self._agreed

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        self._requested = True

    def _negotiate(self, stops: dict[int, str], done: dict[int, str]) -> None:
        """In the watching thread: answers a wish to stop, and knows the result when all have answered."""
        if (self._requested or stops) and not self._frozen:
            with self._lock:
                self._frozen = True
            self._tell("stop", str(self._going_to))
        elif self._frozen and self._agreed is None and len(done | stops) == self.count:
            self._agreed = max(map(int, (done | stops).values()))
            self._agreement.set()

    # ---- Failing together ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """An exception inside ends all processes with its message, before anything is closed that waits for them."""
        try:
            yield
        except BaseException as error:
            if not isinstance(error, SystemExit):
                self._fail(error)
            raise

    def _fail(self, error: BaseException) -> None:
        if self.count == 1:
            return
        if isinstance(error, jax.errors.JaxRuntimeError) and _BROKEN.search(str(error)):
            time.sleep(self._silence + 5 * _POLL)  # the watching thread soon knows whose fault it is
        sentence = cli.sentence(error)
        if sentence is None:
            traceback.print_exception(error)
            sentence = f"{type(error).__name__}: {error}"
        self._tell("error", sentence)
        deadline = time.monotonic() + 10 * _POLL
        while self.index == 0 and time.monotonic() < deadline:  # the store ends with process 0
            told = {i for kind in ("seen", "done", "error") for i in self._read()[kind]}
            if len(told | {0}) == self.count:
                break
            time.sleep(_POLL / 10)
        _exit(sentence)

    def _watch(self) -> None:
        checked = time.monotonic()
        signs = {i: ("", checked) for i in range(self.count) if i != self.index}
        beat = 0
        while not self._done.wait(_POLL):
            beat += 1
            try:
                self._tell("alive", f"{beat} {socket.gethostname()}")
                read = self._read()
            except jax.errors.JaxRuntimeError:  # no connection: it comes back, or the others miss this process
                continue
            for i, text in read["error"].items():
                if i != self.index:
                    self._tell("seen", "yes")
                    _exit(f"{self._names({i})} failed: {text}")
            self._negotiate(read["stop"], read["done"])
            now, before = time.monotonic(), checked
            checked = now
            for i, (sign, when) in signs.items():
                latest = read["alive"].get(i, "")
                if latest != sign or now - before > self._silence / 2:  # we ourselves were suspended: start again
                    signs[i] = latest, now
                elif now - when > self._silence and i not in read["done"]:
                    _exit(
                        f"no sign of life from {self._names({i})} for {self._silence:g} s; "
                        "start the run again, it goes on from its last checkpoint"
                    )

    def _tell(self, kind: str, text: str) -> None:
        _store().key_value_set(f"{_ROOT}/watch/{kind}/{self.index}", text, allow_overwrite=True)

    def _read(self) -> dict[str, dict[int, str]]:
        """What the processes have told, by kind and process."""
        read: dict[str, dict[int, str]] = {kind: {} for kind in ("alive", "done", "error", "seen", "stop")}
        for path, text in _store().key_value_dir_get(f"{_ROOT}/watch/"):
            kind, _, i = path.removeprefix(f"{_ROOT}/watch/").partition("/")
            read[kind][int(i)] = text
        return read

    def _names(self, processes: set[int]) -> str:
        """`process 1 (host b) and process 3`; a host is known once its process has come this far."""
        hosts = {i: text.partition(" ")[2] for i, text in self._read()["alive"].items()}
        return " and ".join(f"process {i}" + (f" (host {hosts[i]})" if i in hosts else "") for i in sorted(processes))


def _store() -> Any:
    return jax_distributed.global_state.client


def _appears(file: Path, seconds: float) -> bool:
    """Whether a file is there, or comes: network file systems show a new file late."""
    deadline = time.monotonic() + seconds
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _exit(sentence: str) -> None:
    """Ends this process now, from any thread."""
    sys.stdout.flush()
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    os._exit(1)
