#!/usr/bin/env bash
# Every architecture at nearly equal parameters and equal tokens, 3 seeds: text and needles. An hour on one core.
source "$(dirname "$0")/common.sh"
source experiments/models.sh

run prepare.py stdlib
run prepare.py needle
for seed in ${SEEDS:-1 2 3}; do
  for model in "${MODELS[@]}"; do
    read -r name text needle options <<< "$model"
    out=out/family/$name-$seed
    # shellcheck disable=SC2086  # the options are words
    run train.py config/compare_cpu.py --out_dir="$out/text" --n_layer=2 --n_embd="$text" --max_iters=300 --warmup_iters=50 \
      --eval_interval=300 --seed="$seed" $options
    # shellcheck disable=SC2086
    run train.py config/needle_cpu.py --out_dir="$out/needle" --n_embd="$needle" --max_iters=400 --eval_interval=400 \
      --cost_from=0.5 --seed="$seed" $options
    run eval_needle.py --out_dir="$out/needle" --control=False --tasks=pass-key,number --lengths=256,1024,4096 --depths=50 \
      --samples=50
  done
done
