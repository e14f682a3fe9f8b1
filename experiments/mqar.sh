#!/usr/bin/env bash
# MQAR of Zoology, cut to 5 million tokens: the memory, its opponents and Transformers, each at its own
# learning rate; the Transformer without convolutions, which learns later, reads 30 million. Accuracy
# against bytes of state. An hour and a half on one core for a seed. Started again, it goes on where it was.
#   RATES="1e-2 2e-2 4e-2" make mqar    every model at each of these rates
source "$(dirname "$0")/common.sh"

# name, learning rate, options
MODELS='lmm                 4e-2
lmm-momentum        2e-2 --memory_momentum=0.5
gated-delta         4e-2 --memory_rule=gated_delta
delta               2e-2 --memory_rule=delta
mac                 2e-2 --arch=mac
mag-conv            2e-2 --arch=mag --attn_conv=4
window-conv         2e-2 --arch=mag --attn_conv=4 --memory_layers=none
gpt                 6e-3 --arch=gpt --max_iters=1830
gpt-conv            2e-2 --arch=gpt --attn_conv=4
lmm-4-heads         2e-2 --memory_heads=4
gated-delta-4-heads 2e-2 --memory_heads=4 --memory_rule=gated_delta
lmm-128             2e-2 --n_embd=128
gated-delta-128     2e-2 --n_embd=128 --memory_rule=gated_delta'

run prepare.py mqar --rows=80000
for seed in ${SEEDS:-1}; do
  while read -r name own options; do
    for rate in ${RATES:-$own}; do
      # shellcheck disable=SC2086  # the options are words
      run train.py config/mqar_cpu.py --init_from=auto --out_dir="out/mqar/$name-$rate-$seed" --seed="$seed" \
        --learning_rate="$rate" $options
    done
  done <<< "$MODELS"
done
run eval_rows.py --out_dir="$(echo out/mqar/*/ | sed 's|/ |,|g; s|/$||')" --rows=100 --seed=8
