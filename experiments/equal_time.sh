#!/usr/bin/env bash
# The memory, a window with convolutions and a Transformer with them, trained on rows of 1,024 and 4,096
# bytes for the same time: 3 minutes each, 7 for rows of 4,096. How many steps that is was
# measured on one thread of an AMD EPYC. 35 minutes on one core.
source "$(dirname "$0")/common.sh"

train() {  # bytes of a row, rows, name, steps, options of the model
  run train.py config/compare_cpu.py --init_from=auto --out_dir="out/time/$1/$3" --block_size="$1" --batch_size="$2" \
    --max_iters="$4" --eval_interval=$(($4 / 4)) --eval_iters=$((100 * 256 / $1 + 10)) "${@:5}"
}
LMM=(--arch=lmm --n_embd=148)
WINDOW=(--arch=mag --memory_layers=none --n_embd=152 --attn_conv=4)
GPT=(--arch=gpt --n_embd=152 --attn_conv=4)

run prepare.py stdlib
train 1024 1 lmm 800 "${LMM[@]}"
train 1024 1 window-conv 756 "${WINDOW[@]}"
train 1024 1 gpt-conv 576 "${GPT[@]}"
train 4096 1 lmm 400 "${LMM[@]}"
train 4096 1 window-conv 436 "${WINDOW[@]}"
train 4096 1 gpt-conv 168 "${GPT[@]}"
for length in 1024 4096; do
  run eval_context.py --out_dir="out/time/$length/lmm" --baseline="out/time/$length/window-conv,out/time/$length/gpt-conv" \
    --length=16384 --rows=16
done
run plot.py --x=hours out/time/4096/*/
