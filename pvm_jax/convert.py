"""Conversion between Hugging Face checkpoints and native ones; strict in both directions.

    python -m pvm_jax.convert from_hf SRC DST [--pvm_layers=8,16,24 --pvm_hidden_size=512 --pvm_seed=0 ...]
    python -m pvm_jax.convert to_hf   SRC DST [--max_shard_size=5GB --dtype=float32 --lora=peft --base_name=OWNER/NAME]
    python -m pvm_jax.convert check   SRC

`from_hf` reads a Qwen3-VL or a PVM checkpoint of the public release; with --pvm_layers a Qwen3-VL gains PVM. `to_hf`
writes a native checkpoint or a training workdir as Hugging Face files; `from_hf` and then `to_hf` gives back every bit.
LoRA is added to the weights it adapts, or written beside them for PEFT, as DST/adapter (`lora_files`).
`check` compares logits with transformers (see `hf_check`).

`from_hf` holds pieces of four parameters in memory at a time, `to_hf` one parameter (of one group of layers). Both
write to a temporary directory beside DST, which takes DST's name at the end: a failure leaves nothing. Names and shapes
are in `hf_names`, initial values of PVM in `pvm_init`.
"""

import argparse
import copy
import dataclasses
import functools
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from pvm_jax import cli, hf_check
from pvm_jax.checkpoint import CheckpointError, open_checkpoint, save_native
from pvm_jax.config import MEMORY_MASKS, ConfigError, ModelConfig, read_json
from pvm_jax.data.images import DataError
from pvm_jax.hf_names import Leaf, Tensor, count_parameters, leaves, parse_group
from pvm_jax.hf_weights import HFWeights, MadePVM
from pvm_jax.lora import with_lora
from pvm_jax.lora_files import ADAPTER, Merged, name_of_base, write_peft
from pvm_jax.model_files import copy_files, new_directory, write_json
from pvm_jax.orbax_io import Lazy
from pvm_jax.pvm_init import METHODS
from pvm_jax.safetensors_io import DTYPES, SafetensorsWriter, WeightsError

DTYPE_NAMES = tuple(dtype.name for dtype in DTYPES.values())
PVM_ARCHITECTURE = "PVMQwen3VLForConditionalGeneration"
LORA = ("merged", "peft")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


class UsageError(ValueError):
    """Options that do not fit together or to the checkpoint; the message is one sentence."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a conversion wrote, and what its reader should know."""

    path: Path
    parameters: int
    pvm_parameters: int
    size_bytes: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        wrote = (
            f"{self.path}: {self.parameters:,} parameters, {self.pvm_parameters:,} of them PVM, "
            f"{self.size_bytes / 1e9:.3f} GB of weights"
        )
        return "\n".join([wrote, *(f"note: {note}" for note in self.notes)])


def convert_from_hf(
    src: str | Path,
    dst: str | Path,
    *,
    pvm_layers: Sequence[int] = (),
    pvm_hidden_size: int | None = None,
    pvm_seed: int = 0,
    pvm_init: str = "normal",
    pvm_memory_mask: str | None = None,
    pvm_slots: int = 0,
    pvm_silencing: bool = True,
    dtype: str | None = None,
    progress: bool = False,
) -> Summary:
    """Writes the Hugging Face directory `src` as the native checkpoint `dst`.

    Args:
      pvm_layers: give a Qwen3-VL without PVM blocks in these decoder layers; their initial values are a function of
        `pvm_seed`, layer and name (see `pvm_init`). Seed and initializer are kept in config.json.
      pvm_hidden_size: R, needed with `pvm_layers`.
      pvm_memory_mask: "causal" (None, for PVM made here) or "all"; for a checkpoint with PVM, None keeps its own.
      pvm_slots, pvm_silencing: so many learned vectors instead of the image; False: image tokens retrieve, too. See
        `config`.
      dtype: "float32", "float16" or "bfloat16" for all parameters; None keeps each one's own.
      progress: draw a progress bar on stderr.

    Raises:
      UsageError, ConfigError: the options do not fit the checkpoint.
      WeightsError: all that is wrong with the weights.
      FileExistsError: `dst` exists.
    """
    src, dst = Path(src), Path(dst)
    if (kind := open_checkpoint(src).kind) != "hf":
        raise UsageError(f"{src}: expected a Hugging Face directory, got a {kind} checkpoint")
    if dst.exists():
        raise FileExistsError(f"{dst}: expected a directory that does not exist yet; remove it or name another")
    options = _PVMOptions(
        tuple(pvm_layers), pvm_hidden_size, pvm_seed, pvm_init, pvm_memory_mask, pvm_slots, pvm_silencing
    )
    raw = _with_dtype(options.applied(read_json(src / "config.json"), src), dtype)
    config = ModelConfig.from_hf(raw, str(src / "config.json"))
    made = MadePVM(pvm_seed, pvm_init) if pvm_layers else None
    weights = HFWeights(src, config, made, keep_dtypes=dtype is None)

    table = leaves(config)
    params = {}
    with tqdm(total=len(table), desc="from_hf", unit="param", disable=not progress) as bar:

        def pieces(path: str, as_dtype: np.dtype) -> Iterator[np.ndarray]:
            yield from weights.pieces(path, as_dtype)
            bar.update()

        for leaf in table:
            as_dtype = jnp.dtype(dtype) if dtype else weights.dtype(leaf.path)
            params[leaf.path] = Lazy(leaf.shape, as_dtype, functools.partial(pieces, leaf.path, as_dtype))
        save_native(dst, raw, params, src)
    return Summary(dst, *count_parameters(config), sum(p.nbytes for p in params.values()))


def convert_to_hf(
    src: str | Path,
    dst: str | Path,
    *,
    max_shard_size: str | int = "5GB",
    dtype: str | None = None,
    lora: str = "merged",
    base_name: str | None = None,
    progress: bool = False,
) -> Summary:
    """Writes a native checkpoint or a training workdir as a Hugging Face directory.

    Args:
      max_shard_size: bytes, or a number with KB, MB or GB, per safetensors file.
      dtype: None keeps the stored dtypes; for a workdir those of the checkpoint that it was trained on, so that a
        bf16 model stays one although its trained parameters are kept in fp32.
      lora: "merged": every program reads the result, rounded to the weights' dtype. "peft": the weights without LoRA,
        and an adapter in `DST/adapter`, in fp32.
      base_name: what the adapter calls those weights, on the Hub or on disk; None: see `lora_files.name_of_base`.

    Raises:
      as `convert_from_hf`, and CheckpointError if `src` is no model.
    """
    src, dst = Path(src), Path(dst)
    max_bytes = max_shard_size if isinstance(max_shard_size, int) else parse_size(max_shard_size)
    checkpoint = open_checkpoint(src)
    source = checkpoint.source()
    table = leaves(checkpoint.config)
    if missing := [leaf.path for leaf in table if not source.holds(leaf.path)]:
        raise CheckpointError("\n".join(f"{src}: {path}: expected this parameter, found none" for path in missing))
    if lora not in LORA:
        raise UsageError(f"--lora: expected one of {', '.join(LORA)}, got {lora!r}")
    if base_name is not None and lora != "peft":
        raise UsageError("--base_name: expected --lora=peft with it, nothing else has the name of its base")
    if lora == "peft" and checkpoint.config.lora is None:
        raise UsageError(f"--lora: expected a checkpoint with LoRA, {src} has none; leave the option out")
    weights = source if lora == "peft" else Merged(source, checkpoint.config)
    dtypes = {leaf.path: jnp.dtype(dtype) if dtype else source.dtype(leaf.path) for leaf in table}
    tensors = {tensor.name: (tensor.shape, dtypes[leaf.path]) for leaf, tensor in _by_layer(table)}
    with new_directory(dst) as partial:
        copy_files(checkpoint.files, partial)
        raw = with_lora(read_json(checkpoint.files / "config.json"), None)
        write_json(partial / "config.json", _with_dtype(raw, dtype))
        if lora == "peft":
            write_peft(source, checkpoint.config, partial / ADAPTER, base_name or name_of_base(checkpoint, dst))
        with SafetensorsWriter(partial, tensors, max_bytes) as writer:
            for leaf in tqdm(table, desc="to_hf", unit="param", disable=not progress):
                value = weights.read(leaf.path).astype(dtypes[leaf.path], copy=False)
                for tensor, row in zip(leaf.tensors, value if leaf.stacked else value[None], strict=True):
                    writer.write(tensor.name, row.reshape(tensor.shape))
    size = sum(e.end - e.start for e in writer.entries.values())
    return Summary(dst, *count_parameters(checkpoint.config), size, _notes(checkpoint.config))


def _notes(config: ModelConfig) -> tuple[str, ...]:
    """Who can read the PVM of a Hugging Face directory."""
    if not (pvm := config.pvm):
        return ()
    notes = ["transformers by itself leaves PVM out and answers as the model without it; PVM-JAX and the public "
             "release's model code run it"]  # fmt: skip
    if unknown := [
        name
        for name, found in (
            (f"the memory mask {pvm.memory_mask!r}", pvm.memory_mask != "all"),
            ("learned slots", pvm.slots),
            ("PVM on image tokens", not pvm.silencing),
        )
        if found
    ]:
        notes.append(f"the release's model code does not know {' and '.join(unknown)}: there its answers differ")
    return tuple(notes)


def check(src: str | Path) -> bool:
    """Prints each comparison of `hf_check` and says whether all passed; native checkpoints are exported for it."""
    checkpoint = open_checkpoint(src)
    if checkpoint.config.pvm:
        print("PVM gates are set to 0: transformers has no PVM, so that the model around it is compared")
    with tempfile.TemporaryDirectory() as scratch:
        if checkpoint.kind != "hf":
            convert_to_hf(src, Path(scratch) / "hf")
            checkpoint = open_checkpoint(Path(scratch) / "hf")
        passed = True
        for difference in hf_check.compare(checkpoint):
            print(difference, flush=True)
            passed &= difference.passed
    return passed


def parse_size(text: str) -> int:
    """ "5GB" -> 5,000,000,000; units KB, MB and GB, or plain bytes."""
    number, unit = (text[:-2], _UNITS[text[-2:].upper()]) if text[-2:].upper() in _UNITS else (text, 1)
    if not number.strip().isdecimal() or int(number) == 0:
        raise UsageError(f"--max_shard_size: expected bytes or a number with KB, MB or GB, got {text!r}")
    return int(number) * unit


@dataclasses.dataclass(frozen=True)
class _PVMOptions:
    layers: tuple[int, ...]
    hidden_size: int | None
    seed: int
    init: str
    memory_mask: str | None
    slots: int
    silencing: bool

    def applied(self, raw: Mapping[str, Any], src: Path) -> dict[str, Any]:
        """The content of config.json with PVM's fields.

        Raises:
          UsageError: the options do not fit together, or to what the checkpoint has.
        """
        raw = copy.deepcopy(dict(raw))
        text = raw.setdefault("text_config", {})
        if self.layers:
            if text.get("pvm_layers"):
                raise UsageError(
                    f"--pvm_layers: expected a checkpoint without PVM, {src} has it in layers {text['pvm_layers']}"
                )
            if self.hidden_size is None:
                raise UsageError("--pvm_hidden_size: expected with --pvm_layers (512 in the paper), got none")
            if self.init not in METHODS:
                raise UsageError(f"--pvm_init: expected one of {', '.join(METHODS)}, got {self.init!r}")
            if self.seed < 0:
                raise UsageError(f"--pvm_seed: expected a number of at least 0, got {self.seed}")
            raw["architectures"] = [PVM_ARCHITECTURE]
            text |= {
                "pvm_layers": sorted(self.layers),
                "pvm_hidden_size": self.hidden_size,
                "pvm_memory_mask": self.memory_mask or "causal",
                "pvm_seed": self.seed,
                "pvm_init": self.init,
            }
            if self.slots:
                text["pvm_slots"] = self.slots
            if not self.silencing:
                text["pvm_silencing"] = False
            return raw
        given = {"pvm_slots": self.slots, "no_pvm_silencing": not self.silencing}
        given["pvm_hidden_size"] = self.hidden_size is not None
        if name := next((name for name, value in given.items() if value), None):
            raise UsageError(f"--{name}: expected only with --pvm_layers, which adds PVM to a checkpoint without it")
        if self.memory_mask:
            if not text.get("pvm_layers"):
                raise UsageError(f"--pvm_memory_mask: expected a checkpoint with PVM or --pvm_layers, {src} has none")
            text["pvm_memory_mask"] = self.memory_mask
        return raw


def _with_dtype(raw: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """config.json says `dtype` where it says one already, and at the top."""
    raw = copy.deepcopy(dict(raw))
    if dtype is None:
        return raw
    if dtype not in DTYPE_NAMES:
        raise UsageError(f"--dtype: expected one of {', '.join(DTYPE_NAMES)}, got {dtype!r}")
    sections = [raw, *(raw[key] for key in ("text_config", "vision_config") if isinstance(raw.get(key), dict))]
    for section in sections:
        for key in ("dtype", "torch_dtype"):  # transformers 5 and 4
            if key in section:
                section[key] = dtype
    if "torch_dtype" not in raw:
        raw["dtype"] = dtype
    return raw


def _by_layer(table: Iterable[Leaf]) -> list[tuple[Leaf, Tensor]]:
    """Tensors in the order of the files: layer after layer, so that a file holds whole layers."""

    def place(pair: tuple[Leaf, Tensor]) -> tuple[str, int]:
        leaf, tensor = pair
        group = parse_group(leaf.path)
        return (group[0], group[1][leaf.tensors.index(tensor)]) if group else ("", 0)

    return sorted(((leaf, tensor) for leaf in table for tensor in leaf.tensors), key=place)


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers with commas, as in 8,16,24, got {text!r}") from None


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="python -m pvm_jax.convert", description="Hugging Face <-> native checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=cli.Parser)
    from_hf = commands.add_parser("from_hf", help="a Hugging Face directory becomes a native checkpoint")
    to_hf = commands.add_parser(
        "to_hf", help="a native checkpoint or training workdir becomes a Hugging Face directory"
    )
    compare = commands.add_parser("check", help="logits against transformers; needs torch")
    for command in (from_hf, to_hf, compare):
        command.add_argument("src", type=Path)
    for command in (from_hf, to_hf):
        command.add_argument("dst", type=Path, help="must not exist")
        command.add_argument("--dtype", choices=DTYPE_NAMES, help="default: that of each stored tensor")
    from_hf.add_argument("--pvm_layers", type=_layers, default=(), help="add PVM to these decoder layers: 8,16,24")
    from_hf.add_argument("--pvm_hidden_size", type=int, help="width of the latent space, 512 in the paper")
    from_hf.add_argument("--pvm_seed", type=int, default=0)
    from_hf.add_argument("--pvm_init", choices=METHODS, default="normal", help="normal: N(0, 0.02) as in the release")
    from_hf.add_argument("--pvm_memory_mask", choices=MEMORY_MASKS, help="default for new PVM: causal")
    from_hf.add_argument("--pvm_slots", type=int, default=0, help="learned vectors instead of the image (a control)")
    from_hf.add_argument(
        "--no_pvm_silencing",
        dest="pvm_silencing",
        action="store_false",
        help="image tokens retrieve, too (an ablation)",
    )
    to_hf.add_argument("--lora", choices=LORA, default="merged", help="where LoRA goes: into the weights, DST/adapter")
    to_hf.add_argument("--base_name", help="what the adapter calls its weights, as Qwen/Qwen3-VL-8B-Instruct")
    to_hf.add_argument("--max_shard_size", default="5GB", help="of one safetensors file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 1 if `check` finds a difference, 2 for what the user can mend."""
    options = vars(_parser().parse_args(argv))
    command = options.pop("command")
    try:
        if command == "check":
            return 0 if check(options["src"]) else 1
        convert = convert_from_hf if command == "from_hf" else convert_to_hf
        print(convert(options.pop("src"), options.pop("dst"), progress=True, **options))
    except (UsageError, ConfigError, CheckpointError, WeightsError, DataError, hf_check.CheckError, OSError) as e:
        for line in str(e).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
