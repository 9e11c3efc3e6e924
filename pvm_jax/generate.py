"""Answers to conversations: prefill, then a compiled loop of decode steps; Python function and command line.

    python -m pvm_jax.generate --checkpoint=DIR --image=FILE --prompt="What is shown?" [--json]

    out = pvm_jax.generate(model, processor, [{"messages": [...]}], max_new_tokens=64)
    out[0].text, out[0].token_ids, out[0].logprobs, out[0].finish_reason

Prompts are padded on the right to few shapes (`bucket`), so that the next call compiles nothing; the loop itself is
`decoding.complete`, the choice of a token `sampling.sample`.
"""

import argparse
import dataclasses
import json
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
from jax.sharding import Mesh

import pvm_jax
from pvm_jax import cli
from pvm_jax.checkpoint import CheckpointError
from pvm_jax.config import ConfigError
from pvm_jax.data.batch import Batch
from pvm_jax.data.images import DataError
from pvm_jax.data.packing import PATCHES_PER_TOKEN, Encoded, collate
from pvm_jax.data.processor import Processor
from pvm_jax.decoding import complete
from pvm_jax.hf_weights import WeightsError
from pvm_jax.models import Qwen3VL
from pvm_jax.sampling import GenerationError, Sampling
from pvm_jax.sharding import ShardingError, make_mesh


@dataclasses.dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
      text: the answer without special tokens.
      token_ids: with the stop token, if it ended with one.
      logprobs: of each token, under the model's distribution at the temperature of the call, see `sampling.sample`.
      finish_reason: "stop", or "length" if max_new_tokens came first.
      prompt_tokens: length of the prompt, visual tokens included.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int


def generate(
    model: Qwen3VL,
    processor: Processor,
    conversations: Sequence[Any] | Mapping[str, Any],
    *,
    max_new_tokens: int = 512,
    temperature: float | int = 0.0,
    top_k: int = 0,
    top_p: float | int = 1.0,
    min_p: float | int = 0.0,
    presence_penalty: float | int = 0.0,
    repetition_penalty: float | int = 1.0,
    seed: int | Sequence[int] = 0,
    stop_token_ids: Sequence[int] | None = None,
    prompt_length: int | None = None,
    prompt_patches: int | None = None,
) -> list[Generation]:
    """One answer to each conversation, all in one batch.

    A row's answer does not depend on the other rows, nor on padding.

    Args:
      conversations: samples `{"messages": [...]}`, or message lists, that end before the assistant's turn.
      max_new_tokens: per row.
      temperature, top_k, top_p, min_p, presence_penalty, repetition_penalty: see `sampling.Sampling`; the defaults
        are greedy. The checkpoint's generation_config.json is used for its stop tokens only.
      seed: one for each row, so that a row draws the same alone and in any batch; or a number, from which each row
        gets another key.
      stop_token_ids: by default the checkpoint's. An empty list: always max_new_tokens.
      prompt_length, prompt_patches: T and P of the prefill; by default `bucket` of the largest prompt. Evaluations
        whose prompts vary pass their largest shape, to compile once.

    Raises:
      GenerationError: a setting out of range, or a model whose logits are not finite.
      DataError: a conversation that cannot be encoded, or is larger than the given shape.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, presence_penalty, repetition_penalty)
    stops = processor.eos_token_ids if stop_token_ids is None else stop_token_ids
    prompts = encode(processor, conversations)
    completions = complete(
        model,
        make_batch(prompts, prompt_length, prompt_patches),
        sampling,
        max_new_tokens=max_new_tokens,
        stop_token_ids=stops,
        banned_token_ids=processor.banned_token_ids,
        seed=seed,
    )
    answers = []
    for row, prompt in enumerate(prompts):
        length, stopped = completions.lengths[row], completions.stopped[row]
        ids = completions.tokens[row, :length].tolist()
        answers.append(
            Generation(
                text=processor.decode(ids[:-1] if stopped else ids),
                token_ids=ids,
                logprobs=completions.logprobs[row, :length].tolist(),
                finish_reason="stop" if stopped else "length",
                prompt_tokens=len(prompt.tokens),
            )
        )
    return answers


def encode(processor: Processor, conversations: Sequence[Any] | Mapping[str, Any]) -> list[Encoded]:
    """Prompts as the model sees them, ending with the opening of the assistant's turn."""
    if isinstance(conversations, Mapping) or not conversations:
        raise GenerationError(
            'conversations: expected a list of {"messages": [...]}, got '
            + ("one of them; put it into a list" if conversations else "none")
        )
    samples = [c if isinstance(c, Mapping) else {"messages": c} for c in conversations]
    samples = [{"id": i, **s} for i, s in enumerate(samples)]
    return [processor.encode(s, add_generation_prompt=True) for s in samples]


def bucket(size: int) -> int:
    """The padded length of a prompt of `size` tokens: a multiple of 16, at most eight lengths per factor of two.

    >>> [bucket(n) for n in (1, 16, 100, 128, 129, 300, 1088, 1200)]
    [16, 16, 112, 128, 144, 320, 1152, 1280]
    """
    step = max(16, 2 ** max(size - 1, 1).bit_length() // 16)
    return -(-max(size, 1) // step) * step


def make_batch(prompts: Sequence[Encoded], length: int | None = None, patches: int | None = None) -> Batch:
    """One prompt a row, T = `length` and P = `patches`, or as few as `bucket` allows."""
    if length is None:
        length = bucket(max(len(p.tokens) for p in prompts))
    if patches is None:
        patches = PATCHES_PER_TOKEN * bucket(max(len(p.patches) for p in prompts) // PATCHES_PER_TOKEN)
    return collate([[p] for p in prompts], length=length, patches=patches)


class _CallableModule(types.ModuleType):
    """`pvm_jax.generate(...)`: importing this module binds its name in the package, where users expect the function."""

    def __call__(self, *args: Any, **kwargs: Any) -> list[Generation]:
        return generate(*args, **kwargs)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="python -m pvm_jax.generate", description="Answers one question about images or videos.")
    add = parser.add_argument
    add("--checkpoint", required=True, help="Hugging Face directory, native checkpoint or training workdir")
    add("--prompt", required=True, help="the question; images and videos stand before it")
    add("--image", action="append", default=[], metavar="FILE", help="may be given several times")
    add("--video", action="append", default=[], metavar="FILE", help="may be given several times")
    add("--system", help="a system message")
    add("--max_new_tokens", type=int, default=512)
    add("--temperature", type=float, default=0.0, help="0 = greedy, the default")
    add("--top_k", type=int, default=0, help="0 = all tokens, the default")
    add("--top_p", type=float, default=1.0)
    add("--min_p", type=float, default=0.0)
    add("--presence_penalty", type=float, default=0.0, help="subtracted once from the logit of a generated token")
    add("--repetition_penalty", type=float, default=1.0)
    add("--seed", type=int, default=0)
    dtypes = ("float32", "bfloat16")
    add("--dtype", choices=dtypes, help="of parameters and computation; default: float32 on CPUs, else bfloat16")
    add("--tensor", type=int, default=1, help="devices to split the model over: a divisor of its key/value heads")
    add("--json", action="store_true", help="print one JSON object: token_ids, text, logprobs, finish_reason, ...")
    return parser


def _mesh(tensor: int) -> Mesh | None:
    if not 1 <= tensor <= jax.device_count():
        raise GenerationError(f"--tensor: expected 1 to {jax.device_count()}, the devices here, got {tensor}")
    return make_mesh(tensor=tensor, devices=jax.devices()[:tensor]) if tensor > 1 else None


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, or 2 for what the user can mend."""
    options = vars(_parser().parse_args(argv))
    as_json, checkpoint, dtype, tensor = (options.pop(name) for name in ("json", "checkpoint", "dtype", "tensor"))
    system, prompt = options.pop("system"), options.pop("prompt")
    content = [{"type": kind, kind: file} for kind in ("image", "video") for file in options.pop(kind)]
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": [*content, {"type": "text", "text": prompt}]})
    try:
        Sampling(**{field.name: options[field.name] for field in dataclasses.fields(Sampling)})  # before the load
        mesh = _mesh(tensor)
        dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
        model, processor = pvm_jax.load(checkpoint, dtype=dtype, mesh=mesh)
        answer = generate(model, processor, [{"id": "prompt", "messages": messages}], **options)[0]
    except (CheckpointError, ConfigError, DataError, GenerationError, ShardingError, WeightsError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        advice = "--tensor=N splits them over N devices" + (", --dtype=bfloat16 halves them" * (dtype == "float32"))
        print(f"error: {checkpoint}: no room on the device for {dtype} weights and cache; {advice}", file=sys.stderr)
        return 2
    print(json.dumps(dataclasses.asdict(answer)) if as_json else answer.text)
    return 0


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    sys.exit(main())
