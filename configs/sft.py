"""SFT of PVM on Qwen3-VL, the paper's recipe (arXiv 2605.00814): `configs/sft.py:8b`; also 2b, 4b, 32b.

Launch, on any machine the checkpoint first:
    python -m pvm_jax.convert from_hf Qwen3-VL-8B-Instruct qwen3-vl-8b-pvm --pvm_layers=8,16,24 --pvm_hidden_size=512
then on one machine with eight GPUs
    python train.py --config=configs/sft.py:8b --workdir=runs/sft-8b --config.micro_batches=4 \\
        --config.model.path=qwen3-vl-8b-pvm --config.data.path=train.jsonl --config.data.image_folder=images
or on every host of a TPU slice, here v5e:16x16 (docs/pods.md has Cloud TPU VMs, GKE and SLURM)
    python train.py --config=configs/sft.py:8b --workdir=/mnt/shared/runs/sft-8b --distributed \\
        --config.mesh.fsdp=64 --config.mesh.tensor=4 --config.model.path=... --config.data.path=...

Your own data: one JSON object a line, {"messages": [...], "images": [...]} or prompt and completion
(pvm_jax/data/records.py lists the forms); parquet and TFDS directories work alike.

Recipe: only PVM trains; AdamW 1e-4, betas 0.9 and 0.999, no weight decay, clip 1.0, cosine after 10 % warm-up,
64 samples a step, one epoch, loss on the answers, every sample weighs the same. Trainable parameters and optimizer
in fp32, the rest in bf16. Against the public script: samples are packed into rows, and samples beyond the largest
bucket are left out and reported (the script never cuts; a row of 16k image tokens would be as large as 16 others).

Data in the paper: 526k samples filtered from OpenMMReasoner-SFT-874K; the filter is not published.

Size   PVM layers   PVM parameters   TPU slice: mesh, micro-batches     GPUs: micro-batches
2b     5, 11, 17    18,878,211       v5e:2x2: fsdp 4, 16                one H100: 16
4b     5, 11, 17    22,728,963       v5e:2x2: fsdp 4, 16                one H100: 16; 8: 2
8b     8, 16, 24    27,922,179       v5e:2x4: fsdp 8, 8                 8 x H100: 4
                                     v5e:16x16: fsdp 64 x tensor 4, 1
32b    16, 32, 48   37,359,363       v5p:4x4x4: fsdp 64, 1              8 x H100: 8
Layers of 4b and 8b are the paper's; those of 2b and 32b are ours (convert with these --pvm_layers). Nothing was planned
for 2b, nor for 4b on eight GPUs: there the micro-batches are a guess.

Planned memory  docs/plans.md: 64 rows of 4,096 tokens a step, 8b on v5e:2x4 5.90 of 15.75 GiB, on v5e:16x16
                with 16,384 tokens a row 4.63 of 15.75 GiB; other buckets by
                `python -m pvm_jax.plan`
Hardware        not measured (the paper: 8 GPUs)
Wall time       not measured
Result          paper, mean of eight benchmarks: 8B 66.7 -> 70.6, 4B 64.0 -> 67.2; ours not measured
                2B and 32B: no numbers in the paper, not measured

Arguments, separated by commas: the size, and
    lora    low-rank adapters of all linear maps of the decoder train, rank 64 (`config.model.lora`), and PVM too if the
            checkpoint has it
    smoke   the same configuration in a few steps of tiny batches
"""

from ml_collections import ConfigDict

import configs.common as common

SIZES = ("2b", "4b", "8b", "32b")


def get_config(argument: str = "8b") -> ConfigDict:
    words = [word for word in argument.split(",") if word]
    unknown = [word for word in words if word not in (*SIZES, "lora", "smoke")]
    sizes = [word for word in words if word in SIZES]
    if unknown or len(sizes) > 1:
        raise ValueError(
            f"configs/sft.py: expected one of {', '.join(SIZES)} and perhaps lora or smoke, got {argument!r}"
        )
    size = sizes[0] if sizes else "8b"

    config = common.get_config()
    config.model.remat = True
    config.model.size = size
    config.data.samples = 64
    config.data.length = (2048, 4096, 8192)
    config.data.patches = (4096, 8192, 16384)
    config.data.threads = 16
    # 1.6 megapixels, 1,568 visual tokens: the checkpoint's own limit lets one image fill 16,384 tokens.
    config.processor.max_pixels = 1_605_632
    if "lora" in words:
        config.model.lora.rank = 64
        config.freeze = common.PVM_AND_LORA
    if "smoke" in words:
        shrink(config)
    return config.lock()


def shrink(config: ConfigDict) -> None:
    """A few small steps on any machine."""
    config.steps = 4
    config.model.remat = False
    config.processor.max_pixels = 4096
    config.data.samples = 2
    config.data.length = (128,)
    config.data.patches = (64,)
    config.data.threads = 2
    config.mesh = {"data": 1, "fsdp": -1, "tensor": 1}
    config.checkpoint.every = 2
    config.log_every = 1
