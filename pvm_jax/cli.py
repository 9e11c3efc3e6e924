"""What the command lines share: flags that explain themselves, and mistakes of the user in one sentence.

Works on any flag whose value has `to_dict()`, so that the package needs no ml_collections.
"""

import argparse
import difflib
import errno
import importlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NoReturn

from absl import app, flags, logging

USAGE_ERROR = 2
"""Exit status of a command line or configuration that cannot be used; a run that breaks exits with 1."""


_PATHS = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "expected a place that this user may read and write"),
    errno.ENOTDIR: "expected a directory, and a part of this path is a file",
}
"""What to do about paths that cannot be used, by the error's number."""


class Parser(argparse.ArgumentParser):
    """For commands without absl flags: a mistake is one sentence, and no usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"error: {message}; see --help\n")


def run(main: Callable[[Sequence[str]], Any]) -> None:
    """`absl.app.run` without tracebacks for mistakes that a user can put right."""

    def guarded(argv: Sequence[str]) -> Any:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax reports every file at INFO
        try:
            return main(argv)
        except (ValueError, OSError) as error:
            message = sentence(error)
            if message is None:
                raise
            sys.exit(_complain(message, 1))

    app.run(guarded, flags_parser=parse)


def sentence(error: BaseException) -> str | None:
    """What a user can put right, in one sentence; None for a bug, which needs its traceback."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{error.filename or 'a file'} could not be written ({error.strerror}); free some space and start again"
    if isinstance(error, OSError) and error.filename is not None and error.errno in _PATHS:
        return f"{error.filename}: {error.strerror}; {_PATHS[error.errno]}"
    # The package's own errors (ConfigError, DataError, ...) say what to do; any other is a bug.
    ours = isinstance(error, ValueError | OSError) and type(error).__module__.startswith("pvm_jax.")
    return str(error) if ours else None


def parse(argv: Sequence[str]) -> list[str]:
    """Parses absl flags; an unknown `--config.KEY` names the keys that are nearest to it."""
    try:
        rest = flags.FLAGS(list(argv))
        config = flags.FLAGS["config"].value if "config" in flags.FLAGS else None
        if config is not None:
            config.to_dict()  # a file that could not be loaded raises only when it is used
        return rest
    except OSError as error:
        sys.exit(_complain(_one_line(error), USAGE_ERROR))
    except (flags.Error, AttributeError, KeyError, ValueError) as error:
        sys.exit(_complain(_unknown_key(argv) or _one_line(error), USAGE_ERROR))


def refuse_addresses(flag: str) -> None:
    """Has `parse` refuse values such as gs://bucket/run, which would become a folder called "gs:"."""
    flags.register_validator(
        flag,
        lambda value: value is None or "://" not in value,
        "expected a directory; mount a bucket (Cloud Storage FUSE, s3fs, ...) and name where it is mounted",
    )


def leaves(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries by dotted path: `{"data": {"path": "x"}}` -> `{"data.path": "x"}`."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= leaves(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def plug_in(module: str, key: str, error: type[ValueError]) -> ModuleType:
    """The module that a configuration names under `key`.

    Raises:
      error: there is no such module. One that is there and imports something that is not raises as ever: a sentence
        about the configuration would mislead.
    """
    if not re.fullmatch(r"\w+(\.\w+)*", module):
        raise error(f"{key}: expected a Python module, got {module!r}")
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        if missing.name is None or not f"{module}.".startswith(f"{missing.name}."):
            raise
        raise error(f"{key}: expected a Python module, got {module!r} ({missing})") from None


def _unknown_key(argv: Sequence[str]) -> str | None:
    """A sentence about the first `--config.KEY` that the configuration file does not have; None if it has all."""
    given = sys.argv
    sys.argv = [argument for argument in argv if not argument.startswith(("--config.", "-config."))]
    try:  # once more without overrides, which config_flags looks for in sys.argv
        flags.FLAGS(sys.argv)
        config = flags.FLAGS["config"].value.to_dict()
    except (flags.Error, AttributeError, KeyError, ValueError, OSError):
        return None  # there is another mistake, and that one has its own message
    finally:
        sys.argv = given
    known = leaves(config)
    sections = {path[: match.start()] for path in known for match in re.finditer(r"\.|$", path)}
    for argument in argv[1:]:
        match = re.match(r"--?config\.([^=\[]+)", argument)
        if match and match[1] not in sections:
            return f"--config.{match[1]}: no such key; {_suggest(match[1], known)}"
    return None


def _suggest(key: str, known: Mapping[str, Any]) -> str:
    """The keys of a similar path, or of a similar last name in another section."""
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    last = {path: path.rpartition(".")[2] for path in known}
    for name in difflib.get_close_matches(key.rpartition(".")[2], set(last.values()), n=2, cutoff=0.75):
        near += [path for path in known if last[path] == name]
    near = list(dict.fromkeys(near))[:3]
    if near:
        return "did you mean " + " or ".join(f"--config.{path}" for path in near) + "?"
    return "the keys at the top are " + ", ".join(sorted({path.partition(".")[0] for path in known}))


def _one_line(error: Exception) -> str:
    """The message, and of a traceback that a flag library put into it only the last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if any(line.startswith("Traceback") for line in lines):
        head = lines[0].split(": Error whilst")[0]
        return f"{head}: {lines[-1].split(': ', 1)[-1]}"
    return " ".join(lines)


def _complain(message: str, status: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status
