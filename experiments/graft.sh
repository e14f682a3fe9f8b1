#!/usr/bin/env bash
# A small GPT-2, trained here, is given a memory: alone, with the memory trained beside it, and with that never written. An hour on
# one core.
source "$(dirname "$0")/common.sh"

graft() {  # name, options
  run train.py config/finetune_gpt2.py --dataset=stdlib --init_from=out/graft/gpt2 --memory_heads=4 --block_size=512 \
    --gradient_accumulation_steps=1 --carry_state=False --max_iters=300 --eval_interval=300 --eval_iters=40 --log_interval=50 \
    --learning_rate=3e-3 --out_dir="out/graft/$1" "${@:2}"
}

"$BIN/pip" install -q -e '.[transformers]'
run prepare.py stdlib
run train.py config/stdlib_cpu.py --arch=gpt --backbone=gpt2 --bias --batch_size=8 --max_iters=3000 --learning_rate=1e-3 \
  --eval_interval=500 --eval_iters=40 --out_dir=out/graft/gpt2
run examples/gpt2_to_transformers.py out/graft/gpt2
for n in 64 256; do
  attention=(--segment_len=$n --window_len=$n)
  graft mac-$n "${attention[@]}"
  graft mac-$n-never-written "${attention[@]}" --update_memory=False
  graft alone-$n "${attention[@]}" --arch=mag --memory_layers=none --num_persist_mem=0 --freeze_backbone=False --learning_rate=1e-3
  graft mac-$n-everything "${attention[@]}" --freeze_backbone=False --learning_rate=1e-3
done
graft mag-64 --segment_len=64 --window_len=64 --arch=mag
graft mal-64 --segment_len=64 --window_len=64 --arch=mal
