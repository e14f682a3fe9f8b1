#!/usr/bin/env bash
# MAC, MAC with momentum, MAC with its memory never written, the memory alone and the Transformer: 3 seeds, two lengths. An hour and
# a half on one core.
source "$(dirname "$0")/common.sh"

compare() {  # block_size batch_size max_iters seed
  local options=(config/compare_cpu.py --block_size="$1" --batch_size="$2" --max_iters="$3" --seed="$4")
  run train.py "${options[@]}" --out_dir="out/compare/mac-$1-$4"
  run train.py "${options[@]}" --out_dir="out/compare/mac-momentum-$1-$4" --memory_momentum=0.5 --memory_lr=0.6
  run train.py "${options[@]}" --out_dir="out/compare/lmm-$1-$4" --arch=lmm --n_embd=148
  run train.py "${options[@]}" --out_dir="out/compare/never-written-$1-$4" --update_memory=False
  run train.py "${options[@]}" --out_dir="out/compare/gpt-$1-$4" --arch=gpt --n_embd=152
}

run prepare.py stdlib
for seed in 1 2 3; do
  compare 256 4 800 "$seed"
  compare 1024 1 400 "$seed"
done
run plot.py out/compare/*/
