"""Samples a second: the evaluation harness against transformers' `generate`, on the digits' base checkpoint.

    python benchmarks/evaluation.py [--threads=2 --rounds=3 --out=FILE.json] [--quick]

Questions of the digits experiment with answers of 66 to 128 tokens, greedy, at most 136 new tokens, fp32. torch gets
encoded prompts, one after the other or in batches of 32, padded on the left; the harness begins with a file and ends
with records: reading, encoding, decoding and verdicts are in its time. Stop tokens end answers on both sides.
`--quick` is a smoke test; its numbers mean nothing.
"""

import base64
import io
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vs_transformers import options, set_up

CHECKPOINT = Path(__file__).parents[1] / "assets" / "digits_base"
ROWS, LIMIT = 32, 136


def write_questions(file: Path, count: int) -> None:
    import numpy as np
    from PIL import Image

    from pvm_jax.data.digits_task import Spec, make_example

    with file.open("w") as lines:
        for i in range(count):
            example = make_example(np.random.default_rng(i), Spec("test", 128, 66, verbose=0.5))
            png = io.BytesIO()
            Image.fromarray(example.image).convert("RGB").save(png, "png")
            image = base64.b64encode(png.getvalue()).decode()
            row = {"index": str(i), "question": example.question, "answer": example.answer, "image": image}
            lines.write(json.dumps(row) + "\n")


class Torch:
    """Completions of all prompts, `rows` at a time."""

    def __init__(self, prompts: list[Any], processor: Any, rows: int):
        import torch_side
        from transformers import Qwen3VLForConditionalGeneration

        image_token = processor.config.image_token_id
        self.model = Qwen3VLForConditionalGeneration.from_pretrained(CHECKPOINT).eval()
        self.batches = [
            torch_side.inputs(prompts[i : i + rows], image_token, left=True) for i in range(0, len(prompts), rows)
        ]
        self.processor, self.completions = processor, []

    def __call__(self) -> float:
        import torch

        start = time.perf_counter()
        self.completions = []
        with torch.inference_mode():
            for batch in self.batches:
                stops = list(self.processor.eos_token_ids)
                out = self.model.generate(
                    **batch, do_sample=False, max_new_tokens=LIMIT, eos_token_id=stops, pad_token_id=stops[0]
                )
                self.completions += [self._text(row) for row in out[:, batch["input_ids"].shape[1] :].tolist()]
        return time.perf_counter() - start

    def _text(self, ids: list[int]) -> str:
        return self.processor.decode(list(itertools.takewhile(lambda i: i not in self.processor.eos_token_ids, ids)))


class Harness:
    """The same by `pvm_jax.evals.harness`, from the file on."""

    def __init__(self, file: Path, processor: Any):
        from pvm_jax.checkpoint import load_model

        self.model = load_model(CHECKPOINT, scan=False)
        self.file, self.processor, self.completions = file, processor, []

    def __call__(self) -> float:
        from pvm_jax.evals.harness import Prepared

        start = time.perf_counter()
        given = {"benchmark": "file:digits", "path": str(self.file), "protocol": "plain", "rule": "exact",
                 "max_new_tokens": LIMIT, "rows": ROWS, "prompt_length": (64,), "patches": (144,)}  # fmt: skip
        prepared = Prepared.of("digits", self.processor, given)
        records = prepared.in_order([record for batch in prepared.answers(self.model) for record in batch])
        self.completions = [record.completion for record in records]
        return time.perf_counter() - start


def measure(folder: Path, rounds: int, count: int) -> dict[str, Any]:
    from timing import alternate

    from pvm_jax.data.processor import Processor
    from pvm_jax.evals import benchmarks, protocols

    write_questions(folder / "digits.jsonl", count)
    processor = Processor.from_pretrained(CHECKPOINT)
    task = protocols.task("plain", "file")
    questions = benchmarks.open_benchmark("file:digits", folder / "digits.jsonl")
    samples = [{"id": q.index, "messages": task.messages(q)} for q in questions]
    prompts = [processor.encode(sample, add_generation_prompt=True) for sample in samples]
    one, batches = Torch(prompts, processor, 1), Torch(prompts, processor, ROWS)
    ours = Harness(folder / "digits.jsonl", processor)
    seconds = alternate({"torch, one by one": one, "torch, batches": batches, "harness": ours}, rounds)
    same = sum(a == b for a, b in zip(one.completions, ours.completions, strict=True))
    return {
        "samples_per_second": {name: count / value for name, value in seconds.items()},
        "ratios": {name: value / seconds["harness"] for name, value in seconds.items() if name != "harness"},
        "samples": count,
        "same_completions": same,
        "same_completions_of_batches": sum(a == b for a, b in zip(one.completions, batches.completions, strict=True)),
    }


def main(argv: list[str] | None = None) -> None:
    args = options(argv, "The evaluation harness against transformers' generate", rounds=3)
    about = set_up(args.threads)
    with tempfile.TemporaryDirectory() as directory:
        result = measure(Path(directory), 1 if args.quick else args.rounds, 4 if args.quick else 2 * ROWS)
    for name, speed in result["samples_per_second"].items():
        ratio = result["ratios"].get(name)
        over = "" if ratio is None else f"    harness / this {ratio:.2f}" + (" (aim 5)" if "one" in name else "")
        print(f"{name:<20}{speed:8.3f} samples/s{over}")
    print(
        f"{result['same_completions']} of {result['samples']} completions are those of transformers one by one "
        f"(its own batches: {result['same_completions_of_batches']})"
    )
    if args.out:
        args.out.write_text(json.dumps({"machine": about, "quick": args.quick} | result, indent=2) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    main()
