#!/usr/bin/env bash
# The second stage on digits, from the result of demo.sh (which is run first where $RUNS has none): GRPO, evaluation,
# and the table of base, SFT and SFT + GRPO. Lands under $RUNS; a second call starts the stage over.
set -euo pipefail
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/demo}
SEED=${SEED:-0}
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$RUNS/xla}

[ -f "$RUNS/eval-pvm/digits.json" ] || RUNS=$RUNS SEED=$SEED PYTHON=$PYTHON bash demo.sh
rm -rf "$RUNS/grpo" "$RUNS/eval-grpo"

printf '\n=== train: GRPO on prompts of the training digits ===\n'
$PYTHON train.py --config=configs/digits_grpo.py --config.seed="$SEED" --config.model.path="$RUNS/pvm" \
  --workdir="$RUNS/grpo"

printf '\n=== evaluate: held-out digits (%d s) ===\n' "$SECONDS"
$PYTHON eval.py --config=configs/digits_eval.py --config.checkpoint="$RUNS/grpo" --workdir="$RUNS/eval-grpo"

printf '\n=== result (%d s) ===\n' "$SECONDS"
$PYTHON -m pvm_jax.evals.compare "$RUNS"/eval-{base,pvm,grpo}/digits.json --names="base,SFT,SFT + GRPO" \
  --out="$RUNS/reads-grpo.png"
