#!/usr/bin/env bash
# Five tasks of MAD, cut to 150 or 300 steps of 64 rows (1.2 to 2.4 million tokens; memory: 0.6 million): the
# memory, its opponents and Transformers. 75 minutes on one core for a seed. Started again, it goes on where
# it was.
source "$(dirname "$0")/common.sh"

MODELS='lmm
lmm-momentum  --memory_momentum=0.5
gated-delta   --memory_rule=gated_delta
gpt           --arch=gpt
gpt-conv      --arch=gpt --attn_conv=4'

mad() {  # task, rows, tokens of a row, steps
  run prepare.py "mad_$1" --rows="$2"
  while read -r name options; do
    for seed in ${SEEDS:-1}; do
      # shellcheck disable=SC2086  # the options are words
      run train.py config/mad_cpu.py --init_from=auto --dataset="mad_$1" --block_size=$(($3 - 1)) --max_iters="$4" \
        --out_dir="out/mad/$1/$name-$seed" --seed="$seed" $options
    done
  done <<< "$MODELS"
  run eval_rows.py --out_dir="$(echo out/mad/"$1"/*/ | sed 's|/ |,|g; s|/$||')" --rows=1280
}

for task in ${TASKS:-recall noisy fuzzy copy memory}; do
  case $task in
    recall | noisy) mad "$task" 12800 128 150 ;;
    fuzzy) mad fuzzy 12800 128 300 ;;
    copy) mad copy 12800 256 150 ;;
    memory) mad memory 256 32 300 ;;
  esac
done
