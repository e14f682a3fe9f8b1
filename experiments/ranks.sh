#!/usr/bin/env bash
# One run on 1, 2 and 4 processes, replicated and sharded: the same curve. Two minutes on two cores.
source "$(dirname "$0")/common.sh"

run prepare.py stdlib
export OMP_NUM_THREADS=1
for parallel in ddp fsdp; do
  for world in 1 2 4; do
    "$BIN/torchrun" --standalone --nproc_per_node=$world train.py config/stdlib_cpu.py --parallel=$parallel --carry_state \
      --max_iters=60 --warmup_iters=10 --eval_interval=20 --eval_iters=4 --log_interval=1 --out_dir=out/ranks/$parallel-$world
  done
done
run plot.py out/ranks/*/
