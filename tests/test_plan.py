"""Plans: names of topologies, the programs of every shipped size lowered for TPU and CUDA, what the compiler says.

Lowering needs no compiler for the platform. Compiling does: those tests run where the extras are installed
(`pip install -e '.[tpu]'`, `'.[cuda12]'`), in processes of their own, as a user would.
"""

import dataclasses
import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from golden import sharding as golden
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import AbstractMesh

import configs.sft
from configs.common import PVM_AND_LORA
from pvm_jax.config import ModelConfig
from pvm_jax.planning import estimate, topology
from pvm_jax.planning.hlo import Program
from pvm_jax.planning.programs import programs
from pvm_jax.planning.recipe import Recipe, model_config
from pvm_jax.planning.topology import PlanError
from pvm_jax.presets import SIZES
from pvm_jax.sharding import MESH_AXES, make_mesh

ROOT = Path(__file__).parents[1]
V5E_256 = (1, 64, 4)


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of docs/plans.md: a command and what it printed. `peak` is None where it was not compiled."""

    size: str
    topology: str
    flags: str
    least: float
    peak: float | None
    ratio: float | None

    @property
    def name(self) -> str:
        return " ".join([self.size, self.topology, *self.flags.split()]).replace("--config.", "")

    def resolved(self) -> tuple[dict, topology.Topology, tuple[int, int, int]]:
        """What the command resolves to: configuration, topology, mesh."""
        config, slices = resolved(self.size), 1
        for flag in self.flags.split():
            path, value = flag.removeprefix("--").split("=")
            if path == "num_slices":
                slices = int(value)
                continue
            *parents, key = path.split(".")[1:]
            functools.reduce(dict.__getitem__, parents, config)[key] = int(value)
        where = topology.parse(self.topology, slices)
        sizes = topology.fill(tuple(config["mesh"][axis] for axis in MESH_AXES), where.size)
        return config, where, sizes


def documented() -> list[Row]:
    number = r"([\d.]+|not compiled|-)"
    line = rf"^\| (\w+) \| (\S+:\S+) \| (?:`(.*?)` )?\| ([\d.]+) \| {number}(?: \(\w\))? \| {number}? ?\| [\d.]+ \|$"
    found = re.findall(line, (ROOT / "docs" / "plans.md").read_text(), re.MULTILINE)
    values = [[float(x) if x[:1].isdigit() else None for x in row[3:]] for row in found]
    return [Row(*row[:3], *numbers) for row, numbers in zip(found, values)]


ROWS = documented()


def resolved(size: str, **data) -> dict:
    config = configs.sft.get_config(size).to_dict()
    config["data"] |= {"rows": 64, "length": 4096, "patches": 8192} | data
    config["micro_batches"] = 1
    return config


def step_of(config: dict, mesh=V5E_256, platform: str = "tpu"):
    (step,) = programs(Recipe(config, model_config(config), AbstractMesh(mesh, MESH_AXES), platform))
    return step


# ------------------------------------------------------------------------------------------- names and mistakes


def test_topologies_by_name():
    v5e, gpus = topology.parse("v5e:16x16", num_slices=2), topology.parse("h100:8")
    assert (v5e.platform, v5e.size, v5e.slices) == ("tpu", 512, 2)
    assert (gpus.platform, gpus.size, gpus.memory) == ("cuda", 8, 84942979072)
    assert topology.parse("h100").name == "h100:1"
    assert [t.size for t in topology.relatives(topology.parse("v6e:2x2"))] == [4, 8, 16, 32, 64, 128, 256]


@pytest.mark.parametrize("name", ["v5e-256", "v5e", "v5e:4x4x4", "v5p:4x4", "v9:2x2", "h100:7", "h100:x", "a100:8", ""])
def test_a_topology_that_does_not_exist(name):
    with pytest.raises(PlanError, match=re.escape(f"--topology={name}: no such topology; expected one of v4:4x4x4")):
        topology.parse(name)


def test_gpus_have_no_slices():
    with pytest.raises(PlanError, match="only TPUs come in slices"):
        topology.parse("h100:8", num_slices=2)


def test_mesh_sizes():
    assert topology.fill((1, -1, 4), 256) == (1, 64, 4)
    with pytest.raises(PlanError, match="expected data x fsdp x tensor = 8 devices, got 1 x -1 x 3"):
        topology.fill((1, -1, 3), 8)


def test_rows_that_do_not_divide():
    with pytest.raises(PlanError, match=r"data x fsdp x config.micro_batches = 64 x 1, got \[8\]"):
        step_of(resolved("8b", rows=8))


def test_no_model_and_no_plan_for_a_stage():
    config = resolved("8b")
    with pytest.raises(PlanError, match=r"expected a path with a config\.json, or a released size"):
        model_config(config | {"model": config["model"] | {"size": None}})
    with pytest.raises(PlanError, match=r"config\.stage\.module: expected one of"):
        step_of(config | {"stage": {"module": "pvm_jax.training.visual_labels"}})


def test_the_command_says_what_is_wrong():
    command = [sys.executable, "-m", "pvm_jax.plan", "--config=configs/sft.py:8b", "--topology=v5e-256"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: --topology=v5e-256: no such topology; expected one")


# ------------------------------------------------------------------------------------------- sharding


@pytest.mark.parametrize("size", golden.SIZES)
def test_the_golden_sharding_table(size):
    stored = (golden.FOLDER / f"sharding_{size}.txt").read_text()
    assert golden.table(size) == stored, "if the change is intended: python tests/golden/sharding.py"


# ------------------------------------------------------------------------------------------- lowering


@pytest.mark.parametrize("size", SIZES)
def test_every_size_lowers_for_256_tpus(size):
    """At 16,384 tokens, with 64-way fsdp and 4-way tensor."""
    step = step_of(resolved(size, length=16384, patches=16384))
    text = step.trace().lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in text, "splash attention"
    assert not re.search(r"16384x16384", text), "no matrix of scores or booleans"
    assert not re.search(r"16384x151936|151936x16384", text), "no logits of a whole row"
    alone = len(step.recipe.model.pvm.layers)
    assert text.count("optimization_barrier") == alone, "layers outside of loops are recomputed when their turn comes"


def test_frozen_weights_are_small_and_have_no_optimizer_state():
    step = step_of(resolved("8b"))
    assert {x.dtype for x in step.frozen.values()} == {jnp.dtype("bfloat16")}
    assert all("/pvm_block/" in name for name in step.state.trainable)
    trained = sum(x.size for x in step.state.trainable.values())
    assert trained == 27_922_179
    assert sum(x.size for x in jax.tree.leaves(step.state.optimizer)) < 2 * trained + 10


def test_lowers_for_cuda(monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91002)
    # cuDNN's partitioning rule wants devices, if only simulated ones.
    config = resolved("4b", length=6144)
    (step,) = programs(Recipe(config, model_config(config), make_mesh(1, 8, 1), "cuda"))
    text = step.trace().lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmha" in text
    assert not re.search(r"6144x6144", text), "no matrix of scores or booleans"


# ------------------------------------------------------------------------------------------- the documented plans


def test_the_table_is_read():
    text = (ROOT / "docs" / "plans.md").read_text()
    assert len(ROWS) == len(re.findall(r"^\| (?:2b|4b|8b|32b) \|", text, re.MULTILINE)) >= 13
    assert {row.size for row in ROWS} == {"4b", "8b", "32b"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_documented_plan_follows_from_the_shapes(row):
    """What is unavoidable, and the ratio; the peaks are the compilers' (below). Lowering is tested above."""
    config, where, sizes = row.resolved()
    (step,) = programs(Recipe(config, model_config(config), AbstractMesh(sizes, MESH_AXES), where.platform))
    least = estimate.unavoidable(step).total / 2**30
    assert row.least == pytest.approx(least, abs=0.006)
    if row.peak:
        assert row.ratio == pytest.approx(row.peak / least, abs=0.006)


# ------------------------------------------------------------------------------------------- estimates


def test_unavoidable_bytes_of_8b_by_hand():
    least = estimate.unavoidable(step_of(resolved("8b"), (1, 8, 1)))
    tokens = 8 * 4096
    assert least.layer_inputs == 2 * tokens * 4096 * (36 - 8 + 1)
    # Of a branch only the three matrices of the decoder's width are split; two moments and a gradient, in fp32.
    split = 3 * 3 * 512 * 4096
    assert least.optimizer == pytest.approx(3 * 4 * (split / 8 + 27_922_179 - split), rel=0.001)
    assert least.weights == pytest.approx(2 * 8.77e9 / 8, rel=0.1), "nearly all is split"
    assert least.work > 2 * 3 * tokens * 12288


def test_backward_passes_end_at_the_lowest_layer_that_trains():
    config = resolved("2b") | {"freeze": PVM_AND_LORA}
    config["model"] |= {"lora": {"rank": 4, "alpha": None, "targets": r"layers\.2[0-3]\.mlp"}}
    step = step_of(config)
    lowest = step.recipe.model.pvm.layers[0]
    names = {**step.state.trainable, **step.frozen}
    for pattern, first in (
        ("_lora/[ab]$", 20),
        ("_lora/[ab]$|pvm_block", lowest),
        ("layers/2[1-9]|^text/norm$", 24),
        ("^text/norm$|^lm_head$", 28),
        ("_lora/[ab]$|^visual/", 0),
        ("_lora/[ab]$|embed_tokens", 0),
        ("", 0),
    ):
        state = dataclasses.replace(step.state, trainable={n: x for n, x in names.items() if re.search(pattern, n)})
        other = dataclasses.replace(step, state=state)
        assert estimate.first_trainable(other) == first, pattern
        assert estimate.unavoidable(other).layer_inputs == 2 * 4096 * 2048 * (28 - first + 1)


def shrunk(config: ModelConfig, layers: int, pvm: int, blocks: int) -> ModelConfig:
    """Real widths, few layers, none of them in a loop."""
    return dataclasses.replace(
        config,
        text=dataclasses.replace(config.text, num_hidden_layers=layers, vocab_size=4096),
        vision=dataclasses.replace(config.vision, depth=blocks, deepstack_visual_indexes=tuple(range(blocks - 1))),
        pvm=dataclasses.replace(config.pvm, layers=(pvm,)),
    )


@pytest.mark.parametrize(("layers", "pvm", "blocks"), [(1, 0, 1), (2, 0, 1), (2, 1, 2)])
def test_flops_are_the_compilers(layers, pvm, blocks):
    """One layer, one more above and below the trained one: the analytic count against the partitioned program's."""
    config = resolved("2b", rows=8, length=512, patches=512)
    config["stage"] |= {"chunk": 512}
    config["model"] |= {"attention": "xla"}
    recipe = Recipe(config, shrunk(model_config(config), layers, pvm, blocks), make_mesh(1, 4, 2), "cpu")
    (step,) = programs(recipe)
    compiled = step.trace().lower().compile()
    counted, read = compiled.cost_analysis()["flops"] * 8, Program(compiled.as_text()).flops() * 8
    assert counted == pytest.approx(estimate.flops(step), rel=0.05)
    assert read == pytest.approx(counted, rel=0.02), "the compiler counts element-wise operations, too"


def test_the_head_is_gathered_once_and_not_in_every_chunk():
    config = resolved("2b", rows=8, length=512, patches=512)
    config["model"] |= {"attention": "xla"}

    def gathered(chunk: int) -> float:
        config["stage"]["chunk"] = chunk
        recipe = Recipe(config, shrunk(model_config(config), 1, 0, 1), make_mesh(1, 8, 1), "cpu")
        (step,) = programs(recipe)
        moved = Program(step.trace().lower().compile().as_text()).collectives()
        return moved["all-gather"] + moved.get("all-to-all", 0)

    assert gathered(256) == gathered(512)


# ------------------------------------------------------------------------------------------- compiled text

HLO = """\
HloModule jit_update

%body (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p = (s32[], f32[8,128]) parameter(0)
  %x = f32[8,128] get-tuple-element(%p), index=1
  %g = bf16[64,128]{1,0} all-gather(%x), dimensions={0}
  %f = f32[8,128] fusion(%g), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"100"}
  %u = f32[8,128] fusion(%x), kind=kCustom, calls=%fused, backend_config={"estimated_cycles":"9223372036854775807"}
  ROOT %t = (s32[], f32[8,128]) tuple(%i, %f)
}

%fused (a: bf16[64,128]) -> f32[8,128] {
  ROOT %r = f32[999,999] reduce(%a), dimensions={0}
}

ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128] parameter(0)
  %s = (f32[8,128], f32[16,128]) all-gather-start(%a), dimensions={0}
  %w = (s32[], f32[8,128]) while(%t0), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  %r = f32[8,128] all-reduce(%a), to_apply=%add, backend_config={"estimated_cycles":"5"}
  ROOT %out = f32[8,128] get-tuple-element(%w), index=1
}
"""


# As compilers for TPU write it: no number of trips, and products as convolutions, some of them in padding.
TPU_HLO = """\
HloModule jit_update, is_scheduled=true

%product (p0: bf16[1,64,16], p1: bf16[3,16,32]) -> bf16[3,64,32] {
  %p0 = bf16[1,64,16]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[3,16,32]{2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %c = bf16[3,64,32]{2,1,0} convolution(%p0, %p1), window={size=3 pad=2_2 rhs_reversal=1}, dim_labels=0bf_0io->0bf
}

%begun (c: bf16[8,2]) -> bf16[64,2] {
  ROOT %g0 = bf16[64,2]{1,0} all-gather(%c), channel_id=5, dimensions={0}, frontend_attributes={chain_id="3"}
}

%ended (d: bf16[8,2]) -> bf16[64,2] {
  ROOT %g1 = bf16[64,2]{1,0} all-gather(%d), channel_id=5, dimensions={0}, frontend_attributes={chain_id="3"}
}

%below (q: (u32[], bf16[3,64,32])) -> pred[] {
  %q = (u32[]{:T(128)}, bf16[3,64,32]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %limit = u32[]{:T(128)} constant(7)
  %i = u32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (p: (u32[], bf16[3,64,32])) -> (u32[], bf16[3,64,32]) {
  %p = (u32[]{:T(128)}, bf16[3,64,32]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %two = u32[]{:T(128)} constant(2)
  %j = u32[]{:T(128)} get-tuple-element(%p), index=0
  %next = u32[]{:T(128)} add(%j, %two)
  %f = bf16[3,64,32]{2,1,0} fusion(%a, %b), kind=kOutput, calls=%product, backend_config={"estimated_cycles":"9"}
  %start = (bf16[8,2], bf16[64,2]) fusion(%c), kind=kCustom, calls=%begun
  %done = bf16[64,2] fusion(%start), kind=kCustom, calls=%ended
  ROOT %t = (u32[]{:T(128)}, bf16[3,64,32]{2,1,0:T(8,128)(2,1)}) tuple(%next, %f)
}

ENTRY %main (a: bf16[64,16], b: bf16[16,32]) -> bf16[64,32] {
  %b = bf16[16,32]{1,0:T(8,128)(2,1)} parameter(1)
  %a = bf16[64,16]{1,0:T(8,128)(2,1)} parameter(0)
  %w = (u32[]{:T(128)}, bf16[3,64,32]{2,1,0:T(8,128)(2,1)}) while(%t0), condition=%below, body=%body
  ROOT %out = bf16[64,32]{1,0:T(8,128)(2,1)} convolution(%a, %b), dim_labels=bf_io->bf
}
"""


def test_loops_and_products_as_tpu_compilers_write_them():
    program = Program(TPU_HLO)
    assert program.cycles() == 4 * 9, "0, 2, 4, 6 are below 7"
    assert program.flops() == (4 * 3 + 1) * 2 * 64 * 16 * 32
    assert program.collectives() == {"all-gather": 4 * 64 * 2 * 2}, "its start and its end are one"


def test_loops_count_once_a_trip():
    program = Program(HLO)
    assert program.collectives() == {"all-gather": 7 * 64 * 128 * 2 + 16 * 128 * 4, "all-reduce": 8 * 128 * 4}
    assert program.cycles() == 705
    assert (64, 128) in program.shapes() and (999, 999) not in program.shapes()


# ------------------------------------------------------------------------------------------- real compilers

needs_tpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="the extra `tpu` is not installed")
needs_cuda = pytest.mark.skipif(
    not importlib.util.find_spec("jax_cuda12_plugin"), reason="the extra `cuda12` is not installed"
)


def command(size: str, topology: str, *options: str, status: int = 0) -> tuple[str, str]:
    """Output and errors of the command."""
    line = [sys.executable, "-m", "pvm_jax.plan", f"--config=configs/sft.py:{size}", f"--topology={topology}"]
    line += ["--config.data.rows=64", "--config.data.length=4096", "--config.data.patches=8192", *options]
    # As users have it: the tests' precision is one that kernels in bf16 have no code for.
    env = {k: v for k, v in os.environ.items() if k not in ("JAX_DEFAULT_MATMUL_PRECISION", "XLA_FLAGS")}
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=3600)
    assert done.returncode == status, done.stderr[-2000:]
    return done.stdout, done.stderr


def compile_row(name: str, hlo: Path) -> Program:
    """Runs a row's command, which must print what the table says, and reads the compiled program."""
    (row,) = (row for row in ROWS if row.name == name)
    out, errors = command(row.size, row.topology, *row.flags.split(), f"--hlo={hlo}")
    found = re.search(r"peak +([\d.]+) GiB, ([\d.]+) of what", out)
    assert float(found[1]) == pytest.approx(row.peak, rel=0.02), out
    assert float(found[2]) == pytest.approx(row.ratio, abs=0.03), out
    assert "Involuntary full rematerialization" not in errors
    return Program(hlo.read_text())


@needs_tpu
def test_8b_on_v5e_8(tmp_path):
    compile_row("8b v5e:2x4 micro_batches=8", tmp_path / "hlo")


@needs_tpu
def test_8b_at_16k_on_v5e_256(tmp_path):
    program = compile_row("8b v5e:16x16 mesh.tensor=4 data.length=16384", tmp_path / "hlo")
    for shape in program.shapes():
        assert shape.count(16384) < 2, "a matrix of scores"
        assert not (16384 in shape and {151936, 151936 // 4} & set(shape)), "logits of a whole row"


@needs_tpu
def test_what_does_not_fit_says_so():
    _, errors = command("8b", "v5e:2x2", status=1)
    assert "v5e:2x2: does not fit: Ran out of memory" in errors
    assert "config.micro_batches" in errors or "--topology=v5e:" in errors


@needs_cuda
def test_8b_on_8_gpus(tmp_path):
    compile_row("8b h100:8 micro_batches=4", tmp_path / "hlo")


@needs_cuda
def test_4b_on_a_gpu(tmp_path):
    compile_row("4b h100:1 micro_batches=16", tmp_path / "hlo")
