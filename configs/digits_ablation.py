"""What matters for PVM on the tiny digits model: a grid of adapters, recipes and data, one row each.

Launch, from the repository's root (again to go on; a run that was killed starts over, one stopped by Ctrl-C goes on):
    python -m pvm_jax.data.prepare_digits runs/data --configs=demo,long
    python -m pvm_jax.analysis.ablation --seeds=0,1,2 --jobs=2 --runs=runs/ablation --out=runs/ablation.json
One row by hand, here `lora_all` with seed 0; rows of PVM are converted first, `--print` shows every row's commands:
    python train.py --config=configs/digits_ablation.py:lora_all --workdir=runs/lora-all --config.seed=0
    python eval.py --config=configs/digits_eval.py:brief --workdir=runs/lora-all/eval --config.checkpoint=runs/lora-all

Every row is `pvm` (configs/digits_sft.py) but for what its title names, and 550 steps long but for `paper_long`. Rows
of LoRA train on the same answers, seen by the backbone (`plain`), with AdamW 2e-3; `lora_blind` has the batches of
`pvm`. Of equal size: PVM has 209,089 parameters (slots 212,545), LoRA of rank 31 on all linear maps 210,304, of rank 49
on the MLPs 206,976; on attention rank 32 is all of k_proj and v_proj, which leaves 81,920. Rows `*_505` take answers of
100-505 tokens, the split `sft_505` of the data set's configuration `long`: up to the longest of the test; a mosaic has
no more than 505 tokens to tell.

Arguments, separated by commas: the row, and `smoke`, the same configuration in a few steps.
"""

from ml_collections import ConfigDict

import configs.common as common
import configs.digits_eval as digits_eval
import configs.digits_sft as digits_sft

BASE = "assets/digits_base"
DEMO, LONG = "digits/demo/2.2.0", "digits/long/2.2.0"
SHIFT = 450  # positions; with the 36 visual tokens and the question, as far as the longest test answers reach


def pvm(layers: str = "0", width: int = 128, init: str = "fan_in", *others: str) -> tuple[str, ...]:
    return (f"--pvm_layers={layers}", f"--pvm_hidden_size={width}", f"--pvm_init={init}", *others)


def same(config: ConfigDict) -> None:
    """As `pvm`."""


def sighted(config: ConfigDict) -> None:
    """The same batches, the backbone sees the image in all of them."""
    for stream in config.data.streams.values():
        stream.vision_masked = 0.0


def no_easy(config: ConfigDict) -> None:
    del config.data.streams["blind_easy"]
    config.data.streams["blind"].start = 0


def slow_gates(config: ConfigDict) -> None:
    config.optimizer.multipliers = ()


def paper_long(config: ConfigDict) -> None:
    digits_sft.publish(config)
    config.steps = 4000


def shifted(config: ConfigDict) -> None:
    config.data.position_shift = SHIFT


def up_to_64(config: ConfigDict) -> None:
    del config.data.streams["blind_long"]
    del config.data.streams["blind"]["stop"]
    config.data.streams["long"].update({"split": "sft_64", "samples": 32, "length": (128,)})


def up_to_505(config: ConfigDict) -> None:
    for name, samples in (("blind_long", 8), ("long", 4)):
        if name in config.data.streams:
            config.data.streams[name].update({"split": "sft_505", "path": LONG, "samples": samples, "length": (576,)})


def lora(rank: int, targets: str, *changes):
    """A change to adapters instead of PVM, and then `changes`."""

    def change(config: ConfigDict) -> None:
        config.model.path = BASE
        config.model.lora.rank = rank
        config.model.lora.targets = targets
        config.freeze = common.LORA_ONLY
        config.optimizer.learning_rate = 2e-3
        config.optimizer.multipliers = ()
        for one in changes:
            one(config)

    return change


def plain(config: ConfigDict) -> None:
    config.data.streams = {
        "long": {"split": "sft_256", "samples": 8, "length": (320,)},
        "short": {"split": "sft_64", "samples": 32, "length": (128,)},
    }


def only_short(config: ConfigDict) -> None:
    del config.data.streams["long"]


ROWS = {
    # name: title; options of `from_hf` that make the checkpoint it starts from (None: it starts from the base); what
    # turns the configuration of `pvm` into the row's (None: nothing is trained)
    "base": ("base", None, None),
    "slots": ("learned slots instead of the image", pvm("0", 128, "fan_in", "--pvm_slots=36"), same),
    "pvm": ("PVM, this project's recipe", pvm(), same),
    "lora_all": ("LoRA 31, all linear maps", None, lora(31, "proj", plain)),
    "lora_attention": ("LoRA 32, attention", None, lora(32, "self_attn", plain)),
    "lora_mlp": ("LoRA 49, MLPs", None, lora(49, "mlp", plain)),
    "lora_blind": ("LoRA 31, batches of PVM", None, lora(31, "proj")),
    "paper": ("PVM, published recipe", pvm(init="normal"), digits_sft.publish),
    "neither": ("neither fan-in nor dropout", pvm(init="normal"), sighted),
    "fan_in": ("fan-in initialization alone", pvm(), sighted),
    "dropout": ("visual attention dropout alone", pvm(init="normal"), same),
    "no_easy": ("no easy mosaics", pvm(), no_easy),
    "slow_gates": ("gates at the same learning rate", pvm(), slow_gates),
    "layer_1": ("PVM in layer 1", pvm("1"), same),
    "layer_3": ("PVM in layer 3", pvm("3"), same),
    "layers_0_2": ("PVM in layers 0 and 2", pvm("0,2"), same),
    "width_64": ("PVM 64 wide, two heads", pvm("0", 64), same),
    "width_256": ("PVM 256 wide, eight heads", pvm("0", 256), same),
    "mask_all": ("memory mask `all`", pvm("0", 128, "fan_in", "--pvm_memory_mask=all"), same),
    "unsilenced": ("image tokens retrieve, too", pvm("0", 128, "fan_in", "--no_pvm_silencing"), same),
    "pvm_shift": ("PVM, shifted positions", pvm(), shifted),
    "lora_shift": ("LoRA 31, shifted positions", None, lora(31, "proj", plain, shifted)),
    "pvm_64": ("PVM, SFT of at most 64 tokens", pvm(), up_to_64),
    "lora_64": ("LoRA 31, SFT of at most 64 tokens", None, lora(31, "proj", plain, only_short)),
    "pvm_505": ("PVM, SFT of at most 505 tokens", pvm(), up_to_505),
    "lora_505": ("LoRA 31, SFT of at most 505 tokens", None, lora(31, "proj", plain, up_to_505)),
    "paper_long": ("PVM, published recipe, 4,000 steps", pvm(init="normal"), paper_long),
}


def get_config(argument: str = "pvm", data: str = "runs/data") -> ConfigDict:
    """The training configuration of a row; `data` is the folder of the data sets."""
    words = [word for word in argument.split(",") if word != "smoke"]
    if len(words) != 1 or words[0] not in ROWS or ROWS[words[0]][2] is None:
        trained = [name for name, (_, _, change) in ROWS.items() if change]
        raise ValueError(
            f"configs/digits_ablation.py: expected one of {', '.join(trained)} and perhaps smoke, got {argument!r}"
        )
    config = digits_sft.get_config().unlock()
    config.checkpoint.every = 0
    config.checkpoint.keep = 1
    config.data.path = f"{data}/{DEMO}"
    ROWS[words[0]][2](config)
    for stream in config.data.streams.values():
        if "path" in stream:
            stream.path = f"{data}/{stream.path}"
    if "smoke" in argument.split(","):
        digits_sft.shrink(config)
    return config.lock()


def evaluation(smoke: bool = False) -> ConfigDict:
    """The configuration of `commands`' last one."""
    return digits_eval.get_config("brief,smoke" if smoke else "brief")


def commands(
    name: str, seed: int, run: str, data: str = "runs/data", smoke: bool = False, base: str | None = None
) -> dict[str, list[str]]:
    """The commands of a row, in order: convert, train, eval. All they write is in the folder `run`."""
    _, options, change = ROWS[name]
    base = base or BASE
    start, trained = (f"{run}/start" if options else base), (f"{run}/train" if change else base)
    word = ",smoke" if smoke else ""
    found = {}
    if options:
        convert = ["-m", "pvm_jax.convert", "from_hf", base, start, *options, f"--pvm_seed={seed}"]
        found["convert"] = ["python", *convert]
    if change:
        flags = [f"--workdir={trained}", f"--config.seed={seed}", f"--config.model.path={start}"]
        config = get_config(name, data)
        flags += [f"--config.data.path={config.data.path}"]
        flags += [
            f"--config.data.streams.{stream}.path={own.path}"
            for stream, own in config.data.streams.items()
            if "path" in own
        ]
        found["train"] = ["python", "train.py", f"--config=configs/digits_ablation.py:{name}{word}", *flags]
    paths = [f"--config.evals.{part}.path={data}/{DEMO}" for part in ("late", "short")]
    found["eval"] = [
        "python",
        "eval.py",
        f"--config=configs/digits_eval.py:brief{word}",
        f"--workdir={run}/eval",
        f"--config.checkpoint={trained}",
        *paths,
    ]
    return found
