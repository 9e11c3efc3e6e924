"""Do batches come as fast as the devices want them? The loader alone, on data made on the spot.

    python benchmarks/loader.py --threads=16 --checkpoint=qwen3-vl-8b-pvm [--hosts=16 --step_seconds=0.5]

Rows have OpenMMReasoner's layout: parquet beside a zip file of JPEGs, one row in eight without an image. Pictures are
crops of scikit-learn's two photographs, enlarged to the sizes of `--sizes`; text is this repository's pages. Batches
are those of `configs/sft.py`. Without `--checkpoint` the tokenizer is the small one in assets/.

A training step's time is either given (`--step_seconds`) or the least that 8B can take on v5p:4x4x4: its flops at the
chips' peak. Several hosts share the work: each encodes its part of the samples, and those of its rows that another
one was dealt, so at most 2 / hosts of all (pvm_jax/data/share.py). The verdict is about hosts with cores like these and
`--host_threads`: the core seconds of a step must fit the threads, and what keeps Python's lock must fit one core.
"""

import argparse
import io
import json
import os
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pvm_jax.data.images import image_values, open_image, patchify, smart_resize
from pvm_jax.data.loader import Loader, Stream
from pvm_jax.data.processor import Processor
from pvm_jax.data.sources import Records, open_source

ROOT = Path(__file__).parents[1]
LENGTHS, PATCHES, MAX_PIXELS = (2048, 4096, 8192), (4096, 8192, 16384), 1_605_632  # configs/sft.py
TEXT_ONLY = 8  # one row in so many


def options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="throughput of the loader")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "assets" / "digits_base", help="tokenizer, processor")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="config.data.threads")
    parser.add_argument("--samples", type=int, default=64, help="of a step")
    parser.add_argument("--steps", type=int, default=4, help="steps measured, after one to warm up")
    parser.add_argument("--sizes", default="640x480,1024x768,1280x960,1920x1440", help="width x height of pictures")
    parser.add_argument("--answer", type=int, default=800, help="tokens of an answer, on average")
    parser.add_argument("--hosts", type=int, default=16, help="that share the work: 4 chips of v5p each")
    parser.add_argument("--host_threads", type=int, default=16, help="config.data.threads of configs/sft.py")
    parser.add_argument("--step_seconds", type=float, help="of the training step; default: from the next three")
    parser.add_argument("--flops_per_token", type=float, default=4.7e10, help="SFT of 8B, docs/plans.md")
    parser.add_argument("--chips", type=int, default=64)
    parser.add_argument("--peak", type=float, default=459e12, help="flops a second of a chip; v5p in bf16")
    parser.add_argument("--out", type=Path, help="write all numbers to this JSON file")
    return parser.parse_args(argv)


def pictures(sizes: list[tuple[int, int]], count: int, seed: int) -> Iterable[bytes]:
    """JPEG files of different crops, each size in turn, some of them upright."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(photograph) for photograph in load_sample_images().images]
    rng = np.random.default_rng(seed)
    for i in range(count):
        photograph = photographs[i % len(photographs)]
        share = rng.uniform(0.6, 1.0)
        width, height = int(photograph.width * share), int(photograph.height * share)
        x, y = rng.integers(0, (photograph.width - width + 1, photograph.height - height + 1)).tolist()
        picture = photograph.resize(sizes[i % len(sizes)], Image.Resampling.BICUBIC, (x, y, x + width, y + height))
        if i % 3 == 0:
            picture = picture.transpose(Image.Transpose.ROTATE_90)
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=90)
        yield file.getvalue()


def write_data(folder: Path, args: argparse.Namespace, processor: Processor) -> Records:
    """Two steps' worth of rows in a parquet file, their pictures in a zip file."""
    sizes = [tuple(map(int, size.split("x"))) for size in args.sizes.split(",")]
    count = 2 * args.samples
    with zipfile.ZipFile(folder / "sft_image.zip", "w") as archive:
        for i, content in enumerate(pictures(sizes, count, seed=0)):
            archive.writestr(f"photographs/{i}.jpg", content)
    pages = "\n".join(path.read_text() for path in sorted(ROOT.glob("docs/*.md")))
    tokens = processor.chat.tokenize_text(pages)
    rng = np.random.default_rng(1)
    rows = []
    for i in range(count):
        length = int(args.answer * rng.uniform(0.5, 1.5))
        start = int(rng.integers(0, max(len(tokens) - length, 1)))
        answer = processor.decode(tokens[start : start + length])
        asked = [{"type": "text", "text": "What does the picture show?", "image_url": None}]
        if i % TEXT_ONLY:
            asked.insert(0, {"type": "image_url", "text": None, "image_url": {"url": f"photographs/{i}.jpg"}})
        answered = [{"type": "text", "text": f"<think>{answer}</think>", "image_url": None}]
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        rows.append({"id": str(i), "messages": messages})
    pq.write_table(pa.Table.from_pylist(rows), folder / "data.parquet", row_group_size=1000)
    return open_source(folder / "data.parquet", image_folder=folder / "sft_image.zip")


def parts(source: Records, processor: Processor, count: int) -> dict[str, float]:
    """Milliseconds a sample in one thread, by what is done; the first `count` rows, the median of three rounds."""
    seconds: dict[str, list[float]] = {}

    def clock(name: str, work: Callable[[], object]) -> object:
        began = time.perf_counter()
        result = work()
        times[name] = times.get(name, 0.0) + time.perf_counter() - began
        return result

    pixels = processor.images
    for _ in range(3):
        times: dict[str, float] = {}
        for i in range(count):
            record = clock("row", lambda i=i: source[i])
            for part in record["messages"][0]["content"]:
                if part["type"] == "image":
                    image = clock("decode", lambda part=part: open_image(part["image"]))
                    limits = pixels.factor, pixels.min_pixels, pixels.max_pixels
                    height, width = smart_resize(image.height, image.width, *limits)
                    image = clock("resize", lambda image=image, size=(width, height): image.resize(size, 3))
                    array = np.asarray(image)[None]
                    clock("patches", lambda array=array: patchify(array, pixels, image_values(pixels)))
            clock("everything", lambda record=record: processor.encode(record))
        for name, value in times.items():
            seconds.setdefault(name, []).append(value)
    median = {name: 1e3 * sorted(values)[1] / count for name, values in seconds.items()}
    whole = median.pop("everything")
    median["text and indices"] = whole - sum(median[name] for name in ("decode", "resize", "patches"))
    return median


def throughput(loader: Loader, steps: int) -> dict[str, float]:
    """Seconds a step and what is in it, over `steps` steps after the first."""
    loader.batch(0)
    began, before = time.perf_counter(), os.times()
    infos = [loader.batch(step)[1] for step in range(1, steps + 1)]
    seconds, after = (time.perf_counter() - began) / steps, os.times()
    tokens, cells = sum(info.tokens for info in infos), sum(info.shape[0] * info.shape[1] for info in infos)
    return {
        "seconds": seconds,
        "cpu": (after.user - before.user) / steps,
        "kernel": (after.system - before.system) / steps,  # fresh memory, mostly; how long it takes is the machine's
        "samples": sum(info.samples for info in infos) / steps,
        "skipped": sum(len(info.skipped) for info in infos) / steps,
        "tokens": tokens / steps,
        "cells": cells / steps,
        "padding": 1 - tokens / cells,
    }


def main(argv: list[str] | None = None) -> None:
    args = options(argv)
    processor = Processor.from_pretrained(args.checkpoint, min_pixels=65_536, max_pixels=MAX_PIXELS)
    with tempfile.TemporaryDirectory() as folder:
        source = write_data(Path(folder), args, processor)
        split = parts(source, processor, min(len(source), 24))
        stream = Stream(source, args.samples, LENGTHS, PATCHES)
        measured = throughput(Loader([stream], processor, seed=0, threads=args.threads), args.steps)
    result = {"parts": split, **measured, **judge(args, split, measured)}
    if args.out:
        args.out.write_text(json.dumps(result | {"options": {k: str(v) for k, v in vars(args).items()}}, indent=2))


def judge(args: argparse.Namespace, split: dict[str, float], measured: dict[str, float]) -> dict[str, float]:
    """Prints what was measured and whether it suffices; gives the step's seconds and the cores that each host needs."""
    seconds, samples, cpu = measured["seconds"], measured["samples"], measured["cpu"] + measured["kernel"]
    given = args.step_seconds is not None
    step = args.step_seconds if given else measured["cells"] * args.flops_per_token / (args.chips * args.peak)
    share = min(1.0, 2 / args.hosts)
    cores = cpu * share / step
    locked = (split["row"] + split["text and indices"]) / 1e3 * samples * share / step
    rates = {"samples": samples, "images": samples * (TEXT_ONLY - 1) / TEXT_ONLY, "tokens": measured["tokens"]}
    print("one thread, ms a sample: " + ", ".join(f"{name} {value:.1f}" for name, value in split.items()))
    print(
        f"{args.threads} threads: a step of {samples:.0f} samples with pictures of {args.sizes} pixels in "
        f"{seconds:.2f} s, {cpu:.2f} core seconds ({measured['kernel']:.2f} of them the kernel's); "
        + ", ".join(f"{count / seconds:.1f} {name}/s" for name, count in rates.items())
    )
    print(f"packed into {measured['cells']:.0f} tokens, of which {measured['padding']:.0%} are padding")
    print(
        f"training step: {step:.2g} s, " + ("as given" if given else f"the least on {args.chips} chips at their peak")
    )
    enough = cores <= args.host_threads and locked <= 1
    print(
        f"each of {args.hosts} hosts makes at most {share:.1%} of a step: {cores:.2g} cores of its {args.host_threads} "
        f"threads, Python's lock held {locked:.0%} of the time; "
        + ("data is not the bottleneck" if enough else "DATA IS THE BOTTLENECK: more threads, or more hosts")
    )
    return {"step_seconds": step, "host_cores": cores, "host_locked": locked}


if __name__ == "__main__":
    main()
