#!/usr/bin/env bash
# Speed and memory, everything docs/results/speed.md has of them: some 15 minutes. PEER=--peer=titans-pytorch where that is
# installed.
source "$(dirname "$0")/common.sh"

models=gpt,mac,mag,mal,lmm
# shellcheck disable=SC2086  # PEER may be empty
{
  run bench.py --measure=train,forward --out_dir=out/bench/S --models=$models ${PEER:-}
  run bench.py --measure=train,forward --out_dir=out/bench/M --shape=M --sizes=2x512 --repeats=5 --models=gpt,mac,lmm ${PEER:-}
}
run bench.py --measure=train --out_dir=out/bench/momentum --models=gpt,mac,mag,lmm --memory_momentum=0.5
run bench.py --measure=train --out_dir=out/bench/deep --models=gpt,mac-2 --repeats=2
run bench.py --measure=memory --out_dir=out/bench/memory --sizes=4x2048 --models=gpt,mac,lmm
run bench.py --measure=train,memory --out_dir=out/bench/checkpointed --sizes=4x2048 --models=gpt,mac --checkpoint_segments --repeats=3
run bench.py --measure=train --out_dir=out/bench/length --sizes=1x1024,1x2048,1x4096,1x8192,1x16384,1x32768 --models=gpt,mac,lmm \
  --repeats=3 --most_seconds=30
run bench.py --measure=stream --out_dir=out/bench/stream --models=gpt,mac,lmm --repeats=5
