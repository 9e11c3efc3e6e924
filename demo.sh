#!/usr/bin/env bash
# The main job on one machine, end to end: data, conversion, SFT of PVM and of its control, evaluation, generation,
# export. All but the data set (runs/data, made once) lands under $RUNS; a second call starts over.
set -euo pipefail
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/demo}
SEED=${SEED:-0}
BASE=assets/digits_base
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$RUNS/xla}
# Memory of one step is kept for the next, in large pages; the module says why.
allocator=$($PYTHON -c "from pvm_jax.analysis.ablation_jobs import ALLOCATOR; print(ALLOCATOR)")
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-$allocator}

step() { printf '\n=== %s (%d s) ===\n' "$1" "$SECONDS"; }

rm -rf "$RUNS"
mkdir -p "$RUNS"

step "data: mosaics of real handwritten digits, as a TFDS data set"
$PYTHON -m pvm_jax.data.prepare_digits runs/data

step "convert: the Hugging Face checkpoint gains PVM in layer 0, or the control"
pvm=(--pvm_layers=0 --pvm_hidden_size=128 --pvm_init=fan_in --pvm_seed="$SEED")
$PYTHON -m pvm_jax.convert from_hf $BASE "$RUNS/pvm-start" "${pvm[@]}"
$PYTHON -m pvm_jax.convert from_hf $BASE "$RUNS/slots-start" "${pvm[@]}" --pvm_slots=36

train() {
  $PYTHON train.py --config="configs/digits_sft.py$2" --config.seed="$SEED" --config.model.path="$RUNS/$1-start" \
    --workdir="$RUNS/$1"
}
step "train: SFT of PVM on answers of at most 256 tokens, and beside it of slots (progress in $RUNS/slots.log)"
train slots :slots >"$RUNS/slots.log" 2>&1 &
control=$!
trap 'kill $control 2>/dev/null || true' EXIT
train pvm ""
wait $control || { tail -n 20 "$RUNS/slots.log" >&2; exit 1; }

step "evaluate: reads by position in the answer, held-out digits"
for kind in base pvm slots; do
  checkpoint=$([ $kind = base ] && echo $BASE || echo "$RUNS/$kind")
  $PYTHON eval.py --config=configs/digits_eval.py --config.checkpoint="$checkpoint" --workdir="$RUNS/eval-$kind"
done

step "generate: one answer from the trained model"
$PYTHON -m pvm_jax.generate --checkpoint="$RUNS/pvm" --image=assets/example.png --prompt="$(cat assets/example.txt)"

step "export: back to a Hugging Face checkpoint"
$PYTHON -m pvm_jax.convert to_hf "$RUNS/pvm" "$RUNS/pvm-hf"

step "result"
$PYTHON -m pvm_jax.evals.compare "$RUNS"/eval-{base,slots,pvm}/digits.json --names="base,base + slots,base + PVM" --out="$RUNS/reads.png"
