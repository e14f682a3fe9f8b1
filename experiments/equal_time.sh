#!/usr/bin/env bash
# Six models, each trained for the same time at contexts of 256, 1,024, 4,096 and 16,384 bytes: two and a half minutes,
# at 16,384 five. How many steps that is was measured on one thread of an AMD EPYC. Then loss against position in 16K
# bytes, and a picture of loss over time. Two hours on one core; CONTEXTS="256 1024" for some of them.
source "$(dirname "$0")/common.sh"

#       steps at  256 1024 4096 16384
MODELS="lmm         774  789  174   75 --arch=lmm --n_embd=148
gated-delta         774  759  174   75 --arch=lmm --n_embd=148 --memory_rule=gated_delta
mac                 579  465  108   57 --arch=mac
window-conv         864  774  186   78 --arch=mag --memory_layers=none --n_embd=152 --attn_conv=4
gpt-conv            855  564   69   12 --arch=gpt --n_embd=152 --attn_conv=4
gpt                 939  630   72   12 --arch=gpt --n_embd=152"

run prepare.py stdlib
runs=()
for context in ${CONTEXTS:-256 1024 4096 16384}; do
  lmm=out/time/$context/lmm others=()
  while read -r name steps_256 steps_1024 steps_4096 steps_16384 options; do
    steps="steps_$context"
    rows=$((context < 1024 ? 1024 / context : 1))
    # shellcheck disable=SC2086  # the options are words
    run train.py config/compare_cpu.py --init_from=auto --out_dir="out/time/$context/$name" --block_size="$context" \
      --batch_size="$rows" --max_iters="${!steps}" --warmup_iters=$((${!steps} / 8)) \
      --log_interval=$((${!steps} / 3)) --eval_interval=$((${!steps} / 3)) --eval_iters=$((65536 / context / rows)) \
      $options
    runs+=("out/time/$context/$name")
    [[ $name == lmm ]] || others+=("out/time/$context/$name")
  done <<< "$MODELS"
  run eval_context.py --out_dir="$lmm" --baseline="$(IFS=,; echo "${others[*]}")" --length=16384 --rows=8
done
run plot.py --x=hours --panels "${runs[@]}"
