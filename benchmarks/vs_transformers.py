"""PVM-JAX against transformers on one machine: the same random checkpoint, fp32, the same threads, warm.

    python benchmarks/vs_transformers.py [--threads=2 --rounds=7 --out=FILE.json] [--quick]

Each row is the median of alternating runs of both sides in one process. README.md in this folder says what the rows
mean. `--quick` is a smoke test on a tiny model; its numbers mean nothing.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

ALL_THREADS = len(os.sched_getaffinity(0))


def options(
    argv: list[str] | None, description: str = "PVM-JAX against transformers", rounds: int = 7
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=ALL_THREADS, help="of both sides; default: all cores")
    parser.add_argument("--rounds", type=int, default=rounds, help="alternations, at least 5 for numbers to quote")
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    parser.add_argument("--out", type=Path, help="write all numbers to this JSON file")
    parser.add_argument("--quick", action="store_true", help="tiny model, one round")
    args = parser.parse_args(argv)
    if not 1 <= args.threads <= ALL_THREADS:
        parser.error(f"--threads: expected 1 to {ALL_THREADS}, got {args.threads}")
    return args


def limit_threads(threads: int) -> None:
    """Before jax or torch is imported: XLA takes its number of threads from the affinity mask."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["HF_HUB_OFFLINE"] = "1"


class Benchmark:
    """Runs the measurements one after the other; `rows` and `facts` are the result."""

    def __init__(self, directory: Path, args: argparse.Namespace):
        import jax_side
        import problem
        import torch_side

        self.args = args
        self.sizes = problem.QUICK if args.quick else problem.FULL
        self.rounds = 1 if args.quick else args.rounds
        torch_side.write_checkpoint(directory, self.sizes.config)
        self.torch_model = torch_side.load(directory).eval()
        self.torch_model.with_pvm = False
        self.model = jax_side.load(directory)
        self.directory = directory
        self.image_token = self.sizes.config["image_token_id"]
        self.rows: list[dict[str, Any]] = []
        self.facts: dict[str, Any] = {}

    def compare(self, name: str, theirs, ours, *, aim: float | None, unit: str = "ms", work: float = 1.0) -> None:
        """One row: `ours` and `theirs` make the measures (their preparation is skipped with the row)."""
        if self.args.only not in name:
            return
        from timing import alternate

        seconds = alternate({"torch": theirs(), "ours": ours()}, self.rounds)
        ratio = seconds["torch"] / seconds["ours"]
        values = {k: 1e3 * s if unit == "ms" else work / s for k, s in seconds.items()}
        self.rows.append({"name": name, "unit": unit, **values, "ratio": ratio, "aim": aim})
        aimed = "" if aim is None else f"   aim {aim:.2f}"
        print(
            f"{name:<58} {values['torch']:>10.2f} {values['ours']:>10.2f} {unit:<9} {ratio:>6.2f}x{aimed}", flush=True
        )

    def prefill(self) -> None:
        import jax_side
        import problem
        import torch_side

        for batch, visual in self.sizes.prefill:
            samples = problem.prompts(self.sizes, batch, visual)
            self.compare(
                f"prefill, batch {batch}, {len(samples[0].tokens)} tokens, {visual} visual",
                lambda s=samples: torch_side.Prefill(self.torch_model, torch_side.inputs(s, self.image_token)),
                lambda s=samples: jax_side.Prefill(self.model, s),
                aim=1.5,
            )

    def decode(self) -> None:
        import jax_side
        import problem
        import torch_side

        steps = self.sizes.steps
        for batch, visual in self.sizes.decode:
            samples = problem.prompts(self.sizes, batch, visual)
            self.compare(
                f"decode step, batch {batch}, {visual} visual",
                lambda s=samples: torch_side.Decode(self.torch_model, torch_side.inputs(s, self.image_token), steps),
                lambda s=samples: jax_side.Decode(self.model, s, steps),
                aim=2.5,
            )
        batch, visual = self.sizes.decode[0]
        samples = problem.prompts(self.sizes, batch, visual)
        self.compare(
            f"generate, batch {batch}, {visual} visual, {2 * steps} new tokens",
            lambda: torch_side.Generate(self.torch_model, torch_side.inputs(samples, self.image_token), 2 * steps),
            lambda: jax_side.Generate(self.model, samples, 2 * steps),
            aim=None,
        )

    def train(self) -> None:
        import jax_side
        import problem
        import torch_side

        model = jax_side.load_for_training(self.directory)
        self.torch_model.with_pvm = True

        def theirs(parts, release):
            return lambda: torch_side.Train(
                self.torch_model, [torch_side.inputs(p, self.image_token) for p in parts], release=release
            )

        samples = problem.sft_samples(self.sizes)
        name = f"SFT step, {len(samples)} x {len(samples[0].tokens)} tokens"
        for label, release, aim in (("checkpointing and input gradients", True, 1.6), ("neither", False, 1.1)):
            self.compare(
                f"{name}, torch: {label}",
                theirs([samples], release),
                lambda: jax_side.Train(model, samples),
                aim=aim,
            )
        ragged = problem.ragged_samples(self.sizes)
        quarters = [ragged[i : i + 4] for i in range(0, len(ragged), 4)]
        for label, parts, release, aim in (
            ("one by one as the release", [[s] for s in ragged], True, 2.5),
            ("padded batches of 4, no checkpointing", quarters, False, None),
        ):
            self.compare(
                f"SFT, {len(ragged)} ragged samples packed, torch: {label}",
                theirs(parts, release),
                lambda: jax_side.Train(model, ragged, self.sizes.row),
                aim=aim,
                unit="samples/s",
                work=len(ragged),
            )
        self.torch_model.with_pvm = False

    def memory_bound(self) -> None:
        """Decode at batch 1 against reading the weights once."""
        import jax_side
        import problem
        from timing import alternate, bandwidth

        if self.args.only not in "memory bound":
            return
        measured = bandwidth(16 if self.args.quick else 512, max(self.rounds, 3))
        weights = jax_side.decode_weight_bytes(self.model)
        batch, visual = self.sizes.decode[0]
        step = jax_side.Decode(self.model, problem.prompts(self.sizes, batch, visual), self.sizes.steps)
        seconds = alternate({"step": step}, self.rounds)["step"]
        bound = weights / measured["copy"]
        self.facts["memory_bound"] = {
            "weight_bytes": weights,
            "copy_bytes_per_second": measured["copy"],
            "read_bytes_per_second": measured["read"],
            "step_seconds": seconds,
            "share_of_bound": bound / seconds,
            "share_of_read_bound": weights / measured["read"] / seconds,
            "aim": 0.85,
        }
        print(
            f"memory bound, batch {batch}: {weights / 1e6:.0f} MB of weights, copy {measured['copy'] / 1e9:.1f} GB/s, "
            f"read {measured['read'] / 1e9:.1f} GB/s: bound {1e3 * bound:.2f} ms, step {1e3 * seconds:.2f} ms, "
            f"{bound / seconds:.0%} of the bound   aim 85%",
            flush=True,
        )

    def pvm_cost(self) -> None:
        """Decode with and without PVM on the same weights: compiled flops and bytes, and time."""
        import jax_side
        import problem
        from timing import alternate

        if self.args.only not in "PVM cost":
            return
        stock = jax_side.without_pvm(self.model)
        self.facts["pvm_cost"] = []
        for batch, visual in self.sizes.decode:
            samples = problem.prompts(self.sizes, batch, visual)
            steps = {
                name: jax_side.Decode(model, samples, self.sizes.steps)
                for name, model in (("pvm", self.model), ("stock", stock))
            }
            cost = {name: step.cost() for name, step in steps.items()}
            seconds = alternate(steps, 2 * self.rounds)
            more = {k: cost["pvm"][k] / cost["stock"][k] - 1 for k in ("flops", "bytes")}
            more["time"] = seconds["pvm"] / seconds["stock"] - 1
            fact = {"batch": batch, "visual": visual, "more": more, "compiled": cost, "seconds": seconds, "aim": 0.02}
            self.facts["pvm_cost"].append(fact)
            print(
                f"PVM's cost in decode, batch {batch}, {visual} visual: {more['flops']:+.1%} flops, "
                f"{more['bytes']:+.1%} bytes, {more['time']:+.1%} time   aim +2%",
                flush=True,
            )


def machine(threads: int) -> dict[str, Any]:
    import jax
    import torch
    import transformers

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "threads": threads,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def set_up(threads: int) -> dict[str, Any]:
    """Both frameworks with so many threads and nothing to say; prints and returns what they run on."""
    limit_threads(threads)
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    about = machine(threads)
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    return about


def main(argv: list[str] | None = None) -> None:
    args = options(argv)
    about = set_up(args.threads)
    with tempfile.TemporaryDirectory() as directory:
        benchmark = Benchmark(Path(directory), args)
        parameters = sum(p.numel() for p in benchmark.torch_model.parameters())
        print(f"{parameters / 1e6:.1f}M parameters, fp32, medians of {benchmark.rounds} alternations\n")
        print(f"{'':<58} {'torch':>10} {'PVM-JAX':>10} {'':<9} {'ratio':>7}")
        for part in (benchmark.prefill, benchmark.decode, benchmark.train, benchmark.memory_bound, benchmark.pvm_cost):
            part()
    if args.out:
        result = {"machine": about, "parameters": parameters, "rounds": benchmark.rounds, "quick": args.quick}
        args.out.write_text(json.dumps(result | {"rows": benchmark.rows, **benchmark.facts}, indent=2) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    main()
