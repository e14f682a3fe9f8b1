#!/usr/bin/env bash
# Five tasks of MAD, cut to 600 steps (4.9 million tokens, 3 epochs; memory: 1.2 million): the memory, its
# opponents and Transformers. Two hours on one core for a seed. Started again, it goes on where it was.
source "$(dirname "$0")/common.sh"

MODELS='lmm
lmm-momentum  --memory_momentum=0.5
gated-delta   --memory_rule=gated_delta
mag-conv      --arch=mag --attn_conv=4
gpt           --arch=gpt
gpt-conv      --arch=gpt --attn_conv=4'

mad() {  # task, rows, tokens of a row
  run prepare.py "mad_$1" --rows="$2"
  while read -r name options; do
    for seed in ${SEEDS:-1}; do
      # shellcheck disable=SC2086  # the options are words
      run train.py config/mad_cpu.py --init_from=auto --dataset="mad_$1" --block_size=$(($3 - 1)) \
        --out_dir="out/mad/$1/$name-$seed" --seed="$seed" $options
    done
  done <<< "$MODELS"
  run eval_rows.py --out_dir="$(echo out/mad/"$1"/*/ | sed 's|/ |,|g; s|/$||')" --rows=1280
}

for task in ${TASKS:-recall noisy fuzzy copy memory}; do
  case $task in
    copy) mad copy 12800 256 ;;
    memory) mad memory 256 32 ;;
    *) mad "$task" 12800 128 ;;
  esac
done
