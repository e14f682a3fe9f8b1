#!/usr/bin/env bash
# State tracking: parity, addition modulo 5, permutations of 3 and of 5, by memories whose step may and
# may not overshoot, with and without momentum, and by Transformers. 40 minutes on one core for a seed.
source "$(dirname "$0")/common.sh"

MODELS='titans
small-step   --memory_max_lr=0.5
momentum     --memory_momentum=0.5
delta        --memory_rule=delta
delta-small  --memory_rule=delta --memory_max_lr=0.5
gpt          --arch=gpt
gpt-conv     --arch=gpt --attn_conv=4'

for task in ${TASKS:-parity mod5 s3 s5}; do
  run prepare.py "$task" --rows=100000
  while read -r name options; do
    for seed in ${SEEDS:-1}; do
      # shellcheck disable=SC2086  # the options are words
      run train.py config/states_cpu.py --dataset="$task" --out_dir="out/states/$task/$name-$seed" \
        --seed="$seed" $options
    done
  done <<< "$MODELS"
  run eval_rows.py --out_dir="$(echo out/states/"$task"/*/ | sed 's|/ |,|g; s|/$||')" --rows=400
done
