"""What `pvm_jax.convert from_hf` costs at full size: memory above the interpreter's, time against copying the files.

    python benchmarks/convert.py [--size=2b --shard=1GB --rounds=3 --folder=/tmp --out=FILE.json]

A checkpoint of the released shape with random bf16 weights (2B: 4.3 GB) is written to a temporary directory, copied by
`cp`, which leaves the work to the kernel, copied by reading and writing, and converted with new PVM blocks; in turn,
the disk's work (`sync`) included. The folder needs twice its size and is emptied afterwards.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from pvm_jax.config import ModelConfig
from pvm_jax.convert import parse_size
from pvm_jax.hf_names import leaves
from pvm_jax.presets import PVM_HIDDEN_SIZE, PVM_LAYERS, SIZES, hf_config
from pvm_jax.safetensors_io import SafetensorsWriter

NORMALS = 1 << 22

# Runs a command line of `pvm_jax.convert`, or only imports it, and prints the most memory that it held at a time. Not
# `ru_maxrss`: that begins with what this process held when it forked.
MEASURED = """
import sys
from pvm_jax import convert
status = convert.main(sys.argv[1:]) if sys.argv[1:] else 0
lines = open("/proc/self/status").read().splitlines()
print(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024)
sys.exit(status)
"""


def write_checkpoint(directory: Path, raw: dict, shard: int, chunk: int = NORMALS) -> int:
    """config.json and shards of random weights under Hugging Face's names; their bytes."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(raw))
    tensors = [t for leaf in leaves(ModelConfig.load(directory)) for t in leaf.tensors]
    bf16 = np.dtype(ml_dtypes.bfloat16)
    normals = (0.02 * np.random.default_rng(0).standard_normal(chunk, np.float32)).astype(bf16)
    with SafetensorsWriter(directory, {t.name: (t.shape, bf16) for t in tensors}, shard) as writer:
        for i, tensor in enumerate(tensors):
            size = int(np.prod(tensor.shape))
            start = 977 * i % chunk  # each tensor another part of the same numbers: drawing billions would take minutes
            writer.write(tensor.name, np.resize(np.roll(normals, start), size).reshape(tensor.shape))
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def measured(arguments: list[str]) -> tuple[float, int]:
    """Seconds and peak bytes of a process."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True)
    os.sync()
    seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(done.stderr)
    return seconds, int(done.stdout.splitlines()[-1])


def kernel_copy(src: Path, dst: Path) -> None:
    subprocess.run(["cp", "-r", src, dst], check=True)


def user_copy(src: Path, dst: Path) -> None:
    dst.mkdir()
    for path in src.iterdir():
        with path.open("rb") as source, (dst / path.name).open("wb") as target:
            shutil.copyfileobj(source, target, 2**25)


def timed(copy: Callable[[Path, Path], None], src: Path, dst: Path) -> float:
    began = time.perf_counter()
    copy(src, dst)
    os.sync()
    seconds = time.perf_counter() - began
    shutil.rmtree(dst)
    return seconds


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="memory and time of from_hf")
    parser.add_argument("--size", choices=SIZES, default="2b")
    parser.add_argument("--shard", type=parse_size, default="1GB", help="largest safetensors file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; default: the system's temporary directory")
    parser.add_argument("--out", type=Path, help="write all numbers to this JSON file")
    args = parser.parse_args(argv)
    layers = ",".join(map(str, PVM_LAYERS[args.size]))
    options = [f"--pvm_layers={layers}", f"--pvm_hidden_size={PVM_HIDDEN_SIZE}"]
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        src, dst = Path(folder) / "hf", Path(folder) / "out"
        size = write_checkpoint(src, hf_config(args.size), args.shard)
        if shutil.disk_usage(folder).free < 2 * size:
            sys.exit(f"{folder}: expected {2 * size / 1e9:.1f} GB free, choose another --folder")
        os.sync()
        bare = measured([])[1]
        rounds: list[tuple[float, float, float, int]] = []
        for _ in range(args.rounds):
            copies = timed(kernel_copy, src, dst), timed(user_copy, src, dst)
            seconds, peak = measured(["from_hf", str(src), str(dst), *options])
            shutil.rmtree(dst)
            rounds.append((*copies, seconds, peak))
            print(f"cp {copies[0]:.1f} s, read and write {copies[1]:.1f} s, from_hf {seconds:.1f} s", flush=True)
    cp, copy, seconds, peak = (statistics.median(values) for values in zip(*rounds))
    print(
        f"{size / 1e9:.2f} GB in shards of {args.shard / 1e9:.2f} GB: peak {peak / 1e9:.2f} GB, "
        f"{(peak - bare) / 1e9:.2f} GB above the interpreter's {bare / 1e9:.2f}; {seconds:.1f} s, "
        f"{seconds / cp:.2f} times cp ({cp:.1f} s), {seconds / copy:.2f} times reading and writing ({copy:.1f} s)"
    )
    if args.out:
        result = {"bytes": size, "interpreter": bare, "peak": peak, "cp": cp, "read_and_write": copy}
        args.out.write_text(json.dumps(result | {"seconds": seconds}, indent=2))


if __name__ == "__main__":
    main()
