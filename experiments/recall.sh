#!/usr/bin/env bash
# Recall of 4 to 64 pairs, three segments back, by every architecture, all 64 wide. 10 minutes on one core.
source "$(dirname "$0")/common.sh"
source experiments/models.sh

run prepare.py recall
for model in "${MODELS[@]}"; do
  read -r name _ _ options <<< "$model"
  # shellcheck disable=SC2086  # the options are words
  run train.py config/recall_cpu.py --out_dir="out/recall/$name" $options
done
run eval_rows.py --out_dir="$(echo out/recall/*/ | sed 's|/ |,|g; s|/$||')"
