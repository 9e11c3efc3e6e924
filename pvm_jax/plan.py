"""What fits where, before any machine is rented: compiles a run's programs for a topology without having it.

    python -m pvm_jax.plan --config=configs/sft.py:8b --topology=v5e:16x16 --config.mesh.tensor=4
    python -m pvm_jax.plan --config=configs/sft.py:8b --topology=h100,h100:8      the first that fits

The compiler is the one that the machines would use, so that its memory plan and what it accepts are exact. Nothing is
run: there are no times here. `config.model.path` needs a config.json only; without a path the shapes are those of
`config.model.size`. TPU topologies need the extra `tpu`, CUDA cards the extra `cuda12`.

Exit status: 0 if all programs fit, 1 if not (with the compiler's sentence), 2 for a command line that cannot be used.
"""

import dataclasses
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from pvm_jax import cli
from pvm_jax.planning import estimate, topology
from pvm_jax.planning.hlo import Program
from pvm_jax.planning.programs import Recipe, TrainStep, model_config, programs
from pvm_jax.planning.topology import GIB, PlanError, Topology

# A plan counts as tight up to this share of peak over unavoidable bytes; candidates are judged with it.
HEADROOM = 1.25


@dataclasses.dataclass(frozen=True)
class Plan:
    """A program compiled for a topology.

    Attributes:
      peak, arguments: bytes of one device; 0 where the compiler refused.
      collectives: bytes by kind.
      cycles: the compiler's estimate, 0 where it gives none.
      flops: of the matrix products outside of kernels, on one device.
      seconds, processor_seconds: of lowering and compiling, by the clock and on all cores together.
      refusal: the compiler's sentence, or "".
    """

    topology: Topology
    step: TrainStep
    peak: int
    arguments: int
    collectives: Mapping[str, float]
    cycles: float
    flops: float
    seconds: float
    processor_seconds: float
    refusal: str = ""

    @property
    def fits(self) -> bool:
        # A compiler for CUDA plans any size; the card's memory decides.
        return not self.refusal and self.peak <= self.topology.memory

    def table(self) -> str:
        """What `python -m pvm_jax.plan` prints."""
        step, shape, mesh = self.step, self.step.shape, self.step.recipe.mesh
        least = estimate.unavoidable(step)
        slices = f", {self.topology.slices} slices" if self.topology.slices > 1 else ""
        micro = f", {shape.micro_batches} micro-batches" if shape.micro_batches > 1 else ""
        rows = [
            (f"{step.name} on {self.topology.name}{slices}", f"mesh {' x '.join(map(str, mesh.shape.values()))}"),
            ("batch", f"{shape.rows} rows of {shape.length:,} tokens and {shape.patches:,} patches{micro}"),
        ]
        if self.refusal:
            rows.append(("does not compile", self.refusal))
        else:
            margin = self.topology.memory - self.peak
            rows += [
                ("arguments", f"{_gib(self.arguments)} a device"),
                ("peak", f"{_gib(self.peak)}, {self.peak / least.total:.2f} of what is unavoidable"),
                ("device memory", f"{_gib(self.topology.memory)}, margin {_gib(margin)}"),
            ]
        rows.append(("unavoidable", _gib(least.total)))
        rows += [(f"  {name.replace('_', ' ')}", _gib(size)) for name, size in dataclasses.asdict(least).items()]
        rows += self._flops()
        rows += [(name, f"{_gib(size)} a device and step") for name, size in sorted(self.collectives.items())]
        if self.cycles and self.topology.clock:
            seconds = self.cycles / (self.topology.clock * 1e9)
            rows.append(("cycles", f"{self.cycles:.3g} ({seconds:.2f} s) without kernels; to compare programs only"))
        rows.append(("compiled in", f"{self.seconds:.0f} s, {self.processor_seconds:.0f} s of processor time"))
        width = max(len(name) for name, _ in rows) + 2
        return "\n".join(f"{name:<{width}}{value}" for name, value in rows)

    def _flops(self) -> list[tuple[str, str]]:
        step, devices = self.step, self.topology.size
        tokens, total = step.shape.rows * step.shape.length, estimate.flops(step)
        rows = [("flops", f"{total / tokens:.3g} a token, {total / devices:.3g} a device and step, counted by hand")]
        if self.topology.platform == "tpu" and not self.refusal:  # CUDA's products are calls of libraries
            xla = step.recipe.config["model"]["attention"] == "xla"
            share = self.flops * devices / estimate.flops(step, attention=xla)
            what = "" if xla else " outside of kernels"
            rows.append(("  compiled", f"{self.flops:.3g} a device and step{what}, {share:.3f} of the count by hand"))
        return rows


def recipe(config: Mapping[str, Any], where: Topology) -> Recipe:
    """What `train.py` would do with a resolved configuration on a topology."""
    return Recipe(config, model_config(config), where.mesh(**config["mesh"]), where.platform)


def compile_for(step: TrainStep, where: Topology) -> tuple[Plan, str]:
    """The plan of a program, and its compiled text ("" where the compiler refused)."""
    begun, begun_processor = time.monotonic(), time.process_time()

    def spent() -> tuple[float, float]:
        return time.monotonic() - begun, time.process_time() - begun_processor

    lowered = step.trace().lower()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        message = " ".join(str(error).split())
        if "RESOURCE_EXHAUSTED" not in message:
            raise
        sentence = re.search(
            r"Ran out of memory.*?\(?[\d.]+[KMGT]\)?.*?exceed\w* .*?[\d.]+[KMGT]?\)?\.?(?= |$)", message
        )
        refusal = sentence[0] if sentence else message[:300]
        return Plan(where, step, 0, 0, {}, 0.0, 0.0, *spent(), refusal), ""
    seconds = spent()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    program = Program(text)
    plan = Plan(
        where,
        step,
        memory.peak_memory_in_bytes,
        memory.argument_size_in_bytes,
        program.collectives(),
        program.cycles(),
        program.flops(),
        *seconds,
    )
    return plan, text


def suggestion(config: Mapping[str, Any], where: Topology) -> str:
    """The smallest relative of a topology that a plan is likely to fit, by unavoidable bytes; nothing is compiled."""
    for other in topology.relatives(where):
        if other.size <= where.size:
            continue
        try:
            steps = programs(recipe(config, other))
        except ValueError:  # this mesh or batch does not divide there
            continue
        if all(HEADROOM * estimate.unavoidable(step).total <= other.memory for step in steps):
            return f"the smallest that should fit is --topology={other.name}"
    return "more micro-batches (config.micro_batches) or shorter buckets (config.data.length) need less"


def main(argv: list[str]) -> None:
    config = flags.FLAGS.config.to_dict()
    names = flags.FLAGS.topology.split(",")
    for where in [topology.parse(name, flags.FLAGS.num_slices) for name in names]:
        plans = []
        for step in programs(recipe(config, where)):
            plan, text = compile_for(step, where)
            if flags.FLAGS.hlo:
                Path(flags.FLAGS.hlo).write_text(text, encoding="utf-8")
            print(plan.table(), end="\n\n", flush=True)
            plans.append(plan)
        if all(plan.fits for plan in plans):
            return
        misses = [p.refusal or f"peak {_gib(p.peak)} of {_gib(where.memory)}" for p in plans if not p.fits]
        verdict = f"{where.name}: does not fit: {misses[0]}"
    raise PlanError(f"{verdict}; {suggestion(config, where)}")


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:.2f} MiB"


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "File with get_config(), e.g. configs/sft.py:8b.", lock_config=True)
    flags.DEFINE_string("topology", None, f"One, or several with commas, smallest first: {topology.VALID}.")
    flags.DEFINE_integer("num_slices", 1, "TPU slices, connected by the data center's network.")
    flags.DEFINE_string("hlo", None, "File for the text of the compiled program, the last one if there are several.")
    flags.mark_flags_as_required(["config", "topology"])
    cli.run(main)
