#!/usr/bin/env bash
# The memory, a window with convolutions and a Transformer with them, trained on rows of 4,096 bytes for the same
# time, some 3 minutes each. How many steps that is was measured on one thread of an AMD EPYC. 15 minutes on one core.
source "$(dirname "$0")/common.sh"

train() {  # name, steps, options of the model
  run train.py config/compare_cpu.py --init_from=auto --out_dir="out/time/$1" --block_size=4096 --batch_size=1 \
    --max_iters="$2" --warmup_iters=$(($2 / 8)) --log_interval=$(($2 / 20)) --eval_interval=$(($2 / 4)) \
    --eval_iters=16 "${@:3}"
}

run prepare.py stdlib
train lmm 200 --arch=lmm --n_embd=148
train window-conv 218 --arch=mag --memory_layers=none --n_embd=152 --attn_conv=4
train gpt-conv 84 --arch=gpt --n_embd=152 --attn_conv=4
run eval_context.py --out_dir=out/time/lmm --baseline=out/time/window-conv,out/time/gpt-conv --length=16384 --rows=16
run plot.py --x=hours out/time/*/
