"""Plans of GRPO: bytes by hand, lowering for TPU and CUDA, and that what is planned is what a run compiles."""

import dataclasses
import functools
import re
from pathlib import Path

import grpo_stages
import jax
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import AbstractMesh

import configs.grpo
from pvm_jax import decoding, decoding_weights
from pvm_jax.checkpoint import open_checkpoint
from pvm_jax.plan import Plan, chosen
from pvm_jax.planning import estimate, topology
from pvm_jax.planning.hlo import Program
from pvm_jax.planning.programs import programs
from pvm_jax.planning.recipe import Recipe, model_config
from pvm_jax.planning.topology import PlanError
from pvm_jax.sharding import MESH_AXES, make_mesh
from pvm_jax.training.setup import Blueprint, ModelOptions
from pvm_jax.training.step import put_batch

ROOT = Path(__file__).parents[1]
NEW_TOKENS = 70  # beyond the cache's first room


def of_size(size: str, mesh: tuple[int, int, int], platform: str = "tpu", **changes) -> dict:
    """The programs of a shipped configuration by the last word of their names."""
    config = configs.grpo.get_config(size).to_dict()
    for key, value in changes.items():
        (config if key in config else config["stage"])[key] = value
    return named(Recipe(config, model_config(config), AbstractMesh(mesh, MESH_AXES), platform))


def named(recipe: Recipe) -> dict:
    return {step.name.split()[-1]: step for step in programs(recipe)}


# ---- Bytes -------------------------------------------------------------------------------------------------------


def test_bytes_of_8b_on_8_devices_by_hand():
    found = of_size("8b", (1, 8, 1), micro_batches=8)
    assert list(found) == ["copy", "prefill", "growth", "decode", "update"]
    assert found["decode"].describe() == "64 rows, a cache of 18,432 tokens"
    assert found["update"].describe() == "64 rows of 18,432 tokens and 8,192 patches, 8 micro-batches"
    least = {name: estimate.unavoidable(step) for name, step in found.items()}
    # Of 64 rows 8 on each device; 36 layers with keys and values of 8 heads of 128 in bf16; PVM's memory beside them.
    token = 36 * 2 * 8 * 128 * 2
    memory = 3 * 2 * 8 * 2048 * 128 * 2
    assert least["decode"].cache == pytest.approx(8 * 18_432 * token + memory, rel=0.001)
    assert least["growth"].cache == pytest.approx(8 * (10_240 + 18_432) * token + 2 * memory, rel=0.001)
    assert least["prefill"].cache == pytest.approx((8 + 1) * 2112 * token + memory * 9 / 8, rel=0.001)
    # fp32 and two moments of all but the tower, which is in bf16.
    step = found["update"]
    assert sum(x.size for x in step.state.trainable.values()) == 8_218_657_539
    assert sum(x.size for x in step.frozen.values()) == 576_388_336
    assert all(name.startswith("visual/") for name in step.frozen)
    # Whole on every device: norms of queries and keys, and what of a branch has no side of the decoder's width; of the
    # tower fc1, its bias and the norm of four mergers (the first one's norm is 1,152 wide), and the blocks' biases.
    whole = 36 * 2 * 128 + (27_922_179 - 3 * 3 * 512 * 4096)
    policy = (8_218_657_539 - whole) // 8 + whole
    whole = 4 * 4608 * (4608 + 1) + 3 * 2 * 4608 + 2 * 1152 + 27 * (3 * 1152 + 4304)
    tower = (576_388_336 - whole) // 8 + whole
    # While completions are drawn another copy of all but the tower, whole on each device, matrices in bf16. Vectors are
    # fp32: two norms a layer and the last, which are split; those above and gates, which are whole and not copied.
    norms, whole = (36 * 2 + 1) * 4096, 36 * 2 * 128 + 3 * (2 * 512 + 2 * 128 + 1)
    copy = 2 * (8_218_657_539 - norms - whole) + 4 * norms
    assert least["decode"].weights == 4 * policy + 2 * tower + copy
    split = of_size("8b", (1, 8, 1), micro_batches=8, sampler_weights="split")
    assert estimate.unavoidable(split["decode"]).weights == 6 * policy + 2 * tower - 2 * (norms // 8 + whole)
    assert least["decode"].optimizer == 8 * policy
    assert least["update"].weights == 4 * policy + 2 * tower
    assert least["update"].optimizer == pytest.approx(12 * policy, abs=100)  # counters
    assert least["update"].layer_inputs == 2 * 18_432 * 4096 * (36 + 1)
    # The gradient of the head, added up in fp32 with a chunk's logits and the gathered matrix beside it.
    assert least["update"].work == (4 + 2) * 151_936 * 4096 + 4 * 2 * 128 * 151_936
    for name in ("copy", "prefill", "growth", "decode"):
        assert (least[name].weights, least[name].optimizer) == (least["decode"].weights, least["decode"].optimizer)


def test_rows_that_do_not_divide_lie_whole():
    """Eight prompts on 64 devices: each has all of them; of 64 completions each has one."""
    found = of_size("8b", (1, 64, 1))
    token = 36 * 2 * 8 * 128 * 2
    assert estimate.unavoidable(found["prefill"]).cache == pytest.approx((8 + 1) * 2112 * token, rel=0.02)
    assert estimate.unavoidable(found["decode"]).cache == pytest.approx(18_432 * token, rel=0.01)
    assert found["prefill"].tokens == 8 * 2048


def test_a_reference_model_and_scores_of_the_old_one():
    """Another model in fp32 beside everything; a pass that scores."""
    plain, found = (of_size("2b", (1, 8, 1), **more) for more in ({}, {"beta": 0.1, "iterations": 2}))
    assert list(found) == ["copy", "prefill", "growth", "decode", "scoring", "update"]
    whole = sum(
        estimate.on_device([*arrays.values()]) for arrays in (plain["update"].state.trainable, plain["update"].frozen)
    )
    for name, step in plain.items():
        assert found[name].resident.total == step.resident.total + whole
    assert found["update"].batch.reference is not None and found["update"].batch.old is not None
    assert estimate.unavoidable(found["scoring"]).weights == 2 * whole


def test_what_lies_beside_a_program_must_fit_with_it():
    step = of_size("2b", (1, 8, 1))["decode"]
    where = topology.parse("h100:8")
    plan = Plan(where, step, where.memory - step.resident.total, 0, {}, 0.0, 0.0, 0.0, 0.0)
    assert plan.fits and f"{step.resident.total / 2**30:.2f} GiB of it beside the program" in plan.table()
    assert not dataclasses.replace(plan, peak=plan.peak + 1).fits


def test_one_program():
    found = [*of_size("2b", (1, 8, 1)).values()]
    assert chosen(found, "decode") == [found[3]]
    with pytest.raises(PlanError, match=r"--program=sampling: expected the last word of one of \['GRPO copy', "):
        chosen(found, "sampling")


# ---- The documented plans ----------------------------------------------------------------------------------------


def documented() -> dict:
    """The table of docs/plans.md: (size, topology, flags) to its rows, (program, least, peak, beside, ratio)."""
    number, rest = r"([\d.]+|not compiled)", r"(?: ([\d.]+))? \|"
    line = rf"^\| (\w+) \| (\w+) \| (\S+:\S+) \| (?:`(.*?)` )?\| {number} \| {number} \|{rest}{rest} [\d.]+ \|$"
    runs: dict = {}
    for program, size, where, flags, *numbers in re.findall(
        line, (ROOT / "docs" / "plans.md").read_text(), re.MULTILINE
    ):
        values = [float(x) if x[:1].isdigit() else None for x in numbers]
        runs.setdefault((size, where, flags), []).append((program, *values))
    return runs


def parts(program: str, size: str, where: str) -> list[float]:
    """A row of the second table: weights, optimizer, cache, batch, activations."""
    line = rf"^\| {program} \| {size} \| {re.escape(where)} ((?:\| [\d.]+ ){{5}})\|$"
    (row,) = re.findall(line, (ROOT / "docs" / "plans.md").read_text(), re.MULTILINE)
    return [float(x) for x in row.split("|")[1:]]


def test_the_table_is_read():
    assert {run[:2] for run in documented()} == {("4b", "h100:8"), ("8b", "v5p:4x4x4"), ("8b", "v5e:16x16")}
    assert all(
        [row[0] for row in rows] == ["copy", "prefill", "growth", "decode", "update"] for rows in documented().values()
    )


@pytest.mark.parametrize("run", documented(), ids=" ".join)
def test_documented_plans_follow_from_the_shapes(run):
    """What is unavoidable, what lies beside, the ratio; the peaks are the compilers'."""
    size, name, flags = run
    config, where = configs.grpo.get_config(size).to_dict(), topology.parse(name)
    for flag in flags.split():
        path, value = flag.removeprefix("--config.").split("=")
        *parents, key = path.split(".")
        functools.reduce(dict.__getitem__, parents, config)[key] = int(value)
    sizes = topology.fill(tuple(config["mesh"][axis] for axis in MESH_AXES), where.size)
    found = named(Recipe(config, model_config(config), AbstractMesh(sizes, MESH_AXES), where.platform))
    for program, wanted, peak, beside, ratio in documented()[run]:
        least = estimate.unavoidable(found[program])
        activations = least.layer_inputs + least.work
        shown = [n / 2**30 for n in (least.weights, least.optimizer, least.cache, least.batch, activations)]
        assert parts(program, size, name) == pytest.approx(shown, abs=0.006)
        least = least.total / 2**30
        assert wanted == pytest.approx(least, abs=0.006)
        if peak:
            assert beside == pytest.approx(found[program].resident.total / 2**30, abs=0.006)
            assert ratio == pytest.approx(peak / least, abs=0.006)


# ---- Lowering ----------------------------------------------------------------------------------------------------


def test_8b_lowers_for_256_tpus():
    found = of_size("8b", (1, 64, 4))
    update, decode = (found[name].trace().lower(lowering_platforms=("tpu",)).as_text() for name in ("update", "decode"))
    assert "tpu_custom_call" in update, "splash attention"
    assert not re.search(r"18432x18432", update), "no matrix of scores or booleans"
    assert not re.search(r"18432x151936|151936x18432", update), "no logits of a whole row"
    donated = r"tensor<(?:\d+x)?64x8x18432x128xbf16> \{[^%]*?(?:tf.aliasing_output|jax.buffer_donor)"
    groups = len(found["decode"].recipe.model.layer_groups(True))
    assert len(re.findall(donated, decode)) == 2 * groups > 2, "keys and values of every group are updated in place"


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_a_small_run_lowers(small_checkpoint, monkeypatch, platform):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91002)
    recipe = small(small_checkpoint, make_mesh(1, 4, 2), platform, length=256, patches=128)
    recipe.config["stage"] |= {"iterations": 2}
    found = named(recipe)
    assert list(found) == ["copy", "prefill", "growth", "decode", "scoring", "update"]
    text = {name: step.trace().lower(lowering_platforms=(platform,)).as_text() for name, step in found.items()}
    kernel = {"tpu": "tpu_custom_call", "cuda": "__cudnn$fmha"}[platform]
    assert all(kernel in text[name] for name in ("scoring", "update"))


def test_the_heads_gradient_is_summed_over_devices_once(small_checkpoint):
    """With twice as many chunks no more than flags are summed; the gradient of the head is 64 KiB."""

    def summed(chunk: int) -> float:
        recipe = small(small_checkpoint, make_mesh(1, 8, 1), "cpu", length=256, patches=96)
        recipe.config["stage"]["chunk"] = chunk
        program = Program(named(recipe)["update"].trace().lower().compile().as_text())
        return sum(program.collectives().get(kind, 0) for kind in ("all-reduce", "reduce-scatter"))

    once = summed(128)
    assert once > 60_000 and summed(64) - once < 1000


def small(checkpoint: Path, mesh, platform: str, length: int, patches: int) -> Recipe:
    config = configs.grpo.get_config("4b").to_dict()
    config["model"] |= {"path": str(checkpoint), "size": None}
    config["stage"] |= {"prompts": 3, "completions": 4, "max_new_tokens": NEW_TOKENS}
    config["data"] |= {"prompt_length": (112,), "length": (length,), "patches": (patches,)}
    return Recipe(config, model_config(config), mesh, platform)


# ---- What is planned is what runs --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(small_checkpoint, tmp_path_factory) -> dict:
    """Of each program the lowered text, planned and with the arguments of a rollout on four devices."""
    mesh = make_mesh(1, 2, 2, devices=jax.devices()[:4])
    recipe = small(small_checkpoint, mesh, "cpu", length=182, patches=96)
    planned = named(recipe)
    stage = grpo_stages.make(
        small_checkpoint,
        grpo_stages.write_prompts(tmp_path_factory.mktemp("prompts")),
        mesh=mesh,
        max_new_tokens=NEW_TOKENS,
        data={"length": (182,), "pack": False},
    )
    options = ModelOptions(str(small_checkpoint), dtype="bfloat16", remat=True)
    source = open_checkpoint(small_checkpoint)
    blueprint = Blueprint(source.config, options, stage, recipe.config["freeze"], mesh)
    trainable, frozen = (
        blueprint.parameters(source, 0, names) for names in (blueprint.partition.trainable, blueprint.partition.frozen)
    )
    ran = {}

    def recorded(module, name: str):
        function = getattr(module, name)

        def call(*args, **options):
            ran.setdefault(name, []).append(function.trace(*args, **options).lower().as_text())
            return function(*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module, name in (
            (decoding_weights, "copied"),
            (decoding, "prefill"),
            (decoding, "grow"),
            (decoding, "decode"),
        ):
            patch.setattr(module, name, recorded(module, name))
        info = stage.next_batch(0, lambda: blueprint.partition.merge(trainable, frozen))
    return {
        "planned": planned,
        "ran": ran,
        "batch": put_batch(info.batch, mesh, 1),
        "beside": [(x, cast) for x, cast in zip(*map(jax.tree.leaves, _models(blueprint, trainable, frozen)))],
    }


def _models(blueprint: Blueprint, trainable: dict, frozen: dict) -> tuple:
    model = blueprint.partition.merge(trainable, frozen)
    return nnx.split(model)[1], nnx.split(decoding_weights.for_decoding(model))[1]


@pytest.mark.parametrize(
    ("program", "function"), [("copy", "copied"), ("prefill", "prefill"), ("growth", "grow"), ("decode", "decode")]
)
def test_planned_programs_of_a_rollout_are_those_that_run(compared, program, function):
    """The same text: shapes, dtypes, shardings, donated arguments, computation."""

    def without_axis_of_one(text: str) -> str:  # XLA leaves it out where it says how the result of a program lies
        return text.replace('{"data", "fsdp"}', '{"fsdp"}')

    planned = compared["planned"][program].trace().lower().as_text()
    assert without_axis_of_one(planned) in [without_axis_of_one(text) for text in compared["ran"][function]]


def test_the_planned_update_has_the_arguments_that_arrive(compared):
    planned, batch = compared["planned"]["update"].batch, compared["batch"]
    assert jax.tree.structure(planned) == jax.tree.structure(batch)
    for want, x in zip(jax.tree.leaves(planned), jax.tree.leaves(batch), strict=True):
        assert (want.shape, want.dtype) == (x.shape, x.dtype)
        assert want.sharding.is_equivalent_to(x.sharding, x.ndim)


def test_what_is_not_copied_for_a_rollout_lies_there_once(compared):
    """The tower and whole vectors are the trained model's own arrays; what is copied is what `resident` counts."""
    pairs = compared["beside"]
    own = [pair for pair in pairs if (pair[0].dtype, pair[0].sharding) == (pair[1].dtype, pair[1].sharding)]
    assert all(
        x.addressable_shards[0].data.unsafe_buffer_pointer() == drawn.addressable_shards[0].data.unsafe_buffer_pointer()
        for x, drawn in own
    )
    assert own and len(own) < len(pairs)
    copied = sum(estimate.on_device([x]) for x, _ in pairs) - sum(estimate.on_device([x]) for x, _ in own)
    assert compared["planned"]["decode"].resident.weights == copied
