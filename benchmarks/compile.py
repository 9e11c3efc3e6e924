"""How compile time grows with depth: the SFT step of a size against the same with 8 layers.

    python benchmarks/compile.py --topology=h100:8 [--size=8b --rounds=3 --out=FILE.json]

Nothing runs; the extra of the platform must be installed (`pip install -e '.[tpu]'` or `[cuda12]`). Both 8-layer
models have the size's width and vision tower; one has PVM in as many layers as the size, one in a single layer. Alike
layers are scanned, so the compiler should see as many kinds of layers, not as many layers. Processor seconds count, as
`pvm_jax.plan` prints them: they depend less on what else the machine does.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from pvm_jax.presets import PVM_LAYERS, SIZES, hf_config

ROOT = Path(__file__).parents[1]
LAYERS = 8


def plan(topology: str, size: str, *options: str) -> int:
    """Processor seconds that one compilation takes in a process of its own."""
    line = [sys.executable, "-m", "pvm_jax.plan", f"--config=configs/sft.py:{size}", f"--topology={topology}"]
    line += ["--config.data.rows=64", "--config.data.length=4096", "--config.data.patches=8192", *options]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    found = re.search(r"compiled in .*, (\d+) s of processor time", done.stdout)
    if not found:
        sys.exit(f"the step of {size} was not compiled for {topology}:\n{done.stderr[-2000:]}")
    return int(found[1])


def shallow(folder: Path, size: str, pvm_layers: tuple[int, ...]) -> Path:
    """A directory whose config.json is the size's with 8 layers."""
    raw = hf_config(size, pvm=True)
    raw["text_config"] |= {"num_hidden_layers": LAYERS, "pvm_layers": list(pvm_layers)}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", required=True)
    parser.add_argument("--size", default="8b", choices=SIZES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--options", default="", help="flags of pvm_jax.plan, e.g. --config.micro_batches=4")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        three = shallow(folder / "three", args.size, (2, 4, 6))
        one = shallow(folder / "one", args.size, (4,))
        models = {
            f"{args.size}, PVM in layers {PVM_LAYERS[args.size]}": (),
            f"{LAYERS} layers, PVM in 2, 4 and 6": (f"--config.model.path={three}",),
            f"{LAYERS} layers, PVM in 4": (f"--config.model.path={one}",),
        }
        seconds: dict[str, list[int]] = {name: [] for name in models}
        for i in range(args.rounds):
            for name, given in models.items():
                seconds[name].append(plan(args.topology, args.size, *args.options.split(), *given))
                print(f"round {i + 1}/{args.rounds}: {name}: {seconds[name][-1]} s", file=sys.stderr)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    whole, *others = medians
    print(f"processor seconds to compile the SFT step for {args.topology}, medians of {args.rounds}")
    for name, median in medians.items():
        print(f"{name:<34} {median:6.0f} s" + (f"   ratio {medians[whole] / median:.2f}" if name in others else ""))
    if args.out:
        args.out.write_text(json.dumps({"topology": args.topology, "seconds": seconds, "medians": medians}, indent=2))


if __name__ == "__main__":
    main()
