#!/usr/bin/env bash
# Where does a memory begin to pay? Memories trained on rows of 256 bytes at random places, and memories that are
# carried from row to row; a window of 64 without a memory, and a Transformer that sees 1,024 bytes; loss against
# position up to 64K. 50 minutes on one core.
source "$(dirname "$0")/common.sh"

ROWS_OF_256='--block_size=256 --batch_size=4 --max_iters=800'
CARRIED="$ROWS_OF_256 --carry_state --reset_prob=0.2"
MODELS="lmm         $ROWS_OF_256 --arch=lmm --n_embd=148
gated-delta $ROWS_OF_256 --arch=lmm --n_embd=148 --memory_rule=gated_delta
mac         $ROWS_OF_256 --arch=mac
mag-conv    $ROWS_OF_256 --arch=mag --attn_conv=4
window-conv $ROWS_OF_256 --arch=mag --memory_layers=none --n_embd=152 --attn_conv=4
gpt-conv    --block_size=1024 --batch_size=1 --max_iters=800 --arch=gpt --n_embd=152 --attn_conv=4
lmm-carried         $CARRIED --arch=lmm --n_embd=148
gated-delta-carried $CARRIED --arch=lmm --n_embd=148 --memory_rule=gated_delta
mac-carried         $CARRIED --arch=mac
mag-conv-carried    $CARRIED --arch=mag --attn_conv=4"

# another text: DATASET=shakespeare_char, prepared before
data=${DATASET:-stdlib}
[[ $data == stdlib ]] && run prepare.py stdlib
baselines=()
while read -r name options; do
  # shellcheck disable=SC2086  # the options are words
  run train.py config/compare_cpu.py --init_from=auto --eval_interval=300 --dataset="$data" \
    --out_dir="out/context/$data/$name" $options
  [[ $name == lmm ]] || baselines+=("out/context/$data/$name")
done <<< "$MODELS"
run eval_context.py --out_dir="out/context/$data/lmm" --baseline="$(IFS=,; echo "${baselines[*]}")" --dataset="$data" \
  --length=65536 --rows="${ROWS:-8}"
run plot.py --x=hours "out/context/$data"/*/
