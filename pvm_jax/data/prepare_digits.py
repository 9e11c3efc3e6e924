"""Writes the digit mosaics: `python -m pvm_jax.data.prepare_digits DATA_DIR [--configs=demo,base] [--questions]`.

A module of its own, because TFDS records a builder's module, which must not be `__main__`.
"""

import argparse
from pathlib import Path

from pvm_jax.data.digits import SPLITS, prepare, write_questions


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Writes the digit mosaics as a TFDS data set.")
    parser.add_argument("data_dir")
    parser.add_argument("--configs", default="demo", help=f"comma-separated, of {', '.join(SPLITS)}")
    parser.add_argument("--questions", action="store_true", help="also digits-questions.jsonl, the tests of `demo`")
    options = parser.parse_args(args)
    for config in options.configs.split(","):
        directory = prepare(options.data_dir, config)
        print(directory)
        if options.questions and config == "demo":
            print(write_questions(directory, Path(options.data_dir) / "digits-questions.jsonl"))


if __name__ == "__main__":
    main()
