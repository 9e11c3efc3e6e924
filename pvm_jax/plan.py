"""What fits where, before any machine is rented: compiles a run's programs for a topology without having it.

    python -m pvm_jax.plan --config=configs/sft.py:8b --topology=v5e:16x16 --config.mesh.tensor=4
    python -m pvm_jax.plan --config=configs/sft.py:8b --topology=h100,h100:8      the first that fits
    python -m pvm_jax.plan --config=configs/grpo.py:4b --topology=h100:8 --config.micro_batches=8 --program=decode

The compiler is the one that the machines would use, so that its memory plan and what it accepts are exact. Nothing is
run: there are no times here. `config.model.path` needs a config.json only; without a path the shapes are those of
`config.model.size`. A run has one program or several, with the largest shapes that its configuration allows; what lies
on the devices beside a program is added to its peak.

TPU topologies need the extra `tpu`, CUDA cards the extra `cuda12`.

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
from pvm_jax.planning.programs import programs
from pvm_jax.planning.recipe import Recipe, Step, TrainStep, model_config
from pvm_jax.planning.topology import GIB, PlanError, Topology

# A plan counts as tight up to this share of peak over unavoidable bytes; candidates are judged with it.
HEADROOM = 1.25


@dataclasses.dataclass(frozen=True)
class Plan:
    """A program compiled for a topology.

    Attributes:
      peak, arguments: bytes of one device in the program alone; 0 where the compiler refused.
      collectives: bytes by kind.
      cycles: the compiler's estimate, 0 where it gives none.
      flops: of the matrix products outside of kernels, on one device.
      seconds, processor_seconds: of lowering and compiling, by the clock and on all cores together.
      refusal: the compiler's sentence, or "".
    """

    topology: Topology
    step: Step
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
        return not self.refusal and self.held <= self.topology.memory

    @property
    def held(self) -> int:
        """Bytes of one device at the peak, with what lies beside the program."""
        return self.peak + self.step.resident.total

    def table(self) -> str:
        """What `python -m pvm_jax.plan` prints."""
        step, mesh = self.step, self.step.recipe.mesh
        least, beside = estimate.unavoidable(step), step.resident
        slices = f", {self.topology.slices} slices" if self.topology.slices > 1 else ""
        rows = [
            (f"{step.name} on {self.topology.name}{slices}", f"mesh {' x '.join(map(str, mesh.shape.values()))}"),
            ("batch", step.describe()),
        ]
        if self.refusal:
            rows.append(("does not compile", self.refusal))
        else:
            share = f", {_gib(beside.total)} of it beside the program" if beside.total else ""
            rows += [
                ("arguments", f"{_gib(self.arguments)} a device"),
                ("peak", f"{_gib(self.held)}, {self.held / least.total:.2f} of what is unavoidable{share}"),
                ("device memory", f"{_gib(self.topology.memory)}, margin {_gib(self.topology.memory - self.held)}"),
            ]
        rows.append(("unavoidable", _gib(least.total)))
        parts = dataclasses.asdict(least).items()
        rows += [(f"  {name.replace('_', ' ')}", _gib(size)) for name, size in parts if size]
        rows += self._flops(step) if isinstance(step, TrainStep) and step.only_pvm else []
        rows += [(name, f"{_gib(size)} a device and step") for name, size in sorted(self.collectives.items())]
        if self.cycles and self.topology.clock:
            seconds = self.cycles / (self.topology.clock * 1e9)
            rows.append(("cycles", f"{self.cycles:.3g} ({seconds:.2f} s) without kernels; to compare programs only"))
        rows.append(("compiled in", f"{self.seconds:.0f} s, {self.processor_seconds:.0f} s of processor time"))
        width = max(len(name) for name, _ in rows) + 2
        return "\n".join(f"{name:<{width}}{value}" for name, value in rows)

    def _flops(self, step: TrainStep) -> list[tuple[str, str]]:
        devices = self.topology.size
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


def compile_for(step: Step, where: Topology) -> tuple[Plan, str]:
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
        steps = chosen(programs(recipe(config, where)), flags.FLAGS.program)
        plans = []
        for step in steps:
            plan, text = compile_for(step, where)
            if flags.FLAGS.hlo:
                file = Path(flags.FLAGS.hlo)
                name = step.name.replace(" ", "_")
                (file if len(steps) == 1 else file.with_name(f"{file.name}.{name}")).write_text(text, encoding="utf-8")
            print(plan.table(), end="\n\n", flush=True)
            plans.append(plan)
        if all(plan.fits for plan in plans):
            most = max(plans, key=lambda plan: plan.held)
            print(f"{where.name}: fits; at most {_gib(most.held)} of {_gib(where.memory)}, in {most.step.name}")
            return
        misses = [
            f"{p.refusal or f'peak {_gib(p.held)} of {_gib(where.memory)}'} ({p.step.name})"
            for p in plans
            if not p.fits
        ]
        verdict = f"{where.name}: does not fit: {misses[0]}"
    raise PlanError(f"{verdict}; {suggestion(config, where)}")


def chosen(steps: list[Step], name: str | None) -> list[Step]:
    """The programs whose names end in `name`; all without one.

    Raises:
      PlanError: there is none.
    """
    found = [step for step in steps if name is None or step.name.split()[-1] == name]
    if not found:
        raise PlanError(f"--program={name}: expected the last word of one of {[step.name for step in steps]}")
    return found


def _gib(size: float | int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:.2f} MiB"


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "File with get_config(), e.g. configs/sft.py:8b.", lock_config=True)
    flags.DEFINE_string("topology", None, f"One, or several with commas, smallest first: {topology.VALID}.")
    flags.DEFINE_integer("num_slices", 1, "TPU slices, connected by the data center's network.")
    flags.DEFINE_string("hlo", None, "File for the text of the compiled program; of several, each in FILE.NAME.")
    flags.DEFINE_string(
        "program", None, "Of a run's programs only this one, e.g. decode; the verdict is about it alone."
    )
    flags.mark_flags_as_required(["config", "topology"])
    cli.run(main)
