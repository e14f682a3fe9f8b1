# make demo       from nothing to a sample: install, prepare, train on the CPU, plot, sample (about 5 minutes on 2 cores)
# make needle     needles in haystacks: train a model and a Transformer, draw where each finds them, with and without memory
# make talk       a model to talk to: train it, tell it something, quit, ask it again; what repetition teaches it
# make test       install what is needed, run the tests; make test-fast: without the slow ones, under two minutes
# make lint       ruff, and mypy on the signatures that others call
# make compare, family, recall, states, babi, mqar, mad, equal_time, ablate, graft, bench, ranks   long comparisons: what experiments/NAME.sh says
# make mutants    break SAMPLE=300 places of the code, drawn by SEED=1, one at a time: do the tests notice? An hour on 2 cores
SHELL = /bin/bash
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN = .venv/bin
EXPERIMENTS = compare family recall states babi mqar mad equal_time ablate graft bench ranks

.PHONY: demo needle talk shakespeare test test-fast lint mutants clean $(EXPERIMENTS)

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
	$(BIN)/python train.py config/needle_cpu.py --arch=gpt --n_embd=104 --attn_conv=8 --out_dir=out/needle_gpt_cpu
	$(BIN)/python plot.py out/needle_cpu out/needle_gpt_cpu
	$(BIN)/python eval_needle.py --out_dir=out/needle_cpu --baseline=out/needle_gpt_cpu --samples=20 --cell_tokens=65536

# told in one conversation, asked in another; then with the memory wiped
SAY = $(BIN)/python sample.py --out_dir=out/talk_cpu --interactive --memory=out/talk_cpu/me.mem --stop='\n' --temperature=0
talk: .venv/ready
	$(BIN)/python prepare.py talk
	$(BIN)/python train.py config/talk_cpu.py
	$(BIN)/python train.py config/talk_cpu.py --arch=gpt --n_embd=104 --out_dir=out/talk_gpt_cpu
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

# nanoGPT's CPU budget on Tiny Shakespeare (add SOURCE=FILE where there is no network)
shakespeare: .venv/ready
	$(BIN)/python prepare.py shakespeare_char $(if $(SOURCE),--source=$(SOURCE))
	$(BIN)/python train.py config/shakespeare_char_cpu.py
	$(BIN)/python sample.py --out_dir=out/shakespeare_char_cpu --max_new_tokens=500

$(EXPERIMENTS): .venv/ready
	BIN=$(BIN) experiments/$@.sh

test: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile
	NANOTITANS_KERNEL=blocks $(BIN)/python -m pytest -n 2 tests/test_model.py -k 'not compiled and not 32k'

test-fast: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow'

# in clones of the last commit under out/mutants, so that this folder stays as it is; what survives is in out/mutants/survivors.diff
mutants: .venv/ready
	$(BIN)/pip install -q -e '.[mutants]'
	$(BIN)/python tests/mutants/run.py --sample=$(or $(SAMPLE),300) --seed=$(or $(SEED),1)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv out *.egg-info .pytest_cache .ruff_cache
