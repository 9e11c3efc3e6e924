"""Generation against transformers' `generate`, against one forward pass, and against itself in other batches."""

import dataclasses
import io
import json
import re
import subprocess
import sys

import jax
import numpy as np
import oracle
import pvm_reference
import pytest
import tiny
from flax import nnx

import pvm_jax
import pvm_jax.generate as generation
from pvm_jax import decoding
from pvm_jax.data.processor import Processor
from pvm_jax.generate import generate
from pvm_jax.sampling import GenerationError, Sampling, row_keys

STEPS = 24


def prompts() -> dict[str, dict]:
    """The parity tests' conversations up to the last answer, and one that is much shorter than the others."""
    samples = {name: {"messages": s["messages"][:-1]} for name, s in tiny.conversations().items()}
    return samples | {"image_first": {"messages": [tiny.user(tiny.image(40, 64, 32), "so?")]}}


# Random models repeat their last tokens for ever, above all with a tied head; then any bug goes unseen.
VARIED = {"max_new_tokens": STEPS, "stop_token_ids": [], "repetition_penalty": 1.5}


@pytest.fixture(scope="module")
def pvm_dir(checkpoints):
    return checkpoints(tied=False, pvm_layers=tiny.PVM_LAYERS, memory_mask="causal")


@pytest.fixture(scope="module")
def pvm(pvm_dir):
    return pvm_jax.load(pvm_dir)


@pytest.fixture(scope="module")
def ragged(pvm):
    """Answers to all prompts in one batch, by name."""
    out = generate(*pvm, list(prompts().values()), **VARIED)
    return dict(zip(prompts(), out))


@pytest.fixture(scope="module")
def stock_dir(checkpoints):
    return checkpoints(tied=False)


@pytest.fixture(scope="module")
def ragged_stock(stock_dir):
    out = generate(*pvm_jax.load(stock_dir), list(prompts().values()), **VARIED)
    return dict(zip(prompts(), out))


@pytest.fixture(scope="module")
def compilations():
    """A list that grows by one with every program that XLA compiles."""
    events = []

    def listen(event: str, *_, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


def answer_of_transformers(directory, sample: dict, repetition_penalty: float) -> list[int]:
    model = pvm_reference.load(directory)
    banned = Processor.from_pretrained(directory).banned_token_ids.tolist()
    arguments = oracle.inputs(directory, sample, add_generation_prompt=True)
    out = model.generate(
        **arguments,
        do_sample=False,
        max_new_tokens=STEPS,
        repetition_penalty=repetition_penalty,
        suppress_tokens=banned,
        eos_token_id=banned[-1],  # never comes
    )
    return out[0, arguments["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("name", prompts())
def test_tokens_of_a_ragged_batch_are_those_of_transformers(ragged_stock, stock_dir, name):
    assert ragged_stock[name].token_ids == answer_of_transformers(stock_dir, prompts()[name], 1.5)


@pytest.mark.parametrize("name", prompts())
def test_tokens_with_pvm_are_those_of_the_torch_reference(ragged, pvm_dir, name):
    assert ragged[name].token_ids == answer_of_transformers(pvm_dir, prompts()[name], 1.5)


def test_these_tokens_can_reveal_a_bug(ragged, ragged_stock):
    assert len({tuple(g.token_ids) for g in [*ragged.values(), *ragged_stock.values()]}) == 2 * len(prompts())
    assert min(len(set(g.token_ids)) for g in [*ragged.values(), *ragged_stock.values()]) > STEPS // 2


def test_several_answers_to_a_prompt_share_its_prefill_and_those_that_end_leave(pvm, monkeypatch):
    """Twelve draws for three prompts, of ragged lengths: one prefill, the tokens of twelve separate rows, in fewer rows
    once half have ended."""
    model, processor = pvm
    conversations = [prompts()[name] for name in ("image", "short", "image_first")]
    apart = [c for c in conversations for _ in range(4)]
    settings = {
        "max_new_tokens": 150,
        "stop_token_ids": range(20, 24),
        "banned_token_ids": processor.banned_token_ids,
        "seed": list(range(100, 112)),
    }

    def draw(conversations, **options):
        batch = generation.make_batch(generation.encode(processor, conversations), 224, 128)
        return decoding.complete(model, batch, Sampling(temperature=1.0), **settings, **options)

    want, got = draw(apart), draw(conversations, samples=4)
    rows, decode = [], decoding.decode

    def counted(graphdef, params, state, *arguments, **static):
        rows.append(state.tokens.shape[0])
        return decode(graphdef, params, state, *arguments, **static)

    monkeypatch.setattr(decoding, "decode", counted)
    compact = draw(conversations, samples=4, compact=True)
    assert rows == [12, 12, 6], want.lengths
    for made in (got, compact):
        np.testing.assert_array_equal(made.lengths, want.lengths)
        np.testing.assert_array_equal(made.stopped, want.stopped)
        for row, length in enumerate(want.lengths):
            np.testing.assert_array_equal(made.tokens[row, :length], want.tokens[row, :length])
            np.testing.assert_allclose(made.logprobs[row, :length], want.logprobs[row, :length], atol=1e-5)


def test_plain_greedy_tokens_are_those_of_the_torch_reference(pvm, pvm_dir, ragged):
    names = ["image", "two_images"]
    out = generate(*pvm, [prompts()[n] for n in names], max_new_tokens=STEPS, stop_token_ids=[])
    assert [g.token_ids for g in out] == [answer_of_transformers(pvm_dir, prompts()[n], 1.0) for n in names]
    assert out[0].token_ids != ragged["image"].token_ids


@pytest.mark.parametrize(
    ("name", "shape"),
    [("image", {}), ("short", {}), ("two_images", {"prompt_length": 224, "prompt_patches": 128})],
)
def test_a_row_is_the_same_alone_and_with_extra_padding(pvm, ragged, name, shape):
    [alone] = generate(*pvm, [prompts()[name]], **VARIED, **shape)
    assert alone.token_ids == ragged[name].token_ids
    assert (alone.text, alone.prompt_tokens) == (ragged[name].text, ragged[name].prompt_tokens)
    np.testing.assert_allclose(alone.logprobs, ragged[name].logprobs, atol=1e-4)


def test_a_sampled_row_is_the_same_alone_and_in_a_batch(pvm):
    samples = [prompts()[n] for n in ("image", "short", "image")]
    options = {"max_new_tokens": 12, "stop_token_ids": [], "temperature": 1.0, "top_p": 0.9}
    together = generate(*pvm, samples, **options, seed=[5, 6, 7])
    alone = generate(*pvm, samples[2:], **options, seed=[7])
    assert alone[0].token_ids == together[2].token_ids
    assert together[0].token_ids != together[2].token_ids
    numbered = generate(*pvm, samples, **options, seed=5)
    assert numbered[0].token_ids != numbered[2].token_ids  # one number, yet a key of its own for each row
    again = generate(*pvm, samples, **options, seed=5)
    assert [g.token_ids for g in again] == [g.token_ids for g in numbered]


one_pass = tiny.compiled(lambda model, batch: model.logits(model(batch)))


def logprobs_of_one_pass(model, processor, sample: dict, tokens: list[int], temperature: float) -> np.ndarray:
    """Of `tokens` after the prompt, by a forward pass without a cache over both."""
    [prompt] = generation.encode(processor, [sample])
    following = prompt.next_position + np.arange(len(tokens))
    length = len(prompt.tokens)
    batch = generation.make_batch([prompt], length + len(tokens))
    batch.tokens[0, length:] = tokens
    batch.positions[:, 0, length:] = following
    batch.segment_ids[0, length:] = 1
    logits = np.array(one_pass(model, batch)[0, length - 1 : -1], np.float64)
    logits[:, processor.banned_token_ids] = -np.inf
    scores = jax.nn.log_softmax(logits / temperature, axis=-1)
    return np.asarray(scores)[np.arange(len(tokens)), tokens]


@pytest.mark.parametrize(("temperature", "scored"), [(0.0, 1.0), (0.7, 0.7)])
def test_log_probabilities_are_those_of_one_forward_pass(pvm, temperature, scored):
    """Over three sizes of the cache: 64, 128 and 256 new tokens."""
    sample = prompts()["two_images"]
    options = {"temperature": temperature, "top_k": 8, "repetition_penalty": 1.5}
    [out] = generate(*pvm, [sample], max_new_tokens=140, stop_token_ids=[], **options)
    assert len(out.token_ids) == len(out.logprobs) == 140 and len(set(out.token_ids)) > 20
    expected = logprobs_of_one_pass(*pvm, sample, out.token_ids, scored)
    np.testing.assert_allclose(out.logprobs, expected, atol=1e-4)


def test_stop_tokens_end_a_row_and_the_others_go_on(pvm):
    samples = [prompts()["image"], prompts()["short"]]
    full = generate(*pvm, samples, **VARIED)
    assert [g.finish_reason for g in full] == ["length", "length"]
    first, second = (g.token_ids for g in full)
    stop = next(t for t in first[5:-1] if t not in second)
    out = generate(*pvm, samples, **VARIED | {"stop_token_ids": [tiny.VOCAB - 1, stop]})
    assert out[0].token_ids == first[: first.index(stop) + 1]
    assert (out[0].finish_reason, out[1].finish_reason) == ("stop", "length")
    assert out[0].text == pvm[1].decode(first[: first.index(stop)])
    assert out[1] == full[1]


def test_the_checkpoint_names_the_stop_tokens(pvm):
    model, processor = pvm
    assert tiny.TOKEN_ID["<|im_end|>"] in processor.eos_token_ids
    [full] = generate(*pvm, [prompts()["short"]], **VARIED)
    stopping = dataclasses.replace(processor, eos_token_ids=(full.token_ids[3],))
    [out] = generate(model, stopping, [prompts()["short"]], max_new_tokens=STEPS, repetition_penalty=1.5)
    assert (out.token_ids, out.finish_reason) == (full.token_ids[:4], "stop")


def test_the_loop_stops_when_all_rows_have(pvm, monkeypatch):
    tokens = generate(*pvm, [prompts()["short"]], **VARIED)[0].token_ids
    last = next(i for i, t in enumerate(tokens) if i > 6 and t not in tokens[:i])
    steps = []
    decode = decoding.decode

    def counted(*args, **options):
        out = decode(*args, **options)
        steps.append(int(out[3]))
        return out

    monkeypatch.setattr(decoding, "decode", counted)
    options = VARIED | {"max_new_tokens": 60, "stop_token_ids": [tokens[last]]}
    out = generate(*pvm, [prompts()["short"]], **options)[0]
    assert steps == [last] and len(out.token_ids) == last + 1


def test_vision_tokens_and_padded_vocabulary_are_never_sampled(pvm):
    options = {"max_new_tokens": 60, "temperature": 50.0, "stop_token_ids": []}
    out = generate(*pvm, [prompts()["short"]] * 16, **options)
    drawn = {t for g in out for t in g.token_ids}
    banned = set(range(tiny.TOKENS, tiny.VOCAB)) | {
        tiny.TOKEN_ID[f"<|{name}|>"] for name in ("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
    }
    assert banned == set(pvm[1].banned_token_ids.tolist())
    assert len(drawn) > 350 and not drawn & banned


def test_the_same_shapes_compile_once(pvm, compilations):
    def answer(seed: int, words: int, temperature: float, length: int = 96):
        sample = {"messages": [tiny.user(tiny.image(seed, 64, 64), tiny.text(seed, words))]}
        options = {"stop_token_ids": [], "temperature": temperature, "seed": seed, "prompt_length": length}
        return generate(*pvm, [sample], max_new_tokens=70, **options)

    answer(1, 20, 0.5)
    before = len(compilations)
    assert before > 0
    answer(2, 30, 0.9)
    assert len(compilations) == before
    answer(2, 30, 0.9, length=112)
    assert len(compilations) > before  # the counter does count


@pytest.mark.parametrize("rows", [1, 3])
def test_the_decode_loop_updates_the_cache_in_place(pvm, rows):
    """No operation of the compiled loop produces a second buffer of a cache's size."""
    model, processor = pvm
    batch = generation.make_batch(generation.encode(processor, [prompts()["short"]] * rows))
    switches, settings = decoding.make_settings(model, Sampling(), (), ())
    graphdef, params = nnx.split(model)
    capacity = 4096  # larger than every weight of the tiny model
    state, _, _ = decoding.prefill(
        graphdef, params, batch, row_keys(0, rows), settings, switches=switches, capacity=capacity
    )
    leaves, tree = jax.tree.flatten(state)  # `lower` describes arguments by objects that are no arrays

    def decode(leaves, params, limit, settings):
        return decoding.decode.__wrapped__(graphdef, params, tree.unflatten(leaves), limit, settings, switches=switches)

    compiled = jax.jit(decode, donate_argnums=0).lower(leaves, params, np.int32(8), settings).compile()
    size = rows * 2 * 16 * capacity
    made = {"copy": 0, "dynamic-update-slice": 0}
    for shape, operation in re.findall(r"= \w+\[([\d,]+)\]\S* ([\w-]+)\(", compiled.as_text()):
        if operation in made and np.prod([int(n) for n in shape.split(",")]) >= size:
            made[operation] += 1
    layers = model.config.text.num_hidden_layers
    assert made == {"copy": 0, "dynamic-update-slice": 2 * layers}


def test_scanned_and_separate_layers_generate_the_same(pvm_dir, pvm):
    stacked = pvm_jax.load(pvm_dir, scan=True)
    assert stacked[0].scan and not pvm[0].scan
    ours, theirs = (generate(*m, [prompts()["image"]], max_new_tokens=12, stop_token_ids=[])[0] for m in (pvm, stacked))
    assert ours.token_ids == theirs.token_ids


def test_bare_message_lists_are_conversations_and_the_module_is_the_function(pvm):
    sample = prompts()["short"]
    options = {"max_new_tokens": 3, "stop_token_ids": []}
    assert pvm_jax.generate(*pvm, [sample["messages"]], **options) == generate(*pvm, [sample], **options)


@pytest.mark.parametrize(
    ("conversations", "options", "message"),
    [
        ([], {}, r"^conversations: expected a list .*, got none$"),
        ({"messages": []}, {}, r"^conversations: expected a list .*put it into a list$"),
        (None, {"max_new_tokens": 0}, r"^max_new_tokens: expected at least 1, got 0$"),
        (None, {"temperature": -1.0}, r"^temperature: expected .*, got -1.0$"),
        (None, {"seed": [1, 2]}, r"^seed: expected a number or 1 of them, one for each row, got"),
        (None, {"seed": -3}, r"^seed: expected whole numbers from 0 to"),
    ],
)
def test_settings_that_cannot_be_used(pvm, conversations, options, message):
    given = [prompts()["short"]] if conversations is None else conversations
    with pytest.raises(GenerationError, match=message):
        generate(*pvm, given, **options)


def test_logits_that_are_not_finite_are_an_error(pvm_dir):
    model, processor = pvm_jax.load(pvm_dir)
    model.text.norm[...] = model.text.norm[...] * np.nan
    with pytest.raises(GenerationError, match=r"row 0, token 0: expected a finite log-probability, got nan"):
        generate(model, processor, [prompts()["short"]], max_new_tokens=2)


# ---- command line --------------------------------------------------------------------------------------------------


@pytest.fixture
def image_files(tmp_path):
    files = []
    for i, size in enumerate([(75, 141), (64, 96)]):
        files.append(tmp_path / f"image {i}.png")
        tiny.image(50 + i, *size).save(files[-1])
    return files


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    try:
        status = generation.main(list(map(str, arguments)))
    except SystemExit as e:
        status = e.code
    out = capsys.readouterr()
    return status, out.out, out.err


def test_command_line_prints_one_json_object_or_the_text(pvm, pvm_dir, image_files, capsys):
    arguments = [f"--checkpoint={pvm_dir}", *(f"--image={f}" for f in image_files), "--prompt=what is shown?"]
    arguments += ["--system=look closely.", "--max_new_tokens=8", "--temperature=0.8", "--top_k=5", "--seed=3"]
    status, out, _ = call(capsys, *arguments, "--json")
    assert status == 0 and out.count("\n") == 1
    content = [{"type": "image", "image": str(f)} for f in image_files]
    messages = [
        {"role": "system", "content": "look closely."},
        {"role": "user", "content": [*content, {"type": "text", "text": "what is shown?"}]},
    ]
    [expected] = generate(*pvm, [{"messages": messages}], max_new_tokens=8, temperature=0.8, top_k=5, seed=3)
    assert json.loads(out) == {
        "token_ids": expected.token_ids,
        "text": expected.text,
        "logprobs": expected.logprobs,
        "finish_reason": expected.finish_reason,
        "prompt_tokens": expected.prompt_tokens,
    }
    status, out, _ = call(capsys, *arguments)
    assert (status, out) == (0, expected.text + "\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--checkpoint": "nowhere"}, "nowhere: expected a model directory, found nothing"),
        ({"--checkpoint": None}, "--checkpoint"),
        ({"--prompt": None}, "--prompt"),
        ({"--image": "missing.png"}, "missing.png"),
        ({"--image": "truncated.png"}, "truncated.png"),
        ({"--video": "missing.mp4"}, "missing.mp4"),
        ({"--temperature": "-1"}, "temperature: expected"),
        ({"--temperature": "warm"}, "--temperature"),
        ({"--top_p": "0"}, "top_p: expected"),
        ({"--max_new_tokens": "0"}, "max_new_tokens: expected at least 1"),
        ({"--seed": "-1"}, "seed: expected"),
        ({"--tensor": "9"}, "--tensor: expected 1 to 8, the devices here, got 9"),
        ({"--colour": "red"}, "--colour"),
    ],
)
def test_mistakes_get_one_sentence_and_exit_status_2(pvm_dir, tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.chdir(tmp_path)
    png = io.BytesIO()
    tiny.image(1, 64, 64).save(png, format="png")
    (tmp_path / "truncated.png").write_bytes(png.getvalue()[:500])
    flags = {"--checkpoint": str(pvm_dir), "--prompt": "what?"} | change
    status, out, err = call(capsys, *(f"{k}={v}" for k, v in flags.items() if v is not None))
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_the_command_splits_a_model_and_says_when_it_does_not_fit(pvm_dir, monkeypatch, capsys):
    asked = {}

    def load(path, **options):
        asked.update(options)
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17 bytes.")

    monkeypatch.setattr(pvm_jax, "load", load)
    status, _, err = call(capsys, f"--checkpoint={pvm_dir}", "--prompt=so?", "--tensor=2", "--dtype=bfloat16")
    assert dict(asked["mesh"].shape) == {"data": 1, "fsdp": 1, "tensor": 2} and asked["dtype"] == "bfloat16"
    assert status == 2 and err.startswith(f"error: {pvm_dir}: no room on the device for bfloat16 weights")
    assert "halves" not in err
    _, _, err = call(capsys, f"--checkpoint={pvm_dir}", "--prompt=so?")
    assert asked == {"mesh": None, "dtype": "float32"} and "--dtype=bfloat16 halves" in err, "on a CPU"


def test_command_line_as_a_program(pvm_dir, image_files):
    command = [sys.executable, "-m", "pvm_jax.generate", f"--checkpoint={pvm_dir}", f"--image={image_files[0]}"]
    run = subprocess.run([*command, "--prompt=so?", "--max_new_tokens=2", "--json"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert set(json.loads(run.stdout)) == {"token_ids", "text", "logprobs", "finish_reason", "prompt_tokens"}
    run = subprocess.run([*command, "--prompt=so?", "--top_k=-1"], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "") and "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1].startswith("error: top_k: expected a whole number")
