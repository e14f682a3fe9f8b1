#!/usr/bin/env bash
# MAC, the Transformer, and MAC with its memory never written: 3 seeds, two lengths. An hour on 2 cores when run two at a time.
source "$(dirname "$0")/common.sh"

compare() {  # block_size batch_size max_iters seed
  local options=(config/compare_cpu.py --block_size="$1" --batch_size="$2" --max_iters="$3" --seed="$4")
  run train.py "${options[@]}" --out_dir="out/compare/mac-$1-$4"
  run train.py "${options[@]}" --out_dir="out/compare/never-written-$1-$4" --update_memory=False
  run train.py "${options[@]}" --out_dir="out/compare/gpt-$1-$4" --arch=gpt --n_embd=152
}

run prepare.py stdlib
for seed in 1 2 3; do
  compare 256 4 800 "$seed"
  compare 1024 1 400 "$seed"
done
run plot.py out/compare/*
