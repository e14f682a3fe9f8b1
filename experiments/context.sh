#!/usr/bin/env bash
# Where does a memory begin to pay? Models that read on through the text, a window of 64 without a memory,
# and a Transformer that sees 1,024 bytes; loss against position up to 64K. 30 minutes on one core.
source "$(dirname "$0")/common.sh"

CARRY='--carry_state --reset_prob=0.2 --block_size=256 --batch_size=4 --max_iters=800'
MODELS="lmm         $CARRY --arch=lmm --n_embd=148
gated-delta $CARRY --arch=lmm --n_embd=148 --memory_rule=gated_delta
mac         $CARRY --arch=mac
mag-conv    $CARRY --arch=mag --attn_conv=4
window-conv $CARRY --arch=mag --memory_layers=none --n_embd=152 --attn_conv=4
gpt-conv    --block_size=1024 --batch_size=1 --max_iters=800 --arch=gpt --n_embd=152 --attn_conv=4"

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
