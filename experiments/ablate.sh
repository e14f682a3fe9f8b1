#!/usr/bin/env bash
# What finding needles needs: the same short training with one thing changed at a time. 20 minutes on one core.
source "$(dirname "$0")/common.sh"

run prepare.py needle
while read -r name options; do
  # shellcheck disable=SC2086  # the options are words
  run train.py config/needle_cpu.py --max_iters=500 --out_dir="out/ablate/$name" $options
  run eval_needle.py --out_dir="out/ablate/$name" --control=False --lengths=1024,16384 --depths=50 --samples=50 --cell_tokens=262144
done << 'END'
nothing-changed
momentum          --memory_momentum=0.5 --memory_lr=0.6
no-convolution    --memory_conv=0
no-persistent     --num_persist_mem=0
8-long-term       --num_longterm_mem=8
no-forget-cost    --forget_cost=0
no-cost           --forget_cost=0 --write_cost=0
sigmoid           --memory_gates=sigmoid --memory_decay=0.0003
END
