# make test: install, lint, types, tests.   make slow: the tests that take longer.   make demo: the whole system here.
# make gpu: what needs a GPU: ranks that share one, over NCCL. With packages of your own, without the network:
# LONGTAKE_TEST_GPU=1 python -m pytest tests/gpu
# make newest: what the newest Triton makes of all kernels.   make oldest: the oldest Transformers, and of its Trainer
# what goes with it. In environments of their own.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TRITON ?= 3.6.0# the PyTorch on PyPI pins one of its own: make test TRITON=3.7.1 for 2.13
NEWEST := .venv-newest
NEWEST_TRITON := 3.9.0
OLDEST := .venv-oldest
OLDEST_VERSIONS := transformers==5.5.0 accelerate==1.12.0 trl==1.16.0 peft==0.18.0
OF_TRANSFORMERS := $(addprefix tests/model/test_,vision.py language.py chat.py official.py) \
	$(addprefix tests/model/test_huggingface,.py _vision.py _data.py _memory.py) tests/train/test_huggingface_trainer.py

.PHONY: test slow gpu lint demo newest oldest clean

test: lint
	$(BIN)/pytest -q -m "not slow"

slow: $(INSTALLED)
	$(BIN)/pytest -q -m slow

gpu: $(INSTALLED)
	LONGTAKE_TEST_GPU=1 $(BIN)/pytest -q tests/gpu

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

demo: $(INSTALLED)
	$(BIN)/longtake demo --ring 2 --ulysses 2

newest: $(NEWEST)/.installed
	$(NEWEST)/bin/longtake bench compiled --check
	$(NEWEST)/bin/longtake bench compiled --check --target sm_80

$(NEWEST)/.installed: $(INSTALLED)
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/pip install --quiet --constraint constraints.txt --editable . triton==$(NEWEST_TRITON)
	@touch $@

oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/pytest -q $(OF_TRANSFORMERS)

$(OLDEST)/.installed: $(INSTALLED)
	$(PYTHON) -m venv $(OLDEST)
	grep -vE '^(transformers|huggingface_hub|tokenizers|accelerate|trl|peft)==' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/pip install --quiet --constraint $(OLDEST)/constraints.txt --editable . pytest hypothesis \
		triton==$(TRITON) $(OLDEST_VERSIONS)
	@touch $@

$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "longtake needs Python 3.11 or later: '$(PYTHON)' not found (make PYTHON=/path/to/python)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "longtake needs Python 3.11 or later, found %d.%d (make PYTHON=/path/to/python)" % v[:2])'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot create virtual environments: install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]' triton==$(TRITON)
	@touch $@

clean:
	rm -rf $(VENV) $(NEWEST) $(OLDEST) build *.egg-info runs
