# Each target makes what it needs: a checkout, Python, pip and make are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := -m pip install --quiet
TORCH := $(shell grep '^torch==' constraints.txt)
# A process for each core, and so a thread of torch for each; a file of tests stays in one. In their order: xdist would
# begin with those of the most tests, and the few that take minutes are in files of a few.
PYTEST := -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder
test slow compat: export OMP_NUM_THREADS := 1

.PHONY: help demo test slow conformance mutants soak lint bench build compat clean
help:
	@echo "make demo     train networks that cannot be differentiated, and see what an override changes"
	@echo "make test     run the tests"
	@echo "make slow     run the cells of that table which make test leaves out"
	@echo "make conformance  each form in each environment, and the page of the documentation that says so"
	@echo "make mutants  planted defects: each must turn a cell of that table red"
	@echo "make soak     100,000 calls and 10,000 overrides: nothing grows"
	@echo "make lint     ruff and mypy"
	@echo "make bench    measure against autograd.Function written by hand"
	@echo "make build    wheel and sdist, tried in an empty environment"
	@echo "make compat   run the tests with the newest torch"
	@echo "make clean    remove everything that make has made"

demo: $(VENV)/.with-demo
	$(BIN)/python -m gradoverride demo

test: $(VENV)/.with-test
	$(BIN)/python $(PYTEST)

slow: $(VENV)/.with-test
	$(BIN)/python $(PYTEST) -m slow tests/conformance

conformance: $(VENV)/.with-test
	$(BIN)/python -m tests.conformance

mutants: $(VENV)/.with-test
	$(BIN)/python tests/conformance/mutants.py

soak: $(VENV)/.with-test
	$(BIN)/python -m pytest -m soak tests/conformance

lint: $(VENV)/.with-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(VENV)/.with-demo
	$(BIN)/python -m benchmarks

# torch comes first and alone: pip then has its version settled before anything that depends on it.
$(VENV)/.with-torch: constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python $(PIP) $(TORCH)
	@touch $@

$(VENV)/.with-%: $(VENV)/.with-torch pyproject.toml
	$(BIN)/python $(PIP) --constraint constraints.txt --editable ".[$*]"
	@touch $@

# -I keeps the checkout off the path, so that what is tried is what was built.
SMOKE := import torch, gradoverride as go; \
	x = torch.tensor([0.4], requires_grad=True); \
	go.straight_through(torch.round)(x).backward(); \
	assert x.grad.item() == 1, x.grad; \
	print('the wheel works')

build: $(VENV)/.with-dev
	rm -rf dist .venv-wheel
	$(BIN)/python -m build
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python $(PIP) $(TORCH)
	.venv-wheel/bin/python $(PIP) --constraint constraints.txt dist/*.whl
	.venv-wheel/bin/python -I -c "$(SMOKE)"
	rm -rf .venv-wheel

compat:
	$(PYTHON) -m venv .venv-compat
	.venv-compat/bin/python $(PIP) --upgrade torch
	.venv-compat/bin/python $(PIP) --upgrade --editable ".[test]"
	.venv-compat/bin/python -c "import torch; print('torch', torch.__version__)"
	.venv-compat/bin/python $(PYTEST)

clean:
	rm -rf $(VENV) .venv-compat .venv-wheel build dist tests/conformance/away/build gradoverride-demo.png
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find gradoverride tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
