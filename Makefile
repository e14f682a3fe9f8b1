# make demo   from nothing to a sample: install, prepare, train on the CPU, plot, sample (about 5 minutes on 2 cores)
# make test   install what is needed, run the tests
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN = .venv/bin

.PHONY: demo test lint clean

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

test: .venv/ready
	$(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check .

clean:
	rm -rf .venv out *.egg-info .pytest_cache .ruff_cache
