#!/usr/bin/env bash
# Five tasks of MAD, cut to 150 to 600 steps of 64 rows (1.2 to 4.9 million tokens; memory: 0.6 million): the
# memory, its opponents and Transformers, each at its own learning rate. Two hours on one core for a seed.
# Started again, it goes on where it was.
#   RATES="1e-3 3e-3" STEPS=300 TASKS=fuzzy make mad    every model at each of these rates, for so many steps
source "$(dirname "$0")/common.sh"

# name, learning rate, options
MODELS='lmm           3e-3
lmm-momentum  3e-3 --memory_momentum=0.5
gated-delta   3e-3 --memory_rule=gated_delta
gpt           1e-3 --arch=gpt
gpt-conv      1e-3 --arch=gpt --attn_conv=4'

mad() {  # task, rows, tokens of a row, steps
  run prepare.py "mad_$1" --rows="$2"
  while read -r name own options; do
    for seed in ${SEEDS:-1}; do
      for rate in ${RATES:-$own}; do
        # shellcheck disable=SC2086  # the options are words
        run train.py config/mad_cpu.py --init_from=auto --dataset="mad_$1" --block_size=$(($3 - 1)) --max_iters="$4" \
          --out_dir="out/mad/$1/$name-$4-$rate-$seed" --seed="$seed" --learning_rate="$rate" $options
      done
    done
  done <<< "$MODELS"
  run eval_rows.py --out_dir="$(echo out/mad/"$1"/*/ | sed 's|/ |,|g; s|/$||')" --rows=1280 --seed=8
}

for task in ${TASKS:-recall noisy fuzzy copy memory}; do
  case $task in
    recall | noisy) mad "$task" 12800 128 "${STEPS:-150}" ;;
    fuzzy) mad fuzzy 12800 128 "${STEPS:-600}" ;;
    copy) mad copy 12800 256 "${STEPS:-150}" ;;
    memory) mad memory 256 32 "${STEPS:-300}" ;;
  esac
done
