#!/usr/bin/env bash
# MAC, MAC with momentum, MAC with its memory never written, the memory alone and the Transformer; then
# the opponents: a Transformer and a window with the memory's convolutions, MAG with them, the memory
# with the rules of DeltaNet and Gated DeltaNet. 3 seeds, two lengths. Three hours on one core.
source "$(dirname "$0")/common.sh"

compare() {  # block_size batch_size max_iters seed
  local options=(config/compare_cpu.py --block_size="$1" --batch_size="$2" --max_iters="$3" --seed="$4")
  run train.py "${options[@]}" --out_dir="out/compare/mac-$1-$4"
  run train.py "${options[@]}" --out_dir="out/compare/mac-momentum-$1-$4" --memory_momentum=0.5 --memory_lr=0.6
  run train.py "${options[@]}" --out_dir="out/compare/lmm-$1-$4" --arch=lmm --n_embd=148
  run train.py "${options[@]}" --out_dir="out/compare/never-written-$1-$4" --update_memory=False
  run train.py "${options[@]}" --out_dir="out/compare/gpt-$1-$4" --arch=gpt --n_embd=152
  run train.py "${options[@]}" --out_dir="out/compare/gpt-conv-$1-$4" --arch=gpt --n_embd=152 --attn_conv=4
  run train.py "${options[@]}" --out_dir="out/compare/window-conv-$1-$4" --arch=mag --memory_layers=none \
    --n_embd=152 --attn_conv=4
  run train.py "${options[@]}" --out_dir="out/compare/mag-conv-$1-$4" --arch=mag --attn_conv=4
  run train.py "${options[@]}" --out_dir="out/compare/delta-$1-$4" --arch=lmm --n_embd=148 --memory_rule=delta
  run train.py "${options[@]}" --out_dir="out/compare/gated-delta-$1-$4" --arch=lmm --n_embd=148 \
    --memory_rule=gated_delta
}

run prepare.py stdlib
for seed in 1 2 3; do
  compare 256 4 800 "$seed"
  compare 1024 1 400 "$seed"
done
run plot.py out/compare/*/
