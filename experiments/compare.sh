#!/usr/bin/env bash
# Text: memories, and models without one, of nearly one size, trained on the same rows of 256 bytes at random places;
# then loss against position in pieces of 64K bytes, with the state carried. Half an hour on one core for a seed;
# SEEDS="1 2 3" for more. Another text, prepared before:
#   DATASET=shakespeare_char LENGTH=16384 make compare
source "$(dirname "$0")/common.sh"

MODELS='lmm --arch=lmm --n_embd=148
gated-delta --arch=lmm --n_embd=148 --memory_rule=gated_delta
mag-conv --arch=mag --attn_conv=4
mag-conv-256 --arch=mag --attn_conv=4 --window_len=256
mac --arch=mac
never-written --arch=mac --update_memory=False
window-conv --arch=mag --memory_layers=none --n_embd=152 --attn_conv=4
gpt-conv --arch=gpt --n_embd=152 --attn_conv=4
gpt --arch=gpt --n_embd=152'

data=${DATASET:-stdlib}
[[ $data == stdlib ]] && run prepare.py stdlib
for seed in ${SEEDS:-1}; do
  out=out/compare/$data/$seed others=()
  while read -r name options; do
    # shellcheck disable=SC2086  # the options are words
    run train.py config/compare_cpu.py --init_from=auto --dataset="$data" --seed="$seed" --out_dir="$out/$name" $options
    case $name in lmm | never-written) ;; *) others+=("$out/$name") ;; esac
  done <<< "$MODELS"
  run eval_context.py --out_dir="$out/lmm" --baseline="$(IFS=,; echo "${others[*]}")" --dataset="$data" \
    --length="${LENGTH:-65536}" --rows="${ROWS:-4}"
  run plot.py "$out"/*/
done
