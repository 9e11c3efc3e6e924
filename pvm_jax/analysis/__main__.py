"""Where models look, token by token: plots, a file of all numbers, and a page.

    python -m pvm_jax.analysis --checkpoint=BASE,PVM --names="base,base + PVM" --data=samples.jsonl --out=DIR
    python -m pvm_jax.analysis --checkpoint=PVM --without_pvm --data=questions.jsonl --max_new_tokens=1024 --out=DIR

DATA has rows as for training (docs/data.md). A row with an answer is analysed as it stands; for one without, each model
writes its own, greedily. What DIR holds then: see `files`. It runs on one host.

Exit status: 0, 1 for what can be put right in the data or the checkpoint, 2 for a command line that cannot be used.
"""

import argparse
import dataclasses
import gc
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pvm_jax import cli
from pvm_jax.analysis import figures, files, measures, texts, tracing
from pvm_jax.analysis.measures import Run
from pvm_jax.analysis.results import AnalysisError, Trace
from pvm_jax.analysis.texts import Source
from pvm_jax.checkpoint import Checkpoint, checksum, load_model, open_checkpoint
from pvm_jax.data.images import DataError
from pvm_jax.data.processor import Processor
from pvm_jax.data.sources import open_source
from pvm_jax.evals.results import versions
from pvm_jax.models.qwen3_vl import Qwen3VL
from pvm_jax.sharding import MESH_AXES, make_mesh, ways_of

TOGETHER = 4
"""Texts at once where rows are not spread over devices; else as many as there are devices for rows."""

PIXELS = ("min_pixels", "max_pixels", "video_min_pixels", "video_max_pixels")
"""Flags, and parameters of `Processor.from_pretrained`."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """One run: a checkpoint, with its PVM or without."""

    name: str
    checkpoint: str
    silenced: bool = False


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="python -m pvm_jax.analysis", description="Where models look, token by token.")
    add = parser.add_argument
    add(
        "--checkpoint",
        action="append",
        required=True,
        metavar="DIR",
        help="Hugging Face directory, native checkpoint or training workdir; several: again, or separated by commas",
    )
    add("--data", required=True, metavar="FILE", help="rows of messages and images; also a folder or glob pattern")
    add("--out", required=True, metavar="DIR", help="folder to make")
    add("--names", help="of the checkpoints, separated by commas; default: their folders")
    add("--without_pvm", action="store_true", help="each checkpoint with PVM once more with its gates at 0")
    add("--limit", type=int, default=4, help="rows, from the first; default: 4")
    add("--split", default="train", help="of TFDS directories")
    add("--image_folder", help="what relative image paths start from; default: the folder of the data")
    add("--generate", action="store_true", help="let the models write an answer also where a row has one")
    add("--max_new_tokens", type=int, default=512, help="of written answers")
    add("--forced", action="store_true", help="written answers never end before max_new_tokens")
    add("--dtype", choices=("float32", "bfloat16"), help="default: float32 on CPUs, bfloat16 on accelerators")
    add("--min_pixels", type=int, help="of an image after the resize; default: what each checkpoint says")
    add("--max_pixels", type=int, help="the same; models of different sizes of images do not compare")
    add("--video_min_pixels", type=int, help="of all frames of a video together, after the resize")
    add("--video_max_pixels", type=int, help="the same")
    add("--no_maps", action="store_true", help="curves alone: maps of long texts and many images take much memory")
    add("--mesh", type=_mesh, metavar="AXIS=N,...", help="devices along data, fsdp, tensor; default: one device")
    return parser


def _mesh(text: str) -> dict[str, int]:
    """`fsdp=4,tensor=2`; axes that are not named have one device."""
    sizes = dict.fromkeys(MESH_AXES, 1)
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in sizes or not size.removeprefix("-").isdigit():
            raise argparse.ArgumentTypeError(f"expected AXIS=N with AXIS one of {', '.join(sizes)}, got {part!r}")
        sizes[axis] = int(size)
    return sizes


def plan(options: argparse.Namespace) -> list[Plan]:
    """What to run, in the order of the page.

    Raises:
      AnalysisError, CheckpointError: flags or directories that do not fit.
    """
    paths = [path for given in options.checkpoint for path in given.split(",") if path]
    if not paths:
        raise AnalysisError(f"--checkpoint: expected a directory, got {options.checkpoint[0]!r}")
    names = options.names.split(",") if options.names else _folders(paths)
    if len(names) != len(paths) or len(set(names)) != len(names):
        raise AnalysisError(f"--names: expected a different name for each of {len(paths)} checkpoints, got {names}")
    for name in ("limit", "max_new_tokens"):
        if getattr(options, name) < 1:
            raise AnalysisError(f"--{name}: expected at least 1, got {getattr(options, name)}")
    figures.check()
    if jax.process_count() > 1:
        raise AnalysisError(
            f"the analyses run on one host, here are {jax.process_count()}; start them where one has all devices"
        )
    plans = []
    for name, path in zip(names, paths):
        has_pvm = open_checkpoint(path).config.pvm is not None  # all of them before the first is loaded
        plans.append(Plan(name, path))
        if options.without_pvm and has_pvm:
            plans.append(Plan(f"{name}, PVM silenced", path, silenced=True))
    if options.without_pvm and len(plans) == len(paths):
        raise AnalysisError(f"--without_pvm: expected a checkpoint with PVM, found none in {', '.join(paths)}")
    files.check(Path(options.out))
    return plans


def _folders(paths: Sequence[str]) -> list[str]:
    """The last part of each path, or as many parts as tell them apart."""
    parts = [Path(path).resolve().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-count:]) for one in parts]
        if len(set(names)) == len(names):
            break
    return names


def samples(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The rows of the data, by file and row.

    Raises:
      DataError: no such file, no rows, or a bad one, which is named.
    """
    source = open_source(
        options.data, split=options.split, image_folder=options.image_folder or None, require_answer=False
    )
    return {source.describe(i): source[i] for i in range(min(options.limit, len(source)))}


def check(plans: Sequence[Plan], rows: Mapping[str, dict[str, Any]], options: argparse.Namespace) -> None:
    """What any of the models could refuse, for before the first is loaded; nothing of it is kept.

    Raises:
      AnalysisError, DataError: a checkpoint's processor, or a row that it cannot encode.
    """
    for path in dict.fromkeys(one.checkpoint for one in plans):
        processor = _processor(open_checkpoint(path), options)
        for where, row in rows.items():
            _read(processor, where, row, options.generate)


def analyse(plans: Sequence[Plan], rows: Mapping[str, dict[str, Any]], options: argparse.Namespace) -> list[Run]:
    """Every plan on every row; a checkpoint is loaded once, and its texts are read or written once."""
    runs = []
    for path, group in itertools.groupby(plans, key=lambda one: one.checkpoint):
        runs += _analyse(path, list(group), rows, options)
        gc.collect()  # modules refer to themselves in circles, and Python does not count what lies on a device
    return runs


def _analyse(
    path: str, plans: Sequence[Plan], rows: Mapping[str, dict[str, Any]], options: argparse.Namespace
) -> list[Run]:
    """The plans of one checkpoint, whose model is gone behind this function: the next one needs its memory."""
    dtype = options.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    mesh = make_mesh(**options.mesh) if options.mesh else None
    checkpoint = open_checkpoint(path)
    processor = _processor(checkpoint, options)
    given = {where: _read(processor, where, row, options.generate) for where, row in rows.items()}
    _say(f"loading {path}")
    model = load_model(checkpoint, dtype=jnp.dtype(dtype), scan=True if mesh else None, mesh=mesh)
    together = _together(mesh)
    questions = [row for where, row in rows.items() if given[where] is None]
    written = iter(_written(model, processor, questions, together, options))
    sources = [one or next(written) for one in given.values()]
    about = {
        "checkpoint": path,
        "checksum": checksum(path),
        "pvm_layers": list(checkpoint.config.pvm.layers) if checkpoint.config.pvm else [],
        "dtype": dtype,
        "data": options.data,
        "min_pixels": processor.images.min_pixels,
        "max_pixels": processor.images.max_pixels,
        "video_min_pixels": processor.video.pixels.min_pixels,
        "video_max_pixels": processor.video.pixels.max_pixels,
        "maps": not options.no_maps,
        "answers": "written, greedy" if options.generate else "given, or written greedily where there is none",
        "max_new_tokens": options.max_new_tokens,
        "forced": options.forced,
        "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        "versions": versions(),
    }
    runs = []
    for one in plans:
        traces = _traces(one, model, sources, together, maps=not options.no_maps)
        runs.append(Run(one.name, about | {"pvm_silenced": one.silenced}, traces, _words(processor, traces)))
    return runs


def _processor(checkpoint: Checkpoint, options: argparse.Namespace) -> Processor:
    return Processor.from_pretrained(checkpoint.files, **{name: getattr(options, name) for name in PIXELS})


def _together(mesh: Mesh | None) -> int:
    """How many texts at once."""
    ways = ways_of(mesh)
    return ways if ways > 1 else TOGETHER


def _read(processor: Processor, where: str, row: dict[str, Any], generate: bool) -> Source | None:
    """The text of a row that has an answer; None if one is to be written.

    Raises:
      AnalysisError: it cannot be encoded; file and row are named.
    """
    try:
        if texts.ends_answered(row) and not generate:
            return texts.read(processor, [row])[0]
        processor.encode(texts.question(row), add_generation_prompt=True)  # what is wrong with it is said here
    except (DataError, AnalysisError) as error:
        raise AnalysisError(f"{where}: {error}") from None
    return None


def _written(
    model: Qwen3VL,
    processor: Processor,
    rows: Sequence[dict[str, Any]],
    together: int,
    options: argparse.Namespace,
) -> list[Source]:
    found = []
    for first in range(0, len(rows), together):
        part = rows[first : first + together]
        for row in part:
            _say(f"{row['id']}: writing an answer")
        found += texts.write(model, processor, part, options.max_new_tokens, forced=options.forced)
    return found


def _traces(one: Plan, model: Qwen3VL, sources: Sequence[Source], together: int, maps: bool) -> list[Trace]:
    """Texts of similar lengths together, since a group is padded to its longest."""
    order = sorted(range(len(sources)), key=lambda place: len(sources[place].text.ids))
    found: dict[int, Trace] = {}
    for first in range(0, len(order), together):
        group = order[first : first + together]
        for place in group:
            text = sources[place].text
            size = f"{len(text.columns)} tokens, {text.visual_tokens} visual tokens"
            _say(f"{one.name}: {text.name}, {place + 1} of {len(sources)}: {size}")
        traces = tracing.trace(
            model, [sources[place] for place in group], maps=maps, silence_pvm=one.silenced, rows=together
        )
        found |= dict(zip(group, traces))
    return [found[place] for place in range(len(sources))]


def _words(processor: Processor, traces: Sequence[Trace]) -> dict[int, str]:
    used = {
        int(token) for trace in traces if trace.lens is not None for token in set(trace.lens.token.ravel().tolist())
    }
    return {token: processor.decode([token], skip_special_tokens=False) for token in sorted(used)}


def _say(message: str) -> None:
    """Progress; standard output has the table alone."""
    print(message, file=sys.stderr, flush=True)


def _about(runs: Sequence[Run], rows: Mapping[str, Any]) -> str:
    def plural(count: int, word: str) -> str:
        return f"{count} {word}{'' if count == 1 else 's'}"

    return (
        f"{plural(len(runs), 'run')}, {plural(len(rows), 'sample')}. What a token is shown with was measured where it "
        "is predicted: at the token before it."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        try:
            plans = plan(options)
        except AnalysisError as error:
            parser.error(str(error))
        rows = samples(options)
        check(plans, rows, options)
        runs = analyse(plans, rows, options)
        _say("drawing")
        written = files.write(Path(options.out), runs, _about(runs, rows))
    except (ValueError, OSError) as error:
        message = cli.sentence(error)
        if message is None and not isinstance(error, OSError):
            raise
        print(f"error: {message or error}", file=sys.stderr)
        return 1
    print(measures.as_text(measures.table(runs)))
    for note in measures.notes(runs):
        print(f"note: {note}")
    print(f"\nwritten to {options.out}: {', '.join(written)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
