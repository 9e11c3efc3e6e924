"""Our models in lmms-eval (0.7): `--model pvm_jax`, batched, spread over all devices of one process.

    python -m lmms_eval --model pvm_jax --model_args checkpoint=DIR --tasks mmstar --batch_size 32

How it differs from lmms-eval's own `qwen3_vl`, whose prompts, pixel limits and defaults it takes over:
  - Tasks choose prompts by the model's name, so that ours would get the `default` ones. `prompts=qwen3_vl` has them
    believe that name; if a version of lmms-eval does not let us, no request is answered.
  - `until` is honoured, but for "\\n\\n", which lmms-eval adds to every task that sets none: it would cut reasoning.
  - An image that cannot be read, or is cut off, gives an empty answer and is counted in a warning; it does not end the
    evaluation. (lmms-eval has PIL fill up truncated images with grey.)
  - A sample's random key depends on the sample, not on the batch; repeats of it draw anew.

docs/lmms_eval.md has the arguments. The module can be imported without lmms-eval, whose base class needs torch.
"""

import contextlib
import dataclasses
import json
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from PIL import ImageFile
from tqdm import tqdm

from pvm_jax.checkpoint import load_model, open_checkpoint
from pvm_jax.data.images import DataError
from pvm_jax.data.packing import Encoded
from pvm_jax.data.processor import Processor
from pvm_jax.decoding import complete
from pvm_jax.evals.extract import final_text
from pvm_jax.evals.lmms_plugin import NAME
from pvm_jax.evals.results import ResultError
from pvm_jax.generate import make_batch
from pvm_jax.sampling import Sampling
from pvm_jax.sharding import make_mesh

try:
    from lmms_eval.api.model import lmms as _Base
except ModuleNotFoundError:
    _Base = object

DEFAULT_UNTIL = "\n\n"
"""What lmms-eval puts into `until` of a task that sets none; a task that asks for the same cannot be told from it."""

WINDOW = 8
"""Batches whose prompts are encoded together and sorted by length, so that a batch has little padding."""

NOT_NEEDED = {"until", "max_new_tokens", "do_sample", "num_beams", "use_cache", "image_aspect_ratio"}
TEXTS = ("all", "answer")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a request is to be answered; requests with the same settings share batches."""

    sampling: Sampling
    max_new_tokens: int
    until: tuple[str, ...]


def read_settings(given: Mapping[str, Any], defaults: Mapping[str, Any], max_new_tokens: int) -> Settings:
    """The settings of a task's `generation_kwargs`.

    As for lmms-eval's `qwen3_vl`, temperature alone decides whether tokens are drawn; `do_sample` does not.

    Args:
      given: by the task, or on the command line.
      defaults: of the checkpoint's generation_config.json, for what is not given.
      max_new_tokens: for tasks that set none.

    Raises:
      ResultError: something that we cannot do.
    """
    if (given.get("num_beams") or 1) != 1:
        raise ResultError(f"num_beams: expected 1, got {given['num_beams']}; there is no beam search")
    until = given.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    if not all(isinstance(stop, str) for stop in until):
        raise ResultError(f"until: expected strings, got {list(until)!r}")
    names = {field.name for field in dataclasses.fields(Sampling)}
    values = {name: defaults[name] for name in names & defaults.keys() if name != "temperature"}
    values |= {name: given[name] for name in names & given.keys() if given[name] is not None}
    if "top_k" in values:
        values["top_k"] = max(int(values["top_k"]), 0)
    return Settings(
        sampling=Sampling(**values),
        max_new_tokens=int(given.get("max_new_tokens") or max_new_tokens),
        until=tuple(stop for stop in until if stop and stop != DEFAULT_UNTIL),
    )


def cut(text: str, until: Iterable[str]) -> str:
    """The text before the first of the stop strings."""
    return text[: min((at for stop in until if (at := text.find(stop)) >= 0), default=len(text))]


def conversation(messages: Sequence[Any], system_prompt: str) -> list[dict[str, Any]]:
    """lmms-eval's messages as our processor takes them, behind the system prompt."""
    made = [{"role": "system", "content": system_prompt}] if system_prompt else []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [_part(part) for part in content]
        made.append({"role": message["role"], "content": content})
    return made


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    kind = part.get("type")
    if kind == "text":
        return {"type": "text", "text": part["text"]}
    if kind in ("image", "video"):
        return {"type": kind, kind: part["url"]}
    raise DataError(f"expected text, images and videos, got {kind!r}")


@dataclasses.dataclass(frozen=True)
class _Job:
    """A request: its place among all, what it asks, how it is to be answered, and its random seed."""

    place: int
    messages: Any
    document: tuple[str, str, Any]  # task, split, index
    settings: Settings
    seed: int


class PVMJax(_Base):
    """The model class that lmms-eval makes from `--model_args`.

    Args:
      checkpoint: Hugging Face directory, native checkpoint or training workdir.
      prompts: the model whose prompts and settings tasks use for ours.
      batch_size: rows of a batch.
      dtype: None: float32 on CPUs, bfloat16 on accelerators.
      min_pixels, max_pixels: of an image after the resize; 0: as the checkpoint says.
      system_prompt: stands before every conversation; empty: none.
      max_new_tokens: for tasks that do not say.
      text: "all": the whole output goes to the task; "answer": without thinking, and of the last `<answer>` only what
        is in it (`extract.final_text`), for tasks whose extraction knows no such tags.
      seed: of everything that is drawn.
      data, fsdp, tensor: the mesh; -1: the devices that are left. `fsdp` would gather weights at every token.
        (Numbers may be floats: lmms-eval reads "-1" as one.)
      device, max_batch_size: lmms-eval passes them; jax chooses devices by itself.
    """

    is_simple = False

    def __init__(
        self,
        checkpoint: str | None = None,
        prompts: str = "qwen3_vl",
        batch_size: int | str = 1,
        dtype: str | None = None,
        min_pixels: int = 256 * 28 * 28,
        max_pixels: int = 1_605_632,
        system_prompt: str = "You are a helpful assistant.",
        max_new_tokens: int = 128,
        text: str = "all",
        seed: int = 0,
        data: float | int = -1,
        fsdp: float | int = 1,
        tensor: float | int = 1,
        device: Any = None,
        max_batch_size: Any = None,
        **others: Any,
    ):
        super().__init__()
        if others:
            raise ResultError(f"--model_args: expected no {', '.join(sorted(others))}; docs/lmms_eval.md has the list")
        if checkpoint is None:
            raise ResultError("--model_args: expected checkpoint=DIR")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ResultError(f"--batch_size: expected a whole number of at least 1, got {batch_size!r}")
        if text not in TEXTS:
            raise ResultError(f"--model_args text: expected {' or '.join(TEXTS)}, got {text!r}")
        self.task_dict: dict[str, Any] = {}
        self.batch_size, self.prompts, self.system_prompt = int(batch_size), str(prompts), str(system_prompt)
        self.max_new_tokens, self.text, self.seed = int(max_new_tokens), text, int(seed)
        use_prompts_of(self.prompts)

        mesh = make_mesh(int(data), int(fsdp), int(tensor))
        found = open_checkpoint(str(checkpoint))
        limits = {"min_pixels": int(min_pixels) or None, "max_pixels": int(max_pixels) or None}
        self.processor = Processor.from_pretrained(found.files, **limits)
        self.defaults = _generation_config(found.files)
        dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
        several = mesh.size > 1
        self.model = load_model(
            found, dtype=jnp.dtype(dtype), scan=True if several else None, mesh=mesh if several else None
        )

    # One process drives all devices.
    rank = 0
    world_size = 1

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise ResultError("this task ranks given answers by their likelihood; pvm_jax only generates")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise ResultError("this task asks in several rounds; pvm_jax answers single questions")

    def generate_until(self, requests: Sequence[Any]) -> list[tuple[str, dict[str, int]]]:
        """For each request its text, and the counts of tokens under the names that lmms-eval has for them.

        Args:
          requests: whose `args` are (context, document -> messages, generation_kwargs, index, task, split).

        Raises:
          ResultError: settings that we do not have, or not a single request could be asked.
        """
        answers: list[tuple[str, dict[str, int]]] = [("", {})] * len(requests)
        failed: list[str] = []
        groups: dict[Settings, list[_Job]] = defaultdict(list)
        for job in self._jobs(requests):
            groups[job.settings].append(job)
        with _whole_images(), tqdm(total=len(requests), desc="answers") as progress:
            for jobs in groups.values():
                for start in range(0, len(jobs), WINDOW * self.batch_size):
                    window = jobs[start : start + WINDOW * self.batch_size]
                    for job, answer in self._answer(window, failed):
                        answers[job.place] = answer
                    progress.update(len(window))
        if failed and len(failed) == len(requests):
            raise ResultError(f"none of {len(failed)} samples could be asked; the first: {failed[0]}")
        if failed:
            logging.warning("%d of %d samples could not be asked; the first: %s", len(failed), len(requests), failed[0])
        return answers

    def _jobs(self, requests: Sequence[Any]) -> Iterator[_Job]:
        seen: Counter[tuple[str, str, Any]] = Counter()
        unknown: set[str] = set()
        for place, request in enumerate(requests):
            _, messages, given, index, task, split = request.args
            _check_prompts(messages, self.prompts)
            document = task, split, index
            settings = read_settings(given, self.defaults, self.max_new_tokens)
            unknown |= given.keys() - NOT_NEEDED - {field.name for field in dataclasses.fields(Sampling)}
            # A request that is repeated comes several times.
            seed = zlib.crc32(json.dumps([self.seed, *map(str, document), seen[document]]).encode())
            seen[document] += 1
            yield _Job(place, messages, document, settings, seed)
        if unknown:
            logging.warning("generation_kwargs that have no effect: %s", ", ".join(sorted(unknown)))

    def _answer(self, jobs: Sequence[_Job], failed: list[str]) -> Iterator[tuple[_Job, tuple[str, dict[str, int]]]]:
        """Answers to some requests with the same settings, in any order; `failed` gets those that cannot be asked."""
        prompts: list[tuple[_Job, Encoded]] = []
        for job in jobs:
            try:
                prompts.append((job, self._encode(job)))
            except (DataError, OSError) as error:  # OSError: PIL's, of an image that a data set decodes lazily
                failed.append(f"{'/'.join(map(str, job.document))}: {error}")
        prompts.sort(key=lambda prompt: (len(prompt[1].tokens), len(prompt[1].patches)), reverse=True)
        for start in range(0, len(prompts), self.batch_size):
            yield from self._complete(prompts[start : start + self.batch_size])

    def _encode(self, job: _Job) -> Encoded:
        task, split, index = job.document
        messages = conversation(job.messages(self.task_dict[task][split][index]), self.system_prompt)
        return self.processor.encode({"id": f"{task}/{index}", "messages": messages}, add_generation_prompt=True)

    def _complete(self, prompts: Sequence[tuple[_Job, Encoded]]) -> Iterator[tuple[_Job, tuple[str, dict[str, int]]]]:
        """One batch. It always has `batch_size` rows, the last ones repeated, so that the programs are the same."""
        filled = [*prompts, *[prompts[-1]] * (self.batch_size - len(prompts))]
        settings = prompts[0][0].settings
        made = complete(
            self.model,
            make_batch([prompt for _, prompt in filled]),
            settings.sampling,
            max_new_tokens=settings.max_new_tokens,
            stop_token_ids=self.processor.eos_token_ids,
            banned_token_ids=self.processor.banned_token_ids,
            seed=[job.seed for job, _ in filled],
        )
        for row, (job, prompt) in enumerate(prompts):
            length = int(made.lengths[row])
            ids = made.tokens[row, : length - int(made.stopped[row])]
            text = cut(self.processor.decode(ids), settings.until)
            counts = {"input_tokens": len(prompt.tokens), "output_tokens": length}
            yield job, (final_text(text) if self.text == "answer" else text, counts)


@contextlib.contextmanager
def _whole_images() -> Iterator[None]:
    """PIL refuses truncated images meanwhile; lmms-eval tells it not to."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _generation_config(directory: Path) -> dict[str, Any]:
    """Settings of the sampler that a checkpoint recommends; what it leaves open is not there."""
    file = directory / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        return {name: value for name, value in json.loads(file.read_text("utf-8")).items() if value is not None}
    except (ValueError, AttributeError) as error:
        raise ResultError(f"{file}: expected a JSON object ({error})") from None


def use_prompts_of(name: str) -> None:
    """Has tasks that are made from now on take the prompts and settings that they have for the model `name`.

    A task looks for its model's name in `lmms_eval_specific_kwargs` and falls back on `default`, without a word.
    """
    try:
        from lmms_eval.api.task import ConfigurableTask
    except ModuleNotFoundError:
        return
    prepare = ConfigurableTask._prepare_model_specific_config

    def prepare_as(task: Any) -> None:
        if task.model_name == NAME:
            task.model_name = name
        prepare(task)

    ConfigurableTask._prepare_model_specific_config = prepare_as


def _check_prompts(messages: Any, prompts: str) -> None:
    """That `use_prompts_of` reached the task whose method makes the messages."""
    task = getattr(messages, "__self__", None)
    if getattr(task, "model_name", prompts) != prompts:
        raise ResultError(
            f"expected a task with the prompts of {prompts}, got those of {task.model_name}; this version of lmms-eval "
            "makes tasks in another order, so pass --model_args prompts=pvm_jax to use the default ones"
        )
