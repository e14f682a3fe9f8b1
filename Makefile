# make demo   from nothing to a sample: install, prepare, train on the CPU, plot, sample (about 5 minutes on 2 cores)
# make needle needles in haystacks: train a model and a Transformer, draw where each finds them, with and without memory
# make talk   a model to talk to: train it, tell it something, quit, ask it again; what repetition teaches it
# make graft  a GPT-2 of our own is given a memory; an hour on one core
# make test   install what is needed, run the tests
# make mutants  break SAMPLE=300 places of the code, drawn by SEED=1, one at a time: do the tests notice? An hour on 2 cores
SHELL = /bin/bash
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN = .venv/bin

.PHONY: demo needle talk graft test mutants lint compare family recall ablate shakespeare bench ranks clean

# torch first and alone: asked for by another package, a CPU machine would be sent gigabytes of CUDA libraries
.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q "$(TORCH)"
	$(BIN)/pip install -q -e '.[dev,plots]'
	touch $@

demo: .venv/ready
	$(BIN)/python prepare.py stdlib
	$(BIN)/python train.py config/stdlib_cpu.py
	$(BIN)/python plot.py out/stdlib_cpu
	$(BIN)/python sample.py --out_dir=out/stdlib_cpu --prompt="def " --max_new_tokens=600

needle: .venv/ready
	$(BIN)/python prepare.py needle
	$(BIN)/python train.py config/needle_cpu.py
	$(BIN)/python train.py config/needle_gpt_cpu.py
	$(BIN)/python plot.py out/needle_cpu out/needle_gpt_cpu
	$(BIN)/python eval_needle.py --out_dir=out/needle_cpu --baseline=out/needle_gpt_cpu --samples=20 --cell_tokens=65536

# a small GPT-2, trained here, is given a memory: alone, with the memory trained beside it, and with that never written
GRAFT = $(BIN)/python train.py config/finetune_gpt2.py --dataset=stdlib --init_from=out/graft/gpt2 --memory_heads=4 --block_size=512 \
  --gradient_accumulation_steps=1 --carry_state=False --max_iters=300 --eval_interval=300 --eval_iters=40 --log_interval=50 --learning_rate=3e-3
graft: .venv/ready
	$(BIN)/pip install -q -e '.[transformers]'
	$(BIN)/python prepare.py stdlib
	$(BIN)/python train.py config/stdlib_cpu.py --arch=gpt --backbone=gpt2 --bias --batch_size=8 --max_iters=3000 --learning_rate=1e-3 \
	  --eval_interval=500 --eval_iters=40 --out_dir=out/graft/gpt2
	$(BIN)/python examples/gpt2_to_transformers.py out/graft/gpt2
	set -e; for n in 64 256; do seen="--segment_len=$$n --window_len=$$n"; \
	  $(GRAFT) $$seen --out_dir=out/graft/mac-$$n; \
	  $(GRAFT) $$seen --out_dir=out/graft/mac-$$n-never-written --update_memory=False; \
	  $(GRAFT) $$seen --out_dir=out/graft/alone-$$n --arch=mag --memory_layers=none --num_persist_mem=0 --freeze_backbone=False --learning_rate=1e-3; \
	  $(GRAFT) $$seen --out_dir=out/graft/mac-$$n-everything --freeze_backbone=False --learning_rate=1e-3; \
	done
	$(GRAFT) --segment_len=64 --window_len=64 --out_dir=out/graft/mag-64 --arch=mag
	$(GRAFT) --segment_len=64 --window_len=64 --out_dir=out/graft/mal-64 --arch=mal

# told in one conversation, asked in another; then with the memory wiped
SAY = $(BIN)/python sample.py --out_dir=out/talk_cpu --interactive --memory=out/talk_cpu/me.mem --stop='\n' --temperature=0
talk: .venv/ready
	$(BIN)/python prepare.py talk
	$(BIN)/python train.py config/talk_cpu.py
	$(BIN)/python train.py config/talk_gpt_cpu.py
	$(BIN)/python eval_talk.py --out_dir=out/talk_cpu
	$(BIN)/python eval_learning.py --out_dir=out/talk_cpu --baseline=out/talk_gpt_cpu
	printf 'My dog is called Bruno.\nThe code of the garage is 4071.\nMy favourite song is zalima.\n' | $(SAY) --reset_memory
	$(SAY) --interactive=False --learn=README.md
	printf 'What is my dog called?\nWhat is the code of the garage?\nWhat is my favourite song?\nWhat is my cat called?\n' | $(SAY)
	printf 'What is my dog called?\nWhat is the code of the garage?\n' | $(SAY) --reset_memory
	printf '%s\n' 'My dog is called Bruno.' 'I will remember.' 'The code of the garage is 4071.' 'I will remember.' \
	  'A Titans model has three memories: attention over a segment, tokens that are the same for every text, and a network.' 'I see.' \
	  'My favourite song is zalima.' 'I will remember.' 'What is my cat called?' 'I do not know.' \
	  'The grass is green. The sky is blue. Here we go. There and back again.' 'I see.' \
	  'What is my dog called?' 'Your dog is called Bruno.' 'What is my favourite song?' 'Your favourite song is zalima.' > out/talk_cpu/talk.txt
	$(BIN)/python inspect_memory.py --out_dir=out/talk_cpu --text=out/talk_cpu/talk.txt

test: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile
	NANOTITANS_KERNEL=blocks $(BIN)/python -m pytest -n 2 tests/test_model.py -k 'not compiled and not 32k'

# in clones of the last commit under out/mutants, so that this folder stays as it is; what survives is in out/mutants/survivors.diff
mutants: .venv/ready
	$(BIN)/pip install -q -e '.[mutants]'
	$(BIN)/python tests/mutants/run.py --sample=$(or $(SAMPLE),300) --seed=$(or $(SEED),1)

lint: .venv/ready
	$(BIN)/ruff check .

# MAC, the Transformer, and MAC with its memory frozen from the start: 3 seeds, two lengths; an hour on 2 cores when run two at a time
compare: .venv/ready
	$(BIN)/python prepare.py stdlib
	set -e; for shape in "256 4 800" "1024 1 400"; do set -- $$shape; for seed in 1 2 3; do \
	  run="$(BIN)/python train.py config/compare_cpu.py --block_size=$$1 --batch_size=$$2 --max_iters=$$3 --seed=$$seed"; \
	  $$run --out_dir=out/compare/mac-$$1-$$seed; \
	  $$run --out_dir=out/compare/frozen-$$1-$$seed --update_memory=False; \
	  $$run --out_dir=out/compare/gpt-$$1-$$seed --arch=gpt --n_embd=152; \
	done; done
	$(BIN)/python plot.py out/compare/*

# what finding needles needs: the same short training with one thing changed at a time; 40 minutes on one core
ABLATIONS = --seed=1337 --memory_depth=2 --memory_conv=0 --memory_momentum=0.5,--memory_lr=0.6 --num_persist_mem=0 \
  --num_longterm_mem=8 --forget_cost=0 --forget_cost=0,--write_cost=0 --memory_gates=sigmoid,--memory_decay=0.0003
ablate: .venv/ready
	$(BIN)/python prepare.py needle
	set -e; for change in $(ABLATIONS); do out=out/ablate/$$(echo $$change | tr -d -); \
	  $(BIN)/python train.py config/needle_cpu.py --max_iters=500 --out_dir=$$out $$(echo $$change | tr , ' '); \
	  $(BIN)/python eval_needle.py --out_dir=$$out --control=False --lengths=1024,16384 --depths=50 --samples=50 --cell_tokens=262144; \
	done

# every architecture at nearly equal parameters and equal tokens, 3 seeds: text and needles; an hour on one core.
# name:changes:width on text:width on needles. window is attention without memory, lmm-m is lmm with momentum
FAMILY = gpt:--arch=gpt:152:104 window:--arch=mag,--memory_layers=none:152:104 mac:--arch=mac:128:96 mag:--arch=mag:128:96 \
  mal:--arch=mal:128:96 lmm:--arch=lmm:148:108 lmm-m:--arch=lmm,--memory_momentum=0.5,--memory_lr=0.6:148:108 \
  mac-2:--arch=mac,--memory_depth=2:128:96
family: .venv/ready
	$(BIN)/python prepare.py stdlib
	$(BIN)/python prepare.py needle
	set -e; for seed in 1 2 3; do for model in $(FAMILY); do IFS=: read name changes text needle <<< "$$model"; \
	  changes="--seed=$$seed $$(echo $$changes | tr , ' ')"; out=out/family/$$name-$$seed; \
	  $(BIN)/python train.py config/compare_cpu.py --out_dir=$$out/text --n_layer=2 --n_embd=$$text --block_size=256 --batch_size=4 \
	    --max_iters=300 --eval_interval=300 $$changes; \
	  $(BIN)/python train.py config/needle_cpu.py --out_dir=$$out/needle --n_embd=$$needle --max_iters=400 \
	    --eval_interval=400 --cost_from=0.5 $$changes; \
	  $(BIN)/python eval_needle.py --out_dir=$$out/needle --control=False --tasks=pass-key,number --lengths=256,1024,4096 --depths=50 \
	    --samples=50; \
	done; done

# recall of 4 to 32 pairs, three segments back, by every architecture, all 64 wide; 20 minutes on one core
recall: .venv/ready
	$(BIN)/python prepare.py recall
	set -e; for model in $(FAMILY); do IFS=: read name changes _ <<< "$$model"; \
	  $(BIN)/python train.py config/recall_cpu.py --out_dir=out/recall/$$name $$(echo $$changes | tr , ' '); \
	done
	$(BIN)/python eval_recall.py --out_dir=$$(ls -d out/recall/* | paste -sd, -)

# nanoGPT's CPU budget on Tiny Shakespeare (add SOURCE=FILE where there is no network)
shakespeare: .venv/ready
	$(BIN)/python prepare.py shakespeare_char $(if $(SOURCE),--source=$(SOURCE))
	$(BIN)/python train.py config/shakespeare_char_cpu.py
	$(BIN)/python sample.py --out_dir=out/shakespeare_char_cpu --max_new_tokens=500

# speed and memory, everything docs/results.md has of them: some 25 minutes. PEER=--peer=titans-pytorch where that is installed
BENCH = $(BIN)/python bench.py
COMPILED = gpt+compile,mac+compile,mac-2+compile,lmm-2+compile
bench: .venv/ready
	$(BENCH) --measure=train,forward --out_dir=out/bench/S --models=gpt,mac,mac-2,mag-2,mal-2,lmm,lmm-2,$(COMPILED) $(PEER)
	$(BENCH) --measure=train,forward --out_dir=out/bench/M --shape=M --sizes=2x512 --repeats=5 --models=gpt,mac,mac-2,lmm-2,gpt+compile,mac-2+compile $(PEER)
	$(BENCH) --measure=memory --out_dir=out/bench/memory --sizes=4x2048 --models=gpt,mac,mac-2,lmm-2
	$(BENCH) --measure=train,memory --out_dir=out/bench/checkpointed --sizes=4x2048 --models=gpt,mac,mac-2 --checkpoint_segments --repeats=3
	$(BENCH) --measure=train --out_dir=out/bench/length --sizes=1x1024,1x4096,1x8192,1x16384,1x32768 --models=gpt,mac-2,lmm-2 \
	  --repeats=3 --most_seconds=12
	$(BENCH) --measure=stream --out_dir=out/bench/stream --models=gpt,mac,mac-2,lmm-2 --repeats=5

# one run on 1, 2 and 4 processes, replicated and sharded: the same curve; two minutes on two cores
ranks: .venv/ready
	$(BIN)/python prepare.py stdlib
	set -e; export OMP_NUM_THREADS=1; for parallel in ddp fsdp; do for world in 1 2 4; do \
	  $(BIN)/torchrun --standalone --nproc_per_node=$$world train.py config/stdlib_cpu.py --parallel=$$parallel --carry_state \
	    --max_iters=60 --warmup_iters=10 --eval_interval=20 --eval_iters=4 --log_interval=1 --out_dir=out/ranks/$$parallel-$$world; \
	done; done
	$(BIN)/python plot.py out/ranks/*

clean:
	rm -rf .venv out *.egg-info .pytest_cache .ruff_cache
