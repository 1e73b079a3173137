# make demo: sample from the shipped model, train on the machine at hand, sample with and without the sampler head;
# make test: check the style and run the tests; make test-all: the slow ones too; make coverage: branches not tested
PYTHON ?= python3
BIN := .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-all coverage clean

demo: .venv/ready
	test -f out-char-diffusion/ckpt.pt || $(BIN)/python sample_simple.py --num-samples 2 --no-progress
	test -f out-char-diffusion/ckpt.pt || $(BIN)/python train.py config/train_char_diffusion_sampler.py
	$(BIN)/python sample_simple.py --num-samples 3 --disable-sampler --no-progress
	$(BIN)/python sample_simple.py --num-samples 3 --no-progress

test: .venv/ready-dev
	$(BIN)/python -m ruff check
	$(BIN)/python -m pytest -n auto

test-all: .venv/ready-dev
	$(BIN)/python -m pytest -n auto -m "slow or not slow"

coverage: .venv/ready-dev
	$(BIN)/python -m pytest -n auto --cov --cov-report=term-missing:skip-covered

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-cache-dir -r requirements.txt
	touch $@

.venv/ready-dev: requirements-dev.txt .venv/ready
	$(BIN)/python -m pip install --quiet --no-cache-dir -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv .cache
