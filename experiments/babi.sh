#!/usr/bin/env bash
# Stories in texts of up to a million tokens: a memory, the same never written, and a Transformer. An
# hour on one core. The price on writing rises in steps, until next to nothing of other text is written.
source "$(dirname "$0")/common.sh"

run prepare.py babi
run train.py config/babi_cpu.py
while read -r steps price; do
  run train.py config/babi_cpu.py --init_from=resume --max_iters="$steps" --write_cost="$price"
done <<< '4800 10
6000 15
6800 40'
run train.py config/babi_cpu.py --arch=gpt --attn_conv=4 --n_embd=104 --max_iters=2400 --out_dir=out/babi_gpt_cpu
run eval_babi.py --out_dir=out/babi_cpu --baseline=out/babi_gpt_cpu --samples=100
