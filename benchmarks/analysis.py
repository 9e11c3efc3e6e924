"""Memory and time of the analyses against the length of the text, each length in a process of its own.

    python benchmarks/analysis.py [--tokens 4096 8192 16384 --checkpoint=DIR --window=128 --no_maps --once]

Without `--checkpoint` the model is assets/digits_base with PVM added in the middle layer. The text is one image and an
answer of random words; every token of the answer is measured: dilution, logit lens, and (unless `--no_maps`) the maps.
Printed: the most memory that the process held at a time, what of it came after the model was loaded, and the time of
a first pass (compilation included) and, unless `--once`, of a second.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
PROMPT = 64  # more than what is not the answer
PEAK = "VmHWM"  # not `ru_maxrss`, which begins with what the parent held when it forked


def options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="memory and time of the analyses")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[4096, 8192, 16384], help="of a text, padding included"
    )
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--window", type=int, default=128, help="columns at a time")
    parser.add_argument("--no_maps", action="store_true")
    parser.add_argument("--once", action="store_true", help="no second pass")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def peak_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(PEAK)) / 1024


def measure(args: argparse.Namespace) -> None:
    """One length in this process; a line of the table."""
    import pvm_jax
    from pvm_jax.analysis.texts import read
    from pvm_jax.analysis.tracing import trace
    from pvm_jax.data.digits_task import WORDS

    model, processor = pvm_jax.load(args.checkpoint)
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (192, 192, 3), dtype=np.uint8))
    length = args.tokens[0]
    words = [f" {word}" for word in WORDS]  # a token each, in the tokenizer of the digits
    question = {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "Read"}]}

    answer = "".join(words[i] for i in rng.integers(len(words), size=length - PROMPT))
    [source] = read(processor, [{"messages": [question, {"role": "assistant", "content": answer}]}])
    before, seconds = peak_mib(), []
    for _ in range(1 if args.once else 2):
        start = time.perf_counter()
        [made] = trace(model, [source], maps=not args.no_maps, rows=1, window=args.window)
        seconds.append(time.perf_counter() - start)
    after, fit = peak_mib(), made.dilution.fit
    exponent = "-" if fit is None else f"{fit.exponent:.2f} ({fit.low:.2f} to {fit.high:.2f})"
    tokens = f"{len(source.text.ids):>8}{len(source.text.columns):>10}"
    times = "".join(f"{s:>10.1f}" for s in seconds).ljust(20)
    print(f"{tokens}{after:>12.0f}{after - before:>12.0f}{times}  {exponent}", flush=True)


def with_pvm(folder: str) -> Path:
    from pvm_jax.convert import convert_from_hf

    directory = Path(folder) / "pvm"
    convert_from_hf(ROOT / "assets" / "digits_base", directory, pvm_layers=(2,), pvm_hidden_size=64)
    return directory


def main() -> None:
    args = options()
    if args.child:
        return measure(args)
    print(
        f"{'tokens':>8}{'measured':>10}{'peak, MiB':>12}{'of it here':>12}{'first, s':>10}{'second, s':>10}  exponent"
    )
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.checkpoint or with_pvm(folder)
        for length in args.tokens:
            command = [sys.executable, __file__, "--child", f"--checkpoint={checkpoint}", f"--window={args.window}"]
            command += ["--tokens", str(length)] + ["--no_maps"] * args.no_maps + ["--once"] * args.once
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
