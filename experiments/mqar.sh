#!/usr/bin/env bash
# MQAR of Zoology, cut to 5 million tokens: the memory, its opponents and Transformers, each at two
# learning rates; accuracy against bytes of state. Two hours on one core for a seed. Started again, it
# goes on where it was.
source "$(dirname "$0")/common.sh"

MODELS='lmm
lmm-momentum        --memory_momentum=0.5
gated-delta         --memory_rule=gated_delta
delta               --memory_rule=delta
mac                 --arch=mac
mag-conv            --arch=mag --attn_conv=4
window-conv         --arch=mag --attn_conv=4 --memory_layers=none
gpt                 --arch=gpt
gpt-conv            --arch=gpt --attn_conv=4
lmm-4-heads         --memory_heads=4
gated-delta-4-heads --memory_heads=4 --memory_rule=gated_delta
lmm-128             --n_embd=128
gated-delta-128     --n_embd=128 --memory_rule=gated_delta'

run prepare.py mqar --rows=80000
for seed in ${SEEDS:-1}; do
  while read -r name options; do
    for rate in ${RATES:-1e-2 2e-2}; do
      # shellcheck disable=SC2086  # the options are words
      run train.py config/mqar_cpu.py --init_from=auto --out_dir="out/mqar/$name-$rate-$seed" --seed="$seed" \
        --learning_rate="$rate" $options
    done
  done <<< "$MODELS"
done
run eval_rows.py --out_dir="$(echo out/mqar/*/ | sed 's|/ |,|g; s|/$||')" --rows=100
