"""GRPO on one machine: what a shared prefill saves, and a whole step against transformers and a torch loop.

    python benchmarks/grpo.py [--threads=2 --rounds=5 --out=FILE.json] [--quick]

Each row is the median of alternating runs of all its sides in one process. README.md in this folder says what the rows
mean. `--quick` is a smoke test on tiny problems; its numbers mean nothing.
"""

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vs_transformers import options, set_up

COMPLETIONS = 8  # of the prompt whose prefill is shared


class Benchmark:
    """Runs the measurements one after the other; `rows` is the result, and what is printed."""

    def __init__(self, directory: Path, args: Any):
        self.directory, self.args = directory, args
        self.rounds = 1 if args.quick else args.rounds
        self.rows: list[dict[str, Any]] = []

    def row(
        self,
        name: str,
        values: Mapping[str, float],
        ratios: Mapping[str, float],
        aims: Mapping[str, float] | None = None,
        unit: str = "ms",
    ) -> None:
        """Prints one line: values by side, ratios (and what they should be) by what is over what."""
        self.rows.append({"name": name, "unit": unit, "values": values, "ratios": ratios, "aims": aims or {}})
        shown = {side: f"{value:,.1f}" if value >= 1 else f"{value:.3g}" for side, value in values.items()}
        sides = "  ".join(f"{side} {value}" for side, value in shown.items())
        aimed = {label: f" (aim {aim:g})" for label, aim in (aims or {}).items()}
        over = "  ".join(f"{label} {ratio:.2f}{aimed.get(label, '')}" for label, ratio in ratios.items())
        print(f"{name}\n    {sides} {unit}    {over}", flush=True)

    def shared_prefill(self) -> None:
        """Completions of one prompt, in one rollout, against its parts and against a prefill for each of them."""
        import grpo_jax
        import jax_side
        import problem
        import torch_side
        from timing import alternate

        if self.args.only not in "shared prefill":
            return
        sizes = problem.QUICK if self.args.quick else problem.FULL
        torch_side.write_checkpoint(self.directory / "problem", sizes.config)
        model = jax_side.load(self.directory / "problem")
        for visual, tokens in sizes.rollout:
            sides = grpo_jax.rollout_sides(model, problem.prompts(sizes, 1, visual)[0], COMPLETIONS, tokens)
            seconds = alternate(sides, self.rounds)
            self.row(
                f"shared prefill, {COMPLETIONS} completions of {tokens} tokens, prompt with {visual} visual tokens",
                {side: 1e3 * value for side, value in seconds.items()},
                {
                    "rollout / parts": seconds["rollout"] / seconds["parts"],
                    "prefill each / rollout": seconds["prefill each"] / seconds["rollout"],
                },
                {"rollout / parts": 1.15},
            )

    def step(self) -> None:
        """A step on the tiny model of the digits: completions of the full length, and ones that end by themselves."""
        import grpo_jax
        import grpo_torch
        from timing import alternate

        if self.args.only not in "GRPO step":
            return
        task = grpo_jax.make_task(self.directory, quick=self.args.quick)
        model = grpo_torch.load(task.exported)
        for ends in (False,) if self.args.quick else (False, True):
            ours = grpo_jax.Step(task, ends=ends)
            theirs = {
                f"torch{label}": grpo_torch.Step(model, task, ours.processor, with_pvm=with_pvm, ends=ends)
                for label, with_pvm in (("", False), (" with PVM", True))
            }
            if not ends:
                self.agreement(ours, theirs["torch with PVM"])
            sides = {**theirs, "PVM-JAX": ours}
            alternate(sides, self.rounds)
            self._step_rows(task, {side: step.parts.medians(self.rounds) for side, step in sides.items()}, ends)

    def _step_rows(self, task: Any, medians: Mapping[str, Mapping[str, float]], ends: bool) -> None:
        settings = task.config["stage"]
        name = f"GRPO step, {settings['prompts']} x {settings['completions']} completions"
        if ends:
            rates = {side: found["tokens_per_second"] for side, found in medians.items()}
            ratios = {f"PVM-JAX / {side}": rates["PVM-JAX"] / rates[side] for side in rates if side != "PVM-JAX"}
            self.row(f"{name} that end by themselves", rates, ratios, unit="generated tokens/s")
            tokens = {side: found["tokens"] for side, found in medians.items()}
            self.row(f"{name} that end by themselves: how many tokens", tokens, {}, unit="tokens")
            return
        for part in ("total", "rollout", "rewards", "update"):
            values = {side: 1e3 * found[part] for side, found in medians.items()}
            ratios = {f"{side} / PVM-JAX": values[side] / values["PVM-JAX"] for side in values if side != "PVM-JAX"}
            label = "" if part == "total" else f": {part}"
            aims = {"torch / PVM-JAX": 3.0} if part == "total" else {}
            self.row(f"{name} of {settings['max_new_tokens']} tokens{label}", values, ratios, aims)

    def agreement(self, ours: Any, theirs: Any) -> None:
        """Both sides' gradient of the same completions; the same algorithm has the same norm."""
        batch, norm = ours.gradient_norm()
        other = theirs.gradient_norm(batch)
        self.row("GRPO step, gradient norm of the same completions", {"torch with PVM": other, "PVM-JAX": norm},
                 {"torch with PVM / PVM-JAX": other / norm}, unit="")  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args = options(argv, "GRPO: a shared prefill, and a step against transformers", rounds=5)
    about = set_up(args.threads)
    with tempfile.TemporaryDirectory() as directory:
        benchmark = Benchmark(Path(directory), args)
        print(f"fp32, medians of {benchmark.rounds} alternations\n")
        benchmark.shared_prefill()
        benchmark.step()
    if args.out:
        result = {"machine": about, "rounds": benchmark.rounds, "quick": args.quick, "rows": benchmark.rows}
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    main()
