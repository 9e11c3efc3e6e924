"""Writes the digit mosaics: `python -m pvm_jax.data.prepare_digits DATA_DIR [--configs=demo,base]`.

A module of its own, because TFDS records a builder's module, which must not be `__main__`.
"""

import argparse

from pvm_jax.data.digits import SPLITS, prepare


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Writes the digit mosaics as a TFDS data set.")
    parser.add_argument("data_dir")
    parser.add_argument("--configs", default="demo", help=f"comma-separated, of {', '.join(SPLITS)}")
    options = parser.parse_args(args)
    for config in options.configs.split(","):
        print(prepare(options.data_dir, config))


if __name__ == "__main__":
    main()
